"""The pretraining loop: any method, exact resume, a line of history for every step."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import config, losses, runs
from .augment import augment
from .config import Settings
from .data.store import Store
from .lars import LARS, cosine, parameter_groups, set_learning_rates
from .model import MultimodalModel
from .pairs import PAIRS, Modality

VIEWS = ((0, "a"), (1, "a"), (0, "b"), (1, "b"))


class Interrupted(RuntimeError):
    """The run was told to stop; its checkpoint is written and the same call resumes it."""


class NonFinite(RuntimeError):
    """A loss term became NaN or infinite; the message names the step, the term and the last good checkpoint."""


def seeded(*parts) -> torch.Generator:
    """A generator that depends on ``parts`` alone, so that a resumed run draws what an uninterrupted one draws."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _loss(settings: Settings, model: MultimodalModel, views: dict) -> dict[str, Tensor]:
    """Named loss terms of one batch of views; ``total`` is what is minimised."""
    z = {(m, v): model.embed(m + 1, x).float() for (m, v), x in views.items()}
    if settings.method == "barlow_twins":
        return {"total": losses.barlow_twins(z[0, "a"], z[1, "a"], lambd=settings.lambd)}
    four = (z[0, "a"], z[0, "b"], z[1, "a"], z[1, "b"])
    return losses.decur(*four, dim_common=settings.dim_common, lambd=settings.lambd)._asdict()


def _views(settings: Settings) -> tuple:
    """The views that the method's loss looks at: cross-modal Barlow Twins needs one of each modality."""
    return VIEWS[:2] if settings.method == "barlow_twins" else VIEWS


class _Batches(torch.utils.data.Dataset):
    """Item i is batch i of the whole run: for each view, uint8 N x C x H x W straight from the store.

    Which samples and seasons it holds follows from the seed, the epoch and the position alone.
    """

    def __init__(self, settings: Settings, store: Store, steps: range):
        self.settings, self.store, self.steps = settings, store, steps
        self.per_epoch = len(store) // settings.batch_size
        self._epoch = -1

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, item: int) -> dict:
        epoch, position = divmod(self.steps[item], self.per_epoch)
        if epoch != self._epoch:
            n, seed = len(self.store), self.settings.seed
            self._order = torch.randperm(n, generator=seeded(seed, "order", epoch)).tolist()
            seasons = torch.randint(self.store.seasons, (n, len(VIEWS)), generator=seeded(seed, "seasons", epoch))
            self._seasons, self._epoch = seasons.tolist(), epoch
        size = self.settings.batch_size
        chosen = self._order[position * size : (position + 1) * size]
        names = [m.name for m in PAIRS[self.settings.pair]]
        batch = {}
        for k, (m, v) in enumerate(_views(self.settings)):
            images = np.empty((size, *self.store.shapes[names[m]]), np.uint8)
            for row, i in enumerate(chosen):
                images[row] = self.store.read(i, names[m], self._seasons[i][k])
            batch[m, v] = torch.from_numpy(images)
        return batch


def _loader(settings: Settings, store: Store, steps: range, device: torch.device) -> Iterator[dict]:
    return torch.utils.data.DataLoader(
        _Batches(settings, store, steps),
        batch_size=None,  # an item is a batch already
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if settings.workers else None,
    )


def device_of(settings: Settings) -> torch.device:
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise config.ConfigError("device = 'cuda', but torch sees no GPU; use device: auto or cpu")
    return torch.device("cuda" if available and settings.device != "cpu" else "cpu")


def _optimizer(settings: Settings, model: MultimodalModel) -> torch.optim.Optimizer:
    groups = parameter_groups(model, lr=settings.learning_rate, lr_biases=settings.learning_rate_biases)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return LARS(
        groups,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        trust_coefficient=settings.trust_coefficient,
    )


@contextlib.contextmanager
def _stop_signals():
    """A list that fills with SIGTERM, SIGUSR1 and SIGINT, which would otherwise end the run in the middle of a step."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {n: signal.signal(n, lambda number, frame: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def _save(state: dict, file: Path) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"))


def _newest(folder: Path, identity: dict) -> dict | None:
    """The newest readable checkpoint's content; a damaged one is reported and the one before is used."""
    for file in reversed(_checkpoints(folder)):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a torn file
            print(f"{file.name} cannot be read ({type(error).__name__}: {error}); trying the one before")
            continue
        _same_settings(state["settings"], identity, folder)
        return state
    return None


def _same_settings(found: dict, wanted: dict, folder: Path) -> None:
    missing = object()
    names = [k for k in {**found, **wanted} if found.get(k, missing) != wanted.get(k, missing)]
    if names:
        listed = "; ".join(f"{k}: {found.get(k, 'absent')} there, {wanted.get(k, 'absent')} now" for k in names)
        raise config.ConfigError(
            f"{folder} holds a run with other settings ({listed}). Use those settings, give this run another `name`,"
            " or remove the folder."
        )


def _check_store(settings: Settings, store: Store) -> None:
    for modality in PAIRS[settings.pair]:
        found = store.meta["preprocessing"].get(modality.name)
        if found != modality.preprocessing.to_dict():
            raise config.ConfigError(
                f"{store.path}: {modality.name} was converted with another preprocessing ({found});"
                f" pair {settings.pair!r} needs {modality.preprocessing.to_dict()}. Convert the data again."
            )
    if len(store) < settings.batch_size:
        raise config.ConfigError(
            f"batch_size = {settings.batch_size}, but {store.path} holds {len(store)} pairs; allowed: 2 to {len(store)}"
        )


def run(settings: Settings, store_path: Path | str) -> Path:
    """Pretrain, go on with an interrupted run, or find the finished one: the same call does whichever is needed.

    ``store_path``: a finished store with the pair's two modalities. Returns the run's folder, which holds
    ``history.jsonl`` (a line per step with every loss term), the last two checkpoints and ``final.pt``. On a CPU, or
    one GPU in deterministic mode, an interrupted and resumed run ends with the same bits as an uninterrupted one.
    Raises ``ConfigError`` (settings), ``Interrupted`` (after SIGTERM, SIGUSR1, SIGINT) and ``NonFinite`` (loss).
    """
    folder = runs.path(settings, "pretrain", runs.title(settings))
    store = Store(store_path)
    with runs.locked(folder):
        config.check_world_size(settings, 1)
        _check_store(settings, store)
        identity = {**config.identity(settings), "data.pairs": len(store)}
        if (folder / "final.pt").exists():
            _same_settings(torch.load(folder / "final.pt", weights_only=True)["settings"], identity, folder)
            return folder
        _train(settings, store, folder, identity)
    return folder


def run_members(settings: Settings, store_path: Path | str) -> dict[str, Path]:
    """``run`` for every member of the profile's ``sweep``, one after the other: run label to folder."""
    return {runs.label(member): run(member, store_path) for member in config.members(settings)}


def example_views(store: Store, modality: Modality, size: int, *, count: int = 8) -> np.ndarray:
    """Random views of a store's first pair, first season, as pretraining sees them: count x C x size x size."""
    image = torch.from_numpy(store.read(0, modality.name, 0).copy())
    policy = dataclasses.replace(modality.views, size=size)
    return augment(image.expand(count, *image.shape), policy, generator=seeded("example", modality.name)).numpy()


def _train(settings: Settings, store: Store, folder: Path, identity: dict) -> None:
    device = device_of(settings)
    pair = PAIRS[settings.pair]
    policies = [dataclasses.replace(m.views, size=settings.crop_size) for m in pair]
    torch.manual_seed(settings.seed)
    model = MultimodalModel(settings.backbone, [m.channels for m in pair], settings.projector)
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = _optimizer(settings, model)
    total = 0 if settings.method == "random" else settings.epochs * (len(store) // settings.batch_size)
    state = _newest(folder, identity)
    start = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"{folder.name}: resumes after step {start} of {total}")
    _keep_history(folder, start)
    runs.write_json(folder / "run.json", {"settings": config.to_dict(settings), "provenance": runs.provenance()})

    def state_at(step: int) -> dict:
        preprocessing = {m.name: m.preprocessing.to_dict() for m in pair}
        return {"model": model.state_dict(), "step": step, "settings": identity, "preprocessing": preprocessing}

    def checkpoint(step: int) -> None:
        try:
            _save({**state_at(step), "optimizer": optimizer.state_dict()}, folder / f"checkpoint-{step:09d}.pt")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            print(f"step {step}: checkpoint not written ({error}); the run goes on with the one before")
            return
        for old in _checkpoints(folder)[:-2]:
            old.unlink()

    pending: list[tuple[int, float, Tensor]] = []
    # On CPUs bfloat16 is emulated and many times slower than float32.
    auto = "bfloat16" if device.type == "cuda" else "float32"
    low = (auto if settings.precision == "auto" else settings.precision) == "bfloat16"
    with _stop_signals() as received, open(folder / "history.jsonl", "a") as history:
        bar = runs.progress(
            _loader(settings, store, range(start, total), device), initial=start, total=total, desc=folder.name
        )
        began = time.perf_counter()
        for step, batch in enumerate(bar, start=start + 1):
            views = {
                (m, v): augment(
                    images.to(device, non_blocking=True),
                    policies[m],
                    generator=seeded(settings.seed, "views", step, m, v),
                ).contiguous(memory_format=torch.channels_last)
                for (m, v), images in batch.items()
            }
            share = cosine(step - 1, total)
            set_learning_rates(optimizer, share)
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                terms = _loss(settings, model, views)
            optimizer.zero_grad(set_to_none=True)
            terms["total"].backward()
            optimizer.step()

            # The terms stay on the device until the next line of the log, so that no step waits for the one before.
            pending.append((step, share, torch.stack([t.detach() for t in terms.values()])))
            due = step % settings.checkpoint_steps == 0 or step == total or bool(received)
            if due or step % settings.log_steps == 0:
                rate = len(pending) * settings.batch_size / (time.perf_counter() - began)
                last = _write_history(history, pending, list(terms), folder, settings, rate)
                bar.set_postfix_str(f"loss {last:.4g}, {rate:.0f} pairs/s", refresh=False)
                pending, began = [], time.perf_counter()
            if due and step < total:
                checkpoint(step)
            if received and step < total:
                name = signal.Signals(received[0]).name
                raise Interrupted(
                    f"{folder.name}: stopped by {name} after step {step} of {total}; the same call resumes"
                )
    _save(state_at(total), folder / "final.pt")
    for file in _checkpoints(folder):
        file.unlink()


def _write_history(file, pending, names, folder: Path, settings: Settings, rate: float) -> float:
    """Append the pending steps' lines, after making sure that every term is a number; returns the last total."""
    values = torch.stack([v for _, _, v in pending]).cpu().double().tolist()
    for (step, share, _), row in zip(pending, values, strict=True):
        terms = dict(zip(names, row, strict=True))
        for name, value in terms.items():
            if not math.isfinite(value):
                good = [f.name for f in _checkpoints(folder)]
                raise NonFinite(
                    f"{folder.name}: loss term {name!r} is {value} at step {step}; last good checkpoint:"
                    f" {good[-1] if good else 'none'}. Lower learning_rate, or look at the images of that step."
                )
        rates = {"learning_rate": share * settings.learning_rate, "pairs_per_second": round(rate, 2)}
        file.write(json.dumps({"step": step, **rates, **terms}) + "\n")
    file.flush()
    return values[-1][0]


def _keep_history(folder: Path, start: int) -> None:
    """Cut lines of steps that are about to be computed again, so that each step has one line."""
    kept = [line for line in runs.read_history(folder) if line["step"] <= start]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    temporary = folder / f".history.jsonl.{os.getpid()}"
    temporary.write_text(text)
    os.replace(temporary, folder / "history.jsonl")

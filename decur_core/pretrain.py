"""The pretraining loop: any method, any number of processes, exact resume, a line of history for every step.

``python -m decur_core.pretrain PROFILE`` is one process of a run over several nodes under ``torchrun``.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from decur_core import backbones, config, losses
from decur_core import model as models
from decur_core.config import Settings
from decur_core.data.modality import PAIRS, Modality
from decur_core.data.raster import DataError
from decur_core.data.store import Store
from decur_core.lars import LARS, cosine, parameter_groups, set_learning_rates
from decur_core.running import checkpoints
from decur_core.running import folders as runs
from decur_core.running import processes as distributed

VIEWS = ((0, "a"), (1, "a"), (0, "b"), (1, "b"))
AGAIN = "if it is removed, the same call trains again"


class Interrupted(RuntimeError):
    """What ran was told to stop, at a place from which the same call goes on."""


class NonFinite(RuntimeError):
    """A loss became NaN or infinite; the message says where, and what to do."""


def seeded(*parts) -> torch.Generator:
    """A generator that depends on ``parts`` alone, so that a resumed run draws what an uninterrupted one draws."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _loss(settings: Settings, model: nn.Module, views: dict) -> dict[str, Tensor]:
    """Named loss terms of one batch of views, over all processes; ``total`` is what is minimised."""
    z = model(*(views.get((m, v)) for m in (0, 1) for v in "ab"))
    z = [None if x is None else distributed.gather(x) for x in z]
    seen = [x for x in z if x is not None]
    options = {"lambd": settings.lambd, "squares": distributed.squares}
    match settings.method:
        case "barlow_twins" | "barlow_twins_single":
            return {"total": losses.barlow_twins(*seen, **options)}
        case "vicreg":
            return losses.vicreg(*seen, squares=distributed.squares)._asdict()
        case "simclr":
            return losses.simclr(*seen, temperature=settings.temperature)._asdict()
        case "clip":
            scale = getattr(model, "module", model).scale()
            return losses.clip(*seen, scale=scale)._asdict() | {"scale": scale}
    dim_common = settings.dim_common if settings.decoupling else seen[0].shape[1]
    return losses.decur(*z, dim_common=dim_common, **options)._asdict()


def _views(settings: Settings) -> list[tuple[int, str]]:
    """The views that the method's loss looks at: most need one of each modality, intra-modal terms need two."""
    names, trained = config.MODALITIES[settings.pair], runs.trained(settings)
    two = settings.method == "barlow_twins_single" or (settings.method == "decur" and settings.intra)
    return [(m, v) for m, v in VIEWS if names[m] in trained and (two or v == "a")]


def _model(settings: Settings) -> models.MultimodalModel:
    """The model of a run at its start; what the method does not train takes no gradient."""
    model = models.build(config.identity(settings), [m.channels for m in PAIRS[settings.pair]])
    if settings.method == "barlow_twins_single":
        model.requires_grad_(False)
        for part in ("backbone", "projector"):
            getattr(model, f"{part}_{settings.single}").requires_grad_(True)
    return model


def _batches(settings: Settings, store: Store, steps: range, device: torch.device) -> Iterator[dict]:
    """The batches of ``steps`` in order: for each view, uint8 n x C x H x W straight from the store.

    Which samples and seasons they hold follows from seed, epoch and position alone; a process reads its own rows.
    ``workers`` threads copy a few batches ahead. Copying lets go of the interpreter, so they get by without processes,
    which would have to hand every batch over through fresh shared memory.
    """
    rank, world = distributed.place()
    size, per_epoch = settings.batch_size // world, len(store) // settings.batch_size
    names = [m.name for m in PAIRS[settings.pair]]

    @functools.lru_cache(2)
    def drawn(epoch: int) -> tuple[list, list]:
        order = torch.randperm(len(store), generator=seeded(settings.seed, "order", epoch))
        shape = (len(store), len(VIEWS))
        seasons = torch.randint(store.seasons, shape, generator=seeded(settings.seed, "seasons", epoch))
        return order.tolist(), seasons.tolist()

    def read(step: int) -> dict:
        epoch, position = divmod(step, per_epoch)
        order, seasons = drawn(epoch)
        first = position * settings.batch_size + rank * size
        batch = {}
        for m, v in _views(settings):
            shape = (size, *store.shapes[names[m]])
            batch[m, v] = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
            images = batch[m, v].numpy()
            for row, i in enumerate(order[first : first + size]):
                images[row] = store.read(i, names[m], seasons[i][VIEWS.index((m, v))])
        return batch

    if not settings.workers:
        yield from map(read, steps)
        return
    pool, ahead = ThreadPoolExecutor(settings.workers), deque()
    try:
        for step in steps:
            ahead.append(pool.submit(read, step))
            if len(ahead) > 2 * settings.workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def device_of(settings: Settings) -> torch.device:
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise config.ConfigError("device = 'cuda', but torch sees no GPU; use device: auto or cpu")
    return torch.device("cuda" if available and settings.device != "cpu" else "cpu")


def _processes(settings: Settings) -> int:
    """How many processes of this node a run takes: what is asked for, or one for every GPU that torch sees."""
    gpus = torch.cuda.device_count() if device_of(settings).type == "cuda" else 0
    if gpus and settings.processes > gpus:
        raise config.ConfigError(f"processes = {settings.processes}, but torch sees {gpus} GPUs; 0 takes all of them")
    return settings.processes or gpus or 1 if runs.trained(settings) else 1


def _optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, lr=settings.learning_rate, lr_biases=settings.learning_rate_biases)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    more = {"momentum": settings.momentum, "trust_coefficient": settings.trust_coefficient}
    return LARS(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, **more)


def _check(settings: Settings, store: Store) -> None:
    config.check_dim_common(settings, [*backbones.widths(settings.backbone), *settings.projector][-1])
    store.check({m.name: m.preprocessing.to_dict() for m in PAIRS[settings.pair]})
    if len(store) < settings.batch_size:
        raise config.ConfigError(
            f"batch_size = {settings.batch_size}, but {store.path} holds {len(store)} pairs; allowed: 2 to {len(store)}"
        )


def run(settings: Settings, store_path: Path | str) -> Path:
    """Pretrain, go on with an interrupted run, or find the finished one: the same call does whichever is needed.

    ``store_path``: a finished store with the pair's two modalities. Returns the run's folder, which holds
    ``history.jsonl`` (a line per step with every loss term), the last two checkpoints and ``final.pt``. On a CPU, or
    one GPU in deterministic mode, an interrupted and resumed run ends with the same bits as an uninterrupted one.
    Several processes (setting ``processes``) are started here and followed; inside ``distributed.joined`` the call is
    one of them. Their number may change from one call to the next.
    Raises ``ConfigError`` (settings), ``Interrupted`` (after SIGTERM, SIGUSR1, SIGINT), ``NonFinite`` (loss) and
    ``OSError`` (a damaged ``final.pt``, or no room for one; for want of room for a checkpoint a run does not stop).
    """
    folder = runs.path(settings, "pretrain", runs.title(settings))
    store, (rank, world), joined = Store(store_path), distributed.place(), torch.distributed.is_initialized()
    ended = (folder / "final.pt").exists()  # such a run is only read, maybe on a disk where nothing can be written
    with runs.locked(folder) if rank == 0 and not ended else contextlib.nullcontext():
        world = world if joined else _processes(settings)
        config.check_world_size(settings, world)
        _check(settings, store)
        about = {"data.pairs": len(store), "data.sha256": store.sha256}
        identity = {**config.identity(settings), **about}
        total = settings.epochs * (len(store) // settings.batch_size) if runs.trained(settings) else 0
        if distributed.largest((folder / "final.pt").exists()):
            checkpoints.same_settings(checkpoints.load(folder / "final.pt", AGAIN)["settings"], identity, folder)
        elif joined or world == 1:
            _train(settings, store, folder, identity, total)
        else:
            _launch(world, settings, store, folder, identity, total)
        if rank == 0:
            checkpoints.remove(folder)  # here, as a process may be killed after final.pt and before this
    return folder


def _launch(world: int, settings: Settings, store: Store, folder: Path, identity: dict, total: int) -> None:
    """Train in ``world`` processes of this machine; meanwhile show their progress and pass signals on."""
    with runs.stop_signals() as received, runs.progress(None, total=total, desc=folder.name) as bar:

        def tick() -> int:
            with contextlib.suppress(OSError, IndexError, json.JSONDecodeError), open(folder / "history.jsonl") as file:
                file.seek(max(0, os.stat(file.fileno()).st_size - 2000))
                line = json.loads(file.read().splitlines()[-1])
                bar.set_postfix_str(f"loss {line['total']:.4g}, {line['pairs_per_second']:.0f} pairs/s", refresh=False)
                bar.update(line["step"] - bar.n)
            return received[0] if received else 0

        try:
            options = {"device": device_of(settings), "processes": world, "tick": tick}
            distributed.launch(_train, settings, store, folder, identity, total, **options)
        except Exception as error:
            if not received or type(error) is not RuntimeError:
                raise
            when = f"after step {bar.n}" if bar.n else "before the first step"
            raise Interrupted(f"{folder.name}: a signal came {when} ({error}); the same call resumes") from error
        tick()


def run_members(settings: Settings, store_path: Path | str, *, shard: tuple[int, int] = (0, 1)) -> dict[str, Path]:
    """``run`` for every member of the profile's ``sweep``, one after the other: run label to folder.

    ``shard`` (i, n): only the i-th member and every n-th after it, so that n jobs share the work.
    Raises what ``run`` raises; ``Interrupted`` also where a signal came too late for a member to stop at.
    """
    config.check_shard(*shard)
    members, folders = config.members(settings)[shard[0] :: shard[1]], {}
    with runs.stop_signals() as received:
        for member in [*members, None]:
            if asked := distributed.largest(received[0] if received else 0):
                state = f"{len(folders)} of {len(members)} runs are finished"
                raise Interrupted(f"{signal.Signals(asked).name}: {state}; the same call finds them and goes on")
            if member:
                folders[runs.label(member)] = run(member, store_path)
    return folders


def example_views(store: Store, modality: Modality, size: int, *, count: int = 8) -> np.ndarray:
    """Random views of a store's first pair, first season, as pretraining sees them: count x C x size x size."""
    image = torch.from_numpy(store.read(0, modality.name, 0).copy())
    generator = seeded("example", modality.name)
    return modality.view(image.expand(count, *image.shape), size=size, generator=generator).numpy()


def _train(settings: Settings, store: Store, folder: Path, identity: dict, total: int) -> None:
    device, (rank, world) = device_of(settings), distributed.place()
    pair = PAIRS[settings.pair]
    torch.manual_seed(settings.seed)
    model = _model(settings).to(device, memory_format=torch.channels_last).train()
    if settings.compile != "off":
        # The backbones alone: what follows them synchronises between processes, where a graph would break.
        for backbone in (model.backbone_1, model.backbone_2):
            backbone.compile(mode=settings.compile)
    optimizer = _optimizer(settings, model)
    state = checkpoints.newest(folder, identity)
    start = state["step"] if state else 0
    if distributed.largest(start) != start:
        raise RuntimeError(f"{folder}: processes find different checkpoints; all nodes must see the same files there")
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    replica = distributed.replicate(model, device)
    if rank == 0:
        if state:
            print(f"{folder.name}: resumes after step {start} of {total}")
        runs.remove_torn(folder)
        _keep_history(folder, start)
        about = {"settings": config.to_dict(settings), "trained": runs.trained(settings), "processes": world}
        runs.write_json(folder / "run.json", about | {"provenance": runs.provenance()})

    def state_at(step: int) -> dict:
        about = {"settings": identity, "trained": runs.trained(settings)}
        about["preprocessing"] = {m.name: m.preprocessing.to_dict() for m in pair}
        return {"model": model.state_dict(), "step": step, **about}

    def checkpoint(step: int) -> None:
        state = {**state_at(step), "optimizer": optimizer.state_dict()}
        if checkpoints.save_or_say(state, folder / f"checkpoint-{step:09d}.pt", f"step {step}"):
            for old in checkpoints.files(folder)[:-2]:
                old.unlink()

    pending: list[tuple[int, float, Tensor]] = []
    # On CPUs bfloat16 is emulated and many times slower than float32.
    auto = "bfloat16" if device.type == "cuda" else "float32"
    low = (auto if settings.precision == "auto" else settings.precision) == "bfloat16"
    with runs.stop_signals() as received, open(os.devnull if rank else folder / "history.jsonl", "a") as history:
        batches = _batches(settings, store, range(start, total), device)
        options = {"initial": start, "total": total, "disable": rank > 0 or distributed.followed}
        bar = runs.progress(batches, desc=folder.name, **options)
        began = time.perf_counter()
        for step, batch in enumerate(bar, start=start + 1):
            torch.manual_seed(seeded(settings.seed, "layers", step, rank).initial_seed())  # for layers that draw
            views = {}
            for (m, v), images in batch.items():
                options = {"generator": seeded(settings.seed, "views", step, m, v), "part": (rank, world)}
                images = images.to(device, non_blocking=True)
                views[m, v] = pair[m].view(images, size=settings.crop_size, **options)
            share = cosine(step - 1, total)
            set_learning_rates(optimizer, share)
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                terms = _loss(settings, replica, views)
            optimizer.zero_grad(set_to_none=True)
            terms["total"].backward()
            optimizer.step()

            # The terms stay on the device until the next line of the log, so that no step waits for the one before.
            pending.append((step, share, torch.stack([t.detach() for t in terms.values()])))
            asked = distributed.largest(received[0] if received else distributed.asked.value)
            due = step % settings.checkpoint_steps == 0 or step == total or bool(asked)
            if due or step % settings.log_steps == 0:
                rate = len(pending) * settings.batch_size / (time.perf_counter() - began)
                last = _write_history(history, pending, list(terms), folder, settings, rate)
                bar.set_postfix_str(f"loss {last:.4g}, {rate:.0f} pairs/s", refresh=False)
                pending, began = [], time.perf_counter()
            if due and step < total and rank == 0:
                checkpoint(step)
            if asked and step < total:
                distributed.largest()  # a process that ends before the checkpoint is written ends them all
                name = signal.Signals(asked).name
                raise Interrupted(f"{folder.name}: {name} after step {step} of {total}; the same call resumes")
        if rank == 0:
            checkpoints.save(state_at(total), folder / "final.pt")
    distributed.largest()


def _write_history(file, pending, names, folder: Path, settings: Settings, rate: float) -> float:
    """Append the pending steps' lines, after making sure that every term is a number; returns the last total."""
    values = torch.stack([v for _, _, v in pending]).cpu().double().tolist()
    for (step, share, _), row in zip(pending, values, strict=True):
        terms = dict(zip(names, row, strict=True))
        if bad := ", ".join(f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)):
            good = [f.name for f in checkpoints.files(folder)]
            raise NonFinite(
                f"{folder.name}: loss terms {bad} at step {step}; last good checkpoint: {good[-1] if good else 'none'}."
                " Lower learning_rate, or look at the images of that step."
            )
        rates = {"learning_rate": share * settings.learning_rate, "pairs_per_second": round(rate, 2)}
        file.write(json.dumps({"step": step, **rates, **terms}) + "\n")
    file.flush()
    return values[-1][0]


def _keep_history(folder: Path, start: int) -> None:
    """Cut lines of steps that are about to be computed again, so that each step has one line."""
    kept = [line for line in runs.read_history(folder) if line["step"] <= start]
    runs.write_text(folder / "history.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with a message for settings that cannot be used, and after a signal."""
    from decur_core.data import prepare

    parser = argparse.ArgumentParser(prog="python -m decur_core.pretrain", description="Pretrain, without a notebook.")
    parser.add_argument("profile", help="a file in notebooks/profiles, without .yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. epochs=5")
    config.add_shard(parser, "train only member I of the sweep and every N-th after it, for job arrays")
    args = parser.parse_args(argv)
    try:
        settings = config.load(args.profile, config.overrides(args.set))
        with distributed.joined(device_of(settings)) if "RANK" in os.environ else contextlib.nullcontext():
            if distributed.place()[0] == 0:
                prepare.pretraining_store(settings)  # the others find it finished
            distributed.largest()
            run_members(settings, prepare.pretraining_store(settings), shard=args.shard)
    except (config.ConfigError, DataError, Interrupted, NonFinite, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    from decur_core import pretrain  # this copy of the module has another name in the processes it starts

    pretrain.main()

"""The pretraining loop: any method, any number of processes, exact resume, a line of history for every step.

``python -m decur_core.pretrain PROFILE`` is one process of a run over several nodes under ``torchrun``.
"""

import argparse
import contextlib
import math
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from decur_core import backbones, config
from decur_core import model as models
from decur_core.config import Settings
from decur_core.data.batches import batches, example_views, seeded  # noqa: F401
from decur_core.data.modality import Modality
from decur_core.data.raster import DataError
from decur_core.data.store import Store
from decur_core.lars import LARS, cosine, parameter_groups, set_learning_rates
from decur_core.losses import METHODS
from decur_core.running import checkpoints, history, memory, processes
from decur_core.running import folders as runs
from decur_core.running.history import NonFinite

AGAIN = "if it is removed, the same call trains again"
ESTIMATED = 4096  # pairs, at most (or one batch), from which the split into common and unique dimensions is estimated


class Interrupted(RuntimeError):
    """What ran was told to stop, at a place from which the same call goes on."""


# One step: bytes to views, views to embeddings, embeddings to a loss, a loss to weights.


def views(settings: Settings, modalities: Sequence[Modality], batch: Mapping, step: int, part=(0, 1)) -> dict:
    """The views of a step, float N x C x S x S on the images' device: modality -> (first, second or None).

    ``batch``: of ``batches``; ``part``: this process's number and how many share the batch.
    """
    made = {}
    for m in modalities:
        draws = [seeded(settings.seed, "views", step, m.name, v) for v in "ab"]
        made[m.name] = tuple(
            None if images is None else m.view(images, generator=draw, size=settings.crop_size, part=part)
            for images, draw in zip(batch[m.name], draws, strict=True)
        )
    return made


def loss(settings: Settings, model: nn.Module, views: Mapping) -> dict[str, Tensor]:
    """Named loss terms of one batch of views, over all processes; ``total`` is what is minimised."""
    z = {m: tuple(x if x is None else processes.gather(x) for x in both) for m, both in model(views).items()}
    method, plain = METHODS[settings.method], getattr(model, "module", model)
    scale = plain.scale() if method.scaled else None
    return method.loss(z, settings, squares=processes.squares, scale=scale)


def train_step(
    settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer, views: Mapping, share: float
) -> dict[str, Tensor]:
    """One update of the weights from one batch of views; ``share``: of the starting rates. Returns the loss terms."""
    device = next(model.parameters()).device
    with autocast(settings, device):
        terms = loss(settings, model, views)
    set_learning_rates(optimizer, share)
    optimizer.zero_grad(set_to_none=True)
    terms["total"].backward()
    optimizer.step()
    return terms


# What a step is given.


def modalities(settings: Settings, store: Store) -> list[Modality]:
    """The modalities that a run trains, with the 8-bit mapping of the store's images."""
    trained, mappings = runs.trained(settings), store.meta["preprocessing"]
    return [m.mapped(mappings[m.name]) for m in config.modalities(settings) if m.name in trained]


def network(settings: Settings, channels: Mapping[str, int]) -> models.MultimodalModel:
    """The model of a run at its start (``channels``: of every modality of the pair); what the method does not train
    takes no gradient."""
    torch.manual_seed(settings.seed)
    model = models.build(config.identity(settings), channels)
    trained = runs.trained(settings) or list(channels)
    for name in sorted(channels, key=trained.__contains__):  # the trained last: they may share a projector with others
        model.backbones[name].requires_grad_(name in trained)
        model.projectors[name].requires_grad_(name in trained)
    return model


def optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """Of all weights that take gradients; biases and normalisation have a rate of their own and, in LARS, no decay."""
    groups = parameter_groups(model, lr=settings.learning_rate, lr_biases=settings.learning_rate_biases)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    more = {"momentum": settings.momentum, "trust_coefficient": settings.trust_coefficient}
    return LARS(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, **more)


def device_of(settings: Settings) -> torch.device:
    """Where a run computes."""
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise config.ConfigError("device = 'cuda', but torch sees no GPU; use device: auto or cpu")
    return torch.device("cuda" if available and settings.device != "cpu" else "cpu")


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """For networks that train. auto: bfloat16 on GPUs and CPUs with AMX; others emulate it, many times slower."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    low = settings.precision == "bfloat16" or settings.precision == "auto" and fast
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


# A run: many steps that survive whatever ends them.


def _processes(settings: Settings) -> int:
    """How many processes of this node a run takes: what is asked for, or one for every GPU that torch sees."""
    gpus = torch.cuda.device_count() if device_of(settings).type == "cuda" else 0
    if gpus and settings.processes > gpus:
        raise config.ConfigError(f"processes = {settings.processes}, but torch sees {gpus} GPUs; 0 takes all of them")
    return settings.processes or gpus or 1 if runs.trained(settings) else 1


def _check(settings: Settings, store: Store) -> None:
    config.check_dim_common(settings, [*backbones.widths(settings.backbone), *settings.projector][-1])
    if missing := [m.name for m in config.modalities(settings) if m.name not in store.shapes]:
        found = f"{store.path}: holds no {missing[0]}, only {', '.join(store.shapes)}"
        raise config.ConfigError(f"{found}; convert a data set of pair {settings.pair!r}")
    store.check({m.name: m.mapping() for m in config.modalities(settings)})
    if len(store) < settings.batch_size:
        raise config.ConfigError(
            f"batch_size = {settings.batch_size}, but {store.path} holds {len(store)} pairs; allowed: 2 to {len(store)}"
        )


def run(settings: Settings, store_path: Path | str) -> Path:
    """Pretrain, go on with an interrupted run, or find the finished one: the same call does whichever is needed.

    ``store_path``: a finished store with the pair's modalities. Returns the run's folder, which holds
    ``history.jsonl`` (a line per step with every loss term), the last two checkpoints and ``final.pt``. On a CPU, or
    one GPU in deterministic mode, an interrupted and resumed run ends with the same bits as an uninterrupted one.
    Several processes (setting ``processes``) are started here and followed; inside ``processes.joined`` the call is
    one of them. Their number may change from one call to the next.
    Raises ``ConfigError`` (settings), ``Interrupted`` (after SIGTERM, SIGUSR1, SIGINT), ``NonFinite`` (loss, weights),
    ``OSError`` (a damaged ``final.pt``, no room for it or the history; without room for a checkpoint a run goes on).
    """
    folder = runs.path(settings, "pretrain", runs.title(settings))
    store, (rank, world), joined = Store(store_path), processes.place(), torch.distributed.is_initialized()
    ended = (folder / "final.pt").exists()  # such a run is only read, maybe on a disk where nothing can be written
    with runs.locked(folder) if rank == 0 and not ended else contextlib.nullcontext():
        world = world if joined else _processes(settings)
        config.check_world_size(settings, world)
        _check(settings, store)
        identity = {**config.identity(settings), "data.pairs": len(store), "data.sha256": store.sha256}
        total = settings.epochs * (len(store) // settings.batch_size) if runs.trained(settings) else 0
        if processes.largest((folder / "final.pt").exists()):
            checkpoints.same_settings(checkpoints.load(folder / "final.pt", AGAIN)["settings"], identity, folder)
        elif joined or world == 1:
            _train(settings, store, folder, identity, total)
        else:
            _launch(world, settings, store, folder, identity, total)
        if rank == 0:
            checkpoints.remove(folder)  # here, as a process may be killed after final.pt and before this
    return folder


def _launch(count: int, settings: Settings, store: Store, folder: Path, identity: dict, total: int) -> None:
    """Train in ``count`` processes of this machine; meanwhile show their progress and pass signals on."""
    with runs.stop_signals() as received, runs.progress(None, total=total, desc=folder.name) as bar:

        def tick() -> int:
            if line := history.last(folder):
                bar.set_postfix_str(f"loss {line['total']:.4g}, {line['pairs_per_second']:.0f} pairs/s", refresh=False)
                bar.update(line["step"] - bar.n)
            return received[0] if received else 0

        try:
            options = {"device": device_of(settings), "processes": count, "tick": tick}
            processes.launch(_train, settings, store, folder, identity, total, **options)
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
            if asked := processes.largest(received[0] if received else 0):
                state = f"{len(folders)} of {len(members)} runs are finished"
                raise Interrupted(f"{signal.Signals(asked).name}: {state}; the same call finds them and goes on")
            if member:
                folders[runs.label(member)] = run(member, store_path)
    return folders


@torch.inference_mode()
def found_split(settings: Settings, model: models.MultimodalModel, store: Store, device: torch.device) -> dict:
    """How much is common, estimated from the features of two views of some images (``explain.split``); JSON-able.

    ``dim_common`` for two modalities, ``blocks`` for more, and what they were read from.
    """
    estimate = pkgutil.resolve_name("decur_core.explain.split:found")  # by name: that room stands below this file
    sensors = modalities(settings, store)
    features: dict[str, list] = {m.name: [[], []] for m in sensors}
    count = max(1, min(len(store), ESTIMATED) // settings.batch_size)
    fixed, (rank, world) = settings.model_copy(update={"seed": settings.seed + 1}), processes.place()
    model.eval()
    for step, batch in enumerate(batches(fixed, store, range(count), device, (rank, world)), start=1):
        for name, both in views(fixed, sensors, batch, step, (rank, world)).items():
            for k, images in enumerate(both):
                features[name][k].append(processes.gather(model.backbones[name](images).float()).cpu())
    model.train()
    width = [*backbones.widths(settings.backbone), *settings.projector][-1]
    z = {name: tuple(map(torch.cat, both)) for name, both in features.items()}
    return {**estimate(z, width), "samples": count * settings.batch_size}


def with_split(settings: Settings, found: Mapping | None) -> Settings:
    """The settings with the split that was found in the place of ``dim_common: auto``."""
    update = {k: found[k] for k in ("dim_common", "blocks") if k in found} if found else {}
    return settings.model_copy(update=update)


def _train(settings: Settings, store: Store, folder: Path, identity: dict, total: int) -> None:
    device, (rank, world), sensors = device_of(settings), processes.place(), modalities(settings, store)
    everything = [m.mapped(store.meta["preprocessing"][m.name]) for m in config.modalities(settings)]
    model = network(settings, {m.name: m.channels for m in everything})
    memory.check(settings, model, sensors, device)
    model = model.to(device, memory_format=torch.channels_last).train()
    if settings.compile != "off":
        # The backbones alone: what follows them synchronises between processes, where a graph would break.
        for backbone in model.backbones.values():
            backbone.compile(mode=settings.compile)
    update = optimizer(settings, model)
    state = checkpoints.newest(folder, identity)
    start, found = (state["step"], state["split"]) if state else (0, None)
    if processes.largest(start) != start:
        raise RuntimeError(f"{folder}: processes find different checkpoints; all nodes must see the same files there")
    if state:
        model.load_state_dict(state["model"])
        update.load_state_dict(state["optimizer"])
    replica = processes.replicate(model, device)
    if rank == 0:
        if state:
            print(f"{folder.name}: resumes after step {start} of {total}", flush=True)
        runs.remove_torn(folder)
        checkpoints.remove(folder, after=start)  # damaged ones, which would be taken for newer than what comes now
        history.keep(folder, start)
        about = {"settings": config.to_dict(settings), "trained": runs.trained(settings), "processes": world}
        about |= {"data": store.meta.get("data", {}), "provenance": runs.provenance()}
        runs.write_json(folder / "run.json", about)

    def state_at(step: int) -> dict:
        about = {"settings": identity, "trained": runs.trained(settings), "data": store.meta.get("data", {})}
        about |= {"preprocessing": {m.name: m.mapping() for m in everything}, "step": step, "split": found}
        return {"model": history.finite(model.state_dict(), folder, "weights", step), **about}

    def checkpoint(step: int) -> None:
        state = {**state_at(step), "optimizer": update.state_dict()}
        if checkpoints.save_or_say(state, folder / f"checkpoint-{step:09d}.pt", f"step {step}"):
            checkpoints.remove(folder, keep=2)

    # With dim_common: auto the run begins with intra-modal terms alone, from which the split is read.
    auto = settings.method == "decur" and settings.dim_common == "auto"
    boundary = min(math.ceil(settings.auto_share * total), total - 1) if auto else -1
    if boundary == 0:
        raise config.ConfigError(f"dim_common = 'auto' in {total} step; it needs one before and one after the split")
    current = with_split(settings, found)
    with runs.stop_signals() as received:
        todo = batches(settings, store, range(start, total), device, (rank, world))
        options = {"initial": start, "total": total, "disable": rank > 0 or processes.followed}
        bar = runs.progress(todo, desc=folder.name, **options)
        pending, began = [], time.perf_counter()
        for step, batch in enumerate(bar, start=start + 1):
            torch.manual_seed(seeded(settings.seed, "layers", step, rank).initial_seed())  # for layers that draw
            seen, share = views(settings, sensors, batch, step, (rank, world)), cosine(step - 1, total)
            terms = train_step(current, replica, update, seen, share)

            # The terms stay on the device until the next line of the log, so that no step waits for the one before.
            pending.append((step, share, {name: t.detach() for name, t in terms.items()}))
            if step == boundary:
                found = processes.shared(found_split(settings, model, store, device))
                current = with_split(settings, found)
                if rank == 0:
                    runs.write_json(folder / "split.json", found)
            asked = processes.largest(received[0] if received else processes.asked.value)
            due = step % settings.checkpoint_steps == 0 or step == total or bool(asked)
            if due or step % settings.log_steps == 0:
                rate = len(pending) * settings.batch_size / (time.perf_counter() - began)
                last = history.write(pending, folder, settings, rate, rank=rank)
                bar.set_postfix_str(f"loss {last:.4g}, {rate:.0f} pairs/s", refresh=False)
                pending, began = [], time.perf_counter()
            if due and step < total and rank == 0:
                checkpoint(step)
            if asked and step < total:
                processes.largest()  # a process that ends before the checkpoint is written ends them all
                name = signal.Signals(asked).name
                raise Interrupted(f"{folder.name}: {name} after step {step} of {total}; the same call resumes")
        if rank == 0:
            checkpoints.save(state_at(total), folder / "final.pt")
    processes.largest()


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
        with processes.joined(device_of(settings)) if "RANK" in os.environ else contextlib.nullcontext():
            if processes.place()[0] == 0:
                prepare.pretraining_store(settings)  # the others find it finished
            processes.largest()
            run_members(settings, prepare.pretraining_store(settings), shard=args.shard)
    except (config.ConfigError, DataError, Interrupted, NonFinite, runs.InUse, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    from decur_core import pretrain  # this copy of the module has another name in the processes it starts

    pretrain.main()

"""Training a network on labels, with checkpoints from which it goes on, and its predictions of a whole store."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from decur_core import pretrain
from decur_core.data.batches import seeded
from decur_core.running import checkpoints
from decur_core.running import folders as runs
from decur_core.transfer.networks import Network

SAVE_SECONDS = 60.0  # between two checkpoints of an evaluation


def share(t, step: int, per_epoch: float, total: int) -> float:
    """Of the starting learning rate at a step; ``per_epoch``: steps that milestones and warm-up count as one epoch."""
    if t.schedule == "constant":
        return 1.0
    if t.schedule == "steps":
        return 0.1 ** sum(step >= milestone * per_epoch for milestone in t.milestones)
    warm = t.warmup_epochs * per_epoch
    return step / warm if step < warm else (1 - step / total) ** 0.9


def length(t, batches: int) -> tuple[int, float]:
    """Updates in all, and how many the schedule counts as an epoch of so many ``batches``.

    Where ``transfer.min_updates`` asks for more than epochs or iterations give, epochs are added and the schedule is
    stretched over them.
    """
    planned = t.iterations or t.epochs * batches
    total = planned if planned >= t.min_updates else batches * math.ceil(t.min_updates / batches)
    return total, batches * total / planned


def _optimizer(network: nn.Module, kind: Network, t, rate: float) -> torch.optim.Optimizer:
    groups = [{"params": [], "weight_decay": decay} for decay in (0.0, t.weight_decay)]
    for parameter in network.parameters():
        if parameter.requires_grad:
            groups[kind.decays(parameter)]["params"].append(parameter)
    if t.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=rate)


def _restored(network: nn.Module, optimizer: torch.optim.Optimizer, file: Path, digest: str, desc: str) -> int:
    """Epochs that a checkpoint of the same evaluation has behind it; 0 without one."""
    state = {}
    try:
        state = checkpoints.load(file) if file.exists() else {}
    except checkpoints.Damaged as error:
        print(f"{error}; {desc} begins again", flush=True)
    if state.get("digest") != digest:
        return 0
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"]


def fit(
    network: nn.Module,
    kind: Network,
    samples: Callable[..., tuple[list[Tensor], Tensor]],
    rows: Sequence[int],
    t,
    *,
    protocol: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    autocast: torch.autocast,
    seed: int,
    desc: str,
    file: Path,
    digest: str,
) -> int:
    """Train on the items of a store in ``rows``; returns the number of updates.

    ``samples(rows, seed=…)``: what the network takes of some of them, and the target that ``loss`` takes; ``file``: a
    checkpoint from which another call of the same ``digest`` goes on, renewed where an epoch ends, once a minute at
    most, if the disk has room. Raises pretraining's ``NonFinite`` (loss, or outputs at the end) and ``Interrupted``.
    """
    setting = f"learning_rate_{protocol}"
    rate = getattr(t, setting)
    way = f"lower transfer.{setting} = {rate:g}"
    optimizer = _optimizer(network, kind, t, rate)
    # A last batch of one image is left out where BatchNorm is trained, which it could not be on that.
    starts = range(0, len(rows) - (protocol != "linear"), t.batch_size)
    total, per_epoch = length(t, len(starts))
    epochs, first = math.ceil(total / len(starts)), _restored(network, optimizer, file, digest, desc)
    network.train()
    saved = time.monotonic()
    with runs.stop_signals() as received:
        for epoch in runs.progress(range(first, epochs), desc=desc, leave=False, initial=first, total=epochs):
            torch.manual_seed(seeded(seed, "transfer", epoch).initial_seed())  # for what drops connections
            shuffled = [rows[i] for i in torch.randperm(len(rows), generator=seeded(seed, "transfer", epoch)).tolist()]
            for step, k in enumerate(starts[: total - epoch * len(starts)], start=epoch * len(starts)):
                images, target = samples(shuffled[k : k + t.batch_size], seed=(seed, "transfer", epoch, k))
                for group in optimizer.param_groups:
                    group["lr"] = rate * share(t, step, per_epoch, total)
                with autocast:
                    outputs = network(*images)
                value = loss(outputs.float(), target)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                if received:
                    at = f"{signal.Signals(received[0]).name} in epoch {epoch + 1} of {epochs}"
                    raise pretrain.Interrupted(f"{desc}: {at}; the same call goes on from its last checkpoint")
            if not value.isfinite():
                raise pretrain.NonFinite(f"{desc}: loss {value:g} in epoch {epoch + 1}; {way}")
            if time.monotonic() - saved > SAVE_SECONDS and epoch + 1 < epochs:
                state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "digest": digest}
                checkpoints.save_or_say({**state, "epoch": epoch + 1}, file, f"{desc}, epoch {epoch + 1}")
                saved = time.monotonic()
    network.eval()
    with torch.inference_mode():
        if not network(*images).isfinite().all():  # what the last step did, no loss has told
            raise pretrain.NonFinite(f"{desc}: outputs that are not finite after the last step; {way}")
    return total


def predictions(
    network: nn.Module, kind: Network, samples: Callable[..., tuple[list[Tensor], Tensor]], rows: Sequence[int], t
) -> Iterator[tuple[Tensor, Tensor]]:
    """Prediction and target of images of a store, in the order of ``rows``, batch by batch: whole, no augmentation.

    ``samples(rows)``: what the network takes of some rows of this store, and the target.
    """
    network.eval()
    for part in torch.tensor(rows).split(t.batch_size):
        images, target = samples(part.tolist())
        with torch.inference_mode():
            yield kind.predict(network, images, t), target

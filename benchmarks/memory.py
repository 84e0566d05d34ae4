"""The memory that a training step needs at its peak, computed from shapes; nothing is run, no GPU is needed.

    python -m benchmarks.memory

DeCUR's step with LARS, `peak_of`. An allocator's rounding, a GPU's libraries (some 2 GB) and what the
networks' convolutions use while they run come on top.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from decur_core import losses
from decur_core.model import MultimodalModel

from . import common

CASES = (  # backbone, pairs in the global batch, K, processes
    *(("resnet50", batch, 8192, 1) for batch in (64, 128, 256, 512)),
    *(("resnet50", 256, k, 1) for k in (512, 2048)),
    *(("resnet50", 256, 8192, processes) for processes in (2, 4, 8)),
    *((backbone, 256, 8192, 1) for backbone in ("resnet18", "mit_b2")),
)


def peak_of(
    model: nn.Module,
    loss: Callable[[nn.Module, dict], Tensor],
    views: Mapping[str, Sequence[Sequence[int] | None]],
    *,
    low: bool,
    slots: int = 1,
    processes: int = 1,
) -> int:
    """Bytes that one process holds at the peak of a step; an allocator's rounding and a GPU's libraries come on top.

    ``model`` lies on the CPU and stays as it is; ``loss(model, views)`` is what is differentiated. ``views``: modality
    to the shapes n x C x S x S of its views in one process, None for one that is not looked at. ``low``: bfloat16.
    ``slots``: numbers that the optimizer keeps for a weight (LARS 1, AdamW 2). With several ``processes`` gradients
    have their place from the start. Tensors have no values here: nothing is computed, no device is needed.

    The peak is the larger of two: as the backward pass begins, with all that the forward pass keeps for it and two
    maps of the largest kind in flight; and in the optimizer, with a gradient and an update for each weight.
    """
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(model).train()
    with mode:
        batch = {
            name: tuple(s and torch.empty(s).to(memory_format=torch.channels_last) for s in shapes)
            for name, shapes in views.items()
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=low), saved_tensors_hooks(keep, lambda x: x):
            value = loss(model, batch)
        given = [*model.parameters(), *model.buffers()]
        given += [x for several in batch.values() for x in several if x is not None]
        known = {x.untyped_storage()._cdata for x in given}
        forward = [x.untyped_storage().nbytes() for key, x in kept.items() if key not in known]
        del value
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = sum(x.nbytes for x in given) + slots * trained
    backward = sum(forward) + 2 * max(forward, default=0) + (trained if processes > 1 else 0)
    return held + max(backward, 2 * trained)


def peak(*, backbone: str, batch: int, k: int, processes: int, size: int, low: bool) -> int:
    """Bytes in each process, which holds its share of the batch and the loss of the whole."""
    channels = {m.name: m.channels for m in common.PAIR}

    def loss(model: nn.Module, views: dict) -> torch.Tensor:
        z = [x.repeat(processes, 1) for both in model(views).values() for x in both]
        return losses.decur(*z, dim_common=k * 7 // 8).total

    views = {name: [(batch // processes, count, size, size)] * 2 for name, count in channels.items()}
    model = MultimodalModel(backbone, channels, (k, k, k))
    return peak_of(model, loss, views, low=low, processes=processes)


def main(argv: Sequence[str] | None = None) -> None:
    known = {"size": (224, 224, "of views, pixels")}
    o = common.arguments(__doc__, argv, **known)
    rows = []
    for backbone, batch, k, processes in CASES:
        row = {"network": backbone, "pairs": batch, "K": k, "processes": processes}
        for name, low in (("float32", False), ("bfloat16", True)):
            options = {"backbone": backbone, "batch": batch, "k": k, "processes": processes}
            row[f"{name}, GB"] = peak(**options, size=o.size, low=low) / 1e9
        rows.append(row)
    print(common.table(rows))
    print(common.save("memory", settings=vars(o) | {"computed": 1}, rows=rows))


if __name__ == "__main__":
    main()

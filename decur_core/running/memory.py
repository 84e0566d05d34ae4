"""What a step of training needs in memory, from shapes alone: to refuse what cannot fit before it starts."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks


def peak(
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

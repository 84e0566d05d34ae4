"""What a step of training needs in memory, from shapes alone: to refuse what cannot fit before it starts."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from decur_core import backbones, losses
from decur_core.config import ConfigError, Settings
from decur_core.running import processes


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


def check(settings: Settings, model: nn.Module, modalities: Iterable, device: torch.device) -> None:
    """Refuse, with a ConfigError, images too small for a network and a step, this process's share, too large for a GPU.

    ``modalities``: those that are trained. Compiled backbones keep less than is counted; no GPU is too small for them.
    """
    method, world = losses.METHODS[settings.method], processes.place()[1]
    if method.loss and settings.backbone.startswith("mit_") and settings.crop_size < backbones.SMALLEST:
        raise ConfigError(f"crop_size = {settings.crop_size}; {settings.backbone} needs {backbones.SMALLEST} or more")
    if device.type != "cuda" or not method.loss or settings.compile != "off":
        return
    low, count, side = settings.precision != "float32", settings.batch_size // world, settings.crop_size
    used = method.views(settings)
    views = {m.name: [(count, m.channels, side, side)] * used + [None] * (2 - used) for m in modalities}

    def loss(model: nn.Module, views: dict) -> Tensor:  # over the batch of all processes, as each of them computes it
        z = {m: tuple(x if x is None else x.repeat(world, 1) for x in both) for m, both in model(views).items()}
        own = model.scale() if method.scaled else None
        return method.loss(z, settings, squares=losses.squares, scale=own)["total"]

    card, slots = torch.cuda.get_device_properties(device), 2 if settings.optimizer == "adamw" else 1
    need = peak(model, loss, views, low=low, slots=slots, processes=world)
    if need > card.total_memory:
        asked = f"batch_size = {settings.batch_size}, precision = {settings.precision!r}, processes = {world}"
        state = f"a step needs {need / 1e9:.1f} GB in each, but {card.name} has {card.total_memory / 1e9:.1f} GB"
        way = "lower batch_size, " + ("" if low else "choose precision: bfloat16, ") + "or use more processes (GPUs)"
        raise ConfigError(f"{asked}: {state}; {way}")

"""Whole training steps, from 8-bit images in the host's memory to updated weights: ours against the published way.

    python -m benchmarks.step                  # small enough for a CPU
    python -m benchmarks.step --device cuda    # ResNet-50, 224 px, batch 256, K 8192
    python -m benchmarks.step --bfloat16 1 --backbone small --side 36 --size 32 --batch 128 --k 64 --repeats 10

Ours: views on the device, channels_last, Gram-form loss, foreach LARS, bfloat16 autocast on a GPU (float32 on a CPU).
Published: views made with OpenCV by loader workers, or by the main process with `--workers 0`; K x K loss, LARS one
parameter after the other, float16 autocast with a gradient scaler on a GPU. Model, weights and images are the same.
With `--bfloat16 1` ours also runs in bfloat16 on a CPU, as `precision: auto` has it where there is AMX; the record is
then `step-bfloat16`.
Times of parts are of each part alone; with workers, the published views overlap with the rest. Needs the extra `bench`.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from decur_core.augment import augment
from decur_core.lars import parameter_groups
from decur_core.model import MultimodalModel

from . import common, lars, loader, loss

CHANNELS = {m.name: m.channels for m in common.PAIR}

COMPILED, LOW = "ours, compiled", "ours, bfloat16"


def build(*, way: str, backbone: str, side: int, size: int, batch: int, k: int, workers: int, threads: int, device):
    """What one way works with: model, `network(views)`, which leaves gradients, and name -> call of step and parts."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ours, compiled, kind = way != "published", way == COMPILED, torch.device(device).type
    gpu, pieces = kind == "cuda", math.gcd(batch, 16) if workers else 1
    half, way = gpu or way == LOW, "ours" if ours else way
    images = [torch.randint(256, (batch, c, side, side), dtype=torch.uint8) for c in 2 * [*CHANNELS.values()]]
    opencv, generator = loader.Views(batch, side, size), torch.Generator().manual_seed(0)
    if not ours:
        options = {"sampler": itertools.cycle(range(batch)), "num_workers": workers, "pin_memory": gpu}
        options["collate_fn"] = lambda rows: loader.collate([opencv(i, [x[i].numpy() for x in images]) for i in rows])
        batches = iter(DataLoader(range(batch), batch // pieces, **options))
    elif gpu:
        images = [x.pin_memory() for x in images]
    model = MultimodalModel(backbone, CHANNELS, (k, k, k))
    model.to(device, memory_format=torch.channels_last if ours else torch.contiguous_format).train()
    for backbone_m in model.backbones.values() if compiled else ():
        backbone_m.compile()
    optimizer = lars.WAYS[way](parameter_groups(model, lr=0.2, lr_biases=0.0048), lr=0.2)
    scaler = torch.amp.GradScaler(device, enabled=gpu and not ours)
    low = torch.bfloat16 if ours else torch.float16
    random = [torch.randn(batch, k, device=device, dtype=low if half else None).requires_grad_() for _ in range(4)]

    def views() -> list[torch.Tensor]:
        if ours:
            sent = (x.to(device, non_blocking=True) for x in images)
            made = [augment(x, p, generator=generator) for x, p in zip(sent, opencv.policies, strict=True)]
            return [x.contiguous(memory_format=torch.channels_last) for x in made]
        parts = [[x.to(device, non_blocking=True) for x in next(batches)] for _ in range(pieces)]
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def backward(forward: Callable[[], Sequence[torch.Tensor]]) -> None:
        with torch.autocast(kind, low, enabled=half):
            value = loss.WAYS[way](*forward(), round(loss.COMMON * k))
        scaler.scale(value).backward()

    def network(views: list[torch.Tensor]) -> None:
        optimizer.zero_grad()
        backward(lambda: itertools.chain(*model(by_modality(views)).values()))

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()

    fixed = functools.cache(views)
    parts = {"step": lambda: (network(views()), update()), "views": views, "network + loss": lambda: network(fixed())}
    return model, network, parts | {"optimizer": update, "loss": lambda: backward(lambda: random)}


def by_modality(views: Sequence[torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The first views of all modalities, then the second ones, as the model takes them."""
    return dict(zip(CHANNELS, zip(views[: len(CHANNELS)], views[len(CHANNELS) :], strict=True), strict=True))


def prepare(**sizes) -> Callable[[], None]:
    return build(**sizes)[2]["step"]


def arithmetic(backbone: str, size: int, batch: int, k: int) -> int:
    """Floating-point operations of the network in one step, forward and backward; a multiply-add counts as two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        views = [torch.empty(batch, c, size, size) for c in 2 * [*CHANNELS.values()]]
        z = MultimodalModel(backbone, CHANNELS, (k, k, k))(by_modality(views))
        sum(each.sum() for each in itertools.chain(*z.values())).backward()
    return counter.get_total_flops()


def main(argv: Sequence[str] | None = None) -> None:
    known = {"backbone": ("resnet18", "resnet50", "network of each modality"), "side": (72, 264, "of images, pixels")}
    known |= {"size": (64, 224, "of views, pixels"), "batch": (32, 256, "pairs in a step")}
    known |= {"k": (2048, 8192, "embedding dimensions, and width of the projectors' other layers")}
    known |= {"workers": (0, max(1, (os.cpu_count() or 1) - 1), "processes that make the published views")}
    known |= {"threads": (1, 1, "CPU threads"), "repeats": (2, 10, "steps in a turn; each way has three")}
    known |= {"peak": (0.0, common.peak_arithmetic(), "TFLOP/s the device reaches at most, 0 if not known")}
    known |= {"compiled": (0, 1, "1: also with the setting compile: default")}
    known |= {"bfloat16": (0, 0, "1: also ours in bfloat16, for CPUs")}
    o = common.arguments(__doc__, argv, **known)
    sizes = {name: value for name, value in vars(o).items() if name not in ("repeats", "peak", "compiled", "bfloat16")}
    ways = (*lars.WAYS, *[COMPILED] * bool(o.compiled), *[LOW] * bool(o.bfloat16))
    made = {way: build(way=way, **sizes)[2] for way in ways}
    calls = {(way, part): call for way, parts in made.items() for part, call in parts.items()}
    times = common.pace(calls, repeats=o.repeats, warm=3 if o.workers else 1, device=o.device)
    operations, rows = arithmetic(o.backbone, o.size, o.batch, o.k), []
    for way, parts in made.items():
        step, alone = times[way, "step"], {part: times[way, part] for part in parts if part != "step"}
        row = {"step": way, "pairs/s": o.batch / step, "times faster": times["published", "step"] / step}
        row |= {"ms": 1e3 * step} | {f"{part} ms": 1e3 * value for part, value in alone.items()}
        row |= {"views, share": alone["views"] / step, "bound by": max(alone, key=alone.get)}
        reached = operations / step / 1e12
        row |= {"TFLOP/s": reached, "share of peak": reached / o.peak if o.peak else "unknown"}
        row["peak MiB"] = common.peak_memory("benchmarks.step", "prepare", way=way, **{**sizes, "workers": 0}) / 2**20
        if o.device != "cpu":
            row["hours for 251,079 pairs x 100"] = 251_079 * 100 * step / o.batch / 3600
        rows.append(row)
    print(common.table(rows))
    settings = vars(o) | {"TFLOP per step": operations / 1e12, "opencv": loader.cv2.__version__}
    settings["AMX"] = int(torch.cpu._is_amx_tile_supported())
    name = "step-bfloat16" if o.bfloat16 else "step"
    print(common.save(name, settings=settings, rows=rows, device=o.device))


if __name__ == "__main__":
    main()

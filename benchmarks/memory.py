"""The memory that a training step needs at its peak, computed from shapes; nothing is run, no GPU is needed.

    python -m benchmarks.memory

DeCUR's step with LARS, `running.memory.peak`. An allocator's rounding, a GPU's libraries (some 2 GB) and what the
networks' convolutions use while they run come on top.
"""

from collections.abc import Sequence

import torch
from torch import nn

from decur_core import losses
from decur_core.model import MultimodalModel
from decur_core.running import memory

from . import common

CASES = (  # backbone, pairs in the global batch, K, processes
    *(("resnet50", batch, 8192, 1) for batch in (64, 128, 256, 512)),
    *(("resnet50", 256, k, 1) for k in (512, 2048)),
    *(("resnet50", 256, 8192, processes) for processes in (2, 4, 8)),
    *((backbone, 256, 8192, 1) for backbone in ("resnet18", "mit_b2")),
)


def peak(*, backbone: str, batch: int, k: int, processes: int, size: int, low: bool) -> int:
    """Bytes in each process, which holds its share of the batch and the loss of the whole."""
    channels = {m.name: m.channels for m in common.PAIR}

    def loss(model: nn.Module, views: dict) -> torch.Tensor:
        z = [x.repeat(processes, 1) for both in model(views).values() for x in both]
        return losses.decur(*z, dim_common=k * 7 // 8).total

    views = {name: [(batch // processes, count, size, size)] * 2 for name, count in channels.items()}
    model = MultimodalModel(backbone, channels, (k, k, k))
    return memory.peak(model, loss, views, low=low, processes=processes)


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

"""Looking into an embedding at full size: t-SNE of all dimensions of both modalities, saliency over a data set.

Time and memory in one fresh process each; the second must not grow with the number of pairs.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from decur_core import config, explain, pretrain

from . import common


def tsne(*, k: int, samples: int, threads: int, device: str) -> Callable[[], None]:
    """t-SNE of 2 k dimensions of which 7 in 8 are common, over ``samples`` images."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shared, own = torch.randn(samples, 32), torch.randn(2, samples, 32)
    common_part, mixed = shared @ torch.randn(32, k * 7 // 8), own @ torch.randn(2, 32, k - k * 7 // 8)
    z1, z2 = (torch.cat([common_part + 0.3 * torch.randn_like(common_part), m], 1) for m in mixed)
    return lambda: explain.tsne(z1, z2)


def saliency(*, pairs: int, side: int, steps: int, threads: int, device: str) -> Callable[[], None]:
    """GradCAM overlap and Integrated Gradients of ``pairs`` pairs with the small network."""
    torch.set_num_threads(threads)
    folder = tempfile.TemporaryDirectory()
    store = common.random_store(Path(folder.name) / "store", count=pairs, side=side, seasons=1)
    overrides = {
        "method": "random",
        "crop_size": side - side // 8,
        "batch_size": 2,
        "runs": str(Path(folder.name) / "runs"),
    }
    settings = config.load("start", {**overrides, "device": device, "data.source": "published"})
    run = pretrain.run(settings, store.path)

    def work(folder=folder) -> None:
        explain.statistics(settings, run, store.path, samples=pairs, steps=steps)

    return work


def main(argv: Sequence[str] | None = None) -> None:
    known = {"k": (8192, 8192, "embedding dimensions of a modality"), "samples": (256, 1024, "images of the t-SNE")}
    known |= {"pairs": (10_000, 10_000, "pairs of the saliency statistics; also a tenth of it")}
    known |= {"side": (36, 264, "of images, pixels"), "steps": (16, 16, "of Integrated Gradients")}
    known |= {"threads": (1, 1, "CPU threads")}
    o = common.arguments(__doc__, argv, **known)
    shared, rows = {"threads": o.threads, "device": o.device}, []
    todo = [(f"t-SNE of 2 x {o.k} dimensions", "tsne", {"k": o.k, "samples": o.samples})]
    for pairs in (max(2, o.pairs // 10), o.pairs):
        sizes = {"pairs": pairs, "side": o.side, "steps": o.steps}
        todo.append((f"saliency of {pairs} pairs", "saliency", sizes))
    for what, prepare, sizes in todo:
        peak, took = common.cost("benchmarks.explain", prepare, **sizes, **shared)
        rows.append({"what": what, "seconds": took, "MB at the peak": peak / 1e6})
    print(common.table(rows))
    print(common.save("explain", settings=vars(o), rows=rows, device=o.device))


if __name__ == "__main__":
    main()

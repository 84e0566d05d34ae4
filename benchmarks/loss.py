"""The DeCUR loss here against the published way of computing it: time and peak extra memory, forward and backward.

    python -m benchmarks.loss                     # K = 8192, N = 256 and two smaller sizes, on the CPU
    python -m benchmarks.loss --k 2048 --n 64     # one size
    python -m benchmarks.loss --all --device cuda # the whole grid

Both ways run in turn in one process for the time, and alone in a fresh process for the memory.
"""

import argparse
import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from decur_core import losses

from . import common

LAMBD = 0.0051
COMMON = 0.875  # share of common dimensions, the paper's for SAR-optical
DEFAULT = ((512, 64), (2048, 256), (8192, 256))
GRID = tuple(itertools.product((512, 2048, 8192), (64, 256, 1024)))


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (a, b))
    return (a.T @ b).div_(len(a))


def _off_diagonal(c: Tensor) -> Tensor:
    """All entries but the diagonal, through a flattened view whose rows are one entry longer than the matrix's."""
    k = len(c)
    return c.flatten()[1:].view(k - 1, k + 1)[:, :-1].flatten()


def _identity(c: Tensor) -> Tensor:
    return torch.diagonal(c).add_(-1).pow_(2).sum() + LAMBD * _off_diagonal(c).pow_(2).sum()


def published(z1_a: Tensor, z1_b: Tensor, z2_a: Tensor, z2_b: Tensor, dim_common: int) -> Tensor:
    """Eq. 2-6 as the published implementation goes about it: batch norm, three K x K matrices, in-place squares.

    The sum is the paper's (Eq. 6); the published weighting of the terms differs and costs the same.
    """
    across = _correlation(z1_a, z2_a)
    shared, unique = across[:dim_common, :dim_common], across[dim_common:, dim_common:]
    cross = _identity(shared) + torch.diagonal(unique).pow_(2).sum() + LAMBD * _off_diagonal(unique).pow_(2).sum()
    return cross + _identity(_correlation(z1_a, z1_b)) + _identity(_correlation(z2_a, z2_b))


def ours(z1_a: Tensor, z1_b: Tensor, z2_a: Tensor, z2_b: Tensor, dim_common: int) -> Tensor:
    return losses.decur(z1_a, z1_b, z2_a, z2_b, dim_common=dim_common, lambd=LAMBD).total


WAYS = {"published": published, "ours": ours}


def embeddings(k: int, n: int, device: str) -> list[Tensor]:
    """Four N x K embeddings whose dimensions correlate across views and modalities, as leaves."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(n, k, generator=generator)
    made = [(shared + torch.randn(n, k, generator=generator)).to(device) for _ in range(4)]
    return [z.requires_grad_() for z in made]


def prepare(*, way: str, k: int, n: int, threads: int, device: str) -> Callable[[], None]:
    """Inputs made and the matrix library warmed up; the returned call is one forward and backward pass."""
    torch.set_num_threads(threads)

    def work(z: list[Tensor]) -> None:
        for leaf in z:
            leaf.grad = None
        WAYS[way](*z, round(COMMON * len(z[0].T))).backward()

    work(embeddings(min(k, 64), 16, device))
    return functools.partial(work, embeddings(k, n, device))


def measure(k: int, n: int, *, threads: int, device: str, repeats: int) -> dict:
    size = {"k": k, "n": n, "threads": threads, "device": device}
    with torch.no_grad():
        z = embeddings(k, n, device)
        values = [float(way(*z, round(COMMON * k))) for way in WAYS.values()]
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-4)
    time = common.seconds({way: prepare(way=way, **size) for way in WAYS}, repeats=repeats, device=device)
    memory = {way: common.peak_memory("benchmarks.loss", "prepare", way=way, **size) / 2**20 for way in WAYS}
    row = {"K": k, "N": n} | {f"{way} ms": 1e3 * time[way] for way in WAYS}
    row |= {"times faster": time["published"] / time["ours"]} | {f"{way} MiB": memory[way] for way in WAYS}
    return row | {"share of memory": memory["ours"] / memory["published"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, help="embedding dimensions; needs --n")
    parser.add_argument("--n", type=int, help="samples; needs --k")
    parser.add_argument("--all", action="store_true", help="every K of 512, 2048, 8192 with every N of 64, 256, 1024")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, the same for both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; the median counts")
    options = parser.parse_args()
    if (options.k is None) != (options.n is None):
        parser.error("--k and --n go together")
    sizes = ((options.k, options.n),) if options.k else GRID if options.all else DEFAULT
    settings = {"threads": options.threads, "device": options.device, "repeats": options.repeats}
    torch.set_num_threads(options.threads)
    rows = [measure(k, n, **settings) for k, n in sizes]
    print(common.table(rows))
    print(common.save("loss" if options.device == "cpu" else f"loss-{options.device}", settings=settings, rows=rows))


if __name__ == "__main__":
    main()

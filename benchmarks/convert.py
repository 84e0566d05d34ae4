"""Conversion of SSL4EO-S12 at full size: 60 GeoTIFFs a location become four seasons of 8-bit images in one store.

    python -m benchmarks.convert

Locations of the miniature world are written in the published layout and read several times, so files come from the page
cache: what a slow disk adds is not in the numbers. Published: worker processes read, each band is resized by OpenCV and
scaled, and one more process pickles all seasons of a location into one value (of a plain file: what an LMDB adds is not
in its numbers). Ours: worker processes also cut outliers, check each file, take statistics and digests, and write. A
rate is that of the later locations: what a short conversion takes is subtracted from what a long one takes, so that the
start of the processes is left out. That start takes some seconds, of each worker; the later locations have to take
several times as long. "per core" divides by the cores that all processes together kept busy, writing included. Needs
the extra `bench`.
"""

import itertools
import os
import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import rasterio
import torch
from torch.utils.data import DataLoader

from decur_core.data.convert import convert
from decur_core.data.modality import OPTICAL, SAR
from decur_core.data.ssl4eo import SSL4EOS12
from decur_core.worlds.files import write_ssl4eo
from decur_core.worlds.sar_optical import World

from . import common

LOCATIONS, CORES = 251_079, 16  # of the data set; of the machine for which hours are reckoned


class Repeated:
    """A data set several times over, up to `count` samples."""

    def __init__(self, dataset, count: int):
        self.dataset, self.ids = dataset, [f"{i:07d}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int):
        item = self.dataset[i % len(self.dataset)]
        return item | {"id": self.ids[i]} if isinstance(item, dict) else item


class Published:
    """The published reader: seasons as the folder lists them, every band resized, SAR scaled by its statistics."""

    def __init__(self, root: Path, side: int):
        self.root, self.side, self.ids = root, side, sorted(p.name for p in (root / "s1").iterdir())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (seasons, 2, H, W) and (seasons, 13, H, W)."""
        sar = self._seasons(self.root / "s1" / self.ids[i], SAR.bands)
        optical = self._seasons(self.root / "s2c" / self.ids[i], OPTICAL.bands)
        return sar, (optical / 10000.0 * 255.0).astype(np.uint8)

    def _seasons(self, folder: Path, bands: Sequence[str]) -> np.ndarray:
        seasons = []
        for season in sorted(folder.iterdir()):
            images = []
            for k, band in enumerate(bands):
                with rasterio.open(season / f"{band}.tif") as file:
                    image = file.read(1)
                image = cv2.resize(image, (self.side, self.side), interpolation=cv2.INTER_LINEAR_EXACT)
                if bands == SAR.bands:
                    low, high = (SAR.mean[k] + sign * 2 * SAR.std[k] for sign in (-1, 1))
                    image = np.clip((image - low) / (high - low) * 255.0, 0, 255).astype(np.uint8)
                images.append(image)
            seasons.append(np.stack(images))
        return np.stack(seasons)


def one(items: list):
    """The only item of a batch."""
    return items[0]


def published(root: Path, side: int, count: int, workers: int, path: Path) -> None:
    """Convert in the published way; every 1000 locations are brought to the disk."""
    loader = DataLoader(Repeated(Published(root, side), count), num_workers=workers, collate_fn=one)
    with open(path, "wb") as file:
        for i, (sar, optical) in enumerate(loader):
            pickle.dump((sar.tobytes(), sar.shape, optical.tobytes(), optical.shape), file)
            if i % 1000 == 0 or i == count - 1:
                file.flush()
                os.fsync(file.fileno())


def ours(root: Path, side: int, count: int, workers: int, path: Path) -> None:
    """Convert as `decur_core.data.prepare` does."""
    preprocessing = {m.name: m for m in common.PAIR}
    convert(Repeated(SSL4EOS12(root), count), path, preprocessing=preprocessing, workers=workers, progress=False)


WAYS = {"published": published, "ours": ours}


def cost(way: str, root: Path, side: int, count: int, workers: int) -> np.ndarray:
    """Seconds of a conversion of `count` locations: on the wall clock, and of all processes together."""
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        before, began = _busy(), time.perf_counter()
        WAYS[way](root, side, count, workers, Path(folder, "store"))
        return np.array([time.perf_counter() - began, _busy() - before])


def _busy() -> float:
    """CPU seconds of this process and of those that it started and that ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def prepare(*, way: str, root: str, side: int, count: int, device: str) -> Callable:
    """A conversion in this process, for its memory."""
    torch.set_num_threads(1)
    return lambda: cost(way, Path(root), side, count, 0)


def main(argv: Sequence[str] | None = None) -> None:
    sizes = {"locations": (8, 8, "on the disk"), "side": (264, 264, "of an image, pixels; a multiple of 12")}
    sizes |= {"count": (320, 320, "conversions that are timed, each location several times")}
    sizes |= {"processes": ([1, 2], [1, 2], "workers"), "turns": (3, 3, "of each way; the median counts")}
    options = common.arguments(__doc__, argv, **sizes)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "ssl4eo-s12")
        write_ssl4eo(root, World(options.locations, tile=options.side), range(options.locations))
        few, times = 2 * max(options.processes), {}
        for _, workers, way in itertools.product(range(options.turns), options.processes, WAYS):
            long, short = (cost(way, root, options.side, n, workers) for n in (few + options.count, few))
            times.setdefault((workers, way), []).append((long - short) / options.count)
        where = {"root": str(root), "side": options.side, "count": options.count}
        peaks = {way: common.peak_memory("benchmarks.convert", "prepare", way=way, **where) for way in WAYS}
    rows = []
    for (workers, way), turns in times.items():
        wall, busy = (statistics.median(values) for values in zip(*turns, strict=True))
        row = {"way": way, "workers": workers, "locations/s": 1 / wall, "locations/s per core": 1 / busy}
        row[f"hours for {LOCATIONS:,}, {CORES} cores"] = LOCATIONS * busy / CORES / 3600
        best = statistics.median(busy for _, busy in times[workers, "ours"])
        rows.append(row | {"ours, times faster per core": busy / best, "MB at the peak, no workers": peaks[way] / 1e6})
    print(common.table(rows))
    print(common.save("convert", settings=vars(options) | {"opencv": cv2.__version__}, rows=rows))


if __name__ == "__main__":
    main()

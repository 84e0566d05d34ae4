"""Pairs per second that one loader worker delivers, and the bytes it reads for a pair, page cache warm.

    python -m benchmarks.loader

Published: a value holds all seasons of a location, pickled (here in a plain file: what an LMDB adds is not in its
numbers). A worker unpickles them and picks seasons ("bytes
only"), and also makes the views, one sample and one operation after another, with OpenCV ("with views", as published).
Ours: a worker copies one season for each view into a uint8 batch; the device makes the views (`benchmarks.augment`).
A worker is a process of torch's DataLoader in the published way, a thread in ours. Needs the extra `bench`.
"""

import dataclasses
import itertools
import math
import os
import pickle
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from decur_core import config
from decur_core.augment import draw
from decur_core.data.batches import batches as load
from decur_core.data.store import Store

from . import common
from .augment import PUBLISHED, opencv


def write(store: Store, path: Path) -> int:
    """The store's images as one pickled value for each location. Returns the bytes of such a value."""
    with open(path, "wb") as file:
        for i in range(len(store)):
            seasons = (np.stack([store.read(i, m.name, s) for s in range(store.seasons)]) for m in common.PAIR)
            file.write(value := pickle.dumps([(array.tobytes(), array.shape) for array in seasons]))
    return len(value)


class Views:
    """Views of size x size made in the published way, with parameters drawn beforehand for `count` samples."""

    def __init__(self, count: int, side: int, size: int):
        cv2.setNumThreads(1)
        generator = torch.Generator().manual_seed(0)
        self.policies = [dataclasses.replace(m.policy, size=size) for m in 2 * common.PAIR]
        self.drawn = [draw(count, side, side, policy, generator=generator) for policy in self.policies]

    def __call__(self, i: int, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """uint8 (C, H, W) of SAR, optical, SAR, optical -> float32 (C, size, size) of the same."""
        made = []
        for image, drawn, policy in zip(images, self.drawn, self.policies, strict=True):
            chosen = {name: [values[i].item()] for name, values in drawn.items()}
            image = np.ascontiguousarray(image.transpose(1, 2, 0))
            made.append(opencv([image], chosen, policy.size, PUBLISHED)[0])
        return made


class Published(Dataset):
    """An item: four images of a location (SAR, optical, SAR, optical), each of a random season."""

    def __init__(self, path: Path, views: Views | None = None):
        self.path, self.views, self.file = path, views, None
        with open(path, "rb") as file:
            pickle.load(file)
            self.size = file.tell()  # of every value

    def __getitem__(self, i: int) -> list:
        if self.file is None:  # opened by the process that reads
            self.file = os.open(self.path, os.O_RDONLY)
        value = pickle.loads(os.pread(self.file, self.size, i * self.size))
        seasons = [np.frombuffer(raw, np.uint8).reshape(shape) for raw, shape in value]
        images = [array[random.randrange(len(array))] for array in 2 * seasons]
        return self.views(i, images) if self.views else images


def collate(samples: Sequence[list]) -> list[torch.Tensor]:
    """Four batches; all that a sample holds is copied once."""
    stack = np.stack if isinstance(samples[0][0], np.ndarray) else torch.stack
    return [torch.as_tensor(stack(images)) for images in zip(*samples, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    sizes = {"locations": (64, 64, "in the store"), "side": (264, 264, "of stored images, pixels")}
    sizes |= {"size": (224, 224, "of views, pixels"), "batch": (16, 16, "pairs in a batch")}
    turns = {"seconds": (5.0, 5.0, "that a turn takes, at least"), "turns": (3, 3, "of each way; the median counts")}
    options = common.arguments(__doc__, argv, **sizes, **turns)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = common.random_store(Path(folder, "store"), count=options.locations, side=options.side, seasons=4)
        value = write(store, Path(folder, "published"))
        settings = config.load("start", {"batch_size": options.batch, "workers": 1, "data.source": "published"})
        read = {"bytes only": value, "with views": value, "ours": 2 * sum(map(math.prod, store.shapes.values()))}
        views = {"bytes only": None, "with views": Views(len(store), options.side, options.size)}
        rates = {name: [] for name in read}
        for _, name in itertools.product(range(options.turns), read):
            if name == "ours":
                batches = load(settings, store, range(10**9))
            else:
                dataset = Published(Path(folder, "published"), views[name])
                order = RandomSampler(range(len(store)), replacement=True, num_samples=10**9)
                batches = DataLoader(dataset, options.batch, sampler=order, num_workers=1, collate_fn=collate)
            rates[name].append(options.batch * common.rate(batches, options.seconds))
    rows = []
    for name, values in rates.items():
        row = {"loader": name if name == "ours" else f"published, {name}", "MB read per pair": read[name] / 1e6}
        pace, best = statistics.median(values), statistics.median(rates["ours"])
        rows.append(row | {"pairs/s": pace, "ours, times faster": best / pace})
    print(common.table(rows))
    print(common.save("loader", settings=vars(options) | {"opencv": cv2.__version__}, rows=rows))


if __name__ == "__main__":
    main()

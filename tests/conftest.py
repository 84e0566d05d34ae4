"""Shared fixtures: a tiny store of random pairs and settings that train on it in a second."""

import contextlib
import resource

import numpy as np
import pytest
import torch

from decur_core import config
from decur_core.data.modality import OPTICAL, SAR
from decur_core.data.store import StoreWriter

torch.set_num_threads(1)


def make_store(path, *, count: int, seasons: int, labels: bool, seed: int = 0, modalities=(SAR, OPTICAL)):
    """Write a store of random 24 px images; with labels, the mean brightness of a patch decides them."""
    random = np.random.default_rng(seed)
    shapes = {m.name: (len(m.bands), 24, 24) for m in modalities}
    meta = {"preprocessing": {m.name: m.mapping() for m in modalities}}
    meta["data"] = {"name": "noise", "title": "Noise", "drawn": False, "source": "own"}
    if labels:
        meta["data"] = {"name": "levels", "title": "Levels", "classes": ["high", "medium", "low"], "drawn": True}
    ids = [f"{i:07d}" for i in range(count)]
    with StoreWriter(path, ids=ids, shapes=shapes, seasons=seasons, labels=3 if labels else 0, meta=meta) as writer:
        for name in ids:
            level = random.uniform(40, 200)
            images = {
                m: np.clip(random.normal(level, 30, (seasons, *shape)), 0, 255).astype(np.uint8)
                for m, shape in shapes.items()
            }
            truth = np.array([level > 120, level > 80, level < 60], np.uint8) if labels else None
            writer.put(name, images, labels=truth)
    return path


@contextlib.contextmanager
def file_limit(size: int | None = None):
    """No file takes more than ``size`` bytes: a full disk for those that are larger. Gives what sets another size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        if size is not None:
            limit(size)
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def pair_store(tmp_path_factory):
    """32 pairs in 2 seasons."""
    return make_store(tmp_path_factory.mktemp("store") / "pairs", count=32, seasons=2, labels=False)


@pytest.fixture(scope="session")
def patch_stores(tmp_path_factory):
    """Labelled patches, 48 for training and 30 for testing."""
    folder = tmp_path_factory.mktemp("patches")
    return {
        "train": make_store(folder / "train", count=48, seasons=1, labels=True, seed=1),
        "test": make_store(folder / "test", count=30, seasons=1, labels=True, seed=2),
    }


TINY = {
    "projector": [16, 16, 8],
    "dim_common": 6,
    "crop_size": 20,
    "batch_size": 8,
    "epochs": 4,
    "checkpoint_steps": 3,
    "log_steps": 1,
    "data.source": "published",
    "device": "cpu",
    "precision": "float32",  # numbers are compared between processes, machines and formulas
}


@pytest.fixture
def tiny(tmp_path):
    """``tiny(**overrides)`` -> settings of 16 steps on ``pair_store`` with runs under the test's own folder."""

    def make(**overrides):
        return config.load("start", {**TINY, "runs": str(tmp_path / "runs"), **overrides})

    return make


def pytest_collection_modifyitems(items):
    """The longest files first, so that with several workers none of them is left for the end, when the others idle."""
    longest = ("test_notebooks.py", "test_distributed.py", "test_live.py", "test_convert.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))

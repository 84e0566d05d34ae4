"""From a profile to finished stores: which reader, which preprocessing, where the converted data lie."""

import contextlib
from pathlib import Path

from .. import config
from ..pairs import PAIRS
from ..preprocess import Preprocessing
from .bigearthnet import BigEarthNetMM
from .convert import convert
from .raster import DataError
from .samples import RealPairs
from .ssl4eo import SSL4EOS12
from .store import Store
from .synthetic import BigEarthNetWorld, World
from .synthetic_files import write_bigearthnet, write_ssl4eo


class Joined:
    """Several readers one after the other, as one: same items, ids in order."""

    def __init__(self, *readers):
        self.readers = readers
        self.ids = [i for reader in readers for i in reader.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        for reader in self.readers:
            if index < len(reader):
                return reader[index]
            index -= len(reader)
        raise IndexError(index)


class Part:
    """The items of a reader at the given positions."""

    def __init__(self, reader, positions: range):
        self.reader, self.positions = reader, positions
        self.ids = [reader.ids[i] for i in positions]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return self.reader[self.positions[index]]


def _stores(settings: config.Settings) -> Path:
    return config.ROOT / settings.data.stores / settings.profile


def _preprocessing(settings: config.Settings) -> dict[str, Preprocessing]:
    return {m.name: m.preprocessing for m in PAIRS[settings.pair]}


def world(settings: config.Settings) -> World:
    """The miniature world of the profile: known factors and land cover of every pretraining location."""
    w = settings.world
    return World(w.locations, tile=w.tile, layout=w.layout, seed=w.seed)


def pairs(settings: config.Settings):
    """Reader of the pretraining pairs that ``data.source`` names; items as ``SSL4EOS12`` gives them.

    For the miniature world the first ``world.through_files`` locations are written to disk in the published layout, if
    they are not there, and read back like any other download; the rest is rendered when asked for.
    """
    data = settings.data
    if data.source == "samples":
        return RealPairs(config.ROOT / data.samples)
    if data.source == "ssl4eo":
        return SSL4EOS12(config.ROOT / data.ssl4eo)
    made = world(settings)
    count = min(settings.world.through_files, len(made))
    if count == 0:
        return made
    root = _stores(settings) / "world" / _world_name(settings) / "ssl4eo-s12"
    _write_once(root, lambda folder: write_ssl4eo(folder, made, range(count)))
    read = SSL4EOS12(root, ids=made.ids[:count])
    return Joined(read, Part(made, range(count, len(made))))


def patches(settings: config.Settings, split: str):
    """Reader of labelled patches, ``split`` = train or test; items as ``BigEarthNetMM`` gives them."""
    data = settings.data
    if data.source == "samples":
        return _sample_patches(settings, split)
    if data.source == "ssl4eo":
        root = config.ROOT / data.bigearthnet
        lists = [p for p in sorted(root.glob("patches_with_*")) if settings.transfer.exclude]
        return BigEarthNetMM(root, split, exclude=lists)
    w = settings.world
    made = BigEarthNetWorld(w.train + w.test, tile=w.tile, seed=w.seed)
    whole = {"train": range(w.train), "test": range(w.train, w.train + w.test)}
    written = {name: part[: w.through_files] for name, part in whole.items()}
    if not w.through_files:
        return Part(made, whole[split])
    root = _stores(settings) / "world" / _world_name(settings) / "bigearthnet"
    _write_once(root, lambda folder: write_bigearthnet(folder, made, written))
    return Joined(BigEarthNetMM(root, split), Part(made, whole[split][w.through_files :]))


def _sample_patches(settings: config.Settings, split: str):
    """The real BigEarthNet example patches under the official split lists: the train list's, and all others as test."""
    folder = config.ROOT / settings.data.samples
    everything = BigEarthNetMM(folder / "bigearthnet_real", None)
    official = BigEarthNetMM(
        folder / "bigearthnet_real", folder / "bigearthnet_splits" / "train.csv.bz2", missing="skip"
    )
    if split == "train":
        return official
    return Part(everything, [i for i, name in enumerate(everything.ids) if name not in set(official.ids)])


def _world_name(settings: config.Settings) -> str:
    w = settings.world
    return f"{w.layout}-{w.locations}-{w.through_files}-{w.train}-{w.test}-{w.tile}px-seed{w.seed}"


def _write_once(root: Path, write) -> None:
    """Write a tree under a temporary name and rename it, so that a tree that is there is a whole one."""
    if root.exists():
        return
    temporary = root.with_name(root.name + ".part")
    temporary.mkdir(parents=True, exist_ok=True)
    write(temporary)
    temporary.rename(root)


def pretraining_store(settings: config.Settings) -> Path:
    """The finished store of the pretraining pairs; converts what is missing of it, from the start or from a kill."""
    kind = _world_name(settings) if settings.data.source == "world" else settings.data.source
    target = _stores(settings) / f"{settings.pair}-{kind}"
    return _convert(settings, target, lambda: pairs(settings))


def patch_stores(settings: config.Settings) -> dict[str, Path]:
    """The finished stores of labelled patches, ``train`` and ``test``; converts what is missing."""
    kind = _world_name(settings) if settings.data.source == "world" else settings.data.source
    folder = _stores(settings)
    return {
        split: _convert(settings, folder / f"bigearthnet-{kind}-{split}", lambda split=split: patches(settings, split))
        for split in ("train", "test")
    }


def _convert(settings: config.Settings, target: Path, reader) -> Path:
    """``target`` as a finished store. A finished one is used as it is, so that the source files may be gone by then."""
    with contextlib.suppress(DataError):  # unfinished or not there
        return Store(target).path
    report = convert(reader(), target, preprocessing=_preprocessing(settings), workers=settings.data.processes)
    print(report)
    return target

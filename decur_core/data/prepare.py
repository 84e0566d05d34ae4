"""From a profile to finished stores: which reader, which preprocessing, where the converted data lie."""

import contextlib
import shutil
from pathlib import Path

from torch.utils.data import ConcatDataset, Subset

from .. import config
from ..pairs import PAIRS
from .bigearthnet import BigEarthNetMM
from .convert import convert
from .raster import DataError
from .samples import RealPairs
from .ssl4eo import SSL4EOS12
from .store import Store
from .synthetic import BigEarthNetWorld, World
from .synthetic_files import write_bigearthnet, write_ssl4eo


def _joined(*readers) -> ConcatDataset:
    """Several readers one after the other, as one."""
    whole = ConcatDataset(readers)
    whole.ids = [i for reader in readers for i in reader.ids]
    return whole


def _part(reader, positions) -> Subset:
    """The items of a reader at the given positions."""
    part = Subset(reader, positions)
    part.ids = [reader.ids[i] for i in positions]
    return part


def _stores(settings: config.Settings) -> Path:
    return config.ROOT / settings.data.stores / settings.profile


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
    root = _written(settings, "ssl4eo-s12", lambda folder: write_ssl4eo(folder, made, range(count)))
    return _joined(SSL4EOS12(root, ids=made.ids[:count]), _part(made, range(count, len(made))))


def patches(settings: config.Settings, split: str):
    """Reader of labelled patches, ``split`` = train or test; items as ``BigEarthNetMM`` gives them."""
    data = settings.data
    if data.source == "samples":
        return _sample_patches(settings, split)
    if data.source == "ssl4eo":
        root = config.ROOT / data.bigearthnet
        lists = sorted(root.glob("patches_with_*")) if settings.transfer.exclude else []
        if settings.transfer.exclude and not lists:
            wanted = "the published lists of patches with snow, cloud or shadow"
            raise DataError(f"{root}: no patches_with_*, {wanted}; put them there or set transfer: exclude to false")
        return BigEarthNetMM(root, split, exclude=lists)
    w = settings.world
    made = BigEarthNetWorld(w.train + w.test, tile=w.tile, seed=w.seed)
    whole = {"train": range(w.train), "test": range(w.train, w.train + w.test)}
    if not w.through_files:
        return _part(made, whole[split])
    written = {name: part[: w.through_files] for name, part in whole.items()}
    root = _written(settings, "bigearthnet", lambda folder: write_bigearthnet(folder, made, written))
    return _joined(BigEarthNetMM(root, split), _part(made, whole[split][w.through_files :]))


def _sample_patches(settings: config.Settings, split: str):
    """The real BigEarthNet example patches under the official split lists: the train list's, and all others as test."""
    folder = config.ROOT / settings.data.samples
    train = BigEarthNetMM(folder / "bigearthnet_real", folder / "bigearthnet_splits" / "train.csv.bz2", missing="skip")
    if split == "train":
        return train
    everything = BigEarthNetMM(folder / "bigearthnet_real")
    return _part(everything, [i for i, name in enumerate(everything.ids) if name not in train.ids])


def _source(settings: config.Settings) -> str:
    """What the images come from, as a name for files; of a world, with everything that decides its files."""
    w = settings.world
    if settings.data.source != "world":
        return settings.data.source
    return f"{w.layout}-{w.locations}-{w.through_files}-{w.train}-{w.test}-{w.tile}px-seed{w.seed}"


def _written(settings: config.Settings, name: str, write) -> Path:
    """A tree of the world on disk, written under a temporary name and renamed: one that is there is a whole one."""
    root = _stores(settings) / "world" / _source(settings) / name
    if not root.exists():
        temporary = root.with_name(f"{name}.part")
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        write(temporary)
        temporary.rename(root)
    return root


def pretraining_store(settings: config.Settings) -> Path:
    """The finished store of the pretraining pairs; converts what is missing of it, from the start or from a kill."""
    return _convert(settings, f"{settings.pair}-{_source(settings)}", pairs)


def patch_stores(settings: config.Settings) -> dict[str, Path]:
    """The finished stores of labelled patches, ``train`` and ``test``; converts what is missing."""
    name = f"bigearthnet-{_source(settings)}"
    return {split: _convert(settings, f"{name}-{split}", patches, split) for split in ("train", "test")}


def _convert(settings: config.Settings, name: str, reader, *split: str) -> Path:
    """The finished store of that name. One that is there is used as it is: its source files may be gone by then."""
    target = _stores(settings) / name
    with contextlib.suppress(DataError):  # unfinished or not there
        return Store(target).path
    preprocessing = {m.name: m.preprocessing for m in PAIRS[settings.pair]}
    print(convert(reader(settings, *split), target, preprocessing=preprocessing, workers=settings.data.processes))
    return target

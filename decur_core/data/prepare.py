"""From a profile to finished stores: which data set, which reader, where the converted data lie.

``python -m decur_core.data.prepare PROFILE`` converts without a notebook, also one part of several (``--shard``), and
re-reads what is stored (``--verify``).
"""

import argparse
import contextlib
import shutil
import sys
from pathlib import Path

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from decur_core import config
from decur_core.data import convert as conversion
from decur_core.data.bigearthnet import BigEarthNetMM, BigEarthNetV2
from decur_core.data.geonrw import SPLITS, GeoNRW
from decur_core.data.hha import depth_to_hha
from decur_core.data.modality import PAIRS
from decur_core.data.nyuv2 import NYUv2
from decur_core.data.raster import DataError, Reader, resize
from decur_core.data.samples import RealPairs
from decur_core.data.ssl4eo import SSL4EOS12
from decur_core.data.store import Store
from decur_core.data.sunrgbd import SUNRGBD
from decur_core.running import folders as runs
from decur_core.worlds import rooms, terrain
from decur_core.worlds import sar_optical as synthetic
from decur_core.worlds.files import write_bigearthnet, write_ssl4eo
from decur_core.worlds.rooms import RoomWorld, write_nyuv2, write_sunrgbd
from decur_core.worlds.sar_optical import BigEarthNetWorld, World
from decur_core.worlds.terrain import TerrainWorld, write_geonrw

# Pair -> the data set and split it is pretrained on (paper, section 4), and those with labels it is transferred to.
PRETRAINING = {"sar_optical": ("ssl4eo", "all"), "rgb_dem": ("geonrw", "train"), "rgb_depth": ("sunrgbd", "all")}
LABELLED = {"sar_optical": ("bigearthnet",), "rgb_dem": ("geonrw",), "rgb_depth": ("sunrgbd", "nyuv2")}


class Rooms(Reader):
    """RGB-depth items as they are stored: depth as HHA, image, HHA and mask of one size.

    ``reader`` gives ``rgb, depth, intrinsics, gravity`` and maybe ``mask`` (``SUNRGBD``, ``NYUv2``, ``RoomWorld``);
    HHA comes before the change of size, so that the camera's intrinsics hold. Items: ``rgb`` and ``hha`` uint8
    (3, *size), bilinear; ``mask`` uint8 size, nearest.
    """

    def __init__(self, reader, size: tuple[int, int]):
        self.reader, self.size, self.ids = reader, size, reader.ids

    def __getitem__(self, i: int) -> dict:
        item = self.reader[i]
        hha = depth_to_hha(item["depth"][0], item["intrinsics"], item["gravity"]).transpose(2, 0, 1)
        made = {"id": item["id"]}
        for name, image in (("rgb", item["rgb"]), ("hha", hha)):
            made[name] = np.rint(resize(image, self.size)).clip(0, 255).astype(np.uint8)
        if "mask" in item:
            mask = item["mask"]
            rows, columns = (
                ((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(self.size, mask.shape, strict=True)
            )
            made["mask"] = mask[rows[:, None], columns]
        return made


def _joined(*readers):
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


def world(settings: config.Settings, dataset: str | None = None, split: str = "train"):
    """The miniature world that stands in for a split of a data set, by default of the one the pair is pretrained on.

    Its ``.factors`` are known; ``splits`` says which of its items belong to the split.
    """
    w, dataset = settings.world, dataset or PRETRAINING[settings.pair][0]
    room = {"height": w.tile, "width": w.tile * 4 // 3, "seed": w.seed}
    if dataset == "ssl4eo":
        return World(w.locations, tile=w.tile, layout=w.layout, seed=w.seed)
    if dataset == "bigearthnet":
        return BigEarthNetWorld(w.train + w.test, tile=w.tile, seed=w.seed)
    if dataset == "geonrw":  # split by city
        if split == "test":
            return TerrainWorld(w.test, tile=w.tile, seed=w.seed, stream=1, cities=SPLITS["test"])
        return TerrainWorld(w.locations, tile=w.tile, seed=w.seed)
    if dataset == "sunrgbd":
        return RoomWorld(w.locations + w.test, **room)
    return RoomWorld(w.train + w.test, stream=1, **room)


def splits(settings: config.Settings, dataset: str) -> dict[str, range]:
    """Which items of the miniature world make up each split of a data set."""
    w = settings.world
    if dataset == "ssl4eo":
        return {"all": range(w.locations)}
    train = w.train if dataset in ("bigearthnet", "nyuv2") else w.locations
    start = 0 if dataset == "geonrw" else train
    return {"train": range(train), "test": range(start, start + w.test)}


def _write(settings: config.Settings, dataset: str, root: Path, parts: dict[str, range]) -> None:
    """These items of the miniature world as files in the published layout of a data set."""
    if dataset == "geonrw":
        for split, part in parts.items():
            write_geonrw(root, world(settings, dataset, split), part)
    elif dataset == "ssl4eo":
        write_ssl4eo(root, world(settings, dataset), parts["all"])
    else:
        writers = {"bigearthnet": write_bigearthnet, "sunrgbd": write_sunrgbd, "nyuv2": write_nyuv2}
        writers[dataset](root, world(settings, dataset), parts)


def _files(settings: config.Settings, dataset: str, root: Path, split: str, missing: str = "error"):
    """Reader of a data set's files in the published layout."""
    if dataset == "ssl4eo":
        return SSL4EOS12(root)
    if dataset == "bigearthnet" and not (root / "metadata.parquet").exists():
        return BigEarthNetMM(root, split, exclude=_excluded(settings, root), missing=missing)
    if dataset == "bigearthnet":
        part = None if split == "all" else split
        return BigEarthNetV2(root, part, exclude=settings.transfer.exclude, missing=missing)
    readers = {"geonrw": GeoNRW, "sunrgbd": SUNRGBD, "nyuv2": NYUv2}
    return readers[dataset](root, None if split == "all" else split, missing=missing)


def _excluded(settings: config.Settings, root: Path) -> list[Path]:
    lists = sorted(root.glob("patches_with_*")) if settings.transfer.exclude else []
    if settings.transfer.exclude and not lists:
        wanted = "the published lists of patches with snow, cloud or shadow"
        raise DataError(f"{root}: no patches_with_*, {wanted}; put them there or set transfer: exclude to false")
    return lists


def _samples(settings: config.Settings, dataset: str, split: str):
    """The real sample files that have the form of a data set."""
    folder = config.ROOT / settings.data.samples
    if dataset == "ssl4eo":
        return RealPairs(folder)
    if dataset == "sunrgbd":
        return SUNRGBD(folder / "sunrgbd_native_sample")
    if dataset == "nyuv2":
        return NYUv2(folder / "nyu_rgbd_sample", split, missing="skip")
    if dataset != "bigearthnet":
        raise DataError(f"{folder}: no sample files of {dataset}; choose data.source published or world")
    # The real example patches under the official split lists: the train list's, and all others as test.
    train = BigEarthNetMM(folder / "bigearthnet_real", folder / "bigearthnet_splits" / "train.csv.bz2", missing="skip")
    if split == "train":
        return train
    everything = BigEarthNetMM(folder / "bigearthnet_real")
    return _part(everything, [i for i, name in enumerate(everything.ids) if name not in train.ids])


def reader(settings: config.Settings, dataset: str, split: str):
    """Reader of a data set as ``data.source`` gives it, with ``.ids``; items in physical units.

    ``dataset``: ssl4eo, bigearthnet, geonrw, sunrgbd, nyuv2; ``split``: train, test or all. For the miniature world the
    first ``world.through_files`` items of every split are written to disk in the published layout, if they are not
    there, and read back like any other download; the rest is rendered when asked for.
    """
    if settings.data.source == "samples":
        return _samples(settings, dataset, split)
    if settings.data.source == "published":
        return _files(settings, dataset, config.ROOT / getattr(settings.data, dataset), split)
    parts = splits(settings, dataset)
    if split == "all" and split not in parts:
        return _joined(*(reader(settings, dataset, part) for part in parts))
    whole = 16 if dataset == "geonrw" else 1  # patches of a tile
    written = {k: part[: min(settings.world.through_files, len(part)) // whole * whole] for k, part in parts.items()}
    made = world(settings, dataset, split)
    if not written[split]:
        return _part(made, parts[split])
    root = _written(settings, dataset, lambda folder: _write(settings, dataset, folder, written))
    files = _files(settings, dataset, root, split, missing="skip")
    return _joined(files, _part(made, parts[split][len(files) :]))


def pairs(settings: config.Settings):
    """Reader of the pretraining pairs."""
    return reader(settings, *PRETRAINING[settings.pair])


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
        with runs.locked(root.parent, wait=True):  # drivers side by side need it; it takes seconds
            if not root.exists():  # another process may just have finished it
                shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
                write(temporary)
                temporary.rename(root)
    return root


def pretraining_store(settings: config.Settings) -> Path:
    """The finished store of the pretraining pairs; converts what is missing of it, from the start or from a kill."""
    return store(settings, *PRETRAINING[settings.pair])


def labelled_stores(settings: config.Settings, dataset: str) -> dict[str, Path]:
    """The finished stores of a data set with labels, ``train`` and ``test``; converts what is missing."""
    if dataset not in LABELLED[settings.pair]:
        allowed = ", ".join(LABELLED[settings.pair])
        raise config.ConfigError(f"dataset = {dataset!r}; labelled data of pair {settings.pair}: {allowed}")
    return {split: store(settings, dataset, split) for split in ("train", "test")}


def patch_stores(settings: config.Settings) -> dict[str, Path]:
    """``labelled_stores`` of BigEarthNet."""
    return labelled_stores(settings, "bigearthnet")


def known_factors(settings: config.Settings) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Factors of the pretraining images of a miniature world, in the store's order, and who sees each of them.

    name -> float32 (n,), uniform in [-1, 1]; name -> ``common`` or the one modality that carries it, without those
    that the 8-bit mapping removes.
    """
    if settings.data.source != "world":
        raise config.ConfigError(f"data: source = {settings.data.source!r}; factors are known for the miniature world")
    seen = {"sar_optical": synthetic.FACTORS, "rgb_dem": terrain.FACTORS, "rgb_depth": rooms.FACTORS}[settings.pair]
    kept = {name: "hha" if who == "depth" else who for name, who in seen.items() if name not in terrain.REMOVED}
    return world(settings).factors, kept


def store(settings: config.Settings, dataset: str, split: str, *, shard: tuple[int, int] = (0, 1)) -> Path:
    """The finished store of a data set's split; ``shard`` (i, n): converts only the i-th of n parts of it.

    One that is there is used as it is: its source files may be gone by then.
    """
    target = _target(settings, dataset, split)
    with contextlib.suppress(DataError):  # unfinished or not there
        return Store(target).path
    images = reader(settings, dataset, split)
    if dataset in ("sunrgbd", "nyuv2"):
        d, w = settings.data, settings.world
        world_size = (w.tile, w.tile * 4 // 3)
        images = Rooms(images, world_size if d.source == "world" else (d.rgbd_height, d.rgbd_width))
    options = {"preprocessing": {m.name: m.preprocessing for m in PAIRS[settings.pair]}, "shard": shard}
    print(conversion.convert(images, target, workers=settings.data.processes, **options))
    return target


def _target(settings: config.Settings, dataset: str, split: str) -> Path:
    known = sorted({PRETRAINING[settings.pair][0], *LABELLED[settings.pair]})
    if dataset not in known or split not in (allowed := {**splits(settings, dataset), "all": None}):
        state = f"dataset = {dataset!r}, split = {split!r}; data sets of pair {settings.pair}: {', '.join(known)}"
        raise config.ConfigError(state + (f"; splits: {', '.join(allowed)}" if dataset in known else ""))
    return _stores(settings) / f"{dataset}-{_source(settings)}-{split}"


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 if ``--verify`` finds damage."""
    parser = argparse.ArgumentParser(
        prog="python -m decur_core.data.prepare", description="Convert, without a notebook."
    )
    parser.add_argument("profile", help="a file in notebooks/profiles, without .yaml")
    parser.add_argument("--pair", choices=tuple(PRETRAINING), help="by default the profile's")
    parser.add_argument("--dataset", help="by default the one that the pair is pretrained on")
    parser.add_argument("--split", default=None, help="train, test or all; by default the one of pretraining")
    config.add_shard(parser, "convert part I (0 to N - 1) of N, for job arrays")
    parser.add_argument("--verify", action="store_true", help="re-read what is stored and say what is damaged")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. data.processes=8"
    )
    args = parser.parse_args(argv)
    try:
        settings = config.load(args.profile, config.overrides(args.set), pair=args.pair)
        dataset, split = PRETRAINING[settings.pair]
        dataset, split = args.dataset or dataset, args.split or split
        if args.verify:
            damaged = conversion.verify(_target(settings, dataset, split))
            print(*(f"{id}: {reason}\n" for id, reason in damaged.items()), sep="", end="")
            if damaged:
                sys.exit(f"{len(damaged)} damaged; remove that store or part of it and convert again")
            return
        store(settings, dataset, split, shard=args.shard)
    except (config.ConfigError, DataError, OSError, RuntimeError) as error:  # the last: another process has the store
        sys.exit(str(error))


if __name__ == "__main__":
    main()

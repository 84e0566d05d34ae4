"""From a profile to finished stores: which data set, which reader, where the converted data lie.

``python -m decur_core.data.prepare PROFILE`` converts without a notebook, also one part of several (``--shard``), and
re-reads what is stored (``--verify``).
"""

import argparse
import contextlib
import pkgutil
import shutil
import sys
from pathlib import Path

import numpy as np

from decur_core import config
from decur_core.data import convert as conversion
from decur_core.data import datasets, folders
from decur_core.data.datasets import DataSet
from decur_core.data.raster import DataError, Joined, Part, Reader
from decur_core.data.store import Store
from decur_core.running import folders as runs
from decur_core.running.files import disk


def miniature(dataset: DataSet):
    """The drawn twin of a data set, a ``worlds.Miniature``; it is named, as worlds are drawn with what readers know."""
    if not dataset.world:
        raise config.ConfigError(f"data: source = 'world'; no miniature world stands in for {dataset.title}")
    return pkgutil.resolve_name(dataset.world)


def _stores(settings: config.Settings) -> Path:
    return Path(settings.data.stores) / settings.profile


class Told(Reader):
    """What is drawn, told as such: ids and dates, which the published layouts of its files need, would look real."""

    def __init__(self, reader: Reader):
        self.reader, self.ids, self.factors = reader, reader.ids, getattr(reader, "factors", {})

    def __getitem__(self, i: int) -> dict:
        return {k: v for k, v in self.reader[i].items() if k != "dates"} | {"id": f"drawn {i + 1}"}


def world(settings: config.Settings, dataset: str | None = None, split: str = "train") -> Reader:
    """The drawn world, with its ``.factors``, that stands in for a data set's split; by default the pretraining's."""
    return Told(miniature(datasets.find(dataset or _pretraining(settings)[0])).drawn(settings.world, split))


def reader(settings: config.Settings, dataset: str, split: str) -> Reader:
    """Reader of a data set as ``data.source`` gives it, with ``.ids``; items in physical units.

    ``dataset``: a name of ``datasets.names``; ``split``: one of its splits, or all. For a miniature world the first
    ``world.through_files`` items of every split are written to disk in the published layout, if they are not there, and
    read back like any other download; the rest, and all with a ``world.common`` below 2, is rendered when asked for.
    """
    found, part = datasets.find(dataset), None if split == "all" else split
    if settings.data.source == "samples":
        if not found.samples:
            folder = settings.data.samples
            raise DataError(f"{folder}: no sample files of {dataset}; choose data.source published or world")
        return found.samples(Path(settings.data.samples), part)
    if settings.data.source == "published":
        return found.read(config.root_of(settings, dataset), part, **_excluding(settings, found))
    twin = miniature(found)
    parts = twin.parts(settings.world)
    if split == "all" and split not in parts:
        return Joined(*(reader(settings, dataset, each) for each in parts))
    through = settings.world.through_files if twin.writer and not twin.unshared(settings.world) else 0
    written = {k: places[: min(through, len(places)) // twin.whole * twin.whole] for k, places in parts.items()}
    made = twin.drawn(settings.world, split)
    if not written[split]:
        return Part(made, parts[split])
    root = _written(settings, dataset, lambda folder: twin.write(folder, settings.world, written))
    files = found.read(root, part, missing="skip")
    return Joined(files, Part(made, parts[split][len(files) :]))


def _excluding(settings: config.Settings, dataset: DataSet) -> dict[str, bool]:
    told = settings.transfer.exclude and dataset.excludes and settings.data.source == "published"
    return {"exclude": True} if told else {}


def pairs(settings: config.Settings) -> Reader:
    """Reader of the pretraining pairs, to look at them."""
    found = reader(settings, *_pretraining(settings))
    return Told(found) if settings.data.source == "world" else found


def _pretraining(settings: config.Settings) -> tuple[str, str]:
    found = datasets.pretraining(settings.pair, settings.data.dataset)
    return found.name, found.pretrain


def _source(settings: config.Settings) -> str:
    """What the images come from, as a name for files; of a world, with everything that decides its files."""
    w = settings.world
    if settings.data.source != "world":
        return settings.data.source
    shared = "" if w.common == 2 else f"-common{w.common}"
    return f"{w.layout}-{w.locations}-{w.through_files}-{w.train}-{w.test}-{w.tile}px-seed{w.seed}{shared}"


def _written(settings: config.Settings, name: str, write) -> Path:
    """A tree of the world on disk, written under a temporary name and renamed: one that is there is a whole one."""
    root = _stores(settings) / "world" / _source(settings) / name
    if not root.exists():
        temporary = root.with_name(f"{name}.part")
        with runs.locked(root.parent, wait=True), disk(root):  # drivers side by side need the lock; it takes seconds
            if not root.exists():  # another process may just have finished it
                shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
                write(temporary)
                temporary.rename(root)
    return root


def pretraining_store(settings: config.Settings) -> Path:
    """The finished store of the pretraining pairs; converts what is missing of it, from the start or from a kill."""
    return store(settings, *_pretraining(settings))


def labelled_stores(settings: config.Settings, dataset: str) -> dict[str, Path]:
    """The finished stores of a data set with labels, ``train``, ``test``, further ones; converts what is missing."""
    labelled = [d.name for d in datasets.of_pair(settings.pair) if d.task]
    if dataset not in labelled:
        raise config.ConfigError(f"dataset = {dataset!r}; labelled data of pair {settings.pair}: {', '.join(labelled)}")
    return {split: store(settings, dataset, split) for split in ("train", "test", *datasets.find(dataset).further)}


def known_factors(settings: config.Settings) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Factors of the pretraining images of a miniature world, in the store's order, and who sees each of them.

    name -> float32 (n,), uniform in [-1, 1]; name -> ``common`` or the modalities that carry it, without those that the
    8-bit mapping removes, joined in their order.
    """
    if settings.data.source != "world":
        raise config.ConfigError(f"data: source = {settings.data.source!r}; factors are known for the miniature world")
    (name, split), names = _pretraining(settings), [m.name for m in config.modalities(settings)]
    twin, w = miniature(datasets.find(name)), settings.world
    drawn = [(twin.drawn(w, k).factors, part) for k, part in twin.parts(w).items() if split in (k, "all")]
    factors = {f: np.concatenate([each[f][p.start : p.stop] for each, p in drawn]) for f in drawn[0][0]}
    seen_by = {f: who.split("+") for f, who in twin.seen_by(w).items()}
    if wrong := [f for f, who in seen_by.items() if {*who} - {*names} and who != ["common"]]:
        raise config.ConfigError(f"{twin.title}: {wrong[0]} is seen by {seen_by[wrong[0]]}; modalities: {names}")
    return factors, {f: "+".join(m for m in names if m in who) or "common" for f, who in seen_by.items()}


def store(settings: config.Settings, dataset: str, split: str, *, shard: tuple[int, int] = (0, 1), **options) -> Path:
    """The finished store of a data set's split; ``shard`` (i, n): converts only the i-th of n parts of it.

    One that is there is used as it is: its source files may be gone by then. ``options``: of ``convert``.
    """
    target, found, drawn = _target(settings, dataset, split), datasets.find(dataset), settings.data.source == "world"
    excluding = _excluding(settings, found)
    size = (settings.data.rgbd_height, settings.data.rgbd_width)
    size = miniature(found).size(settings.world) if drawn and found.stored else size
    with contextlib.suppress(DataError):  # unfinished or not there
        there = Store(target)
        if found.stored and (old := there.shapes[found.modalities[0].name][1:]) != size:
            way = "remove it, or set data.rgbd_height and data.rgbd_width to that"
            raise config.ConfigError(f"{target}: holds images of {old[0]} x {old[1]} px; {way}")
        had, asked = (str(bool(x)).lower() for x in (there.meta["data"].get("exclude"), excluding))
        if had != asked:
            raise config.ConfigError(f"{target}: made with transfer.exclude: {had}; remove it, or set that")
        if not there.meta["quarantined"] or not options.get("retry"):
            return there.path
    images = reader(settings, dataset, split)
    images = found.stored(images, size) if found.stored else images
    preprocessing = {m.name: _measured(settings, m, target, images) for m in found.modalities}
    about = {"name": found.name, "title": miniature(found).title if drawn else found.title, "split": split}
    classes = list(found.task.classes) if found.task and getattr(images, "labelled", True) else []
    about |= {"source": settings.data.source, "drawn": drawn, "classes": classes, **excluding}
    options |= {"preprocessing": preprocessing, "shard": shard, "workers": settings.data.processes}
    print(conversion.convert(images, target, about=about, **options))
    return target


def _measured(settings: config.Settings, modality, target: Path, images: Reader):
    """A modality with its 8-bit mapping; one that is declared without is measured on the pretraining images."""
    if modality.scheme != "measured":
        return modality
    first = _target(settings, *_pretraining(settings))
    with contextlib.suppress(DataError):  # not there yet
        return modality.mapped(Store(first).meta["preprocessing"][modality.name])
    images = images if target == first else reader(settings, *_pretraining(settings))
    return modality.mapped(folders.measure(images, modality))


def _target(settings: config.Settings, dataset: str, split: str) -> Path:
    known = [d.name for d in datasets.of_pair(settings.pair)]
    allowed = dict.fromkeys([*datasets.find(dataset).splits, "all"]) if dataset in known else {}
    if split not in allowed:
        state = f"dataset = {dataset!r}, split = {split!r}; data sets of pair {settings.pair}: {', '.join(known)}"
        raise config.ConfigError(state + (f"; splits: {', '.join(allowed)}" if allowed else ""))
    return _stores(settings) / f"{dataset}-{_source(settings)}-{split}"


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 if ``--verify`` finds damage."""
    parser = argparse.ArgumentParser(prog="python -m decur_core.data.prepare", description="Convert data sets.")
    parser.add_argument("profile", help="a file in notebooks/profiles, without .yaml")
    parser.add_argument("--pair", help="by default the profile's")
    parser.add_argument("--dataset", help="by default the one that the pair is pretrained on")
    parser.add_argument("--split", default=None, help="train, test or all; by default the one of pretraining")
    config.add_shard(parser, "convert part I (0 to N - 1) of N, for job arrays")
    parser.add_argument("--retry", action="store_true", help="try again what is quarantined")
    about = "share of the samples that may be quarantined in a finished store (default: 0.05)"
    parser.add_argument("--allowed", type=float, default=0.05, metavar="SHARE", help=about)
    parser.add_argument("--verify", action="store_true", help="re-read what is stored and say what is damaged")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="data.processes=8")
    args = parser.parse_args(argv)
    try:
        settings = config.load(args.profile, config.overrides(args.set), pair=args.pair)
        dataset, split = _pretraining(settings)
        dataset, split = args.dataset or dataset, args.split or split
        if args.verify:
            damaged = conversion.verify(_target(settings, dataset, split))
            print(*(f"{id}: {reason}\n" for id, reason in damaged.items()), sep="", end="")
            if damaged:
                sys.exit(f"{len(damaged)} damaged; remove that store or part of it and convert again")
            return
        store(settings, dataset, split, shard=args.shard, retry=args.retry, allowed=args.allowed)
    except (config.ConfigError, DataError, OSError, RuntimeError) as error:  # the last: another process has the store
        sys.exit(str(error))


if __name__ == "__main__":
    main()

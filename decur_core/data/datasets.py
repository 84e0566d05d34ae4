"""The table of data sets. Each reader module declares its own; others are added by ``register``, or by a profile."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from decur_core.data import modality
from decur_core.data.modality import Modality
from decur_core.data.raster import DataError, Reader
from decur_core.data.tasks import Masks, Scene, Task

# In the order of the book; what is drawn and never published stands with its world
_READERS = ("ssl4eo", "bigearthnet", "geonrw", "sunrgbd", "nyuv2", "ombria", "ssl4eo_v11")
_MODULES = (*(f"data.{name}" for name in _READERS), "worlds.three")
_TABLE: dict[str, "DataSet"] = {}
_OWN: set[str] = set()  # names that profiles have declared; another profile may declare them otherwise


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """All that anyone needs to know of a data set.

    ``read(root, split, missing=...)`` gives a reader with ``ids`` and ``[i]``, whose items hold an array in physical
    units per modality (and ``labels`` or ``mask``); ``split``: one of ``splits``, or None for all of them.
    """

    name: str  # in settings and folders
    title: str  # for readers
    pair: str  # the modalities' name in settings; data sets of one pair can follow one another
    modalities: tuple[Modality, ...]  # two or more
    read: Callable[..., Reader]
    splits: tuple[str, ...] = ("train", "test")
    pretrain: str = ""  # the split on which encoders are pretrained, or "all"; "": the data set is for transfer
    task: Task | None = None
    further: tuple[str, ...] = ()  # splits beside ``test`` that a trained network is scored on
    seasons: tuple[int, ...] = (0,)  # of an item's images, those that its labels are about
    stored: Callable | None = None  # (reader, (height, width)) -> reader of what is stored; None: what is read
    samples: Callable | None = None  # (folder, split) -> reader of a few real files
    world: str = ""  # "module:name" of the miniature world that stands in for it
    excludes: bool = False  # whether `read` takes exclude=True (transfer.exclude)
    cite: str = ""  # key in the book's bibliography


def register(dataset: DataSet) -> DataSet:
    """Make a data set known by its name, in the place of one that had it."""
    used = [m.name for m in dataset.modalities]
    if len({*used} - {"id", "labels", "mask"}) < max(2, len(used)):
        raise ValueError(f"data set {dataset.name!r}: modalities {used}; at least two, none called id, labels or mask")
    for other in of_pair(dataset.pair):
        if other.name != dataset.name and other.modalities != dataset.modalities:
            raise ValueError(f"data set {dataset.name!r}: pair {dataset.pair!r} has other modalities in {other.name!r}")
    _TABLE[dataset.name] = dataset
    return dataset


def find(name: str) -> DataSet:
    """The data set of this name; a DataError names those that are known."""
    if name not in names():
        raise DataError(f"data set {name!r} is not known; known: {', '.join(_TABLE)}")
    return _TABLE[name]


def names() -> list[str]:
    """Of every data set; fills the table with the library's own, late, as readers are slow to import."""
    for module in _MODULES:
        for dataset in importlib.import_module(f"decur_core.{module}").DATASETS:
            _TABLE.setdefault(dataset.name, dataset)
    return list(_TABLE)


def of_pair(pair: str) -> list[DataSet]:
    """The data sets whose modalities go by this name."""
    return [_TABLE[name] for name in names() if _TABLE[name].pair == pair]


def pairs() -> list[str]:
    """Names of the pairs (or larger groups) of modalities."""
    return list(dict.fromkeys(_TABLE[name].pair for name in names()))


def modalities_of(pair: str) -> tuple[Modality, ...]:
    """The modalities of a pair, in their order."""
    if pair not in pairs():
        raise DataError(f"pair {pair!r} is not known; known: {', '.join(pairs())}")
    return of_pair(pair)[0].modalities


def pretraining(pair: str, name: str = "") -> DataSet:
    """That on which encoders of a pair are pretrained: the named one, or the first that names a split for it."""
    modalities_of(pair)
    return next(d for d in of_pair(pair) if d.pretrain and name in ("", d.name))


def declare(modalities: Mapping[str, Mapping], specs: Mapping[str, Mapping]) -> None:
    """Register the data sets that a profile declares, and its own modalities with them; ValueError: what is wrong."""
    own = {name: modality.declared(name, spec) for name, spec in modalities.items()}
    for name, spec in specs.items():
        if name in names() and name not in _OWN:
            raise ValueError(f"data set {name!r} is there already; give your own another name")
        declared(name, spec, own)
        _OWN.add(name)


def declared(name: str, spec: Mapping, modalities: Mapping[str, Modality]) -> DataSet:
    """Register the data set of layout ``folders`` that a profile declares.

    ``spec``: modalities (names), and maybe splits, labels or masks (names of classes), title, resample, pair, drawn (a
    miniature world can stand in for it); ``modalities``: the declared ones. Raises ValueError for what does not fit.
    """
    from decur_core.data import folders  # which needs this module

    known = {"modalities": (), "splits": (), "labels": (), "masks": (), "title": name, "pair": name}
    known |= {"resample": False, "drawn": False}
    if unknown := [key for key in spec if key not in known]:
        raise ValueError(f"data set {name!r}: {', '.join(unknown)} unknown; known: {', '.join(known)}")
    kinds = {tuple: (list | tuple, "a list"), bool: (bool, "true or false"), str: (str, "text")}
    for key, value in spec.items():
        kind, words = kinds[type(known[key])]
        if not isinstance(value, kind):
            raise ValueError(f"data set {name!r}: {key} = {value!r}; expected {words}")
    given = SimpleNamespace(**known | dict(spec))
    own = {m.name: m for m in vars(modality).values() if isinstance(m, Modality)} | dict(modalities)
    if unknown := [m for m in given.modalities if m not in own]:
        raise ValueError(f"data set {name!r}: modality {unknown[0]!r} is not declared; known: {', '.join(own)}")
    chosen, splits = tuple(own[m] for m in given.modalities), tuple(given.splits) or ("all",)
    options = {"resample": given.resample, "classes": given.labels, "masks": given.masks}
    about = {"name": name, "title": given.title, "pair": given.pair, "splits": splits, "pretrain": splits[0]}
    about["read"] = lambda root, split=None, **more: folders.Folders(root, chosen, split, **options, **more)
    about["task"] = Scene(tuple(given.labels)) if given.labels else Masks(tuple(given.masks)) if given.masks else None
    about["world"] = "decur_core.worlds.folders:OWN" if given.drawn else ""
    return register(DataSet(**about, modalities=chosen))

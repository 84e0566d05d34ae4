"""Profiles: every number of a run, strict and typed. Defaults are the paper's for SAR-optical pretraining."""

import argparse
import contextlib
import dataclasses
import difflib
import itertools
import json
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ROOT / "notebooks" / "profiles"


# Pairs and their two modalities; pairs.py says what they are, without it the headless driver need not load torch.
MODALITIES = {"sar_optical": ("sar", "optical"), "rgb_dem": ("rgb", "dem"), "rgb_depth": ("rgb", "hha")}
# Pretraining methods as readers know them, in the order of the paper's tables.
METHODS = {
    "random": "Random initialisation",
    "supervised": "Supervised",
    "simclr": "SimCLR-cross",
    "clip": "CLIP",
    "barlow_twins": "Barlow Twins",
    "vicreg": "VICReg",
    "barlow_twins_single": "Barlow Twins, single modality",
    "decur": "DeCUR",
}
BACKBONES = ("resnet18", "resnet50", "mit_b0", "mit_b2", "mit_b5", "small")
INPUTS = ("both", *dict.fromkeys(m for pair in MODALITIES.values() for m in pair))


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


def setting(default, meaning: str, *, low=None, high=None, choices: tuple = (), pattern="", result: bool = True):
    """A field with its meaning and unit. ``result=False``: the setting cannot change what a training run computes."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices, "pattern": pattern, "result": result}
    factory = {"default_factory": lambda: default} if isinstance(default, dict) else {"default": default}
    return field(metadata=metadata, **factory)


@dataclass(frozen=True)
class Data:
    """Where images come from and where converted stores go. Relative paths start at the repository root."""

    source: str = setting("published", "where images come from", choices=("published", "world", "samples"))
    ssl4eo: str = setting("data/ssl4eo-s12", "root of SSL4EO-S12: s1/ and s2c/", result=False)
    bigearthnet: str = setting("data/bigearthnet", "root of BigEarthNet-MM (v1), or v2 with its parquet", result=False)
    geonrw: str = setting("data/geonrw", "root of GeoNRW: a folder per city", result=False)
    sunrgbd: str = setting("data/sunrgbd", "root of SUN RGB-D: SUNRGBD/, split lists, labels", result=False)
    nyuv2: str = setting("data/nyuv2", "root of NYU Depth v2, as a tree or as the labelled .mat", result=False)
    rgbd_height: int = setting(480, "height of stored RGB-depth images, px", low=8)
    rgbd_width: int = setting(640, "width of stored RGB-depth images, px", low=8)
    samples: str = setting("../shared/data", "folder of real sample files (source: samples)", result=False)
    stores: str = setting("stores", "folder for converted data, one subfolder per profile", result=False)
    processes: int = setting(4, "processes that convert", low=0, high=512, result=False)


@dataclass(frozen=True)
class World:
    """The miniature worlds (source: world): known factors rendered as the images of a pair."""

    locations: int = setting(2048, "pretraining locations", low=1)
    through_files: int = setting(64, "of these (and of the patches), written as GeoTIFF and read", low=0, result=False)
    train: int = setting(1024, "labelled patches for training a classifier", low=1, result=False)
    test: int = setting(512, "labelled patches for testing it", low=1, result=False)
    tile: int = setting(36, "side (height, for rooms) of an image, px; a multiple of 6", low=6)
    layout: str = setting("coregistered", "scene layout over views", choices=("coregistered", "redrawn"))
    seed: int = setting(0, "seed of scenes and factors", low=0, high=2**63 - 1)


@dataclass(frozen=True)
class Transfer:
    """Training on labels (paper, appendix B); defaults: scene classification on BigEarthNet-MM."""

    protocols: tuple[str, ...] = setting(("linear", "finetune"), "what is trained", choices=("linear", "finetune"))
    inputs: tuple[str, ...] = setting(("both",), "modalities given", choices=INPUTS)
    fractions: tuple[float, ...] = setting((0.01, 1.0), "share of the training labels, 0 to 1", low=0, high=1)
    segmenter: str = setting("fcn", "network on the encoders where pixels have labels", choices=("fcn", "cmx"))
    epochs: int = setting(100, "passes over the labelled images", low=1)
    iterations: int = setting(0, "steps; 0: as many as the epochs have", low=0)
    batch_size: int = setting(256, "images per step", low=1)
    optimizer: str = setting("sgd", "update rule", choices=("sgd", "adamw"))
    learning_rate_linear: float = setting(0.5, "rate with frozen encoders", low=0)
    learning_rate_finetune: float = setting(0.05, "rate when all weights are trained", low=0)
    weight_decay: float = setting(0.0, "decay of the weights", low=0)
    schedule: str = setting("steps", "of the rate", choices=("steps", "polynomial", "constant"))
    milestones: tuple[int, ...] = setting((60, 80), "epochs after which the rate falls to a tenth (steps)", low=1)
    warmup_epochs: int = setting(0, "epochs in which the rate rises from 0 (polynomial)", low=0)
    crop_size: int = setting(224, "side of a network input, px", low=8)
    crop_scale: float = setting(0.8, "smallest share of an image's area that a crop keeps", low=0.01, high=1)
    scales: tuple[float, ...] = setting((1.0,), "sizes at which a segmentation is predicted and averaged", low=0.1)
    flip: bool = setting(False, "also predict mirrored images, and average")
    exclude: bool = setting(False, "leave out patches that lists named patches_with_* in the root name", result=False)


@dataclass(frozen=True)
class Settings:
    """All settings of a profile; ``load`` makes and checks it."""

    profile: str = setting("", "name of the profile", result=False)
    name: str = setting("", "suffix of the run's folder, which tells it from others", pattern=r"[\w.-]*", result=False)
    variant: str = setting("", "chosen part of the profile, and what varies", pattern=r"[\w.-]*", result=False)
    pair: str = setting("sar_optical", "modality pair", choices=tuple(MODALITIES))
    method: str = setting("decur", "pretraining loss; supervised and random: none", choices=tuple(METHODS))
    single: int = setting(1, "modality that barlow_twins_single trains, 1 or 2", low=1, high=2)
    backbone: str = setting("resnet50", "network of each modality", choices=BACKBONES)
    projector: tuple[int, ...] = setting((8192, 8192, 8192), "output widths of the projector's layers, or []", low=1)
    shared_projector: bool = setting(False, "one projector for both modalities, as in the published code")
    dim_common: int = setting(7168, "common embedding dimensions; 87.5 % of the last projector width", low=0)
    decoupling: bool = setting(True, "decur has unique dimensions; false: all are common")
    intra: bool = setting(True, "decur has intra-modal terms")
    lambd: float = setting(0.0051, "weight of the off-diagonal correlations (decur, barlow_twins)", low=0)
    temperature: float = setting(0.1, "of simclr; clip learns its own", low=0.001)
    crop_size: int = setting(224, "side of a view, px", low=8)
    epochs: int = setting(100, "passes over the pairs", low=1)
    batch_size: int = setting(256, "pairs per step, over all processes", low=2)
    optimizer: str = setting("lars", "update rule", choices=("lars", "adamw"))
    learning_rate: float = setting(0.2, "starting rate of the weights", low=0)
    learning_rate_biases: float = setting(0.0048, "starting rate of biases and normalisation parameters", low=0)
    momentum: float = setting(0.9, "LARS momentum", low=0, high=0.999999)
    weight_decay: float = setting(1e-6, "decay of the weights", low=0)
    trust_coefficient: float = setting(0.001, "LARS trust coefficient", low=0)
    seed: int = setting(0, "seed of weights, sample order, seasons and augmentations", low=0, high=2**63 - 1)
    precision: str = setting("auto", "of the network; auto: bfloat16 on GPUs", choices=("auto", "float32", "bfloat16"))
    compile: str = setting("off", "torch.compile mode of the backbones", choices=("off", "default", "reduce-overhead"))
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"), result=False)
    processes: int = setting(0, "that train, on this node; 0: one per visible GPU, 1 on a CPU", low=0, result=False)
    workers: int = setting(8, "threads that read ahead, in each process", low=0, high=512, result=False)
    checkpoint_steps: int = setting(500, "steps between checkpoints", low=1, result=False)
    log_steps: int = setting(20, "steps between lines of the log and checks for non-finite losses", low=1, result=False)
    explain_samples: int = setting(10000, "pairs over which saliency is counted", low=1, result=False)
    runs: str = setting("runs", "folder of results", result=False)
    sweep: dict = setting({}, "what compared runs vary: setting: values, or name: dictionaries", result=False)
    data: Data = field(default_factory=Data)
    world: World = field(default_factory=World)
    transfer: Transfer = field(default_factory=Transfer)


def load(
    profile: str = "mini", overrides: dict | str | None = None, *, pair: str | None = None, variant: str = ""
) -> Settings:
    """Settings of ``notebooks/profiles/<profile>.yaml`` (or of a YAML file's path) with ``overrides`` on top.

    ``overrides``: nested or dotted names, e.g. ``{"epochs": 5, "world.locations": 64}``, or the same as YAML text (so
    that ``papermill -p overrides "{epochs: 5}"`` works). ``pair``: the modality pair, else the one that overrides or
    profile name. ``variant``: a name in the profile's section ``variants``, such as an ablation. What the sections
    ``pairs`` and ``variants`` say under these names lies, in this order, between the profile and the overrides.
    Raises ``ConfigError`` for an unknown profile or name, a wrong type (``1e-6`` counts as a number) and values that
    are out of range or contradict each other.
    """
    path = Path(profile) if str(profile).endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ConfigError(f"profile {str(profile)!r}: no file {path}; existing profiles: {known}")
    values, top = _section(path.read_text(), path.name), _section(overrides, "overrides")
    layers = {k: _section(values.pop(k, None), f"{path.name}: {k}") for k in ("pairs", "variants")}
    if unknown := set(layers["pairs"]) - set(MODALITIES):
        raise ConfigError(f"{path.name}: pairs: unknown pair {unknown.pop()!r}; allowed: {', '.join(MODALITIES)}")
    variant = str(variant or top.get("variant") or "")
    if variant and variant not in layers["variants"]:
        known = ", ".join(layers["variants"]) or "none"
        raise ConfigError(f"{path.name}: variants: {variant!r} is not there; defined: {known}")
    pair = str(pair or top.get("pair") or values.get("pair") or Settings.pair)
    chosen = dict(_section(layers["variants"].get(variant), f"{path.name}: variants: {variant}"))
    inner = _section(chosen.pop("pairs", None), f"{path.name}: variants: {variant}: pairs")  # what it says for a pair
    for layer in (layers["pairs"].get(pair), chosen, inner.get(pair)):
        values = _merge(values, _section(layer, f"{path.name}: pairs or variants, {pair}"))
    values = _merge(values, top) | {"pair": pair, "variant": variant}
    settings = dataclasses.replace(_build(Settings, values, path.name), profile=path.stem)
    _check(settings)
    members(settings)
    return settings


def _section(values, where: str) -> dict:
    """Named values, given as a dict or as YAML text; an empty text or None holds none."""
    values = _parsed(values, where)
    if not isinstance(values, dict | None):
        raise ConfigError(f"{where}: expected `name: value` lines, found {values!r}")
    return values or {}


def _parsed(values, where: str):
    """``values``, read as YAML if they are text."""
    try:
        values = yaml.safe_load(values) if isinstance(values, str) else values
        json.dumps(values, default=str, skipkeys=True)  # refuses values that contain themselves
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    return values


def _merge(base: dict, top: dict) -> dict:
    """``top`` laid over ``base``, section by section; dotted names in either are opened up first."""
    merged: dict = {}
    for source in (base, top):
        for name, value in source.items():
            head, _, rest = str(name).partition(".")
            value, found = {rest: value} if rest else value, merged.get(head)
            if rest and not isinstance(found, dict | None):
                raise ConfigError(f"{head} = {found!r}; expected a section, since {name!r} is set too")
            if head == "sweep":  # replaces the profile's as a whole; its own names are dotted
                merged[head] = {**(found or {}), **value} if rest else value
            elif isinstance(value, dict):
                merged[head] = _merge(found if isinstance(found, dict) else {}, value)
            else:
                merged[head] = value
    return merged


def _build(cls: type, values: dict, where: str):
    known = {f.name: f for f in dataclasses.fields(cls) if f.name != "profile"}
    made = {}
    for key, value in values.items():
        name = f"{where}: {key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown setting {str(key)!r}; {hint}")
        kind = known[key].type
        if not dataclasses.is_dataclass(kind):
            made[key] = _cast(value, kind, name)
            _in_range(made[key], known[key].metadata, name)
        elif isinstance(value, dict):
            made[key] = _build(kind, value, name)
        else:
            raise ConfigError(f"{name} = {value!r}; expected a section of `name: value` lines")
    return cls(**made)


def _cast(value, kind, name: str):
    """``value`` as ``kind``; numbers written like 1e-6, which YAML takes for text, count as numbers."""
    if isinstance(kind, types.GenericAlias):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} = {value!r}; expected a list, e.g. [{value}]")
        return tuple(_cast(v, kind.__args__[0], name) for v in value)
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            if kind is float:
                return number
            if number.is_integer():
                return value if isinstance(value, int) else int(number)  # large ones are not exact as floats
    elif kind in (bool, str, dict) and isinstance(value, kind):
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a section"}[kind]
    raise ConfigError(f"{name} = {value!r}; expected {expected}")


def _in_range(value, metadata, name: str) -> None:
    low, high = metadata["low"], metadata["high"]
    for v in value if isinstance(value, tuple) else (value,):
        allowed = None
        if metadata["choices"] and v not in metadata["choices"]:
            allowed = ", ".join(metadata["choices"])
        elif metadata["pattern"] and not re.fullmatch(metadata["pattern"], v):
            allowed = "letters, digits, '.', '_' and '-'"
        # Written so that NaN, which compares as neither, is refused too.
        elif (low is not None and not v >= low) or (high is not None and not v <= high):
            allowed = f"{low} or more" if high is None else f"{low} to {high}"
        elif v == float("inf"):
            allowed = "finite numbers"
        if allowed:
            raise ConfigError(f"{name} = {v!r}; allowed: {allowed}")


def _check(s: Settings) -> None:
    """Settings that are fine alone and impossible together."""
    for name in ("protocols", "inputs", "fractions"):
        if not getattr(s.transfer, name):
            raise ConfigError(f"transfer: {name} = []; at least one value is needed")
    if not all(s.transfer.fractions):
        raise ConfigError(f"transfer: fractions = {list(s.transfer.fractions)}; each must lie above 0 and at most at 1")
    if wrong := set(s.transfer.inputs) - {"both", *MODALITIES[s.pair]}:
        allowed = ", ".join(("both", *MODALITIES[s.pair]))
        raise ConfigError(f"transfer: inputs = {wrong.pop()!r}, but pair = {s.pair!r} has: {allowed}")
    if s.projector:  # without one, the width is known where networks are made
        check_dim_common(s, s.projector[-1])
    if s.world.tile % 6:
        raise ConfigError(f"world: tile = {s.world.tile}; a multiple of 6 is needed (bands of 10, 20 and 60 m)")
    if s.data.source == "world" and s.world.locations < s.batch_size:
        raise ConfigError(f"batch_size = {s.batch_size} is more than world: locations = {s.world.locations}")
    if not s.runs:
        raise ConfigError("runs = ''; expected the name of a folder")


def check_dim_common(settings: Settings, width: int) -> None:
    """Refuse more common dimensions than an embedding of ``width`` has, where the loss tells them from the others."""
    if settings.method == "decur" and settings.decoupling and settings.dim_common > width:
        source = "the last width of projector" if settings.projector else f"the width of {settings.backbone}"
        found = f"dim_common = {settings.dim_common} is more than the embedding has"
        raise ConfigError(f"{found}: {source} is {width}; allowed: 0 to {width}")


def overrides(items: Iterable[str]) -> dict:
    """The ``KEY=VALUE`` items of a command line as overrides for ``load``; values are YAML."""
    made = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected KEY=VALUE")
        made[key] = _parsed(value, f"--set {item}")
    return made


def check_shard(part: int, count: int) -> None:
    """Refuse a part of a work that cannot be: ``part`` is 0 to ``count`` - 1."""
    if not 0 <= part < count:
        raise ConfigError(f"shard {part}/{count}: expected I/N with I from 0 to N - 1")


def add_shard(parser: argparse.ArgumentParser, meaning: str) -> None:
    """The option ``--shard I/N`` of a command line, a pair of numbers."""

    def shard(text: str) -> tuple[int, int]:
        try:
            check_shard(*(parts := [int(number) for number in text.split("/")]))
        except (TypeError, ValueError):  # the first: not two of them
            raise argparse.ArgumentTypeError(f"{text!r}; expected I/N with I from 0 to N - 1") from None
        return tuple(parts)

    parser.add_argument("--shard", metavar="I/N", type=shard, default=(0, 1), help=meaning)


def check_world_size(settings: Settings, world_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly over ``world_size`` processes."""
    if settings.batch_size % world_size:
        fits = settings.batch_size // world_size * world_size or world_size
        found = f"batch_size = {settings.batch_size} is not divisible by the world size of {world_size} processes"
        raise ConfigError(f"{found}; nearest that is: {fits}")


def members(settings: Settings) -> list[Settings]:
    """One ``Settings`` for each combination of the ``sweep`` lists; without a sweep, the settings themselves."""
    for name, values in settings.sweep.items():
        if name in ("profile", "variant", "sweep") or not isinstance(values, list) or not values:
            expected = "expected a setting's name and a list with at least one value"
            raise ConfigError(f"sweep: {name} = {values!r}; {expected}")
    base = {k: v for k, v in to_dict(settings).items() if k not in ("profile", "variant", "sweep")}
    made = []
    for combination in itertools.product(*settings.sweep.values()):
        chosen = {}  # a dictionary in a list sets several settings at once, whatever the list is called
        for name, value in zip(settings.sweep, combination, strict=True):
            chosen |= value if isinstance(value, dict) else {name: value}
        # Method and seed are in every run's name; whatever else is varied has to tell the runs' folders apart.
        parts = [f"{k.split('.')[-1]}{v}" for k, v in chosen.items() if k not in ("method", "seed")]
        about = {"variant": re.sub(r"[^\w.-]+", "_", "-".join(filter(None, [settings.variant, *parts])))}
        member = _build(Settings, _merge(base, chosen), "sweep")
        made.append(dataclasses.replace(member, profile=settings.profile, **about))
        _check(made[-1])
    return made


def to_dict(settings) -> dict:
    """Nested plain values, as JSON and YAML hold them (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _fields(cls: type = Settings, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Dotted name and field of every setting."""
    for f in dataclasses.fields(cls):
        if f.metadata:
            yield prefix + f.name, f
        else:
            yield from _fields(f.type, f"{f.name}.")


def identity(settings: Settings) -> dict:
    """The settings that decide what a pretraining run computes, as a flat dict of dotted names."""
    values, flat = to_dict(settings), {}
    skipped = ("transfer",) if settings.data.source == "world" else ("transfer", "world")
    for name, f in _fields():
        section, _, inner = name.rpartition(".")
        if f.metadata["result"] and section not in skipped:
            flat[name] = values[section][inner] if section else values[name]
    return flat


def defaults() -> dict:
    """The default of every setting, as ``identity`` would give it."""
    return json.loads(json.dumps({name: default for name, default, _ in describe()}))


def describe() -> list[tuple[str, object, str]]:
    """(name, default, meaning) of every setting, for the book's table."""
    rows = []
    for name, f in _fields():
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        choices = ", ".join(f.metadata["choices"])
        rows.append((name, default, f.metadata["meaning"] + (f": {choices}" if choices else "")))
    return rows

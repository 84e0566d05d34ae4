"""Profiles: every number of a run, strict and typed. Defaults are the paper's for SAR-optical pretraining."""

import contextlib
import dataclasses
import difflib
import itertools
import json
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ROOT / "notebooks" / "profiles"


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

    source: str = setting("ssl4eo", "pretraining pairs", choices=("ssl4eo", "world", "samples"))
    ssl4eo: str = setting("data/ssl4eo-s12", "root of SSL4EO-S12: s1/ and s2c/", result=False)
    bigearthnet: str = setting("data/bigearthnet", "root of BigEarthNet-MM (v1)", result=False)
    samples: str = setting("../shared/data", "folder of real sample files (source: samples)", result=False)
    stores: str = setting("stores", "folder for converted data, one subfolder per profile", result=False)
    processes: int = setting(4, "processes that convert", low=0, high=512, result=False)


@dataclass(frozen=True)
class World:
    """The miniature world (source: world): known factors rendered as Sentinel-1 and Sentinel-2 tiles."""

    locations: int = setting(2048, "pretraining locations", low=1)
    through_files: int = setting(64, "of these (and of the patches), written as GeoTIFF and read", low=0, result=False)
    train: int = setting(1024, "labelled patches for training a classifier", low=1, result=False)
    test: int = setting(512, "labelled patches for testing it", low=1, result=False)
    tile: int = setting(36, "tile side, px at 10 m; a multiple of 6", low=6)
    layout: str = setting("coregistered", "scene layout over views", choices=("coregistered", "redrawn"))
    seed: int = setting(0, "seed of scenes and factors", low=0, high=2**63 - 1)


@dataclass(frozen=True)
class Transfer:
    """Scene classification on BigEarthNet-MM (paper, appendix B)."""

    protocols: tuple[str, ...] = setting(("linear", "finetune"), "what is trained", choices=("linear", "finetune"))
    inputs: tuple[str, ...] = setting(("both",), "modalities given", choices=("both", "sar", "optical"))
    fractions: tuple[float, ...] = setting((0.01, 1.0), "share of the training labels, 0 to 1", low=0, high=1)
    epochs: int = setting(100, "passes over the labelled patches", low=1)
    milestones: tuple[int, ...] = setting((60, 80), "epochs after which the rate falls to a tenth", low=1)
    batch_size: int = setting(256, "patches per step", low=1)
    learning_rate_linear: float = setting(0.5, "SGD rate of the frozen protocol", low=0)
    learning_rate_finetune: float = setting(0.05, "SGD rate when all weights are trained", low=0)
    crop_size: int = setting(224, "side of a network input, px", low=8)
    crop_scale: float = setting(0.8, "smallest share of a patch's area that a crop keeps", low=0.01, high=1)
    exclude: bool = setting(False, "leave out patches that lists named patches_with_* in the root name", result=False)


@dataclass(frozen=True)
class Settings:
    """All settings of a profile; ``load`` makes and checks it."""

    profile: str = setting("", "name of the profile", result=False)
    name: str = setting("", "suffix of the run's folder, which tells it from others", pattern=r"[\w.-]*", result=False)
    pair: str = setting("sar_optical", "modality pair", choices=("sar_optical",))
    method: str = setting("decur", "pretraining loss", choices=("decur", "barlow_twins", "random"))
    backbone: str = setting("resnet50", "network of each modality", choices=("resnet18", "resnet50", "small"))
    projector: tuple[int, ...] = setting((8192, 8192, 8192), "output widths of the projector's layers", low=1)
    dim_common: int = setting(7168, "common embedding dimensions; 87.5 % of the last projector width", low=0)
    lambd: float = setting(0.0051, "weight of the off-diagonal correlations", low=0)
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
    runs: str = setting("runs", "folder of results", result=False)
    sweep: dict = setting({}, "settings to vary in notebooks that compare runs, each with its list", result=False)
    data: Data = field(default_factory=Data)
    world: World = field(default_factory=World)
    transfer: Transfer = field(default_factory=Transfer)


def load(profile: str = "mini", overrides: dict | str | None = None) -> Settings:
    """Settings of ``notebooks/profiles/<profile>.yaml`` (or of a YAML file's path) with ``overrides`` on top.

    ``overrides``: nested or dotted names, e.g. ``{"epochs": 5, "world.locations": 64}``, or the same as YAML text (so
    that ``papermill -p overrides "{epochs: 5}"`` works). Raises ``ConfigError`` for an unknown profile or name, a wrong
    type (``1e-6`` counts as a number) and values that are out of range or contradict each other.
    """
    path = Path(profile) if str(profile).endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ConfigError(f"profile {str(profile)!r}: no file {path}; existing profiles: {known}")
    values = _merge(_section(path.read_text(), path.name), _section(overrides, "overrides"))
    settings = dataclasses.replace(_build(Settings, values, path.name), profile=path.stem)
    _check(settings)
    members(settings)
    return settings


def _section(values, where: str) -> dict:
    """Named values, given as a dict or as YAML text; an empty text or None holds none."""
    try:
        values = yaml.safe_load(values) if isinstance(values, str) else values
        json.dumps(values, default=str, skipkeys=True)  # refuses values that contain themselves
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{where}: expected `name: value` lines, found {values!r}")
    return values or {}


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
    lists = {"projector": s.projector}
    lists |= {f"transfer: {name}": getattr(s.transfer, name) for name in ("protocols", "inputs", "fractions")}
    for name, values in lists.items():
        if not values:
            raise ConfigError(f"{name} = []; at least one width or value is needed")
    if not all(s.transfer.fractions):
        raise ConfigError(f"transfer: fractions = {list(s.transfer.fractions)}; each must lie above 0 and at most at 1")
    if s.dim_common > s.projector[-1]:
        allowed = f"the last width of projector is {s.projector[-1]}; allowed: 0 to {s.projector[-1]}"
        raise ConfigError(f"dim_common = {s.dim_common} is more than the embedding has: {allowed}")
    if s.world.tile % 6:
        raise ConfigError(f"world: tile = {s.world.tile}; must be a multiple of 6 (bands at 10, 20 and 60 m)")
    if s.data.source == "world" and s.world.locations < s.batch_size:
        raise ConfigError(f"batch_size = {s.batch_size} is more than world: locations = {s.world.locations}")
    if not s.runs:
        raise ConfigError("runs = ''; expected the name of a folder")


def check_world_size(settings: Settings, world_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly over ``world_size`` processes."""
    if settings.batch_size % world_size:
        fits = settings.batch_size // world_size * world_size or world_size
        found = f"batch_size = {settings.batch_size} is not divisible by the world size of {world_size} processes"
        raise ConfigError(f"{found}; nearest that is: {fits}")


def members(settings: Settings) -> list[Settings]:
    """One ``Settings`` for each combination of the ``sweep`` lists; without a sweep, the settings themselves."""
    for name, values in settings.sweep.items():
        if name in ("profile", "sweep") or not isinstance(values, list) or not values:
            expected = "expected a setting's name and a list with at least one value"
            raise ConfigError(f"sweep: {name} = {values!r}; {expected}")
    base = {k: v for k, v in to_dict(settings).items() if k not in ("profile", "sweep")}
    made = []
    for combination in itertools.product(*settings.sweep.values()):
        values = _merge(base, dict(zip(settings.sweep, combination, strict=True)))
        made.append(dataclasses.replace(_build(Settings, values, "sweep"), profile=settings.profile))
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


def describe() -> list[tuple[str, object, str]]:
    """(name, default, meaning) of every setting, for the book's table."""
    rows = []
    for name, f in _fields():
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        choices = ", ".join(f.metadata["choices"])
        rows.append((name, default, f.metadata["meaning"] + (f": {choices}" if choices else "")))
    return rows

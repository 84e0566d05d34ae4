"""Profiles: every number of a run, strict and typed. Defaults are the paper's for SAR-optical pretraining."""

import dataclasses
import difflib
import itertools
import json
import re
import types
import typing
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
    through_files: int = setting(
        64, "of these (and of the patches), written to disk as GeoTIFF and read back", low=0, result=False
    )
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
    exclude: bool = setting(True, "leave out patches with snow, cloud or shadow", result=False)


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
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"), result=False)
    processes: int = setting(0, "that train, on this node; 0: one per visible GPU, 1 on a CPU", low=0, result=False)
    workers: int = setting(8, "loader processes", low=0, high=512, result=False)
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
    values = _parse(path.read_text(), path.name)
    if isinstance(overrides, str):
        overrides = _parse(overrides, "overrides")
    settings = _build(Settings, _merge(values, _section(overrides or {}, "overrides")), path.name)
    settings = dataclasses.replace(settings, profile=path.stem)
    _check(settings)
    members(settings)
    return settings


def _parse(text: str, where: str) -> dict:
    try:
        values = yaml.safe_load(text)
        json.dumps(values, default=str)  # refuses values that contain themselves
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    return _section({} if values is None else values, where)


def _section(values, where: str) -> dict:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected `name: value` lines, found {values!r}")
    return values


def _merge(base: dict, top: dict) -> dict:
    """``top`` laid over ``base``, section by section; dotted names in either are opened up first."""
    merged: dict = {}
    for source in (base, top):
        for name, value in source.items():
            head, _, rest = str(name).partition(".")
            value = {rest: value} if rest else value
            found = merged.get(head)
            if head == "sweep" and not rest:
                merged[head] = value  # a sweep replaces the profile's as a whole; its own names are dotted
            elif isinstance(value, dict) and isinstance(found, dict):
                merged[head] = {**found, **value} if head == "sweep" else _merge(found, value)
            elif rest and found is not None:
                raise ConfigError(f"{head} = {found!r}; expected a section, since {name!r} is set too")
            else:
                merged[head] = value if head == "sweep" or not isinstance(value, dict) else _merge({}, value)
    return merged


def _build(cls: type, values: dict, where: str):
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints or name == "profile":
            known = [k for k in hints if k != "profile"]
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown setting {str(name)!r}; {hint}")
    made = {}
    for f in dataclasses.fields(cls):
        if f.name not in values:
            continue
        value, name = values[f.name], f"{where}: {f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} = {value!r}; expected a section of `name: value` lines")
            made[f.name] = _build(hints[f.name], value, name)
        else:
            made[f.name] = _cast(value, hints[f.name], name)
            _in_range(made[f.name], f.metadata, name)
    return cls(**made)


def _cast(value, kind, name: str):
    """``value`` as ``kind``; numbers written like 1e-6, which YAML takes for text, count as numbers."""
    if isinstance(kind, types.GenericAlias):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} = {value!r}; expected a list, e.g. [{value}]")
        return tuple(_cast(v, kind.__args__[0], name) for v in value)
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
            if kind is float or number.is_integer():
                return number if kind is float else int(value) if isinstance(value, int) else int(number)
        except (ValueError, OverflowError):
            pass
    elif kind in (bool, str, dict) and isinstance(value, kind):
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a section"}[kind]
    raise ConfigError(f"{name} = {value!r}; expected {expected}")


def _in_range(value, metadata, name: str) -> None:
    for v in value if isinstance(value, tuple) else (value,):
        if metadata["choices"] and v not in metadata["choices"]:
            raise ConfigError(f"{name} = {v!r}; allowed: {', '.join(metadata['choices'])}")
        if metadata["pattern"] and not re.fullmatch(metadata["pattern"], v):
            raise ConfigError(f"{name} = {v!r}; allowed: letters, digits, '.', '_' and '-'")
        low, high = metadata["low"], metadata["high"]
        # Written so that NaN, which compares as neither, is refused too.
        if (low is not None and not v >= low) or (high is not None and not v <= high):
            allowed = f"{low} or more" if high is None else f"{low} to {high}"
            raise ConfigError(f"{name} = {v!r}; allowed: {allowed}")
        if isinstance(v, float) and v == float("inf"):
            raise ConfigError(f"{name} = {v!r}; must be finite")


def _check(s: Settings) -> None:
    """Settings that are fine alone and impossible together."""
    if not s.projector:
        raise ConfigError("projector = []; at least one width is needed")
    if s.dim_common > s.projector[-1]:
        raise ConfigError(
            f"dim_common = {s.dim_common} is more than the embedding has: the last width of projector is"
            f" {s.projector[-1]}; allowed: 0 to {s.projector[-1]}"
        )
    if s.world.tile % 6:
        raise ConfigError(f"world: tile = {s.world.tile}; must be a multiple of 6 (bands at 10, 20 and 60 m)")
    if s.data.source == "world" and s.world.locations < s.batch_size:
        raise ConfigError(f"batch_size = {s.batch_size} is more than world: locations = {s.world.locations}")
    if not all(s.transfer.fractions):
        raise ConfigError(f"transfer: fractions = {list(s.transfer.fractions)}; each must lie above 0 and at most at 1")
    for name in ("protocols", "inputs", "fractions"):
        if not getattr(s.transfer, name):
            raise ConfigError(f"transfer: {name} = []; at least one is needed")
    if not s.runs:
        raise ConfigError("runs = ''; expected the name of a folder")


def check_world_size(settings: Settings, world_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly over ``world_size`` processes."""
    if settings.batch_size % world_size:
        fits = settings.batch_size // world_size * world_size or world_size
        raise ConfigError(
            f"batch_size = {settings.batch_size} is not divisible by the world size of {world_size} processes;"
            f" nearest that is: {fits}"
        )


def members(settings: Settings) -> list[Settings]:
    """One ``Settings`` for each combination of the ``sweep`` lists; without a sweep, the settings themselves."""
    for name, values in settings.sweep.items():
        if name in ("profile", "sweep") or not isinstance(values, list) or not values:
            raise ConfigError(
                f"sweep: {name} = {values!r}; expected a setting's name and a list with at least one value"
            )
    made = []
    for combination in itertools.product(*settings.sweep.values()):
        values = _merge(to_dict(settings), dict(zip(settings.sweep, combination, strict=True)))
        member = _build(Settings, {k: v for k, v in values.items() if k not in ("profile", "sweep")}, "sweep")
        member = dataclasses.replace(member, profile=settings.profile)
        _check(member)
        made.append(member)
    return made


def to_dict(settings) -> dict:
    """Nested plain values, as JSON and YAML hold them (tuples become lists)."""
    values = dataclasses.asdict(settings)
    return _listed(values)


def _listed(value):
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def identity(settings: Settings) -> dict:
    """The settings that decide what a pretraining run computes, as a flat dict of dotted names."""
    flat = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if f.name == "transfer" or (f.name == "world" and settings.data.source != "world"):
            continue
        if dataclasses.is_dataclass(value):
            inner = [g for g in dataclasses.fields(value) if g.metadata["result"]]
            flat |= {f"{f.name}.{g.name}": _listed(getattr(value, g.name)) for g in inner}
        elif f.metadata["result"]:
            flat[f.name] = _listed(value)
    return flat


def describe(cls: type = Settings, prefix: str = "") -> list[tuple[str, object, str]]:
    """(name, default, meaning) of every setting, for the book's table."""
    rows = []
    for f in dataclasses.fields(cls):
        if "meaning" in f.metadata:
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            choices = f.metadata["choices"]
            rows.append(
                (prefix + f.name, default, f.metadata["meaning"] + (f": {', '.join(choices)}" if choices else ""))
            )
        else:
            rows += describe(f.default_factory, f"{f.name}.")
    return rows

"""Profiles and command lines: YAML 1.2 read strictly, layers, sweeps, extensions, shards. Knows no setting."""

import argparse
import copy
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from decur_core.running.kinds import ROOT, meant
from decur_core.running.sections import ConfigError, Section, at

PROFILES = ROOT / "notebooks" / "profiles"
FIXED = ("profile", "variant", "sweep", "extensions", "modalities", "datasets")  # one for all members of a sweep


class _Loader(yaml.BaseLoader):
    """Every scalar stays the text that was typed: its setting decides what it means. No key stands twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


@functools.lru_cache
def _tree(text: str | bytes):
    return yaml.load(text, _Loader)  # by Python: libyaml ends the process on deep nesting. A long profile takes 50 ms


def parse(text: str | bytes, where: str):
    """YAML as dictionaries, lists and text; None if there is nothing. A key given twice is refused with its line."""
    try:
        return copy.deepcopy(_tree(text))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def section(values, where: str) -> dict:
    """Named values, given as a dictionary or as YAML; None and an empty text hold none."""
    values = parse(values, where) if isinstance(values, str | bytes) else values
    if not isinstance(values, dict | None):
        raise ConfigError(f"{where}: expected `name: value` lines, found {values!r}")
    return dict(values or {})


def located(profile: str | Path) -> str:
    """A profile's name as it is; the path of a YAML file made absolute, so that it holds in any folder."""
    path = os.path.expanduser(str(profile))
    return os.path.abspath(path) if path.endswith((".yaml", ".yml")) else path


def layered(model: type[Section], profile: str | Path, overrides, **chosen: str | None) -> tuple[dict, list[str]]:
    """A profile, what its sections ``pairs`` and ``variants`` say, and ``overrides``, laid over each other, nested.

    ``chosen``: pair and variant, unless overrides or profile name them. Also returns the pairs that have sections.
    """
    file = Path(located(profile))
    file = file if file.is_absolute() else PROFILES / f"{profile}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ConfigError(f"profile {str(profile)!r}: no file {file}; existing profiles: {known}")
    values, top = section(file.read_bytes(), file.name), section(overrides, "overrides")
    pairs, variants = (section(values.pop(k, None), f"{file.name}: {k}") for k in ("pairs", "variants"))
    values, here = model.given(values, file.name), Path.cwd()
    extensions, last = values.get("extensions", []), model.given(top, "overrides", here)
    chosen = {k: v or last.get(k, values.get(k, model.model_fields[k].default)) for k, v in chosen.items()}
    pair, variant = chosen["pair"], chosen["variant"]
    if variant and variant not in variants:
        raise ConfigError(f"{file.name}: variants: {variant!r} is not there; defined: {', '.join(variants) or 'none'}")
    part = section(variants.get(variant), f"{file.name}: variants: {variant}")
    inner = section(part.pop("pairs", None), f"{file.name}: variants: {variant}: pairs")  # what it says for a pair
    for layer in (pairs.get(pair), part, inner.get(pair)):
        where = f"{file.name}: pairs or variants, {pair}"
        values = model.over(values, section(layer, where), where)
    values = model.over(values, top, "overrides", here) | chosen | {"profile": file.stem}
    if values.get("extensions", []) != extensions:
        raise ConfigError(f"extensions = {values['extensions']}; they stand at the top of a profile, nowhere else")
    return values, [*pairs, *inner]


def combinations(sweep: dict) -> Iterator[dict]:
    """What each member of a sweep sets."""
    for name, values in sweep.items():
        if name.partition(".")[0] in FIXED or not isinstance(values, list) or not values:
            expected = "expected a setting's name and a list with at least one value"
            raise ConfigError(f"sweep: {name} = {values!r}; {expected}")
    for combination in itertools.product(*sweep.values()):
        chosen: dict = {}
        for name, value in zip(sweep, combination, strict=True):
            chosen |= value if isinstance(value, dict) else {name: value}
        yield chosen


def assigned(model: type[Section], items: Iterable[str]) -> dict:
    """``NAME=VALUE`` of a command line, typed. VALUE is text where the setting takes text alone, else YAML."""
    made = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected KEY=VALUE")
        where, here = f"--set {item}", Path.cwd()
        try:
            typed = parse(text, where) if name.startswith("sweep.") else text
            made[name] = at(model.given({name: typed}, where, here), name)
        except ConfigError:
            made[name] = at(model.given({name: parse(text, where)}, where, here), name)
    return made


def extend(files: Iterable[str]) -> None:
    """Import Python files, once each; their folders come on the path, so that helper processes find them too."""
    for file in map(Path, files):
        if not file.is_file():
            raise ConfigError(f"extensions: no file {file}{meant(file)}")
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        try:
            module = importlib.import_module(file.stem)
        except Exception as error:
            raise ConfigError(f"extensions: {file}: {type(error).__name__}: {error}") from error
        if not os.path.samefile(getattr(module, "__file__", None) or sys.executable, file):
            raise ConfigError(f"extensions: {file}: another module is called {file.stem}; give the file another name")


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


def check_world_size(settings, world_size: int) -> None:
    """Refuse a batch that cannot be shared out evenly over ``world_size`` processes."""
    if settings.batch_size % world_size:
        fits = settings.batch_size // world_size * world_size or world_size
        found = f"batch_size = {settings.batch_size} is not divisible by the world size of {world_size} processes"
        raise ConfigError(f"{found}; nearest that is: {fits}")

"""What settings are made of: YAML 1.2 read strictly, types, paths, dotted names, and pydantic's errors in words.

Knows no setting and nothing else of this library; ``config.py`` says what there is.
"""

import argparse
import difflib
import importlib
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    JsonValue,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ROOT / "notebooks" / "profiles"
FIXED = ("profile", "variant", "sweep", "extensions", "modalities", "datasets")  # one for all members of a sweep
WHOLE = ("sweep", "blocks")  # given as a dictionary they replace what lies below; their dotted names add to it

# What the core schema of YAML 1.2 takes for a number. `inf` is none there; it counts, to be refused as not finite.
_INTEGER = re.compile(r"[-+]?[0-9]{1,999}|0o[0-7]+|0x[0-9a-fA-F]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?inf")
_TRUTH = {"true": True, "false": False}
_TYPES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
_TYPES |= {"array": "a list", "object": "a section of `name: value` lines"}
_LIMITS = {"minimum": "{} or more", "exclusiveMinimum": "above {}", "maximum": "at most {}"}
_LIMITS |= {"exclusiveMaximum": "below {}", "minItems": "at least {} in the list", "maxItems": "at most {}"}
_LIMITS["multipleOf"] = "a multiple of {}"
_WRITTEN: dict[str, str] = {}  # absolute path: how it was written, for messages


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


class _Loader(yaml.BaseLoader):
    """Every scalar stays the text that was typed: its setting decides what it means. No key stands twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(text: str | bytes, where: str):
    """YAML as dictionaries, lists and text; None if there is nothing. A key given twice is refused with its line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def section(values, where: str) -> dict:
    """Named values, given as a dictionary or as YAML; None and an empty text hold none."""
    values = parse(values, where) if isinstance(values, str | bytes) else values
    if not isinstance(values, dict | None):
        raise ConfigError(f"{where}: expected `name: value` lines, found {values!r}")
    return dict(values or {})


def _plain(value):
    """Text that YAML 1.2 takes for a number or for true or false, as such; everything else as it is."""
    if not isinstance(value, str):
        return value
    if _INTEGER.fullmatch(value):
        return int(value, 0) if value[:2] in ("0o", "0x") else int(value)
    return float(value) if _REAL.fullmatch(value) else _TRUTH.get(value, value)


def _whole(value):
    value = _plain(value)
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError("expected a whole number below 2^64")
    return value


def _real(value):
    value = _plain(value)
    whole = isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 1024
    return float(value) if whole else value


def _path(text: str, info: ValidationInfo) -> str:
    """A path with ``~`` and ``$VARIABLES`` filled in; a relative one starts at the context's ``base``."""
    base = (info.context or {}).get("base", ROOT)

    def variable(match: re.Match) -> str:
        if (name := match[1] or match[2]) not in os.environ:
            raise ValueError(f"the variable {name} is not set")
        return os.environ[name]

    found = os.path.expanduser(re.sub(r"\$(?:(\w+)|\{(.*?)\})", variable, text))
    if not found or found.startswith("~"):
        raise ValueError("there is no such home folder" if found else "expected a path")
    path = os.path.abspath(base / found)
    if not os.path.isabs(found):
        place = "in a profile means the repository" if base == ROOT else "on a command line means the working folder"
        _WRITTEN[path] = f" ({text!r}; a relative path {place}, {base})"
    return path


def meant(path: Path | str) -> str:
    """For a message that ``path`` is missing: how it was written and where it starts, if it was a relative path."""
    return _WRITTEN.get(str(path), "")


# The types of settings, beside text and choices. Text is converted here and nowhere else.
T = TypeVar("T")
as_whole, as_real = BeforeValidator(_whole), BeforeValidator(_real)  # behind a Field in Annotated
Whole, Real = Annotated[int, as_whole], Annotated[float, as_real]
Flag = Annotated[bool, BeforeValidator(_plain)]
Folder = Annotated[str, AfterValidator(_path)]  # or file; absolute in settings
Listed = Annotated[tuple[T, ...], Strict(False)]
# Of a declaration, whose reader takes text for numbers. True and false have to be told from text beforehand.
Declared = dict[str, Annotated[JsonValue, BeforeValidator(lambda v: _TRUTH.get(v, v) if isinstance(v, str) else v)]]


class Section(BaseModel):
    """A group of settings. Unknown names are refused, nothing is converted without a word, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _opened(cls, values):
        """Dotted names as sections: ``{"world.seed": 1}`` is ``{"world": {"seed": 1}}``."""
        if not isinstance(values, dict):
            return values
        made: dict = {}
        for key, value in values.items():
            name, dot, rest = str(key).partition(".")
            value, found = {rest: value} if dot else value, made.get(name, {})
            if name in made and not (isinstance(value, dict) and isinstance(found, dict) and not value.keys() & found):
                raise ConfigError(f"{key!r} is given twice")
            made[name] = found | value if name in made else value
        return made

    @field_validator("sweep", mode="before", check_fields=False)
    @classmethod
    def _swept(cls, sweep):
        """Its values as their settings take them; a dictionary among them sets several, whatever its list is called."""

        def typed(name: str, value):
            several = {str(k): v for k, v in (value if isinstance(value, dict) else {name: value}).items()}
            found = {k: at(cls.given(several, "sweep"), k) for k in several}
            return found if isinstance(value, dict) else found[name]

        lists = {str(k): v for k, v in sweep.items() if isinstance(v, list)} if isinstance(sweep, dict) else {}
        return sweep | {k: [typed(k, v) for v in values] for k, values in lists.items()} if lists else sweep

    def faults(self) -> Iterable[str]:
        """What is wrong with settings that are each of the right type."""
        return ()

    @classmethod
    def _valid(cls, values: dict, where: str, base: Path) -> Self:
        try:
            return cls.model_validate(values, context={"base": base})
        except ValidationError as error:
            raise ConfigError(f"{where}: {_explained(cls, **error.errors()[0])}") from None

    @classmethod
    def made(cls, values: dict, where: str) -> Self:
        """The settings of ``values``, nested or dotted. ConfigError: the first that is not allowed, and what is."""
        settings = cls._valid(values, where, ROOT)
        for fault in settings.faults():
            raise ConfigError(f"{where}: {fault}")
        return settings

    @classmethod
    def given(cls, values: dict, where: str, base: Path = ROOT) -> dict:
        """``values`` and nothing else, nested, each as its setting takes it, in the types of JSON."""
        if "profile" in values:
            raise ConfigError(f"{where}: unknown setting 'profile'; a profile is called like its file")
        return cls._valid(values, where, base).model_dump(mode="json", exclude_unset=True)

    @classmethod
    def over(cls, below: dict, values: dict, where: str, base: Path = ROOT) -> dict:
        """Nested settings ``below`` with ``values`` in their place."""
        kept = {k: v for k, v in below.items() if k not in WHOLE or k not in values}
        return _merged(kept, cls.given(values, where, base))

    @classmethod
    def fields(cls, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
        """Dotted name and field of every setting."""
        for name, field in cls.model_fields.items():
            inner = is_section(field.annotation)
            yield from field.annotation.fields(f"{prefix}{name}.") if inner else [(prefix + name, field)]


def is_section(kind) -> bool:
    """Whether an annotation is that of a section of settings."""
    return isinstance(kind, type) and issubclass(kind, Section)


def at(values: dict, name: str):
    """The value of a dotted name in nested ``values``."""
    head, _, rest = name.partition(".")
    return values[name] if name in values else at(values[head], rest)


def _merged(base: dict, top: dict) -> dict:
    both = {k: _merged(base[k], v) for k, v in top.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | top | both


def nearest(name: str, names: Iterable[str]) -> str:
    """The known name that an unknown one may stand for, else all that are known."""
    close = difflib.get_close_matches(name, known := list(names), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _explained(model: type[Section], *, type: str, loc: tuple, input, msg: str, ctx: dict | None = None, **_) -> str:
    """One of pydantic's errors in words: the setting's full name, its value, what is allowed."""
    error = (ctx or {}).get("error")
    if isinstance(error, ConfigError):  # says everything
        return str(error)
    names, inside, schema = [], [*loc], {"type": "object"}
    while inside and inside[0] in model.model_fields:
        names.append(inside.pop(0))
        kind, schema = model.model_fields[names[-1]].annotation, model.model_json_schema()["properties"][names[-1]]
        if not is_section(kind):
            break
        model, schema = kind, {"type": "object"}
    if type == "extra_forbidden":
        prefix = "".join(f"{name}." for name in names)
        known = [prefix + name for name in model.model_fields if name != "profile"]
        return f"unknown setting {prefix + inside[0]!r}; {nearest(prefix + inside[0], known)}"
    if inside:  # a key, a position, or one of two types
        names += inside[:1] if schema.get("type") == "object" else []
        schema = schema.get("items") or schema.get("additionalProperties") or schema
    options = schema.get("anyOf", [schema])
    kinds = [o.get("const") or _TYPES.get(o.get("type")) for o in options]
    reason, allowed = str(error or msg), " or ".join(filter(None, map(_limits, options)))
    if type == "tuple_type":
        reason = f"expected a list, e.g. [{input}]"
    elif (type.endswith("_type") or type == "int_from_float") and all(kinds):
        reason = f"expected {' or '.join(kinds)}"
    elif not error and allowed:
        reason = f"allowed: {allowed}{', finite' if type == 'finite_number' else ''}"
    return f"{'.'.join(map(str, names))} = {input!r}; {reason}"


def _limits(schema: dict) -> str:
    """What a JSON schema allows: its choices, or its range."""
    if found := schema.get("enum") or [schema[k] for k in ("const",) if k in schema]:
        return ", ".join(found)
    found = " and ".join(text.format(schema[k]) for k, text in _LIMITS.items() if k in schema)
    return found.replace(" or more and at most", " to")


def choices(kind) -> tuple[str, ...]:
    """The texts that a setting of this annotation, or an element of its list, is one of; () for any other."""
    kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return get_args(kind) if get_origin(kind) is Literal else ()


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
    """``NAME=VALUE`` of a command line, typed. VALUE is text where the setting takes it as it stands, else YAML."""
    made = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected KEY=VALUE")
        where, here = f"--set {item}", Path.cwd()
        try:
            made[name] = at(model.given({name: text}, where, here), name)
        except ConfigError:
            made[name] = at(model.given({name: parse(text, where)}, where, here), name)
    return made


def located(profile: str | Path) -> str:
    """A profile's name as it is; the path of a YAML file made absolute, so that it holds in any folder."""
    path = os.path.expanduser(profile)
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
    chosen = {k: v or last.get(k) or values.get(k) or model.model_fields[k].default for k, v in chosen.items()}
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

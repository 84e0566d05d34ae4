"""Groups of settings: dotted names, layers, and pydantic's errors in words."""

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from decur_core.running.kinds import ROOT

WHOLE = ("sweep", "blocks")  # given as a dictionary they replace what lies below; their dotted names add to it
_TYPES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
_TYPES |= {"array": "a list", "object": "a section of `name: value` lines"}
_LIMITS = {"minimum": "{} or more", "exclusiveMinimum": "above {}", "maximum": "at most {}"}
_LIMITS |= {"exclusiveMaximum": "below {}", "minItems": "at least {} in the list", "maxItems": "at most {}"}
_LIMITS["multipleOf"] = "a multiple of {}"
_schemas = functools.cache(lambda model: model.model_json_schema()["properties"])  # once, not for every error


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


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
        try:
            for fault in settings.faults():
                raise ConfigError(fault)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error
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
        kind, schema = model.model_fields[names[-1]].annotation, _schemas(model)[names[-1]]
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


def describe(model: type[Section], tables: Mapping[str, Callable]) -> list[tuple[str, object, str]]:
    """(name, default, meaning) of every setting; ``tables``: its choices, where they are no part of its type."""
    rows = []
    for name, field in model.fields():
        schema = TypeAdapter(field.annotation).json_schema()
        known = ", ".join(tables[name]() if name in tables else schema.get("items", schema).get("enum", ()))
        rows.append((name, field.default, f"{field.description}{': ' if known else ''}{known}"))
    return rows


def defaults(model: type[Section]) -> dict:
    """The default of every setting by its dotted name, in the types of JSON."""
    return {name: list(f.default) if isinstance(f.default, tuple) else f.default for name, f in model.fields()}

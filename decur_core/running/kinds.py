"""Types of settings: what text means to each of them."""

import os
import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, Strict, ValidationInfo

ROOT = Path(__file__).resolve().parents[2]

# What the core schema of YAML 1.2 takes for a number. `inf` is none there; it counts, to be refused as not finite.
_INTEGER = re.compile(r"[-+]?[0-9]{1,999}|0o[0-7]+|0x[0-9a-fA-F]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?inf")
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WRITTEN: dict[str, str] = {}  # absolute path: how it was written, for messages


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


def _path(text: str, info: ValidationInfo) -> str:
    """A path with ``~`` and ``$VARIABLES`` filled in; a relative one starts at the context's ``base``."""
    base = (info.context or {}).get("base", ROOT)
    found = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$(\w+|\{.*?\})", found):
        raise ValueError(f"the variable {unset[1].strip('{}')} is not set")
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


T = TypeVar("T")
_as_whole, _as_plain = BeforeValidator(_whole), BeforeValidator(_plain)
Flag, Int, Real = Annotated[bool, _as_plain], Annotated[int, _as_whole], Annotated[float, _as_plain]
Natural, Positive = Annotated[int, Field(ge=0), _as_whole], Annotated[int, Field(ge=1), _as_whole]
Weight, Scale = Annotated[float, Field(ge=0), _as_plain], Annotated[float, Field(ge=0.1), _as_plain]
Share = Annotated[float, Field(gt=0, le=1), _as_plain]
Folder = Annotated[str, AfterValidator(_path)]  # or file; absolute in settings
Listed = Annotated[tuple[T, ...], Strict(False)]
# Of a declaration, whose reader takes text for numbers. True and false have to be told from text beforehand.
Declared = dict[str, Annotated[JsonValue, BeforeValidator(lambda v: _TRUTH.get(v, v) if isinstance(v, str) else v)]]

"""The house as its plan has it: a thin library, one method on its top floor, no import back up and none in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from decur_core import config

LIBRARY = config.ROOT / "decur_core"
FILES = sorted(LIBRARY.rglob("*.py"))
METHOD = ("losses", "model", "backbones", "augment", "lars", "pretrain", "config")
# From above to below; a room knows what stands before it. What keeps long work safe serves all of them.
ROOMS = ("running", "data", "worlds", "transfer", "explain", "report")


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(file): file for file in FILES}


def imports(file: Path) -> set[str]:
    """Modules of the library that a file imports, also inside functions, as absolute names."""
    found, package = set(), name_of(file).split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in NAMES}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found |= {full if full in NAMES else base} & NAMES.keys()
    return found - {"decur_core", name_of(file)}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or parts[-1] in ROOMS else ""


def test_no_circle_of_imports():
    TopologicalSorter({name: imports(file) for name, file in NAMES.items()}).prepare()


@pytest.mark.parametrize("lower", ROOMS)
def test_no_room_knows_what_stands_below_it(lower):
    below = ROOMS[ROOMS.index(lower) + 1 :]
    known = {n: {room(i) for i in imports(f)} & {*below} for n, f in NAMES.items() if room(n) == lower}
    assert not {name: rooms for name, rooms in known.items() if rooms}


def test_the_method_stands_apart():
    """Losses, optimiser, networks and augmentation need nothing but torch; pretraining only stores and what runs it."""
    for name in ("correlation", "backbones", "augment", "lars"):
        assert not imports(NAMES[f"decur_core.{name}"]), name
    assert {room(i) for i in imports(NAMES["decur_core.model"])} <= {"", "running"}
    for name in METHOD:
        assert not {room(i) for i in imports(NAMES[f"decur_core.{name}"])} & {"worlds", "transfer", "explain", "report"}


def test_what_is_read_in_an_hour_and_in_an_afternoon():
    lines = {name: len(file.read_text().splitlines()) for name, file in NAMES.items()}
    assert sum(lines[f"decur_core.{name}"] for name in METHOD) <= 1700
    assert sum(lines.values()) <= 11_913  # what comes anew pays with what goes
    assert {name: n for name, n in lines.items() if n > 350} == {}
    assert len([*LIBRARY.glob("*.py")]) <= 11


def test_every_module_says_what_it_is():
    assert not [name for name, file in NAMES.items() if not ast.get_docstring(ast.parse(file.read_text()))]

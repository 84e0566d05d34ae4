"""One pinned set of versions behind pip, conda and make; citation and licence files that tools can read."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>!~\[; ]", requirement)[0]).lower()


def test_every_direct_dependency_is_pinned_exactly():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"test", "bench"}
    for requirement in [*PROJECT["dependencies"], *extras["test"], *extras["bench"]]:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", requirement), requirement


def test_conda_environment_has_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["name"] == "decur" and environment["channels"] == ["conda-forge"]
    assert conda == ["python=3.11", "pip"]
    extras = PROJECT["optional-dependencies"]
    expected = [*PROJECT["dependencies"], *extras["test"], *extras["bench"], "--editable ."]
    assert sorted(pip["pip"]) == sorted(expected)


# An interpreter that notes what it is asked for, and makes an environment of itself.
FAKE = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && cp "$0" "$4/bin/jupyter-book" ;;
esac
"""


def fake_checkout(folder: Path):
    """Makefile and pyproject.toml in ``my work``; ``make(goal, VENV=...)`` there -> (exit code, output, commands)."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    work, log = folder / "my work", folder / "log"
    work.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, work / name)
    (folder / "a python").write_text(FAKE)
    (folder / "a python").chmod(0o755)

    def make(goal: str, **variables):
        log.write_text("")
        command = ["make", goal, *(f"{k}={v}" for k, v in {"PYTHON": folder / "a python", **variables}.items())]
        env = {"PATH": os.environ["PATH"], "LOG": str(log)}
        done = subprocess.run(command, cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout, [line for line in log.read_text().splitlines() if line[:2] != "-c"]

    return work, make


def test_makefile_installs_from_pyproject_and_names_no_version_itself(tmp_path):
    assert "==" not in (ROOT / "Makefile").read_text()
    work, make = fake_checkout(tmp_path)
    install = "-m pip install --quiet --disable-pip-version-check --editable .[test]"
    book = ["-m decur_core.run mini --jobs 2", "build . --all -W --keep-going"]
    assert make("book")[::2] == (0, ["-m venv --clear .venv", install, *book])
    assert make("book")[::2] == (0, book)
    later = (work / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(work / "pyproject.toml", (later, later))
    assert make("soak")[::2] == (0, [install, "-m pytest -q -m soak"])
    (work / ".venv" / "bin" / "python").unlink()
    assert make("soak")[2][:2] == ["-m venv --clear .venv", install]
    os.utime(work / "pyproject.toml", (0, 0))
    assert make("book")[2] == book
    (work / ".venv").rename(work / "an env")  # its programs look for the interpreter where it was
    assert make("book", VENV="an env")[2] == ["-m venv --clear an env", install, *book]
    assert make("book", VENV="an env")[2] == book
    (work / "an env" / ".installed").write_text("")  # of an earlier version
    assert make("book", VENV="an env")[2] == book


def test_make_removes_what_it_made_and_nothing_else(tmp_path):
    work, make = fake_checkout(tmp_path)
    kept = ["my env/mine", "my/mine", "my work/env/mine", "my work/runs/a100/x", "my work/notes.egg-info/x"]
    kept += ["my work/book/executed/report/x", "my work/mini/x"]
    gone = ["my work/runs/mini/x", "my work/stores/start/x", "my work/_build/x", "my work/book/executed/mini/x"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    code, said, commands = make("test", VENV=tmp_path / "my env")
    assert code != 0 and commands == [] and f"{tmp_path / 'my env'} holds something else" in said
    code, said, _ = make("clean", VENV=tmp_path / "my env")
    assert code == 0 and f"{tmp_path / 'my env'} stays: it was not made here" in said
    assert all((tmp_path / name).exists() for name in kept) and not any((tmp_path / name).exists() for name in gone)

    for venv in (tmp_path / "an env", "env of $$HOME; touch x"):
        assert make("test", VENV=venv)[0] == 0
        made = work / str(venv).replace("$$", "$")
        assert (made / "bin" / "python").exists()
        assert make("clean", VENV=venv)[0] == 0 and not made.exists()
    assert all((tmp_path / name).exists() for name in kept) and not (work / "x").exists()
    assert sorted(f.name for f in work.iterdir()) == [
        *("Makefile", "book", "env", "mini", "notes.egg-info", "pyproject.toml", "runs", "stores")
    ]


def test_make_explains_a_missing_python(tmp_path):
    for tool in ("touch", "sh"):
        (tmp_path / tool).symlink_to(f"/bin/{tool}")
    make = subprocess.run(["which", "make"], capture_output=True, text=True).stdout.strip()
    if not make:
        pytest.skip("make is not installed")
    command = [make, "test", f"VENV={tmp_path / 'none'}"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode != 0 and "No Python >= 3.11" in done.stdout and not (tmp_path / "none").exists()


def test_every_package_that_is_imported_is_a_direct_dependency():
    declared = {name(r) for r in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]}
    owners, missing = packages_distributions(), {}
    files = [f for folder in ("decur_core", "book/_ext", "tests", "benchmarks") for f in (ROOT / folder).rglob("*.py")]
    local = {"decur_core", "benchmarks", *(f.stem for f in files)}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in {m.partition(".")[0] for m in modules} - set(sys.stdlib_module_names) - local:
                # cv2 belongs to the bench extra, which need not be installed here.
                owned = {
                    name(owner) for owner in owners.get(module, [{"cv2": "opencv-python-headless"}.get(module, module)])
                }
                if not owned & declared:
                    missing.setdefault(module, []).append(str(file.relative_to(ROOT)))
    assert not missing


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert str(citation["version"]) == PROJECT["version"]
    paper = citation["preferred-citation"]
    assert "Decoupling Common and Unique Representations" in paper["title"] and paper["year"] == 2024
    assert [author["family-names"] for author in paper["authors"]][::5] == ["Wang", "Zhu"]
    assert any("2309.05300" in identifier["value"] for identifier in paper["identifiers"])
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence


def test_ci_runs_both_commands():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -eo pipefail" in script and script.index("make test") < script.index("make book")

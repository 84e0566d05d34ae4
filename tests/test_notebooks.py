"""Every notebook runs in plain papermill, from the repository root, with settings small enough for a test."""

from pathlib import Path

import nbformat
import papermill
import pytest

from decur_core import run

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
TINY = {"epochs": 3, "batch_size": 16, "explain_samples": 16, "transfer": {"epochs": 2, "milestones": [1]}}
WORLD = {"locations": 96, "through_files": 16, "train": 24, "test": 16}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def execute(path: Path, profile: str, overrides: dict, folder: Path):
    out = folder / path.name
    papermill.execute_notebook(path, out, {"profile": profile, "overrides": overrides}, cwd=ROOT, progress_bar=False)
    return nbformat.read(out, as_version=4)


def figures(notebook) -> int:
    return sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Notebooks share runs and stores, as they do in a real run."""
    return tmp_path_factory.mktemp("notebooks")


# 00 trains with the settings of its own profile; `make book` runs it.
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[:2] != "00"], ids=lambda p: p.name[:2])
def test_runs_to_its_last_cell_and_shows_its_figures(path, folder):
    # What is common is read from features, which takes some images and some training: longer runs, of its own.
    longer = path.name[:2] == "42"
    more = {"epochs": 8, "batch_size": 32, "world": {**WORLD, "locations": 512}} if longer else {}
    runs = folder / ("longer" if longer else "runs")
    places = {"runs": str(runs), "data": {"stores": str(folder / "stores"), "processes": 0}}
    done = execute(path, "start", {**TINY, "world": WORLD, **places, **more}, folder)
    assert run.is_finished(done)
    captioned = [c for c in done.cells if "figure" in c.metadata.get("mystnb", {})]
    assert figures(done) == len(captioned) > 0, "every captioned cell shows one figure, and no other cell does"


@pytest.mark.soak
@pytest.mark.parametrize("number", ["10", "20", "30"])
def test_real_samples_pass_through_the_same_notebooks(number, folder):
    if not (SHARED / "bigearthnet_real").is_dir():
        pytest.skip(f"{SHARED} is not here")
    (path,) = run.find([number], ROOT / "notebooks")
    places = {"runs": str(folder / "real"), "data": {"stores": str(folder / "stores"), "samples": str(SHARED)}}
    done = execute(path, "samples", {"epochs": 5, **places}, folder)
    assert run.is_finished(done)

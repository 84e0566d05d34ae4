"""Every notebook runs in plain papermill, from the repository root, with settings small enough for a test."""

import asyncio
import re
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from jupyter_client import AsyncKernelManager
from PIL import Image

from decur_core import run

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
TINY = {"epochs": 3, "batch_size": 16, "explain_samples": 16, "transfer": {"epochs": 2, "milestones": [1]}}
WORLD = {"locations": 96, "through_files": 16, "train": 24, "test": 16}
OWN = {"radar": {"bands": ["VV"], "unit": "8 bits"}, "camera": {"bands": ["B11", "B8", "B3"], "unit": "8 bits"}}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def execute(path: Path, profile: str, overrides: dict, folder: Path, **options):
    out, parameters = folder / path.name, {"profile": profile, "overrides": overrides}
    papermill.execute_notebook(path, out, parameters, cwd=ROOT, progress_bar=False, **options)
    return nbformat.read(out, as_version=4)


def printed(notebook) -> str:
    return "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)


def own_places(root: Path, folder: Path) -> dict:
    """Settings of chapter 02 for a tree of one's own; what it makes lies in the other folder."""
    data = {"roots": {"mine": str(root)}, "stores": str(folder / "stores"), "processes": 0}
    return {"modalities": OWN, "data": data, "runs": str(folder / "runs"), "epochs": 2, "batch_size": 16}


def figures(notebook) -> int:
    return sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Notebooks share runs and stores, as they do in a real run."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def kernel(folder):
    """One kernel for all, emptied before each: the library is loaded once. `make book` starts one for each."""
    manager, empty = AsyncKernelManager(kernel_name="python3"), folder / "empty.ipynb"
    # Ceilings by networks of as few steps as everything else.
    short = "%reset -f\nfrom decur_core.explain import probes\nprobes.STEPS = 6\n%reset -f"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(short)]), empty)

    def ready() -> dict:
        papermill.execute_notebook(empty, None, cwd=ROOT, progress_bar=False, kernel_name="python3", km=manager)
        return {"km": manager}

    yield ready
    asyncio.run(manager.shutdown_kernel(now=True))


# 00 trains with the settings of its own profile; `make book` runs it.
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[:2] != "00"], ids=lambda p: p.name[:2])
def test_runs_to_its_last_cell_and_shows_its_figures(path, folder, kernel):
    # What is common is read from features, which takes some images and some training: longer runs, of its own.
    longer = path.name[:2] == "42"
    more = {"epochs": 4, "auto_share": 0.5, "batch_size": 32, "world": {**WORLD, "locations": 256}} if longer else {}
    runs = folder / ("longer" if longer else "runs")
    places = {"runs": str(runs), "data": {"stores": str(folder / "stores"), "processes": 0}}
    done = execute(path, "start", {**TINY, "world": WORLD, **places, **more}, folder, **kernel())
    assert run.is_finished(done)
    captioned = [c for c in done.cells if "figure" in c.metadata.get("mystnb", {})]
    assert figures(done) == len(captioned) > 0, "every captioned cell shows one figure, and no other cell does"


def test_own_data_are_those_of_a_tree_that_links_rearrange(tmp_path, monkeypatch):
    """Chapter 02 with the profile for one's own folders, on real images, by the lines of the page on data."""
    if not (SHARED / "ombria_half").is_dir():
        pytest.skip(f"{SHARED} is not here")
    for file in (SHARED / "ombria_half").glob("Ombria*/train/[AB]*/*_00[0-4]?.png"):
        link = tmp_path / "shared/data/ombria_half" / file.relative_to(SHARED / "ombria_half")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    count = len(list((tmp_path / "shared").glob("**/OmbriaS1/train/BEFORE/*.png")))
    (lines,) = re.findall(r"```python\n([^`]*ombria_half[^`]*)```", (ROOT / "book/data.md").read_text())
    exec(compile(lines, "data.md", "exec"), {})
    small = own_places(tmp_path / "here/data/mine", tmp_path)
    small |= {"dim_common": 0, "blocks": {"radar+camera": 40, "radar": 24, "camera": 24}}  # as three sensors have them
    (path,) = run.find(["02"], ROOT / "notebooks")
    done = execute(path, "mine", small, tmp_path)
    said = printed(done)
    assert run.is_finished(done) and count > 32 and f"{count} places" in said and "no labels: nothing to score" in said
    assert "radar looks for its own place" in said
    assert len(list((tmp_path / "runs/mine/export").glob("*.safetensors"))) == 2


def test_own_data_with_masks_are_scored_by_them(tmp_path, kernel):
    random, root = np.random.default_rng(0), tmp_path / "mine"
    for folder in ("radar", "camera", "mask"):
        (root / folder).mkdir(parents=True)
    for k in range(40):
        mask = (random.random((24, 24)) < 0.5).astype(np.uint8)
        for name, shape in (("radar", (24, 24)), ("camera", (24, 24, 3))):
            Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(root / name / f"{k}.png")
        Image.fromarray(mask + 1).save(root / f"mask/{k}.png")
    (root / "train.txt").write_text("\n".join(map(str, range(32))))
    (root / "test.txt").write_text("\n".join(map(str, range(32, 40))))
    about = {"title": "mine", "modalities": [*OWN], "splits": ["train", "test"], "masks": ["dry", "wet"]}
    more = {"datasets": {"mine": about}, "crop_size": 20, "transfer": {"epochs": 1, "crop_size": 20}}
    (path,) = run.find(["02"], ROOT / "notebooks")
    done = execute(path, "mine", own_places(root, tmp_path) | more, tmp_path, **kernel())
    said = printed(done)
    assert run.is_finished(done) and re.search(r"linear probe: mIoU.* \d+\.\d", said), said


@pytest.mark.soak
@pytest.mark.parametrize("number", ["10", "20", "30"])
def test_real_samples_pass_through_the_same_notebooks(number, folder):
    if not (SHARED / "bigearthnet_real").is_dir():
        pytest.skip(f"{SHARED} is not here")
    (path,) = run.find([number], ROOT / "notebooks")
    places = {"runs": str(folder / "real"), "data": {"stores": str(folder / "stores"), "samples": str(SHARED)}}
    done = execute(path, "samples", {"epochs": 5, **places}, folder)
    assert run.is_finished(done)

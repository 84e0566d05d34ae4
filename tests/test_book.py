"""The book's set-up, the rules for notebooks, and the extension that lays outputs into pages."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jupyter_book.config
import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from decur_core.run import is_finished
from decur_core.running.folders import IMAGES, SENTINEL

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import executed  # noqa: E402

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COPIES = sorted((ROOT / "book" / "executed").glob("*/*.ipynb"))


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def unknown_keys(found: dict, known: dict, where: str = "") -> list[str]:
    """Keys that jupyter-book would ignore without a word; sphinx.config is checked by Sphinx itself."""
    wrong = [f"{where}{key}" for key in found if key not in known]
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(known.get(key), dict) and where + key != "sphinx.config":
            wrong += unknown_keys(value, known[key], f"{where}{key}.")
    return wrong


def test_config_keys_are_known():
    known = yaml.safe_load(jupyter_book.config.PATH_YAML_DEFAULT.read_text())
    known["sphinx"]["config"] = {}
    assert unknown_keys(CONFIG, known) == []
    assert unknown_keys({"execute": {"only_build_toc_files": True}, "bogus": 1}, known) != []
    jupyter_book.config.validate_yaml(CONFIG, raise_on_errors=True)
    assert CONFIG["execute"]["execute_notebooks"] == "off" and CONFIG["only_build_toc_files"] is True
    assert CONFIG["sphinx"]["recursive_update"] is True


def test_table_of_contents_is_complete():
    for page in PAGES:
        assert any((ROOT / f"{page}{end}").is_file() for end in (".md", ".ipynb")), page
    listed = [page for page in PAGES if page.startswith("notebooks/")]
    assert sorted(listed) == [f"notebooks/{path.stem}" for path in NOTEBOOKS]
    pages = [*(ROOT / "book").glob("*.md"), *(ROOT / "book/weights").glob("*/*.md")]
    prose = {str(path.relative_to(ROOT).with_suffix("")) for path in pages}
    assert prose == {page for page in PAGES if page.startswith("book/")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_rules(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert cells[0].metadata.tags == ["parameters"]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cells[0].source).body}
    assert values == {"profile": "mini", "overrides": {}}
    assert cells[-1].source.strip() == "runs.finished()" and cells[-1].metadata.tags == ["remove-cell"]
    for cell in cells:
        assert cell.outputs == [] and cell.execution_count is None, "sources carry no outputs"
        assert len(cell.source.splitlines()) <= 15, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Assert):  # the driver prints what it says, and nothing else is left of the check
                assert isinstance(node.msg, ast.JoinedStr) and "expected" in ast.unparse(node.msg), cell.source
            if path.stem != "01_loss":
                assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef), cell.source
            if isinstance(node, ast.If | ast.IfExp | ast.Match):
                test = node.subject if isinstance(node, ast.Match) else node.test
                assert "profile" not in ast.unparse(test), cell.source


@pytest.mark.parametrize("path", COPIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_executed_copies_are_small_and_finished(path):
    assert path.stat().st_size <= 1_000_000
    notebook = nbformat.read(path, 4)
    assert is_finished(notebook) and Path(notebook.metadata.decur.profile).stem == path.parent.name
    assert (ROOT / "notebooks" / path.name).is_file() and (
        ROOT / "notebooks/profiles" / f"{path.parent.name}.yaml"
    ).is_file()


def test_mini_copies_are_not_committed():
    done = subprocess.run(["git", "ls-files", "book/executed/mini"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout == ""


DRAWN = {"name": "ssl4eo", "title": "drawn world of radar and optical images", "drawn": True, "source": "world"}
REAL = {"name": "nyuv2", "title": "NYU Depth v2", "drawn": False, "source": "published"}


def pair(*images):
    """A source and its executed copy, as the driver publishes it."""
    parameters = new_code_cell('profile = "mini"\noverrides = {}', metadata={"tags": ["parameters"]})
    first, last = new_code_cell("x = 1  # one\nx"), new_code_cell("finished()")
    source = new_notebook(cells=[new_markdown_cell("# Title\n\nText."), parameters, first, last])
    ran = nbformat.from_dict(json.loads(json.dumps(source)))
    injected = new_code_cell(
        '# Parameters\nprofile = "a100"\noverrides = {"epochs": 5}\n', metadata={"tags": ["injected-parameters"]}
    )
    ran.cells.insert(2, injected)
    ran.cells[3].source = "x = (1)\nx"
    ran.cells[3].outputs = [new_output("execute_result", {"text/plain": "1"}, execution_count=2)]
    ran.cells[4].outputs = [new_output("stream", name="stdout", text=f"{IMAGES}{json.dumps(images)}\n{SENTINEL}\n")]
    note = {"profile": "a100", "overrides": {"epochs": 5}, "date": "2026-11-23T10:00:00+00:00", "seconds": 12000.0}
    ran.metadata["decur"] = note
    return source, ran


def test_outputs_are_laid_into_the_page():
    source, ran = pair(DRAWN)
    executed.lay(source, ran)
    title, parameters, first, last = source.cells
    assert title.source.startswith(
        "# Title\n\n```{margin}\nProfile a100, `epochs = 5`, drawn world, 2026-11-23, 3.3 h\n```\n"
    )
    assert title.source.endswith("\nText.")
    assert parameters.source == 'profile = "a100"\noverrides = {"epochs": 5}'
    assert first.source == "x = 1  # one\nx" and first.outputs[0].data == {"text/plain": "1"}
    assert last.outputs == []
    nbformat.validate(source)


@pytest.mark.parametrize(
    ("images", "said", "caption"),
    [
        ([DRAWN], "All pictures and numbers on this page are synthetic", "A figure. Drawn world."),
        ([REAL], "Real images: NYU Depth v2 {cite:p}`silberman2012nyuv2`.", "A figure. Real images."),
        ([REAL, DRAWN], "Beside them stand drawn images (drawn world of radar and optical images)", "A figure."),
        ([REAL | {"source": "samples"}], "Real images: NYU Depth v2. A handful of them", "A figure. Real images."),
        ([], "No image is looked at on this page", "A figure."),
    ],
)
def test_a_page_says_on_top_whether_its_images_are_real(images, said, caption):
    source, ran = pair(*images)
    source.cells[2].metadata["mystnb"] = {"figure": {"caption": "A figure."}}
    executed.lay(source, ran)
    assert said in source.cells[0].source and source.cells[2].metadata.mystnb.figure.caption == caption
    assert ("synthetic" in source.cells[0].source) == (images == [DRAWN])


@pytest.mark.parametrize(("profile", "trains"), [("mini", True), ("mini", False), ("report", True)])
def test_a_page_of_networks_that_were_hardly_trained_says_so(profile, trains):
    source, ran = pair(DRAWN)
    ran.metadata["decur"]["profile"] = profile
    for notebook in (source, ran):
        notebook.cells.insert(-1, new_code_cell("folder = pretrain.run(settings, store)" if trains else "pass"))
    executed.lay(source, ran)
    said = executed.SHORT in source.cells[0].source
    assert said == (profile == "mini" and trains)


def test_a_drawn_page_does_not_deny_the_real_images_that_it_begins_with():
    source, ran = pair(DRAWN)
    source.cells.insert(1, new_markdown_cell("![Six rooms](../book/real/rgb_depth.jpg)"))
    executed.lay(source, ran)
    assert "But for the real images of the first figure, all pictures and numbers" in source.cells[0].source


def test_a_caption_that_says_it_is_left_alone():
    source, ran = pair(REAL)
    source.cells[2].metadata["mystnb"] = {"figure": {"caption": "Miniature world (not real data): rooms."}}
    executed.lay(source, ran)
    assert source.cells[2].metadata.mystnb.figure.caption == "Miniature world (not real data): rooms."


@pytest.mark.parametrize(("profile", "word"), [("mini", "synthetic"), ("a100", "Real images"), ("samples", "handful")])
def test_of_a_run_that_does_not_say_the_profile_does(profile, word):
    source, ran = pair()
    ran.cells[4].outputs[0].text = SENTINEL + "\n"
    ran.metadata["decur"] |= {"profile": profile, "overrides": {}}
    executed.lay(source, ran)
    assert word in source.cells[0].source


def test_progress_bars_stay_out_of_the_page():
    source, ran = pair(DRAWN)
    bar = "run-seed0: 100%|####| 96/96 [00:48<00:00, 2it/s, loss 57]"
    ran.cells[3].outputs = [
        new_output("stream", name="stderr", text=f"{bar}\n"),
        new_output("stream", text=f"{bar}\n5 %\n"),
    ]
    executed.lay(source, ran)
    assert [out.text for out in source.cells[2].outputs] == ["5 %\n"]


def test_no_line_of_a_page_is_taken_for_a_comment():
    """A line that begins with % vanishes in MyST, and the paragraph with it."""
    texts = {path: path.read_text() for path in (ROOT / "book").glob("*.md")}
    texts |= {p: "\n".join(c.source for c in nbformat.read(p, 4).cells if c.cell_type == "markdown") for p in NOTEBOOKS}
    assert {
        p.name: line for p, text in texts.items() for line in text.splitlines() if line.lstrip().startswith("%")
    } == {}


def test_copies_of_other_code_or_unfinished_ones_are_refused():
    source, ran = pair()
    ran.cells[3].source = "x = 2\nx"
    with pytest.raises(executed.Unusable, match="code cell 2 .'x = 1"):
        executed.lay(source, ran)
    source, ran = pair()
    ran.cells[4].outputs = []
    with pytest.raises(executed.Unusable, match="not a finished run"):
        executed.lay(source, ran)
    source, ran = pair()
    del ran.cells[3]
    with pytest.raises(executed.Unusable, match="2 code cells, the page has 3"):
        executed.lay(source, ran)


def test_buttons_lead_to_the_repository_whose_address_is_set(tmp_path):
    """A book of one page, with the settings, the extension and the theme of this one."""
    address = "https://github.com/someone/decur"
    settings = CONFIG | {"repository": {"url": address, "branch": "v1"}}
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(settings))
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: notebooks/20_page\n")
    (tmp_path / "book").mkdir()
    for part in ("_ext", "asset", "references.bib"):
        (tmp_path / "book" / part).symlink_to(ROOT / "book" / part)
    for folder, notebook in zip(("notebooks", "book/executed/mini"), pair(DRAWN), strict=True):
        (tmp_path / folder).mkdir(parents=True)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, tmp_path / folder / "20_page.ipynb")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", tmp_path, "-W", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    page = (tmp_path / "_build/html/notebooks/20_page.html").read_text()
    links = (
        f"{address}/blob/v1/notebooks/20_page.ipynb",
        f"{address}/issues/new",
        "https://mybinder.org/v2/gh/someone/decur/v1?urlpath=lab/tree/notebooks/20_page.ipynb",
        "https://colab.research.google.com/github/someone/decur/blob/v1/notebooks/20_page.ipynb",
        f"!git clone --quiet --depth 1 --branch v1 {address} /content/decur",
    )
    assert done.returncode == 0, done.stderr
    assert [link for link in links if link not in page] == []


def test_without_an_address_there_are_no_buttons():
    app = App(ROOT)
    app.html_theme_options = {"repository_url": ""}
    executed.buttons(app, app)
    assert app.html_theme_options == {"repository_url": ""} and executed.in_colab(app) == ""


class App:
    """What the extension uses of Sphinx's application."""

    def __init__(self, folder: Path):
        self.srcdir, self.config, self.env = folder, self, self
        self.decur_profiles, self.decur_executed = ["a100", "mini"], "executed"
        self.dependencies = {"20_page": set()}

    def doc2path(self, docname: str) -> str:
        return str(self.srcdir / f"{docname}.ipynb")


@pytest.mark.parametrize(
    ("copies", "warning"),
    [
        ({}, "20_page.ipynb: no executed copy; run: python -m decur_core.run mini 20"),
        ({"mini": "x = 1\nx"}, None),
        ({"mini": "x = 1\nx", "a100": "x = 1\nx"}, None),
        # An outdated copy of the larger profile must not be hidden behind a good one of the smaller.
        ({"mini": "x = 1\nx", "a100": "x = 3\nx"}, "run: python -m decur_core.run a100 20"),
        ({"mini": "x = 1\nx", "a100": None}, "a100/20_page.ipynb is damaged; run: python -m decur_core.run a100 20"),
    ],
)
def test_larger_profiles_are_preferred(tmp_path, monkeypatch, copies, warning):
    warnings = []
    monkeypatch.setattr(executed.logger, "warning", lambda message, *values, **_: warnings.append(message % values))
    source, ran = pair()
    for profile, text in copies.items():
        ran.metadata["decur"]["profile"], ran.cells[3].source = profile, text or ""
        (tmp_path / "executed" / profile).mkdir(parents=True)
        nbformat.write(ran, copy := tmp_path / "executed" / profile / "20_page.ipynb")
        copy.write_text(copy.read_text()[: 200 if text is None else None])
    content, app = [nbformat.writes(source)], App(tmp_path)
    executed.read_source(app, "20_page", content)
    if warning:
        assert len(warnings) == 1 and warnings[0].endswith(warning) and content == [nbformat.writes(source)]
    else:
        expected = "a100" if "a100" in copies else "mini"
        assert warnings == [] and f"Profile {expected}, " in content[0]
    assert len(app.dependencies["20_page"]) == 2

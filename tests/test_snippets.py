"""Every snippet of the README and the book, from the text itself. Python is run at tiny size, where it starts processes
as a plain script. Commands are run where they need no published data, and else as far as their names lead: programs,
options, settings, notebooks.
"""

import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torchvision
from conftest import TINY

from decur_core import config, export, pretrain, run
from decur_core.data import archives, convert, prepare
from decur_core.data.raster import DataError
from decur_core.data.store import Store
from decur_core.model import mlp

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.S | re.M)
INLINE = re.compile(r"`(python -m decur_core[^`]*)`")
FENCES = ("python", "bash", "text", "bibtex", "", "{")  # the last four are no code, or directives of the book

# What a snippet is about may be large; what stands for it here is not. Each is needed: a test looks.
TINIER = {
    'config.load("a100", {"name": "mine"}': 'config.load("start", {**TINY, "name": "mine"}',
    "workers=8": "workers=2",
    'config.load("ombria")': 'config.load("start", FLOODS, pair="ombria")',
}
# What the text around a snippet says that the reader has.
GIVEN = """
import numpy as np, torch
TINY = {tiny!r}
FLOODS = {{
    "runs": "runs",
    "data": {{"stores": "stores", "processes": 0}},
    "world": {{"train": 24, "test": 16, "locations": 16}},
    "batch_size": 16,
    "transfer": {{"epochs": 1, "schedule": "constant"}},
}}
z1_a, z1_b, z2_a, z2_b = (torch.randn(8, 8192, requires_grad=True) for _ in range(4))

class MyPairs:
    ids = ["a", "b", "c", "d"]
    def __len__(self):
        return 4
    def __getitem__(self, i):
        random, made = np.random.default_rng(i), dict(id=self.ids[i])
        shapes = dict(sar=(2, -25, 0), optical=(13, 0, 3000), rgb=(3, 0, 255), dem=(1, 50, 80))
        for name in {names!r}:
            bands, low, high = shapes[name]
            made[name] = random.uniform(low, high, (bands, 24, 24)).astype(np.uint8 if name == "rgb" else np.float32)
        return made

my_pairs = MyPairs()
"""


def found(kind: str) -> list:
    """The snippets of a kind, those of a section together, as a reader types them; named by page and first line."""
    made = []
    for page in PAGES:
        before, text = 1, page.read_text()
        for section in re.split(r"^(?=## )", text, flags=re.M):
            snippets = [match for match in FENCE.finditer(section) if match[1] == kind]
            if snippets:
                line = before + section[: snippets[0].start()].count("\n") + 1
                made.append(pytest.param("\n".join(match[2] for match in snippets), id=f"{page.name}:{line}"))
            before += section.count("\n")
    return made


def commands() -> list:
    """Every line of the shell snippets, and the commands within sentences that start a module of this library."""
    lines = [(s.id, line) for s in found("bash") for line in s.values[0].replace("\\\n", " ").splitlines()]
    inline = [(page.name, each) for page in PAGES for each in INLINE.findall(FENCE.sub("", page.read_text()))]
    words = [(where, shlex.split(line.replace("\n", " "), comments=True)) for where, line in lines + inline]
    return [pytest.param(each, id=f"{where}: {' '.join(each)}") for where, each in words if each]


@pytest.fixture(scope="module")
def place(tmp_path_factory, pair_store):
    """A folder with what a reader of the snippets has by then: a store, a run, an export, a published checkpoint."""
    folder = tmp_path_factory.mktemp("my snippets")
    settings = config.load("start", {**TINY, "runs": str(folder / "runs"), "backbone": "small", "epochs": 1})
    made = pretrain.run(settings, pair_store)
    shutil.copytree(made, folder / "runs" / "a100" / "pretrain" / "sar_optical-decur-seed0")
    shutil.copytree(pair_store, folder / "stores" / "mine")
    export.write(made, folder / "exported", "optical")
    state = {}
    for m, channels in (("1", 2), ("2", 13)):
        network = torchvision.models.resnet18()
        network.conv1, network.fc = torch.nn.Conv2d(channels, 64, 7, 2, 3, bias=False), torch.nn.Identity()
        state |= {f"module.backbone_{m}.{k}": v for k, v in network.state_dict().items()}
        state |= {f"module.projector{m}.{k}": v for k, v in mlp(512, (32, 16, 8)).state_dict().items()}
    torch.save({"model": state}, folder / "checkpoint.pth")
    (folder / "book").symlink_to(ROOT / "book")
    return folder


def test_every_snippet_is_of_a_kind_that_is_known():
    kinds = {re.sub(r"^`*{.*", "{", match[1]) for page in PAGES for match in FENCE.finditer(page.read_text())}
    assert kinds <= set(FENCES) and len(found("python")) > 5 and len(commands()) > 30
    for large in TINIER:
        assert any(large in snippet.values[0] for snippet in found("python")), f"no snippet has {large!r} any more"


# Those that add something to the library belong together: test_adding.py runs them.
@pytest.mark.parametrize("text", [each for each in found("python") if not each.values[0].startswith("# add ")])
def test_python_runs(text, place, tmp_path, monkeypatch):
    for large, small in TINIER.items():
        text = text.replace(large, small)
    names = {n for n in ("sar", "optical", "rgb", "dem") if re.search(rf"(?<![a-z]){n}(?![a-z])", text.lower())}
    tiny = {**TINY, "runs": str(tmp_path / "runs"), "backbone": "small", "epochs": 1}
    given = GIVEN.format(tiny=tiny, names=sorted(names))
    if not re.search(r"convert\(|register\(", text):  # the latter would stay for other tests
        monkeypatch.chdir(place)
        exec(compile(given + text, "snippet", "exec"), {"__name__": "__main__"})
        return
    (tmp_path / "given.py").write_text(given)
    (tmp_path / "snippet.py").write_text(f"from given import *\n{text}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "snippet.py"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "convert(" not in text or Store(tmp_path / "stores" / "mine").ids == ["a", "b", "c", "d"]


@pytest.mark.parametrize("words", commands())
def test_commands_are_run_or_lead_somewhere(words, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    if "python" in words[:2]:  # after variables
        module, *arguments = words[words.index("-m") + 1 :]
        MODULES[module](SimpleNamespace(place=place, tmp=tmp_path, patch=monkeypatch), arguments)
    else:
        PROGRAMS[words[0]](*words[1:])


def makes(*goals: str) -> None:
    for goal in goals:
        done = subprocess.run(["make", "-n", goal], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def activates(script: str) -> None:
    assert script == ".venv/bin/activate" and re.search(r"^VENV \?= \.venv$", (ROOT / "Makefile").read_text(), re.M)


def builds(*words: str) -> None:
    assert f"jupyter-book {' '.join(words)}\n" in (ROOT / "Makefile").read_text()  # there `make book` runs it


def installs(*words: str) -> None:
    (extra,) = re.fullmatch(r"install -e \.\[(\w+)\]", " ".join(words)).groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]


def lab(command: str, path: str) -> None:
    assert command == "lab" and (ROOT / path).is_file()


def papermills(source: str, target: str, *options: str) -> None:
    notebook = nbformat.read(ROOT / source, 4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    known = {node.targets[0].id for node in ast.parse(cell.source).body}
    assert target.endswith(".ipynb") and options[::3][:-1] == ("-p",) * (len(options) // 3)
    given = dict(zip(options[1::3], options[2::3], strict=False))
    assert options[-2] == "--cwd" and (ROOT / options[-1]).is_dir() and {"profile"} <= set(given) <= known
    config.load(given["profile"], given.get("overrides"))


def submits(*words: str) -> None:
    """The script is sound, and what it starts accepts what it is given."""
    options = [word for word in words if word.startswith("--array=")]
    script, *arguments = words[len(options) :]
    text = (ROOT / script).read_text()
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0 and text.startswith("#!/bin/bash")
    (line,) = re.findall(r"-m (decur_core\S*) \"\$\{@:-a100\}\"([^&]*) &", text)
    variables = {"$SLURM_ARRAY_TASK_ID": "0", "$SLURM_ARRAY_TASK_COUNT": "4"}
    rest = re.sub("|".join(map(re.escape, variables)), lambda match: variables[match[0]], line[1])
    with pytest.MonkeyPatch.context() as patch:
        MODULES[line[0]](SimpleNamespace(patch=patch), [*(arguments or ["a100"]), *shlex.split(rest)])


def runs_notebooks(have, arguments: list[str]) -> None:
    """A page on a miniature world is run, in small; of published data, settings and notebooks are found."""
    asked, real = [], run.run
    have.patch.setattr(run, "run", lambda paths, **options: asked.append((paths, options)) or 0)
    assert run.main(arguments) == 0
    ((paths, options),) = asked
    if config.load(arguments[0]).data.source == "published" or len(paths) > 1:
        numbers = [word for word in arguments[1:] if re.fullmatch(r"\d\d", word)]
        assert [path.name[:2] for path in paths] == sorted(numbers) or not numbers
        return
    small = {"batch_size": 16, "world": {"locations": 32, "through_files": 16}, "runs": str(have.tmp), "epochs": 1}
    overrides = {**small, "data": {"stores": str(have.tmp), "processes": 0}, **options["overrides"]}
    options |= {"overrides": overrides, "output": have.tmp / "notebooks", "executed": have.tmp / "executed"}
    assert real(paths, **options) == 0 and len(list((have.tmp / "executed").glob("*.ipynb"))) == 1


def stops_at_the_data(main):
    """``main`` accepts the arguments, and goes as far as the images, or to a store that is not there."""

    def check(have, arguments: list[str]) -> None:
        def here(*_, **__):
            raise DataError("would convert now")

        have.patch.setattr(convert, "convert", here)
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        reason = stopped.value.__context__
        found = isinstance(reason, DataError) or "--verify" in arguments  # which reports what it finds
        assert found and not isinstance(reason, config.ConfigError), stopped.value

    return check


def unpacks(have, arguments: list[str]) -> None:
    """Archives of these names, or two parts of each, with one file."""
    files, target = arguments[: arguments.index("--to")], arguments[arguments.index("--to") + 1]
    for name in files:
        with tarfile.open(whole := have.tmp / "whole", "w:gz") as tar:
            tar.add(__file__, f"of-{name.partition('.')[0]}")
        parts = [name.replace("*", end) for end in ("aa", "ab")] if "*" in name else [name]
        data = whole.read_bytes()
        for k, part in enumerate(parts):
            (have.tmp / part).write_bytes(data[len(data) * k // len(parts) : len(data) * (k + 1) // len(parts)])
    have.patch.chdir(have.tmp)
    listed = [str(path) for name in files for path in Path().glob(name)]
    archives.main([*listed, *arguments[len(files) :], "--unchecked"])
    assert len(list(Path(target).iterdir())) == len(files)


def exports(have, arguments: list[str]) -> None:
    stand_ins = {"RUN": "runs/a100/pretrain/sar_optical-decur-seed0", "TARGET": "target"}
    folder, target = (stand_ins.get(word, word) for word in arguments)
    export.main([folder, str(have.tmp / target)])
    assert len(list((have.tmp / target).glob("*.safetensors"))) == 2


def benchmark(name: str):
    def check(have, arguments: list[str]) -> None:
        if name in ("convert", "loader", "step"):
            pytest.importorskip("cv2", reason="opencv-python-headless is an extra of the benchmarks")
        have.patch.setattr(sys, "argv", [name, *arguments, "--help"])
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stopped:
            importlib.import_module(f"benchmarks.{name}").main()
        assert stopped.value.code == 0
        assert all(word in said.getvalue() for word in arguments if word.startswith("--"))

    return check


MODULES = {
    "decur_core.run": runs_notebooks,
    "decur_core.pretrain": stops_at_the_data(pretrain.main),
    "decur_core.data.prepare": stops_at_the_data(prepare.main),
    "decur_core.data.archives": unpacks,
    "decur_core.export": exports,
    **{f"benchmarks.{path.stem}": benchmark(path.stem) for path in (ROOT / "benchmarks").glob("[!_]*.py")},
}
PROGRAMS = {"make": makes, "source": activates, "jupyter-book": builds, "pip": installs, "jupyter": lab}
PROGRAMS |= {"papermill": papermills, "sbatch": submits}

"""In a live kernel, as in JupyterLab: one cell after the other; an interrupted cell leaves a run that goes on."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from decur_core import config, run
from decur_core.running import folders as runs
from decur_core.running import history

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = run.find([], ROOT / "notebooks")
EXECUTED = ROOT / "book" / "executed" / "mini"
SOURCES = ("notebooks/*.ipynb", "notebooks/profiles/*.yaml", "decur_core/**/*.py")
# What was trained and scored, in the folders of the profiles that the notebooks use.
COMPUTED = ("pretrain/*/*.pt", "pretrain/*/history.jsonl", "records/*.json", "predictions/*.json")
VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"

SETUP = """
from decur_core import config, pretrain
settings = config.load("start", {overrides!r})
"""
TOTAL = 8000  # steps, more than anyone waits for
PATIENCE = 300  # seconds, for a machine that does much else
CELL = "folder = pretrain.run(settings, {store!r})"


@pytest.fixture
def kernel():
    manager, client = start_new_kernel(startup_timeout=120)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def wait_for(condition, client) -> None:
    """Wait until ``condition()``, or fail with the cell's answer where it ended before that."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert not client.shell_channel.msg_ready(), client.get_shell_msg(timeout=1)["content"]
        assert time.monotonic() < deadline, "the cell goes on without end"
        time.sleep(0.05)


def test_an_interrupted_cell_resumes_where_it_was(kernel, pair_store, tmp_path):
    manager, client = kernel
    tiny = {
        "projector": [16, 8],
        "dim_common": 6,
        "crop_size": 20,
        "batch_size": 8,
        "epochs": TOTAL // 4,
        "log_steps": 1,
    }
    overrides = {**tiny, "log_steps": 1, "checkpoint_steps": 1000, "device": "cpu", "runs": str(tmp_path / "runs")}
    settings = config.load("start", overrides)
    folder = runs.path(settings, "pretrain", runs.title(settings))
    assert client.execute_interactive(SETUP.format(overrides=overrides), timeout=120)["content"]["status"] == "ok"

    # Without stop_on_error a kernel drops requests that reach it while it still answers the interruption.
    client.execute(CELL.format(store=str(pair_store)), stop_on_error=False)
    wait_for(lambda: len(history.read(folder)) >= 3, client)
    manager.interrupt_kernel()
    answer = client.get_shell_msg(timeout=PATIENCE)["content"]
    assert (
        answer["status"] == "error" and answer["ename"] == "Interrupted" and "the same call resumes" in answer["evalue"]
    )
    (checkpoint,) = folder.glob("checkpoint-*.pt")
    stopped = int(checkpoint.stem.removeprefix("checkpoint-"))
    assert 3 <= stopped < TOTAL

    client.execute(CELL.format(store=str(pair_store)))
    wait_for(lambda: history.read(folder)[-1]["step"] >= stopped + 2, client)
    manager.interrupt_kernel()
    assert client.get_shell_msg(timeout=PATIENCE)["content"]["ename"] == "Interrupted"
    assert [line["step"] for line in history.read(folder)] == list(range(1, len(history.read(folder)) + 1))
    assert json.loads((folder / "run.json").read_text())["settings"]["epochs"] == TOTAL // 4


def session(notebook) -> NotebookClient:
    """What JupyterLab is to a notebook: a kernel in the notebook's folder, and widgets."""
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    return NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources)


def kernel_of(client: NotebookClient):
    """A fresh kernel for ``client``, with this library; the variable that asks for bars as text is not set in it."""
    environment = {name: value for name, value in os.environ.items() if name != "DECUR_HEADLESS"}
    return client.setup_kernel(env=environment | {"PYTHONPATH": str(ROOT)})


def step_through(client: NotebookClient) -> None:
    """Run the cells one after the other, in a fresh kernel."""
    with kernel_of(client):
        for index, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, index)
        client.set_widgets_metadata()


def is_called(name: str, cell) -> bool:
    return f"{name}(" in cell.source


def count(cell, kind: str) -> int:
    return sum(kind in output.get("data", {}) for output in cell.outputs)


def as_it_should_be(notebook, *, shows_progress: str) -> None:
    """Assert what a reader in JupyterLab expects; cells that call ``shows_progress`` have a bar."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert run.is_finished(notebook)
    for cell in code:
        assert count(cell, "image/png") == ("figure" in cell.metadata.get("mystnb", {})), cell.source
        # Warnings, and bars as text.
        assert [output.text for output in cell.outputs if output.get("name") == "stderr"] == [], cell.source
        if is_called(shows_progress, cell):
            assert count(cell, VIEW) > 0, cell.source
    known = notebook.metadata.get("widgets", {}).get(STATE, {"state": {}})["state"]
    bars = [model["state"] for model in known.values() if model["model_name"] == "FloatProgressModel"]
    ends = [(bar["value"], bar["max"], bar["bar_style"]) for bar in bars]
    assert [end for end in ends if end[0] != end[1] or end[2] == "danger"] == []
    assert len(bars) >= sum(count(cell, VIEW) for cell in code)


def computed() -> dict[str, int]:
    """When each result of ``make book`` was written."""
    found = (f for profile in ("mini", "start") for kind in COMPUTED for f in (ROOT / "runs" / profile).glob(kind))
    return {str(file.relative_to(ROOT)): file.stat().st_mtime_ns for file in found}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name[:2])
def test_every_notebook_can_be_stepped_through(path):
    """With the results of ``make book``, so that nothing is trained or scored again."""
    results = EXECUTED / path.name
    if not results.is_file():
        pytest.skip(f"there is no {results.relative_to(ROOT)}; run: make book")
    for source in (file for pattern in SOURCES for file in ROOT.glob(pattern)):
        if source.stat().st_mtime > results.stat().st_mtime:
            pytest.skip(f"{results.relative_to(ROOT)} is older than {source.relative_to(ROOT)}; run: make book")
    before, client = computed(), session(nbformat.read(path, as_version=4))
    step_through(client)
    assert computed() == before
    as_it_should_be(client.nb, shows_progress="evaluate_members")


def test_a_notebook_that_trains_shows_bars_is_interrupted_and_goes_on_in_a_new_kernel(tmp_path):
    (path,) = run.find(["20"], ROOT / "notebooks")
    tiny = {"projector": [16, 8], "dim_common": 6, "crop_size": 20, "batch_size": 8, "epochs": 12, "log_steps": 1}
    places = {"device": "cpu", "runs": str(tmp_path / "runs"), "data": {"stores": str(tmp_path), "processes": 0}}
    world = {"world": {"locations": 32, "through_files": 8}}
    overrides = {**tiny, "log_steps": 1, "checkpoint_steps": 1000, **places, **world}
    settings = config.load("start", overrides)
    second = runs.path(settings, "pretrain", runs.title(config.members(settings)[1]))

    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = f'profile = "start"\noverrides = {overrides!r}'
    client = session(notebook)

    def interrupt():
        deadline = time.monotonic() + 600
        while len(history.read(second)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(client.km.provisioner.pid, signal.SIGINT)

    with kernel_of(client), pytest.raises(CellExecutionError, match="Interrupted.*the same call resumes"):
        threading.Thread(target=interrupt, daemon=True).start()
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    assert is_called("run_members", cell)
    assert count(cell, VIEW) == 3, "the store, the finished run and the interrupted one"
    (checkpoint,) = second.glob("checkpoint-*.pt")

    client = session(notebook)
    step_through(client)
    as_it_should_be(notebook, shows_progress="run_members")
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    assert f"{second.name}: resumes after step {int(checkpoint.stem.removeprefix('checkpoint-'))} of 48" in printed
    assert count(cell, VIEW) == 1, "nothing that was finished is done again"
    assert [line["step"] for line in history.read(second)] == list(range(1, 49))

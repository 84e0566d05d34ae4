"""In a live kernel, as in JupyterLab: an interrupted cell leaves a run that the same cell finishes."""

import json
import time

import pytest
from jupyter_client.manager import start_new_kernel

from decur_core import config, runs

SETUP = """
from decur_core import config, pretrain
settings = config.load("start", {overrides!r})
"""
CELL = "folder = pretrain.run(settings, {store!r})"


@pytest.fixture
def kernel():
    manager, client = start_new_kernel(startup_timeout=120)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_an_interrupted_cell_resumes_where_it_was(kernel, pair_store, tmp_path):
    manager, client = kernel
    tiny = {"projector": [16, 8], "dim_common": 6, "crop_size": 20, "batch_size": 8, "epochs": 400, "log_steps": 1}
    overrides = {**tiny, "checkpoint_steps": 1000, "device": "cpu", "runs": str(tmp_path / "runs")}
    settings = config.load("start", overrides)
    folder = runs.path(settings, "pretrain", runs.title(settings))
    assert client.execute_interactive(SETUP.format(overrides=overrides), timeout=120)["content"]["status"] == "ok"

    client.execute(CELL.format(store=str(pair_store)))
    deadline = time.monotonic() + 60
    while len(runs.read_history(folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    manager.interrupt_kernel()
    answer = client.get_shell_msg(timeout=60)["content"]
    assert (
        answer["status"] == "error" and answer["ename"] == "Interrupted" and "the same call resumes" in answer["evalue"]
    )
    (checkpoint,) = folder.glob("checkpoint-*.pt")
    stopped = int(checkpoint.stem.removeprefix("checkpoint-"))
    assert 3 <= stopped < 1600

    client.execute(CELL.format(store=str(pair_store)))
    while not (lines := runs.read_history(folder)) or lines[-1]["step"] < stopped + 2:
        time.sleep(0.05)
        assert time.monotonic() < deadline + 60
    manager.interrupt_kernel()
    assert client.get_shell_msg(timeout=60)["content"]["ename"] == "Interrupted"
    assert [line["step"] for line in runs.read_history(folder)] == list(range(1, len(runs.read_history(folder)) + 1))
    assert json.loads((folder / "run.json").read_text())["settings"]["epochs"] == 400

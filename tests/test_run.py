"""The headless driver on throw-away notebooks: what is published, what is refused, and what a signal does."""

import base64
import io
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from decur_core import run
from decur_core.running import folders as runs
from decur_core.running.folders import SENTINEL

DRIVER = """
import sys
from pathlib import Path
from decur_core import run
folder = Path(sys.argv[1])
folders = {"output": folder / "runs", "executed": folder / "executed", "cwd": folder}
sys.exit(run.run([folder / "10_long.ipynb"], profile="mini", overrides={}, **folders))
"""
CHATTER = r"""import sys
for i in range(50):
    print(i, flush=True)
    print(f"\r{i}/49", end="", file=sys.stderr)"""
END = f"print({SENTINEL!r})"
HANDLES = """import os, signal, subprocess, time
child = subprocess.Popen(["sleep", "60"], stderr=subprocess.DEVNULL)
signal.signal(signal.SIGTERM, lambda *_: (open("seen", "w").close(), exec("raise RuntimeError('stopped')")))
open("pids.tmp", "w").write(f"{os.getpid()} {child.pid}"); os.rename("pids.tmp", "pids")
time.sleep(60)"""
IGNORES = HANDLES.replace(" exec(\"raise RuntimeError('stopped')\")", " 0")


def write(path: Path, *cells: str) -> Path:
    parameters = new_code_cell('profile = "none"\noverrides = {}', metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[parameters, *map(new_code_cell, cells)]), path)
    return path


def drive(folder: Path, *names: str, **options) -> int:
    paths = [folder / name for name in names]
    folders = {"output": folder / "runs", "executed": folder / "executed", "cwd": folder}
    return run.run(paths, profile="mini", overrides={"epochs": 2}, **folders, **options)


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process is dead (or a zombie) within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_success_is_published_and_failures_leave_the_old_copy(tmp_path, capfd):
    write(tmp_path / "10_good.ipynb", "print(profile, overrides)", CHATTER, END)
    assert drive(tmp_path, "10_good.ipynb") == 0
    published = tmp_path / "executed" / "10_good.ipynb"
    notebook = nbformat.read(published, 4)
    assert notebook.metadata.decur.profile == "mini" and notebook.metadata.decur.overrides == {"epochs": 2}
    assert set(notebook.metadata.decur) == {"profile", "overrides", "date", "seconds", "commit"}
    assert str(tmp_path) not in published.read_text()
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[2][0].text == "mini {'epochs': 2}\n"
    texts = {out.name: out.text for out in outputs[3]}
    assert len(outputs[3]) == 2 and texts == {"stdout": "".join(f"{i}\n" for i in range(50)), "stderr": "49/49"}
    assert "cell 4: import sys" in capfd.readouterr().out

    before = published.read_bytes()
    write(tmp_path / "10_good.ipynb", "x = 1 / 0", END)
    write(tmp_path / "20_after.ipynb", "open('ran', 'w')", END)
    assert drive(tmp_path, "10_good.ipynb", "20_after.ipynb") == 1
    error = capfd.readouterr().err
    assert "10_good.ipynb: failed in cell 3: ZeroDivisionError" in error
    assert published.read_bytes() == before and not (tmp_path / "ran").exists()

    write(tmp_path / "10_good.ipynb", "print('all well')", "print('" + SENTINEL[:-1] + "')")
    assert drive(tmp_path, "10_good.ipynb") == 1
    said = capfd.readouterr().err
    assert "did not print" in said and callable(pkgutil.resolve_name(re.search(r"(\S+)\(\) does", said)[1]))
    assert published.read_bytes() == before and os.listdir(published.parent) == ["10_good.ipynb"]


def test_killed_kernel_is_refused(tmp_path, capfd):
    write(tmp_path / "10_dies.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", END)
    assert drive(tmp_path, "10_dies.ipynb") == 1
    assert "10_dies.ipynb: failed in cell 3: DeadKernelError" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()
    # The reason for the sentinel: what papermill left says that nothing was wrong.
    assert nbformat.read(tmp_path / "runs" / "10_dies.ipynb", 4).metadata.papermill.exception is None


def pids(folder: Path) -> list[int]:
    """Processes of the kernel and of its child, once the long cell has written them down."""
    end = time.monotonic() + 60
    while not (folder / "pids").exists():
        assert time.monotonic() < end, "the kernel did not start"
        time.sleep(0.05)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


@pytest.mark.parametrize(("cell", "grace"), [(HANDLES, 30), (IGNORES, 0.5)])
def test_sigterm_reaches_the_kernel(tmp_path, capfd, cell, grace):
    write(tmp_path / "10_long.ipynb", cell, END)
    sender = threading.Thread(target=lambda: pids(tmp_path) and os.kill(os.getpid(), signal.SIGTERM))
    sender.start()
    assert drive(tmp_path, "10_long.ipynb", grace=grace) == 128 + signal.SIGTERM
    sender.join()
    assert "10_long.ipynb: SIGTERM in cell 3" in capfd.readouterr().err
    assert (tmp_path / "seen").exists() and not (tmp_path / "executed").exists()
    assert all(map(gone, pids(tmp_path)))


def test_a_signal_in_the_middle_of_a_line_is_not_lost(monkeypatch):
    def reentrant(*_, **__):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    monkeypatch.setattr(run, "print", reentrant, raising=False)
    state, sent = run.State(kernels={4711}), []
    monkeypatch.setattr(run, "send", lambda *arguments: sent.append(arguments))
    with run.forwarding(state, grace=60):
        os.kill(os.getpid(), signal.SIGTERM)
        assert state.received == signal.SIGTERM and sent == [({4711}, signal.SIGTERM)]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's end is tied to the driver's by Linux's prctl")
def test_kernel_does_not_outlive_a_killed_driver(tmp_path):
    write(tmp_path / "10_long.ipynb", HANDLES, END)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)])
    kernel, child = pids(tmp_path)
    driver.kill()
    driver.wait(timeout=30)
    assert gone(kernel, 5)
    os.kill(child, signal.SIGKILL)  # a plain subprocess of the notebook's is not tied to it


MEETS = """import pathlib, sys, time
me, other = sys.argv[1:]
pathlib.Path(me).touch()
while not pathlib.Path(other).exists():
    time.sleep(0.02)
print('met', end='\\n')"""
STOPS = """import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path(sys.argv[1] + '.told').touch()))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)"""


def test_chapters_side_by_side_run_at_the_same_time_and_name_their_lines(tmp_path, capfd):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    commands = {"10": [sys.executable, "-c", MEETS, a, b], "11": [sys.executable, "-c", MEETS, b, a]}
    threads = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['DECUR_TURNS'])"
    assert run.side_by_side({**commands, "12": [sys.executable, "-c", threads]}, jobs=2) == 0
    *met, last = capfd.readouterr().out.splitlines()
    assert sorted(met) == ["10 | met", "11 | met"]
    share = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    assert last == f"12 | {share} 1"


def test_after_a_failure_no_chapter_is_started_and_those_that_run_end(tmp_path, capfd):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    fails = f"import os, pathlib; pathlib.Path({b!r}).write_text(str(os.getpid())); raise SystemExit(3)"
    outlives = (
        "\nwhile pathlib.Path('/proc', pathlib.Path(other).read_text()).exists(): time.sleep(0.02)\ntime.sleep(0.5)"
    )
    touch = f"import pathlib; pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    commands = {"10": MEETS + outlives, "11": fails, "12": touch}
    assert run.side_by_side({k: [sys.executable, "-c", v, a, b] for k, v in commands.items()}, jobs=2) == 3
    said = capfd.readouterr()
    assert "10 | met" in said.out and "ended early: 11 (3); not started: 12" in said.err
    assert not (tmp_path / "late").exists()


def test_a_signal_reaches_every_chapter_that_runs(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def send():
        while not (Path(a).exists() and Path(b).exists()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    commands = {name: [sys.executable, "-c", STOPS, name] for name in (a, b, str(tmp_path / "c"))}
    assert run.side_by_side(commands, jobs=2) == 128 + signal.SIGTERM
    sender.join()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "a.told", "b", "b.told"]


def test_a_foreign_kernelspec_does_not_hijack(tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    write(tmp_path / "10_here.ipynb", "import sys\nprint(sys.executable)", END)
    assert drive(tmp_path, "10_here.ipynb") == 0
    notebook = nbformat.read(tmp_path / "executed" / "10_here.ipynb", 4)
    assert notebook.cells[2].outputs[0].text.strip() == sys.executable


@pytest.mark.parametrize(
    ("argv", "message"),
    [("nonesuch", "existing profiles"), ("mini 99", "no notebook 99"), ("mini --set epochs", "KEY=VALUE")],
)
def test_usage_errors_come_before_any_compute(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(argv.split())
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", ["mini 10 20 --jobs 2", "mini --jobs 2 20 10", "--jobs 2 mini 10 20", "mini 10 --jobs 2 20"]
)
def test_chapters_may_stand_on_either_side_of_an_option(argv, monkeypatch):
    asked = []
    monkeypatch.setattr(
        run, "run", lambda paths, **options: asked.append([p.name[:2] for p in paths]) or options["jobs"]
    )
    assert run.main(argv.split()) == 2 and asked == [["10", "20"]]


@pytest.mark.parametrize(("name", "folder"), [("", "book/executed/mini"), ("name=short", "runs/mini/executed")])
def test_pages_of_a_trial_with_a_name_do_not_take_the_place_of_the_books(name, folder, monkeypatch):
    monkeypatch.setattr(run, "run", lambda paths, *, executed, **options: str(executed))
    assert run.main(["mini", "20", "--set", "epochs=2", *filter(None, [name])]).endswith(folder)


def test_a_page_counts_the_seconds_of_every_attempt(tmp_path):
    write(tmp_path / "10_late.ipynb", "import os, time\ntime.sleep(1)\nassert os.path.exists('ready')", END)
    assert drive(tmp_path, "10_late.ipynb") == 1
    first = float((tmp_path / "runs" / "10_late.seconds").read_text())
    (tmp_path / "ready").touch()
    assert drive(tmp_path, "10_late.ipynb") == 0
    note = nbformat.read(tmp_path / "executed" / "10_late.ipynb", 4).metadata.decur
    assert first > 1 and note.seconds > first + 1


def test_published_figures_are_lines_or_few_colours():
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    noise[:20] = 255
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "PNG")
    text = base64.b64encode(whole.getvalue()).decode()
    photographs = {"image/png": text, "image/svg+xml": "<svg><image/></svg>"}
    lines, words = {"image/png": text, "image/svg+xml": "<svg><path/></svg>"}, {"text/plain": "1"}
    for data in (photographs, lines, words):
        run.lighter(data)
    assert (list(photographs), list(lines), words) == (["image/png"], ["image/svg+xml"], {"text/plain": "1"})
    small = Image.open(io.BytesIO(base64.b64decode(photographs["image/png"])))
    found = np.asarray(small.convert("RGB"))
    assert small.size == (80, 60) and (found[:20] == 255).all() and len(photographs["image/png"]) < len(text) / 2
    assert np.abs(found.astype(int) - noise).mean() < 30


@pytest.mark.parametrize("drawing", ["<svg><path/></svg>", "<svg><image/></svg>", "<svg>" + run.HEAVY * " " + "</svg>"])
def test_a_drawing_that_has_no_other_form_is_published(drawing):
    run.lighter(data := {"image/svg+xml": drawing, "text/plain": "1"})
    assert data == {"image/svg+xml": drawing, "text/plain": "1"}


@pytest.mark.parametrize("place", ["executed", "runs", "executed/records.json"])
def test_where_nothing_can_be_written_a_chapter_fails_with_a_sentence(tmp_path, capfd, place):
    write(tmp_path / "10_good.ipynb", END)
    if place == "executed/records.json":
        runs.write_json(tmp_path / "records" / "a.json", {"name": "", "micro": 1})
        (tmp_path / place).mkdir(parents=True)  # in the place of a file
    else:
        (tmp_path / place).write_text("in the place of a folder")
    assert drive(tmp_path, "10_good.ipynb") == 1
    assert re.search(rf"10_good.ipynb: failed .*: \w+Error: .*{tmp_path}/{place}", capfd.readouterr().err)


def test_figures_that_would_weigh_much_are_made_lighter():
    """Lines of which there are too many become an image, and a large image has half the size."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    images = {}
    for name, pixels in (("small", noise[:60, :80]), ("large", noise)):
        Image.fromarray(pixels).save(whole := io.BytesIO(), "PNG")
        images[name] = base64.b64encode(whole.getvalue()).decode()
    many = {"image/png": images["small"], "image/svg+xml": "<svg>" + run.HEAVY * "<path/>" + "</svg>"}
    large = {"image/png": images["large"], "image/svg+xml": "<svg><image/></svg>"}
    sizes = []
    for data in (many, large):
        run.lighter(data)
        assert list(data) == ["image/png"]
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size)
    assert sizes == [(80, 60), (400, 300)]

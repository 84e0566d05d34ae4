"""Headless driver: ``python -m decur_core.run PROFILE [20 30 ...] [--set key=value ...]``.

papermill executes ``notebooks/NN_*.ipynb`` into ``runs/<profile>/notebooks``. A notebook is published into
``book/executed/<profile>`` only when it ended well: no error, and the sentinel printed by its last cell. papermill's
metadata says "completed" even after the kernel was killed, and papermill keeps signals to itself; both are mended here.
``--jobs 2`` executes two notebooks at a time; what both need, one makes while the other waits.
"""

import argparse
import base64
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

if "rfc3987_syntax" not in sys.modules:  # for which jsonschema, behind nbformat, builds a grammar of IRIs for seconds
    sys.modules["rfc3987_syntax"] = None

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import execute_notebook
from PIL import Image

from decur_core import config
from decur_core.running import folders as runs
from decur_core.running import tie
from decur_core.running.files import TURNS

# Bars as rare text lines. Threads that wait must sleep: spinning ones make a shared machine many times slower.
ENVIRONMENT = {"DECUR_HEADLESS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
FIGURES = [f"--InlineBackend.figure_formats={kind}" for kind in ("svg", "retina")]  # ``publish`` keeps one
HEAVY = 200_000  # characters of a figure
REFRESH = 10.0  # seconds between two log lines of the same progress bar


@dataclass
class State:
    """What the driver knows."""

    kernels: set[int] = field(default_factory=set)  # its process; of chapters side by side, their drivers
    cell: str = "before its first cell"  # where in the notebook it is
    received: int | None = None  # the first signal that came


class ThisPython(KernelSpecManager):
    """Kernels of the interpreter that runs the driver, whatever else is installed under the name python3."""

    def get_kernel_spec(self, kernel_name):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", *FIGURES]
        return KernelSpec(argv=argv, env=ENVIRONMENT, language="python", metadata={"supported_encryption": "curve"})


class Client(PapermillNotebookClient):
    """papermill's client, with a kernel that never outlives the driver and a log of progress."""

    def create_kernel_manager(self):
        # Encrypted: other users of a node can connect to the kernel's ports.
        options = {"kernel_spec_manager": ThisPython(), "transport_encryption": "auto"}
        self.km = AsyncKernelManager(kernel_name="python3", **options)
        return self.km

    def start_new_kernel(self, **kwargs):
        super().start_new_kernel(preexec_fn=tie, **kwargs)  # beyond Linux ipykernel polls for its parent
        self.state.kernels = {self.km.provisioner.pid}

    def execute(self):
        try:
            return super().execute()
        finally:
            send(self.state.kernels, signal.SIGKILL, os.killpg)  # whatever the notebook started and left behind
            self.state.kernels = set()

    def execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type != "code":
            return cell
        if self.state.received:
            raise InterruptedError  # the kernel survived the signal; no further cell is started
        number = sum(c.cell_type == "code" for c in self.nb.cells[: cell_index + 1])
        self.state.cell, self.lines, self.shown, start = f"in cell {number}", {}, 0.0, time.monotonic()
        print(f"  cell {number}: {cell.source.partition(chr(10))[0][:100]}", flush=True)
        try:
            return super().execute_cell(cell, cell_index, **kwargs)
        finally:
            print(*(f"    | {rest}\n" for rest in self.lines.values() if rest.strip()), sep="", end="")
            print(f"  cell {number}: {time.monotonic() - start:.1f} s", flush=True)

    def process_message(self, msg, cell, cell_index):
        output = super().process_message(msg, cell, cell_index)
        if output is not None and output.output_type == "stream":
            *done, line = overwrite(self.lines.get(output.name, ""), output.text).split("\n")
            self.lines[output.name] = line
            if "\r" in output.text and line.strip() and time.monotonic() - self.shown > REFRESH:
                done, self.shown = [*done, line], time.monotonic()
            print(*(f"    | {text.rstrip()}\n" for text in done), sep="", end="", flush=True)
        return output


class Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, state, **kwargs):
        options = {"startup_timeout": 300, "iopub_timeout": 60, "shutdown_kernel": "immediate"}
        client = Client(nb_man, timeout=None, coalesce_streams=True, **options)
        client.state = state
        return client.execute()


papermill_engines.register("decur", Engine)


def overwrite(text: str, more: str) -> str:
    """``text + more`` as a terminal shows it: what follows a carriage return replaces its line."""
    head, newline, line = text.rpartition("\n")
    return head + newline + re.sub(r"[^\n]*\r(?=[^\r\n])", "", line + more).replace("\r\n", "\n")


def send(kernels: Iterable[int], number: int, how=os.kill) -> None:
    """Send a signal to kernels that are alive; ``os.killpg`` reaches what they started, too (each leads a session)."""
    for kernel in [*kernels]:
        with contextlib.suppress(ProcessLookupError):
            how(kernel, number)


@contextlib.contextmanager
def forwarding(state: State, grace: float):
    """Pass SIGTERM, SIGINT and SIGUSR1 on to the kernel, which has ``grace`` seconds to write a checkpoint and stop."""

    def forward(number, frame):
        if not state.received:
            state.received = number
            timer = threading.Timer(grace, lambda: send(state.kernels, signal.SIGKILL, os.killpg))
            timer.daemon = True
            timer.start()
        send(state.kernels, number)
        with contextlib.suppress(RuntimeError):  # Python refuses to print a line in the middle of another
            print(f"{signal.Signals(number).name}: passed on to the kernel, which has {grace:g} s to stop", flush=True)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    # What the caller ignores stays ignored (nohup, background jobs of a shell).
    before = {n: signal.signal(n, forward) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_finished(notebook) -> bool:
    """Whether the last code cell of an executed notebook printed the sentinel."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    streams = [out.text for out in cells[-1].outputs if out.output_type == "stream"] if cells else []
    return any(runs.SENTINEL in text.splitlines() for text in streams)


def find(numbers: list[str], notebooks: Path) -> list[Path]:
    """Notebooks with these numbers (``"20"``), all for an empty list, in order; ValueError for an unknown one."""
    paths = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    known = {path.name[:2] for path in paths}
    if not set(numbers) <= known or not known:
        asked = ", ".join(n for n in numbers if n not in known) or "NN_*.ipynb"
        raise ValueError(f"no notebook {asked} in {notebooks}; existing: {', '.join(sorted(known)) or 'none'}")
    return [path for path in paths if path.name[:2] in (numbers or known)]


def lighter(data: dict) -> None:
    """Of a figure, keep lines as SVG if they are not too many, else a PNG (base64) in 256 colours, halved if large."""
    svg = data.get("image/svg+xml", "<image")
    if "<image" not in svg and len(svg) < HEAVY:
        data.pop("image/png", None)
    elif "image/png" in data:
        data.pop("image/svg+xml", None)
        image = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        for size in (image, image.reduce(2)):
            size.quantize(256).save(made := io.BytesIO(), "PNG", optimize=True)
            data["image/png"] = base64.b64encode(made.getvalue()).decode()
            if len(data["image/png"]) < HEAVY:
                break


def publish(notebook, target: Path, note: dict) -> None:
    """Write the executed ``notebook`` with ``note`` in its metadata and figures made ``lighter``."""
    for out in (out for cell in notebook.cells for out in cell.get("outputs", ())):
        lighter(out.get("data", {}))
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)  # holds paths of this machine
    notebook.metadata["decur"] = note
    runs.write_text(target, nbformat.writes(notebook) + "\n")


def run_one(path: Path, state: State, *, parameters: dict, output: Path, executed: Path, cwd: Path) -> str | None:
    """Execute the notebook at ``path`` and publish it; returns None, or what went wrong in it."""
    output.mkdir(parents=True, exist_ok=True)
    ledger = output / f"{path.stem}.seconds"  # an interrupted run's page says how long all its attempts took
    start = time.monotonic() - (float(ledger.read_text()) if ledger.exists() else 0)
    options = {"engine_name": "decur", "kernel_name": "python3", "language": "python", "progress_bar": False}
    try:
        done = execute_notebook(path, output / path.name, parameters, cwd=cwd, state=state, **options)
    except PapermillExecutionError as error:
        return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join([f"{error.ename}: {error.evalue}", *error.traceback]))
    finally:
        runs.write_text(ledger, f"{time.monotonic() - start:.1f}")
    if state.received:
        return "a signal came"
    if not is_finished(done):
        return f"the last cell did not print {runs.SENTINEL!r}; decur_core.running.folders.finished() does"
    made_by, modified = runs.commit()
    commit = f"{made_by}-dirty" if modified else made_by
    date, seconds = datetime.now(UTC).isoformat(timespec="seconds"), round(time.monotonic() - start, 1)
    publish(done, executed / path.name, {**parameters, "date": date, "seconds": seconds, "commit": commit})
    runs.publish_records(output.parent / "records", executed / "records.json")
    print(f"{path.name}: {seconds} s, published in {executed}", flush=True)


def run(
    paths: list[Path], *, profile: str, overrides: dict, output: Path, executed: Path, grace=60.0, cwd=config.ROOT,
    jobs: int = 1, command: list[str] | None = None,
) -> int:  # fmt: skip
    """Execute notebooks in order and stop at the first failure; returns the exit code.

    ``output``: folder of the copies as they ran; ``executed``: that good ones are published into; ``grace``: seconds
    from a signal to the kernel's end; ``cwd``: of the kernels. Returns 0 when all were published, 128 + the number
    of a signal that came, 1 otherwise. ``jobs`` at a time, each by a ``command`` that the notebook's number ends.
    """
    if jobs > 1 and len(paths) > 1:
        code = side_by_side({path.name[:2]: [*command, path.name[:2]] for path in paths}, jobs=jobs, grace=grace)
        runs.publish_records(output.parent / "records", executed / "records.json")  # of all, whoever ended last
        return code
    state, parameters = State(), {"profile": profile, "overrides": overrides}
    with forwarding(state, grace):
        for path in paths:
            state.cell = State.cell
            print(f"{path.name}: profile {profile}", flush=True)
            try:
                error = run_one(path, state, parameters=parameters, output=output, executed=executed, cwd=cwd)
            except Exception as failed:  # a dead kernel, an unreadable notebook, a full disk: the message says why
                error = f"{type(failed).__name__}: {failed}"
            if state.received:
                name = signal.Signals(state.received).name
                print(f"{path.name}: {name} {state.cell}; the same command resumes", file=sys.stderr)
                return 128 + state.received
            if error:
                print(f"{path.name}: failed {state.cell}: {error}\nsee {output / path.name}", file=sys.stderr)
                return 1
    return 0


def side_by_side(commands: dict[str, list[str]], *, jobs: int, grace: float = 60.0) -> int:
    """Run ``commands``, name to arguments, ``jobs`` at a time in their order; returns the exit code, as ``run`` does.

    Each has its share of the cores, and its name before every line. After a failure or a signal none is started; a
    signal is passed on to those that run, and all are waited for.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ, TURNS: "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    options |= {"env": environment, "start_new_session": True, "preexec_fn": tie}
    state, codes = State(), {}

    def execute(name: str) -> None:
        if state.received or any(codes.values()):
            return
        with subprocess.Popen(commands[name], **options) as process:
            state.kernels.add(process.pid)
            send({process.pid} if state.received else (), state.received)
            for line in process.stdout:
                print(f"{name} | {line}", end="", flush=True)
        state.kernels.discard(process.pid)
        codes[name] = process.returncode

    with forwarding(state, grace + 10), ThreadPoolExecutor(jobs) as pool:
        list(pool.map(execute, commands))
    if failed := [f"{name} ({code})" for name, code in codes.items() if code]:
        left = ", ".join(name for name in commands if name not in codes) or "none"
        print(f"ended early: {', '.join(failed)}; not started: {left}", file=sys.stderr)
    return 128 + state.received if state.received else next((code for code in codes.values() if code), 0)


def from_root(profile: str) -> str:
    """``profile`` as a kernel finds it, which starts in the repository's root: a name as it is, a file by its path."""
    path = Path(config.profile_path(profile))
    return str(path.relative_to(config.ROOT) if path.is_relative_to(config.ROOT) else path)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (2 for a profile, setting or notebook that does not exist)."""
    parser = argparse.ArgumentParser(prog="python -m decur_core.run", description="Run notebooks headless.")
    parser.add_argument("profile", help="a file in notebooks/profiles, without .yaml; or the path of one, with it")
    parser.add_argument("notebooks", nargs="*", help="numbers, e.g. 20 30; default: all")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. epochs=5")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time (%(default)s)")
    parser.add_argument("--grace", type=float, default=60, help="seconds for a checkpoint after a signal (%(default)s)")
    args = parser.parse_intermixed_args(argv)
    try:
        overrides = config.overrides(args.set)
        settings = config.load(args.profile, overrides)
        paths = find(args.notebooks, config.ROOT / "notebooks")
    except ValueError as error:
        parser.error(str(error))
    book = runs.path(settings, "executed") if settings.name else config.ROOT / "book/executed" / settings.profile
    folders = {"output": runs.path(settings, "notebooks"), "executed": book}  # trials with a name are not the book's
    same = [*(["--set", *args.set] if args.set else []), "--grace", str(args.grace), args.profile]
    alike = {"jobs": args.jobs, "command": [sys.executable, "-m", "decur_core.run", *same]}
    return run(paths, profile=from_root(args.profile), overrides=overrides, grace=args.grace, **folders, **alike)


if __name__ == "__main__":
    sys.exit(main())

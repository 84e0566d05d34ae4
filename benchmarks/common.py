"""What the benchmarks share: paired timing, peak memory in a fresh process, tables, and records with provenance."""

import argparse
import gc
import importlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from decur_core import config
from decur_core.data.modality import OPTICAL, SAR
from decur_core.data.store import Store, StoreWriter
from decur_core.running import folders as runs

RECORDS = config.ROOT / "benchmarks" / "records"
PAIR = (SAR, OPTICAL)
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # TFLOP/s in 16 bit, dense, of the SXM boards (data sheets)
LOAD = os.getloadavg()[0]  # processes that wanted the machine in the minute before this benchmark


def arguments(about: str, argv: Sequence[str] | None, **known: tuple) -> argparse.Namespace:
    """Command line with ``--device`` and, for each (default on the CPU, default on a GPU, meaning), a ``--name``."""
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="cpu", help="cpu or cuda; other defaults follow from it")
    on_cpu = torch.device(device.parse_known_args(argv)[0].device).type == "cpu"
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, parents=[device], formatter_class=form)
    for name, (cpu, cuda, meaning) in known.items():
        default = cpu if on_cpu else cuda
        several = isinstance(default, list)
        options = {"type": type(default[0] if several else default), "nargs": "+" if several else None}
        parser.add_argument(f"--{name}", default=default, help=f"{meaning} (default: {default})", **options)
    return parser.parse_args(argv)


def random_store(path: Path, *, count: int, side: int, seasons: int) -> Store:
    """A store of random SAR and optical pixels, side x side."""
    shapes = {m.name: (m.channels, side, side) for m in PAIR}
    meta = {"preprocessing": {m.name: m.mapping() for m in PAIR}}
    ids, random = [f"{i:07d}" for i in range(count)], np.random.default_rng(0)
    with StoreWriter(path, ids=ids, shapes=shapes, seasons=seasons, meta=meta) as writer:
        for name in ids:
            writer.put(name, {m: random.integers(0, 256, (seasons, *s), np.uint8) for m, s in shapes.items()})
    return Store(path)


def synchronize(device: str) -> None:
    """Wait until ``device`` has done what it was told; nothing to wait for on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(calls: dict[str, Callable], *, repeats: int = 5, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each call after one warm-up.

    The calls take turns, so that whatever else the machine does falls on all of them and their ratio stays fair.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            if repeat:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def pace(calls: dict[str, Callable], *, repeats: int, warm: int, device: str, turns: int = 3) -> dict[str, float]:
    """Seconds for a call, of ``repeats`` calls without a pause: the host never waits for the device between them.

    Median of the turns. ``warm`` calls before each use up what workers prepared while another call had its turn.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(turns), calls.items()):
        for k in range(warm + repeats):
            if k == warm:
                synchronize(device)
                began = time.perf_counter()
            call()
        synchronize(device)
        times[name].append((time.perf_counter() - began) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def rate(loader: Iterable, duration: float) -> float:
    """Batches per second, from the first to one that comes at least ``duration`` seconds later."""
    arrivals = []
    for _ in loader:
        arrivals.append(time.perf_counter())
        if len(arrivals) > 2 and arrivals[-1] - arrivals[0] > duration:
            break
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


def peak_arithmetic() -> float:
    """TFLOP/s that the GPU's data sheet names, or 0 where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for known, value in PEAKS.items() if known in name), 0.0)


def peak_memory(module: str, prepare: str, *, device: str = "cpu", **arguments) -> int:
    """Bytes that a piece of work holds at its peak on top of its inputs; see ``cost``."""
    return cost(module, prepare, device=device, **arguments)[0]


def cost(module: str, prepare: str, *, device: str = "cpu", **arguments) -> tuple[int, float]:
    """Bytes that a piece of work holds at its peak on top of its inputs, and its seconds, in a fresh process.

    ``module.prepare(**arguments, device=...)`` makes the inputs and returns the work as a callable, which runs once,
    without a warm-up; ``arguments`` must be JSON-able. On the CPU the bytes are the rise of the resident set to its
    high-water mark (Linux), on a GPU that of the memory PyTorch has allocated.
    """
    text = json.dumps({**arguments, "device": device})
    code = f"from benchmarks.common import _peak; _peak({module!r}, {prepare!r}, {text!r})"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{module}.{prepare} {text} failed with exit code {out.returncode}:\n{out.stderr}")
    peak, took = out.stdout.split()[-2:]
    return int(peak), float(took)


def _resident(field: str) -> int:
    return 1024 * int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _peak(module: str, prepare: str, text: str) -> None:
    arguments = json.loads(text)
    work = getattr(importlib.import_module(module), prepare)(**arguments)
    gc.collect()
    gpu = torch.device(arguments["device"]).type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        # Not ru_maxrss: it starts at the parent's resident set, which survives fork and exec. "5" resets the mark.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    began = time.perf_counter()
    work()
    synchronize(arguments["device"])
    took = time.perf_counter() - began
    print((torch.cuda.max_memory_allocated() if gpu else _resident("VmHWM")) - before, took)


def table(rows: Sequence[dict]) -> str:
    """Rows with the same keys as aligned text; floats with four significant digits."""
    if not rows:
        return ""
    lines = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def save(name: str, *, settings: dict, rows: Sequence[dict], device: str = "cpu") -> Path:
    """Write settings, rows, and where and when they were measured. Returns the file.

    It is ``benchmarks/records/<name>.json``, with the device's kind after the name if it is not the CPU.
    """
    kind = torch.device(device).type
    hardware = {**runs.provenance(), "threads": torch.get_num_threads(), "load_before": round(LOAD, 2)}
    file = RECORDS / f"{name if kind == 'cpu' else f'{name}-{kind}'}.json"
    runs.write_json(file, {"settings": settings, "rows": list(rows), "provenance": hardware})
    return file

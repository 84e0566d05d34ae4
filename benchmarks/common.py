"""What the benchmarks share: paired timing, peak memory in a fresh process, tables, and records with provenance."""

import gc
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from decur_core import config, runs

RECORDS = config.ROOT / "benchmarks" / "records"


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


def peak_memory(module: str, prepare: str, *, device: str = "cpu", **arguments) -> int:
    """Bytes that a piece of work holds at its peak on top of its inputs, measured in a fresh process.

    ``module.prepare(**arguments, device=...)`` makes the inputs and returns the work as a callable; ``arguments`` must
    be JSON-able. On the CPU it is the rise of the resident set to its high-water mark (Linux), on a GPU that of the
    memory PyTorch has allocated.
    """
    text = json.dumps({**arguments, "device": device})
    code = f"from benchmarks.common import _peak; _peak({module!r}, {prepare!r}, {text!r})"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{module}.{prepare} {text} failed with exit code {out.returncode}:\n{out.stderr}")
    return int(out.stdout.split()[-1])


def _resident(field: str) -> int:
    return 1024 * int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _peak(module: str, prepare: str, text: str) -> None:
    arguments = json.loads(text)
    work = getattr(importlib.import_module(module), prepare)(**arguments)
    gc.collect()
    if torch.device(arguments["device"]).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        print(torch.cuda.max_memory_allocated() - before)
    else:
        # Not ru_maxrss: it starts at the parent's resident set, which survives fork and exec. "5" resets the mark.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        work()
        print(_resident("VmHWM") - before)


def table(rows: Sequence[dict]) -> str:
    """Rows with the same keys as aligned text; floats with four significant digits."""
    if not rows:
        return ""
    lines = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def save(name: str, *, settings: dict, rows: Sequence[dict]) -> Path:
    """Write ``benchmarks/records/<name>.json``: settings, rows, and where they were measured. Returns the file."""
    hardware = {**runs.provenance(), "threads": torch.get_num_threads()}
    runs.write_json(RECORDS / f"{name}.json", {"settings": settings, "rows": list(rows), "provenance": hardware})
    return RECORDS / f"{name}.json"

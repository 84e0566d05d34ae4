"""A run's history: a line of JSON per step with every loss term, in ``history.jsonl``."""

import contextlib
import json
import os
from pathlib import Path

import torch

from decur_core.config import Settings
from decur_core.running import checkpoints
from decur_core.running import folders as runs
from decur_core.running.files import disk


class NonFinite(RuntimeError):
    """A loss or a weight became NaN or infinite; the message says where, and what to do."""


def write(pending: list, folder: Path, settings: Settings, rate: float, *, rank: int = 0) -> float:
    """Append the pending steps' lines, after making sure that every term is a number; returns the last total."""
    values = torch.cat([torch.stack([*terms.values()]) for _, _, terms in pending]).cpu().double().tolist()
    file = os.devnull if rank else folder / "history.jsonl"
    with disk(file), open(file, "a") as lines:
        for step, share, terms in pending:
            row = finite(dict(zip(terms, values, strict=False)), folder, "loss terms", step)
            values = values[len(terms) :]
            rates = {"learning_rate": share * settings.learning_rate, "pairs_per_second": round(rate, 2)}
            lines.write(json.dumps({"step": step, **rates, **row}) + "\n")
    return row["total"]


def finite(values: dict, folder: Path, what: str, step: int) -> dict:
    """``values``, numbers or tensors by name; NonFinite where there is something else in some of them."""
    tensors = {name: torch.as_tensor(x) for name, x in values.items()}
    if bad := [f"{name} = {x.sum()}" for name, x in tensors.items() if not x.isfinite().all()]:
        good = [f.name for f in checkpoints.files(folder)]
        state = f"{what} {', '.join(bad[:9])} at step {step}; last good checkpoint: {good[-1] if good else 'none'}"
        raise NonFinite(f"{folder.name}: {state}. Lower learning_rate, or look at the images of that step.")
    return values


def keep(folder: Path, start: int) -> None:
    """Cut lines of steps that are about to be computed again, so that each step has one line."""
    kept = [line for line in read(folder) if line["step"] <= start]
    runs.write_text(folder / "history.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def read(folder: Path, name: str = "history.jsonl") -> list[dict]:
    """Every step's loss terms and rates, in order, or other lines of JSON; a torn last line is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(folder / name, errors="replace") as f:
        for line in f:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def last(folder: Path) -> dict | None:
    """The newest whole line, read from the end of the file; None if there is none yet."""
    with contextlib.suppress(OSError, IndexError, json.JSONDecodeError), open(folder / "history.jsonl") as file:
        file.seek(max(0, os.stat(file.fileno()).st_size - 2000))
        return json.loads(file.read().splitlines()[-1])
    return None


def split(folder: Path) -> dict:
    """What a run with ``dim_common: auto`` found: ``dim_common`` or ``blocks``, and what it was read from."""
    return json.loads((Path(folder) / "split.json").read_text())

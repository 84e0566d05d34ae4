"""A run's history: a line of JSON per step with every loss term, in ``history.jsonl``."""

import contextlib
import json
import math
import os
from pathlib import Path

import torch

from decur_core.config import Settings
from decur_core.running import checkpoints
from decur_core.running import folders as runs


class NonFinite(RuntimeError):
    """A loss became NaN or infinite; the message says where, and what to do."""


def write(pending: list, folder: Path, settings: Settings, rate: float, *, rank: int = 0) -> float:
    """Make sure that every term of pending steps is a number, append their lines (rank 0), return the last total."""
    values = torch.cat([torch.stack([*terms.values()]) for _, _, terms in pending]).cpu().double().tolist()
    file, lines = Path(os.devnull) if rank else folder / "history.jsonl", []
    for step, share, terms in pending:
        row, values = dict(zip(terms, values, strict=False)), values[len(terms) :]
        if bad := ", ".join(f"{name} = {value}" for name, value in row.items() if not math.isfinite(value)):
            append(file, lines)
            raise _diverged(folder, f"loss terms {bad} at step {step}")
        rates = {"learning_rate": share * settings.learning_rate, "pairs_per_second": round(rate, 2)}
        lines.append({"step": step, **rates, **row})
    append(file, lines)
    return row["total"]


def finite(weights: dict, folder: Path, step: int) -> dict:
    """``weights``; NonFinite where the last update made one no number, which no loss has seen yet."""
    if bad := [name for name, x in weights.items() if not x.isfinite().all()]:
        raise _diverged(folder, f"{len(bad)} weights that are not finite ({bad[0]}) after step {step}")
    return weights


def _diverged(folder: Path, what: str) -> NonFinite:
    """That something of a run is not a number, and what there is from before."""
    good = [f.name for f in checkpoints.files(folder)]
    state = f"{what}; last good checkpoint: {good[-1] if good else 'none'}"
    return NonFinite(f"{folder.name}: {state}. Lower learning_rate, or look at the images of that step.")


def append(file: Path, lines: list[dict]) -> None:
    """Add lines of JSON; OSError with the file, the reason and the way out where the disk takes no more."""
    try:
        with open(file, "a") as opened:
            opened.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        why = f"{file} cannot be written ({error.strerror}); mend that, and the same call resumes"
        raise OSError(error.errno, why) from error


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

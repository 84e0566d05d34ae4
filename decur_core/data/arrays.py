"""What lies in the folder of a store: plain arrays, each of which `numpy.load(…, mmap_mode="r")` opens.

A row of each array belongs to an id; all are as long as the data set from the start.

    index.json       format, ids, shapes, seasons, `meta` (data set, preprocessing); once it is finished also
                     `quarantined` {id: reason} and `summary` (mean, std, SHA-256 of the content)
    <modality>.npy   uint8 (rows, seasons, C, H, W); a large one in files of equally many rows, <modality>-0003.npy
    labels.npy       uint8 (rows, L), if there are labels
    digests.npy      uint8 (rows, 32), SHA-256 of a row's images and labels
    moments.npy      float64 (rows, 2, bands), mean and variance of each band in physical units
    reasons.npy      text (rows,), why a row is quarantined
    state.npy        uint8 (rows,), 0 to do, 1 stored, 2 quarantined
"""

import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from decur_core.data.raster import DataError
from decur_core.running.files import FULL, write_text

FORMAT = 3
TODO, STORED, QUARANTINED = range(3)
REASON = 1024  # bytes that are kept of a reason
_BLOCK = 1024  # rows that are looked at together


def positions(count: int, shard: tuple[int, int], chunk: int = 1) -> range:
    """Which of `count` ids belong to shard (i, n): about 1/n of them, consecutive, whole chunks of the reader."""
    i, n = shard
    if not 0 <= i < n:
        raise DataError(f"shard {i}/{n}: expected I/N with I from 0 to N - 1")
    chunks = -(-count // chunk)
    return range(count)[i * chunks // n * chunk : (i + 1) * chunks // n * chunk]


def digest(images: Iterable[np.ndarray], labels: Sequence[int]) -> bytes:
    """SHA-256 of a sample: the bytes of its images, modality by modality and season by season, then its labels."""
    found = hashlib.sha256()
    for image in images:
        found.update(np.ascontiguousarray(image))
    found.update(bytes(map(int, labels)))
    return found.digest()


def load(path: Path) -> dict | None:
    """The index of a store, None without one; a DataError says what is there instead."""
    if (path / "data.mdb").exists() or any(path.glob("part-*-of-*/data.mdb")):
        raise DataError(f"{path}: a store of an earlier version (data.mdb); remove it and convert again")
    try:
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}, expected {FORMAT}")
        return index
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no store that can be read; remove it and convert again ({error!r})") from error


def save(path: Path, index: dict) -> None:
    """Write an index, a line for each of its keys."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in index.items())
    write_text(path / "index.json", f"{{\n{lines}\n}}\n")


def measured(index: dict) -> dict[str, int]:
    """Bands of each modality that was encoded: their moments are kept."""
    return {name: shape[0] for name, shape in index["shapes"].items() if name in index["meta"].get("preprocessing", {})}


def files(index: dict) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """Arrays by name, `state` last: file name, dtype and shape of each of their files."""
    rows, found = len(index["ids"]), {}
    for name, shape in index["shapes"].items():
        each = index["rows_per_file"][name]
        starts = range(0, rows, each)
        names = [f"{name}-{k:04d}.npy" for k in range(len(starts))] if len(starts) > 1 else [f"{name}.npy"]
        shapes = [(min(each, rows - start), index["seasons"], *shape) for start in starts]
        found[name] = [(file, "|u1", shape) for file, shape in zip(names, shapes, strict=True)]
    others = {"labels": ("|u1", index["labels"]), "digests": ("|u1", 32), "reasons": (f"|S{REASON}",)}
    others |= {"moments": ("<f8", 2, sum(measured(index).values())), "state": ("|u1",)}
    kept = {name: form for name, form in others.items() if math.prod(form[1:])}
    return found | {name: [(f"{name}.npy", dtype, (rows, *shape))] for name, (dtype, *shape) in kept.items()}


def maps(path: Path, index: dict) -> dict[str, list[np.memmap]]:
    """The arrays by name, each of their files mapped to be read; a DataError names one that is not all there."""
    found = {}
    for name, each in files(index).items():
        for file, dtype, shape in each:
            try:  # numpy refuses a file that is shorter than its header says; to read behind its end kills the process
                array = np.lib.format.open_memmap(path / file, mode="r")
            except (FileNotFoundError, ValueError) as error:  # no other OSError is the file's fault
                state = "missing" if isinstance(error, OSError) else f"truncated or damaged ({error})"
                raise DataError(f"{path / file}: {state}; remove the store and convert again") from error
            if array.dtype != dtype or array.shape != shape:
                what = f"{array.dtype} {array.shape}, expected {dtype} {shape}"
                raise DataError(f"{path / file}: {what}; remove the store and convert again")
            found.setdefault(name, []).append(array)
    return found


def make(path: Path, index: dict) -> None:
    """Every file at its full size, `state` last, with the room for them taken at once where the file system can."""
    every = [(name, *each) for name, group in files(index).items() for each in group]
    for _, file, *_ in every:  # of a process that was killed here: it has taken the room
        for made in (path / file, path / f".{file}"):
            made.unlink(missing_ok=True)
    need = sum(np.dtype(dtype).itemsize * math.prod(shape) for name, _, dtype, shape in every if name != "reasons")
    if need > (free := shutil.disk_usage(path).free):
        why = f"the store needs {need / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free on its disk"
        raise OSError(errno.ENOSPC, why)
    # Not os.posix_fallocate, which writes to every block where the file system cannot.
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", lambda *_: 0)
    for name, file, dtype, shape in every:
        made = path / f".{file}"
        np.lib.format.open_memmap(made, "w+", dtype, shape)
        with open(made, "r+b") as opened:
            size = ctypes.c_int64(made.stat().st_size if name != "reasons" else 1)  # most of those stay holes
            if fallocate(opened.fileno(), 0, ctypes.c_int64(0), size):
                number = ctypes.get_errno()
                if number in FULL:
                    raise OSError(number, os.strerror(number))
            os.fsync(opened.fileno())
        os.replace(made, path / file)


def summary(path: Path, index: dict, rows: range) -> dict:
    """Of some rows: `stored` (how many), `quarantined` {id: reason}, `sha256` of the content, `mean` and `std`.

    The digest, however a store was written, is that of the stored ids, one a line, then of their digests. Statistics
    are per modality and band.
    """
    there, ids = maps(path, index), index["ids"][rows.start : rows.stop]
    state, digests, reasons = (there[name][0][rows.start : rows.stop] for name in ("state", "digests", "reasons"))
    moments = there["moments"][0][rows.start : rows.stop] if "moments" in there else np.empty((len(ids), 2, 0))
    kept = np.flatnonzero(state == STORED)
    sha256 = hashlib.sha256("\n".join(ids[k] for k in kept).encode() + b"\n")
    origin, sums = moments[kept[0], 0] if len(kept) else 0.0, np.zeros((2, moments.shape[2]))
    for block in np.split(kept, range(_BLOCK, len(kept), _BLOCK)):  # a few at a time: together they are large
        sha256.update(digests[block].tobytes())
        offset = moments[block, 0] - origin  # near the mean, so that squares lose nothing
        sums += offset.sum(0), (moments[block, 1] + offset**2).sum(0)
    first, second = sums / max(1, len(kept))
    bad = {ids[k]: reasons[k].decode(errors="ignore") for k in np.flatnonzero(state == QUARANTINED)}
    found = {"stored": len(kept), "quarantined": bad, "sha256": sha256.hexdigest()}
    for key, values in (("mean", origin + first), ("std", np.sqrt((second - first**2).clip(0)))):
        bands = iter(values.tolist())
        found[key] = {name: [next(bands) for _ in range(n)] for name, n in measured(index).items()}
    return found


def unlike(there: dict, here: dict) -> str:
    """What differs between two indices, in words, of all that decides a store's content; empty if nothing does."""
    flat = []
    for index in (there, here):
        ids = {"count": len(index["ids"]), "sha256": hashlib.sha256("\n".join(index["ids"]).encode()).hexdigest()}
        kept = {key: index[key] for key in ("shapes", "seasons", "labels", "chunk", "meta")}
        flat.append(_flat({"ids": ids} | kept))
    a, b = flat
    other = [k for k in a | b if a.get(k) != b.get(k) and k not in ("meta.data.name", "meta.data.title")]
    return "; ".join(f"{k}: {a.get(k)} there, {b.get(k)} here" for k in other)


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Nested dictionaries as one, with dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}

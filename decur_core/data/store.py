"""Encoded images as plain arrays on disk (`arrays`): read as slices of maps, written row by row by many processes.

Rows are written in place, never through a map: a full disk is an error then, not the end of the process. They are
marked as done when they have reached the disk, so a kill costs only what is not marked.
"""

import contextlib
import functools
import json
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from decur_core.data import arrays
from decur_core.data.arrays import QUARANTINED, STORED, TODO, digest, load, maps, positions
from decur_core.data.raster import DataError, repeated
from decur_core.running.files import disk, locked, seen

_LARGEST = 2**37  # bytes of a file
_BATCH, _PAUSE = 2**26, 10.0  # bytes or seconds after which rows are flushed and marked: a flush waits for the disk
_ID = re.compile(r"[^\0\n\ud800-\udfff]*")  # those separate ids, or are not Unicode


class Store:
    """A finished store, read-only: `len`, `.ids`, `.shapes`, `.seasons`, `.labels` (uint8 (n, L) or None) and `.meta`.

    Rows in quarantine are left out. `.meta` is the writer's, with `quarantined` {id: reason} and `summary` (`mean` and
    `std` per modality and band, `sha256`). A store pickles as its path and works in threads, forks and fresh processes.
    A DataError says that it is missing, unfinished or truncated.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        index = load(self.path)
        if not index or not index["finished"]:
            left = _left(self.path, index) if index else ""
            raise DataError(f"{self.path}: no finished store{left}; the same conversion goes on where it stopped")
        there = maps(self.path, index)
        self.seasons, self.shapes = index["seasons"], {name: tuple(shape) for name, shape in index["shapes"].items()}
        # The class of numpy's maps takes time at every access.
        plain = {name: [array.view(np.ndarray) for array in there[name]] for name in self.shapes}
        self._images = {name: (index["rows_per_file"][name], plain[name]) for name in self.shapes}
        self._rows = [row for row, id in enumerate(index["ids"]) if id not in index["quarantined"]]
        self.ids = [index["ids"][row] for row in self._rows]
        self.labels = there["labels"][0].view(np.ndarray)[self._rows] if index["labels"] else None
        self.meta = index["meta"] | {key: index[key] for key in ("quarantined", "summary")}
        seen.append({k: v for k, v in self.meta.get("data", {}).items() if k in ("name", "title", "drawn", "source")})

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple:
        return Store, (self.path,)

    @property
    def sha256(self) -> str:
        """Of the content, whatever the number of workers, parts and interruptions that made it."""
        return self.meta["summary"]["sha256"]

    def check(self, preprocessing: dict[str, dict]) -> None:
        """A DataError if it was made with another preprocessing (`mapping()` by modality; measured, it may be any)."""
        for name, needed in preprocessing.items():
            found = self.meta["preprocessing"].get(name)
            free = ("scheme", "low", "high") if found and needed.get("scheme") == "measured" else ()
            if found != needed | {key: found[key] for key in free if key in found}:
                other = f"was converted with another preprocessing, {found}; needed is {needed}"
                raise DataError(f"{self.path}: {name} {other}. Convert the data again.")

    def read(self, i: int, modality: str, season: int) -> np.ndarray:
        """Image of the i-th id: uint8 (C, H, W), a read-only view of the file, valid as long as it is held."""
        if modality not in self._images or not 0 <= season < self.seasons:
            raise DataError(f"{self.path}: no image {self.ids[i]}, {modality}, season {season} (of {self.seasons})")
        each, files = self._images[modality]
        k, row = divmod(self._rows[i], each)
        return files[k][row, season]


def _left(path: Path, index: dict) -> str:
    """What is to be done of an unfinished store, in words."""
    with contextlib.suppress(DataError):  # killed while its files were made
        todo, n = maps(path, index)["state"][0] == TODO, index["parts"]
        spans = (positions(len(todo), (i, n), index["chunk"]) for i in range(n))
        missing = ", ".join(f"{i}/{n}" for i, span in enumerate(spans) if todo[span.start : span.stop].any())
        return f" ({todo.sum()} of {len(todo)} samples to do" + (f", in parts {missing})" if n > 1 else ")")
    return ""


class StoreWriter:
    """Writes a store or a part of one, or goes on with an unfinished one, as a context manager.

    `ids`: every id of the data set, in its order; `shapes`: (C, H, W) per modality; `seasons`: images per id and
    modality; `labels`: length of the label vector, 0 without; `meta`: JSON-able facts (`data`, `preprocessing`);
    `shard`, `chunk`: which part, see `positions`; `retry`: do again what is in quarantine; `allowed`: share of the ids
    in quarantine up to which the store is finished.

    The process may be killed at any moment: what `.state`, uint8 per row of the whole, says to be done is complete.
    `.span` are the rows of the part, `.finished` says that nothing is left to do. Pickled, it writes rows in another
    process as well, which has to `flush`.

    DataError: `path` holds another store (what differs), or one in another number of parts; too much is quarantined.
    RuntimeError: another process writes this part. OSError: there is not enough room, or the disk fails.
    """

    def __init__(
        self, path: Path | str, *, ids: Sequence[str], shapes: dict, seasons: int, labels=0, meta: dict, shard=(0, 1),
        chunk=1, retry=False, allowed=1.0,
    ):  # fmt: skip
        _check_names(ids, shapes)
        self.span, self.allowed = positions(len(ids), shard, chunk), allowed
        wanted = {"format": arrays.FORMAT, "finished": False, "parts": shard[1], "chunk": chunk}
        wanted |= {"shapes": shapes, "seasons": seasons, "labels": labels, "meta": meta, "rows_per_file": {}}
        wanted = json.loads(json.dumps(wanted)) | {"ids": list(ids)}
        for name, shape in shapes.items():
            files = -(-len(ids) * seasons * math.prod(shape) // _LARGEST)
            wanted["rows_per_file"][name] = -(-len(ids) // files)
        part = "" if shard[1] == 1 else f"-{shard[0]:04d}-of-{shard[1]:04d}"
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(Path(path), name=f".lock{part}"))
            with locked(Path(path), name=".lock-index", wait=True), disk(path):
                _begin(Path(path), wanted, retry=retry)
                self._open(Path(path))
                for row in self.span if retry else ():
                    if self.state[row] == QUARANTINED:
                        self._write("state", row, bytes([TODO]))
                        self.state[row] = TODO
            self._held = stack.pop_all()

    def _open(self, path: Path) -> None:
        self.path, self.index, self._files, self._held = path, load(path), {}, contextlib.ExitStack()
        self._maps, self._pending, self._bytes, self._since = maps(path, self.index), {}, 0, time.monotonic()
        self.state, self.finished = np.array(self._maps["state"][0]), self.index["finished"]

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.close(finish=error[0] is None)
        except OSError:
            if error[0] is None:  # else the first error says more
                raise

    def __reduce__(self) -> tuple:
        return _joined, (self.path,)

    def put(self, id: str | int, images: dict, labels: Sequence | None = None, *, moments=None) -> bytes:
        """Store uint8 (seasons, C, H, W) per modality and labels (L,) of an id, or of the one at a position.

        `moments`, {modality: (mean, variance)} with a value per band, go into the statistics. Returns the digest.
        """
        row, index = self._row(id), self.index
        found = {name: [str(array.dtype), *array.shape] for name, array in images.items()}
        wanted = {name: ["uint8", index["seasons"], *shape] for name, shape in index["shapes"].items()}
        labels = b"" if labels is None else bytes(int(label) for label in labels)
        if found != wanted or len(labels) != index["labels"]:
            state = f"{found}, {len(labels)} labels; expected {wanted}, {index['labels']} labels"
            raise DataError(f"{index['ids'][row]}: {state}")
        values = {name: np.ascontiguousarray(images[name]) for name in wanted}
        values |= {"labels": labels, "digests": digest(values.values(), labels)}
        if moments and "moments" in self._maps:
            values["moments"] = np.concatenate([np.asarray(moments[name]) for name in arrays.measured(index)], axis=1)
        for name in values.keys() & self._maps:
            self._write(name, row, values[name])
        self._mark(row, STORED)
        return values["digests"]

    def quarantine(self, id: str | int, reason: str) -> None:
        """Note why an id is left out."""
        row = self._row(id)
        self._write("reasons", row, reason.encode()[: arrays.REASON].ljust(arrays.REASON, b"\0"))
        self._mark(row, QUARANTINED)

    def _row(self, id: str | int) -> int:
        row = id if isinstance(id, int) else self._known[id]
        if self.state[row] != TODO:
            raise DataError(f"{self.path}: {self.index['ids'][row]} is already in the store")
        return row

    @functools.cached_property
    def _known(self) -> dict[str, int]:
        return {id: row for row, id in enumerate(self.index["ids"])}

    def _write(self, name: str, row: int, value: np.ndarray | bytes) -> None:
        k, row = divmod(row, self.index["rows_per_file"].get(name, len(self.state)))
        there = self._maps[name][k]
        data, offset = memoryview(value).cast("B"), there.offset + row * there.strides[0]
        with disk(self.path):
            if there.filename not in self._files:
                # For writing alone: a network's file system must not write back what it once read of others' rows.
                self._files[there.filename] = os.open(there.filename, os.O_WRONLY)
            while data:
                written = os.pwrite(self._files[there.filename], data, offset)
                data, offset, self._bytes = data[written:], offset + written, self._bytes + written

    def _mark(self, row: int, state: int) -> None:
        self._pending[row] = self.state[row] = state
        if self._bytes >= _BATCH or time.monotonic() - self._since > _PAUSE:
            self.flush()

    def flush(self) -> None:
        """Wait until what was written is on the disk, then mark its rows as done."""
        flush = getattr(os, "fdatasync", os.fsync)
        with disk(self.path):
            for file in self._files.values() if self._pending else ():
                flush(file)
        for row, state in self._pending.items():
            self._write("state", row, bytes([state]))
        self._pending, self._bytes, self._since = {}, 0, time.monotonic()

    def close(self, *, finish: bool = True) -> None:
        """Write what is left and, with every row of the store done, finish it, unless `finish` is off."""
        try:
            self.flush()
            with disk(self.path):
                for file in self._files.values():
                    os.fsync(file)
            if finish and not self.finished:
                with locked(self.path, name=".lock-index", wait=True), disk(self.path):
                    self._finish()
        finally:
            for file in self._files.values():
                os.close(file)
            self._files = {}
            self._held.close()

    def _finish(self) -> None:
        """Note what is only known at the end, if it has come: other parts may have something to do."""
        state = maps(self.path, self.index)["state"][0]
        if (state == TODO).any():
            return
        found = arrays.summary(self.path, self.index, range(len(state)))
        bad = found.pop("quarantined")
        if len(bad) > self.allowed * len(state):
            raise DataError(too_many(self.path, len(bad), len(state), self.allowed, ": ".join([*bad.items()][-1])))
        arrays.save(self.path, self.index | {"finished": True, "quarantined": bad, "summary": found})


def _joined(path: Path) -> StoreWriter:
    """A writer of rows in another process."""
    writer = object.__new__(StoreWriter)
    writer._open(path)
    return writer


def _begin(path: Path, wanted: dict, *, retry: bool) -> None:
    """Note what is to be stored and make the files, `state` last: where it is missing, they are not all there.

    Of a finished store, half copied for instance, none is made anew: it would pass for whole with nothing in it.
    """
    index = load(path)
    if index is None:
        if foreign := [file for each in arrays.files(wanted).values() for file, *_ in each if (path / file).exists()]:
            raise DataError(f"{path}: holds {foreign[0]} but no index.json, so no store; choose another path")
        arrays.save(path, wanted)
    elif unlike := arrays.unlike(index, wanted):
        raise DataError(f"{path}: holds another store, choose another path ({unlike})")
    elif index["parts"] != wanted["parts"]:
        what = f"holds a store in {index['parts']} part(s), not {wanted['parts']}"
        raise DataError(f"{path}: {what}; choose another path")
    elif retry and index["finished"] and index["quarantined"]:
        arrays.save(path, index | {"finished": False})
    if not (path / "state.npy").exists() and not (index or wanted)["finished"]:
        arrays.make(path, index or wanted)


def too_many(path: Path, bad: int, count: int, allowed: float, last: str) -> str:
    """Why a store is not finished of which more is in quarantine than was asked for."""
    how = "mend their files and convert with retry=True (--retry), or with a larger share allowed=… (--allowed)"
    return f"{path}: {bad} of {count} samples are quarantined, more than {allowed:.0%}, last {last}; {how}"


def _check_names(ids: Sequence[str], modalities: Iterable[str]) -> None:
    """Refuse, with a DataError, ids that cannot be noted or are given twice, and modalities that cannot name files."""
    for id in ids:
        if not (isinstance(id, str) and _ID.fullmatch(id)):
            raise DataError(f"id {id!r}: expected text of one line, without zeros and surrogates")
    if twice := repeated(ids):
        raise DataError(f"{len(twice)} of {len(ids)} ids are given more than once, first {twice[0]!r}")
    for name in modalities:
        if not re.fullmatch(r"[A-Za-z]\w*", name) or name in ("labels", "digests", "moments", "reasons", "state"):
            raise DataError(f"modality {name!r}: expected a name of letters, digits and _, none of a store's own files")

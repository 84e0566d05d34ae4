"""Encoded images in one LMDB file: raw bytes per image and season, JSON for everything else, nothing pickled.

Keys, parts separated by a zero byte: `image <id> <modality> <season>` -> uint8 (C, H, W); `done <id>` -> JSON record of
a stored id or {"reason": …} of a quarantined one, in the same transaction as its images; `spec` -> JSON of what the
store is meant to hold; `index` -> JSON of what it holds and `labels` -> uint8 (n, L), both written last.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import lmdb
import numpy as np

from decur_core.data.raster import DataError

_BATCH = 64 * 2**20  # bytes per transaction: each one waits for the disk
_MAP = 2**30  # bytes of addresses to begin with
_MAPS: dict[tuple[int, int], lmdb.Environment] = {}  # finished stores mapped by this process, by device and inode


def _key(*parts: object) -> bytes:
    return "\0".join(map(str, parts)).encode()


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Nested dictionaries as one, with dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


def _map(path: Path) -> lmdb.Environment | None:
    """The read-only mapping of a finished store, one per process and file; None if the store is not finished.

    It is never closed, so views into it stay valid, and takes no locks: a finished store has no writer, and a forked
    worker may go on using its parent's mapping.
    """
    try:
        stat = os.stat(path / "data.mdb")
        if (key := (stat.st_dev, stat.st_ino)) not in _MAPS:
            env = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
            with env.begin() as transaction:
                if transaction.get(b"index") is not None:
                    _MAPS[key] = env
                else:
                    env.close()
    except (OSError, lmdb.Error) as error:
        raise DataError(f"{path}: no store that can be read; decur_core.data.convert makes one ({error})") from error
    return _MAPS.get(key)


class StoreWriter:
    """Writes a store, or goes on with an unfinished one, as a context manager. One process may write at a time.

    `ids`: every id of the data set, in its order; `shapes`: (C, H, W) per modality; `seasons`: images per id and
    modality; `labels`: length of the label vector, 0 without; `meta`: JSON-able facts (data set, preprocessing).
    The process may be killed at any moment: ids in `.done` (stored or quarantined) are complete, the rest is to be put.
    `.finished` says that nothing is left to do. A DataError names what differs if `path` holds another store.
    """

    def __init__(
        self, path: Path | str, *, ids: Sequence[str], shapes: dict[str, tuple], seasons: int, labels=0, meta: dict
    ):
        self.path, self.ids, self._pending, self._bytes = Path(path), list(ids), [], 0
        digest = hashlib.sha256("\n".join(self.ids).encode()).hexdigest()
        spec = {"format": 1, "shapes": shapes, "seasons": seasons, "labels": labels, "meta": meta}
        self._spec = json.loads(json.dumps(spec | {"ids": {"count": len(self.ids), "sha256": digest}}))
        self.path.mkdir(parents=True, exist_ok=True)
        self._env = _map(self.path) if (self.path / "data.mdb").exists() else None
        self.finished = self._env is not None
        if not self.finished:
            # The file grows with its content; the map is only a range of addresses, doubled when it is full. Without
            # metasync a power cut can lose the latest transaction, but never the store.
            self._env = lmdb.open(str(self.path), map_size=_MAP, metasync=False, readahead=False)
        with self._env.begin() as transaction:
            there = transaction.get(b"spec")
            self.done = {i for i in self.ids if transaction.get(_key("done", i)) is not None} if there else set()
        if there is None:
            self._commit((b"spec", json.dumps(self._spec).encode()))
        else:
            there, here = _flat(json.loads(there)), _flat(self._spec)
            if unlike := [k for k in there | here if there.get(k) != here.get(k)]:
                self.close(finish=False)
                what = "; ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in unlike)
                raise DataError(f"{self.path}: holds another store, choose another path ({what})")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(finish=error[0] is None)

    def put(self, id: str, arrays: dict[str, np.ndarray], labels: Sequence | None = None, *, record=None) -> None:
        """Store uint8 (seasons, C, H, W) per modality, labels (L,) and a JSON-able dict `record` of an id."""
        found = {name: [str(array.dtype), *array.shape] for name, array in arrays.items()}
        wanted = {name: ["uint8", self._spec["seasons"], *shape] for name, shape in self._spec["shapes"].items()}
        labels = [] if labels is None else [int(label) for label in labels]
        if found != wanted or len(labels) != self._spec["labels"]:
            raise DataError(f"{id}: {found}, {len(labels)} labels; expected {wanted}, {self._spec['labels']} labels")
        for name, array in arrays.items():
            self._add(*((_key("image", id, name, s), np.ascontiguousarray(image)) for s, image in enumerate(array)))
        self._finish(id, (record or {}) | {"labels": labels})

    def quarantine(self, id: str, reason: str) -> None:
        """Note why an id is left out."""
        self._finish(id, {"reason": reason})

    def records(self) -> dict[str, dict]:
        """Records of the ids done so far, in the data set's order; of quarantined ones {"reason": …}."""
        self._commit()
        with self._env.begin() as transaction:
            return {i: json.loads(transaction.get(_key("done", i))) for i in self.ids if i in self.done}

    def close(self, *, finish: bool = True, summary: dict | None = None) -> None:
        """Write what is left; with every id done, unless `finish` is off, finish the store and note `summary` in it."""
        if self._env is None or self.finished:
            return
        records = self.records()
        if finish and len(records) == len(self.ids):
            kept = {i: record for i, record in records.items() if "reason" not in record}
            quarantined = {i: record["reason"] for i, record in records.items() if "reason" in record}
            index = {"ids": list(kept), "quarantined": quarantined, "summary": summary or {}}
            labels = np.array([record["labels"] for record in kept.values()], dtype=np.uint8)
            self._commit((b"labels", labels.tobytes()), (b"index", json.dumps(index).encode()))
        self._env.sync(True)
        self._env.close()
        self._env = None

    def _add(self, *items: tuple[bytes, np.ndarray | bytes]) -> None:
        self._pending += items
        self._bytes += sum(memoryview(value).nbytes for _, value in items)

    def _finish(self, id: str, record: dict) -> None:
        if self.finished or id in self.done:
            raise DataError(f"{self.path}: {id} is already in the store")
        self.done.add(id)
        self._add((_key("done", id), json.dumps(record).encode()))
        if self._bytes >= _BATCH:
            self._commit()

    def _commit(self, *items: tuple[bytes, bytes]) -> None:
        """Write what is pending and these items in one transaction."""
        self._add(*items)
        while self._pending:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, value in self._pending:
                        transaction.put(key, value)
                self._pending, self._bytes = [], 0
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])


class Store:
    """A finished store, read-only: `len`, `.ids`, `.shapes`, `.seasons`, `.labels` (uint8 (n, L) or None) and `.meta`.

    `.meta` is the writer's, with `quarantined` {id: reason} and the conversion's `summary`. A store pickles as its path
    and works in forked and spawned workers. A DataError says that a store is missing or unfinished.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._env = _map(self.path)
        if self._env is None:
            raise DataError(f"{self.path}: unfinished; run the same conversion again, it goes on where it stopped")
        with self._env.begin() as transaction:
            spec, index = (json.loads(transaction.get(key)) for key in (b"spec", b"index"))
            labels = transaction.get(b"labels")
        self.ids, self.seasons = index["ids"], spec["seasons"]
        self.shapes = {name: tuple(shape) for name, shape in spec["shapes"].items()}
        self.meta = spec["meta"] | {"quarantined": index["quarantined"], "summary": index["summary"]}
        self.labels = np.frombuffer(labels, np.uint8).reshape(len(self.ids), -1) if spec["labels"] else None

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, preprocessing: dict[str, dict]) -> None:
        """Refuse, with a DataError, a store that was not made with this preprocessing (`to_dict()` by modality)."""
        for name, needed in preprocessing.items():
            if (found := self.meta["preprocessing"].get(name)) != needed:
                other = f"was converted with another preprocessing, {found}; needed is {needed}"
                raise DataError(f"{self.path}: {name} {other}. Convert the data again.")

    def __reduce__(self) -> tuple:
        return Store, (self.path,)

    def read(self, i: int, modality: str, season: int) -> np.ndarray:
        """Image of the i-th id: uint8 (C, H, W), a read-only view of the file, valid as long as the process."""
        with self._env.begin(buffers=True) as transaction:
            value = transaction.get(_key("image", self.ids[i], modality, season))
        if value is None:
            raise DataError(f"{self.path}: no image {self.ids[i]}, {modality}, season {season} (of {self.seasons})")
        return np.frombuffer(value, dtype=np.uint8).reshape(self.shapes[modality])

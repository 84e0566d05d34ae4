"""Encoded images in LMDB files: raw bytes per image and season, JSON for everything else, nothing pickled.

A store is a folder with one file, or with parts (`part-0003-of-0016`) that are such folders and hold consecutive ids.
Keys, joined by zero bytes: `image <id> <modality> <season>` -> uint8 (C, H, W); `done <id>` -> JSON record of a stored
id or {"reason": …} of a quarantined one, in the same transaction as its images; `spec` -> JSON of what is to be stored;
`index` -> JSON of what is, `labels` -> uint8 (n, L) and `digests` -> 32 bytes per id, all three written last.
"""

import hashlib
import itertools
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np

from decur_core.data.raster import DataError, repeated

_BATCH = 64 * 2**20  # bytes per transaction: each one waits for the disk
_MAP = 2**30  # bytes of addresses to begin with
_LONGEST = 511  # bytes of a key of LMDB
_ID = re.compile(r"[^\0\n\ud800-\udfff]*")  # those separate ids, or are not Unicode
_PART = re.compile(r"part-\d{4,}-of-(\d{4,})")
_MAPS: dict[tuple[int, int], lmdb.Environment] = {}  # finished stores mapped by this process, by device and inode


def positions(count: int, shard: tuple[int, int], chunk: int = 1) -> range:
    """Which of `count` ids belong to shard (i, n): about 1/n of them, consecutive, whole chunks of the reader."""
    i, n = shard
    if not 0 <= i < n:
        raise DataError(f"shard {i}/{n}: expected I/N with I from 0 to N - 1")
    chunks = -(-count // chunk)
    return range(count)[i * chunks // n * chunk : (i + 1) * chunks // n * chunk]


def parts(path: Path | str, count: int = 1) -> list[Path]:
    """Folders of a store in the order of their ids, there or missing; `count` of them if nothing is there yet."""
    there = {int(part[1]) for folder in Path(path).glob("part-*") if (part := _PART.fullmatch(folder.name))}
    there |= {1} if Path(path, "data.mdb").exists() else set()
    if len(there) > 1:
        mixed = " and one in ".join(map(str, sorted(there)))
        raise DataError(f"{path}: holds a store in {mixed} part(s); remove the one that is not wanted")
    (count,) = there or {count}
    return [Path(path, f"part-{i:04d}-of-{count:04d}") for i in range(count)] if count > 1 else [Path(path)]


def digest(images: Iterable[np.ndarray], labels: Sequence[int]) -> bytes:
    """SHA-256 of a sample: the bytes of its images, modality by modality and season by season, then its labels."""
    found = hashlib.sha256()
    for image in images:
        found.update(np.ascontiguousarray(image))
    found.update(bytes(map(int, labels)))
    return found.digest()


def checksum(ids: Sequence[str], digests: bytes) -> str:
    """SHA-256 of a store's content, however it was written: of its ids, one a line, then of their digests, in order."""
    return hashlib.sha256("\n".join(ids).encode() + b"\n" + digests).hexdigest()


def _pooled(samples: Iterable[tuple[int, dict]]) -> dict[str, dict[str, list[float]]]:
    """{"mean", "std"}, each modality -> per band, from (weight, {modality: (means, variances)}), one at a time."""
    total, sums = 0, {}
    for weight, moments in samples:
        total += weight
        for name, values in moments.items():
            mean, variance = np.array(values)
            origin, first, second = sums.get(name, (mean, 0, 0))  # near the mean, so that squares lose nothing
            offset = mean - origin
            sums[name] = origin, first + weight * offset, second + weight * (variance + offset**2)
    mean = {name: (origin + first / total).tolist() for name, (origin, first, _) in sums.items()}
    variance = {name: second / total - (first / total) ** 2 for name, (_, first, second) in sums.items()}
    return {"mean": mean, "std": {name: np.sqrt(v.clip(0)).tolist() for name, v in variance.items()}}


def _key(*parts: object) -> bytes:
    return "\0".join(map(str, parts)).encode()


def _check_ids(ids: Sequence[str], modalities: Iterable[str]) -> None:
    """Refuse, with a DataError, ids that cannot be keys, or that are given twice."""
    longest = _LONGEST - max(len(_key("image", "", name, 999)) for name in modalities)
    for id in ids:
        if not (isinstance(id, str) and _ID.fullmatch(id) and len(id.encode()) <= longest):
            raise DataError(f"id {id!r}: expected text of one line, at most {longest} bytes of UTF-8")
    if twice := repeated(ids):
        raise DataError(f"{len(twice)} of {len(ids)} ids are given more than once, first {twice[0]!r}")


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Nested dictionaries as one, with dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


def _unlike(there: dict, here: dict) -> str:
    """What differs between two specs, in words; empty if nothing does."""
    there, here = _flat(there), _flat(here)
    return "; ".join(
        f"{k}: {there.get(k)} there, {here.get(k)} here" for k in there | here if there.get(k) != here.get(k)
    )


def _map(path: Path) -> lmdb.Environment | None:
    """The read-only mapping of a finished store, one per process and file; None if it is not there or not finished.

    It is never closed, so views into it stay valid, and takes no locks: a finished store has no writer, and a forked
    worker may go on using its parent's mapping.
    """
    try:
        stat = os.stat(path / "data.mdb")
        if not stat.st_size:  # killed before the first write
            return None
        key = (stat.st_dev, stat.st_ino)
        env, finished = _MAPS.get(key) or lmdb.open(str(path), readonly=True, lock=False, readahead=False), False
        try:
            used = env.stat()["psize"] * (env.info()["last_pgno"] + 1)
            if (size := os.path.getsize(path / "data.mdb")) < used:  # asked for now: a writer may have made it grow
                # Reading behind the end of a file would kill the process.
                raise DataError(f"{path}: data.mdb is truncated, {size} of {used} bytes; remove it, convert again")
            with env.begin() as transaction:
                finished = transaction.get(b"index") is not None
        finally:
            if not finished and key not in _MAPS:  # an open one could not be opened again, in this process
                env.close()
    except FileNotFoundError:
        return None
    except (OSError, lmdb.Error) as error:
        raise DataError(f"{path}: no store that can be read; remove it and convert again ({error})") from error
    return _MAPS.setdefault(key, env) if finished else None


class StoreWriter:
    """Writes a store or a part of one, or goes on with an unfinished one, as a context manager, one process at a time.

    `ids`: every id of the data set, in its order; `shapes`: (C, H, W) per modality; `seasons`: images per id and
    modality; `labels`: length of the label vector, 0 without; `meta`: JSON-able facts (data set, preprocessing);
    `shard`, `chunk`: which part, see `positions`. `.ids` are those of the part.
    The process may be killed at any moment: ids in `.done` (stored or quarantined) are complete, the rest is to be put.
    `.finished` says that nothing is left to do. A DataError names what differs if `path` holds another store.
    """

    def __init__(self, path: Path | str, *, ids: Sequence[str], shapes, seasons, labels=0, meta, shard=(0, 1), chunk=1):
        self.path, self._pending, self._bytes = Path(path), [], 0
        _check_ids(ids, shapes)
        self.ids = [ids[i] for i in positions(len(ids), shard, chunk)]
        sha256 = hashlib.sha256("\n".join(ids).encode()).hexdigest()
        spec = {"format": 2, "shapes": shapes, "seasons": seasons, "labels": labels, "shard": shard, "chunk": chunk}
        self._spec = json.loads(json.dumps(spec | {"meta": meta, "ids": {"count": len(ids), "sha256": sha256}}))
        self.path.mkdir(parents=True, exist_ok=True)
        self._env = _map(self.path)
        self.finished = self._env is not None
        if not self.finished:
            # The file grows with its content; the map is only a range of addresses, doubled when it is full. Without
            # metasync a power cut can lose the latest transaction, but never the store.
            with self._writing():
                self._env = lmdb.open(str(self.path), map_size=_MAP, metasync=False, readahead=False)
        with self._env.begin() as transaction:
            there = transaction.get(b"spec")
            self.done = {i for i in self.ids if transaction.get(_key("done", i)) is not None} if there else set()
        if there is None:
            self._commit((b"spec", json.dumps(self._spec).encode()))
        elif unlike := _unlike(json.loads(there), self._spec):
            self.close(finish=False)
            raise DataError(f"{self.path}: holds another store, choose another path ({unlike})")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(finish=error[0] is None)

    def put(self, id: str, arrays: dict[str, np.ndarray], labels: Sequence | None = None, *, record=None) -> None:
        """Store uint8 (seasons, C, H, W) per modality, labels (L,) and a JSON-able dict `record` of an id.

        `record["moments"]`, {modality: (means, variances)} with a value per band, is pooled over the store.
        """
        found = {name: [str(array.dtype), *array.shape] for name, array in arrays.items()}
        wanted = {name: ["uint8", self._spec["seasons"], *shape] for name, shape in self._spec["shapes"].items()}
        labels = [] if labels is None else [int(label) for label in labels]
        if found != wanted or len(labels) != self._spec["labels"]:
            raise DataError(f"{id}: {found}, {len(labels)} labels; expected {wanted}, {self._spec['labels']} labels")
        images = {_key("image", id, name, s): arrays[name][s] for name in wanted for s in range(self._spec["seasons"])}
        sha256 = digest((arrays[name] for name in wanted), labels).hex()
        self._finish(id, (record or {}) | {"labels": labels, "sha256": sha256}, images)

    def quarantine(self, id: str, reason: str) -> None:
        """Note why an id is left out."""
        self._finish(id, {"reason": reason})

    def close(self, *, finish: bool = True, summary: dict | None = None) -> None:
        """Write what is left; with every id done, unless `finish` is off, finish the store and note `summary` in it."""
        if self._env is None or self.finished:
            return
        self._commit()
        if finish and len(self.done) == len(self.ids):
            self._index(summary or {})
        with self._writing():
            self._env.sync(True)
        self._env.close()
        self._env = None

    def _index(self, summary: dict) -> None:
        """Write what is only known at the end. Records are read one by one: together they are large."""
        ids, quarantined, labels, digests = [], {}, bytearray(), bytearray()

        def moments(transaction: lmdb.Transaction) -> Iterator[tuple[int, dict]]:
            for id in self.ids:
                record = json.loads(transaction.get(_key("done", id)))
                if "reason" in record:
                    quarantined[id] = record["reason"]
                else:
                    ids.append(id)
                    labels.extend(record["labels"])
                    digests.extend(bytes.fromhex(record["sha256"]))
                    yield 1, record.get("moments", {})

        with self._env.begin() as transaction:
            summary = _pooled(moments(transaction)) | {"sha256": checksum(ids, digests)} | summary
        index = json.dumps({"ids": ids, "quarantined": quarantined, "summary": summary}).encode()
        self._commit((b"labels", labels), (b"digests", digests), (b"index", index))

    def _add(self, *items: tuple[bytes, np.ndarray | bytes]) -> None:
        self._pending += items
        self._bytes += sum(memoryview(value).nbytes for _, value in items)

    def _finish(self, id: str, record: dict, images: dict[bytes, np.ndarray] | None = None) -> None:
        if self.finished or id in self.done:
            raise DataError(f"{self.path}: {id} is already in the store")
        self.done.add(id)
        pixels = ((key, np.ascontiguousarray(image)) for key, image in (images or {}).items())
        self._add(*pixels, (_key("done", id), json.dumps(record).encode()))
        if self._bytes >= _BATCH:
            self._commit()

    def _commit(self, *items: tuple[bytes, bytes]) -> None:
        """Write what is pending and these items in one transaction."""
        self._add(*items)
        while self._pending:
            with self._writing():
                try:
                    with self._env.begin(write=True) as transaction:
                        for key, value in self._pending:
                            transaction.put(key, value)
                    self._pending, self._bytes = [], 0
                except lmdb.MapFullError:
                    self._env.set_mapsize(2 * self._env.info()["map_size"])

    @contextmanager
    def _writing(self):
        """What LMDB cannot write becomes an OSError; the environment is closed, so that this process may try again."""
        try:
            yield
        except lmdb.Error as error:
            if self._env is not None:
                self._env.close()
                self._env = None
            way = "is its disk full? Mend that and run the same again: it goes on where it stopped"
            raise OSError(f"{self.path}: cannot be written ({error}); {way}") from error


class Store:
    """A finished store, read-only: `len`, `.ids`, `.shapes`, `.seasons`, `.labels` (uint8 (n, L) or None) and `.meta`.

    `.meta` is the writer's, with `quarantined` {id: reason} and the `summary`: `mean`, `std`, `sha256` and what the
    writer noted (numbers are added up over parts). A store pickles as its path and works in forked and spawned workers.
    A DataError says that it, or which part of it, is missing, unfinished, truncated or of another conversion.
    """

    def __init__(self, path: Path | str):
        self.path, folders = Path(path), parts(path)
        self._envs = [_map(folder) for folder in folders]
        if missing := [f.name for f, env in zip(folders, self._envs, strict=True) if env is None]:
            which = f" (missing or unfinished: {', '.join(missing)})" if len(folders) > 1 else ""
            raise DataError(f"{self.path}: no finished store{which}; the same conversion goes on where it stopped")
        specs, indices, labels, digests = [], [], [], []
        for folder, env in zip(folders, self._envs, strict=True):
            try:
                with env.begin() as transaction:
                    specs.append(json.loads(transaction.get(b"spec")))
                    indices.append(json.loads(transaction.get(b"index")))
                    labels.append(transaction.get(b"labels"))
                    digests.append(transaction.get(b"digests", b""))
            except (lmdb.Error, ValueError, TypeError) as error:
                raise DataError(f"{folder}: damaged; remove it and convert again ({error})") from error
        spec, summary = specs[0], indices[0]["summary"]
        self.ids = [i for index in indices for i in index["ids"]]
        self.digests = b"".join(digests)
        if len(folders) > 1:
            for i, (folder, other) in enumerate(zip(folders, specs, strict=True)):
                if unlike := _unlike(spec | {"shard": [i, len(folders)]}, other):
                    what = f"is of another conversion than {folders[0].name}; remove the wrong one, convert again"
                    raise DataError(f"{folder}: {what} ({unlike})")
            every = [index["summary"] for index in indices]
            summary = {k: sum(s[k] for s in every) if isinstance(v, int | float) else v for k, v in summary.items()}
            squares = ({k: (m, np.square(s["std"][k])) for k, m in s["mean"].items()} for s in every)
            summary |= _pooled(zip((len(index["ids"]) for index in indices), squares, strict=True))
            summary["sha256"] = checksum(self.ids, self.digests)
        self._starts = [0, *itertools.accumulate(len(index["ids"]) for index in indices[:-1])]
        self.seasons, self.shapes = spec["seasons"], {name: tuple(shape) for name, shape in spec["shapes"].items()}
        quarantined = {i: reason for index in indices for i, reason in index["quarantined"].items()}
        self.meta = spec["meta"] | {"quarantined": quarantined, "summary": summary}
        rows = np.frombuffer(b"".join(labels), np.uint8)
        self.labels = rows.reshape(len(self.ids), spec["labels"]) if spec["labels"] else None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sha256(self) -> str:
        """Of the content, whatever the number of workers, parts and interruptions that made it."""
        if not (found := self.meta["summary"].get("sha256")):
            raise DataError(f"{self.path}: from an earlier version, without a digest of its content; convert it again")
        return found

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
        with self._envs[bisect_right(self._starts, i) - 1].begin(buffers=True) as transaction:
            value = transaction.get(_key("image", self.ids[i], modality, season))
        if value is None:
            raise DataError(f"{self.path}: no image {self.ids[i]}, {modality}, season {season} (of {self.seasons})")
        return np.frombuffer(value, dtype=np.uint8).reshape(self.shapes[modality])

"""A sample of a reader as a row of a store, or what is wrong: with its files, with the reader, or with neither; and the
processes of a conversion, each of which reads, encodes and writes its own rows. What they import is kept small.
"""

import errno
import itertools
import multiprocessing
import pickle
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import rasterio
import torch

from decur_core.data.arrays import digest
from decur_core.data.modality import Modality
from decur_core.data.raster import DataError
from decur_core.data.store import StoreWriter
from decur_core.running import tie

PROBES = 100  # samples tried before a data set is given up as a whole
GROUP = 16  # samples, at most (or a chunk of the reader), that a worker is given at a time
GUARD = 'Processes run the script again that starts them: it keeps its calls below `if __name__ == "__main__":`'
STOPPED = "The conversion stopped; mend that, and the same call goes on"
_BAD = (DataError, rasterio.errors.RasterioError, OSError)  # what may be wrong with a sample's files
# What is never the fault of one file.
_ELSEWHERE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_ELSEWHERE += (errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EHOSTDOWN)


class FormError(DataError):
    """What is wrong with a reader's items, not with its files."""


@dataclass(frozen=True)
class Sample:
    images: dict[str, np.ndarray]  # uint8 (seasons, C, H, W)
    labels: np.ndarray  # uint8 (L,)
    moments: dict[str, list]

    def digest(self) -> bytes:
        return digest(self.images.values(), self.labels)


class Encoder:
    """Reads and encodes samples, and tells what is wrong with one from what is wrong around it."""

    def __init__(self, dataset, preprocessing: dict[str, Modality], classes: int | None):
        self.dataset, self.preprocessing, self.labels, self.good = dataset, preprocessing, classes, None

    def first(self, id: str | None) -> tuple[int, Sample]:
        """The first sample that can be encoded (`id`: by which a store knows its data set), and its position."""
        ids, reasons = self.dataset.ids, []
        for row in [ids.index(id)] if id in ids else range(min(PROBES, len(ids))):
            try:
                sample = self.encode(row)
                self.labels, self.good = len(sample.labels), (row, sample.digest())
                return row, sample
            except _BAD as error:
                if isinstance(error, FormError):
                    raise
                reasons.append(f"{ids[row]}: {type(error).__name__}: {error}")
        if id in ids:
            raise DataError(f"{id}, by which the store knows its data set, cannot be read: {reasons[0]}")
        raise DataError(f"none of the first {len(reasons)} of {len(ids)} samples is usable, first {reasons[:1]}")

    def encode(self, row: int) -> Sample:
        """A sample, or one of _BAD for what is wrong with its files."""
        sample, images, moments = self.dataset[row], {}, {}
        labels = self._checked(self.dataset.ids[row], sample)
        for name, modality in self.preprocessing.items():
            values = sample[name] if sample[name].ndim == 4 else sample[name][None]
            if values.ndim != 4 or not len(values):
                raise DataError(f"{name}: expected (C, H, W) or (seasons, C, H, W), found {sample[name].shape}")
            images[name] = np.stack([modality.encode(image) for image in values])  # each stays in the processor's cache
            moments[name] = _moments(values)
        if "mask" in sample:
            images["mask"] = mask = np.repeat(sample["mask"][None, None], len(values), axis=0)  # one for all seasons
            if mask.dtype != np.uint8 or mask.shape[2:] != values.shape[2:]:
                raise DataError(f"mask: expected uint8 {values.shape[2:]}, found {mask.dtype} {mask.shape[2:]}")
        return Sample(images, labels, moments)

    def _checked(self, id: str, sample: dict) -> np.ndarray:
        """The labels of an item, after a look at its form."""
        wanted = f"a reader's item is {{'id': ids[i], {', '.join(map(repr, self.preprocessing))}: arrays"
        wanted += ", maybe 'labels': vector of 0 and 1, one per class, 'mask': uint8 (H, W)}"
        known = [k for k, v in sample.items() if isinstance(v, np.ndarray)] if isinstance(sample, dict) else []
        if missing := [name for name in self.preprocessing if name not in known]:
            found = list(sample) if isinstance(sample, dict) else f"a {type(sample).__name__}"
            raise FormError(f"{id}: no array {missing[0]!r} in {found}; {wanted}")
        if sample.get("id") != id:
            raise FormError(f"{id}: the item at its place has the id {sample.get('id')!r}; {wanted}")
        labels = np.asarray(sample.get("labels", np.zeros(0, np.uint8)))
        binary = labels.ndim == 1 and labels.dtype.kind in "bui" and np.isin(labels, (0, 1)).all()
        expected = self.labels if self.good or "mask" not in sample else None  # classes may be those of the pixels
        if not binary or len(labels) != (len(labels) if expected is None else expected):
            count = "" if expected is None else f" {expected} of them are expected;"
            raise FormError(f"{id}: labels {labels.dtype} {labels.tolist()!s:.60};{count} {wanted}")
        return labels.astype(np.uint8)

    def tried(self, row: int) -> Sample | str:
        """A sample, or why it is bad. An OSError if that is not its own fault, but of what is around it."""
        for last in (False, True):  # a moment later it may be as it should be
            try:
                return self.encode(row)
            except _BAD as error:
                if isinstance(error, FormError):
                    raise
                if last:
                    self._blame(row, error)
                    return f"{type(error).__name__}: {error}"

    def _blame(self, row: int, error: Exception) -> None:
        """Refuse, with an OSError, to call a sample bad if another one, which was good, is not any more."""
        ids, cause, (good, before) = self.dataset.ids, error, self.good
        while cause:
            if getattr(cause, "errno", None) in _ELSEWHERE:
                raise OSError(cause.errno, f"{ids[row]}: {error}. {STOPPED}") from error
            cause = cause.__cause__ or cause.__context__
        try:
            if self.encode(good).digest() == before:
                return
            now = "has other pixels now"
        except _BAD as other:
            now = f"cannot be read any more ({other})"
        gone = f"{ids[row]}: {error}; but {ids[good]}, which was good before, {now}"
        raise OSError(errno.ENOENT, f"{gone}: what holds the files went away or changed. {STOPPED}") from error


def _moments(images: np.ndarray) -> list[list[float]]:
    """Mean and variance of each band of (S, C, H, W): float32 along rows, which is fast, float64 across them."""
    ones, found = np.ones(images.shape[3], np.float32), np.empty((2, *images.shape[:2]))
    for k in np.ndindex(images.shape[:2]):  # one by one, which stays in the processor's cache
        band = images[k].astype(np.float32, copy=False)
        found[0, *k] = mean = np.vecdot(band, ones).mean(dtype=np.float64) / len(ones)
        band = band - np.float32(mean)
        found[1, *k] = np.vecdot(band, band).mean(dtype=np.float64) / len(ones)
    mean = found[0].mean(axis=0)
    return [mean.tolist(), (found[1] + (found[0] - mean) ** 2).mean(axis=0).tolist()]


@dataclass
class Job:
    """What every process of a conversion does."""

    encoder: Encoder
    writer: StoreWriter

    def one(self, row: int) -> str:
        """Store a sample or note why it is left out; returns the reason."""
        sample = self.encoder.tried(row)
        if isinstance(sample, Sample):
            try:
                self.encoder.good = row, self.writer.put(row, sample.images, sample.labels, moments=sample.moments)
                return ""
            except DataError as error:  # another size than the first sample, a mask that others lack
                sample = f"DataError: {error}"
        self.writer.quarantine(row, sample)
        return sample


def results(job: Job, todo: Sequence[int], workers: int, chunk: int) -> Iterator[tuple[int, str]]:
    """(row, reason or "") of all that is to be done; workers are given few samples at a time, but whole chunks."""
    if not workers or not todo:
        yield from ((row, job.one(row)) for row in todo)
        return
    chunks = [list(rows) for _, rows in itertools.groupby(todo, lambda row: row // chunk)]
    size = max(1, min(GROUP // chunk, len(chunks) // (4 * workers)))
    groups = [sum(chunks[k : k + size], []) for k in range(0, len(chunks), size)]
    reader, ready, ahead, workers = type(job.encoder.dataset), False, deque(), min(workers, len(groups))
    refused = f"{reader.__module__}.{reader.__qualname__} cannot be sent to a worker process"
    way = "define it in a module of its own (a file that is imported, not a notebook or a function), or use workers=0"
    try:
        sent = pickle.dumps(job)
    except Exception as error:
        raise RuntimeError(f"{refused} ({error!r}): {way}") from error
    # New processes run the calling script once more, unless it goes by this name; only its own classes need that.
    alone = patch.object(sys.modules["__main__"], "__spec__", SimpleNamespace(name="__main__"), create=True)
    # Fresh processes: forked ones would inherit this one's threads and what its libraries hold.
    options = {"mp_context": multiprocessing.get_context("spawn"), "initializer": _join, "initargs": (sent,)}
    with nullcontext() if b"__main__" in sent else alone, ProcessPoolExecutor(workers, **options) as pool:
        try:
            if reason := pool.submit(_ready).result():
                raise RuntimeError(f"{refused} ({reason}): {way}")
            ready = True
            for group in groups:
                ahead.append((group, pool.submit(_work, group)))
                if len(ahead) >= 2 * workers:
                    yield from ahead[0][1].result()
                    ahead.popleft()
            while ahead:
                yield from ahead[0][1].result()
                ahead.popleft()
        except BrokenProcessPool as error:
            if not ready:
                why = f"ended before they could begin; their own message stands above. {GUARD}. Or use workers=0"
                raise ChildProcessError(f"{job.writer.path}: the worker processes {why}") from error
            at = job.encoder.dataset.ids[(ahead or [(groups[0],)])[0][0][0]]
            why = "It was killed, for want of memory perhaps, or a library crashed: workers=0 shows on which sample"
            raise ChildProcessError(f"a worker process died, at work on {at} or after it. {why}. {STOPPED}") from error
        finally:
            pool.shutdown(cancel_futures=True)


_job: Job | str = ""  # of this worker process, or why there is none


def _join(sent: bytes) -> None:
    global _job
    tie()
    torch.set_num_threads(1)
    try:
        _job = pickle.loads(sent)
    except Exception as error:
        _job = repr(error)


def _ready() -> str:
    return _job if isinstance(_job, str) else ""


def _work(rows: Sequence[int]) -> list[tuple[int, str]]:
    try:
        return [(row, _job.one(row)) for row in rows]
    finally:
        _job.writer.flush()

"""The processes of a conversion: each reads, encodes and writes its own rows. What they import is kept small."""

import ctypes
import itertools
import multiprocessing
import pickle
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch

from decur_core.data.encode import STOPPED, Encoder, Sample
from decur_core.data.raster import DataError
from decur_core.data.store import StoreWriter

GROUP = 16  # samples, at most (or a chunk of the reader), that a worker is given at a time
GUARD = 'Processes run the script again that starts them: it keeps its calls below `if __name__ == "__main__":`'


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
            first = job.encoder.dataset.ids[(ahead or [(groups[0],)])[0][0][0]]
            why = "It was killed, for want of memory perhaps, or a library crashed: workers=0 shows on which sample"
            raise ChildProcessError(f"a worker process died, at work on {first} or after. {why}. {STOPPED}") from error
        finally:
            pool.shutdown(cancel_futures=True)


_job: Job | str = ""  # of this worker process, or why there is none


def _join(sent: bytes) -> None:
    global _job
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG: none outlives the process that started it
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

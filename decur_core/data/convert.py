"""From a data set (files, or a generator that looks the same) to a store of encoded images."""

import itertools
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import lmdb
import numpy as np
import rasterio
import torch
from torch.utils.data import DataLoader

from decur_core.data.modality import Preprocessing
from decur_core.data.raster import DataError
from decur_core.data.store import Store, StoreWriter, checksum, digest, parts, positions
from decur_core.running import folders as runs
from decur_core.running import processes as distributed

PROBES = 100  # samples tried before a data set is given up as a whole
_PAGE = 4096  # bytes; LMDB gives each image whole ones


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a store holds and how its conversion went; prints as a few lines."""

    stored: int  # samples
    quarantined: dict[str, str]  # id -> reason
    bands: dict[str, list[str]]  # modality -> names
    mean: dict[str, list[float]]  # modality -> per band over all stored pixels, in physical units
    std: dict[str, list[float]]
    published: dict[str, list[list[float]]]  # modality -> (mean, std) as the reader knows them
    sha256: str  # of the content, whatever the number of workers, shards and interruptions
    converted: int  # samples, stored or quarantined, of the run that finished the store (of shards: of all)
    seconds: float  # wall time of that run

    @classmethod
    def of(cls, store: Store) -> "Report":
        """The report that a finished store carries."""
        bands = {name: setting["bands"] for name, setting in store.meta["preprocessing"].items()}
        noted = {"published": {}, "sha256": "", "converted": 0, "seconds": 0.0} | store.meta["summary"]
        return cls(stored=len(store), quarantined=store.meta["quarantined"], bands=bands, **noted)

    def far(self, name: str) -> list[str]:
        """Bands of a modality whose mean is over half a deviation, or deviation a factor 1.5, off the published one."""
        columns = zip(self.bands[name], self.mean[name], self.std[name], *self.published[name], strict=True)
        return [b for b, m, s, m0, s0 in columns if abs(m - m0) > s0 / 2 or not s0 / 1.5 <= s <= s0 * 1.5]

    def __str__(self) -> str:
        def line(mean: list[float], std: list[float]) -> str:
            return ", ".join(f"{b} {m:.4g} ± {s:.4g}" for b, m, s in zip(self.bands[name], mean, std, strict=True))

        rate = f" in {self.seconds:.0f} s, {self.converted / self.seconds:.1f} per second" if self.converted else ""
        lines = [f"{self.stored} of {self.stored + len(self.quarantined)} samples stored, {self.converted} now{rate}"]
        for name in self.mean:
            lines.append(f"{name}: {line(self.mean[name], self.std[name])}")
            if name in self.published:
                lines.append(f"{name}, published: {line(*self.published[name])}")
                lines += [f"{name}: FAR FROM PUBLISHED: {', '.join(far)}"] if (far := self.far(name)) else []
        lines += [f"quarantined {id}: {reason}" for id, reason in list(self.quarantined.items())[:10]]
        lines += [f"… {len(self.quarantined)} quarantined in all"] if len(self.quarantined) > 10 else []
        return "\n".join([*lines, f"content: sha256 {self.sha256}"])


def convert(
    dataset, path: Path | str, *, preprocessing: dict[str, Preprocessing], workers=0, shard=(0, 1), progress=True
) -> Report:
    """Encode every sample and write it to the store at `path`; run again after an interruption to go on.

    `dataset` has `.ids` and `[i]` -> {"id", <modality>: physical values ((S,) C, H, W), optionally "labels" (L,) and
    "mask" uint8 (H, W)}, and pickles if there are `workers`: processes that read and encode, 0 for this one, which
    alone writes. It may have `.chunk` (so many consecutive samples share files and go to one worker, in one piece) and
    `.statistics`, modality -> (mean, std) as published, for the report. `preprocessing`: per modality (the samples'
    keys), also noted in the store. A mask is kept as it is, as modality "mask" of shape (1, H, W). A sample that cannot
    be read or does not fit is quarantined with the reason, and the conversion goes on.

    `shard` (i, n) converts the i-th of n parts, for n jobs side by side; the report is that part's. The whole, asked
    for where there are parts, goes on with those that are missing. A finished store or part is never changed: to try
    quarantined samples again, mend their files, remove it and convert again.

    DataError: all of the first samples fail (wrong root, unit or modality), or `path` holds another store or one in
    another number of parts. RuntimeError: another process writes it. OSError: not enough free disk space.
    """
    start, path, chunk = time.perf_counter(), Path(path), getattr(dataset, "chunk", 1)
    first = _first_good(dataset, preprocessing)
    sizes = {name: len(array) for name, array in first["arrays"].items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"{first['id']}: modalities differ in seasons: {sizes}")
    meta = {
        "dataset": type(dataset).__name__,
        "preprocessing": {name: setting.to_dict() for name, setting in preprocessing.items()},
        # Ids and shapes may agree while the pixels do not: another seed, another release, another resampling. Of the
        # whole data set, also in parts, which then belong together only if they come from the same one.
        "first_sample": {"id": first["id"], "sha256": digest(first["arrays"].values(), first["labels"]).hex()},
    }
    shapes = {name: array.shape[1:] for name, array in first["arrays"].items()}
    form = {"shapes": shapes, "seasons": min(sizes.values()), "labels": len(first["labels"]), "meta": meta}
    pages = sum(len(array) * -(-array[0].nbytes // _PAGE) for array in first["arrays"].values())
    positions(0, shard)  # refuses a shard that cannot be
    folders, converted = parts(path, shard[1]), 0
    if len(folders) != shard[1] != 1:
        raise DataError(f"{path}: holds a store in {len(folders)} part(s), not {shard[1]}; choose another path")
    for place in [shard] if shard[1] > 1 else [(i, len(folders)) for i in range(len(folders))]:
        began, folder = time.perf_counter(), folders[place[0]]
        with runs.locked(folder), StoreWriter(folder, **form, ids=dataset.ids, shard=place, chunk=chunk) as writer:
            span = positions(len(dataset.ids), place, chunk)
            todo = span[len(writer.done) :]  # samples are written in order
            if todo:
                _check_disk(path, _PAGE * pages * len(dataset.ids))
            results = _encoded(dataset, preprocessing, todo, workers, chunk)
            bar = {"total": len(span), "initial": len(span) - len(todo), "desc": folder.name, "disable": not progress}
            for i, result in zip(todo, runs.progress(results, **bar), strict=True):
                try:
                    put = writer.quarantine if "reason" in result else writer.put
                    put(dataset.ids[i], **result)
                except DataError as error:  # another size than the first sample, a mask that others lack
                    writer.quarantine(dataset.ids[i], f"DataError: {error}")
            converted += len(todo)
            noted = {"converted": len(todo), "seconds": round(time.perf_counter() - began, 3)}
            writer.close(summary=noted | {"published": getattr(dataset, "statistics", {})})
    report = Report.of(Store(path if shard[1] == 1 else folder))
    return replace(report, converted=converted, seconds=time.perf_counter() - start)


def _check_disk(path: Path, whole: int) -> None:
    """Refuse, with an OSError, to begin what the disk cannot hold: `whole` bytes in all, for all parts."""
    need = 1.05 * whole - sum(512 * file.stat().st_blocks for file in path.glob("**/data.mdb"))
    if need > (free := shutil.disk_usage(path).free):
        raise OSError(f"{path}: the store needs {need / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free on its disk")


def _encode(dataset, preprocessing: dict[str, Preprocessing], i: int) -> dict:
    """Sample i as the arguments of `StoreWriter.put`, or {"reason"} if it is bad."""
    arrays, moments = {}, {}
    try:
        sample = dataset[i]
        for name, setting in preprocessing.items():
            images = sample[name] if sample[name].ndim == 4 else sample[name][None]
            arrays[name] = setting.encode(images)
            mean = images.mean(axis=(0, 2, 3), dtype=np.float64)
            centred = images - mean.astype(np.float32)[:, None, None]
            square = np.square(centred, out=centred).mean(axis=(0, 2, 3), dtype=np.float64)
            moments[name] = [mean.tolist(), square.tolist()]
        if "mask" in sample:
            arrays["mask"] = mask = sample["mask"][None, None]
            if mask.dtype != np.uint8 or mask.shape[2:] != images.shape[2:]:
                raise DataError(f"mask: expected uint8 {images.shape[2:]}, found {mask.dtype} {mask.shape[2:]}")
    except (DataError, rasterio.errors.RasterioError, OSError) as error:
        return {"reason": f"{type(error).__name__}: {error}"}
    return {"arrays": arrays, "labels": sample.get("labels", ()), "record": {"moments": moments}}


def _encode_chunk(dataset, preprocessing: dict[str, Preprocessing], todo: range, chunk: int, k: int) -> list[dict]:
    """The samples of the reader's k-th chunk that are to be done."""
    wanted = range(max(k * chunk, todo.start), min((k + 1) * chunk, todo.stop))
    return [_encode(dataset, preprocessing, i) for i in wanted]


def _encoded(dataset, preprocessing: dict, todo: range, workers: int, chunk: int) -> Iterable[dict]:
    """Encoded samples in order; with workers, two chunks per worker are under way, however large the data set."""
    chunks = range(todo.start // chunk, -(-todo.stop // chunk)) if todo else range(0)
    workers = min(workers, len(chunks))
    loader = DataLoader(
        chunks,
        batch_size=None,
        collate_fn=partial(_encode_chunk, dataset, preprocessing, todo, chunk),
        num_workers=workers,
        # Fresh processes: forked ones would inherit the writer's environment and this process's threads.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=distributed.tie,
        generator=torch.Generator(),  # leaves the global one alone
    )
    return itertools.chain.from_iterable(loader)


def _first_good(dataset, preprocessing: dict[str, Preprocessing]) -> dict:
    """The first sample that can be encoded, with its id."""
    reasons = []
    for i, id in enumerate(dataset.ids[:PROBES]):
        result = _encode(dataset, preprocessing, i)
        if "reason" not in result:
            return result | {"id": id}
        reasons.append(f"{id}: {result['reason']}")
    raise DataError(f"none of the first {len(reasons)} of {len(dataset.ids)} samples is usable, first {reasons[:1]}")


def verify(path: Path | str, *, workers: int = 1, progress: bool = True) -> dict[str, str]:
    """Read every byte of a store again: id, or folder for what concerns all of it -> what is wrong; empty if nothing.

    Other processes read, `workers` of them: a damaged tree of pages can lead LMDB to places that kill the reader.
    """
    damaged, start = {}, partial(ProcessPoolExecutor, workers, get_context("spawn"), initializer=distributed.tie)
    pool = start()
    try:
        for folder in (folders := parts(path)):
            try:
                n = pool.submit(_count, folder).result()
                found = pool.map(partial(_damage, folder), range(n), chunksize=16)
                for some in runs.progress(found, total=n, desc=f"verify {folder.name}", disable=not progress):
                    damaged |= some
            except DataError as error:
                damaged[str(folder)] = str(error)
            except BrokenProcessPool:
                damaged[str(folder)] = "reading it kills the process; remove it and convert again"
                pool = start()
        if len(folders) > 1 and not damaged:
            Store(path)  # do the parts belong together?
    except DataError as error:
        damaged[str(path)] = str(error)
    finally:
        pool.shutdown(cancel_futures=True)
    return damaged


_opened = lru_cache(1)(Store)


def _count(folder: Path) -> int:
    """Number of ids of a finished store or part."""
    store = _opened(folder)
    if checksum(store.ids, store.digests) != store.meta["summary"].get("sha256"):
        raise DataError(f"{folder}: its ids or digests are damaged (or from an earlier version, without digests)")
    return len(store)


def _damage(folder: Path, i: int) -> dict[str, str]:
    """{id: reason} if the i-th sample is not what was written."""
    store = _opened(folder)
    try:
        images = (store.read(i, name, season) for name in store.shapes for season in range(store.seasons))
        same = digest(images, () if store.labels is None else store.labels[i]) == store.digests[32 * i : 32 * i + 32]
        return {} if same else {store.ids[i]: f"{folder}: not the bytes that were written; remove it and convert again"}
    except (ValueError, lmdb.Error) as error:
        return {store.ids[i]: f"{folder}: {error}"}

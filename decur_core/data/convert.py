"""From a data set (files, or a generator that looks the same) to a store of encoded images."""

import hashlib
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import rasterio
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from decur_core import distributed
from decur_core.data.raster import DataError
from decur_core.data.store import StoreWriter
from decur_core.preprocess import Preprocessing

PROBES = 100  # samples tried before a data set is given up as a whole


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    total: int  # samples of the data set
    stored: int  # of them in the store, from this and earlier runs
    quarantined: dict[str, str]  # id -> reason, from this and earlier runs
    mean: dict[str, list[float]]  # modality -> per band over all stored pixels, in physical units
    std: dict[str, list[float]]
    converted: int  # samples of this run, stored or quarantined
    seconds: float  # wall time of this run

    def __str__(self) -> str:
        rate = f", {self.converted / self.seconds:.1f} per second" if self.converted else ""
        lines = [f"{self.stored} of {self.total} samples stored, {self.converted} in this run{rate}"]
        lines += [f"quarantined {id}: {reason}" for id, reason in list(self.quarantined.items())[:10]]
        if len(self.quarantined) > 10:
            lines.append(f"… {len(self.quarantined)} quarantined in all")
        return "\n".join(lines)


def convert(
    dataset, path: Path | str, *, preprocessing: dict[str, Preprocessing], workers: int = 0, progress: bool = True
) -> Report:
    """Encode every sample and write it to the store at `path`; run again after an interruption to go on.

    `dataset` has `.ids` and `[i]` -> {"id", <modality>: physical values ((S,) C, H, W), optionally "labels" (L,)}, and
    pickles if there are `workers`: processes that read and encode, 0 for this one, which alone writes. `preprocessing`:
    per modality (the samples' keys), also noted in the store. A sample that cannot be read or does not fit is
    quarantined with the reason, and the conversion goes on.

    DataError: all of the first samples fail (wrong root, unit or modality), or `path` holds another store. OSError: not
    enough free disk space.
    """
    start, path, n = time.perf_counter(), Path(path), len(dataset.ids)
    first = _first_good(dataset, preprocessing)
    shapes = {name: array.shape[1:] for name, array in first["arrays"].items()}
    seasons = {len(array) for array in first["arrays"].values()}
    if len(seasons) != 1:
        raise DataError(f"{first['id']}: modalities differ in seasons: {sorted(seasons)}")
    meta = {
        "dataset": type(dataset).__name__,
        "preprocessing": {name: setting.to_dict() for name, setting in preprocessing.items()},
        # Ids and shapes may agree while the pixels do not: another seed, another release, another resampling.
        "first_sample": {"id": first["id"], "sha256": first["sha256"]},
    }
    options = {"shapes": shapes, "seasons": seasons.pop(), "labels": len(first["labels"]), "meta": meta}
    with StoreWriter(path, ids=dataset.ids, **options) as writer:
        todo = [i for i, id in enumerate(dataset.ids) if id not in writer.done]
        need, free = len(todo) * sum(a.nbytes for a in first["arrays"].values()), shutil.disk_usage(path).free
        if 1.05 * need > free:
            raise OSError(f"{path}: the store needs {need / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free on its disk")
        results = _encoded(dataset, preprocessing, todo, workers)
        bar = tqdm(results, total=n, initial=n - len(todo), desc=path.name, mininterval=1, disable=not progress)
        for i, result in zip(todo, bar, strict=True):
            try:
                put = writer.quarantine if "reason" in result else writer.put
                put(dataset.ids[i], **result)
            except DataError as error:  # another size than the first sample
                writer.quarantine(dataset.ids[i], f"DataError: {error}")
        records = writer.records()
        quarantined = {id: record["reason"] for id, record in records.items() if "reason" in record}
        mean, std = _pooled([record["moments"] for record in records.values() if "reason" not in record])
        writer.close(summary={"mean": mean, "std": std})
    seconds = time.perf_counter() - start
    return Report(n, n - len(quarantined), quarantined, mean, std, converted=len(todo), seconds=seconds)


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
    except (DataError, rasterio.errors.RasterioError, OSError) as error:
        return {"reason": f"{type(error).__name__}: {error}"}
    return {"arrays": arrays, "labels": sample.get("labels", ()), "record": {"moments": moments}}


def _pooled(moments: list[dict]) -> tuple[dict, dict]:
    """Mean and standard deviation per modality and band from means and variances of equally large samples."""
    mean, std = {}, {}
    for name in moments[0]:
        means, squares = np.array([m[name] for m in moments]).transpose(1, 0, 2)  # (n, C) each
        mean[name] = means.mean(axis=0).tolist()
        std[name] = np.sqrt(squares.mean(axis=0) + means.var(axis=0)).tolist()
    return mean, std


def _first_good(dataset, preprocessing: dict[str, Preprocessing]) -> dict:
    """The first sample that can be encoded, with its id and the digest of its bytes."""
    reasons = []
    for i, id in enumerate(dataset.ids[:PROBES]):
        result = _encode(dataset, preprocessing, i)
        if "reason" not in result:
            digest = hashlib.sha256(b"".join(array.tobytes() for array in result["arrays"].values()))
            return result | {"id": id, "sha256": digest.hexdigest()}
        reasons.append(f"{id}: {result['reason']}")
    raise DataError(f"none of the first {len(reasons)} of {len(dataset.ids)} samples is usable, first {reasons[:1]}")


def _encoded(dataset, preprocessing: dict[str, Preprocessing], todo: Sequence[int], workers: int) -> Iterable[dict]:
    """Encoded samples in order; with workers, two per worker are under way at a time, however large the data set."""
    return DataLoader(
        todo,
        batch_size=None,
        collate_fn=partial(_encode, dataset, preprocessing),
        num_workers=workers,
        # Fresh processes: forked ones would inherit the writer's environment and this process's threads.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=distributed.tie,
        generator=torch.Generator(),  # leaves the global one alone
    )

"""From a data set (files, or a generator that looks the same) to a store of encoded images."""

import multiprocessing
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decur_core.data import arrays
from decur_core.data.arrays import TODO, digest, load, positions
from decur_core.data.encode import GUARD, Encoder, Job, results
from decur_core.data.modality import Modality
from decur_core.data.raster import DataError
from decur_core.data.store import Store, StoreWriter, too_many
from decur_core.running import folders as runs


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
    converted: int = 0  # samples, stored or quarantined, of this run
    seconds: float = 0.0  # wall time of this run

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
    dataset,
    path: Path | str,
    *,
    preprocessing: dict[str, Modality | dict],
    about: dict | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    retry: bool = False,
    allowed: float = 0.05,
    progress: bool = True,
) -> Report:
    """Encode every sample and write it to the store at `path`; run again after an interruption to go on.

    `dataset` has `.ids` and `[i]` -> {"id", <modality>: physical values ((S,) C, H, W), optionally "labels" (L,) of
    zeros and ones, and "mask" uint8 (H, W)}, and pickles if there are `workers`: processes that read, encode and write,
    0 for this one. It may have `.chunk` (so many consecutive samples share files and go to one worker, in one piece)
    and `.statistics`, modality -> (mean, std) as published, for the report. `preprocessing`: per modality (the samples'
    keys), or its `mapping()`; noted in the store. `about`: facts of the data set, noted as well: "name" (that of the
    reader's class, unless given), "title", "classes", "drawn" (whether by a miniature world). A mask is kept as it is,
    as modality "mask" of shape (1, H, W).

    A sample in whose files something is wrong is quarantined with the reason, and the conversion goes on; `retry` tries
    those again that are quarantined. If more than the share `allowed` is, the store is not finished. `shard` (i, n)
    converts the i-th of n parts, for n jobs side by side; the report is that part's. The whole, asked for where there
    are parts, goes on with those that are missing.

    DataError: all of the first samples fail (wrong root, unit or modality), the reader's items are of another form, too
    much is quarantined, or `path` holds another store or one in another number of parts. RuntimeError: another process
    writes it, or workers cannot be started. OSError: a root, a helper process or the room on the disk went away; mend
    that, and the same call goes on.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that is being started runs this
        raise RuntimeError(f"convert was called while a worker process was being started. {GUARD}.")
    start, path = time.perf_counter(), Path(path)
    chosen = {n: x if hasattr(x, "encode") else Modality.from_mapping(x) for n, x in preprocessing.items()}
    positions(0, shard)  # refuses a shard that cannot be
    index = load(path) or {"parts": shard[1], "meta": {}}
    encoder = Encoder(dataset, chosen, len((about or {}).get("classes") or ()) or None)
    row, first = encoder.first(index["meta"].get("first_sample", {}).get("id"))
    sizes = {name: len(array) for name, array in first.images.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"{dataset.ids[row]}: modalities differ in seasons: {sizes}")
    meta = {
        "data": {"name": type(dataset).__name__, "title": type(dataset).__name__, "drawn": False} | (about or {}),
        "preprocessing": {name: modality.mapping() for name, modality in chosen.items()},
        "published": {name: np.asarray(v).tolist() for name, v in getattr(dataset, "statistics", {}).items()},
        # Ids and shapes may agree while the pixels do not: another seed, another release, another resampling. Of the
        # whole data set, also in parts, which then come from the same one.
        "first_sample": {"id": dataset.ids[row], "sha256": first.digest().hex()},
    }
    shapes = {name: array.shape[1:] for name, array in first.images.items()}
    form = {"ids": dataset.ids, "shapes": shapes, "seasons": sizes.popitem()[1], "labels": len(first.labels)}
    form |= {"meta": meta, "chunk": getattr(dataset, "chunk", 1), "retry": retry, "allowed": allowed}
    converted, parts = 0, index["parts"]
    for place in [shard] if shard[1] > 1 else [(i, parts) for i in range(parts)]:
        with StoreWriter(path, shard=place, **form) as writer:
            todo = [row for row in writer.span if writer.state[row] == TODO]
            bad = np.count_nonzero(writer.state == arrays.QUARANTINED)
            name = path.name if place[1] == 1 else f"{path.name} {place[0]}/{place[1]}"
            bar = {"total": len(writer.span), "initial": len(writer.span) - len(todo), "desc": name}
            with closing(results(Job(encoder, writer), todo, workers, form["chunk"])) as found:
                for row, reason in runs.progress(found, disable=not progress, **bar):
                    bad, converted = bad + bool(reason), converted + 1
                    if reason and bad > allowed * len(dataset.ids):
                        raise DataError(too_many(path, bad, len(dataset.ids), allowed, f"{dataset.ids[row]}: {reason}"))
            span = writer.span if shard[1] > 1 else range(len(dataset.ids))
    known = {"bands": {name: list(m.bands) for name, m in chosen.items()}, "published": meta["published"]}
    how = {"converted": converted, "seconds": time.perf_counter() - start}
    return Report(**known, **arrays.summary(path, writer.index, span), **how)


def verify(path: Path | str, *, progress: bool = True) -> dict[str, str]:
    """Read every byte of a store again: id, or path for what concerns all of it -> what is wrong; empty if nothing.

    It is not read through maps, so that what the disk cannot read is an error.
    """
    path, way = Path(path), "remove it and convert again"
    try:
        store, index = Store(path), load(path)
        if arrays.summary(path, index, range(len(index["ids"])))["sha256"] != store.sha256:
            raise DataError(f"{path}: its ids, its digests or its state are damaged; {way}")
    except DataError as error:
        return {str(path): str(error)}
    there = arrays.maps(path, index)
    rows = np.flatnonzero(there["state"][0] == arrays.STORED).tolist()

    def bytes_of(name: str, row: int) -> np.ndarray:
        k, row = divmod(row, index["rows_per_file"].get(name, len(index["ids"])))
        size, first = there[name][k].strides[0], there[name][k].offset
        return np.fromfile(there[name][k].filename, np.uint8, size, offset=first + row * size)

    def damage(row: int) -> str:
        try:
            labels = bytes_of("labels", row) if index["labels"] else ()
            same = digest((bytes_of(name, row) for name in store.shapes), labels) == there["digests"][0][row].tobytes()
            return "" if same else f"{path}: not the bytes that were written; {way}"
        except OSError as error:
            return f"{path}: {error}; {way}"

    bar = runs.progress(rows, total=len(rows), desc="verify", disable=not progress)
    return {index["ids"][row]: reason for row in bar if (reason := damage(row))}

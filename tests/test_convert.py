import dataclasses
import errno
import hashlib
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import rasterio

from decur_core.data import arrays as layout
from decur_core.data import encode as workers_module
from decur_core.data import raster, store
from decur_core.data.bigearthnet import BigEarthNetMM
from decur_core.data.convert import convert, verify
from decur_core.data.modality import DEM, OPTICAL, RGB, SAR
from decur_core.data.raster import DataError, read
from decur_core.data.ssl4eo import SSL4EOS12
from decur_core.data.store import Store
from decur_core.running import folders as runs
from decur_core.worlds.files import write_ssl4eo
from decur_core.worlds.sar_optical import World

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_samples = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with the sample data is missing")
PREPROCESSING = {"sar": SAR, "optical": OPTICAL}


class Generated:
    """A data set without files; notes in `log` the process and time of each read."""

    def __init__(self, n, *, size=12, bad=(), larger=(), seasons=2, seed=0, labels=False, log=None, pause=0.0):
        self.ids = [f"{i:07d}" for i in range(n)]
        self.size, self.bad, self.larger, self.seasons, self.seed = size, bad, larger, seasons, seed
        self.labels, self.log, self.pause = labels, log, pause

    def __getitem__(self, i):
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"{i} {os.getpid()}\n")
        time.sleep(self.pause)
        if i in self.bad:
            raise self.bad[i]
        rng, size = np.random.default_rng([self.seed, i]), self.size + (i in self.larger)
        sample = {
            "id": self.ids[i],
            "sar": rng.normal(-14, 5, (self.seasons, 2, size, size)).astype(np.float32),
            "optical": rng.uniform(0, 9000, (self.seasons, 13, size, size)).astype(np.float32),
        }
        if self.seasons == 1:
            sample |= {name: sample[name][0] for name in PREPROCESSING}
        return sample | ({"labels": np.arange(19) % (i + 2) == 0} if self.labels else {})


def run(dataset, path, **settings):
    return convert(dataset, path, **{"preprocessing": PREPROCESSING, "progress": False, "allowed": 1.0} | settings)


def content(path):
    """Every file that others see, byte for byte."""
    return {file.name: file.read_bytes() for file in Path(path).iterdir() if not file.name.startswith(".")}


def same(a: Path, b: Path):
    """Two stores that agree in all that is read from them, however many parts they were made in."""
    files = [{k: v for k, v in content(path).items() if k != "index.json"} for path in (a, b)]
    assert files[0] == files[1]
    a, b = Store(a), Store(b)
    assert a.ids == b.ids and a.shapes == b.shapes and a.seasons == b.seasons
    assert (a.labels is b.labels is None) or (a.labels == b.labels).all()
    assert a.meta["quarantined"] == b.meta["quarantined"] and list(a.meta["quarantined"]) == list(b.meta["quarantined"])
    assert {k: v for k, v in a.meta.items() if k != "summary"} == {k: v for k, v in b.meta.items() if k != "summary"}
    assert a.meta["summary"]["sha256"] == b.meta["summary"]["sha256"] != ""
    for key in ("mean", "std"):
        assert a.meta["summary"][key] == {k: pytest.approx(v, rel=1e-9) for k, v in b.meta["summary"][key].items()}
    for i in range(len(a)):
        for name in a.shapes:
            for season in range(a.seasons):
                assert (a.read(i, name, season) == b.read(i, name, season)).all()


def test_store_holds_the_encoded_samples_and_the_statistics(tmp_path):
    data = Generated(6, labels=True)
    report = run(data, tmp_path)
    found = Store(tmp_path)
    assert found.ids == data.ids and found.shapes == {"sar": (2, 12, 12), "optical": (13, 12, 12)}
    samples = [data[i] for i in range(6)]
    for i, sample in enumerate(samples):
        for name, setting in PREPROCESSING.items():
            for season in range(2):
                assert (found.read(i, name, season) == setting.encode(sample[name][season])).all()
    assert (found.labels == np.stack([sample["labels"] for sample in samples])).all()
    for name in PREPROCESSING:
        pixels = np.concatenate([sample[name] for sample in samples]).astype(np.float64)
        assert report.mean[name] == pytest.approx(pixels.mean(axis=(0, 2, 3)), rel=1e-6)
        assert report.std[name] == pytest.approx(pixels.std(axis=(0, 2, 3)), rel=1e-6)
    assert found.meta["preprocessing"]["sar"] == SAR.mapping()
    assert found.meta["data"] == {"name": "Generated", "title": "Generated", "drawn": False}
    assert (report.stored, report.converted, report.quarantined) == (6, 6, {}) and report.seconds > 0
    again = run(data, tmp_path)
    assert again.converted == 0 and dataclasses.replace(again, seconds=report.seconds, converted=6) == report


def test_single_images_get_a_season_axis(tmp_path):
    data = Generated(2, seasons=1)
    run(data, tmp_path)
    found = Store(tmp_path)
    assert found.seasons == 1 and (found.read(1, "sar", 0) == SAR.encode(data[1]["sar"])).all()


def test_workers_write_the_same_store_and_bound_what_is_under_way(tmp_path):
    bad = {3: DataError("file x.tif: missing"), 7: OSError("input/output error on y.tif")}
    one, log = tmp_path / "one", tmp_path / "log"
    run(Generated(40, bad=bad), one)
    report = run(Generated(40, bad=bad, log=str(log)), tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(one)
    assert report.quarantined == {"0000003": "DataError: file x.tif: missing", "0000007": f"OSError: {bad[7]}"}
    assert report.stored == 38 and "38 of 40" in str(report) and "quarantined 0000003" in str(report)
    readers = {line.split()[1] for line in log.read_text().splitlines()[1:]}  # the first read is the probe
    assert len(readers - {str(os.getpid())}) in (1, 2) and str(os.getpid()) not in readers


def test_workers_are_given_few_samples_at_a_time(tmp_path):
    """Each reads, encodes and writes one after the other, so what is under way does not depend on the data set."""
    log = tmp_path / "log"
    data = Generated(200, bad={1: DataError("file x.tif")}, log=str(log), pause=0.01)
    with pytest.raises(DataError, match="1 of 200 samples are quarantined, more than 0%, last 0000001: .*file x.tif"):
        run(data, tmp_path / "store", workers=1, allowed=0.0)
    seen = [int(line.split()[0]) for line in log.read_text().splitlines() if line.split()[1] != str(os.getpid())]
    assert 1 in seen and max(seen) < 3 * workers_module.GROUP


@pytest.mark.parametrize("seed", [0, 1])
def test_other_pixels_under_the_same_ids_are_another_data_set(tmp_path, seed):
    run(Generated(3), tmp_path)
    if seed:
        with pytest.raises(DataError, match="holds another store.*meta.first_sample.sha256"):
            run(Generated(3, seed=seed), tmp_path)
    else:
        run(Generated(3, seed=seed), tmp_path)


def test_samples_of_another_size_are_quarantined(tmp_path):
    report = run(Generated(4, larger=[2]), tmp_path)
    assert list(report.quarantined) == ["0000002"] and "13, 13" in report.quarantined["0000002"]


def test_hopeless_data_sets_are_given_up_early(tmp_path):
    class Swapped(Generated):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return sample | {"sar": sample["optical"], "optical": sample["sar"]}

    with pytest.raises(DataError, match="none of the first 3 of 3 samples is usable.*2 bands"):
        run(Swapped(3), tmp_path / "store")
    with pytest.raises(DataError, match="none of the first 100 of 500"):
        run(Swapped(500), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_errors_of_the_program_are_not_quarantined(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(Generated(4, bad={2: ZeroDivisionError()}), tmp_path)
    assert run(Generated(4), tmp_path).converted == 2  # what came before the error was kept


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**4, 10**4))
    with pytest.raises(OSError, match="needs .* GB more, 0.0 GB are free"):
        run(Generated(50), tmp_path)


@needs_samples
def test_damaged_locations_are_quarantined_with_the_file(tmp_path):
    root = tmp_path / "root"
    for copy in range(6):
        for folder in ("s1", "s2c"):
            source = SHARED / "torchgeo_fixtures" / "ssl4eo_s12" / folder / f"000000{copy % 2}"
            shutil.copytree(source, root / folder / f"000000{copy}")
    s1, s2c = ({p.parent.name: sorted(p.parent.iterdir())[1] for p in (root / f).glob("*/*")} for f in ("s1", "s2c"))
    (s2c["0000001"] / "B9.tif").unlink()
    shutil.copy(SHARED / "rasterio_tests" / "corrupt.tif", s2c["0000002"] / "B2.tif")
    (s1["0000003"] / "VV.tif").write_bytes((s1["0000003"] / "VV.tif").read_bytes()[:3000])
    shutil.copy(s2c["0000004"] / "B1.tif", s2c["0000004"] / "B8.tif")
    shutil.copy(SHARED / "sentinel1_grd_raw" / "iw-vv.tiff", s1["0000005"] / "VV.tif")
    data = SSL4EOS12(root)
    report = run(data, tmp_path / "store")
    files = [s2c["0000001"] / "B9.tif", s2c["0000002"] / "B2.tif", s1["0000003"] / "VV.tif"]
    files += [s2c["0000004"] / "B8.tif", s1["0000005"] / "VV.tif"]
    words = ["missing", "expected 1 band", "truncated", "6 x 6 pixels, expected 36 x 36", "found uint16"]
    assert list(report.quarantined) == data.ids[1:]
    for reason, file, word in zip(report.quarantined.values(), files, words, strict=True):
        assert str(file) in reason and word in reason, reason
    assert Store(tmp_path / "store").ids == ["0000000"]
    assert Store(tmp_path / "store").meta["quarantined"] == report.quarantined


@needs_samples
def test_real_patches_become_a_labelled_store(tmp_path):
    data = BigEarthNetMM(SHARED / "bigearthnet_real")
    report = run(data, tmp_path)
    found = Store(tmp_path)
    assert (found.labels == data.labels).all() and found.shapes == {"sar": (2, 120, 120), "optical": (13, 120, 120)}
    assert found.read(0, "optical", 0)[10].max() == 0
    assert report.mean["sar"][0] == pytest.approx(np.mean([item["sar"][0].mean() for item in data]), rel=1e-6)


def _convert_in_child(data, path, workers, shard):
    store._BATCH = 10_000  # flushed and marked several times
    run(data, path, workers=workers, shard=shard)


def _kill_and_resume(tmp_path, kills, *, shards=1, workers=0):
    """Convert, killing the process while it works on a random sample; the end must equal an undisturbed conversion."""
    n, settings = 20 * kills * shards, {"bad": {5: DataError("file x.tif: missing")}, "labels": True}
    run(Generated(n, **settings), tmp_path / "whole")
    log, rng, context = tmp_path / "log", random.Random(0), multiprocessing.get_context("fork")
    for k in range(kills * shards):
        log.write_text("")
        data, shard = Generated(n, log=str(log), pause=0.003, **settings), (k % shards, shards)
        process = context.Process(target=_convert_in_child, args=(data, tmp_path / "killed", workers, shard))
        process.start()
        reads = rng.randint(2, 16)  # the first one is the probe
        while process.is_alive() and len(log.read_text().splitlines()) < reads:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.005)
        process.kill()
        process.join()
        assert process.exitcode == -9
    with pytest.raises(DataError, match="no finished store"):
        Store(tmp_path / "killed")
    if shards > 1:  # the jobs again, then what is left in one go
        run(Generated(n, **settings), tmp_path / "killed", shard=(1, shards))
    report = run(Generated(n, **settings), tmp_path / "killed")
    assert 0 < report.converted < n  # some of the work was kept
    if shards == 1:
        assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert verify(tmp_path / "killed", progress=False) == {}
    same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("shards", [1, 2])
def test_killed_conversions_end_with_the_same_store(tmp_path, shards):
    _kill_and_resume(tmp_path, 2, shards=shards)


@pytest.mark.soak
@pytest.mark.parametrize(("shards", "workers"), [(1, 0), (3, 0), (1, 2)])
def test_ten_kills_end_with_the_same_store(tmp_path, shards, workers):
    _kill_and_resume(tmp_path, 10, shards=shards, workers=workers)


def test_workers_do_not_outlive_a_killed_conversion(tmp_path):
    log = tmp_path / "log"
    data = Generated(10_000, log=str(log), pause=0.01)
    context = multiprocessing.get_context("fork")
    settings = {"preprocessing": PREPROCESSING, "progress": False, "workers": 1}
    process = context.Process(target=convert, args=(data, tmp_path / "store"), kwargs=settings)
    process.start()
    while process.is_alive() and len(set(_readers(log)) - {process.pid}) == 0:
        time.sleep(0.01)
    (worker,) = set(_readers(log)) - {process.pid}
    process.kill()
    process.join()
    for _ in range(1000):
        if not _is_running(worker):
            return
        time.sleep(0.01)
    raise AssertionError(f"worker {worker} still runs")


def _readers(log):
    return [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


BAD = {3: DataError("file x.tif: missing"), 11: DataError("file y.tif: missing")}


@pytest.mark.parametrize("shards", [2, 3, 30])
def test_parts_read_like_the_whole(tmp_path, shards):
    data = Generated(23, bad=BAD, labels=True)
    run(data, tmp_path / "whole")
    for i in reversed(range(shards)):
        report = run(data, tmp_path / "parts", shard=(i, shards))
        rows = layout.positions(23, (i, shards))
        assert report.stored + len(report.quarantined) == report.converted == len(rows)
        assert list(report.quarantined) == [data.ids[k] for k in BAD if k in rows]
        if report.stored:
            pixels = np.concatenate([data[k]["sar"] for k in rows if k not in BAD]).astype(np.float64)
            assert report.mean["sar"] == pytest.approx(pixels.mean(axis=(0, 2, 3)), rel=1e-6)
            assert report.std["sar"] == pytest.approx(pixels.std(axis=(0, 2, 3)), rel=1e-6)
    same(tmp_path / "parts", tmp_path / "whole")
    again = run(data, tmp_path / "parts")
    assert again.converted == 0 and again.sha256 == Store(tmp_path / "whole").sha256


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_shards_are_consecutive_and_respect_chunks(chunk):
    for count in (0, 1, 7, 64, 100):
        for n in (1, 2, 7, 16):
            found = [layout.positions(count, (i, n), chunk) for i in range(n)]
            assert [i for part in found for i in part] == list(range(count))
            assert all(part.start % chunk == 0 for part in found if part)
            assert max(map(len, found)) <= chunk * -(-count // (chunk * n))
    for wrong in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(DataError, match=f"shard {wrong[0]}/{wrong[1]}: expected I/N"):
            run(Generated(3), "nowhere", shard=wrong)


def test_missing_parts_are_named_and_converted_by_a_run_without_shards(tmp_path):
    log, target = tmp_path / "log", tmp_path / "parts"
    run(Generated(12), target, shard=(1, 4))
    run(Generated(12), target, shard=(3, 4))
    with pytest.raises(DataError, match=r"no finished store \(6 of 12 samples to do, in parts 0/4, 2/4\)"):
        Store(target)
    report = run(Generated(12, log=str(log)), target)
    assert report.converted == 6 and report.stored == 12
    assert [int(line.split()[0]) for line in log.read_text().splitlines()] == [0, 0, 1, 2, 6, 7, 8]  # first: the probe
    run(Generated(12), tmp_path / "whole")
    same(target, tmp_path / "whole")


def test_parts_of_different_conversions_are_refused(tmp_path):
    data, target = Generated(8), tmp_path / "parts"
    run(data, target, shard=(0, 2))
    before = content(target)
    with pytest.raises(DataError, match=r"holds a store in 2 part\(s\), not 3; choose another path"):
        run(data, target, shard=(0, 3))
    changed = {"preprocessing": PREPROCESSING | {"sar": dataclasses.replace(SAR, outliers=0.04)}}
    for shard in ((0, 1), (1, 2)):
        with pytest.raises(DataError, match="parts: holds another store.*meta.first_sample.sha256"):
            run(Generated(8, seed=1), target, shard=shard)
        with pytest.raises(DataError, match="meta.preprocessing.sar.outliers: 0.02 there, 0.04 here"):
            run(data, target, shard=shard, **changed)
        with pytest.raises(DataError, match="ids.count: 8 there, 9 here"):
            run(Generated(9), target, shard=shard)
    assert content(target) == before
    run(data, tmp_path / "single")
    with pytest.raises(DataError, match=r"holds a store in 1 part\(s\), not 2"):
        run(data, tmp_path / "single", shard=(0, 2))


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_only_one_process_writes(tmp_path, shard):
    name = ".lock-0001-of-0002" if shard[1] > 1 else ".lock"
    words = f"{tmp_path.name} is in use by another process"
    with runs.locked(tmp_path, name=name), pytest.raises(RuntimeError, match=words):
        run(Generated(4), tmp_path, shard=shard)
    run(Generated(4), tmp_path, shard=shard)
    if shard[1] > 1:
        run(Generated(4), tmp_path, shard=(0, 2))  # side by side


class Tiles(Generated):
    """Four patches of each tile, which is decoded when another tile was the last; with masks."""

    chunk, last = 4, None

    def __getstate__(self):
        return self.__dict__ | {"last": None}

    def __getitem__(self, i):
        if self.last != i // 4:
            with open(self.log, "a") as log:
                log.write(f"{i // 4} {os.getpid()}\n")
        self.last = i // 4
        time.sleep(self.pause)
        rng, size = np.random.default_rng([self.seed, i]), self.size
        dem = rng.uniform(50, 900, (1, size, size)).astype(np.float32)
        item = {"id": self.ids[i], "rgb": rng.integers(0, 256, (3, size, size), dtype=np.uint8), "dem": dem}
        mask = rng.integers(0, 11, (size, size + (i in self.larger)), dtype=np.uint8)
        return item | ({} if i in self.bad else {"mask": mask.astype(self.seasons)})


ELEVATION = {"preprocessing": {"rgb": RGB, "dem": DEM}, "progress": False, "allowed": 0.5}


def tiles(n, log, **settings):
    return Tiles(n, log=str(log), **({"seasons": np.uint8} | settings))


def test_a_tile_is_decoded_once(tmp_path):
    log = tmp_path / "log"
    convert(tiles(26, log), tmp_path / "one", **ELEVATION)
    assert [line.split()[0] for line in log.read_text().splitlines()] == list("0123456")
    log.unlink()
    convert(tiles(26, log), tmp_path / "two", workers=1, **ELEVATION)
    decoded = [line.split() for line in log.read_text().splitlines()]
    assert [tile for tile, _ in decoded] == list("00123456")  # the first one is the probe
    same(tmp_path / "two", tmp_path / "one")
    for i in range(3):
        convert(tiles(26, log), tmp_path / "parts", shard=(i, 3), **ELEVATION)
    same(tmp_path / "parts", tmp_path / "one")
    rows = [layout.positions(26, (i, 3), Tiles.chunk) for i in range(3)]
    assert [len(part) for part in rows] == [8, 8, 10]


def test_labels_beside_masks_need_not_be_of_the_masks_classes(tmp_path):
    class Both(Tiles):
        given = {}

        def __getitem__(self, i):
            return super().__getitem__(i) | {"labels": self.given.get(i, [1, 0, 1])}

    options = ELEVATION | {"about": {"name": "both", "classes": list("abcdefghij")}}
    data = Both(4, log=str(tmp_path / "log"), seasons=np.uint8)
    convert(data, tmp_path / "store", **options)
    found = Store(tmp_path / "store")
    assert found.labels.tolist() == 4 * [[1, 0, 1]] and "mask" in found.shapes
    data.given = {2: [1, 0]}
    with pytest.raises(DataError, match=r"0000002: labels int64 .1, 0.; 3 of them are expected"):
        convert(data, tmp_path / "uneven", **options)


def test_masks_are_kept_as_they_are(tmp_path):
    data = tiles(9, tmp_path / "log", bad=[2], larger=[4])
    report = convert(data, tmp_path / "store", **ELEVATION)
    found = Store(tmp_path / "store")
    assert list(report.quarantined) == ["0000002", "0000004"] and "mask" in report.quarantined["0000004"]
    assert found.shapes == {"rgb": (3, 12, 12), "dem": (1, 12, 12), "mask": (1, 12, 12)}
    for row, i in enumerate([0, 1, 3, 5, 6, 7, 8]):
        assert (found.read(row, "mask", 0)[0] == data[i]["mask"]).all()
        assert (found.read(row, "rgb", 0) == data[i]["rgb"]).all()
        assert (found.read(row, "dem", 0) == DEM.encode(data[i]["dem"])).all()
    assert set(report.mean) == set(report.std) == {"rgb", "dem"}
    found.check({"rgb": RGB.mapping(), "dem": DEM.mapping()})
    for wrong, words in (({"seasons": np.int64}, "int64 .12, 12."), ({"larger": range(3)}, "uint8 .12, 13.")):
        with pytest.raises(DataError, match=f"none of the first 3 of 3.*mask: expected uint8 .12, 12., found {words}"):
            convert(tiles(3, tmp_path / "log", **wrong), tmp_path / "wrong", **ELEVATION)


def test_the_report_stands_beside_the_published_statistics(tmp_path):
    data = Generated(30, bad={i: DataError(f"file {i}.tif") for i in range(3, 15)})
    optical = ([4500.0] * 12 + [22.1], [2600.0] * 13)
    data.statistics = {"sar": ((-14.0, -14.0), (5.0, 9.0)), "optical": optical}
    report = run(data, tmp_path)
    assert report.far("sar") == ["VH"] and report.far("optical") == ["B12"]
    text = str(report)
    assert re.search(r"^sar: VV -14\.?\d* ± [45]\.\d+, VH -1", text, re.M)
    assert "\nsar, published: VV -14 ± 5, VH -14 ± 9\nsar: FAR FROM PUBLISHED: VH\n" in text
    assert "18 of 30 samples stored, 30 now" in text and "… 12 quarantined in all" in text
    assert text.count("\nquarantined ") == 10 and f"content: sha256 {report.sha256}" in text
    again = str(run(data, tmp_path))
    assert again.splitlines()[1:] == text.splitlines()[1:] and "18 of 30 samples stored, 0 now\n" in again


def test_the_checksum_is_that_of_ids_and_digests(tmp_path):
    data = Generated(5, bad={1: DataError("file")}, labels=True)
    report = run(data, tmp_path)
    digests = b""
    for i in (0, 2, 3, 4):
        whole = b"".join(setting.encode(data[i][name]).tobytes() for name, setting in PREPROCESSING.items())
        digests += hashlib.sha256(whole + data[i]["labels"].astype(np.uint8).tobytes()).digest()
    ids = "\n".join(data.ids[i] for i in (0, 2, 3, 4)).encode()
    assert report.sha256 == hashlib.sha256(ids + b"\n" + digests).hexdigest()


def overwrite(path, old, new):
    """Change bytes in a file of a store."""
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def test_damage_is_found_and_named(tmp_path):
    data, target = Generated(8, labels=True), tmp_path / "store"
    for i in range(4):
        run(data, target, shard=(i, 4))
    whole = content(target)
    assert verify(target, progress=False) == {}
    image = OPTICAL.encode(data[1]["optical"])[1].tobytes()
    overwrite(target / "optical.npy", image, image[:-1] + bytes([image[-1] ^ 4]))
    labels = [(np.arange(19) % i == 0).astype(np.uint8).tobytes() for i in (8, 9)]
    overwrite(target / "labels.npy", labels[0] + labels[1], labels[1] + labels[0])
    damaged = verify(target, progress=False)
    assert list(damaged) == ["0000001", "0000006", "0000007"]
    assert all(f"{target}: not the bytes that were written; remove it" in text for text in damaged.values())
    for name, change in (("digests", 5), ("state", 0), ("index.json", None)):
        for file, text in whole.items():
            (target / file).write_bytes(text)
        if change is None:
            overwrite(target / "index.json", b'"0000003"', b'"000000x"')
        else:
            array = np.load(target / f"{name}.npy", mmap_mode="r+")
            array[2] = change
            array.flush()
        damaged = verify(target, progress=False)
        assert list(damaged) == [str(target)] and "its ids, its digests or its state are damaged" in str(damaged)
    (target / "index.json").write_bytes(whole["index.json"][:-40])
    assert "no store that can be read" in verify(target, progress=False)[str(target)]


def test_what_the_disk_cannot_read_is_damage_and_not_the_end(tmp_path, monkeypatch):
    run(Generated(3), tmp_path)
    read = np.fromfile

    def failing(file, dtype, count, offset):
        if "optical" in str(file) and offset > 2 * 13 * 12 * 12 * 2:
            raise OSError(5, "Input/output error")
        return read(file, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", failing)
    damaged = verify(tmp_path, progress=False)
    assert list(damaged) == ["0000002"] and "Input/output error; remove it" in damaged["0000002"]


def test_unfinished_and_missing_stores_are_damage(tmp_path):
    run(Generated(4), tmp_path / "half", shard=(0, 2))
    for name in ("half", "nothing"):
        damaged = verify(tmp_path / name, progress=False)
        assert list(damaged) == [str(tmp_path / name)] and "no finished store" in str(damaged)


def test_truncated_stores_do_not_kill_the_reader(tmp_path):
    run(Generated(40), tmp_path)
    file = tmp_path / "optical.npy"
    whole = file.read_bytes()
    found = Store(tmp_path)
    for cut in (len(whole) - 1, len(whole) // 2, 8192, 128, 10):
        os.truncate(file, cut)  # while it is open
        with pytest.raises(DataError, match="optical.npy: truncated.*remove the store"):
            Store(found.path)
        with pytest.raises(DataError, match="optical.npy: truncated"):
            run(Generated(40), tmp_path)
        assert list(verify(tmp_path, progress=False)) == [str(tmp_path)]
        file.write_bytes(whole)


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "_BLOCK", 64)
    run(Generated(5), tmp_path / "imports")
    peaks = []
    for count in (100, 700):
        data = Generated(count, size=16)
        tracemalloc.start()
        run(data, tmp_path / str(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 600 * 400  # a sample has 7680 bytes, its record about 900 as text


class Moved(SSL4EOS12):
    """Its root is renamed while item `at` is read, and put back when `back` more items have been asked for."""

    def __init__(self, root, at, back):
        super().__init__(root)
        self.at, self.back, self.asked, self.away = at, back, 0, Path(f"{root}-away")

    def __getitem__(self, i):
        if self.away.exists():
            self.asked += 1
            if self.asked > self.back:
                self.away.rename(self.root)
        elif i == self.at:
            self.root.rename(self.away)
            self.at = None
        return super().__getitem__(i)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Eight locations in the published layout."""
    root = tmp_path_factory.mktemp("tree") / "ssl4eo"
    write_ssl4eo(root, World(8, tile=24), range(8))
    return root


def test_a_root_that_goes_away_stops_the_conversion_and_costs_no_sample(tmp_path, tree):
    root = shutil.copytree(tree, tmp_path / "root")
    words = f"0000004: .*0000004: missing.*but 0000003, which was good before, cannot be read.*{root}.*goes on"
    with pytest.raises(OSError, match=words) as error:
        run(Moved(root, at=4, back=1000), tmp_path / "store", allowed=0.05)
    assert not isinstance(error.value, DataError) and not root.exists()
    with pytest.raises(DataError, match=r"no finished store \(4 of 8 samples to do\)"):
        Store(tmp_path / "store")
    Path(f"{root}-away").rename(root)
    report = run(Moved(root, at=None, back=0), tmp_path / "store", allowed=0.05)
    assert report.converted == 4 and report.quarantined == {}
    run(Moved(root, at=None, back=0), tmp_path / "whole")
    same(tmp_path / "store", tmp_path / "whole")


def test_a_root_that_is_away_for_a_moment_costs_nothing(tmp_path, tree):
    root = shutil.copytree(tree, tmp_path / "root")
    assert run(Moved(root, at=4, back=0), tmp_path / "store").quarantined == {}


def test_a_root_that_holds_something_else_now_is_not_the_samples_fault(tmp_path):
    class Exchanged(Generated):
        def __getitem__(self, i):
            self.seed += i == 3
            return super().__getitem__(i)

    with pytest.raises(OSError, match="0000003: file x.tif; but 0000002, which was good before, has other pixels now"):
        run(Exchanged(6, bad={3: DataError("file x.tif")}), tmp_path)


@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "EIO", "ESTALE", "ENOTCONN", "ENOSPC"])
def test_errors_that_are_no_files_fault_stop_the_conversion(tmp_path, name):
    number = getattr(errno, name)
    inner = OSError(number, os.strerror(number))
    outer = DataError("file x.tif: cannot be read")
    outer.__cause__ = inner
    for k, error in enumerate((inner, outer)):
        with pytest.raises(OSError, match=f"0000002: .*{'cannot be read' if k else inner.strerror}.*goes on") as found:
            run(Generated(4, bad={2: error}), tmp_path / str(k))
        assert found.value.errno == number
        assert run(Generated(4), tmp_path / str(k)).converted == 2


def test_no_file_handles_left_are_not_the_samples_fault(tmp_path, tree):
    """GDAL says it in words alone."""

    class Greedy(SSL4EOS12):
        def __getitem__(self, i):
            if i == 3:
                os.close(lowest := os.open(os.devnull, os.O_RDONLY))
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
            return super().__getitem__(i)

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with pytest.raises(OSError, match="0000003: .*Too many open files"):
            run(Greedy(tree), tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    report = run(SSL4EOS12(tree), tmp_path / "store")
    assert report.stored == 8 and report.quarantined == {}


def test_more_quarantine_than_is_allowed_stops_until_it_is_asked_for_or_mended(tmp_path):
    bad = {i: DataError(f"file {i}.tif") for i in (0, 5, 9)}
    words = r"2 of 30 samples are quarantined, more than 5%, last 0000005: DataError: file 5.tif; mend .*retry=True"
    for converted in (6, 0):
        with pytest.raises(DataError, match=words):
            run(Generated(30, bad=bad), tmp_path / "store", allowed=0.05)
        words = r"3 of 30 samples are quarantined, more than 5%, last 0000009"  # goes on, up to the next one
        del converted
    report = run(Generated(30, bad=bad), tmp_path / "store", allowed=0.1)
    assert report.converted == 20 and list(report.quarantined) == ["0000000", "0000005", "0000009"]
    assert run(Generated(30), tmp_path / "store", allowed=0.0).converted == 0  # a finished store is not judged again
    report = run(Generated(30, bad={9: bad[9]}), tmp_path / "store", retry=True)
    assert report.converted == 3 and list(report.quarantined) == ["0000009"]
    report = run(Generated(30), tmp_path / "store", retry=True, allowed=0.0)
    assert report.converted == 1 and report.stored == 30 and report.quarantined == {}
    report = run(Generated(30), tmp_path / "store", retry=True)
    assert report.converted == 0
    assert verify(tmp_path / "store", progress=False) == {}
    assert report.sha256 == run(Generated(30), tmp_path / "whole").sha256


def test_a_part_tries_its_own_quarantine_again(tmp_path):
    bad = {i: DataError(f"file {i}.tif") for i in (1, 6)}
    for i in range(2):
        run(Generated(8, bad=bad), tmp_path, shard=(i, 2))
    report = run(Generated(8), tmp_path, shard=(1, 2), retry=True)
    assert report.converted == 1 and report.quarantined == {}
    assert list(Store(tmp_path).meta["quarantined"]) == ["0000001"]


class Items(Generated):
    """Items with something added."""

    def __init__(self, n, change, **settings):
        super().__init__(n, **settings)
        self.change = change

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return self.change(item, i) if callable(self.change) else item | self.change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.array([0.9, 0.1])}, r"0000000: labels float64 \[0.9, 0.1\]"),
        ({"labels": np.array([0.0, 1.0])}, r"0000000: labels float64"),
        ({"labels": np.array([3, 7])}, r"0000000: labels int64 \[3, 7\]"),
        ({"labels": 3}, r"0000000: labels int64 3"),
        ({"labels": np.eye(2, dtype=np.uint8)}, r"0000000: labels uint8 \[\[1, 0\]"),
        ({"labels": ["forest"]}, r"0000000: labels <U6"),
        ({"id": "0000001"}, "0000000: the item at its place has the id '0000001'"),
        (lambda item, i: {k: v for k, v in item.items() if k != "id"}, "has the id None"),
        (lambda item, i: {k: v for k, v in item.items() if k != "sar"}, "no array 'sar' in .'id', 'optical'."),
        (lambda item, i: (item["sar"], item["optical"]), "no array 'sar' in a tuple"),
        (lambda item, i: item | {"sar": item["sar"].tolist()}, "no array 'sar' in .'id'"),
    ],
)
def test_items_of_another_form_are_refused_at_the_first_one(tmp_path, change, words):
    with pytest.raises(DataError, match=f"{words}.*a reader's item is .'id': ids.i., 'sar', 'optical': arrays"):
        run(Items(3, change), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda item, i: item | {"labels": np.ones(2 + i // 2, bool)},
            "0000002: labels bool .* 2 of them are exp",
        ),
        (lambda item, i: item | {"labels": np.full(2, i // 2 * 4)}, r"0000002: labels int64 \[4, 4\]"),
        (lambda item, i: item | ({"labels": np.ones(2, bool)} if i < 2 else {}), "0000002: labels uint8"),
        (lambda item, i: item | {"id": "000000" + "0113"[i]}, "0000002: the item at its place has the id '0000001'"),
    ],
)
def test_a_later_item_of_another_form_stops_the_conversion(tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        run(Items(4, change), tmp_path / "store")
    with pytest.raises(DataError, match=r"no finished store \(2 of 4 samples to do\)"):
        Store(tmp_path / "store")


@pytest.mark.parametrize("shape", [(12, 12), (0, 2, 12, 12), (1, 2, 2, 12, 12)])
def test_images_of_other_dimensions_are_quarantined(tmp_path, shape):
    data = Items(3, lambda item, i: item | ({"sar": np.full(shape, -9, np.float32)} if i == 1 else {}))
    report = run(data, tmp_path)
    assert re.search(r"sar: expected \(C, H, W\) or \(seasons, C, H, W\), found", report.quarantined["0000001"])


def test_one_class_works_and_the_number_of_classes_is_held_to(tmp_path):
    data = Items(3, lambda item, i: item | {"labels": np.array([i % 2])})
    about = {"name": "mine", "title": "My places", "classes": ["forest"], "drawn": True}
    run(data, tmp_path / "store", about=about)
    found = Store(tmp_path / "store")
    assert found.labels.tolist() == [[0], [1], [0]] and found.meta["data"] == about
    with pytest.raises(DataError, match=r"0000000: labels int64 \[0\]; 2 of them are expected"):
        run(data, tmp_path / "other", about=about | {"classes": ["forest", "water"]})
    with pytest.raises(DataError, match="meta.data.classes: .'forest'. there, .'water'. here"):
        run(data, tmp_path / "store", about=about | {"classes": ["water"]})
    assert run(data, tmp_path / "store", about=about | {"title": "Places of mine"}).converted == 0


def test_a_mapping_stands_for_its_modality(tmp_path):
    run(Generated(2), tmp_path / "objects")
    run(Generated(2), tmp_path / "mappings", preprocessing={name: m.mapping() for name, m in PREPROCESSING.items()})
    assert content(tmp_path / "objects") == content(tmp_path / "mappings")


@needs_samples
def test_a_known_first_sample_that_cannot_be_read_any_more_is_named(tmp_path):
    run(Generated(4, bad={0: DataError("file x.tif")}), tmp_path, shard=(0, 2))
    run(Generated(4), tmp_path, shard=(0, 2))  # of another sample would be said that it is another data set
    with pytest.raises(DataError, match="0000001, by which the store knows its data set, cannot be read.*file y.tif"):
        run(Generated(4, bad={1: DataError("file y.tif")}), tmp_path)


def test_what_a_decoder_warns_of_is_damage(tmp_path):
    """OpenJPEG reads a stream without an end, and GDAL only warns; a tag that GDAL does not know is no damage."""
    grey = np.add.outer(np.arange(256), np.arange(256)) // 2 + np.random.default_rng(0).integers(0, 9, (256, 256))
    form = {"width": 256, "height": 256, "count": 1, "dtype": "uint8"}
    with rasterio.open(tmp_path / "whole.jp2", "w", driver="JP2OpenJPEG", QUALITY="50", **form) as file:
        file.write(grey.clip(0, 255).astype(np.uint8), 1)
    data = (tmp_path / "whole.jp2").read_bytes()
    (tmp_path / "half.jp2").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    options = {"count": 1, "kind": "ui", "driver": "JP2OpenJPEG"}
    assert abs(read(tmp_path / "whole.jp2", **options)[0].astype(int) - grey).mean() < 4
    with pytest.raises(DataError, match="half.jp2: damaged, says its decoder .JP2OpenJPEG.: .*does not end with EOC"):
        read(tmp_path / "half.jp2", **options)

    class Tiles:
        ids = ["half", "whole"]

        def __getitem__(self, i):
            tile = read(tmp_path / f"{self.ids[i]}.jp2", **options)
            return {"id": self.ids[i], "rgb": np.repeat(tile, 3, axis=0)}

    report = convert(Tiles(), tmp_path / "store", preprocessing={"rgb": RGB}, allowed=0.5, progress=False)
    assert list(report.quarantined) == ["half"] and "does not end with EOC" in report.quarantined["half"]


def test_warnings_of_other_threads_and_of_headers_are_not_a_files_own(tmp_path):
    form = {"width": 8, "height": 8, "count": 1, "dtype": "uint8", "driver": "GTiff"}
    with rasterio.open(tmp_path / "a.tif", "w", **form) as file:
        file.write(np.zeros((8, 8), np.uint8), 1)
    with raster._gdal() as warned:
        thread = threading.Thread(target=logging.getLogger("rasterio._err").warning, args=["of another file"])
        thread.start()
        thread.join()
        assert warned == []
        logging.getLogger("rasterio._err").warning("of a tag")
        assert warned == ["of a tag"]
        assert raster._read(tmp_path / "a.tif", warned, count=1, kind="ui").values.shape == (1, 8, 8)
    assert not [h for h in logging.getLogger("rasterio").handlers if h.level == logging.WARNING]


READER = """
import numpy as np

class Mine:
    ids = ["a", "b", "c"]
    def __getitem__(self, i):
        return {"id": self.ids[i], "rgb": np.full((3, 4, 4), i, np.uint8)}
"""
CALLS = """
from decur_core.data.convert import convert, verify
from decur_core.data.modality import RGB
convert(Mine(), "store", preprocessing={"rgb": RGB}, workers=2, progress=False)
assert verify("store") == {}, verify("store")
print("done")
"""


def script(folder, text, *command):
    """Run a script of someone else, in its own folder; what it says and its exit code."""
    (folder / "script.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *(command or ["script.py"])], cwd=folder, env=environment, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    return done.stdout + done.stderr, done.returncode


def test_a_plain_script_without_a_guard_converts_and_verifies(tmp_path):
    (tmp_path / "mine.py").write_text(READER)
    said, code = script(tmp_path, f"from mine import Mine\n{CALLS}")
    assert code == 0 and said.count("done") == 1, said  # once: the processes leave the script alone


def test_a_script_whose_own_class_needs_a_guard_is_told(tmp_path):
    said, code = script(tmp_path, READER + CALLS)
    last = said.strip().splitlines()[-1]
    assert code and "the worker processes ended before they could begin" in last
    assert 'keeps its calls below `if __name__ == "__main__":`' in last and "in use" not in said
    calls = "\n".join(f"    {line}" for line in CALLS.strip().splitlines())
    said, code = script(tmp_path, f'{READER}\nif __name__ == "__main__":\n{calls}')
    assert code == 0 and "done" in said, said  # nothing that was there is in the way


def test_a_class_of_a_notebook_is_named(tmp_path):
    """What is typed into a session has no file that a process could import."""
    said, code = script(tmp_path, "", "-c", READER + CALLS)
    assert code and "__main__.Mine cannot be sent to a worker process" in said.strip().splitlines()[-1]
    assert "define it in a module of its own (a file that is imported, not a notebook" in said and "workers=0" in said
    said, code = script(tmp_path, "", "-c", READER + CALLS.replace("workers=2, progress", "workers=0, progress"))
    assert code == 0 and "done" in said, said

    class Local(Generated):
        pass

    with pytest.raises(RuntimeError, match="Local cannot be sent to a worker process .*workers=0"):
        run(Local(3), tmp_path / "local", workers=1)


class Deadly(Generated):
    """Reading item 21 kills the process, unless it is this one."""

    def __init__(self, n, **settings):
        super().__init__(n, **settings)
        self.alive = os.getpid()

    def __getitem__(self, i):
        if i == 21 and os.getpid() != self.alive:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_the_death_of_a_worker_is_not_blamed_on_the_data(tmp_path):
    words = "a worker process died, at work on 00000.. or after it.*workers=0 shows on which sample.*goes on"
    with pytest.raises(ChildProcessError, match=words):
        run(Deadly(40), tmp_path / "store", workers=1, allowed=0.0)
    report = run(Deadly(40), tmp_path / "store", allowed=0.0)
    assert 0 < report.converted < 40 and report.quarantined == {}


SBATCH = """touch calls
echo "$*" >> calls
trap 'echo signalled >> calls; exit 3' USR1 TERM
touch ready
for _ in $(seq 200); do sleep 0.05; done"""


@pytest.mark.parametrize("number", [None, signal.SIGUSR1, signal.SIGTERM])
def test_the_job_array_converts_its_part_and_goes_back_into_the_queue(tmp_path, number):
    script = ROOT / "slurm" / "convert.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    stubs = {"python": SBATCH if number else 'echo "$*" >> calls; exit 5', "scontrol": 'echo "scontrol $*" >> calls'}
    for stub, text in stubs.items():
        (tmp_path / stub).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / stub).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f"PATH={tmp_path}:$PATH")
    slurm = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    job = subprocess.Popen(["bash", script, "a100"], cwd=tmp_path, env={**os.environ, **slurm})
    while number and not (tmp_path / "ready").exists():
        time.sleep(0.01)
    if number:
        job.send_signal(number)
    assert job.wait(20) == (3 if number else 5)
    said = (tmp_path / "calls").read_text().splitlines()
    assert said[0] == "-m decur_core.data.prepare a100 --shard 3/16"
    assert ("scontrol requeue 71" in said) == (number == signal.SIGUSR1) and ("signalled" in said) == bool(number)


def test_the_published_conversion_of_the_benchmark_gives_nearly_the_same_bytes(tmp_path):
    pytest.importorskip("cv2", reason="opencv-python-headless is an extra of the benchmarks")
    from benchmarks import convert as benchmark

    root = tmp_path / "root"
    write_ssl4eo(root, World(2, tile=36), range(2))
    sar, optical = benchmark.Published(root, 36)[1]
    item = SSL4EOS12(root)[1]
    assert sar.shape == (4, 2, 36, 36) and optical.dtype == sar.dtype == np.uint8
    assert abs(optical.astype(int) - OPTICAL.encode(item["optical"])).max() <= 1  # it rounds resized bands
    # Ours cuts outliers, and takes seasons by date; theirs by the folder's name, where S1A comes before S1B.
    by_date = np.argsort([p.name[17:] for p in sorted((root / "s1" / "0000001").iterdir())])
    assert (abs(sar[by_date].astype(int) - SAR.encode(item["sar"])) > 1).mean() < 0.03
    for way in benchmark.WAYS.values():
        way(root, 36, 5, 0, tmp_path / way.__name__)
    assert len(Store(tmp_path / "ours")) == 5 and (tmp_path / "published").stat().st_size > 5 * 4 * 15 * 36**2

import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import lmdb
import numpy as np
import pytest

from decur_core.data import convert as convert_module
from decur_core.data import store
from decur_core.data.bigearthnet import BigEarthNetMM
from decur_core.data.convert import convert
from decur_core.data.raster import DataError
from decur_core.data.ssl4eo import SSL4EOS12
from decur_core.data.store import Store
from decur_core.preprocess import OPTICAL, SAR

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
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
    return convert(dataset, path, preprocessing=PREPROCESSING, progress=False, **settings)


def content(path):
    """Every key and value."""
    with tempfile.TemporaryDirectory() as copy:  # this process may have the store itself mapped
        shutil.copy(path / "data.mdb", copy)
        with lmdb.open(copy, readonly=True, lock=False) as env, env.begin() as transaction:
            return dict(transaction.cursor())


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
    assert found.meta["summary"] == {"mean": report.mean, "std": report.std}
    assert found.meta["preprocessing"]["sar"] == SAR.to_dict() and found.meta["dataset"] == "Generated"
    assert (report.total, report.stored, report.converted, report.quarantined) == (6, 6, 6, {})
    again = run(data, tmp_path)
    assert again.converted == 0 and (again.mean, again.std) == (report.mean, report.std)


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


def test_at_most_a_few_samples_per_worker_are_under_way(tmp_path):
    data = Generated(100, log=str(tmp_path / "log"))
    results = iter(convert_module._encoded(data, PREPROCESSING, range(100), 1))
    for received in range(1, 11):
        found = next(results)["arrays"]["optical"]
        time.sleep(0.02)  # enough for the worker to read all of them, if it were let
        assert sum(pid != os.getpid() for pid in _readers(tmp_path / "log")) <= received + 2
        assert (found == OPTICAL.encode(data[received - 1]["optical"])).all()


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
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**4, 10**4))
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


def _convert_in_child(data, path):
    store._BATCH = 10_000  # several transactions
    run(data, path)


def _kill_and_resume(tmp_path, kills):
    """Convert, killing the process while it works on a random sample; the end must equal an undisturbed conversion."""
    n, settings = 20 * kills, {"bad": {5: DataError("file x.tif: missing")}, "labels": True}
    run(Generated(n, **settings), tmp_path / "whole")
    log, rng, context = tmp_path / "log", random.Random(0), multiprocessing.get_context("fork")
    for _ in range(kills):
        log.write_text("")
        data = Generated(n, log=str(log), pause=0.003, **settings)
        process = context.Process(target=_convert_in_child, args=(data, tmp_path / "killed"))
        process.start()
        reads = rng.randint(2, 16)  # the first one is the probe
        while process.is_alive() and len(log.read_text().splitlines()) < reads:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.005)
        process.kill()
        process.join()
        assert process.exitcode == -9
    with pytest.raises(DataError, match="unfinished|no store"):
        Store(tmp_path / "killed")
    report = run(Generated(n, **settings), tmp_path / "killed")
    assert 0 < report.converted < n  # some of the work was kept
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_killed_conversions_end_with_the_same_store(tmp_path):
    _kill_and_resume(tmp_path, 2)


@pytest.mark.soak
def test_killed_conversions_end_with_the_same_store_soak(tmp_path):
    _kill_and_resume(tmp_path, 10)


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

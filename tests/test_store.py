import multiprocessing
import os
import pickle
import resource
import shutil
import tempfile

import lmdb
import numpy as np
import pytest
from torch.utils.data import DataLoader

from decur_core.data import store
from decur_core.data.raster import DataError
from decur_core.data.store import Store, StoreWriter

SHAPES = {"sar": (2, 9, 8), "optical": (13, 9, 8)}
IDS = [f"{i:07d}" for i in (5, 3, 11, 4, 0)]


def arrays(id, seasons=4):
    rng = np.random.default_rng(int(id))
    return {name: rng.integers(0, 256, (seasons, *shape), dtype=np.uint8) for name, shape in SHAPES.items()}


def writer(path, **changes):
    settings = {
        "ids": IDS,
        "shapes": SHAPES,
        "seasons": 4,
        "meta": {"dataset": "made up", "preprocessing": {"scale": 1.5}},
    }
    return StoreWriter(path, **(settings | changes))


def fill(path, ids=IDS, bad=()):
    with writer(path) as target:
        for id in ids:
            if id in bad:
                target.quarantine(id, "broken file")
            elif id not in target.done:
                target.put(id, arrays(id), record={"n": int(id)})
    return path


def content(path):
    """Every key and value."""
    with tempfile.TemporaryDirectory() as copy:  # this process may have the store itself mapped
        shutil.copy(path / "data.mdb", copy)
        with lmdb.open(copy, readonly=True, lock=False) as env, env.begin() as transaction:
            return dict(transaction.cursor())


def test_what_is_written_is_read(tmp_path):
    found = Store(fill(tmp_path / "store", ids=sorted(IDS), bad=["0000004"]))
    assert found.ids == ["0000005", "0000003", "0000011", "0000000"]  # the data set's order, not that of writing
    assert len(found) == 4 and found.seasons == 4 and found.shapes == SHAPES and found.labels is None
    assert found.meta["dataset"] == "made up" and found.meta["quarantined"] == {"0000004": "broken file"}
    for i, id in enumerate(found.ids):
        for name, images in arrays(id).items():
            for season in range(4):
                assert (found.read(i, name, season) == images[season]).all()
    for place in ((0, "depth", 0), (0, "sar", 4)):
        with pytest.raises(DataError, match=f"no image 0000005, {place[1]}, season {place[2]}"):
            found.read(*place)


def test_labels_follow_the_ids(tmp_path):
    labels = {id: np.arange(19) % (int(id) + 2) == 0 for id in IDS}
    with writer(tmp_path, labels=19) as target:
        for id in reversed(IDS):
            target.put(id, arrays(id), labels[id])
    found = Store(tmp_path).labels
    assert found.dtype == np.uint8 and (found == np.stack([labels[id] for id in IDS])).all()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the list of mappings is Linux's")
def test_views_are_read_only_maps_that_outlive_the_store(tmp_path):
    found = Store(fill(tmp_path / "store"))
    view = found.read(2, "optical", 1)
    assert view.base is not None and not view.flags.owndata and not view.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if str(tmp_path / "store" / "data.mdb") in line]
    address = view.__array_interface__["data"][0]
    assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)  # in the file, not a copy
    del found
    shutil.rmtree(tmp_path / "store")
    assert (view == arrays(IDS[2])["optical"][1]).all()
    assert Store(fill(tmp_path / "store", bad=IDS[1:])).ids == IDS[:1]  # another store under the same name
    assert (view == arrays(IDS[2])["optical"][1]).all()


class Images:
    def __init__(self, found):
        self.store = found

    def __len__(self):
        return len(self.store)

    def __getitem__(self, i):
        return i, os.getpid(), self.store.read(i, "optical", i % 4).copy()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_their_own_mapping(tmp_path, method):
    found = Store(fill(tmp_path))
    kept = found.read(0, "sar", 0)
    loader = DataLoader(Images(found), batch_size=None, num_workers=2, multiprocessing_context=method)
    items = list(loader)
    assert os.getpid() not in {pid for _, pid, _ in items}
    for i, _, image in items:
        assert (np.asarray(image) == arrays(IDS[i])["optical"][i % 4]).all()
    assert (kept == arrays(IDS[0])["sar"][0]).all()


def test_a_store_pickles_as_its_path(tmp_path):
    found = Store(fill(tmp_path))
    data = pickle.dumps(found)
    assert len(data) < 300
    assert (pickle.loads(data).read(1, "sar", 2) == found.read(1, "sar", 2)).all()


def test_the_map_grows_and_batches_survive_it(tmp_path, monkeypatch):
    plain = content(fill(tmp_path / "plain"))
    monkeypatch.setattr(store, "_MAP", 2**16)
    for batch in (1, 10_000, 2**26):
        monkeypatch.setattr(store, "_BATCH", batch)
        assert content(fill(tmp_path / f"grown {batch}")) == plain


def test_unfinished_stores_are_refused_and_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_BATCH", 1)
    with writer(tmp_path / "store") as target:
        target.put(IDS[0], arrays(IDS[0]))
        target.quarantine(IDS[1], "broken file")
    with pytest.raises(DataError, match="no finished store; the same conversion goes on where it stopped"):
        Store(tmp_path / "store")
    with pytest.raises(KeyError), writer(tmp_path / "store") as target:
        target.put(IDS[2], arrays(IDS[2]))
        raise KeyError
    with writer(tmp_path / "store") as target:
        assert target.done == set(IDS[:3]) and not target.finished
        with pytest.raises(DataError, match="already in the store"):
            target.put(IDS[0], arrays(IDS[0]))
        for id in IDS[3:]:
            target.put(id, arrays(id))
    assert Store(tmp_path / "store").ids == [IDS[0], *IDS[2:]]
    with writer(tmp_path / "store") as target:
        assert target.finished and target.done == set(IDS)
    Store(tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": IDS[:4]}, "ids.count: 5 there, 4 here"),
        ({"ids": sorted(IDS)}, "ids.sha256"),
        ({"seasons": 1}, "seasons: 4 there, 1 here"),
        ({"shapes": SHAPES | {"optical": (12, 9, 8)}}, r"shapes.optical: \[13, 9, 8\] there, \[12, 9, 8\] here"),
        ({"shapes": SHAPES | {"dem": (1, 9, 8)}}, r"shapes.dem: None there, \[1, 9, 8\] here"),
        ({"labels": 19}, "labels: 0 there, 19 here"),
        (
            {"meta": {"dataset": "made up", "preprocessing": {"scale": 2.0}}},
            "meta.preprocessing.scale: 1.5 there, 2.0 here",
        ),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_something_else_is_refused(tmp_path, change, words, finished):
    before = content(fill(tmp_path, ids=IDS if finished else IDS[:2]))
    with pytest.raises(DataError, match=words):
        writer(tmp_path, **change)
    assert content(tmp_path) == before


def test_arrays_of_another_form_are_refused(tmp_path):
    good = arrays(IDS[0])
    with pytest.raises(DataError, match="0000005"), writer(tmp_path) as target:
        for wrong in ({"sar": good["sar"]}, good | {"sar": good["sar"][:2]}, good | {"sar": good["sar"].astype(float)}):
            with pytest.raises(DataError, match="expected"):
                target.put(IDS[0], wrong)
        assert IDS[0] not in target.done
        target.put(IDS[0], good, np.ones(3))


def test_what_is_stored_is_not_replaced(tmp_path):
    with writer(tmp_path) as target:
        target.put(IDS[0], arrays(IDS[0]))
        with pytest.raises(DataError, match="0000005 is already in the store"):
            target.put(IDS[0], arrays(IDS[1]))
        for id in IDS[1:]:
            target.put(id, arrays(id))
    assert (Store(tmp_path).read(0, "sar", 2) == arrays(IDS[0])["sar"][2]).all()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", "b", "a"], "1 of 3 ids are given more than once, first 'a'"),
        (["a", "ü" * 250], "ü': expected text of one line, at most 4.. bytes"),
        (["a", 7], "id 7: expected text"),
        (["a\nb"], "expected text"),
        (["a\0b"], "expected text"),
        (["a\udcff"], "expected text"),
    ],
)
def test_ids_that_cannot_be_stored_are_refused(tmp_path, ids, words):
    with pytest.raises(DataError, match=words):
        writer(tmp_path / "store", ids=ids)
    assert not (tmp_path / "store").exists()


def test_ids_may_be_long_and_of_any_language(tmp_path):
    ids = ["", "..", "/a b", "日本", "ü" * 240]
    with writer(tmp_path, ids=ids) as target:
        for id, name in zip(ids, IDS, strict=True):
            target.put(id, arrays(name))
    found = Store(tmp_path)
    assert found.ids == ids and (found.read(4, "optical", 3) == arrays(IDS[4])["optical"][3]).all()


@pytest.mark.parametrize("limit", [1, 60_000])  # at the first page, and between two transactions
def test_a_disk_that_fills_up_costs_nothing_that_is_stored(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(store, "_BATCH", 10_000)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}.*: cannot be written .* goes on where it stopped") as failed:
            fill(tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with pytest.raises(DataError, match="no finished store"):
        Store(tmp_path / "store")
    with writer(tmp_path / "store") as target:  # in the process that still has the error and its frames
        assert failed.value and bool(target.done) == (limit > 1)
    assert content(fill(tmp_path / "store")) == content(fill(tmp_path / "whole"))


def test_a_store_that_is_being_written_is_not_called_truncated(tmp_path, monkeypatch):
    fill(tmp_path, ids=IDS[:1])
    open_ = lmdb.open

    def later(*args, **options):  # a transaction ends after the first look at the file
        monkeypatch.setattr(lmdb, "open", open_)
        fill(tmp_path)
        return open_(*args, **options)

    monkeypatch.setattr(lmdb, "open", later)
    assert Store(tmp_path).ids == IDS


def test_a_truncated_file_may_be_completed(tmp_path):
    data = fill(tmp_path / "store") / "data.mdb"
    whole = data.read_bytes()
    with open(data, "r+b") as file:
        file.truncate(len(whole) // 2)
    with pytest.raises(DataError, match="data.mdb is truncated") as error:
        Store(tmp_path / "store")
    with open(data, "r+b") as file:  # a copy that goes on, while this process still has the error and its frames
        file.write(whole)
    assert error.value and Store(tmp_path / "store").ids == IDS


def test_folders_of_other_names_are_no_parts(tmp_path):
    fill(tmp_path)
    (tmp_path / "part-0000-of-0002.bak").mkdir()
    (tmp_path / "part-of-something-else").mkdir()
    assert Store(tmp_path).ids == IDS


def test_missing_and_foreign_stores_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing: no finished store"):
        Store(tmp_path / "nothing")
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(DataError, match="no store that can be read"):
        Store(tmp_path)


def _put_until_killed(path):
    store._BATCH = 1
    with writer(path) as target:
        for id in IDS:
            if id not in target.done:
                target.put(id, arrays(id), record={"n": int(id)})
                if len(target.done) % 3 == 0:
                    os.kill(os.getpid(), 9)


def test_committed_ids_survive_a_kill(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_put_until_killed, args=(tmp_path / "killed",))
    process.start()
    process.join()
    assert process.exitcode == -9
    with writer(tmp_path / "killed") as target:
        assert target.done == set(IDS[:3])
    assert content(fill(tmp_path / "killed")) == content(fill(tmp_path / "whole"))


def test_a_store_from_before_digests_is_named_where_one_is_needed(tmp_path, monkeypatch):
    with StoreWriter(tmp_path / "old", ids=["a"], shapes={"x": (1, 2, 2)}, seasons=1, meta={}) as writer:
        writer.put("a", {"x": np.zeros((1, 1, 2, 2), np.uint8)})
    store = Store(tmp_path / "old")
    assert len(store.sha256) == 64
    del store.meta["summary"]["sha256"]
    with pytest.raises(DataError, match="old: from an earlier version, without a digest.*convert it again"):
        assert store.sha256


def test_what_lmdb_finds_wrong_when_it_looks_is_named(tmp_path, monkeypatch):
    with StoreWriter(tmp_path / "s", ids=["a"], shapes={"x": (1, 2, 2)}, seasons=1, meta={}) as writer:
        writer.put("a", {"x": np.zeros((1, 1, 2, 2), np.uint8)})

    class Broken:
        def stat(self):
            raise lmdb.CorruptedError("page 7")

        def close(self):
            pass

    monkeypatch.setattr(lmdb, "open", lambda *a, **k: Broken())
    with pytest.raises(DataError, match="no store that can be read.*page 7"):
        Store(tmp_path / "s")

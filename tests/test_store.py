import errno
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from conftest import file_limit
from torch.utils.data import DataLoader

from decur_core.data import arrays as layout
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


def done(target):
    """Ids of a writer's part that are stored or quarantined."""
    return {target.index["ids"][row] for row in target.span if target.state[row] != layout.TODO}


def fill(path, ids=IDS, bad=()):
    with writer(path) as target:
        for id in ids:
            if id in bad:
                target.quarantine(id, "broken file")
            elif id not in done(target):
                target.put(id, arrays(id))
    return path


def content(path):
    """Every file that others see."""
    return {file.name: file.read_bytes() for file in Path(path).iterdir() if not file.name.startswith(".")}


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
        ranges = [line.split()[0].split("-") for line in maps if str(tmp_path / "store" / "optical.npy") in line]
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


def test_every_file_is_an_array_that_numpy_opens(tmp_path):
    labels = {id: np.arange(3) == i % 3 for i, id in enumerate(IDS)}
    with writer(tmp_path, labels=3) as target:
        for id in IDS[1:]:
            moments = {"sar": ([1.0, 2.0], [3.0, 4.0])}
            target.put(id, arrays(id), labels[id], moments=moments)
        target.quarantine(IDS[0], "why not")
    there = {file.stem: np.load(file, mmap_mode="r") for file in tmp_path.glob("*.npy")}
    assert set(there) == {"sar", "optical", "labels", "digests", "reasons", "state"}  # no preprocessing, no moments
    assert there["optical"].shape == (5, 4, 13, 9, 8) and (there["optical"][2] == arrays(IDS[2])["optical"]).all()
    assert there["state"].tolist() == [2, 1, 1, 1, 1] and there["reasons"][0] == b"why not"
    assert (there["labels"][3] == labels[IDS[3]]).all()
    whole = layout.digest(arrays(IDS[3]).values(), labels[IDS[3]])
    assert there["digests"][3].tobytes() == whole
    assert json.loads((tmp_path / "index.json").read_text())["ids"] == IDS


def test_large_arrays_are_cut_into_files_of_equally_many_rows(tmp_path, monkeypatch):
    plain = Store(fill(tmp_path / "plain"))
    monkeypatch.setattr(store, "_LARGEST", 2 * 4 * 13 * 9 * 8)  # two rows of optical images, thirteen of SAR
    with writer(tmp_path / "cut", ids=IDS) as target:
        target.put(IDS[3], arrays(IDS[3]))
    monkeypatch.undo()  # a store keeps the form that it began with
    found = Store(fill(tmp_path / "cut"))
    files = sorted((tmp_path / "cut").glob("optical*.npy"))
    assert [np.load(file).shape[0] for file in files] == [2, 2, 1] and (tmp_path / "cut" / "sar.npy").exists()
    assert [file.name for file in files] == ["optical-0000.npy", "optical-0001.npy", "optical-0002.npy"]
    assert found.sha256 == plain.sha256
    for i in range(5):
        for season in range(4):
            assert (found.read(i, "optical", season) == plain.read(i, "optical", season)).all()


@pytest.mark.parametrize("batch", [1, 10_000, 2**26])
def test_how_often_rows_are_flushed_changes_nothing(tmp_path, monkeypatch, batch):
    plain = content(fill(tmp_path / "plain"))
    monkeypatch.setattr(store, "_BATCH", batch)
    assert content(fill(tmp_path / "other")) == plain


def test_rows_are_marked_only_after_their_bytes_are_on_the_disk(tmp_path, monkeypatch):
    order, names = [], {}
    open_, write, flush = os.open, os.pwrite, os.fdatasync

    def opened(file, *args, **options):
        names[number := open_(file, *args, **options)] = Path(file).stem
        return number

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", lambda f, *args: (order.append(f"write {names[f]}"), write(f, *args))[1])
    monkeypatch.setattr(os, "fdatasync", lambda f: (order.append(f"flush {names[f]}"), flush(f))[1])
    with writer(tmp_path) as target:
        target.put(IDS[0], arrays(IDS[0]))
        target.put(IDS[1], arrays(IDS[1]))
        assert "write state" not in order
        target.flush()
    first = order.index("write state")
    for name in ("sar", "optical", "digests"):
        assert order.index(f"flush {name}") < first and f"write {name}" not in order[order.index(f"flush {name}") :]


def test_quarantined_rows_are_tried_again_when_asked_for(tmp_path):
    fill(tmp_path, bad=[IDS[1], IDS[4]])
    first = Store(tmp_path)
    with writer(tmp_path) as target:
        assert target.finished
    with writer(tmp_path, retry=True) as target:
        assert not target.finished and done(target) == {IDS[0], IDS[2], IDS[3]}
        with pytest.raises(DataError, match="no finished store"):
            Store(tmp_path)
        target.put(IDS[1], arrays(IDS[1]))
        target.quarantine(IDS[4], "still broken")
    found = Store(tmp_path)
    assert found.ids == IDS[:4] and found.meta["quarantined"] == {IDS[4]: "still broken"}
    assert found.sha256 != first.sha256 and (found.read(1, "sar", 3) == arrays(IDS[1])["sar"][3]).all()
    fill(tmp_path / "whole", bad=[IDS[4]])
    assert Store(tmp_path / "whole").sha256 == found.sha256


def test_a_store_of_too_much_quarantine_is_not_finished_unless_asked_for(tmp_path):
    words = "2 of 5 samples are quarantined, more than 20%, last 0000000: broken file"
    with pytest.raises(DataError, match=words), writer(tmp_path, allowed=0.2) as target:
        for id in IDS:
            target.quarantine(id, "broken file") if id in (IDS[1], IDS[4]) else target.put(id, arrays(id))
    with pytest.raises(DataError, match=r"no finished store \(0 of 5 samples to do\)"):
        Store(tmp_path)
    with writer(tmp_path, allowed=0.4):
        pass
    assert len(Store(tmp_path)) == 3


def test_long_reasons_are_cut_in_whole_letters(tmp_path):
    with writer(tmp_path) as target:
        for id in IDS[1:]:
            target.put(id, arrays(id))
        target.quarantine(IDS[0], "ü" * 700 + "!")
    assert Store(tmp_path).meta["quarantined"][IDS[0]] == "ü" * 512


def test_unfinished_stores_are_refused_and_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_BATCH", 1)
    with writer(tmp_path / "store") as target:
        target.put(IDS[0], arrays(IDS[0]))
        target.quarantine(IDS[1], "broken file")
    words = r"no finished store \(3 of 5 samples to do\); the same conversion goes on where it stopped"
    with pytest.raises(DataError, match=words):
        Store(tmp_path / "store")
    with pytest.raises(KeyError), writer(tmp_path / "store") as target:
        target.put(IDS[2], arrays(IDS[2]))
        raise KeyError
    with writer(tmp_path / "store") as target:
        assert done(target) == set(IDS[:3]) and not target.finished
        with pytest.raises(DataError, match="already in the store"):
            target.put(IDS[0], arrays(IDS[0]))
        for id in IDS[3:]:
            target.put(id, arrays(id))
    assert Store(tmp_path / "store").ids == [IDS[0], *IDS[2:]]
    with writer(tmp_path / "store") as target:
        assert target.finished and done(target) == set(IDS)
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
        assert IDS[0] not in done(target)
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
    ids = ["", "..", "/a b", "日本", "ü" * 2400]
    with writer(tmp_path, ids=ids) as target:
        for id, name in zip(ids, IDS, strict=True):
            target.put(id, arrays(name))
    found = Store(tmp_path)
    assert found.ids == ids and (found.read(4, "optical", 3) == arrays(IDS[4])["optical"][3]).all()


@pytest.mark.parametrize("limit", [1, 8000])  # at the index, and while the files are made
def test_a_disk_that_fills_up_before_the_work_is_named(tmp_path, limit):
    cannot = f"{tmp_path}.*: cannot be written .* goes on where it stopped"
    with file_limit(limit), pytest.raises(OSError, match=cannot):
        fill(tmp_path / "store")
    with pytest.raises(DataError, match="no finished store"):
        Store(tmp_path / "store")
    assert content(fill(tmp_path / "store")) == content(fill(tmp_path / "whole"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_costs_nothing_that_is_stored(tmp_path, monkeypatch, number):
    monkeypatch.setattr(store, "_BATCH", 1)
    write, calls = os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) > 9:  # in the third row, between its two images
            raise OSError(number, os.strerror(number))
        return write(*args)

    monkeypatch.setattr(os, "pwrite", full)
    words = f"{tmp_path}.*: cannot be written .{os.strerror(number)}.* goes on where it stopped"
    with pytest.raises(OSError, match=words) as failed:
        fill(tmp_path / "store")
    assert failed.value.errno == number
    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(DataError, match=r"no finished store \(3 of 5 samples to do\)"):
        Store(tmp_path / "store")
    with writer(tmp_path / "store") as target:  # in the process that still has the error and its frames
        assert failed.value and done(target) == set(IDS[:2])
    assert content(fill(tmp_path / "store")) == content(fill(tmp_path / "whole"))


def test_what_a_write_leaves_over_is_written_too(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:1000], offset))
    assert content(fill(tmp_path / "short")) == content(fill(tmp_path / "whole"))


def test_room_is_looked_for_and_taken_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**4, 10**4))
    with pytest.raises(OSError, match="the store needs 0.0 GB more, 0.0 GB are free") as error:
        fill(tmp_path / "store")
    assert error.value.errno == errno.ENOSPC and not list((tmp_path / "store").glob("*.npy"))
    monkeypatch.undo()
    with writer(tmp_path / "store") as target:
        target.put(IDS[0], arrays(IDS[0]))
    if sys.platform == "linux":
        size = os.stat(tmp_path / "store" / "optical.npy")
        assert 512 * size.st_blocks >= size.st_size > 4 * 5 * 13 * 9 * 8


def test_a_kill_while_the_files_are_made_is_survived(tmp_path, monkeypatch):
    """Also on a disk without the room for a second copy of what was made."""
    replace, usage = os.replace, namedtuple("usage", "total used free")

    def just_enough(path):
        taken = sum(512 * file.stat().st_blocks for file in path.glob("*.npy"))
        return usage(30_000, taken, 30_000 - taken)

    monkeypatch.setattr(layout.shutil, "disk_usage", just_enough)

    def killed(a, b):
        if str(b).endswith("digests.npy"):
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "store")
    monkeypatch.setattr(os, "replace", replace)
    assert (tmp_path / "store" / "sar.npy").exists() and just_enough(tmp_path / "store").used > 20_000
    with pytest.raises(DataError, match="no finished store; the same"):
        Store(tmp_path / "store")
    assert content(fill(tmp_path / "store")) == content(fill(tmp_path / "whole"))


def test_arrays_of_others_are_not_overwritten(tmp_path):
    np.save(tmp_path / "optical.npy", np.arange(3))
    with pytest.raises(DataError, match="holds optical.npy but no index.json, so no store; choose another path"):
        fill(tmp_path)
    assert np.load(tmp_path / "optical.npy").tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["state", "a/b", "", "..", "labels"])
def test_modalities_that_cannot_name_files_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="expected a name of letters, digits and _"):
        writer(tmp_path / "store", shapes={name: (1, 2, 2)})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["optical", "sar", "labels", "digests", "state", "reasons"])
def test_a_truncated_file_is_named_and_may_be_completed(tmp_path, name):
    with writer(tmp_path, labels=2) as target:
        for id in IDS:
            target.put(id, arrays(id), (0, 1))
    data, before = tmp_path / f"{name}.npy", content(tmp_path)
    whole = data.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 3, 0):
        with open(data, "r+b") as file:
            file.truncate(size)
        with pytest.raises(DataError, match=f"{name}.npy: truncated.*remove the store and convert again") as error:
            Store(tmp_path)
    data.unlink()
    with pytest.raises(DataError, match=f"{name}.npy: missing"):
        Store(tmp_path)
    with pytest.raises(DataError, match=f"{name}.npy: missing; remove the store"):  # not with empty arrays as finished
        writer(tmp_path, labels=2)
    data.write_bytes(whole)  # in the process that still has the error and its frames
    assert error.value and Store(tmp_path).ids == IDS and content(tmp_path) == before


def test_another_array_in_a_files_place_is_named(tmp_path):
    fill(tmp_path)
    np.save(tmp_path / "sar.npy", np.zeros((5, 4, 3, 9, 8), np.uint8))
    with pytest.raises(DataError, match=r"sar.npy: uint8 \(5, 4, 3, 9, 8\), expected \|u1 \(5, 4, 2, 9, 8\)"):
        Store(tmp_path)


@pytest.mark.parametrize("part", [None, "part-0003-of-0016"])
def test_stores_of_the_earlier_format_are_named(tmp_path, part):
    (tmp_path / (part or ".")).mkdir(exist_ok=True)
    (tmp_path / (part or ".") / "data.mdb").write_bytes(b"pages")
    for opened in (Store, fill):
        with pytest.raises(DataError, match="a store of an earlier version .data.mdb.; remove it and convert again"):
            opened(tmp_path)


def test_a_finished_store_on_a_read_only_disk_is_read(tmp_path, monkeypatch):
    fill(tmp_path)
    open_ = open

    def refused(file, mode="r", *args, **options):
        if set(mode) & set("wax+"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return open_(file, mode, *args, **options)

    monkeypatch.setattr("builtins.open", refused)
    assert Store(tmp_path).ids == IDS
    with writer(tmp_path) as target:  # as a conversion does that finds everything done
        assert target.finished


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_two_writers_of_one_part_are_refused(tmp_path, shard):
    with writer(tmp_path, shard=shard) as target:
        with pytest.raises(RuntimeError, match="in use by another process"):
            writer(tmp_path, shard=shard)
        if shard[1] > 1:
            with writer(tmp_path, shard=(0, 2)) as other:  # side by side
                assert [*other.span] == [0, 1] and [*target.span] == [2, 3, 4]


def test_missing_and_foreign_stores_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing: no finished store"):
        Store(tmp_path / "nothing")
    for text in ("not an index", "[]", "{}", '{"format": 4}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(DataError, match="no store that can be read; remove it and convert again"):
            Store(tmp_path)


def _put_until_killed(path):
    store._BATCH = 1
    with writer(path) as target:
        for id in IDS:
            if id not in done(target):
                target.put(id, arrays(id))
                if len(done(target)) % 3 == 0:
                    os.kill(os.getpid(), 9)


def test_committed_ids_survive_a_kill(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_put_until_killed, args=(tmp_path / "killed",))
    process.start()
    process.join()
    assert process.exitcode == -9
    with writer(tmp_path / "killed") as target:
        assert done(target) == set(IDS[:3])
    assert content(fill(tmp_path / "killed")) == content(fill(tmp_path / "whole"))

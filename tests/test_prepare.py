"""From a profile to stores: the published path and the miniature world's end in the same form."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import file_limit

from decur_core import config
from decur_core.data import datasets, prepare
from decur_core.data.bigearthnet import BigEarthNetMM
from decur_core.data.convert import convert
from decur_core.data.modality import OPTICAL, SAR
from decur_core.data.raster import Reader
from decur_core.data.ssl4eo import SSL4EOS12
from decur_core.data.store import Store
from decur_core.data.sunrgbd import AsHHA

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WORLD = {"locations": 10, "through_files": 3, "train": 6, "test": 5, "tile": 36}


@pytest.fixture
def settings(tmp_path):
    return config.load("start", {"batch_size": 4, "world": WORLD, "data.stores": str(tmp_path)})


def test_some_locations_pass_through_published_files_and_all_agree_with_the_world(settings, tmp_path):
    reader, world = prepare.pairs(settings), prepare.world(settings)
    assert reader.ids == world.ids and len(reader) == 10
    (tree,) = tmp_path.glob("**/ssl4eo")
    assert len(SSL4EOS12(tree)) == 3 and len(list((tree / "s2c").glob("*/*/*.tif"))) == 3 * 4 * 13
    for i in (0, 2, 3, 9):
        for name in ("sar", "optical"):
            np.testing.assert_array_equal(reader[i][name], world[i][name])


def test_stores_hold_what_the_readers_give(settings):
    store = Store(prepare.pretraining_store(settings))
    reader = prepare.pairs(settings)
    assert store.ids == reader.ids and store.seasons == 4
    for modality in (SAR, OPTICAL):
        expected = modality.encode(reader[7][modality.name])
        found = np.stack([store.read(7, modality.name, s) for s in range(4)])
        np.testing.assert_array_equal(found, expected)


def test_patches_are_split_labelled_and_through_files(settings, tmp_path):
    stores = {k: Store(p) for k, p in prepare.labelled_stores(settings, "bigearthnet").items()}
    assert [len(stores[k]) for k in ("train", "test")] == [6, 5]
    assert not set(stores["train"].ids) & set(stores["test"].ids)
    (tree,) = tmp_path.glob("**/bigearthnet")
    for split, store in stores.items():
        written = BigEarthNetMM(tree, split)
        assert written.ids == store.ids[:3]
        np.testing.assert_array_equal(written[1]["labels"], store.labels[1].astype(bool))


def test_a_finished_store_is_used_without_its_source(settings, monkeypatch):
    path = prepare.pretraining_store(settings)
    monkeypatch.setattr(prepare.conversion, "convert", lambda *a, **k: pytest.fail("converted again"))
    assert prepare.pretraining_store(settings) == path


@pytest.mark.parametrize(
    ("pair", "dataset", "split", "count"),
    [("rgb_dem", "geonrw", "train", 48), ("rgb_dem", "geonrw", "test", 16), ("rgb_depth", "sunrgbd", "all", 11)]
    + [("rgb_depth", "sunrgbd", "test", 5), ("rgb_depth", "nyuv2", "train", 6), ("rgb_depth", "nyuv2", "test", 5)],
)
def test_other_pairs_pass_through_published_files_and_agree_with_their_world(pair, dataset, split, count, tmp_path):
    world = WORLD | ({"locations": 48, "through_files": 20, "test": 16} if pair == "rgb_dem" else {"locations": 6})
    options = {"batch_size": 4, "world": world, "data.stores": str(tmp_path), "transfer.inputs": ["both"]}
    settings = config.load("start", options, pair=pair)
    store, reader = Store(prepare.store(settings, dataset, split)), prepare.reader(settings, dataset, split)
    assert store.ids == reader.ids and len(store) == count and len(set(store.ids)) == count
    assert not store.meta["quarantined"]
    made = prepare.world(settings, dataset, split)
    parts = prepare.miniature(datasets.find(dataset)).parts(settings.world)
    part = parts[split] if split in parts else range(count)
    for i in (0, count - 1):
        item, drawn = reader[i], made[part[i]]
        for name in item.keys() & drawn.keys() - {"id"}:
            np.testing.assert_array_equal(item[name], drawn[name], err_msg=name)
        np.testing.assert_array_equal(store.read(i, "mask", 0)[0], item["mask"])
        np.testing.assert_array_equal(store.read(i, "rgb", 0), item["rgb"])
    first, second = datasets.modalities_of(pair)
    assert set(store.shapes) == {first.name, second.name, "mask"}
    if pair == "rgb_dem":
        np.testing.assert_array_equal(store.read(0, "dem", 0), second.encode(reader[0]["dem"]))
    if split in ("train", "all") and dataset == datasets.pretraining(pair).name:
        factors, seen_by = prepare.known_factors(settings)
        assert all(len(values) == count for values in factors.values()) and set(seen_by) <= set(factors)
        assert set(seen_by.values()) == {"common", first.name, second.name}


def test_a_mapping_is_that_of_the_pretraining_images_whichever_store_is_made_first(tmp_path):
    options = {"batch_size": 4, "world": WORLD, "data.processes": 0}
    made = [
        config.load("start", options | {"data.stores": str(tmp_path / name)}, pair="mine") for name in ("one", "other")
    ]
    paths = {}
    for settings, order in zip(made, (("train", "test"), ("test", "train")), strict=True):
        for split in order:
            paths.setdefault(split, []).append(prepare.store(settings, "mine", split))
    one, *others = (Store(path).meta["preprocessing"] for both in paths.values() for path in both)
    assert one["radar"]["scheme"] == "range_8bit" and all(other == one for other in others)


def test_command_line_tries_again_what_is_quarantined(tmp_path):
    options = ["start", "--set", f"data.stores={tmp_path}", "batch_size=4"]
    options.append("world={locations: 8, through_files: 8, tile: 36}")
    settings = config.load("start", config.overrides(options[2:]))
    prepare.pairs(settings)
    file = next(prepare._stores(settings).glob("world/**/0000005/*/B8.tif"))
    whole = file.read_bytes()
    file.write_bytes(whole[:900])
    with pytest.raises(SystemExit, match="1 of 8 samples are quarantined, more than 5%, last 0000005: .*--retry"):
        prepare.main(options)
    prepare.main([*options, "--allowed", "0.2"])
    (folder,) = tmp_path.glob("start/ssl4eo-*")
    assert list(Store(folder).meta["quarantined"]) == ["0000005"]
    prepare.main(options)
    assert len(Store(folder)) == 7  # a finished one is used as it is
    file.write_bytes(whole)
    prepare.main([*options, "--retry"])
    assert len(Store(folder)) == 8 and not Store(folder).meta["quarantined"]
    prepare.main([*options, "--retry"])


def test_rooms_of_other_sizes_are_brought_to_one_after_hha():
    class Reader:
        ids = ["a", "b"]

        def __getitem__(self, i):
            height, width = (30, 40) if i else (60, 80)
            depth = np.full((1, height, width), 2.0, np.float32)
            camera = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
            rgb = np.zeros((3, height, width), np.uint8)
            rgb[0, :, width // 2 :] = 200
            mask = np.where(rgb[0] > 0, 2, 1).astype(np.uint8)
            down = np.array([0.0, 1.0, 0.0])
            return {"id": str(i), "rgb": rgb, "depth": depth, "intrinsics": camera, "gravity": down, "mask": mask}

    rooms = AsHHA(Reader(), (30, 40))
    large, small = rooms[0], rooms[1]
    for name in ("rgb", "hha", "mask"):
        assert large[name].shape[-2:] == (30, 40) and large[name].dtype == np.uint8
    np.testing.assert_array_equal(large["mask"], small["mask"])
    assert set(np.unique(large["mask"])) == {1, 2}
    assert np.abs(large["hha"].astype(int) - small["hha"])[0].max() <= 1, "disparity does not depend on the size"


class Rooms(Reader):
    ids = ["a", "b"]

    def __getitem__(self, i):
        return {"id": self.ids[i], **{name: np.full((3, 24, 32), 100, np.uint8) for name in ("rgb", "hha")}}


def test_a_store_of_another_size_than_the_settings_is_refused(tmp_path):
    """Its runs would be recorded with a size that their images did not have."""
    where = {"data": {"source": "published", "stores": str(tmp_path), "rgbd_height": 24, "rgbd_width": 32}}
    mappings = {m.name: m for m in datasets.find("nyuv2").modalities}
    convert(Rooms(), tmp_path / "start" / "nyuv2-published-train", preprocessing=mappings)
    settings = config.load("start", where, pair="rgb_depth")
    assert len(Store(prepare.store(settings, "nyuv2", "train"))) == 2
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"rgbd_height": 48})})
    with pytest.raises(
        config.ConfigError, match="train: holds images of 24 x 32 px; remove it, or set data.rgbd_height"
    ):
        prepare.store(other, "nyuv2", "train")


def test_command_line_converts_in_parts_and_verifies(tmp_path, capsys):
    options = [f"data.stores={tmp_path}", "batch_size=4", "world={locations: 10, through_files: 0, tile: 36}"]
    for shard in ("0/2", "1/2"):
        prepare.main(["start", "--shard", shard, "--set", *options])
    settings = config.load(
        "start", {"batch_size": 4, "data.stores": str(tmp_path), "world": WORLD | {"through_files": 0}}
    )
    (folder,) = tmp_path.glob("start/ssl4eo-*")
    assert len(Store(folder)) == 10 and Store(folder).ids == prepare.pairs(settings).ids
    prepare.main(["start", "--verify", "--set", *options])
    (data,) = sorted(folder.rglob("optical*.npy"))[:1]
    data.write_bytes(data.read_bytes()[:9000])
    with pytest.raises(SystemExit) as caught:
        prepare.main(["start", "--verify", "--set", *options])
    assert caught.value.code not in (0, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "cifar"], "dataset = 'cifar'.*data sets of pair sar_optical: ssl4eo, bigearthnet"),
        (["--dataset", "geonrw", "--verify"], "data sets of pair sar_optical"),
        (["--split", "train"], "split = 'train'.*splits: all"),
        (["--dataset", "bigearthnet", "--split", "val"], "splits: train, test, all"),
    ],
)
def test_what_a_pair_does_not_have_is_named(tmp_path, options, words):
    with pytest.raises(SystemExit, match=words):
        prepare.main(["start", *options, "--set", f"data.stores={tmp_path}"])


@pytest.mark.parametrize("shard", ["1", "a/b", "1/2/3"])
def test_a_shard_of_another_form_is_named(capsys, shard):
    with pytest.raises(SystemExit):
        prepare.main(["start", "--shard", shard])
    assert "--shard" in capsys.readouterr().err


@pytest.mark.parametrize(("pair", "name"), [("sar_optical", "ssl4eo"), ("rgb_dem", "geonrw")])
def test_a_tree_that_finds_no_room_is_none_and_written_anew(tmp_path, pair, name):
    overrides = {"batch_size": 4, "world": WORLD | {"through_files": 16, "locations": 16}, "data.stores": str(tmp_path)}
    settings = config.load("start", overrides, pair=pair)
    cannot = rf"/{name}: cannot be written \(File too large\); make room and run"
    with file_limit(3000), pytest.raises(OSError, match=cannot):
        prepare.pairs(settings)
    assert not list(tmp_path.glob(f"**/{name}"))
    reader, world = prepare.pairs(settings), prepare.world(settings)
    for i, sensor in [(k, m) for k in (0, 15) for m in ("sar", "optical", "rgb", "dem") if m in world[k]]:
        np.testing.assert_array_equal(reader[i][sensor], world[i][sensor])


def test_a_tree_that_another_process_has_just_written_is_taken(settings, monkeypatch):
    locked = prepare.runs.locked

    @contextlib.contextmanager
    def later(folder, **options):  # the other one ends between the look and the lock
        monkeypatch.setattr(prepare.runs, "locked", locked)
        prepare.pairs(settings)
        with locked(folder, **options):
            yield

    monkeypatch.setattr(prepare.runs, "locked", later)
    assert prepare.pairs(settings).ids == prepare.world(settings).ids


def test_drivers_that_start_together_wait_for_each_others_trees(settings):
    """Each writes another data set of one world; a thread stands in for the second process (locks are per opening)."""
    with ThreadPoolExecutor(2) as pool:
        whole = list(pool.map(lambda dataset: len(prepare.reader(settings, dataset, "train")), ["bigearthnet"] * 2))
        folder = next((prepare.config.ROOT / settings.data.stores).glob("**/world/*"))
        with prepare.runs.locked(folder):
            other = pool.submit(prepare.reader, settings, "ssl4eo", "all")
            time.sleep(0.3)
            assert not other.done() and not (folder / "ssl4eo").exists()
        assert len(other.result(60)) == settings.world.locations and whole == [settings.world.train] * 2


def test_real_samples_split_by_the_official_list(tmp_path):
    if not (SHARED / "bigearthnet_real").is_dir():
        pytest.skip(f"{SHARED} is not here")
    settings = config.load("samples", {"data.stores": str(tmp_path), "data.samples": str(SHARED)})
    train, test = (prepare.reader(settings, "bigearthnet", k) for k in ("train", "test"))
    assert len(train) == 2 and len(test) == 2 and not set(train.ids) & set(test.ids)
    assert len(prepare.pairs(settings)) == 24


def test_missing_data_is_named(tmp_path):
    settings = config.load("a100", {"data.roots": {"ssl4eo": str(tmp_path / "nowhere")}, "data.stores": str(tmp_path)})
    with pytest.raises(ValueError, match="nowhere"):
        prepare.pretraining_store(settings)

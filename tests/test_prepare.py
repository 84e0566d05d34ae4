"""From a profile to stores: the published path and the miniature world's end in the same form."""

from pathlib import Path

import numpy as np
import pytest

from decur_core import config
from decur_core.data import prepare
from decur_core.data.bigearthnet import BigEarthNetMM
from decur_core.data.ssl4eo import SSL4EOS12
from decur_core.data.store import Store
from decur_core.pairs import PAIRS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WORLD = {"locations": 10, "through_files": 3, "train": 6, "test": 5, "tile": 36}


@pytest.fixture
def settings(tmp_path):
    return config.load("start", {"batch_size": 4, "world": WORLD, "data.stores": str(tmp_path)})


def test_some_locations_pass_through_published_files_and_all_agree_with_the_world(settings, tmp_path):
    reader, world = prepare.pairs(settings), prepare.world(settings)
    assert reader.ids == world.ids and len(reader) == 10
    (tree,) = tmp_path.glob("**/ssl4eo-s12")
    assert len(SSL4EOS12(tree)) == 3 and len(list((tree / "s2c").glob("*/*/*.tif"))) == 3 * 4 * 13
    for i in (0, 2, 3, 9):
        for name in ("sar", "optical"):
            np.testing.assert_array_equal(reader[i][name], world[i][name])


def test_stores_hold_what_the_readers_give(settings):
    store = Store(prepare.pretraining_store(settings))
    reader = prepare.pairs(settings)
    assert store.ids == reader.ids and store.seasons == 4
    for modality in PAIRS["sar_optical"]:
        expected = modality.preprocessing.encode(reader[7][modality.name])
        found = np.stack([store.read(7, modality.name, s) for s in range(4)])
        np.testing.assert_array_equal(found, expected)


def test_patches_are_split_labelled_and_through_files(settings, tmp_path):
    stores = {k: Store(p) for k, p in prepare.patch_stores(settings).items()}
    assert [len(stores[k]) for k in ("train", "test")] == [6, 5]
    assert not set(stores["train"].ids) & set(stores["test"].ids)
    (tree,) = tmp_path.glob("**/bigearthnet")
    for split, store in stores.items():
        written = BigEarthNetMM(tree, split)
        assert written.ids == store.ids[:3]
        np.testing.assert_array_equal(written[1]["labels"], store.labels[1].astype(bool))


def test_a_finished_store_is_used_without_its_source(settings, monkeypatch):
    path = prepare.pretraining_store(settings)
    monkeypatch.setattr(prepare, "convert", lambda *a, **k: pytest.fail("converted again"))
    assert prepare.pretraining_store(settings) == path


def test_real_samples_split_by_the_official_list(tmp_path):
    if not (SHARED / "bigearthnet_real").is_dir():
        pytest.skip(f"{SHARED} is not here")
    settings = config.load("samples", {"data.stores": str(tmp_path), "data.samples": str(SHARED)})
    train, test = prepare.patches(settings, "train"), prepare.patches(settings, "test")
    assert len(train) == 2 and len(test) == 2 and not set(train.ids) & set(test.ids)
    assert len(prepare.pairs(settings)) == 24


def test_missing_data_is_named(tmp_path):
    settings = config.load("a100", {"data.ssl4eo": str(tmp_path / "nowhere"), "data.stores": str(tmp_path)})
    with pytest.raises(ValueError, match="nowhere"):
        prepare.pretraining_store(settings)

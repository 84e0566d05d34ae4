"""The three-sensor world: each factor is read by the sensors that carry it, shares are met, scenes have labels."""

import pickle
from functools import lru_cache

import numpy as np
import pytest
import torch

from decur_core import config
from decur_core.data import datasets, prepare
from decur_core.data.modality import DEM, OPTICAL, SAR
from decur_core.data.raster import DataError
from decur_core.data.store import Store
from decur_core.explain.probes import supervised_r2
from decur_core.worlds.sar_optical import BARE, BUILT, VEGETATED, WATER
from decur_core.worlds.three import CLASSES, FACTORS, SceneWorld, ThreeWorld, draw_ground

MODALITIES = {m.name: m for m in (SAR, OPTICAL, DEM)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and type(a[k]) is type(b[k]) for k in a)


@lru_cache(maxsize=1)
def encoded(locations: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The images that training sees, uint8 (locations, 2, C, 36, 36) per modality, and the factors (locations, 9)."""
    world = ThreeWorld(locations, seasons=2, seed=5)
    items = [{m: v.encode(item[m]) for m, v in MODALITIES.items()} for item in world]
    target = torch.from_numpy(np.stack(list(world.factors.values()), 1))
    return {m: torch.from_numpy(np.stack([item[m] for item in items])) for m in MODALITIES}, target


def check_admission(modality: str, *, train: int, test: int, steps: int) -> None:
    everything, target = encoded(train + test)
    images, rest = everything[modality], torch.arange(train, train + test)

    def view(rows, step, generator):
        season = torch.randint(2, (64,), generator=generator)
        return images[rows, season].flip([axis for bit, axis in ((1, -1), (2, -2)) if step & bit]) / 255

    r2 = supervised_r2(view, images[rest, rest % 2] / 255, target, train, steps=steps)
    r2 = dict(zip(FACTORS, r2.tolist(), strict=True))
    for name, owner in FACTORS.items():
        if owner == "common" or modality in owner.split("+"):
            assert r2[name] >= 0.85, r2
        else:
            assert r2[name] <= 0.1, r2


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_factor_is_readable_where_it_should_be_and_nowhere_else(modality):
    check_admission(modality, train=1800, test=400, steps=340)


@pytest.mark.soak
@pytest.mark.parametrize("modality", MODALITIES)
def test_factor_admission_long(modality):
    check_admission(modality, train=3000, test=1000, steps=600)


def test_there_are_factors_for_all_for_each_pair_and_for_each_alone():
    pairs = {"sar+optical", "sar+dem", "optical+dem"}
    assert set(FACTORS.values()) == {"common", *pairs, *MODALITIES}


@pytest.mark.parametrize("tile", [12, 24, 36, 60])
def test_scene_fractions_are_the_factors(tile):
    world = ThreeWorld(20, tile=tile, seed=3)
    for i in range(20):
        (cover, *_), woods, terrain = draw_ground(*world._draw(i, 0), world.tile)
        assert set(np.unique(cover)) == {BARE, WATER, BUILT, VEGETATED} and not (woods & (cover == BUILT)).any()
        for where, name, low, span in (
            (cover == BUILT, "built_up", 0.08, 0.27), (cover == WATER, "water", 0.02, 0.38), (woods, "woods", 0.05, 0.3)
        ):  # fmt: skip
            assert abs(where.sum() - (low + span * (world.factors[name][i] + 1) / 2) * tile**2) <= 0.51
        assert abs(terrain.std() - 1) < 1e-5 and abs(terrain.mean()) < 1e-5


def test_the_ground_is_what_each_sensor_shows_of_it():
    world = ThreeWorld(12, seed=4)
    for i in range(12):
        (layout, woods, _), item = draw_ground(*world._draw(i, 0), world.tile), world[i]
        water, built = (layout.cover == kind for kind in (WATER, BUILT))
        land = ~water & ~built
        for vv, optical, dem in zip(item["sar"][:, 0], item["optical"], item["dem"][:, 0], strict=True):
            assert vv[water].mean() + 4 < vv[land].mean() < vv[built].mean() - 2
            assert optical[7][water & ~woods].mean() < optical[7][land & ~woods].mean()
            assert dem[woods].mean() > dem[built].mean() > dem[land & ~woods].mean() + 2
        # Where a sensor is blind, it sees the same on both sides.
        assert abs(dem[water & ~woods].mean() - dem[land & ~woods].mean()) < 3 * dem[land & ~woods].std()


def test_location_depends_on_seed_stream_and_index_only():
    few, many = ThreeWorld(3, seed=7), ThreeWorld(50, seed=7)
    many[40]
    assert all(same(many[i], few[i]) for i in (2, 0, 1))
    assert same(pickle.loads(pickle.dumps(many))[30], many[30])
    for other in (ThreeWorld(3, seed=8), ThreeWorld(3, seed=7, stream=3)):
        assert not np.array_equal(other[0]["sar"], few[0]["sar"])
    assert all(np.array_equal(many.factors[name][:3], few.factors[name]) for name in FACTORS)


def test_items_have_the_form_of_the_readers_and_realistic_values():
    world = ThreeWorld(40, tile=24, seasons=3, seed=1)
    items = list(world)
    assert world.ids[7] == items[7]["id"] == "0000007" and len(world) == 40
    for name, modality in MODALITIES.items():
        images = np.stack([item[name] for item in items])
        assert images.shape == (40, 3, len(modality.bands), 24, 24) and images.dtype == np.float32
        assert modality.encode(images).std() > 20
    assert {len(times) for item in items for times in item["dates"].values()} == {3}
    assert all((item["dem"] == item["dem"][:1]).all() for item in items)
    sar = np.stack([item["sar"] for item in items])
    assert abs(sar.mean((0, 1, 3, 4)) - SAR.mean).max() < 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"locations": 0}, "locations = 0"),
        ({"seasons": 5}, "seasons = 5.*1 to 4"),
        ({"seed": -1}, "seed = -1"),
        ({"stream": 1.5}, "stream = 1.5"),
        ({"tile": 32}, "tile = 32.*steps of 6"),
        ({"tile": 6}, "tile = 6: .*, 12 to"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ThreeWorld(**{"locations": 2} | settings)
    with pytest.raises(IndexError, match="world of 2"):
        ThreeWorld(2)[2]


def test_labels_follow_from_factors_of_every_kind():
    world = SceneWorld(3000, seed=2)
    share = world.labels.mean(0)
    assert world.labels.shape == (3000, len(CLASSES)) and ((share > 0.1) & (share < 0.6)).all()
    assert {name for rule in CLASSES.values() for name in rule} == set(FACTORS)
    f, item = world.factors, world[5]
    towers = (f["built_up"] >= -0.2) & (f["building_height"] >= 0.2)
    assert np.array_equal(world.labels[:, list(CLASSES).index("towers")], towers)
    assert item["sar"].shape == (2, 36, 36) and item["labels"].dtype == bool and item.keys() >= MODALITIES.keys()
    assert not np.array_equal(item["sar"], ThreeWorld(6, seed=2)[5]["sar"][0])


def test_scenes_are_drawn_and_never_read(tmp_path):
    options = {"batch_size": 4, "data.stores": str(tmp_path)}
    options["world"] = {"locations": 6, "through_files": 3, "train": 5, "test": 4, "tile": 24}
    settings = config.load("start", options, pair="sar_optical_dem")
    stores = {k: Store(path) for k, path in prepare.labelled_stores(settings, "three_scenes").items()}
    assert [len(stores[k]) for k in ("train", "test")] == [5, 4] and not set(stores["train"].ids) & set(
        stores["test"].ids
    )
    world = prepare.world(settings, "three_scenes").reader
    for split, first in (("train", 0), ("test", 5)):
        assert np.array_equal(stores[split].labels, world.labels[first : first + len(stores[split])])
        assert np.array_equal(stores[split].read(1, "dem", 0), DEM.encode(world[first + 1]["dem"]))
    assert not list(tmp_path.glob("**/world/**/three_scenes"))
    with pytest.raises(DataError, match="three_scenes is drawn and has no files.*data.source: world"):
        datasets.find("three_scenes").read(tmp_path, "train", missing="skip")

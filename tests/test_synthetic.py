"""The miniature world: its factors can be read, its files are what the readers expect, and it is deterministic."""

import json
import pickle
from functools import lru_cache

import numpy as np
import pytest
import rasterio
import torch

from decur_core.data.bigearthnet import CLASS_OF, CLASSES_19, BigEarthNetMM
from decur_core.data.modality import OPTICAL, SAR
from decur_core.data.ssl4eo import SSL4EOS12
from decur_core.explain.probes import supervised_r2
from decur_core.worlds.files import write_bigearthnet, write_ssl4eo
from decur_core.worlds.sar_optical import (
    BUILT,
    FACTORS,
    LABEL_RULES,
    LAND_COVER,
    LAYOUTS,
    WATER,
    BigEarthNetWorld,
    World,
    factors,
)

MODALITIES = {"sar": SAR, "optical": OPTICAL}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and type(a[k]) is type(b[k]) for k in a)


def cover_of(world: World, i: int) -> np.ndarray:
    """Land cover of location i of a coregistered world: int (tile, tile), indices into LAND_COVER."""
    return world._layouts(*world._draw(i, 0))[0].cover


@lru_cache(maxsize=1)
def encoded(layout: str, locations: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The images that training sees, uint8 (locations, 4, C, 36, 36) per modality, and the factors (locations, 7)."""
    world = World(locations, layout=layout, seed=5)
    images = {m: [] for m in MODALITIES}
    for i in range(locations):
        item = world[i]
        for modality, preprocessing in MODALITIES.items():
            images[modality].append(preprocessing.encode(item[modality]))
    target = torch.from_numpy(np.stack(list(world.factors.values()), 1))
    return {m: torch.from_numpy(np.stack(views)) for m, views in images.items()}, target


def read_factors(images: torch.Tensor, target: torch.Tensor, train: int, *, steps: int) -> dict[str, float]:
    seasons, rest = images.shape[1], torch.arange(train, len(images))

    def view(rows, step, generator):
        season = torch.randint(seasons, (64,), generator=generator)
        return images[rows, season].flip([axis for bit, axis in ((1, -1), (2, -2)) if step & bit]) / 255

    r2 = supervised_r2(view, images[rest, rest % seasons] / 255, target, train, steps=steps)
    return dict(zip(FACTORS, r2.tolist(), strict=True))


def check_admission(layout: str, modality: str, *, train: int, test: int, steps: int) -> None:
    images, target = encoded(layout, train + test)
    r2 = read_factors(images[modality], target, train, steps=steps)
    for name, owner in FACTORS.items():
        if owner in ("common", modality):
            assert r2[name] >= 0.85, r2
        else:
            assert r2[name] <= 0.1, r2


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_factor_is_readable_where_it_should_be_and_nowhere_else(modality):
    check_admission("coregistered", modality, train=1500, test=400, steps=220)


@pytest.mark.soak
@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_factor_admission_long(layout, modality):
    check_admission(layout, modality, train=3000, test=1000, steps=600)


@pytest.mark.parametrize("tile", [12, 18, 24, 30, 36, 42, 120])
def test_scene_fractions_are_the_factors(tile):
    world = World(20, tile=tile, seed=3)
    for i in range(20):
        cover = cover_of(world, i)
        assert set(np.unique(cover)) == set(range(len(LAND_COVER)))
        for cls, name, low, span in ((WATER, "water", 0.02, 0.38), (BUILT, "built_up", 0.03, 0.24)):
            share = low + span * (world.factors[name][i] + 1) / 2
            assert abs((cover == cls).sum() - share * tile**2) <= 0.51
    assert world[0]["optical"].shape == (4, 13, tile, tile)


def test_both_sensors_show_one_scene():
    world = World(20, seed=4)
    for i in range(20):
        cover, item = cover_of(world, i), world[i]
        vv, nir = item["sar"][:, 0], item["optical"][:, 7]
        water, land = cover == WATER, (cover != WATER) & (cover != BUILT)
        assert (vv[:, water].mean(1) + 4 < vv[:, land].mean(1)).all()
        assert (nir[:, water].mean(1) < nir[:, land].mean(1)).all()
        assert (vv[:, cover == BUILT].mean(1) > vv[:, land].mean(1) + 2).all()


def test_redrawn_scenes_lie_elsewhere_in_every_view():
    item = World(1, layout="redrawn", seed=4)[0]
    water = [view[0] < np.quantile(view[0], 0.1) for view in item["sar"]]
    water += [view[7] < np.quantile(view[7], 0.1) for view in item["optical"]]
    shared = [(a & b).sum() / (a | b).sum() for k, a in enumerate(water) for b in water[:k]]
    assert max(shared) < 0.4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_location_depends_on_seed_and_index_only(layout):
    few, many = World(3, layout=layout, seed=7), World(50, layout=layout, seed=7)
    many[40]
    assert all(same(many[i], few[i]) for i in (2, 0, 1))
    assert same(pickle.loads(pickle.dumps(many))[30], many[30])
    assert not np.array_equal(World(3, layout=layout, seed=8)[0]["sar"], few[0]["sar"])
    assert all(np.array_equal(many.factors[name][:3], few.factors[name]) for name in FACTORS)
    assert not np.array_equal(BigEarthNetWorld(1, seed=7)[0]["sar"], few[0]["sar"][0])


def test_factors_are_uniform_and_independent():
    values = np.stack(list(factors(20000, seed=1).values()))
    assert values.dtype == np.float32 and abs(values).max() <= 1
    assert np.allclose(values.mean(1), 0, atol=0.02) and np.allclose(values.var(1), 1 / 3, atol=0.01)
    assert abs(np.corrcoef(values) - np.eye(len(FACTORS))).max() < 0.03


def test_items_have_the_form_of_the_readers_and_realistic_values():
    world = World(100, tile=24, seasons=2, seed=1)
    assert len(world) == 100 and world.ids[7] == "0000007" and len(list(world)) == 100
    items = [world[i] for i in range(100)]
    sar, optical = (np.stack([item[m] for item in items]) for m in ("sar", "optical"))
    assert sar.shape == (100, 2, 2, 24, 24) and optical.shape == (100, 2, 13, 24, 24)
    assert sar.dtype == optical.dtype == np.float32 and len(items[0]["dates"]["sar"]) == 2
    axes = (0, 1, 3, 4)
    assert abs(sar.mean(axes) - SAR.mean).max() < 1.5 and abs(sar.std(axes) - SAR.std).max() < 1.5
    # SSL4EO-S12, level 1C, without clouds as thick as there: within a factor of 2 of the band means, B10 tens of counts
    means = [1606, 1391, 1315, 1364, 1549, 2092, 2372, 2300, 2560, 830, 22, 2177, 1524]
    ratio = optical.mean(axes) / means
    assert ((ratio > 0.5) & (ratio < 2) | (np.arange(13) == 10)).all() and 10 < optical[:, :, 10].mean() < 200
    for preprocessing, images in ((SAR, sar), (OPTICAL, optical)):
        encoded = preprocessing.encode(images)
        assert ((encoded == 255).mean(axes) < 0.05).all()
        assert (np.delete(encoded.std(axes), 10 if images is optical else []) > 6).all()


def test_labels_follow_from_factors_of_every_kind():
    world = BigEarthNetWorld(3000, seed=2)
    share = world.labels.mean(0)
    used = share > 0
    assert used.sum() == 13 and ((share[used] > 0.05) & (share[used] < 0.6)).all()
    assert world.labels.any(1).all() and len(set(world.ids)) == 3000
    assert {owner for _, rule in LABEL_RULES for owner in map(FACTORS.get, rule)} == {"common", "sar", "optical"}
    f = world.factors
    pastures = (f["greenness"] >= 0) & (f["ratio"] < 0)
    assert np.array_equal(world.labels[:, CLASSES_19.index("Pastures")], pastures)
    dropped = [i for i in range(200) if f["built_up"][i] >= 0.85]
    assert dropped and all("Road and rail networks and associated land" in world.corine(i) for i in dropped)
    assert all(name in CLASS_OF for name, _ in LABEL_RULES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"locations": 0}, "locations = 0"),
        ({"locations": 2.0}, "locations = 2.0"),
        ({"seasons": 5}, "seasons = 5.*1 to 4"),
        ({"seed": -1}, "seed = -1"),
        ({"tile": 32}, "tile = 32.*steps of 6"),
        ({"tile": 6}, "tile = 6: .*, 12 to"),
        ({"layout": "random"}, "layout = 'random'.*coregistered, redrawn"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        World(**{"locations": 2} | settings)


def test_index_beyond_the_world_is_refused():
    world = World(2)
    for i in (2, -1):
        with pytest.raises(IndexError, match="world of 2"):
            world[i]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ssl4eo_tree_reads_back_exactly(tmp_path, layout):
    world = World(12, seed=11, layout=layout)
    write_ssl4eo(tmp_path, world, range(3, 12))
    data = SSL4EOS12(tmp_path)
    assert data.ids == world.ids[3:]
    assert all(same(data[i], world[i + 3]) for i in range(9))

    seasons = [sorted(p.name for p in (tmp_path / "s1" / i).iterdir()) for i in data.ids]
    assert any(names != sorted(names, key=lambda name: name[17:32]) for names in seasons)
    sizes = {}
    for path in (tmp_path / "s2c" / data.ids[0]).glob("*/*.tif"):
        with rasterio.open(path) as file:
            sizes[path.stem] = file.shape
            assert file.dtypes == ("uint16",) and file.crs.to_epsg() == 4326 and file.nodata is None
    assert set(sizes) == set(OPTICAL.bands)
    assert (sizes["B2"], sizes["B8A"], sizes["B10"]) == ((36, 36), (18, 18), (6, 6))


def test_bigearthnet_tree_reads_back_exactly(tmp_path):
    world = BigEarthNetWorld(10, seed=12)
    write_bigearthnet(tmp_path, world, {"train": range(5), "val": [5], "test": range(6, 10)})
    for split, indices in (("train", range(5)), ("val", [5]), ("test", range(6, 10))):
        data = BigEarthNetMM(tmp_path, split)
        assert data.ids == [world.ids[i] for i in indices]
        assert all(same(data[k], world[i]) for k, i in enumerate(indices))
    assert not world[0]["optical"][10].any()

    s2, s1 = (tmp_path / "bigearthnet-val.csv").read_text().strip().split(",")
    assert s1 == world.sar_name(5)
    metadata = {
        name: json.loads((tmp_path / folder / name / f"{name}_labels_metadata.json").read_text())
        for folder, name in (("BigEarthNet-v1.0", s2), ("BigEarthNet-S1-v1.0", s1))
    }
    assert metadata[s2]["labels"] == metadata[s1]["labels"] == world.corine(5)
    assert metadata[s1]["corresponding_s2_patch"] == s2
    with rasterio.open(tmp_path / "BigEarthNet-v1.0" / s2 / f"{s2}_B01.tif") as file:
        assert file.crs.to_epsg() == 32633 and file.shape == (6, 6)

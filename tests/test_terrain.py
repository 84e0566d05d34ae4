"""The miniature RGB-DEM world: its factors can be read, its files are what readers expect, and it is deterministic."""

import pickle
from functools import lru_cache

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from decur_core.data.geonrw import CLASSES, SPLITS, GeoNRW
from decur_core.data.modality import DEM, RGB
from decur_core.explain.probes import supervised_r2
from decur_core.worlds.terrain import (
    BUILDING,
    FACTORS,
    FIELD,
    FOREST,
    MEADOW,
    PER_CITY,
    REMOVED,
    ROAD,
    WATER,
    YARD,
    TerrainWorld,
    write_geonrw,
)

MODALITIES = {"rgb": RGB, "dem": DEM}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and type(a[k]) is type(b[k]) for k in a)


@lru_cache(maxsize=1)
def encoded(locations: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What encoders see, uint8 (locations, 3, 36, 36) per modality, and the factors (locations, 8)."""
    world = TerrainWorld(locations, seed=5)
    items = [world[i] for i in range(locations)]
    images = {m: np.stack([p.encode(item[m]) for item in items]) for m, p in MODALITIES.items()}
    target = torch.from_numpy(np.stack(list(world.factors.values()), 1))
    return {m: torch.from_numpy(x).repeat(1, MODALITIES[m].copies, 1, 1) for m, x in images.items()}, target


def read_factors(images: torch.Tensor, target: torch.Tensor, train: int, *, steps: int) -> dict[str, float]:
    images = (images / 255).contiguous(memory_format=torch.channels_last)

    def view(rows, step, generator):
        views = images[rows].flip([axis for bit, axis in ((1, -1), (2, -2)) if step & bit])
        return views.mT if step & 4 else views

    r2 = supervised_r2(view, images[train:], target, train, steps=steps, batch=80, rate=1e-2)
    return dict(zip(FACTORS, r2.tolist(), strict=True))


def check_admission(modality: str, *, train: int, test: int, steps: int) -> None:
    images, target = encoded(train + test)
    r2 = read_factors(images[modality], target, train, steps=steps)
    for name, owner in FACTORS.items():
        if owner in ("common", modality) and name not in REMOVED:
            assert r2[name] >= 0.85, r2
        else:
            assert r2[name] <= 0.05, r2


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_factor_is_readable_where_it_should_be_and_nowhere_else(modality):
    check_admission(modality, train=2000, test=400, steps=190)


@pytest.mark.soak
@pytest.mark.parametrize("modality", MODALITIES)
def test_factor_admission_long(modality):
    check_admission(modality, train=4000, test=1000, steps=600)


def changed(name: str, i: int, *, by: float = 0.5) -> tuple[dict, dict]:
    """Location i as it is and with another value of one factor."""
    world, other = TerrainWorld(i + 1, seed=9), TerrainWorld(i + 1, seed=9)
    other.factors[name] = world.factors[name] - by * np.sign(world.factors[name])
    return world[i], other[i]


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_changes_the_images_of_its_owner_only(name):
    for i in range(5):
        before, after = changed(name, i)
        for modality in MODALITIES:
            seen = FACTORS[name] in ("common", modality)
            assert np.array_equal(before[modality], after[modality]) != seen
        assert np.array_equal(before["mask"], after["mask"]) == (FACTORS[name] != "common")


def test_preprocessing_removes_elevation_and_nothing_else():
    for i in range(20):
        before, after = changed("elevation", i)
        assert abs(abs(after["dem"] - before["dem"]) - 100).max() < 1e-3
        steps = DEM.encode(after["dem"]).astype(int) - DEM.encode(before["dem"])
        assert abs(steps).max() <= 1 and (steps != 0).mean() < 0.03  # rounding: 1 % is at the very top
    assert REMOVED == ("elevation",)
    for name in ("building_height", "relief"):
        steps = [np.subtract(*(DEM.encode(item["dem"]).astype(int) for item in changed(name, i))) for i in range(20)]
        assert (abs(np.stack(steps)) > 1).mean() > 0.1


@pytest.mark.parametrize("tile", [16, 25, 36, 64, 250])
def test_scene_fractions_are_the_factors(tile):
    world = TerrainWorld(20, tile=tile, seed=3)
    for i in range(4 if tile == 250 else 20):
        item = world[i]
        assert item["rgb"].shape == (3, tile, tile) and item["dem"].shape == (1, tile, tile)
        unlabelled = (item["mask"] == 0).sum()
        assert unlabelled == round(0.02 * tile**2)
        for value, name, low, span in ((BUILDING, "built_up", 0.08, 0.15), (FOREST, "forest", 0.1, 0.25)):
            share = low + span * (world.factors[name][i] + 1) / 2
            assert -0.51 <= share * tile**2 - (item["mask"] == value).sum() <= unlabelled + 0.51


@pytest.fixture(scope="module")
def items() -> list[dict]:
    world = TerrainWorld(200, seed=1)
    return [world[i] for i in range(200)]


def test_items_have_the_form_of_the_reader_and_plausible_values(items):
    assert all((x["rgb"].dtype, x["dem"].dtype, x["mask"].dtype) == (np.uint8, np.float32, np.uint8) for x in items)
    rgb, dem, mask = (np.stack([item[key] for item in items]) for key in ("rgb", "dem", "mask"))
    share = np.bincount(mask.ravel(), minlength=len(CLASSES)) / mask.size
    assert (share[[0, FOREST, WATER, FIELD, YARD, MEADOW, ROAD, BUILDING]] > 0.01).all() and not share[[6, 7, 8]].any()
    assert 90 < rgb.mean() < 140 and (rgb.std((0, 2, 3)) > 30).all() and ((rgb == 0) | (rgb == 255)).mean() < 0.001
    assert dem.min() > 1 and dem.max() < 500 and (np.ptp(dem, (1, 2, 3)) < 50).all()
    assert (DEM.encode(dem).std((1, 2, 3)) > 30).all()


def test_masks_need_both_sensors(items):
    def means(key: str, value: int) -> np.ndarray:
        return np.stack([item[key][:, item["mask"] == value].mean(1) for item in items])

    # the same colour, another height
    colour = means("rgb", BUILDING) - means("rgb", YARD)
    height = means("dem", BUILDING) - means("dem", YARD)
    assert abs(colour.mean(0)).max() < 1.5 and height.min() > 2 and 10 < height.mean() < 15
    # about the same height, another colour
    for a, b in ((FIELD, MEADOW), (MEADOW, ROAD)):
        assert abs((means("dem", a) - means("dem", b)).mean()) < 0.3
        assert np.median(abs(means("rgb", a) - means("rgb", b)).max(1)) > 30
    # ponds: level, in hollows
    for item in items:
        water, open_land = (item["dem"][0][np.isin(item["mask"], kinds)] for kinds in ((WATER,), (FIELD, MEADOW, ROAD)))
        assert water.std() < 0.16 and water.mean() < open_land.mean()


def test_location_depends_on_seed_stream_and_index_only():
    few, many = TerrainWorld(3, seed=7), TerrainWorld(50, seed=7)
    many[40]
    assert all(same(many[i], few[i]) for i in (2, 0, 1))
    assert same(pickle.loads(pickle.dumps(many))[30], many[30])
    assert all(np.array_equal(many.factors[name][:3], few.factors[name]) for name in FACTORS)
    elsewhere = TerrainWorld(3, seed=7, cities=SPLITS["test"])
    assert np.array_equal(elsewhere[0]["rgb"], few[0]["rgb"]) and elsewhere.ids[0] != few.ids[0]
    for other in (TerrainWorld(3, seed=8), TerrainWorld(3, seed=7, stream=1)):
        assert not np.array_equal(other[0]["rgb"], few[0]["rgb"])
        assert not np.array_equal(other.factors["forest"], few.factors["forest"])


def test_factors_are_uniform_and_independent():
    values = np.stack(list(TerrainWorld(20000, seed=1).factors.values()))
    assert values.dtype == np.float32 and values.shape == (len(FACTORS), 20000) and abs(values).max() <= 1
    assert np.allclose(values.mean(1), 0, atol=0.02) and np.allclose(values.var(1), 1 / 3, atol=0.01)
    assert abs(np.corrcoef(values) - np.eye(len(FACTORS))).max() < 0.03


def test_names_are_those_of_tiles_city_after_city():
    world = TerrainWorld(4 * PER_CITY, cities=SPLITS["test"])
    assert len(world) == len(set(world.ids)) == 4 * PER_CITY
    assert world.ids[:2] + world.ids[15:17] == [
        f"duesseldorf/300_{k}" for k in ("5600_1", "5600_2", "5600_16", "5601_1")
    ]
    cities = [name.split("/")[0] for name in world.ids]
    assert [cities.count(city) for city in SPLITS["test"]] == [PER_CITY, PER_CITY, 2 * PER_CITY]
    last = TerrainWorld(320_000).ids[-1]
    assert last == "wuppertal/499_5699_16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"locations": 0}, "locations = 0"),
        ({"locations": 2.0}, "locations = 2.0"),
        ({"locations": 400_000}, "locations = 400000.*320000"),
        ({"tile": 15}, "tile = 15.*16 to 250"),
        ({"seed": -1}, "seed = -1"),
        ({"stream": -1}, "stream = -1"),
        ({"cities": ()}, "cities"),
        ({"cities": ("neuss", "herne")}, "cities.*alphabetical"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TerrainWorld(**{"locations": 2} | settings)


def test_index_beyond_the_world_is_refused():
    world = TerrainWorld(2)
    for i in (2, -1):
        with pytest.raises(IndexError, match="world of 2"):
            world[i]


@pytest.mark.parametrize("indices", [range(15), range(1, 17), [*range(8), *range(24, 32)], range(0, 32, 2)])
def test_part_of_a_tile_is_refused(tmp_path, indices):
    with pytest.raises(ValueError, match="whole tiles of 16"):
        write_geonrw(tmp_path, TerrainWorld(48), indices)
    assert not list(tmp_path.iterdir())


def test_geonrw_tree_reads_back_exactly(tmp_path):
    """Through the reader, in the order of the world, over the end of a city."""
    world = TerrainWorld(PER_CITY + 32, seed=11, cities=SPLITS["test"][:2])
    part = range(PER_CITY - 16, PER_CITY + 32)
    write_geonrw(tmp_path, world, part)
    data = GeoNRW(tmp_path, "test", missing="skip")
    assert data.ids == [world.ids[i] for i in part] and {i.split("/")[0] for i in data.ids} == {"duesseldorf", "herne"}
    assert all(same(data[k], world[i]) for k, i in enumerate(part))


def test_files_are_those_of_geonrw(tmp_path):
    world = TerrainWorld(32, seed=12)
    write_geonrw(tmp_path, world, range(16, 32))
    folder = tmp_path / "aachen"
    assert sorted(p.name for p in folder.iterdir()) == [f"300_5601_{end}" for end in ("dem.tif", "rgb.jp2", "seg.tif")]
    forms = {
        "rgb.jp2": ("JP2OpenJPEG", "uint8", 3),
        "dem.tif": ("GTiff", "float32", 1),
        "seg.tif": ("GTiff", "uint8", 1),
    }
    for end, form in forms.items():
        with rasterio.open(folder / f"300_5601_{end}") as file:
            assert (file.driver, file.dtypes[0], file.count) == form and file.shape == (144, 144)
            assert file.crs.to_epsg() == 25832 and file.nodata is None
            assert np.allclose(file.bounds, (300_000, 5_601_000, 301_000, 5_602_000), rtol=0, atol=1e-6)
            image = file.read()
        item = world[16 + 7]  # number 8: second row, last column
        key = {"rgb.jp2": "rgb", "dem.tif": "dem", "seg.tif": "mask"}[end]
        np.testing.assert_array_equal(image[:, 36:72, 108:].squeeze(), item[key].squeeze())
    other_decoder = np.asarray(Image.open(folder / "300_5601_rgb.jp2"))  # in the order red, green, blue, and exact
    np.testing.assert_array_equal(other_decoder[36:72, 108:].transpose(2, 0, 1), item["rgb"])

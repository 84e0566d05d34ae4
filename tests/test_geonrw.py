import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from decur_core.data import geonrw
from decur_core.data.geonrw import CLASSES, COLOURS, SPLITS, GeoNRW
from decur_core.data.modality import DEM, RGB
from decur_core.data.raster import DataError
from decur_core.worlds.terrain import TerrainWorld, write_geonrw

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FIXTURE = SHARED / "torchgeo_fixtures" / "geonrw"
samples = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with the sample data is missing")
LOSSLESS = {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES", "YCC": "NO"}


def write(path, image, **options):
    image = image if image.ndim == 3 else image[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    options = (LOSSLESS if path.suffix == ".jp2" else {"driver": "GTiff"}) | options
    size = {"count": image.shape[0], "height": image.shape[1], "width": image.shape[2]}
    with rasterio.open(path, "w", dtype=image.dtype, **size, **options) as file:
        file.write(image)
    return path


def write_tile(root, tile="aachen/371_5712", *, side=40, seed=0, **images):
    """A random tile; `images` replaces some of its three files."""
    random = np.random.default_rng(seed)
    made = {
        "rgb.jp2": random.integers(1, 256, (3, side, side), dtype=np.uint8),
        "dem.tif": random.uniform(30, 400, (side, side)).astype(np.float32),
        "seg.tif": random.integers(0, 11, (side, side), dtype=np.uint8),
    }
    for name, key in (("rgb.jp2", "rgb"), ("dem.tif", "dem"), ("seg.tif", "seg")):
        made[name] = images.get(key, made[name])
        write(root / f"{tile}_{name}", made[name])
    return made


def path_of(root, suffix):
    return root / "aachen" / f"371_5712_{suffix}"


@pytest.fixture
def tree(tmp_path):
    write_tile(tmp_path)
    return tmp_path


@samples
def test_classes_and_cities_are_those_of_the_layout_notes():
    text = (SHARED / "LAYOUTS.md").read_text()
    text = text[text.index("## 4. GeoNRW") : text.index("## 5.")]
    rows = re.findall(r"(\d+) ([a-z,]+) (#[0-9a-f]{6})", text)
    rows = sorted((int(value), name, colour) for value, name, colour in rows)
    assert [value for value, _, _ in rows] == list(range(11)) == list(range(len(CLASSES)))
    assert tuple(colour for _, _, colour in rows) == COLOURS
    simple = [name.replace(" ", "") for name in CLASSES]
    assert simple[1:] == [name for _, name, _ in rows][1:] and CLASSES[0] == "unlabelled"
    assert re.search(r"Test: ([a-z, ]+)\.", text)[1].split(", ") == list(SPLITS["test"])
    assert re.search(r"Train \(40\): ([a-z ]+)\.", text)[1].split() == list(SPLITS["train"])


@samples
def test_every_patch_of_the_fixture_is_that_of_another_reader():
    data = GeoNRW(FIXTURE)
    cities = ("aachen", "bergisch", "bielefeld", "duesseldorf")
    tiles = [f"{city}/{name}" for city in cities for name in ("0_0", "1_1")]
    assert data.ids == [f"{tile}_{k}" for tile in tiles for k in range(1, 17)] and data.chunk == 16
    for i in range(len(data)):
        item, (tile, k) = data[i], (tiles[i // 16], i % 16)
        assert item["id"] == data.ids[i] and set(item) == {"id", "rgb", "dem", "mask"}
        y, x = 25 * (k // 4), 25 * (k % 4)
        for key, suffix in (("rgb", "rgb.jp2"), ("dem", "dem.tif"), ("mask", "seg.tif")):
            with Image.open(FIXTURE / f"{tile}_{suffix}") as image:
                cut = np.asarray(image)[y : y + 25, x : x + 25]
            assert (item[key].squeeze() == (cut.transpose(2, 0, 1) if key == "rgb" else cut)).all(), (tile, k, key)
    assert item["rgb"].shape == (3, 25, 25) and item["dem"].shape == (1, 25, 25) and item["mask"].shape == (25, 25)
    assert (item["rgb"].dtype, item["dem"].dtype, item["mask"].dtype) == (np.uint8, np.float32, np.uint8)


@samples
def test_splits_are_by_city_and_absent_cities_are_named():
    with pytest.raises(DataError, match=r"no tile of 2 of 3 cities of the split test: herne, neuss; .*missing='skip'"):
        GeoNRW(FIXTURE, "test")
    with pytest.raises(DataError, match="37 of 40 cities of the split train: bochum, bonn"):
        GeoNRW(FIXTURE, "train")
    test, train = (GeoNRW(FIXTURE, split, missing="skip") for split in ("test", "train"))
    assert {i.split("/")[0] for i in test.ids} == {"duesseldorf"} and len(test) == 32
    assert {i.split("/")[0] for i in train.ids} == {"aachen", "bergisch", "bielefeld"} and len(train) == 96
    assert set(test.ids) | set(train.ids) == set(GeoNRW(FIXTURE).ids)


def test_a_whole_split_needs_no_leave(tmp_path):
    for city in SPLITS["test"]:
        write_tile(tmp_path, f"{city}/1_2", side=8)
    (tmp_path / "aachen").mkdir()  # a city without tiles is not there
    assert len(GeoNRW(tmp_path, "test")) == 48
    with pytest.raises(DataError, match="40 of 40 cities of the split train: aachen"):
        GeoNRW(tmp_path, "train")
    with pytest.raises(DataError, match="no files <city>/<E>_<N>_rgb.jp2 for split train"):
        GeoNRW(tmp_path, "train", missing="skip")


def test_wrong_settings_and_roots_are_refused(tree):
    with pytest.raises(DataError, match="split is 'val'; allowed are train, test and None"):
        GeoNRW(tree, "val")
    with pytest.raises(DataError, match="nowhere: missing"):
        GeoNRW(tree / "nowhere")
    with pytest.raises(DataError, match="no files <city>"):
        GeoNRW(tree / "aachen")  # one folder too deep
    for wrong in ({"missing": "ignore"}, {"parts": 0}):
        with pytest.raises(ValueError, match=f"{[*wrong][0]} is"):
            GeoNRW(tree, **wrong)


def test_patches_are_numbered_row_by_row(tmp_path):
    rows, columns = np.indices((40, 40))
    write_tile(tmp_path, dem=(100 * rows + columns).astype(np.float32))
    for parts in (1, 2, 4):
        data, side = GeoNRW(tmp_path, parts=parts), 40 // parts
        assert len(data) == data.chunk == parts**2
        for k in range(parts**2):
            corner = 100 * side * (k // parts) + side * (k % parts)
            assert data[k]["dem"][0, 0, 0] == corner and data[k]["dem"].shape == (1, side, side)
            assert data.ids[k] == f"aachen/371_5712_{k + 1}"


def test_the_world_comes_back_from_its_files(tmp_path):
    world = TerrainWorld(32, tile=16)
    write_geonrw(tmp_path, world, range(32))
    data = GeoNRW(tmp_path)
    assert data.ids == world.ids
    for i in range(32):
        item, made = data[i], world[i]
        assert item["id"] == made["id"]
        for key in ("rgb", "dem", "mask"):
            assert item[key].dtype == made[key].dtype and (item[key] == made[key]).all()


def test_a_tile_is_decoded_once_and_never_for_another_reader(tmp_path, monkeypatch):
    first = write_tile(tmp_path / "a")["dem.tif"]
    write_tile(tmp_path / "a", "aachen/371_5713", seed=1)
    other = write_tile(tmp_path / "b", seed=2)["dem.tif"]  # a tile of the same name
    opened = []
    read = geonrw.read
    monkeypatch.setattr(geonrw, "read", lambda path, **form: opened.append(path.name) or read(path, **form))
    data = GeoNRW(tmp_path / "a")
    for i in range(32):
        data[i]
    assert len(opened) == len(set(opened)) == 6
    data[0]["dem"][:] = 0  # whoever changes an item does not change the next one
    assert (data[0]["dem"][0] == first[:10, :10]).all()
    assert (GeoNRW(tmp_path / "b")[0]["dem"][0] == other[:10, :10]).all()
    copy = pickle.dumps(data)
    assert len(copy) < 3000  # no pixels
    assert (pickle.loads(copy)[17]["rgb"] == data[17]["rgb"]).all()


def test_files_are_paired_by_the_first_two_fields_of_a_city(tmp_path):
    made = write_tile(tmp_path, "aachen/32337_5709")
    write_tile(tmp_path, "bonn/32337_5709", seed=1)
    folder = tmp_path / "aachen"
    (folder / "32337_5709_dem.tif").rename(folder / "32337_5709_2m_dem.tif")
    for stray in ("32337_5709_sar.tif", "32337_5709_rgb.jp2.aux.xml", "readme.txt", "._1_1_rgb.jp2"):
        (folder / stray).write_text("not read")
    data = GeoNRW(tmp_path)
    assert len(data) == 32 and data.ids[0] == "aachen/32337_5709_1"
    assert (data[0]["dem"][0] == made["dem.tif"][:10, :10]).all()
    shutil.copy(folder / "32337_5709_2m_dem.tif", folder / "32337_5709_dem.tif")
    with pytest.raises(DataError, match="aachen/32337_5709_dem.tif: 2 files fit this tile, expected 1"):
        GeoNRW(tmp_path)[0]


def no_partner(suffix):
    def damage(root):
        path_of(root, suffix).unlink()
        return f"{path_of(root, suffix)}: 0 files"

    damage.__name__ = f"no_{suffix}"
    return damage


def cut_rgb(root):
    path = path_of(root, "rgb.jp2")
    path.write_bytes(path.read_bytes()[:-300])
    return f"{path}: cannot be read"


def cut_dem(root):
    path = path_of(root, "dem.tif")
    path.write_bytes(path.read_bytes()[:3000])
    return f"{path}: cannot be read"


def tiff_as_rgb(root):
    path = path_of(root, "rgb.jp2")
    write(path, np.ones((3, 40, 40), np.uint8), driver="GTiff")
    return f"{path}: cannot be read"


def grey_rgb(root):
    return f"{write(path_of(root, 'rgb.jp2'), np.ones((40, 40), np.uint8))}: expected 3 band.s., found 1"


def deep_rgb(root):
    path = write(path_of(root, "rgb.jp2"), np.full((3, 40, 40), 3000, np.uint16))
    return f"{path}: expected 8-bit colours, found uint16"


def colour_dem(root):
    return f"{write(path_of(root, 'dem.tif'), np.ones((3, 40, 40), np.float32))}: expected 1 band.s., found 3"


def float_mask(root):
    return f"{write(path_of(root, 'seg.tif'), np.ones((40, 40), np.float32))}: expected integers, found float32"


def unknown_label(root):
    return f"{write(path_of(root, 'seg.tif'), np.full((40, 40), 11, np.uint8))}: labels 11 to 11, expected 0 to 10"


def negative_label(root):
    return f"{write(path_of(root, 'seg.tif'), np.full((40, 40), -1, np.int16))}: labels -1 to -1"


def small_dem(root):
    path = write(path_of(root, "dem.tif"), np.ones((20, 40), np.float32))
    return f"{path}: 20 x 40 pixels; expected that of its partners"


def odd_side(root):
    write_tile(root, side=42)
    return f"{path_of(root, 'seg.tif')}: 42 x 42 pixels; expected .* divisible by parts = 4"


@pytest.mark.parametrize(
    "damage",
    [
        *map(no_partner, ("rgb.jp2", "dem.tif", "seg.tif")), cut_rgb, cut_dem, tiff_as_rgb, grey_rgb, deep_rgb,
        colour_dem, float_mask, unknown_label, negative_label, small_dem, odd_side,
    ],
)  # fmt: skip
def test_a_bad_tile_is_named_and_costs_no_other(tmp_path, damage):
    write_tile(tmp_path)
    good = write_tile(tmp_path, "aachen/372_5712", seed=1)
    words = damage(tmp_path)
    data = GeoNRW(tmp_path)
    assert len(data) == 32
    with pytest.raises(DataError, match=words.replace(str(tmp_path), re.escape(str(tmp_path)))):
        data[5]
    assert (data[16]["rgb"] == good["rgb.jp2"][:, :10, :10]).all()


@samples
def test_a_damaged_real_tiff_is_refused_in_any_place(tree):
    for part, words in (("rgb.jp2", "cannot be read"), ("dem.tif", "found 3"), ("seg.tif", "found 3")):
        shutil.copy(SHARED / "rasterio_tests" / "corrupt.tif", path_of(tree, part))
        with pytest.raises(DataError, match=f"371_5712_{part}: .*{words}"):
            GeoNRW(tree)[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -9999.0, -3.4028235e38])
def test_patches_with_pixels_without_elevation_are_refused_alone(tmp_path, value):
    dem = np.random.default_rng(0).uniform(30, 400, (40, 40)).astype(np.float32)
    dem[12, 3:5] = value  # second row of patches, first column
    write_tile(tmp_path)
    write(path_of(tmp_path, "dem.tif"), dem, nodata=value if np.isfinite(value) else None)
    data = GeoNRW(tmp_path)
    with pytest.raises(DataError, match=r"371_5712_dem.tif: 2 of 100 pixels of patch 5 have no data"):
        data[4]
    for i in set(range(16)) - {4}:
        assert np.isfinite(data[i]["dem"]).all()


def test_integer_elevation_is_taken_with_its_missing_pixels(tmp_path):
    dem = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    dem[0, 0] = 65535
    write_tile(tmp_path)
    write(path_of(tmp_path, "dem.tif"), dem, nodata=65535)
    data = GeoNRW(tmp_path)
    assert data[1]["dem"].dtype == np.float32 and (data[1]["dem"][0] == dem[:10, 10:20]).all()
    with pytest.raises(DataError, match="1 of 100 pixels of patch 1 have no data"):
        data[0]


def test_a_flat_patch_is_valid_and_a_black_photograph_is_not(tmp_path):
    dem = np.random.default_rng(0).uniform(30, 400, (40, 40)).astype(np.float32)
    dem[:10, :10] = 0  # a lake
    rgb = np.random.default_rng(0).integers(1, 256, (3, 40, 40), dtype=np.uint8)
    rgb[:, :10, 10:20] = 0  # all of patch 2
    rgb[:, :9, 20:30] = 0  # not all of patch 3
    write_tile(tmp_path, dem=dem, rgb=rgb)
    data = GeoNRW(tmp_path)
    assert (DEM.encode(data[0]["dem"]) == 0).all()
    assert DEM.encode(data[3]["dem"]).max() == 255 and (RGB.encode(data[2]["rgb"]) == rgb[:, :10, 20:30]).all()
    with pytest.raises(DataError, match="371_5712_rgb.jp2: patch 2 is black all over"):
        data[1]


@samples
def test_real_photograph_and_canopy_heights_come_through(tmp_path):
    """One metre pixels of NEON's airborne survey in the tree of GeoNRW, and a real elevation model of whole metres."""
    folder = SHARED / "aerial_rgb_chm_bart"
    with rasterio.open(next(folder.glob("*image_crop.tif"))) as file:
        fine = file.read()[:, :1000, :1000].astype(float)
    with rasterio.open(next(folder.glob("*CHM_crop.tif"))) as file:
        assert file.nodata == -9999 and file.dtypes == ("float32",)
        height = file.read(1)
    rgb = np.rint(fine.reshape(3, 100, 10, 100, 10).mean(axis=(2, 4))).astype(np.uint8)
    write_tile(tmp_path, side=100, rgb=rgb)
    write(path_of(tmp_path, "dem.tif"), height[:100, :100], nodata=-9999)
    items = [*GeoNRW(tmp_path)]
    dem = np.stack([item["dem"][0] for item in items])
    assert dem.min() == 0 and dem.max() == height[:100, :100].max() and height.max() == pytest.approx(26.4, abs=0.05)
    assert dem.mean() == pytest.approx(height[:100, :100].mean(dtype=float))
    assert np.mean([item["rgb"] for item in items]) == pytest.approx(rgb.mean())
    with rasterio.open(SHARED / "rgb_dem_rmnp" / "rmnp-dem.tif") as file:
        dem = file.read(1)[:148, :152]
        write_tile(tmp_path, side=152, **{k: np.ones((c, 148, 152), np.uint8) for k, c in (("rgb", 3), ("seg", 1))})
        write(path_of(tmp_path, "dem.tif"), dem, nodata=file.nodata)
    items = [*GeoNRW(tmp_path)]
    assert min(i["dem"].min() for i in items) == dem.min() and max(i["dem"].max() for i in items) == dem.max()
    assert all(i["dem"].min() >= 2281 and i["dem"].max() <= 4261 for i in items)

import itertools
import re
import shutil
import struct
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio import Affine

from decur_core.data.modality import OPTICAL, SAR
from decur_core.data.raster import OPTICAL_STEPS, DataError, read, read_place, resize
from decur_core.data.ssl4eo import SSL4EOS12

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FIXTURE = SHARED / "torchgeo_fixtures" / "ssl4eo_s12"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with the sample data is missing")

S1 = [
    "S1A_IW_GRDH_1SDV_20200329T001515_20200329T001540_031883_03AE27_9BAF",
    "S1B_IW_GRDH_1SDV_20200627T001449_20200627T001514_022212_02A27E_2A09",
    "S1B_IW_GRDH_1SDV_20200928T120105_20200928T120130_023575_02CCB0_F035",
    "S1A_IW_GRDH_1SDV_20201230T001523_20201230T001548_035908_04349D_C91E",
]
BANDS = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]


@pytest.fixture
def tree(tmp_path):
    """A copy of the first location that may be damaged."""
    for folder in ("s1", "s2c"):
        shutil.copytree(FIXTURE / folder / "0000000", tmp_path / folder / "0000000")
    return tmp_path


def by_formula(band, size):
    """Bilinear with half-pixel centres, one output pixel at a time."""
    out = np.empty(size)
    for i, j in itertools.product(*map(range, size)):
        y = min(max((i + 0.5) * band.shape[0] / size[0] - 0.5, 0), band.shape[0] - 1)
        x = min(max((j + 0.5) * band.shape[1] / size[1] - 0.5, 0), band.shape[1] - 1)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, band.shape[0] - 1), min(x0 + 1, band.shape[1] - 1)
        top = band[y0, x0] * (1 - (x - x0)) + band[y0, x1] * (x - x0)
        bottom = band[y1, x0] * (1 - (x - x0)) + band[y1, x1] * (x - x0)
        out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


@pytest.mark.parametrize(
    ("small", "large"), [((6, 6), (36, 36)), ((18, 18), (36, 36)), ((5, 7), (10, 42)), ((9, 4), (6, 3))]
)
def test_resize_is_bilinear_with_half_pixel_centres(small, large):
    band = np.random.default_rng(0).integers(0, 65536, small).astype(np.uint16)
    out = resize(band, large)
    assert out.dtype == np.float32 and out == pytest.approx(by_formula(band.astype(float), large), rel=1e-5, abs=0.01)


def test_resize_of_a_stack_is_that_of_its_bands_bit_for_bit():
    stack = np.random.default_rng(0).normal(1000, 300, (24, 44, 44)).astype(np.float32)
    assert (resize(stack, (264, 264)) == np.stack([resize(band, (264, 264)) for band in stack])).all()
    assert (resize(stack, (44, 44)) == stack).all()
    assert (resize(np.zeros((3, 6, 6)), (36, 36)) == 0).all()  # pixels without data stay so


def test_fixture_is_read_band_by_band_in_order_of_the_dates():
    data = SSL4EOS12(FIXTURE)
    assert data.ids == ["0000000", "0000001"] and len(data) == 2
    item = data[0]
    assert item["id"] == "0000000"
    assert item["sar"].shape == (4, 2, 36, 36) and item["optical"].shape == (4, 13, 36, 36)
    assert item["sar"].dtype == item["optical"].dtype == np.float32
    assert item["dates"]["sar"] == [name[17:32] for name in S1]  # S1A of December comes last
    scenes = sorted((FIXTURE / "s2c" / "0000000").iterdir())
    assert item["dates"]["optical"] == [scene.name[:15] for scene in scenes]
    for season in range(4):
        for band, row in (("VV", 0), ("VH", 1)):
            with rasterio.open(FIXTURE / "s1" / "0000000" / S1[season] / f"{band}.tif") as source:
                assert (item["sar"][season, row] == source.read(1)).all()
        for row, band in enumerate(BANDS):
            with rasterio.open(scenes[season] / f"{band}.tif") as source:
                values = source.read(1).astype(float)
            if values.shape != (36, 36) and season == 1:
                assert item["optical"][season, row] == pytest.approx(by_formula(values, (36, 36)), rel=1e-5, abs=0.01)
            else:
                assert (item["optical"][season, row] == resize(values, (36, 36))).all()


def test_seasons_are_paired_with_the_smallest_sum_of_time_differences():
    for item in SSL4EOS12(FIXTURE):
        sar, optical = ([datetime.strptime(d, "%Y%m%dT%H%M%S") for d in item["dates"][m]] for m in ("sar", "optical"))
        apart = [
            sum(abs((a - b).total_seconds()) for a, b in zip(sar, order, strict=True))
            for order in itertools.permutations(optical)  # the first one keeps the order
        ]
        assert apart[0] == min(apart)


def scene(root, folder, season):
    return sorted((root / folder / "0000000").iterdir())[season]


def rewrite(path, values):
    with rasterio.open(path) as source:
        profile = source.profile
    bands = values if values.ndim == 3 else values[None]
    profile.update(count=bands.shape[0], height=bands.shape[1], width=bands.shape[2], dtype=values.dtype)
    with rasterio.open(path, "w", **profile) as target:
        target.write(bands)


def no_band(root):
    path = scene(root, "s2c", 1) / "B8A.tif"
    path.unlink()
    return path, "missing"


def cut_band(root):
    path = scene(root, "s1", 3) / "VH.tif"
    path.write_bytes(path.read_bytes()[:2000])
    return path, "truncated"


def empty_band(root):
    path = scene(root, "s2c", 0) / "B2.tif"
    path.write_bytes(b"")
    return path, "damaged"


def corrupt_band(root):
    path = scene(root, "s2c", 2) / "B4.tif"
    shutil.copy(SHARED / "rasterio_tests" / "corrupt.tif", path)
    return path, "expected 1 band"


def wrong_size_20m(root):
    path = scene(root, "s2c", 0) / "B11.tif"
    rewrite(path, np.ones((36, 36), np.uint16))
    return path, "36 x 36 pixels, expected 18 x 18"


def wrong_size_sar(root):
    path = scene(root, "s1", 0) / "VV.tif"
    rewrite(path, np.ones((35, 36), np.float32))
    return path, "35 x 36 pixels, expected 36 x 36"


def wrong_size_season(root):
    path = scene(root, "s2c", 3) / "B2.tif"
    rewrite(path, np.ones((18, 18), np.uint16))
    return path, "expected 36 x 36"


def integers_as_sar(root):
    path = scene(root, "s1", 0) / "VH.tif"
    shutil.copy(SHARED / "sentinel1_grd_raw" / "iw-vh.tiff", path)
    return path, "expected floating-point numbers, found uint16"


def floats_as_optical(root):
    path = scene(root, "s2c", 0) / "B3.tif"
    rewrite(path, np.ones((36, 36), np.float32))
    return path, "expected integers, found float32"


def other_bands(root):
    path = scene(root, "s2c", 0) / "B12.tif"
    rewrite(path, np.ones((2, 18, 18), np.uint16))
    return path, "expected 1 band(s), found 2"


def other_place(root):
    path = scene(root, "s1", 0) / "VH.tif"
    with rasterio.open(path, "r+") as target:
        pixel, _, west, _, height, north = target.transform[:6]
        target.transform = Affine(pixel, 0, west + 0.3 * 36 * pixel, 0, height, north)
    return path, "must lie at the same place"


def other_crs(root):
    path = scene(root, "s1", 0) / "VV.tif"
    with rasterio.open(path, "r+") as target:
        target.crs = "EPSG:32615"
    return path, "EPSG:32615, but"


def swapped_folders(root):
    (root / "s1").rename(root / "x")
    (root / "s2c").rename(root / "s1")
    (root / "x").rename(root / "s2c")
    return root / "s1" / "0000000", "no date in the name; expected ^.{16}_"


def no_season(root):
    shutil.rmtree(scene(root, "s1", 1))
    return root / "s1" / "0000000", "3 season directories, expected 4"


def odd_name(root):
    path = scene(root, "s1", 1)
    return path.rename(path.with_name("march")), "no date"


def no_modality(root):
    shutil.rmtree(root / "s2c" / "0000000")
    return root / "s2c" / "0000000", "missing"


@pytest.mark.parametrize(
    "damage",
    [
        no_band, cut_band, empty_band, corrupt_band, wrong_size_20m, wrong_size_sar, wrong_size_season, integers_as_sar,
        floats_as_optical, other_bands, other_place, other_crs, swapped_folders, no_season, odd_name, no_modality,
    ],
)  # fmt: skip
def test_damage_is_an_error_that_names_the_file(tree, damage):
    data = SSL4EOS12(tree)
    data[0]
    path, words = damage(tree)
    with pytest.raises(DataError) as error:
        data[0]
    assert str(path) in str(error.value) and words in str(error.value), str(error.value)


def test_pixels_that_cannot_be_backscatter_are_refused_by_the_preprocessing(tree):
    path = scene(tree, "s1", 2) / "VV.tif"
    with rasterio.open(path) as file:
        values = file.read(1)
    with rasterio.open(SHARED / "sentinel1_grd_raw" / "iw-vv.tiff") as file:
        raw = file.read(1)[400:436, 400:436].astype(np.float32)  # digital numbers, made to look like the real thing
    values[0, 0] = np.nan
    for wrong, words in ((values, "non-finite pixels"), (raw, "within -100 to 50; found")):
        rewrite(path, wrong)
        with pytest.raises(DataError, match=words):
            SAR.encode(SSL4EOS12(tree)[0]["sar"])


def test_corners_may_differ_as_far_as_the_writer_of_the_data_set_moved_them(tree):
    """By half a pixel of every band: the fixture has that, and its 60 m bands lie 25 m off."""
    bounds = {}
    for band in ("B1", "B2"):
        with rasterio.open(scene(tree, "s2c", 0) / f"{band}.tif") as file:
            bounds[band], pixel = file.bounds, file.transform.a
    assert (bounds["B2"].left - bounds["B1"].left) / pixel == pytest.approx(2.5, abs=0.01)
    assert SSL4EOS12(tree)[0]["optical"].any()


def test_a_file_cut_anywhere_is_refused_or_whole(tree):
    """Never quietly other pixels."""
    path = scene(tree, "s2c", 0) / "B2.tif"
    whole, pixels = path.read_bytes(), read(path, count=1, kind="ui")
    refused = 0
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        try:
            assert (read(path, count=1, kind="ui") == pixels).all(), length
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(whole) // 37 * 0.9


def test_corrupt_real_tiff_is_refused_and_its_intact_twin_read():
    with pytest.raises(DataError, match="corrupt.tif.*damaged"):
        read(SHARED / "rasterio_tests" / "corrupt.tif", count=3, kind="ui")
    assert read(SHARED / "rasterio_tests" / "cogeo.tif", count=3, kind="ui").shape == (3, 1024, 1024)


def test_a_header_that_claims_more_pixels_than_memory_holds_is_refused(tree):
    path = scene(tree, "s1", 0) / "VV.tif"
    damaged = bytearray(path.read_bytes())
    entry = damaged.index(struct.pack("<HHI", 257, 3, 1))  # the height, of 16 bits; after it the width of strips
    damaged[entry : entry + 12] = struct.pack("<HHII", 257, 4, 1, 2_000_000_000)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="VV.tif: cannot be read"):
        SSL4EOS12(tree)[0]


def test_hidden_folders_are_of_other_programs(tree):
    for folder in ("s1", "s2c"):
        (tree / folder / ".ipynb_checkpoints").mkdir()
    (tree / "s1" / "0000000" / ".ipynb_checkpoints").mkdir()
    data = SSL4EOS12(tree)
    assert data.ids == ["0000000"] and data[0]["sar"].shape[0] == 4


def test_missing_bands_leave_a_row_of_zeros(tree):
    paths = [None if band == "B10" else scene(tree, "s2c", 0) / f"{band}.tif" for band in OPTICAL.bands]
    bands = read_place(paths, [scene(tree, "s1", 0) / "VV.tif"])
    assert bands.shape == (14, 36, 36)
    assert [band for band, image in zip(OPTICAL.bands, bands, strict=False) if not image.any()] == ["B10"]


def test_published_id_lists():
    void, subset = (
        [f"{int(line):07d}" for line in (SHARED / "ssl4eo_s12_lists" / f"{name}.csv").read_text().split()]
        for name in ("void_ids", "50k_ids_random")
    )
    assert len(void) == 97 and void[0] == "0124990" and void[-1] == "0179723"
    assert len(subset) == 50_000 and subset[0] == "0000002" and not set(void) & set(subset)


def test_statistics_are_the_published_ones():
    text = (SHARED / "LAYOUTS.md").read_text()
    (sar,) = re.findall(r"S1 mean ([-\d. ]+), std ([\d. ]+) \(its LMDB", text)
    optical = [re.search(rf"S2C {name} ([\d. ]+)\n", text)[1] for name in ("mean", "std")]
    published = {"sar": sar, "optical": optical}
    for modality, bands in (("sar", 2), ("optical", 13)):
        for values, found in zip(SSL4EOS12.statistics[modality], published[modality], strict=True):
            assert values == tuple(float(value) for value in found.split()) and len(values) == bands


def test_a_real_patch_of_the_published_size_comes_through(tmp_path):
    """Level 1C pixels of 264 x 264 with the means that were measured on them, and real backscatter beside them."""
    with rasterio.open(next((SHARED / "sentinel2_l1c_264").glob("*.tif"))) as file:
        optical = file.read()
    with rasterio.open(next((SHARED / "sen12mscr_pair").glob("*_s1_*.tif"))) as file:
        sar = np.pad(file.read(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    bands = [("s1", *band) for band in zip(("VV", "VH"), sar, (1, 1), strict=True)]
    bands += [("s2c", *band) for band in zip(BANDS, optical, OPTICAL_STEPS, strict=True)]
    for (season, sar_scene), (folder, band, values, step) in itertools.product(enumerate(S1), bands):
        side = 264 // step
        values = values.reshape(side, step, side, step).mean(axis=(1, 3)) + season
        values = values.astype(np.float32) if folder == "s1" else np.rint(values).astype(np.uint16)
        path = (
            tmp_path / folder / "0000000" / (sar_scene if folder == "s1" else f"{sar_scene[17:32]}_x") / f"{band}.tif"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        place = {"crs": "EPSG:4326", "transform": Affine(9e-5 * step, 0, 5, 0, -9e-5 * step, 50)}
        profile = {"driver": "GTiff", "count": 1, "height": side, "width": side, "dtype": values.dtype}
        with rasterio.open(path, "w", **place, **profile) as file:
            file.write(values, 1)
    item = SSL4EOS12(tmp_path)[0]
    measured = [1080, 834, 762, 537, 984, 2500, 3139, 3205, 3520, 1518, 14, 1638, 750]
    for season in range(4):
        means = item["optical"][season].mean(axis=(1, 2), dtype=float) - season
        assert means == pytest.approx(measured, abs=1.5)
        assert item["sar"][season] == pytest.approx(sar + season, abs=1e-5)
    assert OPTICAL.encode(item["optical"]).shape == (4, 13, 264, 264) and SAR.encode(item["sar"]).any()


def test_gaps_and_single_modalities_are_left_out(tree):
    shutil.copytree(tree / "s1" / "0000000", tree / "s1" / "0000007")
    with pytest.warns(UserWarning, match="1 ids are left out, only s1 or s2c has 0000007"):
        assert SSL4EOS12(tree).ids == ["0000000"]


def test_wrong_root_is_named(tmp_path):
    with pytest.raises(DataError, match="s1: missing"):
        SSL4EOS12(tmp_path)
    (tmp_path / "s1").mkdir()
    (tmp_path / "s2c").mkdir()
    with pytest.raises(DataError, match="no location"):
        SSL4EOS12(tmp_path)

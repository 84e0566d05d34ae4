import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from decur_core import backbones
from decur_core.data import modality
from decur_core.data.modality import DEM, HHA, OPTICAL, RGB, SAR, Modality
from decur_core.data.raster import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_samples = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with the sample data is missing")


def backscatter(*shape, seed=0):
    return np.random.default_rng(seed).normal(-14, 6, shape).astype(np.float32)


def test_optical_is_the_whole_number_formula_for_every_16_bit_value():
    counts = np.arange(65536)
    images = np.resize(counts, (13, 64, 1024)).astype(np.uint16)
    expected = np.minimum(255, counts * 255 // 10000).reshape(64, 1024)
    for dtype in (np.uint16, np.float32, np.float64):
        assert (OPTICAL.encode(images.astype(dtype)) == expected).all()


def test_sar_equals_the_formula_written_out():
    images = backscatter(3, 2, 25, 31)
    encoded = SAR.encode(images)
    assert encoded.dtype == np.uint8 and encoded.shape == images.shape
    for image, codes in zip(images.astype(np.float64), encoded, strict=True):
        for band in range(2):
            ordered = sorted(image[band].ravel())
            low, high = (_quantile(ordered, share) for share in (0.01, 0.99))
            bottom = SAR.mean[band] - 2 * SAR.std[band]
            for value, code in zip(image[band].ravel(), codes[band].ravel(), strict=True):
                level = (min(max(value, low), high) - bottom) / (4 * SAR.std[band]) * 255
                assert abs(min(max(level, 0), 255) - 0.5 - code) <= 0.5 + 1e-3


@pytest.mark.parametrize("shares", [(0.01, 0.99), (0.0, 1.0), (0.2, 0.8)])
def test_quantiles_are_those_of_numpy_bit_for_bit(shares):
    random = np.random.default_rng(0)
    for shape in [(2, 264, 264), (4, 2, 33, 47), (3, 1, 2), (1, 1, 1)]:
        for images in (random.normal(-14, 5, shape), random.integers(0, 900, shape), random.integers(0, 3, shape)):
            for dtype in (np.float32, np.float64, np.int16):
                images = images.astype(dtype)
                expected = np.quantile(images, shares, axis=(-2, -1), keepdims=True)
                found = np.stack(list(modality._quantiles(images, shares)))
                assert found.dtype == expected.dtype and (found == expected).all()


def _quantile(ordered, share):
    place = share * (len(ordered) - 1)
    k = int(place)
    return ordered[k] + (place - k) * (ordered[k + 1] - ordered[k])


def test_outliers_are_cut_per_image_and_band():
    wide = dataclasses.replace(SAR, mean=(-12.0, -20.0), std=(50.0, 50.0))  # nothing is clipped by the mean and std
    images = backscatter(2, 2, 60, 60)
    images[0, 0, 0, :3] = 30
    encoded = wide.encode(images)
    assert (encoded[1] == wide.encode(images[1])).all()
    assert (encoded[0, 1] == wide.encode(images)[0, 1]).all()
    kept = dataclasses.replace(wide, outliers=0.0).encode(images)
    assert kept[0, 0].max() > encoded[0, 0].max() + 20
    cut = (images > np.quantile(images, 0.99, axis=(2, 3), keepdims=True)).mean(axis=(2, 3))
    assert cut == pytest.approx(np.full((2, 2), 0.01), abs=1e-9)


@pytest.mark.parametrize(
    ("setting", "images", "words"),
    [
        (SAR, backscatter(13, 6, 6), ["sar", "2 bands (VV VH)", "(13, 6, 6)"]),
        (OPTICAL, np.full((2, 6, 6), 900), ["optical", "13 bands", "(2, 6, 6)"]),
        (SAR, np.where(np.eye(6), np.nan, backscatter(2, 6, 6)), ["sar", "non-finite"]),
        (SAR, np.where(np.eye(6), np.inf, backscatter(2, 6, 6)), ["sar", "non-finite"]),
        (SAR, np.arange(72).reshape(2, 6, 6) * 38, ["sar", "-100 to 50", "0 to 2698"]),
        (SAR, 10 ** (backscatter(2, 6, 6) / 10), ["sar", "dB", "amplitude or power"]),
        (SAR, np.stack([backscatter(2, 6, 6), 10 ** (backscatter(2, 6, 6) / 10)]), ["amplitude or power"]),
        (OPTICAL, backscatter(13, 6, 6), ["optical", "0 to 65536", "found -"]),
        (OPTICAL, np.random.default_rng(0).random((13, 6, 6)), ["optical", "0 to 1", "multiply by 10000"]),
        (OPTICAL, np.arange(468.0).reshape(13, 6, 6) * 255 / 468, ["optical", "8 bits"]),
        (OPTICAL, np.arange(468, dtype=np.uint8).reshape(13, 6, 6), ["optical", "uint8"]),
        (SAR, np.zeros((0, 2, 6, 6), np.float32), ["sar", "(0, 2, 6, 6)"]),
        (OPTICAL, np.zeros((13, 6, 0), np.uint16), ["optical", "(13, 6, 0)"]),
        (OPTICAL, np.full((13, 6, 6), 1 + 2j), ["optical", "complex128"]),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(setting, images, words):
    with pytest.raises(DataError) as error:
        setting.encode(images)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_images_without_data_and_dark_water_pass():
    assert (OPTICAL.encode(np.zeros((2, 13, 6, 6))) == 0).all()
    SAR.check(np.zeros((2, 6, 6), dtype=np.float32))
    water = np.random.default_rng(0).uniform(20, 200, (13, 6, 6))
    with pytest.raises(DataError, match="8 bits"):
        OPTICAL.check(water)
    water[10] = 0  # level 2A has no B10
    OPTICAL.check(water)


def test_dictionary_survives_json_and_refuses_other_fields():
    for setting in (SAR, OPTICAL):
        values = json.loads(json.dumps(setting.mapping()))
        assert setting.mapped(values) == setting
        with pytest.raises(ValueError, match="gamma"):
            Modality.from_mapping(values | {"gamma": 2.2})
        values.pop("valid_range")
        with pytest.raises(ValueError, match="valid_range"):
            Modality.from_mapping(values)


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        (SAR, {"scheme": "minmax"}),
        (SAR, {"mean": (-12.5,)}),
        (SAR, {"std": None}),
        (SAR, {"outliers": 1.0}),
        (SAR, {"outliers": None}),
        (DEM, {"outliers": None}),
        (OPTICAL, {"scale": None}),
        (OPTICAL, {"scale": 0.0}),
    ],
)
def test_impossible_settings_are_refused(setting, change):
    with pytest.raises(ValueError, match="scheme must be"):
        dataclasses.replace(setting, **change)


def test_elevation_goes_the_way_of_the_book_into_its_encoder():
    images = np.random.default_rng(0).normal(100, 9, (2, 1, 24, 24))
    encoder, features = backbones.build("small", DEM.channels)
    assert encoder(DEM.copied(DEM.to_float(DEM.encode(images)))).shape == (2, features)


def test_to_float_maps_bytes_to_the_unit_interval():
    codes = torch.arange(256, dtype=torch.uint8)
    values = OPTICAL.to_float(codes)
    assert values.dtype == torch.float32 and torch.equal(values, torch.arange(256) / 255)
    encoded = OPTICAL.encode(np.full((13, 2, 2), 2000, np.float32))  # an array, as the book hands it on
    assert torch.equal(OPTICAL.to_float(encoded), torch.full((13, 2, 2), 51 / 255))
    with pytest.raises(DataError, match="float32"):
        OPTICAL.to_float(values)


@needs_samples
def test_real_level_1c_patch():
    with rasterio.open(SHARED / "sentinel2_l1c_264" / "20201002T221611_20201002T221610_T60HWB.tif") as source:
        image = source.read()
    measured = [1080, 834, 762, 537, 984, 2500, 3139, 3205, 3520, 1518, 14, 1638, 750]
    assert image.mean(axis=(1, 2)) == pytest.approx(measured, abs=0.51)
    levels = OPTICAL.encode(image).mean(axis=(1, 2))
    assert levels == pytest.approx(np.array(measured) * 0.0255 - 0.5, abs=0.6)  # cut off: half a level lower
    assert levels.argmin() == 10


@needs_samples
def test_real_uncalibrated_sar_is_refused():
    bands = []
    for name in ("vv", "vh"):
        with rasterio.open(SHARED / "sentinel1_grd_raw" / f"iw-{name}.tiff") as source:
            bands.append(source.read(1))
    raw = np.stack(bands)
    with pytest.raises(DataError, match="within -100 to 50; found 0 to 2759"):
        SAR.encode(raw)
    dark = (raw / 60).astype(np.float32)  # amplitudes within the range of decibels
    with pytest.raises(DataError, match="not decibels"):
        SAR.encode(dark)


@pytest.mark.parametrize(("setting", "band"), [(OPTICAL, "B1"), (OPTICAL, "B11"), (SAR, "VH")])
def test_a_band_of_zeros_beside_full_ones_is_refused_by_name(setting, band):
    random = np.random.default_rng(0)
    images = random.uniform(-20, -5, (2, 2, 8, 8)) if setting is SAR else random.uniform(300, 3000, (2, 13, 8, 8))
    setting.encode(images)
    images[1, setting.bands.index(band)] = 0
    with pytest.raises(DataError, match=f"{band} all zero beside other bands"):
        setting.encode(images)
    images[:] = 0
    setting.encode(images)  # a whole image without data stays what it is


def test_a_patch_of_level_2a_has_no_b10():
    images = np.random.default_rng(0).uniform(300, 3000, (13, 8, 8))
    images[OPTICAL.bands.index("B10")] = 0
    assert not OPTICAL.encode(images)[10].any()


def test_elevation_is_spread_over_its_percentiles_and_flat_ground_is_zero():
    random = np.random.default_rng(0)
    images = np.stack([random.normal(300, 5, (1, 40, 40)), np.full((1, 40, 40), 71.5)]).astype(np.float32)
    images[0, 0, 0, :3] = 900
    found = DEM.encode(images)
    low, high = np.percentile(images[0], [1, 99])
    expected = ((images[0].clip(low, high) - low) / (high - low) * 255).astype(int)
    assert np.abs(found[0].astype(int) - expected).max() <= 1 and found[0].max() == 255 and found[0].min() == 0
    assert not found[1].any()
    np.testing.assert_array_equal(DEM.encode(3 * images[:1] + 500), DEM.encode(images[:1]), err_msg="scale and offset")
    with pytest.raises(DataError, match="-1000 to 9000"):
        DEM.encode(images * 20)
    with pytest.raises(DataError, match="non-finite"):
        DEM.encode(np.where(images > 800, np.nan, images))


def test_colours_and_codes_are_bytes_already():
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 9), dtype=np.uint8)
    for setting in (RGB, HHA):
        assert setting.encode(images) is images
        with pytest.raises(DataError, match="found float32 values"):
            setting.encode(images.astype(np.float32))
    with pytest.raises(DataError, match="found uint8 values"):
        DEM.encode(images[:1])


def test_a_dictionary_from_before_a_field_existed_still_says_the_same():
    older = {k: v for k, v in SAR.mapping().items() if k != "copies"}
    assert SAR.mapped(older) == SAR
    with pytest.raises(ValueError, match="bands"):
        Modality.from_mapping({k: v for k, v in older.items() if k != "bands"})

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio

from decur_core.data import ssl4eo
from decur_core.data.modality import OPTICAL, SAR
from decur_core.data.raster import DataError
from decur_core.data.ssl4eo import RealPairs

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with the sample data is missing")


def read(path):
    with rasterio.open(path) as source:
        return source.read()


def test_tiles_are_row_major_cuts_of_the_files():
    pairs = RealPairs(SHARED)
    assert len(pairs) == len(set(pairs.ids)) == 16 + 4 + 4
    assert pairs.ids[:6] == [
        f"sen1floods11/Spain_7370579/r{r}c{c}" for r, c in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1))
    ]
    floods = SHARED / "sen1floods11_sample"
    sar, optical = read(floods / "S1" / "Spain_7370579_S1Hand.tif"), read(floods / "S2" / "Spain_7370579_S2Hand.tif")
    item = pairs[4]
    assert item["sar"].shape == (1, 2, 120, 120) and item["optical"].shape == (1, 13, 120, 120)
    assert item["sar"].dtype == item["optical"].dtype == np.float32
    assert (item["sar"][0] == sar[:, 120:240, :120]).all() and (item["optical"][0] == optical[:, 120:240, :120]).all()
    patch = read(SHARED / "sen12mscr_pair" / "ROIs1868_summer_s2_cloudy_19_p30.tif")
    item = pairs[pairs.ids.index("sen12mscr/ROIs1868_summer_19_p30/r1c0")]
    assert (item["optical"][0] == patch[:, 120:240, :120]).all()
    for item in pairs:
        assert item["sar"][0, 0].mean() > item["sar"][0, 1].mean()  # VV is brighter than VH
        level_2a = item["id"].startswith("bigearthnet")
        assert item["optical"][0, 10].mean() < 60 and (item["optical"][0, 10].any() != level_2a)
        assert SAR.encode(item["sar"]).std() > 10 and OPTICAL.encode(item["optical"]).std() > 5


def test_measured_means_of_the_whole_patches(monkeypatch):
    bright = [item for item in RealPairs(SHARED) if item["id"].startswith("bigearthnet")]
    assert min(item["sar"][0, 0].mean() for item in bright) == pytest.approx(-12.2, abs=0.05)
    monkeypatch.setattr(ssl4eo, "TILE", 256)
    monkeypatch.setattr(ssl4eo, "FOLDERS", {"sen12mscr": ssl4eo.FOLDERS["sen12mscr"]})
    means = RealPairs(SHARED)[0]["optical"].mean(axis=(0, 2, 3))
    assert means[[0, 10]] == pytest.approx([1991, 11], abs=0.51)


def test_a_folder_without_a_tile_is_named(monkeypatch):
    monkeypatch.setattr(ssl4eo, "TILE", 264)  # which only the flood chip has room for
    with pytest.raises(DataError, match="sen12mscr_pair: no tile of 264 x 264 pixels fits"):
        RealPairs(SHARED)


@pytest.fixture
def floods(tmp_path):
    """A copy of the flood chip, beside the other samples."""
    for name, _ in ssl4eo.FOLDERS.values():
        (tmp_path / name).symlink_to(SHARED / name)
    (tmp_path / "sen1floods11_sample").unlink()
    shutil.copytree(SHARED / "sen1floods11_sample", tmp_path / "sen1floods11_sample")
    return tmp_path


def change(path, edit, **profile_changes):
    with rasterio.open(path) as source:
        image, profile, names = source.read(), source.profile, list(source.descriptions)
    image = edit(image, names)
    profile.update(dtype=image.dtype, count=len(image), **profile_changes)
    with rasterio.open(path, "w", **profile) as target:
        target.write(image)
        target.descriptions = names


def test_tiles_with_pixels_without_data_are_left_out(floods):
    def hole(image, names):
        image[:, 130, 10] = image.dtype.type(np.nan) if image.dtype.kind == "f" else 0
        return image

    change(floods / "sen1floods11_sample" / "S1" / "Spain_7370579_S1Hand.tif", hole)
    pairs = RealPairs(floods)
    assert len(pairs) == 15 + 8 and "sen1floods11/Spain_7370579/r1c0" not in pairs.ids
    shutil.copy(
        SHARED / "sen1floods11_sample" / "S1" / "Spain_7370579_S1Hand.tif", floods / "sen1floods11_sample" / "S1"
    )
    assert len(RealPairs(floods)) == 16 + 8
    change(floods / "sen1floods11_sample" / "S2" / "Spain_7370579_S2Hand.tif", hole)
    assert RealPairs(floods).ids == pairs.ids


def test_hidden_files_are_no_scenes(floods):
    ids = RealPairs(floods).ids
    (floods / "sen1floods11_sample" / "S1" / "._Spain_7370579_S1Hand.tif").write_bytes(b"left by an archiver")
    assert RealPairs(floods).ids == ids


def test_other_bands_units_and_sizes_are_refused(floods):
    path = floods / "sen1floods11_sample" / "S1" / "Spain_7370579_S1Hand.tif"

    def swapped(image, names):
        names.reverse()
        return image[::-1]

    change(path, swapped)
    with pytest.raises(DataError, match=r"S1Hand.tif: bands are \('VH', 'VV'\)"):
        RealPairs(floods)
    change(path, swapped)
    change(path, lambda image, names: 10 ** (image / 10))
    with pytest.raises(DataError, match="backscatter in dB"):
        RealPairs(floods)
    change(path, lambda image, names: np.log10(image[:, :500]) * 10, height=500)
    with pytest.raises(DataError, match="Spain_7370579: SAR of .500, 512. pixels and optical of .512, 512."):
        RealPairs(floods)


def test_missing_folders_and_files_are_named(floods):
    (floods / "sen12mscr_pair").unlink()
    with pytest.raises(DataError, match="sen12mscr_pair: missing"):
        RealPairs(floods)
    (floods / "sen1floods11_sample" / "S2" / "Spain_7370579_S2Hand.tif").unlink()
    with pytest.raises(DataError, match="Spain_7370579_S2Hand.tif: missing"):
        RealPairs(floods)

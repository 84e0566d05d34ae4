"""torchgeo, written by others, must read the trees that the miniature worlds write and see in them what our readers do.

Where torchgeo changes pixels (noted at each comparison), what is compared is what it leaves unchanged.
"""

import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio

from decur_core.data.bigearthnet import BigEarthNetMM, BigEarthNetV2
from decur_core.data.geonrw import CLASSES, COLOURS, SPLITS, GeoNRW
from decur_core.data.modality import OPTICAL
from decur_core.data.raster import OPTICAL_STEPS, resize
from decur_core.data.ssl4eo import SSL4EOS12
from decur_core.worlds.files import write_bigearthnet, write_ssl4eo
from decur_core.worlds.sar_optical import BigEarthNetWorld, World
from decur_core.worlds.terrain import TerrainWorld, write_geonrw

peer = pytest.importorskip("torchgeo.datasets", reason="torchgeo, the reader to compare with, is not installed")
FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "data" / "torchgeo_fixtures"
samples = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"{FIXTURES} with the sample data is missing")
WITHOUT_B10 = [row for row, band in enumerate(OPTICAL.bands) if band != "B10"]


def test_ssl4eo_written_here_is_the_same_to_torchgeo(tmp_path):
    world = World(2, seed=3)
    write_ssl4eo(tmp_path, world, range(2))
    ours = SSL4EOS12(tmp_path)
    for split, key in (("s1", "sar"), ("s2c", "optical")):
        theirs = peer.SSL4EOS12(tmp_path, split=split, seasons=4)  # takes locations by number, so from 0 on
        for i, item in enumerate(ours):
            sample = theirs[i]
            times = sample["t"].numpy()
            order = np.argsort(times)  # its seasons come in random order
            dates = np.array([datetime.strptime(d, "%Y%m%dT%H%M%S").timestamp() for d in item["dates"][key]])
            assert times[order] - times.min() == pytest.approx(dates - dates[0], abs=200)  # its float32 rounds by 128 s
            images = sample["image"].numpy().reshape(4, -1, 264, 264)[order]
            assert images.shape[:2] == item[key].shape[:2]
            for row in range(images.shape[1]):
                # It repeats pixels (nearest neighbour) until there are 264: one in the middle of each is the file
                side = world.tile // (1 if split == "s1" else OPTICAL_STEPS[row])
                middle = ((np.arange(side) + 0.5) * 264 / side).astype(int)
                native = images[:, row, middle[:, None], middle]
                shown = np.stack([resize(band, (world.tile, world.tile)) for band in native])
                assert (shown == item[key][:, row]).all(), (split, row)


def compare_patches(theirs, ours):
    """Both releases: torchgeo gives VH before VV, whole numbers, and 120 x 120 pixels in all bands."""
    assert len(theirs) == len(ours)
    for i, item in enumerate(ours):
        sample = theirs[i]
        image = sample["image"] if "image" in sample else np.concatenate([sample["image_s1"], sample["image_s2"]])
        sar, optical = np.asarray(image[:2]), np.asarray(image[2:])
        assert sar.shape == (2, 120, 120) and optical.shape == (12, 120, 120)
        assert abs(sar[::-1] - item["sar"]).max() <= 0.5  # decibels
        for row, band in zip(WITHOUT_B10, optical, strict=True):
            # Coarse bands by GDAL's bilinear method, which rounds, and computes in float32 like ours
            limit = 0 if OPTICAL_STEPS[row] == 1 else 0.51
            assert abs(band - item["optical"][row]).max() <= limit, OPTICAL.bands[row]
        assert (sample["label"].numpy().astype(bool) == item["labels"]).all()


def test_bigearthnet_written_here_is_the_same_to_torchgeo(tmp_path):
    world = BigEarthNetWorld(5, tile=120, seed=3)
    write_bigearthnet(tmp_path, world, {"train": range(2), "val": range(2, 3), "test": range(3, 5)})
    for split in ("train", "val", "test"):
        compare_patches(peer.BigEarthNet(tmp_path, split), BigEarthNetMM(tmp_path, split))


@samples
def test_real_bigearthnet_patches_are_the_same_to_torchgeo(tmp_path):
    real = FIXTURES.parent / "bigearthnet_real"
    for name, example in (("BigEarthNet-v1.0", "S2-Example"), ("BigEarthNet-S1-v1.0", "S1-Example")):
        shutil.copytree(real / f"BigEarthNet-{example}", tmp_path / name)
    ours = BigEarthNetMM(tmp_path)
    for split in ("train", "val", "test"):  # torchgeo wants all lists to be there
        (tmp_path / f"bigearthnet-{split}.csv").write_text("".join(f"{a},{b}\n" for a, b in ours._partners.items()))
    compare_patches(peer.BigEarthNet(tmp_path, "test"), BigEarthNetMM(tmp_path, "test"))


@samples
def test_second_release_is_the_same_to_torchgeo(tmp_path):
    """Its fixture, with the backscatter as the floating-point numbers of the real release."""
    shutil.copytree(FIXTURES / "bigearthnet_v2", tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for path in (tmp_path / "BigEarthNet-S1").rglob("*.tif"):
        with rasterio.open(path) as source:
            profile, values = source.profile, source.read()
        with rasterio.open(path, "w", **(profile | {"dtype": "float32"})) as target:
            target.write(values.astype(np.float32))
    for split in ("train", "val", "test"):
        compare_patches(peer.BigEarthNetV2(tmp_path, split), BigEarthNetV2(tmp_path, split))


def compare_tiles(theirs, ours):
    """torchgeo gives whole tiles: colours divided by 255, elevation and labels as they are."""
    assert 16 * len(theirs) == len(ours)
    for tile in range(len(theirs)):
        sample, items = theirs[tile], [ours[16 * tile + k] for k in range(16)]
        side = sample["mask"].shape[-1] // 4
        assert theirs.file_list[tile].endswith(f"{items[0]['id'].removesuffix('_1')}_rgb.jp2")
        for key, scale in (("image", 255), ("dem", 1), ("mask", 1)):
            image = np.rint(sample[key].numpy() * scale) if scale > 1 else sample[key].numpy()
            if key == "dem" and image.max() <= 1:
                image = np.rint(image * 255)  # it divides 8-bit elevation, too, which only its fixture has
            for k, item in enumerate(items):
                window = np.s_[..., side * (k // 4) : side * (k // 4 + 1), side * (k % 4) : side * (k % 4 + 1)]
                assert (item[{"image": "rgb"}.get(key, key)] == image[window]).all(), (tile, key, k)


@pytest.mark.parametrize("split", ["train", "test"])
def test_geonrw_written_here_is_the_same_to_torchgeo(tmp_path, split):
    world = TerrainWorld(48, tile=25, cities=SPLITS[split][:1], seed=3)
    write_geonrw(tmp_path, world, range(48))
    for city in SPLITS[split]:
        (tmp_path / city).mkdir(exist_ok=True)  # torchgeo asks for the folders of all cities
    compare_tiles(peer.GeoNRW(tmp_path, split), GeoNRW(tmp_path, split, missing="skip"))


@samples
def test_geonrw_fixture_is_the_same_to_torchgeo(tmp_path):
    shutil.copytree(FIXTURES / "geonrw", tmp_path, dirs_exist_ok=True)
    for city in SPLITS["train"] + SPLITS["test"]:
        (tmp_path / city).mkdir(exist_ok=True)
    for split in SPLITS:
        compare_tiles(peer.GeoNRW(tmp_path, split), GeoNRW(tmp_path, split, missing="skip"))


def test_classes_and_cities_of_geonrw_are_those_of_torchgeo():
    assert (SPLITS["train"], SPLITS["test"]) == (peer.GeoNRW.train_list, peer.GeoNRW.test_list)
    assert tuple(peer.GeoNRW.colormap.colors) == COLOURS
    assert [name.replace(" ", "") for name in CLASSES[1:]] == list(peer.GeoNRW.classes[1:])

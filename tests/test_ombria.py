import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from decur_core.data.ombria import CLASSES, DATASETS, EVENTS, OPTICAL, SAR, Flood, Ombria, simple_rules
from decur_core.data.raster import DataError
from decur_core.worlds.floods import FloodWorld

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = SHARED / "ombria_half"
needs_shared = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} with the real patches is missing")
SIZE = (10, 14)
# Event -> where its folders are, how its files are called, and their numbers, out of order as text
EVENTS_HERE = {
    "train": ("OmbriaS{}/train", "S{}_{}_{:04d}.png", [2, 10, 700]),
    "test": ("OmbriaS{}/test", "S{}_{}_{:04d}.png", [5]),
    **{event: (f"2021/{event.upper()}/Sentinel{{}}", "{1}_{2}.png", [0, 2, 10]) for event in EVENTS},
}
PARTS = {"BEFORE": ("before", "imbefore"), "AFTER": ("after", "imafter"), "MASK": ("mask", "gt")}


def truth(event, number, sensor, part):
    """Pixels (H, W) or (H, W, 3) of a file; masks do not depend on the sensor."""
    key = (list(EVENTS_HERE).index(event), number, list(PARTS).index(part))
    if part == "MASK":
        return 255 * np.random.default_rng(key).integers(0, 2, SIZE, np.uint8)
    return np.random.default_rng((*key, sensor)).integers(0, 256, SIZE if sensor == 1 else (*SIZE, 3), np.uint8)


def file_of(root, event, number, sensor, part):
    folder, name, _ = EVENTS_HERE[event]
    return root / folder.format(sensor) / part / name.format(sensor, PARTS[part][event in EVENTS], number)


@pytest.fixture
def tree(tmp_path):
    for event, (_, _, numbers) in EVENTS_HERE.items():
        for number in numbers:
            for sensor in (1, 2):
                for part in PARTS:
                    path = file_of(tmp_path, event, number, sensor, part)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(truth(event, number, sensor, part)).save(path)
    return tmp_path


def test_patches_are_read_from_their_published_places(tree):
    assert Ombria(tree, "train").ids == ["train/0002", "train/0010", "train/0700"]
    assert Ombria(tree, "test").ids == ["test/0005"]
    assert Ombria(tree, "2021").ids == [f"{event}/{number}" for event in EVENTS for number in (0, 2, 10)]
    assert Ombria(tree, "guyana").ids == ["guyana/0", "guyana/2", "guyana/10"]
    data = pickle.loads(pickle.dumps(Ombria(tree)))
    assert len(data) == len(set(data.ids)) == 16 and data.left_out == {"absent": 0}
    for i, id in enumerate(data.ids):
        (event, number), item = id.split("/"), data[i]
        assert item["id"] == id and {v.dtype for k, v in item.items() if k != "id"} == {np.dtype(np.uint8)}
        assert item["sar"].shape == (2, 1, *SIZE) and item["optical"].shape == (2, 3, *SIZE)
        for k, part in enumerate(("BEFORE", "AFTER")):
            assert np.array_equal(item["sar"][k, 0], truth(event, int(number), 1, part))
            assert np.array_equal(item["optical"][k], truth(event, int(number), 2, part).transpose(2, 0, 1))
        flooded = truth(event, int(number), 1, "MASK") == 255
        assert np.array_equal(item["mask"] == 1 + CLASSES.index("flooded"), flooded)
        assert np.array_equal(item["mask"] == 1 + CLASSES.index("dry"), ~flooded)


def test_the_modalities_take_the_items_as_they_are(tree):
    item = Ombria(tree, "test")[0]
    assert DATASETS[0].modalities == (SAR, OPTICAL) and DATASETS[0].task.classes == CLASSES
    for modality in DATASETS[0].modalities:
        assert np.array_equal(modality.encode(item[modality.name]), item[modality.name])
    assert [reader.ids for reader in (DATASETS[0].read(tree, split) for split in DATASETS[0].splits)] == [
        Ombria(tree, split).ids for split in ("train", "test", "2021")
    ]


def test_grey_images_may_have_three_equal_channels(tree):
    grey = truth("train", 2, 1, "BEFORE")
    path = file_of(tree, "train", 2, 1, "BEFORE")
    Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(path)
    assert np.array_equal(Ombria(tree, "train")[0]["sar"][0, 0], grey)
    Image.fromarray(truth("train", 2, 2, "BEFORE")).save(path)
    with pytest.raises(DataError, match="S1_before_0002.png: 3 different channels, expected 1"):
        Ombria(tree, "train")[0]


@pytest.mark.parametrize(
    ("sensor", "part", "damage", "message"),
    [
        (1, "AFTER", lambda p: p.write_bytes(p.read_bytes()[:-40]), "S1_after_0010.png: cannot be read"),
        (2, "BEFORE", lambda p: Image.new("L", SIZE[::-1]).save(p), "S2_before_0010.png: 1 different channels, .* 3"),
        (2, "AFTER", lambda p: Image.new("RGB", (9, 9)).save(p), r"S2_after_0010.png: \(9, 9\) pixels, but .*has \(10"),
        (2, "MASK", lambda p: Image.new("L", SIZE[::-1]).save(p), "S1_mask_0010.png: not the mask of .*S2_mask_0010"),
        (1, "BEFORE", lambda p: Image.new("I;16", SIZE[::-1]).save(p), "S1_before_0010.png: .*mode L or RGB.*I;16"),
    ],
)
def test_a_bad_file_is_named_and_others_stay(tree, sensor, part, damage, message):
    data = Ombria(tree, "train")
    damage(file_of(tree, "train", 10, sensor, part))
    with pytest.raises(DataError, match=message):
        data[1]
    assert data[0]["id"] == "train/0002"


def test_masks_have_two_values(tree):
    for sensor in (1, 2):
        Image.new("L", SIZE[::-1], 7).save(file_of(tree, "france", 2, sensor, "MASK"))
    with pytest.raises(DataError, match=r"gt_2.png: values \[7\], expected 0 \(dry\) and 255 \(flooded\)"):
        Ombria(tree, "france")[1]


def test_what_is_missing_is_named_or_left_out(tree):
    file_of(tree, "train", 700, 2, "MASK").unlink()
    with pytest.raises(DataError, match="1 events or patches are not whole: no 0700 in .*OmbriaS2/train/MASK"):
        Ombria(tree, "train")
    data = Ombria(tree, "train", missing="skip")
    assert data.ids == ["train/0002", "train/0010"] and data.left_out == {"absent": 1}
    shutil.rmtree(tree / "2021" / "TIMOR")
    with pytest.raises(DataError, match="no patch in .*2021/TIMOR/Sentinel1/BEFORE"):
        Ombria(tree, "2021")
    assert len(Ombria(tree, "2021", missing="skip")) == 9
    with pytest.raises(DataError, match="no patch in .*TIMOR"):
        Ombria(tree, "timor", missing="skip")
    for settings in ({"split": "val"}, {"missing": "ignore"}):
        with pytest.raises(ValueError, match="allowed are (train, test, 2021, albania|error)"):
            Ombria(tree, **settings)


def test_hidden_files_are_no_patches(tree):
    path = file_of(tree, "test", 5, 1, "MASK")
    path.with_name("._S1_mask_0006.png").write_bytes(b"left by an archiver")
    path.with_name("S1_mask_notes.png").write_bytes(b"no number")
    assert Ombria(tree, "test").ids == ["test/0005"]


@needs_shared
def test_real_patches_have_the_measured_numbers():
    counts = {split: len(Ombria(REAL, split)) for split in ("train", "test", "2021", *EVENTS)}
    assert counts == {"train": 624, "test": 70, "2021": 150, "albania": 22, "france": 88, "guyana": 30, "timor": 10}
    shares = {}
    for split in ("test", "2021"):
        data = Ombria(REAL, split)
        masks = np.stack([data[i]["mask"] for i in range(len(data))])
        assert set(np.unique(masks)) == {1, 2}
        shares[split] = (masks == 2).mean()
    assert shares == pytest.approx({"test": 0.34, "2021": 0.11}, abs=0.01)


@needs_shared
def test_real_water_after_the_flood_is_dark_in_both_sensors():
    data = Ombria(REAL, "test")
    index, radar = [], []
    for item in (data[i] for i in range(0, 70, 5)):
        flooded, near_infrared = item["mask"] == 2, item["optical"][1, OPTICAL.bands.index("B8")].astype(float)
        index.append(near_infrared[flooded].mean() - near_infrared[~flooded].mean())
        radar.append(item["sar"][1, 0][flooded].mean() - item["sar"][1, 0][~flooded].mean())
    assert np.median(index) < -5 and np.median(radar) < -5


class Places:
    """As a ``Store``: four places, of which the left part is flooded; dark in the radar, or wet, after the flood."""

    shapes = {"sar": (1, 8, 8), "optical": (3, 8, 8), "mask": (1, 8, 8)}

    def __init__(self, columns, bright=0):
        self.columns, self.bright = columns, bright

    def __len__(self):
        return 4

    def read(self, i, name, season):
        flooded = np.arange(8) < self.columns
        rows = {"sar": [np.where(flooded & (season == 1), 20, 90)], "mask": [np.where(flooded, 2, 1)]}
        rows["optical"] = [np.full(8, 50), np.where(flooded, 20, 80), np.where(flooded, 60, 40)]
        image = np.array(rows[name])[:, None].repeat(8, 1)
        return (image + self.bright * (name == "sar")).astype(np.uint8)


def test_simple_rules_take_their_thresholds_from_training_places():
    rules = simple_rules({"train": Places(2), "2021": Places(4, bright=100)})
    assert rules["every pixel"] == {"train": 25, "2021": 50}
    assert rules["NDWI"] == {"train": 100, "2021": 100}
    assert rules["dark radar"] == {"train": 100, "2021": 0}, "nothing there is as dark as the threshold"


@pytest.mark.parametrize("predicted", [0, 1])
def test_images_without_a_flood_have_no_score(predicted):
    """Where none is predicted either, its IoU is 0 / 0: a record of that could not be averaged or put into a table."""
    task = Flood(CLASSES)
    dry, wet = (task.target(torch.full((1, 4, 4), value, dtype=torch.uint8)) for value in (1, 2))
    found = torch.full_like(dry, predicted)
    with pytest.raises(DataError, match="no flooded pixel to score"):
        task.score([(found, dry), (found, dry)])
    assert task.score([(found, dry), (found, wet)])["flood"] == 50 * predicted


def test_the_drawn_floods_are_read_as_the_published_ones_and_lie_where_the_mask_says():
    world = FloodWorld(8, seed=3)
    for i in (5, 1):
        item, again = world[i], FloodWorld(6, seed=3)[i]
        assert all(np.array_equal(item[name], again[name]) for name in ("sar", "optical", "mask"))
        assert item["sar"].shape == (2, 1, 36, 36) and item["optical"].shape == (2, 3, 36, 36)
        assert {x.dtype for k, x in item.items() if k != "id"} == {np.dtype(np.uint8)}
        flooded = item["mask"] == 2
        assert 0.02 < flooded.mean() < 0.46 and set(np.unique(item["mask"])) == {1, 2}
        before, after = item["sar"][:, 0].astype(float)
        assert (after - before)[flooded].mean() < (after - before)[~flooded].mean() - 30, "water is dark"

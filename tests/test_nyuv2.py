import fcntl
import pickle
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import scipy.io
from PIL import Image

from decur_core.data.nyuv2 import CAMERA, CLASSES_40, NYUv2, intrinsics
from decur_core.data.raster import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL, META, HALF = SHARED / "nyu_rgbd_sample", SHARED / "nyuv2_meta", SHARED / "nyuv2_half"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with the sample data is missing")
SIZE = (48, 64)
SPLITS = {"train": ["2", "3", "4"], "test": ["0", "1"]}


def truth_of(i):
    random = np.random.default_rng(i)
    labels = random.integers(0, 895, SIZE)
    to_40 = np.append(0, np.random.default_rng(99).integers(1, 41, 894))
    colour = np.array([200, 100, 20 + 10 * i], np.uint8)
    return {"colour": colour, "depth": random.uniform(0.7, 10, SIZE), "labels": labels, "mask": to_40[labels]}


@pytest.fixture
def tree(tmp_path):
    """Five small images as a tree."""
    for folder in ("RGB", "Depth", "Label"):
        (tmp_path / folder).mkdir()
    for split, names in SPLITS.items():
        (tmp_path / f"{split}.txt").write_text("".join(f"RGB/{name}.jpg\tLabel/{name}.png\n" for name in names))
    for i in range(5):
        truth = truth_of(i)
        pixels = np.full((*SIZE, 3), truth["colour"])
        Image.fromarray(pixels).save(tmp_path / "RGB" / f"{i}.jpg")
        np.save(tmp_path / "Depth" / f"{i}.npy", truth["depth"].astype(np.float32))
        label = Image.fromarray(truth["mask"].astype(np.uint8), "P")
        label.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))  # colours that are not the values
        label.save(tmp_path / "Label" / f"{i}.png")
    return tmp_path


@pytest.fixture
def published(tmp_path):
    """The same images as MATLAB writes them: axes in reverse order."""
    truth = [truth_of(i) for i in range(5)]
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        colours = [np.full((*SIZE, 3), t["colour"]).T for t in truth]
        file["images"] = np.array(colours, np.uint8)
        file["depths"] = np.array([t["depth"].T for t in truth], np.float32)
        file["labels"] = np.array([t["labels"].T for t in truth], np.uint16)
    to_40 = np.random.default_rng(99).integers(1, 41, 894).astype(np.uint8)
    scipy.io.savemat(tmp_path / "classMapping40.mat", {"mapClass": to_40[None]})
    numbers = {f"{split}Ndxs": np.array([[int(name) + 1] for name in SPLITS[split]], np.uint16) for split in SPLITS}
    scipy.io.savemat(tmp_path / "splits.mat", numbers)
    return tmp_path


@needs_shared
def test_classes_are_those_of_the_published_map():
    names = scipy.io.loadmat(META / "classMapping40.mat")["className"].ravel()
    assert tuple(str(name.item()) for name in names) == CLASSES_40


@needs_shared
def test_real_image_has_the_measured_values():
    data = NYUv2(REAL, "test", missing="skip")
    assert data.ids == ["0"] and data.left_out == {"absent": 653}
    item = data[0]
    assert item["rgb"].shape == (3, 480, 640) and item["depth"].shape == (1, 480, 640)
    assert item["rgb"].dtype == item["mask"].dtype == np.uint8
    assert item["depth"].dtype == np.float32 and item["gravity"] is None
    assert item["depth"].min() == pytest.approx(1.7985, abs=1e-4)
    assert item["depth"].max() == pytest.approx(3.6156, abs=1e-4)
    with rasterio.open(SHARED / "nyu_hha_reference" / "0.png") as source:
        assert abs(item["depth"] - source.read() / 10_000).max() < 1e-4
    with rasterio.open(REAL / "Label" / "0.png") as source:  # which gives the indices of a palette
        assert np.array_equal(item["mask"], source.read(1))
    assert item["mask"].min() == 0 and item["mask"].max() == 40 and (item["mask"] == 0).mean() < 0.08
    (fx, _, cx), (_, fy, cy), last = item["intrinsics"].tolist()
    assert (fx, fy, cx, cy) == pytest.approx(CAMERA, rel=1e-12) and last == [0, 0, 1]
    text = (SHARED / "LAYOUTS.md").read_text()
    assert tuple(map(float, re.search(r"colour fx (\S+) fy (\S+) cx (\S+) cy (\S+);", text).groups())) == CAMERA
    assert NYUv2(REAL, missing="skip").ids == ["0"]
    with pytest.raises(DataError, match="has 1 of the 654 images of split test; .*missing='skip'"):
        NYUv2(REAL, "test")
    with pytest.raises(DataError, match="has 0 of the 795 images of split train"):
        NYUv2(REAL, "train", missing="skip")


@needs_shared
def test_real_images_of_half_size_are_those_of_the_whole_one():
    train, test = NYUv2(HALF, "train"), NYUv2(HALF, "test")
    assert len(train) == 795 and len(test) == 654 and not set(train.ids) & set(test.ids)
    item, whole = test[test.ids.index("0")], NYUv2(REAL, "test", missing="skip")[0]
    assert item["rgb"].shape == (3, 240, 320) and item["depth"].shape == (1, 240, 320) == (1, *item["mask"].shape)
    assert item["depth"].dtype == np.float32 and item["depth"].min() == np.float32(1.784)
    halved = whole["depth"].reshape(1, 240, 2, 320, 2).mean((2, 4))
    assert abs(item["depth"] - halved).mean() < 0.02  # steps of 4 cm
    labelled = (item["mask"] > 0) & (whole["mask"][::2, ::2] > 0)
    assert (item["mask"] == whole["mask"][::2, ::2])[labelled].mean() > 0.95 and labelled.mean() > 0.85
    # Half the focal length, and rays that go through the same corners
    assert np.allclose(item["intrinsics"][[0, 1], [0, 1]], np.array(CAMERA[:2]) / 2)
    assert np.allclose(item["intrinsics"], intrinsics(240, 320)) and abs(item["gravity"][1]) > 0.9


@needs_shared
def test_gravity_is_opposite_to_the_floors_normal_in_the_real_image(tmp_path):
    shutil.copytree(REAL, tmp_path, dirs_exist_ok=True)
    shutil.copy(META / "camera_rotations_NYU.txt", tmp_path)
    item = NYUv2(tmp_path, "test", missing="skip")[0]
    depth, k = item["depth"][0].astype(float), item["intrinsics"]
    v, u = np.indices(depth.shape) + 1
    points = np.stack([(u - k[0, 2]) / k[0, 0] * depth, (v - k[1, 2]) / k[1, 1] * depth, depth], 2)
    points = points[item["mask"] == 1 + CLASSES_40.index("floor")]
    for _ in range(5):  # leave out what the outline of the mask has of other things
        centred = points - points.mean(0)
        normal = np.linalg.svd(centred, full_matrices=False)[2][2]
        distance = abs(centred @ normal)
        points = points[distance <= np.quantile(distance, 0.9)]

    def degrees(a):
        return np.degrees(np.arccos(abs(a @ normal)))

    turn = np.loadtxt(META / "camera_rotations_NYU.txt")[:3]
    assert degrees(item["gravity"]) < 1.5 and item["gravity"][1] > 0.99
    assert degrees(turn[1]) > 2.5 and degrees(turn[[0, 2, 1], 2] * [-1, 1, -1]) > 4  # other ways to read it
    assert np.linalg.norm(item["gravity"]) == pytest.approx(1, abs=1e-5)


@needs_shared
def test_rotations_are_the_shortest_that_bring_their_third_axis_up():
    turns = np.loadtxt(META / "camera_rotations_NYU.txt").reshape(-1, 3, 3)
    assert len(turns) == 1449
    # The shortest rotation to axis k is symmetric but for row and column k.
    assert np.array_equal(turns[:, 0, 1], turns[:, 1, 0]) and not np.array_equal(turns[:, 0, 2], turns[:, 2, 0])
    assert np.array_equal(turns[:, 2, :2], -turns[:, :2, 2])
    # The cameras of the same frames in SUN RGB-D, whose rotations are in these coordinates too, agree.
    lines = (SHARED / "sunrgbd_lists" / "sunrgbd_training_images.txt").read_text().split()
    other = np.loadtxt(SHARED / "sunrgbd_lists" / "sunrgbd_train_T_fileNames.txt").reshape(-1, 3, 4)[:, :, :3]
    pairs = [(i, int(match[1]) - 1) for i, line in enumerate(lines) if (match := re.search(r"/NYU(\d{4})/", line))]
    here, there = np.array(pairs).T
    angles = [
        np.degrees(np.arccos((turns[there][..., 2, :] * rows).sum(1)))
        for rows in (other[here][:, 2], other[here][:, :, 2])
    ]
    assert np.median(angles[0]) < 5 < 15 < np.median(angles[1])


@needs_shared
def test_official_lists_of_both_kinds_agree(tmp_path):
    shutil.copytree(REAL, tmp_path, dirs_exist_ok=True)
    shutil.copy(META / "splits.mat", tmp_path)
    assert NYUv2(tmp_path, "test", missing="skip").ids == ["0"]
    path = tmp_path / "test.txt"
    path.write_text(path.read_text().replace("RGB/1448.jpg\tLabel/1448.png\n", ""))
    with pytest.raises(DataError, match="test.txt: not the images of splits.mat, which has 654; remove one"):
        NYUv2(tmp_path, "test", missing="skip")


def check(data, names):
    assert data.ids == names and len(data) == len(names) and data.left_out == {"absent": 0}
    for i, name in enumerate(names):
        item, truth = data[i], truth_of(int(name))
        assert item["id"] == name and item["rgb"].shape == (3, *SIZE) and item["mask"].dtype == np.uint8
        assert np.allclose(item["rgb"].reshape(3, -1).mean(1), truth["colour"], atol=2.5)
        assert np.array_equal(item["depth"][0], truth["depth"].astype(np.float32))
        assert np.array_equal(item["mask"], truth["mask"])
        assert np.array_equal(item["intrinsics"], intrinsics(*SIZE))


def test_tree_and_published_file_give_the_same_items(tree, published):
    for split, names in (*SPLITS.items(), (None, list("01234"))):
        check(pickle.loads(pickle.dumps(NYUv2(tree, split))), names)
    shutil.rmtree(tree / "RGB")
    for split, names in (*SPLITS.items(), (None, list("01234"))):
        check(pickle.loads(pickle.dumps(NYUv2(published, split))), names)


def test_a_file_that_cannot_be_locked_is_read(published):
    """Many network file systems and read-only disks have no locks; one that another program holds is as good."""
    with open(published / "nyu_depth_v2_labeled.mat", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        check(NYUv2(published, "test"), SPLITS["test"])


def test_lists_may_have_bare_names(tree):
    (tree / "test.txt").write_text("\n".join(SPLITS["test"]))
    check(NYUv2(tree, "test"), SPLITS["test"])


def in_millimetres(tree):
    for i in range(5):
        (tree / "Depth" / f"{i}.npy").unlink()
        Image.fromarray(np.rint(1000 * truth_of(i)["depth"]).astype(np.uint16)).save(tree / "Depth" / f"{i}.png")


def test_depth_may_be_images_in_millimetres(tree):
    in_millimetres(tree)
    for i, item in enumerate(NYUv2(tree, "test")):
        assert item["depth"].dtype == np.float32 and item["depth"].shape == (1, *SIZE)
        assert abs(item["depth"][0] - truth_of(i)["depth"]).max() <= 0.000501


def test_depth_images_of_another_unit_or_kind_are_refused(tree):
    in_millimetres(tree)
    data, path = NYUv2(tree, "test"), tree / "Depth" / "1.png"
    for depth, message in (
        (np.full(SIZE, 18000, np.uint16), "1.png: depth up to 18000, expected millimetres"),  # 1.8 m in steps of 0.1 mm
        (np.full(SIZE, 180, np.uint8), "1.png: .*mode I;16.*mode L"),
    ):
        Image.fromarray(depth).save(path)
        with pytest.raises(DataError, match=message):
            data[1]
    path.unlink()
    with pytest.raises(DataError, match="1.png: missing; expected an image of mode I;16"):
        data[1]
    assert data[0]["id"] == "0"


def test_intrinsics_follow_the_size():
    whole, half = intrinsics(480, 640), intrinsics(240, 320)
    corner = np.array([0.5, 0.5, 1])  # outer corner of the first pixel, and of the last one: same rays at any size
    for fraction in (0, 1):
        a, b = corner + fraction * np.array([640, 480, 0]), corner + fraction * np.array([320, 240, 0])
        assert np.allclose(np.linalg.solve(whole, a), np.linalg.solve(half, b))


def test_gravity_is_that_of_the_images_number(tree):
    angles, turns = np.radians([5, 10, 15, 20, 25]), np.zeros((5, 3, 3))
    turns[:, 0, 0], turns[:, 1, 1], turns[:, 2, 2] = 1, np.cos(angles), np.cos(angles)
    turns[:, 1, 2], turns[:, 2, 1] = np.sin(angles), -np.sin(angles)  # cameras that look down so much
    path = tree / "camera_rotations_NYU.txt"
    path.write_text("\n".join("\n".join(" ".join(map(str, row)) for row in turn) + "\n" for turn in turns))
    data = NYUv2(tree, "train")
    for item, angle in zip([data[i] for i in range(3)], angles[2:], strict=True):
        assert np.allclose(item["gravity"], [0, np.cos(angle), np.sin(angle)])
    np.savetxt(path, turns[:3].reshape(-1, 3))
    with pytest.raises(DataError, match="NYU.txt: 3 rotations, none for 3"):
        NYUv2(tree, "train")
    np.savetxt(path, 2 * turns.reshape(-1, 3))
    with pytest.raises(DataError, match="NYU.txt: not all of its matrices are rotations"):
        NYUv2(tree, "train")
    path.write_text("1 0 0\n0 1\n")
    with pytest.raises(DataError, match="NYU.txt: cannot be read; expected 3 x 3 numbers"):
        NYUv2(tree, "train")


def save(path, pixels):
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("path", "damage", "message"),
    [
        ("Depth/3.npy", Path.unlink, "3.npy: missing"),
        ("Label/3.png", Path.unlink, "3.png: missing; expected an image of mode P or L"),
        ("RGB/3.jpg", lambda p: p.write_bytes(p.read_bytes()[:-40]), "RGB/3.jpg: cannot be read; .*truncated"),
        ("Label/3.png", lambda p: p.write_bytes(p.read_bytes()[:-400]), "3.png: cannot be read"),
        ("Depth/3.npy", lambda p: p.write_bytes(p.read_bytes()[:-40]), "3.npy: cannot be read"),
        ("Depth/3.npy", lambda p: np.save(p, np.array([{}])), "3.npy: cannot be read.*pickle"),
        ("Depth/3.npy", lambda p: np.savez(p.open("wb"), np.ones(SIZE)), "3.npy: cannot be read"),
        ("Depth/3.npy", lambda p: np.save(p, np.ones(SIZE, np.uint16)), r"3.npy: uint16 \(48, 64\), expected .*metres"),
        ("Depth/3.npy", lambda p: np.save(p, np.ones((1, *SIZE))), r"3.npy: float64 \(1, 48, 64\), expected"),
        (
            "Depth/3.npy",
            lambda p: np.save(p, np.ones((48, 65))),
            r"3.npy: \(48, 65\) pixels, but .*3.jpg has \(48, 64\)",
        ),
        ("Depth/3.npy", lambda p: np.save(p, np.zeros(SIZE)), "3.npy: nothing but holes; leave"),
        ("Depth/3.npy", lambda p: np.save(p, np.full(SIZE, 1500.0)), "3.npy: depth 1500.0 .*expected metres"),
        ("Depth/3.npy", lambda p: np.save(p, np.full(SIZE, -0.1)), "3.npy: depth -0.1.*expected metres"),
        ("Depth/3.npy", lambda p: np.save(p, np.full(SIZE, np.nan)), "3.npy: depth nan.*expected metres"),
        ("Label/3.png", lambda p: save(p, np.full(SIZE, 41, np.uint8)), "3.png: label 41 .*expected 0 to 40; take"),
        ("Label/3.png", lambda p: save(p, np.zeros((*SIZE, 3), np.uint8)), "3.png: .*mode P or L.*mode RGB"),
        ("RGB/3.jpg", lambda p: save(p, np.zeros(SIZE, np.uint8)), "3.jpg: .*expected.*mode RGB.*mode L"),
        ("RGB/3.jpg", lambda p: save(p, np.zeros((45, 64, 3), np.uint8)), "3.jpg: 45 x 64 pixels, expected the ratio"),
    ],
)
def test_a_bad_image_is_refused_by_name_and_others_stay(tree, path, damage, message):
    damage(tree / path)
    data = NYUv2(tree, "train")
    with pytest.raises(DataError, match=message):
        data[1]
    assert data[0]["id"] == "2" and data[2]["id"] == "4"


def test_hidden_files_are_no_images(tree):
    ids = NYUv2(tree).ids
    (tree / "RGB" / "._3.jpg").write_bytes(b"left by an archiver")
    assert NYUv2(tree).ids == ids


def test_bad_lists_and_settings_are_refused(tree):
    for text, message in (
        ("0\n1\n0\n", "name 0 twice"),
        ("0\n1\n2\n", "name 2 twice"),  # which is for training
        ("RGB/0.jpg\tLabel/1.png\n", "test.txt: .*files of one image.*'0', '1'"),
        ("0\n1\n9\n", "has 2 of the 3 images of split test; .*missing='skip'"),
    ):
        (tree / "test.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            NYUv2(tree, "test")
    assert NYUv2(tree, "test", missing="skip").ids == ["0", "1"]
    (tree / "test.txt").unlink()
    with pytest.raises(DataError, match="test.txt: missing"):
        NYUv2(tree, "train")
    for settings in ({"split": "val"}, {"missing": "ignore"}):
        with pytest.raises(ValueError, match="allowed are (train|error)"):
            NYUv2(tree, **settings)


def test_bad_published_files_are_refused(published):
    path = published / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "a") as file:
        file["labels"][3, 5, 7] = 895
        file["depths"][4] = 0
    data = NYUv2(published, "train")
    with pytest.raises(DataError, match="labeled.mat: .*label 895 in image 3"):
        data[1]
    with pytest.raises(DataError, match="labeled.mat: nothing but holes"):
        data[2]
    assert data[0]["id"] == "2"
    for name in ("classMapping40.mat", "splits.mat"):
        good = (published / name).read_bytes()
        (published / name).write_bytes(good[:150])
        with pytest.raises(DataError, match=f"{name}: cannot be read; expected a MATLAB file with"):
            NYUv2(published, "train")
        (published / name).unlink()
        with pytest.raises(DataError, match=f"{name}: missing; expected a MATLAB file with"):
            NYUv2(published, "train")
        (published / name).write_bytes(good)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="labeled.mat: cannot be read"):
        NYUv2(published, "train")
    path.unlink()
    with pytest.raises(DataError, match="labeled.mat: missing; expected the .mat of .*, or else a tree with"):
        NYUv2(published, "train")

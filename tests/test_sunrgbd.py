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

from decur_core.data.hha import depth_to_hha
from decur_core.data.raster import DataError
from decur_core.data.sunrgbd import CLASSES_37, SUNRGBD, decode_depth

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL, LISTS = SHARED / "sunrgbd_native_sample", SHARED / "sunrgbd_lists"
SAMPLE = "kv2/align_kv2/2014-12-18_11-31-54_260595134347"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with the sample data is missing")

TRAIN = ["kv1/NYUdata/NYU0003", "kv2/kinect2data/000065-resize", "xtion/sun3ddata/home/scan1/0000285-000009641860"]
TEST = ["kv1/b3dodata/img_0063", "realsense/lg/2014_10_30-15_46_48-1311000073"]
K = np.array([[52.5, 0, 31.7], [0, 52.25, 24.125], [0, 0, 1]])


def rotation(axis, degrees):
    a, b = [(1, 2), (2, 0), (0, 1)][axis]
    turn, angle = np.eye(3), np.radians(degrees)
    turn[[a, b], [a, b]], turn[a, b], turn[b, a] = np.cos(angle), -np.sin(angle), np.sin(angle)
    return turn


def write_frame(top, frame, *, seed, size=(48, 64)):
    """A frame as published, and what is in it."""
    random, folder = np.random.default_rng(seed), top / frame
    truth = {"mm": random.integers(1, 65536, size), "turn": rotation(0, 20 + seed) @ rotation(2, 3)}
    truth["mask"] = random.integers(0, 38, size)
    for part in ("image", "depth", "depth_bfx", "extrinsics"):
        (folder / part).mkdir(parents=True)
    b3do = "b3do" in frame
    pixels = np.full((*size, 3), (200, 100, 20 + seed), np.uint8)
    Image.fromarray(pixels).save(folder / "image" / ("img_0063.jpg" if b3do else "0000144.jpg"))
    for part, millimetres in (("depth_bfx", truth["mm"]), ("depth", truth["mm"] * (random.random(size) > 0.2))):
        bits = [(int(v) * 8) % 65536 + int(v) // 8192 for v in millimetres.ravel()]
        name = "img_0063_abs.png" if b3do else "0000144.png"
        Image.fromarray(np.array(bits, np.uint16).reshape(size)).save(folder / part / name)
    (folder / "intrinsics.txt").write_text((" " if b3do else "\n").join(" ".join(map(str, row)) for row in K.tolist()))
    numbers = [" ".join(f"{v:f}" for v in (*row, 0)) for row in truth["turn"]]
    (folder / "extrinsics" / "20141221170930.txt").write_text("\n".join(numbers) + "\n")
    return truth


def write_masks(root, masks):
    path = root / "SUNRGBDtoolbox" / "Metadata" / "SUNRGBD2Dseg.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        references = file.create_dataset("SUNRGBD2Dseg/seglabel", (len(masks), 1), h5py.ref_dtype)
        for row, mask in enumerate(masks):
            references[row, 0] = file.create_dataset(f"#refs#/{row}", data=mask.T.astype(float)).ref
    return path


@pytest.fixture
def tree(tmp_path):
    """Five small frames in the native tree, with both lists and the masks; (root, frame -> truth)."""
    truth = {frame: write_frame(tmp_path / "SUNRGBD", frame, seed=seed) for seed, frame in enumerate(TRAIN + TEST)}
    for name, frames in (("training", TRAIN), ("testing", TEST)):
        slashes = ["/", "//"]
        lines = [f"SUNRGBD/{f}{slashes[i % 2]}image/0000144.jpg\n" for i, f in enumerate(frames)]
        (tmp_path / f"sunrgbd_{name}_images.txt").write_text("".join(lines))
    write_masks(tmp_path, [truth[frame]["mask"] for frame in TEST + TRAIN])
    return tmp_path, truth


def test_decode_depth_is_the_rotation_for_all_values():
    values = np.arange(65536)
    depth = decode_depth(values.astype(np.uint16))
    millimetres = values // 8 + values % 8 * 8192
    assert depth.dtype == np.float32 and np.allclose(depth, millimetres / 1000, rtol=1e-7, atol=0)
    assert sorted(np.rint(1000 * depth.astype(float))) == list(range(65536))  # one to one
    assert decode_depth(np.array([[0, 9870 * 8 % 65536 + 1]], np.uint16)).tolist() == [[0, np.float32(9.87)]]
    for dtype in (np.int32, np.uint8, np.int16, float):
        with pytest.raises(DataError, match=f"is uint16, found {np.dtype(dtype)}"):
            decode_depth(np.zeros(3, dtype))


@needs_shared
def test_classes_are_those_of_the_layout_notes():
    names = re.search(r"37 classes \+ 0 = void: ([a-z_ ]+)", (SHARED / "LAYOUTS.md").read_text())[1]
    assert tuple(names.split()) == CLASSES_37 and len(CLASSES_37) == 37


@needs_shared
def test_real_frame_has_the_measured_values():
    for root in (REAL, REAL / "SUNRGBD"):
        filled, raw = SUNRGBD(root), SUNRGBD(root, depth="depth")
        assert filled.ids == [SAMPLE] and len(filled) == 1 and filled.left_out == {"absent": 0}
        item, holes = filled[0], raw[0]["depth"] == 0
        assert set(item) == {"id", "rgb", "depth", "intrinsics", "gravity"}
        assert item["rgb"].shape == (3, 530, 730) and item["rgb"].dtype == np.uint8
        assert item["depth"].shape == (1, 530, 730) and item["depth"].dtype == np.float32
        assert item["depth"].min() > 0 and holes.mean() == pytest.approx(0.134, abs=5e-4)
        assert item["intrinsics"].tolist() == [[529.5, 0, 365], [0, 529.5, 265], [0, 0, 1]]
        assert item["gravity"].tolist() == [-0.004693, 0.937961, 0.34671]
    for data, part in ((item, "depth_bfx"), (raw[0], "depth")):
        with rasterio.open(REAL / "SUNRGBD" / SAMPLE / part / "0000144.png") as source:  # another reader of 16 bits
            assert np.array_equal(np.rint(1000 * data["depth"][0]), source.read(1) // 8)  # nothing beyond 8.19 m here
    with rasterio.open(REAL / "SUNRGBD" / SAMPLE / "image" / "0000144.jpg") as source:
        assert abs(item["rgb"] - source.read().astype(float)).mean() < 1


@needs_shared
def test_gravity_is_opposite_to_the_floors_normal_in_the_real_frame():
    item = SUNRGBD(REAL, depth="depth")[0]
    depth, k = item["depth"][0].astype(float), item["intrinsics"]
    hha = depth_to_hha(depth, k)  # which finds gravity without being told
    floor = (depth > 0) & (hha[..., 1] < 12) & (abs(hha[..., 2].astype(int) - 38) < 12)
    assert floor.sum() > 50_000
    v, u = np.indices(depth.shape) + 1
    points = np.stack([(u - k[0, 2]) / k[0, 0] * depth, (v - k[1, 2]) / k[1, 1] * depth, depth], 2)[floor]
    normal = np.linalg.svd(points - points.mean(0), full_matrices=False)[2][2]

    def degrees(a):
        return np.degrees(np.arccos(abs(a @ normal)))

    assert degrees(item["gravity"]) < 2 < 35 < degrees(item["gravity"] * [-1, 1, -1])  # the other way to read it
    heights = points @ item["gravity"]
    assert heights.mean() == pytest.approx(1.3, abs=0.05) and heights.std() < 0.02  # below the camera, and level
    told = depth_to_hha(depth, k, item["gravity"]).astype(int)
    assert np.median(abs(told - hha)[depth > 0], axis=0).max() <= 2


@needs_shared
def test_official_lists_are_complete_and_agree_with_those_of_nyuv2(tmp_path):
    for path in LISTS.glob("*_images.txt"):
        shutil.copy(path, tmp_path)
    shutil.copytree(REAL / "SUNRGBD", tmp_path / "SUNRGBD")
    data = SUNRGBD(tmp_path, "test", missing="skip")
    assert data.ids == [SAMPLE] and data.left_out == {"absent": 5049}
    with pytest.raises(DataError, match=r"1 of 5050 frames, lacks kv1/NYUdata/NYU0001; .*missing='skip'"):
        SUNRGBD(tmp_path, "test")
    with pytest.raises(DataError, match="0 of 5285 frames"):
        SUNRGBD(tmp_path, "train", missing="skip")
    assert "mask" not in data[0]
    frames = {name: data._list(name) for name in ("test", "train")}
    splits = scipy.io.loadmat(SHARED / "nyuv2_meta" / "splits.mat")
    for name, sources in (
        ("train", "NYUdata 795 b3dodata 278 align_kv2 150 kinect2data 1774 sa 415 sh 21 shr 151 sun3ddata 1551"),
        ("test", "NYUdata 654 b3dodata 276 align_kv2 149 kinect2data 1711 lg 548 sa 24 sun3ddata 1539"),
    ):
        found = [frame.split("/")[1] for frame in frames[name]]
        for source, count in zip(*[iter(sources.split())] * 2, strict=True):
            assert found.count(source) == int(count)
        nyu = {int(frame[-4:]) for frame in frames[name] if "NYU" in frame}
        assert nyu == set(splits[f"{name}Ndxs"].ravel().tolist())
    # masks of all frames, of which only that of the sample is there: line 1712 of the list for testing
    mask = np.random.default_rng(0).integers(0, 38, (530, 730))
    path = write_masks(tmp_path, [])
    with h5py.File(path, "w") as file:
        references = file.create_dataset("SUNRGBD2Dseg/seglabel", (10_335, 1), h5py.ref_dtype)
        references[1711, 0] = file.create_dataset("#refs#/a", data=mask.T.astype(float)).ref
    for split in ("test", None):
        assert np.array_equal(SUNRGBD(tmp_path, split, missing="skip")[0]["mask"], mask)


def test_frames_are_read_as_written(tree):
    root, truth = tree
    for split, frames in (("train", TRAIN), ("test", TEST), (None, sorted(TRAIN + TEST))):
        data = pickle.loads(pickle.dumps(SUNRGBD(root, split)))
        raw = SUNRGBD(root, split, depth="depth")
        assert data.ids == frames
        for i, frame in enumerate(frames):
            item, expected = data[i], truth[frame]
            assert item["id"] == frame and item["mask"].dtype == np.uint8
            assert np.array_equal(item["mask"], expected["mask"])
            assert np.array_equal(np.rint(1000 * item["depth"][0].astype(float)), expected["mm"])
            assert 0.15 < (raw[i]["depth"] == 0).mean() < 0.25
            assert np.array_equal(item["intrinsics"], K)
            assert np.allclose(expected["turn"] @ item["gravity"], [0, 1, 0], atol=1e-5)  # comes to point down
            means = item["rgb"].reshape(3, -1).mean(1)
            assert np.allclose(means, (200, 100, 20 + (TRAIN + TEST).index(frame)), atol=2.5)  # red first


def test_the_toolboxs_split_is_read_where_the_text_lists_are_not(tree):
    root, _ = tree
    for path in root.glob("*.txt"):
        path.unlink()
    with pytest.raises(DataError, match=r"sunrgbd_testing_images.txt: missing; .*allsplit.mat in its place"):
        SUNRGBD(root, "train")
    path = root / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat"
    path.parent.mkdir()

    def cells(frames):
        names = [f"/n/fs/sun3d/data/SUNRGBD/{f}{'/' * (i % 2)}" for i, f in enumerate(frames)]
        return np.array([*names, None], object)[None, :-1]

    scipy.io.savemat(path, {"alltrain": cells(TRAIN), "alltest": cells(TEST)})
    assert SUNRGBD(root, "train").ids == TRAIN and SUNRGBD(root, "test").ids == TEST
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="allsplit.mat: cannot be read"):
        SUNRGBD(root, "train")


def test_masks_that_cannot_be_locked_are_read(tree):
    """Many network file systems and read-only disks have no locks; one that another program holds is as good."""
    root, truth = tree
    with open(root / "SUNRGBDtoolbox" / "Metadata" / "SUNRGBD2Dseg.mat", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert np.array_equal(SUNRGBD(root, "train")[0]["mask"], truth[TRAIN[0]]["mask"])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def save(path, pixels):
    Image.fromarray(pixels).save(path)


PART = {"image": "image/0000144.jpg", "depth": "depth_bfx/0000144.png", "K": "intrinsics.txt"}
PART["R"] = "extrinsics/20141221170930.txt"


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("image", Path.unlink, r"image: no file \*.jpg; unpack the frame"),
        ("depth", Path.unlink, r"depth_bfx: no file \*.png; unpack the frame"),
        ("K", Path.unlink, "intrinsics.txt: missing; expected 3 x 3 numbers"),
        ("R", Path.unlink, r"extrinsics: no file \*.txt"),
        ("image", cut, "0000144.jpg: cannot be read; .*unpack it again.*truncated"),
        ("depth", cut, "0000144.png: cannot be read; .*unpack it again"),
        ("image", lambda p: p.write_bytes(b""), "0000144.jpg: cannot be read"),
        ("image", lambda p: save(p, np.zeros((48, 64), np.uint8)), "0000144.jpg: .*expected.*mode RGB.*mode L"),
        ("depth", lambda p: save(p, np.zeros((48, 64), np.uint8)), "0000144.png: .*expected.*mode I;16.*mode L"),
        ("depth", lambda p: save(p, np.zeros((48, 64), np.uint16)), "0000144.png: nothing but holes; leave"),
        ("depth", lambda p: save(p, np.ones((48, 65), np.uint16)), r"0000144.png: \(48, 65\) pixels, but .*\(48, 64\)"),
        ("image", lambda p: save(p, np.ones((47, 64, 3), np.uint8)), r"\(48, 64\) pixels, but .*0000144.jpg has"),
        ("K", lambda p: edit(p, "0 1", ""), "intrinsics.txt: cannot be read; expected 3 x 3 numbers"),
        ("K", lambda p: edit(p, "52.5", "fx"), "intrinsics.txt: cannot be read; expected 3 x 3 numbers"),
        ("K", lambda p: edit(p, "52.5", "-52.5"), "expected fx 0 cx 0 fy cy 0 0 1 for 64 x 48 pixels; unpack"),
        ("K", lambda p: edit(p, "52.5", "nan"), "expected fx 0 cx 0 fy cy 0 0 1"),
        ("K", lambda p: edit(p, "52.5", "inf"), "expected fx 0 cx 0 fy cy 0 0 1"),
        ("K", lambda p: edit(p, "0.0 31.7", "0.5 31.7"), "expected fx 0 cx 0 fy cy 0 0 1"),
        ("K", lambda p: edit(p, "31.7", "131.7"), "expected fx 0 cx 0 fy cy 0 0 1 for 64 x 48"),  # of a larger image
        ("R", lambda p: edit(p, "0.", "0.5"), "20141221170930.txt: .*expected a rotation"),
        ("R", lambda p: p.write_text("1 0 0 0 0 1 0 0 0 0 -1 0"), "20141221170930.txt: .*expected a rotation"),
        ("R", lambda p: p.write_text("1 0 0 0 1 0 0 0 1"), "20141221170930.txt: .*expected 3 x 4 numbers"),
    ],
)
def test_a_bad_frame_is_refused_by_name_and_others_stay(tree, part, damage, message):
    root, _ = tree
    damage(root / "SUNRGBD" / TRAIN[1] / PART[part])
    data = SUNRGBD(root, "train")
    assert data.ids == TRAIN
    with pytest.raises(DataError, match=message) as error:
        data[1]
    assert TRAIN[1] in str(error.value)
    assert data[0]["id"] == TRAIN[0] and data[2]["id"] == TRAIN[2]


def test_of_several_files_those_count_that_the_toolbox_takes(tree):
    root, truth = tree
    frame = root / "SUNRGBD" / TRAIN[0]
    turn = rotation(0, 50)
    (frame / "extrinsics" / "20150101.txt").write_text("\n".join(" ".join(map(str, (*row, 0))) for row in turn))
    save(frame / "depth_bfx" / "0000999.png", np.ones((9, 9), np.uint16))
    (frame / "image" / "._0000144.jpg").write_bytes(b"left by an archiver")
    item = SUNRGBD(root, "train")[0]
    assert np.allclose(item["gravity"], turn[1])
    assert np.array_equal(np.rint(1000 * item["depth"][0].astype(float)), truth[TRAIN[0]]["mm"])


def test_frames_behind_links_are_found(tree):
    root, _ = tree
    everything = SUNRGBD(root).ids
    (root / "SUNRGBD" / "kv2").rename(root / "elsewhere")
    (root / "SUNRGBD" / "kv2").symlink_to(root / "elsewhere")
    (root / "SUNRGBD" / "kv1" / "again").symlink_to(root / "SUNRGBD")  # leads back up
    (root / "SUNRGBD" / ".trash" / "image").mkdir(parents=True)
    assert SUNRGBD(root).ids == everything == sorted(TRAIN + TEST)


def test_bad_masks_are_refused(tree):
    root, truth = tree
    masks = [truth[frame]["mask"].astype(float) for frame in TEST + TRAIN]
    for value in (38, -1, 1.5, np.nan):
        masks[3][5, 7] = value  # of the second frame for training
        write_masks(root, masks)
        data = SUNRGBD(root, "train")
        with pytest.raises(DataError, match=rf"SUNRGBD2Dseg.mat: label {value}.* for .*{TRAIN[1]}.*expected 0 to 37"):
            data[1]
        assert np.array_equal(data[2]["mask"], truth[TRAIN[2]]["mask"])
    masks[3] = np.zeros((48, 63))
    path = write_masks(root, masks)
    with pytest.raises(DataError, match=r"SUNRGBD2Dseg.mat: \(48, 63\) pixels, but"):
        SUNRGBD(root, "train")[1]
    write_masks(root, masks[1:])
    with pytest.raises(DataError, match="4 masks, but 5 frames"):
        SUNRGBD(root, "train")
    path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(DataError, match="SUNRGBD2Dseg.mat: cannot be read; expected .*princeton.edu; .*remove it"):
        SUNRGBD(root)
    path.unlink()
    assert "mask" not in SUNRGBD(root)[0]


def test_bad_lists_and_settings_are_refused(tree):
    root, _ = tree
    path = root / "sunrgbd_training_images.txt"
    good = path.read_text()
    for text, message in (
        (good + good.splitlines()[0].replace("/image", "//image"), f"lists name {TRAIN[0]} twice"),
        (good + f"SUNRGBD/{TEST[0]}/image/a.jpg\n", f"lists name {TEST[0]} twice"),
        (good + "kv1/NYUdata\n", "sunrgbd_training_images.txt: .*expected SUNRGBD/.*'kv1/NYUdata'"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            SUNRGBD(root, "test")
    path.write_text(good)
    write_frame(root / "SUNRGBD", "kv2/new", seed=9)
    data = SUNRGBD(root)
    with pytest.raises(DataError, match=r"kv2/new: in neither split list"):
        data[data.ids.index("kv2/new")]
    masks = root / "SUNRGBDtoolbox" / "Metadata" / "SUNRGBD2Dseg.mat"
    masks.rename(root / "elsewhere.mat")
    assert len([SUNRGBD(root)[i] for i in range(6)]) == 6
    (root / "elsewhere.mat").rename(masks)
    shutil.rmtree(root / "SUNRGBD" / TEST[1])
    with pytest.raises(DataError, match=rf"1 of 2 frames, lacks {TEST[1]}; .*missing='skip'"):
        SUNRGBD(root, "test")
    assert SUNRGBD(root, "test", missing="skip").ids == TEST[:1]
    for settings in ({"split": "val"}, {"depth": "depth_raw"}, {"missing": "ignore"}):
        with pytest.raises(ValueError, match="allowed are"):
            SUNRGBD(root, **settings)
    shutil.rmtree(root / "SUNRGBD")
    for split in ("train", None):
        with pytest.raises(DataError, match=r"SUNRGBD: 0 of .* unpack SUNRGBD.zip"):
            SUNRGBD(root, split, missing="skip")
    masks.unlink()
    with pytest.raises(DataError, match=r"SUNRGBD: 0 of .* unpack SUNRGBD.zip"):
        SUNRGBD(root, missing="skip")


def test_no_damaged_image_gets_through_as_another_error(tree):
    root, _ = tree
    random, data = np.random.default_rng(0), SUNRGBD(root, "train")
    for part in ("image", "depth"):
        path = root / "SUNRGBD" / TRAIN[0] / PART[part]
        good = path.read_bytes()
        for k in range(60):
            bad = bytearray(good)
            if k % 2:
                bad[random.integers(len(bad))] ^= 1 << random.integers(8)
            else:
                del bad[random.integers(len(bad)) :]
            path.write_bytes(bad)
            try:
                data[0]
            except DataError as error:
                assert TRAIN[0] in str(error)
        path.write_bytes(good)
    data[0]

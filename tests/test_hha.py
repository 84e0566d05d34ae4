"""HHA against the published MATLAB image, planes fitted one by one, and scenes whose height and angle are known."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import common
from benchmarks import hha as benchmark
from decur_core import config
from decur_core.data.hha import depth_to_hha
from decur_core.data.raster import DataError

DATA = config.ROOT.parent / "shared" / "data"
K_NYU = np.array([[518.85790117450188, 0, 325.58244941119034], [0, 519.46961112127485, 253.73616633400465], [0, 0, 1]])
FLOOR, WALL, CEILING, UNKNOWN = 38, 128, 218, 218  # codes of the angle
SUN = "sunrgbd_native_sample/SUNRGBD/kv2/align_kv2/2014-12-18_11-31-54_260595134347"


def sample(name: str) -> np.ndarray:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return np.array(Image.open(path))


def camera(h: int, w: int, f: float | None = None) -> np.ndarray:
    return np.array([[f or 0.8 * w, 0, (w + 1) / 2], [0, f or 0.8 * w, (h + 1) / 2], [0, 0, 1]])


def off(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


def window_pixels(seen: np.ndarray, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the measured pixels within 3 of (i, j)."""
    rows, columns = np.nonzero(seen[max(i - 3, 0) : i + 4, max(j - 3, 0) : j + 4])
    return rows + max(i - 3, 0), columns + max(j - 3, 0)


def fixes_a_plane(rows, columns) -> bool:
    return np.linalg.matrix_rank(np.stack([np.ones(len(rows)), rows, columns]) if len(rows) else np.zeros((1, 1))) == 3


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_result_is_that_of_the_matlab_code(dtype):
    depth = sample("nyu_hha_reference/0.png") / 10000
    found = depth_to_hha(depth.astype(dtype), K_NYU)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    difference = off(found, sample("nyu_hha_reference/matlab_hha.png"))
    assert not difference[..., 0].any() and difference.max() <= 1
    assert (difference == 0).mean() > (0.9999 if dtype == np.float32 else 0.999999)


def test_missing_pixels_are_left_out_of_the_planes_as_in_the_published_image():
    depth, raw = (sample(f"nyu_hha_reference/{name}.png") for name in ("0", "0_raw"))
    found = depth_to_hha(depth / 10000, K_NYU, missing=raw == 0)
    difference = off(found, sample("nyu_hha_reference/hha.png"))
    assert not difference[..., 0].any() and difference[..., 1].max() <= 1
    assert (difference[..., 2] <= 1).mean() > 0.99
    for i, j in np.argwhere(difference[..., 2] > 1):  # only where pixels in a line leave the plane to rounding errors
        assert found[i, j, 2] == UNKNOWN and not fixes_a_plane(*window_pixels(raw > 0, i, j))


def test_angles_are_those_of_planes_fitted_one_by_one():
    random = np.random.default_rng(0)
    h, w = 36, 33
    x, y = (np.arange(1, w + 1) - 14.3) / 15, (np.arange(1, h + 1)[:, None] - 15.1) / 16
    depth = 1 / np.maximum(0.9 * y + 0.2 * x - 0.3, 0.2 - 0.1 * x)  # a floor that leads uphill, seen by a tilted camera
    depth[:, 22:] *= np.exp(random.normal(size=(h, 11)))
    depth[random.random((h, w)) < 0.6] = 0
    depth[8:24, 6:28] = 0
    depth[:4, :4] = 10
    depth[3, 3] = 0.2  # so near that the plane around the first pixel leads behind the camera
    depth[12, 10] = depth[15, 13] = depth[18, 16] = 2  # alone, in pairs and in a line
    k = np.array([[15, 0, 14.3], [0, 16, 15.1], [0, 0, 1]])
    down = np.array([0.1, 0.9, -0.3]) / np.linalg.norm([0.1, 0.9, -0.3])
    found = depth_to_hha(depth, k, down)[..., 2]
    unknown, turned = 0, {"hole": 0, "seen": 0}
    for i, j in np.ndindex(h, w):
        rows, columns = window_pixels(depth > 0, i, j)
        if not fixes_a_plane(rows, columns):
            assert found[i, j] == UNKNOWN
            unknown += 1
            continue
        rays = np.stack([x[columns], y[rows, 0], np.ones(len(rows))], axis=1)
        normal = np.linalg.lstsq(rays, 1 / depth[rows, columns])[0]
        if (normal @ [x[j], y[i, 0], 1] if depth[i, j] else normal[2]) < 0:  # away from the camera
            normal = -normal
            turned["seen" if depth[i, j] else "hole"] += 1
        angle = np.degrees(np.arccos(normal @ down / np.linalg.norm(normal)))
        assert abs(found[i, j] - (angle + 38)) < 0.5 + 1e-6, (i, j)
    assert 50 < unknown < 500 and min(turned.values()) > 3


def floor_and_wall(h, w, *, pitch, roll, up=1.5, far=4.0):
    """Depth, intrinsics and gravity of a camera `up` metres above a floor and `far` from a wall, and which is seen."""
    k = camera(h, w)
    a, b = np.radians([pitch, roll])
    down = np.array([np.sin(b) * np.cos(a), np.cos(b) * np.cos(a), np.sin(a)])
    ahead = np.array([-np.sin(b) * np.sin(a), -np.cos(b) * np.sin(a), np.cos(a)])
    assert abs(down @ ahead) < 1e-12
    u, v = np.meshgrid(np.arange(1, w + 1), np.arange(1, h + 1))
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones((h, w))], axis=-1)
    below = np.maximum(rays @ down, 1e-9)
    floor = up / below < far / (rays @ ahead)
    depth = np.where(floor, up / below, far / (rays @ ahead))
    return depth, k, down, floor, 100 * (up - depth * (rays @ down))


@pytest.mark.parametrize("size", [(480, 640), (425, 560), (97, 131)])
@pytest.mark.parametrize("given", [True, False])
def test_floor_and_wall_have_their_height_and_angle(size, given):
    depth, k, down, floor, height = floor_and_wall(*size, pitch=20, roll=-6)
    found = depth_to_hha(depth, k, down if given else None).astype(float)
    tolerance = 0.5 if given else 1.5 if size[0] > 400 else 3  # of levels; planes across the corner pull at an estimate
    assert (np.abs(found[..., 0] - 31000 / (100 * depth)) < 0.5 + 1e-6).all()
    assert (np.abs(found[..., 1] - np.minimum(height, 255)) < tolerance + 1e-6).all()
    away = np.ones(size, bool)  # from the corner, and from the image's edge, where windows are cut
    for shift in range(-3, 4):
        away &= (np.roll(floor, shift, 0) == floor) & (np.roll(floor, shift, 1) == floor)
        away &= np.roll(np.roll(floor, shift, 0), shift, 1) == floor
        away &= np.roll(np.roll(floor, shift, 0), -shift, 1) == floor
    away[:3] = away[-3:] = away[:, :3] = away[:, -3:] = False
    assert away[floor].sum() > 100 and away[~floor].sum() > 100
    assert (np.abs(found[..., 2] - np.where(floor, FLOOR, WALL))[away] < tolerance + 1e-6).all()
    assert np.abs(found[..., 2] - FLOOR)[~away].max() > 20  # the corner itself is neither


def test_gravity_of_a_real_room_agrees_with_the_accelerometer():
    value = sample(f"{SUN}/depth_bfx/0000144.png")
    depth = ((value >> 3) | (value << 13)).astype(np.uint16) / 1000
    down = np.loadtxt(next((DATA / SUN / "extrinsics").iterdir()))[1, :3]
    k = np.loadtxt(DATA / SUN / "intrinsics.txt").reshape(3, 3)
    found, expected = depth_to_hha(depth, k), depth_to_hha(depth, k, down / np.linalg.norm(down))
    assert np.quantile(off(found, expected), 0.99, axis=(0, 1))[2] <= 2


def test_a_near_table_is_at_the_height_above_an_unseen_floor():
    down = np.array([0.0, 0.0, 1.0])  # looking straight down
    found = depth_to_hha(np.full((20, 30), 0.5), camera(20, 30), down)
    assert (found == [255, 130 - 50, FLOOR]).all()
    found = depth_to_hha(np.full((20, 30), 2.0), camera(20, 30), down)
    assert (found == [155, 0, FLOOR]).all()
    found = depth_to_hha(np.full((20, 30), 2.0), camera(20, 30), -down)
    assert (found == [155, 255, CEILING]).all()


@pytest.mark.parametrize("noise", [0, 0.01])
def test_a_bare_wall_leaves_gravity_where_the_camera_is_upright(noise):
    depth = 2 + noise * np.random.default_rng(0).standard_normal((120, 160))
    k = camera(120, 160, 500)
    found = depth_to_hha(depth, k)
    expected = depth_to_hha(depth, k, [0, 1, 0])
    assert off(found, expected).max() <= 1 and (noise or (found == expected).all())
    assert noise or (found[..., 2] == WALL).all()
    middle = found[59:61].astype(float)
    assert np.abs(middle[..., 1] - 130).max() <= 1


def test_a_best_direction_at_right_angles_to_the_guess_is_not_taken():
    y = (np.arange(1, 121)[:, None] - 60.5) / 100
    depth = np.broadcast_to(2 / (0.714 - 0.7 * np.abs(y)), (120, 160))  # two slopes of 44 degrees from a wall
    k = camera(120, 160, 100)
    assert (depth_to_hha(depth, k) == depth_to_hha(depth, k, [0, 1, 0])).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 2), (3, 5)])
def test_tiny_images_have_an_answer(shape):
    found = depth_to_hha(np.full(shape, 2.0), camera(*shape, 30))
    assert (found[..., 0] == 155).all() and (found[..., 2] == (UNKNOWN if min(shape) == 1 else WALL)).all()


@pytest.mark.parametrize(
    ("name", "scale", "cut"),
    [
        ("nyu_rcnn_depth_demo/rawdepth.png", 1000, (40, 45)),
        ("rgbd_kinect2_sample/sample_depth.png", 10000, (None, None)),
    ],
)
def test_holes_of_real_images_stay_marked(name, scale, cut):
    depth = sample(name) / scale
    h, w = depth.shape
    k = K_NYU - [[0, 0, cut[0]], [0, 0, cut[1]], [0, 0, 0]] if cut[0] else camera(h, w, 365)
    found, hole = depth_to_hha(depth, k), depth == 0
    assert found.shape == (h, w, 3) and 0.1 < hole.mean() < 0.2
    assert (found[hole][:, 0] == 255).all() and len(np.unique(found[hole][:, 1])) == 1
    inside = [(i, j) for i, j in np.argwhere(hole)[::97] if not len(window_pixels(~hole, i, j)[0])]
    assert len(inside) > 50 and all(found[i, j, 2] == UNKNOWN for i, j in inside)
    for mark in (np.nan, np.inf, -np.inf):
        assert (depth_to_hha(np.where(hole, mark, depth), k) == found).all()
    filled = np.where(hole, 3, depth)  # what stands in for missing pixels changes nothing around them
    again = depth_to_hha(filled, k, missing=hole)
    assert (again[~hole][:, [0, 2]] == found[~hole][:, [0, 2]]).all()
    assert (again[hole][:, 0] == 103).all()


K = camera(30, 40)
ROOM = np.full((30, 40), 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth_m": ROOM[None]}, r"depth_m: float64 \(1, 30, 40\); expected one image"),
        ({"depth_m": ROOM[:0]}, r"depth_m: float64 \(0, 40\)"),
        ({"depth_m": ROOM > 0}, "depth_m: bool"),
        ({"depth_m": ROOM - 2.5}, "depth_m: -0.5 m is negative"),
        ({"depth_m": 0 * ROOM}, "depth_m: all 1200 pixels are holes.* nothing to encode"),
        ({"depth_m": np.nan * ROOM}, "depth_m: all 1200 pixels are holes"),
        ({"missing": ROOM > 0}, "depth_m: all 1200 pixels are holes"),
        ({"depth_m": (1000 * ROOM).astype(np.uint16)}, "up to 2000 m; if these are millimetres, divide them by 1000"),
        ({"intrinsics": K[:2]}, "intrinsics: .* expected .*fx, 0, cx"),
        ({"intrinsics": K.T}, "intrinsics: .* expected .*fx, 0, cx"),
        ({"intrinsics": K * [[0], [1], [1]]}, "intrinsics: .* fx, fy > 0"),
        ({"intrinsics": K * [[1, 1, 1], [1, -1, 1], [1, 1, 1]]}, "intrinsics: .* fx, fy > 0"),
        ({"intrinsics": K * np.nan}, "intrinsics: .*nan"),
        ({"intrinsics": np.where(K == 32, np.inf, K)}, "intrinsics: .*inf"),
        ({"intrinsics": K_NYU}, r"principal point \(325.582, 253.736\) outside the image of 40 x 30 pixels"),
        ({"gravity": [0, 2, 0]}, r"gravity: \[0.0, 2.0, 0.0\]; .* unit vector that points down"),
        ({"gravity": [0, np.nan, 0]}, "gravity: .*nan"),
        ({"gravity": [0, 1]}, r"gravity: \[0.0, 1.0\]"),
        ({"missing": ROOM}, r"missing: float64 \(30, 40\); expected bool \(30, 40\)"),
        ({"missing": ROOM[1:] > 0}, r"missing: bool \(29, 40\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_errors_name_the_argument_and_its_value(change, message):
    arguments = {"depth_m": ROOM, "intrinsics": K} | change
    with pytest.raises(DataError, match=message):
        depth_to_hha(**arguments)


def test_result_does_not_depend_on_threads_and_arguments_stay_as_they_are():
    depth, k = benchmark.room(240, 320)
    before = depth.copy()
    here = hashlib.sha256(depth_to_hha(depth, k).tobytes()).hexdigest()
    assert (depth == before).all()
    code = (
        "import hashlib; from benchmarks.hha import room; from decur_core.data.hha import depth_to_hha;"
        "print(hashlib.sha256(depth_to_hha(*room(240, 320)).tobytes()).hexdigest())"
    )
    variables = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "3")
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == here, done.stderr


def test_the_benchmark_compares_equal_results_and_writes_its_record(tmp_path, monkeypatch, capsys):
    depth, k = benchmark.room(120, 160)
    assert off(benchmark.published(depth, k), depth_to_hha(depth, k)).max() <= 1
    monkeypatch.setattr(common, "RECORDS", tmp_path)
    benchmark.main(["--height", "60", "--width", "80", "--repeats", "1"])
    (row,) = json.loads((tmp_path / "hha.json").read_text())["rows"]
    assert row["times faster"] == pytest.approx(row["published ms"] / row["ours ms"])
    assert "ours ms" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="leave out --device"):
        benchmark.main(["--device", "cuda"])


def test_the_benchmarks_published_way_gives_the_matlab_image():
    found = benchmark.published(sample("nyu_hha_reference/0.png") / 10000, K_NYU)
    assert off(found, sample("nyu_hha_reference/matlab_hha.png")).max() <= 1

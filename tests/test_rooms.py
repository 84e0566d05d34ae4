"""The miniature rooms: factors can be read, geometry is exact, files are as published, and all is repeatable."""

import pickle
from functools import lru_cache

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from decur_core.data.hha import depth_to_hha
from decur_core.data.nyuv2 import NYUv2
from decur_core.data.sunrgbd import SUNRGBD
from decur_core.explain.probes import supervised_r2
from decur_core.worlds.rooms import (
    CEILING,
    FACTORS,
    FLOOR,
    FURNITURE,
    HEIGHTS,
    PAINTED,
    WALL,
    RoomWorld,
    write_nyuv2,
    write_sunrgbd,
)

SPLITS = {"train": range(3, 12), "test": [0, 15, 1]}


def same(a: dict, b: dict) -> bool:
    """Equal keys, values, types and dtypes."""
    kinds = [{k: (type(v), getattr(v, "dtype", None)) for k, v in d.items()} for d in (a, b)]
    return kinds[0] == kinds[1] and all(np.array_equal(a[k], b[k]) for k in a)


@lru_cache(maxsize=1)
def encoded(height: int, locations: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The images that training sees, uint8 (locations, 3, H, W) per modality, and the factors (locations, 7)."""
    world = RoomWorld(locations, height=height, width=height * 4 // 3, seed=5)
    images = {"rgb": [], "depth": []}
    for i in range(locations):
        item = world[i]
        images["rgb"].append(item["rgb"])
        images["depth"].append(depth_to_hha(item["depth"][0], item["intrinsics"], item["gravity"]).transpose(2, 0, 1))
    target = torch.from_numpy(np.stack(list(world.factors.values()), 1))
    return {m: torch.from_numpy(np.stack(views)) for m, views in images.items()}, target


def read_factors(images: torch.Tensor, target: torch.Tensor, train: int, *, steps: int) -> dict[str, float]:
    images = (images / 255).contiguous(memory_format=torch.channels_last)

    def view(rows, step, generator):
        return images[rows].flip(-1) if step % 2 else images[rows]  # rooms are not turned upside down

    r2 = supervised_r2(view, images[train:], target, train, steps=steps)
    return dict(zip(FACTORS, r2.tolist(), strict=True))


def check_admission(modality: str, height: int, *, train: int, test: int, steps: int) -> None:
    images, target = encoded(height, train + test)
    r2 = read_factors(images[modality], target, train, steps=steps)
    for name, owner in FACTORS.items():
        if owner in ("common", modality):
            assert r2[name] >= 0.85, r2
        else:
            assert r2[name] <= 0.05, r2


@pytest.mark.parametrize("modality", ["rgb", "depth"])
def test_every_factor_is_readable_where_it_should_be_and_nowhere_else(modality):
    check_admission(modality, 30, train=1300, test=300, steps=220)


@pytest.mark.soak
@pytest.mark.parametrize("modality", ["rgb", "depth"])
def test_factor_admission_long(modality):
    check_admission(modality, 48, train=3000, test=1000, steps=600)


def test_rays_meet_the_room_and_the_furniture_exactly():
    world = RoomWorld(40, seed=1)
    v, u = np.indices(world.size) + 1
    (fx, _, cx), (_, fy, cy), _ = world.intrinsics
    pixels = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones(world.size)]).reshape(3, -1)
    for i in range(40):
        scene = world.scene(i)
        room, (low, high) = scene.piece < 0, scene.room
        assert np.allclose(scene.tilt @ scene.tilt.T, np.eye(3)) and np.linalg.det(scene.tilt) > 0
        assert high[2] == 2.4 * (6.5 / 2.4) ** ((float(world.factors["room_depth"][i]) + 1) / 2)
        # the nearest of the planes, in the level axes of the camera: floor and ceiling need no yaw
        down = scene.tilt[1] @ pixels
        level = np.where(down > 0, high[1] / down, low[1] / down)
        flat = room & (scene.axis == 1)
        assert np.allclose(scene.depth[flat], level[flat], rtol=1e-4) and (scene.depth < level + 1e-3).all()
        # a point is its ray times its depth: the distance from the camera is the same in both systems of axes
        lengths = np.linalg.norm(pixels, axis=0) * scene.depth
        assert np.allclose(np.linalg.norm(scene.point, axis=0), lengths, rtol=1e-4)
        bounds = np.where(scene.point > 0, high[:, None], low[:, None])
        assert np.allclose(np.take_along_axis(scene.point - bounds, scene.axis[None], 0)[:, room], 0, atol=2e-3)
        assert (scene.point > low[:, None] - 2e-3).all() and (scene.point < high[:, None] + 2e-3).all()
        for k, kind in enumerate(scene.kind):
            if not (part := scene.piece == k).any():  # behind others
                continue
            x, y, z = scene.point[:, part]
            cos, sin = np.cos(scene.yaw[k]), np.sin(scene.yaw[k])
            along = np.stack([cos * x + sin * z, high[1] - y, cos * z - sin * x])  # y: height above the floor
            assert (np.ptp(along, axis=1) < [0.91, 1.1 * HEIGHTS[kind], 1.09]).all()
            assert along[1].min() > -2e-3 and along[1].max() < 1.1 * HEIGHTS[kind] + 2e-3
            faces = [along[axis, scene.axis[part] == axis] for axis in range(3)]
            assert all(np.ptp(face) < 2e-3 for face in faces if len(face))
            assert not len(faces[1]) or faces[1].min() > 0.9 * HEIGHTS[kind] - 2e-3  # seen from above


def test_hha_of_exact_depth_is_the_known_one():
    world, seen = RoomWorld(60, seed=2), set()
    for i in range(60):
        scene = world.scene(i)
        hha = depth_to_hha(scene.depth.reshape(world.size).astype(np.float64), world.intrinsics, scene.tilt[1])
        disparity, height, angle = hha.transpose(2, 0, 1).astype(float)
        axis, piece = scene.axis.reshape(world.size), scene.piece.reshape(world.size)
        down = (scene.tilt[1] @ world._pixels).reshape(world.size)
        above = (scene.room[1, 1] - scene.point[1].reshape(world.size)) * 100  # cm, from the tracer, not from HHA
        assert (
            abs(disparity - np.minimum(31000 / np.maximum(100 * scene.depth.reshape(world.size), 100), 255)).max() < 1
        )
        if (floor := (piece < 0) & (axis == 1) & (down > 0)).any():
            assert height[floor].max() <= 1 and abs(height - np.clip(above, 0, 255)).max() <= 1
        # windows of 7 x 7 pixels on one surface
        surface = axis + 3 * (piece + 1) + 100 * (scene.point[0] > 0).reshape(world.size) * ((axis == 0) & (piece < 0))
        flat = maximum_filter(surface, 7) == minimum_filter(surface, 7)
        flat[:3] = flat[-3:] = flat[:, :3] = flat[:, -3:] = False
        for name, part, degrees in (
            ("floor", flat & floor, 38),
            ("ceiling", flat & (axis == 1) & (down < 0), 218),
            ("top", flat & (axis == 1) & (piece >= 0), 38),
            ("wall", flat & (axis != 1) & (piece < 0), 128),
            ("side", flat & (axis != 1) & (piece >= 0), 128),
        ):
            if part.any():
                seen.add(name)
                assert abs(angle[part] - degrees).max() <= 1, (i, name)
    assert seen == {"floor", "ceiling", "top", "wall", "side"}


def test_factors_do_what_they_say():
    world = RoomWorld(150, seed=3)
    share = {name: (values + 1) / 2 for name, values in world.factors.items()}
    (fx, _, cx), (_, fy, cy), _ = world.intrinsics
    v, u = np.indices(world.size) + 1
    r2 = ((u - cx) / fx) ** 2 + ((v - cy) / fy) ** 2
    clutter, noise, bulge = [], [], []
    for i in range(150):
        scene = world.scene(i)
        clutter.append((scene.piece >= 0).mean())
        error = world[i]["depth"][0] / scene.depth.reshape(world.size) - 1
        slope = (error * r2).sum() / (r2**2).sum()
        bulge.append(slope)
        noise.append((error - slope * r2).std())
    assert np.corrcoef(clutter, share["clutter"])[0, 1] ** 2 > 0.95
    assert abs(np.array(clutter) - 0.04 - 0.36 * share["clutter"]).mean() < 0.015
    assert abs(np.array(bulge) - 0.5 * share["bulge"] + 0.25).max() < 0.02
    assert np.allclose(noise, 0.003 + 0.057 * share["noise"], rtol=0.12)
    values = np.stack(list(RoomWorld(20000, seed=1).factors.values()))
    assert values.dtype == np.float32 and abs(values).max() <= 1 and np.allclose(values.var(1), 1 / 3, atol=0.01)
    assert abs(np.corrcoef(values) - np.eye(len(FACTORS))).max() < 0.03


def test_masks_need_both_sensors():
    world, count = RoomWorld(250, seed=6), np.zeros(38)
    colours = {value: [] for value in FURNITURE.ravel()}
    for i in range(250):
        scene, item = world.scene(i), world[i]
        mask, piece, axis = item["mask"], scene.piece.reshape(world.size), scene.axis.reshape(world.size)
        count += np.bincount(mask.ravel(), minlength=38)
        assert set(mask[piece < 0]) <= {WALL, FLOOR, CEILING, *(row[0] for row in PAINTED)}
        assert np.isin(mask[(piece < 0) & (axis == 1)], (FLOOR, CEILING)).all()
        for k, kind in enumerate(scene.kind):
            if not (part := piece == k).any():  # behind others
                continue
            (value,) = set(mask[part])  # a piece has one label: of its height, or none
            assert value in (0, *FURNITURE[kind])
            if value:
                red, _, blue = item["rgb"][:, part].mean(1) / item["rgb"].mean((1, 2))
                colours[value].append(red > blue)
    share = count / count.sum()
    assert 0.001 < share[0] < 0.02
    assert set(np.flatnonzero(share)) == {0, WALL, FLOOR, CEILING, *FURNITURE.ravel(), *(row[0] for row in PAINTED)}
    assert share[share > 0].min() > 0.003
    for blue, brown in FURNITURE:
        assert np.mean(colours[blue]) < 0.1 and np.mean(colours[brown]) > 0.9


def test_location_depends_on_seed_stream_and_index_only():
    few, many = RoomWorld(3, seed=7), RoomWorld(50, seed=7)
    many[40]
    assert all(same(many[i], few[i]) for i in (2, 0, 1))
    assert same(pickle.loads(pickle.dumps(many))[30], many[30])
    assert all(np.array_equal(many.factors[name][:3], few.factors[name]) for name in FACTORS)
    for other in (RoomWorld(1, seed=8), RoomWorld(1, seed=7, stream=1)):
        assert not np.array_equal(other[0]["rgb"], few[0]["rgb"])
        assert not np.array_equal(other[0]["depth"], few[0]["depth"])


@pytest.mark.parametrize("size", [(24, 32), (48, 64), (96, 128)])
def test_items_have_the_form_of_the_readers(size):
    world = RoomWorld(6, height=size[0], width=size[1])
    assert len(world) == len(list(world)) == len(set(world.ids)) == 6
    for item in world:
        assert item["rgb"].shape == (3, *size) and item["rgb"].dtype == item["mask"].dtype == np.uint8
        assert item["depth"].shape == (1, *size) and item["depth"].dtype == np.float32
        assert item["mask"].shape == size and item["depth"].min() > 0.3 and item["depth"].max() < 15
        assert abs(np.linalg.norm(item["gravity"]) - 1) < 1e-9 and item["gravity"][1] > 0.9 > 0 < item["gravity"][2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"locations": 0}, "locations = 0"),
        ({"locations": 2.0}, "locations = 2.0"),
        ({"seed": -1}, "seed = -1"),
        ({"stream": -1}, "stream = -1"),
        ({"height": 46}, "height = 46.*3:4"),
        ({"height": 50, "width": 50}, "height = 50.*3:4"),
        ({"height": 12, "width": 16}, "tile = 12.*24"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RoomWorld(**{"locations": 2} | settings)


def test_index_beyond_the_world_is_refused():
    for i in (2, -1):
        with pytest.raises(IndexError, match="world of 2"):
            RoomWorld(2)[i]


def test_sunrgbd_tree_reads_back_exactly(tmp_path):
    world = RoomWorld(20, seed=4)
    write_sunrgbd(tmp_path, world, SPLITS)
    for split, indices in SPLITS.items():
        data, raw = SUNRGBD(tmp_path, split), SUNRGBD(tmp_path, split, depth="depth")
        assert data.ids == [world.ids[i] for i in indices]
        for k, i in enumerate(indices):
            assert same(data[k], world[i])
            holes = raw[k]["depth"] == 0
            assert 0.002 < holes.mean() < 0.4
            assert np.array_equal(raw[k]["depth"][~holes], world[i]["depth"][~holes])


def test_sunrgbd_tree_is_the_published_one(tmp_path):
    world = RoomWorld(20, seed=4)
    write_sunrgbd(tmp_path, world, SPLITS)
    lists = [(tmp_path / f"sunrgbd_{name}_images.txt").read_text().split() for name in ("testing", "training")]
    assert [len(lines) for lines in lists] == [3, 9]
    assert lists[0][0] == "SUNRGBD/kv1/b3dodata/0000000/image/img_0000.jpg"
    with h5py.File(tmp_path / "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat") as file:
        references = file["SUNRGBD2Dseg"]["seglabel"]
        assert references.shape == (12, 1)
        masks = [file[references[row][0]][:].transpose(1, 0) for row in range(12)]
    indices = [*SPLITS["test"], *SPLITS["train"]]
    for i, mask, line in zip(indices, masks, lists[0] + lists[1], strict=True):
        item, frame = world[i], (tmp_path / line).parents[1]
        assert np.array_equal(mask, item["mask"])
        (file,) = (frame / "depth_bfx").iterdir()
        with Image.open(file) as image:
            stored = np.array(image)
        assert stored.dtype == np.uint16
        assert np.array_equal(((stored >> 3) | (stored << 13)).astype(np.float32) / 1000, item["depth"][0])
        assert np.array_equal(
            np.array((frame / "intrinsics.txt").read_text().split(), float), item["intrinsics"].ravel()
        )
        (file,) = (frame / "extrinsics").iterdir()
        matrix = np.loadtxt(file)
        assert matrix.shape == (3, 4) and not matrix[:, 3].any() and np.array_equal(matrix[1, :3], item["gravity"])


def test_nyuv2_tree_reads_back_exactly(tmp_path):
    world = RoomWorld(20, seed=4)
    write_nyuv2(tmp_path, world, SPLITS)
    for split, indices in SPLITS.items():
        data = NYUv2(tmp_path, split)
        assert data.ids == [str(i) for i in indices]
        assert all(same(data[k], world[i] | {"id": str(i)}) for k, i in enumerate(indices))
    assert (tmp_path / "test.txt").read_text() == "".join(f"RGB/{i}.jpg\tLabel/{i}.png\n" for i in SPLITS["test"])
    depth = np.load(tmp_path / "Depth/15.npy")
    assert depth.dtype == np.float32 and depth.shape == (48, 64)
    with Image.open(tmp_path / "Label/15.png") as label:
        assert label.mode == "P"

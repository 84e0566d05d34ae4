"""A miniature RGB-depth world with known factors: what camera and depth sensor both see, and what only one sees.

A location is one view into a room of planes and boxes, through the pinhole of the NYUv2 colour camera scaled to the
size of the image, 1.4 to 1.5 m above the floor and looking about 10 degrees down. Depth is exact; the sensor adds its
flaws and stores whole millimetres.
Nuisance: the room's width and height, where furniture stands and its size, what hangs on the
walls, colours of single pieces, lamp, exposure, noise of the photograph, and where the raw depth has holes.
Masks have SUN RGB-D's values and need both sensors: furniture of one height differs by colour, of one colour by height
(`FURNITURE`); doors, windows and pictures are paint, which depth cannot see; 3 % of the furniture is unlabelled, 0.
Factors of depth are read from HHA. The size of furniture was tried as one, and failed.
"""

import io
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image

from decur_core.data.nyuv2 import intrinsics
from decur_core.worlds import Miniature
from decur_core.worlds.sar_optical import Locations

# name: who sees it. What each one does is written where it is used, in `scene`, `_photograph` and `_sensed`.
FACTORS = {
    "clutter": "common",  # share of the image under furniture, 4 to 40 %
    "room_depth": "common",  # from the camera to the back wall, 2.4 to 6.5 m
    "wall_hue": "rgb",  # walls from rose to green
    "illumination": "rgb",  # light from cold to warm
    "texture": "rgb",  # contrast of the tiles on every surface, 3 to 33 %
    "noise": "depth",  # standard deviation, 0.3 to 6 % of the depth
    "bulge": "depth",  # error of calibration that bends walls, Z (1 + k r^2) with k from -0.25 to 0.25
}
WALL, FLOOR, CEILING = 1, 2, 22
HEIGHTS = (0.45, 0.75, 1.1)  # metres, of low, medium and tall furniture
FURNITURE = np.array([[4, 6], [29, 7], [10, 3]])  # blue, brown: bed, sofa; box, table; bookshelf, cabinet
COLOURS = np.array([[0.10, 0.14, 0.34], [0.30, 0.13, 0.06]])  # reflectance of blue and brown
PAINTED = (  # class, width, lower and upper edge in metres, reflectance: door, window, picture
    (8, 0.9, 0.0, 2.0, (0.72, 0.60, 0.40)),
    (9, 1.3, 0.9, 2.0, (0.75, 0.88, 1.00)),
    (11, 0.7, 1.3, 1.8, (0.90, 0.80, 0.25)),
)
SOURCES = ("kv1/b3dodata", "kv2/kinect2data", "realsense/sa", "xtion/xtion_align_data")
_PIECES, _TRIES = 32, 128  # pieces of furniture that find a place, at most, and places that are tried


class Scene(NamedTuple):
    """What rays through the pixels of a view meet, pixels row by row."""

    tilt: np.ndarray  # (3, 3), from the camera's axes x right, y down, z forward to level ones; row 1 is gravity
    depth: np.ndarray  # float32 (pixels,), metres along the optical axis
    point: np.ndarray  # float32 (3, pixels), metres from the camera, axes of the room: right, down, to the back wall
    axis: np.ndarray  # (pixels,), which axis of the room or of the piece the surface is normal to
    piece: np.ndarray  # (pixels,), number of the piece of furniture, -1 for the room itself
    room: np.ndarray  # (2, 3), left, ceiling, behind and right, floor, back; metres
    yaw: np.ndarray  # (pieces,), radians
    kind: np.ndarray  # (pieces,), index into HEIGHTS


def _level(yaw: np.ndarray, x, y, z) -> np.ndarray:
    """Vectors in the axes of boxes that are turned by `yaw` around the vertical: (3, …)."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.stack(np.broadcast_arrays(cos * x + sin * z, y, cos * z - sin * x))


def _cross(centre: np.ndarray, rays: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far along rays from the origin the three pairs of planes |p - centre| = half lie: near and far ones."""
    inverse = 1 / (rays + np.float32(1e-12))  # a ray along a plane meets it very far away
    middle, reach = centre * inverse, half * abs(inverse)
    return middle - reach, middle + reach


def _furniture(rng, yaw: float, room: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pieces on the floor, some against each other: centre and half sizes (3, n), yaw, kind (n,)."""
    (left, _, _), (right, floor, back) = room
    kind = rng.integers(len(HEIGHTS), size=_TRIES)
    tall = np.take(HEIGHTS, kind) * rng.uniform(0.9, 1.1, _TRIES)
    side = rng.uniform(0.4, 0.9, _TRIES)
    half = np.stack([side, tall, side * rng.uniform(0.75, 1.2, _TRIES)]) / 2
    reach = np.hypot(half[0], half[2])
    z = 1.2 + (back - 1.2) * np.sqrt(rng.random(_TRIES))  # evenly over the floor that the camera sees
    x = np.clip(z * np.tan(yaw + rng.uniform(-0.55, 0.55, _TRIES)), left + reach, right - reach)
    z = np.minimum(z, back - reach)
    apart = np.hypot(x - x[:, None], z - z[:, None]) > 0.55 * (reach + reach[:, None])
    free, chosen = np.hypot(x, z) > reach + 0.6, []
    for k in range(_TRIES):
        if free[k] and len(chosen) < _PIECES:
            chosen.append(k)
            free &= apart[k]
    centre = np.stack([x, floor - half[1], z])
    return centre[:, chosen], half[:, chosen], rng.uniform(-0.6, 0.6, _TRIES)[chosen], kind[chosen]


class RoomWorld(Locations):
    """Views of the miniature world, as `SUNRGBD` and `NYUv2` read them from the written files.

    `height`, `width`: of the image in pixels, 3:4 with a height of 24, 30, 36, …
    """

    def __init__(self, locations: int, *, height: int = 48, width: int = 64, seed: int = 0, stream: int = 0):
        if 4 * height != 3 * width:
            raise ValueError(f"height = {height!r}, width = {width!r}: 3:4 is needed")
        given = {"locations": locations, "tile": height, "seed": seed, "stream": stream}
        super().__init__(FACTORS, **given, sizes=range(24, 10_000, 6))
        self.size = self.tile, int(width)
        self.intrinsics = intrinsics(*self.size)
        v, u = np.indices(self.size).reshape(2, -1) + 1  # the first pixel has its centre at (1, 1)
        self._pixels = np.linalg.solve(self.intrinsics, np.stack([u, v, np.ones(u.size)])).astype(np.float32)
        self.ids = [f"{SOURCES[i % len(SOURCES)]}/{i:07d}" for i in range(locations)]

    def scene(self, i: int) -> Scene:
        """The geometry of location i, without any flaw of a sensor."""
        rng, f = self._draw(i, 0)
        yaw = rng.uniform(-0.2, 0.2)
        angles = rng.normal((0.18, 0), (0.015, 0.02))  # pitch and roll
        (cos, c), (sin, s) = np.cos(angles), np.sin(angles)
        tilt = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        rays = _level(yaw, *(tilt @ self._pixels)).astype(np.float32)  # of depth 1
        back = 2.4 * (6.5 / 2.4) ** f["room_depth"]
        room = rng.uniform([[-2.1, -1.05, -9], [1.7, 1.4, back]], [[-1.7, -0.95, -9], [2.1, 1.5, back]])
        low, high = room.astype(np.float32)[..., None]
        _, far = _cross((low + high) / 2, rays, (high - low) / 2)
        axis, depth = far.argmin(0), far.min(0)

        centre, half, yaws, kind = _furniture(rng, yaw, room)
        centre, half, turn = (a.astype(np.float32)[..., None] for a in (centre, half, yaws))
        near, far = _cross(_level(turn, *centre), _level(turn, *rays[:, None]), half)  # (3, pieces, pixels)
        enter = near.max(0)
        hit = (enter > 0) & (enter < far.min(0))
        limit, seen, chosen = (0.05 + 0.36 * f["clutter"]) * hit.shape[1], np.zeros(hit.shape[1], bool), []
        for k, outline in enumerate(hit):  # take what fits into the share of the image
            if seen.sum() < (seen | outline).sum() <= limit:
                seen |= outline
                chosen.append(k)
        order = np.array([0, *chosen])  # the room first, in the place of a piece
        enter = np.where(hit[order], enter[order], np.inf)
        enter[0] = depth
        piece, depth = enter.argmin(0), enter.min(0)
        axis = np.where(piece > 0, near[:, order[piece], np.arange(piece.size)].argmax(0), axis)
        return Scene(tilt, depth, rays * depth, axis, piece - 1, room, yaws[chosen], kind[chosen])

    def _photograph(self, i: int, scene: Scene) -> tuple[bytes, np.ndarray]:
        """The JPEG of location i, and its mask."""
        rng, f = self._draw(i, 1)
        point, axis, piece = scene.point, scene.axis, scene.piece
        (left, ceiling, _), (right, floor, back) = scene.room
        pixels, room = np.arange(piece.size), piece < 0
        wall = room & (axis != 1)
        mask = np.where(wall, WALL, np.where(point[1] > 0, FLOOR, CEILING))
        rose, green, grey = np.array([[0.72, 0.48, 0.62], [0.46, 0.70, 0.50], [0.32, 0.30, 0.28]])
        walls, floors = rose + f["wall_hue"] * (green - rose), grey * rng.uniform(0.85, 1.15)
        reflectance = {WALL: walls, FLOOR: floors, CEILING: 0.78}
        colour = np.empty((3, piece.size), np.float32)
        for value in reflectance:
            colour.T[mask == value] = reflectance[value]
        face = np.where(axis == 2, 2, point[0] > 0)  # left, right or back wall, one for each of the painted things
        for (value, width, lower, upper, paint), side in zip(PAINTED, rng.permutation(3), strict=True):
            along, start, stop = (point[0], left, right) if side == 2 else (point[2], 0.9, back)
            along, height = along - rng.uniform(start, stop - width), floor - point[1]
            area = wall & (face == side) & (along > 0) & (along < width) & (height > lower) & (height < upper)
            mask[area], colour.T[area] = value, paint
        hue = rng.integers(2, size=len(scene.kind))
        paint = COLOURS[hue] * rng.normal(1, 0.08, (len(hue), 3))
        value = np.where(rng.random(len(hue)) < 0.03, 0, FURNITURE[scene.kind, hue])
        mask[~room], colour.T[~room] = value[piece[~room]], paint[piece[~room]]

        yaw = np.where(room, 0, np.append(scene.yaw, 0)[piece])
        cell = np.floor(_level(yaw, *point) / 0.16).astype(int)  # tiles of 16 cm
        tiles = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
        tile = tiles[(cell[axis - 2, pixels] + 7 * axis) % 64, (cell[axis - 1, pixels] + 11 * piece) % 64]
        colour *= 1 + (0.03 + 0.30 * f["texture"]) * tile
        lamp = np.array([rng.uniform(-0.8, 0.8), ceiling + 0.5, rng.uniform(0.0, 1.0)])
        to = _level(yaw, *(lamp[:, None] - point))
        distance = np.sqrt((to**2).sum(0))
        light = 0.4 + 0.6 * abs(to[axis, pixels]) / distance / (1 + (distance / 3) ** 2)  # a glow, and Lambert's law
        cold, warm = np.array([[0.80, 1.00, 1.22], [1.22, 1.00, 0.70]])
        lit = colour * light * (cold + f["illumination"] * (warm - cold))[:, None] * rng.normal(1, 0.05)
        image = 255 * np.clip(lit, 0, 1) ** (1 / 1.6) + 3 * rng.standard_normal(lit.shape, dtype=np.float32)
        image = np.clip(np.rint(image), 0, 255).astype(np.uint8).T.reshape(*self.size, 3)
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=95)
        return file.getvalue(), mask.astype(np.uint8).reshape(self.size)

    def _sensed(self, i: int, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Depth of location i as the sensor gives it, uint16 (H, W) in mm: with holes filled, and with holes of 0."""
        rng, f = self._draw(i, 2)
        depth = scene.depth * (1 + (0.5 * f["bulge"] - 0.25) * (self._pixels[:2] ** 2).sum(0))
        grain = rng.standard_normal((self.size[0] // 2, self.size[1] // 2), dtype=np.float32)
        grain = grain.repeat(2, 0).repeat(2, 1).ravel()  # stereo matches small windows, not pixels
        depth *= 1 + (0.003 + 0.057 * f["noise"]) * grain
        depth = np.clip(np.rint(1000 * depth), 1, 65535).astype(np.uint16).reshape(self.size)
        holes = rng.random(self.size) < rng.uniform(0.005, 0.05)
        holes[:, 1:] |= abs(np.diff(scene.depth.reshape(self.size))) > 0.2  # seen, but not lit from beside the camera
        return depth, np.where(holes, 0, depth).astype(np.uint16)

    def native(self, i: int) -> dict:
        """What files hold of location i: {"jpeg": bytes, "mask", "depth" and "raw" uint16 mm, "tilt": (3, 3)}."""
        scene = self.scene(i)
        jpeg, mask = self._photograph(i, scene)
        depth, raw = self._sensed(i, scene)
        return {"jpeg": jpeg, "mask": mask, "depth": depth, "raw": raw, "tilt": scene.tilt}

    def __getitem__(self, i: int) -> dict:
        """{"id", "rgb": uint8 (3, H, W), "depth": float32 (1, H, W) metres, "intrinsics", "gravity", "mask"}."""
        native = self.native(i)
        rgb = np.asarray(Image.open(io.BytesIO(native["jpeg"]))).transpose(2, 0, 1)
        images = {"rgb": np.ascontiguousarray(rgb), "depth": (native["depth"] / np.float32(1000))[None]}
        camera = {"intrinsics": self.intrinsics.copy(), "gravity": native["tilt"][1].copy()}
        return {"id": self.ids[i], **images, **camera, "mask": native["mask"]}


def write_sunrgbd(root: Path | str, world: RoomWorld, splits: dict[str, Iterable[int]]) -> None:
    """Write locations as the native tree of SUN RGB-D; `splits`: indices for both "train" and "test".

    As in the data set, one of four sources names its files otherwise and has its intrinsics on one line, and the masks
    of all frames, first those of the test split, are one MATLAB file, each of them transposed.
    """
    root, masks = Path(root), []
    for split, name in (("test", "sunrgbd_testing_images.txt"), ("train", "sunrgbd_training_images.txt")):
        lines = []
        for i in splits[split]:
            native, folder = world.native(i), root / "SUNRGBD" / world.ids[i]
            image, depth = (f"img_{i:04d}", f"img_{i:04d}_abs") if "b3do" in world.ids[i] else (f"{i:07d}", f"{i:07d}")
            for part in ("image", "depth", "depth_bfx", "extrinsics"):
                (folder / part).mkdir(parents=True)
            (folder / f"image/{image}.jpg").write_bytes(native["jpeg"])
            for part, millimetres in (("depth", native["raw"]), ("depth_bfx", native["depth"])):
                Image.fromarray(millimetres << 3 | millimetres >> 13).save(folder / f"{part}/{depth}.png")
            np.savetxt(folder / "intrinsics.txt", world.intrinsics, "%.17g", newline=" " if image[0] == "i" else "\n")
            np.savetxt(folder / "extrinsics/20150101000000.txt", np.c_[native["tilt"], np.zeros(3)], "%.17g")
            lines.append(f"SUNRGBD/{world.ids[i]}/image/{image}.jpg\n")
            masks.append(native["mask"])
        (root / name).write_text("".join(lines))
    (toolbox := root / "SUNRGBDtoolbox" / "Metadata").mkdir(parents=True)
    with h5py.File(toolbox / "SUNRGBD2Dseg.mat", "w") as file:
        references = file.create_dataset("SUNRGBD2Dseg/seglabel", (len(masks), 1), h5py.ref_dtype)
        for row, mask in enumerate(masks):
            references[row, 0] = file.create_dataset(f"#refs#/{row}", data=mask.T).ref


def write_nyuv2(root: Path | str, world: RoomWorld, splits: dict[str, Iterable[int]]) -> None:
    """Write locations as an NYUv2 tree, with the camera's rotations; `splits`: indices for both "train" and "test".

    `NYUv2` calls location i `str(i)`.
    """
    root, turns = Path(root), np.tile(np.eye(3), (len(world), 1, 1))
    for folder in ("RGB", "Depth", "Label"):
        (root / folder).mkdir(parents=True)
    axes = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # to x right, y forward, z up
    for split in ("train", "test"):
        lines = []
        for i in splits[split]:
            native = world.native(i)
            (root / f"RGB/{i}.jpg").write_bytes(native["jpeg"])
            np.save(root / f"Depth/{i}.npy", native["depth"] / np.float32(1000))
            Image.fromarray(native["mask"]).convert("P").save(root / f"Label/{i}.png")
            turns[i] = axes @ native["tilt"] @ axes.T
            lines.append(f"RGB/{i}.jpg\tLabel/{i}.png\n")
        (root / f"{split}.txt").write_text("".join(lines))
    np.savetxt(root / "camera_rotations_NYU.txt", turns.reshape(-1, 3), "%.17g")


def _make(world, split: str, count: int, *, stream: int = 0) -> RoomWorld:
    return RoomWorld(count, height=world.tile, width=world.tile * 4 // 3, seed=world.seed, stream=stream)


SUNRGBD = Miniature(
    "drawn world of rooms in colour and depth",
    make=_make,
    splits={"train": "locations", "test": "test"},
    writer=write_sunrgbd,
    factors={name: "hha" if who == "depth" else who for name, who in FACTORS.items()},
    size=lambda world: (world.tile, world.tile * 4 // 3),
    sensors=("rgb", "hha", ("depth",)),
)
NYUV2 = replace(SUNRGBD, make=partial(_make, stream=1), splits={"train": "train", "test": "test"}, writer=write_nyuv2)

"""HHA of one depth image, 480 x 640 pixels, on one core: ours against the published way of going about it.

    python -m benchmarks.hha

Published: nine sums over windows of 7 x 7 and of 21 x 21 pixels, each of them pixel by pixel of the window; the arc
cosine of one pixel after the other; the points and normals turned upright. Both encode the same room of five planes
and two boxes, and their results are compared. "given" is ours when gravity is known, so that it need not be found.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from decur_core.data.hha import depth_to_hha

from . import common


def room(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth (H, W) in metres of a room seen from 1.4 m above its floor, camera tilted and rolled; intrinsics (3, 3)."""
    k = np.array([[0.81 * width, 0, 0.51 * width], [0, 0.81 * width, 0.52 * height], [0, 0, 1]])
    u, v = np.meshgrid(np.arange(1, width + 1), np.arange(1, height + 1))
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], axis=-1)
    tilt, roll = np.radians([12, 4])
    pitched = np.array([[1, 0, 0], [0, math.cos(tilt), math.sin(tilt)], [0, -math.sin(tilt), math.cos(tilt)]])
    rays = rays @ (pitched @ [[math.cos(roll), math.sin(roll), 0], [-math.sin(roll), math.cos(roll), 0], [0, 0, 1]]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        walls = np.stack(
            [1.4 / rays[..., 1], -1.2 / rays[..., 1], 2 / rays[..., 0], -1.5 / rays[..., 0], 4 / rays[..., 2]]
        )
        depth = np.where(walls > 0, walls, np.inf).min(0)
        for low, high in (((-0.9, 0.7, 2.2), (0.1, 1.4, 2.8)), ((0.8, 0.2, 2.9), (1.5, 1.4, 3.5))):
            near, far = np.sort(np.stack([np.array(low) / rays, np.array(high) / rays]), axis=0)
            enter, leave = near.max(-1), far.min(-1)
            depth = np.where((enter > 0) & (enter < leave), np.minimum(depth, enter), depth)
    return depth, k


def published(depth: np.ndarray, k: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of an image without holes, each step as the published Python version goes about it."""
    u, v = np.meshgrid(np.arange(1, depth.shape[1] + 1), np.arange(1, depth.shape[0] + 1))
    z = 100 * depth
    points = np.stack([(u - k[0, 2]) * z / k[0, 0], (v - k[1, 2]) * z / k[1, 1], z], axis=-1)
    fine, coarse = (plane_normals(points, radius) for radius in (3, 10))
    down = np.array([0.0, 1.0, 0.0])
    flat = coarse.reshape(-1, 3).T
    for degrees in np.repeat([45, 15], 5):
        cosine = np.abs(down @ flat)
        floors, walls = (
            flat[:, cosine > math.cos(math.radians(degrees))],
            flat[:, cosine < math.sin(math.radians(degrees))],
        )
        values, vectors = np.linalg.eig(walls @ walls.T - floors @ floors.T)
        found = vectors[:, values.argmin()]
        down = found * np.sign(found @ down)
    axis = np.cross([0, 1, 0], down)
    (a, b, c), turn = axis / np.linalg.norm(axis), math.acos(down[1])
    cross = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
    rotation = np.eye(3) + math.sin(turn) * cross + (1 - math.cos(turn)) * cross @ cross
    upright, _ = ((rotation.T @ x.reshape(-1, 3).T).T.reshape(x.shape) for x in (points, fine))
    height = -upright[..., 1]
    lowest = np.percentile(height, 0)
    height = height - (lowest if lowest <= -90 else -130)
    cosines = np.clip((fine * down).sum(-1), -1, 1)
    angle = np.array([math.degrees(math.acos(x)) for x in cosines.flatten()]).reshape(z.shape)
    bands = np.stack([31000 / np.maximum(z, 100), height, angle + 128 - 90], axis=-1)
    return np.minimum(np.rint(bands), 255).astype(np.uint8)


def plane_normals(points: np.ndarray, radius: int) -> np.ndarray:
    """Unit normals (H, W, 3) of the planes that fit (2 radius + 1)^2 points best; they point away from the camera."""
    x, y, z = np.moveaxis(points, -1, 0)
    h, w = z.shape
    x, y = x / z, y / z
    sums = []
    for values in (x * x, x * y, x, y * y, y, np.ones_like(z), x / z, y / z, 1 / z):
        padded, total = np.pad(values, radius), np.zeros_like(z)
        for i in range(2 * radius + 1):
            for j in range(2 * radius + 1):
                total += padded[i : i + h, j : j + w]
        sums.append(total)
    xx, xy, x, yy, y, n, bx, by, b = sums
    normals = np.stack(  # the adjugate of the normal equations' matrix times their right-hand side
        [
            (yy * n - y * y) * bx + (x * y - xy * n) * by + (xy * y - x * yy) * b,
            (x * y - xy * n) * bx + (xx * n - x * x) * by + (xy * x - xx * y) * b,
            (xy * y - x * yy) * bx + (xy * x - xx * y) * by + (xx * yy - xy * xy) * b,
        ],
        axis=-1,
    )
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return normals * np.where((normals * points).sum(-1, keepdims=True) < 0, -1, 1)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(
        __doc__,
        argv,
        height=(480, 480, "of the image, in pixels"),
        width=(640, 640, "of the image, in pixels"),
        repeats=(5, 5, "timed turns of each way; the median counts"),
        threads=(1, 1, "CPU threads"),
    )
    if torch.device(options.device).type != "cpu":
        raise SystemExit("HHA images are made on the CPU when a data set is converted; leave out --device")
    torch.set_num_threads(options.threads)
    depth, k = room(options.height, options.width)
    off = np.abs(published(depth, k).astype(int) - depth_to_hha(depth, k)).max((0, 1))
    if off.max() > 1:
        raise RuntimeError(f"the bands of the two ways differ by up to {off.tolist()} levels, expected at most 1")
    ways = {
        "published": lambda: published(depth, k),
        "ours": lambda: depth_to_hha(depth, k),
        "given": lambda: depth_to_hha(depth, k, np.array([0.0, 1.0, 0.0])),
    }
    time = common.seconds(ways, repeats=options.repeats)
    row = {f"{name} ms": 1e3 * value for name, value in time.items()}
    row |= {"times faster": time["published"] / time["ours"], "largest difference": int(off.max())}
    print(common.table([row]))
    print(common.save("hha", settings=vars(options), rows=[row]))


if __name__ == "__main__":
    main()

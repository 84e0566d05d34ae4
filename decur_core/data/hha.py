"""HHA: a depth image as three 8-bit bands, disparity, height and angle (Gupta et al. 2014, arXiv:1407.5736).

The numbers are those of the published MATLAB code and its Python version (charlesCXK/Depth2HHA-python), with depth Z:

- disparity: 31000 cm / Z, where nothing counts as nearer than 1 m;
- height: cm above the lowest point of the image along gravity. If that point is less than 90 cm below the camera, the
  floor is taken to be out of view and 130 cm below the camera;
- angle: 38 + the angle in degrees between gravity and the surface normal that points away from the camera, so that a
  floor gives 38, a wall 128 and a ceiling 218.

Normals are planes 1/Z = n . (x, y, 1) / d that fit the 7 x 7 pixels around each pixel best; gravity is looked for with
planes of 21 x 21 pixels. Nothing is drawn at random and no sum is split over threads.
"""

import numpy as np

from decur_core.data.raster import DataError

_NORMAL, _SMOOTH = 3, 10  # half the side of the windows of normals, of the image and for finding gravity
_STAGES = np.radians([45, 15])  # of the search for gravity: how far from exact a floor or wall may be
_ROUNDS = 5  # of each stage
_BLOCK, _PART = 32, 8192  # rows or columns, and normals, that are dealt with at once: they fit into a CPU's cache
_FLAT = 1e-3  # share of the normals that has to speak for a direction of gravity against another one


def depth_to_hha(
    depth_m: np.ndarray, intrinsics: np.ndarray, gravity: np.ndarray | None = None, *, missing: np.ndarray | None = None
) -> np.ndarray:
    """Encode one depth image: uint8 (H, W, 3) with disparity, height and angle, rounded and cut off at 255.

    `depth_m`: (H, W), metres along the optical axis; 0, NaN and infinity are holes. `intrinsics`: [[fx, 0, cx],
    [0, fy, cy], [0, 0, 1]] in pixels, where the first pixel has its centre at (1, 1) as in the published calibrations.
    `gravity`: unit vector that points down, in camera coordinates x right, y down, z forward; None finds it as Gupta et
    al. do, which takes a camera held upright within about 45 degrees. `missing`: bool (H, W), True where the sensor
    measured nothing and `depth_m` is filled in: such pixels have no part in the normals, else they count.

    Holes get what the published code gives them: disparity 255, the height of the camera, and the angle of the plane
    through their neighbours, or 218 where the window is empty. Windows with pixels in a line also give 218; there the
    published code gives rounding noise.
    DataError: arguments of another form, units that cannot be metres, intrinsics of another image, nothing but holes.
    """
    depth, camera = _checked(depth_m, intrinsics)
    seen = depth > 0
    if missing is not None:
        missing = np.asarray(missing)
        if missing.shape != depth.shape or missing.dtype != bool:
            raise DataError(f"missing: {missing.dtype} {missing.shape}; expected bool {depth.shape}, True = filled in")
        seen &= ~missing
    if not seen.any():
        raise DataError(f"depth_m: all {depth.size} pixels are holes, there is nothing to encode; leave the image out")
    if gravity is None:
        down = _gravity(_normals(depth, seen, camera, _SMOOTH))
    else:
        down = np.asarray(gravity, np.float64)
        if down.shape != (3,) or not abs(np.linalg.norm(down) - 1) < 1e-3:
            raise DataError(f"gravity: {down.tolist()}; expected None or three numbers, a unit vector that points down")

    fx, fy, cx, cy = camera
    x, y = (np.arange(1, depth.shape[1] + 1) - cx) / fx, (np.arange(1, depth.shape[0] + 1)[:, None] - cy) / fy
    nx, ny, nz = _normals(depth, seen, camera, _NORMAL)
    away = np.where(depth > 0, nx * x + ny * y + nz, nz)  # a hole is at no place, so that its z has to do
    cosine = down[0] * nx + down[1] * ny + down[2] * nz
    np.negative(cosine, out=cosine, where=away < 0)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1, out=cosine), out=cosine), out=cosine)
    depth_cm = 100 * depth
    height = (down[0] * x + (down[1] * y + down[2])) * -depth_cm
    height -= lowest if (lowest := height.min()) <= -90 else -130
    bands = np.empty((*depth.shape, 3), np.uint8)
    angle = np.nan_to_num(angle, copy=False, nan=180) + 38
    for i, band in enumerate((31000 / np.maximum(depth_cm, 100), height, angle)):
        bands[..., i] = np.rint(np.minimum(band, 255, out=band), out=band)
    return bands


def _checked(depth_m: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Depth as float64 with 0 for every hole; fx, fy, cx, cy."""
    depth = np.asarray(depth_m)
    if depth.ndim != 2 or depth.dtype.kind not in "fui" or not depth.size:
        raise DataError(f"depth_m: {depth.dtype} {depth.shape}; expected one image (H, W) of numbers in metres")
    depth = np.where(np.isfinite(depth), depth, 0).astype(np.float64)
    if depth.min() < 0:
        raise DataError(f"depth_m: {depth.min():g} m is negative; holes are 0 or NaN")
    if depth.max() > 100:
        raise DataError(f"depth_m: up to {depth.max():g} m; if these are millimetres, divide them by 1000")
    k = np.asarray(intrinsics, np.float64)
    fx, fy, cx, cy = (k[0, 0], k[1, 1], k[0, 2], k[1, 2]) if k.shape == (3, 3) else (np.nan,) * 4
    if not np.array_equal(k, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]) or not 0 < min(fx, fy) <= max(fx, fy) < np.inf:
        raise DataError(f"intrinsics: {k.tolist()}; expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0")
    h, w = depth.shape
    if not (0.5 <= cx <= w + 0.5 and 0.5 <= cy <= h + 0.5):
        found = f"principal point ({cx:g}, {cy:g}) outside the image of {w} x {h} pixels"
        raise DataError(f"intrinsics: {found}; when depth_m is resized or cropped, scale or shift them with it")
    return depth, (fx, fy, cx, cy)


def _window_sums(values: np.ndarray, radius: int, axis: int) -> np.ndarray:
    """Sums over `radius` pixels on either side and the pixel itself along an axis, -2 or -1, of (..., H, W).

    Products with bands of ones, a block of pixels at a time: sums of whole numbers stay exact, and no pass over the
    image is bound by memory.
    """
    sums, length = np.empty(values.shape), values.shape[axis]
    lines, totals = values.reshape(-1, values.shape[-1]), sums.reshape(-1, values.shape[-1])
    for first in range(0, length, _BLOCK):
        last = min(first + _BLOCK, length)
        low, high = max(first - radius, 0), min(last + radius, length)
        band = (np.abs(np.arange(first, last)[:, None] - np.arange(low, high)) <= radius).astype(np.float64)
        if axis == -2:
            np.matmul(band, values[..., low:high, :], out=sums[..., first:last, :])
        else:
            np.matmul(lines[:, low:high], band.T, out=totals[:, first:last])
    return sums


def _normals(depth: np.ndarray, seen: np.ndarray, camera: tuple, radius: int) -> np.ndarray:
    """Unit normals of the planes that fit best, float64 (3, H, W), either sign; NaN where the pixels fix no plane."""
    fx, fy, cx, cy = camera
    h, w = depth.shape
    # Whole numbers from the middle of the image: sums of pixels and their determinant are then exact, 0 for a line.
    u, v = np.arange(w) - w // 2, np.arange(h)[:, None] - h // 2
    inverse = np.divide(1, depth, out=np.zeros_like(depth), where=seen)
    down = _window_sums(np.stack((seen, seen * v, seen * v**2, inverse, inverse * v)), radius, -2)
    normals = np.empty((3, h, w))
    for rows in (slice(i, i + _BLOCK) for i in range(0, h, _BLOCK)):  # what a few rows take fits into the cache
        one, v1, v2, z, vz = down[:, rows]
        products = np.stack((one, one * u, one * u**2, v1, v1 * u, v2, z, z * u, vz))
        n, su, suu, sv, suv, svv, sz, suz, svz = _window_sums(products, radius, -1)
        uu, uv, vv, uz, vz = n * suu - su**2, n * suv - su * sv, n * svv - sv**2, n * suz - su * sz, n * svz - sv * sz
        determinant = uu * vv - uv**2
        a, b = vv * uz - uv * vz, uu * vz - uv * uz  # 1/Z = (a u + b v + c) / determinant
        with np.errstate(divide="ignore", invalid="ignore"):
            c = (sz * determinant - a * su - b * sv) / n + a * (cx - 1 - w // 2) + b * (cy - 1 - h // 2)
            a, b = a * fx, b * fy
            length = np.where(determinant > 0, np.sqrt(a * a + b * b + c * c), np.nan)
            for band, values in zip(normals, (a, b, c), strict=True):
                np.divide(values, length, out=band[rows])
    return normals


def _gravity(normals: np.ndarray) -> np.ndarray:
    """The direction that floors face and walls do not, from (3, H, W): unit vector (3,), starting at the camera's y.

    Where several directions fit equally well (a bare wall in view), it is the one of them nearest to the last guess.
    """
    normals = normals.reshape(3, -1)
    normals = normals[:, np.isfinite(normals[0])]
    down, count = np.array([0.0, 1.0, 0.0]), normals.shape[1]
    for stage in _STAGES:
        before = None
        for _ in range(_ROUNDS):
            products = np.zeros((3, 3))
            for part in (normals[:, i : i + _PART] for i in range(0, count, _PART)):
                along = np.abs(down @ part)
                wall, floor = ((x.view(np.int8)) for x in (along < np.sin(stage), along > np.cos(stage)))
                products += (part * (wall - floor).astype(np.float64)) @ part.T
            if np.array_equal(products, before):  # the same floors and walls again, as in all rounds to come
                break
            values, vectors = np.linalg.eigh(products)
            best = vectors[:, values <= values[0] + _FLAT * count]
            guess, before = best @ (best.T @ down), products
            if (length := np.linalg.norm(guess)) > 1e-6:
                down = guess / length
    return down

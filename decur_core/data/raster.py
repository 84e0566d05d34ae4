"""GeoTIFF bands as float32 arrays, with errors that name the file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F

# Pixel size of the 13 Sentinel-2 bands B1..B8, B8A, B9..B12 in units of 10 m.
OPTICAL_STEPS = (6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 6, 2, 2)
_KINDS = {"f": "floating-point numbers", "ui": "integers"}


class DataError(ValueError):
    """A file of a data set is missing, damaged or not of the published form."""


def resize(band: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring (h, w) or (C, h, w) of any real dtype to another pixel grid: float32 (…, H, W), `size` = (H, W).

    Bilinear with half-pixel centres and no smoothing: output pixel i samples the input at (i + 0.5) * h / H - 0.5,
    clamped to the border. This is OpenCV's INTER_LINEAR in floating point, with which the published loaders bring 20 m
    and 60 m bands to 10 m. A band already of this size only changes its dtype.
    """
    values = np.ascontiguousarray(band, dtype=np.float32)
    if values.shape[-2:] == tuple(size):
        return values
    grid = torch.from_numpy(values).reshape(1, -1, *values.shape[-2:])
    out = F.interpolate(grid, size=tuple(size), mode="bilinear", align_corners=False)
    return out.numpy().reshape(*values.shape[:-2], *size)


def read(path: Path | str, *, count: int, kind: str) -> np.ndarray:
    """Read a whole GeoTIFF: (count, H, W) in the file's dtype.

    `count` bands must be there; `kind` is "f" for a floating-point file, "ui" for integers: another type means another
    product. A DataError names a file that is missing, damaged, truncated or of another form.
    """
    try:
        with rasterio.open(path, driver="GTiff") as source:
            if source.count != count:
                raise DataError(f"{path}: expected {count} band(s), found {source.count}")
            if np.dtype(source.dtypes[0]).kind not in kind:
                raise DataError(f"{path}: expected {_KINDS[kind]}, found {source.dtypes[0]}")
            return source.read()
    except (rasterio.errors.RasterioError, OSError) as error:
        state = "cannot be read (damaged or truncated?)" if Path(path).exists() else "missing"
        raise DataError(f"{path}: {state}; expected a GeoTIFF of {count} band(s): {error}") from error


def read_bands(
    paths: Sequence[Path | str | None], *, steps: Sequence[int], kind: str, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Read one-band files of one place and bring them to the finest grid: float32 (len(paths), H, W).

    `paths`: one per band, None for a row of zeros; `steps`: pixel size of each band in units of the finest one (1, 2
    and 6 for Sentinel-2), at least one is 1; `kind`: as in `read`; `size`: (H, W) of the finest grid, None takes that
    of the first band with step 1. A DataError as in `read`, and for a file of another size than `size` / step.
    """
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):  # there are no side files worth a listing
        bands = [None if path is None else read(path, count=1, kind=kind)[0] for path in paths]
    size = size or next(band.shape for band, step in zip(bands, steps, strict=True) if step == 1 and band is not None)
    out = np.zeros((len(bands), *size), dtype=np.float32)
    coarse = {}  # bands of one step are resized in one call
    for row, (path, band, step) in enumerate(zip(paths, bands, steps, strict=True)):
        if band is None:
            continue
        if (band.shape[0] * step, band.shape[1] * step) != tuple(size):
            wanted = f"{size[0] / step:g} x {size[1] / step:g} (1/{step} of the {size[0]} x {size[1]} of 10 m bands)"
            raise DataError(f"{path}: {band.shape[0]} x {band.shape[1]} pixels, expected {wanted}")
        if step == 1:
            out[row] = band
        else:
            coarse.setdefault(step, []).append((row, band))
    for group in coarse.values():
        rows, stack = zip(*group, strict=True)
        out[list(rows)] = resize(np.stack(stack), size)
    return out

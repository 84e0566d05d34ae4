"""GeoTIFF (and JPEG 2000) bands as arrays on one grid, and what all readers share, first errors that name the file."""

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from rasterio.crs import CRS
from rasterio.io import DatasetReader

from decur_core.running.files import visible as visible  # part of what readers share

# Pixel size of the 13 Sentinel-2 bands B1..B8, B8A, B9..B12 in units of 10 m.
OPTICAL_STEPS = (6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 6, 2, 2)
MISSING = ("error", "skip")  # what a reader can do about what is not there
_KINDS = {"f": "floating-point numbers", "ui": "integers", "fui": "real numbers"}


class DataError(ValueError):
    """A file of a data set is missing, damaged or not of the published form."""


class Reader:
    """A data set: `.ids`, in its order, and by position the sample of each.

    Readers of files take `root`; maybe `split`, None for all that is there; and `missing`: "error" refuses a data set,
    or a split of it, of which something is not there, "skip" uses the rest, and `.left_out` counts what was not used.
    A DataError names what is missing, damaged, of another form or at another place: of the whole when a reader is
    made, of one sample when that is asked for.
    """

    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


class Part(Reader):
    """The items of a reader at some positions."""

    def __init__(self, reader: Reader, positions: Sequence[int]):
        self.reader, self.positions, self.ids = reader, positions, [reader.ids[i] for i in positions]

    def __getitem__(self, i: int) -> dict:
        return self.reader[self.positions[i]]


class Joined(Reader):
    """Several readers one after the other, as one."""

    def __init__(self, *readers: Reader):
        self.places = [(reader, i) for reader in readers for i in range(len(reader))]
        self.ids = [name for reader in readers for name in reader.ids]

    def __getitem__(self, i: int) -> dict:
        reader, place = self.places[i]
        return reader[place]


def one_of(allowed: Sequence, **given: object) -> None:
    """Refuse options of a reader that are none of those it knows."""
    for name, value in given.items():
        if value not in allowed:
            known = " and ".join([", ".join(map(str, allowed[:-1])), str(allowed[-1])])
            raise DataError(f"{name} is {value!r}; allowed are {known}")


def repeated(names: Iterable[str]) -> list[str]:
    """Those that are given more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


@contextmanager
def reading(path: Path | str, expected: str):
    """What libraries raise for a damaged file becomes a DataError that says what was expected."""
    try:
        yield
    except Exception as error:
        state = "cannot be read" if Path(path).exists() else "missing"
        raise DataError(f"{path}: {state}; expected {expected}: {error!r}") from error


class _Raster(NamedTuple):
    values: np.ndarray  # (count, H, W)
    crs: CRS | None
    bounds: tuple[float, float, float, float]  # west, south, east, north in the units of `crs`


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


def read(path: Path | str, *, count: int, kind: str, driver: str = "GTiff") -> np.ndarray:
    """Read a whole file: (count, H, W) in the file's dtype.

    `count` bands must be there; `kind` is "f" for a floating-point file, "ui" for integers, "fui" for either: another
    type means another product; `driver`: GDAL's name of the format. In a file of kind "fui" pixels that it marks as
    having no data become NaN, so the result is float32. A DataError names a file that is missing, damaged, truncated or
    of another form; damaged is also what the decoder only warns of, as of a JPEG 2000 stream without an end.
    """
    with _gdal() as warned:
        return _read(path, warned, count=count, kind=kind, driver=driver).values


@contextmanager
def _gdal() -> Iterator[list[str]]:
    """Where files are read: one environment for many files, and a list of what GDAL warns of in this thread."""
    said, thread, handler = [], threading.get_ident(), logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage()) if record.thread == thread else None
    log = logging.getLogger("rasterio")
    log.addHandler(handler)
    try:
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):  # there are no side files worth a listing
            yield said
    finally:
        log.removeHandler(handler)


def _read(path: Path | str, warned: list[str], *, count: int, kind: str, driver: str = "GTiff") -> _Raster:
    try:
        with DatasetReader(Path(path), driver=driver) as source:  # open would enter an environment for each file
            if source.count != count:
                raise DataError(f"{path}: expected {count} band(s), found {source.count}")
            if np.dtype(source.dtypes[0]).kind not in kind:
                raise DataError(f"{path}: expected {_KINDS[kind]}, found {source.dtypes[0]}")
            warned.clear()  # of unknown tags and the like; what counts is how the pixels are decoded
            values = source.read(masked=kind == "fui")
            if warned:  # a decoder goes on with what it can make of a damaged file
                raise DataError(f"{path}: damaged, says its decoder ({driver}): {warned[0]}")
            if kind == "fui":
                values = values.astype(np.float32).filled(np.nan)
            return _Raster(values, source.crs, tuple(source.bounds))
    except (rasterio.errors.RasterioError, OSError, MemoryError) as error:  # the last: a header with an absurd size
        state = "cannot be read (damaged or truncated?)" if Path(path).exists() else "missing"
        raise DataError(f"{path}: {state}; expected {count} band(s) as {driver}: {error}") from error


def read_place(
    optical: Sequence[Path | str | None], sar: Sequence[Path | str], *, utm: bool = False, out: np.ndarray | None = None
) -> np.ndarray:
    """Read one-band files of one place and bring them to 10 m: float32 (13 + len(sar), H, W), `out` if given.

    `optical`: integers, in the order B1..B8, B8A, B9..B12, None for a row of zeros; `sar`: floating point; H, W: those
    of B2. `utm`: whether they lie on one projected grid, to half a pixel (a coarse band may then have come resampled
    to 10 m); else each has corners of its own, and they only have to lie within a quarter of a side of each other.

    A DataError as in `read`, for a file of another size than (H, W) / step, and for one at another place.
    """
    paths, steps = [*optical, *sar], [*OPTICAL_STEPS, *[1] * len(sar)]
    kinds, first = ["ui"] * len(optical) + ["f"] * len(sar), steps.index(1)
    with _gdal() as warned:
        files = [path and _read(path, warned, count=1, kind=kind) for path, kind in zip(paths, kinds, strict=True)]
    size = files[first].values.shape[1:] if out is None else out.shape[1:]
    out = np.empty((len(paths), *size), dtype=np.float32) if out is None else out
    coarse = {}  # bands of one step are resized in one call
    for row, (path, file, step) in enumerate(zip(paths, files, steps, strict=True)):
        if file is None:
            out[row] = 0
            continue
        height, width = file.values.shape[1:]
        if (height, width) == size and (step == 1 or utm):
            out[row] = file.values[0]
        elif (height * step, width * step) == size:
            coarse.setdefault(step, []).append((row, file.values[0]))
        else:
            wanted = f"{size[0] / step:g} x {size[1] / step:g} (1/{step} of the {size[0]} x {size[1]} of 10 m bands)"
            raise DataError(f"{path}: {height} x {width} pixels, expected {wanted}")
    _check_places({path: file for path, file in zip(paths, files, strict=True) if file}, paths[first], utm)
    for group in coarse.values():
        rows, stack = zip(*group, strict=True)
        out[list(rows)] = resize(np.stack(stack), size)
    return out


def _check_places(files: dict[Path | str, _Raster], first: Path | str, utm: bool) -> None:
    """Refuse files that do not show the place of the first one or, if that is asked for, do not lie on one grid."""
    crs, (west, south, east, north) = files[first].crs, files[first].bounds
    side = (east - west) / files[first].values.shape[2]
    if utm and not (crs and crs.is_projected and abs(side - 10) < 0.1):
        raise DataError(f"{first}: pixels of {side:g} in {crs}, expected a UTM grid of 10 m")
    apart = 5 if utm else 0.25 * min(east - west, north - south)
    for path, file in files.items():
        shift = max(abs(a - b) for a, b in zip(file.bounds, files[first].bounds, strict=True))
        if file.crs != crs or shift > apart:
            other = f"{first} of the same sample {files[first].bounds} in {crs}; they must lie at the same place"
            raise DataError(f"{path}: shows {file.bounds} in {file.crs}, but {other}")

"""Anyone's images: a folder per modality with the same names in each.

Tree: `<modality>/<id>.<tif|tiff|png|jpg|jpeg|npy>`, or `<modality>/<id>/<season>.<…>` for several images of a place;
`train.txt`, `test.txt` and so on with an id per line; `labels.csv` (see `read_labels`) or `mask/<id>.png`, 8 bits, 0
for unlabelled and classes from 1 on. An array file holds (C, H, W), or (H, W) of one band.
"""

import csv
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import array_bounds
from rasterio.warp import Resampling, reproject

from decur_core.data.modality import Modality
from decur_core.data.raster import DataError, Reader, reading, repeated

DRIVERS = {".tif": "GTiff", ".tiff": "GTiff", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".npy": ""}
_PIXELS = 10_000  # per band of a sample that `measure` looks at


class Image(NamedTuple):
    path: Path
    values: np.ndarray  # (C, H, W)
    crs: CRS | None = None
    transform: Affine = Affine.identity()

    def __str__(self) -> str:
        height, width = self.values.shape[1:]
        place = f" at {', '.join(f'{v:.10g}' for v in self.bounds)} of {self.crs}" if self.crs else ""
        return f"{height} x {width} pixels{place}"

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east and north in the units of `crs`."""
        return array_bounds(*self.values.shape[1:], self.transform)


def read(path: Path) -> Image:
    """A whole image. Pixels that a file of more than 8 bits marks as having no data become NaN."""
    with reading(path, "a GeoTIFF, PNG, JPEG or array of real numbers"):
        if not (driver := DRIVERS[path.suffix.lower()]):
            with open(path, "rb") as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
            image = Image(path, values[None] if values.ndim == 2 else values)
        else:
            if driver == "PNG" and b"IEND" not in path.read_bytes()[-64:]:  # GDAL fills what is missing with zeros
                raise ValueError("truncated")
            with warnings.catch_warnings(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with rasterio.open(path, driver=driver) as file:
                    values = file.read(masked=file.dtypes[0] != "uint8")
                    if np.ma.is_masked(values):
                        values = values.astype(np.float32).filled(np.nan)
                    image = Image(path, np.asarray(values), file.crs, file.transform)
        if image.values.ndim != 3 or image.values.dtype.kind not in "fui" or not image.values.size:
            raise ValueError(f"{image.values.dtype} values of shape {image.values.shape}")
    return image


def on_grid(image: Image, grid: Image, resample: bool, method: Resampling = Resampling.bilinear) -> np.ndarray:
    """Pixels (C, H, W) of an image on the grid of another one of the same sample, resampled if they are not and may be.

    By place where both say where they lie (one grid: the same to half a pixel), else corner to corner.
    """
    (h, w), (height, width) = image.values.shape[1:], grid.values.shape[1:]
    placed = bool(image.crs and grid.crs)
    if (h, w) == (height, width):
        half = (grid.bounds[2] - grid.bounds[0]) / w / 2
        if not placed or image.crs == grid.crs and np.abs(np.subtract(image.bounds, grid.bounds)).max() <= half:
            return image.values
    if not resample:
        message = f"{image.path}: {image}, but {grid.path} of the same id has {grid}"
        raise DataError(f"{message}; bring them to one grid, or have it done with resample: true")
    values = np.full((len(image.values), height, width), np.nan, np.float32)
    reproject(
        image.values.astype(np.float32),
        values,
        src_transform=image.transform if placed else Affine.scale(width / w, height / h),
        dst_transform=grid.transform if placed else Affine.identity(),
        src_crs=image.crs if placed else "EPSG:3857",
        dst_crs=grid.crs if placed else "EPSG:3857",
        src_nodata=np.nan,
        dst_nodata=np.nan,
        resampling=method,
    )
    if bad := int(np.isnan(values).any(axis=0).sum()):
        raise DataError(f"{image.path}: {image}: no data for {bad} of the {height * width} pixels of {grid.path}")
    return np.rint(values).clip(0, 255).astype(np.uint8) if image.values.dtype == np.uint8 else values


class Folders(Reader):
    """Images of two or more modalities with the same ids, with labels or masks where they are there.

    `root` holds a folder per name in `modalities`; `split`: name of a list `<split>.txt` beside them, None or "all" for
    every id, sorted; `resample`: bring images of another size or grid to that of the first modality (bilinear, masks
    nearest), refused otherwise; `missing`: "error" refuses ids that not every modality has, "skip" leaves them out;
    `classes`: names that labels may have, in the order of the columns, () for those found, sorted; `masks`: names of
    the classes 1, 2, … of masks, () for any.

    Items: {"id", <modality>: ((S,) C, H, W), uint8 if its files have 8 bits, else float32 in the unit of the files,
    "labels": bool (classes,), "mask": uint8 (H, W)}. Seasons are in the order of their names; the k-th of one modality
    goes with the k-th of another, and an image without seasons (elevation) with all of them.
    `.left_out`: how many hidden files, dangling links, files of other types and ids were left out; a warning says so.

    A DataError names the id or file: an id missing in a modality or in labels, or unknown to them; another size or
    grid; another number of bands or seasons; a band of one value; more than 8 bits where `modality.scheme` is bytes.
    """

    def __init__(
        self,
        root: Path | str,
        modalities: Sequence[Modality],
        split: str | None = None,
        *,
        resample: bool = False,
        missing: str = "error",
        classes: Sequence[str] = (),
        masks: Sequence[str] = (),
    ):
        if missing not in ("error", "skip"):
            raise ValueError(f"missing is {missing!r}; allowed are 'error' and 'skip'")
        self.root, self.modalities, self.resample, self.masks = Path(root), tuple(modalities), resample, tuple(masks)
        self.left_out = Counter()
        self._files = {modality.name: self._scan(modality.name) for modality in modalities}
        self._masks = self._scan("mask") if (self.root / "mask").is_dir() else None
        known = set().union(*self._files.values())
        wanted = sorted(known) if split in (None, "all") else self._list(split, known)
        lacking = {i: name for name, files in self._files.items() for i in wanted if i not in files}
        if missing == "error":
            for i, name in lacking.items():
                state = f"{len(lacking)} of {len(wanted)} ids are not in every folder, {i} for one is not in {name}"
                raise DataError(f"{self.root}: {state}; complete it, or use the others with missing='skip'")
        self.ids = [i for i in wanted if i not in lacking]
        if not self.ids:
            raise DataError(f"{self.root}: no id is in all of {', '.join(self._files)}")
        self.left_out = +(self.left_out + Counter(ids=len(lacking)))
        if self.left_out:
            warnings.warn(f"{self.root}: left out: {dict(self.left_out)}", stacklevel=2)
        self.classes, self._labels = tuple(classes), None
        if (path := self.root / "labels.csv").is_file():
            self.classes, self._labels = read_labels(path, self.classes)
            self._match(path, self._labels, known)
        if self._masks is not None:
            self._match(self.root / "mask", self._masks, known)

    def __getitem__(self, i: int) -> dict:
        id = self.ids[i]
        paths = {modality.name: self._seasons(modality.name, id) for modality in self.modalities}
        seasons = {name: len(own) for name, own in paths.items() if own[0].parent != self.root / name}
        if len(set(seasons.values())) > 1:
            raise DataError(f"{self.root}: {id} has {seasons} seasons; give each modality the same number")
        item, grid = {"id": id}, None
        for modality in self.modalities:
            images = [read(path) for path in paths[modality.name]]
            grid = grid or images[0]
            pixels = np.stack([self._pixels(image, modality, grid) for image in images])
            for band, values in zip(modality.bands, pixels.swapaxes(0, 1), strict=True):
                if values.min() == values.max():
                    found = f"band {band} of {id} is {values.flat[0]:g} all over"
                    raise DataError(f"{images[0].path}: {found}; leave the id or the band out")
            count = max(seasons.values(), default=0)
            item[modality.name] = np.repeat(pixels, count // len(pixels), axis=0) if count else pixels[0]
        if self._labels is not None:
            item["labels"] = np.array([name in self._labels[id] for name in self.classes])
        if self._masks is not None:
            item["mask"] = self._mask(read(self.root / "mask" / self._masks[id]), grid)
        return item

    def _pixels(self, image: Image, modality: Modality, grid: Image) -> np.ndarray:
        """(C, H, W) of an image of this modality, on the grid of its sample."""
        if len(image.values) != len(modality.bands):
            wanted = f"{len(modality.bands)} ({', '.join(modality.bands)}) of {modality.name}"
            raise DataError(f"{image.path}: {len(image.values)} band(s), expected {wanted}")
        if modality.scheme == "bytes" and image.values.dtype != np.uint8:
            found = f"{image.values.dtype} values, but {modality.name} is declared as 8-bit images (bytes)"
            raise DataError(f"{image.path}: {found}; declare another mapping, or none to have it measured")
        pixels = on_grid(image, grid, self.resample)
        return pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)

    def _mask(self, image: Image, grid: Image) -> np.ndarray:
        if len(image.values) != 1 or image.values.dtype != np.uint8:
            raise DataError(f"{image.path}: {len(image.values)} bands of {image.values.dtype}, expected one of 8 bits")
        if self.masks and image.values.max() > len(self.masks):
            raise DataError(f"{image.path}: class {image.values.max()}, expected 0 to {len(self.masks)}")
        return on_grid(image, grid, self.resample, Resampling.nearest)[0]

    def _scan(self, name: str) -> dict[str, str]:
        """id -> name of its file, or of its folder of seasons."""
        if not (folder := self.root / name).is_dir():
            raise DataError(f"{folder}: missing; the root holds a folder per modality")
        found = {}
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                self.left_out["hidden files"] += 1
            elif not path.exists():
                self.left_out["dangling links"] += 1
            elif not path.is_dir() and path.suffix.lower() not in DRIVERS:
                self.left_out["files of other types"] += 1
            elif (id := path.name if path.is_dir() else path.stem) in found:
                raise DataError(f"{folder}: {id} is there twice, as {found[id]} and {path.name}; keep one")
            else:
                found[id] = path.name
        return found

    def _list(self, split: str, known: set[str]) -> list[str]:
        if not (path := self.root / f"{split}.txt").is_file():
            lists = ", ".join(sorted(other.stem for other in self.root.glob("*.txt"))) or "none"
            raise DataError(f"{path}: missing; lists of this root: {lists}; 'all' needs no list")
        wanted = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if wrong := [i for i in wanted if i not in known] or repeated(wanted):
            raise DataError(f"{path}: {wrong[0]} is unknown or there twice; a line is an id, without suffix")
        return wanted

    def _match(self, path: Path, found: dict, known: set[str]) -> None:
        """Refuse labels or masks of ids that are not known, and ids without."""
        if unknown := sorted(found.keys() - known):
            raise DataError(f"{path}: labels for {len(unknown)} unknown ids, first {unknown[0]}; remove them")
        if lacking := [i for i in self.ids if i not in found]:
            raise DataError(f"{path}: nothing for {len(lacking)} of {len(self.ids)} ids, first {lacking[0]}")

    def _seasons(self, name: str, id: str) -> list[Path]:
        path = self.root / name / self._files[name][id]
        if not path.is_dir():
            return [path]
        found = [file for file in sorted(path.iterdir()) if file.suffix.lower() in DRIVERS and file.name[0] != "."]
        if not found:
            raise DataError(f"{path}: no image of {id} in it")
        return found


def read_labels(path: Path, classes: Sequence[str] = ()) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Names of the classes, those given or else all that occur, and those of each id.

    Either a header `id,<class>,<class>,…` and 0 or 1 in the columns; or names of classes, after a header that begins
    with `id` or without one: separated by `;` if there is one in the file, else in columns of their own if there are
    several, else by spaces (a given class may contain them). A row with the id alone has none of the classes.
    A DataError names an id that is there twice, or that has a class that is not given.
    """
    with reading(path, "rows of an id and its classes"), open(path, newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(map(str.strip, row))]
        header = rows.pop(0)[1:] if rows[0][0].lower() == "id" else []
        cells = {cell for row in rows for cell in row[1:]}
        if header and cells <= {"0", "1"}:
            found = header
            names = [[n for n, cell in zip(header, row[1:], strict=True) if cell == "1"] for row in rows]
        else:
            columns = max(map(len, rows)) > 2
            between = ";" if any(";" in cell for cell in cells) else "$" if columns else r"\s"
            keep = {cell: [cell] for cell in classes}
            names = [sum((keep.get(c) or re.split(between, c) for c in row[1:]), []) for row in rows]
            names = [[name.strip() for name in own if name.strip()] for own in names]
            found = sorted({name for own in names for name in own})
    if twice := repeated(row[0] for row in rows):
        raise DataError(f"{path}: {twice[0]} is there more than once")
    labels = {row[0]: own for row, own in zip(rows, names, strict=True)}
    for id, own in labels.items():
        if classes and (wrong := sorted({*own} - {*classes})):
            raise DataError(f"{path}: {id} has the class {wrong[0]!r}, expected {', '.join(classes)}")
    return tuple(classes or found), labels


def measure(reader, modality: Modality, *, samples: int = 256) -> dict:
    """The 8-bit mapping of a modality from the data, as `Modality.mapping` gives it and stores and weights carry it.

    `reader`: any with `.ids` and items that hold `modality.name`; `samples`, spread evenly over it, are looked at.
    8-bit images stay as they are (scheme bytes), else the 1st and 99th percentile of a band become 0 and 255
    (range_8bit). One printed line says what the values look like. Samples that cannot be read or have pixels without
    data are counted and left out, as a conversion will; a DataError if none is left.
    """
    pixels, reasons = [], []
    for i in np.unique(np.linspace(0, len(reader.ids) - 1, min(samples, len(reader.ids))).astype(int)):
        try:
            images = reader[int(i)][modality.name]
            if not np.isfinite(images).all():
                raise DataError(f"{reader.ids[i]}: pixels without data in {modality.name}")
            bands = np.moveaxis(images, -3, 0).reshape(images.shape[-3], -1)
            pixels.append(bands[:, :: -(-bands.shape[1] // _PIXELS)])
        except DataError as error:
            reasons.append(error)
    if not pixels:
        raise DataError(f"{modality.name}: none of {len(reasons)} samples can be measured, first: {reasons[0]}")
    values = np.concatenate(pixels, axis=1)
    low, high = np.percentile(values, (1, 99), axis=1)
    spread = low < high  # else nearly all is one value, and the extremes are what there is
    low, high = np.where(spread, low, values.min(axis=1)), np.where(spread, high, values.max(axis=1))
    low, high = (tuple(float(f"{v:.6g}") for v in limits) for limits in (low, high))
    measured = {"scheme": "bytes"} if values.dtype == np.uint8 else {"scheme": "range_8bit", "low": low, "high": high}
    ranges = ", ".join(f"{band} {a:g} to {z:g}" for band, a, z in zip(modality.bands, low, high, strict=True))
    left_out = f"; {len(reasons)} left out, first: {reasons[0]}" if reasons else ""
    found = f"{len(pixels)} samples look like {looks_like(values)}, declared as {modality.unit}"
    print(f"{modality.name}: {found}; 1 to 99 %: {ranges}{left_out}")
    return replace(modality, **measured).mapping()


def looks_like(values: np.ndarray) -> str:
    """In words, what values (of any shape) can be; several units can look alike."""
    if values.dtype == np.uint8:
        return "8-bit images, kept as they are"
    low, middle, high = np.percentile(values, (0.1, 50, 99.9))
    if low >= 0 and high > 1 and (values == np.rint(values)).all():
        bits = next((bits for bits in (8, 10, 12, 14, 16) if values.max() < 2**bits), 32)
        return f"whole numbers of {bits} bits (digital numbers, or reflectance x 10000)"
    for kind, least, most in (
        ("shares of 1 (reflectance)", 0, 1.5),
        ("an index from -1 to 1", -1, 1),
        ("decibels", -100, 50),
        ("degrees (angles or temperatures), or metres of low land", -180, 360),
        ("metres of elevation", -1000, 9000),
    ):
        if least <= low and high <= most and (kind != "decibels" or middle < 0):
            return kind
    return "another unit"

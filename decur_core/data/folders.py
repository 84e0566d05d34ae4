"""Anyone's images: a folder per modality with the same names in each.

Tree: `<modality>/<id>.<tif|tiff|png|jpg|jpeg|npy>`, or `<modality>/<id>/<season>.<…>` for several images of a place;
`train.txt`, `test.txt` and so on with an id per line; `labels.csv` (see `read_labels`) or `mask/<id>.png`, 8 bits, 0
for unlabelled and classes from 1 on. An array file holds (C, H, W), or (H, W) of one band. Labels are for all of train
and test; images of another list, to pretrain on, may lack them.
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
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import array_bounds
from rasterio.warp import Resampling, reproject

from decur_core.data.modality import Modality
from decur_core.data.raster import MISSING, DataError, Reader, one_of, reading, repeated, visible

DRIVERS = {".tif": "GTiff", ".tiff": "GTiff", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".npy": ""}
TRUTH = {"0": False, "1": True, "0.0": False, "1.0": True, "False": False, "True": True, "FALSE": False, "TRUE": True}
MASK = Modality(name="mask", bands=("class",), unit="number of a class", valid_range=(0.0, 255.0), scheme="bytes")


class Image(NamedTuple):
    path: Path
    values: np.ndarray  # (C, H, W)
    crs: rasterio.crs.CRS | None = None
    transform: Affine = Affine.identity()

    def __str__(self) -> str:
        height, width = self.values.shape[1:]
        bounds = array_bounds(height, width, self.transform)  # west, south, east and north
        place = f" at {', '.join(f'{v:.10g}' for v in bounds)} of {self.crs}" if self.crs else ""
        return f"{height} x {width} pixels{place}"


def read(path: Path) -> Image:
    """A whole image, upright. Pixels that a file of more than 8 bits marks as having no data become NaN."""
    with reading(path, "a GeoTIFF, PNG, JPEG or array of real numbers"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        if not (driver := DRIVERS[path.suffix.lower()]):
            values, place, turn = np.load(path, allow_pickle=False), (), 1
            values = values[None] if values.ndim == 2 else values
        else:
            if driver == "PNG" and b"IEND" not in path.read_bytes()[-64:]:  # GDAL fills what is missing with zeros
                raise ValueError("truncated")
            with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), rasterio.open(path, driver=driver) as file:
                values, place = file.read(masked=file.dtypes[0] != "uint8"), (file.crs, file.transform)
                turn = int(file.tags().get("EXIF_Orientation", 1))  # 1 to 8: how a camera was held
            values = values.astype(np.float32).filled(np.nan) if np.ma.is_masked(values) else np.asarray(values)
        if values.ndim != 3 or values.dtype.kind not in "fui" or not values.size:
            raise ValueError(f"{values.dtype} values of shape {values.shape}")
        values = values.swapaxes(1, 2) if turn > 4 else values
        values = values[:, :: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
    return Image(path, values, *place)


def on_grid(image: Image, grid: Image, resample: bool, method: Resampling = Resampling.bilinear) -> np.ndarray:
    """Pixels (C, H, W) of an image on the grid of another one of the same sample, resampled if they are not and may be.

    By place where both say where they lie (one grid: the same to half a pixel), else corner to corner.
    """
    (h, w), (height, width) = image.values.shape[1:], grid.values.shape[1:]
    placed, half = image.crs and grid.crs, np.abs(grid.transform[:2]).max() / 2
    ends = np.subtract(image.transform[:6], grid.transform[:6]).reshape(2, 3) @ [[0, w, 0], [0, 0, h], [1, 1, 1]]
    near = image.crs == grid.crs and np.abs(ends).max() <= half  # three corners, for an image may be turned or mirrored
    if (h, w) == (height, width) and (near or not placed):
        return image.values
    state, values = f"{image.path}: {image}", np.full((len(image.values), height, width), np.nan, np.float32)
    if not resample:
        raise DataError(f"{state}, but {grid.path} of the same id has {grid}; make it one grid, or set resample: true")
    if not placed:
        image = image._replace(crs="EPSG:3857", transform=Affine.scale(width / w, height / h))
        grid = grid._replace(crs="EPSG:3857", transform=Affine.identity())
    places = {"src_crs": image.crs, "src_transform": image.transform, "dst_crs": grid.crs}
    options = {"dst_transform": grid.transform, "src_nodata": np.nan, "dst_nodata": np.nan, "resampling": method}
    reproject(image.values.astype(np.float32), values, **places, **options)
    if bad := int(np.isnan(values).any(axis=0).sum()):
        raise DataError(f"{state}: no data for {bad} of the {height * width} pixels of {grid.path}")
    return np.rint(values).clip(0, 255).astype(np.uint8) if image.values.dtype == np.uint8 else values


class Folders(Reader):
    """Images of two or more modalities with the same ids, with labels or masks where they are there.

    `root` holds a folder per name in `modalities`; `split`: name of a list `<split>.txt` beside them, None or "all" for
    every id, sorted; `resample`: bring images of another size or grid to that of the first modality (bilinear, masks
    nearest), refused otherwise; `missing` is about ids that not every modality has; `classes`: names that labels may
    have, in the order of the columns, () for those found, sorted; `masks`: names of the classes 1, 2, … of masks, ()
    for any.

    Items: {"id", <modality>: ((S,) C, H, W), uint8 if its files have 8 bits, else float32 in the unit of the files,
    "labels": bool (classes,), "mask": uint8 (H, W)}. Seasons are in the order of their names; the k-th of one modality
    goes with the k-th of another, and an image without seasons (elevation) with all of them.
    Warnings tell of `.left_out`, files of other types and ids; of hidden files; of a list that is taken without labels.

    A DataError names the id or file: an id missing in a modality or in labels, or unknown to them; another size or
    grid; another number of bands or seasons; a band of one value; more than 8 bits where `modality.scheme` is bytes.
    """

    def __init__(self, root, modalities, split=None, *, resample=False, missing="error", classes=(), masks=()):
        one_of(MISSING, missing=missing)
        self.root, self.modalities, self.resample, self.masks = Path(root), tuple(modalities), resample, tuple(masks)
        self.left_out, self.classes, self._labels = Counter(), tuple(classes), {}
        self._files = {modality.name: self._scan(modality.name) for modality in modalities}
        known = set().union(*self._files.values())
        if (self.root / MASK.name).is_dir() or self.masks:
            self._files[MASK.name] = self._scan(MASK.name)
        wanted = sorted(known) if split in (None, "all") else self._list(split, known)
        lacking = {i: m.name for m in modalities for i in wanted if i not in self._files[m.name]}
        self.ids = [i for i in wanted if i not in lacking]
        for i, name in lacking.items() if missing == "error" else ():
            state = f"{len(lacking)} of {len(wanted)} ids are not in every folder, {i} for one is not in {name}"
            raise DataError(f"{self.root}: {state}; complete it, or use the others with missing='skip'")
        if not self.ids:
            raise DataError(f"{self.root}: no id is in all of {', '.join(m.name for m in modalities)}")
        self.left_out = +(self.left_out + Counter(ids=len(lacking)))
        if self.left_out:
            warnings.warn(f"{self.root}: left out: {dict(self.left_out)}", stacklevel=2)
        if (path := self.root / "labels.csv").is_file() or self.classes:
            self.classes, labels = read_labels(path, self.classes)
            self._labels = labels if self._matched(path, labels, known, split) else {}
        if MASK.name in self._files and not self._matched(self.root / MASK.name, self._files[MASK.name], known, split):
            del self._files[MASK.name]
        self.labelled = bool(self._labels) or MASK.name in self._files

    def __getitem__(self, i: int) -> dict:
        id, found, seasons, grid = self.ids[i], {}, {}, None
        for modality in (*self.modalities, MASK) if MASK.name in self._files else self.modalities:
            path = self.root / modality.name / self._files[modality.name][id]
            paths = sorted(visible(path, "*")) if path.is_dir() else [path]
            if not (images := [read(file) for file in paths if file.suffix.lower() in DRIVERS]):
                raise DataError(f"{path}: no image of {id} in it")
            grid = grid or images[0]
            found[modality.name] = pixels = np.stack([self._pixels(image, modality, grid) for image in images])
            seasons |= {modality.name: len(images)} if path.is_dir() else {}
            even = pixels.min((2, 3)) == pixels.max((2, 3))
            for season, band in np.argwhere(even) if modality is not MASK else ():
                state = f"band {modality.bands[band]} of {id} is {pixels[season, band, 0, 0]:g} all over"
                raise DataError(f"{images[season].path}: {state}; leave the id or the band out")
        if len({*seasons.values()}) > 1:
            raise DataError(f"{self.root}: {id} has {seasons} seasons; give each modality the same number")
        count, mask = max(seasons.values(), default=0), found.pop(MASK.name, None)
        item = {name: np.repeat(own, count // len(own), axis=0) if count else own[0] for name, own in found.items()}
        if self._labels:
            item["labels"] = np.array([name in self._labels[id] for name in self.classes])
        return {"id": id, **item} | ({} if mask is None else {"mask": mask[0, 0]})

    def _pixels(self, image: Image, modality: Modality, grid: Image) -> np.ndarray:
        """(C, H, W) of an image of this modality, on the grid of its sample."""
        values, name = image.values, modality.name
        if len(values) != len(modality.bands):
            wanted = f"{len(modality.bands)} ({', '.join(modality.bands)}) of {name}"
            raise DataError(f"{image.path}: {len(values)} band(s), expected {wanted}")
        if modality.scheme == "bytes" and values.dtype != np.uint8:
            state = f"{image.path}: {values.dtype} values, but {name} is declared as 8-bit images (bytes)"
            raise DataError(f"{state}; save 8 bits, or declare another mapping, or none to have it measured")
        if modality is MASK and self.masks and values.max() > len(self.masks):
            raise DataError(f"{image.path}: class {values.max()}, expected 0 to {len(self.masks)}")
        pixels = on_grid(image, grid, self.resample, Resampling.nearest if modality is MASK else Resampling.bilinear)
        return pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)

    def _scan(self, name: str) -> dict[str, str]:
        """id -> name of its file, or of its folder of seasons."""
        if not (folder := self.root / name).is_dir():
            raise DataError(f"{folder}: missing; the root holds a folder per modality, and of declared masks")
        found = {}
        for path in sorted(visible(folder, "*")):
            if not (is_folder := path.is_dir()) and path.suffix.lower() not in DRIVERS:
                self.left_out["files of other types"] += 1
            elif (id := path.name if is_folder else path.stem) in found:
                raise DataError(f"{folder}: {id} is there twice, as {found[id]} and {path.name}; keep one")
            else:
                found[id] = path.name
        return found

    def _list(self, split: str, known: set[str]) -> list[str]:
        if not (path := self.root / f"{split}.txt").is_file():
            lists = ", ".join(sorted(other.stem for other in self.root.glob("*.txt"))) or "none"
            raise DataError(f"{path}: missing; lists of this root: {lists}; 'all' needs no list")
        with reading(path, "ids, a line each"):
            wanted = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if wrong := [i for i in wanted if i not in known] or repeated(wanted):
            raise DataError(f"{path}: {wrong[0]} is unknown or there twice; a line is an id, without suffix")
        held_out = self._list("test", known) if split == "train" and (self.root / "test.txt").is_file() else ()
        if both := sorted({*wanted} & {*held_out}):
            state = f"{len(both)} of its ids stand in test.txt too, first {both[0]}"
            raise DataError(f"{path}: {state}; scores would be of images that were learnt from")
        return wanted

    def _matched(self, path: Path, found: dict, known: set[str], split: str | None) -> bool:
        """Whether every id has labels or masks, which those to be scored must; refused are those of unknown ids."""
        if unknown := sorted(found.keys() - known):
            raise DataError(f"{path}: labels for {len(unknown)} unknown ids, first {unknown[0]}; remove or rename them")
        if not (lacking := [i for i in self.ids if i not in found]):
            return True
        state = f"{path}: nothing for {len(lacking)} of {len(self.ids)} ids, first {lacking[0]}"
        if split in (None, "all", "train", "test"):
            raise DataError(f"{state}; complete it, or pretrain on pretrain.txt, with splits: [pretrain, train, test]")
        warnings.warn(f"{state}; images of {split}.txt are taken without", stacklevel=3)
        return False


def read_labels(path: Path, classes: Sequence[str] = ()) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Names of the classes, those given or else all that occur, and those of each id.

    Either a header `id,<class>,<class>,…` and 0 or 1 (False or True) in the columns; or names of classes, after a
    header that begins with `id` or without: separated by `;` if there is one in the file, else in columns of their own
    if there are several, else by spaces (a given class may hold them). A row with the id alone has none of the classes.
    Comma, `;` or tab, what comes first in the file separates columns. A DataError names an id that is there twice, or
    that has a class that is not given or another value beside 0 and 1.
    """
    with reading(path, "rows of an id and its classes"):
        text = path.read_text(encoding="utf-8-sig")
        separator = (re.search("[,;\t]", text) or ",")[0]
        lines = csv.reader(text.split("\n"), delimiter=separator, skipinitialspace=True)
        rows = [[cell.strip() for cell in row] for row in lines if any(map(str.strip, row))]
        header = rows.pop(0)[1:] if rows[0][0].lower() == "id" else []
        cells = {cell for row in rows for cell in row[1:]}
        if header and (cells <= TRUTH.keys() or len(header) > 1 and cells & TRUTH.keys()):
            if wrong := [f"{row[0]} has {cell!r}" for row in rows for cell in row[1:] if cell not in TRUTH]:
                raise ValueError(f"{wrong[0]} beside 0 and 1")
            found = header
            names = [[n for n, cell in zip(header, row[1:], strict=True) if TRUTH[cell]] for row in rows]
        else:
            between = ";" if any(";" in cell for cell in cells) else "$" if max(map(len, rows)) > 2 else r"\s"
            parts = {cell: [cell] if cell in classes else map(str.strip, re.split(between, cell)) for cell in cells}
            parts = {cell: [*filter(None, own)] for cell, own in parts.items()}
            names = [[name for cell in row[1:] for name in parts[cell]] for row in rows]
            found = sorted({name for own in names for name in own})
    if twice := repeated(row[0] for row in rows):
        raise DataError(f"{path}: {twice[0]} is there more than once")
    labels = {row[0]: own for row, own in zip(rows, names, strict=True)}
    for id, own in labels.items() if classes else ():
        if wrong := sorted({*own} - {*classes}):
            raise DataError(f"{path}: {id} has the class {wrong[0]!r}, expected {', '.join(classes)}")
    return tuple(classes or found), labels


def measure(reader, modality: Modality, *, samples: int = 256) -> dict:
    """The 8-bit mapping of a modality from the data, as `Modality.mapping` gives it and stores and weights carry it.

    `reader`: any with `.ids` and items that hold `modality.name`; `samples`, spread evenly over it, are looked at.
    8-bit images stay as they are (scheme bytes), else the 1st and 99th percentile of a band become 0 and 255
    (range_8bit). One printed line says what the values look like. Samples that a conversion will refuse (damaged,
    without data, outside of `valid_range`) are counted and left out; a DataError if none is left.
    """
    pixels, reasons = [], []
    for i in np.unique(np.linspace(0, len(reader.ids) - 1, samples).astype(int)):
        try:
            images = reader[int(i)][modality.name]
            replace(modality, scheme="bytes" if images.dtype == np.uint8 else "measured").check(images)
            bands = np.moveaxis(images, -3, 0).reshape(images.shape[-3], -1)
            pixels.append(bands[:, :: -(-bands.shape[1] // 10_000)])  # about 10,000 of a band are enough
        except DataError as error:
            reasons.append(f"{reader.ids[i]}: {error}")
    if not pixels:
        raise DataError(f"{modality.name}: none of {len(reasons)} samples can be measured, first: {reasons[0]}")
    values = np.concatenate(pixels, axis=1)
    limits = np.percentile(values, (1, 99), axis=1)
    limits = np.where(limits[0] < limits[1], limits, [values.min(axis=1), values.max(axis=1)])  # else nearly all is one
    short = [[float(f"{v:.6g}") for v in own] for own in limits]
    low, high = map(tuple, short if np.less(*short).all() else limits.tolist())
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
    kinds = {
        "shares of 1 (reflectance)": (0, 1.5),
        "an index from -1 to 1": (-1, 1),
        "decibels": (-100, 50 if middle < 0 else -100),
        "degrees (angles or temperatures), or metres of low land": (-180, 360),
        "metres of elevation": (-1000, 9000),
    }
    return next((kind for kind, (least, most) in kinds.items() if least <= low and high <= most), "another unit")

"""SSL4EO-S12 v1.1: Sentinel-1, Sentinel-2 and elevation of 246,144 places at four times (Blumenstiel et al. 2025).

264 x 264 pixels of 10 m in every band. Two published forms, told by the names of the files:
* Zarr archives of 64 places: `{train,val}/{S1GRD,S2L1C,S2L2A}/ssl4eos12_{train,val}_seasonal_data_<n>.zarr.zip` (3,812
  and 34), named by `splits/ssl4eos12_{train,val}.txt`; in them `bands` (place, time, band, y, x) and `sample`, the ids;
* tar shards: `{train,val}/{S1GRD,S2L1C,S2L2A,DEM,LULC}/ssl4eos12_shard_<n>.tar` (477 and 5), a Zarr archive
  `<key>.zarr.zip` per place, with `bands` (time, band, y, x).
Sentinel-1: VV, VH in dB, float16, in the first form in the order of the scenes' names, S1A before S1B, while its dates
`time_` are sorted; in the second by date. Sentinel-2: int16, reflectance x 10000, in the first form plus 1,000, as
processing baseline 04.00 has it, in the second without. Elevation: metres, one image per place. Land cover: see
`LAND_COVER`. Ids are not those of v1.

How to get it: huggingface.co/datasets/embed2scale, SSL4EO-S12-v1.1-Zarr (first form) or SSL4EO-S12-v1.1. CC-BY-4.0.
"""

import io
import re
import tarfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from decur_core.data.datasets import DataSet
from decur_core.data.modality import DEM, OPTICAL, SAR
from decur_core.data.raster import MISSING, DataError, Reader, one_of, reading, visible
from decur_core.data.tasks import Masks

B10 = OPTICAL.bands.index("B10")
OFFSET = 1000  # of processing baseline 04.00
_L1C = tuple(f"B{int(name[1:]):02d}" if name[1:].isdigit() else name for name in OPTICAL.bands)
# Folder -> key of items, names of the bands in the files, and mean and deviation over the data set as published, which
# for Sentinel-2 are those without the offset
FOLDERS = {
    "S1GRD": ("sar", ("vv", "vh"), (-12.577, -20.265), (5.179, 5.872)),
    "S2L1C": (
        "optical", _L1C,
        (1607.345, 1393.068, 1320.225, 1373.963, 1562.536, 2110.071, 2392.832, 2321.154, 2583.77, 838.712, 21.753,
         2205.112, 1545.798),
        (786.523, 849.702, 875.318, 1143.578, 1126.248, 1161.98, 1273.505, 1246.79, 1342.755, 576.795, 45.626,
         1340.347, 1145.036),
    ),
    "S2L2A": (
        "optical", _L1C[:B10] + _L1C[B10 + 1 :],
        (793.243, 924.863, 1184.553, 1340.936, 1671.402, 2240.082, 2468.412, 2563.244, 2627.704, 2711.071, 0.0,
         2416.714, 1849.625),
        (1160.144, 1201.092, 1219.943, 1397.225, 1400.035, 1373.136, 1429.17, 1485.025, 1447.836, 1652.703, 0.0,
         1471.002, 1365.307),
    ),
    "DEM": ("dem", ("DEM",), (435.726,), (560.326,)),
    "LULC": ("mask", ("LULC",)),
}  # fmt: skip
# Value of LULC -> class, those of the yearly maps by Impact Observatory and Esri, numbered without their gaps, as in
# TerraMesh (Blumenstiel et al. 2025, arXiv:2504.11172), which contains places of this data set
_NAMES = "no data, water, trees, flooded vegetation, crops, built area, bare ground, snow and ice, clouds, rangeland"
LAND_COVER = tuple(_NAMES.split(", "))
# Form -> names of its files, and how many were published
FORMS = {
    ".zarr.zip": ("ssl4eos12_{split}_seasonal_data_{number:06d}.zarr.zip", {"train": 3812, "val": 34}),
    ".tar": ("ssl4eos12_shard_{number:06d}.tar", {"train": 477, "val": 5}),
}


def darkest(images: np.ndarray) -> float:
    """1st percentile of the pixels with data (not 0) of the darkest band of (T, 12 or 13, H, W); infinite without any.

    The darkest of 13 bands is B10, which sees no ground.
    """
    bands = images[:, B10 : B10 + 1] if images.shape[1] == len(_L1C) else images
    pixels = (band[band > 0] for band in bands[..., ::4, ::4].swapaxes(0, 1))
    return min((float(np.percentile(values, 1)) for values in pixels if values.size), default=np.inf)


def find_offset(places: Iterable[np.ndarray]) -> int:
    """What was added to reflectance x 10000 in Sentinel-2 images (T, 12 or 13, H, W) of several places: 0 or 1000.

    No ground is darker than 0, so with the offset even the darkest band stays at about 1,000, and without it most
    places have water, shade or vegetation far below (B10: about 20). The lower quartile of the places tells; a
    DataError if it fits neither, as on snow or desert alone.
    """
    found = float(np.quantile([darkest(images) for images in places] or [np.inf], 0.25, method="lower"))
    if found < 800:
        return 0
    if 950 <= found < 1300:
        return OFFSET
    raise DataError(f"darkest pixels of Sentinel-2 at {found:.0f}: neither near 0 nor {OFFSET}; give offset=0 or 1000")


class SSL4EOS12v11(Reader):
    """SAR, optical images and elevation of one place, all four times of it per item, or the first with land cover.

    `root` holds train/ and val/; `split`: "train" or "val", also called "test"; `folders`: products, keys of FOLDERS,
    not both S2L1C and S2L2A; `missing` is about files (of the split list, or else as many as were published) and about
    places that not every product has; `offset`: what was added to Sentinel-2, None to tell it from the data with
    `find_offset`.

    Items: {"id": str, "sar": float32 (4, 2, H, W) in dB, "optical": float32 (4, 13, H, W) in reflectance x 10000
    without the offset, with 0 in place of less (noise over dark ground) and, for S2L2A, in B10, "dem": float32 (4, 1,
    H, W) in metres, four times the same, "dates": {"sar": [...], "optical": [...]} as YYYYMMDDThhmmss}, by date. With
    LULC among the folders the first image of each, (C, H, W), and "mask": uint8 (H, W), index into LAND_COVER.

    `.chunk`: so many consecutive places share a file; the last block of it is kept, as Zarr archives are compressed
    over all of their places. `.statistics`: as published, modality -> (mean, std).

    A DataError also for a place whose B10 shows another offset than the rest.
    """

    def __init__(self, root: Path | str, split=None, folders=("S1GRD", "S2L1C"), *, missing="error", offset=None):
        names = [FOLDERS[folder][0] for folder in folders if folder in FOLDERS]
        one_of(("train", "val", "test", None), split=split)
        one_of(MISSING, missing=missing)
        if not len(folders) == len(set(names)) > 0:
            raise ValueError(f"folders {folders}: some of {', '.join(FOLDERS)} are needed, one of S2L1C and S2L2A")
        self.root, self.folders, self.left_out, self._keys = Path(root), tuple(folders), {}, names
        self.statistics = {n: FOLDERS[f][2:] for n, f in zip(names, folders, strict=True) if n != "mask"}
        parts = [{"test": "val"}.get(split, split)] if split else ["train", "val"]
        wanted = [[self.root / part / folder / n for folder in folders] for part in parts for n in self._wanted(part)]
        absent = {k: f"no {path}" for k, paths in enumerate(wanted) for path in paths[::-1] if not path.is_file()}
        self._files = [paths for k, paths in enumerate(wanted) if k not in absent]  # by number those of every folder
        self._skip("files", absent, missing, self._files)
        found = [_index([paths[k] for paths in self._files]) for k in range(len(folders))]
        lacking = {
            key: f"{key} is not in {self._files[number][k]}, but in its partners"
            for own in found for key, (number, *_) in own.items() for k in range(len(found)) if key not in found[k]
        }  # fmt: skip
        self.ids = [key for key in found[0] if key not in lacking]
        self._skip("places", lacking, missing, self.ids)
        self._places = np.array([[own[key] for own in found] for key in self.ids], np.int64)
        self.chunk = 1 if self._places[0, 0, 2] else int((self._places[:, 0, 0] == self._places[0, 0, 0]).sum())
        self.offset = self._offset() if offset is None and "optical" in names else offset

    def __getitem__(self, i: int) -> dict:
        item, dates, kept = {}, {}, slice(1 if "mask" in self._keys else None)
        for k, name in enumerate(self._keys):
            images, times = (own[kept] for own in self._read(i, k))
            item[name] = self._reflectance(i, images) if name == "optical" else images.astype(np.float32)
            dates |= {name: times} if times else {}
        if len(item.get("dem", ())) == 1:
            item["dem"] = np.repeat(item["dem"], max(map(len, item.values())), axis=0)
        if len({(len(images), images.shape[2:]) for images in item.values()}) > 1:
            shapes = ", ".join(f"{name} {images.shape}" for name, images in item.items())
            raise DataError(f"{self._files[self._places[i, 0, 0]][0]}: {self.ids[i]} has {shapes}; not of one place")
        if "mask" in item:
            cover, k = item["mask"][0, 0], self._keys.index("mask")
            if len(wrong := cover[~np.isin(cover, range(len(LAND_COVER)))]):
                path = self._files[self._places[i, k, 0]][k]
                raise DataError(f"{path}: land cover {wrong[0]:g} in {self.ids[i]}; expected 0 to 9, see LAND_COVER")
            item = {name: images[0] for name, images in item.items()} | {"mask": cover.astype(np.uint8)}
        return {"id": self.ids[i], **item, "dates": dates}

    def _wanted(self, part: str) -> list[str]:
        """Names of the files of a split."""
        folder, list_of_names = self.root / part / self.folders[0], self.root / "splits" / f"ssl4eos12_{part}.txt"
        forms = [form for form in FORMS if visible(folder, f"*{form}")]
        if len(forms) > 1:
            raise DataError(f"{folder}: both forms of the data set, {' and '.join(forms)}; keep one of them")
        if forms == [".zarr.zip"] and list_of_names.is_file():
            return list_of_names.read_text().split()
        name, counts = FORMS[forms[0] if forms else ".tar"]
        return [name.format(split=part, number=number) for number in range(1, counts[part] + 1)]

    def _skip(self, kind: str, lacking: dict, missing: str, left: list) -> None:
        self.left_out[kind] = len(lacking)
        if lacking and missing == "error" or not left:
            first = next(iter(lacking.values()), f"no {kind} in any")
            state = f"{len(lacking)} {kind} are not there in all of {', '.join(self.folders)}: {first}"
            raise DataError(f"{self.root}: {state}; complete them, or use the others with missing='skip'")

    def _offset(self) -> int:
        """Told from the first images of places all over the data set."""
        k, probes = self._keys.index("optical"), []
        for i in np.unique(np.linspace(0, len(self.ids) - 1, 16).astype(int)):
            with suppress(DataError):  # a damaged place is refused when it is asked for
                probes.append(self._read(i, k, 1)[0])
        return find_offset(probes)

    def _read(self, i: int, k: int, times: int | None = None) -> tuple[np.ndarray, list[str]]:
        """Images of a place (the first ones) as stored, (T, C, H, W), by date, and, if of satellites, their dates."""
        number, place, size = map(int, self._places[i, k])
        path, (_, names, *_) = self._files[number][k], FOLDERS[self.folders[k]]
        with reading(path, f"{self.folders[k]} of {self.ids[i]} as Zarr, (times, {len(names)}, H, W)"):
            group = _open(path, place, size)
            step = group["bands"].chunks[0]
            images = group["bands"][:times] if size else _block(path, place // step * step, step, times)[place % step]
            if images.ndim != 4 or images.shape[1] != len(names) or images.dtype.kind not in "fui":
                raise ValueError(f"{images.dtype} of shape {images.shape}")
            if len(names) > 1 and "band" in group and (found := tuple(map(str, group["band"][:]))) != names:
                raise ValueError(f"bands {found}")
            dates = [] if len(names) == 1 else _dates(group, None if size else place)[:times]
            if dates and all(date.startswith("2") for date in dates):  # a few are damaged, and tell no order
                images, dates = images[np.argsort(dates, kind="stable")], sorted(dates)
            return images, dates

    def _reflectance(self, i: int, images: np.ndarray) -> np.ndarray:
        """Stored values of Sentinel-2 -> float32 (T, 13, H, W) without the offset."""
        values = np.maximum(images.astype(np.float32) - self.offset, 0)
        if images.shape[1] < len(_L1C):
            return np.insert(values, B10, 0, axis=1)
        if (low := darkest(images)) < np.inf and (low < 800) != (self.offset == 0):
            found = f"begins at {low:.0f}, which does not fit the offset of {self.offset} elsewhere"
            raise DataError(f"{self.root}: B10 of {self.ids[i]} {found}; use files of one form")
        return values


def _open(path: Path, offset: int = 0, size: int = 0):
    """The group in a Zarr archive, which is the file or, of so many bytes, a part of it."""
    import zarr  # takes half a second
    from zarr.buffer import cpu
    from zarr.storage import MemoryStore, ZipStore

    if not size:
        return zarr.open_group(ZipStore(path, mode="r"), mode="r", zarr_format=2)
    with open(path, "rb") as file:
        file.seek(offset)
        archive = zipfile.ZipFile(io.BytesIO(file.read(size)))
    parts = {name: cpu.Buffer.from_bytes(archive.read(name)) for name in archive.namelist()}
    return zarr.open_group(MemoryStore(parts), mode="r", zarr_format=2)


@lru_cache(3)  # one for each product
def _block(path: Path, start: int, step: int, times: int | None) -> np.ndarray:
    """Images of the places that are compressed together."""
    return _open(path)["bands"][start : start + step, :times]


def _index(paths: list[Path]) -> dict[str, tuple[int, int, int]]:
    """Key of each place -> number of its file, its row and 0, or offset and size of its archive in bytes."""
    found = {}
    with ThreadPoolExecutor(16) as pool:
        for number, places in enumerate(pool.map(_places, paths)):
            for key, *place in places:
                if key in found:
                    raise DataError(f"{paths[number]}: {key} is there a second time; download the files again")
                found[key] = (number, *place)
    return found


def _places(path: Path) -> list[tuple[str, int, int]]:
    with reading(path, "a Zarr archive with the ids of its places, or a tar file of such archives"):
        if path.suffix == ".zip":
            return [(str(key), row, 0) for row, key in enumerate(_open(path)["sample"][:])]
        with tarfile.open(path, "r:") as file:
            places = [(m.name.removesuffix(".zarr.zip"), m.offset_data, m.size) for m in file if ".zarr." in m.name]
        return [place for place in places if not Path(place[0]).name.startswith(".")]


def _dates(group, row: int | None) -> list[str]:
    """When the images of a place were taken, YYYYMMDDThhmmss; `row`: of the place, None in an archive of its own."""
    if row is not None:  # names of scenes, which begin with or contain the start
        return [re.search(r"\d{8}T\d{6}", str(name))[0] for name in group["file_id"][row]]
    taken = group["time"][:].astype("datetime64[ns]").astype("datetime64[s]")
    return [re.sub("[-:]", "", str(time)) for time in taken]


DATASETS = tuple(
    DataSet(
        name=name,
        title=f"SSL4EO-S12 v1.1{title}",
        pair=pair,
        modalities=tuple(m for m in (SAR, OPTICAL, DEM) if m.name in [FOLDERS[folder][0] for folder in folders]),
        read=partial(SSL4EOS12v11, folders=folders),
        splits=("train", "test" if task else "val"),
        pretrain="" if task else "train",
        task=task,
        world="" if task else f"decur_core.worlds.ssl4eo_v11:{name.upper()}",
        cite="blumenstiel2025ssl4eo",
    )
    for name, title, pair, folders, task in (
        ("ssl4eo_v11", "", "sar_optical_v11", ("S1GRD", "S2L1C"), None),
        ("ssl4eo_v11_dem", " with elevation", "sar_optical_dem", ("S1GRD", "S2L1C", "DEM"), None),
        ("ssl4eo_v11_lulc", " with land cover", "sar_optical_v11", ("S1GRD", "S2L1C", "LULC"), Masks(LAND_COVER[1:])),
    )
)

"""SSL4EO-S12: co-located Sentinel-1 and Sentinel-2 images of 251,079 places in four seasons (Wang et al. 2022).

Tree, one band per file: `s1/<id>/<S1 scene>/{VV,VH}.tif` (float32, dB) and `s2c/<id>/<S2 scene>/B*.tif` (uint16,
reflectance x 10000, level 1C); 264 x 264 pixels at 10 m, 132 at 20 m, 44 at 60 m. Ids have 7 digits, 97 of them do not
exist. Pixels outside a scene are 0 in the files, in the SAR bands as well (0 dB); nothing marks them, so they stay 0.
Every file has corners of its own: the data set was written with those of coarse bands half a pixel off.
"""

import re
import warnings
from pathlib import Path

import numpy as np
import rasterio

from decur_core.data.bigearthnet import BigEarthNetMM
from decur_core.data.datasets import DataSet
from decur_core.data.modality import OPTICAL, SAR, Modality
from decur_core.data.raster import DataError, Reader, read, read_place, visible

# Scene names: S1A_IW_GRDH_1SDV_20200329T001515_... and 20200323T162931_20200323T163750_T15QXA
_SCENE_DATES = {"s1": re.compile(r"^.{16}_(\d{8}T\d{6})_"), "s2c": re.compile(r"^(\d{8}T\d{6})_")}
SEASONS = 4  # of every location
# Mean and standard deviation of the 13 bands over the data set, as its authors publish them with their converter (L1C).
_OPTICAL_MEAN = (1605.57504906, 1390.78157673, 1314.8729939, 1363.52445545, 1549.44374991, 2091.74883118, 2371.7172463,
                 2299.90463006, 2560.29504086, 830.06605044, 22.10351321, 2177.07172323, 1524.06546312)  # fmt: skip
_OPTICAL_STD = (786.78685367, 850.34818441, 875.06484736, 1138.84957046, 1122.17775652, 1161.59187054, 1274.39184232,
                1248.42891965, 1345.52684884, 577.31607053, 51.15431158, 1336.09932639, 1136.53823676)  # fmt: skip


class SSL4EOS12(Reader):
    """SAR-optical pairs of one tree, all seasons of a location per item.

    `root` holds `s1` and `s2c`; every location that is in both is used, sorted.

    Items: {"id": str, "sar": float32 (seasons, 2, H, W) in dB, "optical": float32 (seasons, 13, H, W) in reflectance x
    10000, "dates": {"sar": [...], "optical": [...]} as YYYYMMDDThhmmss}. Seasons are in order of acquisition, and the
    k-th SAR image is paired with the k-th optical one: of all one-to-one pairings the one with the smallest sum of time
    differences. (Names do not sort by date: S1A comes before S1B.)

    `.statistics`: the published mean and standard deviation, modality -> (mean per band, std per band).
    """

    statistics = {"sar": (SAR.mean, SAR.std), "optical": (_OPTICAL_MEAN, _OPTICAL_STD)}

    def __init__(self, root: Path | str):
        self.root, found = Path(root), {}
        for folder in (self.root / "s1", self.root / "s2c"):
            if not folder.is_dir():
                raise DataError(f"{folder}: missing; the root of SSL4EO-S12 holds the folders s1 and s2c")
            found[folder.name] = {entry.name for entry in visible(folder, "*/")}
        if single := sorted(found["s1"] ^ found["s2c"]):
            warnings.warn(f"{self.root}: {len(single)} ids are left out, only s1 or s2c has {single[0]}", stacklevel=2)
        self.ids = sorted(found["s1"] & found["s2c"])
        if not self.ids:
            raise DataError(f"{self.root}: no location is present in both s1 and s2c")

    def __getitem__(self, i: int) -> dict:
        sar_dates, sar_scenes = self._scenes("s1", self.ids[i])
        optical_dates, optical_scenes = self._scenes("s2c", self.ids[i])
        whole = None  # float32 (seasons, 15, H, W); all seasons are of the first one's size
        for k, (optical_scene, sar_scene) in enumerate(zip(optical_scenes, sar_scenes, strict=True)):
            paths = [f"{optical_scene}/{band}.tif" for band in OPTICAL.bands]
            out = None if whole is None else whole[k]
            bands = read_place(paths, [f"{sar_scene}/{band}.tif" for band in SAR.bands], out=out)
            if whole is None:
                whole = np.empty((SEASONS, *bands.shape), np.float32)
                whole[0] = bands
        optical, sar = whole[:, : len(OPTICAL.bands)], whole[:, len(OPTICAL.bands) :]
        dates = {"sar": sar_dates, "optical": optical_dates}
        return {"id": self.ids[i], "sar": sar, "optical": optical, "dates": dates}

    def _scenes(self, folder: str, location: str) -> tuple[list[str], list[str]]:
        """Dates and directories of a location's scenes, in order of the date."""
        place, scenes = self.root / folder / location, []
        if not place.is_dir():
            raise DataError(f"{place}: missing; the location must be in both s1 and s2c")
        for scene in visible(place, "*/"):
            if not (match := _SCENE_DATES[folder].match(scene.name)):
                raise DataError(f"{scene}: no date in the name; expected {_SCENE_DATES[folder].pattern}")
            scenes.append((match[1], str(scene)))
        if len(scenes) != SEASONS:
            raise DataError(f"{place}: {len(scenes)} season directories, expected {SEASONS}")
        dates, paths = zip(*sorted(scenes), strict=True)
        return list(dates), list(paths)


class RealPairs(Reader):
    """Tiles of co-located real SAR and optical images, as items of the form that `SSL4EOS12` gives, with one season.

    `root` holds the folders in FOLDERS. Tiles of 120 pixels do not overlap, and row-major order numbers them.

    Items: {"id": such as "sen1floods11/Spain_7370579/r0c1", "sar": float32 (1, 2, 120, 120) in dB, "optical": float32
    (1, 13, 120, 120) in reflectance x 10000, "dates": {}}. Sen1Floods11 and SEN12MS-CR are level 1C; BigEarthNet is
    level 2A with a zero row for B10. Tiles with pixels without data are left out.

    A DataError names a folder or file that is missing or not of this form, and a folder without a tile.
    """

    def __init__(self, root: Path | str):
        self._items = {}
        for source, (name, scenes) in FOLDERS.items():
            if not (folder := Path(root) / name).is_dir():
                raise DataError(f"{folder}: missing; put the sample data there")
            before = len(self._items)
            for scene, sar, optical in scenes(folder):
                self._items |= _cut(f"{source}/{scene}", sar, optical)
            if len(self._items) == before:
                raise DataError(f"{folder}: no tile of {TILE} x {TILE} pixels fits; put the sample data there")
        self.ids = list(self._items)

    def __getitem__(self, i: int) -> dict:
        return {"id": self.ids[i], **self._items[self.ids[i]], "dates": {}}


def _cut(name: str, sar: np.ndarray, optical: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Tiles of a scene, (2, H, W) and (13, H, W), that hold data everywhere."""
    if (shape := sar.shape[1:]) != optical.shape[1:]:
        raise DataError(f"{name}: SAR of {shape} pixels and optical of {optical.shape[1:]} are not on one grid")
    empty, tiles = ~np.isfinite(sar).all(axis=0) | ~optical.any(axis=0), {}
    for r, c in np.ndindex(shape[0] // TILE, shape[1] // TILE):
        window = np.s_[..., r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE]
        if not empty[window].any():
            SAR.check(sar[window])
            OPTICAL.check(optical[window])
            tiles[f"{name}/r{r}c{c}"] = {"sar": sar[window][None], "optical": optical[window][None]}
    return tiles


def _read_bands(path: Path, setting: Modality, kind: str) -> np.ndarray:
    """All bands of a modality from one file, float32; band names in the file, if any, must be those of the modality."""
    image = read(path, count=len(setting.bands), kind=kind).astype(np.float32)
    with rasterio.open(path) as source:
        if any(source.descriptions) and source.descriptions != setting.bands:
            raise DataError(f"{path}: bands are {source.descriptions}, expected {setting.bands}")
    return image


def _sen1floods11(folder: Path):
    for path in sorted(visible(folder, "S1/*_S1Hand.tif")):
        name = path.name.removesuffix("_S1Hand.tif")
        yield name, _read_bands(path, SAR, "f"), _read_bands(folder / "S2" / f"{name}_S2Hand.tif", OPTICAL, "ui")


def _sen12mscr(folder: Path):
    for path in sorted(visible(folder, "*_s1_*.tif")):
        partner = folder / path.name.replace("_s1_", "_s2_cloudy_")
        yield path.stem.replace("_s1_", "_"), _read_bands(path, SAR, "f"), _read_bands(partner, OPTICAL, "ui")


def _bigearthnet(folder: Path):
    patches = BigEarthNetMM(folder)
    for i, patch in enumerate(patches.ids):
        yield patch, patches[i]["sar"], patches[i]["optical"]


# Real Sentinel-1/2 pairs in small, for trying the whole path: tiles of one Sen1Floods11 chip, one SEN12MS-CR patch and
# four BigEarthNet patches.
FOLDERS = {
    "sen1floods11": ("sen1floods11_sample", _sen1floods11),
    "sen12mscr": ("sen12mscr_pair", _sen12mscr),
    "bigearthnet": ("bigearthnet_real", _bigearthnet),
}
TILE = 120  # pixels


SSL4EO = DataSet(
    name="ssl4eo",
    title="SSL4EO-S12",
    pair="sar_optical",
    modalities=(SAR, OPTICAL),
    read=lambda root, split=None, **_: SSL4EOS12(root),
    splits=("all",),
    pretrain="all",
    samples=lambda folder, split: RealPairs(folder),
    world="decur_core.worlds.files:SSL4EO",
    cite="wang2023ssl4eo",
)
DATASETS = (SSL4EO,)

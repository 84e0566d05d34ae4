"""Real Sentinel-1/2 pairs in small, for trying the whole path: tiles of one Sen1Floods11 chip, one SEN12MS-CR patch and
four BigEarthNet patches, from a folder that holds them under `sen1floods11_sample`, `sen12mscr_pair` and
`bigearthnet_real`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio

from decur_core.data.bigearthnet import BigEarthNetMM
from decur_core.data.modality import OPTICAL, SAR, Modality
from decur_core.data.raster import DataError, Reader, read, visible

FOLDERS = {"sen1floods11": "sen1floods11_sample", "sen12mscr": "sen12mscr_pair", "bigearthnet": "bigearthnet_real"}


class RealPairs(Reader):
    """Tiles of co-located real SAR and optical images, as items of the form that `SSL4EOS12` gives, with one season.

    `root` holds the folders in FOLDERS, of which `sources` are used; `tile`: height and width in pixels of 10 m. Tiles
    do not overlap, and row-major order numbers them.

    Items: {"id": such as "sen1floods11/Spain_7370579/r0c1", "sar": float32 (1, 2, tile, tile) in dB, "optical": float32
    (1, 13, tile, tile) in reflectance x 10000, "dates": {}}. Sen1Floods11 and SEN12MS-CR are level 1C; BigEarthNet is
    level 2A with a zero row for B10. Tiles with pixels without data are left out.

    A DataError names a folder or file that is missing or not of this form, and a source smaller than the tile.
    """

    def __init__(self, root: Path | str, tile: int = 120, *, sources: Sequence[str] = tuple(FOLDERS)):
        if tile < 1:
            raise ValueError(f"tile = {tile}: at least one pixel is needed")
        self.tile, self._items = tile, {}
        for source in sources:
            if source not in FOLDERS:
                raise ValueError(f"sources has {source!r}; allowed are {', '.join(FOLDERS)}")
            if not (folder := Path(root) / FOLDERS[source]).is_dir():
                raise DataError(f"{folder}: missing; leave {source} out of sources or put the sample data there")
            before = len(self._items)
            for name, sar, optical in _SCENES[source](folder):
                self._items |= self._cut(f"{source}/{name}", sar, optical)
            if len(self._items) == before:
                raise DataError(f"{folder}: no tile of {tile} x {tile} pixels fits; leave {source} out of sources")
        self.ids = list(self._items)

    def __getitem__(self, i: int) -> dict:
        return {"id": self.ids[i], **self._items[self.ids[i]], "dates": {}}

    def _cut(self, name: str, sar: np.ndarray, optical: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """Tiles of a scene, (2, H, W) and (13, H, W), that hold data everywhere."""
        if (shape := sar.shape[1:]) != optical.shape[1:]:
            raise DataError(f"{name}: SAR of {shape} pixels and optical of {optical.shape[1:]} are not on one grid")
        empty = ~np.isfinite(sar).all(axis=0) | ~optical.any(axis=0)
        tiles, size = {}, self.tile
        for r, c in np.ndindex(shape[0] // size, shape[1] // size):
            window = np.s_[..., r * size : (r + 1) * size, c * size : (c + 1) * size]
            if not empty[window].any():
                SAR.check(sar[window])
                OPTICAL.check(optical[window])
                tiles[f"{name}/r{r}c{c}"] = {"sar": sar[window][None], "optical": optical[window][None]}
        return tiles


def _read(path: Path, setting: Modality, kind: str) -> np.ndarray:
    """All bands of a modality from one file, float32; band names in the file, if any, must be those of the modality."""
    image = read(path, count=len(setting.bands), kind=kind).astype(np.float32)
    with rasterio.open(path) as source:
        if any(source.descriptions) and source.descriptions != setting.bands:
            raise DataError(f"{path}: bands are {source.descriptions}, expected {setting.bands}")
    return image


def _sen1floods11(folder: Path):
    for path in sorted(visible(folder, "S1/*_S1Hand.tif")):
        name = path.name.removesuffix("_S1Hand.tif")
        yield name, _read(path, SAR, "f"), _read(folder / "S2" / f"{name}_S2Hand.tif", OPTICAL, "ui")


def _sen12mscr(folder: Path):
    for path in sorted(visible(folder, "*_s1_*.tif")):
        partner = folder / path.name.replace("_s1_", "_s2_cloudy_")
        yield path.stem.replace("_s1_", "_"), _read(path, SAR, "f"), _read(partner, OPTICAL, "ui")


def _bigearthnet(folder: Path):
    patches = BigEarthNetMM(folder)
    for i, patch in enumerate(patches.ids):
        yield patch, patches[i]["sar"], patches[i]["optical"]


_SCENES = {"sen1floods11": _sen1floods11, "sen12mscr": _sen12mscr, "bigearthnet": _bigearthnet}

"""SSL4EO-S12: co-located Sentinel-1 and Sentinel-2 images of 251,079 places in four seasons (Wang et al. 2022).

Tree, one band per file: `s1/<id>/<S1 scene>/{VV,VH}.tif` (float32, dB) and `s2c/<id>/<S2 scene>/B*.tif` (uint16,
reflectance x 10000, level 1C); 264 x 264 pixels at 10 m, 132 at 20 m, 44 at 60 m. Ids have 7 digits, 97 of them do not
exist. Pixels outside a scene are 0 in the files, in the SAR bands as well (0 dB); nothing marks them, so they stay 0.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decur_core.data.raster import OPTICAL_STEPS, DataError, read_bands
from decur_core.preprocess import OPTICAL, SAR

# Scene names: S1A_IW_GRDH_1SDV_20200329T001515_... and 20200323T162931_20200323T163750_T15QXA
_SCENE_DATES = {"s1": re.compile(r"^.{16}_(\d{8}T\d{6})_"), "s2c": re.compile(r"^(\d{8}T\d{6})_")}


def read_ids(path: Path | str) -> list[str]:
    """Ids of a list with one number per line (`void_ids.csv`, `50k_ids_random.csv`), with the 7 digits of the tree."""
    lines = Path(path).read_text().split()
    if wrong := [line for line in lines if not line.isdigit()]:
        raise DataError(f"{path}: expected one location number per line, found {wrong[0]!r}")
    return [line.zfill(7) for line in lines]


class SSL4EOS12:
    """SAR-optical pairs of one tree, all seasons of a location per item.

    `root` holds `s1` and `s2c`; `ids`: locations to use, in this order, None for every directory present in both,
    sorted; `seasons`: how many each location must have.

    Items: {"id": str, "sar": float32 (seasons, 2, H, W) in dB, "optical": float32 (seasons, 13, H, W) in reflectance x
    10000, "dates": {"sar": [...], "optical": [...]} as YYYYMMDDThhmmss}. Seasons are in order of acquisition, and the
    k-th SAR image is paired with the k-th optical one: of all one-to-one pairings the one with the smallest sum of time
    differences. (Names do not sort by date: S1A comes before S1B.)

    A DataError names the file or folder that is missing, damaged or of another form.
    """

    def __init__(self, root: Path | str, *, ids: Sequence[str] | None = None, seasons: int = 4):
        self.root, self.seasons, found = Path(root), seasons, {}
        for folder in (self.root / "s1", self.root / "s2c"):
            if not folder.is_dir():
                raise DataError(f"{folder}: missing; the root of SSL4EO-S12 holds the folders s1 and s2c")
            found[folder.name] = {entry.name for entry in folder.iterdir() if entry.is_dir()}
        both = found["s1"] & found["s2c"]
        if absent := [i for i in ids or () if i not in both]:
            state = ", ".join(f"{'in' if absent[0] in names else 'not in'} {name}" for name, names in found.items())
            raise DataError(f"{self.root}: {len(absent)} of {len(ids)} ids are missing, first {absent[0]} ({state})")
        if ids is None and (single := sorted(found["s1"] ^ found["s2c"])):
            warnings.warn(f"{self.root}: {len(single)} ids are left out, only s1 or s2c has {single[0]}", stacklevel=2)
        self.ids = sorted(both) if ids is None else list(ids)
        if not self.ids:
            raise DataError(f"{self.root}: no location is present in both s1 and s2c")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        sar_dates, sar_scenes = self._scenes("s1", self.ids[i])
        optical_dates, optical_scenes = self._scenes("s2c", self.ids[i])
        optical, size = [], None
        for scene in optical_scenes:
            paths = [f"{scene}/{band}.tif" for band in OPTICAL.bands]
            optical.append(read_bands(paths, steps=OPTICAL_STEPS, kind="ui", size=size))
            size = optical[0].shape[1:]
        paths = [f"{scene}/{band}.tif" for scene in sar_scenes for band in SAR.bands]
        sar = read_bands(paths, steps=[1] * len(paths), kind="f", size=size)
        return {
            "id": self.ids[i],
            "sar": sar.reshape(self.seasons, len(SAR.bands), *size),
            "optical": np.stack(optical),
            "dates": {"sar": sar_dates, "optical": optical_dates},
        }

    def _scenes(self, folder: str, location: str) -> tuple[list[str], list[str]]:
        """Dates and directories of a location's scenes, in order of the date."""
        place, scenes = self.root / folder / location, []
        if not place.is_dir():
            raise DataError(f"{place}: missing; the location must be in both s1 and s2c")
        for scene in filter(Path.is_dir, place.iterdir()):
            if not (match := _SCENE_DATES[folder].match(scene.name)):
                raise DataError(f"{scene}: no date in the name; expected {_SCENE_DATES[folder].pattern}")
            scenes.append((match[1], str(scene)))
        if len(scenes) != self.seasons:
            raise DataError(f"{place}: {len(scenes)} season directories, expected {self.seasons}")
        dates, paths = zip(*sorted(scenes), strict=True)
        return list(dates), list(paths)

"""GeoNRW: aerial photographs, elevation and land cover of North Rhine-Westphalia at 1 m (Baier et al. 2020).

7,783 tiles of 1 km x 1 km in 43 cities and districts, 1000 x 1000 pixels. Tree:
`<city>/<E>_<N>_rgb.jp2` (3 x uint8), `<city>/<E>_<N>_dem.tif` (float32, metres above sea level: mean of the first lidar
returns, so with roofs and tree tops) and `<city>/<E>_<N>_seg.tif` (uint8, see `CLASSES`); E and N are the kilometres of
the lower left corner in UTM zone 32N, in older files with the zone in front. Some tiles have a `_sar.tif`, which is not
read. Splits are by city: 40 for training, 3 for testing. Licence: dl-de/by-2-0.
"""

import re
from pathlib import Path

import numpy as np

from decur_core.data.datasets import DataSet
from decur_core.data.modality import DEM, RGB
from decur_core.data.raster import MISSING, DataError, Reader, one_of, read, visible
from decur_core.data.tasks import Masks

SPLITS = {
    "train": (
        "aachen", "bergisch", "bielefeld", "bochum", "bonn", "borken", "bottrop", "coesfeld", "dortmund",
        "dueren", "duisburg", "ennepetal", "erftstadt", "essen", "euskirchen", "gelsenkirchen", "guetersloh",
        "hagen", "hamm", "heinsberg", "herford", "hoexter", "kleve", "koeln", "krefeld", "leverkusen",
        "lippetal", "lippstadt", "lotte", "moenchengladbach", "moers", "muelheim", "muenster", "oberhausen",
        "paderborn", "recklinghausen", "remscheid", "siegen", "solingen", "wuppertal",
    ),
    "test": ("duesseldorf", "herne", "neuss"),
}  # fmt: skip
# Value of a mask: name, and colour by which the authors show it
_LEGEND = """\
unlabelled #000000; forest #2ca02c; water #1f77b4; agricultural #8c564b; residential, commercial, industrial #7f7f7f; \
grassland, swamp, shrubbery #bcbd22; railway, train station #ff7f0e; highway, squares #9467bd; \
airport, shipyard #17becf; roads #d62728; buildings #e377c2"""
CLASSES, COLOURS = zip(*(entry.rsplit(" ", 1) for entry in _LEGEND.split("; ")), strict=True)

# Suffix -> what `raster.read` shall expect
_FILES = {
    "seg.tif": {"count": 1, "kind": "ui"},
    "dem.tif": {"count": 1, "kind": "fui"},  # whole metres would do, and missing pixels become NaN
    "rgb.jp2": {"count": 3, "kind": "ui", "driver": "JP2OpenJPEG"},
}
_NAME = re.compile(rf"(\d+_\d+)_(?:.*_)?({'|'.join(map(re.escape, _FILES))})")


class GeoNRW(Reader):
    """RGB-DEM patches with land-cover masks.

    `root` holds a folder per city; `split`: "train" or "test"; `parts`: every tile is cut into parts x parts patches
    (4: 250 x 250 pixels), numbered row by row; `missing` is about cities.

    Items: {"id": "<city>/<E>_<N>_<number from 1>", "rgb": uint8 (3, H, W), "dem": float32 (1, H, W) in metres, "mask":
    uint8 (H, W), index into CLASSES, 0 = unlabelled}. `.chunk`: that many consecutive patches share a tile; the last
    tile is kept, so that it is decoded once. A flat DEM is a patch like any other (a lake).

    A DataError also for a label above 10, a pixel without elevation (not finite, or marked in the file), a photograph
    that is black all over.
    """

    def __init__(self, root: Path | str, split: str | None = None, *, parts: int = 4, missing: str = "error"):
        one_of(MISSING, missing=missing)
        one_of([*SPLITS, None], split=split)
        if parts < 1:
            raise ValueError(f"parts is {parts}; allowed are 1 and more")
        self.root, self.parts, self.chunk, self._files, self._last = Path(root), parts, parts**2, {}, ("", {})
        if not self.root.is_dir():
            raise DataError(f"{self.root}: missing; the root of GeoNRW holds a folder per city")
        cities = sorted(folder.name for folder in visible(self.root, "*/")) if split is None else SPLITS[split]
        absent = [city for city in cities if not self._find(city)]
        if split and absent and missing == "error":
            state = f"no tile of {len(absent)} of {len(cities)} cities of the split {split}: {', '.join(absent)}"
            raise DataError(f"{self.root}: {state}; complete them, or use what is there with missing='skip'")
        if not self._files:
            raise DataError(f"{self.root}: no files <city>/<E>_<N>_rgb.jp2 for split {split}")
        self.ids = [f"{tile}_{k}" for tile in self._files for k in range(1, self.chunk + 1)]

    def __getitem__(self, i: int) -> dict:
        tile, k = self.ids[i].rsplit("_", 1)
        if (last := self._last)[0] != tile:
            last = self._last = tile, self._read(tile)
        height, width = (side // self.parts for side in last[1]["mask"].shape)
        row, column = divmod(int(k) - 1, self.parts)
        window = np.s_[..., row * height : (row + 1) * height, column * width : (column + 1) * width]
        item = {"id": self.ids[i], **{key: image[window].copy() for key, image in last[1].items()}}
        if bad := (~np.isfinite(item["dem"])).sum():
            raise DataError(f"{self.root / tile}_dem.tif: {bad} of {height * width} pixels of patch {k} have no data")
        if not item["rgb"].any():
            raise DataError(f"{self.root / tile}_rgb.jp2: patch {k} is black all over, outside of the photograph")
        return item

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_last": ("", {})}

    def _find(self, city: str) -> bool:
        """Note the files of the tiles of a city; whether there are any."""
        found = {}
        for path in sorted(visible(self.root / city, "*")):
            if match := _NAME.fullmatch(path.name):
                found.setdefault(f"{city}/{match[1]}", {}).setdefault(match[2], []).append(path.name)
        self._files |= found
        return bool(found)

    def _read(self, tile: str) -> dict[str, np.ndarray]:
        """Images of a whole tile under the keys of items."""
        images = []
        for suffix, form in _FILES.items():  # the slowest last
            names = self._files[tile].get(suffix, [])
            if len(names) != 1:
                raise DataError(f"{self.root / tile}_{suffix}: {len(names)} files fit this tile, expected 1")
            images.append(read((self.root / tile).with_name(names[0]), **form))
            if (size := images[-1].shape[1:]) != images[0].shape[1:] or size[0] % self.parts or size[1] % self.parts:
                wanted = f"that of its partners, divisible by parts = {self.parts}"
                raise DataError(f"{self.root / tile}_{suffix}: {size[0]} x {size[1]} pixels; expected {wanted}")
        mask, dem, rgb = images
        if mask.min() < 0 or mask.max() >= len(CLASSES):
            raise DataError(f"{self.root / tile}_seg.tif: labels {mask.min()} to {mask.max()}, expected 0 to 10")
        if rgb.dtype != np.uint8:
            raise DataError(f"{self.root / tile}_rgb.jp2: expected 8-bit colours, found {rgb.dtype}")
        return {"rgb": rgb, "dem": dem, "mask": mask[0].astype(np.uint8)}


GEONRW = DataSet(
    name="geonrw",
    title="GeoNRW",
    pair="rgb_dem",
    modalities=(RGB, DEM),
    read=GeoNRW,
    pretrain="train",
    task=Masks(CLASSES[1:]),
    world="decur_core.worlds.terrain:GEONRW",
    cite="baier2020geonrw",
)
DATASETS = (GEONRW,)

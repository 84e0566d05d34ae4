"""A miniature world of three sensors, radar, optical and elevation: factors for all, for each pair and for one alone.

A location shows lakes, houses, woods and fields, as in `sar_optical`, over hilly ground. What a sensor does not see is
drawn as if it were not there: the radar takes woods for the fields under them, the elevation model lakes for dry
ground, the optical sensor knows no hills (nothing is shaded). As in `terrain`, the 8-bit mapping keeps ratios of
heights: what houses and hills measure against the canopy of the woods. Nuisance as in `sar_optical`, drawn for every
season, and heights of crowns.
"""

from math import inf
from pathlib import Path

import numpy as np

from decur_core.data.datasets import DataSet
from decur_core.data.modality import DEM, OPTICAL, SAR
from decur_core.data.raster import DataError, Reader
from decur_core.data.tasks import Scene
from decur_core.worlds import Miniature
from decur_core.worlds import sar_optical as flat

# name: who sees it. What each one does is written where it is used, in `draw_ground` and `ThreeWorld`.
FACTORS = {
    "built_up": "common",  # share of the tile under buildings, 8 to 35 %
    "water": "sar+optical",  # share of the tile under water, 2 to 40 %
    "relief": "sar+dem",  # height of the hills, and how strongly the radar sees their slopes
    "woods": "optical+dem",  # share of the tile under trees, 5 to 35 %
    "greenness": "optical",  # vegetated fields from dry and sparse to dense and green
    "haze": "optical",  # mean opacity of the haze, 2 to 38 %
    "looks": "sar",  # speckle deviation from 3.4 dB (few looks) down to 1.0 dB (many)
    "ratio": "sar",  # VH - VV from -11 dB (surface scattering) to -5 dB (volume scattering)
    "building_height": "dem",  # 5 to 31 m, the canopy being at 36 m
}


def draw_ground(rng, f: dict[str, float], tile: int) -> tuple[flat.Layout, np.ndarray, np.ndarray]:
    """One ground: houses, lakes and fields; where woods stand, maybe on the latter two, bool (tile, tile); the terrain,
    of unit variance. Factors are scaled to 0..1; shares of houses, water and woods are met to the pixel.

    What one sensor does not see must not shape what it sees: houses first, lakes and woods around them alone.
    """
    shape = (tile, tile)
    _, x, _, street, rank = flat._blocks(rng, tile, 0.3)
    houses = flat._lowest(rank + 10 * street, round((0.08 + 0.27 * f["built_up"]) * tile**2))
    lakes = flat._lowest(flat._smooth(rng, shape, 2.2) + 100 * houses, round((0.02 + 0.38 * f["water"]) * tile**2))
    woods = flat._lowest(flat._smooth(rng, shape, 2.0) + 100 * houses, round((0.05 + 0.30 * f["woods"]) * tile**2))
    cover = np.full(shape, flat.BARE)
    cover[houses], cover[lakes] = flat.BUILT, flat.WATER
    terrain = flat._smooth(rng, shape, 1.4)
    layout = flat.Layout(cover, flat._fields(rng, cover), houses & (x % 4 == 0))
    return layout, woods, (terrain - terrain.mean()) / terrain.std()


class ThreeWorld(flat.Locations):
    """Locations seen by radar, optical sensor and elevation model.

    `tile`: height and width in 10 m pixels, a multiple of 6 from 12 on; `seasons`: views of each location, of which
    what lies where and the elevation stay. Items: {"id", "sar": float32 (S, 2, H, W) dB, "optical": float32 (S, 13, H,
    W) reflectance x 10000, "dem": float32 (S, 1, H, W) m, "dates"}.
    """

    dates = flat.World.dates

    def __init__(self, locations: int, *, tile: int = 36, seasons: int = 4, seed: int = 0, stream: int = 2):
        super().__init__(FACTORS, locations=locations, tile=tile, seasons=seasons, seed=seed, stream=stream)
        self.ids = [f"{i:07d}" for i in range(locations)]

    def __getitem__(self, i: int) -> dict:
        rng, f = self._draw(i, 0)
        (layout, woods, terrain), shape = draw_ground(rng, f, self.tile), (self.tile, self.tile)
        views = flat.Layout(*(np.repeat(part[None], self.seasons, 0) for part in layout))
        land = np.isin(layout.cover, (flat.BARE, flat.VEGETATED))
        slope = np.gradient(terrain, axis=1)  # open land is much brighter where it faces the radar
        slope = np.tanh(slope / slope.std()) * land
        slope = np.maximum(slope, 0.35 * slope)
        slope *= (0.4 + 7 * f["relief"]) / slope[land].std()
        sar = flat._sar(rng, views, f, self.seasons) + slope.astype(np.float32)
        optical = flat.to_10m(flat._optical(rng, views, f | {"soil_colour": 0.5}, self.seasons, woods))
        canopy, roofs = 36 + 1.5 * flat._smooth(rng, shape, 0.5), 5 + 26 * f["building_height"]
        height = 100 + 0.3 * 7 ** f["relief"] * terrain + 0.1 * rng.standard_normal(shape)
        height += np.where(woods, canopy, 0) + np.where(layout.cover == flat.BUILT, roofs, 0)
        dem = np.repeat(height.astype(np.float32)[None, None], self.seasons, 0)
        return {"id": self.ids[i], "sar": sar, "optical": optical, "dem": dem, "dates": self.dates(i)}


# Class: the named factors lie in [low, high). Most need sensors together, so that each one that is missing costs.
CLASSES = {
    "town": {"built_up": (0.3, inf)},
    "towers": {"built_up": (-0.2, inf), "building_height": (0.2, inf)},
    "lakes": {"water": (0.3, inf)},
    "marsh": {"water": (-0.1, inf), "ratio": (0.2, inf)},
    "mountains": {"relief": (0.3, inf)},
    "forest": {"woods": (0.3, inf)},
    "parkland": {"woods": (-inf, 0.2), "greenness": (0.1, inf)},
    "misty valley": {"relief": (-0.3, inf), "haze": (0.2, inf)},
    "rough steppe": {"greenness": (-inf, 0.0), "looks": (-inf, 0.2)},
}


class SceneWorld(ThreeWorld):
    """One view each of locations with labels: {"id", "sar", "optical", "dem", "labels": bool (9,) of CLASSES}."""

    def __init__(self, locations: int, *, tile: int = 36, seed: int = 0):
        super().__init__(locations, tile=tile, seasons=1, seed=seed, stream=6)
        held = [[(low <= self.factors[k]) & (self.factors[k] < high) for k, (low, high) in rule.items()]
                for rule in CLASSES.values()]  # fmt: skip
        self.labels = np.stack([np.all(parts, axis=0) for parts in held], axis=1)

    def __getitem__(self, i: int) -> dict:
        item = super().__getitem__(i)
        return {"id": item["id"], **{k: item[k][0] for k in ("sar", "optical", "dem")}, "labels": self.labels[i].copy()}


def _unpublished(root: Path, split: str | None = None, **options) -> Reader:
    raise DataError(f"{root}: three_scenes is drawn and has no files to read; choose data.source: world")


TITLE = "drawn world of radar and optical images and elevation"
SCENES = Miniature(
    TITLE,
    make=lambda world, split, count: SceneWorld(count, tile=world.tile, seed=world.seed),
    splits={"train": "train", "test": "test"},
    factors=FACTORS,
)
THREE_SCENES = DataSet(
    name="three_scenes",
    title="Three-sensor scenes",
    pair="sar_optical_dem",
    modalities=(SAR, OPTICAL, DEM),
    read=_unpublished,
    task=Scene(tuple(CLASSES)),
    world="decur_core.worlds.three:SCENES",
)
DATASETS = (THREE_SCENES,)

"""A miniature world of three sensors, radar, optical and elevation: factors for all, for each pair and for one alone.

A location shows lakes, houses, woods and fields, as in `sar_optical`, over hilly ground. Nine independent factors,
uniform in [-1, 1] (`FACTORS`), each a statistic of a stationary scene. What a sensor does not see is drawn as if it
were not there: the radar takes woods for the fields under them, the elevation model lakes for dry ground, the optical
sensor knows no hills (nothing is shaded). As in `terrain`, the 8-bit mapping keeps ratios of heights: what houses and
hills measure against the canopy of the woods. Nuisance as in `sar_optical`, drawn for every season, and heights of
crowns. `tests/test_three.py` decides which factors may be used: a supervised network must read each with R2 >= 0.85
from the sensors that carry it, and not at all from the others.
"""

from math import inf
from typing import NamedTuple

import numpy as np

from decur_core.worlds.sar_optical import (
    BARE,
    BUILT,
    VEGETATED,
    WATER,
    Layout,
    Locations,
    World,
    _blocks,
    _fields,
    _lowest,
    _optical,
    _sar,
    _smooth,
    check_views,
    to_10m,
)

# name: who sees it. What each one does is written where it is used, in `draw_scene` and `ThreeWorld`.
FACTORS = {
    "built_up": "common",  # share of the tile under buildings, 5 to 32 %
    "water": "sar+optical",  # share of the tile under water, 2 to 40 %
    "relief": "sar+dem",  # height of the hills, and how strongly the radar sees their slopes
    "woods": "optical+dem",  # share of the tile under trees, 5 to 35 %
    "greenness": "optical",  # vegetated fields from dry and sparse to dense and green
    "haze": "optical",  # mean opacity of the haze, 2 to 38 %
    "looks": "sar",  # speckle deviation from 3.4 dB (few looks) down to 1.0 dB (many)
    "ratio": "sar",  # VH - VV from -11 dB (surface scattering) to -5 dB (volume scattering)
    "building_height": "dem",  # 12 to 36 m, the canopy being at 8 m
}


class Scene(NamedTuple):
    """Where things lie, each (tile, tile)."""

    layout: Layout  # houses, lakes and fields; woods may stand on the latter two
    woods: np.ndarray  # bool
    terrain: np.ndarray  # float of unit variance


def draw_scene(rng, f: dict[str, float], tile: int) -> Scene:
    """One scene; factors scaled to 0..1. Shares of houses, water and woods are met to the pixel, whatever the places.

    What one sensor does not see must not shape what it sees: houses first, lakes and woods around them alone.
    """
    shape = (tile, tile)
    _, x, _, street, rank = _blocks(rng, tile, 0.3)
    houses = _lowest(rank + 10 * street, round((0.05 + 0.27 * f["built_up"]) * tile**2))
    lakes = _lowest(_smooth(rng, shape, 2.2) + 100 * houses, round((0.02 + 0.38 * f["water"]) * tile**2))
    woods = _lowest(_smooth(rng, shape, 2.0) + 100 * houses, round((0.05 + 0.30 * f["woods"]) * tile**2))
    cover = np.full(shape, BARE)
    cover[houses], cover[lakes] = BUILT, WATER
    terrain = _smooth(rng, shape, 3.0)
    layout = Layout(cover, _fields(rng, cover), houses & (x % 4 == 0))
    return Scene(layout, woods, (terrain - terrain.mean()) / terrain.std())


class ThreeWorld(Locations):
    """Locations seen by radar, optical sensor and elevation model; location i depends on (seed, i) and settings only.

    `tile`: height and width in 10 m pixels, a multiple of 6 from 12 on; `seasons`: views of each location, of which
    what lies where and the elevation stay; `seed`, `stream`: integers >= 0, worlds of other streams have other
    locations. Items: {"id", "sar": float32 (S, 2, H, W) dB, "optical": float32 (S, 13, H, W) reflectance x 10000,
    "dem": float32 (S, 1, H, W) m, "dates"}.
    """

    dates = World.dates

    def __init__(self, locations: int, *, tile: int = 36, seasons: int = 4, seed: int = 0, stream: int = 2):
        super().__init__(FACTORS, locations, seed=seed, stream=stream, most=10_000_000)
        check_views(tile, seasons)
        self.tile, self.seasons = int(tile), int(seasons)
        self.ids = [f"{i:07d}" for i in range(locations)]

    def scene(self, i: int) -> Scene:
        """What lies where at location i."""
        return draw_scene(*self._draw(i, 0), self.tile)

    def __getitem__(self, i: int) -> dict:
        rng, f = self._draw(i, 0)
        (layout, woods, terrain), shape = draw_scene(rng, f, self.tile), (self.tile, self.tile)
        views = Layout(*(np.repeat(part[None], self.seasons, 0) for part in layout))
        slope = np.gradient(terrain, axis=1)  # open land is brighter where it faces the radar
        slope *= ((0.5 + 6 * f["relief"]) / slope.std()) * np.isin(layout.cover, (BARE, VEGETATED))
        sar = _sar(rng, views, f, self.seasons) + slope.astype(np.float32)
        optical = to_10m(_optical(rng, views, f | {"soil_colour": 0.5}, self.seasons, woods))
        canopy, roofs = 8 + 1.5 * _smooth(rng, shape, 0.5), 12 * 3 ** f["building_height"]
        height = 100 + 0.4 * 10 ** f["relief"] * terrain + 0.1 * rng.standard_normal(shape)
        height += np.where(woods, canopy, 0) + np.where(layout.cover == BUILT, roofs, 0)
        dem = np.repeat(height.astype(np.float32)[None, None], self.seasons, 0)
        return {"id": self.ids[i], "sar": sar, "optical": optical, "dem": dem, "dates": self.dates(i)}

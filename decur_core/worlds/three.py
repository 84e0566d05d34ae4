"""A miniature world of three sensors, radar, optical and elevation: factors for all, for each pair and for one alone.

A location shows lakes, houses, woods and fields, as in `sar_optical`, over hilly ground. Nine independent factors,
uniform in [-1, 1] (`FACTORS`), each a statistic of a stationary scene. What a sensor does not see is drawn as if it
were not there: the radar takes woods for the fields under them, the elevation model lakes for dry ground, the optical
sensor knows no hills (nothing is shaded). As in `terrain`, the 8-bit mapping keeps ratios of heights: what houses and
hills measure against the canopy of the woods. Nuisance as in `sar_optical`, drawn for every season, and heights of
crowns. `tests/test_three.py` decides which factors may be used: a supervised network must read each with R2 >= 0.85
from the sensors that carry it, and not at all from the others.
"""

import numpy as np

from decur_core.data.modality import OPTICAL
from decur_core.data.raster import resize
from decur_core.worlds.sar_optical import (
    BARE,
    BUILT,
    GROUPS,
    WATER,
    Layout,
    Locations,
    _blocks,
    _fields,
    _lowest,
    _optical,
    _sar,
    _smooth,
    integers,
)

# name: who sees it. What each one does is written where it is used, in `ThreeWorld.__getitem__`.
FACTORS = {
    "built_up": "common",  # share of the tile under buildings, 6 to 27 %
    "water": "sar+optical",  # share of the tile under water, 2 to 40 %
    "relief": "sar+dem",  # height of the hills, and how strongly the radar sees their slopes
    "woods": "optical+dem",  # share of the tile under trees, 5 to 35 %
    "greenness": "optical",  # vegetated fields from dry and sparse to dense and green
    "haze": "optical",  # mean opacity of the haze, 2 to 38 %
    "looks": "sar",  # speckle deviation from 3.4 dB (few looks) down to 1.0 dB (many)
    "ratio": "sar",  # VH - VV from -11 dB (surface scattering) to -5 dB (volume scattering)
    "building_height": "dem",  # 5 to 25 m, the canopy being at 12 m
}


class ThreeWorld(Locations):
    """Locations seen by radar, optical sensor and elevation model; location i depends on (seed, i) and settings only.

    `tile`: height and width in 10 m pixels, a multiple of 6 from 12 on; `seasons`: views of each location; the ground
    stays, what lies on it too. Items: {"id", "sar": float32 (S, 2, H, W) dB, "optical": float32 (S, 13, H, W)
    reflectance x 10000, "dem": float32 (S, 1, H, W) m}.
    """

    def __init__(self, locations: int, *, tile: int = 36, seasons: int = 2, seed: int = 0, stream: int = 2):
        super().__init__(FACTORS, locations, seed=seed, stream=stream, most=10_000_000)
        integers(seasons=(seasons, 1, 4))
        if not isinstance(tile, (int, np.integer)) or tile < 12 or tile % 6:
            raise ValueError(f"tile = {tile!r}: a multiple of 6, at least 12, is needed (60 m bands: tile / 6 pixels)")
        self.tile, self.seasons = int(tile), int(seasons)
        self.ids = [f"{i:07d}" for i in range(locations)]

    def __getitem__(self, i: int) -> dict:
        rng, f = self._draw(i, 0)
        size = (self.tile, self.tile)

        # What one sensor does not see must not shape what it sees: houses first, lakes and woods around them alone.
        _, x, _, street, rank = _blocks(rng, self.tile, 0.3)
        houses = _lowest(rank + 10 * street, self._pixels(0.06 + 0.21 * f["built_up"]))
        lakes = _lowest(_smooth(rng, size, 2.2) + 100 * houses, self._pixels(0.02 + 0.38 * f["water"]))
        woods = _lowest(_smooth(rng, size, 2.0) + 100 * houses, self._pixels(0.05 + 0.30 * f["woods"]))
        cover = np.full(size, BARE)
        cover[houses], cover[lakes] = BUILT, WATER
        layout = Layout(cover, _fields(rng, cover), houses & (x % 4 == 0))
        layout = Layout(*(np.repeat(part[None], self.seasons, 0) for part in layout))
        terrain = _smooth(rng, size, 3.0)
        terrain = (terrain - terrain.mean()) / terrain.std()

        sar = _sar(rng, layout, f, self.seasons)
        slope = np.gradient(terrain, axis=1)  # brighter where it faces the radar
        sar += ((0.4 + 5 * f["relief"]) * slope / slope.std()).astype(np.float32)
        native = _optical(rng, layout, f | {"soil_colour": 0.5}, self.seasons, woods)
        optical = np.empty((self.seasons, len(OPTICAL.bands), *size), np.float32)
        for season in range(self.seasons):
            for k, rows in GROUPS.items():
                optical[season, rows] = resize(native[k][season], size)
        canopy, roofs = 12 + 2 * _smooth(rng, size, 0.5), 5 * 5 ** f["building_height"]
        height = 100 + 0.3 * 10 ** f["relief"] * terrain + np.where(woods, canopy, 0) + np.where(houses, roofs, 0)
        dem = height + 0.1 * rng.standard_normal((self.seasons, 1, *size))
        return {"id": self.ids[i], "sar": sar, "optical": optical, "dem": dem.astype(np.float32)}

    def _pixels(self, share: float) -> int:
        return round(share * self.tile**2)

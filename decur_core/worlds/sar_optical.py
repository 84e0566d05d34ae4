"""A miniature SAR-optical world with known factors: what both sensors see, and what only one of them sees.

Nuisance, drawn for every season: brightness of single fields, VH of the houses, where the haze lies, gain, offset,
calibration, sensor noise and speckle; with layout "redrawn" also where things lie, for every sensor and season.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import cache
from math import inf
from typing import NamedTuple

import numpy as np

from decur_core.data.bigearthnet import labels_19
from decur_core.data.modality import OPTICAL
from decur_core.data.raster import OPTICAL_STEPS, Reader, resize

# name: who sees it. What each one does is written where it is used, in `draw_layout`, `_optical` and `_sar`.
FACTORS = {
    "built_up": "common",  # share of the tile under buildings, 3 to 27 %
    "water": "common",  # share of the tile under water, 2 to 40 %
    "greenness": "optical",  # vegetated fields from dry and sparse to dense and green
    "haze": "optical",  # mean opacity of the haze, 2 to 38 %
    "soil_colour": "optical",  # bare fields from grey and moist to red and dry
    "looks": "sar",  # speckle deviation from 3.4 dB (few looks) down to 1.0 dB (many)
    "ratio": "sar",  # VH - VV from -11 dB (surface scattering) to -5 dB (volume scattering)
}
LAYOUTS = ("coregistered", "redrawn")
LAND_COVER = ("bare field", "water", "built-up", "vegetated field")  # values of Layout.cover
BARE, WATER, BUILT, VEGETATED = range(4)
# Rows of the bands at 10, 20 and 60 m
GROUPS = {k: [row for row, step in enumerate(OPTICAL_STEPS) if step == k] for k in (1, 2, 6)}

# Reflectance x 10000 at the top of the atmosphere in OPTICAL.bands; plausible, of the order of the SSL4EO-S12 means
SPECTRA = {
    "soil grey": (1350, 1280, 1300, 1330, 1450, 1600, 1700, 1750, 1850, 700, 12, 2000, 1500),
    "soil red": (1300, 1080, 1250, 2150, 2450, 2650, 2800, 2850, 3050, 850, 12, 3900, 3300),
    "water": (1350, 1120, 840, 560, 480, 420, 400, 360, 330, 160, 8, 160, 100),
    "built-up": (2300, 2350, 2400, 2500, 2600, 2650, 2750, 2800, 2850, 1000, 15, 2900, 2700),
    "sparse": (1300, 1110, 1200, 1250, 1500, 1850, 2000, 2050, 2150, 750, 12, 2400, 1650),
    "dense": (1200, 840, 980, 480, 900, 2900, 3600, 3700, 4000, 1200, 10, 1500, 650),
    "wood": (1150, 830, 760, 480, 780, 1700, 2050, 2150, 2350, 900, 10, 1000, 480),
    "cloud": (5200, 5000, 4900, 4950, 5050, 5150, 5250, 5250, 5350, 2600, 420, 4300, 3600),
}
SPECTRA = {name: np.array(values, np.float32) for name, values in SPECTRA.items()}
# dB of BARE, WATER, BUILT, VEGETATED: VV, and VH - VV, to which the fields add the factor and the houses a random value
VV = np.array([-12.5, -20.5, -6.0, -10.5], np.float32)
VH_VV = np.array([-8.5, -8.0, -9.0, -7.5], np.float32)

# Label (of the 43 names of BigEarthNet): the named factors must lie in [low, high). Arable land, woodland, pastures and
# forests follow from greenness (optical) and VH/VV ratio (SAR) together, so neither sensor alone knows them; these five
# rules leave no gap, so every patch has a label. Roads are one of the names that the 19 classes leave out. Never seen
# of the 19: permanent crops, agriculture with nature, agro-forestry, mixed forest, moors, coastal wetlands.
LABEL_RULES = (
    ("Discontinuous urban fabric", {"built_up": (0.1, 0.7)}),
    ("Continuous urban fabric", {"built_up": (0.7, inf)}),
    ("Industrial or commercial units", {"built_up": (0.3, inf), "ratio": (-inf, -0.2)}),
    ("Road and rail networks and associated land", {"built_up": (0.85, inf)}),
    ("Non-irrigated arable land", {"greenness": (-inf, 0.0), "ratio": (-inf, 0.2)}),
    ("Transitional woodland/shrub", {"greenness": (-inf, 0.0), "ratio": (0.2, inf)}),
    ("Pastures", {"greenness": (0.0, inf), "ratio": (-inf, 0.0)}),
    ("Broad-leaved forest", {"greenness": (0.0, 0.5), "ratio": (0.0, inf)}),
    ("Coniferous forest", {"greenness": (0.5, inf), "ratio": (0.0, inf)}),
    ("Complex cultivation patterns", {"built_up": (-inf, 0.0), "looks": (-inf, -0.3)}),
    ("Sparsely vegetated areas", {"greenness": (-inf, -0.2), "soil_colour": (0.0, inf)}),
    ("Beaches, dunes, sands", {"water": (0.2, inf), "soil_colour": (0.6, inf)}),
    ("Inland marshes", {"water": (-0.2, inf), "looks": (0.3, inf)}),
    ("Water bodies", {"water": (0.0, inf), "soil_colour": (-inf, 0.2)}),
    ("Sea and ocean", {"water": (0.5, inf), "soil_colour": (0.2, inf)}),
)


def factors(n: int, *, seed: int, stream: int = 0, names: Iterable[str] = FACTORS) -> dict[str, np.ndarray]:
    """The factors of n locations: name -> float32 (n,), uniform in [-1, 1]. Location i is the same for every n > i."""
    names = list(names)
    values = np.random.default_rng((seed, stream)).uniform(-1, 1, (n, len(names))).astype(np.float32)
    return dict(zip(names, values.T, strict=True))


class Locations(Reader):
    """What miniature worlds have in common: `.factors` that are known, and random numbers for each location alone.

    `tile`: height of an image in pixels, one of `sizes`; `most`: locations that there can be; `seasons`: views of each.
    A ValueError names a setting that is impossible.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        sizes=range(12, 10_000, 6),
        most: int = 10_000_000,
        locations: int,
        tile: int,
        seasons: int = 1,
        seed: int,
        stream: int,
    ):
        given = {"locations": (locations, range(1, most + 1)), "tile": (tile, sizes), "seasons": (seasons, range(1, 5))}
        for name, (value, known) in (given | {"seed": (seed, range(2**63)), "stream": (stream, range(2**63))}).items():
            if not isinstance(value, (int, np.integer)) or int(value) not in known:
                steps = f", in steps of {known.step}" * (known.step > 1)
                raise ValueError(f"{name} = {value!r}: an integer, {known[0]} to {known[-1]}{steps}, is needed")
        self.tile, self.seasons, self.seed, self.stream = (int(n) for n in (tile, seasons, seed, stream))
        self.factors = factors(locations, seed=self.seed, stream=self.stream, names=names)

    def _draw(self, i: int, part: int) -> tuple[np.random.Generator, dict[str, float]]:
        """Random numbers for one part of location i, and its factors scaled to 0..1."""
        if not 0 <= i < len(self):
            raise IndexError(f"location {i} of a world of {len(self)}")
        rng = np.random.default_rng((self.seed, self.stream, int(i), part))
        return rng, {name: (float(values[i]) + 1) / 2 for name, values in self.factors.items()}


class Layout(NamedTuple):
    """Where things lie, each (tile, tile); stacked along a first axis for several views."""

    cover: np.ndarray  # int, index into LAND_COVER
    parcel: np.ndarray  # int, number of the field
    facing: np.ndarray  # bool, walls that face the radar


@cache
def _blur(tile: int, sigma: float) -> np.ndarray:
    """Matrix (tile, tile) of a periodic Gaussian blur whose output has unit variance for white noise on one axis."""
    distance = np.arange(tile)
    kernel = np.exp(-0.5 * (np.minimum(distance, tile - distance) / sigma) ** 2)
    kernel /= np.sqrt((kernel**2).sum())
    return kernel[(distance[:, None] - distance[None]) % tile].astype(np.float32)


def _smooth(rng, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Stationary Gaussian random fields (…, tile, tile) of unit variance, smooth over about sigma pixels."""
    blur = _blur(shape[-1], sigma)
    return blur @ rng.standard_normal(shape, dtype=np.float32) @ blur.T


def _lowest(field: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` lowest pixels; equal ones are taken row by row, so the result never depends on the sort."""
    flat = field.ravel() + np.arange(field.size) * 1e-7
    mask = np.zeros(field.size, bool)
    mask[np.argpartition(flat, count)[:count]] = True
    return mask.reshape(field.shape)


def _blocks(rng, tile: int, clusters: float) -> tuple[np.ndarray, ...]:
    """Places for houses of 3 x 3 pixels with streets of 1 pixel between: y, x, number of the block, street, rank.

    `y`, `x`: (tile, 1), (1, tile), counted from a street on; `rank`: low ranks are built up first, and a smooth field,
    of which `clusters` is the weight, makes neighbours likely.
    """
    dy, dx = rng.integers(4, size=2)
    y, x = (np.arange(tile) + dy)[:, None], (np.arange(tile) + dx)[None]
    side = (tile + 6) // 4  # blocks along one side, wherever the first street lies
    block, street = y // 4 * side + x // 4, (y % 4 == 3) | (x % 4 == 3)
    town = _smooth(rng, (tile, tile), 3.0)
    return y, x, block, street, rng.random(side**2)[block] - clusters * town[y - y % 4 - dy, x - x % 4 - dx]


def draw_layout(rng, built_up: float, water: float, tile: int) -> Layout:
    """One scene: lakes, rows of houses in clusters, and fields of which half are vegetated.

    Factors are scaled to 0..1. Shares of water and buildings are met to the pixel, whatever the places.
    """
    cover = np.full((tile, tile), BARE)
    lakes = _lowest(_smooth(rng, (tile, tile), 2.2), round((0.02 + 0.38 * water) * tile**2))
    cover[lakes] = WATER

    _, x, _, street, rank = _blocks(rng, tile, 0.3)
    houses = _lowest(rank + 10 * street + 100 * lakes, round((0.03 + 0.24 * built_up) * tile**2))  # streets come last
    cover[houses] = BUILT

    return Layout(cover, _fields(rng, cover), houses & (x % 4 == 0))


def _fields(rng, cover: np.ndarray) -> np.ndarray:
    """Number of the field of every pixel, int (tile, tile); half of the bare land of `cover` becomes vegetated.

    Fields are what is nearest to jittered seeds in the maximum norm of turned axes, so rectangles of any direction.
    """
    tile = len(cover)
    side = round(tile / 7)
    seeds = (np.indices((side, side)).reshape(2, -1, 1) + rng.random((2, side**2, 1))) * (tile / side)
    dy, dx = np.indices((tile, tile)).reshape(2, 1, -1) - seeds
    angle = rng.uniform(0, np.pi / 2)
    sin, cos = np.sin(angle), np.cos(angle)
    gap = np.maximum(abs(cos * dx + sin * dy), 1.5 * abs(cos * dy - sin * dx))
    parcel = gap.argmin(0).reshape(tile, tile)
    land = cover == BARE
    cover[_lowest(rng.permutation(side**2)[parcel] + 1000 * ~land, int(land.sum()) // 2)] = VEGETATED
    return parcel


def _by_field(values: np.ndarray, layout: Layout, elsewhere: float) -> np.ndarray:
    """Values (seasons, fields) laid out over the fields, `elsewhere` off them: float32 (seasons, tile, tile)."""
    spread = values[np.arange(len(values))[:, None, None], layout.parcel]
    return np.where((layout.cover == BARE) | (layout.cover == VEGETATED), spread, elsewhere).astype(np.float32)


def _optical(rng, layout: Layout, f: dict[str, float], seasons: int, woods: np.ndarray | None = None) -> dict:
    """Optical views of one location: {k: uint16 (seasons, bands of GROUPS[k], tile/k, tile/k)} for k = 1, 2, 6.

    `woods`: bool (tile, tile), where crowns hide what lies below.
    """
    tile = layout.cover.shape[-1]
    bare = SPECTRA["soil grey"] + f["soil_colour"] * (SPECTRA["soil red"] - SPECTRA["soil grey"])
    vegetated = SPECTRA["sparse"] + f["greenness"] * (SPECTRA["dense"] - SPECTRA["sparse"])
    # in the order of LAND_COVER, then the crowns
    spectra = np.stack([bare, SPECTRA["water"], SPECTRA["built-up"], vegetated, SPECTRA["wood"]], 1)
    cover = layout.cover if woods is None else np.where(woods, len(LAND_COVER), layout.cover)
    shade = _by_field(rng.normal(1, 0.15, (seasons, layout.parcel.max() + 1)), layout, 1)
    haze = 1 / (1 + np.exp(-1.5 * _smooth(rng, (seasons, tile, tile), 4.0))) + 0.2
    haze *= (0.02 + 0.36 * f["haze"]) / haze.mean((1, 2), keepdims=True)
    gain = rng.normal(1, 0.08, (seasons, 1, 1, 1)).astype(np.float32)
    offset = rng.normal(0, 80, (seasons, 1, 1, 1)).astype(np.float32)
    view = spectra[:, cover] * (shade * (1 - haze)) + SPECTRA["cloud"][:, None, None, None] * haze
    native = {}
    for k, rows in GROUPS.items():
        band = view[rows].swapaxes(0, 1)
        if k > 1:
            mean = np.repeat(np.eye(tile // k, dtype=np.float32) / k, k, axis=1)  # (tile / k, tile), of k neighbours
            band = mean @ band @ mean.T
        band = band * gain + offset + 30 * rng.standard_normal(band.shape, dtype=np.float32)
        native[k] = np.clip(np.rint(band), 1, 65535).astype(np.uint16)  # 0 means "no data" in Sentinel-2
    return native


def to_10m(native: dict[int, np.ndarray]) -> np.ndarray:
    """Views of `_optical` as readers give them: float32 (seasons, 13, tile, tile), reflectance x 10000."""
    seasons, _, *size = native[1].shape
    out = np.empty((seasons, len(OPTICAL.bands), *size), np.float32)
    for season in range(seasons):
        for k, rows in GROUPS.items():  # scene by scene, as readers do: the last bit depends on the stack's size
            out[season, rows] = resize(native[k][season], tuple(size))
    return out


def _sar(rng, layout: Layout, f: dict[str, float], seasons: int) -> np.ndarray:
    """SAR views of one location: float32 (seasons, 2, tile, tile), VV and VH in dB."""
    shade = _by_field(rng.normal(0, 1, (seasons, layout.parcel.max() + 1)), layout, 0)
    vv = VV[layout.cover] + 4 * layout.facing + shade
    ratio = (6 * f["ratio"] - 3) * ((layout.cover == BARE) | (layout.cover == VEGETATED))
    houses = rng.normal(0, 2, (seasons, 1, 1)) * (layout.cover == BUILT)
    vh = vv + VH_VV[layout.cover] + ratio + houses
    calibration = rng.normal(0, 1, (seasons, 1, 1, 1)) + rng.normal(0, 0.25, (seasons, 2, 1, 1))
    speckle = (3.4 - 2.4 * f["looks"]) * rng.standard_normal((seasons, 2, *vv.shape[1:]), dtype=np.float32)
    return (np.stack([vv, vh], 1) + calibration + speckle).astype(np.float32)


class World(Locations):
    """Locations of the miniature world, with the behaviour of `SSL4EOS12`.

    `tile`: height and width in 10 m pixels, a multiple of 6 from 12 on; `seasons`: views of each location, 1 to 4, in
    order of time; `layout`: "coregistered" (one scene for both sensors and all seasons) or "redrawn" (a new scene for
    each of them); `seed`: any integer >= 0.
    """

    stream = 0  # random numbers apart from those of other worlds of the same seed

    def __init__(self, locations: int, *, tile: int = 36, seasons: int = 4, layout: str = LAYOUTS[0], seed: int = 0):
        super().__init__(FACTORS, locations=locations, tile=tile, seasons=seasons, seed=seed, stream=self.stream)
        if layout not in LAYOUTS:
            raise ValueError(f"layout = {layout!r}: one of {', '.join(LAYOUTS)} is needed")
        self.layout = layout
        self.ids = [f"{i:07d}" for i in range(locations)]

    def _layouts(self, rng, f: dict[str, float]) -> list[Layout]:
        count = 1 if self.layout == "coregistered" else 2 * self.seasons
        return [draw_layout(rng, f["built_up"], f["water"], self.tile) for _ in range(count)]

    def native(self, i: int) -> dict:
        """What files hold of location i: {"sar": float32 (S, 2, H, W), k: uint16 (S, bands of GROUPS[k], H/k, W/k)}."""
        rng, f = self._draw(i, 0)
        drawn = self._layouts(rng, f)
        parts = drawn[: self.seasons], drawn[-self.seasons :]
        optical, sar = (Layout(*map(np.stack, zip(*part, strict=True))) for part in parts)
        return {"sar": _sar(rng, sar, f, self.seasons), **_optical(rng, optical, f, self.seasons)}

    def dates(self, i: int) -> dict[str, list[str]]:
        """Acquisition times YYYYMMDDThhmmss of location i, in order; seasons are 30 days wide, a quarter apart."""
        rng, _ = self._draw(i, 1)
        start = datetime(2020, 12, 21) - timedelta(days=int(rng.integers(365)))
        out = {}
        for modality, hour in (("sar", 5), ("optical", 10)):
            days = np.array([0, 89, 182, 275][: self.seasons]) + rng.integers(-15, 16, self.seasons)
            seconds = 3600 * hour + rng.integers(3600, size=self.seasons)
            times = [start + timedelta(int(d), int(s)) for d, s in zip(days, seconds, strict=True)]
            out[modality] = [f"{time:%Y%m%dT%H%M%S}" for time in times]
        return out

    def __getitem__(self, i: int) -> dict:
        """{"id", "sar": float32 (S, 2, H, W) dB, "optical": float32 (S, 13, H, W) reflectance x 10000, "dates"}."""
        native = self.native(i)
        return {"id": self.ids[i], "sar": native["sar"], "optical": to_10m(native), "dates": self.dates(i)}


class BigEarthNetWorld(World):
    """Labelled patches like those of `BigEarthNetMM`; of level 2A only the missing B10, a zero row, is simulated."""

    stream = 1  # other scenes than a World of the same seed

    def __init__(self, patches: int, *, tile: int = 36, seed: int = 0):
        super().__init__(patches, tile=tile, seasons=1, seed=seed)
        self.ids = [self._name("S2A_MSIL2A", "optical", i, "") for i in range(patches)]
        self.labels = np.stack([labels_19(self.corine(i), source="LABEL_RULES") for i in range(patches)])

    def _name(self, start: str, modality: str, i: int, tile: str) -> str:
        return f"{start}_{self.dates(i)[modality][0]}_{tile}{i // 90 % 90}_{i % 90}"

    def sar_name(self, i: int) -> str:
        """Name of the S1 patch that belongs to patch i."""
        return self._name("S1A_IW_GRDH_1SDV", "sar", i, "33UUP_")

    def corine(self, i: int) -> list[str]:
        """Names of patch i in the 43-class nomenclature, by LABEL_RULES."""
        f = {name: values[i] for name, values in self.factors.items()}
        return [name for name, rule in LABEL_RULES if all(low <= f[k] < high for k, (low, high) in rule.items())]

    def __getitem__(self, i: int) -> dict:
        """{"id", "sar": float32 (2, H, W), "optical": float32 (13, H, W) with B10 zero, "labels": bool (19,)}."""
        item = super().__getitem__(i)
        item["optical"][:, OPTICAL.bands.index("B10")] = 0
        return {"id": item["id"], "sar": item["sar"][0], "optical": item["optical"][0], "labels": self.labels[i].copy()}

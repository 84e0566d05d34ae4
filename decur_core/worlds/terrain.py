"""A miniature RGB-DEM world with known factors: what photograph and elevation model both see, and what only one sees.

A location is a patch of 250 m x 250 m, as after the published cutting of GeoNRW: 36 pixels of 6.9 m instead of 250 of
1 m. It shows fields, woods, ponds in hollows and villages of flat-roofed blocks; objects are sized in pixels, so a
larger `tile` holds more of them. The preprocessing of the paper brings every DEM patch to 8 bits between its own 1st
and 99th percentile: what survives are ratios of heights, here of buildings and of the terrain to the canopy, and
`REMOVED` names what does not. Nothing is shaded: a shadow would tell the photograph about heights.
Nuisance: where things lie, share of water, brightness of fields and roofs, heights of single
buildings and crowns, exposure, white balance, noise of both sensors. Views of a patch come from augmentation.
Masks need both sensors: yards are paved like the roofs around them and differ in height only; meadows, fields and roads
are equally low and differ in colour only. Values are those of GeoNRW, of which 6, 7 and 8 do not occur.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rasterio import Affine
from rasterio.enums import ColorInterp

from decur_core.data.geonrw import SPLITS
from decur_core.worlds import Miniature
from decur_core.worlds.files import write_raster
from decur_core.worlds.sar_optical import Locations, _blocks, _lowest, _smooth

# name: who sees it. What each one does is written where it is used, in `draw_scene`, `_rgb` and `_dem`.
FACTORS = {
    "built_up": "common",  # share of the patch under buildings, 8 to 23 %
    "forest": "common",  # share of the patch under trees, 10 to 35 %
    "greenness": "rgb",  # meadows from dry to lush, woods a little
    "roof_colour": "rgb",  # roofs and yards from slate to red tiles
    "soil_colour": "rgb",  # fields from pale grey to red-brown
    "building_height": "dem",  # 5 to 25 m, the canopy being at 12 m
    "relief": "dem",  # standard deviation of the terrain, 0.2 to 1.6 m
    "elevation": "dem",  # 50 to 450 m above sea level
}
REMOVED = ("elevation",)  # factors that are gone after the 8-bit preprocessing
FOREST, WATER, FIELD, YARD, MEADOW, ROAD, BUILDING = 1, 2, 3, 4, 5, 9, 10  # values of masks; 0: unlabelled

PER_CITY = 256  # locations in each city but the last, which has all others

# Red, green, blue of 0..255
COLOURS = {
    "meadow dry": (168, 152, 98),
    "meadow lush": (88, 138, 62),
    "wood dry": (72, 72, 46),
    "wood lush": (44, 74, 40),
    "roof slate": (96, 100, 112),
    "roof red": (188, 92, 66),
    "soil grey": (194, 188, 176),
    "soil red": (142, 90, 60),
    "water": (44, 66, 82),
    "road": (140, 140, 142),
}
COLOURS = {name: np.array(values, np.float32) for name, values in COLOURS.items()}


class Scene(NamedTuple):
    """Where things lie, each (tile, tile)."""

    cover: np.ndarray  # int, what is there: a value of masks, never 0
    labelled: np.ndarray  # bool, what the mask tells
    parcel: np.ndarray  # int, number of the field
    furrow: np.ndarray  # float, -1 to 1 across the rows of the fields
    block: np.ndarray  # int, number of the building with its yard
    crowns: np.ndarray  # float of unit variance, height of the canopy around its mean
    terrain: np.ndarray  # float of unit variance, level on water


def draw_scene(rng, built_up: float, forest: float, tile: int) -> Scene:
    """One scene; factors scaled to 0..1. Shares of buildings and woods are met to the pixel, whatever the places."""
    shape, area = (tile, tile), tile**2
    terrain = _smooth(rng, shape, 2.5)
    terrain = (terrain - terrain.mean()) / terrain.std()
    pond = _lowest(terrain, round(rng.uniform(0.015, 0.05) * area))
    terrain = np.where(pond, terrain[pond].max(), terrain)  # the water stands up to the lowest point of the shore

    y, x, block, street, rank = _blocks(rng, tile, 0.4)
    houses = round((0.08 + 0.15 * built_up) * area)
    build = rank + 10 * street + 100 * pond
    house, paved = _lowest(build, houses), _lowest(build, round(1.25 * houses))
    road = street & ~pond & (rank <= rank[paved].max())
    wood = _lowest(_smooth(rng, shape, 2.0) + 100 * (paved | road | pond), round((0.1 + 0.25 * forest) * area))

    # fields: rectangles of about 9 x 6 pixels in rows of any direction
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y + 2 * tile  # > 0
    across = np.cos(angle) * y - np.sin(angle) * x + 2 * tile
    row = (across // 6).astype(int)
    parcel = row * tile + ((along + 9 * rng.random(tile)[row]) // 9).astype(int)
    parcel = np.unique(parcel, return_inverse=True)[1].reshape(shape)

    cover = np.where(wood, FOREST, MEADOW)
    for where, value in ((pond, WATER), (paved, YARD), (road, ROAD), (house, BUILDING)):
        cover[where] = value
    open_land = cover == MEADOW
    order = rng.permutation(parcel.max() + 1)[parcel]
    cover[_lowest(order + 10**6 * ~open_land, int(open_land.sum()) // 2)] = FIELD
    labelled = ~_lowest(_smooth(rng, shape, 1.5), round(0.02 * area))
    furrow = np.sin(2 * np.pi * across / 2.6)
    return Scene(cover, labelled, parcel, furrow, block, _smooth(rng, shape, 0.5), terrain)


def _rgb(rng, scene: Scene, f: dict[str, float]) -> np.ndarray:
    """The photograph: uint8 (3, tile, tile)."""

    def between(low: str, high: str, share: float) -> np.ndarray:
        return COLOURS[low] + share * (COLOURS[high] - COLOURS[low])

    palette = np.zeros((11, 3), np.float32)
    palette[[WATER, ROAD]] = COLOURS["water"], COLOURS["road"]
    palette[FOREST] = between("wood dry", "wood lush", f["greenness"])
    palette[MEADOW] = between("meadow dry", "meadow lush", f["greenness"])
    palette[FIELD] = between("soil grey", "soil red", f["soil_colour"])
    palette[[YARD, BUILDING]] = between("roof slate", "roof red", f["roof_colour"])

    cover = scene.cover
    field = rng.normal(1, 0.08, scene.parcel.max() + 1)[scene.parcel]
    roof = rng.normal(1, 0.08, scene.block.max() + 1)[scene.block]
    shade = np.ones(cover.shape)
    for values, kinds in ((1 + 0.2 * scene.crowns, (FOREST,)), (field, (MEADOW,)), (roof, (YARD, BUILDING))):
        shade = np.where(np.isin(cover, kinds), values, shade)
    shade = np.where(cover == FIELD, field * (1 + 0.08 * scene.furrow), shade).astype(np.float32)
    exposure = (rng.normal(1, 0.06) * rng.normal(1, 0.02, (3, 1, 1))).astype(np.float32)
    image = palette.T[:, cover] * shade * exposure + 4 * rng.standard_normal((3, *cover.shape), dtype=np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _dem(rng, scene: Scene, f: dict[str, float]) -> np.ndarray:
    """Heights of the first returns above sea level: float32 (1, tile, tile), m."""
    canopy = 12 + 1.5 * scene.crowns
    roofs = 5 * 5 ** f["building_height"] * rng.normal(1, 0.05, scene.block.max() + 1)[scene.block]
    height = 50 + 400 * f["elevation"] + 0.2 * 8 ** f["relief"] * scene.terrain
    height += np.where(scene.cover == FOREST, canopy, 0) + np.where(scene.cover == BUILDING, roofs, 0)
    return (height + 0.1 * rng.standard_normal(height.shape))[None].astype(np.float32)


class TerrainWorld(Locations):
    """Locations of the miniature RGB-DEM world, with the items of `decur_core.data.geonrw.GeoNRW`.

    16 neighbours make one GeoNRW tile of 1 km x 1 km. `tile`: height and width of a patch in pixels of 250 / tile m;
    `cities`: in alphabetical order, those of a split of GeoNRW, filled one after the other, so that `ids` are in the
    order of the reader.
    """

    def __init__(self, locations: int, *, tile: int = 36, seed: int = 0, stream: int = 0, cities=SPLITS["train"]):
        # 320,000: what 200 km x 100 km hold, about North Rhine-Westphalia
        given = {"locations": locations, "tile": tile, "seed": seed, "stream": stream}
        super().__init__(FACTORS, **given, sizes=range(16, 251), most=320_000)
        if not cities or list(cities) != sorted(set(cities)):
            raise ValueError(f"cities = {cities!r}: at least one is needed, in alphabetical order, none twice")
        self.ids = []
        for i in range(locations):
            city, number = cities[min(i // PER_CITY, len(cities) - 1)], i // 16
            self.ids.append(f"{city}/{300 + number // 100}_{5600 + number % 100}_{i % 16 + 1}")

    def __getitem__(self, i: int) -> dict:
        """{"id", "rgb": uint8 (3, H, W), "dem": float32 (1, H, W) m, "mask": uint8 (H, W), 0 = unlabelled}."""
        rng, f = self._draw(i, 0)
        scene = draw_scene(rng, f["built_up"], f["forest"], self.tile)
        images = {"rgb": _rgb(rng, scene, f), "dem": _dem(rng, scene, f)}
        return {"id": self.ids[i], **images, "mask": (scene.cover * scene.labelled).astype(np.uint8)}


def write_geonrw(root: Path | str, world: TerrainWorld, indices: Iterable[int]) -> None:
    """Write locations as GeoNRW: `<city>/<E>_<N>_{rgb.jp2,dem.tif,seg.tif}`, 16 of them in a file, row by row.

    `indices`: whole tiles, in any order: 16 k to 16 k + 15 for some k each, else a ValueError.
    """
    indices = np.fromiter(indices, int)
    first = indices[::16]
    if not np.array_equal(indices, (first[:, None] + np.arange(16)).ravel()) or (first % 16).any():
        raise ValueError(f"indices: {indices.size} locations, not whole tiles of 16 neighbours (16 k to 16 k + 15)")
    # Without loss: the reversible wavelet, every bit of it, and no mixture of the colours
    lossless = {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES", "YCC": "NO"}
    # Colours are named, else the header says grey, and Pillow refuses three bands of grey
    lossless |= {"colors": (ColorInterp.red, ColorInterp.green, ColorInterp.blue)}
    for k in first:
        items = [world[i] for i in range(k, k + 16)]
        city, name = items[0]["id"].rsplit("_", 1)[0].split("/")
        east, north = (1000 * int(part) for part in name.split("_"))
        pixel, side = 250 / world.tile, 4 * world.tile
        place = {"crs": "EPSG:25832", "transform": Affine(pixel, 0, east, 0, -pixel, north + 1000)}
        (Path(root) / city).mkdir(parents=True, exist_ok=True)
        for part, key, options in (("rgb.jp2", "rgb", lossless), ("dem.tif", "dem", {}), ("seg.tif", "mask", {})):
            grid = np.stack([item[key] for item in items]).reshape(4, 4, -1, world.tile, world.tile)
            image = grid.transpose(2, 0, 3, 1, 4).reshape(-1, side, side)
            write_raster(Path(root) / city / f"{name}_{part}", image, **place, **options)


def _make(world, split: str, count: int) -> TerrainWorld:
    return TerrainWorld(count, tile=world.tile, seed=world.seed, stream=int(split == "test"), cities=SPLITS[split])


GEONRW = Miniature(
    "drawn world of photographs and elevation",
    make=_make,
    splits={"train": "locations", "test": "test"},
    alone=True,  # split by city
    writer=lambda root, made, parts: write_geonrw(root, made, *parts.values()),
    factors={name: who for name, who in FACTORS.items() if name not in REMOVED},
    whole=16,  # patches of a tile
    sensors=("rgb", "dem", ("dem",)),
)

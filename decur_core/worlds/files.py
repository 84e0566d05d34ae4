"""The miniature world on disk, in the published layouts of SSL4EO-S12 and BigEarthNet-MM (v1), with smaller tiles."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from rasterio import Affine, MemoryFile
from rasterio.crs import CRS

from decur_core.data.bigearthnet import BAND_FILES
from decur_core.data.modality import OPTICAL, SAR
from decur_core.worlds import Miniature
from decur_core.worlds.sar_optical import FACTORS, GROUPS, BigEarthNetWorld, World

_LONLAT, _UTM = CRS.from_epsg(4326), CRS.from_epsg(32633)
_PIXEL = {_LONLAT: 9e-5, _UTM: 10.0}  # 10 m in the units of the reference system


def write_raster(path: Path, image: np.ndarray, *, driver: str = "GTiff", colors=None, **place) -> None:
    """(C, H, W) as a file, by way of memory: what a full disk does not take is no error for GDAL."""
    shape = dict(zip(("count", "height", "width"), image.shape, strict=True))
    with MemoryFile(ext=path.suffix) as memory:
        with memory.open(driver=driver, dtype=image.dtype, **shape, **place) as file:
            if colors:
                file.colorinterp = colors
            file.write(image)
        path.write_bytes(memory.getbuffer())


def _write(folder: Path, bands: dict[str, tuple], *, crs: CRS, west: float, north: float) -> None:
    """{name: (band (h, w), pixel size in units of 10 m)} as GeoTIFFs without a no-data tag, as in both data sets."""
    folder.mkdir(parents=True)
    for name, (band, step) in bands.items():
        size = _PIXEL[crs] * step
        place = {"crs": crs, "transform": Affine(size, 0, west, 0, -size, north)}
        write_raster(folder / f"{name}.tif", band[None], **place)


def _bands(native: dict, season: int) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """SAR and optical bands of a season: {name: (band, pixel size in units of 10 m)}."""
    sar = {name: (band, 1) for name, band in zip(SAR.bands, native["sar"][season], strict=True)}
    optical = {}
    for step, rows in GROUPS.items():
        optical |= {OPTICAL.bands[row]: (band, step) for row, band in zip(rows, native[step][season], strict=True)}
    return sar, optical


def _scene(platform: str, time: str, code: int) -> str:
    """Name of a Sentinel-1 scene, with invented end, orbit, take and checksum."""
    return f"{platform}_IW_GRDH_1SDV_{time}_{time}_{code % 60000:06d}_{code % 2**24:06X}_{code % 2**16:04X}"


def write_ssl4eo(root: Path | str, world: World, indices: Iterable[int]) -> None:
    """Write locations of the world as SSL4EO-S12: `s1/<id>/<scene>/{VV,VH}.tif` and `s2c/<id>/<scene>/B1..B12.tif`.

    As in the data set, Sentinel-1 scenes come from the platforms S1A and S1B: their names do not sort by date.
    """
    for i in indices:
        native, dates = world.native(i), world.dates(i)
        platforms = np.random.default_rng((world.seed, world.stream, i, 2)).choice(["S1A", "S1B"], world.seasons)
        place = {"crs": _LONLAT, "west": round(5 + 0.03 * (i % 1000), 6), "north": round(50 - 0.03 * (i // 1000), 6)}
        for season in range(world.seasons):
            sar, optical = _bands(native, season)
            start, time = dates["sar"][season], dates["optical"][season]
            scene = _scene(platforms[season], start, 4 * i + season + 1)
            _write(Path(root) / "s1" / world.ids[i] / scene, sar, **place)
            _write(Path(root) / "s2c" / world.ids[i] / f"{time}_{time}_T33UUP", optical, **place)


def write_bigearthnet(root: Path | str, world: BigEarthNetWorld, splits: dict[str, Iterable[int]]) -> None:
    """Write patches as BigEarthNet-MM v1: both patch folders, label JSONs, and a list per split (train, val, test)."""
    root, side = Path(root), 10 * world.tile
    for split, indices in splits.items():
        lines = []
        for i in indices:
            s2, s1 = world.ids[i], world.sar_name(i)
            column, row = (int(part) for part in s2.split("_")[-2:])
            place = {"crs": _UTM, "west": 300000 + side * column, "north": 5400000 - side * row}
            sar, optical = _bands(world.native(i), 0)
            optical = {file: optical[name] for name, file in zip(OPTICAL.bands, BAND_FILES, strict=True) if file}
            patches = {("BigEarthNet-v1.0", s2): (optical, {})}
            patches["BigEarthNet-S1-v1.0", s1] = sar, {"corresponding_s2_patch": s2}
            for (folder, name), (bands, more) in patches.items():
                _write(root / folder / name, {f"{name}_{band}": found for band, found in bands.items()}, **place)
                metadata = {"labels": world.corine(i)} | more
                (root / folder / name / f"{name}_labels_metadata.json").write_text(json.dumps(metadata))
            lines.append(f"{s2},{s1}\n")
        root.mkdir(parents=True, exist_ok=True)
        (root / f"bigearthnet-{split}.csv").write_text("".join(lines))


TITLE = "drawn world of radar and optical images"
SSL4EO = Miniature(
    TITLE,
    make=lambda world, split, count: World(count, tile=world.tile, layout=world.layout, seed=world.seed),
    splits={"all": "locations"},
    writer=lambda root, made, parts: write_ssl4eo(root, made, parts["all"]),
    factors=FACTORS,
    sensors=("sar", "optical", ("optical",)),
)
BIGEARTHNET = replace(
    SSL4EO,
    make=lambda world, split, count: BigEarthNetWorld(count, tile=world.tile, seed=world.seed),
    splits={"train": "train", "test": "test"},
    writer=write_bigearthnet,
)

"""The miniature SAR-optical world with elevation, in both published forms of SSL4EO-S12 v1.1, with smaller tiles."""

import io
import tarfile
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from zarr.storage import MemoryStore

from decur_core.data.ssl4eo_v11 import B10, FOLDERS, FORMS, OFFSET
from decur_core.worlds import Miniature
from decur_core.worlds.files import TITLE, _scene
from decur_core.worlds.sar_optical import BUILT, FACTORS, WATER, World, _smooth, draw_layout

PER_FILE = 64  # places


class ElevatedWorld(World):
    """A `World` with elevation, with the behaviour of `SSL4EOS12v11`: what its files hold after their rounding.

    `split`: "train", whose SAR and optical images are those of the World of the same settings, or "val", which has
    other locations. The terrain is hilly, with water at its lowest level and houses of 8 m: elevation carries the two
    common factors; its height and relief are nuisance.
    """

    def __init__(self, locations: int, split: str = "train", **settings):
        self.stream = {"train": 0, "val": 4}[split]
        super().__init__(locations, **settings)
        self.ids = [f"{1_000_000 * (split == 'val') + i:07d}" for i in range(locations)]

    def elevation(self, i: int) -> np.ndarray:
        """Metres above sea level: float32 (1, tile, tile)."""
        rng, f = self._draw(i, 3)
        if self.layout == "coregistered":
            cover = self.label_map(i)
        else:
            cover = draw_layout(rng, f["built_up"], f["water"], self.tile).cover
        height = rng.uniform(5, 30) * _smooth(rng, cover.shape, 5.0)
        height += rng.uniform(50, 800) - height.min()
        height = np.where(cover == WATER, height.min(), height) + 8 * (cover == BUILT)
        return (height + 0.3 * rng.standard_normal(cover.shape))[None].astype(np.float32)

    def __getitem__(self, i: int) -> dict:
        """{"id", "sar": float32 (S, 2, H, W) dB, "optical": float32 (S, 13, H, W) reflectance x 10000, "dem": float32
        (S, 1, H, W) m, "dates"}."""
        item = super().__getitem__(i)
        item["sar"] = item["sar"].astype(np.float16).astype(np.float32)
        item["optical"] = np.rint(item["optical"]).clip(0, np.iinfo(np.int16).max - OFFSET)
        return item | {"dem": np.repeat(self.elevation(i)[None], self.seasons, axis=0)}


def ground_level(optical: np.ndarray) -> np.ndarray:
    """Level 2A from level 1C, reflectance x 10000 (T, 13, H, W) -> (T, 12, H, W): without B10, and without the
    atmosphere, which is what makes the darkest pixel of a band brighter than 1 (dark-object subtraction)."""
    bands = np.delete(optical, B10, axis=1)
    return bands - bands.min(axis=(2, 3), keepdims=True) + 1


def write_ssl4eo_v11(
    root: Path | str,
    world: ElevatedWorld,
    split: str,
    indices: Iterable[int],
    *,
    form: str = ".zarr.zip",
    folders: Iterable[str] = ("S1GRD", "S2L1C"),
) -> None:
    """Write locations of the world as a split of SSL4EO-S12 v1.1: `<split>/<folder>/…`, for ".zarr.zip" with its list.

    `SSL4EOS12v11(root, split, folders, missing="skip")` reads back what the world gives for these locations, from
    Sentinel-2 files with the offset (".zarr.zip") or without (".tar"), as published.
    """
    indices, root = list(indices), Path(root)
    (root / "splits").mkdir(parents=True, exist_ok=True)
    starts = range(0, len(indices), PER_FILE)
    names = [FORMS[form][0].format(split=split, number=1 + start // PER_FILE) for start in starts]
    for name, start in zip(names, starts, strict=True):
        items = [world[i] for i in indices[start : start + PER_FILE]]
        for folder in folders:
            (path := root / split / folder / name).parent.mkdir(parents=True, exist_ok=True)
            places = [_stored(item, folder, OFFSET if form == ".zarr.zip" else 0) for item in items]
            if form == ".zarr.zip":
                whole = {key: np.stack([place[key] for place in places]) for key in places[0] if key != "time"}
                whole["sample"] = np.array([item["id"] for item in items])
                path.write_bytes(_archive(whole, folder))
                continue
            with tarfile.open(path, "w") as file:
                for item, place in zip(items, places, strict=True):
                    data = _archive({key: values for key, values in place.items() if key != "file_id"}, folder)
                    member = tarfile.TarInfo(f"{item['id']}.zarr.zip")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    if form == ".zarr.zip":
        (root / "splits" / f"ssl4eos12_{split}.txt").write_text("".join(f"{name}\n" for name in names))


def _stored(item: dict, folder: str, offset: int) -> dict[str, np.ndarray]:
    """A place as a file of a folder has it, by the name of the array."""
    key = FOLDERS[folder][0].name
    if key == "dem":
        return {"bands": item["dem"][:1], "time": np.zeros(1, np.int64)}
    dates = item["dates"][key]
    times = [f"{d[:4]}-{d[4:6]}-{d[6:11]}:{d[11:13]}:{d[13:]}" for d in dates]
    stored = {"time": np.array(times, "datetime64[ns]").astype(np.int64)}
    if key == "sar":
        names = [_scene("S1A", date, int(item["id"])) for date in dates]
        return stored | {"bands": item["sar"].astype(np.float16), "file_id": np.array(names)}
    bands = ground_level(item["optical"]) if folder == "S2L2A" else item["optical"]
    stored["bands"] = bands = (bands + offset).astype(np.int16)
    stored["cloud_mask"] = np.zeros_like(bands[:, 0], np.uint8)
    return stored | {"file_id": np.array([f"{date}_{date}_T33UUP" for date in dates])}


def _archive(arrays: dict[str, np.ndarray], folder: str) -> bytes:
    """Arrays as a Zarr archive of version 2, with images of each time in chunks of their own."""
    parts = {}
    group = zarr.create_group(store := MemoryStore(parts), zarr_format=2)
    for name, values in ({"band": np.array(FOLDERS[folder][1])} | arrays).items():
        time = {"bands": -4, "cloud_mask": -3}.get(name)
        chunks = tuple(1 if time and k == values.ndim + time else n for k, n in enumerate(values.shape))
        group.create_array(name, data=values, chunks=chunks)
    zarr.consolidate_metadata(store, zarr_format=2)
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name in sorted(parts):
            archive.writestr(zipfile.ZipInfo(name), parts[name].to_bytes())
    return file.getvalue()


def _make(world, split: str) -> ElevatedWorld:
    count = world.test if split == "val" else world.locations
    return ElevatedWorld(count, split, tile=world.tile, layout=world.layout, seed=world.seed)


def _write_parts(root: Path, world, parts: dict[str, range], **options) -> None:
    for split, part in parts.items():
        write_ssl4eo_v11(root, _make(world, split), split, part, **options)


def _parts(world) -> dict[str, range]:
    return {"train": range(world.locations), "val": range(world.test)}


SSL4EO_V11 = Miniature(TITLE, make=_make, parts=_parts, write=_write_parts, factors=FACTORS)
SSL4EO_V11_DEM = Miniature(
    "drawn world of radar and optical images and elevation",
    make=_make,
    parts=_parts,
    write=partial(_write_parts, form=".tar", folders=("S1GRD", "S2L1C", "DEM")),
    factors=FACTORS,
)

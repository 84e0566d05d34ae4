"""Miniature worlds in both published forms of SSL4EO-S12 v1.1, with smaller tiles."""

import io
import tarfile
import zipfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import numpy as np
import zarr
from zarr.storage import MemoryStore

from decur_core.data.raster import Reader
from decur_core.data.ssl4eo_v11 import B10, FOLDERS, FORMS, OFFSET
from decur_core.worlds import Miniature, three
from decur_core.worlds.files import TITLE, _scene
from decur_core.worlds.sar_optical import FACTORS, World

PER_FILE = 64  # places


class Rounded(Reader):
    """Items of a world as `SSL4EOS12v11` gives them: what its files hold after their rounding, in ids of a split."""

    def __init__(self, world: Reader, split: str = "train"):
        self.world, self.factors = world, world.factors
        self.ids = [f"{1_000_000 * (split == 'val') + i:07d}" for i in range(len(world))]

    def __getitem__(self, i: int) -> dict:
        item = self.world[i] | {"id": self.ids[i]}
        item["sar"] = item["sar"].astype(np.float16).astype(np.float32)
        item["optical"] = np.rint(item["optical"]).clip(0, np.iinfo(np.int16).max - OFFSET)
        return item


def write_ssl4eo_v11(root: Path | str, world: Rounded, split: str, indices: Iterable[int], *, form: str, folders):
    """Write locations as a split of SSL4EO-S12 v1.1: `<split>/<folder>/…`, in the form ".zarr.zip" with its list.

    As published, Sentinel-2 files have the offset (".zarr.zip") or not (".tar").
    """
    indices, names = list(indices), []
    for start in range(0, len(indices), PER_FILE):
        items = [world[i] for i in indices[start : start + PER_FILE]]
        names.append(FORMS[form][0].format(split=split, number=len(names) + 1))
        for folder in folders:
            (path := Path(root) / split / folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
            places = [_stored(item, folder, form) for item in items]
            if form == ".zarr.zip":
                whole = {key: np.stack([place[key] for place in places]) for key in places[0]}
                path.write_bytes(archive(whole | {"sample": np.array([item["id"] for item in items])}, folder))
                continue
            with tarfile.open(path, "w") as file:
                for item, place in zip(items, places, strict=True):
                    member, data = tarfile.TarInfo(f"{item['id']}.zarr.zip"), archive(place, folder)
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
    if form == ".zarr.zip":
        (lists := Path(root) / "splits").mkdir(parents=True, exist_ok=True)
        (lists / f"ssl4eos12_{split}.txt").write_text("".join(f"{name}\n" for name in names))


def _stored(item: dict, folder: str, form: str) -> dict[str, np.ndarray]:
    """A place as a file of a folder has it, by the name of the array."""
    key = FOLDERS[folder][0]
    if key in ("dem", "mask"):
        return {"bands": item[key][:1]} | ({} if form == ".zarr.zip" else {"time": np.zeros(1, np.int64)})
    images, dates = item[key], item["dates"][key]
    scenes = [_scene("S1A", d, int(item["id"])) if key == "sar" else f"{d}_{d}_T33UUP" for d in dates]
    taken = np.array([datetime.strptime(d, "%Y%m%dT%H%M%S") for d in dates], "datetime64[ns]").astype(np.int64)
    times = {"file_id": np.array(scenes)} if form == ".zarr.zip" else {"time": taken}
    if key == "sar":
        return {"bands": images.astype(np.float16)} | times
    if folder == "S2L2A":  # without the atmosphere, which is why the darkest pixel of a band is not dark, and B10
        images = np.delete(images - images.min(axis=(2, 3), keepdims=True) + 1, B10, axis=1)
    bands = (images + OFFSET * (form == ".zarr.zip")).astype(np.int16)
    return {"bands": bands} | times


def archive(arrays: dict[str, np.ndarray], folder: str) -> bytes:
    """Arrays as a Zarr archive of version 2, with images of each time in chunks of their own."""
    group = zarr.create_group(MemoryStore(parts := {}), zarr_format=2)
    for name, values in ({"band": np.array(FOLDERS[folder][1])} | arrays).items():
        chunks = [1 if name == "bands" and k == values.ndim - 4 else n for k, n in enumerate(values.shape)]
        group.create_array(name, data=values, chunks=tuple(chunks))
    zarr.consolidate_metadata(group.store, zarr_format=2)
    with zipfile.ZipFile(file := io.BytesIO(), "w") as out:
        for name in sorted(parts):
            out.writestr(zipfile.ZipInfo(name), parts[name].to_bytes())
    return file.getvalue()


class _Val(World):
    stream = 4  # other scenes than those of training


def _two(world, split: str, count: int) -> Rounded:
    make = _Val if split == "val" else World
    return Rounded(make(count, tile=world.tile, layout=world.layout, seed=world.seed), split)


def _three(world, split: str, count: int) -> Rounded:
    return Rounded(three.ThreeWorld(count, tile=world.tile, seed=world.seed, stream=2 + (split == "val")), split)


def _twin(title: str, factors: dict[str, str], make, **options) -> Miniature:
    def write(root: Path, made: Rounded, parts: dict[str, range]) -> None:
        ((split, part),) = parts.items()
        write_ssl4eo_v11(root, made, split, part, **options)

    return Miniature(title, make, {"train": "locations", "val": "test"}, factors, write, alone=True)


SSL4EO_V11 = _twin(TITLE, FACTORS, _two, form=".zarr.zip", folders=("S1GRD", "S2L1C"))
SSL4EO_V11_DEM = _twin(three.TITLE, three.FACTORS, _three, form=".tar", folders=("S1GRD", "S2L1C", "DEM"))

"""OMBRIA: Sentinel-1 and Sentinel-2 patches of flooded places, before and after, with flood masks (Drakonakis et al.
2022).

Tree: `OmbriaS1/{train,test}/{BEFORE,AFTER,MASK}/S1_{before,after,mask}_<n>.png`, `OmbriaS2/…` likewise, and four later
events in `2021/<COUNTRY>/Sentinel{1,2}/{BEFORE,AFTER,MASK}/{imbefore,imafter,gt}_<n>.png`; 256 x 256 pixels as
published, any size here. Sentinel-1: VV, stretched to 8 bits **per patch**, so that absolute backscatter is lost.
Sentinel-2: B11, B8 and B3 in 8 bits; 5 % of the patches have black borders, which stay. Masks: 0 dry, 255 flooded, the
same for both sensors. The patches of test are of the same events as those of train; 2021 is the honest test.

How to get it: github.com/geodrak/OMBRIA. Contains modified Copernicus Sentinel data; masks of the Copernicus EMS.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from decur_core.data import modality
from decur_core.data.datasets import DataSet
from decur_core.data.modality import RGB
from decur_core.data.raster import MISSING, DataError, Reader, one_of, visible
from decur_core.data.sunrgbd import read_image
from decur_core.data.tasks import Masks, confusion, mean_iou

CLASSES = ("dry", "flooded")  # values 1 and 2 of masks; 0 would be unlabelled
EVENTS = ("albania", "france", "guyana", "timor")  # of 2021
SPLITS = {"train": ("train",), "test": ("test",), "2021": EVENTS, **{event: (event,) for event in EVENTS}}
_KEYS = [(sensor, part) for sensor in (1, 2) for part in ("BEFORE", "AFTER", "MASK")]
_LOOK = {"policy": modality.SAR.policy, "title": modality.SAR.title, "colour": modality.SAR.colour}
SAR = replace(RGB, name="sar", bands=("VV",), unit="8-bit backscatter, stretched per patch", **_LOOK)
OPTICAL = replace(RGB, name="optical", bands=("B11", "B8", "B3"), unit="8-bit reflectance", title="optical")


class Flood(Masks):
    """Masks of two classes, of which the second is scored: its IoU over a whole set, in which some pixels show it."""

    metric = "IoU of the flooded (%)"
    numbers = ("flood", "miou")

    def score(self, batches) -> dict:
        found = mean_iou(counts := confusion(batches, self.outputs))
        if not counts[1].any():
            raise DataError(f"no {self.classes[1]} pixel to score: none of the masks shows one")
        return found | {"flood": found["per_class"][1]}


def simple_rules(stores: Mapping) -> dict[str, dict[str, float]]:
    """IoU of the flooded in percent, by what needs no network, in some ``Store``: rule -> name of the store -> IoU.

    Every pixel; radar after the flood darker than a threshold; NDWI of the image after it, (B3 - B8) / (B3 + B8), above
    one. Thresholds are those that are best in the store ``train``.
    """
    values, flooded = {}, {}
    for part, store in stores.items():
        after = {m: np.stack([store.read(i, m, 1) for i in range(len(store))]) for m in store.shapes}
        b8, b3 = after["optical"][:, 1:].astype(float).swapaxes(0, 1)
        values[part] = {"dark radar": -after["sar"][:, 0].astype(float), "NDWI": (b3 - b8) / np.maximum(b3 + b8, 1)}
        flooded[part] = after["mask"][:, 0] == 1 + CLASSES.index("flooded")

    def iou(part: str, found: np.ndarray) -> float:
        return 100 * (found & flooded[part]).sum() / (found | flooded[part]).sum()

    rules = {"every pixel": {part: iou(part, np.ones_like(mask)) for part, mask in flooded.items()}}
    for rule, train in values["train"].items():
        limits = np.quantile(train, np.linspace(0.02, 0.98, 49))
        best = max(limits, key=lambda limit: iou("train", train > limit))
        rules[rule] = {part: iou(part, values[part][rule] > best) for part in stores}
    return rules


class Ombria(Reader):
    """SAR-optical pairs before and after a flood, with masks.

    `root` holds the tree; `split`: "train", "test", "2021" or one of its EVENTS; `missing` is about events, and patches
    of them, of which a file is not there.

    Items: {"id": such as "train/0001" or "france/12", "sar": uint8 (2, 1, H, W), "optical": uint8 (2, 3, H, W) of
    `OPTICAL.bands`, both before and after, "mask": uint8 (H, W), 1 dry, 2 flooded, index into CLASSES plus 1}.

    A DataError also for masks of the two sensors that are not the same.
    """

    def __init__(self, root: Path | str, split: str | None = None, *, missing: str = "error"):
        one_of([*SPLITS, None], split=split)
        one_of(MISSING, missing=missing)
        self.root, self._files, absent = Path(root), {}, []
        for event in SPLITS[split] if split else ("train", "test", *EVENTS):
            place = f"2021/{event.upper()}/Sentinel{{}}/{{}}" if event in EVENTS else f"OmbriaS{{}}/{event}/{{}}"
            folders = {key: self.root / place.format(*key) for key in _KEYS}
            files = {key: {p.stem.split("_")[-1]: p for p in visible(f, "*_*.png")} for key, f in folders.items()}
            numbers = sorted(filter(str.isdecimal, set().union(*files.values())), key=int)
            absent += [] if numbers else [f"no patch in {folders[_KEYS[0]]}"]
            for number in numbers:
                gone = [f"no {number} in {folders[key]}" for key in _KEYS if number not in files[key]]
                absent += gone[:1]
                self._files |= {} if gone else {f"{event}/{number}": {key: files[key][number] for key in _KEYS}}
        self.ids, self.left_out = list(self._files), {"absent": len(absent)}
        if absent and missing == "error" or not self.ids:
            state = f"{len(absent)} events or patches are not whole: {absent[0]}"
            raise DataError(f"{self.root}: {state}; complete it, or use what is there with missing='skip'")

    def __getitem__(self, i: int) -> dict:
        files, images = self._files[self.ids[i]], {}
        for (sensor, part), path in files.items():
            images[sensor, part] = image = _read(path, 3 if sensor == 2 and part != "MASK" else 1)
            if image.shape[1:] != (size := images[_KEYS[0]].shape[1:]):
                raise DataError(f"{path}: {image.shape[1:]} pixels, but {files[_KEYS[0]]} has {size}")
        mask, path = images[1, "MASK"][0], files[1, "MASK"]
        if not np.array_equal(mask, images[2, "MASK"][0]):
            raise DataError(f"{path}: not the mask of {files[2, 'MASK']}; take both as published")
        if not np.isin(mask, (0, 255)).all():
            raise DataError(f"{path}: values {np.unique(mask)[:5]}, expected 0 (dry) and 255 (flooded)")
        sar, optical = (np.stack([images[sensor, part] for part in ("BEFORE", "AFTER")]) for sensor in (1, 2))
        return {"id": self.ids[i], "sar": sar, "optical": optical, "mask": np.where(mask, 2, 1).astype(np.uint8)}


def _read(path: Path, bands: int) -> np.ndarray:
    """uint8 (bands, H, W); a grey image may come in three equal channels."""
    image = read_image(path, "L", "RGB")
    image = image[None] if image.ndim == 2 else image[:1] if bands == 1 and (image == image[:1]).all() else image
    if len(image) != bands:
        raise DataError(f"{path}: {len(image)} different channels, expected {bands}")
    return image


OMBRIA = DataSet(
    name="ombria",
    title="OMBRIA",
    pair="ombria",
    modalities=(SAR, OPTICAL),
    read=Ombria,
    splits=("train", "test", "2021"),
    pretrain="train",
    task=Flood(CLASSES),
    further=("2021",),
    seasons=(1,),  # after the flood
    samples=lambda folder, split: Ombria(folder / "ombria_half", split),
    world="decur_core.worlds.floods:FLOODS",
    cite="drakonakis2022ombria",
)
DATASETS = (OMBRIA,)

"""The miniature SAR-optical world as someone's own folders of images, for trying the way of own data."""

import csv
from pathlib import Path

import numpy as np

from decur_core.data.bigearthnet import CLASSES_19
from decur_core.data.modality import OPTICAL
from decur_core.worlds import Miniature
from decur_core.worlds.sar_optical import FACTORS, BigEarthNetWorld

BANDS = ("B2", "B3", "B4", "B8")  # of the camera
CLASSES = ("Arable land", "Pastures", "Coniferous forest", "Urban fabric", "Inland waters", "Marine waters")


class OwnWorld(BigEarthNetWorld):
    """Items as ``Folders`` reads them: {"id", "radar": float32 (2, H, W) dB, "camera": uint16 (4, H, W), "labels"}."""

    stream = 5

    def __init__(self, patches: int, *, tile: int = 36, seed: int = 0):
        super().__init__(patches, tile=tile, seed=seed)
        self.ids = [f"place{i:05d}" for i in range(patches)]
        self.labels = self.labels[:, [CLASSES_19.index(name) for name in CLASSES]]

    def __getitem__(self, i: int) -> dict:
        item = super().__getitem__(i)
        camera = np.rint(item["optical"][[OPTICAL.bands.index(band) for band in BANDS]]).astype(np.uint16)
        return {"id": item["id"], "radar": item["sar"], "camera": camera, "labels": item["labels"]}


def write_folders(root: Path | str, world: OwnWorld, parts: dict[str, range]) -> None:
    """A folder per sensor with an .npy per place, labels.csv and a list for each split."""
    root = Path(root)
    for name in ("radar", "camera"):
        (root / name).mkdir(parents=True)
    with open(root / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", *CLASSES])
        for split, part in parts.items():
            for i in part:
                item = world[i]
                for name in ("radar", "camera"):
                    np.save(root / name / f"{item['id']}.npy", item[name])
                rows.writerow([item["id"], *item["labels"].astype(int)])
            (root / f"{split}.txt").write_text("".join(f"{world.ids[i]}\n" for i in part))


OWN = Miniature(
    "drawn world of radar and a camera, in folders",
    make=lambda world, split, count: OwnWorld(count, tile=world.tile, seed=world.seed),
    splits={"train": "locations", "test": "test"},
    writer=write_folders,
    factors={name: {"sar": "radar", "optical": "camera"}.get(who, who) for name, who in FACTORS.items()},
)

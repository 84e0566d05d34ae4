"""The miniature SAR-optical world before and after a flood, as OMBRIA's patches."""

import numpy as np

from decur_core.data.modality import OPTICAL as BANDS
from decur_core.data.ombria import OPTICAL
from decur_core.worlds import Miniature
from decur_core.worlds.sar_optical import FACTORS, WATER, Layout, World, _lowest, _smooth


class FloodWorld(World):
    """Items as ``Ombria`` reads them; 5 to 45 % of a place are flooded, low land and not what was water before."""

    stream = 7

    def __init__(self, places: int, *, tile: int = 36, seed: int = 0):
        super().__init__(places, tile=tile, seasons=2, seed=seed)
        self.ids = [f"place{i:05d}" for i in range(places)]

    def _layouts(self, rng, f: dict[str, float]) -> list[Layout]:
        (before,) = super()._layouts(rng, f)
        low, water = _smooth(rng, (self.tile, self.tile), 3.0), before.cover == WATER
        flooded = _lowest(low + 100 * water, round(rng.uniform(0.05, 0.45) * (~water).sum()))
        after = before._replace(cover=np.where(flooded, WATER, before.cover), facing=before.facing & ~flooded)
        return [before, after, before, after]

    def __getitem__(self, i: int) -> dict:
        item, (before, after, *_) = super().__getitem__(i), self._layouts(*self._draw(i, 0))
        vv = item["sar"][:, :1]
        low, high = np.percentile(vv, (1, 99), axis=(1, 2, 3), keepdims=True)
        rows = [BANDS.bands.index(band) for band in OPTICAL.bands]
        images = {"sar": 255 * (vv - low) / (high - low), "optical": item["optical"][:, rows] * (255 / 10_000)}
        encoded = {name: np.rint(x).clip(0, 255).astype(np.uint8) for name, x in images.items()}
        return {"id": item["id"], **encoded, "mask": np.where(before.cover == after.cover, 1, 2).astype(np.uint8)}


FLOODS = Miniature(
    "drawn world of floods in radar and optical images",
    make=lambda world, split, count: FloodWorld(count, tile=world.tile, seed=world.seed),
    splits={"train": "train", "test": "test", "2021": "test"},
    factors=FACTORS,
)

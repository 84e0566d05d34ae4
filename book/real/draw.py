"""The real images that chapters 10 to 12 begin with: ``python book/real/draw.py SAMPLES`` writes the figures beside it.

Data are not part of this repository, and most runs draw their own: so these few images lie here. SAMPLES holds
``aerial_rgb_chm_bart`` and ``rgb_dem_rmnp``; OMBRIA and NYU Depth v2 are where the profiles ``ombria`` and ``nyu`` say.
"""

import sys
from pathlib import Path

import numpy as np
import rasterio
from rasterio.vrt import WarpedVRT

from decur_core import config
from decur_core.data import prepare
from decur_core.data.hha import depth_to_hha
from decur_core.report import pictures

FLOODS = ("albania/5", "albania/17", "france/40", "france/62", "guyana/8", "timor/3")
ROOMS = (20, 120, 310, 470, 560, 700)  # positions in the training split


def floods() -> list[dict]:
    reader, samples = prepare.reader(config.load("ombria"), "ombria", "2021"), []
    for name in FLOODS:
        item = reader[reader.ids.index(name)]
        grey = item["sar"][0].repeat(3, 0)  # before the flood; radar in grey, as in the chapter
        samples.append({"id": name.replace("/", " ").title(), "optical": item["optical"][0], "radar": grey})
    return samples


def rooms() -> list[dict]:
    reader, samples = prepare.pairs(config.load("nyu")), []
    for item in (reader[i] for i in ROOMS):
        hha = depth_to_hha(item["depth"][0], item["intrinsics"], item["gravity"]).transpose(2, 0, 1)
        samples.append(item | {"hha": hha})
    return samples


def places(samples: Path) -> list[dict]:
    """Three pieces of a clearing and three of a mountain range, heights on the grid of the photograph."""
    found = []
    for folder, image, heights, title, (top, left, side) in (
        ("aerial_rgb_chm_bart", "*image_crop.tif", "*CHM_crop.tif", "Bartlett", (92, 20, 368)),
        ("rgb_dem_rmnp", "*rgb.tif", "*dem.tif", "Rocky Mountains", (60, 100, 90)),
    ):
        (image,), (heights,) = ((samples / folder).glob(pattern) for pattern in (image, heights))
        with rasterio.open(image) as colour, rasterio.open(heights) as dem:
            grid = {"crs": colour.crs, "transform": colour.transform, "height": colour.height, "width": colour.width}
            with WarpedVRT(dem, **grid, resampling=rasterio.enums.Resampling.bilinear) as warped:
                rgb, metres = colour.read(), warped.read(1, masked=True).astype("float32").filled(np.nan)
        for k in range(3):
            part = np.s_[top : top + side, left + k * side : left + (k + 1) * side]
            found.append({"id": f"{title} {k + 1}", "rgb": rgb[(slice(None), *part)], "dem": metres[part][None]})
    return found


def save(samples: list[dict], kinds: list[str], name: str) -> None:
    made = pictures.scenes(samples, kinds)
    # At twice the width of the page's column; 256 shades of each colour need no more than this quality.
    made.savefig(Path(__file__).with_name(name), dpi=192, bbox_inches="tight", pil_kwargs={"quality": 85})


if __name__ == "__main__":
    save(floods(), ["optical", "radar"], "sar_optical.jpg")
    save(places(Path(sys.argv[1])), ["rgb", "dem"], "rgb_dem.jpg")
    save(rooms(), ["rgb", "depth", "hha"], "rgb_depth.jpg")

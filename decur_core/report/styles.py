"""How figures show things: names and colours, the same in all of them and in the tables; images; legends."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from decur_core.config import METHODS

# Okabe and Ito's palette, told apart by colour-blind readers.
STYLES = {
    "sar": ("SAR", "#0072B2"),
    "optical": ("optical", "#D55E00"),
    "rgb": ("RGB", "#D55E00"),
    "dem": ("elevation", "#0072B2"),
    "hha": ("depth", "#0072B2"),
    "both": ("both", "#444444"),
    "common": ("common", "#009E73"),
    "unique": ("unique", "#CC79A7"),
    "total": ("total", "#000000"),
    "intra1": ("intra-modal, first modality", "#0072B2"),
    "intra2": ("intra-modal, second modality", "#D55E00"),
    "random": (METHODS["random"], "#999999"),
    "supervised": (METHODS["supervised"], "#555555"),
    "simclr": (METHODS["simclr"], "#CC6677"),
    "clip": (METHODS["clip"], "#88CCEE"),
    "barlow_twins": (METHODS["barlow_twins"], "#E69F00"),
    "vicreg": (METHODS["vicreg"], "#117733"),
    "barlow_twins_single": (METHODS["barlow_twins_single"], "#DDCC77"),
    "decur": (METHODS["decur"], "#332288"),
}
# Of benchmarks; what is not listed has DeCUR's colour.
WAYS = {"published": "#999999", "tuned": "#DDAA33", "ours, gravity given": "#88CCEE"}
RGB = (3, 2, 1)  # rows of B4, B3, B2 among the 13 bands


def named(words: str) -> str:
    """``rgb, common`` as readers know it: every part between commas by its name in STYLES, where it has one."""
    return ", ".join(STYLES.get(word, (word,))[0] for word in words.split(", "))


def method_of(label: str) -> str | None:
    """The method that a run's label (``runs.label``) begins with, None for other texts."""
    found = [method for method, name in METHODS.items() if label == name or label.startswith(f"{name}, ")]
    return max(found, key=lambda method: len(METHODS[method]), default=None)


def stretch(image: np.ndarray, low: float = 2, high: float = 98) -> np.ndarray:
    """An image (C, H, W) as H x W x C in [0, 1], cut at two percentiles of all its pixels; for looking at."""
    bottom, top = np.percentile(image, (low, high))
    return np.clip((image - bottom) / max(top - bottom, 1e-6), 0, 1).transpose(1, 2, 0)


def picture(image: np.ndarray) -> np.ndarray:
    """An image of any modality (C x H x W, 0 to 1) as H x W x 3 to look at: true colour, or band 1 in grey."""
    if len(image) == 3:
        return image.transpose(1, 2, 0)
    shown = stretch(image[list(RGB)] if len(image) > 3 else image[:1], 1, 99)
    return shown if shown.shape[2] == 3 else shown.repeat(3, 2)


def plain_ticks(axis: Axes) -> None:
    """Plain numbers at the ticks of a logarithmic y axis; also between powers of ten where there are few of these."""
    low, high = axis.get_ylim()
    if 0 < high < 30 * low:
        locator = LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(5, steps=[1, 2, 5, 10])
        axis.yaxis.set_major_locator(locator)
        axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def legend(figure: Figure, handles: Iterable | None = None, *, columns: int = 4, side: str = "lower") -> None:
    """A legend outside the panels, where it covers nothing; of each label that they have, unless handles are given."""
    if handles is None:
        handles = {h.get_label(): h for axis in figure.axes for h in axis.get_legend_handles_labels()[0]}.values()
    handles = list(handles)
    options = {"loc": f"outside {side} center", "ncols": min(columns, len(handles)), "fontsize": 7, "frameon": False}
    figure.legend(handles=handles, **options)

"""How figures and tables show things: names and colours, the same everywhere; panels, ticks and legends."""

import zlib
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from decur_core.data import datasets
from decur_core.data.modality import Modality
from decur_core.losses import METHODS

# Of methods and of kinds of dimensions, told apart by colour-blind readers; modalities declare their own.
COLOURS = {
    "both": "#444444",
    "total": "#000000",
    "common": "#009E73",
    "unique": "#CC79A7",
    "rest": "#CC79A7",
    "random": "#999999",
    "supervised": "#555555",
    "simclr": "#CC6677",
    "clip": "#88CCEE",
    "barlow_twins": "#E69F00",
    "vicreg": "#117733",
    "barlow_twins_single": "#DDCC77",
    "decur": "#332288",
}
# Of benchmarks; what is not listed has DeCUR's colour.
WAYS = {"published": "#999999", "tuned": "#DDAA33", "ours, gravity given": "#88CCEE"}
WIDEST = 7  # inches of a figure: the column of a page in a window of 1280 px, where 7 points are then 9 px
TERMS = {"intra": "intra-modal", "anchor": "anchors"}  # loss terms of one modality, `intra/sar`


def modalities() -> dict[str, Modality]:
    """Every modality that a data set declares, by name, in the order of the data sets."""
    found: dict[str, Modality] = {}
    for m in (m for name in datasets.names() for m in datasets.find(name).modalities):
        found.setdefault(m.name, m)
    return found


def title(name: str) -> str:
    """What readers call a method, modalities (``sar+optical``, ``sar before``, ``sar, common``) or a loss term."""
    if ", " in name:
        return ", ".join(map(title, name.split(", ")))
    head, _, rest = name.partition(" ")
    if rest and head in modalities():
        return f"{title(head)} {rest}"
    head, _, rest = name.partition("/")
    if rest:
        return f"{TERMS.get(head, head)}, {title(rest)}"
    if "+" in name:
        return " + ".join(map(title, name.split("+")))
    found = METHODS.get(name) or modalities().get(name)
    return found.title or name if found else name


def given(inputs: str, kinds: Iterable[str]) -> str:
    """The title of what a network is given, among the ``kinds`` of a task: both of more than two sensors are all."""
    return "all sensors" if inputs == "both" and any("+" in kind for kind in kinds) else title(inputs)


def colour(name: str) -> str:
    """Of a method, a modality, a loss term or a kind of dimensions; one that nobody chose has always the same."""
    head, _, rest = name.partition("/")
    if rest:
        return COLOURS.get(head) or colour(rest)
    declared = COLOURS.get(name) or getattr(modalities().get(name), "colour", "")
    return declared or plt.matplotlib.colors.to_hex(plt.get_cmap("tab10")(zlib.crc32(name.encode()) % 10))


def rank(method: str) -> tuple[int, str]:
    """Place of a method in the order of the paper's tables; others come last."""
    return [*METHODS].index(method) if method in METHODS else len(METHODS), method


def method_of(label: str) -> str | None:
    """The method that a run's label (``folders.label``) begins with, None for other texts."""
    found = [name for name, m in METHODS.items() if label == m.title or label.startswith(f"{m.title}, ")]
    return max(found, key=lambda name: len(METHODS[name].title), default=None)


def figure(rows: int, columns: int, *, width: float = WIDEST, height: float, **options) -> tuple[Figure, np.ndarray]:
    made = plt.figure(figsize=(min(width, WIDEST), height), dpi=96, layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **options)
    plt.close(made)  # a notebook shows it once: as the value of its cell
    return made, axes


def grid(count: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[plt.Axes]]:
    """``count`` panels of ``width`` x ``height`` inches in rows of at most ``columns``."""
    columns = max(1, min(count, columns))
    rows = max(1, -(-count // columns))
    made, axes = figure(rows, columns, height=height * rows, width=max(4.5, width * columns + 0.4))
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return made, list(axes.flat[:count])


def plain_ticks(axis: Axes) -> None:
    """Plain numbers at the ticks of a logarithmic y axis; also between powers of ten where there are few of these."""
    low, high = axis.get_ylim()
    if 0 < high < 30 * low:
        locator = LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(5, steps=[1, 2, 5, 10])
        axis.yaxis.set_major_locator(locator)
        axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def legend(made: Figure, handles: Iterable | None = None, *, columns: int = 4, side: str = "lower") -> None:
    """A legend outside the panels, where it covers nothing; of each label that they have, unless handles are given."""
    if handles is None:
        handles = {h.get_label(): h for axis in made.axes for h in axis.get_legend_handles_labels()[0]}.values()
    handles = list(handles)
    longest = max((len(h.get_label()) for h in handles), default=0) + 8  # in letters, of which an inch has about 16
    columns = max(1, min(columns, len(handles), int(16 * made.get_figwidth() / longest)))
    made.legend(handles=handles, loc=f"outside {side} center", ncols=columns, fontsize=7, frameon=False)

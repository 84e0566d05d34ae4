"""Images to look at, of any modality: three bands as colours, others with named colour bands in true colour, the rest
in grey. Arrays in, a matplotlib Figure out.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from decur_core.data.modality import Modality
from decur_core.report.styles import WIDEST, figure, legend, modalities, title

COLOURS = (("red", "green", "blue"), ("B4", "B3", "B2"))  # names of bands that make a picture
LABELS = ("mask", "predicted")  # classes of pixels in a reader's item
# Of classes whose names bring a colour to mind; the others have those of a list.
NATURAL = {"water": "#4E9BD6", "flooded": "#4E9BD6", "dry": "#D9CFB8", "forest": "#2F7D4F", "grassland": "#A6D96A"}


def chosen(bands: Sequence[str]) -> list[int]:
    """Which bands make a picture: red, green and blue if they are there, or three of three, else the first in grey."""
    for names in COLOURS:
        if set(names) <= set(bands):
            return [bands.index(name) for name in names]
    return [0, 1, 2] if len(bands) == 3 else [0]


def stretch(image: np.ndarray, low: float = 2, high: float = 98) -> np.ndarray:
    """An image (C, H, W) as H x W x C in [0, 1], cut at two percentiles of all its pixels; for looking at."""
    bottom, top = np.percentile(image, (low, high))
    made = np.clip((image - bottom) / max(top - bottom, 1e-6), 0, 1).transpose(1, 2, 0)
    return made if len(image) < 3 else made**0.7  # colours as a screen shows them: a cloud leaves the ground dark


def picture(image: np.ndarray, name: str = "") -> np.ndarray:
    """An image of a modality (C x H x W, 0 to 1, or bytes) as H x W x 3: colours, or the first band in grey."""
    if len(image) == 3:
        return image.transpose(1, 2, 0)
    m = modalities().get(name)
    found = stretch(image[chosen(m.bands) if m and len(m.bands) == len(image) else [0]], 1, 99)
    return found if found.shape[2] == 3 else found.repeat(3, 2)


def _mosaic(rows: Sequence[Sequence[tuple]], labels: Sequence[str], *, width: float, cmap="gray"):
    """A figure of rows of (image H x W (x 3), title), at most ``width`` inches wide each, and its axes."""
    width = min(width, (WIDEST - 0.2) / len(rows[0]))
    lines = [len(row[0][1].split("\n")) if row[0][1] else 0 for row in rows]
    heights = [0.05 + 0.2 * n + width * np.divide(*row[0][0].shape[:2]) for n, row in zip(lines, rows, strict=True)]
    made, axes = figure(len(rows), len(rows[0]), height=sum(heights) + 0.2, width=max(4.5, width * len(rows[0]) + 0.2))
    for line, row, label in zip(axes, rows, labels, strict=True):
        for axis, (image, text) in zip(line, row, strict=True):
            axis.imshow(image, interpolation="nearest", cmap=cmap)
            axis.set_title(text, fontsize=8)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=8)
    return made, axes


def _sensors(sample: Mapping) -> list[Modality]:
    """The modalities of a reader's item, colours first."""
    if found := [m for name, m in modalities().items() if name in sample]:
        return sorted(found, key=lambda m: -len(chosen(m.bands)))
    raise ValueError(f"no known modality among {', '.join(sample)}; known: {', '.join(modalities())}")


def pairs(samples: Sequence[dict], *, season: int = 0) -> Figure:
    """One column per sample: of each modality a row in (true) colour, or a row per band in grey with its range.

    ``samples``: items of a reader, arrays (seasons x) bands x H x W in physical units by modality.
    """
    rows, labels = [], []
    for m in _sensors(samples[0]):
        images = [s[m.name][season] if s[m.name].ndim == 4 else s[m.name] for s in samples]
        if len(several := chosen(m.bands)) == 3:
            rows.append([(picture(x) if m.scheme == "bytes" else stretch(x[several]), "") for x in images])
            labels.append(" ".join(m.bands[k] for k in several))
            continue
        for k, band in enumerate(m.bands):
            ends = [np.round(np.percentile(x[k], (2, 98))) + 0.0 for x in images]
            texts = [f"{low:.0f} to {high:.0f} {_unit(m)}".strip() for low, high in ends]
            rows.append([(stretch(x[k : k + 1]), text) for x, text in zip(images, texts, strict=True)])
            labels.append(band)
    names = [str(s["id"]).split("/")[-1] for s in samples]
    rows[0] = [(x, f"{name}\n{text}".strip()) for name, (x, text) in zip(names, rows[0], strict=True)]
    return _mosaic(rows, labels, width=1.5)[0]


def _unit(m: Modality | None) -> str:
    """A modality's unit in one word, or none if it has none; metres where it is not known, as of depth."""
    return " ".join(m.unit.split()[-1:]).replace("metres", "m") if m else "m"


def scenes(samples: Sequence[dict], kinds: Sequence[str], *, classes: Sequence[str] = ()) -> Figure:
    """A column per sample, a row per kind of image: three bands or more in colour, ``mask`` and ``predicted`` in one
    colour per class, with a legend, others on a scale of their own (8 bit: without its range).

    ``samples``: items of a reader or store, C x H x W; ``classes``: names of the mask's values, unlabelled first.
    """
    listed = (*plt.get_cmap("tab20").colors, *plt.get_cmap("tab20b").colors)
    colours = np.array([(0, 0, 0), *7 * listed])  # of all values of a byte: from the 41st class on they come again
    for k, name in enumerate(classes):
        colours[k] = to_rgb(NATURAL.get(name, colours[k]))

    def cell(kind: str, image: np.ndarray) -> tuple:
        if kind in LABELS:
            return colours[image], ""
        if len(image) > 2:
            return picture(image, kind), ""
        band = np.where(image[0] == 0, np.nan, image[0]) if kind == "depth" else image[0]  # 0: not measured
        m = modalities().get(kind.partition(" ")[0])  # "sar before"
        text = "" if band.dtype == np.uint8 else f"{np.nanmin(band):.1f} to {np.nanmax(band):.1f} {_unit(m)}"
        return (band if _unit(m) == "m" else picture(image)), text  # heights in colours, radar in grey

    rows = [[cell(kind, s[kind]) for s in samples] for kind in kinds]
    names = [str(s["id"]).split("/")[-1] for s in samples]
    rows[0] = [(image, text or name) for name, (image, text) in zip(names, rows[0], strict=True)]
    made, _ = _mosaic(rows, [title(kind) for kind in kinds], width=1.6, cmap="cividis")
    seen = sorted({k for s in samples for kind in kinds if kind in LABELS for k in np.unique(s[kind]).tolist()})
    if seen and classes:
        legend(made, [Patch(color=colours[k], label=classes[k].replace("$", r"\$")) for k in seen])
    return made


def seasons(sample: dict) -> Figure:
    """All seasons of one location, a row per modality, in colour or the first band, with acquisition dates if known."""
    rows = []
    for m in _sensors(sample):
        several, images = chosen(m.bands), sample[m.name]
        label = title(m.name) if len(several) == 3 or len(m.bands) == 1 else f"{title(m.name)} {m.bands[0]}"
        dates = sample.get("dates", {}).get(m.name) or [f"season {k + 1}" for k in range(len(images))]
        rows.append([(stretch(x[several]), f"{label} {date[:15]}") for x, date in zip(images, dates, strict=True)])
    return _mosaic(rows, [""] * len(rows), width=2.2)[0]


def bands(image: np.ndarray, names: Sequence[str], unit: str) -> Figure:
    """Each band of one image (C x H x W) on its own grey scale, with its mean in ``unit``."""
    cells = [(stretch(b[None]), f"{name}\nmean {b.mean():.4g}") for b, name in zip(image, names, strict=True)]
    columns = min(5, len(cells))
    cells += [(np.ones((*image.shape[1:], 3)), "")] * (-len(cells) % columns)
    rows = [cells[k : k + columns] for k in range(0, len(cells), columns)]
    made, axes = _mosaic(rows, [""] * len(rows), width=1.8)
    for axis in axes.flat:
        axis.set_axis_off()
    made.suptitle(unit, fontsize=9)
    return made


def views(rows: dict[str, np.ndarray]) -> Figure:
    """Augmented views: one row per entry, images N x C x H x W in [0, 1], in colour where they have any."""
    cells = [[(picture(x, name), "") for x in images] for name, images in rows.items()]
    return _mosaic(cells, [title(name) for name in rows], width=1.2)[0]


def saliency(rows: Sequence[dict[str, np.ndarray]], columns: Sequence[str]) -> Figure:
    """Images with saliency maps over them, a row per pair (Fig. 4b, 10).

    ``rows``: name -> C x H x W image, or (image, H x W map); ``columns``: which of the names, in order. A map of one
    value is not drawn but marked as empty.
    """
    pairs = [[row[n] if isinstance(row[n], tuple) else (row[n], None) for n in columns] for row in rows]
    cells = [[(picture(x, n.split(", ")[0]), "") for (x, _), n in zip(row, columns, strict=True)] for row in pairs]
    cells[0] = [(x, title(n).replace(", ", ",\n")) for (x, _), n in zip(cells[0], columns, strict=True)]
    made, axes = _mosaic(cells, [""] * len(rows), width=1.5)
    for axis, (_, heat) in zip(axes.flat, (cell for row in pairs for cell in row), strict=True):
        if heat is not None and np.ptp(heat) == 0:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
            axis.text(0.5, 0.5, "empty", ha="center", va="center", fontsize=8, transform=axis.transAxes, bbox=box)
        elif heat is not None:
            axis.imshow(heat, cmap="inferno", alpha=0.55, interpolation="bilinear")
    return made

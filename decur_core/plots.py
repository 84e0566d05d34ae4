"""Every figure of the book: arrays in, a matplotlib Figure out. Nothing is computed here that a record should hold."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .data.bigearthnet import CLASSES_19

# Name and colour of everything, the same in all figures (Okabe and Ito's palette, told apart by colour-blind readers).
STYLES = {
    "sar": ("SAR", "#0072B2"),
    "optical": ("optical", "#D55E00"),
    "both": ("SAR + optical", "#444444"),
    "common": ("common", "#009E73"),
    "unique": ("unique", "#CC79A7"),
    "total": ("total", "#000000"),
    "intra1": ("intra-modal SAR", "#0072B2"),
    "intra2": ("intra-modal optical", "#D55E00"),
    "decur": ("DeCUR", "#332288"),
    "barlow_twins": ("Barlow Twins (cross-modal)", "#E69F00"),
    "random": ("random initialisation", "#999999"),
}
ABOVE = {"fontsize": 7, "loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}  # of a legend
RGB = (3, 2, 1)  # rows of B4, B3, B2 among the 13 bands


def _figure(rows: int, columns: int, *, width: float = 9, height: float, **options) -> tuple[Figure, np.ndarray]:
    figure = plt.figure(figsize=(width, height), dpi=90, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    plt.close(figure)  # a notebook shows it once: as the value of its cell
    return figure, axes


def stretch(image: np.ndarray, low: float = 2, high: float = 98) -> np.ndarray:
    """An image (C, H, W) as H x W x C in [0, 1], cut at two percentiles of all its pixels; for looking at."""
    bottom, top = np.percentile(image, (low, high))
    return np.clip((image - bottom) / max(top - bottom, 1e-6), 0, 1).transpose(1, 2, 0)


def _show(axis, image: np.ndarray, title: str = "", **options) -> None:
    axis.imshow(image, interpolation="nearest", **options)
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])


def _classes(labels: Sequence[str], *, height: float) -> tuple[Figure, plt.Axes]:
    """A panel for bars that lie, one row per class, the first on top."""
    figure, axes = _figure(1, 1, height=height, width=8)
    axes[0, 0].set_yticks(range(len(labels)), labels, fontsize=7)
    axes[0, 0].invert_yaxis()
    return figure, axes[0, 0]


def pairs(samples: Sequence[dict], *, season: int = 0) -> Figure:
    """One column per sample: the optical image in true colour above, VV and VH in dB below.

    ``samples``: items of a reader with seasons (``optical`` S x 13 x H x W, ``sar`` S x 2 x H x W).
    """
    figure, axes = _figure(3, len(samples), height=5.2, width=max(4.5, 1.5 * len(samples)))
    for column, sample in zip(axes.T, samples, strict=True):
        _show(column[0], stretch(sample["optical"][season][list(RGB)]), str(sample["id"]).split("/")[-1])
        for row, name in enumerate(("VV", "VH")):
            _show(column[1 + row], stretch(sample["sar"][season][row : row + 1]), cmap="gray")
            if column is axes.T[0]:
                column[1 + row].set_ylabel(f"{name} (dB)", fontsize=8)
    axes[0, 0].set_ylabel("B4 B3 B2", fontsize=8)
    return figure


def seasons(sample: dict) -> Figure:
    """All seasons of one location: optical in true colour above, VV below, titled with acquisition dates if known."""
    n = len(sample["sar"])
    figure, axes = _figure(2, n, height=4.4, width=max(4.5, 2.2 * n))
    dates = {name: sample["dates"].get(name, ["(no date given)"] * n) for name in ("optical", "sar")}
    for s in range(n):
        _show(axes[0, s], stretch(sample["optical"][s][list(RGB)]), f"optical {dates['optical'][s][:15]}")
        _show(axes[1, s], stretch(sample["sar"][s][:1]), f"SAR VV {dates['sar'][s][:15]}", cmap="gray")
    return figure


def bands(image: np.ndarray, names: Sequence[str], unit: str) -> Figure:
    """Each band of one image (C x H x W) on its own grey scale, with its mean in ``unit``."""
    columns = 5
    rows = -(-len(names) // columns)
    figure, axes = _figure(rows, columns, height=2.0 * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, band, name in zip(axes.flat, image, names, strict=False):
        _show(axis, stretch(band[None]), f"{name}: mean {band.mean():.4g}", cmap="gray")
    figure.suptitle(unit, fontsize=9)
    return figure


def histograms(values: dict[str, np.ndarray], *, unit: str, bins: int = 64) -> Figure:
    """Distribution of 8-bit values (or others) per modality: one panel per entry, all bands of it as lines."""
    figure, axes = _figure(1, len(values), height=2.8)
    for axis, (name, images) in zip(axes.flat, values.items(), strict=True):
        for band in np.moveaxis(images, -3, 0):
            counts, edges = np.histogram(band, bins=bins)
            axis.plot((edges[:-1] + edges[1:]) / 2, counts / counts.sum(), color=STYLES[name][1], alpha=0.5, lw=1)
        axis.set(title=STYLES[name][0], xlabel=unit, ylabel="share of pixels")
    return figure


def views(rows: dict[str, np.ndarray]) -> Figure:
    """Augmented views: one row per entry, images N x C x H x W in [0, 1]; 13 channels are shown as true colour."""
    n = max(len(v) for v in rows.values())
    figure, axes = _figure(len(rows), n, height=1.25 * len(rows), width=1.2 * n + 0.6)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            colour = len(image) > 3
            picture = stretch(image[list(RGB)] if colour else image[:1], 1, 99)
            _show(axis, picture, cmap=None if colour else "gray")
        line[0].set_ylabel(name, fontsize=8)
    return figure


def correlation(matrices: dict[str, np.ndarray], *, dim_common: int | None = None) -> Figure:
    """Cross-correlation matrices (K x K, values -1 to 1) side by side; lines mark where the unique dimensions begin."""
    figure, axes = _figure(1, len(matrices), height=3.4, width=min(3.2 * len(matrices) + 0.8, 12))
    for axis, (name, c) in zip(axes.flat, matrices.items(), strict=True):
        shown = axis.imshow(c, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("dimension j", fontsize=8)
        if dim_common is not None:
            for line in (axis.axhline, axis.axvline):
                line(dim_common - 0.5, color="black", lw=0.8, ls="--")
    axes[0, 0].set_ylabel("dimension i", fontsize=8)
    figure.colorbar(shown, ax=axes.ravel().tolist(), label="C$_{ij}$", shrink=0.8)
    return figure


def history(runs: dict[str, Sequence[dict]], *, smooth: int = 1) -> Figure:
    """Every loss term over the steps, one panel per run; ``smooth``: steps averaged for the thick line."""
    figure, axes = _figure(1, len(runs), height=3.2, width=max(5, 4.2 * len(runs)))
    for axis, (title, lines) in zip(axes.flat, runs.items(), strict=True):
        steps = [line["step"] for line in lines]
        for name in ("total", "common", "unique", "intra1", "intra2"):
            if lines and name in lines[0]:
                values, (label, color) = [line[name] for line in lines], STYLES[name]
                axis.plot(steps, values, color=color, lw=0.5, alpha=0.35)
                width = min(smooth, len(values))
                mean = np.convolve(values, np.ones(width) / width, mode="valid")
                axis.plot(steps[width - 1 :], mean, color=color, lw=1.5, label=label)
        axis.set(title=title, xlabel="step", ylabel="loss (sum over dimensions)", yscale="log")
        axis.legend(fontsize=7)
    return figure


def learning_rate(lines: Sequence[dict]) -> Figure:
    """The learning rate of the weights over the steps of one run."""
    figure, ((axis,),) = _figure(1, 1, height=2.4, width=5)
    axis.plot([x["step"] for x in lines], [x["learning_rate"] for x in lines], color="black")
    axis.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def scores(rows: Sequence[dict], *, reference: float | None = None) -> Figure:
    """mAP micro, a panel per kind of input, a bar per method, whiskers for the deviation over seeds.

    ``rows``: of ``results.summary``; ``reference``: mAP of guessing, drawn as a dotted line.
    """
    panels = list(dict.fromkeys(r["inputs"] for r in rows))
    groups = list(dict.fromkeys((r["fraction"], r["protocol"]) for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = _figure(len(panels), 1, height=2 * len(panels) + 0.8, width=7, sharex=True, sharey=True)
    width = 0.8 / max(1, len(methods))
    for axis, inputs in zip(axes.flat, panels, strict=True):
        for k, method in enumerate(methods):
            found = {
                groups.index((r["fraction"], r["protocol"])): r
                for r in rows
                if r["method"] == method and r["inputs"] == inputs
            }
            at = [i + (k - (len(methods) - 1) / 2) * width for i in found]
            spread, (label, color) = [r["deviation"] or 0 for r in found.values()], STYLES[method]
            axis.bar(at, [r["mean"] for r in found.values()], width, yerr=spread, color=color, label=label, capsize=2)
        if reference is not None:
            axis.axhline(reference, color="black", ls=":", lw=1, label="guessing")
        axis.set_title(STYLES[inputs][0], fontsize=9, loc="right")
        axis.set_ylabel("mAP micro (%)", fontsize=8)
    axis.set_xticks(range(len(groups)), [f"{p}\n{100 * f:g} % labels" for f, p in groups], fontsize=8)
    axes[0, 0].legend(ncols=4, **ABOVE)
    return figure


def per_class(rows: dict[str, Sequence[float | None]]) -> Figure:
    """Average precision of each of the 19 classes that occurs, a bar per method."""
    kept = [i for i in range(len(CLASSES_19)) if any(v[i] is not None for v in rows.values())]
    figure, axis = _classes([CLASSES_19[i] for i in kept], height=0.42 * len(kept) + 1)
    height = 0.8 / len(rows)
    for k, (method, values) in enumerate(rows.items()):
        at, (label, color) = np.arange(len(kept)) + (k + 0.5) * height - 0.4, STYLES[method]
        axis.barh(at, [values[i] or 0 for i in kept], height, color=color, label=label)
    axis.set_xlabel("average precision (%)")
    axis.legend(ncols=3, **ABOVE)
    return figure


def prevalence(labels: np.ndarray) -> Figure:
    """Share of patches that carry each of the 19 classes; ``labels``: N x 19 of 0 and 1."""
    figure, axis = _classes(CLASSES_19, height=4.2)
    axis.barh(range(len(CLASSES_19)), 100 * labels.mean(0), color=STYLES["both"][1])
    axis.set_xlabel("share of patches (%)")
    return figure

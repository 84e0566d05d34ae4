"""Every figure of the book: arrays in, a matplotlib Figure out. Nothing is computed here that a record should hold."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from decur_core.config import METHODS, MODALITIES
from decur_core.data.bigearthnet import CLASSES_19
from decur_core.data.modality import OPTICAL, SAR
from decur_core.report.styles import RGB, STYLES, WAYS, legend, method_of, named, picture, plain_ticks, stretch


def _figure(rows: int, columns: int, *, width: float = 9, height: float, **options) -> tuple[Figure, np.ndarray]:
    figure = plt.figure(figsize=(width, height), dpi=90, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    plt.close(figure)  # a notebook shows it once: as the value of its cell
    return figure, axes


def _grid(count: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[plt.Axes]]:
    """``count`` panels of ``width`` x ``height`` inches in rows of at most ``columns``."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure, axes = _figure(rows, columns, height=height * rows, width=max(4.5, width * columns + 0.4))
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


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
    """One column per sample: the optical image in true colour above, VV and VH below with the dB from black to white.

    ``samples``: items of a reader with seasons (``optical`` S x 13 x H x W, ``sar`` S x 2 x H x W).
    """
    figure, axes = _figure(3, len(samples), height=5.2, width=max(4.5, 1.5 * len(samples)))
    for column, sample in zip(axes.T, samples, strict=True):
        _show(column[0], stretch(sample["optical"][season][list(RGB)]), str(sample["id"]).split("/")[-1])
        for row in range(2):
            band = sample["sar"][season][row : row + 1]
            low, high = np.percentile(band, (2, 98))
            _show(column[1 + row], stretch(band), f"{round(low)} to {round(high)} dB", cmap="gray")
    for axis, name in zip(axes[:, 0], ("B4 B3 B2", "VV", "VH"), strict=True):
        axis.set_ylabel(name, fontsize=8)
    return figure


def scenes(samples: Sequence[dict], kinds: Sequence[str], *, classes: Sequence[str] = ()) -> Figure:
    """A column per sample, a row per kind of image: ``rgb`` and ``hha`` as colours, ``dem`` and ``depth`` on a scale
    of metres of their own (8 bit: without), ``mask`` and ``predicted`` in one colour per class, with a legend.

    ``samples``: items of an RGB-DEM or RGB-depth reader; ``classes``: names of the mask's values, unlabelled first.
    """
    figure, axes = _figure(len(kinds), len(samples), height=1.6 * len(kinds) + 0.4, width=max(4.5, 1.6 * len(samples)))
    colours = np.vstack([(0, 0, 0), plt.get_cmap("tab20").colors, plt.get_cmap("tab20b").colors])
    seen: set[int] = set()
    for column, sample in zip(axes.T, samples, strict=True):
        for axis, kind in zip(column, kinds, strict=True):
            image = sample[kind]
            if kind in ("rgb", "hha"):
                _show(axis, image.transpose(1, 2, 0), str(sample["id"]).split("/")[-1] if axis is column[0] else "")
            elif kind in ("mask", "predicted"):
                _show(axis, colours[image])
                seen |= set(np.unique(image).tolist())
            else:
                metres = np.where(image[0] == 0, np.nan, image[0]) if "depth" in kind else image[0]
                title = "" if metres.dtype == np.uint8 else f"{np.nanmin(metres):.1f} to {np.nanmax(metres):.1f} m"
                _show(axis, metres, title, cmap="cividis")
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        axis.set_ylabel(named(kind), fontsize=8)
    if seen and classes:
        legend(figure, [Patch(color=colours[k], label=classes[k]) for k in sorted(seen)], columns=6)
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
    rows = -(-len(names) // 5)
    figure, axes = _figure(rows, 5, height=2.0 * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, band, name in zip(axes.flat, image, names, strict=False):
        _show(axis, stretch(band[None]), f"{name}: mean {band.mean():.4g}", cmap="gray")
    figure.suptitle(unit, fontsize=9)
    return figure


def histograms(values: dict[str, np.ndarray], *, unit: str, bins: int = 64) -> Figure:
    """Distribution of 8-bit values (or others) per modality, logarithmic: a panel per entry, a line per band.

    All bands of a panel have the same bins, of whole numbers for integers; colours follow the bands' wavelengths.
    """
    figure, axes = _figure(1, len(values), height=3.2)
    for axis, (name, images) in zip(axes.flat, values.items(), strict=True):
        whole, low, high = np.issubdtype(images.dtype, np.integer), float(images.min()), float(images.max())
        step = -(-(high - low + 1) // bins) if whole else max(high - low, 1e-9) / bins
        edges = low - whole / 2 + step * np.arange(np.ceil((high - low + whole) / step) + 1)
        count = images.shape[-3]
        known = {"sar": SAR.bands, "optical": OPTICAL.bands}.get(name, ())
        names = known if len(known) == count else [f"band {k + 1}" for k in range(count)]
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, count)) if count > 1 else [STYLES[name][1]]
        for band, label, colour in zip(np.moveaxis(images, -3, 0), names, colours, strict=True):
            share = np.histogram(band, bins=edges)[0] / band.size
            axis.plot((edges[:-1] + edges[1:]) / 2, np.where(share > 0, share, np.nan), color=colour, lw=1, label=label)
        axis.set(title=STYLES[name][0], xlabel=unit, ylabel="share of pixels", yscale="log")
        plain_ticks(axis)
        if count > 1:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=7, fontsize=7, frameon=False)
    return figure


def views(rows: dict[str, np.ndarray]) -> Figure:
    """Augmented views: one row per entry, images N x C x H x W in [0, 1]; 3 and 13 channels are shown as colours."""
    n = max(len(v) for v in rows.values())
    figure, axes = _figure(len(rows), n, height=1.25 * len(rows), width=1.2 * n + 0.6)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            _show(axis, picture(image))
        line[0].set_ylabel(named(name), fontsize=8)
    return figure


def correlation(matrices: dict[str, np.ndarray], *, dim_common: int | None = None) -> Figure:
    """Cross-correlation matrices (K x K, values -1 to 1) side by side; lines mark where the unique dimensions begin.

    A matrix whose name is the label of a run of another method than DeCUR has none, and no lines.
    """
    figure, axes = _grid(len(matrices), 4, width=2.3, height=2.6)
    for axis, (name, c) in zip(axes, matrices.items(), strict=True):
        shown = axis.imshow(c, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axis.set_title(textwrap.fill(name, 24), fontsize=8)
        axis.set_xlabel("dimension j", fontsize=8)
        if dim_common is not None and method_of(name) in (None, "decur"):
            for line in (axis.axhline, axis.axvline):
                line(dim_common - 0.5, color="black", lw=0.8, ls="--")
    axes[0].set_ylabel("dimension i", fontsize=8)
    figure.colorbar(shown, ax=axes, label="C$_{ij}$", shrink=0.8)
    return figure


def history(runs: dict[str, Sequence[dict]], *, smooth: int = 1) -> Figure:
    """Every loss term over the steps, one panel per run; ``smooth``: steps averaged for the thick line.

    The scale is logarithmic, its ticks are written out.
    """
    figure, axes = _grid(len(runs), 2, width=3.6, height=2.6 + 0.6 / max(1, len(runs)))
    for axis, (title, lines) in zip(axes, runs.items(), strict=True):
        steps = [line["step"] for line in lines]
        for name in ("total", "common", "unique", "intra1", "intra2"):
            if lines and name in lines[0]:
                values, (label, color) = [line[name] for line in lines], STYLES[name]
                axis.plot(steps, values, color=color, lw=0.5, alpha=0.35)
                width = min(smooth, len(values))
                mean = np.convolve(values, np.ones(width) / width, mode="valid")
                axis.plot(steps[width - 1 :], mean, color=color, lw=1.5, label=label)
        axis.set(xlabel="step", ylabel="loss", yscale="log")
        axis.set_title(textwrap.fill(title, 32), fontsize=9)
        plain_ticks(axis)
    legend(figure, columns=3 if len(runs) > 1 else 2)
    return figure


def learning_rate(lines: Sequence[dict]) -> Figure:
    """The learning rate of the weights over the steps of one run."""
    figure, ((axis,),) = _figure(1, 1, height=2.4, width=5)
    axis.plot([x["step"] for x in lines], [x["learning_rate"] for x in lines], color="black")
    axis.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def scores(rows: Sequence[dict], *, reference: float | None = None, unit: str = "mAP micro (%)") -> Figure:
    """Mean scores, a panel per kind of input, a bar per method, whiskers for the deviation over seeds.

    ``rows``: of ``results.summary``; ``reference``: score of guessing, drawn as a dotted line.
    """
    panels = list(dict.fromkeys(r["inputs"] for r in rows))
    groups = list(dict.fromkeys((r["fraction"], r["protocol"]) for r in rows))
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    figure, axes = _figure(len(panels), 1, height=2 * len(panels) + 0.8, width=7, sharex=True, sharey=True)
    width = 0.8 / max(1, len(methods))
    offset = {method: (k - (len(methods) - 1) / 2) * width for k, method in enumerate(methods)}
    for r in rows:
        at = groups.index((r["fraction"], r["protocol"])) + offset[r["method"]]
        axis, (_, color) = axes[panels.index(r["inputs"]), 0], STYLES[r["method"]]
        axis.bar(at, r["mean"], width, yerr=r["deviation"] or 0, color=color, capsize=2)
    handles = [Patch(color=color, label=label) for label, color in map(STYLES.get, methods)]
    for axis, inputs in zip(axes.flat, panels, strict=True):
        axis.set_title(STYLES[inputs][0], fontsize=9, loc="left")
        axis.set_ylabel(unit, fontsize=8)
    if reference is not None:
        guessing = [axis.axhline(reference, color="black", ls=":", lw=1, label="guessing") for axis in axes.flat]
        handles.append(guessing[0])
    axis.set_xticks(range(len(groups)), [f"{p}\n{100 * f:g} % labels" for f, p in groups], fontsize=8)
    legend(figure, handles, side="upper")
    return figure


def per_class(
    rows: dict[str, Sequence[float | None]],
    *,
    classes: Sequence[str] = CLASSES_19,
    unit: str = "average precision (%)",
) -> Figure:
    """Score of each class that occurs, a bar per method; the 19 classes of BigEarthNet unless others are given."""
    kept = [i for i in range(len(classes)) if any(v[i] is not None for v in rows.values())]
    figure, axis = _classes([classes[i] for i in kept], height=0.42 * len(kept) + 1)
    height = 0.8 / len(rows)
    for k, (method, values) in enumerate(sorted(rows.items(), key=lambda row: list(METHODS).index(row[0]))):
        at, (label, color) = np.arange(len(kept)) + (k + 0.5) * height - 0.4, STYLES[method]
        axis.barh(at, [values[i] or 0 for i in kept], height, color=color, label=label)
    axis.set_xlabel(unit)
    axis.margins(y=0.01)
    legend(figure, side="upper")
    return figure


def prevalence(labels: np.ndarray) -> Figure:
    """Share of patches that carry each of the 19 classes; ``labels``: N x 19 of 0 and 1."""
    return shares(dict(zip(CLASSES_19, labels.mean(0), strict=True)), of="patches")


def shares(classes: dict[str, float], *, of: str) -> Figure:
    """How much of something each class has: a bar per class; values 0 to 1."""
    figure, axis = _classes(list(classes), height=0.2 * len(classes) + 0.8)
    axis.barh(range(len(classes)), [100 * share for share in classes.values()], color=STYLES["both"][1])
    axis.set_xlabel(f"share of {of} (%)")
    return figure


def bars(groups: Sequence[str], series: dict[str, Sequence[float]], *, unit: str, log: bool = False) -> Figure:
    """Measurements side by side: a bar per series in every group, its value above it where there are few."""
    figure, ((axis,),) = _figure(1, 1, height=2.8, width=7)
    width = 0.8 / len(series)
    for k, (name, values) in enumerate(series.items()):
        label, colour = STYLES.get(name, (name, WAYS.get(name, WAYS.get(name.split(",")[0], STYLES["decur"][1]))))
        at = np.arange(len(groups)) + (k - (len(series) - 1) / 2) * width
        drawn = axis.bar(at, values, width, color=colour, label=label)
        if len(groups) * len(series) <= 16:
            texts = [f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in values]
            axis.bar_label(drawn, labels=texts, fontsize=7, padding=1)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.set(ylabel=unit, yscale="log" if log else "linear")
    axis.margins(y=0.12)
    if log:
        plain_ticks(axis)
    if len(series) > 1:
        legend(figure, side="upper")
    return figure


def alignment(losses: dict[str, np.ndarray]) -> Figure:
    """Histograms of (1 - C_ii)^2 over the embedding dimensions, a line per run (Fig. 4a); values above 1 count as 1."""
    figure, ((axis,),) = _figure(1, 1, height=3, width=6)
    for k, (name, values) in enumerate(losses.items()):
        colour = STYLES[method][1] if (method := method_of(name)) else plt.get_cmap("tab10")(k)
        options = {"histtype": "step", "lw": 1.5, "color": colour, "label": name}
        axis.hist(np.clip(values, 0, 1), bins=np.linspace(0, 1, 41), **options)
    axis.set(xlabel="alignment loss of a dimension, $(1 - C_{ii})^2$", ylabel="dimensions", yscale="symlog")
    axis.set_xticks(np.linspace(0, 1, 6), ["0", "0.2", "0.4", "0.6", "0.8", "≥ 1"])
    plain_ticks(axis)
    legend(figure)
    return figure


def dimensions(points: dict[str, np.ndarray], *, dim_common: dict[str, int]) -> Figure:
    """Maps of embedding dimensions, one panel per run (Fig. 1, 9): 2K x 2 points, those of the first modality first.

    Crosses and squares: common dimensions of the two modalities; dots: unique ones. The name of a pair becomes a title
    that says which modality is the first.
    """
    figure, axes = _grid(len(points), 3, width=3.4, height=3.6)
    for axis, (name, place) in zip(axes, points.items(), strict=True):
        k = len(place) // 2
        for half, colour, mark, who in ((0, "#D62728", "x", "first"), (k, "#1F77B4", "s", "second")):
            common, unique = place[half : half + dim_common[name]], place[half + dim_common[name] : half + k]
            paint = {"facecolors": "none", "edgecolors": colour} if mark == "s" else {"color": colour}
            axis.scatter(*common.T, s=16, marker=mark, lw=0.8, label=f"{who} modality, common", **paint)
            axis.scatter(*unique.T, s=10, color=colour, label=f"{who} modality, unique")
        both = zip(MODALITIES.get(name, ()), ("first", "second"), strict=False)
        axis.set_title(", ".join(f"{named(m)} ({which})" for m, which in both) or name, fontsize=9)
        axis.set(xticks=[], yticks=[])
    legend(figure)
    return figure


def saliency(rows: Sequence[dict[str, np.ndarray]], columns: Sequence[str]) -> Figure:
    """Images with saliency maps over them, a row per pair (Fig. 4b, 10).

    ``rows``: name -> C x H x W image, or (image, H x W map); ``columns``: which of the names, in order. A map of one
    value is not drawn but marked as empty.
    """
    figure, axes = _figure(len(rows), len(columns), height=1.5 * len(rows) + 0.3, width=1.5 * len(columns))
    for line, row in zip(axes, rows, strict=True):
        for axis, name in zip(line, columns, strict=True):
            image, heat = row[name] if isinstance(row[name], tuple) else (row[name], None)
            _show(axis, picture(image), named(name).replace(", ", ",\n") if row is rows[0] else "")
            if heat is not None and np.ptp(heat) == 0:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
                axis.text(0.5, 0.5, "empty", ha="center", va="center", fontsize=8, transform=axis.transAxes, bbox=box)
            elif heat is not None:
                axis.imshow(heat, cmap="inferno", alpha=0.55, interpolation="bilinear")
    return figure


def overlaps(values: dict[str, np.ndarray]) -> Figure:
    """Histograms of saliency overlap over the pairs of a data set, common and unique (Fig. 5a); scores of 0 to 1.

    Pairs with an empty map have no score (not a number); the legend says how many.
    """
    figure, ((axis,),) = _figure(1, 1, height=2.8, width=5)
    for name, scores in values.items():
        (label, colour), there = STYLES[name], scores[np.isfinite(scores)]
        mean = f"mean {there.mean():.2f}; " if len(there) else ""
        label = f"{label}: {mean}{1 - len(there) / len(scores):.0%} of pairs without a map"
        axis.hist(there, bins=np.linspace(0, 1, 41), color=colour, alpha=0.5, label=label)
    axis.set(xlabel="overlap of the modalities' saliency (log, scaled to 0 to 1)", ylabel="pairs")
    legend(figure, columns=1, side="upper")
    return figure


def matrix(tables: dict[str, dict[str, dict[str, float]]], *, unit: str) -> Figure:
    """Heat maps of row -> column -> value of 0 to 1, with the values written in, one panel per entry.

    All panels have the same columns; each may have rows of its own. Not a number is a dash on grey.
    """
    columns, rows = list(next(iter(next(iter(tables.values())).values()))), [len(t) for t in tables.values()]
    size = {"height": 0.32 * sum(rows) + 1.1 * len(rows), "width": 0.75 * len(columns) + 2.5}
    figure, axes = _figure(len(tables), 1, **size, gridspec_kw={"height_ratios": rows})
    viridis = plt.get_cmap("viridis").with_extremes(bad="#CCCCCC")
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        values = np.array([[row[c] for c in columns] for row in table.values()])
        shown = axis.imshow(values, vmin=0, vmax=1, cmap=viridis, aspect="auto")
        for (i, j), value in np.ndenumerate(np.round(values, 2) + 0.0):  # no -0.00
            text, color = "–" if np.isnan(value) else f"{value:.2f}", "w" if value < 0.6 else "k"
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(len(columns)), columns, rotation=20, fontsize=7)
        axis.set_yticks(range(len(table)), list(table), fontsize=7)
        axis.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes.ravel().tolist(), label=unit, shrink=0.7)
    return figure


def _curves(axis: plt.Axes, series: dict[str, dict[float, Sequence[float]]]) -> None:
    for k, (name, points) in enumerate(series.items()):
        at = sorted(points)
        mean = [np.mean(points[x]) for x in at]
        spread = [np.std(points[x], ddof=1) if len(points[x]) > 1 else 0 for x in at]
        label = name if max(map(len, points.values())) > 1 else f"{name} (one seed)"
        axis.errorbar(at, mean, spread, marker="o", ms=4, capsize=2, color=plt.get_cmap("tab10")(k), label=label)


def curves(series: dict[str, dict[float, Sequence[float]]], *, xlabel: str, ylabel: str) -> Figure:
    """Means over seeds against a setting, whiskers for the deviation over seeds: series -> x -> values of seeds."""
    figure, ((axis,),) = _figure(1, 1, height=3, width=6)
    _curves(axis, series)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    legend(figure, columns=2, side="upper")
    return figure


def curve_panels(panels: dict[str, dict], *, xlabel: str, ylabel: str) -> Figure:
    """``curves`` side by side on one scale from 0 on: title -> series, which are the same in every panel."""
    figure, (axes,) = _figure(1, len(panels), height=3.2, width=4 * len(panels), sharey=True)
    for axis, (title, series) in zip(axes, panels.items(), strict=True):
        _curves(axis, series)
        axis.set(xlabel=xlabel, ylim=(-0.03, None))
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel(ylabel)
    legend(figure, columns=2)
    return figure

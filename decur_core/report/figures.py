"""The book's charts: arrays in, a matplotlib Figure out. Nothing is computed here that a record should hold."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from decur_core.data import datasets
from decur_core.report import styles
from decur_core.report.styles import WAYS, colour, figure, given, grid, legend, method_of, plain_ticks, rank, title

ORDER = ("first", "second", "third", "fourth", "fifth")  # modality of a panel, where panels have different ones
MARKS = "xs^DP"  # of common dimensions, by the place of their modality in a panel
DASHES = ("-", "--", ":", "-.")


def _classes(labels: Sequence[str], *, height: float) -> tuple[Figure, plt.Axes]:
    """A panel for bars that lie, one row per class, the first on top."""
    made, axes = figure(1, 1, height=height, width=8)
    axes[0, 0].set_yticks(range(len(labels)), [label.replace("$", r"\$") for label in labels], fontsize=7)
    axes[0, 0].invert_yaxis()
    return made, axes[0, 0]


def histograms(values: dict[str, np.ndarray], *, unit: str, bins: int = 64) -> Figure:
    """Distribution of 8-bit values (or others) per modality, logarithmic: a panel per entry, a line per band.

    All bands of a panel have the same bins, of whole numbers for integers; colours follow the bands' wavelengths.
    """
    made, axes = figure(1, len(values), height=3.2)
    for axis, (name, images) in zip(axes.flat, values.items(), strict=True):
        whole, low, high = np.issubdtype(images.dtype, np.integer), float(images.min()), float(images.max())
        step = -(-(high - low + 1) // bins) if whole else max(high - low, 1e-9) / bins
        edges = low - whole / 2 + step * np.arange(np.ceil((high - low + whole) / step) + 1)
        count = images.shape[-3]
        known = getattr(styles.modalities().get(name), "bands", ())
        names = known if len(known) == count else [f"band {k + 1}" for k in range(count)]
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, count)) if count > 1 else [colour(name)]
        for band, label, paint in zip(np.moveaxis(images, -3, 0), names, colours, strict=True):
            share = np.histogram(band, bins=edges)[0] / band.size
            axis.plot((edges[:-1] + edges[1:]) / 2, np.where(share > 0, share, np.nan), color=paint, lw=1, label=label)
        axis.set(title=title(name), xlabel=unit, ylabel="share of pixels", yscale="log")
        plain_ticks(axis)
        if count > 1:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=7, fontsize=7, frameon=False)
    return made


def correlation(matrices: dict[str, np.ndarray], *, dim_common: int | None = None) -> Figure:
    """Cross-correlation matrices (K x K, values -1 to 1) side by side; lines mark where the unique dimensions begin.

    A matrix whose name is the label of a run of another method than DeCUR has none, and no lines.
    """
    made, axes = grid(len(matrices), 3, width=2.2, height=2.2)
    for axis, (name, c) in zip(axes, matrices.items(), strict=True):
        shown = axis.imshow(c, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axis.set_title(textwrap.fill(name, 24), fontsize=8)
        axis.set_xlabel("dimension j", fontsize=8)
        if dim_common is not None and method_of(name) in (None, "decur"):
            for line in (axis.axhline, axis.axvline):
                line(dim_common - 0.5, color="black", lw=0.8, ls="--")
    if matrices:
        axes[0].set_ylabel("dimension i", fontsize=8)
        made.colorbar(shown, ax=axes, label="C$_{ij}$", shrink=0.8)
    return made


def history(runs: dict[str, Sequence[dict]], *, smooth: int = 1) -> Figure:
    """The terms of the loss over the steps, one panel per run; ``smooth``: steps averaged for the thick line.

    Shown, on a logarithmic scale: ``total``, ``common``, ``unique`` and those of modalities or pairs (``intra/sar``).
    """
    made, axes = grid(len(runs), 2, width=3.6, height=2.6 + 0.6 / max(1, len(runs)))
    for axis, (label, lines) in zip(axes, runs.items(), strict=True):
        terms, used = dict.fromkeys(n for line in lines for n in line), []  # some begin once a run has found its split
        for name in [n for n in terms if n in ("total", "common", "unique") or "/" in n]:
            steps, values = zip(*((line["step"], line[name]) for line in lines if name in line), strict=True)
            paint = colour(name)
            axis.plot(steps, values, color=paint, lw=0.5, alpha=0.35)
            width, dashes = min(smooth, len(values)), DASHES[used.count(paint) % len(DASHES)]
            mean = np.convolve(values, np.ones(width) / width, mode="valid")
            axis.plot(steps[width - 1 :], mean, color=paint, lw=1.5, ls=dashes, label=title(name))
            used.append(paint)
        axis.set(xlabel="step", ylabel="loss", yscale="log")
        axis.set_title(textwrap.fill(label, 32), fontsize=9)
        plain_ticks(axis)
    legend(made, columns=3 if len(runs) > 1 else 2)
    return made


def scores(rows: Sequence[dict], *, reference: float | None = None, unit: str = "mAP micro (%)") -> Figure:
    """Mean scores, a panel per kind of input, a bar per method, whiskers for the deviation over seeds.

    ``rows``: of ``records.summary``; ``reference``: score of guessing, drawn as a dotted line.
    """
    panels = list(dict.fromkeys(r["inputs"] for r in rows))
    groups = list(dict.fromkeys((r["fraction"], r["protocol"]) for r in rows))
    methods = sorted({r["method"] for r in rows}, key=rank)
    made, axes = figure(len(panels), 1, height=2 * len(panels) + 0.8, width=7, sharex=True, sharey=True)
    width = 0.8 / max(1, len(methods))
    offset = {method: (k - (len(methods) - 1) / 2) * width for k, method in enumerate(methods)}
    for r in rows:
        at = groups.index((r["fraction"], r["protocol"])) + offset[r["method"]]
        axis = axes[panels.index(r["inputs"]), 0]
        axis.bar(at, r["mean"], width, yerr=r["deviation"], color=colour(r["method"]), capsize=2)
    handles = [Patch(color=colour(m), label=title(m)) for m in methods]
    for axis, inputs in zip(axes.flat, panels, strict=True):
        axis.set_title(given(inputs, panels), fontsize=9, loc="left")
        axis.set_ylabel(unit, fontsize=8)
    if reference is not None:
        handles += [axis.axhline(reference, color="black", ls=":", lw=1, label="guessing") for axis in axes.flat][:1]
    axis.set_xticks(range(len(groups)), [f"{p}\n{100 * f:g} % labels" for f, p in groups], fontsize=8)
    legend(made, handles, side="upper")
    return made


def per_class(rows: dict[str, Sequence], *, classes: Sequence[str] = (), unit="average precision (%)") -> Figure:
    """Score of each class that occurs, a bar per method; the 19 classes of BigEarthNet unless others are given."""
    classes = classes or datasets.find("bigearthnet").task.classes  # here: it loads readers
    kept = [i for i in range(len(classes)) if any(v[i] is not None for v in rows.values())]
    made, axis = _classes([classes[i] for i in kept], height=0.42 * len(kept) + 1)
    height = 0.8 / len(rows)
    for k, method in enumerate(sorted(rows, key=rank)):
        at = np.arange(len(kept)) + (k + 0.5) * height - 0.4
        axis.barh(at, [rows[method][i] or 0 for i in kept], height, color=colour(method), label=title(method))
    axis.set_xlabel(unit)
    axis.margins(y=0.01)
    legend(made, side="upper")
    return made


def shares(classes: dict[str, float], *, of: str) -> Figure:
    """How much of something each class has: a bar per class; values 0 to 1."""
    made, axis = _classes(list(classes), height=0.2 * len(classes) + 0.8)
    axis.barh(range(len(classes)), [100 * share for share in classes.values()], color=colour("both"))
    axis.set_xlabel(f"share of {of} (%)")
    return made


def bars(groups: Sequence[str], series: dict[str, Sequence[float]], *, unit: str, log: bool = False) -> Figure:
    """Measurements side by side: a bar per series in every group, its value above it where there are few."""
    made, ((axis,),) = figure(1, 1, height=2.8, width=7)
    width = 0.8 / len(series)
    for k, (name, values) in enumerate(series.items()):
        ways = [WAYS.get(w) or WAYS.get(w.split(",")[0]) for w in (groups if len(series) == 1 else [name])]
        paint = [way or colour("decur") for way in ways]
        paint = colour(name) if name in (*styles.COLOURS, *styles.modalities()) else paint * (len(groups) // len(paint))
        at = np.arange(len(groups)) + (k - (len(series) - 1) / 2) * width
        drawn = axis.bar(at, values, width, color=paint, label=title(name))
        if len(groups) * len(series) <= 16:
            texts = [f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in values]
            axis.bar_label(drawn, labels=texts, fontsize=7, padding=1)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.set(ylabel=unit, yscale="log" if log else "linear")
    axis.margins(y=0.12)
    if log:
        plain_ticks(axis)
    if len(series) > 1:
        legend(made, side="upper")
    return made


def alignment(losses: dict[str, np.ndarray]) -> Figure:
    """Histograms of (1 - C_ii)^2 over the embedding dimensions, a line per run (Fig. 4a); values above 1 count as 1."""
    made, ((axis,),) = figure(1, 1, height=3, width=6)
    for k, (name, values) in enumerate(losses.items()):
        paint = colour(method) if (method := method_of(name)) else plt.get_cmap("tab10")(k)
        axis.hist(np.clip(values, 0, 1), bins=np.linspace(0, 1, 41), histtype="step", lw=1.5, color=paint, label=name)
    axis.set(xlabel="alignment loss of a dimension, $(1 - C_{ii})^2$", ylabel="dimensions", yscale="symlog")
    axis.set_xticks(np.linspace(0, 1, 6), ["0", "0.2", "0.4", "0.6", "0.8", "≥ 1"])
    plain_ticks(axis)
    legend(made)
    return made


def dimensions(points: dict[str, np.ndarray], *, blocks: dict[str, Mapping[str, Mapping[str, slice]]]) -> Figure:
    """Maps of embedding dimensions, one panel per run (Fig. 1, 9): points x 2, modality after modality.

    Marks of outlines: common dimensions, in another shape for each modality; dots: unique ones. ``blocks``: which are
    which, by run, of ``explain.blocks``. The name of a pair becomes a title that says which modality is the first.
    """
    made, axes = grid(len(points), 3, width=3.4, height=2.8)
    for axis, (name, place) in zip(axes, points.items(), strict=True):
        start, layout = 0, blocks[name]
        for (m, there), mark in zip(layout.items(), MARKS, strict=False):
            paint = colour(m)
            mine, own = place[start : start + max(w.stop for w in there.values())], there[m]
            start += len(mine)
            outline = {"color": paint} if mark == "x" else {"facecolors": "none", "edgecolors": paint}
            common = np.delete(mine, own, axis=0)
            axis.scatter(*common.T, s=16, marker=mark, lw=0.8, label=f"{title(m)}, common", **outline)
            axis.scatter(*mine[own].T, s=10, color=paint, label=f"{title(m)}, unique")
        if start != len(place):
            raise ValueError(f"{name}: {len(place)} points for {start} dimensions of {', '.join(layout)}")
        known = name in datasets.pairs()
        text = ", ".join(f"{title(m)} ({who})" for m, who in zip(layout, ORDER, strict=False)) if known else name
        axis.set_title(text, fontsize=9)
        axis.set(xticks=[], yticks=[])
    legend(made)
    return made


def spectra(found: dict[str, dict], *, shown: int = 40) -> Figure:
    """Held-out canonical correlations, a panel per run with ``dim_common: auto`` (``history.split``).

    What the two views of each modality repeat, what pairs of modalities share and, dotted, what chance would give.
    """
    made, axes = grid(len(found), 3, width=3.2, height=2.6)
    for axis, (name, about) in zip(axes, found.items(), strict=True):
        for which, values in about["spectra"].items():
            shared = "+" in which
            paint = colour("common") if shared else colour(which)
            label = "shared" if shared else title(which)
            first = values[:shown]
            axis.plot(range(1, len(first) + 1), first, color=paint, lw=2 if shared else 1, label=label)
            if shared:
                axis.axhline(about["thresholds"][which], color=paint, ls=":", lw=1)
        axis.axhline(0.5, color="black", lw=0.5)
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="direction", ylabel="correlation", ylim=(-0.05, 1.02))
    legend(made)
    return made


def places(points: dict[str, np.ndarray]) -> Figure:
    """Maps of samples, a panel per modality: N x 2 points, coloured alike in all panels by their place in the first."""
    made, axes = grid(len(points), 3, width=3.4, height=2.5)
    first = next(iter(points.values()))
    hue = np.arctan2(*(first - first.mean(0)).T[::-1])
    for axis, (name, place) in zip(axes, points.items(), strict=True):
        axis.scatter(*place.T, s=8, c=hue, cmap="twilight")
        axis.set_title(title(name), fontsize=9)
        axis.set(xticks=[], yticks=[])
    return made


def overlaps(values: dict[str, np.ndarray]) -> Figure:
    """Histograms of saliency overlap over the pairs of a data set, common and unique (Fig. 5a); scores of 0 to 1.

    Pairs with an empty map have no score (not a number); the legend says how many.
    """
    made, ((axis,),) = figure(1, 1, height=2.8, width=5)
    for name, scores in values.items():
        there = scores[np.isfinite(scores)]
        mean = f"mean {there.mean():.2f}; " if len(there) else ""
        label = f"{title(name)}: {mean}{1 - len(there) / len(scores):.0%} of pairs without a map"
        axis.hist(there, bins=np.linspace(0, 1, 41), color=colour(name), alpha=0.5, label=label)
    axis.set(xlabel="overlap of the modalities' saliency (log, scaled to 0 to 1)", ylabel="pairs")
    legend(made, columns=1, side="upper")
    return made


def matrix(tables: dict[str, dict[str, dict[str, float]]], *, unit: str) -> Figure:
    """Heat maps of row -> column -> value of 0 to 1, with the values written in, one panel per entry.

    All panels have the same columns; each may have rows of its own. Not a number is a dash on grey.
    """
    columns, rows = [*next(iter(next(iter(tables.values())).values()))], [len(t) for t in tables.values()]
    size = {"height": 0.32 * sum(rows) + 1.1 * len(rows), "width": 0.75 * len(columns) + 2.5}
    made, axes = figure(len(tables), 1, **size, gridspec_kw={"height_ratios": rows})
    viridis = plt.get_cmap("viridis").with_extremes(bad="#CCCCCC")
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=True):
        values = np.array([[row[c] for c in columns] for row in table.values()])
        shown = axis.imshow(values, vmin=0, vmax=1, cmap=viridis, aspect="auto")
        for (i, j), value in np.ndenumerate(np.round(values, 2) + 0.0):  # no -0.00
            text, color = "–" if np.isnan(value) else f"{value:.2f}", "w" if value < 0.6 else "k"
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(len(columns)), [c.replace("_", " ") for c in columns], rotation=20, fontsize=7)
        axis.set_yticks(range(len(table)), list(table), fontsize=7)
        axis.set_title(name, fontsize=9, loc="left")  # where a phone begins to read
    made.colorbar(shown, ax=axes.ravel().tolist(), label=unit, shrink=0.7)
    return made


def _curves(axis: plt.Axes, series: dict[str, dict[float, Sequence[float]]]) -> None:
    for k, (name, points) in enumerate(series.items()):
        at, several = sorted(points), max(map(len, points.values())) > 1
        mean = [np.mean(points[x]) for x in at]
        spread = [np.std(points[x], ddof=1) if len(points[x]) > 1 else 0 for x in at] if several else None
        label = name if several else f"{name} (one seed)"
        paint = colour(method) if (method := method_of(name)) else plt.get_cmap("tab10")(k)
        axis.errorbar(at, mean, spread, marker="o", ms=4, capsize=2, color=paint, label=label)


def curves(series: dict[str, dict[float, Sequence[float]]], *, xlabel: str, ylabel: str) -> Figure:
    """Means over seeds against a setting, whiskers for the deviation over seeds: series -> x -> values of seeds."""
    made, ((axis,),) = figure(1, 1, height=3, width=6)
    _curves(axis, series)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    legend(made, columns=2, side="upper")
    return made


def curve_panels(panels: dict[str, dict], *, xlabel: str, ylabel: str, zero: bool = True) -> Figure:
    """``curves`` side by side: title -> series, the same in every panel; on one scale from 0 on, or each on its own."""
    made, (axes,) = figure(1, len(panels), height=3.2, width=4 * len(panels), sharey=zero)
    for axis, (name, series) in zip(axes, panels.items(), strict=True):
        _curves(axis, series)
        axis.set(xlabel=xlabel, xscale="linear" if zero else "log")
        if not zero and len(at := sorted({x for points in series.values() for x in points})) <= 6:  # more collide
            axis.set_xticks(at, [f"{x:g}" for x in at])
            axis.minorticks_off()
        axis.set_title(textwrap.fill(name, 80 // len(panels)), fontsize=9)
    axes[0].set(ylabel=ylabel, **({"ylim": (-0.03, None)} if zero else {}))  # of all, when all of them are drawn
    legend(made, columns=2)
    return made

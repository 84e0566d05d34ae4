"""What blocks of embeddings know of known factors (``explain.probes``), as panels of a figure and as a table."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from decur_core.explain.probes import Table, scores
from decur_core.report.records import spread
from decur_core.report.styles import title
from decur_core.report.tables import cell, grid

SHOWN = ("DeCUR", "Barlow Twins", "Random initialisation")
COLUMNS = {"right": "right block", "wrong": "wrong block (leakage)"}  # of ``scores``: what heads it, else its own name
COLUMNS |= {name: name for name in ("block score", "impossible")}


def method(label: str) -> str:
    """A run's label (``folders.label``) without the seed: runs of other variants are apart."""
    return re.sub(r", seed \d+", "", label)


def _empty(row: Mapping[str, float]) -> bool:
    """Whether a block has no dimension: exactly 0 for every factor (see ``r2``), or not a number without a ceiling."""
    return not np.nan_to_num(list(row.values())).any()


def panels(
    by_run: Mapping[str, Mapping[str, Table]], ceilings: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Linear R2, means over seeds, for ``figures.matrix``: the ceiling, then the blocks of each of some methods.

    Not a number where a block has no dimension to read from.
    """
    means = {m: {f: float(np.mean(values)) for f, values in found.items()} for m, found in ceilings.items()}
    made = {"Supervised network: the ceiling, $R^2$": {title(m): row for m, row in means.items()}}
    for name in dict.fromkeys(method(run) for kind in SHOWN for run in by_run if run.partition(", seed")[0] == kind):
        found = [by_kernel["linear"] for label, by_kernel in by_run.items() if method(label) == name]
        rows = made[name] = {}
        for m, block in {place: None for each in found for place in each}:  # runs that found a split differ in them
            there = [each[m, block] for each in found if (m, block) in each]
            row = {f: float(np.mean([values[f] for values in there])) for f in there[0]}
            kind = "unique" if block == m else "common" if block == "+".join(ceilings) else title(block)
            rows[f"{kind}, {title(m)}"] = dict.fromkeys(row, np.nan) if _empty(row) else row
    return made


def table(by_run: Mapping[str, Mapping[str, Table]], seen_by: Mapping[str, str]) -> str:
    """``probes.scores`` of every method, mean ± deviation over seeds, as a Markdown table.

    Below it: which methods have no unique dimensions, and so 0 there without a measurement.
    """
    found: dict[tuple, list[dict]] = {}
    whole = {}  # methods without unique dimensions, in order
    for label, by_kernel in by_run.items():
        for kernel, rows in by_kernel.items():
            if all(_empty(row) for (m, block), row in rows.items() if block == m):
                whole[method(label)] = None
            found.setdefault((method(label), kernel), []).append(scores(rows, seen_by))
    lines = []
    for (name, kernel), seeds in found.items():
        spreads = [spread([each[column] for each in seeds]) for column in COLUMNS]
        texts = ["–" if np.isnan(mean) else cell(mean, deviation, digits=2) for mean, deviation in spreads]
        lines.append([name, kernel, *texts])
    text = grid(["Method", "Probe", *COLUMNS.values()], lines)
    note = "Without unique dimensions, where an $R^2$ of 0 stands by definition and is not measured: "
    return f"{text}\n\n{note}{'; '.join(whole)}." if whole else text

"""Records as Markdown tables, beside the paper's numbers where it has them."""

import itertools
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from decur_core.data import datasets
from decur_core.losses import METHODS
from decur_core.report.records import PAIR, REFERENCE, by_seed, by_share, choose, head, order, paired, place, spread
from decur_core.report.styles import given, title
from decur_core.transfer.evaluation import ONLY

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
TRANSFER = {1: ("bigearthnet", "table1_bigearthnet_map_micro"), 2: ("geonrw", "table2_geonrw_miou")}  # table -> data
COLUMNS = {f"{100 * f:g} % {p}": (f, p) for f in (0.01, 1.0) for p in ("linear", "finetune")}
NUMBERS = {"micro": "mAP micro (%)", "macro": "mAP macro (%)", "miou": "mIoU (%)", "accuracy": "pixel accuracy (%)"}
NUMBERS["flood"] = "IoU of the flooded (%)"
WIDEST = 4  # columns of numbers that a page has room for
SPACE = "\N{NO-BREAK SPACE}"


def number(mean: float, deviation: float | None, digits: int = 1, sign: str = "", space: str = " ") -> str:
    """Mean ± deviation, without the sign of -0.0; ``sign``: "+" for one that always stands."""
    more = "" if deviation is None else f"{space}±{space}{deviation:.{digits}f}"
    return f"{round(mean, digits) + 0.0:{sign}.{digits}f}{more}"


def cell(
    mean: float | None,
    deviation: float | None = None,
    best: float | None = None,
    difference: tuple[float | None, float | None] = (None, None),
    *,
    digits: int = 1,
) -> str:
    """Mean ± deviation for a table; bold where the mean is the ``best``; below it the ``difference`` to DeCUR."""
    if mean is None:
        return ""
    text = number(mean, deviation, digits, space=SPACE)
    text = f"**{text}**" if mean == best else text
    return text if difference[0] is None else f"{text}<br>Δ{SPACE}{number(*difference, digits, '+', SPACE)}"


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a ``|`` in a text does not end its cell."""
    first, *lines = ["| " + " | ".join(text.replace("|", r"\|") for text in row) + " |" for row in (header, *rows)]
    return "\n".join([first, "|---" * len(header) + "|", *lines])


def _between(values: Iterable[int]) -> str:
    values = sorted(set(values))
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _note(counts: Iterable[int], measured: Iterable[Mapping], *, differences: bool) -> str:
    """What stands below tables: over how many seeds, and by how many updates of the weights (``steps``, if known)."""
    text = f"Mean ± standard deviation over {_between(counts)} seeds" if {*counts} - {1} else "One seed"
    text += f"; Δ: difference to {title(REFERENCE)} over the seeds of both" if differences else ""
    steps: dict[str, list[int]] = {}
    for r in sorted(measured, key=_task):
        steps.setdefault(_column(_task(r)), []).extend(np.atleast_1d(r.get("steps", [])).tolist())
    updates = ", ".join(f"{task} {_between(found)}" for task, found in steps.items() if found)
    return f"{text}. Updates of the weights: {updates}." if updates else f"{text}."


def _task(r: Mapping) -> tuple:
    """What a column of scores is about: its share of labels, and whether encoders are trained too."""
    return r["fraction"], r["protocol"] != "linear", r["protocol"]


def _column(task: tuple) -> str:
    return f"{100 * task[0]:g} % {task[-1]}"


def markdown(rows: Sequence[dict], *, numbers: int = 2) -> str:
    """Rows of ``summary`` as Markdown tables: one per number and kind of inputs, methods as rows, DeCUR first.

    Mean ± standard deviation over seeds where there is more than one; the best of a column in bold; Δ: ``difference``.
    ``numbers``: 1 leaves out the second.
    """
    parts, kinds = [], sorted({r["inputs"] for r in rows}, key=order)
    for (k, (mean, more)), inputs in itertools.product(enumerate(PAIR[:numbers]), kinds):
        found = [r for r in rows if r["inputs"] == inputs]
        number = found[0]["numbers"][k]
        parts.append(f"**{NUMBERS.get(number, number)}, {given(inputs, kinds)}: {found[0]['data']}**")
        tasks = sorted({_task(r) for r in found})
        apart = [[t for t in tasks if t[1:] == p] for p in sorted({t[1:] for t in tasks})]
        for columns in [tasks] if len(tasks) <= WIDEST else apart:
            there = [r for r in found if _task(r) in columns]
            best = {task: max(r[mean] for r in there if _task(r) == task) for task in columns}
            cells = {
                (r["method"], _task(r)): cell(r[mean], r[f"{more}deviation"], best[_task(r)], r[f"{more}difference"])
                for r in there
            }
            methods = sorted({r["method"] for r in there}, key=place)
            body = [[title(m), *(cells.get((m, task), "") for task in columns)] for m in methods]
            parts.append(grid(["Method", *map(_column, columns)], body))
    compared = any(r["difference"][0] is not None for r in rows)
    return "\n\n".join([*parts, _note([r["seeds"] for r in rows], rows, differences=compared)])


def worth(parts: Mapping[str, Sequence[dict]]) -> str:
    """Name -> records, as a table: scores of DeCUR, frozen and fine-tuned, less those without pretraining."""
    ways, body = (("frozen", "linear", "random"), ("fine-tuned", "finetune", "supervised")), []
    for what, found in parts.items():
        both = [[by_seed(choose(found, method=m, protocol=p)) for m in (REFERENCE, without)] for _, p, without in ways]
        body.append([what, *(cell(*paired(*two)) for two in both)])
    return grid(["", *(f"{way}, less {title(without).lower()}" for way, _, without in ways)], body)


def _beside(
    rows: Mapping[str, list],
    ours: Mapping[str, Sequence[Mapping[int, float]]],
    columns: Sequence[str],
    names: Mapping[str, str],
    records: Sequence[dict],
    *,
    more: str = "",
    apart: Container[tuple[str, int]] = (),
) -> str:
    """The paper's numbers (row -> one or None per column) and ours (row -> seed -> number), best in bold.

    ``records``: those that ours come from; ``more``: goes on from what heads our columns; ``apart``: (row, column) of
    cells that are not compared with others, never in bold. Two columns of the paper make a table.
    """
    parts, differences = [], 0
    for start in range(0, len(columns), WIDEST // 2):
        lines: dict[str, list[str]] = {row: [names[row]] for row in rows}
        chosen = range(start, min(start + WIDEST // 2, len(columns)))
        for k in chosen:
            compared = [row for row in rows if (row, k) not in apart]
            means = {row: spread([*ours[row][k].values()]) for row in rows}
            best = [
                max((found[row] for row in compared if found[row] is not None), default=None)
                for found in ({r: v[k] for r, v in rows.items()}, {r: m[0] for r, m in means.items()})
            ]
            for row, values in rows.items():
                marked = best if row in compared else (None, None)
                other = ours[REFERENCE][k] if REFERENCE in rows and row in compared and row != REFERENCE else {}
                difference = paired(ours[row][k], other)
                differences += difference[0] is not None
                lines[row] += [cell(values[k], None, marked[0]), cell(*means[row], marked[1], difference)]
        header = ["", *(text for k in chosen for text in (f"{columns[k]}, paper", head(records) + more))]
        parts.append(grid(header, lines.values()))
    counts = [len(seeds) for several in ours.values() for seeds in several if seeds]
    return "\n\n".join(parts + ([_note(counts, records, differences=differences > 0)] if counts else []))


def table(number: int, records: Sequence[dict], part: str) -> str:
    """A table of the paper as Markdown, its numbers (from real data) beside the means over seeds of our records.

    ``number, part``: 1 with ``sar+optical`` or ``sar``; 2 with ``rgb+dem`` or ``rgb``; 3 with ``sunrgbd`` or ``nyuv2``;
    4 with ``sar+optical`` or ``rgb+dem``. Our cells are empty where nothing ran. A row without pretraining has one
    score for each share of labels, as in the paper; it is compared with others (the best in bold) only in columns of
    its own protocol. In Table 4 our share of labels may be another than the paper's; the header says it. Our columns
    say whether images are drawn; for more see ``source``.
    """
    return {1: _linear_and_finetune, 2: _linear_and_finetune, 3: _table3, 4: _table4}[number](number, records, part)


def _linear_and_finetune(number: int, records: Sequence[dict], part: str) -> str:
    name, key = TRANSFER[number]
    inputs = "both" if "+" in part else part
    found = choose(records, dataset=datasets.find(name).title, inputs=inputs, variant="")
    rows, ours = {m: v for m, v in PAPER[key][part].items() if m in METHODS}, {}
    for method in rows:
        tasks = [(fraction, ONLY.get(method, protocol)) for fraction, protocol in COLUMNS.values()]
        ours[method] = [by_seed(choose(found, method=method, fraction=f, protocol=p)) for f, p in tasks]
    apart = {(m, k) for m in rows for k, (_, p) in enumerate(COLUMNS.values()) if ONLY.get(m, p) != p}
    return _beside(rows, ours, list(COLUMNS), {m: title(m) for m in rows}, found, apart=apart)


# Rows of Table 3: the paper's name, our network, method and inputs; None: systems that the paper quotes.
TABLE3 = {
    "fcn/rgb/random": ("FCN, RGB", ("FCN", "supervised", "rgb")),
    "fcn/rgb/clip": ("FCN, RGB (CLIP)", ("FCN", "clip", "rgb")),
    "fcn/rgb/decur": ("FCN, RGB (DeCUR)", ("FCN", "decur", "rgb")),
    "sa_gate": ("SA-Gate (quoted)", None),
    "sgnet": ("SGNet (quoted)", None),
    "shapeconv": ("ShapeConv (quoted)", None),
    "omnivore": ("OMNIVORE (quoted)", None),
    "cmx_b2": ("CMX-B2", ("CMX", "supervised", "both")),
    "cmx_b2/decur": ("CMX-B2 (DeCUR)", ("CMX", "decur", "both")),
    "cmx_b5": ("CMX-B5", ("CMX", "supervised", "both")),
    "cmx_b5/decur": ("CMX-B5 (DeCUR)", ("CMX", "decur", "both")),
}


def _table3(number: int, records: Sequence[dict], part: str) -> str:
    rows, ours, every = PAPER["table3_rgbd"][part], {}, []
    names = {row: name for row, (name, _) in TABLE3.items()}
    for row in rows:
        network, method, inputs = TABLE3[row][1] or ("", "", "")
        wanted = {"network": network, "method": method, "inputs": inputs, "fraction": 1.0, "protocol": "finetune"}
        found = choose(records, dataset=datasets.find(part).title, **wanted)
        ours[row], every = [by_seed(found, k) for k in (0, 1)], every + found
        about = [r.get("settings", {}).get("pretraining", {}) for r in found if network == "CMX"]
        used = {f"cmx_{a['backbone'].removeprefix('mit_')}" for a in about if "backbone" in a}
        if other := sorted(used - {row.partition("/")[0]}):  # the paper's rows have a size of network in their names
            names[row] += f", ours {', '.join(other).replace('cmx_', '').upper()}"
    return _beside(rows, ours, ("mIoU", "accuracy"), names, every)


TABLE4 = {  # row: its name, and the settings intra and decoupling
    "decur": ("DeCUR", True, True),
    "without_intra_and_decoupling": ("without intra and decoupling", False, False),
    "without_intra": ("without intra", False, True),
    "without_decoupling": ("without decoupling", True, False),
}


def _table4(number: int, records: Sequence[dict], part: str) -> str:
    column = ("sar+optical", "rgb+dem").index(part)
    found = choose(records, pair=part.replace("+", "_"), method="decur", protocol="finetune", inputs="both")
    found = [r for r in found if r["variant"].startswith("terms")]
    least, ours, paper = min((r["fraction"] for r in found), default=0), {}, PAPER["table4_loss_ablation"]
    found = [r for r in found if r["fraction"] == least]
    for row, (_, *switches) in TABLE4.items():
        about = [(r, r["settings"]["pretraining"]) for r in found]
        had = [r for r, s in about if [s.get("intra", True), s.get("decoupling", True)] == switches]
        ours[row] = [by_seed(had)]
    rows, names = {row: [paper[row][column]] for row in TABLE4}, {row: name for row, (name, *_) in TABLE4.items()}
    more = f" ({100 * least:g} % finetune)" if found else ""
    return _beside(rows, ours, (paper["columns"][column],), names, found, more=more)


def share_table(found: dict[str, Sequence[dict]]) -> str:
    """The points of ``by_share`` for several lists of records as a Markdown table."""
    rows = []
    for name, records in found.items():
        for size, points in by_share(records).items():
            scores = {x: spread(points[x]) for x in sorted(points)}
            best = max(mean for mean, _ in scores.values())
            rows += [[name, size, f"{x:g} %", cell(*each, best)] for x, each in scores.items()]
    return grid(["Pair", "Embedding", "Common", "Score (%)"], rows)

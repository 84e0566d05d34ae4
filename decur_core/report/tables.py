"""Records of evaluations as rows, and the paper's tables with its numbers beside ours."""

import json
import statistics
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from decur_core.running.folders import METHODS
from decur_core.transfer.evaluation import ONLY

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
COLUMNS = {f"{100 * f:g} % {p}": (f, p) for f in (0.01, 1.0) for p in ("linear", "finetune")}
KEYS = ("method", "protocol", "inputs", "fraction")  # what tells one measurement from another, seeds aside
SCORES = {"mAP (%)": ("micro", "macro"), "mIoU (%)": ("miou", "accuracy")}  # metric: its two numbers in a record
NAMES = {"both": "both", "sar": "SAR", "optical": "optical", "rgb": "RGB", "dem": "elevation", "hha": "depth"}
DATA = {"published": "the published data sets", "world": "the miniature world (not real data)"}
DATA["samples"] = "a handful of real sample tiles"


def choose(records: Iterable[dict], **wanted) -> list[dict]:
    """Records with these values, e.g. ``dataset="GeoNRW", variant=""``."""
    return [r for r in records if all(r.get(k, "") == v for k, v in wanted.items())]


def numbers(record: dict) -> tuple[float, float]:
    """The two numbers of a record in percent: mAP micro and macro, or mIoU and overall accuracy."""
    first, second = SCORES[record.get("metric", "mAP (%)")]
    return record[first], record[second]


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, None where there are too few values."""
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def summary(records: Sequence[dict]) -> list[dict]:
    """One row per method, protocol, inputs and label fraction: ``mean`` and ``second`` (see ``numbers``) over seeds.

    ``deviation`` and ``second_deviation`` are sample standard deviations over seeds, None with a single seed.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[k] for k in KEYS), []).append(record)
    rows = []
    for key, found in groups.items():
        row = {**dict(zip(KEYS, key, strict=True)), "seeds": len(found)}
        first, second = zip(*map(numbers, found), strict=True)
        row["mean"], row["deviation"] = _spread(first)
        row["second"], row["second_deviation"] = _spread(second)
        rows.append(row)
    order = list(METHODS)
    rows.sort(key=lambda r: (order.index(r["method"]), r["inputs"], -r["fraction"], r["protocol"] != "linear"))
    return rows


def per_class(records: Sequence[dict], *, protocol: str, inputs: str, fraction: float) -> dict[str, list]:
    """Score of every class, averaged over seeds, by method; None where a class never occurs."""
    found: dict[str, list] = {}
    for r in records:
        if (r["inputs"], r["fraction"]) == (inputs, fraction) and r["protocol"] == ONLY.get(r["method"], protocol):
            found.setdefault(r["method"], []).append(r["per_class"])
    return {
        method: [None if None in values else statistics.fmean(values) for values in zip(*rows, strict=True)]
        for method, rows in found.items()
    }


def cell(mean: float | None, deviation: float | None = None, best: float | None = None, *, digits: int = 1) -> str:
    """Mean ± deviation for a table; bold where the mean is the ``best``."""
    if mean is None:
        return ""
    spread = f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{deviation:.{digits}f}" if deviation is not None else ""
    text = f"{round(mean, digits) + 0.0:.{digits}f}{spread}"  # without the sign of -0.0
    return f"**{text}**" if mean == best else text


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def markdown(rows: Sequence[dict]) -> str:
    """Rows of ``summary`` as a Markdown table, a column per method, both numbers in a cell, in percent.

    Mean ± standard deviation over seeds where there is more than one; the best first number of a line in bold.
    """
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    tasks = sorted(
        {(r["inputs"], r["fraction"], r["protocol"]) for r in rows},
        key=lambda t: (list(NAMES).index(t[0]), -t[1], t[2] != "linear"),
    )
    lines = []
    for task in tasks:
        found = {r["method"]: r for r in rows if (r["inputs"], r["fraction"], r["protocol"]) == task}
        best, cells = max(r["mean"] for r in found.values()), [NAMES[task[0]], f"{100 * task[1]:g} %", task[2]]
        for r in map(found.get, methods):
            second = cell(r["second"], r["second_deviation"]) if r else ""
            cells.append(f"{cell(r['mean'], r['deviation'], best)} / {second}" if r else "")
        lines.append(cells)
    return grid(["Inputs", "Labels", "Protocol", *(METHODS[m] for m in methods)], lines)


def _best(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _beside(
    rows: dict[str, list],
    ours: dict[str, list],
    columns: Sequence[str],
    names: dict[str, str],
    *,
    head: str = "ours",
    apart: Container[tuple[str, int]] = (),
) -> str:
    """The paper's numbers (row -> one or None per column) and ours (row -> those of the seeds), best in bold.

    ``head``: of our columns; ``apart``: (row, column) of cells that are not compared with others, never in bold.
    """
    spreads = {row: [_spread(values) for values in ours[row]] for row in rows}
    best, top = [], []
    for k in range(len(columns)):
        compared = [row for row in rows if (row, k) not in apart]
        best.append(_best(rows[row][k] for row in compared))
        top.append(_best(spreads[row][k][0] for row in compared))
    lines = []
    for row, values in rows.items():
        cells = [names.get(row, row)]
        for k, value in enumerate(values):
            marked = (None, None) if (row, k) in apart else (best[k], top[k])
            cells += [cell(value, None, marked[0]), cell(*spreads[row][k], marked[1])]
        lines.append(cells)
    return grid(["", *(text for c in columns for text in (f"{c}, paper", head))], lines)


def table(number: int, records: Sequence[dict], part: str) -> str:
    """A table of the paper as Markdown, its numbers (from real data) beside the means over seeds of our records.

    ``number, part``: 1 with ``sar+optical`` or ``sar``; 2 with ``rgb+dem`` or ``rgb``; 3 with ``sunrgbd`` or ``nyuv2``;
    4 with ``sar+optical`` or ``rgb+dem``. Our cells are empty where nothing ran. A row without pretraining has one
    score for each share of labels, as in the paper; it is compared with others (the best in bold) only in columns of
    its own protocol. In Table 4 our share of labels may be another than the paper's; the header says it. Which data
    ours come from is for the caption: see ``source``.
    """
    return {1: _linear_and_finetune, 2: _linear_and_finetune, 3: _table3, 4: _table4}[number](number, records, part)


def _linear_and_finetune(number: int, records: Sequence[dict], part: str) -> str:
    dataset, key = {1: ("BigEarthNet-MM", "table1_bigearthnet_map_micro"), 2: ("GeoNRW", "table2_geonrw_miou")}[number]
    inputs = "both" if "+" in part else part
    found = choose(records, dataset=dataset, inputs=inputs, variant="")
    rows, ours = {m: v for m, v in PAPER[key][part].items() if m in METHODS}, {}
    for method in rows:
        tasks = [(fraction, ONLY.get(method, protocol)) for fraction, protocol in COLUMNS.values()]
        ours[method] = [[numbers(r)[0] for r in choose(found, method=method, fraction=f, protocol=p)] for f, p in tasks]
    apart = {(m, k) for m in rows for k, (_, p) in enumerate(COLUMNS.values()) if ONLY.get(m, p) != p}
    return _beside(rows, ours, list(COLUMNS), METHODS, apart=apart)


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
    dataset, rows, ours = {"sunrgbd": "SUN RGB-D", "nyuv2": "NYU Depth v2"}[part], PAPER["table3_rgbd"][part], {}
    names = {row: name for row, (name, _) in TABLE3.items()}
    for row in rows:
        network, method, inputs = TABLE3[row][1] or ("", "", "")
        wanted = {"dataset": dataset, "network": network, "method": method, "inputs": inputs, "fraction": 1.0}
        found = choose(records, protocol="finetune", **wanted)
        ours[row] = [[numbers(r)[k] for r in found] for k in (0, 1)]
        about = [r.get("settings", {}).get("pretraining", {}) for r in found if network == "CMX"]
        used = {f"cmx_{a['backbone'].removeprefix('mit_')}" for a in about if "backbone" in a}
        if other := sorted(used - {row.partition("/")[0]}):  # the paper's rows have a size of network in their names
            names[row] += f", ours {', '.join(other).replace('cmx_', '').upper()}"
    return _beside(rows, ours, ("mIoU", "accuracy"), names)


TABLE4 = {  # row: its name, and the settings intra and decoupling
    "decur": ("DeCUR", True, True),
    "without_intra_and_decoupling": ("without intra and decoupling", False, False),
    "without_intra": ("without intra", False, True),
    "without_decoupling": ("without decoupling", True, False),
}


def _table4(number: int, records: Sequence[dict], part: str) -> str:
    column = ("sar+optical", "rgb+dem").index(part)
    found = choose(records, pair=("sar_optical", "rgb_dem")[column], method="decur", protocol="finetune", inputs="both")
    found = [r for r in found if r["variant"].startswith("terms")]
    least, ours, paper = min((r["fraction"] for r in found), default=0), {}, PAPER["table4_loss_ablation"]
    for row, (_, *switches) in TABLE4.items():
        about = [(r, r["settings"]["pretraining"]) for r in found if r["fraction"] == least]
        had = [numbers(r)[0] for r, s in about if [s.get("intra", True), s.get("decoupling", True)] == switches]
        ours[row] = [had]
    rows, names = {row: [paper[row][column]] for row in TABLE4}, {row: name for row, (name, *_) in TABLE4.items()}
    head = f"ours ({100 * least:g} % finetune)" if found else "ours"
    return _beside(rows, ours, (paper["columns"][column],), names, head=head)


def _series(points: Iterable[tuple[str, float, dict]]) -> dict[str, dict[float, list[float]]]:
    """Series -> x -> first scores of the seeds, of (series, x, record)."""
    series: dict[str, dict[float, list[float]]] = {}
    for name, x, record in points:
        series.setdefault(name, {}).setdefault(x, []).append(numbers(record)[0])
    return series


def by_share(records: Sequence[dict]) -> dict[str, dict[float, list[float]]]:
    """Scores over the share of common dimensions in percent, a series per size of the embedding (Fig. 3a, 6)."""
    found = [(r, r["settings"]["pretraining"]) for r in records]
    sizes = [(r, about["dim_common"], about["projector"][-1]) for r, about in found]
    return _series((f"{size} dimensions", 100 * common / size, r) for r, common, size in sizes)


def by_projector(records: Sequence[dict]) -> dict[str, dict[float, list[float]]]:
    """Scores over the width of the projector, 0 without one, a series per data set and protocol (Fig. 3b, 7)."""
    widths = [(r, r["settings"]["pretraining"]["projector"] or [0]) for r in records]
    return _series((f"{r['dataset']}, {r['protocol']}", width[-1], r) for r, width in widths)


def share_table(found: dict[str, Sequence[dict]]) -> str:
    """The points of ``by_share`` for several lists of records as a Markdown table."""
    rows = []
    for title, records in found.items():
        for name, points in by_share(records).items():
            scores = {x: _spread(points[x]) for x in sorted(points)}
            best = _best(mean for mean, _ in scores.values())
            rows += [[title, name, f"{x:g} %", cell(*spread, best)] for x, spread in scores.items()]
    return grid(["Pair", "Embedding", "Common", "Score (%)"], rows)


def source(records: Sequence[dict]) -> str:
    """One sentence on what produced the records: data, profile, seeds, commit, hardware, date."""
    if not records:
        return "Ours: nothing has run yet."
    data = " and ".join(DATA[k] for k in sorted({r["world"] for r in records}))
    origins = [r["provenance"] for r in records]
    profiles, commits = (sorted(found) for found in ({r["profile"] for r in records}, {o["commit"] for o in origins}))
    hardware = {o["hardware"]["processor"]: o["hardware"] for o in origins}
    machines = ", ".join(", ".join(h["gpus"]) or f"{h['cores']} cores of {name}" for name, h in hardware.items())
    seeds = len({r["seed"] for r in records})
    made = f"profile {', '.join(profiles)}, {seeds} seed{'s' if seeds > 1 else ''}, commit {', '.join(commits)}"
    return f"Ours: {data}; {made}, {machines}, {max(o['date'] for o in origins)[:10]}."

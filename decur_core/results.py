"""Records of evaluations as rows, and tables with the paper's numbers beside ours."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from .runs import METHODS

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
COLUMNS = {f"{100 * f:g} % {p}": (f, p) for f in (0.01, 1.0) for p in ("linear", "finetune")}
KEYS = ("method", "protocol", "inputs", "fraction")  # what tells one measurement from another, seeds aside
INPUTS = {"sar+optical": "both", "sar": "sar"}


def summary(records: Sequence[dict]) -> list[dict]:
    """One row per method, protocol, inputs and label fraction: mean mAP micro and macro in percent over the seeds.

    ``deviation`` is the sample standard deviation over seeds, None with a single seed.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[k] for k in KEYS), []).append(record)
    rows = []
    for key, found in groups.items():
        row = {**dict(zip(KEYS, key, strict=True)), "seeds": len(found)}
        for kind, mean, deviation in (("micro", "mean", "deviation"), ("macro", "macro", "macro_deviation")):
            values = [r[kind] for r in found]
            row[mean] = statistics.fmean(values)
            row[deviation] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    order = list(METHODS)
    rows.sort(key=lambda r: (order.index(r["method"]), r["inputs"], -r["fraction"], r["protocol"] != "linear"))
    return rows


def per_class(records: Sequence[dict], *, protocol: str, inputs: str, fraction: float) -> dict[str, list]:
    """Average precision of every class, averaged over seeds, by method; None where a class never occurs."""
    found: dict[str, list] = {}
    for r in records:
        if (r["protocol"], r["inputs"], r["fraction"]) == (protocol, inputs, fraction):
            found.setdefault(r["method"], []).append(r["per_class"])
    return {
        method: [None if None in values else statistics.fmean(values) for values in zip(*rows, strict=True)]
        for method, rows in found.items()
    }


def _cell(mean: float, deviation: float | None, best: float | None = None) -> str:
    text = f"{mean:.1f}" + (f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{deviation:.1f}" if deviation is not None else "")
    return f"**{text}**" if mean == best else text


def markdown(rows: Sequence[dict]) -> str:
    """Rows of ``summary`` as a Markdown table, a column per method: mAP micro / macro in percent.

    Mean ± standard deviation over seeds where there is more than one; the best micro of a line in bold.
    """
    names = {"both": "SAR + optical", "sar": "SAR", "optical": "optical"}
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]
    tasks = sorted(
        {(r["inputs"], r["fraction"], r["protocol"]) for r in rows},
        key=lambda t: (list(names).index(t[0]), -t[1], t[2] != "linear"),
    )
    lines = ["| Inputs | Labels | Protocol | " + " | ".join(METHODS[m] for m in methods) + " |"]
    lines.append("|---" * (3 + len(methods)) + "|")
    for task in tasks:
        found = {r["method"]: r for r in rows if (r["inputs"], r["fraction"], r["protocol"]) == task}
        best = max(r["mean"] for r in found.values())
        cells = [names[task[0]], f"{100 * task[1]:g} %", task[2]]
        for r in map(found.get, methods):
            macro = _cell(r["macro"], r["macro_deviation"]) if r else ""
            cells.append(f"{_cell(r['mean'], r['deviation'], best)} / {macro}" if r else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table1(records: Sequence[dict], inputs: str = "sar+optical") -> str:
    """The paper's Table 1 for one kind of input: the paper's mAP (real data) beside ours, best of a column in bold.

    ``inputs``: ``sar+optical`` or ``sar``. Our cells are empty where nothing ran. Which data ours come from is for the
    caption to say: see ``source``.
    """
    ours = [r for r in summary(records) if r["inputs"] == INPUTS[inputs]]
    paper = PAPER["table1_bigearthnet_map_micro"][inputs]
    rows: dict[str, list[str]] = {m: [] for m in METHODS if m in paper}
    for k, column in enumerate(COLUMNS.values()):
        found = {r["method"]: r for r in ours if (r["fraction"], r["protocol"]) == column}
        best = max((r["mean"] for r in found.values()), default=None)
        for method, cells in rows.items():
            r = found.get(method)
            cells.append(_cell(paper[method][k], None, max(row[k] for row in paper.values())))
            cells.append(_cell(r["mean"], r["deviation"], best) if r else "")
    lines = ["| | " + " | ".join(f"{c}, paper | ours" for c in COLUMNS) + " |", "|---" * (1 + 2 * len(COLUMNS)) + "|"]
    return "\n".join(lines + [f"| {METHODS[m]} | " + " | ".join(cells) + " |" for m, cells in rows.items()])


def source(records: Sequence[dict]) -> str:
    """One sentence on what produced the records: data, profile, seeds, commit, hardware, date."""
    if not records:
        return "Ours: nothing has run yet."
    kinds = {"world": "the miniature world (not real data)", "ssl4eo": "SSL4EO-S12 and BigEarthNet-MM"}
    kinds["samples"] = "a handful of real sample tiles"
    data = " and ".join(kinds[k] for k in sorted({r["world"] for r in records}))
    origins = [r["provenance"] for r in records]
    profiles, commits = (sorted(found) for found in ({r["profile"] for r in records}, {o["commit"] for o in origins}))
    hardware = {o["hardware"]["processor"]: o["hardware"] for o in origins}
    machines = ", ".join(", ".join(h["gpus"]) or f"{h['cores']} cores of {name}" for name, h in hardware.items())
    seeds = len({r["seed"] for r in records})
    made = f"profile {', '.join(profiles)}, {seeds} seed{'s' if seeds > 1 else ''}, commit {', '.join(commits)}"
    return f"Ours: {data}; {made}, {machines}, {max(o['date'] for o in origins)[:10]}."

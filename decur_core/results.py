"""Records of evaluations as rows, and tables with the paper's numbers beside ours."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from .runs import METHODS

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
COLUMNS = {"1 % linear": (0.01, "linear"), "1 % finetune": (0.01, "finetune")}
COLUMNS |= {"100 % linear": (1.0, "linear"), "100 % finetune": (1.0, "finetune")}
INPUTS = {"sar+optical": "both", "sar": "sar"}


def summary(records: Sequence[dict]) -> list[dict]:
    """One row per method, protocol, inputs and label fraction: mean mAP micro and macro in percent over the seeds.

    ``deviation`` is the sample standard deviation over seeds, None with a single seed.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        key = tuple(record[k] for k in ("method", "protocol", "inputs", "fraction"))
        groups.setdefault(key, []).append(record)
    rows = []
    for (method, protocol, inputs, fraction), found in groups.items():
        micro = [r["micro"] for r in found if r["micro"] is not None]
        macro = [r["macro"] for r in found]
        row = {"method": method, "protocol": protocol, "inputs": inputs, "fraction": fraction, "seeds": len(found)}
        row["mean"] = statistics.fmean(micro)
        row["deviation"] = statistics.stdev(micro) if len(micro) > 1 else None
        row["macro"] = statistics.fmean(macro)
        row["macro_deviation"] = statistics.stdev(macro) if len(macro) > 1 else None
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


def _cell(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")


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
    found = {(r["method"], r["inputs"], r["fraction"], r["protocol"]): r for r in rows}
    lines = ["| Inputs | Labels | Protocol | " + " | ".join(METHODS[m] for m in methods) + " |"]
    lines.append("|---" * (3 + len(methods)) + "|")
    for task in tasks:
        best = max(r["mean"] for r in rows if (r["inputs"], r["fraction"], r["protocol"]) == task)
        cells = [names[task[0]], f"{100 * task[1]:g} %", task[2]]
        for method in methods:
            row = found.get((method, *task))
            micro = _cell(row["mean"], row["deviation"]) if row else ""
            micro = f"**{micro}**" if row and row["mean"] == best else micro
            cells.append(f"{micro} / {_cell(row['macro'], row['macro_deviation'])}" if row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table1(records: Sequence[dict], inputs: str = "sar+optical") -> str:
    """The paper's Table 1 for one kind of input: the paper's mAP (real data) beside ours, best of a column in bold.

    ``inputs``: ``sar+optical`` or ``sar``. Our cells are empty where nothing ran. Which data ours come from is for the
    caption to say: see ``source``.
    """
    ours = {(r["method"], r["fraction"], r["protocol"]): r for r in summary(records) if r["inputs"] == INPUTS[inputs]}
    paper = PAPER["table1_bigearthnet_map_micro"][inputs]
    best_paper = [max(row[k] for row in paper.values()) for k in range(len(COLUMNS))]
    best_ours = [
        max((r["mean"] for (m, f, p), r in ours.items() if (f, p) == column), default=None)
        for column in COLUMNS.values()
    ]
    lines = ["| | " + " | ".join(f"{c}, paper | ours" for c in COLUMNS) + " |", "|---" * (1 + 2 * len(COLUMNS)) + "|"]
    for method in (m for m in METHODS if m in paper):
        cells = []
        for k, column in enumerate(COLUMNS.values()):
            value = f"{paper[method][k]:.1f}"
            cells.append(f"**{value}**" if paper[method][k] == best_paper[k] else value)
            row = ours.get((method, *column))
            mine = _cell(row["mean"], row["deviation"]) if row else ""
            cells.append(f"**{mine}**" if row and row["mean"] == best_ours[k] else mine)
        lines.append(f"| {METHODS[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def source(records: Sequence[dict]) -> str:
    """One sentence on what produced the records: data, profile, seeds, commit, hardware, date."""
    if not records:
        return "Ours: nothing has run yet."
    kinds = {"world": "the miniature world (not real data)", "ssl4eo": "SSL4EO-S12 and BigEarthNet-MM"}
    kinds["samples"] = "a handful of real sample tiles"
    data = " and ".join(kinds[k] for k in sorted({r["world"] for r in records}))
    profiles = ", ".join(sorted({r["profile"] for r in records}))
    commits = ", ".join(sorted({r["provenance"]["commit"] for r in records}))
    hardware = {r["provenance"]["hardware"]["processor"]: r["provenance"]["hardware"] for r in records}
    machines = ", ".join(", ".join(h["gpus"]) or f"{h['cores']} cores of {name}" for name, h in hardware.items())
    seeds = len({r["seed"] for r in records})
    date = max(r["provenance"]["date"] for r in records)[:10]
    plural = "s" if seeds > 1 else ""
    return f"Ours: {data}; profile {profiles}, {seeds} seed{plural}, commit {commits}, {machines}, {date}."

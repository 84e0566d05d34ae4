"""Records of evaluations as rows of numbers: chosen, averaged over seeds, compared seed by seed, called what they are.

Drawn images are called by their world's name and never by that of the data set whose place they take.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from decur_core import backbones
from decur_core.report.styles import modalities, rank
from decur_core.transfer.evaluation import ONLY

KEYS = ("method", "protocol", "inputs", "fraction")  # what tells one measurement from another, seeds aside
REFERENCE = "decur"  # the method that others are compared with
PAIR = (("mean", ""), ("second", "second_"))  # of a row of `summary`: its numbers, and what is about each begins with
# Kinds of images: what heads columns of their numbers, and how their name goes on.
KINDS = {"published": ("ours", "{}"), "samples": ("real samples", "a handful of real samples of {}")}
KINDS["small"] = ("ours, small networks", "{}, small networks on small images")  # not what the paper's tables hold
KINDS["world"] = ("drawn world", "{}, a miniature world (not real data)")


def choose(records: Iterable[dict], **wanted) -> list[dict]:
    """Records with these values, e.g. ``dataset="GeoNRW", variant=""``."""
    return [r for r in records if all(r.get(k, "") == v for k, v in wanted.items())]


def kind(record: Mapping) -> str:
    """One of KINDS."""
    small = record.get("settings", {}).get("pretraining", {}).get("backbone") in ("small", "medium")
    small = small and record["world"] == "published"
    return "world" if record["drawn"] else "small" if small else record["world"]


def data_title(record: Mapping) -> str:
    """What the images of a record are called: by the data set's title or, if they are drawn, by their world's."""
    return f"{record['data']['title']}, {len(record['per_class'])} classes" if record["drawn"] else record["dataset"]


def head(records: Iterable[Mapping]) -> str:
    """Of columns of our numbers: which kind of images they are from."""
    return " and ".join(sorted({KINDS[kind(r)][0] for r in records})) or KINDS["published"][0]


def numbers(record: Mapping) -> tuple[float, float]:
    """The two numbers of a record that tables show, in percent: mAP micro and macro, or mIoU and overall accuracy."""
    first, second = record["numbers"]
    return record[first], record[second]


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, None where there are too few values or, for the latter, one is no number."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 and mean == mean else None


def paired(mine: Mapping[int, float], other: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Mean and deviation of mine - other over the seeds (keys) that both have."""
    return spread([mine[seed] - other[seed] for seed in mine if seed in other])


def by_seed(records: Iterable[Mapping], number: int = 0) -> dict[int, float]:
    """The first or second number of the records of one measurement, by seed."""
    found: dict[int, float] = {}
    for r in records:
        if r["seed"] in found:
            about = ", ".join(f"{k} {r[k]}" for k in KEYS)
            state = f"two records of {r['dataset']}, {about}, seed {r['seed']}"
            raise ValueError(f"{state}; choose one data set and variant")
        found[r["seed"]] = numbers(r)[number]
    return found


def place(method: str) -> tuple:
    """Of a row: the reference first, then in the order of the paper's tables, then what it does not have."""
    return method != REFERENCE, rank(method)


def order(inputs: str) -> tuple:
    """Of a kind of inputs: everything first, then fewer and fewer modalities, in their order."""
    known, names = [*modalities()], inputs.split("+")
    return inputs != "both", -len(names), [known.index(n) if n in known else len(known) for n in names]


def summary(records: Sequence[dict]) -> list[dict]:
    """One row per method, protocol, inputs and label fraction: ``mean`` and ``second`` (see ``numbers``) over seeds.

    ``deviation`` and ``second_deviation`` are sample standard deviations over seeds, None with a single seed;
    ``difference`` and ``second_difference``: mean and deviation of the difference to DeCUR over the seeds of both;
    ``seeds``: how many; ``steps``: updates of the weights, where records know them; ``data``: ``data_title``.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[k] for k in KEYS), []).append(record)
    rows = []
    for key, found in groups.items():
        row = {**dict(zip(KEYS, key, strict=True)), "seeds": len(found), "data": data_title(found[0])}
        row["steps"] = sorted({r["steps"] for r in found if "steps" in r})
        row["numbers"] = found[0]["numbers"]
        for k, (mean, prefix) in enumerate(PAIR):
            mine, other = (by_seed(group, k) for group in (found, groups.get((REFERENCE, *key[1:]), [])))
            row[mean], row[f"{prefix}deviation"] = spread([*mine.values()])
            row[f"{prefix}difference"] = (None, None) if key[0] == REFERENCE else paired(mine, other)
        rows.append(row)
    rows.sort(key=lambda r: (place(r["method"]), order(r["inputs"]), -r["fraction"], r["protocol"] != "linear"))
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


def _series(points: Iterable[tuple[str, float, dict]]) -> dict[str, dict[float, list[float]]]:
    """Series -> x -> first scores of the seeds, of (series, x, record)."""
    series: dict[str, dict[float, list[float]]] = {}
    for name, x, record in points:
        series.setdefault(name, {}).setdefault(x, []).append(numbers(record)[0])
    return series


def by_share(records: Sequence[dict]) -> dict[str, dict[float, list[float]]]:
    """Scores over the share of common dimensions in percent, a series per size of the embedding (Fig. 3a, 6)."""
    found = [(r, r["settings"]["pretraining"]) for r in records]
    sizes = [(r, s["dim_common"], (s["projector"] or backbones.widths(s["backbone"]))[-1]) for r, s in found]
    return _series((f"{size} dimensions", 100 * common / size, r) for r, common, size in sizes)


def by_projector(records: Sequence[dict]) -> dict[str, dict[float, list[float]]]:
    """Scores over the width of the projector, 0 without one, a series per data set and protocol (Fig. 3b, 7)."""
    widths = [(r, r["settings"]["pretraining"]["projector"] or [0]) for r in records]
    return _series((f"{data_title(r)}, {r['protocol']}", width[-1], r) for r, width in widths)


def source(records: Sequence[dict]) -> str:
    """One sentence on what produced the records: data, profile, seeds, commit, hardware, date."""
    if not records:
        return "Ours: nothing has run yet."
    names = {KINDS[kind(r)][1].format(data_title(r)): None for r in records}
    origins = [r["provenance"] for r in records]
    profiles, last = sorted({r["profile"] for r in records}), max(origins, key=lambda o: o["date"])
    earlier = len({o["commit"] for o in origins}) - 1
    hardware = [o["hardware"] for o in origins]
    machines = dict.fromkeys(", ".join(h["gpus"]) or f"{h['cores']} cores of {h['processor']}" for h in hardware)
    seeds = len({r["seed"] for r in records})
    made = f"profile {', '.join(profiles)}, {seeds} seed{'s' if seeds > 1 else ''}, commit {last['commit']}"
    before, data, whose = f" and {earlier} earlier" if earlier else "", " and ".join(names), head(records)
    return f"{whose[0].upper()}{whose[1:]}: {data}; {made}{before}, {', '.join(machines)}, {last['date'][:10]}."

"""Results that read themselves: from measurements, the sentence that they allow.

A method is said to be ahead of another only where the mean difference over the seeds of both exceeds the deviation of
these differences; of a single seed no difference is told.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from decur_core.explain.probes import Table, scores
from decur_core.report import tables
from decur_core.report.matrices import COLUMNS, method
from decur_core.report.records import by_seed, data_title, paired, place, spread
from decur_core.report.styles import given, title


def told(difference: tuple[float | None, float | None]) -> bool:
    """Whether a paired difference (mean, deviation) exceeds its deviation."""
    mean, deviation = difference
    return deviation is not None and abs(mean) > deviation


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def compare(values: Mapping[str, Mapping[int, float]], what: str, *, digits: int = 1) -> str:
    """A sentence on which method has most of ``what``: method -> seed -> value, the higher the better.

    It names the highest mean, the methods that it is ahead of, and those that it cannot be told from, with the paired
    differences; of one method its number alone. What is not a number is left out; a lead that rounds to 0 is none.
    """
    numbers = {name: {seed: v for seed, v in seeds.items() if v == v} for name, seeds in values.items()}
    if not (values := {name: seeds for name, seeds in numbers.items() if seeds}):
        raise ValueError(f"no measurement of {what} to make a sentence of")
    means = {name: spread([*seeds.values()]) for name, seeds in values.items()}
    first = max(means, key=lambda name: means[name][0])
    count = len(values[first])
    if len(values) > 1 and max(map(len, values.values())) == 1:
        listed = _listed([f"{n} {tables.number(*means[n], digits)}" for n in sorted(means, key=lambda n: -means[n][0])])
        return f"{what}, one seed, which tells nobody from anybody: {listed}."
    about = f"{tables.number(*means[first], digits)} ({count} seed{'s' if count > 1 else ''})"
    ahead, close, behind = [], [], []
    for name in [name for name in values if name != first]:
        difference = paired(values[first], values[name])
        number = f"by {tables.number(*difference, digits)}" if difference[0] is not None else "no seed in common"
        lead = round(difference[0], digits) if told(difference) else 0
        group = ahead if lead > 0 else behind if lead < 0 else close
        group.append(f"{name} ({number})")
    verbs = {"is not told from": close, "is behind, over the seeds of both,": behind}
    rest = [f"{verb} {_listed(names)}" for verb, names in verbs.items() if names]
    if ahead:
        return f"{what}: {'; it '.join([f'{first}, with {about}, is ahead of {_listed(ahead)}', *rest])}."
    if rest:
        lead = "" if behind else "nobody is ahead; "
        return f"{what}: {lead}the highest mean, {first}'s {about}, {' and '.join(rest)}."
    return f"{what}: {first} has {about}."


def of_records(
    records: Iterable[dict], *, protocol: str, inputs: str, fraction: float, number: int = 0, data: bool = True
) -> str:
    """``compare`` of the methods' scores in one task, such as ``linear``, ``both``, 1.0; first or second number.

    Methods without pretraining are in it where the protocol is theirs. ``data``: name the data set.
    """
    records = list(records)
    found = [r for r in records if (r["inputs"], r["fraction"], r["protocol"]) == (inputs, fraction, protocol)]
    if not found:
        raise ValueError(f"no record with {protocol}, inputs {inputs}, {100 * fraction:g} % of the labels")
    values = {
        title(m): by_seed([r for r in found if r["method"] == m], number)
        for m in sorted({r["method"] for r in found}, key=place)
    }
    score = found[0]["numbers"][number]
    what = f"{tables.NUMBERS.get(score, score)}, {protocol}, {100 * fraction:g} % of the labels"
    what = f"{what}, {given(inputs, {r['inputs'] for r in records})}"
    return compare(values, f"{what}, {data_title(found[0])}" if data else what)


def of_matrices(
    by_run: Mapping[str, Mapping[str, Table]],
    seen_by: Mapping[str, str],
    *,
    kernel: str = "linear",
    score: str = "block score",
) -> str:
    """``compare`` of one of ``probes.scores`` of R2 matrices; ``by_run``: of ``probes.tables``, labels with a seed."""
    values: dict[str, dict[int, float]] = {}
    for label, by_kernel in by_run.items():
        seed = re.search(r", seed (\d+)", label)
        found = scores(by_kernel[kernel], seen_by)[score]
        values.setdefault(method(label), {})[int(seed[1]) if seed else 0] = found
    return compare(values, f"{COLUMNS.get(score, score)}, {kernel} probe", digits=2)

"""Sphinx extension: tables on prose pages, made from the records of runs when the book is built.

A page holds a comment line, ``<!-- decur: NAME -->``, and gets the table that ``TABLES`` makes for NAME. Records travel
with the executed notebooks, as ``<decur_executed>/<profile>/records.json``; the first profile of ``decur_profiles``
that has the kind of data asked for supplies a table. Those of benchmarks are in ``benchmarks/records``. The library is
imported where a table needs it: it brings torch, and most pages have no table.
"""

import collections
import itertools
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

MARK = re.compile(r"^<!-- decur: (.+?) -->$", re.MULTILINE)
BLOCKS = """<figure class="sketch" id="fig-blocks">
<svg viewBox="0 0 400 296" role="img" aria-labelledby="blocks-title">
<title id="blocks-title">{title}</title>
<g fill="currentColor" font-size="12">
{parts}
</g></svg>
<figcaption>How much blocks of the embedding hold of what both sensors see (upper row) and of what one sees alone (lower
row): R² of a linear probe as a share of what a supervised network reads from the images, mean over pairs and seeds.
Drawn worlds, profile {profile}; chapter 60 has all of it.</figcaption>
</figure>"""
TRUTH = "60_ground_truth.ipynb"
NOT_RUN = "*Not run yet.*"
# Of OMBRIA, the shorter the less is given.
DATES = {"0": ", before the flood", "1": ", images after the flood", "0+1": ", images before and after the flood"}
NOTHING = (
    "Nothing yet: no run on a real data set stands in this book. The pages of a run say on top what their images"
    " are, and [the results](results.md) what can be said today."
)
TARGETS = (  # what, at least (at most with a minus sign), record, its row, its column
    ("loss, forward and backward, K 8192, N 256, one CPU core: times faster", 35, "loss", -1, "times faster"),
    ("its peak extra memory: share of the published way's", -0.2, "loss", -1, "share of memory"),
    ("loader, one process, 15 bands, ours without making views: times faster", 20, "loader", 1, "ours, times faster"),
    ("augmentation, one CPU core, optical: times faster", 1, "augment", 0, "published/ours"),
    ("augmentation, one CPU core, SAR: times faster", 1, "augment", 1, "published/ours"),
    ("LARS step, one CPU core: times faster", 1, "lars", 0, "times faster"),
    ("LARS step, GPU: times faster", 5, "lars-cuda", 0, "times faster"),
    ("augmentation, H200: share of the step", -0.05, "step-cuda", 1, "views, share"),
    ("whole step, H200: times faster", 4, "step-cuda", 1, "times faster"),
    ("whole step, H200: pairs/s", 600, "step-cuda", 1, "pairs/s"),
    ("251,079 pairs, 100 epochs, H200: hours", -12, "step-cuda", 1, "hours for 251,079 pairs x 100"),
)


def measured(app, *, trained: bool = False, **wanted) -> list[dict]:
    """Records with these values, such as ``dataset="GeoNRW"`` or ``kind="world"`` (world is drawn, else samples, small
    or published), of the first profile that has any; ``trained``: the last one aside, which only shows that pages run.
    """
    from decur_core.report import records

    for profile in app.config.decur_profiles[: -1 if trained else None]:
        every = [record | {"kind": records.kind(record)} for record in _records(app, profile)]
        if found := records.choose(every, **wanted):
            return found
    return []


def _read(file: Path, otherwise):
    """What a JSON file of the repository holds, ``otherwise`` where there is none; a ValueError names a damaged one."""
    try:
        return json.loads(file.read_text()) if file.is_file() else otherwise
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); restore it from the repository, or run again") from None


def _records(app, profile: str) -> list[dict]:
    return _read(Path(app.srcdir) / app.config.decur_executed / profile / "records.json", [])


def summary(app, argument: str) -> str:
    """All scores on one data set of one kind, with what produced them: ``world BigEarthNet-MM``."""
    from decur_core.report import records, tables

    kind, _, dataset = argument.partition(" ")
    found = measured(app, kind=kind, dataset=dataset, variant="")
    return f"{tables.markdown(records.summary(found))}\n\n{records.source(found)}" if found else NOT_RUN


def table(app, argument: str) -> str:
    """A table of the paper beside our records of one kind of data: ``1 sar+optical published``."""
    from decur_core.data import datasets
    from decur_core.report import records, tables

    number, part, kind = argument.split()
    name = ({n: name for n, (name, _) in tables.TRANSFER.items()} | {3: part}).get(int(number))
    about = {"dataset": datasets.find(name).title} if name else {"pair": part.replace("+", "_"), "variant": "terms"}
    found = measured(app, kind=kind, **about)
    return f"{tables.table(int(number), found, part)}\n\n{records.source(found)}"


def claims(app, _: str) -> str:
    """DeCUR against other methods in the paper's first two tables, and in trained runs on drawn worlds."""
    from decur_core.data import datasets
    from decur_core.report import records, sentences, styles, tables
    from decur_core.transfer.evaluation import ONLY

    rows, every, said = [], [], collections.Counter()
    without = {protocol: method for method, protocol in ONLY.items()}
    for table, (name, key) in tables.TRANSFER.items():
        found = measured(app, trained=True, kind="world", dataset=datasets.find(name).title, variant="")
        every += found
        parts = {part: paper for part, paper in tables.PAPER[key].items() if part != "columns"}
        for (part, paper), (k, column) in itertools.product(parts.items(), enumerate(tables.COLUMNS)):
            fraction, protocol = tables.COLUMNS[column]
            task = {"inputs": "both" if "+" in part else part, "fraction": fraction, "protocol": protocol}
            ours = records.by_seed(records.choose(found, method=records.REFERENCE, **task))
            for other in ("barlow_twins", "barlow_twins_single", without[protocol]):
                theirs = records.by_seed(records.choose(found, method=other, **task))
                difference = records.paired(ours, theirs)
                if difference[0] is None or other not in paper:
                    continue
                wanted = paper[records.REFERENCE][k] - paper[other][k]
                same = "agrees" if (difference[0] > 0) == (wanted > 0) else "does not"
                verdict = same if sentences.told(difference) else "cannot be told here"
                said[verdict] += 1
                numbers = (f"{wanted:+.1f}", tables.number(*difference, sign="+"))
                rows.append((f"{table}, {part}, {column}", styles.title(other), *numbers, verdict))
    if not rows:
        return NOT_RUN
    header = ("table, inputs, labels", "DeCUR against", "paper", "trained networks on drawn scenes", "")
    counts = ", ".join(f"{verdict} {n}" for verdict, n in said.items())
    summary = f"Of {len(rows)} differences: {counts}. {records.source(every)}"
    against = [row for row in rows if row[-1] == "does not"]
    summary += f"\n\n{tables.grid(header, against)}" if against else ""
    return f"{summary}\n\n::::{{dropdown}} Every difference\n{tables.grid(header, rows)}\n::::"


def steps(app, _: str) -> str:
    """Scores on held-out training images after so many steps of pretraining, means over seeds, of each data set and
    method for which runs of several lengths (variant ``steps``) are on record."""
    from decur_core.report import records, styles, tables

    parts, every = [], []
    for profile in app.config.decur_profiles[:-1]:
        lengths: dict[str, dict[str, dict[int, list[dict]]]] = {}
        for r in records.choose(_records(app, profile), variant="steps"):
            run, score = r["settings"]["pretraining"], r["numbers"][0]
            data = f"{tables.NUMBERS.get(score, score)}: {records.data_title(r)}"
            data += f", {styles.title(r['inputs'])} alone" if r["inputs"] != "both" else ""
            count = run["epochs"] * (run["data.pairs"] // run["batch_size"])
            lengths.setdefault(data, {}).setdefault(r["method"], {}).setdefault(count, []).append(r)
        for data, methods in lengths.items():
            found = {m: methods[m] for m in sorted(methods, key=records.place) if len(methods[m]) > 1}
            counts, rows = sorted({n for several in found.values() for n in several}), []
            for method, several in found.items():
                scores = {n: statistics.fmean(records.by_seed(several[n]).values()) for n in sorted(several)}
                *_, before, last = scores.values()
                cells = (f"{scores[n]:.1f}" if n in scores else "" for n in counts)
                rows.append((styles.title(method), *cells, f"{last - before:+.1f}"))
                every += itertools.chain(*several.values())
            if rows:
                header = ("Method", *(f"{n:,} steps" for n in counts), "last difference")
                parts.append(f"**{data}**\n\n{tables.grid(header, rows)}")
    return "\n\n".join([*parts, records.source(every)]) if parts else NOT_RUN


def settings(app, _: str) -> str:
    """Every setting with its default and meaning."""
    from decur_core import config
    from decur_core.report.tables import grid

    described = config.describe()
    rows = (
        (f"`{name}`", f"`{default}`" if str(default) else "(empty)", meaning) for name, default, meaning in described
    )
    return grid(("setting", "default", "meaning"), rows)


def _benchmark(app, name: str) -> dict | None:
    return _read(Path(app.srcdir) / "benchmarks" / "records" / f"{name}.json", None)


def _number(value) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def benchmark(app, name: str) -> str:
    """One benchmark's rows, then its settings, and where and when they were measured."""
    from decur_core.report.tables import grid

    record = _benchmark(app, name)
    if record is None:
        return "*Not measured.*"
    rows, about = record["rows"], record["provenance"]
    lines = grid(list(rows[0]), [list(map(_number, row.values())) for row in rows])
    found = {k: v for k, v in record["settings"].items() if isinstance(v, int | float | str)}
    chosen = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
    hardware, state = about["hardware"], " with changes" if about["modified"] else ""
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cores']} cores of {hardware['processor']}"
    where = f"{machine}; torch {about['versions']['torch']}; commit {about['commit']}{state}; {about['date'][:10]}"
    load = f"; load before it began {about['load_before']}" if "load_before" in about else ""
    verb = "Computed" if record["settings"].get("computed") else "Measured"
    return f"{lines}\n\nSettings: {', '.join(chosen)}. {verb} on {where}{load}."


def targets(app, _: str) -> str:
    """What is aimed at beside what the records hold; what no record holds is open."""
    from decur_core.report.tables import grid

    lines = []
    for what, aim, name, row, column in TARGETS:
        record, wanted = _benchmark(app, name), f"{'at least' if aim > 0 else 'at most'} {abs(aim)}"
        found = record["rows"][row][column] if record else None
        verdict = "open" if record is None else "reached" if (found >= aim if aim > 0 else found <= -aim) else "missed"
        lines.append((what, wanted, "" if record is None else _number(found), verdict))
    return grid(("what", "aim", "measured", ""), lines)


# record: columns that name a group, {column: series}, unit, whether the scale is logarithmic, what is seen
FIGURES = {
    "loss": (("K", "N"), {"published ms": "published", "ours ms": "ours"}, "ms", True, "Time of the loss"),
    "augment": (
        ("ms per view",),
        {k: k for k in ("published", "tuned", "ours")},
        "ms per view",
        True,
        "Time of a view",
    ),
    "loader": (("loader",), {"pairs/s": "pairs/s"}, "pairs/s", True, "Pairs from one worker"),
    "scaling": (("processes",), {"pairs/s": "pairs/s"}, "pairs/s", False, "Pairs per second over processes"),
    "convert": (
        ("way", "workers"),
        {"locations/s": "locations/s"},
        "locations/s",
        False,
        "Locations converted per second",
    ),
    "hha": (
        (),
        {"published ms": "published", "ours ms": "ours", "given ms": "ours, gravity given"},
        "ms",
        True,
        "Time of an HHA",
    ),
}


def figure(app, name: str) -> str:
    """One benchmark's record as bars; the picture is drawn into the build folder."""
    from decur_core.report import figures

    record = _benchmark(app, name)
    if record is None:
        return ""
    keys, columns, unit, log, seen = FIGURES[name]
    groups = [
        "\n".join(str(r[k]) if isinstance(r[k], str) or len(keys) == 1 else f"{k} {r[k]}" for k in keys)
        for r in record["rows"]
    ]
    series = {label: [row[column] for row in record["rows"]] for column, label in columns.items()}
    target = Path(app.srcdir) / "_build" / "figures" / f"{name}.svg"
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = figures.bars(groups, series, unit=unit, log=log)
    if all(group.isdigit() for group in groups):  # a number says nothing alone
        drawn.axes[0].set_xlabel(keys[0])
    drawn.savefig(target, metadata={"Date": None})
    return f"```{{figure}} /_build/figures/{name}.svg\n:alt: {seen} as bars\n:name: fig-bench-{name}\n\n{seen}.\n```"


def _real(app, profile: str) -> dict[tuple[str, str], list[dict]]:
    """Scores on real test images of a profile: (what they are about, where, which dates) -> records.

    Variants in which DeCUR stands alone are ablations, which have chapters of their own; one that scores what the
    plain runs do is named.
    """
    from decur_core.report import records

    found: dict[tuple[str, str], list[dict]] = {}
    every = [r for r in _records(app, profile) if records.kind(r) in ("published", "small")]
    plain = {(r["dataset"], r["numbers"][0]) for r in every if not r.get("variant")}
    compared = {(r["dataset"], r.get("variant")) for r in every if r["method"] != records.REFERENCE}
    for r in every:
        variant = r.get("variant", "")
        if r.get("split", "test") == "test" and (not variant or (r["dataset"], variant) in compared):
            given = DATES.get(r.get("seasons", ""), "")
            given += f", {variant}" if variant and (r["dataset"], r["numbers"][0]) in plain else ""
            further = r.get("further", {})
            for where, score in {"": {}, **further}.items():
                place = f", events of {where}" if where else ", test" if further else ""
                name = f"{r['dataset']}{place}{given}"
                found.setdefault((r["numbers"][0], name), []).append(r | score)
    return found


POINTS = (
    "Points that DeCUR has more than no pretraining, with both sensors, over seeds: what does not exceed its deviation"
    " says nothing."
)


def _furthest(app) -> Iterator[list[tuple[str, list[dict]]]]:
    """Of every profile with records of real data sets: name and records of each data set, kind of score and variant,
    where most was given and in the place that is furthest from training (whose name is the longest)."""
    for profile in app.config.decur_profiles:
        found = sorted(_real(app, profile).items(), key=lambda item: len(item[0][1]))
        about = [(metric, rows[0]["dataset"], rows[0].get("variant", "")) for (metric, _), rows in found]
        last = {key: (name, rows) for key, ((_, name), rows) in zip(about, found, strict=True)}.values()
        both = [(name, [r for r in rows if r["inputs"] == "both"]) for name, rows in last]
        if both := [(name, rows) for name, rows in both if rows]:
            yield both


def worth(app, _: str) -> str:
    """A table of what pretraining is worth on real images, a row for each share of the labels."""
    from decur_core.report import records, tables

    rows = {}
    for name, found in (pair for last in _furthest(app) for pair in last):
        score = found[0]["numbers"][0]
        what = f"{name}: {tables.NUMBERS.get(score, score)}"
        fractions = sorted({r["fraction"] for r in found})
        for fraction in fractions:
            of = f", {100 * fraction:g} % of the labels" if len(fractions) > 1 else ""
            rows[what + of] = records.choose(found, fraction=fraction)
    return f"{tables.worth(rows)}\n\n{POINTS}" if rows else NOTHING


def findings(app, _: str) -> str:
    """What records of real data sets allow to say, with all labels: a sentence for each score and protocol."""
    from decur_core.report import records, sentences

    lines = []
    for last in _furthest(app):
        told = []
        for name, rows in last:
            of = records.choose(rows, method=records.REFERENCE, fraction=1.0)
            for protocol in sorted({r["protocol"] for r in of}, reverse=True):
                task = {"protocol": protocol, "inputs": "both", "fraction": 1.0}
                told.append(f"- **{name}.** {sentences.of_records(rows, **task, data=False)}")
        if told:
            lines += [*told, f"\n{records.source([r for _, rows in last for r in rows])}\n"]
    return "\n".join(lines) or NOTHING


def real(app, profile: str) -> str:
    """Every score on real test images of a profile, first number alone, with what produced them."""
    from decur_core.report import records, tables

    parts, every = [], []
    for (_, name), rows in _real(app, profile).items():
        summary = [row | {"data": name} for row in records.summary(rows)]
        parts.append(tables.markdown(summary, numbers=1))
        every += rows
    return "\n\n".join([*parts, records.source(every)]) if parts else NOT_RUN


def blocks(app, _: str) -> str:
    """What common and unique blocks hold of common and own factors, two by two, as notebook 60 measured it.

    Of the first profile that has it, the last one aside, which only shows that pages run. An SVG within the page, in
    its colours; empty where there is nothing to show.
    """
    for profile in app.config.decur_profiles[:-1]:
        copy = Path(app.srcdir) / app.config.decur_executed / profile / TRUTH
        if held := _held(_read(copy, {"cells": []})):
            break
    else:
        return ""
    from decur_core.report import matrices, styles

    by_method: dict[str, dict[str, list[float]]] = {}
    for label, scores in (run for runs in held.values() for run in runs.items()):
        for kind, value in scores.items():
            by_method.setdefault(matrices.method(label), {}).setdefault(kind, []).append(value)
    shown = [name for name in matrices.SHOWN if name in by_method]
    paints = {name: styles.colour(styles.method_of(name)) for name in shown}
    parts, titles = [], []
    for k, (factors, block) in enumerate(itertools.product(("common", "own"), ("common", "unique"))):
        x, bottom = 10 + 200 * (k % 2), 130 + 118 * (k // 2)
        parts.append(f'<path stroke="currentColor" d="M{x} {bottom}h180"/>')
        parts.append(f'<text x="{x}" y="{bottom - 90}">{factors} factors</text>')
        said = []
        for left, name in zip((x + 10, x + 70, x + 130), shown, strict=False):
            value = max(0.0, statistics.fmean(by_method[name][f"{factors} factors, {block} block"]))
            here = {v for f in ("common", "own") for v in by_method[name][f"{f} factors, {block} block"]}
            text, high = "–" if here == {0.0} else f"{value:.2f}", 70 * value
            said.append(f"{name} {'has none' if text == '–' else text}")
            box = f'x="{left}" y="{bottom - high:.1f}" width="34" height="{high:.1f}"'
            parts.append(
                f'<rect {box} fill="{paints[name]}"/><text x="{left + 4}" y="{bottom - 4 - high:.1f}">{text}</text>'
            )
        titles.append(f"{factors} factors in the {block} block: {', '.join(said)}.")
    for x, block in ((10, "common"), (210, "unique")):
        parts.append(f'<text x="{x}" y="16" font-weight="600">{block} block</text>')
    for x, name in zip((10, 80, 190), shown, strict=False):
        box = f'x="{x}" y="278" width="10" height="10"'
        parts.append(f'<rect {box} fill="{paints[name]}"/><text x="{x + 14}" y="288">{name}</text>')
    drawn = BLOCKS.format(title=" ".join(titles), parts="\n".join(parts), profile=profile)
    target = "../notebooks/60_ground_truth.html"
    return drawn.replace("chapter 60", f'<a href="{target}">chapter 60</a>')


def _held(notebook: dict) -> dict:
    """Pair -> run -> kind of ``probes.HELD`` -> mean R2, as the cell of an executed notebook 60 gives it."""
    for cell in notebook["cells"]:
        for out in cell.get("outputs", []):
            if "application/json" in out.get("data", {}):
                return out["data"]["application/json"]
    return {}


TABLES = {
    "claims": claims,
    "findings": findings,
    "worth": worth,
    "real": real,
    "blocks": blocks,
    "figure": figure,
    "summary": summary,
    "table": table,
    "settings": settings,
    "steps": steps,
    "benchmark": benchmark,
    "targets": targets,
}


def read_source(app, docname: str, content: list[str]) -> None:
    """Handler of Sphinx's ``source-read``: puts tables in the place of their comment lines."""
    if docname.startswith("book/"):
        for profile in app.config.decur_profiles:
            for file in ("records.json", TRUTH) if docname == "book/index" else ("records.json",):
                app.env.dependencies[docname].add(str(Path(app.srcdir) / app.config.decur_executed / profile / file))
        measurements = (Path(app.srcdir) / "benchmarks" / "records").glob("*.json")
        app.env.dependencies[docname].update(map(str, measurements))

        def table(match: re.Match) -> str:
            name, _, argument = match[1].partition(" ")
            return TABLES[name](app, argument)

        content[0] = MARK.sub(table, content[0])


def setup(app) -> dict:
    app.connect("source-read", read_source)
    return {"version": "1", "parallel_read_safe": True}

"""Sphinx extension: tables on prose pages, made from the records of runs when the book is built.

A page holds a comment line, ``<!-- decur: NAME -->``, and gets the table that ``TABLES`` makes for NAME. Records travel
with the executed notebooks, as ``<decur_executed>/<profile>/records.json``; the first profile of ``decur_profiles``
that has the kind of data asked for supplies a table. Those of benchmarks are in ``benchmarks/records``. The library is
imported where a table needs it: it brings torch, and most pages have no table.
"""

import json
import re
from pathlib import Path

MARK = re.compile(r"^<!-- decur: (.+?) -->$", re.MULTILINE)
NOT_RUN = "*Not run yet.*"
TARGETS = (  # what, at least (at most with a minus sign), record, its row, its column
    ("loss, forward and backward, K 8192, N 256, one CPU core: times faster", 35, "loss", -1, "times faster"),
    ("its peak extra memory: share of the published way's", -0.2, "loss", -1, "share of memory"),
    ("loader, one process, 264 px, 15 bands: times faster", 20, "loader", 1, "ours, times faster"),
    ("augmentation, one CPU core, optical: times faster", 1, "augment", 0, "published/ours"),
    ("augmentation, one CPU core, SAR: times faster", 1, "augment", 1, "published/ours"),
    ("LARS step, one CPU core: times faster", 1, "lars", 0, "times faster"),
    ("LARS step, GPU: times faster", 5, "lars-cuda", 0, "times faster"),
    ("augmentation, H200: share of the step", -0.05, "step-cuda", 1, "views, share"),
    ("whole step, H200: times faster", 4, "step-cuda", 1, "times faster"),
    ("whole step, H200: pairs/s", 600, "step-cuda", 1, "pairs/s"),
    ("251,079 pairs, 100 epochs, H200: hours", -12, "step-cuda", 1, "hours for 251,079 pairs x 100"),
)


def measured(app, kind: str) -> list[dict]:
    """Records of the preferred profile whose images are of ``kind``: world (drawn), samples or published."""
    from decur_core.report import records

    for profile in app.config.decur_profiles:
        file = Path(app.srcdir) / app.config.decur_executed / profile / "records.json"
        if file.is_file():
            found = [record for record in json.loads(file.read_text()) if records.kind(record) == kind]
            if found:
                return found
    return []


def summary(app, argument: str) -> str:
    """All scores on one data set of one kind, with what produced them: ``world BigEarthNet-MM``."""
    from decur_core.report import records, tables

    kind, _, dataset = argument.partition(" ")
    found = [r for r in records.choose(measured(app, kind), dataset=dataset) if not r.get("variant")]
    return f"{tables.markdown(records.summary(found))}\n\n{records.source(found)}" if found else NOT_RUN


def table(app, argument: str) -> str:
    """A table of the paper beside our records of one kind of data: ``1 sar+optical published``."""
    from decur_core.report import records, tables

    number, part, kind = argument.split()
    found = measured(app, kind)
    return f"{tables.table(int(number), found, part)}\n\n{records.source(found)}"


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
    file = Path(app.srcdir) / "benchmarks" / "records" / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


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
    groups = ["\n".join(f"{k} {r[k]}" if len(keys) > 1 else str(r[k]) for k in keys) for r in record["rows"]]
    series = {label: [row[column] for row in record["rows"]] for column, label in columns.items()}
    target = Path(app.srcdir) / "_build" / "figures" / f"{name}.svg"
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = figures.bars(groups, series, unit=unit, log=log)
    if all(group.isdigit() for group in groups):  # a number says nothing alone
        drawn.axes[0].set_xlabel(keys[0])
    drawn.savefig(target, metadata={"Date": None})
    return f"```{{figure}} /_build/figures/{name}.svg\n:alt: {seen} as bars\n:name: fig-bench-{name}\n\n{seen}.\n```"


TABLES = {
    "figure": figure,
    "summary": summary,
    "table": table,
    "settings": settings,
    "benchmark": benchmark,
    "targets": targets,
}


def read_source(app, docname: str, content: list[str]) -> None:
    """Handler of Sphinx's ``source-read``: puts tables in the place of their comment lines."""
    if docname.startswith("book/"):
        for profile in app.config.decur_profiles:
            records = Path(app.srcdir) / app.config.decur_executed / profile / "records.json"
            app.env.dependencies[docname].add(str(records))
        measurements = (Path(app.srcdir) / "benchmarks" / "records").glob("*.json")
        app.env.dependencies[docname].update(map(str, measurements))

        def table(match: re.Match) -> str:
            name, _, argument = match[1].partition(" ")
            return TABLES[name](app, argument)

        content[0] = MARK.sub(table, content[0])


def setup(app) -> dict:
    app.connect("source-read", read_source)
    return {"version": "1", "parallel_read_safe": True}

"""Sphinx extension: tables on prose pages, made from the records of runs when the book is built.

A page holds a comment line, ``<!-- decur: NAME -->``, and gets the table that ``TABLES`` makes for NAME. Records travel
with the executed notebooks, as ``<decur_executed>/<profile>/records.json``; the first profile of ``decur_profiles``
that has the kind of data asked for supplies a table.
"""

import json
import re
from pathlib import Path

from decur_core import config, results

MARK = re.compile(r"^<!-- decur: (.+?) -->$", re.MULTILINE)
NOT_RUN = "*Not run yet.*"


def measured(app, kind: str) -> list[dict]:
    """Records of the preferred profile whose images are of ``kind``: world, samples or ssl4eo."""
    for profile in app.config.decur_profiles:
        file = Path(app.srcdir) / app.config.decur_executed / profile / "records.json"
        if file.is_file():
            found = [record for record in json.loads(file.read_text()) if record["world"] == kind]
            if found:
                return found
    return []


def summary(app, kind: str) -> str:
    """All scores on one kind of data, with what produced them."""
    found = measured(app, kind)
    return f"{results.markdown(results.summary(found))}\n\n{results.source(found)}" if found else NOT_RUN


def table1(app, inputs: str) -> str:
    """The paper's Table 1 beside ours, ours being from real data only."""
    found = measured(app, "ssl4eo")
    return f"{results.table1(found, inputs)}\n\n{results.source(found)}"


def settings(app, _: str) -> str:
    """Every setting with its default and meaning."""
    rows = (f"| `{name}` | `{default}` | {meaning} |" for name, default, meaning in config.describe())
    return "| setting | default | meaning |\n|---|---|---|\n" + "\n".join(rows)


TABLES = {"summary": summary, "table1": table1, "settings": settings}


def read_source(app, docname: str, content: list[str]) -> None:
    """Handler of Sphinx's ``source-read``: puts tables in the place of their comment lines."""
    if docname.startswith("book/"):
        for profile in app.config.decur_profiles:
            records = Path(app.srcdir) / app.config.decur_executed / profile / "records.json"
            app.env.dependencies[docname].add(str(records))

        def table(match: re.Match) -> str:
            name, _, argument = match[1].partition(" ")
            return TABLES[name](app, argument)

        content[0] = MARK.sub(table, content[0])


def setup(app) -> dict:
    app.connect("source-read", read_source)
    return {"version": "1", "parallel_read_safe": True}

"""Sphinx extension: lays the outputs of executed notebooks into the pages of their sources, cell by cell.

Sources in ``notebooks/`` hold no outputs. For each page the first profile of ``decur_profiles`` that has a copy in
``<decur_executed>/<profile>/`` supplies them. Code must be the code that ran (compared as syntax trees: comments and
formatting are free, prose too); a copy that is missing, unfinished or of other code is a warning that names the command
that mends it, so ``-W`` fails. The extension also serves MathJax from the installed package, for reading offline.
"""

import ast
import hashlib
from importlib.metadata import distribution
from pathlib import Path

import nbformat
from sphinx.util import logging

logger = logging.getLogger(__name__)

# tex-svg.js of MathJax 3.2.2 (Apache-2.0) as its authors published it; it needs no fonts or further files.
MATHJAX = "sphinx-mathjax-offline/static/mathjax/tex-svg.js"
MATHJAX_SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"


class Unusable(Exception):
    """An executed copy that must not be shown; the message says why."""


def same_code(a: str, b: str) -> bool:
    """Whether two cells hold the same code, comments and formatting aside; cells with magics are compared as text."""
    try:
        return ast.dump(ast.parse(a)) == ast.dump(ast.parse(b))
    except SyntaxError:
        return a.strip() == b.strip()


def tagged(cell, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and not tagged(cell, "injected-parameters")]


def printed(cell) -> list[str]:
    return [line for out in cell.outputs if out.output_type == "stream" for line in out.text.splitlines()]


def duration(seconds: float) -> str:
    """``seconds`` as a reader says it: 9 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def lay(source, executed) -> None:
    """Put the outputs of ``executed`` into ``source`` (both notebooks; ``source`` is changed).

    The parameters cell then shows the values that were used, and a note in the margin under the title says profile,
    date, duration and overrides. Raises ``Unusable`` when ``executed`` is not a finished run of the same code.
    """
    from decur_core.running.folders import SENTINEL  # here, as the library brings torch

    note, pages, ran = executed.metadata.get("decur"), code_cells(source), code_cells(executed)
    if not note or not ran or SENTINEL not in printed(ran[-1]):
        raise Unusable("is not a finished run")
    if len(pages) != len(ran):
        raise Unusable(f"has {len(ran)} code cells, the page has {len(pages)}")
    for number, (page, old) in enumerate(zip(pages, ran, strict=True), start=1):
        if not same_code(page.source, old.source):
            first = next(iter(page.source.splitlines()), "")
            raise Unusable(f"ran other code in code cell {number} ({first!r})")
        page.outputs = [out for out in old.outputs if out.output_type != "stream" or out.text.strip() != SENTINEL]
        page.execution_count = None
        if tagged(page, "parameters"):
            injected = [cell.source for cell in executed.cells if tagged(cell, "injected-parameters")]
            page.source = "\n".join(injected or [page.source]).removeprefix("# Parameters\n").strip()
    used = "".join(f", `{key} = {value}`" for key, value in note["overrides"].items())
    remark = f"Profile {note['profile']}{used}, {note['date'][:10]}, {duration(note['seconds'])}"
    title, newline, rest = source.cells[0].source.partition("\n")
    source.cells[0].source = f"{title}\n\n```{{margin}}\n{remark}\n```\n{newline}{rest}"


def read_source(app, docname: str, content: list[str]) -> None:
    """Handler of Sphinx's ``source-read``: replaces a notebook's text by the same notebook with outputs."""
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".ipynb":
        return
    folder, number = Path(app.srcdir) / app.config.decur_executed, path.name[:2]
    copies = [folder / profile / path.name for profile in app.config.decur_profiles]
    for copy in copies:
        app.env.dependencies[docname].add(str(copy))  # an incremental build sees a new run
    copy = next((copy for copy in copies if copy.is_file()), None)
    if copy is None:
        problem, profile = "no executed copy", app.config.decur_profiles[-1]
    else:
        notebook, profile = nbformat.reads(content[0], as_version=4), copy.parent.name
        try:
            lay(notebook, nbformat.read(copy, as_version=4))
            content[0] = nbformat.writes(notebook)
            return
        except Unusable as error:
            problem = f"{copy.relative_to(app.srcdir)} {error}"
    command = f"python -m decur_core.run {profile} {number}"
    logger.warning("%s: %s; run: %s", path.name, problem, command, location=docname, type="decur", subtype="executed")


def serve_mathjax(app, config) -> None:
    """Handler of ``config-inited``: formulas are set by a file of the book's own, not by one from the network."""
    file = Path(distribution("sphinx-mathjax-offline").locate_file(MATHJAX))
    if hashlib.sha256(file.read_bytes()).hexdigest() != MATHJAX_SHA256:
        logger.warning("%s is not MathJax 3.2.2 as published; install the pinned packages again", file)
        return
    config.html_static_path.append(str(file))
    config.mathjax_path = file.name


def setup(app) -> dict:
    app.add_config_value("decur_profiles", ["a100", "report", "mini"], "env")
    app.add_config_value("decur_executed", "book/executed", "env")
    app.connect("source-read", read_source)
    app.connect("config-inited", serve_mathjax, priority=400)  # before Sphinx checks the static paths
    return {"version": "1", "parallel_read_safe": True}

"""Sphinx extension: lays the outputs of executed notebooks into the pages of their sources, cell by cell.

Sources in ``notebooks/`` hold no outputs. For each page the first profile of ``decur_profiles`` that has a copy in
``<decur_executed>/<profile>/`` supplies them. Code must be the code that ran (compared as syntax trees: comments and
formatting are free, prose too); a copy that is missing, damaged, unfinished or of other code is a warning that names
the command that mends it, so ``-W`` fails. On top of a page stands whether its images are real or drawn, as the run
says itself; a margin note says which run it was, with links to source, copy and records. The extension also serves
MathJax from the installed package, for reading offline.
"""

import ast
import hashlib
import json
import os
import re
from importlib.metadata import distribution
from pathlib import Path

import nbformat
from sphinx.util import logging

logger = logging.getLogger(__name__)

# tex-svg.js of MathJax 3.2.2 (Apache-2.0) as its authors published it; it needs no fonts or further files.
MATHJAX = "sphinx-mathjax-offline/static/mathjax/tex-svg.js"
MATHJAX_SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"
# Of images, in margin notes and captions; and captions that say it themselves.
WORDS = {"real": "real images", "drawn": "drawn world", "none": "no images"}
SAYS_SO = re.compile(r"not real|drawn|real images|miniature world", re.IGNORECASE)
COLAB = """
````{{dropdown}} To run this page in Colab, put this into a first cell
```
!git clone --quiet --depth 1 --branch {branch} {address} /content/decur
%cd /content/decur
%pip install --quiet --editable .
```
If Colab asks for a restart, run the line with `%cd` again after it.
````
"""
REAL = "](../book/real/"  # a figure of real images that lies in the book

BAR = re.compile(r"\d+%\|.*\|")  # tqdm's


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


def without_bars(out):
    """An output without the lines of progress bars; None if it has no others."""
    if out.output_type == "stream":
        lines = [line for line in out.text.splitlines(keepends=True) if not BAR.search(line)]
        out = nbformat.from_dict({**out, "text": "".join(lines)}) if "".join(lines).strip() else None
    return out


def duration(seconds: float) -> str:
    """``seconds`` as a reader says it: 9 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def images(executed) -> list[dict]:
    """What the images of a finished run are, of each store that it opened: ``name``, ``title``, ``drawn``, ``source``.

    The run says so in its last cell; for one from before runs did, its profile says where images come from.
    """
    from decur_core import config  # here, as the library brings torch
    from decur_core.data import datasets
    from decur_core.running.folders import IMAGES

    for line in printed(code_cells(executed)[-1]):
        if line.startswith(IMAGES):
            return json.loads(line.removeprefix(IMAGES))
    note = executed.metadata["decur"]
    settings = config.load(note["profile"], note["overrides"])
    source, drawn = settings.data.source, settings.data.source == "world"
    names = {name: datasets.find(name).title for name in settings.data.roots} if source == "published" else {}
    names = names or {"": {"world": "miniature worlds", "samples": "a few sample files"}.get(source, "published data")}
    return [{"name": name, "title": title, "drawn": drawn, "source": source} for name, title in names.items()]


def cited(about: dict) -> str:
    """The title of a data set, and who published it if the bibliography has that."""
    from decur_core.data import datasets

    known = about.get("name") in datasets.names() and about.get("source") != "samples"
    key = datasets.find(about["name"]).cite if known else ""
    return f"{about['title']} {{cite:p}}`{key}`" if key else about["title"]


# Of pages of the profile that only shows the way.
SHORT = (
    "**Its networks were trained for a minute at most** (profile `mini`): the page shows that the way works and what"
    " comes out of it; which method or setting is better, it cannot tell."
)


def banner(found: list[dict], real_first: bool = False, short: bool = False) -> tuple[str, str]:
    """Whether images (of ``images``) are real or drawn: in a word or two, and as it stands on top of a page.

    ``real_first``: the page begins with a figure of real images that lies in the book; ``short``: its networks have
    hardly been trained.
    """
    drawn, real = ([about for about in found if about["drawn"] == kind] for kind in (True, False))
    word = " and ".join(filter(None, (WORDS["real"] if real else "", WORDS["drawn"] if drawn else "")))
    worlds, sets = "; ".join(about["title"] for about in drawn), "; ".join(map(cited, real))
    few = " A handful of them: they show that the way works, not what a method is worth."
    text = f"Real images: {sets}.{few if any(about.get('source') == 'samples' for about in real) else ''}"
    if real and drawn:
        text = f"{text} Beside them stand drawn images ({worlds}); captions and tables say which is which."
    elif drawn:
        but = "But for the real images of the first figure, all" if real_first else "All"
        text = f"{but} pictures and numbers on this page are synthetic, drawn from known factors: {worlds}."
    elif not real:
        text = "No image is looked at on this page: its numbers are made up in its cells."
    text += f" {SHORT}" if short else ""
    kind = "real" if real else "drawn" if drawn else "none"
    word = word or WORDS["none"]
    head = word[0].upper() + word[1:]
    return word, f"```{{admonition}} {head}\n:class: decur-images decur-{kind}\n{text}\n```"


def lay(source, executed, links: str = "") -> None:
    """Put the outputs of ``executed`` into ``source`` (both notebooks; ``source`` is changed).

    The parameters cell then shows the values that were used. Under the title stand a ``banner`` and a note in the
    margin on profile, images, date, duration and overrides, with ``links``; captions end with the banner's word.
    Raises ``Unusable`` when ``executed`` is not a finished run of the same code.
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
        page.outputs = [] if old is ran[-1] else [out for out in map(without_bars, old.outputs) if out]
        page.execution_count = None
        if tagged(page, "parameters"):
            injected = [cell.source for cell in executed.cells if tagged(cell, "injected-parameters")]
            page.source = "\n".join(injected or [page.source]).removeprefix("# Parameters\n").strip()
    begins = any(REAL in c.source for c in source.cells if c.cell_type == "markdown")
    short = note["profile"] == "mini" and any("pretrain.run" in page.source for page in pages)
    word, top = banner(images(executed), begins, short)
    for page in pages if word in (WORDS["real"], WORDS["drawn"]) else ():
        about = page.metadata.get("mystnb", {}).get("figure", {})
        if about and not SAYS_SO.search(about["caption"]):
            about["caption"] += f" {word[0].upper()}{word[1:]}."
    used = "".join(f", `{key} = {value}`" for key, value in note["overrides"].items())
    remark = f"Profile {note['profile']}{used}, {word}, {note['date'][:10]}, {duration(note['seconds'])}"
    title, newline, rest = source.cells[0].source.partition("\n")
    source.cells[0].source = f"{title}\n\n```{{margin}}\n{remark}{links}\n```\n\n{top}\n{newline}{rest}"


def sources(app, docname: str, copy: Path) -> str:
    """Links to the source of a page, to its executed copy and to the records of the profile, as files of the book."""
    files = {"source": Path(app.env.doc2path(docname)), "executed copy": copy, "records": copy.parent / "records.json"}
    here = Path(app.env.doc2path(docname)).parent
    found = [f"{{download}}`{k} <{os.path.relpath(file, here)}>`" for k, file in files.items() if file.is_file()]
    return f"\n\n{', '.join(found)}"


def read_source(app, docname: str, content: list[str]) -> None:
    """Handler of Sphinx's ``source-read``: replaces a notebook's text by the same notebook with outputs.

    Of prose only the title of a model card changes, as ``decur_core.export`` gives the same to all.
    """
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".ipynb":
        if path.name == "README.md":  # a model card, of which the book has several
            content[0] = content[0].replace("# Pretrained encoders", f"# Model card: {path.parent.name}", 1)
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
            lay(notebook, nbformat.read(copy, as_version=4), sources(app, docname, copy))
            notebook.cells[0].source = f"# {number}. {notebook.cells[0].source.removeprefix('# ')}{in_colab(app)}"
            content[0] = nbformat.writes(notebook)
            return
        except Unusable as error:
            problem = f"{copy.relative_to(app.srcdir)} {error}"
        except (nbformat.reader.NotJSONError, nbformat.ValidationError):
            problem = f"{copy.relative_to(app.srcdir)} is damaged"
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


def in_colab(app) -> str:
    """What installs the library where a notebook is opened alone; Binder reads ``environment.yml``."""
    options = getattr(app.config, "html_theme_options", {})
    address, branch = options.get("repository_url", ""), options.get("repository_branch") or "main"
    return COLAB.format(address=address, branch=branch) if address.startswith("https://github.com/") else ""


def spare_mathjax(app, page, template, context, doctree) -> None:
    """Handler of ``html-page-context``: no script for formulas, which is large, where there are none.

    Sphinx leaves it out itself, but not of the front page, as it counts all that a page has in its contents.
    """
    if doctree is not None and 'class="math' not in context.get("body", "") and app.config.mathjax_path:
        files = context["script_files"]
        files[:] = [file for file in files if app.config.mathjax_path not in str(getattr(file, "filename", file))]


def buttons(app, config) -> None:
    """Handler of ``config-inited``: with an address of the repository come buttons that lead there, without it none."""
    if config.html_theme_options.get("repository_url"):
        names = ("use_source_button", "use_repository_button", "use_issues_button")
        config.html_theme_options |= dict.fromkeys(names, True)
        services = {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"}
        config.html_theme_options["launch_buttons"] = {"notebook_interface": "jupyterlab", **services}


def setup(app) -> dict:
    app.add_config_value("decur_profiles", ["a100", "report", "mini"], "env")
    app.add_config_value("decur_executed", "book/executed", "env")
    app.connect("source-read", read_source)
    app.connect("config-inited", buttons)
    app.connect("html-page-context", spare_mathjax, priority=900)
    app.connect("config-inited", serve_mathjax, priority=400)  # before Sphinx checks the static paths
    return {"version": "1", "parallel_read_safe": True}

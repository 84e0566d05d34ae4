"""The built book in a real browser, without a network: every page as readers meet it, wide and narrow, light and dark.

The page is shown by Chromium (``apt install chromium``), the book is what ``make book`` left in ``_build/html``.
"""

import gzip
import json
import re
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
import yaml
from chromium import Browser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import executed  # noqa: E402

HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]
PAGES = [f"{page}.html" for page in (TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"]))]
SOURCES = (
    "_*.yml",
    "notebooks/*.ipynb",
    *(f"book/**/*.{end}" for end in ("md", "py", "css", "js", "bib", "ipynb", "json")),
)
CHROMIUM = shutil.which("chromium")
WIDTHS, THEMES = (390, 1280), ("light", "dark")
FIRST_BYTES, PAGE_BYTES = 1_000_000, 1_500_000  # of all that a page loads, compressed as servers send it

CONTENT = r"""(() => {
  const prose = document.querySelector("article, main").cloneNode(true);
  const all = name => [...document.querySelectorAll(name)];
  prose.querySelectorAll("pre, code, script, style, mjx-container").forEach(e => e.remove());
  return {
    language: document.documentElement.lang, titles: all("h1").filter(e => e.checkVisibility()).map(e => e.innerText),
    links: all("a[href]").map(e => e.href), targets: all("[id]").map(e => e.id), prose: prose.textContent,
    banner: document.querySelector("article .decur-images")?.className ?? "",
    downloads: all("a.download[href]").map(e => e.href),
    searches: all(".search-button__button").filter(e => e.checkVisibility({visibilityProperty: true})).length,
    loaded: [location.href, ...performance.getEntriesByType("resource").map(e => e.name)],
    contents: all("nav.bd-links a").map(e => e.href), next: document.querySelector("a.right-next")?.href,
    images: all("img").map(e => ({source: e.src, alt: e.alt, drawn: e.complete && e.naturalWidth > 0})),
    formulas: all("article .math").length, rendered: all("article .math mjx-container > svg").length,
    refused: all("[data-mml-node=merror], mjx-assistive-mml [mathcolor=red]").map(e => e.textContent),
  };
})()"""

# What sticks out of the window: the scroll width, and elements that nothing around them scrolls into view.
OVERFLOW = """(() => {
  const found = [], scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  for (const e of document.querySelectorAll("article *:not(mjx-assistive-mml *)")) {
    let right = e.getBoundingClientRect().right, around = e.parentElement;
    if (!e.checkVisibility({visibilityProperty: true}) || right <= innerWidth + 1) continue;
    while (!around.matches("article") && !scrolls(around)) around = around.parentElement;
    if (around.matches("article")) found.push(`${e.localName} ${e.textContent.slice(0, 40)} to ${Math.round(right)}`);
  }
  const width = document.scrollingElement.scrollWidth;
  return width > innerWidth ? [`page is ${width} wide`, ...found] : found;
})()"""

# Tables that have to be scrolled; text of figures that is drawn in the page, by its size in px.
TABLES = """[...document.querySelectorAll("article table")].filter(e => e.scrollWidth > e.clientWidth + 1
  || e.getBoundingClientRect().width > e.parentElement.getBoundingClientRect().width + 1)
  .map(e => `${e.textContent.trim().slice(0, 40)}: ${e.scrollWidth} in ${e.clientWidth}`)"""
SMALLEST = """[...document.querySelectorAll("article svg[viewBox] text")].map(e => {
  const svg = e.ownerSVGElement;
  return parseFloat(getComputedStyle(e).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
})"""

# Figures that are shown at less than the size they were made for, at which their text has 9 px or more: PNGs of twice
# that size say it in their style.
SHRUNK = """[...document.querySelectorAll("article figure img")].map(e => [e, e.src.endsWith(".svg") ? e.naturalWidth
  : parseFloat(e.style.width)]).filter(([e, made]) => e.getBoundingClientRect().width < 0.96 * made)
  .map(([e, made]) => `${e.alt.slice(0, 40)}: ${made} in ${Math.round(e.getBoundingClientRect().width)}`)"""

# Contrast of every visible text and formula with what lies behind it; colours may be translucent. WCAG 2.1, 1.4.3:
# at least 4.5, for large type 3.
CONTRAST = """(() => {
  const brush = document.createElement("canvas").getContext("2d", {willReadFrequently: true}), known = {};
  const rgba = text => known[text] ??= (brush.clearRect(0, 0, 1, 1), brush.fillStyle = text, brush.fillRect(0, 0, 1, 1),
    [...brush.getImageData(0, 0, 1, 1).data].map(v => v / 255));
  const over = (top, below, opacity) => below.map((v, i) => v + (top[i] - v) * top[3] * opacity);
  const behind = e => e ? over(rgba(getComputedStyle(e).backgroundColor), behind(e.parentElement), 1) : [1, 1, 1];
  const opacity = e => e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
  const light = c => c.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = new Set(), texts = new Set(document.querySelectorAll("article mjx-container"));
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) if (walk.currentNode.data.trim()) texts.add(walk.currentNode.parentElement);
  for (const e of texts) {
    const style = getComputedStyle(e), size = parseFloat(style.fontSize), box = e.getBoundingClientRect();
    if (!e.checkVisibility({visibilityProperty: true, opacityProperty: true}) || box.width * box.height < 4) continue;
    const paper = behind(e), pair = [light(over(rgba(style.color), paper, opacity(e))), light(paper)];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    const least = size >= 24 || size >= 18.66 && style.fontWeight >= 700 ? 3 : 4.5;
    if (ratio < least) found.add(`${e.localName}.${e.className} ${e.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return [...found];
})()"""


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    index = HTML / "searchindex.js"
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    if not index.is_file():
        pytest.skip("there is no book in _build/html; run: make book")
    for path in (path for pattern in SOURCES for path in ROOT.glob(pattern)):
        if path.stat().st_mtime > index.stat().st_mtime:
            pytest.skip(f"the book in _build/html is older than {path.relative_to(ROOT)}; run: make book")
    # Served under a folder, as on GitHub Pages.
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=HTML.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = Browser(CHROMIUM, f"http://127.0.0.1:{server.server_port}/html/", tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def survey(browser):
    """Address -> what each page holds and how it looks; every page is loaded once."""
    seen = {}
    for page in (*PAGES, "search.html", "genindex.html"):
        browser.open(page)
        found = browser.evaluate(CONTENT)
        for width in WIDTHS:
            browser.ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False
            )
            found[width] = browser.evaluate(OVERFLOW)
            found["tables", width], found["smallest", width] = browser.evaluate(TABLES), browser.evaluate(SMALLEST)
            found["shrunk", width] = browser.evaluate(SHRUNK)
        for theme in THEMES:
            feature = {"name": "prefers-color-scheme", "value": theme}
            browser.ask("Emulation.setEmulatedMedia", features=[feature])
            browser.until(f"document.documentElement.dataset.theme === '{theme}'")
            found[theme] = browser.evaluate(CONTRAST)
        seen[page] = found | {"noise": browser.noise}
    return seen


def wrong(survey, judge) -> dict:
    """Page -> what ``judge(found)`` objects to, for the pages to which it objects."""
    return {page: objection for page, found in survey.items() if (objection := judge(found))}


def test_pages_load_without_errors_or_requests_to_elsewhere(survey):
    assert wrong(survey, lambda found: found["noise"]) == {}


def test_formulas_are_set(survey):
    raw = re.compile(r"\\[()\[\]]|\$\S[^$\n]*\$|\\(?:begin|frac|sum|text|math\w+)\b")
    assert wrong(survey, lambda found: raw.findall(found["prose"])) == {}
    assert wrong(survey, lambda found: found["refused"]) == {}
    assert wrong(survey, lambda found: found["formulas"] - found["rendered"]) == {}
    assert survey["book/method.html"]["rendered"] > 10


def test_contents_lead_to_every_page_in_order(survey, browser):
    assert f"url={PAGES[0]}" in (HTML / "index.html").read_text()
    every = [browser.base + page for page in PAGES]
    for page in PAGES:
        assert [urldefrag(link).url for link in survey[page]["contents"]] == every, page
    assert [survey[page].get("next") for page in PAGES] == [*every[1:], None]


def test_links_within_the_book_lead_somewhere(survey, browser):
    def broken(found):
        for link in found["links"]:
            address, anchor = urldefrag(link.removeprefix(browser.base))
            page, anchor = unquote(address.partition("?")[0]), unquote(anchor)
            if not link.startswith(browser.base.removesuffix("html/")):
                continue  # to elsewhere; a link to the root of this server stays and is broken
            if not (HTML / page).is_file() or anchor and anchor not in survey[page]["targets"]:
                yield link

    assert wrong(survey, lambda found: list(broken(found))) == {}


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_the_window(survey, width):
    assert wrong(survey, lambda found: found[width]) == {}


@pytest.mark.parametrize("theme", THEMES)
def test_text_is_legible(survey, theme):
    assert wrong(survey, lambda found: found[theme]) == {}


def test_images_are_drawn_and_described(survey):
    def poor(image):  # a file name is what Sphinx writes where there is no description
        return not image["drawn"] or len(image["alt"].split()) < 2 or "_images/" in image["alt"]

    assert wrong(survey, lambda found: [image for image in found["images"] if poor(image)]) == {}


def test_pages_have_a_language_and_one_title_of_their_own(survey):
    assert wrong(survey, lambda found: found["language"] != "en" or len(found["titles"]) != 1) == {}
    assert len({found["titles"][0] for found in survey.values()}) == len(survey)


def test_pages_are_small(survey, browser):
    sizes: dict[Path, int] = {}

    def size(page):
        addresses = {urldefrag(unquote(each)).url.partition("?")[0] for each in survey[page]["loaded"]}
        files = [HTML / each.removeprefix(browser.base) for each in addresses if each.startswith(browser.base)]
        assert len(files) > 5 and all(file.is_file() for file in files), page
        for file in files:
            sizes[file] = sizes.get(file) or len(gzip.compress(file.read_bytes(), 6))
        return sum(sizes[file] for file in files)

    limits = {page: FIRST_BYTES if page == PAGES[0] else PAGE_BYTES for page in survey}
    assert {page: found for page, limit in limits.items() if (found := size(page)) > limit} == {}


def test_tables_are_as_wide_as_the_column(survey):
    assert wrong(survey, lambda found: found["tables", 1280]) == {}


def test_text_of_drawings_is_legible(survey):
    assert min(survey[PAGES[1]]["smallest", 390]) >= 9, "the sketches of the primer"
    assert wrong(survey, lambda found: [each for each in found["smallest", 390] if each < 9]) == {}


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_have_the_size_at_which_their_text_is_legible(survey, width):
    assert wrong(survey, lambda found: found["shrunk", width]) == {}


def test_a_page_of_a_run_says_truly_whether_its_images_are_real(survey):
    """Against the executed copy that it shows, and its records where it has any."""
    for page in (page for page in PAGES if page.startswith("notebooks/")):
        name = f"{Path(page).stem}.ipynb"
        copies = (ROOT / "book" / "executed" / profile / name for profile in CONFIG["decur_profiles"])
        copy = next(copy for copy in copies if copy.is_file())
        facts = executed.images(nbformat.read(copy, 4))
        kind = "real" if any(not about["drawn"] for about in facts) else "drawn" if facts else "none"
        assert f"decur-{kind}" in survey[page]["banner"].split(), page
        if (records := copy.with_name("records.json")).is_file() and {about["drawn"] for about in facts} == {True}:
            assert any(record["drawn"] for record in json.loads(records.read_text())), page


def test_pages_of_runs_lead_to_source_and_copy(survey, browser):
    for page in (page for page in PAGES if page.startswith("notebooks/")):
        files = [HTML / unquote(link.removeprefix(browser.base)) for link in survey[page]["downloads"]]
        named = [file for file in files if file.name == f"{Path(page).stem}.ipynb" and file.is_file()]
        outputs = [any(c.get("outputs") for c in json.loads(f.read_text())["cells"]) for f in dict.fromkeys(named)]
        assert {True, False} <= set(outputs), page


def test_there_is_one_search_field(survey):
    assert wrong(survey, lambda found: found["searches"] > 1 and found["searches"]) == {}


def test_the_film_of_the_loss_moves(browser):
    browser.open("notebooks/01_loss.html")
    state = """(() => { const place = document.querySelector(".decur-film"); return {
      told: place.querySelector(".film-told").textContent, step: place.querySelector("output").textContent,
      drawn: [...place.querySelectorAll("canvas")].map(e => e.toDataURL())}; })()"""
    move = (
        "(() => { const e = document.querySelector('.decur-film %s'); e.%s; e.dispatchEvent(new Event('input')); })()"
    )
    first = browser.evaluate(state)
    browser.evaluate(move % ("input", "value = e.max"))
    last = browser.evaluate(state)
    browser.evaluate(move % ("select", "selectedIndex = 1"))
    other = browser.evaluate(state)
    assert first["step"] != last["step"] == other["step"] and len({each["told"] for each in (first, last, other)}) == 3
    assert len(first["drawn"]) == 3 and len({*first["drawn"], *last["drawn"], *other["drawn"]}) == 9
    assert browser.noise == []


@pytest.mark.parametrize(("term", "expected"), [("correlation", "book/method.html"), ("zebrafish", None)])
def test_search_finds_a_term(browser, term, expected):
    browser.open(f"search.html?q={term}")
    browser.until("document.querySelector('#search-results .search-summary')?.textContent.trim()")
    found = browser.evaluate("[...document.querySelectorAll('#search-results li > a')].map(e => e.href)")
    pages = {urldefrag(link).url.removeprefix(browser.base).partition("?")[0] for link in found}
    assert browser.noise == [] and pages <= set(PAGES) and (expected in pages if expected else not pages)

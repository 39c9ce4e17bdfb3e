"""The site, built from the stored outputs and opened in a real browser.

The tests look at every page, light and dark, on a desk and on a telephone. They need
Chromium (`apt-get install chromium`, or set CHROMIUM to its path) and are skipped where
there is none; with CI=true in the environment its absence is a failure.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from reading import reading_minutes

ROOT = Path(__file__).resolve().parent.parent
ADDRESSES = ("BOOK_REPOSITORY_URL", "BOOK_REPOSITORY_BRANCH", "GITHUB_SERVER_URL")
ADDRESSES += ("GITHUB_REPOSITORY", "GITHUB_REF_NAME")
BROWSER = next(
    filter(
        None,
        [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "google-chrome"))],
    ),
    None,
)
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update""".split()
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
# Axe takes long to compute what is behind an element. The contrast is the same wherever
# colour, ground and size are, so its rules on colour see one element of each such look,
# and everything else is removed before. All other rules see the whole page, in light
# only: dark changes nothing but colours.
AUDIT = """async () => {
    const colours = ["color-contrast", "link-in-text-block"];
    const off = Object.fromEntries(colours.map((rule) => [rule, {enabled: false}]));
    const options = {resultTypes: ["violations"]};
    const results = [];
    if (matchMedia("(prefers-color-scheme: light)").matches) {
        results.push(await axe.run(document, {...options, rules: off}));
    }
    const ground = (e) => {
        const colour = getComputedStyle(e).backgroundColor;
        const clear = colour === "rgba(0, 0, 0, 0)";
        return clear && e.parentElement ? ground(e.parentElement) : colour;
    };
    const speaks = (e) => e.checkVisibility({visibilityProperty: true}) &&
        (e.matches("input") || [...e.childNodes].some((n) => n.data?.trim()));
    const looks = new Map();
    for (const e of [...document.body.querySelectorAll("*")].filter(speaks)) {
        const s = getComputedStyle(e);
        const look = [s.color, ground(e), s.fontSize, s.fontWeight, s.opacity].join();
        if (!looks.has(look)) looks.set(look, e);
    }
    const kept = [...looks.values()];
    for (const e of document.body.querySelectorAll("*")) {
        if (!kept.some((k) => k.contains(e) || e.contains(k))) e.remove();
    }
    results.push(await axe.run(document, {...options, runOnly: colours}));
    return results.flatMap((result) => result.violations)
        .filter((v) => ["serious", "critical"].includes(v.impact))
        .map((v) => `${v.id}: ${v.nodes.map((n) => n.html.slice(0, 120)).slice(0, 3)}`);
}"""
TOO_WIDE = """() => {
    const room = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= room) return [];
    return [...document.querySelectorAll("body *")]
        .filter((e) => e.getBoundingClientRect().right > room + 1)
        .filter((e) => !e.closest("pre, .wide, .formula > div, .sidebar"))
        .map((e) => e.outerHTML.slice(0, 120));
}"""
OUT_OF_REACH = """() => [...document.querySelectorAll("article *")]
    .filter((e) => e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0)
    .filter((e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX))
    .map((e) => e.outerHTML.slice(0, 120))"""
WITHOUT_TEXT = """() => [...document.images]
    .filter((i) => !i.hasAttribute("alt") ||
        (!i.alt.trim() && !i.closest("a")?.textContent.trim()))
    .map((i) => i.outerHTML.slice(0, 120))"""

sys.path.insert(0, str(ROOT / "book" / "_ext"))


def build(folder: Path, *options: str, **address: str) -> Path:
    """Build what lies in folder, with an address in the environment or none."""
    env = {k: v for k, v in os.environ.items() if k not in ADDRESSES} | address
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    command = [jupyter_book, "build", ".", "--all", *options]
    result = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "_build" / "html"


def copy(folder: Path) -> Path:
    """A copy of what the site is made of."""
    leave_out = shutil.ignore_patterns(".*", "_build", "tests", "data")
    return shutil.copytree(ROOT, folder, ignore=leave_out)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the site, built with every warning an error and no address set."""
    folder = copy(tmp_path_factory.mktemp("site") / "book")
    return build(folder, "-W", "-n", "--keep-going")


@pytest.fixture(scope="session")
def pages(site: Path) -> list[str]:
    """Addresses of all pages below the site's folder."""
    found = [p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html"))]
    return [page for page in found if "/" in page or page == "search.html"]


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A site of a chapter, a notebook below it and a page, with an address."""
    folder = copy(tmp_path_factory.mktemp("small") / "book")
    in_depth = nbformat.v4.new_notebook()
    text = "# 1b. In depth\n" + "Word. " * 400
    in_depth.cells.append(nbformat.v4.new_markdown_cell(text))
    nbformat.write(in_depth, folder / "notebooks" / "01b_in_depth.ipynb")
    toc = """
        format: jb-book
        root: book/index
        parts:
        - caption: A part
          chapters:
          - file: notebooks/01_hello_pytorch
            sections: [file: notebooks/01b_in_depth]
        - caption: Another
          chapters: [file: book/status]"""
    (folder / "_toc.yml").write_text(toc)
    (folder / "book" / "index.md").write_text("# Welcome\n\nRead.\n\n[It](status.md)\n")
    return build(folder, BOOK_REPOSITORY_URL="https://github.com/someone/some-book")


@pytest.fixture(scope="module")
def server(site: Path):
    """Address of a local server of the site."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; closed before other tests run, as its event loop disturbs."""
    if BROWSER is None:
        reason = (
            "no Chromium: get it with `apt-get install chromium`, "
            "or set CHROMIUM to the path of a browser that is there"
        )
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield running
        running.close()


class Visit:
    """A browser tab that writes down what goes wrong and what is loaded."""

    def __init__(self, browser, screen: str = "desktop", scheme: str = "light") -> None:
        width, height = SCREENS[screen]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        self.tab = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("requestfailed", lambda r: self.complaints.append(f"lost {r.url}"))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", self._listen)

    def _listen(self, message) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def open(self, address: str) -> None:
        """Open the page and load all its images, those further down too."""
        self.tab.goto(address)
        self.tab.evaluate(
            """async () => {
                for (const image of document.images) image.loading = "eager";
                await Promise.all([...document.images].map((i) => i.decode()));
                await document.fonts.ready;
            }"""
        )

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_) -> None:
        self.context.close()


def is_chapter(page: str) -> bool:
    """Whether the page is a chapter, not one of the pages around them."""
    return page.startswith("notebooks/")


# ---------------------------------------------------------------- without a browser
@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"\hat{y}", '<mover accent="true"><mrow><mi>y</mi></mrow>'),
        (r"\mathbf{W} \in \mathbb{R}^{m \times n}", "<mi>𝐖</mi>"),
        (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", 'class="aligned"'),
        (r"\begin{bmatrix} 1 & 2 \end{bmatrix}^\top", "<msup><mrow><mo>[</mo>"),
        (r"\begin{cases} x & x > 0 \\ 0 & \text{else} \end{cases}", "<mo>&gt;</mo>"),
        (r"\arg\min_\theta L", "<munder><mo"),
        (r"\operatorname{softmax}(z)", '<mi class="name">softmax</mi>'),
        (r"\boldsymbol{\theta}", "𝜽"),
        (r"\log x", '<mspace width="0.167em"'),
        (r"\mathrm{ReLU}(x)", "<mi>ReLU</mi>"),
        (r"\|x\|_2", "‖"),
    ],
)
def test_formula(latex, expected):
    """Common LaTeX becomes the MathML that browsers draw."""
    from book_math import mathml

    assert expected in mathml(latex, display=True)


@pytest.mark.parametrize(
    "latex", [r"\foo{x}", r"\frac{a", r"a & b", r"\begin{foo} a \end{foo}", "x^"]
)
def test_untranslatable_formula_is_an_error(latex):
    """What latex2mathml passes through, or stumbles over, is not drawn as if right."""
    from book_math import MathError, mathml

    with pytest.raises(MathError):
        mathml(latex, display=False)


def test_untranslatable_formula_fails_the_build(tmp_path):
    """The warning names the page and the formula."""
    (tmp_path / "index.md").write_text("# Title\n\nWrong: $\\foo{x}$\n")
    config = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
        "extensions = ['myst_parser', 'book_math']\n"
        "myst_enable_extensions = ['dollarmath']\nhtml_math_renderer = 'mathml'\n"
    )
    (tmp_path / "conf.py").write_text(config)
    command = [sys.executable, "-m", "sphinx", "-W", "-q", ".", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "page index" in result.stderr
    assert r"\foo{x}" in result.stderr


def test_no_address_no_link(site, pages):
    """Without an address in the environment no page points to a repository or Colab."""
    for page in pages:
        text = (site / page).read_text(encoding="utf-8")
        for name in ("google.com/github", "mybinder.org/v2", "executablebooks"):
            assert name not in text, f"{page} names {name}"


def test_nothing_named_from_elsewhere(site, pages):
    """No page names a script, style sheet or image of another origin, or MathJax."""
    loads = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)="https?:""")
    for page in pages:
        text = (site / page).read_text(encoding="utf-8")
        assert not loads.search(text), page
        for name in ("mathjax", "thebe", "require.js", "fontawesome"):
            assert name not in text.lower(), f"{page}: {name}"


def test_links_lead_somewhere(site, pages):
    """Every link inside the site has a target, and every fragment an element."""
    missing = []
    texts = {page: (site / page).read_text(encoding="utf-8") for page in pages}
    for page, text in texts.items():
        for href in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            url = urlsplit(href)
            if url.scheme or url.netloc:
                continue
            target = (
                (site / page).parent / unquote(url.path) if url.path else site / page
            )
            target = target.resolve()
            if not target.is_file():
                missing.append(f"{page}: {href}")
            elif url.fragment and target.suffix == ".html":
                aim = texts.get(target.relative_to(site.resolve()).as_posix(), "")
                if f'id="{unquote(url.fragment)}"' not in aim:
                    missing.append(f"{page}: {href}")
    assert not missing


@pytest.mark.parametrize(
    "address",
    [
        {
            "BOOK_REPOSITORY_URL": "https://github.com/someone/some-book",
            "BOOK_REPOSITORY_BRANCH": "release/1",
        },
        {
            "GITHUB_SERVER_URL": "https://github.com",
            "GITHUB_REPOSITORY": "someone/some-book",
            "GITHUB_REF_NAME": "release/1",
        },
    ],
    ids=["variable", "GitHub Actions"],
)
def test_links_with_address(address, monkeypatch):
    """With an address, the links name its repository, branch and the notebook."""
    import book_site

    for name in ADDRESSES:
        monkeypatch.delenv(name, raising=False)
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    colab, binder = (link["url"] for link in book_site.links("notebooks/02_autograd"))
    book = "someone/some-book"
    assert colab == (
        "https://colab.research.google.com/github/"
        f"{book}/blob/release/1/notebooks/02_autograd.ipynb"
    )
    assert binder == (
        f"https://mybinder.org/v2/gh/{book}/release%2F1"
        "?urlpath=lab%2Ftree%2Fnotebooks%2F02_autograd.ipynb"
    )


def test_page_with_address(small):
    """A build with an address: the chapter has its links, other pages have none."""
    text = (small / "notebooks/01_hello_pytorch.html").read_text(encoding="utf-8")
    found = re.findall(r'href="(https://(?:colab|mybinder)[^"]*)"', text)
    assert found == [
        "https://colab.research.google.com/github/someone/some-book/blob/main/"
        "notebooks/01_hello_pytorch.ipynb",
        "https://mybinder.org/v2/gh/someone/some-book/main?urlpath=lab%2Ftree%2F"
        "notebooks%2F01_hello_pytorch.ipynb",
    ]
    other = (small / "book" / "status.html").read_text(encoding="utf-8")
    assert "someone/some-book" not in other


def plain(html: str) -> str:
    """Text without its tags, spaces folded."""
    return " ".join(re.sub("<[^>]*>", " ", html).split())


def table(page: Path) -> list[list[str]]:
    """The cells of the body of a page's table, row by row."""
    body = page.read_text(encoding="utf-8").split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]
    return [[plain(cell) for cell in row] for row in rows]


def test_facts_of_each_notebook(site):
    """Below its title, on its card and in the table: computed, or from status.json."""
    measured = json.loads((site / "../../book/status.json").read_text(encoding="utf-8"))
    status = site / "book" / "status.html"
    rows = iter(table(status))
    welcome = (site / "book" / "index.html").read_text(encoding="utf-8")
    cards = dict(
        re.findall(r'"minutes">(.*?)</p>.*?(notebooks/\w+.html)"', welcome, re.DOTALL)
    )
    assert cards
    total = 0
    for path in sorted((site / "../../notebooks").glob("*.ipynb")):
        page = (site / "notebooks" / path.stem).with_suffix(".html")
        text = page.read_text(encoding="utf-8")
        line = re.search(r'</h1>\s*<div class="facts">(.*?)</div>', text, re.DOTALL)
        minutes = reading_minutes(nbformat.read(path, as_version=4))
        total += minutes if "b_" not in path.stem[:4] else 0
        expected, cells = f"{minutes} min to read", [""] * 5
        if found := measured.get(path.stem):
            keys = ("seconds", "memory", "data", "torch", "date")
            cells = seconds, memory, data, torch, date = [str(found[k]) for k in keys]
            expected += f" {seconds} s to run {memory} GB of memory"
            expected += f" data: {data} torch {torch}, {date}"
            assert found["machine"] in plain(status.read_text(encoding="utf-8"))
        assert plain(line[1]) == expected
        assert next(rows)[1:] == [str(minutes), *cells]
        assert cards.pop(f"notebooks/{page.name}", None) in (None, f"{minutes} min")
    assert f"all chapters takes {total:,} minutes" in status.read_text(encoding="utf-8")


def test_notebook_in_depth(small):
    """It stands below its chapter: in part, sidebar, order of reading and table."""
    page = (small / "notebooks/01b_in_depth.html").read_text(encoding="utf-8")
    assert '<p class="where">A part</p>' in page
    assert '<li class="toctree-l2 current"><a aria-current="page"' in page
    assert 'rel="prev" href="01_hello_pytorch.html"' in page
    assert 'rel="next" href="../book/status.html"' in page
    facts = re.search('"facts">(.*?)</div>', page, re.DOTALL)[1]
    assert plain(facts) == "2 min to read"
    status = small / "book" / "status.html"
    assert table(status)[1] == ["1b. In depth", "2", "", "", "", "", ""]
    text = status.read_text(encoding="utf-8")
    assert re.findall(r'<tr class="(.*?)">', text)[1:] == ["row-even", "below row-odd"]
    minutes = int(table(status)[0][1])
    assert f"chapters takes {minutes} minutes" in text
    assert f"with the in-depth notebooks {minutes + 2} minutes" in text


# ---------------------------------------------------------------- in the browser
def test_every_page_loads_cleanly(browser, server, pages):
    """From a server: no other origin, nothing missing, no word on the console."""
    with Visit(browser) as visit:
        for page in pages:
            visit.open(server + page)
            assert visit.complaints == [], page
        foreign = [
            url for url in visit.requests if not url.startswith((server, "data:"))
        ]
        assert foreign == []


def test_every_page_opens_from_a_file(browser, site, pages):
    """The same without a server."""
    with Visit(browser) as visit:
        for page in pages:
            visit.open((site / page).as_uri())
            assert visit.complaints == [], page
        assert [u for u in visit.requests if not u.startswith(("file:", "data:"))] == []


def test_weight(browser, server, pages):
    """All bytes of a chapter's first visit, uncompressed, images below included."""
    weights = {}
    for page in filter(is_chapter, pages):
        with Visit(browser) as visit:
            sizes: dict[str, int] = {}
            kinds: dict[str, int] = {}

            def weigh(response, sizes=sizes, kinds=kinds) -> None:
                size = int(response.headers["content-length"])
                kind = response.request.resource_type
                sizes[response.url] = size
                kinds[kind] = kinds.get(kind, 0) + size

            visit.tab.on("response", weigh)
            visit.open(server + page)
        weights[page] = sum(sizes.values())
        parts = ", ".join(f"{kind} {size:,}" for kind, size in sorted(kinds.items()))
        print(f"{page}: {weights[page]:,} bytes ({parts})")
        rest = weights[page] - kinds["document"] - kinds.get("image", 0)
        assert rest <= 400_000, f"style, scripts and fonts of {page}: {rest:,} bytes"
    assert statistics.median(weights.values()) <= 500_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", list(SCREENS))
def test_accessible_and_no_sideways_scrolling(browser, server, pages, screen, scheme):
    """Nothing serious from axe, nothing wider than the screen, all images with text."""
    axe = pytest.importorskip("axe_playwright_python.base")
    problems = []
    with Visit(browser, screen, scheme) as visit:
        for page in pages:
            visit.open(server + page)
            # folded cells are read too
            visit.tab.evaluate(
                "document.querySelectorAll('details').forEach((d) => (d.open = true))"
            )
            visit.tab.wait_for_timeout(50)  # until the page's own script has seen it
            visit.tab.evaluate(axe.AXE_SCRIPT)
            for script, problem in (
                (TOO_WIDE, "wider than the screen"),
                (OUT_OF_REACH, "scrolls, but not by keyboard"),
                (WITHOUT_TEXT, "image without alt text"),
                (AUDIT, "axe"),
            ):
                found = visit.tab.evaluate(script)
                problems += [f"{page}: {problem}: {element}" for element in found]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("way", ["server", "file"])
def test_search(browser, server, site, way):
    """A word typed into the search field of a page finds the chapters that have it."""
    with Visit(browser) as visit:
        start = server if way == "server" else site.as_uri() + "/"
        visit.open(start + "book/how_to_use.html")
        visit.tab.keyboard.press("/")
        visit.tab.keyboard.type("autograd")
        visit.tab.keyboard.press("Enter")
        visit.tab.wait_for_selector("#search-results li a")
        hits = visit.tab.locator("#search-results li a").all_inner_texts()
        assert any("Autograd" in hit or "autograd" in hit for hit in hits), hits
        visit.tab.locator("#search-results li a").first.click()
        visit.tab.wait_for_selector("article h1")
        assert visit.complaints == []


def test_formulas_are_mathml(browser, server, site, pages):
    """Chapters hold MathML, and the mathematical font is the one that draws it."""
    with Visit(browser) as visit:
        chapters = filter(is_chapter, pages)
        page = max(chapters, key=lambda p: (site / p).read_text("utf-8").count("<math"))
        visit.open(server + page)
        assert visit.tab.locator("math").count() > 0
        assert visit.tab.evaluate("document.fonts.check('16px \"Book Math\"', 'x')")
        raised = visit.tab.evaluate(
            """() => [...document.querySelectorAll("msup")].some((m) =>
                m.children[1].getBoundingClientRect().bottom <
                m.children[0].getBoundingClientRect().bottom)"""
        )
        assert raised, "an exponent is drawn above its base"


def test_light_and_dark(browser, server):
    """The switch changes the page, and the next page remembers."""
    ground = "getComputedStyle(document.body).backgroundColor"
    with Visit(browser) as visit:
        visit.open(server + "book/index.html")
        light = visit.tab.evaluate(ground)
        visit.tab.get_by_role("button", name="Switch to dark").click()
        dark = visit.tab.evaluate(ground)
        assert dark != light
        visit.open(server + "book/glossary.html")
        assert visit.tab.evaluate(ground) == dark
        visit.tab.get_by_role("button", name="Switch to light").click()
        assert visit.tab.evaluate(ground) == light


def test_previous_and_next(browser, server, pages):
    """Following "next" from the welcome page passes every page of the book once."""
    with Visit(browser) as visit:
        visit.tab.goto(server)
        visit.tab.wait_for_url("**/book/index.html")
        assert not visit.tab.locator(".bar [rel]").count()
        seen = []
        while True:
            seen.append(visit.tab.url.removeprefix(server))
            forward = visit.tab.locator("a.next")
            if not forward.count():
                break
            forward.click()
            visit.tab.wait_for_load_state()
            back = visit.tab.locator("a.previous").evaluate("a => a.href")
            assert back == server + seen[-1]
            links = "links => links.map((a) => a.href)"
            top, bottom = visit.tab.locator(".bar [rel]"), visit.tab.locator(".turn a")
            assert top.evaluate_all(links) == bottom.evaluate_all(links)
        assert sorted(seen) == sorted(set(pages) - {"search.html"})


@pytest.mark.parametrize("screen", list(SCREENS))
def test_bar_with_all_its_tools(browser, small, screen):
    """Previous and next are in reach at the top; nothing is pushed off the screen."""
    with Visit(browser, screen) as visit:
        visit.open((small / "notebooks/01_hello_pytorch.html").as_uri())
        tools = visit.tab.locator(".tools > *")
        assert tools.count() == 6
        right = max(tool.bounding_box()["x"] for tool in tools.all())
        assert right < SCREENS[screen][0] - 40
        assert visit.tab.evaluate(TOO_WIDE) == []
        visit.tab.get_by_role("link", name="Next page").click()
        visit.tab.wait_for_url("**/01b_in_depth.html")


def test_going_on(browser, server):
    """The welcome page offers the chapter and section that were read last."""
    with Visit(browser) as visit:
        visit.open(server + "book/index.html")
        assert not visit.tab.locator(".go-on").count()
        visit.open(server + "notebooks/04_training_and_evaluation.html")
        visit.open(server + "book/index.html")
        offer = visit.tab.locator(".go-on")
        assert offer.inner_text().startswith("Go on with chapter 4: ")
        offer.locator("a").click()
        section = visit.tab.locator("article > section > section").nth(4)
        section.evaluate("section => section.scrollIntoView()")
        heading = visit.tab.locator(".contents [aria-current]").inner_text()
        visit.open(server + "book/glossary.html")
        visit.open(server + "book/index.html")
        assert offer.inner_text().endswith(f"\n{heading}")
        offer.locator("a").click()
        visit.tab.wait_for_url(f"**/04_*.html#{section.get_attribute('id')}")
        assert visit.complaints == []


def test_storage_that_is_blocked(browser, server):
    """Where the browser remembers nothing, pages work and nothing is offered."""
    blocked = "() => { throw new DOMException('blocked', 'SecurityError') }"
    with Visit(browser) as visit:
        visit.tab.add_init_script(
            "Object.defineProperty(window, 'localStorage', "
            f"{{configurable: true, get: {blocked}}})"
        )
        visit.open(server + "notebooks/04_training_and_evaluation.html")
        visit.tab.get_by_role("button", name="Switch to dark").click()
        visit.open(server + "book/index.html")
        assert not visit.tab.locator(".go-on").count()
        assert visit.complaints == []


def test_link_to_a_heading(browser, server):
    """It shows when it is wanted, works by keyboard, copies its address and says so."""
    page = server + "notebooks/04_training_and_evaluation.html"
    shown = "a => getComputedStyle(a).opacity"
    with Visit(browser) as visit:
        visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
        visit.open(page)
        heading = visit.tab.locator("h2").nth(2)
        link = heading.get_by_role("link", name="Copy link")
        assert link.evaluate(shown) == "0"
        heading.hover()
        assert link.evaluate(shown) == "1"
        visit.tab.mouse.move(0, 0)
        link.focus()
        assert link.evaluate(shown) == "1"
        visit.tab.evaluate("window.setTimeout = () => 0")  # what it says, stays
        visit.tab.keyboard.press("Enter")
        visit.tab.locator("[role=status]", has_text="Copied").wait_for(state="attached")
        assert "Copied" in link.evaluate("a => getComputedStyle(a, '::after').content")
        copied = visit.tab.evaluate("navigator.clipboard.readText()")
        assert copied == link.evaluate("a => a.href") == visit.tab.url
    touch = browser.new_context(is_mobile=True, has_touch=True)
    tab = touch.new_page()
    tab.goto(page)
    assert tab.locator("h2 > .headerlink").first.evaluate(shown) == "1"
    touch.close()


def test_print(browser, server):
    """On paper: the text in light colours, with the cells that the reader unfolded."""
    with Visit(browser, scheme="dark") as visit:
        visit.open(server + "notebooks/04_training_and_evaluation.html")
        visit.tab.evaluate("window.print = () => (window.printed = true)")
        visit.tab.get_by_role("button", name="Print").click()
        visit.tab.wait_for_function("window.printed")
        visit.tab.emulate_media(media="print", color_scheme="dark")
        visit.tab.set_viewport_size({"width": 680, "height": 960})  # A4 and its margins
        hidden = ".bar, .sidebar, .contents, .turn, .copy, .headerlink, details.hide"
        visible = "things => things.filter((thing) => thing.checkVisibility()).length"
        assert visit.tab.locator(hidden).evaluate_all(visible) == 0
        ground = "getComputedStyle(document.body).backgroundColor"
        assert visit.tab.evaluate(ground) == "rgb(255, 255, 255)"
        wide = "boxes => boxes.some((box) => box.scrollWidth > box.clientWidth)"
        assert not visit.tab.locator("pre").evaluate_all(wide)
        after = "a => getComputedStyle(a, '::after').content"
        outside = visit.tab.locator("article a.external:not(.bare)").first
        assert outside.get_attribute("href") in outside.evaluate(after)
        visit.tab.emulate_media(media="screen")
        visit.tab.set_viewport_size({"width": 1280, "height": 900})
        visit.tab.get_by_role("button", name="Unfold all code").click()
        visit.tab.emulate_media(media="print")
        cells = visit.tab.locator("details.hide pre")
        assert cells.evaluate_all(visible) == cells.count() > 0
        assert visit.tab.locator("details.hide summary").evaluate_all(visible) == 0
        visit.tab.emulate_media(media="screen")
        visit.tab.get_by_role("button", name="Fold all code").click()
        assert not visit.tab.locator("details.hide[open]").count()


def test_menu_on_a_phone(browser, server):
    """The chapters are behind a button there, and reachable by keyboard."""
    with Visit(browser, "phone") as visit:
        visit.open(server + "book/index.html")
        chapters = visit.tab.get_by_role("navigation", name="Chapters")
        assert not chapters.is_visible()
        visit.tab.get_by_role("button", name="Contents of the book").click()
        chapters.wait_for(state="visible")
        visit.tab.keyboard.press("Escape")
        chapters.wait_for(state="hidden")

"""What the pages need beyond Sphinx: links, facts of the notebooks, sizes of images.

The repository's address is never guessed. It comes from `BOOK_REPOSITORY_URL` (and
`BOOK_REPOSITORY_BRANCH`), or from what GitHub Actions sets; where neither is there, the
pages have no link that would need it.

How long a notebook takes to read is computed from it, everything else about it is what
`tools/chapters.py status` measured and wrote to book/status.json.
"""

import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from reading import reading_minutes  # noqa: E402

# Assets of the theme and of Jupyter Book's extensions that our own layout replaces
UNUSED = """vendor scripts styles images locales
    sbt-webpack-macros.html webpack-macros.html
    design-tabs.js sphinx-thebe.js sphinx-thebe.css togglebutton.js togglebutton.css
    copybutton.js copybutton_funcs.js copybutton.css clipboard.min.js check-solid.svg
    copy-button.svg basic.css pygments.css file.png minus.png plus.png""".split()
UNUSED_PATTERNS = ["mystnb.*.css", "sphinx-design.min.css", "design-style.*.min.css"]

PLAIN_TOKEN = re.compile(r'<span class="(?:n|o|p|w|vm|nv)">([^<]*)</span>')

# The first line of a folded cell, which is for Colab: here the button says it
FORM_TITLE = re.compile(r'<span class="c1"># ?@title [^<]*</span>\n')
# What Jupyter Book appends for running cells in the page, with another book's address
THEBE = re.compile(
    r'<script type="text/x-thebe-config">.*?</script>\s*<script>kernelName.*?</script>',
    re.DOTALL,
)
# A link whose text is its address: in print it needs no address behind it
BARE_LINK = re.compile(
    r'(<a class="reference external)(" href="(?:https://doi\.org/)?([^"]*)">\3<)'
)
# Where the text of a card that leads to a notebook ends
CARD_END = re.compile(
    r'</div>\s*<a class="sd-stretched-link [^>]*href="\.\./(notebooks/\w+)\.html"'
)

REDIRECT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="refresh" content="0; url={page}"><link rel="icon" href="data:,">
</head><body><main><h1><a href="{page}">{title}</a></h1></main></body></html>
"""


def repository() -> tuple[str, str] | None:
    """Address and branch of the repository, if the environment tells them."""
    env = os.environ
    if url := env.get("BOOK_REPOSITORY_URL"):
        return url.rstrip("/").removesuffix(".git"), env.get(
            "BOOK_REPOSITORY_BRANCH", "main"
        )
    if env.get("GITHUB_SERVER_URL") and env.get("GITHUB_REPOSITORY"):
        url = f"{env['GITHUB_SERVER_URL']}/{env['GITHUB_REPOSITORY']}"
        return url, env.get("GITHUB_REF_NAME", "main")
    return None


def links(page: str) -> list[dict[str, str]]:
    """The links of a notebook's page that need the repository's address."""
    known = repository()
    if known is None or not known[0].startswith("https://github.com/"):
        return []
    owner_and_name = known[0].removeprefix("https://github.com/")
    branch = quote(known[1])
    path = f"{owner_and_name}/blob/{branch}/{page}.ipynb"
    binder = f"{owner_and_name}/{quote(known[1], safe='')}?urlpath="
    return [
        {
            "name": "Colab",
            "title": "Open this notebook in Google Colab",
            "url": f"https://colab.research.google.com/github/{path}",
        },
        {
            "name": "Binder",
            "title": "Open this notebook on Binder",
            "url": f"https://mybinder.org/v2/gh/{binder}"
            + quote(f"lab/tree/{page}.ipynb", safe=""),
        },
    ]


def is_notebook(page: str) -> bool:
    """Whether a page is a notebook, not one of the pages around them."""
    return page.startswith("notebooks/")


def contents(
    app: Sphinx, above: str = "", part: str = "", depth: int = 0
) -> Iterator[tuple[str, str, int]]:
    """The pages below another in the book's order: name, part of the book, depth."""
    site_map = app.config.external_site_map
    for subtree in site_map[above or site_map.root.docname].subtrees:
        for page in map(str, subtree.items):
            yield page, subtree.caption or part, depth
            yield from contents(app, page, subtree.caption or part, depth + 1)


def facts(app: Sphinx, page: str) -> dict:
    """Minutes to read a notebook and, once it was measured, what running it takes."""
    notebook = nbformat.read(Path(app.srcdir, f"{page}.ipynb"), as_version=4)
    status = Path(app.srcdir, "book", "status.json").read_text(encoding="utf-8")
    measured = json.loads(status).get(Path(page).name, {})
    return {"minutes": reading_minutes(notebook), **measured}


class Notebooks(SphinxDirective):
    """A table of all notebooks, the time to read them, and where they were measured."""

    columns = "notebook | minutes to read | seconds to run | memory (GB) | data | torch"
    keys = ["minutes", "seconds", "memory", "data", "torch", "date"]

    def run(self) -> list[nodes.Node]:
        app = self.env.app
        pages = [(page, depth) for page, _, depth in contents(app) if is_notebook(page)]
        found = {page: facts(app, page) for page, _ in pages}
        lines = [f"| {self.columns} | measured |", "|---|---:|---:|---:|---|---|---|"]
        machines: dict[str, list[str]] = {}
        for page, measured in found.items():
            cells = [str(measured.get(key, "")) for key in self.keys]
            lines.append(f"| [](/{page}.ipynb) | {' | '.join(cells)} |")
            if machine := measured.get("machine"):
                machines.setdefault(machine, []).append(Path(page).name.split("_")[0])

        chapters = sum(found[page]["minutes"] for page, depth in pages if not depth)
        everything = sum(measured["minutes"] for measured in found.values())
        lines += ["", f"Reading all chapters takes {duration(chapters)}"]
        if everything > chapters:
            lines[-1] += f", with the in-depth notebooks {duration(everything)}"
        lines[-1] += "."
        for machine, names in machines.items():
            several = f" ({', '.join(names)})" if len(machines) > 1 else ""
            lines += ["", f"Measured on: {machine}{several}."]

        result = self.parse_text_to_nodes("\n".join(lines))
        result[0]["classes"].append("notebooks")
        rows = list(result[0].findall(nodes.row))[1:]
        for row, (_, depth) in zip(rows, pages, strict=True):
            row["classes"] += ["below"] if depth else []
        return result


def duration(minutes: int) -> str:
    """Minutes, and roughly how many hours that is."""
    return f"{minutes:,} minutes ({minutes / 60:.0f} hours)"


def size_of_png(path: Path) -> tuple[int, int] | None:
    """Width and height of a PNG file, read from its header."""
    header = path.read_bytes()[:24] if path.suffix == ".png" else b""
    return struct.unpack(">II", header[16:24]) if len(header) == 24 else None


def finish_body(app: Sphinx, body: str) -> str:
    """Make the text of a page lighter and steadier.

    Images get their size and load late, tables scroll by themselves, and tokens of
    code that book.css does not colour lose the tags that make up half of a page.
    """
    sources = {name: source for source, name in app.builder.images.items()}

    def image(match: re.Match) -> str:
        tag = match[0]
        name = Path(re.search(r'src="([^"]*)"', tag)[1]).name
        size = name in sources and size_of_png(Path(app.srcdir, sources[name]))
        if size and "width" not in tag:
            tag = tag.replace("<img ", f'<img width="{size[0]}" height="{size[1]}" ')
        return tag.replace("<img ", '<img loading="lazy" decoding="async" ')

    def minutes(match: re.Match) -> str:
        return f'<p class="minutes">{facts(app, match[1])["minutes"]} min</p>{match[0]}'

    body = re.sub(r"<img [^>]*>", image, body)
    body = THEBE.sub("", body)
    body = FORM_TITLE.sub("", body)
    body = PLAIN_TOKEN.sub(r"\1", body)
    body = body.replace("tex2jax_ignore mathjax_ignore", "")
    body = body.replace(' role="list"', "")  # of citations, which are no list items
    body = body.replace(' aria-label="Toggle hidden content"', "")
    body = BARE_LINK.sub(r"\1 bare\2", body)
    body = CARD_END.sub(minutes, body)
    body = re.sub(r"<table\b", '<div class="wide"><table', body)
    return body.replace("</table>", "</table></div>")


def add_to_page(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Pass part, links, facts and the finished text on to the page's template."""
    notebook = is_notebook(page)
    parts = {name: part for name, part, _ in contents(app)}
    context["part"] = parts.get(page, "")
    context["links"] = links(page) if notebook else []
    context["notebook"] = f"_sources/{page}.ipynb" if notebook else ""
    context["facts"] = facts(app, page) if notebook else {}
    if context.get("body"):
        context["body"] = finish_body(app, context["body"])


def tidy(app: Sphinx, exception: Exception | None) -> None:
    """Remove what no page loads; lead from the top of the site to its first page."""
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    doomed = [static / name for name in UNUSED]
    doomed += [path for pattern in UNUSED_PATTERNS for path in static.glob(pattern)]
    for path in doomed:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    first = app.builder.get_target_uri(app.config.root_doc)
    redirect = REDIRECT.format(title=app.config.html_title, page=first)
    Path(app.outdir, "index.html").write_text(redirect, encoding="utf-8")


def setup(app: Sphinx) -> dict:
    """Connect to Sphinx."""
    app.add_directive("notebooks", Notebooks)
    app.connect("html-page-context", add_to_page, priority=900)
    app.connect("build-finished", tidy)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

"""Every chapter has the form that CONTRIBUTING.md describes."""

import ast
import base64
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from notebooks import NOTEBOOKS, notebook_paths

ROOT = NOTEBOOKS.parent

CHAPTERS = notebook_paths()
SECTIONS = ["What goes wrong", "What you learned", "In practice", "Exercises"]
TAGS = re.compile(
    r"parameters|data|hide-input|hide-cell|nbval-ignore-output|[ari]tol=\d[\d.e-]*"
)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: nbformat.NotebookNode) -> str:
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def lines(source: str) -> int:
    return sum(bool(line.strip()) for line in source.splitlines())


def has_text(cell: nbformat.NotebookNode) -> bool:
    """Whether the cell printed or returned text, other than the name of a picture."""
    return any(
        output.output_type == "stream"
        or ("text/plain" in output.get("data", {}) and "image/png" not in output.data)
        for output in cell.outputs
    )


def figures(notebook: nbformat.NotebookNode) -> list[tuple]:
    """(cell, PNG as bytes) of every figure."""
    return [
        (cell, base64.b64decode(output.data["image/png"]))
        for cell in code(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request) -> nbformat.NotebookNode:
    notebook = read(request.param)
    notebook.path = request.param
    return notebook


def test_the_chapters_are_numbered_without_gaps_and_all_listed():
    numbers = [int(path.name[:2]) for path in CHAPTERS]
    assert numbers == list(range(1, len(numbers) + 1))
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    listed = [file for file in files if file.startswith("notebooks/")]
    assert listed == [f"notebooks/{path.stem}" for path in CHAPTERS]


def test_the_title_carries_the_number(chapter):
    first = chapter.cells[0].source.splitlines()[0]
    assert first.startswith(f"# {int(chapter.path.name[:2])}. "), first


def test_the_opening_says_what_how_and_how_long(chapter):
    opening = chapter.cells[0].source
    parts = opening.split("**You will**")
    assert len(parts) == 2, "no **You will**"
    assert 3 <= len(re.findall(r"^- ", parts[1], re.MULTILINE)) <= 7
    assert "**Before you start**" in opening and "**Time and data**" in opening


def test_the_closing_sections_are_there_in_order(chapter):
    headings = re.findall(r"^## (.+)$", prose(chapter), re.MULTILINE)
    places = [
        [i for i, title in enumerate(headings) if name in title]
        for name in [*SECTIONS, "Further reading"]
    ]
    assert all(len(place) == 1 for place in places), (headings, places)
    assert places == sorted(places)
    numbers = [h.split()[0] for h in headings if re.match(r"\d+\.\d+ ", h)]
    number = int(chapter.path.name[:2])
    assert numbers == [f"{number}.{i}" for i in range(1, len(numbers) + 1)]
    assert len(numbers) >= 4


def test_each_exercise_has_a_folded_solution_that_checks_itself(chapter):
    start = next(i for i, c in enumerate(chapter.cells) if "## Exercises" in c.source)
    titles = re.findall(r"^### Exercise (\d)", prose(chapter), re.MULTILINE)
    assert titles == [str(i + 1) for i in range(len(titles))] and 3 <= len(titles) <= 5
    solutions = [c for c in chapter.cells[start:] if c.cell_type == "code"]
    assert len([c for c in solutions if "# @title Solution" in c.source]) >= len(titles)
    for cell in solutions:
        assert "hide-cell" in tags(cell), cell.source
        assert cell.metadata.mystnb.code_prompt_show == "Show the solution"
    checked = "\n".join(cell.source for cell in solutions)
    assert checked.count("assert") >= len(titles)


def test_one_parameters_cell_comes_first_and_holds_the_seed(chapter):
    tagged = [i for i, c in enumerate(code(chapter)) if "parameters" in tags(c)]
    assert tagged == [0]
    assert "SEED = 0" in code(chapter)[0].source


def test_cells_are_short(chapter):
    lengths = [lines(cell.source) for cell in code(chapter)]
    assert max(lengths) <= 25
    assert sum(length <= 8 for length in lengths) >= len(lengths) / 2


def test_every_cell_was_executed_in_order(chapter):
    counts = [cell.execution_count for cell in code(chapter)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_errors_or_warnings_are_stored(chapter):
    for cell in code(chapter):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", (cell.source, output.text)


def test_outputs_are_short(chapter):
    for cell in code(chapter):
        text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
        assert len(text.splitlines()) <= 20, cell.source


def test_figures_have_alt_text_and_are_small(chapter):
    for cell, png in figures(chapter):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt) >= 30, f"describe the figure of: {cell.source}"
        assert len(png) < 60 * 1024, f"{len(png) // 1024} KB: {cell.source}"
    assert len(figures(chapter)) >= 4


def test_tags_are_known(chapter):
    for cell in code(chapter):
        assert all(TAGS.fullmatch(tag) for tag in tags(cell)), tags(cell)


def test_a_cell_that_is_not_compared_says_why(chapter):
    for cell in code(chapter):
        skipped = "nbval-ignore-output" in tags(cell)
        reason = cell.metadata.get("not-compared", "")
        assert skipped == bool(reason), cell.source
        assert not skipped or len(reason) >= 20
        assert "NBVAL" not in cell.source, "use the tag and give the reason"


def test_nine_in_ten_cells_with_text_are_compared(chapter):
    cells = [cell for cell in code(chapter) if has_text(cell)]
    compared = [cell for cell in cells if "nbval-ignore-output" not in tags(cell)]
    print(f"{chapter.path.stem}: {len(compared)} of {len(cells)} cells compared")
    assert len(compared) >= 0.9 * len(cells) > 0


def test_claims_are_asserted(chapter):
    trees = [ast.parse(cell.source) for cell in code(chapter)]
    asserts = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert len(asserts) >= 15


def test_it_stands_alone(chapter):
    """No absolute path, no import of project files, no machine-dependent metadata."""
    text = json.dumps(chapter.cells)
    assert not re.search(r"(?<![\w.:/])/(home|root|work|tmp|Users)/|[A-Z]:\\\\", text)
    project = {path.stem for path in (ROOT / "tools").glob("*.py")} | {"conftest"}
    for cell in code(chapter):
        for node in ast.walk(ast.parse(cell.source)):
            names = [a.name for a in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not project & set(names)
    assert set(chapter.metadata) == {"kernelspec", "language_info"}


def test_the_prose_shows_in_jupyter_colab_and_on_github(chapter):
    """No MyST directives or roles and no HTML, which only one of the places draws."""
    text = prose(chapter)
    assert not re.search(r"^(:::|```\{)", text, re.MULTILINE)
    assert not re.search(r"\{\w+\}`", text)
    assert not re.search(r"</?(div|span|img|br|details|sub|sup)\b", text)


def test_links_between_pages_lead_somewhere(chapter):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(chapter)):
        if not target.startswith("http"):
            assert (chapter.path.parent / target).exists(), target


def test_shared_cells_are_the_same_everywhere():
    """Plot style and check of the data files are copied into each chapter unchanged."""
    for title in ("# @title Plot style", "# @title Check of the data files"):
        found = {
            cell.source
            for path in CHAPTERS
            for cell in code(read(path))
            if cell.source.startswith(title)
        }
        assert len(found) == 1, f"{len(found)} versions of {title}"

"""Every chapter has the form that CONTRIBUTING.md describes."""

import ast
import base64
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from claims import find_claims, outside
from copies import as_in_source
from notebooks import NOTEBOOKS, notebook_paths
from reading import count_lines, is_folded, only_draws, reading_minutes

ROOT = NOTEBOOKS.parent

CHAPTERS = notebook_paths()
MINUTES = {"chapter": 60, "in depth": 45}  # to read, at most
CELLS = 70  # code cells of a chapter, at most

NUMBER = r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)"

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
    numbers = [int(path.name[:2]) for path in CHAPTERS if path.name[2] == "_"]
    assert numbers == list(range(1, len(numbers) + 1))
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    entries = [entry for part in toc["parts"] for entry in part["chapters"]]
    listed = []
    for entry in entries:
        below = [section["file"] for section in entry.get("sections", [])]
        assert all(file.startswith(entry["file"][:12] + "b_") for file in below)
        listed += [entry["file"], *below]
    listed = [file for file in listed if file.startswith("notebooks/")]
    assert listed == [f"notebooks/{path.stem}" for path in CHAPTERS]


def test_it_is_one_sitting(chapter):
    in_depth = chapter.path.name[2] == "b"
    assert reading_minutes(chapter) <= MINUTES["in depth" if in_depth else "chapter"]
    assert len(code(chapter)) <= CELLS


def test_chapters_1_to_11_are_read_in_seventeen_hours():
    """Chapters 1 to 11 in eleven, with what stands below them."""
    first = [path for path in CHAPTERS if int(path.name[:2]) <= 11]
    minutes = {path.name[:3]: reading_minutes(read(path)) for path in first}
    chapters = sum(m for name, m in minutes.items() if name[2] == "_")
    assert chapters <= 11 * 60 and sum(minutes.values()) <= 17 * 60


def test_code_that_only_draws_is_folded(chapter):
    for cell in code(chapter):
        assert is_folded(cell) or not only_draws(cell.source), cell.source


def test_the_title_carries_the_number(chapter):
    first = chapter.cells[0].source.splitlines()[0]
    number = chapter.path.name.split("_")[0].lstrip("0")
    assert first.startswith(f"# {number}. "), first


def test_the_opening_says_what_and_what_for(chapter):
    opening = chapter.cells[0].source
    parts = opening.split("**You will**")
    assert len(parts) == 2, "no **You will**"
    assert 3 <= len(re.findall(r"^- ", parts[1], re.MULTILINE)) <= 7
    assert "**Before you start**" in opening
    assert not re.search(r"\d (minutes?|seconds?|MB|GB)\b", opening), "the site says it"


def test_the_closing_sections_are_there_in_order(chapter):
    headings = re.findall(r"^## (.+)$", prose(chapter), re.MULTILINE)
    places = [
        [i for i, title in enumerate(headings) if name in title]
        for name in [*SECTIONS, "Further reading"]
    ]
    assert all(len(place) == 1 for place in places), (headings, places)
    assert places == sorted(places)
    numbers = [h.split()[0] for h in headings if re.match(r"\d+b?\.\d+ ", h)]
    number = chapter.path.name.split("_")[0].lstrip("0")
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
    """None is over 25 lines, and half of those whose code is visible have at most 8.

    Imports do not count, nor do the shared functions that find the data.
    """
    lengths = {
        cell.id: count_lines(
            re.sub(r"^(import|from) .*", "", cell.source, flags=re.MULTILINE)
        )
        for cell in code(chapter)
        if not cell.source.startswith("# @title Data files")
    }
    visible = [lengths[c.id] for c in code(chapter) if not is_folded(c)]
    assert max(lengths.values()) <= 25
    assert sum(length <= 8 for length in visible) >= len(visible) / 2


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


def compared(notebook: nbformat.NotebookNode) -> list[bool]:
    """For each cell with text, whether it is compared."""
    cells = [cell for cell in code(notebook) if has_text(cell)]
    return ["nbval-ignore-output" not in tags(cell) for cell in cells]


def test_cells_with_text_are_compared(chapter):
    assert sum(compared(chapter)) >= 0.9 * len(compared(chapter)) > 0


def test_in_the_whole_book_19_of_20_cells_with_text_are_compared():
    found = [result for path in CHAPTERS for result in compared(read(path))]
    print(f"{sum(found)} of {len(found)} cells are compared")
    assert sum(found) >= 0.95 * len(found) > 0


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
    assert set(chapter.metadata) - {"torch", "package"} == {
        "kernelspec",
        "language_info",
    }
    asked = re.findall(r'find_spec\(\\"(\w+)', text)  # without it, conftest.py passes
    assert asked in ([], [chapter.metadata.get("package")])


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


def test_copies_are_as_in_their_source(chapter):
    for cell in code(chapter):
        if source := cell.metadata.get("copy-of"):
            there = read(NOTEBOOKS / f"{source}.ipynb")
            assert cell.source == as_in_source(cell, there), "run chapters.py copies"


def test_cells_that_all_chapters_share_are_the_same_everywhere():
    """Plot style, data files and the choice of a device are copied unchanged."""
    starts = {
        "# @title Plot style": r".*",
        "# @title Data files": r".*",
        'if hasattr(torch, "accelerator")': r"[^\n]*\n(?:(?: .*|else:.*)(?:\n|$))+",
    }
    sources = [cell.source for path in CHAPTERS for cell in code(read(path))]
    for start, rest in starts.items():
        pattern = re.compile(
            f"^{re.escape(start)}{rest}",
            re.MULTILINE | (re.DOTALL if rest == ".*" else 0),
        )
        found = [match[0].strip() for s in sources if (match := pattern.search(s))]
        assert len(set(found)) == 1, f"{len(set(found))} versions of {start}"
        assert "data" in start.lower() or len(found) >= len(CHAPTERS) - 1


def test_comments_on_five_seeds_hold_what_the_page_shows(chapter):
    wrong = []
    for cell in code(chapter):
        measured = cell.metadata.get("measured", {})
        wrong += outside(cell.source, measured)
        lines = {str(claim.line) for claim in find_claims(cell.source)}
        assert set(measured) <= lines, "run `make refresh`"
    assert not wrong


# Tolerances


def tolerance(cell: nbformat.NotebookNode) -> dict[str, float]:
    """Kind of tolerance -> how far a cell lets its numbers move."""
    found = (re.fullmatch(r"([ari]tol)=(.+)", tag) for tag in tags(cell))
    return {match[1]: float(match[2]) for match in found if match}


def compares_little(cell: nbformat.NotebookNode) -> bool:
    """Whether a tolerance is wider than half of the spread of the numbers printed.

    The spread is between the smallest and the largest number of a kind (whole, or with
    a decimal point); of a single number it is its distance from 0.
    """
    allowed = tolerance(cell)
    text = "\n".join(
        o.get("text", "") or o.get("data", {}).get("text/plain", "")
        for o in cell.outputs
    )
    numbers = re.findall(NUMBER, text)
    for kinds, wanted in ((("atol", "rtol"), False), (("itol",), True)):
        found = [float(n) for n in numbers if n.lstrip("+-").isdigit() is wanted]
        if found and set(kinds) & set(allowed):
            spread = max(found) - min(found) or abs(found[0])
            size = max(map(abs, found))
            wide = allowed.get("rtol", 0) * size * (not wanted)
            wide += sum(allowed.get(kind, 0) for kind in kinds if kind != "rtol")
            if wide > spread / 2:
                return True
    return False


def test_tolerances_compare_something(chapter):
    assert not [cell.id for cell in code(chapter) if compares_little(cell)]


# Outputs that no run can change


def says_nothing(cell: nbformat.NotebookNode) -> bool:
    """Whether all text that a cell shows is True, False or a sentence in its code."""
    fixed = {""}
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            fixed |= {line.strip() for line in node.value.splitlines()}
    text = "\n".join(
        o.get("text", "") or o.get("data", {}).get("text/plain", "")
        for o in cell.outputs
        if "image/png" not in o.get("data", {})
    )
    parts = re.split(r"\n|\bTrue\b|\bFalse\b", text)
    return all(part.strip(" ,|[]()") in fixed for part in parts)


def test_most_cells_print_what_they_measured(chapter):
    cells = [cell for cell in code(chapter) if has_text(cell)]
    fixed = [cell for cell in cells if says_nothing(cell)]
    print(f"{chapter.path.stem}: {len(fixed)} of {len(cells)}")
    assert len(fixed) <= 0.03 * len(cells)

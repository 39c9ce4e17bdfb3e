"""The repository's own machinery: tools, pins, style, workflows, README."""

import base64
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

import chapters
import claims
import copies
import large
import seeds
from notebooks import notebook_paths

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run(*command: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# Refreshing


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Write a notebook of one cell where the tools look for chapters; its path."""

    def write(source: str) -> Path:
        path = tmp_path / "01_one.ipynb"
        cell = new_code_cell(source, execution_count=7)
        nbformat.write(new_notebook(cells=[cell]), path)
        return path

    monkeypatch.setattr(chapters, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(chapters, "STATUS", tmp_path / "status.json")
    return write


def test_refresh_stores_the_outputs_of_a_run(notebook):
    path = notebook("print(6 * 7)")
    chapters.refresh(path)
    cell = nbformat.read(path, as_version=4).cells[0]
    assert cell.execution_count == 1 and cell.outputs[0].text == "42\n"
    before = path.read_bytes()
    chapters.refresh(path)
    assert path.read_bytes() == before


def test_a_failed_refresh_leaves_the_file_as_it_was(notebook):
    path = notebook("print(1)\nassert 1 > 2")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError):
        chapters.refresh(path)
    assert path.read_bytes() == before
    with pytest.raises(SystemExit, match="failed: 01_one"):
        chapters.main(["refresh", "01"])
    assert [p.name for p in path.parent.iterdir()] == ["01_one.ipynb"]


def test_an_unknown_chapter_is_named_with_those_there_are():
    with pytest.raises(SystemExit, match="no chapter '77'.*01_hello_pytorch"):
        chapters.main(["refresh", "77"])


def test_chapters_are_found_by_number_name_or_path():
    first = notebook_paths()[0]
    for name in ("01", first.stem, f"notebooks/{first.name}"):
        assert chapters.find_chapters([name]) == [first]


def test_a_number_means_the_chapter_and_not_what_stands_below_it(notebook):
    below = notebook("").rename(chapters.NOTEBOOKS / "01b_more.ipynb")
    chapter = notebook("")
    assert chapters.find_chapters(["01"]) == [chapter]
    assert chapters.find_chapters(["01b"]) == [below]
    assert chapters.find_chapters([]) == [chapter, below]


def test_refresh_keeps_what_a_notebook_asks_for(notebook):
    path = notebook("")
    whole = nbformat.read(path, as_version=4)
    whole.metadata |= {"torch": "2.6", "package": "json"}
    nbformat.write(whole, path)
    chapters.refresh(path)
    metadata = nbformat.read(path, as_version=4).metadata
    assert metadata == chapters.METADATA | {"torch": "2.6", "package": "json"}


# Status


def test_status_tells_what_a_chapter_needs_and_which_data_it_reads(notebook):
    source = 'file = open("data/" + "numbers.csv")\nprint(file.read())'
    path = notebook(source)
    (path.parent / "data").mkdir()
    (path.parent / "data" / "numbers.csv").write_text("1")
    (path.parent / "data" / "other.csv").write_text("1")
    before = path.read_bytes()
    chapters.main(["status"])
    row = chapters.read_status()["01_one"]
    assert row["data"] == "numbers.csv (repository)"
    assert row["seconds"] > 0 and row["memory"] > 0
    assert path.read_bytes() == before


def test_every_chapter_was_measured():
    rows = chapters.read_status()
    assert list(rows) == [path.stem for path in notebook_paths()]
    assert not re.search(r"(?<!\.)/(home|root|work|tmp)/", text("book/status.json"))
    assert all(10 * row["slowest cell"] <= chapters.LIMIT for row in rows.values())


# Claims over seeds


def test_a_claim_notes_both_sides_once_and_stops_nothing(notebook):
    source = """SEED = 0
for x in (1.0, 2.0):
    assert x + SEED < 2
assert SEED >= 0, "a message"
def inner():
    assert False
"""
    noted, sources, error = seeds.run(notebook(source), seed=0, threads=1)
    assert not error and [claim[2:] for claim in noted] == [
        [True, [1.0, 2.0]],
        [False, [2.0, 2.0]],
        [True, [0.0, 0.0]],
    ]
    assert sources[0, 3].test == "x + SEED < 2"


def test_seeds_report_a_claim_that_fails_with_another_seed(notebook, capsys):
    path = notebook("SEED = 0")
    whole = nbformat.read(path, as_version=4)
    whole.cells.append(new_code_cell("assert SEED < 1"))
    nbformat.write(whole, path)
    with pytest.raises(SystemExit, match="not every claim held"):
        seeds.main(["01", "--seeds", "0", "1"])
    assert "| 1 | `SEED < 1` | 1/2 | 0.00 to 1.00 | 1 |" in capsys.readouterr().out


def test_the_comment_on_five_seeds_is_written_and_then_checked(notebook):
    path = notebook("SEED = 0")
    long = "assert 0 <= SEED + 0.25 < 10 + 0 * len('" + "long" * 8 + "')"
    source = f"assert SEED / 7 < 1  # five seeds: 3\n{long}  # five seeds: 1"
    whole = nbformat.read(path, as_version=4)
    whole.cells.append(new_code_cell(source))
    nbformat.write(whole, path)
    seeds.main(["01", "--write"])
    written = nbformat.read(path, as_version=4).cells[1].source
    assert written == (
        "assert SEED / 7 < 1  # five seeds: 0.000 to 0.572\n"
        f"# five seeds: 0.25 to 4.25\n{long}"
    )
    chapters.refresh(path)
    cell = nbformat.read(path, as_version=4).cells[1]
    assert cell.metadata["measured"] == {"1": [0.0, 0.0], "3": [0.25, 0.25]}
    assert claims.outside(cell.source, cell.metadata["measured"]) == []
    lower = {"1": [0.0, 0.0], "3": [0.24, 0.24]}
    assert claims.outside(cell.source, lower) == ["0.25 to 4.25 does not hold 0.24"]


# Copies


def test_copies_are_found_out_and_written_anew(notebook, tmp_path):
    source = notebook("@staticmethod\ndef twice(x):\n    return 2 * x\n\n\nHALF = 0.5")
    copy = tmp_path / "02_two.ipynb"
    cell = new_code_cell("# Copied\ndef twice(x):\n    return x + x\n\n\nHALF = 1 / 2")
    cell.metadata["copy-of"] = source.stem
    nbformat.write(new_notebook(cells=[cell]), copy)
    assert copies.copy_definitions(copy) == ["01_one"]
    written = nbformat.read(copy, as_version=4).cells[0].source
    assert written == f"# Copied\n{nbformat.read(source, as_version=4).cells[0].source}"
    assert copies.copy_definitions(copy) == []


def test_a_copy_of_what_is_not_there_is_an_error(notebook):
    source = nbformat.read(notebook("x = 1"), as_version=4)
    cell = new_code_cell("y = 1", metadata={"copy-of": "01_one"})
    with pytest.raises(LookupError, match="01_one does not define y"):
        copies.as_in_source(cell, source)


# Figures


def in_base64(save) -> str:
    """The PNG file that a function writes, as notebooks store it."""
    file = BytesIO()
    save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def test_a_figure_is_stored_with_fewer_colours():
    figure = Figure(facecolor="none")
    figure.subplots().plot(np.sin(np.arange(100.0)))
    stored = in_base64(figure.savefig)
    new = chapters.smaller(stored)
    assert len(new) < len(stored) / 2
    sizes = {Image.open(BytesIO(base64.b64decode(png))).size for png in (stored, new)}
    assert len(sizes) == 1


def test_a_photograph_keeps_its_colours():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    stored = in_base64(Image.fromarray(pixels).save)
    assert chapters.smaller(stored) == stored


# Larger runs


def test_a_larger_run_is_shown_and_the_smaller_one_stays(notebook):
    path = notebook("SEEDS = 1")
    whole = nbformat.read(path, as_version=4)
    whole.cells += [
        new_code_cell("print('seeds', SEEDS)"),
        new_markdown_cell("", metadata={"large-run": "SEEDS = 5"}),
        new_markdown_cell("", metadata={"large-run": "SEEDS = 9"}),
        new_code_cell("assert SEEDS == 1  # behind it: not run"),
    ]
    nbformat.write(whole, path)
    large.main(["01"])
    cells = nbformat.read(path, as_version=4).cells
    assert cells[-5].source == "SEEDS = 1" and "outputs" in cells[-4]
    for cell, count in zip(cells[-3:-1], (5, 9), strict=True):
        start, end = f"With `SEEDS = {count}` the same", f"```text\nseeds {count}\n```"
        assert cell.source.startswith(start) and cell.source.endswith(end)


def test_a_larger_run_that_fails_changes_nothing(notebook):
    path = notebook("SEEDS = 1")
    whole = nbformat.read(path, as_version=4)
    whole.cells += [
        new_code_cell("assert SEEDS == 1"),
        new_markdown_cell("", metadata={"large-run": "SEEDS = 5"}),
    ]
    nbformat.write(whole, path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError):
        large.main(["01"])
    assert path.read_bytes() == before


# Pins and style


LISTS = ("requirements-book.txt", "requirements.txt", "requirements-torchtext.txt")


def lines_of(name: str) -> list[str]:
    """What a list names, without comments, options and markers."""
    lines = [line.split(";")[0].strip() for line in text(name).splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def test_every_dependency_is_pinned_once():
    pinned = [line.split("==")[0].lower() for line in lines_of("constraints.txt")]
    assert all(
        re.match(r"[\w.-]+==[\w.]+$", line) for line in lines_of("constraints.txt")
    )
    for name in LISTS:
        for line in lines_of(name):
            package, _, version = line.partition("==")
            assert bool(version) != (package in pinned), f"{name}: {line}"
    assert not any("://" in text(name) for name in (*LISTS, "constraints.txt"))


def test_the_site_needs_no_pytorch_and_the_full_list_contains_its_own():
    assert "-r requirements-book.txt" in text("requirements.txt")
    assert not {"torch", "torchvision"} & set(lines_of("requirements-book.txt"))


def test_ruff_has_nothing_to_say():
    for command in (["check"], ["format", "--check"]):
        result = run("ruff", *command, ".")
        assert result.returncode == 0, result.stdout + result.stderr


# Workflows and the README


@pytest.mark.parametrize(
    "schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"]
)
def test_workflows_fit_the_schema(schema):
    result = run("check_jsonschema", "--builtin-schema", schema, *map(str, WORKFLOWS))
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_workflow_schema_rejects_a_mistake(tmp_path):
    path = tmp_path / "wrong.yml"
    path.write_text(text(".github/workflows/tests.yml").replace("runs-on", "run-on"))
    schema = ["--builtin-schema", "vendor.github-workflows"]
    assert run("check_jsonschema", *schema, str(path)).returncode != 0


def test_the_workflows_cover_every_supported_python_and_both_generations():
    assert [path.stem for path in WORKFLOWS] == ["publish", "tests", "weekly"]
    jobs = yaml.safe_load(text(".github/workflows/tests.yml"))["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert {"run": "make torchtext"} in jobs["torchtext"]["steps"]
    weekly = text(".github/workflows/weekly.yml")
    assert "--upgrade torch torchvision" in weekly and "linkcheck" in weekly
    assert weekly.count("gh issue create") == 2


def test_readme_and_makefile_name_the_same_commands():
    makefile, readme = text("Makefile"), text("README.md")
    targets = re.findall(r"^([a-z]+):", makefile, re.MULTILINE)
    named = re.findall(r"make ([a-z]+)", readme)
    assert set(targets) == set(named), (targets, named)
    build = "jupyter-book build . --all -W -n --keep-going"
    assert f"$(BIN)/{build}\n" in makefile and build in readme
    assert build in text("book/setup.md")
    assert "$(BIN)/pytest $(options)\n" in makefile


def test_the_readme_lists_every_chapter():
    for path in notebook_paths():
        assert f"(notebooks/{path.name})" in text("README.md")

"""The repository's own machinery: tools, pins, style, workflows, README."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

import chapters
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
    with pytest.raises(SystemExit, match="not refreshed: 01_one"):
        chapters.main(["refresh", "01"])
    assert [p.name for p in path.parent.iterdir()] == ["01_one.ipynb"]


def test_an_unknown_chapter_is_named_with_those_there_are():
    with pytest.raises(SystemExit, match="no chapter '77'.*01_hello_pytorch"):
        chapters.main(["refresh", "77"])


def test_chapters_are_found_by_number_name_or_path():
    first = notebook_paths()[0]
    for name in ("01", first.stem, f"notebooks/{first.name}"):
        assert chapters.find_chapters([name]) == [first]


# Status


def test_status_tells_which_data_are_read(notebook):
    source = 'import json\nfile = open("data/" + "numbers.csv")\nprint(file.read())'
    path = notebook(source)
    (path.parent / "data").mkdir()
    (path.parent / "data" / "numbers.csv").write_text("1")
    (path.parent / "data" / "other.csv").write_text("1")
    row = chapters.measure(path)
    assert "| numbers.csv (repository) |" in row and "other" not in row


def test_the_status_table_has_a_row_for_each_chapter():
    table = text("book/status_table.md")
    for path in notebook_paths():
        assert f"](../notebooks/{path.name}) |" in table
    assert "Measured on: " in table
    assert not re.search(r"(?<!\.)/(home|root|work|tmp)/", table)


# Claims over seeds


def test_seeds_record_both_sides_of_a_claim_and_go_on(notebook):
    source = """SEED = 0
for x in (1.0, 2.0):
    assert x + SEED < 3
assert SEED >= 0, "a message"
def inner():
    assert False
"""
    path = notebook(source)
    whole = nbformat.read(path, as_version=4)
    whole.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(whole, path)
    claims, sources, error = seeds.run(path, seed=0, threads=1)
    assert not error and [c[2:] for c in claims] == [
        [True, [1.0, 3.0]],
        [True, [2.0, 3.0]],
        [True, [0.0, 0.0]],
    ]
    assert sources[0, 3] == "x + SEED < 3"


def test_seeds_report_a_claim_that_fails_with_another_seed(notebook, capsys):
    path = notebook("SEED = 0")
    whole = nbformat.read(path, as_version=4)
    whole.cells[0].metadata["tags"] = ["parameters"]
    whole.cells.append(new_code_cell("assert SEED < 1"))
    nbformat.write(whole, path)
    assert not seeds.try_chapter(path, seeds=[0, 1], threads=[1])
    assert "| 1 | `SEED < 1` | 1/2 | 0 to 1 | 1 |" in capsys.readouterr().out


# Pins and style


def test_every_dependency_is_pinned():
    for name in ("requirements.txt", "constraints.txt", "requirements-current.txt"):
        for line in text(name).splitlines():
            if line and not line.startswith(("#", "-c ")):
                assert re.match(r"[\w.-]+==[\w.]+( ?;.*)?$", line), line
                assert "://" not in line


def test_the_environments_agree_on_what_they_share():
    def pins(name):
        found = re.findall(r"^([\w-]+)==([\w.]+)$", text(name), re.MULTILINE)
        return dict(found)

    main, current = pins("requirements.txt"), pins("requirements-current.txt")
    shared = set(main) & set(current)
    assert len(shared) >= 5
    assert {n: main[n] for n in shared} == {n: current[n] for n in shared}
    for package in ("torch", "torchvision", "numpy"):
        assert f'{package}=={current[package]}; python_version >= "3.13"' in text(
            "requirements.txt"
        )


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


def test_the_workflows_cover_every_supported_python_and_the_newest_torch():
    assert [path.stem for path in WORKFLOWS] == ["publish", "tests", "weekly"]
    jobs = yaml.safe_load(text(".github/workflows/tests.yml"))["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
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
    assert "$(BIN)/pytest\n" in makefile


def test_the_readme_lists_every_chapter():
    for path in notebook_paths():
        assert f"(notebooks/{path.name})" in text("README.md")

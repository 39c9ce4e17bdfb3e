"""The tests of the notebooks go red when they should, run in parallel as always.

All cases are cells of a few notebooks, which nbval runs once, in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"

GREEN = {
    "the same text": ("print('loss 0.50')", "loss 0.50\n", []),
    "a number within atol": ("print('loss 0.52')", "loss 0.50\n", ["atol=0.03"]),
    "a number within rtol": ("print('loss 1.02e6')", "loss 1e6\n", ["rtol=0.03"]),
    "a whole number within itol": ("print('wrong: 12')", "wrong: 10\n", ["itol=2"]),
    "columns moved by a digit": (
        "print('a  9.9\\nb 10.1')",
        "a 10.0\nb 10.0\n",
        ["atol=0.2"],
    ),
    "a zero that changed its sign": ("print(-0.0)", "0.0\n", ["atol=0.1"]),
    "a result instead of a print": (
        "1.25",
        new_output("execute_result", {"text/plain": "1.26"}, execution_count=1),
        ["atol=0.02"],
    ),
    "an output that is not compared": ("print(1)", "2\n", ["nbval-ignore-output"]),
}

RED = {
    "a number without a tolerance": ("print('loss 0.51')", "loss 0.50\n", []),
    "a number out of tolerance": ("print('loss 0.54')", "loss 0.50\n", ["atol=0.03"]),
    "a number out of relative tolerance": ("print(1.04e6)", "1e6\n", ["rtol=0.03"]),
    "a whole number under atol": ("print('shape 11')", "shape 10\n", ["atol=5"]),
    "a whole number out of itol": ("print('wrong: 13')", "wrong: 10\n", ["itol=2"]),
    "a number that became nan": ("print(float('nan'))", "0.5\n", ["atol=1", "rtol=1"]),
    "a digit inside a word": (
        "print('conv2 0.5')",
        "conv1 0.5\n",
        ["atol=1", "itol=9"],
    ),
    "a changed word": ("print('gain 0.50')", "loss 0.50\n", ["atol=0.03"]),
    "a missing line": ("print('a 1.0')", "a 1.0\nb 2.0\n", ["atol=0.1"]),
    "an additional line": ("print('a 1.0\\nb 2.0')", "a 1.0\n", ["atol=0.1"]),
    "a missing number": ("print('0.5')", "0.5 0.5\n", ["atol=0.1"]),
    "a missing output": ("x = 1", "1\n", ["atol=0.1"]),
    "a failed assert": ("assert 1 > 2", None, []),
    "a failed assert, not compared": ("assert 1 > 2", None, ["nbval-ignore-output"]),
    "a warning": ("import warnings; warnings.warn('old')", None, []),
    "a missing figure": (
        "print('no figure')",
        new_output(
            "display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}
        ),
        ["nbval-ignore-output"],
    ),
    "an additional figure": (FIGURE, None, ["nbval-ignore-output"]),
    "a figure of another size": (
        FIGURE,
        new_output(
            "display_data",
            {
                "image/png": "iVBORw0KGgo=",
                "text/plain": "<Figure size 1x1 with 1 Axes>",
            },
        ),
        [],
    ),
    "an executed cell whose output was removed": ("print(1)", None, []),
}


NEVER_EXECUTED = "a cell never executed, or a notebook stripped of its outputs"


def case_cell(source: str, stored, tags: list[str]) -> nbformat.NotebookNode:
    """A code cell with one stored output (text stands for printed text)."""
    if isinstance(stored, str):
        stored = new_output("stream", name="stdout", text=stored)
    cell = new_code_cell(source, outputs=[stored] if stored else [], execution_count=1)
    cell.metadata.tags = tags
    return cell


# Notebooks of their own, of which the second cell goes wrong
ACCIDENTS = {
    "dies": "import os; os._exit(1)",
    "hangs": "import time; time.sleep(600)",
}
LIMIT = 10  # seconds for a cell


def run(folder: Path, *options: str) -> dict[tuple[str, int], tuple[str, float]]:
    """(Notebook, cell) -> what was said of its failure, and the seconds it took."""
    shutil.copy(ROOT / "conftest.py", folder)
    options = ["--nbval", "--nbval-current-env", "--color=no", *options, "--rootdir=."]
    options += ["-n2", "--dist=loadfile", "--max-worker-restart=0"]
    options += ["--junitxml=report.xml", "-c", os.devnull]
    options += [f"--nbval-cell-timeout={LIMIT}"]
    command = [sys.executable, "-m", "pytest", *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    found = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        file = case.get("classname").removesuffix(".ipynb")
        cell = int(case.get("name").split()[-1])
        said = "".join(f"{e.get('message')}\n{e.text}" for e in case)
        found[file, cell] = said, float(case.get("time"))
    return found


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[tuple[str, int], tuple[str, float]]:
    """The outcome of all cases; the notebooks are left as they were."""
    folder = tmp_path_factory.mktemp("comparison")
    cells = [case_cell(*case) for case in (GREEN | RED).values()]
    cells.append(new_code_cell("print(1)", execution_count=None))
    nbformat.write(new_notebook(cells=cells), folder / "cases.ipynb")
    for name, source in ACCIDENTS.items():
        cells = [case_cell("x = []", None, []), case_cell(source, None, [])]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    before = {path: path.read_bytes() for path in folder.glob("*.ipynb")}
    found = run(folder)
    assert {path: path.read_bytes() for path in folder.glob("*.ipynb")} == before
    return found


@pytest.fixture(scope="module")
def report(outcome) -> dict[str, tuple[bool, str]]:
    """Case -> whether its cell passed, and what was said of it."""
    names = [*GREEN, *RED, NEVER_EXECUTED]
    said = [outcome["cases", i][0] for i in range(len(names))]
    return {name: (not text, text) for name, text in zip(names, said, strict=True)}


@pytest.mark.parametrize("case", GREEN)
def test_passes(report, case):
    passed, printed = report[case]
    assert passed, printed


@pytest.mark.parametrize("case", [*RED, NEVER_EXECUTED])
def test_fails(report, case):
    passed, _ = report[case]
    assert not passed


def test_the_message_names_the_number_that_moved(report):
    _, printed = report["a number out of tolerance"]
    assert "outside {'atol': 0.03}: 0.50 -> 0.54" in printed


def test_the_message_for_a_stripped_notebook_names_the_remedy(report):
    _, printed = report[NEVER_EXECUTED]
    assert "stored without having been executed: run `make refresh`" in printed


def test_a_kernel_that_dies_is_noticed_at_once(outcome):
    said, seconds = outcome["dies", 1]
    assert "the kernel died" in said and "os._exit" in said
    assert seconds < 15
    assert not outcome["dies", 0][0]


def test_a_cell_that_hangs_hits_its_limit(outcome):
    said, _ = outcome["hangs", 1]
    assert f"the cell hit its limit of {LIMIT} s" in said and "time.sleep" in said


def test_a_worker_that_dies_is_named_with_its_cell(tmp_path):
    kills = case_cell("import os; os.kill(os.getppid(), 9)", None, [])
    nbformat.write(new_notebook(cells=[kills]), tmp_path / "kills.ipynb")
    said, _ = run(tmp_path)["kills", 0]
    assert "crashed while running 'kills.ipynb::Cell 0'" in said


def test_a_cell_that_changes_when_run_twice_is_found(tmp_path):
    grows = case_cell("x = [*x, 1]\nprint(len(x))", "1\n", [])
    cells = [case_cell("x = []", None, []), grows]
    nbformat.write(new_notebook(cells=cells), tmp_path / "twice.ipynb")
    found = run(tmp_path, "--twice")
    assert not found["twice", 0][0]
    assert "run a second time: Cell outputs differ" in found["twice", 1][0]

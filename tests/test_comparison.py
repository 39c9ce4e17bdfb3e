"""The comparison of stored and new outputs goes red when it should.

All cases are cells of one notebook, which nbval runs once, in a process of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, tuple[bool, str]]:
    """Case -> whether its cell passed, and what was printed of it."""
    folder = tmp_path_factory.mktemp("comparison")
    cases = GREEN | RED
    cells = [case_cell(*case) for case in cases.values()]
    cells.append(new_code_cell("print(1)", execution_count=None))
    nbformat.write(new_notebook(cells=cells), folder / "cases.ipynb")
    shutil.copy(ROOT / "conftest.py", folder)
    options = [
        "--nbval",
        "--nbval-current-env",
        "--color=no",
        "-rpf",
        "-c",
        os.devnull,
    ]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir=.", "cases.ipynb"]
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    passed = {int(n) for n in re.findall(r"^PASSED .*::Cell (\d+)", out, re.MULTILINE)}
    parts = re.split(r"^_+ .*::Cell (\d+) _+$", out, flags=re.MULTILINE)
    details = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    names = [*cases, NEVER_EXECUTED]
    assert len(passed) + len(details) == len(names), out
    return {name: (i in passed, details.get(i, "")) for i, name in enumerate(names)}


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

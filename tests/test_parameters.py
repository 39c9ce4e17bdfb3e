"""Every chapter reaches its end with other parameters than its own.

Claims are recorded instead of enforced, as by tools/seeds.py: with a tenth of the steps
they need not hold, but no cell may stop with an error from inside Python.
"""

import pytest

import seeds
from notebooks import NOTEBOOKS

# What replaces the values of a chapter's first cell
SMALLER = {
    "01_hello_pytorch": "STEPS = 20; N_MADE = 12",
}


@pytest.mark.parametrize("chapter", SMALLER)
def test_it_runs_with_smaller_parameters(chapter):
    path = NOTEBOOKS / f"{chapter}.ipynb"
    claims, _, error = seeds.run(path, 0, 1, SMALLER[chapter])
    assert not error
    assert claims

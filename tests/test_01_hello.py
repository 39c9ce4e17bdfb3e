"""Chapter 1: its formulas against references, its cells run twice, its data."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from notebooks import NOTEBOOKS, code_cells, load_definitions, run_twice

PATH = NOTEBOOKS / "01_hello_pytorch.ipynb"
CHAPTER = load_definitions(PATH, "mse", "mse_gradient", "descend", "condition")


def plain_cells(until: str) -> list[str]:
    """The sources of the cells that are not folded, up to the one that holds a text."""
    found = []
    for cell in code_cells(PATH):
        if not {"hide-input", "hide-cell"} & set(cell.tags):
            found.append(cell.source)
        if until in cell.source:
            return found
    raise LookupError(until)


def houses(number: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(number, generator=torch.Generator().manual_seed(0))
    return x, 2 * x + 1


def test_the_loss_is_torchs_and_refuses_to_broadcast():
    x, y = houses()
    assert CHAPTER["mse"](x, y) == F.mse_loss(x, y)
    with pytest.raises(AssertionError, match="20, 1.*20"):
        CHAPTER["mse"](x[:, None], y)


def test_the_gradient_is_autograds():
    x, y = houses()
    w, b = (torch.tensor(v, requires_grad=True) for v in (0.3, -0.2))
    F.mse_loss(w * x + b, y).backward()
    ours = CHAPTER["mse_gradient"](0.3, -0.2, x, y)
    torch.testing.assert_close(torch.stack(ours), torch.stack([w.grad, b.grad]))


def test_descent_finds_the_line():
    history = CHAPTER["descend"](*houses(), lr=0.3, steps=2000)
    assert len(history) == 2001 and history[0][:2] == (0, 0)
    assert history[-1][:2] == pytest.approx((2, 1), abs=1e-3)


def test_the_condition_number_is_that_of_the_table_squared():
    inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    table = np.column_stack([inputs, np.ones(50)]).astype(np.float64)
    expected = np.linalg.cond(table) ** 2
    assert CHAPTER["condition"](inputs) == pytest.approx(expected, rel=1e-6)


def test_cells_may_be_run_twice_up_to_the_learning_rate():
    """The training loop of section 1.6 went on from where its first run ended."""
    run_twice(list(plain_cells(until="runs = {lr")), {})


@pytest.fixture
def read_houses(tmp_path, monkeypatch):
    """Read the house prices below ~/bookdata, as the chapter does; their file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "bookdata").mkdir()
    shutil.copy(NOTEBOOKS / "data" / "AmesHousing.txt", tmp_path / "bookdata")
    cell = next(cell for cell in code_cells(PATH) if "data" in cell.tags)

    def read() -> None:
        namespace = load_definitions(PATH, "AMES_URL", "check_data", "fetch")
        exec(cell.source, namespace | {"DATA_DIR": "~/bookdata"})

    return read, tmp_path / "bookdata" / "AmesHousing.txt"


def test_the_prices_are_read_from_a_folder_of_the_readers_own(read_houses, capsys):
    read, _ = read_houses
    read()
    assert "1656 square feet, 215000" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [0.3, 20, 4, 2])
def test_prices_that_were_cut_off_are_named_with_the_remedy(read_houses, lost):
    read, file = read_houses
    content = file.read_bytes()
    file.write_bytes(content[: -lost if lost > 1 else int(len(content) * (1 - lost))])
    with pytest.raises(AssertionError, match=r"AmesHousing\.txt is cut off: delete it"):
        read()

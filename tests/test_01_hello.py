"""Chapter 1: its formulas against references, its cells run twice, its data."""

import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LinearRegression
from torch.nn import functional as F

from notebooks import NOTEBOOKS, code_cells, load_definitions, run_twice

PATH = NOTEBOOKS / "01_hello_pytorch.ipynb"
CHAPTER = load_definitions(
    PATH,
    *("mse", "mse_gradient", "descend", "log_likelihood", "SIGMA"),
    *("with_ones", "least_squares", "curvatures", "fit", "SEED"),
)


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


def test_the_likelihood_is_that_of_scipy(monkeypatch):
    x, y = houses()
    y = y + 0.1 * x.cos()
    monkeypatch.setitem(CHAPTER, "x", x)
    monkeypatch.setitem(CHAPTER, "y", y)
    expected = stats.norm.logpdf(y, loc=1.9 * x + 1.1, scale=CHAPTER["SIGMA"]).sum()
    assert CHAPTER["log_likelihood"](1.9, 1.1) == pytest.approx(expected, rel=1e-5)


def table(number: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Three inputs of different means and spreads, and noisy targets."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(number, 3, generator=generator)
    inputs = inputs * torch.tensor([1.0, 0.5, 2.0]) + torch.tensor([0.0, 1.0, -1.0])
    noise = torch.randn(number, 1, generator=generator)
    return inputs, inputs.sum(dim=1, keepdim=True) - 0.5 + noise


def test_least_squares_is_scikit_learns():
    inputs, targets = table()
    reference = LinearRegression().fit(inputs.numpy(), targets.numpy())
    expected = np.append(reference.coef_[0], reference.intercept_)
    solution = CHAPTER["least_squares"](inputs, targets)
    np.testing.assert_allclose(solution[:, 0], expected, atol=1e-4)
    predicted = CHAPTER["with_ones"](inputs) @ solution
    np.testing.assert_allclose(predicted, reference.predict(inputs.numpy()), atol=1e-4)


def test_training_reaches_scikit_learns_parameters():
    inputs, targets = table()
    reference = LinearRegression().fit(inputs.numpy(), targets.numpy())
    model, losses = CHAPTER["fit"](inputs, targets, lr=0.1, steps=1000)
    np.testing.assert_allclose(model.weight.detach(), reference.coef_, atol=1e-3)
    np.testing.assert_allclose(model.bias.detach(), reference.intercept_, atol=1e-3)
    assert len(losses) == 1001 and losses[-1] < losses[0]


def test_the_curvatures_are_those_of_the_hessian():
    inputs, targets = table()

    def loss(parameters: torch.Tensor) -> torch.Tensor:
        prediction = inputs.double() @ parameters[:3] + parameters[3]
        return F.mse_loss(prediction, targets[:, 0].double())

    start = torch.ones(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(loss, start)
    expected = np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(CHAPTER["curvatures"](inputs), expected, rtol=1e-9)


def test_above_the_limit_training_explodes_and_below_it_does_not():
    inputs, targets = table()
    limit = 2 / CHAPTER["curvatures"](inputs)[-1].item()
    _, below = CHAPTER["fit"](inputs, targets, 0.97 * limit, steps=400)
    _, above = CHAPTER["fit"](inputs, targets, 1.03 * limit, steps=400)
    assert below[-1] < below[0] and above[-1] > 1e3 * above[0]


def test_cells_may_be_run_twice_up_to_the_learning_rate():
    """A training loop must not go on from where its first run ended."""
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

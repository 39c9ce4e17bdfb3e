"""Chapter 5 in depth: weights, stacks and graphs of the notebook against PyTorch."""

import warnings

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize

from notebooks import NOTEBOOKS, code_cells, load_definitions, section

NOTEBOOK = NOTEBOOKS / "05b_functions_and_graphs.ipynb"


@pytest.fixture(scope="module")
def notebook() -> dict:
    return load_definitions(
        NOTEBOOK,
        *("TiedModel", "Symmetric", "LowRank", "Positive", "LengthAndDirection"),
        *("fold", "Shapes", "Counting", "try_compile", "Block", "DigitNet"),
    )


def test_a_shared_parameter_counts_once_and_is_saved_twice(notebook):
    tied = notebook["TiedModel"]()
    assert tied.out.weight is tied.embed.weight
    assert len(list(tied.parameters())) == 1 and len(tied.state_dict()) == 2


def test_low_rank_starts_unchanged_and_has_its_rank(notebook):
    torch.manual_seed(0)
    layer = nn.Linear(20, 30)
    before = layer.weight.detach().clone()
    layer.weight.requires_grad_(False)
    change = notebook["LowRank"](layer.weight, 3)
    parametrize.register_parametrization(layer, "weight", change)
    assert torch.equal(layer.weight, before)
    nn.init.normal_(change.B)
    assert torch.linalg.matrix_rank((layer.weight - before).detach()) == 3
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["bias", *(f"parametrizations.weight.0.{k}" for k in "AB")]


def test_parametrisations_hold_what_they_promise(notebook):
    x = torch.randn(5, 5)
    mirrored = notebook["Symmetric"]()(x)
    assert torch.equal(mirrored, mirrored.T) and torch.equal(mirrored.triu(), x.triu())
    assert (notebook["Positive"]()(x) > 0).all()


def test_length_and_direction_is_weight_norm(notebook):
    torch.manual_seed(0)
    ours = nn.Linear(7, 4)
    theirs = nn.Linear(7, 4)
    theirs.load_state_dict(ours.state_dict())
    parametrizations.weight_norm(theirs)
    split = notebook["LengthAndDirection"]()
    parametrize.register_parametrization(ours, "weight", split)
    x = torch.randn(6, 7)
    for layer in (ours, theirs):
        layer(x).pow(2).sum().backward()
    torch.testing.assert_close(ours.weight, theirs.weight)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_batch_norm(notebook, bias):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    x = torch.randn(8, 3, 6, 6)
    norm(conv(x))  # statistics that are not zero and one
    expected = norm.eval()(conv(x))
    notebook["fold"](conv, norm)
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-4)


def test_shapes_are_those_of_the_run(notebook):
    model = notebook["DigitNet"]().eval()
    shapes = notebook["Shapes"](fx.symbolic_trace(model))
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(shapes.run(x), model(x))
    assert shapes.shapes["blocks_1_conv"] == (3, 16, 8, 8)
    assert shapes.shapes["output"] == (3, 10)


def test_the_warning_of_python_3_13_0_is_quiet():
    cells = [c.source for c in code_cells(NOTEBOOK) if "def try_compile" in c.source]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(cells[0], {"warnings": warnings, "nn": nn})
        text = "Guards may run slower on Python 3.13.0. Consider upgrading."
        warnings.warn(text, RuntimeWarning, stacklevel=1)


def test_the_check_of_the_ensemble_trains_the_same_when_run_again():
    space = load_definitions(NOTEBOOK, "train")
    space |= {"SEED": 0, "NUM_MODELS": 2}
    cells = section(NOTEBOOK, "5b.3", "5b.4")
    last = next(
        i for i, source in enumerate(cells) if "train_stack(stack, 10)" in source
    )
    found = []
    for source in [*cells[: last + 1], cells[last]]:
        exec(source, space)
        found.append(space.get("stack", {}).get("0.weight"))
    assert found[-1].equal(found[-2]) and not found[-1].equal(found[-3])

"""Chapter 7b: growing, cutting, grouping and normalising against PyTorch's."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from notebooks import NOTEBOOKS, code_cells, load_definitions, randn

PATH = NOTEBOOKS / "07b_resnet_in_depth.ipynb"
NOTEBOOK = load_definitions(
    PATH,
    "BasicBlock",
    "PlainBlock",
    "STEMS",
    "StochasticBlock",
    "best_error",
    "count_products",
    "curve",
    "decay_groups",
    "grid",
    "group_norm",
    "grow",
    "idle_share",
    "make_deep",
    "make_identity",
    "make_resnet",
    "make_shortcut",
    "make_stage",
    "make_stem",
    "renew_statistics",
    "spread",
)
NOTEBOOK["device"] = torch.device("cpu")
NOTEBOOK["SEED"] = 0


def define(name):
    """A definition of the notebook."""
    return NOTEBOOK[name]


@pytest.mark.parametrize("block", ["PlainBlock", "BasicBlock"])
def test_grown_networks_compute_the_same_in_evaluation_mode(block):
    torch.manual_seed(0)
    model = define("make_deep")(define(block), 6)
    x = randn(16, 1, 14, 14)
    model(x)  # moves the running averages
    grown = define("grow")(model, define(block), 20)
    assert len(model.layer1) == 2 and len(grown.layer1) == 9
    torch.testing.assert_close(grown.eval()(x), model.eval()(x), atol=1e-3, rtol=1e-3)


def test_an_identity_block_trains():
    block, x = define("make_identity")(define("BasicBlock")), randn(4, 16, 5, 5).relu()
    assert torch.equal(block(x), x)
    block(x).pow(2).sum().backward()
    assert block.bn2.weight.grad.abs().max() > 0


def test_larger_classes_that_are_nested_fit_no_worse():
    errors = [define("best_error")(range(1, k)) for k in range(1, 9)]
    assert all(b <= a + 1e-12 for a, b in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_spread_filters_agree_with_grouped_convolution(groups):
    x, weight = randn(2, 6, 7, 8), randn(12, 6 // groups, 3, 3, seed=1)
    full = define("spread")(weight, groups)
    assert full.shape == (12, 6, 3, 3)
    assert full.count_nonzero() == weight.count_nonzero()
    torch.testing.assert_close(
        F.conv2d(x, full), F.conv2d(x, weight, groups=groups), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("size", "idle"), [(32, True), (33, False)])
def test_idle_weights_end_at_33_pixels(size, idle):
    assert (define("idle_share")("imagenet", size) > 0.5) == idle


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_agrees_with_pytorch(groups):
    norm, x = nn.GroupNorm(groups, 6), randn(3, 6, 4, 5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    ours = define("group_norm")(x, groups, norm.weight, norm.bias)
    torch.testing.assert_close(ours, norm(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_renewed_statistics_are_the_mean_over_batches(training):
    norm, x = nn.BatchNorm2d(4), 3 + randn(30, 4, 5, 5)
    model = nn.Sequential(norm).train(training)
    define("renew_statistics")(model, x, batch_size=10)
    expected = torch.stack([b.var(dim=(0, 2, 3)) for b in x.split(10)]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, expected)
    assert norm.momentum == 0.1 and model.training == training


def test_stochastic_depth_is_off_in_evaluation_and_right_in_the_mean():
    torch.manual_seed(0)
    block = define("StochasticBlock")(2, 2).eval()
    x = randn(1, 2, 3, 3).relu()
    with torch.no_grad():
        torch.testing.assert_close(block(x), F.relu(x + block.branch(x)))
        branch = block.branch(x)
        block.train()
        out = F.relu(x + block.thin(branch.expand(4000, -1, -1, -1)))
    alive = F.relu(x + branch / (1 - block.p))
    share = (out - x).flatten(1).abs().sum(dim=1).gt(0).double().mean()
    assert abs(share - (1 - block.p)) < 0.04
    assert all(
        torch.allclose(image, x[0]) or torch.allclose(image, alive[0], atol=1e-5)
        for image in out[:50]
    )


def test_no_decay_for_biases_and_normalisation():
    model = define("make_resnet")(width=4)
    decayed, free = define("decay_groups")(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    for p in free["params"]:
        name = names[id(p)]
        assert "bn" in name or "downsample.1" in name or name.endswith("bias")


def test_products_of_groups_are_counted():
    grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
    assert define("count_products")(grouped, randn(2, 8, 5, 5)) == 2 * 8 * 2 * 9 * 25


def test_garments_that_were_cut_off_are_named_with_the_remedy(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(NOTEBOOKS / "data" / "FashionMNIST" / "raw", raw)
    file = raw / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 7 // 10])
    space = load_definitions(PATH, "check_data")
    space |= {"DATA_DIR": str(tmp_path), "N_TRAIN": 10}
    (cell,) = [c.source for c in code_cells(PATH) if "data" in c.tags]
    with pytest.raises(
        RuntimeError, match="did not arrive whole .* Delete that"
    ) as error:
        exec(cell, space)
    assert f"{tmp_path}/FashionMNIST" in str(error.value)

"""Chapter 7: convolution, batch normalisation and ResNets against PyTorch's."""

import ast
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from notebooks import (
    NOTEBOOKS,
    code_cells,
    load_definitions,
    randn,
    statements,
)

PATH = NOTEBOOKS / "07_resnet_from_scratch.ipynb"
RESNET = ["STEMS", "make_shortcut", "BasicBlock", "make_stage", "make_stem"]
RESNET += ["make_resnet"]
CHAPTER = load_definitions(
    PATH,
    *RESNET,
    "BatchNorm",
    "Bottleneck",
    "NoProjection",
    "PlainBlock",
    "PreActivation",
    "Scale",
    "SharedNorm",
    "at_end",
    "conv2d_loops",
    "disagreement",
    "gradient_by_layer",
    "make_bare",
    "make_deep",
    "map_sizes",
    "output_size",
    "receptive_field",
    "remember",
    "replace_norms",
    "seen_pixels",
    "signal_by_block",
    "train",
    "train_new",
    "warmup_cosine",
)
CHAPTER["device"] = torch.device("cpu")
CHAPTER["SEED"] = 0


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


# Convolution


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5), (7, 7)])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2), (1, 3)])
def test_the_convolution_agrees_with_pytorch(kernel, stride, padding):
    x, weight = randn(2, 3, 8, 11), randn(4, 3, *kernel, seed=1)
    expected = F.conv2d(x, weight, stride=stride, padding=padding)
    rows = define("output_size")(8, kernel[0], stride, padding)
    columns = define("output_size")(11, kernel[1], stride, padding)
    assert expected.shape == (2, 4, rows, columns)
    looped = [define("conv2d_loops")(image, weight, stride, padding) for image in x]
    torch.testing.assert_close(torch.stack(looped), expected, atol=1e-4, rtol=1e-4)


def test_a_filter_as_large_as_the_image_gives_one_number():
    x = randn(2, 5, 4)
    out = define("conv2d_loops")(x, x[None])
    assert out.shape == (1, 1, 1)
    torch.testing.assert_close(out.sum(), x.pow(2).sum())


def test_the_map_moves_with_the_image():
    x, weight = randn(2, 12, 12), randn(3, 2, 3, 3, seed=1)
    before = define("conv2d_loops")(x, weight)
    after = define("conv2d_loops")(x.roll((2, 3), dims=(1, 2)), weight)
    torch.testing.assert_close(after[:, 2:, 3:], before[:, :-2, :-3])


def test_channels_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="3 channels, filters for 1"):
        define("conv2d_loops")(randn(3, 5, 5), randn(2, 1, 3, 3))


def test_a_filter_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a filter of 7 on 6 pixels"):
        define("conv2d_loops")(randn(1, 9, 4), randn(1, 1, 3, 7), padding=1)


def test_the_loops_keep_the_kind_of_number():
    x, weight = randn(2, 6, 6).double(), randn(3, 2, 3, 3, seed=1).double()
    out = define("conv2d_loops")(x, weight)
    torch.testing.assert_close(out, F.conv2d(x, weight))


@pytest.mark.parametrize(
    "layers", list(itertools.product([(1, 1), (3, 1), (3, 2), (5, 1)], repeat=3))
)
def test_receptive_field_is_where_the_gradient_is(layers):
    seen = (define("seen_pixels")(layers) > 0).any(dim=0).sum().item()
    assert seen == define("receptive_field")(layers)


def test_no_layers_see_one_pixel():
    assert define("receptive_field")([]) == 1


# Normalisation


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 2, 2), (5, 3, 4, 6)])
@pytest.mark.parametrize(("eps", "momentum"), [(1e-5, 0.1), (1e-3, 0.7)])
def test_batch_norm_agrees_with_pytorch_in_both_modes(shape, eps, momentum):
    ours = define("BatchNorm")(3, eps, momentum).double()
    theirs = nn.BatchNorm2d(3, eps, momentum).double()
    nn.init.uniform_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    for step, mode in enumerate([True, True, False, True, False]):
        x = randn(*shape, seed=step).double().requires_grad_()
        direction = randn(*shape, seed=99).double()
        outputs, gradients = [], []
        for norm in (ours, theirs):
            out = norm.train(mode)(x)
            inputs = x, norm.weight, norm.bias
            gradients.append(torch.autograd.grad(out, inputs, direction))
            outputs.append(out)
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_batch_norm_refuses_a_single_value_in_training_mode_only():
    norm = define("BatchNorm")(3)
    with pytest.raises(ValueError, match="no variance"):
        norm(randn(1, 3, 1, 1))
    assert norm.num_batches_tracked == 0, "the buffers are untouched"
    x = randn(1, 3, 1, 1)
    torch.testing.assert_close(norm.eval()(x), x, atol=1e-4, rtol=1e-4)


# ResNets


def pairs():
    """(ours, torchvision's): the same architectures."""
    basic, bottleneck = define("BasicBlock"), define("Bottleneck")
    make = define("make_resnet")
    return {
        "resnet18": (make(), models.resnet18()),
        "resnet34": (make(basic, (3, 4, 6, 3)), models.resnet34()),
        "resnet50": (make(bottleneck, (3, 4, 6, 3)), models.resnet50()),
        "10 classes": (make(classes=10), models.resnet18(num_classes=10)),
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "10 classes"])
def test_weights_load_both_ways_and_give_the_same_logits(name):
    torch.manual_seed(0)
    ours, theirs = pairs()[name]
    for tensor in theirs.state_dict().values():  # ones and zeros would agree anyway
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for size in (32, 64, 97):
        x = randn(3, 3, size, size, seed=size)
        with torch.no_grad():
            for mode in (False, True):
                first, second = ours.train(mode)(x), theirs.train(mode)(x)
                torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_resnet18_has_the_published_number_of_parameters():
    count = sum(p.numel() for p in define("make_resnet")().parameters())
    assert count == 11_689_512


def test_resnet18_is_written_in_fewer_than_80_lines():
    lines = 0
    for statement in statements(PATH):
        names = {getattr(statement, "name", None)}
        if isinstance(statement, ast.Assign):
            names = {getattr(target, "id", None) for target in statement.targets}
        if names & set(RESNET):
            lines += statement.end_lineno - statement.lineno + 1
    assert 30 < lines < 80


@pytest.mark.parametrize("stem", ["imagenet", "3x3/2", "3x3/1"])
def test_map_sizes_follow_the_strides(stem):
    model = define("make_resnet")(width=4, channels=1, stem=stem)
    first, before = {"imagenet": (16, 8), "3x3/2": (16, 16), "3x3/1": (32, 32)}[stem]
    halved = [before, before // 2, before // 4, before // 8]
    assert list(define("map_sizes")(model).values()) == [32, first, before, *halved]


def test_an_unknown_stem_names_those_that_exist():
    with pytest.raises(ValueError, match="choose one of imagenet, 3x3/2, 3x3/1"):
        define("make_resnet")(stem="5x5")


def test_fewer_stages_and_grey_images_work():
    model = define("make_resnet")(counts=(1, 2), width=4, classes=7, channels=1)
    assert model(randn(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize("depth", [2, 9])
def test_a_depth_that_cannot_be_built_is_refused(depth):
    with pytest.raises(ValueError, match=f"{depth} layers: take an even number"):
        define("make_deep")(define("BasicBlock"), depth)


def test_a_plain_block_is_a_residual_block_without_its_skip():
    torch.manual_seed(0)
    plain, residual = define("PlainBlock")(4, 4).eval(), define("BasicBlock")(4, 4)
    residual.load_state_dict(plain.state_dict())
    x = randn(2, 4, 5, 5)
    branch = plain.bn2(plain.conv2(F.relu(plain.bn1(plain.conv1(x)))))
    torch.testing.assert_close(plain(x), branch.relu())
    torch.testing.assert_close(residual.eval()(x), (branch + x).relu())


@pytest.mark.parametrize("block", ["PlainBlock", "BasicBlock"])
@pytest.mark.parametrize("depth", [4, 10, 40])
def test_depth_counts_convolutions_and_the_linear_layer(block, depth):
    model = define("make_deep")(define(block), depth)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert model(randn(3, 1, 14, 14)).shape == (3, 10)


def test_bare_networks_have_no_normalisation_and_scaled_branches():
    bare = define("make_bare")(define("BasicBlock"), 0.0)
    assert not [m for m in bare.modules() if isinstance(m, nn.BatchNorm2d)]
    x = randn(2, 1, 14, 14)
    stem = bare[:4](x)
    torch.testing.assert_close(bare.layer1(stem), stem)  # all branches times 0


def test_replaced_norms_get_their_name():
    names = []

    def make(name, norm):
        names.append((name, norm.num_features))
        return nn.GroupNorm(2, norm.num_features)

    model = define("replace_norms")(define("make_resnet")(width=4), make)
    kinds = [type(module) for module in model.modules()]
    assert nn.BatchNorm2d not in kinds and kinds.count(nn.GroupNorm) == len(names) == 20
    assert names[0] == ("bn1", 4) and ("bn2", 32) in names and ("1", 8) in names


def test_pre_activation_leaves_the_skip_untouched():
    block, x = define("PreActivation")(4, 4), randn(2, 4, 5, 5)
    kept = x.clone()
    out = block(x)
    assert x.equal(kept)
    inner = block.conv1(F.relu(block.bn1(x)))
    torch.testing.assert_close(out, x + block.conv2(F.relu(block.bn2(inner))))


def test_modes_agree_unless_a_normalisation_is_shared():
    torch.manual_seed(0)
    apart = {
        n: define("disagreement")(define(n)(8, 8)) for n in ("BasicBlock", "SharedNorm")
    }
    assert apart["BasicBlock"] < 0.05 < 0.1 < apart["SharedNorm"]


# Training


def test_gradients_are_the_same_when_measured_again(monkeypatch):
    monkeypatch.setitem(CHAPTER, "small_images", randn(8, 1, 14, 14))
    monkeypatch.setitem(CHAPTER, "fit_labels", torch.arange(8))
    torch.manual_seed(0)
    model = define("make_deep")(define("BasicBlock"), 4)
    first, second = [define("gradient_by_layer")(model) for _ in range(2)]
    assert first == pytest.approx(second) and len(first) == 3 and min(first) > 0


def test_equal_images_have_a_cosine_of_one(monkeypatch):
    same = randn(1, 1, 14, 14).expand(8, -1, -1, -1)
    monkeypatch.setitem(CHAPTER, "small_images", same)
    model = define("make_deep")(define("BasicBlock"), 10).eval()
    found = define("signal_by_block")(model)
    assert len(found) == 4
    for size, cosine in found:
        assert size > 0 and cosine == pytest.approx(1, abs=1e-4)


def test_training_repeats_and_passes_over_all_images():
    images, labels = randn(10, 3), torch.arange(10) % 2
    runs = [
        define("train_new")(lambda: nn.Linear(3, 2), images, labels, 0.01, 3)
        for _ in range(2)
    ]
    assert runs[0][1] == runs[1][1] and len(runs[0][1]) == 3
    assert define("at_end")([9.0] * 5 + [1.0] * 20) == 1


def test_garments_that_were_cut_off_are_named_with_the_remedy(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(NOTEBOOKS / "data" / "FashionMNIST" / "raw", raw)
    file = raw / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 7 // 10])
    space = load_definitions(PATH, "check_data")
    space |= {"DATA_DIR": str(tmp_path), "N_TRAIN": 10, "N_TEST": 10}
    (cell,) = [c.source for c in code_cells(PATH) if "data" in c.tags]
    with pytest.raises(
        RuntimeError, match="did not arrive whole .* Delete that"
    ) as error:
        exec(cell, space)
    assert f"{tmp_path}/FashionMNIST" in str(error.value)

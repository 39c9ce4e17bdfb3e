"""Chapter 7: convolution, batch normalisation and ResNets against PyTorch's."""

import ast
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from notebooks import NOTEBOOKS, code_cells, load_definitions, statements

PATH = NOTEBOOKS / "07_resnet_from_scratch.ipynb"
RESNET = ["STEMS", "make_shortcut", "BasicBlock", "make_stage", "make_stem"]
RESNET += ["make_resnet"]
CHAPTER = load_definitions(
    PATH,
    *RESNET,
    "BatchNorm",
    "Bottleneck",
    "DeepBlock",
    "PreActivation",
    "RunningStatistics",
    "StochasticBlock",
    "conv2d_loops",
    "conv2d_matrix",
    "decay_groups",
    "gradient_by_layer",
    "group_norm",
    "make_cnn",
    "make_deep",
    "map_sizes",
    "on_photos",
    "output_size",
    "photos",
    "random_patches",
    "receptive_field",
    "renew_statistics",
    "seen_pixels",
    "swap_norms",
    "train",
    "warmup_cosine",
)
CHAPTER["device"] = torch.device("cpu")
CHAPTER["SEED"] = 0


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


# Convolution


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5), (7, 7)])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2), (1, 3)])
def test_both_convolutions_agree_with_pytorch(kernel, stride, padding):
    x, weight = randn(2, 3, 8, 11), randn(4, 3, *kernel, seed=1)
    expected = F.conv2d(x, weight, stride=stride, padding=padding)
    rows = define("output_size")(8, kernel[0], stride, padding)
    columns = define("output_size")(11, kernel[1], stride, padding)
    assert expected.shape == (2, 4, rows, columns)
    looped = [define("conv2d_loops")(image, weight, stride, padding) for image in x]
    torch.testing.assert_close(torch.stack(looped), expected, atol=1e-4, rtol=1e-4)
    product = define("conv2d_matrix")(x, weight, stride, padding)
    torch.testing.assert_close(product, expected, atol=1e-4, rtol=1e-4)


def test_a_filter_as_large_as_the_image_gives_one_number():
    x = randn(2, 5, 4)
    out = define("conv2d_loops")(x, x[None])
    assert out.shape == (1, 1, 1)
    torch.testing.assert_close(out.sum(), x.pow(2).sum())


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


def test_the_matrix_convolution_has_the_same_gradient():
    x, weight = randn(1, 2, 6, 6), randn(3, 2, 3, 3, seed=1).requires_grad_()
    ours = define("conv2d_matrix")(x, weight, 2, 1).pow(2).sum()
    theirs = F.conv2d(x, weight, stride=2, padding=1).pow(2).sum()
    for first, second in zip(
        torch.autograd.grad(ours, weight),
        torch.autograd.grad(theirs, weight),
        strict=True,
    ):
        torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-4)


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


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_agrees_with_pytorch(groups):
    norm, x = nn.GroupNorm(groups, 6), randn(3, 6, 4, 5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    ours = define("group_norm")(x, groups, norm.weight, norm.bias)
    torch.testing.assert_close(ours, norm(x), atol=1e-5, rtol=1e-5)


def test_swapped_norms_leave_no_batch_norm():
    model = define("swap_norms")(define("make_resnet")(width=8))
    kinds = [type(module) for module in model.modules()]
    assert nn.BatchNorm2d not in kinds and kinds.count(nn.GroupNorm) == 20


@pytest.mark.parametrize("training", [True, False])
def test_renewed_statistics_are_the_mean_over_batches(training):
    norm, x = nn.BatchNorm2d(4), 3 + randn(30, 4, 5, 5)
    model = nn.Sequential(norm).train(training)
    define("renew_statistics")(model, x, batch_size=10)
    expected = torch.stack([b.var(dim=(0, 2, 3)) for b in x.split(10)]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, expected)
    assert norm.momentum == 0.1 and model.training == training


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


@pytest.mark.parametrize("norm", [True, False])
def test_a_scale_of_zero_makes_the_block_the_identity(norm):
    x = randn(2, 4, 5, 5)
    block = define("DeepBlock")(4, skip=True, norm=norm, scale=0.0)
    assert block(x).equal(x.relu())
    plain = define("DeepBlock")(4, skip=False, norm=norm, scale=0.0)
    assert plain(x).count_nonzero() == 0


def test_pre_activation_leaves_the_skip_untouched():
    block, x = define("PreActivation")(4, skip=True, norm=True), randn(2, 4, 5, 5)
    kept = x.clone()
    out = block(x)
    assert x.equal(kept)
    inner = block.conv1(F.relu(block.norm1(x)))
    expected = x + block.conv2(F.relu(block.norm2(inner)))
    torch.testing.assert_close(out, expected)


def test_stochastic_depth_is_off_in_evaluation_and_right_in_the_mean():
    torch.manual_seed(0)
    block = define("StochasticBlock")(2, skip=True, norm=False)
    x = randn(1, 2, 3, 3).relu()
    with torch.no_grad():
        expected = F.relu(x + block.branch(x))
        assert block.eval()(x).equal(expected)
        out = block.train()(x.expand(4000, -1, -1, -1))
    alive = F.relu(x + block.branch(x) / (1 - block.p))
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


@pytest.mark.parametrize("depth", [2, 9])
def test_a_depth_that_cannot_be_built_is_refused(depth):
    with pytest.raises(ValueError, match=f"{depth} layers: take an even number"):
        define("make_deep")(depth, skip=True, norm=True)


@pytest.mark.parametrize("size", [28, 30, 32, 33])
def test_the_cnn_takes_images_of_any_size(size):
    model = define("make_cnn")(channels=1, size=size, width=2, hidden=4)
    assert model(randn(2, 1, size, size)).shape == (2, 10)


# Training and pictures


def test_the_schedule_stays_at_its_end():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule, rates = define("warmup_cosine")(optimizer, 10), []
    for _ in range(30):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == 1 and rates[5] > rates[9] > 0
    assert max(rates[10:]) < 1e-9


def test_gradients_are_the_same_when_measured_again(monkeypatch):
    monkeypatch.setitem(CHAPTER, "small_images", randn(8, 1, 14, 14))
    monkeypatch.setitem(CHAPTER, "fit_labels", torch.arange(8))
    torch.manual_seed(0)
    model = define("make_deep")(4, skip=True, norm=True)
    first, second = [define("gradient_by_layer")(model) for _ in range(2)]
    assert first == pytest.approx(second) and len(first) == 3 and min(first) > 0


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


def test_training_sees_every_image_once_per_pass_and_repeats():
    class Recorder(nn.Linear):
        seen = []

        def forward(self, x):
            self.seen += x[:, 0].int().tolist()
            return super().forward(x)

    images, labels = torch.arange(10.0)[:, None], torch.arange(10) % 2
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Recorder(1, 2)
        model.seen = []
        losses = define("train")(model, images, labels, 5, 0.01, batch_size=4)
        runs.append((losses, model.seen))
    assert runs[0] == runs[1] and len(runs[0][0]) == 5
    assert sorted(runs[0][1][:10]) == sorted(runs[0][1][10:]) == list(range(10))


def test_pictures_follow_the_generator_and_stay_in_range():
    garments = torch.rand(6, 1, 28, 28, generator=generator(0))
    make = define("on_photos")
    first, second = [make(garments, generator(3)) for _ in range(2)]
    assert first.shape == (6, 3, 32, 32) and first.equal(second)
    assert first.min() >= 0 and first.max() <= 1
    assert not first.equal(make(garments, generator(4)))


def test_an_empty_garment_leaves_the_photograph():
    empty = torch.zeros(4, 1, 28, 28)
    pictures = define("on_photos")(empty, generator(0), size=24)
    assert pictures.shape == (4, 3, 24, 24)
    assert all(picture.std() > 0 for picture in pictures)
    patches = define("random_patches")(5, 24, generator(0))
    assert patches.shape == (5, 3, 24, 24)
    assert patches.min() >= 0 and patches.max() <= 1

"""Chapter 5: module, summary and renamed files of the chapter against PyTorch."""

import random

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from notebooks import NOTEBOOKS, load_definitions

CHAPTER = NOTEBOOKS / "05_module_tools.ipynb"


@pytest.fixture(scope="module")
def chapter() -> dict:
    return load_definitions(
        CHAPTER,
        *("MiniModule", "record", "summarise", "snapshot", "changed", "swap"),
        *("rename_keys", "xavier_std", "kaiming_std", "make_deep", "DEPTH"),
        *("Block", "DigitNet", "RenamedNet", "FrozenDigitNet", "with_new_head"),
        *("listening", "MultiTask"),
    )


def grow(base: type, seed: int, depth: int = 0):
    """A random tree of modules; the same for every base class that is given."""
    rng = random.Random(seed)
    module = base()
    children = []
    for number in range(rng.randint(2, 6)):
        kind = rng.choice(["parameter", "buffer", "child", "shared", "plain"])
        name = f"{kind}{number}"
        if kind == "parameter":
            setattr(module, name, nn.Parameter(torch.ones(number + 1)))
        elif kind == "buffer":
            module.register_buffer(name, torch.zeros(number + 1))
        elif kind == "child" and depth < 3:
            children.append(grow(base, rng.random(), depth + 1))
            setattr(module, name, children[-1])
        elif kind == "shared" and children:
            setattr(module, name, rng.choice(children))
        elif kind == "plain":
            setattr(module, name, [nn.Parameter(torch.ones(1)), "text"])
    return module


@pytest.mark.parametrize("seed", range(40))
def test_mini_module_agrees_on_names_and_order(chapter, seed):
    mini, real = grow(chapter["MiniModule"], seed), grow(nn.Module, seed)
    state, wanted = mini.state_dict(), real.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_the_trees_are_not_all_trivial():
    sizes = [len(grow(nn.Module, seed).state_dict()) for seed in range(40)]
    assert max(sizes) > 15


def test_mini_module_reads_back_what_it_registered(chapter):
    module = chapter["MiniModule"]()
    module.weight = nn.Parameter(torch.ones(2))
    module.register_buffer("mean", torch.zeros(2))
    module.note = "plain"
    assert torch.equal(module.weight, torch.ones(2)) and module.note == "plain"
    assert torch.equal(module.mean, torch.zeros(2))
    module.mean = torch.ones(2)
    assert torch.equal(module.state_dict()["mean"], torch.ones(2))
    with pytest.raises(AttributeError, match="absent"):
        _ = module.absent


def test_a_module_without_init_cannot_take_a_layer():
    class Forgot(nn.Module):
        def __init__(self):
            self.layer = nn.Linear(2, 1)

    with pytest.raises(AttributeError, match="assign module before Module.__init__"):
        Forgot()


def test_changed_names_what_differs_and_the_copy_stays(chapter):
    model = chapter["DigitNet"]()
    before = chapter["snapshot"](model)
    assert chapter["changed"](model, before) == []
    model.train()(torch.rand(4, 1, 8, 8))
    names = chapter["changed"](model, before)
    assert set(names) == {name for name, _ in model.named_buffers()}
    with torch.no_grad():
        model.head.bias += 1
    assert chapter["changed"](model, before) == [*names, "head.bias"]


def test_swap_replaces_at_any_depth_and_keeps_the_names(chapter):
    model = resnet18(weights=None)
    names, x = list(model.state_dict()), torch.randn(2, 3, 32, 32)
    expected = sum(isinstance(m, nn.ReLU) for m in model.modules())
    assert chapter["swap"](model, nn.ReLU, nn.GELU) == expected
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert list(model.state_dict()) == names and model(x).shape == (2, 1000)
    assert chapter["swap"](model, nn.ReLU, nn.GELU) == 0


def test_the_deep_network_starts_as_told(chapter):
    torch.manual_seed(0)
    model = chapter["make_deep"](chapter["kaiming_std"], depth=3, width=400)
    layers = [m for m in model if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in layers] == [
        *((400, 64), (400, 400), (400, 400), (10, 400)),
    ]
    for layer in layers:
        n = layer.in_features
        assert abs(layer.weight.var().item() * n / 2 - 1) < 0.1
        assert not layer.bias.any()
    default = chapter["make_deep"](None, depth=2, width=400)[3].weight
    assert abs(default.var().item() * 400 * 3 - 1) < 0.05


def test_summary_of_resnet18(chapter):
    model = resnet18(weights=None)
    model.layer1.eval()
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    modes = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rows = chapter["summarise"](model, torch.zeros(2, 3, 64, 64))
    assert sum(row[3] for row in rows) == sum(p.numel() for p in model.parameters())
    assert sum(row[4] for row in rows) == 4 * 11_689_512
    shapes = {name: shape for name, _, shape, _, _ in rows}
    assert shapes["conv1"] == (2, 64, 32, 32) and shapes["fc"] == (2, 1000)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_summary_lists_a_parent_of_an_empty_container_by_its_parts(chapter):
    model = nn.Sequential(nn.Sequential(nn.Sequential()), nn.Linear(2, 3))
    rows = chapter["summarise"](model, torch.zeros(1, 2))
    assert [row[0] for row in rows] == ["0.0", "1"]


def test_frozen_parts_stay_in_eval_mode_and_others_follow(chapter):
    base = chapter["DigitNet"](classes=5)
    model = chapter["with_new_head"](base, 3, chapter["FrozenDigitNet"])
    model.drop = nn.Dropout()
    model.train()
    assert not any(m.training for m in [*model.stem.modules(), *model.blocks.modules()])
    assert model.training and model.head.training and model.drop.training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    assert torch.equal(model.stem[0].weight, base.stem[0].weight)
    model.eval()
    assert not model.head.training and not model.drop.training


def test_recording_removes_its_hooks_when_the_model_fails(chapter):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 5)).train()
    with pytest.raises(RuntimeError):
        chapter["record"](model, torch.zeros(1, 2))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


def test_attention_counts_the_parameters_of_its_own(chapter):
    """Input projections of attention belong to a module that has children."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, 4, 8)
    rows = chapter["summarise"](attention, x, x, x)
    total = sum(p.numel() for p in attention.parameters())
    assert sum(row[3] for row in rows) == total


def test_a_renamed_file_gives_the_same_model(chapter):
    model, renamed = chapter["DigitNet"](), chapter["RenamedNet"]()
    names = {"stem": "features", "head": "classifier"}
    renamed.load_state_dict(chapter["rename_keys"](model.state_dict(), names))
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(renamed.eval()(x), model.eval()(x))


def test_rename_keys(chapter):
    rename = chapter["rename_keys"]
    state = {"fc.weight": 1, "fc2.weight": 2, "_orig_mod.fc.bias": 3}
    assert rename(state, {"fc": "head"}) == {
        "head.weight": 1,
        "fc2.weight": 2,
        "_orig_mod.fc.bias": 3,
    }
    assert "fc.bias" in rename(state, {"_orig_mod": ""})
    with pytest.raises(ValueError, match="fc2.weight"):
        rename(state, {"fc": "fc2"})


def test_initialisation_agrees_with_torch(chapter):
    weight = torch.empty(300, 200)
    for std, init in (
        (chapter["xavier_std"], nn.init.xavier_normal_),
        (chapter["kaiming_std"], lambda w: nn.init.kaiming_normal_(w, a=0)),
    ):
        torch.manual_seed(0)
        measured = init(weight).clone()
        torch.manual_seed(0)
        torch.testing.assert_close(nn.init.normal_(weight, std=std(weight)), measured)


def test_standard_deviations_are_for_matrices(chapter):
    """Of a convolution's weight they would be wrong, in silence."""
    for std in (chapter["xavier_std"], chapter["kaiming_std"]):
        with pytest.raises(ValueError, match="unpack"):
            std(torch.empty(4, 3, 3, 3))


def test_listening_leaves_no_hook_behind_even_if_a_name_is_wrong(chapter):
    model = chapter["DigitNet"]()
    with pytest.raises(AttributeError, match="absent"):
        with chapter["listening"](model, "stem", "absent"):
            pass
    assert not any(m._forward_hooks for m in model.modules())

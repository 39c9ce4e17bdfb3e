"""Chapter 5: the module, the summary and the loader of the chapter against PyTorch."""

import random
import warnings

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from notebooks import NOTEBOOKS, code_cells, load_definitions, section

CHAPTER = NOTEBOOKS / "05_module_tools.ipynb"


@pytest.fixture(scope="module")
def chapter() -> dict:
    return load_definitions(
        CHAPTER,
        *("Registry", "MiniModule", "record", "summarise", "draw_graph"),
        *("rename_keys", "find_misfits", "load_renamed", "xavier_std", "kaiming_std"),
        *("Block", "DigitNet", "RenamedNet", "TiedModel", "LowRank", "fold"),
        *("FrozenDigitNet", "with_new_head", "FixedCentre", "Centre", "listening"),
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
    expected = [(name, p.shape) for name, p in real.named_parameters()]
    assert [(name, p.shape) for name, p in mini.named_parameters()] == expected
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


def test_summary_counts_shared_and_uncalled_parameters_once(chapter):
    tied = chapter["TiedModel"]()
    rows = chapter["summarise"](tied, torch.arange(3))
    assert sum(row[3] for row in rows) == sum(p.numel() for p in tied.parameters())
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, 4, 8)
    rows = chapter["summarise"](attention, x, x, x)
    total = sum(p.numel() for p in attention.parameters())
    assert sum(row[3] for row in rows) == total


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


def test_the_mean_in_a_buffer_is_saved(chapter):
    trained, loaded = chapter["FixedCentre"](), chapter["FixedCentre"]()
    trained.measure(torch.tensor([1.0, 3.0]))
    loaded.load_state_dict(trained.state_dict())
    assert loaded.mean == trained.mean == 2


def test_recording_removes_its_hooks_when_the_model_fails(chapter):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 5)).train()
    with pytest.raises(RuntimeError):
        chapter["record"](model, torch.zeros(1, 2))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


@pytest.fixture
def saved(chapter, tmp_path):
    model = chapter["DigitNet"]()
    path = tmp_path / "digits.pt"
    torch.save(model.state_dict(), path)
    return model, path


def test_load_renamed_gives_the_same_model(chapter, saved):
    model, path = saved
    renamed = chapter["RenamedNet"]()
    chapter["load_renamed"](renamed, path, {"stem": "features", "head": "classifier"})
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(renamed.eval()(x), model.eval()(x))


def test_load_renamed_names_file_keys_and_remedy_and_loads_nothing(chapter, saved):
    _, path = saved
    renamed = chapter["RenamedNet"](classes=5)
    before = {key: value.clone() for key, value in renamed.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        chapter["load_renamed"](renamed, path, {"head": "classifier"})
    message = str(caught.value)
    for part in (str(path), "RenamedNet", "rename="):
        assert part in message
    missing, unexpected, wrong = (
        next(line for line in message.splitlines() if line.startswith(word))
        for word in ("missing", "unexpected", "wrong shape")
    )
    assert "features.0.weight" in missing and "stem" not in missing
    assert "stem.0.weight" in unexpected and "features" not in unexpected
    assert "classifier.weight (10, 64) instead of (5, 64)" in wrong
    state = renamed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in before.items())


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


def test_folding_batch_norm(chapter):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    x = torch.randn(8, 3, 6, 6)
    norm(conv(x))  # statistics that are not zero and one
    expected = norm.eval()(conv(x))
    chapter["fold"](conv, norm)
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-4)


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


def test_the_warning_of_python_3_13_0_is_quiet():
    cells = [c.source for c in code_cells(CHAPTER) if "def try_compile" in c.source]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(cells[0], {"warnings": warnings})
        text = "Guards may run slower on Python 3.13.0. Consider upgrading."
        warnings.warn(text, RuntimeWarning, stacklevel=1)


def test_the_check_of_the_ensemble_trains_the_same_when_run_again():
    space = load_definitions(CHAPTER)
    space |= {"SEED": 0, "NUM_MODELS": 2}
    cells = section(CHAPTER, "5.12", "5.13")
    last = next(
        i for i, source in enumerate(cells) if "train_stack(params, 10)" in source
    )
    found = []
    for source in [*cells[: last + 1], cells[last]]:
        exec(source, space)
        found.append(space.get("params", {}).get("0.weight"))
    assert found[-1].equal(found[-2]) and not found[-1].equal(found[-3])

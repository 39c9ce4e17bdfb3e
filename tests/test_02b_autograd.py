"""Notebook 2b: own derivatives, loss and optimiser against PyTorch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebooks import NOTEBOOKS, load_definitions

PATH = NOTEBOOKS / "02b_autograd_in_depth.ipynb"
CHAPTER = load_definitions(
    PATH,
    "Softplus",
    "SoftplusEverywhere",
    "RoundStraightThrough",
    "TurnRound",
    "QuantileLoss",
    "AdamW",
    "move",
    "masked_root",
    "safe_root",
    "hvp",
)
# PyTorch 2.3 cannot load a part of itself inside a transform: an optimiser loads it
torch.optim.SGD([torch.zeros(1)], lr=0.1)


@pytest.mark.parametrize("name", ["Softplus", "SoftplusEverywhere"])
def test_softplus_and_its_derivatives(name):
    softplus = CHAPTER[name].apply
    inputs = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(softplus(inputs), F.softplus(inputs))
    assert torch.autograd.gradcheck(softplus, inputs)
    assert torch.autograd.gradgradcheck(softplus, inputs)
    extreme = torch.tensor([-1e4, -90.0, 90.0, 1e4], requires_grad=True)
    (slopes,) = torch.autograd.grad(softplus(extreme).sum(), extreme)
    assert slopes.isfinite().all() and softplus(extreme).isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_softplus_survives_every_transform():
    f, reference = CHAPTER["SoftplusEverywhere"].apply, F.softplus
    x = torch.tensor([-30.0, -1.0, 0.5, 40.0], dtype=torch.float64)
    func = torch.func
    for way in (
        lambda f: func.vmap(func.grad(lambda v: f(v) ** 2))(x),
        lambda f: func.vmap(func.vmap(f))(x.reshape(2, 2)),
        lambda f: func.jacfwd(f)(x),
        lambda f: func.jacrev(f)(x),
        lambda f: func.hessian(lambda v: f(v).prod())(x),
        lambda f: func.jacfwd(func.jacfwd(lambda v: f(v).prod()))(x),
        lambda f: func.vmap(func.hessian(lambda v: f(v).sum()))(x.reshape(2, 2)),
    ):
        torch.testing.assert_close(way(f), way(reference))


def test_straight_through_rounds_and_passes_the_gradient():
    x = torch.tensor([0.2, 1.7, -2.4], requires_grad=True)
    y = CHAPTER["RoundStraightThrough"].apply(x)
    (3 * y).sum().backward()
    assert y.tolist() == [0, 2, -2] and x.grad.tolist() == [3, 3, 3]


@pytest.mark.filterwarnings("ignore")
def test_a_turned_gradient():
    x = torch.tensor([1.0, -3.0])
    value, slope = torch.func.jvp(CHAPTER["TurnRound"].apply, (x,), (torch.ones(2),))
    assert value.tolist() == x.tolist() and slope.tolist() == [-0.5, -0.5]
    assert torch.func.grad(lambda x: CHAPTER["TurnRound"].apply(x).sum())(
        x
    ).tolist() == [
        -0.5,
        -0.5,
    ]


@pytest.mark.parametrize("q", [0.05, 0.5, 0.8])
def test_the_quantile_loss_has_its_minimum_at_the_quantile(q):
    torch.manual_seed(0)
    targets = torch.randn(301)
    loss_fn = CHAPTER["QuantileLoss"](q)
    prices = torch.stack([loss_fn(guess, targets) for guess in targets])
    assert targets[prices.argmin()] == targets.quantile(q, interpolation="nearest")
    assert f"q={q}" in repr(loss_fn)


def test_the_quantile_loss_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    targets, guesses = torch.randn(2, 50).double()
    ours = CHAPTER["QuantileLoss"](0.3)(guesses, targets).item()
    assert ours == pytest.approx(metrics.mean_pinball_loss(targets, guesses, alpha=0.3))


@pytest.mark.parametrize("q", [0.0, 1.0, -1.0, 2.0])
def test_no_quantile_outside_0_and_1(q):
    with pytest.raises(ValueError, match="between 0 and 1"):
        CHAPTER["QuantileLoss"](q)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.0}, {"betas": (0.8, 0.95), "eps": 1e-4, "lr": 0.02}],
)
def test_adamw_is_torchs_with_groups_schedule_and_checkpoint(options):
    torch.manual_seed(0)
    x, y = torch.randn(32, 5).double(), torch.randn(32, 1).double()
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    nets = [net, copy.deepcopy(net)]
    tools = []
    for kind, model in zip((CHAPTER["AdamW"], torch.optim.AdamW), nets, strict=True):
        groups = [
            {"params": model[0].parameters(), "weight_decay": 0.2},
            {"params": model[2].parameters()},
        ]
        optimizer = kind(groups, **options)
        tools.append(
            (optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        )
    for step in range(40):
        for model, (optimizer, schedule) in zip(nets, tools, strict=True):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            schedule.step()
            if step == 20:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for ours, theirs in zip(*(model.parameters() for model in nets), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_adamw_leaves_parameters_without_gradient_alone():
    used, unused = (torch.ones(1, requires_grad=True) for _ in range(2))
    optimizer = CHAPTER["AdamW"]([used, unused], lr=0.1)
    (used**2).sum().backward()
    optimizer.step()
    assert unused.item() == 1 and used.item() < 1
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: 0.0)


def test_where_hides_a_value_but_not_its_gradient():
    x = torch.tensor([-2.0, 0.0, 9.0], requires_grad=True)
    for name in ("masked_root", "safe_root"):
        assert CHAPTER[name](x).tolist() == [0, 0, 3]
    (bad,) = torch.autograd.grad(CHAPTER["masked_root"](x).sum(), x)
    (good,) = torch.autograd.grad(CHAPTER["safe_root"](x).sum(), x)
    assert bad[:2].isnan().all() and good.tolist() == [0, 0, pytest.approx(1 / 6)]


@pytest.mark.filterwarnings("ignore")
def test_hessian_vector_product():
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.float64)
    x, v = torch.randn(2, 6, dtype=torch.float64)
    product = CHAPTER["hvp"](lambda x: x @ matrix @ x, x, v)
    torch.testing.assert_close(product, (matrix + matrix.T) @ v)

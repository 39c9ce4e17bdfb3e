"""Chapter 2: the scalar engine, the rules and the graph walk against PyTorch."""

import ast
import math
import random
import re

import pytest
import torch
from torch import nn

from notebooks import (
    NOTEBOOKS,
    code_cells,
    load_definitions,
    run_twice,
    section,
    statements,
)

PATH = NOTEBOOKS / "02_autograd.ipynb"
ENGINE = ("Value", "lift", "backward", "tanh")
RULES = ("gradient_descent", "momentum", "adam", "nesterov")
CHAPTER = load_definitions(
    PATH,
    *ENGINE,
    *RULES,
    "exp",
    "random_expression",
    "value_network",
    "as_values",
    "count_flops",
    "wide_bowl",
    "rosenbrock",
    "walk",
    "torch_walk",
    "NeverZeroed",
    "steps_needed",
    "graph_edges",
    "graph_places",
    "graph_labels",
    "graph_slopes",
    "newton_sqrt",
    "slope_through",
)
Value = CHAPTER["Value"]


def leaf(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("seed", range(0, 500, 100))
def test_random_expressions_agree_in_value_and_gradient(seed):
    for case in range(seed, seed + 100):
        rng = random.Random(case)
        start = [rng.uniform(-3, 3) for _ in range(4)]
        ours, theirs = [Value(v) for v in start], [leaf(v) for v in start]
        result = CHAPTER["random_expression"](case, ours)
        reference = CHAPTER["random_expression"](case, theirs)
        result.backward()
        reference.backward()
        assert result.data == pytest.approx(reference.item(), rel=1e-10, abs=1e-12)
        for a, b in zip(ours, theirs, strict=True):
            assert a.grad == pytest.approx(b.grad.item(), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize(
    "f",
    [
        lambda a: a + 2,
        lambda a: 2 + a,
        lambda a: a - 2,
        lambda a: 2 - a,
        lambda a: a * 3,
        lambda a: 3 * a,
        lambda a: a / 4,
        lambda a: 4 / a,
        lambda a: a / a,
        lambda a: a - a,
        lambda a: a**3,
        lambda a: a**0.5,
        lambda a: a**-2,
        lambda a: a**0,
        lambda a: a.exp(),
        lambda a: a.tanh(),
        lambda a: (a - 5).tanh(),
        lambda a: a.tanh().exp() / a,
    ],
)
def test_each_operation(f):
    ours, theirs = Value(1.7), leaf(1.7)
    result, reference = f(ours), f(theirs)
    result.backward()
    reference.backward()
    assert result.data == pytest.approx(reference.item(), rel=1e-12, abs=1e-12)
    assert ours.grad == pytest.approx(theirs.grad.item(), rel=1e-12, abs=1e-12)


def test_powers_at_zero_follow_torch():
    for f in (lambda a: a**2, lambda a: a**1, lambda a: a**0):
        ours, theirs = Value(0.0), leaf(0.0)
        f(ours).backward()
        f(theirs).backward()
        assert ours.grad == theirs.grad.item()


def test_deep_graph_needs_no_recursion():
    def chain(a, b):
        total = a
        for step in range(10_000):
            total = total + b if step % 2 else total * 0.999
        return total

    ours, theirs = (Value(0.3), Value(-0.2)), (leaf(0.3), leaf(-0.2))
    result = chain(*ours)
    result.backward()
    chain(*theirs).backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad == pytest.approx(b.grad.item(), rel=1e-9)


def test_diamonds_multiply_the_paths():
    """Forty stacked diamonds have 2**40 paths: each node must be visited once."""
    ours, theirs = Value(0.5), leaf(0.5)
    for value in (ours, theirs):
        for _ in range(40):
            value = value + value * 0.5
        value.backward()
    assert ours.grad == pytest.approx(1.5**40)
    assert ours.grad == pytest.approx(theirs.grad.item())


def test_a_result_is_younger_than_what_it_was_computed_from():
    nodes = [Value(v) for v in (0.1, 0.2, 0.3)]
    to_visit = [CHAPTER["random_expression"](7, nodes)]
    while to_visit:
        node = to_visit.pop()
        assert all(parent.number < node.number for parent in node.parents)
        to_visit.extend(node.parents)


def test_backward_accumulates_in_leaves_only():
    ours, theirs = Value(2.0), leaf(2.0)
    result, reference = (ours * ours + 1) ** 2, (theirs * theirs + 1) ** 2
    for _ in range(3):
        result.backward()
        reference.backward(retain_graph=True)
    assert ours.grad == theirs.grad.item() == 3 * 40


def test_errors_are_those_of_python():
    with pytest.raises(ZeroDivisionError):
        Value(1.0) / Value(0.0)
    with pytest.raises(OverflowError):
        Value(1e4).exp()


def test_network_of_values_agrees_with_torch():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    points = torch.randn(6, 2, dtype=torch.float64)
    labels = torch.randn(6, dtype=torch.float64)
    hidden, output = CHAPTER["as_values"](net)
    guesses = [CHAPTER["value_network"](p, hidden, output) for p in points.tolist()]
    loss = sum((g - t) ** 2 for g, t in zip(guesses, labels.tolist(), strict=True)) / 6
    loss.backward()
    reference = nn.functional.mse_loss(net(points)[:, 0], labels)
    reference.backward()
    assert loss.data == pytest.approx(reference.item())
    ours = [v.grad for unit in hidden for v in unit] + [v.grad for v in output]
    first = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], dim=1)
    theirs = [*first.flatten(), *net[2].weight.grad[0], net[2].bias.grad[0]]
    assert ours == pytest.approx([v.item() for v in theirs])


def test_engine_is_under_60_lines_of_code():
    """Without docstrings, comments and blank lines."""
    lines = 0
    for statement in statements(PATH):
        attached = re.match(r"Value\.(backward|tanh) =", ast.unparse(statement))
        if getattr(statement, "name", None) in ENGINE or attached:
            for node in ast.walk(statement):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    if ast.get_docstring(node) is not None:
                        node.body = node.body[1:]
            lines += len(ast.unparse(statement).split("\n"))
            lines -= ast.unparse(statement).split("\n").count("")
    assert 35 < lines < 60


OPTIMISERS = {
    "gradient_descent": (torch.optim.SGD, {}, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, {}),
    "momentum, other beta": (torch.optim.SGD, {"momentum": 0.7}, {"beta": 0.7}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, {}),
    "adam": (torch.optim.Adam, {}, {}),
    "adam, other betas": (torch.optim.Adam, *[{"betas": (0.8, 0.95)}] * 2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
def test_rules_agree_with_torch(name, lr):
    official, their_options, our_options = OPTIMISERS[name]
    rule = CHAPTER[name.split(",")[0]]
    torch.manual_seed(0)
    features, labels = torch.randn(32, 5).double(), torch.randn(32, 1).double()
    nets = []
    for _ in range(2):
        torch.manual_seed(1)
        nets.append(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    optimizer = official(nets[1].parameters(), lr=lr, **their_options)
    states: dict = {p: {} for p in nets[0].parameters()}
    for _ in range(50):
        for net in nets:
            net.zero_grad()
            nn.functional.mse_loss(net(features), labels).backward()
        optimizer.step()
        with torch.no_grad():
            for p, state in states.items():
                p += rule(p.grad, state, lr, **our_options)
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert (a - b).abs().max() < 1e-9


def test_walks_at_once_equal_walks_one_by_one():
    start, rates = (-1.2, 1.0), torch.tensor([[1e-3], [5e-3]], dtype=torch.float64)
    for name in RULES:
        args = (CHAPTER["rosenbrock"], start, 20, CHAPTER[name])
        together = CHAPTER["walk"](*args, rates)
        assert together.shape == (21, 2, 2)
        for column, rate in enumerate(rates[:, 0].tolist()):
            alone = CHAPTER["walk"](*args, rate)
            torch.testing.assert_close(together[:, column], alone)


def test_steps_needed_counts_until_the_loss_stays_low():
    losses = torch.tensor([[9.0, 9.0, 9.0], [0.5, 5.0, 0.5], [3.0, 5.0, 0.5]]).double()
    losses = torch.cat([losses, torch.tensor([[0.5, math.nan, 0.5]]).double()])
    steps = CHAPTER["steps_needed"](losses, 1.0)
    assert steps.tolist() == [3, 999, 1]


def test_never_zeroed_follows_the_sum_of_all_gradients():
    args = (CHAPTER["wide_bowl"], (-5.0, 0.5), 20)
    forgotten = CHAPTER["torch_walk"](*args, CHAPTER["NeverZeroed"], 0.05)
    reference = CHAPTER["torch_walk"](*args, torch.optim.SGD, 0.05, momentum=1.0)
    torch.testing.assert_close(forgotten, reference)


@pytest.mark.parametrize("rows", [1, 7])
def test_flops_of_a_layer(rows):
    flops = CHAPTER["count_flops"](nn.Linear(3, 5), torch.ones(rows, 3))
    assert flops == 2 * rows * 3 * 5


def test_what_cuts_the_graph():
    assert CHAPTER["slope_through"](lambda p: p.detach()) == "cut"
    assert CHAPTER["slope_through"](lambda p: 3 * p) == "[3.0, 3.0]"


def test_graph_walk_finds_each_node_once_and_deep_graphs_too():
    a = torch.tensor(2.0, requires_grad=True)
    assert len(CHAPTER["graph_edges"]((3 * a) * a**2)) == 4
    total = a
    for _ in range(5_000):
        total = total + a
    edges = CHAPTER["graph_edges"](total)
    assert len(edges) == 5_001
    assert len(CHAPTER["graph_places"](edges)) == 5_001
    with pytest.raises(ValueError, match="no graph"):
        CHAPTER["graph_edges"](a.detach())


def test_graph_places_put_every_arrow_from_right_to_left():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    x = torch.ones(2, 3)
    result = (net(x) * net(x)).sum()
    edges = CHAPTER["graph_edges"](result)
    places = CHAPTER["graph_places"](edges)
    assert places.keys() == edges.keys() and len(set(places.values())) == len(places)
    assert places[result.grad_fn][0] == 0
    for node, children in edges.items():
        assert all(places[child][0] < places[node][0] for child in children)
    labels = CHAPTER["graph_labels"](edges, {"bias": net[0].bias})
    assert sorted(labels.values()).count("bias") == 1
    assert "leaf (4, 3)" in labels.values() and "Addmm" in labels.values()


def test_arrows_carry_the_slopes_and_leave_grad_alone():
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    result = (3 * a) * a**2 + b
    edges = CHAPTER["graph_edges"](result)
    carried = CHAPTER["graph_slopes"](result, edges)
    into = {"a": [], "b": []}
    for (node, i), text in carried.items():
        leaf_ = getattr(edges[node][i], "variable", None)
        if leaf_ is not None:
            into["a" if leaf_ is a else "b"].append(float(text))
    assert sorted(into["a"]) == [12, 24] and into["b"] == [1]
    assert a.grad is None and b.grad is None
    result.backward()  # the drawing has not freed the graph
    assert a.grad.item() == 36
    net = nn.Linear(3, 5)
    loss = net(torch.ones(4, 3)).sum()
    shapes = CHAPTER["graph_slopes"](loss, CHAPTER["graph_edges"](loss)).values()
    assert {"(4, 5)", "(5)", "(5, 3)"} <= set(shapes)


@pytest.mark.parametrize("number", [1e-3, 0.3, 1.0, 2.0, 1e4])
def test_gradient_through_a_loop(number):
    x = leaf(number)
    root = CHAPTER["newton_sqrt"](x, tolerance=1e-12 * max(1.0, number))
    root.backward()
    assert root.item() == pytest.approx(math.sqrt(number))
    assert x.grad.item() == pytest.approx(0.5 / math.sqrt(number), rel=1e-6)


def set_up() -> dict:
    """A namespace in which the chapter's parameters and its set-up have been run."""
    namespace: dict = {"__name__": PATH.stem}
    run_twice([cell.source for cell in code_cells(PATH)[:2]], namespace)
    return namespace


@pytest.mark.parametrize(("number", "until"), [("2.5", "2.6"), ("2.7", "2.8")])
def test_cells_may_be_run_twice(number, until):
    """The graph was freed by the first run; a value had been changed by it."""
    shared = {name: CHAPTER[name] for name in ("graph_edges", "newton_sqrt")}
    run_twice(section(PATH, number, until), set_up() | shared)


def test_training_twice_starts_from_the_same_network():
    namespace = set_up() | CHAPTER | {"ENGINE_STEPS": 3}
    runs = []
    for source in section(PATH, "2.8", "2.9"):
        if "untrained =" in source or "our_losses, torch_losses =" in source:
            for _ in range(2):
                exec(source, namespace)
                runs.append(namespace.get("our_losses"))
    assert len(runs) == 4 and runs[2] == runs[3] and len(set(runs[3])) == 3


def test_the_values_of_a_network_are_its_parameters():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    hidden, output = CHAPTER["as_values"](net)
    point = [0.3, -0.7]
    ours = CHAPTER["value_network"](point, hidden, output).data
    assert ours == pytest.approx(net(torch.tensor(point).double()).item())


@pytest.mark.parametrize("number", [-1.0, 0.0, math.nan])
def test_a_root_of_no_positive_number_is_refused(number):
    with pytest.raises(ValueError, match="positive number is wanted"):
        CHAPTER["newton_sqrt"](torch.tensor(number))

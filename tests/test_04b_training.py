"""Chapter 4 in depth: range test, folds, ROC AUC, average precision."""

import math
from itertools import pairwise

import pytest
import torch
from sklearn import metrics
from torch import nn

from notebooks import NOTEBOOKS, generator, load_definitions

PATH = NOTEBOOKS / "04b_training_in_depth.ipynb"
CHAPTER = load_definitions(
    PATH,
    "average_precision",
    "range_test",
    "roc_auc",
    "stratified_folds",
    "train",
)


def define(name):
    """A definition of the notebook."""
    return CHAPTER[name]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("levels", [1, 2, 5, 10**9])
def test_roc_auc_agrees_with_scikit_learn_with_ties(seed, levels):
    g = generator(seed)
    labels = torch.randint(2, (30,), generator=g)
    labels[:2] = torch.tensor([0, 1])
    scores = torch.randint(levels, (30,), generator=g).float()
    ours = define("roc_auc")(labels, scores)
    assert math.isclose(ours, metrics.roc_auc_score(labels, scores), abs_tol=1e-12)
    reverse = define("roc_auc")(labels, -scores)
    assert math.isclose(ours + reverse, 1, abs_tol=1e-12)


@pytest.mark.parametrize("label", [0, 1])
def test_roc_auc_needs_both_classes(label):
    with pytest.raises(ValueError, match="at least one positive and one negative"):
        define("roc_auc")(torch.full((5,), label), torch.rand(5))


def test_roc_auc_refuses_nan():
    scores = torch.tensor([0.1, math.nan, 0.3])
    with pytest.raises(ValueError, match="nan"):
        define("roc_auc")(torch.tensor([0, 1, 1]), scores)


def test_roc_auc_takes_minus_one_for_negatives_as_scikit_learn_does():
    labels, scores = torch.tensor([-1, 1, -1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = metrics.roc_auc_score(labels, scores)
    assert define("roc_auc")(labels, scores) == expected == 0.75


@pytest.mark.parametrize("seed", range(10))
def test_average_precision_agrees_with_scikit_learn(seed):
    g = generator(seed)
    labels = torch.randint(2, (30,), generator=g)
    labels[0] = 1
    scores = torch.randn(30, generator=g)
    expected = metrics.average_precision_score(labels, scores)
    assert math.isclose(define("average_precision")(labels, scores), expected)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_folds_hold_every_class_evenly(k):
    labels = torch.randint(4, (101,), generator=generator(k))
    folds = define("stratified_folds")(labels, k, generator(0))
    assert folds.unique().tolist() == list(range(k)) and len(folds) == 101
    counts = torch.bincount(folds * 4 + labels, minlength=4 * k).view(k, 4)
    assert (counts.max(dim=0).values - counts.min(dim=0).values).max() <= 1
    assert folds.bincount().max() - folds.bincount().min() <= 1


def test_more_folds_than_samples_is_an_error_that_names_both():
    with pytest.raises(ValueError, match="7 folds of 5 samples"):
        define("stratified_folds")(torch.zeros(5).long(), 7)


def a_line():
    """A model, and batches that it can learn."""
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = (x[:, 0] > 0).long()
    batches = list(zip(x.split(8), y.split(8), strict=True))
    model = nn.Linear(3, 2)
    return model, batches, torch.optim.SGD(model.parameters(), lr=1.0)


def test_the_range_test_grows_by_a_constant_factor_and_smooths():
    rates, losses = define("range_test")(*a_line(), 1e-4, 1e-2, steps=21)
    assert len(rates) == len(losses) == 21
    assert math.isclose(rates[0], 1e-4) and math.isclose(rates[-1], 1e-2)
    assert all(math.isclose(b / a, 100 ** (1 / 20)) for a, b in pairwise(rates))
    model, batches, optimizer = a_line()
    assert math.isclose(losses[0], define("train")(model, batches[:1], optimizer)[0])


def test_the_range_test_stops_when_the_loss_explodes():
    rates, losses = define("range_test")(*a_line(), 1.0, 1e9, steps=50)
    assert len(rates) < 50 and not losses[-1] < 4 * losses[0]

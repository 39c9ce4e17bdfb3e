"""Chapter 6b: marginals, the tree of products, samples and names against references."""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from notebooks import NOTEBOOKS, load_definitions

PATH = NOTEBOOKS / "06b_crf_and_names.ipynb"
NOTEBOOK = load_definitions(
    PATH,
    "BIO",
    "CRF",
    "FOLLOWERS",
    "FORBIDDEN",
    "IGNORE",
    "LEGAL",
    "LETTERS",
    "N",
    "NAME_LEGAL",
    "PAD",
    "RULES",
    "SEED",
    "TAGS",
    "UNK",
    "all_paths",
    "brute_scores",
    "check_mask",
    "combinations",
    "cut_if_likely",
    "followers",
    "forward_backward",
    "is_legal",
    "log_partition",
    "marginals",
    "naive_partition",
    "name_inputs",
    "name_score",
    "name_spans",
    "name_tags",
    "path_score",
    "random_case",
    "read_pieces",
    "run_packed",
    "sample",
    "symbols",
    "tree_partition",
    "viterbi",
)


def define(name):
    """A definition of the notebook."""
    return NOTEBOOK[name]


@pytest.mark.parametrize("num_tags", [1, 3, 4])
@pytest.mark.parametrize("sizes", [[1], [5, 2, 4], [3, 1, 6]], ids=str)
def test_marginals_by_two_recursions_by_gradient_and_by_brute_force(sizes, num_tags):
    emissions, mask, transition = define("random_case")(sizes, num_tags, 1)
    by_gradient = define("marginals")(emissions, mask, transition)
    for row, gradient, n in zip(emissions, by_gradient, sizes, strict=True):
        probs = define("brute_scores")(row[:n], transition).softmax(0)
        paths = define("all_paths")(n, num_tags)
        hits = nn.functional.one_hot(paths, num_tags).double()
        expected = torch.einsum("p,ptk->tk", probs, hits)
        torch.testing.assert_close(gradient[:n], expected)
        both = define("forward_backward")(row[:n], transition)
        torch.testing.assert_close(both, expected)


@pytest.mark.parametrize("sizes", [[1], [2, 1], [7, 3, 8, 1], [33, 16, 17]], ids=str)
@pytest.mark.parametrize("num_tags", [1, 2, 5])
def test_the_tree_of_products_equals_the_loop(sizes, num_tags):
    emissions, mask, transition = define("random_case")(sizes, num_tags, 2)
    if max(sizes) == 1:
        emissions, mask = [torch.cat([x, x], 1) for x in (emissions, mask)]
        mask[:, 1] = False
    loop = define("log_partition")(emissions, mask, transition)
    tree = define("tree_partition")(emissions, mask, transition)
    torch.testing.assert_close(tree, loop)


def test_logarithms_and_plain_numbers_agree_where_these_suffice():
    emissions, mask, transition = define("random_case")([6], 3, 3)
    plain = define("naive_partition")(emissions[0], transition).log()
    expected = define("log_partition")(emissions, mask, transition)[0]
    torch.testing.assert_close(plain, expected)


def test_samples_have_the_frequencies_of_the_paths():
    emissions, _, transition = define("random_case")([3], 3, 5)
    paths = define("sample")(emissions[0], transition, 20_000)
    shares = (paths @ torch.tensor([9, 3, 1])).bincount(minlength=27) / 20_000
    expected = define("brute_scores")(emissions[0], transition).softmax(0)
    assert (shares - expected).abs().max() < 0.02  # five standard deviations


def test_the_combinations_survive_what_can_be_moved_into_the_emissions():
    _, _, transition = define("random_case")([3], 4, 11)
    g = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, 5, generator=g, dtype=torch.float64)
    moved = transition + u[:, None] + v
    before, after = [define("combinations")(t) for t in (transition, moved)]
    assert before == pytest.approx(after)


@pytest.mark.parametrize("both", [False, True])
def test_two_tags_are_always_legal(both):
    emissions, mask, _ = define("random_case")([9, 1, 5], 4, 2)
    tags = define("cut_if_likely")(emissions, mask, both)
    for row, n in zip(tags.tolist(), [9, 1, 5], strict=True):
        assert define("is_legal")("".join("BIES"[t] for t in row[:n]))


@pytest.mark.parametrize("lengths", [[4], [1, 6, 3]], ids=str)
def test_a_packed_lstm_gives_each_line_what_it_would_get_alone(lengths):
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, batch_first=True, bidirectional=True)
    x = torch.randn(len(lengths), max(lengths), 3)
    outputs = define("run_packed")(lstm, x, torch.tensor(lengths))
    assert outputs.shape == (len(lengths), max(lengths), 8)
    for row, out, n in zip(x, outputs, lengths, strict=True):
        torch.testing.assert_close(out[:n], lstm(row[None, :n])[0][0])


# Names


def test_names_are_runs_of_capitals():
    words = "my Lord of York and I love Sir Toby Belch's house O fair Helen".split()
    tags = define("name_tags")(words)
    assert tags == "OBOBOOOBIIOOOB"
    assert define("name_spans")(tags) == [(1, 2), (3, 4), (7, 10), (13, 14)]
    assert define("name_spans")("OIIO") == [(1, 3)]  # read kindly
    assert define("name_spans")("OBBI") == [(1, 2), (2, 4)]


def test_legal_tags_of_names_are_those_that_can_be_read_back():
    table = define("NAME_LEGAL")
    for path in itertools.product(range(3), repeat=4):
        legal = all(table[a, b] for a, b in itertools.pairwise((3, *path, 3)))
        tags = "".join(define("BIO")[t] for t in path)
        assert legal == ("OI" not in f"O{tags}")


def test_scores_of_names():
    space = dict(NOTEBOOK)
    score = define("name_score")
    score.__globals__.update(
        name_test=[["the", "Duke", "of", "York"], ["my", "Viola"]],
        word_counts=Counter(["the", "duke", "of", "my", "viola"]),
    )
    assert score(["OBOB", "OB"]) == {"F1": 1, "new": 1}
    found = score(["OBOO", "BB"])  # right: Duke, Viola; wrong: my; missed: York
    assert found["F1"] == pytest.approx(2 * 2 / (3 + 3)) and found["new"] == 0
    assert space["name_score"] is score


def test_words_become_numbers_and_letters():
    function = define("name_inputs")
    function.__globals__["numbers"] = {"the": 2, "duke": 3}
    rows = function([["The", "Duke"], ["honorificabilitudinitatibus"]])
    assert rows.shape == (2, 2, 1 + define("LETTERS"))
    assert rows[:, :, 0].tolist() == [[2, 3], [define("UNK"), 0]]
    assert rows[0, 0, 1:5].tolist() == [20, 8, 5, 0]
    last = "honorificabilitudinitatibus"[-define("LETTERS") :]
    assert rows[1, 0, 1:].tolist() == [ord(c) - 96 for c in last]
    assert not rows[1, 1].any()


def test_pieces_lose_speakers_directions_and_first_words():
    text = """ACT I. Scene of the Acts in Rome
HAMLET.
But soft, what light! And now good Horatio comes here [He draws
his long Sword] with me.
KING CLAUDIUS. Now is the winter of our York\u2019s discontent
Enter the King of France and all
"""
    assert define("read_pieces")(text) == [
        "now good Horatio comes here with me".split(),
        "is the winter of our York's discontent".split(),
    ]

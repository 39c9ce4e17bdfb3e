"""Chapter 10: attention, heads, positions and blocks against PyTorch and formulas."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from notebooks import NOTEBOOKS, code_cells, load_definitions, section

PATH = NOTEBOOKS / "10_attention.ipynb"
CHAPTER = load_definitions(
    PATH,
    "BlockAttention",
    "LETTERS",
    "MultiHeadAttention",
    "SPAN",
    "TurnedAttention",
    "alibi",
    "attention",
    "attention_loops",
    "backward_in_blocks",
    "forward_in_blocks",
    "grouped_attention",
    "influence",
    "join_heads",
    "knowable",
    "linear_recurrent",
    "linear_square",
    "multiplications",
    "pair_speeds",
    "phi",
    "plain_attention",
    "repeated",
    "rotary",
    "rotary_halves",
    "saved_bytes",
    "sinusoidal",
    "split_heads",
    "step",
    "window_mask",
)
CHAPTER["device"] = torch.device("cpu")
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    """Queries, keys or values in double precision that want a gradient."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return x.requires_grad_()


# One head


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("m", [1, 4])
def test_loops_and_matrices_agree_with_pytorch(n, m):
    q, k, v = random(n, 3), random(m, 3, seed=1), random(m, 2, seed=2)
    by_loops = define("attention_loops")(q, k, v)
    by_matrices, weights = define("plain_attention")(q, k, v)
    reference = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    torch.testing.assert_close(by_loops, reference)
    torch.testing.assert_close(by_matrices, reference)
    assert weights.shape == (n, m)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(n).double())


@pytest.mark.parametrize("seed", range(10))
def test_any_mask_gives_what_pytorch_gives_with_gradients(seed):
    mask = torch.rand(2, 1, 6, 7, generator=generator(seed)) < 0.4
    mask[..., seed % 7] = True  # every query may look at something
    results = []
    for attend in (
        lambda q, k, v: define("attention")(q, k, v, mask)[0],
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    ):
        leaves = random(2, 3, 6, 4), random(2, 3, 7, 4, seed=1), random(2, 3, 7, 5)
        output = attend(*leaves)
        output.square().sum().backward()
        results.append([output, *[leaf.grad for leaf in leaves]])
    torch.testing.assert_close(*results)


def test_no_mask_and_a_mask_of_true_are_the_same():
    q, k, v = [random(2, 5, 4, seed=i) for i in range(3)]
    free = define("attention")(q, k, v)
    torch.testing.assert_close(
        free, define("attention")(q, k, v, torch.ones(5, 5).bool())
    )
    torch.testing.assert_close(free, define("plain_attention")(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_query_that_may_look_at_nothing_gets_zeros_and_finite_gradients(dtype):
    leaves = [
        torch.randn(3, 4, generator=generator(i)).to(dtype).requires_grad_()
        for i in range(3)
    ]
    mask = torch.ones(3, 3).bool()
    mask[1] = False
    output, weights = define("attention")(*leaves, mask)
    output.float().square().sum().backward()
    assert not output[1].any() and not weights[1].any()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not leaves[0].grad[1].any()


@pytest.mark.skipif(VERSION not in [(2, 3), (2, 14)], reason="the prose names these")
def test_what_pytorch_does_then_is_what_the_prose_says():
    q, mask = torch.randn(1, 1, 3, 4), torch.ones(3, 3).bool()
    mask[1] = False
    row = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)[0, 0, 1]
    assert row.isnan().all() if VERSION == (2, 3) else not row.any()
    layer, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(1, 3, 4)
    ignored = torch.ones(1, 3).bool()
    for training in (True, False):
        layer.train(training)
        output, weights = layer(x, x, x, key_padding_mask=ignored)
        assert output.isnan().all() and weights.isnan().all()
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                output, _ = layer(
                    *[x, x, x], key_padding_mask=ignored, need_weights=False
                )
            fast_path = not training and not gradients
            assert output.isnan().all() == (VERSION == (2, 3) or fast_path)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    output = encoder(x, src_key_padding_mask=ignored)
    assert output.isnan().all() == (VERSION == (2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_must_be_boolean(dtype):
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match=f"boolean.*{dtype}"):
        define("attention")(x, x, x, torch.ones(3, 3, dtype=dtype))


# Several heads


def test_splitting_and_joining_heads_are_inverse_and_keep_words_apart():
    x = torch.arange(2 * 3 * 8).reshape(2, 3, 8)
    heads = define("split_heads")(x, 4)
    assert heads.shape == (2, 4, 3, 2)
    assert heads[1, 2, 0].equal(x[1, 0, 4:6])
    assert define("join_heads")(heads).equal(x)


@pytest.mark.parametrize("num_heads", [1, 2, 8])
@pytest.mark.parametrize("lengths", [[5, 5], [5, 1], [3, 5, 2, 1]])
def test_heads_agree_with_the_library(num_heads, lengths):
    torch.manual_seed(num_heads)
    theirs = nn.MultiheadAttention(16, num_heads, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = define("MultiHeadAttention")(16, num_heads).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    real = torch.arange(5) < torch.tensor(lengths)[:, None]
    causal = torch.ones(5, 5).tril().bool()
    results = []
    for layer in (ours, theirs):
        x = random(len(lengths), 5, 16)
        if layer is ours:
            y, w = layer(x, real[:, None, None, :] & causal)
        else:
            y, w = layer(
                *[x, x, x],
                key_padding_mask=~real,
                attn_mask=~causal,
                average_attn_weights=False,
            )
        y[real].square().sum().backward()
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([y[real], w, x.grad, *gradients])
    torch.testing.assert_close(*results)


def test_heads_must_divide_the_size():
    with pytest.raises(ValueError, match="dim 10 is not divisible by 3 heads"):
        define("MultiHeadAttention")(10, 3)


def test_a_new_layer_starts_like_the_library():
    torch.manual_seed(0)
    ours, theirs = define("MultiHeadAttention")(64, 4), nn.MultiheadAttention(64, 4)
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name)
        assert mine.shape == parameter.shape
        torch.testing.assert_close(
            mine.std(unbiased=False), parameter.std(unbiased=False), rtol=0.1, atol=0.0
        )


def test_the_cells_that_compare_gradients_may_be_run_twice():
    space = CHAPTER | {"SEED": 0, "real": torch.arange(6) < torch.tensor([[6], [4]])}
    space["batch"] = torch.randn(2, 6, 32)
    sources = section(PATH, "10.5", "10.6") + section(PATH, "10.10", "10.11")
    cells = [
        source.replace("torch.randn(3, 6, 32)", "torch.randn(2, 6, 32)")
        for source in sources
        if "theirs" in source or "blocks, plain" in source
    ]
    assert len(cells) == 5
    for source in cells:
        exec(source, space)
        exec(source, space)


# Positions


def test_an_odd_number_of_features_cannot_be_paired():
    x, place = torch.ones(2, 7), torch.arange(2)
    calls = [lambda: define("sinusoidal")(5, 7)]
    calls += [lambda f=f: define(f)(x, place) for f in ("rotary", "rotary_halves")]
    for call in calls:
        with pytest.raises(ValueError, match="dim 7 is not divisible by 2"):
            call()


@pytest.mark.parametrize("dim", [2, 8])
def test_sinusoidal_positions_follow_the_formula(dim):
    table = define("sinusoidal")(50, dim)
    for t, i in ((0, 0), (7, 0), (49, dim // 2 - 1)):
        angle = t / 10_000 ** (2 * i / dim)
        assert math.isclose(table[t, 2 * i], math.sin(angle), abs_tol=1e-4)
        assert math.isclose(table[t, 2 * i + 1], math.cos(angle), abs_tol=1e-4)


def test_rotary_is_multiplication_with_a_complex_number():
    x, place = random(3, 9, 8), torch.arange(9).double()
    speeds = 10_000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turn = torch.polar(torch.ones(9, 4).double(), place[:, None] * speeds)
    reference = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * turn
    reference = torch.view_as_real(reference).flatten(-2)
    torch.testing.assert_close(define("rotary")(x, place), reference)


@pytest.mark.parametrize("shift", [1, 17, 400])
def test_rotary_scores_depend_on_the_distance(shift):
    q, k = random(6, 16), random(6, 16, seed=1)
    place = torch.arange(6).double()
    scores = [
        define("rotary")(q, place + s) @ define("rotary")(k, place + s).T
        for s in (0, shift)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)  # speeds are 32-bit


def test_rotary_keeps_the_type():
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert define("rotary")(x, torch.arange(3)).dtype == torch.bfloat16


def test_weights_without_words_depend_on_the_distance_only():
    torch.manual_seed(0)
    mask = torch.ones(1, 1, 1, 9).bool()
    for by_words in (True, False):
        layer = define("TurnedAttention")(8, 2, by_words)
        _, weights = layer(torch.randn(2, 9, 8), mask)
        scores = weights.log()
        ratio = scores[..., 1:, 1:-1] - scores[..., 1:, 2:]  # of neighbouring keys
        before = scores[..., :-1, :-2] - scores[..., :-1, 1:-1]  # one place earlier
        assert torch.allclose(ratio, before, atol=1e-4) != by_words
        assert torch.allclose(weights[0], weights[1]) != by_words


# Blocks


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_blocks_agree_with_plain_attention_and_its_gradients(block):
    results = []
    for attend in (
        lambda *t: define("BlockAttention").apply(*t, block),
        lambda *t: define("plain_attention")(*t)[0],
    ):
        leaves = random(2, 5, 4), random(2, 7, 4, seed=1), random(2, 7, 3, seed=2)
        output = attend(*leaves)
        output.cos().sum().backward()
        results.append([output, *[leaf.grad for leaf in leaves]])
    torch.testing.assert_close(*results)


def test_blocks_survive_scores_whose_exponential_is_infinite():
    q, k, v = [torch.randn(5, 4, generator=generator(i)) for i in range(3)]
    output, log_sum = define("forward_in_blocks")(1000 * q, 1000 * k, v, 2)
    assert output.isfinite().all() and log_sum.isfinite().all()
    reference = define("plain_attention")(1000 * q, 1000 * k, v)[0]
    torch.testing.assert_close(output, reference)
    scores = (q @ k.T / 2).logsumexp(dim=1, keepdim=True)
    torch.testing.assert_close(define("forward_in_blocks")(q, k, v, 2)[1], scores)


def test_blocks_refuse_a_second_derivative():
    leaves = [random(5, 4, seed=i) for i in range(3)]
    output = define("BlockAttention").apply(*leaves, 2).square().sum()
    (gradient,) = torch.autograd.grad(output, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_blocks_keep_memory_that_grows_in_a_straight_line():
    def kept(attend, n):
        return define("saved_bytes")(
            attend, *[torch.randn(1, 2, n, 8).requires_grad_() for _ in range(3)]
        )

    blocks = [
        kept(lambda *t: define("BlockAttention").apply(*t, 16), n) for n in (64, 128)
    ]
    assert blocks[1] == 2 * blocks[0] == 2 * 4 * (4 * 2 * 64 * 8 + 2 * 64)
    plain = kept(lambda *t: define("plain_attention")(*t)[0], 128)
    assert plain > 4 * 2 * 128**2


def test_each_piece_of_memory_is_counted_once():
    x = torch.randn(100, requires_grad=True)
    assert define("saved_bytes")(lambda x: x * x, x) == 400
    assert define("saved_bytes")(lambda x: x[:50] * x[50:], x) == 400
    assert define("saved_bytes")(lambda x: x + x, x) == 0


def test_multiplications_of_a_known_case():
    assert define("multiplications")(3, 2) == (2 * 9 * 2 + 4 * 3 * 4, 6 * 3 * 4)


# The made sequences, and the test that finds mistakes


def test_sequences_repeat_and_the_first_round_has_no_letter_twice():
    sequence, period = define("repeated")(200, generator(0))
    assert sequence.shape == (200, define("SPAN"))
    assert sequence.max() < len(define("LETTERS"))
    assert period.unique().tolist() == list(range(6, 13))
    for row, p in zip(sequence.tolist(), period[:, 0].tolist(), strict=True):
        assert len(set(row[:p])) == p
        assert row[p:] == row[:-p]
        where = define("knowable")(torch.tensor([[p]]))[0].tolist()
        assert where == [row[i] in row[:i] for i in range(len(row) - 1)]


def test_influence_of_known_functions():
    x = torch.randn(4, 3, generator=generator(0))
    assert (define("influence")(lambda x: x, x) > 0).equal(torch.eye(4).bool())
    causal = define("influence")(lambda x: x.cumsum(dim=0), x) > 0
    assert causal.equal(torch.ones(4, 4).tril().bool())


# Words of real sentences

DATA = NOTEBOOKS / "data" / "movieReviewSnippets_GroundTruth.txt"


def read_data(folder) -> dict:
    """Run the cells that read the data, from a folder of the reader's own."""
    space = load_definitions(PATH, "check_data", "fetch") | {"DATA_DIR": str(folder)}
    for cell in code_cells(PATH):
        if "data" in cell.tags:
            exec(cell.source, space)
    return space


def test_the_readers_own_folder_is_found(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    Path(tmp_path, "bookdata").mkdir()
    Path(tmp_path, "bookdata", DATA.name).write_bytes(DATA.read_bytes())
    assert len(read_data("~/bookdata")["sentences"]) == 10_041


def test_a_file_that_was_cut_off_is_named(tmp_path):
    whole = DATA.read_bytes()
    Path(tmp_path, DATA.name).write_bytes(whole[: int(0.7 * len(whole))])
    with pytest.raises(RuntimeError, match=f"{DATA.name} is cut off: delete it"):
        read_data(tmp_path)


def test_what_looks_like_a_special_token_is_a_word():
    space = {"Counter": Counter, "tokens": [["film"] * 20]}
    space |= {"PAD": 0, "UNKNOWN": 1, "BLANK": 2}
    (cell,) = [c.source for c in code_cells(PATH) if "number_of = " in c.source]
    exec(cell, space)
    assert space["number_of"] == {"____": 2, "film": 3}


# The exercises


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_grouped_attention_agrees_with_copied_heads(groups):
    q = random(2, 6, 5, 4)
    k, v = random(2, groups, 7, 4, seed=1), random(2, groups, 7, 4, seed=2)
    copied = [t.repeat_interleave(6 // groups, dim=1) for t in (k, v)]
    reference = F.scaled_dot_product_attention(q, *copied)
    torch.testing.assert_close(define("grouped_attention")(q, k, v), reference)


def test_heads_must_be_divisible_by_groups():
    with pytest.raises(ValueError, match="6 heads cannot share 4 groups"):
        define("grouped_attention")(*[torch.randn(1, h, 2, 2) for h in (6, 4, 4)])


def test_alibi_has_the_slopes_of_the_paper():
    bias = define("alibi")(8, 5)
    assert bias[:, 1, 0].tolist() == [-(2.0**-h) for h in range(1, 9)]
    assert (bias[:, 0, 1:] == -math.inf).all() and not bias.diagonal(0, 1, 2).any()
    assert bias[0, 4, 0] == 4 * bias[0, 1, 0]


@pytest.mark.parametrize("width", [1, 3, 10])
def test_window_mask_by_its_definition(width):
    mask = define("window_mask")(6, width)
    wanted = [[0 <= i - j < width for j in range(6)] for i in range(6)]
    assert mask.tolist() == wanted


def test_linear_attention_two_ways():
    q, k, v = [random(9, 4, seed=i) for i in range(3)]
    square = define("linear_square")(q, k, v)
    torch.testing.assert_close(square, define("linear_recurrent")(q, k, v))
    torch.testing.assert_close(square[0], v[0])


@pytest.mark.parametrize("num_heads", [1, 4])
def test_steps_with_a_cache_are_the_causal_layer(num_heads):
    torch.manual_seed(num_heads)
    layer, x, cache = (
        define("MultiHeadAttention")(8, num_heads),
        torch.randn(2, 6, 8),
        [],
    )
    steps = [define("step")(layer, x[:, t : t + 1], cache) for t in range(6)]
    whole, _ = layer(x, torch.ones(6, 6).tril().bool())
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    assert len(cache) == 1 and cache[0][0].shape == (2, num_heads, 6, 8 // num_heads)

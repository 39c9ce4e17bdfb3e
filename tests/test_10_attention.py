"""Chapter 10: attention, heads and positions against PyTorch and formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from notebooks import NOTEBOOKS, generator, load_definitions

PATH = NOTEBOOKS / "10_attention.ipynb"
CHAPTER = load_definitions(
    PATH,
    "CARDS",
    "HeadProjections",
    "LETTERS",
    "MultiHeadAttention",
    "Reader",
    "RotaryAttention",
    "SPAN",
    "alibi",
    "attention",
    "decks",
    "grouped_attention",
    "influence",
    "join_heads",
    "labelled",
    "letter_loss",
    "pair_speeds",
    "repeated",
    "rotary",
    "rotary_halves",
    "sinusoidal",
    "split_heads",
    "step",
    "weights_by_layer",
    "window_mask",
)
CHAPTER["device"] = torch.device("cpu")
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def random(*shape, seed=0):
    """Queries, keys or values in double precision that want a gradient."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return x.requires_grad_()


# One head


def by_loops(q, k, v, mask):
    """Attention of q (n, d), k (m, d) and v (m, c), one number at a time."""
    rows = []
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if mask[i, j]]
        scores = [
            sum(q[i, f].item() * k[j, f].item() for f in range(q.shape[1]))
            / math.sqrt(q.shape[1])
            for j in seen
        ]
        total = sum(math.exp(s) for s in scores)
        pairs = zip(scores, seen, strict=True)
        rows.append(sum((math.exp(s) / total * v[j] for s, j in pairs), 0 * v[0]))
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("m", [1, 4])
def test_attention_is_what_loops_compute(n, m):
    q, k, v = random(n, 3), random(m, 3, seed=1), random(m, 2, seed=2)
    mask = torch.rand(n, m, generator=generator(0)) < 0.6  # rows of False as well
    output, weights = define("attention")(q, k, v, mask)
    torch.testing.assert_close(output, by_loops(q, k, v, mask))
    assert weights.shape == (n, m)
    torch.testing.assert_close(weights.sum(dim=1), mask.any(dim=1).double())


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
    torch.testing.assert_close(free[0], F.scaled_dot_product_attention(q, k, v))


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
            mask = real[:, None, None, :] & causal
            y, w = layer(x, mask), layer.weights(x, mask)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("empty", ["a row", "a text", "a head", "everything"])
def test_heads_that_may_look_at_nothing_take_nothing(empty, training, dtype):
    torch.manual_seed(0)
    layer = define("MultiHeadAttention")(8, 2).to(dtype).train(training)
    mask = torch.rand(3, 2, 5, 5, generator=generator(0)) < 0.5
    mask[..., 0] = True
    place = {"a row": (0, 0, 1), "a text": (1,), "a head": (2, 1), "everything": ()}
    mask[place[empty]] = False
    x = torch.randn(3, 5, 8, generator=generator(1)).to(dtype).requires_grad_()
    output = layer(x, mask)
    q, k, v = layer.project(x)
    plain, weights = define("attention")(q, k, v, mask)
    reference = layer.out_proj(define("join_heads")(plain))
    leaves = [x, *layer.parameters()]
    grads = [
        torch.autograd.grad(y.float().square().sum(), leaves, retain_graph=True)
        for y in (output, reference)
    ]
    bound = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(output, reference, atol=bound, rtol=bound)
    for ours, theirs in zip(*grads, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)
    assert not weights[~mask].any()
    torch.testing.assert_close(layer.weights(x, mask), weights)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x, mask), output)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_cross_attention_agrees_with_the_library(num_heads):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, num_heads, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    ours = define("MultiHeadAttention")(16, num_heads).double()
    ours.load_state_dict(theirs.state_dict())
    x, context = random(2, 5, 16), random(2, 7, 16, seed=1)
    y, w = theirs(x, context, context, average_attn_weights=False)
    torch.testing.assert_close(ours(x, context=context), y)
    torch.testing.assert_close(ours.weights(x, context=context), w)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer, x = define("MultiHeadAttention")(8, 2, dropout=0.5), torch.randn(1, 6, 8)
    assert not layer(x).equal(layer(x))
    without = define("MultiHeadAttention")(8, 2)
    without.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), without(x))


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


@pytest.mark.parametrize("num_heads", [1, 2])
def test_rotary_attention_sees_distances_and_nothing_else_of_the_places(num_heads):
    torch.manual_seed(0)
    layer = define("RotaryAttention")(8, num_heads)
    x, front = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    mask = torch.ones(8, 8).bool()
    mask[:, :3] = False  # nobody looks at the three in front
    moved = layer(torch.cat([front, x], dim=1), mask)[:, 3:]
    torch.testing.assert_close(moved, layer(x), atol=1e-5, rtol=1e-4)
    order = torch.tensor([1, 0, 2, 3, 4])
    assert not torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-3)


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal", "rotary"])
def test_the_reader_sees_no_later_letter_and_trains_what_it_should(positions):
    torch.manual_seed(0)
    model = define("Reader")(positions, dim=8)
    letters = torch.randint(26, (1, 23), generator=generator(0))
    changed = letters.clone()
    changed[:, 12] = (letters[:, 12] + 1) % 26
    one, other = model(letters), model(changed)
    torch.testing.assert_close(one[:, :12], other[:, :12])
    assert not one[:, 12].equal(other[:, 12])
    assert model.places.requires_grad == (positions == "learned")
    weights = define("weights_by_layer")(model, letters)
    assert [w.shape for w in weights] == [(1, 23, 23)] * 2
    assert not weights[1].triu(1).any()
    assert not model.layers[0]._forward_pre_hooks


# The made sequences, and the test that finds mistakes


def test_sequences_repeat_and_the_first_round_has_no_letter_twice():
    sequence, period = define("repeated")(200, generator(0))
    assert sequence.shape == (200, define("SPAN"))
    assert sequence.max() < len(define("LETTERS"))
    assert period.unique().tolist() == list(range(6, 13))
    for row, p in zip(sequence.tolist(), period[:, 0].tolist(), strict=True):
        assert len(set(row[:p])) == p
        assert row[p:] == row[:-p]
    letters, labels, period = define("labelled")(200, generator(0))
    for row, wanted, p in zip(letters.tolist(), labels.tolist(), period, strict=True):
        whole = [*row, row[len(row) - p]]
        assert wanted == [whole[i + 1] if i >= p else -100 for i in range(len(row))]
        for i, label in enumerate(wanted):  # known, if the letter has come before
            assert (label >= 0) == (row[i] in row[:i])


def test_the_letter_loss_leaves_out_what_cannot_be_known():
    logits = torch.randn(2, 3, 26, generator=generator(0))
    labels = torch.tensor([[-100, 4, 5], [-100, -100, 7]])
    chances = logits.log_softmax(dim=2)
    wanted = -(chances[0, 1, 4] + chances[0, 2, 5] + chances[1, 2, 7]) / 3
    torch.testing.assert_close(define("letter_loss")(logits, labels), wanted)


@pytest.mark.parametrize("hidden", [True, False])
def test_a_deck_holds_the_answers(hidden):
    ((x, answers),) = define("decks")(1, seed=3, size=50, hidden=hidden)
    assert x.shape == (50, 9, 16) and answers.shape == (50, 16)
    for (question, *cards), answer in zip(x, answers, strict=True):
        of = {card[:8].argmax().item(): card[8:] for card in cards}
        assert set(of) == set(range(8))
        if hidden:
            assert not question.any()
        else:
            asked = question.view(2, 8).argmax(dim=1).tolist()
            assert asked[0] != asked[1]
            assert torch.cat([of[i] for i in asked]).equal(answer)


def test_influence_of_known_functions():
    x = torch.randn(4, 3, generator=generator(0))
    assert (define("influence")(lambda x: x, x) > 0).equal(torch.eye(4).bool())
    causal = define("influence")(lambda x: x.cumsum(dim=0), x) > 0
    assert causal.equal(torch.ones(4, 4).tril().bool())


# The exercises


def test_the_other_layout_is_the_first_with_features_reordered():
    x, places = random(3, 9, 8), torch.arange(9).double()
    order = torch.arange(8).view(4, 2).T.flatten()  # 0 2 4 6 1 3 5 7
    turned = define("rotary")(x, places)[..., order]
    torch.testing.assert_close(define("rotary_halves")(x[..., order], places), turned)


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


@pytest.mark.parametrize("num_heads", [1, 4])
def test_steps_with_a_cache_are_the_causal_layer(num_heads):
    torch.manual_seed(num_heads)
    layer, x, cache = (
        define("MultiHeadAttention")(8, num_heads),
        torch.randn(2, 6, 8),
        [],
    )
    steps = [define("step")(layer, x[:, t : t + 1], cache) for t in range(6)]
    whole = layer(x, torch.ones(6, 6).tril().bool())
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    assert len(cache) == 1 and cache[0][0].shape == (2, num_heads, 6, 8 // num_heads)

"""Chapter 10b: attention in blocks, its gradients and its memory."""

import math

import pytest
import torch
import torch.nn.functional as F

from notebooks import NOTEBOOKS, generator, load_definitions

CHAPTER = load_definitions(
    NOTEBOOKS / "10b_flash_attention.ipynb",
    "BlockAttention",
    "attention",
    "backward_in_blocks",
    "causal_in_blocks",
    "extrapolate",
    "forward_in_blocks",
    "linear_recurrent",
    "linear_square",
    "multiplications",
    "phi",
    "saved_bytes",
    "without_maximum",
)


def define(name):
    """A definition of the notebook."""
    return CHAPTER[name]


def random(*shape, seed=0):
    """Queries, keys or values in double precision that want a gradient."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return x.requires_grad_()


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_blocks_agree_with_plain_attention_and_its_gradients(block):
    results = []
    for attend in (
        lambda *t: define("BlockAttention").apply(*t, block),
        lambda *t: define("attention")(*t)[0],
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
    reference = define("attention")(1000 * q, 1000 * k, v)[0]
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
    plain = kept(lambda *t: define("attention")(*t)[0], 128)
    assert plain > 4 * 2 * 128**2


def test_each_piece_of_memory_is_counted_once():
    x = torch.randn(100, requires_grad=True)
    assert define("saved_bytes")(lambda x: x * x, x) == 400
    assert define("saved_bytes")(lambda x: x[:50] * x[50:], x) == 400
    assert define("saved_bytes")(lambda x: x + x, x) == 0


def test_multiplications_of_a_known_case():
    wanted = {"attention": 2 * 9 * 2 + 4 * 3 * 4, "GRU": 6 * 3 * 4}
    assert define("multiplications")(3, 2) == wanted


def test_without_the_maximum_small_scores_are_right():
    leaves = random(5, 4), random(7, 4, seed=1), random(7, 3, seed=2)
    plain = F.scaled_dot_product_attention(*[t[None] for t in leaves])[0]
    torch.testing.assert_close(define("without_maximum")(*leaves), plain)


# The exercises


@pytest.mark.parametrize("n", [1, 6, 7, 30])
@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_causal_blocks_agree_and_are_counted(n, size):
    leaves = [random(2, n, 4, seed=i) for i in range(3)]
    output, pairs = define("causal_in_blocks")(*leaves, size)
    reference = F.scaled_dot_product_attention(*leaves, is_causal=True)
    torch.testing.assert_close(output, reference, atol=1e-6, rtol=1e-5)
    blocks = math.ceil(n / size)
    assert pairs == blocks * (blocks + 1) // 2


def test_a_parabola_is_extrapolated():
    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            n = x.shape[1]
            ctx.save_for_backward(torch.zeros(100 + 3 * n + 2 * n**2))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    wanted = 4 * (100 + 3 * 500 + 2 * 500**2) / 2**20
    assert math.isclose(define("extrapolate")(Known.apply, 500), wanted)


def test_linear_attention_two_ways():
    q, k, v = [random(9, 4, seed=i) for i in range(3)]
    square = define("linear_square")(q, k, v)
    torch.testing.assert_close(square, define("linear_recurrent")(q, k, v))
    torch.testing.assert_close(square[0], v[0])

"""Chapter 14b: a base in blocks, rounding, and bytes kept, against references."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from notebooks import NOTEBOOKS, load_definitions

gguf = pytest.importorskip("gguf")

PATH = NOTEBOOKS / "14b_what_adapters_change.ipynb"
NAMES = """
    BlockLinear BlockProduct LoRA Reader from_q4_1 kept_bytes redrawn rounded
    rounded_layer
""".split()
CHAPTER = load_definitions(PATH, *NAMES)


def define(name):
    """A definition of the notebook."""
    return CHAPTER[name]


@pytest.fixture
def blocks():
    """A matrix (8, 64) in blocks of four bits, and its numbers."""
    numbers = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    raw = gguf.quantize(numbers.numpy(), gguf.GGMLQuantizationType.Q4_1)
    back = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_1)
    return torch.from_numpy(raw).view(-1, 20), torch.from_numpy(back)


def test_a_layer_in_blocks_is_the_decoded_layer(blocks):
    raw, weight = blocks
    layer, lengths = define("BlockLinear")(raw, [8, 64]), (2, 3, 64)
    ours = torch.randn(lengths, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    out, expected = layer(ours), F.linear(theirs, weight)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert not [*layer.parameters()]


def test_a_layer_in_blocks_keeps_no_decoded_matrix(blocks):
    raw, _ = blocks
    layer, kept = define("BlockLinear")(raw, [8, 64]), []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t, lambda t: t
    ):
        layer(x)
    assert sum(t.numel() * t.element_size() for t in kept) == raw.numel()


def test_lora_fits_around_blocks(blocks):
    raw, weight = blocks
    base = nn.Linear(64, 8, bias=False)
    base.weight.data.copy_(weight)
    full = define("LoRA")(base, 2, 6.0)
    nn.init.normal_(full.B)
    small = copy.deepcopy(full)
    small.base = define("BlockLinear")(raw, [8, 64])
    x = torch.randn(5, 64)
    torch.testing.assert_close(small(x), full(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_leaves_few_levels_between_the_same_ends(bits):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    near = define("rounded")(weight, bits)
    pairs = zip(weight.view(-1, 32), near.view(-1, 32), strict=True)
    for block, levels in pairs:
        assert len(levels.unique()) <= 2**bits
        step = (block.max() - block.min()) / (2**bits - 1)
        assert (levels - block).abs().max() <= 0.501 * step
        torch.testing.assert_close(levels.min(), block.min())
        torch.testing.assert_close(levels.max(), block.max())


def test_a_block_of_equal_numbers_stays_as_it_is():
    weight = torch.full((1, 32), 0.7)
    assert torch.equal(define("rounded")(weight, 2), weight)


def test_four_bits_leave_what_lay_in_four_bits(blocks):
    _, weight = blocks
    torch.testing.assert_close(define("rounded")(weight, 4), weight, atol=1e-4, rtol=0)


def test_rounding_a_layer_leaves_the_layer_alone():
    layer = nn.Sequential(nn.Linear(32, 4), nn.LayerNorm(4))
    before = copy.deepcopy(layer.state_dict())
    near = define("rounded_layer")(layer, 2)
    assert not torch.equal(near[0].weight, layer[0].weight)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_redrawn_layer_keeps_its_shapes_and_none_of_its_numbers():
    layer = nn.Sequential(
        nn.Linear(400, 100, bias=False), nn.LayerNorm(100, bias=False)
    )
    nn.init.constant_(layer[1].weight, 3.0)
    before = copy.deepcopy(layer.state_dict())
    drawn = define("redrawn")(layer)
    assert 0.95 < 20 * drawn[0].weight.std() < 1.05
    assert (drawn[0].weight != before["0.weight"]).all()
    assert (drawn[1].weight == 1).all()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_kept_bytes_are_those_of_the_inputs_of_what_learns():
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.states = torch.zeros(2, 3), torch.randn(9, 5)
            self.frozen = nn.Linear(5, 4, bias=False).requires_grad_(False)
            self.learns = nn.Linear(4, 3, bias=False)

        def forward(self, numbers):
            return self.learns(self.frozen(self.states[numbers])) @ self.words.T

    toy, numbers = Toy(), torch.arange(6)
    assert define("kept_bytes")(toy, numbers) == 6 * 4 * 4  # what enters `learns`
    toy.frozen.requires_grad_(True)
    assert define("kept_bytes")(toy, numbers) == 6 * 4 * 4 + 6 * 5 * 4


def test_kept_bytes_keeps_nothing_itself():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.scale = torch.zeros(2, 3), nn.Parameter(torch.ones(3))

        def forward(self, numbers):
            grown = (self.scale * numbers[:, None]).exp()  # its gradient is itself
            results.append(weakref.ref(grown))
            return grown @ self.words.T

    results = []
    assert define("kept_bytes")(Growing(), torch.arange(6.0)) > 0
    assert [result() for result in results] == [None]

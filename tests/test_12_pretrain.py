"""Chapter 12: the GPT, counts and sampling against references."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")  # which needs Python 3.11

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from notebooks import NOTEBOOKS, generator, load_definitions, randn

PATH = NOTEBOOKS / "12_pretrain_gpt.ipynb"
MODEL = ["split_heads", "join_heads", "HeadProjections", "CausalAttention", "Block"]
MODEL += ["GPT", "start_like_gpt2", "NAMES", "to_gpt2", "generate"]
COUNTS = ["BASE", "codes", "look_up", "discounts", "count_runs", "probabilities"]
SHAPE = (50, 12, 16, 3, 4)  # vocab, context, dim, layers, heads


@pytest.fixture(scope="module")
def chapter() -> dict:
    names = [*MODEL, *COUNTS, "read_plays", "HELD_OUT", "split_plays", "windows"]
    names += ["next_token_loss", "token_bits", "bits_per_byte", "top_k", "top_p"]
    names += ["sample", "to_array", "gpt_size", "llama_size", "llama_parts"]
    names += ["count_last"]
    return load_definitions(PATH, *names)


@pytest.fixture
def pair(chapter):
    """Our GPT with large weights, and transformers' GPT-2 with the same ones."""
    vocab, context, dim, layers, heads = SHAPE
    torch.manual_seed(0)
    ours = chapter["GPT"](*SHAPE).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = GPT2Config(
        vocab_size=vocab, n_positions=context, n_embd=dim, n_layer=layers, n_head=heads
    )
    theirs = GPT2LMHeadModel(config).eval()
    theirs.transformer.load_state_dict(chapter["to_gpt2"](ours.state_dict()))
    return ours, theirs


def test_the_logits_are_those_of_gpt2(pair):
    ours, theirs = pair
    ids = torch.randint(50, (4, 12), generator=generator())
    with torch.inference_mode():
        a, b = ours(ids), theirs(ids).logits
    scale = b.abs().max()
    assert (a - b).abs().max() < 1e-5 * scale
    assert scale > 1


def test_the_gradients_are_those_of_gpt2(chapter, pair):
    ours, theirs = pair
    ids = torch.randint(50, (4, 12), generator=generator())
    chapter["next_token_loss"](ours(ids[:, :-1]), ids[:, 1:]).backward()
    theirs(ids, labels=ids).loss.backward()
    grads = chapter["to_gpt2"]({n: p.grad for n, p in ours.named_parameters()})
    for name, parameter in theirs.transformer.named_parameters():
        scale = parameter.grad.abs().max()
        assert (grads[name] - parameter.grad).abs().max() < 1e-4 * scale, name


def test_the_greedy_text_is_that_of_gpt2(chapter, pair):
    ours, theirs = pair
    start = [3, 1, 4]
    found = list(chapter["generate"](ours, start, 9))
    expected = theirs.generate(
        torch.tensor([start]), max_new_tokens=9, do_sample=False, pad_token_id=0
    )
    assert found == expected[0, 3:].tolist()


def test_writing_goes_on_behind_the_context_and_ends_at_stop(chapter, pair):
    ours, _ = pair
    text = list(chapter["generate"](ours, [1], 30))
    assert len(text) == 30
    assert (
        list(chapter["generate"](ours, [1], 30, stop=text[4]))
        == text[: text.index(text[4])]
    )


def test_the_start_is_gpt2s(chapter):
    torch.manual_seed(0)
    model = chapter["start_like_gpt2"](chapter["GPT"](400, 64, 128, 8, 4))
    block = model.blocks[3]
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.in_proj_weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in (block.attn.out_proj, block.linear2):
        assert layer.weight.std().item() == pytest.approx(0.005, rel=0.05)
    for name, parameter in model.named_parameters():
        assert "bias" not in name or not parameter.any()
        assert "norm" not in name or "bias" in name or (parameter == 1).all()


def test_sizes_are_those_of_transformers(chapter):
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config())
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=8,
                num_key_value_heads=2,
                intermediate_size=100,
            )
        )
        parts = chapter["llama_parts"](320, 64, 3, 16, 100)
    size = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert chapter["gpt_size"](50257, 1024, 768, 12) == size(gpt2) == 124_439_808
    assert chapter["llama_size"](320, 64, 3, 16, 100) == size(llama) == size(parts)


def slow_counts(data: list[int], order: int, symbols: int):
    """Modified Kneser-Ney smoothing with dictionaries: P(symbol | past)."""
    levels = []
    counts = Counter(tuple(data[i : i + order]) for i in range(len(data) - order + 1))
    for _ in range(order):
        ns = [max(1, sum(c == k for c in counts.values())) for k in (1, 2, 3, 4)]
        y = ns[0] / (ns[0] + 2 * ns[1])
        taken = [k - (k + 1) * y * ns[k] / ns[k - 1] for k in (1, 2, 3)]
        taken = [min(max(t, 0.1), k) for k, t in enumerate(taken, 1)]
        of_past = defaultdict(dict)
        for run, c in counts.items():
            of_past[run[:-1]][run[-1]] = c, taken[min(c, 3) - 1]
        levels.insert(0, of_past)
        counts = Counter(run[1:] for run in counts)

    def probability(past: tuple, symbol: int) -> float:
        p = 1 / symbols
        for n, of_past in enumerate(levels):
            known = of_past.get(past[len(past) - n :])
            if n > len(past) or not known:
                continue
            total = sum(c for c, _ in known.values())
            kept = known[symbol][0] - known[symbol][1] if symbol in known else 0
            p = (kept + sum(d for _, d in known.values()) * p) / total
        return p

    return probability


def test_counts_are_those_of_dictionaries(chapter):
    rng = np.random.default_rng(0)
    data = rng.choice(7, size=600, p=[0.3, 0.25, 0.2, 0.1, 0.08, 0.05, 0.02])
    asked = rng.integers(7, size=80)
    tables = chapter["count_runs"](data.astype(np.uint64), 4)
    found = chapter["probabilities"](tables, asked.astype(np.uint64), 7)
    slow = slow_counts(data.tolist(), 4, 7)
    for i in range(len(asked)):
        past = tuple(asked[max(0, i - 3) : i].tolist())
        assert found[i] == pytest.approx(slow(past, int(asked[i])), rel=1e-9)


@pytest.mark.parametrize("order", [1, 3, 7])
def test_probabilities_of_all_symbols_sum_to_one(chapter, order):
    rng = np.random.default_rng(0)
    data = rng.integers(20, size=3000).astype(np.uint64)
    tables = chapter["count_runs"](data, order)
    pasts = [data[i : i + 7] for i in range(40)] + [rng.integers(20, size=7)]
    rows = np.stack([[np.append(past, s) for s in range(20)] for past in pasts])
    p = chapter["probabilities"](tables, rows.astype(np.uint64), 20)[..., -1]
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-9)
    assert p.min() > 0


def test_runs_of_nine_bytes_have_numbers_of_their_own(chapter):
    text = np.array([[130] * 9, [130] * 8 + [129], [0] * 9], dtype=np.uint64)
    found = chapter["codes"](text, 9)[:, 0].tolist()
    assert found == [131**9 - 1, 131**9 - 2, 0]


def test_the_last_symbols_are_counted(chapter):
    data = np.random.default_rng(0).integers(6, size=40)
    found = chapter["count_last"](data, 8, 6)
    assert len(found) == 39
    for i in range(1, 40):
        past = data[max(0, i - 8) : i].tolist()
        shares = [(past.count(s) + 5 / 6) / (len(past) + 5) for s in range(6)]
        assert sum(shares) == pytest.approx(1)
        assert found[i - 1] == pytest.approx(shares[data[i]])


def test_windows_are_one_token_apart(chapter):
    ids = torch.arange(100)
    for inputs, targets in chapter["windows"](ids, 8, 50, 20, seed=1):
        assert inputs.shape == targets.shape == (50, 8)
        assert (targets == inputs + 1).all() and targets.max() < 100
    starts = [x[:, 0] for x, _ in chapter["windows"](ids, 8, 500, 4)]
    assert torch.cat(starts).unique().tolist() == list(range(92))


@pytest.mark.parametrize("length", [2, 5, 8, 9, 12, 13, 100])
def test_each_token_is_judged_once_with_the_longest_past(chapter, length):
    torch.manual_seed(0)
    model = chapter["GPT"](20, 8, 16, 1, 2)
    torch.nn.init.normal_(model.embed.weight)
    ids = torch.randint(20, (length,), generator=generator())
    found = chapter["token_bits"](model, ids, context=8, batch=3)
    assert len(found) == length - 1
    with torch.inference_mode():
        for i in range(1, length):
            start = 0 if i <= 8 else (i - 5) // 4 * 4
            logits = model(ids[None, start:i])[0, -1]
            bits = -logits.log_softmax(0)[ids[i]].item() / math.log(2)
            assert found[i - 1].item() == pytest.approx(bits, abs=1e-4)
    total = chapter["bits_per_byte"](model, ids, 7, context=8)
    assert total == pytest.approx(found.sum().item() / 7, rel=1e-5)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_top_k_is_that_of_transformers(chapter, k):
    logits = randn(20, 40)
    assert chapter["top_k"](logits, k).equal(TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.8, 0.99])
def test_top_p_is_that_of_transformers(chapter, p):
    logits = 3 * randn(20, 40)
    found = chapter["top_p"](logits, p)
    assert found.equal(TopPLogitsWarper(p)(None, logits))
    assert (found == logits).any(dim=1).all()


def test_samples_follow_the_probabilities(chapter):
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().expand(20_000, 5)
    drawn = chapter["sample"](logits, generator(), temperature=0.5, p=0.8)
    shares = drawn.flatten().bincount(minlength=5) / 20_000
    expected = torch.tensor([0, 0.16, 0, 0.09, 0]) / 0.25
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    assert chapter["sample"](logits[0], generator(), k=1).tolist() == [1]
    assert chapter["sample"](logits, generator(), temperature=0).eq(1).all()


def test_the_works_come_out_of_both_files(chapter):
    """The repository's, framed and typographic, and Project Gutenberg's own form."""
    text = (NOTEBOOKS / "data/shakespeare.txt").read_text()
    works = chapter["read_plays"](text)
    assert len(works) == 42
    assert sum(map(len, works.values())) > 0.999 * len(text)
    assert all(work.isascii() for work in works.values())
    fit, held = chapter["split_plays"](works)
    assert len(fit) == 39
    heads = [play.split("\n")[0] for play in held]
    assert heads == ["MACBETH", "THE TEMPEST", "TWELFTH NIGHT; OR, WHAT YOU WILL"]
    start, end = "*** START OF THE EBOOK ***\n", "\n*** END OF THE EBOOK ***\nTerms"
    framed = f"About\n{start}{text}{end}".replace("'", "\u2019")
    assert chapter["read_plays"](framed) == works
    listed = "".join(f"    {title}\n" for title in works)
    parts = [
        f"{title.replace(';', ':')}\n\n\n\nContents\n\nACT I\n\n{work[100:2000]}"
        for title, work in works.items()
    ]
    joined = "\n\n\n".join(parts).replace("by William Shakespeare", "")
    title = "The Complete Works\n\nby William Shakespeare\n\n\n    Contents\n\n"
    found = chapter["read_plays"](f"{start}{title}{listed}\n\n\n{joined}{end}")
    assert len(found) == 42
    assert len(chapter["split_plays"](found)[1]) == 3

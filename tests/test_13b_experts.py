"""Chapter 13b: experts against a plain formula, Llamas as transformers writes them."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from notebooks import NOTEBOOKS, load_definitions

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

PATH = NOTEBOOKS / "13b_experts_and_other_llamas.ipynb"
NAMES = """
    Cache CausalAttention Config Decoder DecoderLayer Experts FeedForward RMSNorm SIZES
    balance config_of_folder count halved has_and_meets interleaved
    join_heads load_safetensors make_norm our_tensors pair_speeds rotary save_for_hub
    small split_heads with_experts
""".split()
CHAPTER = load_definitions(PATH, *NAMES)


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def library_model(seed: int = 0, **changes) -> transformers.LlamaForCausalLM:
    """A small Llama of the library with random numbers everywhere."""
    shape = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 6}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def ids() -> torch.Tensor:
    return torch.randint(61, (2, 32), generator=torch.Generator().manual_seed(0))


# Llamas


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_a_llama_that_the_library_saved_has_its_logits(tmp_path, tied, base):
    theirs = library_model(tie_word_embeddings=tied, rope_theta=base, rms_norm_eps=1e-3)
    theirs.save_pretrained(tmp_path)
    ours = define("load_safetensors")(tmp_path)
    assert (ours.c.tied, ours.c.base, ours.c.eps) == (tied, base, 1e-3)
    with torch.inference_mode():
        wanted = theirs(ids()).logits
        off = (ours(ids()) - wanted).abs().max() / wanted.abs().max()
    assert off < 1e-5


def test_several_files_and_other_types_are_read(tmp_path):
    stored = library_model(num_key_value_heads=6).bfloat16()
    stored.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = define("load_safetensors")(str(tmp_path))
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        wanted = theirs(ids()).logits
        assert (ours(ids()) - wanted).abs().max() / wanted.abs().max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_the_library_reads_what_we_write(tmp_path, tied):
    torch.manual_seed(0)
    ours = define("Decoder")(replace(define("small"), tied=tied)).eval()
    define("save_for_hub")(ours, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        wanted = theirs(ids()).logits
        assert (ours(ids()) - wanted).abs().max() / wanted.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "is a mistral, not a Llama"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "positions are stretched"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "stretched"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "another activation"),
        ({"head_dim": 16}, "heads of another size"),
    ],
)
def test_what_is_no_plain_llama_is_refused(tmp_path, change, message):
    library_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    at = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(at | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        define("load_safetensors")(tmp_path)


def stored_again(folder, change) -> None:
    """Store a small Llama in a folder, and once more after a change of its tensors."""
    library_model().save_pretrained(folder)
    path = folder / "model.safetensors"
    state = {name: value.clone() for name, value in safetensors.load_file(path).items()}
    change(state)
    safetensors.save_file(state, path, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(tmp_path):
    stored_again(tmp_path, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    message = r"missing \['layers.1.mlp.up_proj.weight'\], unknown \[\]$"
    with pytest.raises(ValueError, match=message) as error:
        define("load_safetensors")(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.self_attn.q_proj.bias", [24]),
        ("layers.0.self_attn.k_proj.weight_scale", [1]),  # as float8 models have
        ("layers.1.mlp.down_proj.weight_scale", []),
        ("layers.2.self_attn.q_proj.weight", [24, 24]),  # a layer too many
        ("layers.0.self_attn.q_proj.lora_A.weight", [7, 24]),
    ],
)
def test_an_unknown_tensor_is_named(tmp_path, name, shape):
    added = {f"model.{name}": torch.ones(shape)}
    stored_again(tmp_path, lambda state: state.update(added))
    with pytest.raises(ValueError, match=rf"missing \[\], unknown \['{name}'\]$"):
        define("load_safetensors")(tmp_path)


def test_a_tensor_of_another_size_is_no_silent_change(tmp_path):
    added = {"model.norm.weight": torch.ones(25)}
    stored_again(tmp_path, lambda state: state.update(added))
    with pytest.raises(RuntimeError, match="size mismatch for norm.weight"):
        define("load_safetensors")(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_computed_or_stored_twice_is_left_out(tmp_path, tied):
    theirs = library_model(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = safetensors.load_file(path)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    state["lm_head.weight"] = theirs.lm_head.weight.detach().clone()
    safetensors.save_file(state, tmp_path / "again.safetensors")
    path.unlink()
    ours = define("load_safetensors")(tmp_path)
    with torch.inference_mode():
        wanted = theirs(ids()).logits
        assert (ours(ids()) - wanted).abs().max() / wanted.abs().max() < 1e-5


def test_an_old_configuration_has_as_many_keys_as_queries(tmp_path):
    theirs = library_model(num_key_value_heads=6)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    at = json.loads(path.read_text(encoding="utf-8"))
    del at["num_key_value_heads"]
    path.write_text(json.dumps(at), encoding="utf-8")
    ours = define("load_safetensors")(tmp_path)
    with torch.inference_mode():
        wanted = theirs(ids()).logits
        assert (ours(ids()) - wanted).abs().max() / wanted.abs().max() < 1e-5


def test_the_numbers_are_a_copy_that_can_learn(tmp_path):
    library_model().save_pretrained(tmp_path)
    ours = define("load_safetensors")(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    ours(ids()).sum().backward()
    assert not ours.training
    for parameter in ours.parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None


@pytest.mark.parametrize("heads", [1, 3])
def test_the_two_orders_of_rows_are_inverse(heads):
    rows = torch.randn(heads * 8, 5)
    assert define("interleaved")(define("halved")(rows, heads), heads).equal(rows)
    first = define("halved")(rows, heads)[:4]
    assert first.equal(rows[:8:2])


# Experts


@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_with_gradients_by_the_plain_formula(k):
    torch.manual_seed(k)
    mixture = define("Experts")(define("small"), 4, k).double()
    results = []
    for plain in (False, True):
        x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0)).double()
        x.requires_grad_()
        if plain:
            probs = mixture.router(x).softmax(dim=-1)
            kept = torch.zeros_like(probs).scatter(-1, probs.topk(k).indices, 1.0)
            every = torch.stack([expert(x) for expert in mixture.experts], dim=-1)
            y = (every * (probs * kept)[..., None, :]).sum(dim=-1)
        else:
            y = mixture(x)
        mixture.zero_grad()
        y.square().sum().backward()
        grads = [parameter.grad.clone() for parameter in mixture.parameters()]
        results.append([y, x.grad, *grads])
    torch.testing.assert_close(*results)


def test_shares_and_their_loss():
    torch.manual_seed(0)
    mixture, x = define("Experts")(define("small"), 4, 2), torch.randn(3, 50, 48)
    mixture(x)
    probs = mixture.router(x).softmax(dim=-1).flatten(0, 1)
    used = F.one_hot(probs.topk(2).indices, 4).sum(dim=(0, 1)) / (150 * 2)
    torch.testing.assert_close(mixture.shares, used)
    wanted = define("balance")(used.tolist(), probs.mean(dim=0).tolist())
    assert abs(mixture.balance.item() - wanted) < 1e-5
    nn.init.zeros_(mixture.router.weight)
    nn.init.constant_(mixture.router.weight[1], 1.0)
    mixture(x.abs() + 10)
    assert abs(mixture.balance.item() - 2) < 0.01  # half of the slots, all probability


def test_a_model_is_copied_once_its_balance_is_gone():
    mixture = define("Experts")(define("small"), 4)
    mixture(torch.randn(1, 5, 48)).sum().backward()
    mixture.balance = None
    copied = copy.deepcopy(mixture)
    assert copied.router.weight.equal(mixture.router.weight)


def test_an_expert_without_tokens_is_no_error():
    mixture = define("Experts")(define("small"), 4)
    nn.init.zeros_(mixture.router.weight)
    mixture(torch.randn(1, 5, 48)).sum().backward()
    assert mixture.shares.max() == 1


@pytest.mark.parametrize("k", [1, 2])
def test_what_a_model_has_and_meets(k):
    model = define("with_experts")(4, k)
    has, meets = define("has_and_meets")(model.c, 4, k)
    assert has == sum(p.numel() for p in model.parameters())
    resting = (4 - k) * sum(
        p.numel() for p in model.layers[0].mlp.experts[0].parameters()
    )
    assert has - meets == len(model.layers) * resting

"""Chapter 11: encoder against PyTorch's, training helpers, calibration, IMDB's path."""

import hashlib
import io
import math
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from notebooks import NOTEBOOKS, code_cells, load_definitions, section

PATH = NOTEBOOKS / "11_transformer_classifier.ipynb"
NAMES = [
    "BagOfVectors",
    "Classifier",
    "Encoder",
    "EncoderLayer",
    "MultiHeadAttention",
    "PAD",
    "Part",
    "RECIPE",
    "Vocab",
    "accuracy",
    "batches",
    "bins",
    "both_ways",
    "calibration_error",
    "check",
    "drop_words",
    "every_deletion",
    "library_encoder",
    "make_optimizer",
    "make_part",
    "mixed",
    "normed_product",
    "predict",
    "rate",
    "rotate",
    "shuffled",
    "temperature",
    "tfidf_scores",
    "thin",
    "tokenize",
    "train",
    "update",
    "word_scores",
]


def fresh() -> dict:
    """The chapter's definitions, on the CPU."""
    space = load_definitions(PATH, *NAMES)
    space["device"] = torch.device("cpu")
    return space


CHAPTER = fresh()


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_part(n: int = 30, longest: int = 9, words: int = 20, seed: int = 0):
    """Random texts of 1 to `longest` words, the label is whether word 2 occurs."""
    g = generator(seed)
    ids = torch.randint(2, words, (n, longest), generator=g)
    lengths = torch.randint(1, longest + 1, (n, 1), generator=g)
    ids = ids.masked_fill(torch.arange(longest) >= lengths, 0)
    return define("Part")(ids, (ids == 2).any(dim=1).long())


def classifier(**changes):
    torch.manual_seed(0)
    model = define("Classifier")(20, (2, 16, 4, 32), **changes)
    for parameter in model.parameters():  # away from the small start
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


# The encoder


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_agrees_with_pytorch(heads):
    torch.manual_seed(0)
    ours, theirs = (
        define("MultiHeadAttention")(16, heads),
        nn.MultiheadAttention(16, heads, batch_first=True),
    )
    ours.load_state_dict(theirs.state_dict())
    x, real = torch.randn(3, 7, 16), torch.arange(7) < torch.tensor([[7], [3], [1]])
    out, weights = ours(x, real[:, None, None])
    expected, expected_weights = theirs(
        x, x, x, key_padding_mask=~real, average_attn_weights=False
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-4)
    assert weights.shape == (3, heads, 7, 7)
    assert weights[1, :, :, 3:].abs().max() == 0


def test_attention_accepts_a_causal_mask_and_none():
    torch.manual_seed(0)
    attention, x = define("MultiHeadAttention")(8, 2), torch.randn(2, 5, 8)
    causal = torch.ones(5, 5).tril().bool()
    weights = attention(x, causal)[1]
    assert weights.triu(1).abs().max() == 0
    everything = torch.ones(5, 5).bool()
    assert torch.equal(attention(x)[0], attention(x, everything)[0])


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_and_its_gradients_agree_with_pytorch(norm_first):
    torch.manual_seed(0)
    ours = define("Encoder")(2, 16, 4, 32, 0.0, norm_first)
    theirs = define("library_encoder")(2, 16, 4, 32, norm_first)
    ours.load_state_dict(theirs.state_dict())
    x, real = (
        torch.randn(4, 6, 16),
        torch.arange(6) < torch.tensor([[6], [2], [1], [5]]),
    )
    for mode in (True, False):
        a = ours.train(mode)(x, real[:, None, None])[0][real]
        b = theirs.train(mode)(x, src_key_padding_mask=~real)[real]
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    a.square().sum().backward()
    theirs.train()(x, src_key_padding_mask=~real)[real].square().sum().backward()
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, p), (other, q) in pairs:
        assert name == other
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3)


# The classifier


def test_a_text_gets_the_same_answer_alone_and_in_a_batch():
    model, part = classifier(), some_part()
    together = model(part.ids)
    for row, expected in zip(part.ids, together, strict=True):
        alone = model(row[None, : (row != 0).sum()])[0]
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("places", [0, 9])
def test_only_positions_see_the_order(places):
    model = classifier(places=places)
    ids = torch.randint(2, 20, (20, 9), generator=generator())
    same = torch.allclose(model(ids), model(ids.flip(1)), atol=1e-4)
    assert same == (places == 0)


def test_a_bag_of_vectors_ignores_padding_and_order():
    torch.manual_seed(0)
    bag, ids = define("BagOfVectors")(20), torch.tensor([[5, 3, 4], [4, 5, 3]])
    torch.testing.assert_close(bag(ids)[0], bag(ids)[1])
    padded = torch.nn.functional.pad(ids, (0, 4))
    torch.testing.assert_close(bag(padded), bag(ids))


def test_predictions_keep_the_order_of_the_texts():
    model, part = classifier(), some_part(50)
    torch.testing.assert_close(
        define("predict")(model, part.ids, size=7), model(part.ids).detach()
    )


def test_heads_must_divide_the_size():
    with pytest.raises(ValueError, match="dim 10 is not divisible by 3 heads"):
        define("Encoder")(1, 10, 3, 20)


# Data

DATA = NOTEBOOKS / "data"
FILES = ("shakespeare.txt", "movieReviewSnippets_GroundTruth.txt")


def read_data(folder) -> dict:
    """Run the cells that read the data, from a folder of the reader's own."""
    space = load_definitions(PATH, "check_data", "fetch", "read_lines")
    space |= {"DATA_DIR": str(folder), "DATASET": "movies"}
    for cell in code_cells(PATH):
        if "data" in cell.tags:
            exec(cell.source, space)
    return space


@pytest.fixture
def originals(tmp_path, monkeypatch):
    """The folder ~/bookdata with the originals of both texts."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    folder = tmp_path / "bookdata"
    folder.mkdir()
    for name in FILES:
        text = (DATA / name).read_text(encoding="utf-8")
        if name == "shakespeare.txt":
            text = f"About\n*** START OF IT ***\n{text}\n*** END OF IT ***\nTerms"
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_readers_own_folder_is_found(originals):
    space = read_data("~/bookdata")
    assert len(space["lines"]) > 50_000 and len(space["reviews"]) == 10_041


@pytest.mark.parametrize("file", FILES)
def test_a_text_that_was_cut_off_is_named(originals, file):
    whole = (originals / file).read_bytes()
    (originals / file).write_bytes(whole[: int(0.7 * len(whole))])
    with pytest.raises(RuntimeError, match=f"{file} is cut off: delete it"):
        read_data(originals)


# Words and batches


def test_vocabulary_by_frequency_with_unknown_and_empty_texts():
    texts = [["a", "b", "a"], ["a", "b", "c"]]
    assert define("Vocab")(texts).words == ["<pad>", "<unk>", "a", "b", "c"]
    vocab = define("Vocab")(texts, min_freq=2)
    assert vocab.encode(["b", "c", "z"]) == [3, 1, 1] and vocab.encode([]) == [1]
    assert len(define("Vocab")(texts, max_size=3)) == 3
    with pytest.raises(ValueError, match="max_size 1 has no room for 2 special"):
        define("Vocab")(texts, max_size=1)


def test_what_looks_like_a_special_token_is_a_word():
    vocab = define("Vocab")([["a", "b"]])
    assert vocab.encode(["<pad>", "a", "<unk>"]) == [1, 2, 1]
    part = define("make_part")([define("tokenize")("<pad> <pad>")], [0], vocab)
    assert classifier()(part.ids).isfinite().all()
    vocab = define("Vocab")([["a", "<pad>", "<pad>"]])
    assert vocab.encode(["<pad>", "a"]) == [2, 3] and vocab.words[2] == "<pad>"


def test_a_part_is_padded_and_cut():
    vocab = define("Vocab")([["a", "b"]])
    part = define("make_part")([["a"], ["b", "a", "b", "b"], []], [0, 1, 0], vocab, 3)
    assert part.ids.tolist() == [[2, 0, 0], [3, 2, 3], [1, 0, 0]]
    assert part.labels.tolist() == [0, 1, 0]


def test_tokens():
    assert define("tokenize")('It\'s GOOD; "well-made", café!') == [
        *("it", "'", "s", "good", "well-made", ",", "café", "!")
    ]
    assert define("tokenize")(" \n") == []


def test_pairs_hold_the_same_words_in_another_order():
    lines = [("a", "b", "c"), ("a", "a", "b")] * 50
    texts, labels = define("both_ways")(lines, generator())
    assert labels == [1, 0] * 100 and texts[0::2] == lines
    for written, other in zip(texts[0::2], texts[1::2], strict=True):
        assert sorted(written) == sorted(other) and written != other


@pytest.mark.parametrize("words", [(), ("a",), ("a", "a")])
def test_words_without_another_order_are_refused(words):
    with pytest.raises(ValueError, match="no other order"):
        define("shuffled")(words, generator())


@pytest.mark.parametrize(("have", "want"), [(10, 3), (10, 10), (3, 10)])
def test_thin(have, want):
    kept = define("thin")(list(range(have)), want)
    assert len(kept) == min(have, want) and kept == sorted(set(kept))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_batches_hold_every_text_once_and_no_needless_padding(size):
    part = some_part(41)
    seen = []
    for ids, labels in define("batches")(part, size, generator()):
        assert len(ids) <= size and (ids != 0).any(dim=0).all()
        assert labels.equal((ids == 2).any(dim=1).long())
        seen += [tuple(row[row != 0].tolist()) for row in ids]
    expected = [tuple(row[row != 0].tolist()) for row in part.ids]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_dropped_words_are_unknown_and_padding_stays(share):
    ids = some_part(400).ids
    new = define("drop_words")(ids, share, generator())
    assert new.eq(0).equal(ids.eq(0)) and (new[new != ids] == 1).all()
    dropped = (new == 1).sum() / (ids != 0).sum()
    assert abs(dropped - share) < 0.05


# Training


@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_the_rate_rises_and_falls(warmup):
    rates = [define("rate")(step, 100, warmup) for step in range(101)]
    assert max(rates) == pytest.approx(1, abs=0.06) and rates[-1] == 0
    assert min(rates[:-1]) > 0
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_rate_stays_at_its_end():
    assert [define("rate")(step, 10, 3) for step in (9, 10, 11, 1000)][1:] == [0] * 3


def test_update_reports_the_norm_and_clips_it():
    layer = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    loss = layer(torch.tensor([[3.0, 0.0, 4.0]])).sum()
    assert define("update")(layer, loss, optimizer, 1.0) == pytest.approx(5)
    moved = (before - layer.weight.detach()).norm()
    assert moved.item() == pytest.approx(1, abs=1e-4)


def test_training_learns_and_keeps_the_best_weights():
    train_part, valid = some_part(400), some_part(200, seed=1)
    torch.manual_seed(0)
    model = define("Classifier")(20, dropout=(0.0, 0.0))
    records = define("train")(
        model, train_part, valid, 6, 0, size=64, words=0.0, warmup=5
    )
    best = max(record["accuracy"] for record in records)
    assert define("accuracy")(model, valid) == pytest.approx(best) and best > 0.8
    assert len(records) == 6 and set(records[0]) == {"norms", "loss", "accuracy"}
    assert [len(record["norms"]) for record in records] == [7] * 6


def test_a_misspelt_setting_is_named():
    with pytest.raises(TypeError, match=r"not in RECIPE: \['warm_up'\]"):
        define("train")(classifier(), some_part(), some_part(), 1, 0, warm_up=3)


# Words that matter, calibration, exercises


def test_deletions_agree_with_deleting_by_hand():
    model, ids = classifier(), torch.tensor([[4, 7, 2, 9]])
    changes = define("every_deletion")(model, ids)
    probs = model(ids).softmax(dim=1)[0]
    for place, change in enumerate(changes):
        rest = [ids[0, i].item() for i in range(4) if i != place]
        new = model(torch.tensor([rest])).softmax(dim=1)[0]
        assert change.item() == pytest.approx(
            abs(new - probs)[probs.argmax()].item(), abs=1e-5
        )


def test_a_text_of_one_word_has_none_to_delete():
    with pytest.raises(ValueError, match="one word"):
        define("every_deletion")(classifier(), torch.tensor([[4]]))


def test_scores_of_words_agree_with_finite_differences():
    model, ids = classifier().double(), torch.tensor([[4, 7, 2, 9]])
    attended, product, integral = define("word_scores")(model, ids)
    assert attended.sum().item() == pytest.approx(1)
    x, real = model.vectors(ids).detach(), ids != 0
    top = model(ids).argmax().item()
    for place in range(4):
        scale = torch.ones(1, 4, 1, dtype=torch.float64)
        ends = []
        for step in (1e-5, -1e-5):
            scale[0, place] = 1 + step
            ends.append(model.classify(x * scale, real)[0, top].item())
        slope = (ends[0] - ends[1]) / 2e-5
        assert product[place].item() == pytest.approx(slope, abs=1e-5)
    assert integral.shape == (4,)


def test_integrated_gradients_of_a_linear_model_are_exact():
    """Where logits are linear in the vectors, the shares are the steps times slope."""
    model, ids = classifier().double(), torch.tensor([[4, 1, 2, 9]])
    slope = torch.randn(2, 16, dtype=torch.float64, generator=generator(1))
    linear = model.classify

    def classify(x, real):
        linear(x, real)  # leaves the attention weights
        return x.sum(dim=1) @ slope.T

    model.classify = classify
    integral = define("word_scores")(model, ids)[2]
    x = model.vectors(ids)
    answer = (x.sum(dim=1) @ slope.T).argmax()
    start = model.vectors(torch.full_like(ids, 1))
    expected = ((x - start)[0] @ slope[answer]).detach()
    torch.testing.assert_close(integral, expected)
    assert expected.min() < 0 < expected.max(), "scores have a sign"
    assert integral[1] == 0, "an unknown word carries nothing"


def test_the_product_behind_the_norm_agrees_with_finite_differences():
    model, ids = classifier().double(), torch.tensor([[4, 7, 2, 9]])
    product = define("normed_product")(model, ids)
    top = model(ids).argmax().item()
    for place in range(4):
        ends = []
        for step in (1e-5, -1e-5):
            scale = torch.ones(1, 4, 1, dtype=torch.float64)
            scale[0, place] += step
            hook = model.encoder.layers[0].norm1.register_forward_hook(
                lambda module, inputs, output, scale=scale: output * scale
            )
            ends.append(model(ids)[0, top].item())
            hook.remove()
        slope = (ends[0] - ends[1]) / 2e-5
        assert product[place].item() == pytest.approx(slope, abs=1e-5)
    assert not model.encoder.layers[0].norm1._forward_hooks


def test_mixing_keeps_words_and_padding():
    ids = some_part(100).ids
    new = define("mixed")(ids, generator())
    assert new.eq(0).equal(ids.eq(0)) and not new.equal(ids)
    assert new.sort(dim=1).values.equal(ids.sort(dim=1).values)


def test_ties_on_validation_are_not_broken_by_the_test_part():
    texts = ["good film", "bad film", "good", "bad"] * 5
    labels = [1, 0, 1, 0] * 5
    parts = [(texts, labels), (["good", "bad"], [1, 0]), (["bad", "good"], [1, 0])]
    assert define("tfidf_scores")(parts) == (1.0, 0.0)
    parts[1] = (["nothing"], [0])
    assert len(define("tfidf_scores")(parts, pairs=True)) == 2


def test_calibration_error_of_known_cases():
    sure = torch.tensor([[0.0, 50.0]] * 10)
    labels = torch.tensor([1] * 7 + [0] * 3)
    assert define("calibration_error")(sure, labels) == pytest.approx(0.3, abs=1e-5)
    modest = torch.tensor([[0.0, math.log(7 / 3)]] * 10)
    assert define("calibration_error")(modest, labels) == pytest.approx(0, abs=1e-5)
    assert sum(share for share, _, _ in define("bins")(modest, labels)) == 1


@pytest.mark.parametrize("function", ["bins", "calibration_error", "temperature"])
def test_logits_must_be_numbers(function):
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])
    with pytest.raises(ValueError, match="nan"):
        define(function)(logits, torch.tensor([1, 0]))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_factor(factor):
    logits = torch.randn(20_000, 2, generator=generator()) * 2
    probs = logits.softmax(dim=1)[:, 1]
    labels = (torch.rand(len(probs), generator=generator(1)) < probs).long()
    found = define("temperature")(logits * factor, labels)
    assert found == pytest.approx(factor, rel=0.08)


def test_rotation_is_a_product_of_complex_numbers():
    x = torch.randn(6, 8, generator=generator(), dtype=torch.float64)
    rates = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.arange(6, dtype=torch.float64)[:, None] * rates
    turned = torch.view_as_complex(x.view(6, 4, 2)) * torch.exp(1j * angles)
    expected = torch.view_as_real(turned).flatten(1)
    torch.testing.assert_close(define("rotate")(x), expected)


def test_an_odd_number_of_features_cannot_be_turned():
    with pytest.raises(ValueError, match="dim 7 is not divisible by 2"):
        define("rotate")(torch.ones(3, 7))


def test_the_cell_on_missing_masks_may_be_run_twice(capsys):
    (cell,) = [c.source for c in code_cells(PATH) if "flips = []" in c.source]
    cell = cell.split("\nassert")[0]  # the claim is about other networks
    split = SimpleNamespace(parts=[None, None, some_part()])
    space = fresh() | load_definitions(PATH, "with_mask", "PAD")
    space["runs"] = [{"split": split, "model": classifier()}] * 2
    exec(cell, space)
    exec(cell, space)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


# The article's set-up, with a stand-in in the layout of the original


@pytest.fixture
def imdb(tmp_path, serve):
    """Serve a small archive in IMDB's layout: its address, its sum, the files asked."""
    archive = tmp_path / "served" / "aclImdb_v1.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for part in ("train", "test"):
            for side, word in (("neg", "dreadful"), ("pos", "wonderful")):
                for i in range(40):
                    text = f"A {word} film.<br /><br />Number {i}, {word} café!"
                    data = text.encode()
                    info = tarfile.TarInfo(f"aclImdb/{part}/{side}/{i}_7.txt")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    if i == 0:  # as macOS puts beside a file
                        info.name = f"aclImdb/{part}/{side}/._0_7.txt"
                        tar.addfile(info, io.BytesIO(data))
    url, asked = serve(archive.parent)
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    return url, md5, asked


def run_section(space: dict, server: str, md5: str) -> None:
    """Run the cells of the article's set-up with another address and sum."""
    for source in section(PATH, "11.10", "11.11"):
        source = re.sub(r"https?://[^\s\"']*/", server, source)
        source = source.replace("7c2ac02c03563afcf9b574c7e56c153a", md5)
        source = source.replace("25_000", "80")
        exec(compile(source, PATH.name, "exec"), space)


def test_the_articles_path_reads_imdb_and_trains(tmp_path, imdb, capsys, monkeypatch):
    server, md5, asked = imdb
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    space = fresh() | {"SEED": 0, "DATASET": "imdb", "IMDB_EPOCHS": 2}
    space["DATA_DIR"] = "~/data"
    run_section(space, server, md5)
    assert set(asked) == {"aclImdb_v1.tar.gz"}
    asked.clear()
    out = capsys.readouterr().out
    assert "80 reviews to train 80 reviews to test" in out and "test accuracy" in out
    texts, labels = space["imdb"]["test"]
    assert labels == [0] * 40 + [1] * 40
    assert "dreadful" in texts[0] and "wonderful" in texts[-1]
    assert "<br" not in " ".join(space["tokenize"](texts[0])) and "café" in texts[0]
    sizes = [len(part.labels) for part in space["imdb_parts"]]
    assert sizes == [72, 8]
    shape = space["imdb_model"].encoder.layers[0].linear1.weight.shape
    assert shape == (512, 128) and len(space["imdb_model"].encoder.layers) == 2
    run_section(space, server, md5)
    assert not asked, "what is there is not downloaded again"
    Path(tmp_path, "data/aclImdb/train/pos/3_7.txt").unlink()
    with pytest.raises(RuntimeError, match="train has 79 of 80 reviews: delete"):
        run_section(space, server, md5)


def test_a_damaged_archive_is_refused(tmp_path, imdb):
    server, _, _ = imdb
    space = fresh() | {"SEED": 0, "DATASET": "imdb", "DATA_DIR": str(tmp_path / "data")}
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        run_section(space, server, "0" * 32)


def test_an_empty_folder_is_named(tmp_path):
    read = load_definitions(PATH, "read_imdb")["read_imdb"]
    with pytest.raises(RuntimeError, match="has 0 of 25000 reviews: delete"):
        read(tmp_path, "train", 25_000)


def test_the_articles_path_is_skipped_aloud(tmp_path, imdb, capsys):
    space = fresh() | {"SEED": 0, "DATASET": "movies", "DATA_DIR": str(tmp_path / "d")}
    run_section(space, imdb[0], imdb[1])
    assert capsys.readouterr().out.count("skipped: DATASET is movies") == 2
    assert not imdb[2] and not (tmp_path / "d").exists()


# The chapter says that it uses what chapters 9 and 10 derive


def test_the_tokeniser_is_chapter_9s():
    theirs = load_definitions(
        NOTEBOOKS / "09_text_to_tensors.ipynb", "MARKS", "tokenize"
    )
    text = (NOTEBOOKS / "data" / "movieReviewSnippets_GroundTruth.txt").read_text(
        "utf-8"
    )
    for sentence in text.splitlines():
        assert define("tokenize")(sentence) == theirs["tokenize"](sentence)


def test_attention_is_chapter_10s():
    names = ("HeadProjections", "MultiHeadAttention", "attention")
    names += ("split_heads", "join_heads")
    chapter = load_definitions(NOTEBOOKS / "10_attention.ipynb", *names)
    theirs = chapter["MultiHeadAttention"](8, 2)
    ours = define("MultiHeadAttention")(8, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 8, generator=generator())
    mask = (torch.arange(5) < torch.tensor([[5], [3], [1]]))[:, None, None]
    wanted = theirs(x, mask), theirs.weights(x, mask)
    for got, want in zip(ours(x, mask), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)

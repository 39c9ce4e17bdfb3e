"""Chapter 11b: hidden words, counts of neighbours, calibration, IMDB's path."""

import hashlib
import io
import math
import re
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

from notebooks import NOTEBOOKS, generator, load_definitions, section

PATH = NOTEBOOKS / "11b_pretraining_and_calibration.ipynb"
NAMES = """
    Classifier Encoder EncoderLayer HeadProjections KNOWN MARKS MAX_LEN MaskedWords
    MultiHeadAttention SETTINGS TextEncoder UNK Vocab accuracy attention bins
    bucket_batches by_chance by_neighbours calibration_error count_pairs
    equal_bins_error fit_labels half_shuffled hide imdb_pretrained join_heads learn
    pair_counts pair_odds predict pretrain read_imdb right split_heads start surest_half
    temperature to_ids tokenize train warmup_cosine words_and_pairs
""".split()


def fresh() -> dict:
    """The notebook's definitions, on the processor."""
    space = load_definitions(PATH, *NAMES, "PAD")
    space |= {"device": torch.device("cpu"), "SEED": 0}
    return space


CHAPTER = fresh()


def define(name):
    """A definition of the notebook."""
    return CHAPTER[name]


def some_ids(n: int = 30, longest: int = 9, words: int = 20, seed: int = 0):
    """Random texts of 1 to `longest` words, padded with 0."""
    ids = torch.randint(1, words, (n, longest), generator=generator(seed))
    lengths = torch.randint(1, longest + 1, (n, 1), generator=generator(seed + 1))
    return ids.masked_fill(torch.arange(longest) >= lengths, 0)


# Hidden words


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_only_known_words_are_hidden_and_can_be_put_back(share):
    ids = some_ids(400)
    hidden, words = define("hide")(ids, 20, 12, share, generator())
    at = hidden == 20
    assert hidden[~at].equal(ids[~at]) and words.equal(ids[at])
    assert ((words > 1) & (words < 12)).all()
    could = ((ids > 1) & (ids < 12)).sum()
    assert abs(len(words) / could - share) < 0.05


def guesser(known: int = 12):
    torch.manual_seed(0)
    body = define("Classifier")(21, 9, (1, 8, 2, 16))
    return define("MaskedWords")(body, torch.full((known,), 1 / known)).eval()


def test_each_mask_gets_its_own_logits_in_the_order_of_the_places():
    model, ids = guesser(), some_ids()
    hidden, words = define("hide")(ids, 20, 12, 0.4, generator())
    logits = model(hidden)
    assert logits.shape == (len(words), 12)
    states, seen = model.body.encode(hidden), 0
    for row, place in (hidden == 20).nonzero().tolist():
        expected = model.body.embed.weight[:12] @ states[row, place] + model.bias
        torch.testing.assert_close(logits[seen], expected)
        seen += 1
    together = define("predict")(model, hidden, batch_size=7)
    torch.testing.assert_close(together, logits.detach(), atol=1e-5, rtol=1e-4)


def test_the_table_serves_twice():
    model, ids = guesser(), some_ids()
    hidden, words = define("hide")(ids, 20, 12, 0.4, generator())
    nn.functional.cross_entropy(model(hidden), words).backward()
    names = [name for name, _ in model.named_parameters()]
    assert sum("embed" in name for name in names) == 1
    assert model.body.embed.weight.grad[:12].abs().sum(dim=1).gt(0).all()


def test_pretraining_learns_a_word_that_follows_from_its_neighbour():
    """Word 2 + i is always followed by word 7 + i."""
    first = torch.randint(2, 7, (600, 1), generator=generator())
    raw = torch.cat([first, first + 5], dim=1)
    model = guesser()
    losses = define("pretrain")(model, raw, 25, 0)
    assert len(losses) == 25 * 10
    hidden = raw.clone()
    hidden[:, 1] = 20
    assert define("accuracy")(model, hidden, raw[:, 1]) > 0.95


# The counts of neighbours


def neighbours(raw: torch.Tensor, masked: torch.Tensor, known: int, k: float):
    """The notebook's counts and logits for other texts."""
    space = fresh()  # what the functions see as well
    space |= {"MASK": 20, "KNOWN": known}
    between = nn.functional.pad(raw, (1, 1))
    space["after"] = space["pair_counts"](between[:, :-2], raw)
    space["before"] = space["pair_counts"](between[:, 2:], raw)
    share = space["after"].sum(dim=0) + 1e-3
    space["frequency"] = share / share.sum()
    return space["by_neighbours"](masked, k), space


def test_counts_of_neighbours_agree_with_counting_one_by_one():
    raw = some_ids(60)
    masked, words = define("hide")(raw, 20, 12, 0.3, generator())
    logits, space = neighbours(raw, masked, 12, 5.0)
    assert logits.shape == (len(words), 12)
    row, place = (masked == 20).nonzero()[3].tolist()
    around = nn.functional.pad(masked, (1, 1))[row]
    texts = [[0, *[i for i in text if i], 0] for text in raw.tolist()]
    expected = torch.zeros(12)
    for side, given in ((0, around[place]), (1, around[place + 2])):
        counts = torch.zeros(12)
        for text in texts:
            for a, b in zip(text, text[1:], strict=False):
                beside, word = (a, b) if side == 0 else (b, a)
                if beside == given and 1 < word < 12:
                    counts[word] += 1
        smooth = (counts + 5 * space["frequency"]) / (counts.sum() + 5)
        expected += smooth.log()
    expected -= space["frequency"].log()
    torch.testing.assert_close(logits[3], expected, atol=1e-4, rtol=1e-4)


def test_pair_odds_agree_with_adding_up_the_words():
    raw = some_ids(60)
    _, space = neighbours(raw, raw, 12, 5.0)
    space |= {"best_k": 5.0}
    odds = space["pair_odds"](raw)
    expected = 0.0
    for before, word in zip([0, *raw[7].tolist()], raw[7].tolist(), strict=False):
        if 1 < word < 12:
            counts, share = space["after"][before], space["frequency"][word]
            smooth = (counts[word] + 5 * share) / (counts.sum() + 5)
            expected += math.log(smooth / share)
    assert odds.shape == (60,) and odds[7].item() == pytest.approx(expected, abs=1e-4)


# The questions


def test_half_of_the_texts_are_shuffled_and_keep_their_words():
    texts = [[f"{i}-{j}" for j in range(12)] for i in range(400)]
    mixed, labels = define("half_shuffled")(texts, generator())
    assert abs(labels.float().mean() - 0.5) < 0.1
    for text, new, label in zip(texts, mixed, labels.tolist(), strict=True):
        assert (new == text) == (label == 1) and sorted(new) == sorted(text)


def test_given_weights_are_taken_and_the_rest_is_fresh():
    space = fresh()
    start = space["start"]
    other = start(1, 30)
    kept = {k: v for k, v in other.state_dict().items() if not k.startswith("head")}
    model = start(0, 30, kept)
    for key, value in model.state_dict().items():
        assert value.equal(other.state_dict()[key]) == (not key.startswith("head")), key
    with pytest.raises(RuntimeError, match="misspelt"):
        start(0, 30, {"misspelt": torch.ones(1)})


def test_pairs_tell_orders_apart():
    texts = [["a", "b"], ["b", "a"]] * 10
    labels = torch.tensor([1, 0] * 10)
    logits, again = define("count_pairs")(texts, labels, texts[:2], [["c"]])
    assert logits.argmax(dim=1).tolist() == [1, 0] and again.shape == (1, 2)
    assert define("right")(logits, labels[:2]) == 1


# Calibration


def test_calibration_error_of_known_cases():
    sure = torch.tensor([[0.0, 50.0]] * 10)
    labels = torch.tensor([1] * 7 + [0] * 3)
    for function in ("calibration_error", "equal_bins_error"):
        assert define(function)(sure, labels) >= 0.3 - 1e-5
    assert define("calibration_error")(sure, labels) == pytest.approx(0.3, abs=1e-5)
    modest = torch.tensor([[0.0, math.log(7 / 3)]] * 10)
    assert define("calibration_error")(modest, labels) == pytest.approx(0, abs=1e-5)
    assert sum(share for share, _, _ in define("bins")(modest, labels)) == 1


def test_equal_bins_of_one_group_compare_the_means():
    logits = torch.randn(50, 2, generator=generator())
    labels = torch.randint(0, 2, (50,), generator=generator(1))
    confidence, guess = logits.softmax(dim=1).max(dim=1)
    gap = abs(confidence.mean() - (guess == labels).float().mean()).item()
    assert define("equal_bins_error")(logits, labels, 1) == pytest.approx(gap, abs=1e-5)


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


def test_chance_falls_with_the_square_root():
    logits = torch.randn(2000, 2, generator=generator())
    few, many = (
        define("by_chance")(logits, n, 200, generator()).mean() for n in (200, 3200)
    )
    assert few / many == pytest.approx(4, rel=0.15)


def test_the_surest_half_does_not_change_with_the_temperature():
    logits = torch.randn(101, 2, generator=generator(), dtype=torch.float64)
    half = define("surest_half")(logits)
    assert len(half) == 50 and half.equal(define("surest_half")(logits / 3))
    gaps = logits.diff(dim=1).abs()[:, 0]
    rest = [i for i in range(101) if i not in set(half.tolist())]
    assert gaps[half].min() >= gaps[rest].max()


# Data


def test_sentences_without_an_opinion_are_raw_text():
    space = load_definitions(
        PATH, "check_data", "fetch", "read_reviews", "tokenize", "MARKS"
    )
    space["DATA_DIR"] = str(NOTEBOOKS / "data")
    (source,) = [s for s in section(PATH, "11b.1", "11b.2") if "unclear = " in s]
    exec(source, space)
    assert len(space["sentences"]) == 10_041 and len(space["unclear"]) > 500
    assert not set(space["sentences"]) & set(space["unclear"])


def test_a_text_that_was_cut_off_is_named(tmp_path):
    name = "movieReviewSnippets_GroundTruth.txt"
    whole = (NOTEBOOKS / "data" / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(0.7 * len(whole))])
    space = load_definitions(PATH, "check_data", "fetch", "read_reviews")
    space["DATA_DIR"] = str(tmp_path)
    (source,) = [s for s in section(PATH, "11b.1", "11b.2") if "unclear = " in s]
    with pytest.raises(RuntimeError, match=f"{name} is cut off: delete it"):
        exec(source, space)


# IMDB, with a stand-in in the layout of the original

FOLDERS = {
    "train/neg": "dreadful",
    "train/pos": "wonderful",
    "train/unsup": "curious",
    "test/neg": "dreadful",
    "test/pos": "wonderful",
}


@pytest.fixture
def imdb(tmp_path, serve):
    """Serve a small archive in IMDB's layout: its address, its sum, the files asked."""
    archive = tmp_path / "served" / "aclImdb_v1.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for folder, word in FOLDERS.items():
            for i in range(40):
                text = f"A {word} film.<br /><br />Number {i}, {word} café!"
                data = text.encode()
                info = tarfile.TarInfo(f"aclImdb/{folder}/{i}_7.txt")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                if i == 0:  # as macOS puts beside a file
                    info.name = f"aclImdb/{folder}/._0_7.txt"
                    tar.addfile(info, io.BytesIO(data))
    url, asked = serve(archive.parent)
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    return url, md5, asked


def run_section(space: dict, server: str, md5: str) -> None:
    """Run the cells of IMDB's section with another address, sum and counts."""
    for source in section(PATH, "11b.7", "11b.8"):
        source = re.sub(r"https?://[^\s\"']*/", server, source)
        source = source.replace("7c2ac02c03563afcf9b574c7e56c153a", md5)
        source = re.sub("12_500|50_000", "40", source)
        exec(compile(source, PATH.name, "exec"), space)


def test_imdb_is_read_and_all_three_methods_run(tmp_path, imdb, capsys, monkeypatch):
    server, md5, asked = imdb
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    space = fresh() | {"DATASET": "imdb", "IMDB_EPOCHS": 2, "DATA_DIR": "~/data"}
    run_section(space, server, md5)
    assert set(asked) == {"aclImdb_v1.tar.gz"}
    asked.clear()
    out = capsys.readouterr().out
    assert "40 in train/neg" in out and "40 in train/unsup" in out
    assert re.search(r"pairs 1.000, fresh [\d.]+, pretrained [\d.]+", out)
    first = space["imdb"]["test/neg"][0]
    assert "dreadful" in first and "café" in first and "<br" not in " ".join(first)
    assert space["truths"]["test"].tolist() == [0] * 40 + [1] * 40
    assert space["parts"]["test"][0] == first
    assert "curious" in space["imdb_vocab"].numbers
    assert "dreadful" not in space["imdb_vocab"].numbers, "counted on the raw text"
    model = space["model"]
    assert model.encoder.layers[0].linear1.weight.shape == (512, 128)
    assert len(model.encoder.layers) == 2
    run_section(space, server, md5)
    assert not asked, "what is there is not downloaded again"
    Path(tmp_path, "data/aclImdb/train/pos/3_7.txt").unlink()
    with pytest.raises(RuntimeError, match="pos has 39 of 40 reviews: delete"):
        run_section(space, server, md5)


def test_a_damaged_archive_is_refused(tmp_path, imdb):
    space = fresh() | {"DATASET": "imdb", "DATA_DIR": str(tmp_path / "data")}
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        run_section(space, imdb[0], "0" * 32)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="has 0 of 12500 reviews: delete"):
        define("read_imdb")(tmp_path / "aclImdb" / "train" / "pos", 12_500)


def test_imdb_is_skipped_aloud(tmp_path, imdb, capsys):
    space = fresh() | {"DATASET": "movies", "DATA_DIR": str(tmp_path / "d")}
    run_section(space, imdb[0], imdb[1])
    assert capsys.readouterr().out.count("skipped: DATASET is movies") == 2
    assert not imdb[2] and not (tmp_path / "d").exists()

"""Chapter 9: tokens, byte-pair encoding, batches, counts and networks."""

import html
import json
import random
from pathlib import Path

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer

from notebooks import NOTEBOOKS, code_cells, load_definitions, run_twice, section

PATH = NOTEBOOKS / "09_text_to_tensors.ipynb"
CHAPTER = load_definitions(
    PATH,
    "BYTE_ORDER",
    "BagOfWords",
    "BiGRU",
    "DIM",
    "MARKS",
    "NUMBER_OF",
    "PAD",
    "PIECES",
    "UNK",
    "Vocab",
    "bucket_batches",
    "check_data",
    "count_words",
    "encode_piece",
    "fetch",
    "library_bpe",
    "masked_mean",
    "merge_pair",
    "pick",
    "read_reviews",
    "spell",
    "split",
    "tf_idf",
    "to_ids",
    "to_symbols",
    "tokenize",
    "train_bpe",
    "words_and_pairs",
)
FILE = NOTEBOOKS / "data" / "movieReviewSnippets_GroundTruth.txt"
MERGES = NOTEBOOKS / "data" / "vocab.bpe"
RAW = FILE.read_text(encoding="utf-8")
SENTENCES = [html.unescape(line.split("\t")[2]) for line in RAW.splitlines()]


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


# Sentences and split


def test_sentences_are_labelled_unescaped_and_distinct():
    text = "1\t0.6\tA &amp; B \n2\t-0.6\tbad\n3\t0.5\tbetween\n4\t-2\tA &amp; B\n"
    assert define("read_reviews")(text) == (["A & B", "bad"], [1, 0])
    sentences, labels = define("read_reviews")(RAW)
    assert len(sentences) == len(set(sentences)) == len(labels) == 10_041


def test_the_split_is_the_same_on_every_version_of_pytorch():
    parts = define("split")(10_041, 0)
    assert [len(part) for part in parts] == [8000, 1000, 1041]
    assert torch.cat(parts).sort().values.equal(torch.arange(10_041))
    assert parts[0][:5].tolist() == [1253, 3840, 1793, 6795, 5557]


def read_data(folder) -> dict:
    """Run the cell that reads the data, from a folder of the reader's own."""
    space = load_definitions(PATH, "BYTE_ORDER", "check_data", "fetch", "read_reviews")
    space["DATA_DIR"] = str(folder)
    for cell in code_cells(PATH):
        if "data" in cell.tags:
            exec(cell.source, space)
    return space


def test_the_readers_own_folder_is_found(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    Path(tmp_path, "bookdata").mkdir()
    for file in (FILE, MERGES):
        Path(tmp_path, "bookdata", file.name).write_bytes(file.read_bytes())
    assert len(read_data("~/bookdata")["sentences"]) == 10_041


@pytest.mark.parametrize("share", [0.7, 0.9999])
def test_a_file_that_was_cut_off_is_named(tmp_path, share):
    for file in (MERGES, FILE):
        whole = file.read_bytes()
        Path(tmp_path, FILE.name).write_bytes(FILE.read_bytes())
        Path(tmp_path, file.name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(RuntimeError, match=f"{file.name} is cut off: delete it"):
            read_data(tmp_path)


# Tokeniser and vocabulary


AWKWARD = [
    "",
    "  ",
    '"',
    "a;b:c",
    "x<br />y",
    '<br "/>',
    "<br;/>",
    "Ünï\u00a0cödé'S",
    "..!?",
]


def test_tokens_agree_with_torchtext(torchtext):
    theirs = torchtext.data.utils.get_tokenizer("basic_english")
    assert len(SENTENCES) == 10_605
    for text in SENTENCES + AWKWARD:
        assert define("tokenize")(text) == theirs(text)


@pytest.mark.parametrize("min_freq", [1, 2, 10])
@pytest.mark.parametrize("max_size", [None, 2, 5, 1000, 10**6])
def test_the_vocabulary_agrees_with_torchtext(torchtext, min_freq, max_size):
    tokens = [define("tokenize")(text) for text in SENTENCES]
    ours = define("Vocab")(tokens, min_freq, max_size)
    theirs = torchtext.vocab.build_vocab_from_iterator(
        tokens,
        specials=["<pad>", "<unk>"],
        min_freq=min_freq,
        # torchtext wants room for a word, and cuts before it looks at min_freq
        max_tokens=None if max_size == 2 else max_size,
    )
    theirs.set_default_index(1)
    listed = theirs.get_itos()[:max_size]
    assert ours.words == listed
    if max_size != 2:
        for part in [*tokens, ["never seen"]]:
            assert ours.encode(part) == (theirs(part) or [1])


def test_what_looks_like_a_special_token_is_a_word():
    vocab = define("Vocab")([["a", "<pad>", "<pad>"]])
    assert vocab.words == ["<pad>", "<unk>", "<pad>", "a"]
    assert vocab.encode(["<pad>", "a", "<unk>"]) == [2, 3, 1]
    assert define("Vocab")([["a"]]).encode(["<pad>"]) == [1]


def test_vocabulary_edges():
    vocab = define("Vocab")([])
    assert len(vocab) == 2 and vocab.encode([]) == [1] == vocab.encode(["x"])
    assert define("Vocab")([["b", "a"]]).decode([3, 2, 0]) == ["b", "a", "<pad>"]
    with pytest.raises(ValueError, match="max_size 1 has no room"):
        define("Vocab")([["a"]], max_size=1)


# Byte-pair encoding


def test_merges_agree_with_counting_by_strings():
    """On random strings with many ties and overlaps (aaa)."""
    rng = random.Random(0)
    for _ in range(30):
        text = " ".join(
            "".join(rng.choices("aab", k=rng.randint(1, 9))) for _ in range(9)
        )
        merges = define("train_bpe")([text], 24)
        words = [define("to_symbols")(p) for p in define("PIECES").findall(text)]
        for pair, new in merges.items():
            counts = {}
            for word in words:
                for q in zip(word, word[1:], strict=False):
                    counts[q] = counts.get(q, 0) + 1
            assert pair == min(counts, key=lambda q: (-counts[q], q))
            words = [define("merge_pair")(word, pair, new) for word in words]
        assert len(merges) == 24 or all(len(word) == 1 for word in words)


def test_merges_and_numbers_are_those_of_tokenizers():
    texts = SENTENCES[:500]
    merges = define("train_bpe")(texts, 40)
    library = define("library_bpe")(texts, 296)
    model = json.loads(library.to_str())["model"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    assert [tuple(model["vocab"][part] for part in pair) for pair in pairs] == [*merges]
    for text in SENTENCES[500:600]:
        ids = [
            i
            for piece in define("PIECES").findall(text)
            for i in define("encode_piece")(piece, merges)
        ]
        assert ids == library.encode(text).ids
        symbols = define("spell")(merges)
        assert b"".join(symbols[i] for i in ids).decode() == text


def test_merging_takes_the_left_of_overlapping_pairs():
    assert define("merge_pair")([1, 2, 1, 2, 2], (1, 2), 9) == [9, 9, 2]
    assert define("merge_pair")([5, 5, 5], (5, 5), 9) == [9, 5]
    assert define("merge_pair")([], (5, 5), 9) == []


def test_bpe_edges():
    assert define("train_bpe")([], 5) == {}
    assert len(define("train_bpe")(["ab"], 10)) == 1
    assert sorted(define("BYTE_ORDER")) == list(range(256))
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as in GPT-2
    assert define("BYTE_ORDER")[:188] == visible
    rng = random.Random(1)
    for _ in range(100):
        text = "".join(map(chr, rng.choices(range(0xD800), k=40)))
        assert "".join(define("PIECES").findall(text)) == text


def test_the_tokeniser_of_another_model_is_a_setting_away(tmp_path, monkeypatch):
    """Section 9.4 runs with what the hub hands out: here a small GPT-2 of our own."""
    small = define("library_bpe")(SENTENCES[:300], 600)
    small.add_special_tokens(["<|endoftext|>"])
    asked = []

    def from_pretrained(name):
        asked.append(name)
        return Tokenizer.from_str(small.to_str())

    def hub(model):
        return Tokenizer(model)

    hub.from_pretrained = from_pretrained
    space = CHAPTER | {
        "TOKENIZER": "openai-community/gpt2",
        "Tokenizer": hub,
        "sentences": SENTENCES[:50],
        "DATA_DIR": str(NOTEBOOKS / "data"),
    }
    printed = run_twice(section(PATH, "9.4", "9.5"), space)
    assert asked == ["openai-community/gpt2"] * 2
    assert "601 entries, the end of a text is number 600" in printed[2]


def test_the_switch_for_special_tokens_is_not_saved(tmp_path):
    tokeniser = define("library_bpe")(SENTENCES[:50], 300)
    tokeniser.add_special_tokens(["<|endoftext|>"])
    tokeniser.encode_special_tokens = True
    tokeniser.save(str(tmp_path / "tokeniser.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokeniser.json"))
    assert not again.encode_special_tokens
    assert again.get_vocab() == tokeniser.get_vocab()


# Batches


@pytest.mark.parametrize("n", [1, 7, 100, 500])
def test_buckets_hold_each_text_once(n):
    generator = torch.Generator().manual_seed(n)
    lengths = torch.randint(1, 30, (n,), generator=generator)
    ids = (torch.arange(30) < lengths[:, None]) * torch.arange(1, n + 1)[:, None]
    batches = list(define("bucket_batches")(ids, torch.arange(n), 8, generator))
    rows = torch.cat([labels for _, labels in batches])
    assert rows.sort().values.equal(torch.arange(n))
    for part, labels in batches:
        assert len(part) <= 8 and part.shape[1] == lengths[labels].max()
        assert part.equal(ids[labels, : part.shape[1]])


def test_texts_are_cut_and_padded():
    vocab = define("Vocab")([["a", "b"]])
    ids = define("to_ids")([["a"] * 5, ["b"], []], vocab, max_len=3)
    assert ids.tolist() == [[2, 2, 2], [3, 0, 0], [1, 0, 0]]


def test_masked_mean_ignores_padding_and_survives_an_empty_row():
    x = torch.tensor([[[1.0], [3.0], [torch.nan]], [[7.0], [torch.inf], [7.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert define("masked_mean")(x, mask).tolist() == [[2.0], [0.0]]


# Models and features


@pytest.mark.parametrize("name", ["BagOfWords", "BiGRU"])
def test_padding_and_company_do_not_change_the_answer(name):
    torch.manual_seed(0)
    model = define(name)(50).eval()
    assert not model.embed.weight[0].any()
    rows = [torch.randint(1, 50, (n,)) for n in (1, 9, 4)]
    together = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logits = model(together)
    for row, expected in zip(rows, logits, strict=True):
        torch.testing.assert_close(model(row[None])[0], expected)
    wider = torch.nn.functional.pad(together, (0, 5))
    torch.testing.assert_close(model(wider), logits)


def test_counts_are_those_of_counting():
    ids = torch.tensor([[2, 3, 2, 0], [1, 0, 0, 0]])
    counts = define("count_words")(ids, 5)
    assert counts.is_sparse and counts.is_coalesced()
    assert counts.to_dense().tolist() == [[0, 0, 2, 1, 0], [0, 1, 0, 0, 0]]


def test_tf_idf_agrees_with_scikit_learn():
    tokens = [define("tokenize")(text) for text in SENTENCES[:200]]
    vocab = define("Vocab")(tokens)
    counts = define("count_words")(define("to_ids")(tokens, vocab), len(vocab))
    short = [words[:64] for words in tokens]
    reference = TfidfVectorizer(analyzer=list, vocabulary=vocab.words)
    theirs = torch.from_numpy(reference.fit_transform(short).toarray())
    ours = define("tf_idf")(counts.to_dense().double())
    torch.testing.assert_close(ours, theirs)
    assert define("tf_idf")(torch.tensor([[1.0], [0.0]])).tolist() == [[1.0], [0.0]]


def test_pairs_are_features_of_their_own():
    assert define("words_and_pairs")(["a", "b", "a"]) == ["a", "b", "a", "a b", "b a"]
    assert define("words_and_pairs")([]) == []

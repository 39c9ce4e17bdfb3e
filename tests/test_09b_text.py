"""Chapter 9 in depth: torchtext's vocabulary, a faster BPE against tokenizers."""

import html
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from notebooks import NOTEBOOKS, load_definitions

PATH = NOTEBOOKS / "09b_text_in_depth.ipynb"
CHAPTER = load_definitions(
    PATH,
    "BPE",
    "BYTE_ORDER",
    "Codec",
    "MARKS",
    "NUMBER_OF",
    "PIECES",
    "Vocabulary",
    "build_vocab",
    "count_pairs",
    "encode_with_dropout",
    "fast_bpe",
    "longest_first",
    "merge_pair",
    "negation",
    "pick",
    "shuffled",
    "to_symbols",
    "tokenize",
    "train_bpe",
)
FILE = NOTEBOOKS / "data" / "movieReviewSnippets_GroundTruth.txt"
RAW = FILE.read_text(encoding="utf-8")
SENTENCES = [html.unescape(line.split("\t")[2]) for line in RAW.splitlines()]


def define(name):
    """A definition of the notebook."""
    return CHAPTER[name]


# torchtext


@pytest.mark.parametrize(
    "specials", [[], ["<unk>"], ["<pad>", "<unk>"], ["the", "<x>"]]
)
@pytest.mark.parametrize("min_freq", [1, 2, 10])
@pytest.mark.parametrize("max_tokens", [None, 5, 1000, 10**6])
def test_the_vocabulary_agrees_with_torchtext(
    torchtext, specials, min_freq, max_tokens
):
    tokens = [define("tokenize")(text) for text in SENTENCES]
    options = {"specials": specials, "min_freq": min_freq, "max_tokens": max_tokens}
    ours = define("build_vocab")(tokens, **options)
    theirs = torchtext.vocab.build_vocab_from_iterator(tokens, **options)
    assert ours.tokens == theirs.get_itos()
    assert ours.index == theirs.get_stoi()
    if "<unk>" in specials:
        ours.default_index = ours.index["<unk>"]
        theirs.set_default_index(theirs["<unk>"])
        for part in [*tokens, ["never seen"]]:
            assert ours(part) == theirs(part)


def test_vocabulary_errors():
    build, vocab = define("build_vocab"), define("Vocabulary")
    with pytest.raises(KeyError, match="'x' is unknown, and default_index is not set"):
        vocab(["a"])(["x"])
    with pytest.raises(ValueError, match="no room"):
        build([["a"]], ["<pad>", "<unk>"], max_tokens=2)
    with pytest.raises(ValueError, match="twice"):
        vocab(["a", "a"])
    assert build([], ["<pad>"]).tokens == ["<pad>"]
    assert vocab(["a"], default_index=0)(["x", "a"]) == [0, 0]


def test_what_looks_like_a_special_token_is_unknown():
    vocab = define("build_vocab")([["a", "<pad>"]], ["<pad>", "<unk>"])
    with pytest.raises(KeyError, match="'<pad>' is unknown"):
        vocab(["<pad>"])
    vocab.default_index = 1
    assert vocab(["<pad>", "a", "<unk>"]) == [1, 2, 1]


def test_a_vocabulary_keeps_a_list_of_its_own():
    tokens = ["a", "b"]
    vocab = define("Vocabulary")(tokens)
    tokens.append("c")
    assert len(vocab) == 2


# Byte-pair encoding


@pytest.fixture(scope="module")
def library():
    """The tokenizers library's BPE, trained on the pieces of 4,000 sentences."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = level
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (p for text in SENTENCES[:4000] for p in define("PIECES").findall(text))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def codec():
    merges, _ = define("fast_bpe")(SENTENCES[:4000], 2000)
    return define("Codec")(merges, ["<|endoftext|>", "<x>"])


def test_merges_are_those_of_tokenizers_in_the_same_order(library, codec):
    vocab = library.get_vocab()
    ids = {i: token for token, i in vocab.items()}
    assert len(codec.merges) == 2000 - 256
    for (left, right), new in codec.merges.items():
        assert ids[left] + ids[right] == ids[new]


def test_encoding_is_that_of_tokenizers(library, codec):
    for text in SENTENCES:
        pieces = define("PIECES").findall(text)
        assert codec.encode(text) == library.encode(pieces, is_pretokenized=True).ids


def test_the_fast_loop_learns_what_the_plain_one_learns():
    """On random strings with many ties and overlaps (aaa)."""
    rng = random.Random(0)
    for _ in range(30):
        text = " ".join(
            "".join(rng.choices("aab", k=rng.randint(1, 9))) for _ in range(9)
        )
        fast, visited = define("fast_bpe")([text], 280)
        assert list(fast.items()) == list(define("train_bpe")([text], 24).items())
        assert len(visited) == len(fast)


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n \t x ", "电影", "🎬👨‍👩‍👧", "_a_1²", "a\u0301", "\0"]
)
def test_every_text_comes_back(codec, text):
    assert codec.decode(codec.encode(text)) == text


def test_random_texts_come_back(codec):
    rng = random.Random(1)
    valid = [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(300):
        text = "".join(map(chr, rng.choices(valid, k=40)))
        assert codec.decode(codec.encode(text)) == text
        dropped = define("encode_with_dropout")(codec, text, 0.5, rng)
        assert codec.decode(dropped) == text


def test_special_tokens_come_from_their_names_only(codec):
    assert codec.special("<|endoftext|>") == 2000 and codec.special("<x>") == 2001
    assert max(codec.encode("<|endoftext|><x>")) < 2000
    assert codec.decode([2001, 2000]) == "<x><|endoftext|>"
    with pytest.raises(ValueError):
        codec.special("<y>")


def test_a_codec_is_saved_and_loaded(codec, tmp_path):
    codec.save(tmp_path / "codec.json")
    again = type(codec).load(tmp_path / "codec.json")
    assert list(again.merges.items()) == list(codec.merges.items())
    assert len(again) == len(codec) == 2002
    assert again.special("<x>") == codec.special("<x>")
    assert all(again.encode(text) == codec.encode(text) for text in SENTENCES[:200])


def test_what_a_codec_hands_out_may_be_changed(codec):
    merges = dict(codec.merges)
    own = define("Codec")(merges)
    own.encode_piece(" film").append(0)
    own.encode(" film").append(0)
    merges.clear()
    assert own.encode("a film") == codec.encode("a film")
    assert own.encode_piece(" film") == codec.encode_piece(" film")


def test_bpe_edges(codec):
    assert define("fast_bpe")([], 300) == ({}, [])
    assert define("fast_bpe")(["ab"], 256) == ({}, [])
    assert len(define("fast_bpe")(["ab"], 10_000)[0]) == 1
    with pytest.raises(UnicodeEncodeError):
        codec.encode("\ud83c")
    assert codec.decode(define("to_symbols")("电")[:2]) == "\ufffd"


def test_longest_first_prefers_the_longest():
    known = {b"a": 0, b"b": 1, b"ab": 2, b"bb": 3}
    assert define("longest_first")("abb", known) == [2, 1]


# What a network has learned


def test_shuffled_words_are_the_same_words():
    words = list("abcdefgh")
    mixed = define("shuffled")(words, torch.Generator().manual_seed(0))
    assert mixed != words and sorted(mixed) == words


@pytest.mark.parametrize("text", ["It isn't good", "Never!", "no plot", "cannot"])
def test_negations_are_found(text):
    assert define("negation").search(text)


@pytest.mark.parametrize("text", ["a notable film", "know", "another nose"])
def test_other_words_are_no_negations(text):
    assert not define("negation").search(text)

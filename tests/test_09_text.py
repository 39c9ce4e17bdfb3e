"""Chapter 9: tokens and vocabulary against torchtext, BPE against tokenizers."""

import html
import json
import random
from pathlib import Path

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from notebooks import NOTEBOOKS, code_cells, load_definitions, section

PATH = NOTEBOOKS / "09_text_to_tensors.ipynb"
CHAPTER = load_definitions(
    PATH,
    "BPE",
    "BYTE_ORDER",
    "Batch",
    "BiGRU",
    "BagOfWords",
    "DIM",
    "MARKS",
    "NUMBER_OF",
    "PAD",
    "PIECES",
    "SPECIALS",
    "UNK",
    "Vocab",
    "bucket_batches",
    "build_vocab",
    "collate",
    "count_pairs",
    "encode_with_dropout",
    "longest_first",
    "masked_mean",
    "merge_pair",
    "prints_well",
    "read_sentences",
    "reverse",
    "share_padding",
    "smaller",
    "split",
    "tf_idf",
    "to_symbols",
    "tokenize",
    "train_bpe",
)
FILE = NOTEBOOKS / "data" / "movieReviewSnippets_GroundTruth.txt"
RAW = FILE.read_text(encoding="utf-8")
SENTENCES = [html.unescape(line.split("\t")[2]) for line in RAW.splitlines()]
TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


# Sentences and split


def test_sentences_are_labelled_unescaped_and_distinct():
    text = "1\t0.6\tA &amp; B\n2\t-0.6\tbad\n3\t0.5\tbetween\n4\t-2\tA &amp; B\n"
    sentences, labels, scores = define("read_sentences")(text)
    assert (sentences, labels, scores) == (
        ["A & B", "bad"],
        [1, 0],
        [0.6, -0.6, 0.5, -2],
    )
    sentences, labels, _ = define("read_sentences")(RAW)
    assert len(sentences) == len(set(sentences)) == len(labels) > 10_000


def test_the_split_is_the_same_on_every_version_of_pytorch():
    parts = define("split")(10_041, 0)
    assert [len(part) for part in parts] == [8000, 1000, 1041]
    assert sorted(sum(parts, [])) == list(range(10_041))
    assert parts[0][:5] == [1253, 3840, 1793, 6795, 5557]


def read_data(folder) -> dict:
    """Run the cell that reads the data, from a folder of the reader's own."""
    space = load_definitions(PATH, "check_data", "fetch", "read_sentences")
    space["DATA_DIR"] = str(folder)
    for cell in code_cells(PATH):
        if "data" in cell.tags:
            exec(cell.source, space)
    return space


def test_the_readers_own_folder_is_found(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    Path(tmp_path, "bookdata").mkdir()
    Path(tmp_path, "bookdata", FILE.name).write_bytes(FILE.read_bytes())
    assert len(read_data("~/bookdata")["sentences"]) == 10_041


@pytest.mark.parametrize("share", [0.7, 0.9999])
def test_a_file_that_was_cut_off_is_named(tmp_path, share):
    whole = FILE.read_bytes()
    Path(tmp_path, FILE.name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RuntimeError, match=f"{FILE.name} is cut off: delete it"):
        read_data(tmp_path)


# torchtext


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


@pytest.mark.parametrize(
    "specials", [[], ["<unk>"], ["<pad>", "<unk>"], ["the", "<x>"]]
)
@pytest.mark.parametrize("min_freq", [1, 2, 10])
@pytest.mark.parametrize("max_tokens", [None, 5, 1000, 10**6])
def test_vocabulary_agrees_with_torchtext(torchtext, specials, min_freq, max_tokens):
    tokens = [define("tokenize")(text) for text in SENTENCES]
    options = {"specials": specials, "min_freq": min_freq, "max_tokens": max_tokens}
    ours = define("build_vocab")(tokens, **options)
    theirs = torchtext.vocab.build_vocab_from_iterator(tokens, **options)
    assert ours.tokens == theirs.get_itos()
    assert ours.index == theirs.get_stoi()
    if "<unk>" in specials:
        ours.default_index = ours["<unk>"]
        theirs.set_default_index(theirs["<unk>"])
        for part in [*tokens, ["never seen"]]:
            assert ours(part) == theirs(part)


def test_vocabulary_errors():
    build, vocab = define("build_vocab"), define("Vocab")
    with pytest.raises(KeyError, match="'x' is unknown, and default_index is not set"):
        vocab(["a"])["x"]
    with pytest.raises(ValueError, match="no room"):
        build([["a"]], ["<pad>", "<unk>"], max_tokens=2)
    with pytest.raises(ValueError, match="twice"):
        vocab(["a", "a"])
    assert build([], ["<pad>"]).tokens == ["<pad>"]
    assert vocab(["a"], default_index=0)(["x", "a"]) == [0, 0]


def test_what_looks_like_a_special_token_is_a_word():
    vocab = define("build_vocab")([["a", "<pad>"]], define("SPECIALS"))
    with pytest.raises(KeyError, match="'<pad>' is unknown"):
        vocab(["<pad>"])
    vocab.default_index = vocab["<unk>"]
    assert vocab["<pad>"] == 0 and vocab(["<pad>", "a", "<unk>"]) == [1, 2, 1]


def test_a_vocabulary_keeps_a_list_of_its_own():
    tokens = ["a", "b"]
    vocab = define("Vocab")(tokens)
    tokens.append("c")
    assert len(vocab) == 2


# Byte-pair encoding


@pytest.fixture(scope="module")
def library():
    """The tokenizers library's BPE, trained on the pieces of all sentences."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = level
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (p for text in SENTENCES for p in define("PIECES").findall(text))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def bpe():
    return define("BPE")(define("train_bpe")(SENTENCES, 3000))


def test_merges_are_those_of_tokenizers_in_the_same_order(library, bpe):
    model = json.loads(library.to_str())["model"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    theirs = [tuple(model["vocab"][part] for part in pair) for pair in pairs]
    assert len(theirs) == 3000 - 256
    assert list(bpe.merges) == theirs


def test_encoding_is_that_of_tokenizers(library, bpe):
    for text in SENTENCES:
        pieces = define("PIECES").findall(text)
        encoded = library.encode(pieces, is_pretokenized=True, add_special_tokens=False)
        assert bpe.encode(text) == encoded.ids


def test_merges_agree_with_counting_anew():
    """On random strings with many ties and overlaps (aaa)."""
    rng = random.Random(0)
    for _ in range(30):
        text = " ".join(
            "".join(rng.choices("aab", k=rng.randint(1, 9))) for _ in range(9)
        )
        merges = define("train_bpe")([text], 280)
        words = [define("to_symbols")(p) for p in define("PIECES").findall(text)]
        for pair, new in merges.items():
            counts = {}
            for word in words:
                for q in zip(word, word[1:], strict=False):
                    counts[q] = counts.get(q, 0) + 1
            assert pair == min(counts, key=lambda q: (-counts[q], q))
            words = [define("merge_pair")(word, pair, new) for word in words]
        assert len(merges) == 24 or all(len(word) == 1 for word in words)


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n \t x ", "电影", "🎬👨‍👩‍👧", "_a_1²", "a\u0301", "\0"]
)
def test_every_text_comes_back(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_random_texts_come_back(bpe):
    rng = random.Random(1)
    valid = [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(300):
        text = "".join(map(chr, rng.choices(valid, k=40)))
        assert "".join(define("PIECES").findall(text)) == text
        assert bpe.decode(bpe.encode(text)) == text
        dropped = define("encode_with_dropout")(bpe, text, 0.5, rng)
        assert bpe.decode(dropped) == text


def test_what_bpe_hands_out_may_be_changed(bpe):
    merges = dict(bpe.merges)
    own = define("BPE")(merges)
    own.encode_piece(" film").append(0)
    own.encode(" film").append(0)
    merges.clear()
    assert own.encode("a film") == bpe.encode("a film")
    assert own.encode_piece(" film") == bpe.encode_piece(" film")


def test_sizes_that_cannot_be(bpe, monkeypatch):
    with pytest.raises(ValueError, match="255 symbols cannot hold the 256 bytes"):
        define("train_bpe")(["ab"], 255)
    monkeypatch.setitem(CHAPTER, "bpe", bpe)
    monkeypatch.setitem(CHAPTER, "merges", bpe.merges)
    assert len(define("smaller")(256).symbols) == 256
    for size in (100, 3001):
        with pytest.raises(ValueError, match=f"{size} is not between 256 and 3000"):
            define("smaller")(size)


def test_bpe_edges(bpe):
    assert define("train_bpe")([], 300) == {} and define("train_bpe")(["ab"], 256) == {}
    assert len(define("train_bpe")(["ab"], 10_000)) == 1
    with pytest.raises(UnicodeEncodeError):
        bpe.encode("\ud83c")
    assert sorted(define("BYTE_ORDER")) == list(range(256))
    assert bpe.decode(define("to_symbols")("电")[:2]) == "\ufffd"


# Batches


def test_collate_pads_and_names_empty_sentences():
    batch = define("collate")([(torch.tensor([3]), 1), (torch.tensor([4, 5]), 0)])
    assert batch.ids.tolist() == [[3, 0], [4, 5]]
    assert batch.lengths.tolist() == [1, 2] and batch.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="without tokens"):
        define("collate")([(torch.tensor([], dtype=torch.long), 1)])


@pytest.mark.parametrize("n", [0, 1, 7, 100])
@pytest.mark.parametrize("pool", [1, 3])
def test_buckets_hold_each_sentence_once(n, pool):
    lengths = torch.randint(1, 30, (n,), generator=torch.Generator().manual_seed(n))
    generator = torch.Generator().manual_seed(0)
    batches = define("bucket_batches")(lengths.tolist(), 8, generator, pool)
    assert sorted(i for b in batches for i in b) == list(range(n))
    assert all(0 < len(b) <= 8 for b in batches)


def test_share_of_padding():
    assert define("share_padding")([[0, 1]], [1, 3]) == pytest.approx(1 / 3)
    assert define("share_padding")([[0], [1]], [1, 3]) == 0


def test_masked_mean_ignores_padding_and_survives_an_empty_row():
    x = torch.tensor([[[1.0], [3.0], [99.0]], [[7.0], [7.0], [7.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert define("masked_mean")(x, mask).tolist() == [[2.0], [0.0]]


def test_masked_mean_does_not_look_at_padding():
    x = torch.tensor([[[1.0], [3.0], [torch.nan]], [[2.0], [torch.inf], [0.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert define("masked_mean")(x, mask).tolist() == [[2.0], [2.0]]


# Models and features


def test_the_cells_on_embeddings_may_be_run_twice():
    space = load_definitions(PATH, "PAD") | {"SEED": 0}
    cells = [source for source in section(PATH, "9.6", "9.7") if "Bag" not in source]
    assert len(cells) == 3
    for source in cells:
        exec(source, space)
        exec(source, space)


@pytest.mark.parametrize("name", ["BagOfWords", "BiGRU"])
def test_padding_and_company_do_not_change_the_answer(name):
    torch.manual_seed(0)
    model = define(name)(50).eval()
    rows = [torch.randint(1, 50, (n,)) for n in (1, 9, 4)]
    together = define("collate")([(row, 0) for row in rows])
    logits = model(together.ids, together.lengths)
    for row, expected in zip(rows, logits, strict=True):
        alone = define("collate")([(row, 0)])
        torch.testing.assert_close(model(alone.ids, alone.lengths)[0], expected)
    wider = torch.nn.functional.pad(together.ids, (0, 5))
    torch.testing.assert_close(model(wider, together.lengths), logits)


def test_reverse_turns_only_what_is_real():
    ids, lengths = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2])
    turned = define("reverse")(ids, lengths)
    assert turned.tolist() == [[3, 2, 1], [5, 4, 0]]
    assert define("reverse")(turned, lengths).equal(ids)


def test_tf_idf_agrees_with_scikit_learn():
    texts = SENTENCES[:200]
    tokens = [define("tokenize")(text) for text in texts]
    vocab = define("build_vocab")(tokens)
    reference = TfidfVectorizer(
        tokenizer=define("tokenize"),
        token_pattern=None,
        lowercase=False,
        vocabulary=vocab.index,
    )
    theirs = torch.from_numpy(reference.fit_transform(texts).toarray())
    torch.testing.assert_close(define("tf_idf")(tokens, vocab), theirs)


def test_tf_idf_of_a_text_without_words_is_zero():
    vocab = define("build_vocab")([["a"]])
    assert define("tf_idf")([["a"], []], vocab).tolist() == [[1.0], [0.0]]


def test_longest_first_prefers_the_longest():
    known = {b"a": 0, b"b": 1, b"ab": 2, b"bb": 3}
    assert define("longest_first")("abb", known) == [2, 1]

"""Chapter 11: counts by hand, the encoder against PyTorch's, reading, attention."""

from collections import Counter

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from notebooks import NOTEBOOKS, code_cells, generator, load_definitions

PATH = NOTEBOOKS / "11_transformer_classifier.ipynb"
CHAPTER = load_definitions(
    PATH,
    *("PAD, UNK".split(", ")),
    *("attention", "split_heads", "join_heads", "HeadProjections"),
    *("MultiHeadAttention", "EncoderLayer", "Encoder", "TextEncoder", "Classifier"),
    *("library_encoder", "predict", "accuracy", "alone_and_together"),
    *("TOLD", "tell", "runs", "distant_pairs", "count_and_fit"),
    *("shuffled", "both_ways", "looks", "unevenness", "made_even"),
)


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def some_ids(n: int = 30, longest: int = 9, words: int = 20) -> torch.Tensor:
    """Random padded texts of 1 to `longest` words."""
    g = generator()
    ids = torch.randint(2, words, (n, longest), generator=g)
    lengths = torch.randint(1, longest + 1, (n, 1), generator=g)
    return ids.masked_fill(torch.arange(longest) >= lengths, 0)


def classifier(places: int = 9, **changes) -> nn.Module:
    torch.manual_seed(0)
    model = define("Classifier")(20, places, (2, 16, 4, 32), std=0.4, **changes)
    for parameter in model.parameters():  # away from the small start
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


# The task that counts cannot solve


def test_the_asked_one_said_what_the_label_says():
    texts, labels = define("tell")([("anna", "ben"), ("tom", "eve")])
    assert len(texts) == len(labels) == 8 and sum(labels) == 4
    for words, label in zip(texts, labels, strict=True):
        told = {words[3]: words[6], words[9]: words[12]}
        assert set(told.values()) == {"yes", "no"}
        assert told[words[-1]] == ("yes" if label else "no")


@pytest.mark.parametrize(("longest", "same"), [(1, True), (3, True), (4, False)])
def test_twins_have_the_same_runs(longest, same):
    texts, labels = define("tell")([("anna", "ben"), ("tom", "eve")])
    find = define("runs")(longest)
    for i in (0, 1, 4, 5):
        assert labels[i] != labels[i + 2]
        assert (Counter(find(texts[i])) == Counter(find(texts[i + 2]))) == same


def test_runs_and_distant_pairs_by_hand():
    assert sorted(define("runs")(2)(["a", "b", "a"])) == ["a", "a", "a b", "b", "b a"]
    assert define("runs")(9)(["a"]) == ["a"]
    pairs = define("distant_pairs")(["a", "b", "c"])
    assert pairs == ["a", "b", "c", "a … b", "a … c", "b … c"]


def test_counts_solve_what_counts_can_solve():
    texts, labels = [["a"], ["b"], ["a", "c"], ["b", "c"]], [1, 0, 1, 0]
    found = define("count_and_fit")(
        define("runs")(1), LogisticRegression(), (texts, labels), (texts, labels)
    )
    assert found == (1.0, 1.0)


BOTH_ORDERS = [("anna", "ben"), ("ben", "anna")]


@pytest.mark.parametrize("longest", [8, None])
def test_no_count_of_two_parts_tells(longest):
    find = define("runs")(longest) if longest else define("distant_pairs")
    told = define("tell")(BOTH_ORDERS)
    assert define("count_and_fit")(find, LogisticRegression(), told, told)[1] == 0


def test_with_one_order_of_the_names_runs_tell():
    told = define("tell")(BOTH_ORDERS[:1])
    counts = define("runs")(8), LogisticRegression()
    assert define("count_and_fit")(*counts, told, told)[1] > 0


def test_a_run_of_nine_words_tells():
    told = define("tell")(BOTH_ORDERS)
    counts = define("runs")(9), LogisticRegression()
    assert define("count_and_fit")(*counts, told, told)[1] > 0


# The encoder


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_and_its_gradients_agree_with_pytorch(norm_first):
    torch.manual_seed(0)
    ours = define("Encoder")(2, 16, 4, 32, norm_first=norm_first)
    theirs = define("library_encoder")(2, 16, 4, 32, norm_first)
    ours.load_state_dict(theirs.state_dict())
    real = torch.arange(6) < torch.tensor([[6], [2], [1], [5]])
    x = torch.randn(4, 6, 16)
    for mode in (True, False):
        a = ours.train(mode)(x, real[:, None, None])[real]
        b = theirs.train(mode)(x, src_key_padding_mask=~real)[real]
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    a.square().sum().backward()
    theirs.train()(x, src_key_padding_mask=~real)[real].square().sum().backward()
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, p), (other, q) in pairs:
        assert name == other
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    encoder, x = define("Encoder")(1, 16, 4, 32, 0.5), torch.randn(2, 5, 16)
    assert encoder.layers[0].self_attn.dropout == 0.5
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_heads_must_divide_the_size():
    with pytest.raises(ValueError, match="dim 10 is not divisible by 3 heads"):
        define("Encoder")(1, 10, 3, 20)


# The classifier


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_a_text_gets_the_same_answer_alone_and_in_a_batch(pool):
    assert define("alone_and_together")(classifier(pool=pool), some_ids()) < 1e-4


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_the_summary_by_hand(pool):
    model, ids = classifier(pool=pool), torch.tensor([[4, 7, 2, 0, 0]])
    x = model.encode(ids)[0, :3]  # three words
    summary = x.mean(dim=0) if pool == "mean" else x.max(dim=0).values
    torch.testing.assert_close(model(ids)[0], model.head(summary))


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("places", [0, 9])
def test_only_positions_see_the_order(places, pool):
    model = classifier(places, pool=pool)
    ids = torch.randint(2, 20, (20, 9), generator=generator())
    same = torch.allclose(model(ids), model(ids.flip(1)), atol=1e-4)
    assert same == (places == 0)


def test_dropped_words_are_unknown_and_only_in_training():
    model, ids = classifier(word_dropout=1.0), some_ids()
    unknown = ids.masked_fill(ids != 0, 1)
    torch.testing.assert_close(model.train()(ids), model(unknown))
    assert not torch.allclose(model.eval()(ids), model(unknown))


def test_a_longer_text_than_places_is_refused():
    with pytest.raises(RuntimeError, match="must match"):
        classifier(places=4)(some_ids(longest=9))


# Attention that is made even


def test_even_attention_is_a_plain_mean():
    model, ids = classifier(), some_ids()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    even = define("made_even")(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert define("unevenness")(even, ids) == pytest.approx(0, abs=1e-6)
    x = torch.randn(1, 5, 16)
    weights = even.encoder.layers[1].self_attn.weights(x)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.2))


def test_weights_are_those_of_the_first_layer_and_none_is_on_padding():
    model, ids = classifier(), some_ids()
    weights = define("looks")(model, ids)
    assert weights.shape == (30, 4, 9, 9)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(30, 4, 9))
    assert (weights.amax(dim=(1, 2))[ids == 0] == 0).all()


def test_unevenness_by_hand():
    model, ids = classifier(), torch.tensor([[4, 7, 2, 0, 0]])
    layer = model.encoder.layers[0]
    x = model.embed(ids)[:, :3] + model.place.weight[:3]
    weights = layer.self_attn.weights(layer.norm1(x))
    expected = (weights - 1 / 3).abs().sum(dim=-1).mean().item() / 2
    assert define("unevenness")(model, ids) == pytest.approx(expected, abs=1e-5)


# Lines of Shakespeare


def test_shuffled_lines_hold_the_same_words_in_another_order():
    lines = [("a", "b", "c"), ("a", "a", "b")] * 50
    texts, labels = define("both_ways")(lines, generator())
    assert labels == [1, 0] * 100 and texts[0::2] == lines
    for written, other in zip(texts[0::2], texts[1::2], strict=True):
        assert sorted(written) == sorted(other) and written != other


@pytest.mark.parametrize("words", [(), ("a",), ("a", "a")])
def test_words_without_another_order_are_refused(words):
    with pytest.raises(ValueError, match="no other order"):
        define("shuffled")(words, generator())


# Data

DATA = NOTEBOOKS / "data"
FILES = ("shakespeare.txt", "movieReviewSnippets_GroundTruth.txt")


def read_data(folder) -> dict:
    """Run the cells that read the data, from a folder of the reader's own."""
    names = ("check_data", "fetch", "read_lines", "shuffled", "both_ways")
    names += ("read_reviews", "tokenize", "MARKS")
    space = load_definitions(PATH, *names)
    space |= {"DATA_DIR": str(folder), "SEED": 0, "N_LINES": 500}
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
    assert len(space["lines"]) > 50_000 and len(space["sentences"]) == 10_041
    fit, test = space["line_fit"][0], space["line_test"][0]
    assert len(fit) == 1000 and not set(fit[::2]) & set(test[::2])


@pytest.mark.parametrize("file", FILES)
def test_a_text_that_was_cut_off_is_named(originals, file):
    whole = (originals / file).read_bytes()
    (originals / file).write_bytes(whole[: int(0.7 * len(whole))])
    with pytest.raises(RuntimeError, match=f"{file} is cut off: delete it"):
        read_data(originals)

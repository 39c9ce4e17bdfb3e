"""Chapter 6: the CRF against brute force and pytorch-crf, packing, tags and words."""

import itertools
import math
import statistics
import time

import pytest
import torch
import torchcrf
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from notebooks import NOTEBOOKS, code_cells, generator, load_definitions

PATH = NOTEBOOKS / "06_sequence_labelling.ipynb"
CHAPTER = load_definitions(
    PATH,
    "PAD",
    "IGNORE",
    "BiLSTM",
    "CRF",
    "ENCODERS",
    "FOLLOWERS",
    "FORBIDDEN",
    "HIDDEN",
    "LEGAL",
    "N",
    "RULES",
    "SEED",
    "TAGS",
    "Window",
    "all_paths",
    "brute_scores",
    "check_mask",
    "clashes",
    "cut_by_words",
    "fit",
    "is_legal",
    "largest",
    "log_partition",
    "longest_first",
    "lstm_by_hand",
    "marginals",
    "path_score",
    "predict",
    "read_lines",
    "score",
    "segment",
    "softmax_loss",
    "spell",
    "tag_lines",
    "thin",
    "to_spans",
    "to_tags",
    "to_tensors",
    "trigrams",
    "two_best",
    "viterbi",
)
CHAPTER["device"] = torch.device("cpu")
CHAPTER["known"] = {"i", "am"}
WORDS = [
    ["a"],
    ["no"],
    ["i", "am", "here"],
    ["thou", "art", "a", "villain"],
    ["to", "be", "or", "not", "to", "be"],
]


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def a_case(seed: int, lengths: list[int], num_tags: int = 4, dtype=torch.float64):
    """Random emissions, tags, mask and transitions for lines of the given lengths."""
    g = generator(seed)
    shape = len(lengths), max(lengths)
    emissions = 2 * torch.randn(*shape, num_tags, generator=g, dtype=dtype)
    tags = torch.randint(num_tags, shape, generator=g)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    size = num_tags + 1, num_tags + 1
    return emissions, tags, mask, torch.randn(size, generator=g, dtype=dtype)


def padded(tags, mask):
    """The tags as CRF.loss wants them: IGNORE behind the end of a line."""
    return tags.where(mask, define("IGNORE"))


def reference(transition, dtype=torch.float64) -> torchcrf.CRF:
    """pytorch-crf's layer with the same scores."""
    crf = torchcrf.CRF(len(transition) - 1, batch_first=True).to(dtype)
    with torch.no_grad():
        crf.start_transitions.copy_(transition[-1, :-1])
        crf.transitions.copy_(transition[:-1, :-1])
        crf.end_transitions.copy_(transition[:-1, -1])
    return crf


def log_likelihood(emissions, tags, mask, transition):
    path = define("path_score")(emissions, tags, mask, transition)
    return path - define("log_partition")(emissions, mask, transition)


# The CRF against pytorch-crf and brute force

RAGGED = [[7], [1], [5, 5, 5], [9, 1, 4, 12, 2], [3, 40, 17], [1, 1, 2]]


@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize("num_tags", [1, 2, 4, 7])
def test_likelihood_and_gradients_agree_with_pytorch_crf(lengths, num_tags):
    emissions, tags, mask, transition = a_case(sum(lengths), lengths, num_tags)
    emissions.requires_grad_()
    ours = transition.clone().requires_grad_()
    value = log_likelihood(emissions, tags, mask, ours)
    value.sum().backward()
    ours_grad, emissions.grad = emissions.grad, None

    theirs = reference(transition)
    expected = theirs(emissions, tags, mask, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-6)
    pairs = [
        (ours_grad, emissions.grad),
        (ours.grad[-1, :-1], theirs.start_transitions.grad),
        (ours.grad[:-1, :-1], theirs.transitions.grad),
        (ours.grad[:-1, -1], theirs.end_transitions.grad),
    ]
    assert ours.grad[-1, -1] == 0
    for one, two in pairs:
        two = torch.zeros_like(one) if two is None else two  # no steps in short lines
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize("num_tags", [1, 2, 4, 7])
def test_viterbi_agrees_with_pytorch_crf(lengths, num_tags):
    emissions, _, mask, scores = a_case(1 + sum(lengths), lengths, num_tags)
    paths, values = define("viterbi")(emissions, mask, scores)
    expected = reference(scores).decode(emissions, mask)
    assert [row[:n].tolist() for row, n in zip(paths, lengths, strict=True)] == expected
    again = define("path_score")(emissions, paths, mask, scores)
    torch.testing.assert_close(values, again)


@pytest.mark.parametrize("seed", range(5))
def test_in_32_bits_it_agrees_with_pytorch_crf_to_1e_4(seed):
    emissions, tags, mask, scores = a_case(seed, [30, 8, 21], dtype=torch.float32)
    ours = log_likelihood(emissions, tags, mask, scores)
    theirs = reference(scores, torch.float32)(emissions, tags, mask, reduction="none")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("num_tags", [2, 3, 5])
def test_everything_agrees_with_brute_force(num_tags):
    lengths = [5, 1, 3]
    emissions, _, mask, scores = a_case(num_tags, lengths, num_tags)
    log_z = define("log_partition")(emissions, mask, scores)
    paths, values = define("viterbi")(emissions, mask, scores)
    nodes = define("marginals")(emissions, mask, scores)
    for i, n in enumerate(lengths):
        every = list(itertools.product(range(num_tags), repeat=n))
        totals = []
        for path in every:  # one by one, in plain Python
            total = sum(emissions[i, t, k] for t, k in enumerate(path))
            steps = itertools.pairwise([num_tags, *path, num_tags])
            totals.append(total + sum(scores[a, b] for a, b in steps))
        totals = torch.stack(totals)
        torch.testing.assert_close(
            define("brute_scores")(emissions[i, :n], scores), totals
        )
        torch.testing.assert_close(log_z[i], totals.logsumexp(0))
        assert paths[i, :n].tolist() == list(every[totals.argmax()])
        torch.testing.assert_close(values[i], totals.max())
        hits = torch.nn.functional.one_hot(torch.tensor(every), num_tags).double()
        expected = torch.einsum("p,ptk->tk", totals.softmax(0), hits)
        torch.testing.assert_close(nodes[i, :n], expected)
        best = define("two_best")(emissions[i, :n], scores)
        torch.testing.assert_close(best, totals.topk(2).values)
    assert nodes[~mask].abs().sum() == 0


def test_gradients_agree_with_finite_differences():
    emissions, tags, mask, scores = a_case(0, [4, 1, 3], 3)
    inputs = [x.clone().requires_grad_() for x in (emissions, scores)]

    def function(e, s):
        return log_likelihood(e, tags, mask, s)

    assert torch.autograd.gradcheck(function, inputs)


def test_padding_has_no_effect_whatever_it_holds():
    emissions, tags, mask, scores = a_case(3, [6, 2, 4])
    spoilt, spoilt_tags = emissions.clone(), tags.clone()
    spoilt[~mask], spoilt_tags[~mask] = 1e6, 3
    one = log_likelihood(emissions, tags, mask, scores)
    two = log_likelihood(spoilt, spoilt_tags, mask, scores)
    assert one.equal(two)
    paths = [define("viterbi")(e, mask, scores)[0][mask] for e in (emissions, spoilt)]
    assert paths[0].equal(paths[1])


def test_a_path_repeats_its_last_tag_behind_the_end():
    emissions, _, mask, scores = a_case(4, [6, 2])
    path = define("viterbi")(emissions, mask, scores)[0][1]
    assert (path[2:] == path[1]).all()


# The layer with its rules


def test_only_legal_paths_have_a_probability():
    emissions, _, _, _ = a_case(6, [5])
    probs = define("brute_scores")(emissions[0], define("RULES").double()).softmax(0)
    for path, p in zip(define("all_paths")(5), probs, strict=True):
        tags = "".join(define("TAGS")[t] for t in path)
        assert define("is_legal")(tags) == (p > 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_an_untrained_layer_decodes_legal_lines(seed):
    lengths = [9, 1, 2, 30]
    emissions, _, mask, _ = a_case(seed, lengths, dtype=torch.float32)
    paths = define("CRF")().decode(10 * emissions, mask)
    for row, n in zip(paths.tolist(), lengths, strict=True):
        assert define("is_legal")("".join(define("TAGS")[t] for t in row[:n]))


def test_without_rules_the_layer_is_pytorch_crf():
    emissions, tags, mask, scores = a_case(8, [9, 3, 6], dtype=torch.float32)
    crf = define("CRF")(torch.ones(5, 5, dtype=torch.bool))
    with torch.no_grad():
        crf.learned.copy_(scores)
    theirs = reference(scores, torch.float32)
    expected = -theirs(emissions, tags, mask, reduction="token_mean")
    torch.testing.assert_close(crf.loss(emissions, padded(tags, mask)), expected)


def test_rules_are_neither_trained_nor_saved():
    crf = define("CRF")()
    assert {name for name, _ in crf.named_parameters()} == {"learned"}
    assert set(crf.state_dict()) == {"learned"}
    again = define("CRF")()
    again.load_state_dict(crf.state_dict())
    assert again.rules.equal(define("RULES"))


def test_a_true_path_that_the_rules_forbid_is_refused():
    path = torch.tensor([["BIES".index(tag) for tag in "BIB"]])
    with pytest.raises(ValueError, match="the rules forbid one of the true paths"):
        define("CRF")().loss(torch.zeros(1, 3, 4), path)


def legal_lines():
    """Random emissions (2, 6, 4) and legal tags of two lines."""
    ids, tags = define("to_tensors")([["a", "fine", "s"], ["no"]])
    return 2 * torch.randn(*tags.shape, 4, generator=generator(7)), tags


def test_half_precision_emissions_give_finite_losses_in_32_bits():
    emissions, tags = legal_lines()
    half, crf = emissions.bfloat16(), define("CRF")()
    mask = tags != define("IGNORE")
    loss = crf.loss(half, tags)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert loss == crf.loss(half.float(), tags)
    assert crf.decode(half, mask).equal(crf.decode(half.float(), mask))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[True, True, True]], "do not fit"),
        ([[True, True], [False, False]], "a line is empty"),
        ([[True, True], [False, True]], "a line is empty"),
    ],
)
def test_a_wrong_mask_is_refused(mask, message):
    crf, mask = define("CRF")(), torch.tensor(mask)
    emissions, tags = torch.zeros(2, 2, 4), torch.zeros(mask.shape, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        crf.decode(emissions, mask)
    with pytest.raises(ValueError, match=message):
        crf.loss(emissions, padded(tags, mask))


def test_a_mask_with_a_gap_is_refused():
    mask = torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match="a mask has a gap: real letters first"):
        define("CRF")().decode(torch.zeros(1, 3, 4), mask)


def ratio(ours, theirs, repeats: int = 15) -> float:
    """Median time of ours over that of theirs, measured in turn."""
    times = [], []
    for _ in range(repeats):
        for function, found in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


@pytest.mark.parametrize("work", ["loss", "decode"])
def test_it_is_no_slower_than_pytorch_crf(work):
    lengths = torch.randint(10, 51, (64,), generator=generator(0)).tolist()
    emissions, tags, mask, scores = a_case(0, lengths, dtype=torch.float32)
    emissions.requires_grad_()
    crf = define("CRF")(torch.ones(5, 5, dtype=torch.bool))
    theirs, ours = reference(scores, torch.float32), padded(tags, mask)
    calls = {
        "loss": (
            lambda: crf.loss(emissions, ours).backward(),
            lambda: theirs(emissions, tags, mask, reduction="token_mean").backward(),
        ),
        "decode": (
            lambda: crf.decode(emissions.detach(), mask),
            lambda: theirs.decode(emissions.detach(), mask),
        ),
    }
    found = []
    for _ in range(4):  # again, if something else was running
        found.append(ratio(*calls[work]))
        if found[-1] <= 1.5:
            break
    print(f"{work}: {found[-1]:.2f} of pytorch-crf's time")
    assert min(found) <= 1.5, found


# Recurrent networks and padding


@pytest.mark.parametrize("lengths", [[5], [1], [7, 2, 4], [1, 1, 6]])
def test_the_encoder_is_a_packed_bidirectional_lstm(lengths):
    torch.manual_seed(sum(lengths))
    encoder = define("BiLSTM")(hidden=6, dim=5)
    library = nn.LSTM(5, 6, batch_first=True, bidirectional=True)
    library.load_state_dict(encoder.lstm.state_dict())
    sizes = torch.tensor(lengths)
    mask = torch.arange(max(lengths)) < sizes[:, None]
    letters = torch.randint(1, 27, mask.shape).where(mask, 0)
    packed = pack_padded_sequence(
        encoder.embed(letters), sizes, batch_first=True, enforce_sorted=False
    )
    hidden, _ = pad_packed_sequence(library(packed)[0], batch_first=True)
    expected = encoder.head(hidden)[mask]
    torch.testing.assert_close(encoder(letters)[mask], expected)


@pytest.mark.parametrize("make", ["whole line", "1 letter", "3 letters", "5 letters"])
def test_an_encoder_gives_a_line_the_same_emissions_alone_and_in_a_batch(make):
    torch.manual_seed(0)
    encoder = define("ENCODERS")[make]()
    together = encoder(define("to_tensors")(WORDS)[0])
    for words, row in zip(WORDS, together, strict=True):
        one = encoder(define("to_tensors")([words])[0])[0]
        torch.testing.assert_close(row[: len(one)], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lstm_by_hand_is_the_librarys(dtype):
    torch.manual_seed(1)
    lstm, x = nn.LSTM(4, 3, batch_first=True).to(dtype), torch.randn(1, 9, 4).to(dtype)
    torch.testing.assert_close(define("lstm_by_hand")(lstm, x[0]), lstm(x)[0][0])


def test_the_softmax_loss_ignores_the_padding():
    emissions, tags, mask, _ = a_case(9, [5, 2], dtype=torch.float32)
    loss = define("softmax_loss")(emissions, padded(tags, mask))
    emissions[~mask] = 100.0
    assert define("softmax_loss")(emissions, padded(tags, mask)) == loss


# Tags, words, text


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_words_become_legal_tags_and_come_back(words):
    tags, letters = define("to_tags")(words), "".join(words)
    assert define("is_legal")(tags) and not define("clashes")(tags)
    assert [letters[a:b] for a, b in define("to_spans")(tags)] == words


def test_an_empty_word_is_refused():
    with pytest.raises(ValueError, match="a word is empty"):
        define("to_tags")(["to", "", "be"])


@pytest.mark.parametrize("words", [["To"], ["na\u00efve"], ["no", "1"], []], ids=str)
def test_a_batch_takes_only_letters_from_a_to_z(words):
    with pytest.raises(ValueError, match="letters from a to z"):
        define("to_tensors")([["fine"], words])


@pytest.mark.parametrize("length", range(1, 7))
def test_legal_tags_are_as_many_as_there_are_ways_to_cut(length):
    every = ["".join(tags) for tags in itertools.product("BIES", repeat=length)]
    legal = [tags for tags in every if define("is_legal")(tags)]
    assert len(legal) == 2 ** (length - 1)
    assert [tags for tags in every if not define("clashes")(tags)] == legal
    cuts = {tuple(define("to_spans")(tags)) for tags in legal}
    assert len(cuts) == len(legal)
    for tags in every:  # illegal ones too are read as words that cover the line
        spans = define("to_spans")(tags)
        assert [i for a, b in spans for i in range(a, b)] == list(range(length))


def test_scores_of_known_cases():
    lines = [["i", "am", "here"]]  # "here" is new
    perfect = define("score")(["SBEBIIE"], lines)
    assert perfect == {"F1": 1, "new words": 1, "letters": 1, "illegal": 0}
    joined = define("score")(["BIEBIIE"], lines)  # "iam", "here"
    precision, recall = 1 / 2, 1 / 3
    f1 = 2 * precision * recall / (precision + recall)
    assert math.isclose(joined["F1"], f1) and joined["new words"] == 1
    assert math.isclose(joined["letters"], 5 / 7)
    nothing = define("score")(["BIIIIII"], lines)
    assert nothing["F1"] == nothing["new words"] == 0 and nothing["illegal"] == 1


def test_tags_of_lines_have_their_own_lengths():
    torch.manual_seed(0)
    ids, decode = define("to_tensors")(WORDS)[0], define("CRF")().decode
    guesses = define("tag_lines")(define("Window")(1), decode, ids)
    assert [len(g) for g in guesses] == [len("".join(words)) for words in WORDS]
    assert all(map(define("is_legal"), guesses))


def test_lines_lose_speakers_roles_and_directions():
    text = """HAMLET

by William Shakespeare

DRAMATIS PERSONAE

HAMLET, son to the former king, and nephew to the present
SCENE: Elsinore, a room in the castle of the king

ACT I. The first of the acts of this play

FRANCISCO.
Nay, answer me: stand [drawing his sword], and unfold yourself. [Drawing
it further.]
ALL. Farewell, our father's man-child, is't so?
 Enter a ghost and several other persons
Too short
"""
    expected = [
        "nay answer me stand and unfold yourself".split(),
        "farewell our fathers man child ist so".split(),
    ]
    read = define("read_lines")
    assert read(text) == expected
    gutenberg = text.replace("'", "\u2019").replace(": stand", "\u2014stand")
    title = "THE PROJECT GUTENBERG EBOOK ***"
    framed = f"A line of thanks before\n*** START OF {title}\n{gutenberg}"
    assert read(f"{framed}\n*** END OF {title}\nTerms and conditions\n") == expected


def test_an_original_that_was_cut_off_is_named_with_the_remedy(tmp_path):
    words = "To be, or not to be\u2014that is the question\n" * 75_000
    text = f"*** START OF THE PROJECT GUTENBERG EBOOK ***\n{words}".encode()
    path = tmp_path / "shakespeare.txt"
    dash = text.index(b"\xe2", len(text) * 7 // 10)
    path.write_bytes(text[: dash + 1])  # in the middle of a character
    space = load_definitions(PATH, "check_data", "fetch", "read_lines", "to_tags")
    space["DATA_DIR"] = str(tmp_path)
    (cell,) = [c.source for c in code_cells(PATH) if "data" in c.tags]
    with pytest.raises(RuntimeError, match="cut off: delete it") as error:
        exec(cell, space)
    assert str(path) in str(error.value)


def test_thinning():
    assert define("thin")(list(range(10)), 3) == [0, 3, 6]
    assert define("thin")([1, 2], 5) == [1, 2]


@pytest.mark.parametrize("text", ["abcd", "aab", "xaby", "cdcd"])
def test_the_dictionary_finds_the_best_of_all_cuts(text):
    counts = {"a": 3, "ab": 2, "abc": 1, "b": 1, "c": 2, "cd": 4, "d": 1}
    total = sum(counts.values())

    def logp(words):
        seen = [counts.get(word, 10.0 ** (1 - len(word))) for word in words]
        return sum(math.log(count / total) for count in seen)

    cuts = []
    for gaps in itertools.product([False, True], repeat=len(text) - 1):
        spaced = "".join(c + " " * gap for c, gap in zip(text, [*gaps, 0], strict=True))
        cuts.append(spaced.split())
    found = define("cut_by_words")(text, counts)
    assert "".join(found) == text
    assert math.isclose(logp(found), max(map(logp, cuts)))


def test_the_greedy_cut_takes_the_longest_word():
    counts = {"ab": 1, "abc": 1, "c": 1, "cd": 9, "d": 1}
    assert define("longest_first")("abcd", counts) == ["abc", "d"]
    assert define("cut_by_words")("abcd", counts) == ["ab", "cd"]
    with pytest.raises(ValueError, match="no word of the dictionary begins 'xyz'"):
        define("longest_first")("xyz", counts)

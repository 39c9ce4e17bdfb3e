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

from notebooks import NOTEBOOKS, code_cells, load_definitions

PATH = NOTEBOOKS / "06_sequence_labelling.ipynb"
CHAPTER = load_definitions(
    PATH,
    "Batch",
    "BiLSTM",
    "CRF",
    "ENCODERS",
    "FEW_STEPS",
    "FORBIDDEN",
    "HIDDEN",
    "LEGAL",
    "SEED",
    "STEPS",
    "Scores",
    "TAGS",
    "Window",
    "all_paths",
    "brute_scores",
    "check_mask",
    "clashes",
    "collate",
    "combinations",
    "cut_if_likely",
    "forward_backward",
    "is_legal",
    "log_partition",
    "longest_first",
    "lstm_by_hand",
    "marginals",
    "most_probable",
    "path_score",
    "predict",
    "read_lines",
    "reverse",
    "rules",
    "sample",
    "score",
    "share_unseen",
    "softmax_loss",
    "thin",
    "to_spans",
    "to_tags",
    "two_best",
    "viterbi",
)
CHAPTER["device"] = torch.device("cpu")
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


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_case(seed: int, lengths: list[int], num_tags: int = 4, dtype=torch.float64):
    """Random emissions, tags, mask and scores for lines of the given lengths."""
    g = generator(seed)
    shape = len(lengths), max(lengths)
    emissions = 2 * torch.randn(*shape, num_tags, generator=g, dtype=dtype)
    tags = torch.randint(num_tags, shape, generator=g)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    sizes = (num_tags,), (num_tags, num_tags), (num_tags,)
    scores = [torch.randn(size, generator=g, dtype=dtype) for size in sizes]
    return emissions, tags, mask, define("Scores")(*scores)


def reference(scores, dtype=torch.float64) -> torchcrf.CRF:
    """pytorch-crf's layer with the same scores."""
    crf = torchcrf.CRF(len(scores.start), batch_first=True).to(dtype)
    with torch.no_grad():
        crf.start_transitions.copy_(scores.start)
        crf.transitions.copy_(scores.step)
        crf.end_transitions.copy_(scores.end)
    return crf


def log_likelihood(emissions, tags, mask, scores):
    path = define("path_score")(emissions, tags, mask, scores)
    return path - define("log_partition")(emissions, mask, scores)


# The CRF against pytorch-crf and brute force

RAGGED = [[7], [1], [5, 5, 5], [9, 1, 4, 12, 2], [3, 40, 17], [1, 1, 2]]


@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize("num_tags", [1, 2, 4, 7])
def test_likelihood_and_gradients_agree_with_pytorch_crf(lengths, num_tags):
    emissions, tags, mask, scores = a_case(sum(lengths), lengths, num_tags)
    emissions.requires_grad_()
    ours = define("Scores")(*[s.clone().requires_grad_() for s in scores])
    value = log_likelihood(emissions, tags, mask, ours)
    value.sum().backward()
    ours_grad, emissions.grad = emissions.grad, None

    theirs = reference(scores)
    expected = theirs(emissions, tags, mask, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-6)
    pairs = [
        (ours_grad, emissions.grad),
        (ours.start.grad, theirs.start_transitions.grad),
        (ours.step.grad, theirs.transitions.grad),
        (ours.end.grad, theirs.end_transitions.grad),
    ]
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
            total = scores.start[path[0]] + scores.end[path[-1]]
            total += sum(emissions[i, t, k] for t, k in enumerate(path))
            total += sum(scores.step[a, b] for a, b in itertools.pairwise(path))
            totals.append(total)
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
        two_ways = define("forward_backward")(emissions[i, :n], scores)
        torch.testing.assert_close(two_ways, expected)
        best = define("two_best")(emissions[i, :n], scores)
        torch.testing.assert_close(best, totals.topk(2).values)
    assert nodes[~mask].abs().sum() == 0


def test_gradients_agree_with_finite_differences():
    emissions, tags, mask, scores = a_case(0, [4, 1, 3], 3)
    inputs = [x.clone().requires_grad_() for x in (emissions, *scores)]

    def function(e, *s):
        return log_likelihood(e, tags, mask, define("Scores")(*s))

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


def test_samples_have_the_frequencies_of_the_paths():
    emissions, _, _, scores = a_case(5, [3], 3)
    paths = define("sample")(emissions[0], scores, 20_000)
    numbers = paths @ torch.tensor([9, 3, 1])
    shares = numbers.bincount(minlength=27) / 20_000
    expected = define("brute_scores")(emissions[0], scores).softmax(0)
    assert (shares - expected).abs().max() < 0.02  # five standard deviations


# The layer with its rules


def test_only_legal_paths_have_a_probability():
    emissions, _, _, _ = a_case(6, [5])
    scores = [s.double() for s in define("rules")]
    probs = define("brute_scores")(emissions[0], define("Scores")(*scores)).softmax(0)
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
    crf = define("CRF")(constrained=False)
    with torch.no_grad():
        for name, value in scores._asdict().items():
            getattr(crf, name).copy_(value)
    theirs = reference(scores, torch.float32)
    expected = -theirs(emissions, tags, mask, reduction="token_mean")
    torch.testing.assert_close(crf.loss(emissions, tags, mask), expected)


def test_penalties_are_neither_trained_nor_saved():
    crf = define("CRF")()
    assert {n for n, _ in crf.named_parameters()} == {"start", "step", "end"}
    assert set(crf.state_dict()) == {"start", "step", "end"}
    again = define("CRF")()
    again.load_state_dict(crf.state_dict())
    assert all(a.equal(b) for a, b in zip(crf.scores(), again.scores(), strict=True))


def test_half_precision_emissions_give_finite_losses_in_32_bits():
    emissions, tags, mask, _ = a_case(7, [9, 30], dtype=torch.float32)
    half, crf = emissions.bfloat16(), define("CRF")()
    loss = crf.loss(half, tags, mask)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert loss == crf.loss(half.float(), tags, mask)
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
    emissions, tags = torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        crf.decode(emissions, mask)
    with pytest.raises(ValueError, match=message):
        crf.loss(emissions, tags, mask)


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
    crf, theirs = define("CRF")(constrained=False), reference(scores, torch.float32)
    calls = {
        "loss": (
            lambda: crf.loss(emissions, tags, mask).backward(),
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
    state = encoder.from_left.state_dict()
    state |= {f"{k}_reverse": v for k, v in encoder.from_right.state_dict().items()}
    library.load_state_dict(state)
    letters = torch.randint(1, 27, (len(lengths), max(lengths)))
    sizes = torch.tensor(lengths)
    mask = torch.arange(max(lengths)) < sizes[:, None]
    packed = pack_padded_sequence(
        encoder.embed(letters), sizes, batch_first=True, enforce_sorted=False
    )
    hidden, _ = pad_packed_sequence(library(packed)[0], batch_first=True)
    expected = encoder.head(hidden)[mask]
    torch.testing.assert_close(encoder(letters, sizes)[mask], expected)


@pytest.mark.parametrize("make", ["BiLSTM", "1 letter", "3 letters", "5 letters"])
def test_an_encoder_gives_a_line_the_same_emissions_alone_and_in_a_batch(make):
    torch.manual_seed(0)
    encoder = define("ENCODERS")[make][0]()
    batch = define("collate")(WORDS)
    together = encoder(batch.letters, batch.lengths)
    for words, row, n in zip(WORDS, together, batch.lengths, strict=True):
        alone = define("collate")([words])
        one = encoder(alone.letters, alone.lengths)[0]
        torch.testing.assert_close(row[:n], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lstm_by_hand_is_the_librarys(dtype):
    torch.manual_seed(1)
    lstm, x = nn.LSTM(4, 3, batch_first=True).to(dtype), torch.randn(1, 9, 4).to(dtype)
    torch.testing.assert_close(define("lstm_by_hand")(lstm, x[0]), lstm(x)[0][0])


def test_reverse_turns_each_line_in_its_own_length():
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])[..., None]
    turned = define("reverse")(x, torch.tensor([4, 2, 1]))[..., 0]
    assert turned.tolist() == [[4, 3, 2, 1], [6, 5, 0, 0], [7, 0, 0, 0]]


def test_the_softmax_loss_ignores_the_padding():
    emissions, tags, mask, _ = a_case(9, [5, 2], dtype=torch.float32)
    loss = define("softmax_loss")(emissions, tags, mask)
    emissions[~mask] = 100.0
    assert define("softmax_loss")(emissions, tags, mask) == loss


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
        define("collate")([["fine"], words])


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
    lines = [["i", "am", "here"]]
    perfect = define("score")(["SBEBIIE"], lines)
    expected = {"precision": 1, "recall": 1, "F1": 1, "letters": 1, "illegal": 0}
    assert perfect == expected
    joined = define("score")(["BIEBIIE"], lines)  # "iam", "here"
    assert math.isclose(joined["precision"], 1 / 2)
    assert math.isclose(joined["recall"], 1 / 3)
    assert math.isclose(joined["F1"], 0.4)
    assert math.isclose(joined["letters"], 5 / 7)
    nothing = define("score")(["BIIIIII"], lines)
    assert nothing["F1"] == 0 and nothing["illegal"] == 1


@pytest.mark.parametrize("both", [False, True])
def test_two_tags_are_always_legal(both):
    emissions, _, mask, _ = a_case(2, [9, 1, 5], dtype=torch.float32)
    tags = define("cut_if_likely")(emissions, mask, both)
    for row, n in zip(tags.tolist(), [9, 1, 5], strict=True):
        assert define("is_legal")("".join("BIES"[t] for t in row[:n]))


def test_predict_gives_each_line_its_own_length():
    torch.manual_seed(0)
    guesses = define("predict")(define("Window")(1), define("CRF")().decode, WORDS)
    assert [len(g) for g in guesses] == [len("".join(words)) for words in WORDS]


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


def test_unseen_words_and_thinning():
    assert define("share_unseen")([["a", "b"]], [["a", "c"], ["c", "b"]]) == 0.5
    assert define("thin")(list(range(10)), 3) == [0, 3, 6]
    assert define("thin")([1, 2], 5) == [1, 2]


def test_the_dictionary_looks_ahead():
    counts = {"ab": 1, "abc": 1, "c": 1, "cd": 1, "d": 1}
    assert define("most_probable")("abcd", counts) in (["abc", "d"], ["ab", "cd"])
    assert define("most_probable")("abcd", {**counts, "cd": 9}) == ["ab", "cd"]
    assert define("longest_first")("abcd", {**counts, "cd": 9}) == ["abc", "d"]
    with pytest.raises(ValueError, match="'xyz' cannot be cut into words"):
        define("most_probable")("xyz", counts)
    with pytest.raises(ValueError, match="no word of the dictionary begins 'xyz'"):
        define("longest_first")("xyz", counts)


def test_the_combinations_survive_what_can_be_moved_into_the_emissions():
    _, _, _, scores = a_case(11, [3])
    u, v = torch.randn(2, 4, generator=generator(1), dtype=torch.float64)
    moved = scores.step + u[:, None] + v
    before, after = [define("combinations")(step) for step in (scores.step, moved)]
    assert before == pytest.approx(after)

"""Chapter 4: metrics against scikit-learn, loop, augmentation, checkpoints."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from sklearn import metrics
from torch import nn

from notebooks import NOTEBOOKS, code_cells, load_definitions, run_twice, section

PATH = NOTEBOOKS / "04_training_and_evaluation.ipynb"
CHAPTER = load_definitions(
    PATH,
    "Batches",
    "EarlyStopping",
    "augment",
    "calibration",
    "confusion_matrix",
    "evaluate",
    "fit",
    "generators",
    "load_checkpoint",
    "make_mlp",
    "precision_recall_f1",
    "predict",
    "read_checkpoint",
    "roc_auc",
    "save_checkpoint",
    "sign_test",
    "stratified_folds",
    "top_k_accuracy",
    "train_epoch",
    "update",
    "warmup_cosine",
    "wilson_interval",
)


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Metrics


@pytest.mark.parametrize("seed", range(20))
def test_confusion_precision_recall_and_f1_agree_with_scikit_learn(seed):
    g = generator(seed)
    classes = 2 + seed % 6
    present = 1 + seed % classes  # some classes are absent from the labels
    labels = torch.randint(present, (40,), generator=g)
    guesses = torch.randint(classes, (40,), generator=g)
    confusion = define("confusion_matrix")(labels, guesses, classes)
    every = list(range(classes))
    assert (
        confusion.numpy() == metrics.confusion_matrix(labels, guesses, labels=every)
    ).all()
    ours = define("precision_recall_f1")(confusion)
    theirs = metrics.precision_recall_fscore_support(
        labels, guesses, labels=every, zero_division=0
    )
    for row, reference in zip(ours, theirs[:3], strict=True):
        torch.testing.assert_close(row, torch.from_numpy(reference))
    macro = metrics.f1_score(
        labels, guesses, labels=every, average="macro", zero_division=0
    )
    assert math.isclose(ours[2].mean(), macro)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("levels", [1, 2, 5, 10**9])
def test_roc_auc_agrees_with_scikit_learn_with_ties(seed, levels):
    g = generator(seed)
    labels = torch.randint(2, (30,), generator=g)
    labels[:2] = torch.tensor([0, 1])
    scores = torch.randint(levels, (30,), generator=g).float()
    ours = define("roc_auc")(labels, scores)
    assert math.isclose(ours, metrics.roc_auc_score(labels, scores), abs_tol=1e-12)
    reverse = define("roc_auc")(labels, -scores)
    assert math.isclose(ours + reverse, 1, abs_tol=1e-12)


@pytest.mark.parametrize("label", [0, 1])
def test_roc_auc_needs_both_classes(label):
    with pytest.raises(ValueError, match="at least one positive and one negative"):
        define("roc_auc")(torch.full((5,), label), torch.rand(5))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_accuracy_agrees_with_scikit_learn(k):
    g = generator(k)
    logits = torch.randn(50, 5, generator=g)
    labels = torch.randint(5, (50,), generator=g)
    reference = metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(5))
    assert math.isclose(
        define("top_k_accuracy")(logits, labels, k), reference, rel_tol=1e-6
    )


def test_wilson_interval_of_a_known_case():
    low, high = define("wilson_interval")(8, 10)
    assert math.isclose(low, 0.4901, abs_tol=1e-3)  # Agresti and Coull (1998)
    assert math.isclose(high, 0.9433, abs_tol=1e-3)
    for correct in (0, 10):
        low, high = define("wilson_interval")(correct, 10)
        assert -1e-12 <= low < high <= 1 + 1e-12


def test_sign_test_of_known_cases():
    yes, no = torch.ones(5).bool(), torch.zeros(5).bool()
    assert define("sign_test")(yes, yes) == 1
    assert define("sign_test")(yes, no) == 2 / 32
    assert define("sign_test")(no, yes) == 2 / 32


def test_calibration_error_of_known_cases():
    logits = torch.log(torch.tensor([[0.75, 0.25]])).repeat(8, 1)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    rows, ece = define("calibration")(logits, labels)
    assert len(rows) == 1 and ece < 1e-6
    _, ece = define("calibration")(logits, torch.ones_like(labels))
    assert math.isclose(ece, 0.75, abs_tol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_folds_hold_every_class_evenly(k):
    labels = torch.randint(4, (101,), generator=generator(k))
    folds = define("stratified_folds")(labels, k, generator(0))
    assert folds.unique().tolist() == list(range(k)) and len(folds) == 101
    counts = define("confusion_matrix")(folds, labels, max(4, k))[:k]
    assert (counts.max(dim=0).values - counts.min(dim=0).values).max() <= 1
    assert folds.bincount().max() - folds.bincount().min() <= 1


# Batches, loop, early stopping


def test_batches_hold_every_sample_once_and_follow_the_seed():
    images, labels = torch.arange(23.0), torch.arange(23)
    first = define("Batches")(images, labels, 5, generator(1))
    again = define("Batches")(images, labels, 5, generator(1))
    one, two = [torch.cat([y for _, y in first]) for _ in range(2)]
    assert len(first) == 5 and one.sort().values.equal(labels)
    assert not one.equal(two)
    assert torch.cat([y for _, y in again]).equal(one)
    plain = torch.cat([y for _, y in define("Batches")(images, labels, 5)])
    assert plain.equal(labels)


def test_the_loss_of_an_epoch_is_the_mean_over_images_not_over_batches():
    images = torch.randn(10, 1, 28, 28, generator=generator(0))
    labels = torch.arange(10)
    model = define("make_mlp")((8,))
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = define("Batches")(images, labels, 7)  # batches of 7 and 3
    loss = define("train_epoch")(model, loader, still)
    expected, _ = define("evaluate")(model, images, labels)
    assert math.isclose(loss, expected, rel_tol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_predict_is_in_eval_mode_and_gives_the_mode_back(training):
    images = torch.randn(6, 1, 28, 28, generator=generator(0))
    model = define("make_mlp")((8,), 0.5).train(training)
    first, second = [define("predict")(model, images, 4) for _ in range(2)]
    assert first.shape == (6, 10) and first.equal(second)
    assert model.training == training and not first.requires_grad


def test_early_stopping_keeps_the_best_and_waits():
    stopper, model = define("EarlyStopping")(patience=2), nn.Linear(1, 1)
    losses = [3.0, 1.0, float("nan"), 0.5, 2.0, 1.0]
    told = []
    for epoch, loss in enumerate(losses):
        nn.init.constant_(model.weight, epoch)
        told.append(stopper.update(loss, model))
    assert told == [False, False, False, False, False, True]
    stopper.restore(model)
    assert model.weight.item() == 3 and stopper.best == 0.5


def test_early_stopping_without_a_finite_loss_says_so():
    stopper, model = define("EarlyStopping")(patience=1), nn.Linear(1, 1)
    assert stopper.update(float("nan"), model)
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        stopper.restore(model)


def test_fit_stops_when_told():
    data = torch.randn(8, 1, 28, 28, generator=generator(0)), torch.arange(8)
    model = define("make_mlp")((8,))
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    stopper = define("EarlyStopping")(patience=3)
    loader = define("Batches")(*data, 8)
    history = define("fit")(model, loader, still, 50, data, stopper)
    assert {len(values) for values in history.values()} == {4}


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_the_schedule_warms_up_peaks_and_ends_at_zero(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler, rates = define("warmup_cosine")(optimizer, steps), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    peak = rates.index(max(rates))
    assert math.isclose(max(rates), 0.5) and min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    for _ in range(2 * steps):  # and beyond the end it stays there
        assert scheduler.get_last_lr()[0] == 0
        optimizer.step()
        scheduler.step()


# Augmentation


def test_augmentation_with_no_amounts_changes_nothing():
    images = torch.rand(4, 3, 28, 20, generator=generator(0))
    same = define("augment")(images, degrees=0, shift=0, scale=0, slant=0)
    torch.testing.assert_close(same, images, atol=1e-4, rtol=0)


def test_augmentation_follows_the_generator_and_differs_between_images():
    images = torch.rand(1, 1, 28, 28, generator=generator(0)).repeat(5, 1, 1, 1)
    one, two = [define("augment")(images, generator(3)) for _ in range(2)]
    assert one.shape == images.shape and one.equal(two)
    assert all((one[0] - other).abs().max() > 0.01 for other in one[1:])
    assert one.min() >= images.min() - 1e-5 and one.max() <= images.max() + 1e-5


def test_augmentation_shifts_by_no_more_than_it_says():
    images = torch.zeros(200, 1, 29, 29)
    images[:, 0, 14, 14] = 1
    moved = define("augment")(images, generator(0), degrees=0, scale=0, slant=0)
    place = moved.flatten(1).argmax(dim=1)
    rows, columns = place // 29 - 14, place % 29 - 14
    for offset in (rows, columns):
        assert offset.min() == -2 and offset.max() == 2


# Checkpoints


def a_run(seed: int, hidden=(16,)):
    """Model, optimiser, scheduler and loader of a short run with dropout."""
    torch.manual_seed(seed)
    model = define("make_mlp")(hidden, dropout=0.3)
    images = torch.randn(40, 1, 28, 28, generator=generator(0))
    labels = torch.randint(10, (40,), generator=generator(1))
    loader = define("Batches")(images, labels, 16, generator(seed), define("augment"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, define("warmup_cosine")(optimizer, 12), loader


def train(run, epochs: int) -> torch.Tensor:
    model, optimizer, scheduler, loader = run
    define("fit")(model, loader, optimizer, epochs, scheduler=scheduler)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, at):
    whole = train(a_run(0), 4)
    run = a_run(0)
    train(run, at)
    define("save_checkpoint")(tmp_path / "run.pt", at, *run)
    torch.manual_seed(99)
    run = a_run(5)
    assert define("load_checkpoint")(tmp_path / "run.pt", *run) == at
    assert train(run, 4 - at).equal(whole)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt does not exist: start"):
        define("read_checkpoint")(tmp_path / "none.pt")


@pytest.mark.parametrize("kind", ["cut off", "altered", "empty", "text", "code"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, kind):
    path = tmp_path / "run.pt"
    define("save_checkpoint")(path, 1, *a_run(0))
    content = path.read_bytes()
    if kind == "code":  # weights_only refuses to run it
        torch.save({"epoch": print}, path)
    else:
        path.write_bytes(
            {
                "cut off": content[: len(content) // 2],
                "altered": b"\0" * 200 + content[200:-200] + b"\0" * 200,
                "empty": b"",
                "text": b"not a checkpoint",
            }[kind]
        )
    with pytest.raises(RuntimeError, match=r"run\.pt is damaged.*Go on from"):
        define("load_checkpoint")(path, *a_run(0))


@pytest.mark.parametrize("content", [{"epoch": 1}, {}])
def test_a_file_that_lacks_parts_is_named(tmp_path, content):
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(RuntimeError, match=r"part\.pt lacks .*save_checkpoint"):
        define("read_checkpoint")(tmp_path / "part.pt")


@pytest.mark.parametrize("hidden", [(8,), (16, 16), ()])
def test_a_file_of_another_network_is_refused_and_touches_nothing(tmp_path, hidden):
    define("save_checkpoint")(tmp_path / "run.pt", 1, *a_run(0))
    run = a_run(1, hidden)
    before = nn.utils.parameters_to_vector(run[0].parameters()).detach().clone()
    with pytest.raises(RuntimeError, match=r"run\.pt does not fit.*sizes it was saved"):
        define("load_checkpoint")(tmp_path / "run.pt", *run)
    assert nn.utils.parameters_to_vector(run[0].parameters()).equal(before)


def test_a_file_of_another_optimiser_is_refused_and_touches_nothing(tmp_path):
    define("save_checkpoint")(tmp_path / "run.pt", 1, *a_run(0))
    model, _, scheduler, loader = a_run(1)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"optimizer is AdamW.*SGD here.*same optim"):
        define("load_checkpoint")(tmp_path / "run.pt", model, sgd, scheduler, loader)
    assert nn.utils.parameters_to_vector(model.parameters()).equal(before)
    assert not sgd.state


def test_every_kind_of_device_has_its_random_state_saved(tmp_path, monkeypatch):
    """`torch.meta` stands in for `torch.cuda`, `torch.mps` and the like."""
    states = [torch.ByteTensor([1]), torch.ByteTensor([2])]
    restored = []
    device = SimpleNamespace(get_rng_state=states.pop, set_rng_state=restored.append)
    monkeypatch.setattr(torch, "meta", device, raising=False)
    assert define("generators")(nn.Linear(1, 1)) == {"cpu": torch}
    run = a_run(0)
    run[0].to("meta")
    define("save_checkpoint")(tmp_path / "run.pt", 1, *run)
    saved = define("read_checkpoint")(tmp_path / "run.pt")["random"]
    assert saved["meta"].tolist() == [2] and saved["cpu"].equal(torch.get_rng_state())
    define("load_checkpoint")(tmp_path / "run.pt", *run)
    assert [state.tolist() for state in restored] == [[2]]


def test_a_run_may_move_to_another_kind_of_device(tmp_path):
    path = tmp_path / "run.pt"
    define("save_checkpoint")(path, 1, *a_run(0))
    saved = define("read_checkpoint")(path)
    saved["random"]["xpu"] = torch.ByteTensor([1])
    torch.save(saved, path)
    assert define("load_checkpoint")(path, *a_run(1)) == 1


# What readers may pass by mistake


def test_nan_is_refused():
    scores = torch.tensor([0.1, math.nan, 0.3])
    with pytest.raises(ValueError, match="nan"):
        define("roc_auc")(torch.tensor([0, 1, 1]), scores)
    with pytest.raises(ValueError, match="nan"):
        define("calibration")(scores[:, None].expand(3, 2), torch.zeros(3).long())


def test_roc_auc_takes_minus_one_for_negatives_as_scikit_learn_does():
    labels, scores = torch.tensor([-1, 1, -1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = metrics.roc_auc_score(labels, scores)
    assert define("roc_auc")(labels, scores) == expected == 0.75


def test_sizes_that_do_not_fit_are_named():
    for labels, guesses in (([0, 3], [0, 1]), ([0, 1], [0, 3]), ([0, 1], [0, -1])):
        with pytest.raises(ValueError, match="classes -?[0-3] to .* within 0 to 2"):
            define("confusion_matrix")(torch.tensor(labels), torch.tensor(guesses), 3)
    with pytest.raises(ValueError, match="12 right of 10"):
        define("wilson_interval")(12, 10)
    with pytest.raises(ValueError, match="7 folds of 5 samples"):
        define("stratified_folds")(torch.zeros(5).long(), 7)
    with pytest.raises(ValueError, match="k = 6 of 5 classes"):
        define("top_k_accuracy")(torch.randn(3, 5), torch.zeros(3).long(), 6)
    with pytest.raises(ValueError, match="3 images, 4 labels"):
        define("Batches")(torch.zeros(3, 1, 28, 28), torch.zeros(4))


# Cells


def set_up() -> dict:
    """A namespace in which the chapter's parameters and its set-up have been run."""
    namespace: dict = {"__name__": PATH.stem}
    run_twice([cell.source for cell in code_cells(PATH)[:2]], namespace)
    return namespace | load_definitions(PATH, "check_data", "make_mlp", "update")


def test_cells_may_be_run_twice():
    """Gradients added up; a network went on learning the one batch."""
    namespace = set_up()
    run_twice(section(PATH, "4.2", "4.3"), namespace)
    namespace["fit_images"] = torch.randn(32, 1, 28, 28)
    namespace["fit_labels"] = torch.arange(32) % 10
    run_twice([s for s in section(PATH, "4.3", "4.4") if "AdamW" in s], namespace)


@pytest.fixture
def read_digits(tmp_path, monkeypatch):
    """Read MNIST below ~/bookdata, as the chapter does; the folder of its files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    raw = tmp_path / "bookdata" / "MNIST" / "raw"
    shutil.copytree(NOTEBOOKS / "data" / "MNIST" / "raw", raw)
    cell = next(cell.source for cell in code_cells(PATH) if "data" in cell.tags)

    def read(**parameters) -> dict:
        namespace = set_up() | {"DATA_DIR": "~/bookdata"} | parameters
        run_twice([cell], namespace)
        return namespace

    return read, raw


def test_digits_are_read_from_a_folder_of_the_readers_own(read_digits):
    read, _ = read_digits
    assert read()["raw_train"].shape == (4000, 1, 28, 28)


@pytest.mark.parametrize("kept", [0, 10, 16, 1000])
def test_digits_that_were_cut_off_are_named_with_the_remedy(read_digits, kept):
    read, raw = read_digits
    file = raw / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RuntimeError, match="MNIST/raw is not whole.*Delete this"):
        read()


def test_more_images_than_there_are_is_an_error_that_names_both(read_digits):
    read, _ = read_digits
    with pytest.raises(ValueError, match="4000 training and 1000 test.*N_TRAIN"):
        read(N_TEST=10_000)

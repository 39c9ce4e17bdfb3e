"""Chapter 4: metrics against scikit-learn, loop, augmentation, checkpoints."""

import math
import shutil
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics
from torch import nn

from notebooks import (
    NOTEBOOKS,
    code_cells,
    generator,
    load_definitions,
    run_twice,
    section,
)

PATH = NOTEBOOKS / "04_training_and_evaluation.ipynb"
CHAPTER = load_definitions(
    PATH,
    "SEED",
    "CNN",
    "EarlyStopping",
    "Net",
    "accuracy",
    "augment",
    "confusion_matrix",
    "fit",
    "generators",
    "go_on",
    "load_checkpoint",
    "make_loader",
    "precision_recall_f1",
    "predict",
    "save_checkpoint",
    "sign_test",
    "top_k_accuracy",
    "train",
    "warmup_cosine",
    "wilson_interval",
)


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


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


@pytest.mark.parametrize("wins, losses", [(5, 0), (0, 5), (7, 3), (4, 4), (0, 0)])
def test_the_sign_test_counts_coin_throws(wins, losses):
    first = torch.tensor([True] * (wins + 9) + [False] * losses)
    second = torch.tensor([False] * wins + [True] * (9 + losses))
    n, worse = wins + losses, min(wins, losses)
    throws = [bin(i).count("1") for i in range(2**n)]
    lopsided = sum(k <= worse or k >= n - worse for k in throws) / 2**n
    assert define("sign_test")(first, second) == (wins, losses, lopsided)


@pytest.mark.parametrize("z", [1.0, 1.96])
@pytest.mark.parametrize("correct", [0, 3, 50, 97, 100])
def test_the_ends_of_the_wilson_interval_are_z_deviations_away(correct, z):
    for p in define("wilson_interval")(correct, 100, z):
        variance = p * (1 - p) / 100
        assert math.isclose((correct / 100 - p) ** 2, z**2 * variance, abs_tol=1e-12)


def test_the_wilson_interval_covers_what_it_says():
    z = NormalDist().inv_cdf(0.975)
    assert math.isclose(z, 1.96, abs_tol=1e-3)
    covered = 0.0
    for k in range(201):
        low, high = define("wilson_interval")(k, 200)
        covered += math.comb(200, k) * 0.9**k * 0.1 ** (200 - k) * (low < 0.9 < high)
    assert abs(covered - 0.95) < 0.02


# Loader, loop, early stopping


def batches_of(loader) -> torch.Tensor:
    return torch.cat([targets for _, targets in loader])


def test_batches_hold_every_sample_once_and_follow_the_seed():
    images, labels = torch.arange(23.0), torch.arange(23)
    first, again = [define("make_loader")(images, labels, 5, seed=1) for _ in range(2)]
    one, two = batches_of(first), batches_of(first)
    assert len(first) == 5 and one.sort().values.equal(labels)
    assert not one.equal(two) and batches_of(again).equal(one)
    for inputs, targets in first:
        assert inputs.equal(targets.float())


def test_a_loader_changes_its_batches_with_its_own_generator():
    seen = []

    def change(inputs, generator):
        seen.append(generator)
        return inputs + 100

    loader = define("make_loader")(torch.arange(6.0), torch.arange(6), 4, 0, change)
    assert all((inputs == targets + 100).all() for inputs, targets in loader)
    assert seen == [loader.generator] * 2


def small_data():
    return torch.randn(32, 1, 28, 28, generator=generator(0)), torch.arange(32) % 10


@pytest.mark.parametrize("clip", [None, 0.1])
def test_train_makes_the_steps_of_a_loop_written_out(clip):
    images, labels = small_data()
    batches = list(zip(images.split(10), labels.split(10), strict=True))
    torch.manual_seed(0)
    ours, theirs = [define("Net")(8, 1) for _ in range(2)]
    theirs.load_state_dict(ours.state_dict())
    rates = {"lr": 0.5, "momentum": 0.9}
    optimizers = [torch.optim.SGD(m.parameters(), **rates) for m in (ours, theirs)]
    schedulers = [define("warmup_cosine")(optimizer, 4) for optimizer in optimizers]
    losses = define("train")(
        ours.eval(), batches, optimizers[0], scheduler=schedulers[0], clip=clip
    )
    expected = []
    for x, y in batches:
        loss = F.cross_entropy(theirs(x), y)
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        for p, g in zip(theirs.parameters(), gradients, strict=True):
            p.grad = factor * g
        optimizers[1].step()
        schedulers[1].step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-4) and ours.training
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_predict_is_in_eval_mode_and_gives_the_mode_back(training):
    images, labels = small_data()
    model = define("Net")(8, 1, dropout=0.5).train(training)
    first, second = [define("predict")(model, images, 5) for _ in range(2)]
    assert first.shape == (32, 10) and first.equal(second)
    assert model.training == training and not first.requires_grad
    expected = metrics.accuracy_score(labels, first.argmax(dim=1))
    assert math.isclose(
        define("accuracy")(model, images, labels), expected, abs_tol=1e-6
    )


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_network_is_the_stack_of_layers_that_it_says(depth):
    torch.manual_seed(0)
    net = define("Net")(8, depth, torch.tanh)
    stack = nn.Sequential(nn.Flatten())
    for layer in net.layers:
        stack.extend([layer, nn.Tanh()])
    torch.testing.assert_close(net(small_data()[0]), stack[:-1](small_data()[0]))
    assert len(list(net.parameters())) == 2 * (depth + 1)


def test_the_cnn_halves_the_picture_twice():
    model, (images, _) = define("CNN")(width=4, hidden=8), small_data()
    shapes = []
    for layer in (model.norm1, model.norm2):
        layer.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    assert model(images).shape == (32, 10)
    assert shapes == [(32, 4, 14, 14), (32, 8, 7, 7)]


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


def test_fit_stops_when_told_and_records_what_it_saw():
    data = small_data()
    model = define("Net")(8, 1)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    stopper = define("EarlyStopping")(patience=3)
    loader = define("make_loader")(*data, 8)
    history = define("fit")(model, loader, still, 50, data, stopper)
    assert {len(values) for values in history.values()} == {4}
    logits = define("predict")(model, data[0])
    assert math.isclose(
        history["validation loss"][-1], F.cross_entropy(logits, data[1])
    )
    assert math.isclose(history["training loss"][0], stopper.best, rel_tol=1e-5)
    assert history["accuracy"][0] == define("accuracy")(model, *data)


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


def a_run(seed: int, width: int = 16):
    """Model, optimiser, scheduler and loader of a short run with dropout."""
    torch.manual_seed(seed)
    model = define("Net")(width, 1, dropout=0.3)
    images = torch.randn(40, 1, 28, 28, generator=generator(0))
    labels = torch.randint(10, (40,), generator=generator(1))
    loader = define("make_loader")(images, labels, 16, seed, define("augment"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, define("warmup_cosine")(optimizer, 12), loader


def trained(run, epochs: int) -> torch.Tensor:
    model, optimizer, scheduler, loader = run
    for _ in range(epochs):
        define("train")(model, loader, optimizer, scheduler=scheduler)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, at):
    whole = trained(a_run(0), 4)
    run = a_run(0)
    trained(run, at)
    define("save_checkpoint")(tmp_path / "run.pt", at, *run)
    torch.manual_seed(99)
    run = a_run(5)
    assert define("load_checkpoint")(tmp_path / "run.pt", *run) == at
    assert trained(run, 4 - at).equal(whole)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    define("save_checkpoint")(path, 1, *a_run(0))
    content = path.read_bytes()

    def cut_off(checkpoint, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        define("save_checkpoint")(path, 2, *a_run(1))
    assert path.read_bytes() == content


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"epoch": print}, tmp_path / "run.pt")
    with pytest.raises(Exception, match="[Ww]eights.?only|Unsupported"):
        define("load_checkpoint")(tmp_path / "run.pt", *a_run(0))


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
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["random"]
    assert saved["meta"].tolist() == [2] and saved["cpu"].equal(torch.get_rng_state())
    define("load_checkpoint")(tmp_path / "run.pt", *run)
    assert [state.tolist() for state in restored] == [[2]]


def test_a_run_may_move_to_another_kind_of_device(tmp_path):
    path = tmp_path / "run.pt"
    define("save_checkpoint")(path, 1, *a_run(0))
    saved = torch.load(path, weights_only=True)
    saved["random"]["xpu"] = torch.ByteTensor([1])
    torch.save(saved, path)
    assert define("load_checkpoint")(path, *a_run(1)) == 1


# What readers may pass by mistake


def test_sizes_that_do_not_fit_are_named():
    for labels, guesses in (([0, 3], [0, 1]), ([0, 1], [0, 3]), ([0, 1], [0, -1])):
        with pytest.raises(ValueError, match="classes -?[0-3] to .* within 0 to 2"):
            define("confusion_matrix")(torch.tensor(labels), torch.tensor(guesses), 3)
    with pytest.raises(ValueError, match="12 right of 10"):
        define("wilson_interval")(12, 10)
    with pytest.raises(ValueError, match="k = 6 of 5 classes"):
        define("top_k_accuracy")(torch.randn(3, 5), torch.zeros(3).long(), 6)
    with pytest.raises(AssertionError, match="[Ss]ize mismatch"):  # PyTorch's own
        define("make_loader")(torch.zeros(3, 1, 28, 28), torch.zeros(4))


# Watching


def test_tensorboard_reads_what_a_run_wrote(tmp_path, monkeypatch):
    """Under the names and at the epochs that the chapter gives, the loss of `train`."""
    monkeypatch.setitem(CHAPTER, "valid", small_data())
    writer = CHAPTER["SummaryWriter"](log_dir=tmp_path)
    run, twin = a_run(0), a_run(0)
    torch.manual_seed(1)
    define("go_on")(run, range(2, 4), writer)
    writer.close()
    events = CHAPTER["EventAccumulator"](str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["accuracy/validation", "loss/training"]

    torch.manual_seed(1)
    model, optimizer, scheduler, loader = twin
    losses = [
        define("train")(model, loader, optimizer, scheduler=scheduler) for _ in range(2)
    ]
    written = events.Scalars("loss/training")
    assert [event.step for event in written] == [2, 3]
    expected = [sum(values) / len(values) for values in losses]
    assert [event.value for event in written] == pytest.approx(expected)
    right = define("accuracy")(model, *small_data())
    assert events.Scalars("accuracy/validation")[-1].value == pytest.approx(right)


# Cells


def set_up() -> dict:
    """A namespace in which the chapter's parameters and its set-up have been run."""
    namespace: dict = {"__name__": PATH.stem}
    run_twice([cell.source for cell in code_cells(PATH)[:3]], namespace)
    return namespace | load_definitions(PATH, "check_data", "predict", "train")


def test_cells_may_be_run_twice():
    """Gradients added up; a network went on learning the one batch."""
    namespace = set_up()
    namespace["fit_images"] = torch.randn(32, 1, 28, 28)
    namespace["fit_labels"] = torch.arange(32) % 10
    run_twice(section(PATH, "4.2", "4.3"), namespace)
    run_twice([s for s in section(PATH, "4.3", "4.4") if "one_batch" in s], namespace)


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

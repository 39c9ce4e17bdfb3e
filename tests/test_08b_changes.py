"""Chapter 8b: maps, mixtures and frozen layers against references; CIFAR-10's path."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import Ridge
from torch import nn
from torchvision import datasets
from torchvision.models import resnet18

from notebooks import NOTEBOOKS, load_definitions, randn, section

PATH = NOTEBOOKS / "08b_what_fine_tuning_changes.ipynb"
NETWORK = ["BasicBlock", "STEMS", "make_resnet", "make_shortcut", "make_small"]
NETWORK += ["make_stage", "make_stem", "with_new_head"]
LOOPS = ["STAGES", "fine_tune", "make_groups", "predict", "train", "warmup_cosine"]
NOTEBOOK = load_definitions(
    PATH,
    *NETWORK,
    *LOOPS,
    "KINDS",
    "WEIGHTS",
    "features_of",
    "train_head",
    "fit_map",
    "for_imagenet",
    "freeze_norm",
    "mix",
    "replace_norms",
    "rescale",
    "score",
    "ten_outputs",
    "with_teacher",
)
NOTEBOOK |= {"device": torch.device("cpu"), "SEED": 0}


def define(name):
    """A definition of the notebook."""
    return NOTEBOOK[name]


def network(classes: int = 4, seed: int = 0) -> nn.Sequential:
    """A small network whose running averages are not those of its start."""
    torch.manual_seed(seed)
    model = define("make_small")(classes)
    model.train()(randn(16, 3, 32, 32, seed=seed))
    return model


# Heads and maps


def test_features_are_those_of_evaluation_mode_and_all_modes_stay():
    model = network().train()
    model.layer2.eval()
    before = {name: m.training for name, m in model.named_modules()}
    steps = model.bn1.num_batches_tracked.item()
    images = randn(5, 3, 32, 32)
    features = define("features_of")(model, images)
    assert {name: m.training for name, m in model.named_modules()} == before
    assert model.bn1.num_batches_tracked == steps
    logits = model.eval()(images)
    torch.testing.assert_close(model.fc(features), logits, atol=1e-5, rtol=1e-4)


def test_a_head_learns_what_is_linear():
    features = randn(60, 5)
    targets = features[:, :3].argmax(dim=1)
    head = define("train_head")(features, targets, 3)
    assert define("score")(head, features, targets) > 0.9


def test_the_linear_map_is_ridge_regression():
    source, target = randn(50, 6), randn(50, 6, seed=1) + 3
    ours = define("fit_map")(source, target, "linear")
    theirs = Ridge(alpha=0.01 * 50).fit(source.numpy(), target.numpy())
    expected = torch.tensor(theirs.predict(source.numpy()))
    torch.testing.assert_close(ours(source), expected, atol=1e-4, rtol=1e-4)


def test_the_turn_is_scipys_and_undoes_a_turn():
    source = randn(40, 6) + 2
    turn = torch.linalg.qr(randn(6, 6, seed=1))[0]
    target = source @ turn - 1
    ours = define("fit_map")(source, target, "turn")
    torch.testing.assert_close(ours(source), target, atol=1e-4, rtol=1e-4)
    a, b = ((x - x.mean(dim=0)).numpy() for x in (source, randn(40, 6, seed=2)))
    theirs, _ = orthogonal_procrustes(a, b)
    ours = define("fit_map")(torch.tensor(a), torch.tensor(b), "turn")
    torch.testing.assert_close(ours.weight.T, torch.tensor(theirs), atol=1e-4, rtol=0)


def test_the_shift_moves_the_mean_only():
    source, target = randn(30, 4), randn(30, 4, seed=1) + 5
    ours = define("fit_map")(source, target, "shift")(source)
    torch.testing.assert_close(ours.mean(dim=0), target.mean(dim=0))
    torch.testing.assert_close(ours.diff(dim=0), source.diff(dim=0))


def test_a_mix_has_both_networks_at_its_ends():
    first, then = network(seed=0), network(seed=1)
    then.bn1.running_mean.fill_(2.0)
    kept = first.bn1.running_mean.clone()
    for share, expected in ((0.0, first), (1.0, then)):
        mixed = define("mix")(first, then, share).state_dict()
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(mixed[name], value)
    halfway = define("mix")(first, then, 0.5).bn1.running_mean
    torch.testing.assert_close(halfway, 1 + kept / 2)
    assert first.bn1.running_mean.equal(kept), "the first is as it was"


# Statistics


def test_frozen_norms_compute_what_evaluation_mode_does_in_both_modes():
    model, images = network().eval(), randn(6, 3, 32, 32, seed=3)
    expected = model(images)
    fixed = define("replace_norms")(network(), define("freeze_norm"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fixed.modules())
    before = {name: t.clone() for name, t in fixed.state_dict().items()}
    for mode in (True, False):
        torch.testing.assert_close(
            fixed.train(mode)(images), expected, atol=1e-4, rtol=1e-4
        )
    assert all(t.equal(before[name]) for name, t in fixed.state_dict().items())


def test_training_a_head_moves_the_statistics_of_a_frozen_body():
    for name, moves in (("batch", True), ("frozen", False)):
        model = define("with_new_head")(network(), 0)
        if name == "frozen":
            define("replace_norms")(model, define("freeze_norm"))
        model[:-1].requires_grad_(False)
        before = model.bn1.running_mean.clone()
        images, targets = randn(40, 3, 32, 32, seed=5), torch.arange(40) % 4
        define("fine_tune")(model, images, targets, 0.01, 0, steps=2)
        assert model.bn1.running_mean.equal(before) is not moves


def test_rescaled_pictures_have_the_usual_mean_and_deviation(monkeypatch):
    monkeypatch.setitem(NOTEBOOK, "few_images", usual := randn(9, 3, 8, 8) * 2 + 1)
    dusk = randn(9, 3, 8, 8, seed=1) / 4 - 1
    ours = define("rescale")(dusk, dusk)
    for statistic in (torch.mean, torch.std):
        found, wanted = (statistic(t, dim=(0, 2, 3)) for t in (ours, usual))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    exact = define("rescale")(usual / 4 - 1, usual / 4 - 1)
    torch.testing.assert_close(exact, usual, atol=1e-4, rtol=1e-4)


def test_kinds_of_pictures_stay_between_zero_and_one():
    pictures = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for change in define("KINDS").values():
        assert 0 <= change(pictures).min() and change(pictures).max() <= 1


# Exercises


def test_the_head_of_ten_outputs_begins_with_the_old_one(monkeypatch):
    monkeypatch.setitem(NOTEBOOK, "base", base := network(6))
    ten, images = define("ten_outputs")(), randn(4, 3, 32, 32)
    torch.testing.assert_close(ten.eval()(images)[:, :6], base.eval()(images))
    assert ten.fc.weight.shape == (10, 64) and ten.fc.weight.requires_grad


def test_the_teachers_loss_is_its_formula():
    outputs, teacher = randn(7, 10), randn(7, 6, seed=1)
    targets = torch.arange(7) % 4
    ours = define("with_teacher")(outputs, torch.cat([teacher, targets[:, None]], 1))
    p, q = (t.div(2).softmax(dim=1) for t in (teacher, outputs[:, :6]))
    divergence = (p * (p / q).log()).sum(dim=1).mean()
    expected = nn.functional.cross_entropy(outputs[:, 6:], targets) + 4 * divergence
    torch.testing.assert_close(ours, expected)


# ImageNet's weights on CIFAR-10, with stand-ins in the formats of the originals


@pytest.mark.parametrize("size", [32, 64, 224])
def test_the_transforms_are_those_of_the_weights(size):
    noise = np.random.default_rng(0).integers(256, size=(80, 80, 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    theirs = define("WEIGHTS").transforms(resize_size=size, crop_size=size)(photo)
    ours = define("for_imagenet")(size)(photo)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture
def cifar(tmp_path, monkeypatch, serve):
    """Serve a small archive in the layout of CIFAR-10; the list of files asked for."""
    rng = np.random.default_rng(0)
    sums, archive = {}, tmp_path / "served" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    with tarfile.open(archive, "w:gz") as tar:
        for name in [*names, "batches.meta"]:
            data = rng.integers(256, size=(20, 3072), dtype=np.uint8)
            # the originals' Python 2 strings are read as str, so str stands for them
            content = {"data": data, "labels": [i % 10 for i in range(20)]}
            if name == "batches.meta":
                content = {"label_names": [f"class {i}" for i in range(10)]}
            packed = pickle.dumps(content, protocol=2)
            sums[name] = hashlib.md5(packed, usedforsecurity=False).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(packed)
            tar.addfile(info, io.BytesIO(packed))
    url, asked = serve(archive.parent)
    packed = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "url", url + archive.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", packed)
    train = [[name, sums[name]] for name in names[:5]]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [[names[5], sums[names[5]]]])
    meta = datasets.CIFAR10.meta | {"md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return asked


@pytest.fixture
def imagenet_weights(tmp_path, monkeypatch):
    """A random state in the place where torch.hub keeps the ImageNet weights."""
    torch.manual_seed(7)
    state = resnet18().state_dict()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / "resnet18-f37072fd.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return state


def run_cifar(folder, **parameters) -> dict:
    """Run the notebook's section on CIFAR-10 with these parameters; its namespace."""
    names = ["features_of", "train_head", "load_photos", "photos", "score"]
    space = load_definitions(PATH, *LOOPS, *names)
    space |= {"SEED": 0, "CIFAR_TRAIN": 40, "CIFAR_SIZE": 64} | parameters
    space |= {"DATA_DIR": str(folder), "device": torch.device("cpu")}
    for source in section(PATH, "8b.8", "8b.9"):
        exec(compile(source, PATH.name, "exec"), space)
    return space


def test_the_path_with_imagenet_weights_reads_cifar_and_trains(
    tmp_path, cifar, imagenet_weights
):
    space = run_cifar(tmp_path / "data", DATASET="cifar10")
    assert set(cifar) == {"cifar-10-python.tar.gz"}
    assert list(space["cifar_scores"]) == [32, 64, "fine-tuned"]
    assert all(0 <= value <= 1 for value in space["cifar_scores"].values())
    training, test = space["cifar"](True, 64), space["cifar"](False, 64)
    assert (len(training), len(test)) == (40, 20)
    image, label = training[13]
    assert image.shape == (3, 64, 64) and label == 3
    body, whole = space["body"].state_dict(), space["whole"].state_dict()
    for name, value in imagenet_weights.items():
        if not name.startswith("fc."):
            assert body[name].equal(value), f"{name}: features are only computed"
    moved = [n for n, t in imagenet_weights.items() if "fc." not in n]
    moved = [n for n in moved if not whole[n].equal(imagenet_weights[n])]
    assert {n.split(".")[0] for n in moved} >= {"conv1", "layer1", "layer4"}
    assert whole["fc.weight"].shape == (10, 512)


def test_all_of_the_training_pictures_are_enough(tmp_path, cifar, imagenet_weights):
    parameters = {"DATASET": "cifar10", "CIFAR_TRAIN": 10**6, "CIFAR_SIZE": 32}
    space = run_cifar(tmp_path / "data", **parameters)
    assert len(space["cifar"](True, 32)) == 100


def test_without_the_parameter_nothing_is_downloaded(tmp_path, cifar, capsys):
    run_cifar(tmp_path / "data", DATASET="garments")
    assert capsys.readouterr().out.count("skipped: DATASET is garments") == 2
    assert not cifar and not (tmp_path / "data").exists()

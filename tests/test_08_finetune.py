"""Chapter 8: pictures, network and Grad-CAM against references; the article's path."""

import hashlib
import io
import pickle
import shutil
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torchvision import datasets
from torchvision.models import resnet18

from notebooks import NOTEBOOKS, code_cells, load_definitions, section

PATH = NOTEBOOKS / "08_finetune_resnet.ipynb"
CHAPTER = load_definitions(
    PATH,
    "STAGES",
    "STEPS",
    "SmallResNet",
    "ZONES",
    "cut_patches",
    "fit",
    "grad_cam",
    "heat_on",
    "load_classifier",
    "make_groups",
    "make_pictures",
    "make_stage",
    "make_stream",
    "mix",
    "neighbours",
    "on_picture",
    "place",
    "run",
    "save_classifier",
    "train_mode",
    "train_network",
)
CHAPTER["device"] = torch.device("cpu")
CHAPTER["MEAN"] = torch.full((1, 3, 1, 1), 0.5)
CHAPTER["STD"] = torch.full((1, 3, 1, 1), 0.25)


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(classes: int = 4, width: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    return define("SmallResNet")(classes, width)


@pytest.fixture
def ruler(monkeypatch):
    """Photographs whose red channel is the number of the column."""
    columns = torch.arange(320.0).expand(3, 40, 320)
    monkeypatch.setitem(CHAPTER, "photos", [columns, columns])


# Pictures


def test_placing_by_nothing_only_enlarges_and_mirrors():
    garments = torch.randint(256, (20, 28, 28), generator=generator())
    masks = define("place")(garments, generator(), degrees=0, scale=0, shift=0)
    reference = nn.functional.interpolate(garments[:, None] / 255, 32, mode="bilinear")
    inside = torch.zeros(32, 32)
    inside[1:-1, 1:-1] = 1  # the border is mixed with black
    same = ((masks - reference) * inside).abs().amax(dim=(1, 2, 3)) < 1e-5
    mirrored = ((masks.flip(3) - reference) * inside).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert (same | mirrored).all() and same.any() and mirrored.any()


def test_masks_stay_between_zero_and_one_and_follow_the_generator():
    garments = torch.randint(256, (50, 28, 28), generator=generator())
    one, two = [define("place")(garments, generator(3)) for _ in range(2)]
    assert one.shape == (50, 1, 32, 32) and one.equal(two)
    assert one.min() >= 0 and one.max() <= 1


@pytest.mark.parametrize("zone", ["train", "valid", "test"])
def test_patches_stay_in_their_zone(ruler, zone):
    patches = define("cut_patches")(300, zone, generator())
    low, high = [edge * 320 for edge in define("ZONES")[zone]]
    assert patches.min() >= low and patches.max() < high
    assert patches.min() <= low + 4 and patches.max() >= high - 5, "all of it is used"


def test_a_patch_larger_than_its_zone_is_refused(monkeypatch):
    """It would reach into another zone: a leak."""
    monkeypatch.setitem(CHAPTER, "photos", [torch.zeros(3, 100, 320)])
    with pytest.raises(ValueError, match="70 pixels in a zone of 100 by 64"):
        define("cut_patches")(1, "test", generator(), size=70)


def test_zones_do_not_overlap():
    edges = [edge for zone in define("ZONES").values() for edge in zone]
    assert edges == sorted(edges) and edges[0] == 0 and edges[-1] == 1


def test_without_a_garment_a_picture_is_the_patch(ruler):
    empty = torch.zeros(5, 28, 28)
    pictures, masks = define("make_pictures")(empty, "train", generator())
    assert masks.abs().max() == 0
    assert (pictures[:, 0].diff(dim=2) == 1).all(), "a patch of the ruler"


def test_the_stream_for_pretraining_is_the_same_again(ruler, monkeypatch):
    garments = torch.randint(256, (6, 28, 28), generator=generator())
    monkeypatch.setitem(CHAPTER, "garments", garments)
    monkeypatch.setitem(CHAPTER, "labels", torch.tensor([0, 9, 1, 2, 8, 3]))
    monkeypatch.setitem(CHAPTER, "old", CHAPTER["labels"] < 6)
    (images, labels), again = [define("make_stream")(2, seed=5) for _ in range(2)]
    assert images.equal(again[0]) and labels.equal(again[1])
    assert images.shape == (8, 3, 32, 32)
    assert [sorted(half.tolist()) for half in labels.split(4)] == [[0, 1, 2, 3]] * 2


def test_garments_that_were_cut_off_are_named_with_the_remedy(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(NOTEBOOKS / "data" / "FashionMNIST" / "raw", raw)
    file = raw / "train-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 7 // 10])
    space = load_definitions(PATH, "check_data")
    space |= {"DATA_DIR": str(tmp_path), "N_TRAIN": 10, "N_TEST": 10}
    cell = next(c.source for c in code_cells(PATH) if "data" in c.tags)
    with pytest.raises(
        RuntimeError, match="did not arrive whole .* Delete that"
    ) as error:
        exec(cell, space)
    assert f"{tmp_path}/FashionMNIST" in str(error.value)


# The network


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method 'Full'"):
        define("train_network")("Full", 0.01, None, None, 0)


def test_the_network_is_torchvisions_with_another_stem():
    ours, theirs = network(10, width=64), resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 32, 32, generator=generator())
    with torch.no_grad():
        for mode in (True, False):
            a, b = ours.train(mode)(images), theirs.train(mode)(images)
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [network, lambda: resnet18(num_classes=4)])
def test_groups_hold_every_parameter_once_and_rates_fall(make):
    model = make()
    groups = define("make_groups")(model, 0.1, 0.5)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert [g["lr"] for g in groups] == [0.1 * 0.5**d for d in range(5)]
    assert {id(p) for p in groups[0]["params"]} == {
        id(p) for p in model.fc.parameters()
    }


def test_groups_leave_out_what_is_frozen():
    model = network().requires_grad_(False)
    model.layer3.requires_grad_(True)
    (group,) = define("make_groups")(model, 1.0, 0.5)
    assert group["lr"] == 0.25 and len(group["params"]) == len(
        list(model.layer3.parameters())
    )


def test_train_mode_leaves_frozen_parts_in_eval_mode():
    model = network().requires_grad_(False)
    model.layer4.requires_grad_(True)
    define("train_mode")(model.eval())
    training = {name for name, part in model.named_children() if part.training}
    assert training == {"layer4"} and model.training


def test_train_mode_keeps_parts_without_parameters_in_training():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    define("train_mode")(model.eval())
    assert [part.training for part in model] == [False, True, True]


def test_run_is_in_eval_mode_and_gives_each_module_its_mode_back():
    model = network().train()
    model.layer2.eval()
    before = {name: m.training for name, m in model.named_modules()}
    images = torch.randn(5, 3, 32, 32, generator=generator())
    first, second = [define("run")(model.features, images, model) for _ in range(2)]
    assert first.equal(second) and not first.requires_grad
    assert {name: m.training for name, m in model.named_modules()} == before
    assert model.bn1.num_batches_tracked == 0


@pytest.mark.parametrize(("n", "batch"), [(3, 8), (8, 8), (20, 8)])
def test_fit_takes_the_steps_it_is_told(n, batch):
    model = network()
    images = torch.randn(n, 3, 32, 32, generator=generator())
    groups = define("make_groups")(model, 0.01)
    losses = define("fit")(model, images, torch.arange(n) % 4, groups, 5, 0, batch)
    assert len(losses) == 5 and model.bn1.num_batches_tracked == 5


# Grad-CAM


def test_grad_cam_agrees_with_its_definition():
    model = network().eval()
    images = torch.randn(3, 3, 32, 32, generator=generator())
    heat = define("grad_cam")(model, model.layer2, images, torch.tensor([2, 0, 2]))
    for image, wanted, ours in zip(images, [2, 0, 2], heat, strict=True):
        x = torch.relu(model.bn1(model.conv1(image[None])))
        maps = model.layer2(model.layer1(x))
        maps.retain_grad()
        logits = model.fc(model.layer4(model.layer3(maps)).mean(dim=(2, 3)))
        logits[0, wanted].backward()
        expected = torch.zeros(8, 8)
        for activation, gradient in zip(maps[0], maps.grad[0], strict=True):
            expected += gradient.mean() * activation.detach()
        torch.testing.assert_close(ours, expected.relu(), atol=1e-6, rtol=1e-4)


def test_without_the_average_each_place_keeps_its_own_gradient():
    model = network().eval()
    images = torch.randn(2, 3, 32, 32, generator=generator())
    classes = torch.tensor([1, 3])
    ours = define("grad_cam")(model, model.layer2, images, classes, average=False)
    maps = model.layer2(model.layer1(torch.relu(model.bn1(model.conv1(images)))))
    maps.retain_grad()
    logits = model.fc(model.layer4(model.layer3(maps)).mean(dim=(2, 3)))
    logits[range(2), classes].sum().backward()
    expected = (maps * maps.grad).sum(dim=1).relu()
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    last = partial(define("grad_cam"), model, model.layer4, images, classes)
    torch.testing.assert_close(last(average=False), last(), atol=1e-6, rtol=1e-4)


def test_grad_cam_takes_the_predicted_class_and_a_frozen_network():
    model = network().eval().requires_grad_(False)
    images = torch.randn(4, 3, 32, 32, generator=generator())
    guess = model(images).argmax(dim=1)
    cam = partial(define("grad_cam"), model, model.layer3, images)
    assert cam().equal(cam(guess)) and not cam().requires_grad
    assert not images.requires_grad


def test_grad_cam_leaves_no_hook_behind_even_after_an_error():
    model = network().eval()
    with pytest.raises(RuntimeError):
        define("grad_cam")(model, model.layer1, torch.randn(1, 5, 32, 32))
    define("grad_cam")(model, model.layer1, torch.randn(1, 3, 32, 32))
    assert not any(m._forward_hooks for m in model.modules())


def test_heat_is_shared_out_and_empty_maps_are_left_out():
    heat = torch.zeros(3, 4, 4)
    heat[0, 0, 0], heat[1, 3, 3] = 5.0, 1.0
    masks = torch.zeros(3, 1, 32, 32)
    masks[:, :, :16, :16] = 1
    sums = define("on_picture")(heat).sum(dim=(1, 2))
    torch.testing.assert_close(sums, torch.tensor([1.0, 1.0, 0.0]))
    assert abs(define("heat_on")(masks, heat) - 0.5) < 1e-6


# Files


def test_a_classifier_comes_back_with_what_belongs_to_it(tmp_path):
    model, path = network(), tmp_path / "net.pt"
    define("save_classifier")(path, model, ["a", "b", "c", "d"])
    other = network(seed=1)
    card = define("load_classifier")(path, other)
    assert card == {
        "classes": ["a", "b", "c", "d"],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    for name, value in model.state_dict().items():
        assert other.state_dict()[name].equal(value), name


def test_a_missing_classifier_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt does not exist: train first"):
        define("load_classifier")(tmp_path / "none.pt", network())


@pytest.mark.parametrize("content", ["cut off", "empty", "text", "list", "code"])
def test_a_damaged_classifier_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "net.pt"
    define("save_classifier")(path, network(), ["a"])
    whole = path.read_bytes()
    if content == "list":
        torch.save([1, 2], path)
    elif content == "code":
        torch.save({"model": print}, path)
    else:
        cut = {"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"no"}
        path.write_bytes(cut[content])
    with pytest.raises(RuntimeError, match=r"net\.pt is damaged.*train again"):
        define("load_classifier")(path, network())


@pytest.mark.parametrize(("classes", "width"), [(6, 8), (4, 4)])
def test_a_classifier_that_does_not_fit_touches_nothing(tmp_path, classes, width):
    path, model = tmp_path / "net.pt", network()
    define("save_classifier")(path, network(classes, width, seed=1), ["a"])
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    with pytest.raises(
        RuntimeError, match=r"net\.pt does not fit: .*classes and width"
    ):
        define("load_classifier")(path, model)
    assert nn.utils.parameters_to_vector(model.parameters()).equal(before)


# Exercises


def test_one_neighbour_agrees_with_scikit_learn():
    train = torch.randn(30, 5, generator=generator())
    test = torch.randn(40, 5, generator=generator(1))
    targets = torch.arange(30) % 4
    ours = define("neighbours")(train, targets, test, 1)
    theirs = KNeighborsClassifier(1, metric="cosine").fit(train, targets).predict(test)
    assert ours.tolist() == theirs.tolist()


def test_a_mix_has_both_networks_at_its_ends():
    first, then = network(seed=0), network(seed=1)
    then.bn1.running_mean.fill_(2.0)
    for share, expected in ((0.0, first), (1.0, then)):
        mixed = define("mix")(first, then, share).state_dict()
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(mixed[name], value)
    assert define("mix")(first, then, 0.5).bn1.running_mean.eq(1.0).all()
    assert first.bn1.running_mean.eq(0.0).all(), "the first is as it was"


# The article's set-up, with stand-ins in the formats of the originals


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


def test_the_articles_path_reads_cifar_and_trains_only_the_head(
    tmp_path, cifar, imagenet_weights, capsys
):
    names = ["STAGES", "article_model", "make_groups", "train_mode", "train_on"]
    space = load_definitions(PATH, *names, "imagenet")
    space |= {"SEED": 0, "DATASET": "cifar10", "CIFAR_STEPS": 3}
    space |= {"DATA_DIR": str(tmp_path / "data"), "device": torch.device("cpu")}
    for source in section(PATH, "8.12", "8.13"):
        exec(compile(source, PATH.name, "exec"), space)
    assert set(cifar) == {"cifar-10-python.tar.gz"}
    assert (len(space["cifar"]), len(space["cifar_test"])) == (100, 20)
    assert "100 and 20 pictures" in capsys.readouterr().out
    image, _ = space["cifar_test"][0]
    pixels = torch.tensor(space["cifar_test"].data[0]).permute(2, 0, 1) / 255
    mean = torch.tensor(space["imagenet"].transforms().mean).view(3, 1, 1)
    std = torch.tensor(space["imagenet"].transforms().std).view(3, 1, 1)
    torch.testing.assert_close(image, (pixels - mean) / std)
    state = space["cifar_model"].state_dict()
    for name, value in imagenet_weights.items():
        if not name.startswith("fc."):
            assert state[name].equal(value), f"{name} was to be frozen"
    torch.manual_seed(0)
    start = space["article_model"]().fc
    assert not state["fc.weight"].equal(start.weight), "the head has learned"
    assert state["fc.weight"].shape == (10, 512)
    assert 0 <= space["cifar_accuracy"] <= 1


def test_the_articles_path_is_skipped_aloud(tmp_path, cifar, capsys):
    space = load_definitions(PATH, "imagenet")
    space |= {"SEED": 0, "DATASET": "garments", "DATA_DIR": str(tmp_path / "data")}
    for source in section(PATH, "8.12", "8.13"):
        exec(compile(source, PATH.name, "exec"), space)
    assert capsys.readouterr().out.count("skipped: DATASET is garments") == 2
    assert not cifar and not (tmp_path / "data").exists()

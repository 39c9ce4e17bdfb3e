"""What the pages in book/ state as facts: examples that run, numbers looked up."""

import doctest
import json
import re
import sys
from pathlib import Path

import pytest
from torchvision import models

from notebooks import notebook_paths

BOOK = Path(__file__).resolve().parents[1] / "book"
MAP = (BOOK / "large_models.md").read_text(encoding="utf-8")
NAMES = {
    "AlexNet": "alexnet",
    "VGG-16": "vgg16",
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "EfficientNet-B0": "efficientnet_b0",
    "ViT-B/16": "vit_b_16",
    "Swin-T": "swin_t",
    "ConvNeXt-T": "convnext_tiny",
    "MaxViT-T": "maxvit_t",
    "ViT-H/14": "vit_h_14",
}


@pytest.fixture(scope="module")
def examples():
    """What the examples of the map define, after each has printed what it says."""
    blocks = re.findall(r"^```pycon\n(.*?)^```$", MAP, re.MULTILINE | re.DOTALL)
    source = "\n".join(blocks)
    test = doctest.DocTestParser().get_doctest(source, {}, "large_models", None, None)
    failed, tried = doctest.DocTestRunner().run(test, clear_globs=False)
    assert not failed and tried >= 25
    return test.globs


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="torchtext has no wheels here")
def test_the_measures_agree_with_torchtext(examples):
    import torchtext

    torchtext.disable_torchtext_deprecation_warning()
    from torchtext.data import metrics

    person = examples["person"]
    close = [*person[:6], "a", *person[7:]]
    for words in (close, close[:-2], person, ["an", "idle", *person]):
        expected = metrics.bleu_score([words], [[person]])
        assert examples["bleu"](words, person) == pytest.approx(expected, abs=1e-6)


def test_the_edit_distance_is_the_smallest(examples):
    def slowly(a, b):
        if not a or not b:
            return len(a) + len(b)
        changed = slowly(a[1:], b[1:]) + (a[0] != b[0])
        return min(changed, slowly(a[1:], b) + 1, slowly(a, b[1:]) + 1)

    for a, b in [
        ("", "abc"),
        ("kitten", "sitting"),
        ("abcd", "badc"),
        ("same", "same"),
    ]:
        assert examples["edit_distance"](a, b) == slowly(a, b)


def test_the_rule_of_thumb_fits_the_plain_language_models(examples):
    rows = re.findall(r"^\| ([^{|]+) \{cite.*?\| 20\d\d \| (.*) \|$", MAP, re.MULTILINE)
    plain = [cells.split(" | ") for _, cells in rows]
    plain = [cells for cells in plain if cells[0] in ("encoder", "decoder")]
    assert len(rows) == 8 and len(plain) == 6
    for _, layers, width, parameters, _ in plain:
        rule = examples["billions"](int(layers), int(width.replace(",", "")))
        assert rule == pytest.approx(float(parameters), rel=0.12)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_models_agrees_with_torchvision(name):
    row = next(line for line in MAP.splitlines() if line.startswith(f"| {name} |"))
    *_, parameters, operations, accuracy = row.strip("|").split("|")
    weights = models.get_model_weights(NAMES[name])
    right = {w: w.meta["_metrics"]["ImageNet-1K"]["acc@1"] for w in weights}
    best = max((w for w in weights if "SWAG" not in w.name), key=right.get, default=0)
    best = best or max(weights, key=right.get)
    assert float(parameters) == round(best.meta["num_params"] / 1e6, 1)
    assert float(operations) == round(best.meta["_ops"], 1)
    assert float(accuracy) == round(right[best], 1)


def test_the_table_lists_no_other_model():
    rows = re.findall(r"^\| ([^{|]+) \| 20\d\d \|", MAP, re.MULTILINE)
    assert rows == list(NAMES)


def test_sections_that_are_named_exist():
    pages = {path.name: path.read_text(encoding="utf-8") for path in BOOK.glob("*.md")}
    there = set()
    for path in notebook_paths():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
        there |= set(re.findall(r"^## (\d+\.\d+) ", text, re.MULTILINE))
        pages[path.name] = text
    for name, text in pages.items():
        for list_ in re.findall(r"sections? ((?:\d+\.\d+(?:, | and | to )?)+)", text):
            missing = set(re.findall(r"\d+\.\d+", list_)) - there
            assert not missing, f"{name} names sections that do not exist: {missing}"

"""What the pages in book/ state as facts: examples that run, numbers looked up."""

import doctest
import re
from pathlib import Path

import pytest
from torchvision import models

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


def test_the_examples_print_what_they_say():
    blocks = re.findall(r"^```pycon\n(.*?)^```$", MAP, re.MULTILINE | re.DOTALL)
    source = "\n".join(blocks)
    test = doctest.DocTestParser().get_doctest(source, {}, "large_models", None, None)
    failed, tried = doctest.DocTestRunner().run(test)
    assert not failed and tried >= 8


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
    rows = re.findall(r"^\| ([^|]+) \| 20\d\d \|", MAP, re.MULTILINE)
    assert rows == list(NAMES)

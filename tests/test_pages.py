"""What the pages in book/ state as facts: examples that run, numbers looked up."""

import doctest
import json
import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
from torchvision import models

from notebooks import NOTEBOOKS, notebook_paths

BOOK = Path(__file__).resolve().parents[1] / "book"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in BOOK.glob("*.md")}
MAP = PAGES["large_models.md"]
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
CHINESE = re.compile("[\u4e00-\u9fff]")


def sections(page: str) -> dict[str, str]:
    """The text below each second-level heading of a page."""
    parts = re.split(r"^## (.*)\n", PAGES[page], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def run(text: str, name: str) -> tuple[dict, int]:
    """Run the examples of a text, each against what it says; names, their number."""
    blocks = re.findall(r"^```pycon\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    source = "\n".join(blocks)
    test = doctest.DocTestParser().get_doctest(source, {}, name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with warnings.catch_warnings():
        failed, tried = runner.run(test, clear_globs=False)
    assert not failed
    return test.globs, tried


# The map of large models


@pytest.fixture(scope="module")
def examples() -> dict:
    """What the examples of the map define, after each has printed what it says."""
    names, tried = run(MAP, "large_models")
    assert tried >= 30
    return names


def test_the_measures_agree_with_torchtext(examples, torchtext):
    person = examples["person"]
    close = [*person[:6], "a", *person[7:]]
    for words in (close, close[:-2], person, ["an", "idle", *person]):
        expected = torchtext.data.metrics.bleu_score([words], [[person]])
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


# Where a layer has 12 times its width squared: rows of the embeddings, and what differs
COUNTED = {
    "BERT-large": {"rows": 30522 + 512},
    "GPT-2": {"rows": 50257 + 1024},
    "GPT-3": {"rows": 50257 + 2048},
    "Chinchilla": {"rows": 32000},
    "LLaMA-65B": {"rows": 2 * 32000, "inner": 22016 / 8192, "matrices": 3},
    "Llama 3.1 405B": {
        "rows": 2 * 128256,
        "inner": 53248 / 16384,
        "matrices": 3,
        "keys": 1 / 16,
    },
}


def test_the_counts_of_the_language_models_are_those_of_the_table(examples):
    """Also of those whose count the page leaves out."""
    rows = re.findall(r"^\| ([^{|]+) \{cite.*?\| 20\d\d \| (.*) \|$", MAP, re.MULTILINE)
    table = {name: cells.split(" | ") for name, cells in rows}
    assert len(table) == 8
    for name, options in COUNTED.items():
        _, layers, width, parameters, _ = table[name]
        layers, width = int(layers), int(width.replace(",", ""))
        # relative positions: a fifth matrix
        extra = layers * width**2 / 1e9 if name == "Chinchilla" else 0
        counted = examples["billions"](layers, width, **options) + extra
        assert counted == pytest.approx(float(parameters), abs=0.11, rel=0.005), name
    attention = 24 * (4 + 8) * 1024 * 16384  # T5-11B: its decoder attends twice
    feed_forward = 48 * 2 * 1024 * 65536
    counted = (attention + feed_forward + 32128 * 1024) / 1e9
    assert counted == pytest.approx(float(table["T5-11B"][3]), abs=0.4)
    experts = 58 * 257 * 3 * 7168 * 2048 / 1e9
    assert 0.95 < experts / float(table["DeepSeek-V3"][3]) < 1  # "nearly all"


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


def test_each_application_names_a_paper_or_a_chapter():
    text = sections("large_models.md")["Where they are used, and how it works"]
    found = re.findall(r"^- \*\*(.*?)\.\*\* (.*)$", text, re.MULTILINE)
    assert len(found) >= 27 and len(found) == len(re.findall("^- ", text, re.MULTILINE))
    for name, mechanism in found:
        assert "{cite:" in mechanism or ".ipynb)" in mechanism, name


def luminance(colour: str) -> float:
    """Relative luminance of a colour such as #1b6a92 (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    )
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted([luminance(one), luminance(other)], reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_figure_can_be_read_on_light_and_dark_pages():
    root = ElementTree.parse(BOOK / "images" / "map.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    for group in root.iter(f"{svg}g"):
        colour = group.get("fill")
        if group.find(f"{svg}rect") is not None:
            assert contrast(colour, "#ffffff") >= 4.5  # the text in the box
        elif group.find(f"{svg}text") is not None and colour != "#ffffff":
            assert (
                int(group.get("font-size")) >= 20 and group.get("font-weight") == "600"
            )
            grounds = ("#fffefc", "#15181b")
            assert all(
                contrast(colour, ground) >= 3 for ground in grounds
            )  # large text


# The errata


@pytest.mark.parametrize(
    "title", [t for t in sections("errata.md") if "right" not in t]
)
def test_each_mistake_can_be_seen(title, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    _, tried = run(sections("errata.md")[title], title)
    assert tried >= 6


def test_the_tokeniser_of_article_2_gets_a_number(torchtext):
    with pytest.raises(AttributeError, match="'int' object has no attribute 'lower'"):
        torchtext.data.utils.get_tokenizer("basic_english")(1)


# The concordance


def test_the_concordance_leaves_no_section_out():
    """Each number follows the one before it; only article 4 has no 6.1 to 6.3."""
    articles = sections("concordance.md")
    assert list(articles) == [f"Article {i}" for i in range(1, 6)]
    for name, text in articles.items():
        rows = re.findall(r"^\| (.*?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)[1:]
        plain = {title for _, title, _ in rows if not CHINESE.search(title)}
        assert plain <= {"PyTorch 2.0", "PyTorch Lightning"}
        last = [0]
        for number in filter(None, (number for number, _, _ in rows)):
            now = [int(part) for part in number.split(".")]
            after = [[*last[:i], last[i] + 1] for i in range(len(last))]
            allowed = [*after, [*last, 1]] + [[6, 4]] * (name == "Article 4")
            assert now in allowed, (name, number)
            last = now


def test_the_concordance_plans_nothing_that_is_there():
    text = PAGES["concordance.md"]
    there = {int(path.name[:2]) for path in notebook_paths()}
    planned = {
        int(n) for n in re.findall(r"(?:planned: |, )chapter (\d+), [A-Z]", text)
    }
    assert planned and not planned & there, f"no longer planned: {planned & there}"
    assert planned | there == set(range(1, max(planned) + 1))
    linked = set(re.findall(r"\(\.\./notebooks/(\d\d)_", text))
    assert linked == {path.name[:2] for path in notebook_paths()}


# The glossary, and all pages


def test_the_glossary_is_in_order_with_chinese_names_and_links():
    body = PAGES["glossary.md"].split("```{glossary}\n")[1].removesuffix("```\n")
    entries = [entry.strip().split("\n") for entry in body.split("\n\n")]
    assert all(len(entry) == 2 for entry in entries)
    keys = [re.sub("[^a-z0-9 ]", "", t.split(" (")[0].lower()) for t, _ in entries]
    assert keys == sorted(set(keys))
    names = {t for t, _ in entries if not CHINESE.search(t)}
    assert names == {
        *("Adam", "BERT", "BLEU", "FlashAttention", "GELU", "GGUF", "GPT", "ImageNet"),
        *("ROUGE", "safetensors", "softmax", "SwiGLU", "TensorBoard", "Transformer"),
        "WordPiece",
    }
    general = {t.split(" (")[0] for t, text in entries if "](" not in text}
    assert general == {
        *("data parallelism", "dead ReLU", "deep learning", "distillation"),
        *("generalisation", "hyperparameter", "inference", "local minimum"),
        *("mixed precision", "model parallelism", "neural network", "pruning"),
    }


def test_sections_that_are_named_exist():
    pages, there = dict(PAGES), set()
    for path in notebook_paths():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
        there |= set(re.findall(r"^## (\d+b?\.\d+) ", text, re.MULTILINE))
        pages[path.name] = text
    for name in ("errata.md", "concordance.md"):
        del pages[name]  # they name sections of the articles
    for name, text in pages.items():
        for list_ in re.findall(r"sections? ((?:\d+b?\.\d+(?:, | and | to )?)+)", text):
            missing = set(re.findall(r"\d+b?\.\d+", list_)) - there
            assert not missing, f"{name} names sections that do not exist: {missing}"

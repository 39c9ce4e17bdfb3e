"""Every chapter reaches its end on another device, with other parameters than its own.

The device is a stand-in that refuses what cards refuse (tests/standin.py): tensors of
the processor beside its own, and float64. Claims are noted instead of enforced, as by
tools/seeds.py: with a tenth of the steps they need not hold, but no cell may stop with
an error from inside Python.
"""

from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

import seeds
from notebooks import NOTEBOOKS

# What replaces the values of a chapter's first cell
SMALLER = {
    "01_hello_pytorch": "STEPS = 20; N_MADE = 12",
    "02_autograd": "ENGINE_STEPS = 3",
    "02b_autograd_in_depth": "STEPS = 3",
    "03_data_and_dataloader": "N_TRAIN = 400; BATCH_SIZE = 7",
    "03b_data_at_scale": "N_STEPS = 8; N_SHOWN = 100",
    "04_training_and_evaluation": "N_TRAIN = 400; N_TEST = 100; EPOCHS = 1",
    "04b_training_in_depth": "N_TRAIN = 400; N_TEST = 100; EPOCHS = 1",
    "05_module_tools": "EPOCHS = 1; DEPTH = 2; NETWORKS = 1",
    "05b_functions_and_graphs": "EPOCHS = 1; NUM_MODELS = 2",
    "06_sequence_labelling": "N_TRAIN = 300; N_HELD = 100; HIDDEN = 7",
    "06b_crf_and_names": "N_TRAIN = 300; N_NAMES = 200; EPOCHS = 1; N_HELD = 100",
    "07_resnet_from_scratch": "N_TRAIN = 300; N_TEST = 50; EPOCHS = 1",
    "07b_resnet_in_depth": "N_TRAIN = 300; SIZES = (20, 32, 33)",
    "08_finetune_resnet": (
        "N_TRAIN = 500; N_TEST = 500; PRETRAIN_EPOCHS = 1; STEPS = 3"
    ),
    "08b_what_fine_tuning_changes": (
        "N_TRAIN = 500; N_TEST = 500; PRETRAIN_EPOCHS = 1; STEPS = 3"
    ),
    "09_text_to_tensors": "SPLITS = 2; EPOCHS = 1; BATCH = 77; DIM = 7",
    "09b_text_in_depth": "SYMBOLS = 320; SPLITS = 2; EPOCHS = 1; BATCH = 77; DIM = 7",
    "10_attention": "STEPS = 20",
    "10b_flash_attention": "MAX_LENGTH = 200",
    "11_transformer_classifier": (
        "STEPS = 20; N_LINES = 500; SPLITS = 2; EPOCHS = 1; DIM = 8"
    ),
    "11b_pretraining_and_calibration": (
        "PRETRAIN_EPOCHS = 1; LABELS = {50: 1, 90: 2}; DRAWS = 1; EPOCHS = 1"
    ),
    "12_pretrain_gpt": (
        "SYMBOLS = 300; CONTEXT = 10; DIM, LAYERS, HEADS = 16, 1, 2; STEPS = 20"
    ),
    "13_modern_llm": "STEPS = 5; SEEDS = 2",
    "13b_experts_and_other_llamas": "STEPS = 5",
    "14_finetune_llm": "N_TEST = 16; LABELS = (8,); TAUGHT = 2; TUNED = 5",
    "14b_what_adapters_change": "N_TEST = 16; N_LABELS = 8; TUNED = 2",
}


FOLDER = str(Path(__file__).parent)
STANDIN = f"""import sys; sys.path.insert(0, {FOLDER!r}); import standin
standin.install(); sys.path.pop(0)
"""


@pytest.mark.parametrize("chapter", SMALLER)
def test_it_runs_with_smaller_parameters_on_another_device(chapter):
    path = NOTEBOOKS / f"{chapter}.ipynb"
    package = nbformat.read(path, as_version=4).metadata.get("package")
    if package and not find_spec(package):
        pytest.skip(f"{package} is not installed")
    claims, _, error = seeds.run(path, 0, 1, SMALLER[chapter], STANDIN)
    assert not error
    assert claims


def test_every_notebook_is_tried():
    assert list(SMALLER) == [
        path.stem for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    ]

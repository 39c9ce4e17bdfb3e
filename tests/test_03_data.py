"""The definitions of chapter 3 against references: torch, NumPy, scikit-learn."""

import csv
import os
import shutil
import subprocess
import symtable
import sys

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from notebooks import (
    NOTEBOOKS,
    code_cells,
    generator,
    load_definitions,
    run_twice,
    section,
)

PATH = NOTEBOOKS / "03_data_and_dataloader.ipynb"


@pytest.fixture(scope="module")
def chapter() -> dict:
    return load_definitions(
        PATH,
        "Squares",
        "LabelledPictures",
        "stratified_split",
        "group_split",
        "nearest",
        "nearest_score",
        "DigitPoints",
        "pad_collate",
        "batch_report",
    )


def test_a_data_set_ends_a_for_loop(chapter):
    assert list(chapter["Squares"](4)) == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert list(chapter["Squares"](0)) == []
    with pytest.raises(IndexError):
        chapter["Squares"](4)[4]


@pytest.fixture
def table(tmp_path):
    """Write pictures and a table of them; the table, the pixels and the labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 7), dtype=np.uint8)
    labels = [2, 0, 1, 1, 0, 2]
    rows = [(f"picture {n}.png", labels[n]) for n in (4, 1, 5, 0, 3, 2)]
    for number, image in enumerate(pixels):
        for folder in (tmp_path, tmp_path / "by class" / str(labels[number])):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"picture {number}.png")

    def write(rows=rows, header=("file", "label")):
        with open(tmp_path / "labels.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return tmp_path / "labels.csv"

    return write, pixels, rows


def test_labelled_pictures_agree_with_image_folder(chapter, table):
    write, pixels, _ = table
    ours = chapter["LabelledPictures"](write())
    reference = datasets.ImageFolder(write().parent / "by class")
    theirs = {os.path.basename(path): label for path, label in reference.samples}
    assert len(ours) == len(list(ours)) == len(reference) == 6
    for (picture, label), path in zip(ours, ours.paths, strict=True):
        assert label == theirs[path.name]
        np.testing.assert_array_equal(np.asarray(picture), pixels[int(path.stem[-1])])


def test_labelled_pictures_apply_the_transform(chapter, table):
    write, pixels, rows = table
    files = chapter["LabelledPictures"](str(write(rows[:2])), v2.PILToTensor())
    assert torch.equal(files[1][0], torch.from_numpy(pixels[1])[None])
    assert files[1][1] == 0


def test_a_table_that_does_not_fit_its_folder_is_refused(chapter, table):
    write, _, rows = table
    with pytest.raises(FileNotFoundError, match="lost.png is named in .*labels.csv"):
        chapter["LabelledPictures"](write([*rows, ("lost.png", 1)]))
    for wrong in ([], [*rows, rows[2]]):
        with pytest.raises(ValueError, match="labels.csv names no file, or one file"):
            chapter["LabelledPictures"](write(wrong))
    with pytest.raises(KeyError, match="file"):
        chapter["LabelledPictures"](write(header=("name", "label")))


def test_files_that_other_programs_leave_are_not_read(chapter, table):
    """A table says what belongs to the data; a folder takes whatever lies there."""
    write, _, _ = table
    folder = write().parent
    for place in (".ipynb_checkpoints/picture 0.png", "._picture 1.png"):
        (folder / place).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(folder / place)
    (folder / ".DS_Store").write_bytes(b"\0")
    assert len(chapter["LabelledPictures"](write())) == 6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_stratified_split_keeps_the_shares(chapter, seed, fraction):
    labels = torch.tensor([0] * 200 + [1] * 60 + [2] * 20)
    labels = labels[torch.randperm(280, generator=generator(seed))]
    train, validation = chapter["stratified_split"](labels, fraction, generator(seed))
    both = torch.cat([train, validation])
    assert torch.equal(both.sort().values, torch.arange(280))
    split = StratifiedShuffleSplit(1, test_size=fraction, random_state=seed)
    _, reference = next(split.split(np.zeros(280), labels))
    assert torch.equal(labels[validation].bincount(), labels[reference].bincount())
    again = chapter["stratified_split"](labels, fraction, generator(seed))
    other = chapter["stratified_split"](labels, fraction, generator(seed + 100))
    assert torch.equal(again[1], validation) and not torch.equal(other[1], validation)


def test_group_split_divides_no_group(chapter):
    groups = torch.randint(0, 40, (300,), generator=generator())
    train, validation = chapter["group_split"](groups, 0.25, 0)
    assert not set(groups[train].tolist()) & set(groups[validation].tolist())
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(300))
    split = GroupShuffleSplit(1, test_size=0.25, random_state=0)
    _, reference = next(split.split(groups, groups=groups))
    assert len(groups[validation].unique()) == len(groups[reference].unique())


def test_nearest_is_scikit_learns_nearest_neighbour(chapter):
    known, new = torch.randn(60, 2, 3), torch.randn(25, 2, 3)
    labels, truth = torch.randint(0, 4, (60,)), torch.randint(0, 4, (25,))
    reference = KNeighborsClassifier(1).fit(known.flatten(1), labels)
    ours = labels[chapter["nearest"](known, new)]
    assert ours.tolist() == reference.predict(new.flatten(1)).tolist()
    score = chapter["nearest_score"](known, labels, new, truth)
    assert score == pytest.approx(reference.score(new.flatten(1), truth))


@pytest.mark.parametrize("lengths", [[3, 1, 5], [4, 4], [2], [0, 3]])
def test_pad_collate_agrees_with_pad_sequence(chapter, lengths):
    sequences = [torch.randn(length, 2) for length in lengths]
    samples = [(sequence, torch.tensor(i)) for i, sequence in enumerate(sequences)]
    padded, mask, labels = chapter["pad_collate"](samples)
    torch.testing.assert_close(padded, pad_sequence(sequences, batch_first=True))
    assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == lengths
    assert labels.tolist() == list(range(len(lengths)))
    for row, keep, sequence in zip(padded, mask, sequences, strict=True):
        torch.testing.assert_close(row[keep], sequence)


def test_pad_collate_works_in_a_loader(chapter):
    images = torch.zeros(6, 5, 5, dtype=torch.uint8)
    for number in range(6):
        images[number].view(-1)[: number + 1] = 200
    points = chapter["DigitPoints"](images, torch.arange(6))
    loader = DataLoader(points, batch_size=4, collate_fn=chapter["pad_collate"])
    shapes = [tuple(padded.shape) for padded, _, _ in loader]
    assert shapes == [(4, 4, 2), (2, 6, 2)]


def test_a_report_names_range_classes_and_copies(chapter):
    inputs = torch.tensor([[0.0, 1.0], [3.0, 4.0], [0.0, 1.0], [0.0, 1.0]])
    line = chapter["batch_report"](inputs, torch.tensor([1, 1, 5, 1]))
    numbers = line.replace(",", "").replace("%", "").split()
    values = inputs.numpy()
    assert [float(n) for n in numbers if n[0].isdigit()] == pytest.approx(
        [0, 4, values.mean(), values.std(ddof=1), 2, 75, 2], abs=0.005
    )
    white = torch.full((3, 4), 255, dtype=torch.uint8)
    assert "255.00 to 255.00" in chapter["batch_report"](white, torch.arange(3))


# What readers may pass by mistake, and what they may change


@pytest.mark.parametrize("name", ["stratified_split", "group_split"])
def test_splits_refuse_a_share_beyond_one_and_nan(chapter, name):
    split, random = chapter[name], generator() if name == "stratified_split" else 0
    for fraction in (-0.1, 20, float("nan")):
        with pytest.raises(ValueError, match=f"fraction is {fraction}"):
            split(torch.arange(9) % 3, fraction, random)
    with pytest.raises(ValueError, match="nan"):
        split(torch.tensor([0.0, 1.0, float("nan")]), 0.5, random)


def test_distances_to_nan_are_refused(chapter):
    points, labels = torch.randn(4, 2), torch.arange(4)
    spoilt = points.clone()
    spoilt[1, 0] = float("nan")
    for known, new in ((spoilt, points), (points, spoilt)):
        with pytest.raises(ValueError, match="nan"):
            chapter["nearest"](known, new)
        with pytest.raises(ValueError, match="nan"):
            chapter["nearest_score"](known, labels, new, labels)


def test_samples_are_copies(chapter):
    images, labels = torch.rand(3, 4, 4), torch.tensor([2, 0, 1])
    points = chapter["DigitPoints"](images, labels, threshold=0)
    sample, label = points[1]
    sample.mul_(2)
    label.add_(5)
    assert points[1][0].max() <= 3 and labels.tolist() == [2, 0, 1]


# Cells


def set_up() -> dict:
    """A namespace in which the chapter's parameters and its set-up have been run."""
    namespace: dict = {"__name__": PATH.stem}
    for cell in code_cells(PATH)[:3]:
        run_twice([cell.source], namespace)
    return namespace | load_definitions(PATH, "SEED", "check_data", "seeded")


@pytest.fixture
def read_digits(tmp_path, monkeypatch):
    """Read MNIST below ~/bookdata, as the chapter does; the folder of its files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    raw = tmp_path / "bookdata" / "MNIST" / "raw"
    shutil.copytree(NOTEBOOKS / "data" / "MNIST" / "raw", raw)
    cells = [cell.source for cell in code_cells(PATH)]
    first = next(i for i, cell in enumerate(cells) if "datasets.MNIST(" in cell)

    def read(**parameters) -> dict:
        namespace = set_up() | {"DATA_DIR": "~/bookdata"} | parameters
        for source in cells[first : first + 2]:
            run_twice([source], namespace)
        return namespace

    return read, raw


def test_digits_are_read_from_a_folder_of_the_readers_own(read_digits):
    read, raw = read_digits
    (raw / ".DS_Store").write_bytes(b"\0")
    assert read()["pixels"].shape == (4000, 1, 28, 28)


@pytest.mark.parametrize("kept", [0, 3, 10, 16, 1000])
def test_digits_that_were_cut_off_are_named_with_the_remedy(read_digits, kept):
    read, raw = read_digits
    file = raw / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RuntimeError, match="MNIST/raw is not whole.*Delete this"):
        read()


def test_more_images_than_there_are_is_an_error_that_names_both(read_digits):
    read, _ = read_digits
    with pytest.raises(ValueError, match="holds 4000 images: lower N_TRAIN"):
        read(N_TRAIN=60_000)


def needed(cells: list, wanted: set[int]) -> list:
    """The cells at some positions, and the earlier ones whose names they use."""
    kept, names = [], set()
    for position in reversed(range(max(wanted) + 1)):
        table = symtable.symtable(cells[position].source, "cell", "exec")
        bound = {s.get_name() for s in table.get_symbols() if s.is_assigned()}
        bound |= {s.get_name() for s in table.get_symbols() if s.is_imported()}
        if position in wanted or bound & names:
            kept.insert(0, cells[position])
            names = (names - bound) | used(table)
    return kept


def used(table: symtable.SymbolTable) -> set[str]:
    """The global names that a cell, or a function in it, uses."""
    top = table.get_type() == "module"
    found = [s for s in table.get_symbols() if s.is_referenced()]
    names = {s.get_name() for s in found if top or s.is_global()}
    return names.union(*map(used, table.get_children()))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_start_afresh_give_the_stored_outputs(tmp_path, method):
    """Windows, macOS and newer Pythons start workers so; nbval runs the rest forked.

    Compared are the cells on workers and the solution of the exercise on them.
    """
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    sources = [cell.source for cell in code]
    wanted = {sources.index(source) for source in section(PATH, "3.10", "3.11")}
    wanted |= {i for i, source in enumerate(sources) if "load_angles(" in source}
    assert len(wanted) >= 7
    notebook.cells = needed(code, wanted)
    own = nbformat.v4.new_code_cell(f"DATA_DIR = {str(NOTEBOOKS / 'data')!r}")
    own.execution_count = 1
    notebook.cells.insert(1, own)
    nbformat.write(notebook, tmp_path / "workers.ipynb")
    shutil.copy(NOTEBOOKS.parent / "conftest.py", tmp_path)
    options = ["--nbval", "--nbval-current-env", "-n0", "-q", "--rootdir=."]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-c", os.devnull, "workers.ipynb"],
        cwd=tmp_path,
        env=os.environ | {"BOOK_START_METHOD": method},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(notebook.cells)} passed" in result.stdout

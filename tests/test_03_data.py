"""The definitions of chapter 3 against references: torch, NumPy, scikit-learn."""

import os
import shutil
import subprocess
import symtable
import sys
import tempfile

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from notebooks import NOTEBOOKS, code_cells, load_definitions, run_twice, section

PATH = NOTEBOOKS / "03_data_and_dataloader.ipynb"


@pytest.fixture(scope="module")
def chapter() -> dict:
    return load_definitions(
        PATH,
        "Squares",
        "FolderDataset",
        "stratified_split",
        "group_split",
        "nearest_label",
        "streaming_mean_std",
        "unnormalise",
        "DigitPoints",
        "pad_collate",
        "Pictures",
        "pca",
        "same_label_nearby",
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_data_set_ends_a_for_loop(chapter):
    assert list(chapter["Squares"](4)) == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert list(chapter["Squares"](0)) == []
    with pytest.raises(IndexError):
        chapter["Squares"](4)[4]


def test_folder_dataset_agrees_with_image_folder(chapter, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 7), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / ["cat", "ant", "bee"][number % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    (tmp_path / "notes.txt").write_text("not a class")
    ours = chapter["FolderDataset"](tmp_path)
    reference = datasets.ImageFolder(tmp_path)
    assert ours.classes == reference.classes == ["ant", "bee", "cat"]
    assert len(ours) == len(reference) == 6
    for (picture, label), (rgb, expected), (path, _) in zip(
        ours, reference, ours.samples, strict=False
    ):
        assert label == expected and picture.size == rgb.size == (7, 9)
        np.testing.assert_array_equal(np.asarray(picture), pixels[int(path.stem)])


def test_folder_dataset_applies_the_transform_and_refuses_an_empty_folder(
    chapter, tmp_path
):
    with pytest.raises(FileNotFoundError, match="no PNG"):
        chapter["FolderDataset"](tmp_path)
    (tmp_path / "0").mkdir()
    with pytest.raises(FileNotFoundError, match="no PNG files in .*0"):
        chapter["FolderDataset"](tmp_path)
    Image.new("L", (4, 4), 255).save(tmp_path / "0" / "white.png")
    white = chapter["FolderDataset"](tmp_path, transform=v2.PILToTensor())[0][0]
    assert white.shape == (1, 4, 4) and white.min() == 255


def test_files_that_other_programs_leave_are_no_classes_and_no_pictures(
    chapter, tmp_path
):
    for place in (".ipynb_checkpoints/0.png", "ant/1.png", "bee/2.png", "ant/._1.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / place)
    for place in (".DS_Store", "ant/.DS_Store", "bee/Thumbs.db"):
        (tmp_path / place).write_bytes(b"\0")
    found = chapter["FolderDataset"](tmp_path)
    assert found.classes == ["ant", "bee"]
    assert [(path.name, label) for path, label in found.samples] == [
        ("1.png", 0),
        ("2.png", 1),
    ]


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
    train, validation = chapter["group_split"](groups, 0.25, generator())
    assert not set(groups[train].tolist()) & set(groups[validation].tolist())
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(300))
    split = GroupShuffleSplit(1, test_size=0.25, random_state=0)
    _, reference = next(split.split(groups, groups=groups))
    assert len(groups[validation].unique()) == len(groups[reference].unique())


def test_nearest_label_is_scikit_learns_nearest_neighbour(chapter):
    known, new = torch.randn(60, 2, 3), torch.randn(25, 2, 3)
    labels = torch.randint(0, 4, (60,))
    reference = KNeighborsClassifier(1).fit(known.flatten(1), labels)
    ours = chapter["nearest_label"](known, labels, new)
    assert ours.tolist() == reference.predict(new.flatten(1)).tolist()


@pytest.mark.parametrize("batch_size", [1, 7, 16, 50])
def test_streaming_statistics_equal_the_ones_at_once(chapter, batch_size):
    pictures = torch.rand(50, 3, 5, 4, generator=generator()) * 3 + 1000
    mean, std = chapter["streaming_mean_std"](pictures.split(batch_size))
    whole = pictures.double().numpy()
    np.testing.assert_allclose(mean, whole.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, whole.std((0, 2, 3)), rtol=1e-9)


def test_streaming_takes_batches_of_different_picture_sizes(chapter):
    batches = [torch.rand(2, 1, 8, 8), torch.rand(5, 1, 3, 4), torch.rand(1, 1, 1, 1)]
    values = torch.cat([batch.flatten() for batch in batches]).double()
    mean, std = chapter["streaming_mean_std"](batches)
    torch.testing.assert_close(mean, values.mean()[None])
    torch.testing.assert_close(std, values.std(correction=0)[None])
    with pytest.raises(ValueError, match="no batch"):
        chapter["streaming_mean_std"]([])


def test_unnormalise_is_the_inverse_of_normalize(chapter):
    pictures = torch.rand(4, 3, 6, 5)
    mean, std = torch.tensor([0.2, 0.5, 0.7]), torch.tensor([0.1, 0.3, 2.0])
    ready = v2.functional.normalize(pictures, mean.tolist(), std.tolist())
    torch.testing.assert_close(chapter["unnormalise"](ready, mean, std), pictures)


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


def test_pictures_apply_the_transform_only_where_there_is_one(chapter):
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([2, 0, 1])
    plain = chapter["Pictures"](images, labels)
    flipped = chapter["Pictures"](images, labels, v2.RandomHorizontalFlip(p=1.0))
    assert torch.equal(plain[1][0], images[1]) and plain[1][1] == 0
    assert torch.equal(flipped[1][0], images[1].flip(-1))
    assert len(list(DataLoader(TensorDataset(images), 2))) == 2


@pytest.mark.parametrize("shape", [(40, 12), (10, 30)])
def test_pca_agrees_with_scikit_learn(chapter, shape):
    x = torch.randn(*shape, generator=generator()).double()
    mean, components, share = chapter["pca"](x, 5)
    reference = PCA(5, svd_solver="full").fit(x.numpy())
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-12)
    np.testing.assert_allclose(share, reference.explained_variance_ratio_, rtol=1e-9)
    products = np.abs((components.numpy() * reference.components_).sum(axis=1))
    np.testing.assert_allclose(products, 1, atol=1e-9)
    torch.testing.assert_close(components @ components.T, torch.eye(5).double())


def test_same_label_nearby_is_the_share_of_agreeing_neighbours(chapter):
    points = torch.randn(80, 2).double()
    labels = torch.randint(0, 3, (80,))
    model = KNeighborsClassifier(2).fit(points, labels)
    nearest = model.kneighbors(points, return_distance=False)[:, 1]
    expected = (labels[nearest] == labels).double().mean().item()
    ours = chapter["same_label_nearby"](points, labels)
    assert ours == pytest.approx(expected)


# What readers may pass by mistake, and what they may change


@pytest.mark.parametrize("name", ["stratified_split", "group_split"])
def test_splits_refuse_a_share_beyond_one_and_nan(chapter, name):
    split = chapter[name]
    for fraction in (-0.1, 20, float("nan")):
        with pytest.raises(ValueError, match=f"fraction is {fraction}"):
            split(torch.arange(9) % 3, fraction, generator())
    with pytest.raises(ValueError, match="nan"):
        split(torch.tensor([0.0, 1.0, float("nan")]), 0.5, generator())


def test_distances_to_nan_are_refused(chapter):
    points, labels = torch.randn(4, 2), torch.arange(4)
    spoilt = points.clone()
    spoilt[1, 0] = float("nan")
    for known, new in ((spoilt, points), (points, spoilt)):
        with pytest.raises(ValueError, match="nan"):
            chapter["nearest_label"](known, labels, new)
    with pytest.raises(ValueError, match="nan"):
        chapter["same_label_nearby"](spoilt, labels)


def test_sizes_that_do_not_fit_are_named(chapter):
    grey_and_colour = [torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)]
    with pytest.raises(ValueError, match="3 channels after batches of 1"):
        chapter["streaming_mean_std"](grey_and_colour)
    with pytest.raises(ValueError, match="12 components of 10 x 30"):
        chapter["pca"](torch.randn(10, 30), 12)
    with pytest.raises(ValueError, match="3 images, 4 labels"):
        chapter["Pictures"](torch.rand(3, 1, 4, 4), torch.arange(4))


def test_samples_are_copies(chapter):
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([2, 0, 1])
    pictures = chapter["Pictures"](images, labels)
    points = chapter["DigitPoints"](images[:, 0], labels, threshold=0)
    before = images.clone()
    for sample, label in (pictures[1], points[1]):
        sample.mul_(2)
        label.add_(5)
    assert torch.equal(images, before) and labels.tolist() == [2, 0, 1]


# Cells


def set_up() -> dict:
    """A namespace in which the chapter's parameters and its set-up have been run."""
    namespace: dict = {"__name__": PATH.stem}
    for cell in code_cells(PATH)[:3]:
        run_twice([cell.source], namespace)
    return namespace | load_definitions(PATH, "SEED", "check_data", "seeded")


def test_loaders_and_photographs_may_be_made_twice():
    """The sampler went on drawing; the folder was there already."""
    namespace = set_up()
    namespace["labels"] = torch.arange(4000) % 10
    namespace["counts"] = namespace["labels"].bincount()
    for source in section(PATH, "3.10", "3.11"):
        if "plt." not in source:
            run_twice([source], namespace)
    namespace["photos"] = 2 * [torch.zeros(416, 640, 3, dtype=torch.uint8)]
    with tempfile.TemporaryDirectory() as folder:
        namespace["workspace"] = type("Workspace", (), {"name": folder})
        cells = [s for s in section(PATH, "3.11", "3.12") if "photo_root =" in s]
        assert "32 photographs" in run_twice(cells[:1], namespace)[0]


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
    file = raw / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RuntimeError, match="MNIST/raw is not whole.*Delete this"):
        read()


def test_more_images_than_there_are_is_an_error_that_names_both(read_digits):
    read, _ = read_digits
    with pytest.raises(ValueError, match="4000 training and 1000 test.*N_TRAIN"):
        read(N_TRAIN=60_000)


def needed(cells: list, wanted: range) -> list:
    """The cells at some positions, and the earlier ones whose names they use."""
    kept, names = [], set()
    for position in reversed(range(wanted.stop)):
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


def test_workers_that_start_afresh_give_the_stored_outputs(tmp_path):
    """Windows, macOS and newer Pythons start workers so; nbval runs the rest forked."""
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    sources = [cell.source for cell in code]
    about = section(PATH, "3.8", "3.9")
    first = sources.index(about[0])
    notebook.cells = needed(code, range(first, first + len(about)))
    own = nbformat.v4.new_code_cell(f"DATA_DIR = {str(NOTEBOOKS / 'data')!r}")
    own.execution_count = 1
    notebook.cells.insert(1, own)
    nbformat.write(notebook, tmp_path / "workers.ipynb")
    shutil.copy(NOTEBOOKS.parent / "conftest.py", tmp_path)
    options = ["--nbval", "--nbval-current-env", "-n0", "-q", "--rootdir=."]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-c", os.devnull, "workers.ipynb"],
        cwd=tmp_path,
        env=os.environ | {"BOOK_START_METHOD": "spawn"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(notebook.cells)} passed" in result.stdout

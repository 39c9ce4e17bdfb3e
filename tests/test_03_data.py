"""The definitions of chapter 3 against references: torch, NumPy, scikit-learn."""

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

from notebooks import NOTEBOOKS, load_definitions

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
    Image.new("L", (4, 4), 255).save(tmp_path / "0" / "white.png")
    white = chapter["FolderDataset"](tmp_path, transform=v2.PILToTensor())[0][0]
    assert white.shape == (1, 4, 4) and white.min() == 255


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

"""The definitions of notebook 3b against references: torch, NumPy, scikit-learn."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from notebooks import NOTEBOOKS, generator, load_definitions
from test_03_data import needed

PATH = NOTEBOOKS / "03b_data_at_scale.ipynb"


@pytest.fixture(scope="module")
def chapter() -> dict:
    return load_definitions(
        PATH,
        "Span",
        "simulate",
        "Cached",
        "Whole",
        "OneByOne",
        "write_shards",
        "Shards",
        "SharedShards",
        "shuffle_buffer",
        "streaming_mean_std",
        "streaming_pca",
        "pca",
        "same_label_nearby",
    )


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("t_load", [0.01, 0.04, 0.2])
def test_the_chart_follows_the_formula(chapter, workers, t_load):
    n, t_model = 240, 0.03
    loads, uses = chapter["simulate"]([t_load] * n, t_model, workers)
    formula = max(t_model, t_load / workers) if workers else t_load + t_model
    assert uses[-1][1] / n == pytest.approx(formula, rel=0.05)
    for (start, end), (begin, stop) in zip(loads, uses, strict=True):
        assert end - start == pytest.approx(t_load)
        assert stop - begin == pytest.approx(t_model) and begin >= end
    begins = [begin for begin, _ in uses]
    assert begins == sorted(begins)


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_no_worker_runs_ahead_further_than_it_may(chapter, prefetch):
    times = np.random.default_rng(0).exponential(0.02, 60).tolist()
    loads, uses = chapter["simulate"](times, 0.05, 2, prefetch)
    for start, _ in loads:
        begun = sum(other <= start for other, _ in loads)
        used = sum(begin <= start for begin, _ in uses)
        assert begun - used <= 2 * prefetch
    for worker in (0, 1):
        own = loads[worker::2]
        assert all(b[0] >= a[1] for a, b in zip(own, own[1:], strict=False))


def test_a_cache_holds_what_the_folder_holds(chapter, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(len(name)).integers(0, 256, (5, 6, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / "1.png")
    folder = datasets.ImageFolder(tmp_path, v2.ToImage())
    cached = chapter["Cached"](folder)
    assert len(cached) == len(folder) == 2
    for (ours, label), (theirs, expected) in zip(cached, folder, strict=False):
        assert torch.equal(ours, theirs) and label == expected


def test_whole_batches_are_the_batches_of_single_samples(chapter):
    chapter["calls"] = Counter()
    x, y = torch.randn(50, 3), torch.arange(50)
    for name in ("Whole", "OneByOne"):
        options = {"collate_fn": tuple} if name == "Whole" else {}
        loaders = [
            DataLoader(data, 8, shuffle=True, generator=generator(), **options)
            for data in (chapter[name](x, y),)
        ]
        plain = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=generator())
        for ours, theirs in zip(*loaders, plain, strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert chapter["calls"] == {"for a batch": 7, "for a sample": 50}


@pytest.fixture
def shards(chapter, tmp_path):
    """Twenty-three pictures in shards of five; the shards, pictures and labels."""
    images = torch.randint(0, 256, (23, 28, 28), generator=generator())
    images, labels = images.to(torch.uint8), torch.arange(23) % 7
    chapter |= {"images": images, "labels": labels}
    order = torch.randperm(23, generator=generator()).tolist()
    paths = chapter["write_shards"](tmp_path / "shards", order, 5)
    return paths, images[order], labels[order]


def test_shards_give_back_what_was_written(chapter, shards):
    paths, images, labels = shards
    assert [path.name for path in paths] == [f"shard-{n:03d}.tar" for n in range(5)]
    pictures, found = zip(*chapter["Shards"](paths), strict=True)
    assert torch.equal(torch.cat(pictures), images) and list(found) == labels.tolist()


def test_a_shard_is_a_tar_file_of_pairs_with_one_name(shards):
    paths, images, _ = shards
    with tarfile.open(paths[0]) as tar:
        names = tar.getnames()
        first = Image.open(io.BytesIO(tar.extractfile(names[0]).read()))
    assert np.array_equal(np.asarray(first), images[0])
    assert [name.split(".")[1] for name in names] == 5 * ["png", "cls"]
    stems = [name.split(".")[0] for name in names]
    assert stems[::2] == stems[1::2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_shared_shards_yield_each_sample_once(chapter, shards, workers):
    paths, images, _ = shards
    stream = chapter["SharedShards"](paths)
    start = {"num_workers": workers, "multiprocessing_context": "fork"}
    loader = DataLoader(stream, batch_size=None, **(start if workers else {}))
    pictures = [picture for picture, _ in loader]
    found = torch.cat(pictures).flatten(1).unique(dim=0)
    assert len(pictures) == 23
    assert torch.equal(found, images.flatten(1).unique(dim=0))


@pytest.mark.parametrize("size", [1, 3, 50, 1000])
def test_a_shuffle_buffer_loses_nothing_and_carries_only_so_far(chapter, size):
    shuffled = list(chapter["shuffle_buffer"](range(200), size, seed=0))
    assert sorted(shuffled) == list(range(200)) and shuffled != list(range(200))
    assert all(item - place <= size for place, item in enumerate(shuffled))
    assert shuffled == list(chapter["shuffle_buffer"](iter(range(200)), size, seed=0))
    with pytest.raises(ValueError, match="a buffer of 0"):
        list(chapter["shuffle_buffer"](range(5), 0, seed=0))


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
    grey_and_colour = [torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)]
    with pytest.raises(ValueError, match="3 channels after batches of 1"):
        chapter["streaming_mean_std"](grey_and_colour)


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
    with pytest.raises(ValueError, match="12 components of 10 x 30"):
        chapter["pca"](torch.randn(10, 30), 12)


def test_streamed_components_equal_the_ones_at_once(chapter):
    x = torch.randn(60, 12, generator=generator()).double() * torch.arange(1, 13) + 9
    components = chapter["pca"](x, 6)[1]
    for size in (2, 7, 60):
        streamed = chapter["streaming_pca"](x.split(size), 6)
        cosines = (streamed * components).sum(dim=1).abs()
        torch.testing.assert_close(cosines, torch.ones(6).double())


def test_same_label_nearby_is_the_share_of_agreeing_neighbours(chapter):
    points = torch.randn(80, 2).double()
    labels = torch.randint(0, 3, (80,))
    model = KNeighborsClassifier(2).fit(points, labels)
    nearest = model.kneighbors(points, return_distance=False)[:, 1]
    expected = (labels[nearest] == labels).double().mean().item()
    ours = chapter["same_label_nearby"](points, labels)
    assert ours == pytest.approx(expected)
    points[1, 0] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        chapter["same_label_nearby"](points, labels)


def test_streams_whose_workers_start_afresh_give_the_stored_outputs(tmp_path):
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    wanted = {i for i, cell in enumerate(code) if "copies_of_each(" in cell.source}
    wanted |= {i for i, cell in enumerate(code) if "reducer_override" in cell.source}
    notebook.cells = needed(code, wanted)
    own = nbformat.v4.new_code_cell(f"DATA_DIR = {str(NOTEBOOKS / 'data')!r}")
    own.execution_count = 1
    notebook.cells.insert(1, own)
    nbformat.write(notebook, tmp_path / "streams.ipynb")
    shutil.copy(NOTEBOOKS.parent / "conftest.py", tmp_path)
    options = ["--nbval", "--nbval-current-env", "-n0", "-q", "--rootdir=."]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-c", os.devnull, "streams.ipynb"],
        cwd=tmp_path,
        env=os.environ | {"BOOK_START_METHOD": "spawn"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(notebook.cells)} passed" in result.stdout

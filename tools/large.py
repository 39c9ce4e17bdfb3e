"""Run a notebook once more with larger parameters, and show what a cell printed then.

    python tools/large.py 14

A Markdown cell behind a code cell, with metadata such as
`"large-run": "SEEDS = 5; N_TEST = 500"`, holds what that code cell printed in a run of
the whole notebook with these values instead of those of its first cell. Such a run
takes longer than the tests have time for, so nothing compares it: run it anew when the
code that it shows has changed. The claims up to that cell must hold in it too.
"""

import argparse
import os
from datetime import date
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from chapters import execute, find_chapters

TEXT = """With `{values}` the same cell printed, after {minutes:.0f} minutes of one \
core (PyTorch {torch}, {date}):

```text
{printed}
```"""


def shown_cells(notebook: NotebookNode) -> dict[int, tuple[int, str]]:
    """Position of a Markdown cell with `large-run`: its code cell's, and its values.

    Several may follow one code cell. Raises ValueError for one that follows none.
    """
    found, code = {}, None
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            code = i
        elif values := cell.metadata.get("large-run"):
            if code is None:
                raise ValueError(f"cell {i}: large-run belongs behind a code cell")
            found[i] = code, values
        else:
            code = None
    return found


def printed(notebook: NotebookNode, values: str, last: int) -> NotebookNode:
    """The notebook up to the cell `last`, run with the values behind its first cell.

    One more cell prints the minutes of one core that it took.
    """
    part = nbformat.from_dict(notebook.copy())
    part.cells = [nbformat.from_dict(dict(c)) for c in notebook.cells[: last + 1]]
    first = next(cell for cell in part.cells if cell.cell_type == "code")
    first.source += f"\n{values}"
    part.cells.append(new_code_cell("import time\nprint(time.process_time() / 60)"))
    return execute(part, limit=None)


def write(path: Path) -> int:
    """Fill the cells of a notebook that show a larger run; how many there are.

    The file is replaced after the last run; if a cell fails, it stays as it was. What
    was changed in it during the run is kept.
    """
    notebook, texts = nbformat.read(path, as_version=4), {}
    shown = shown_cells(notebook)
    for values in dict.fromkeys(values for _, values in shown.values()):
        places = {i: code for i, (code, own) in shown.items() if own == values}
        run = printed(notebook, values, max(places.values()))
        minutes = float(run.cells[-1].outputs[-1].text)
        for i, code in places.items():
            parts = [output.get("text", "") for output in run.cells[code].outputs]
            texts[notebook.cells[i].id] = TEXT.format(
                values=values,
                minutes=minutes,
                torch=version("torch"),
                date=date.today(),
                printed="".join(parts).strip("\n"),
            )
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = texts.get(cell.id, cell.source)
    new = path.with_suffix(".new")
    nbformat.write(notebook, new)
    os.replace(new, path)
    return len(shown)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="+", help="numbers or names")
    for path in find_chapters(parser.parse_args(arguments).chapters):
        print(f"{path.stem}: {write(path)} cells written", flush=True)


if __name__ == "__main__":
    main()

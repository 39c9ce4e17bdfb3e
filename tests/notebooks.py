"""Read the notebooks in tests: their code cells, and definitions out of them."""

import ast
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


class CodeCell(NamedTuple):
    """A code cell: its source without IPython's magics, its tags and its metadata."""

    source: str
    tags: list[str]
    metadata: dict


def notebook_paths() -> list[Path]:
    """The notebooks of the chapters, in order."""
    return sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def without_magics(source: str) -> str:
    """Python source of a cell: lines such as ``%matplotlib inline`` become ``pass``.

    A cell whose first line is a cell magic (``%%bash``) is empty, unless the magic only
    measures or captures what its Python lines do.
    """
    first, _, rest = source.partition("\n")
    if first.startswith("%%"):
        timing = first.split()[0] in ("%%time", "%%timeit", "%%capture")
        return without_magics(rest) if timing else ""
    try:
        ast.parse(source)
    except SyntaxError:
        lines = source.splitlines()
        for number, line in enumerate(lines):
            code = line.lstrip()
            if code.startswith(("%", "!")):
                lines[number] = line[: len(line) - len(code)] + "pass"
        return "\n".join(lines)
    return source


def code_cells(path: Path) -> list[CodeCell]:
    """The code cells of a notebook, in order."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    found = []
    for cell in cells:
        if cell["cell_type"] == "code":
            source = without_magics("".join(cell["source"]))
            found.append(
                CodeCell(source, cell["metadata"].get("tags", []), cell["metadata"])
            )
    return found


def section(path: Path, number: str, until: str) -> list[str]:
    """The sources of the code cells between two headings of a chapter."""
    sources, inside = [], False
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and f"## {number} " in source:
            inside = True
        if cell["cell_type"] == "markdown" and f"## {until} " in source:
            inside = False
        if inside and cell["cell_type"] == "code":
            sources.append(source)
    return sources


def statements(path: Path) -> Iterator[ast.stmt]:
    """The top-level statements of a notebook's code cells, in order."""
    for number, cell in enumerate(code_cells(path)):
        yield from ast.parse(cell.source, f"{Path(path).name}, code cell {number}").body


def bound_names(statement: ast.stmt) -> set[str]:
    """The names that a definition or an assignment binds or changes.

    ``Value.exp = exp`` changes ``Value``, so it belongs to the definition of that.
    """
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        targets = list(statement.targets)
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    else:
        return set()
    names = set()
    while targets:
        target = targets.pop()
        if isinstance(target, ast.Name):
            names.add(target.id)
        elif isinstance(target, ast.Tuple | ast.List):
            targets = [*targets, *target.elts]
        elif isinstance(target, ast.Attribute | ast.Subscript | ast.Starred):
            targets = [*targets, target.value]
    return names


def load_definitions(path: Path, *names: str) -> dict:
    """Run a notebook's imports and its definitions of the names; the namespace.

    A definition is a function, a class or an assignment at the top level of a code
    cell. All of them run in the notebook's order, so a later one replaces an earlier
    one. Whatever else a definition uses when it runs must be named too.

    Raises LookupError if the notebook does not define one of the names.
    """
    wanted, found = set(names), set()
    namespace: dict = {"__name__": Path(path).stem}
    for statement in statements(path):
        bound = bound_names(statement) & wanted
        if bound or isinstance(statement, ast.Import | ast.ImportFrom):
            found |= bound
            module = ast.Module([statement], type_ignores=[])
            exec(compile(module, Path(path).name, "exec"), namespace)
    if missing := wanted - found:
        raise LookupError(f"{Path(path).name} does not define {sorted(missing)}")
    return namespace


def run_twice(sources: list[str], namespace: dict) -> list[str]:
    """Run each cell twice in a row: both times it prints the same. What they print."""
    printed = []
    for source in sources:
        texts = []
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(source, namespace)
            texts.append(output.getvalue())
        assert texts[0] == texts[1], source
        printed.append(texts[0])
    return printed


def generator(seed: int = 0) -> torch.Generator:
    """A generator of random numbers that starts from the seed."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers of a shape, the same for the same seed."""
    return torch.randn(*shape, generator=generator(seed))

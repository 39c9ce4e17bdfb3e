"""Definitions that one notebook copies from another.

A notebook imports nothing from this repository, so what two of them need stands in
both. A code cell whose metadata say `"copy-of": "10_attention"` holds nothing but
definitions (functions, classes, assignments), letter by letter as in that notebook.
"""

import ast
from pathlib import Path

import nbformat
from nbformat import NotebookNode

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def name_of(statement: ast.stmt) -> str:
    """What a statement defines. Raises ValueError for one that is no definition."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return statement.name
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return ast.unparse(statement.targets[0])
    if isinstance(statement, ast.AnnAssign):
        return ast.unparse(statement.target)
    raise ValueError(f"no definition: {ast.unparse(statement)[:60]}")


def span(statement: ast.stmt) -> tuple[int, int]:
    """First and last line of a statement, decorators included."""
    first = min([statement.lineno, *(d.lineno for d in decorators(statement))])
    return first, statement.end_lineno


def decorators(statement: ast.stmt) -> list[ast.expr]:
    """The decorators of a function or a class."""
    return getattr(statement, "decorator_list", [])


def definitions(notebook: NotebookNode) -> dict[str, str]:
    """Name -> text of a notebook's definitions; of several, the first."""
    found: dict[str, str] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code" or "copy-of" in cell.metadata:
            continue
        lines = cell.source.split("\n")
        for statement in ast.parse(cell.source).body:
            if isinstance(statement, Definition):
                first, last = span(statement)
                text = "\n".join(lines[first - 1 : last])
                found.setdefault(name_of(statement), text)
    return found


def as_in_source(cell: NotebookNode, source: NotebookNode) -> str:
    """The text of a copying cell as its source has it now.

    Raises LookupError if the source does not define a name, and ValueError if the cell
    holds anything but definitions.
    """
    there, lines = definitions(source), cell.source.split("\n")
    for statement in reversed(ast.parse(cell.source).body):
        name = name_of(statement)
        if name not in there:
            raise LookupError(f"{cell.metadata['copy-of']} does not define {name}")
        first, last = span(statement)
        lines[first - 1 : last] = there[name].split("\n")
    return "\n".join(lines)


def copy_definitions(path: Path) -> list[str]:
    """Write the copying cells of a notebook anew; the sources of those that changed."""
    notebook, changed = nbformat.read(path, as_version=4), []
    for cell in notebook.cells:
        if source := cell.metadata.get("copy-of"):
            there = nbformat.read(path.with_name(f"{source}.ipynb"), as_version=4)
            text = as_in_source(cell, there)
            if text != cell.source:
                cell.source = text
                changed.append(source)
    if changed:
        nbformat.write(notebook, path)
    return changed

"""What a reader of a chapter meets: minutes to read, and code that only draws."""

import ast
from collections.abc import Iterator

from nbformat import NotebookNode

WORDS, LINES = 200, 12  # read in a minute: words of prose, lines of visible code
FOLDED = {"hide-input", "hide-cell"}


def is_folded(cell: NotebookNode) -> bool:
    """Whether the site shows a cell's code only on request."""
    return bool(FOLDED & set(cell.metadata.get("tags", [])))


def count_lines(source: str) -> int:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in source.splitlines())


def reading_minutes(notebook: NotebookNode) -> int:
    """Minutes to read the prose and the visible code; folded cells are free."""
    prose = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    code = [c for c in notebook.cells if c.cell_type == "code" and not is_folded(c)]
    words = sum(len(source.split()) for source in prose)
    lines = sum(count_lines(cell.source) for cell in code)
    return round(words / WORDS + lines / LINES)


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements in a tree that hold no others, in order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and not hasattr(child, "body"):
            yield child
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from statements(child)


def names(*nodes: ast.AST) -> set[str]:
    """The names that occur in trees."""
    found = [n for node in nodes for n in ast.walk(node)]
    return {n.id for n in found if isinstance(n, ast.Name)} | {
        n.arg for n in found if isinstance(n, ast.arg)
    }


def only_draws(source: str) -> bool:
    """Whether most lines of a cell draw.

    A statement draws if it names `plt`, axes or a figure: `ax`, `axes`, `fig`, or a
    name that a statement which draws, a loop over axes or a `with` has bound.
    """
    tree = ast.parse(source)
    pens = {"plt", "ax", "axes", "fig"}
    for node in ast.walk(tree):
        if isinstance(node, ast.For) and names(node.iter) & pens:
            zipped = isinstance(node.iter, ast.Call) and isinstance(
                node.target, ast.Tuple
            )
            if zipped and len(node.iter.args) == len(node.target.elts):
                pairs = zip(node.iter.args, node.target.elts, strict=True)
                pens |= {n for arg, to in pairs if names(arg) & pens for n in names(to)}
            elif isinstance(node.target, ast.Name):
                pens.add(node.target.id)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if names(node.value.func) & pens:
                pens |= names(*node.targets)
    code = [s for s in statements(tree) if not is_docstring(s)]
    lengths = {s: s.end_lineno - s.lineno + 1 for s in code}
    drawing = sum(length for s, length in lengths.items() if names(s) & pens)
    return drawing > sum(lengths.values()) / 2


def is_docstring(statement: ast.stmt) -> bool:
    """Whether a statement is nothing but a text."""
    return isinstance(statement, ast.Expr) and isinstance(
        getattr(statement.value, "value", None), str
    )

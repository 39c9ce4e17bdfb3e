"""Claims: the `assert` statements of a chapter, and the values on their two sides.

`tools/chapters.py` has a kernel run this file before a chapter. From then on each claim
notes its values in the file $BOOK_CLAIMS, one line of JSON for each time it is met:
[number of the code cell, line, whether it held, values]. With $BOOK_CLAIMS_ONLY set,
a claim that does not hold is noted and does not stop the chapter.
"""

import ast
import builtins
import json
import os
import re
from decimal import Decimal
from typing import NamedTuple

COMMENT = re.compile(r"# five seeds: (.*)")
NUMBER = r"(-?\d[\d.]*(?:e[-+]\d+)?)"
RANGE = re.compile(f"{NUMBER}(?: to {NUMBER})?")


class Claim(NamedTuple):
    """An assert outside functions: where it stands, what it says, what was measured."""

    line: int  # of its first and its last line, from 1
    last_line: int
    test: str
    side: int  # which side is measured: the first that is no constant
    five_seeds: str | None  # what follows "five seeds:", behind or above it


def find_claims(source: str) -> list[Claim]:
    """The claims of a code cell, in order."""
    lines, found = source.split("\n"), []
    for node in outside_functions(ast.parse(source)):
        if isinstance(node, ast.Assert):
            behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            above = lines[node.lineno - 2].strip() if node.lineno > 1 else ""
            match = COMMENT.search(behind) or COMMENT.match(above)
            text = match[1] if match else None
            sides = [node.test]
            if isinstance(node.test, ast.Compare):
                sides = [node.test.left, *node.test.comparators]
            plain = [all(map(is_plain, ast.walk(s))) for s in sides]
            side = plain.index(False) if False in plain else 0
            place = (node.lineno, node.end_lineno)
            found.append(Claim(*place, ast.unparse(node.test), side, text))
    return found


def is_plain(node: ast.AST) -> bool:
    """Whether a node of an expression can be part of a constant."""
    return isinstance(
        node, ast.Constant | ast.UnaryOp | ast.USub | ast.BinOp | ast.operator
    )


def outside(source: str, measured: dict[str, list[float]]) -> list[str]:
    """What is wrong with a cell's comments "five seeds: …", given what was measured.

    `measured` holds line -> smallest and largest value of the run whose outputs are
    stored (tools/chapters.py notes them). A comment of one range or one number must
    hold these values.
    """
    wrong = []
    for claim in find_claims(source):
        if claim.five_seeds is None or str(claim.line) not in measured:
            continue
        match = RANGE.fullmatch(claim.five_seeds)
        if not match:
            wrong.append(f"{claim.five_seeds!r} is no range")
            continue
        ends = [end for end in match.groups() if end]
        slack = [0.51 * 10.0 ** Decimal(end).as_tuple().exponent for end in ends]
        low, high = float(ends[0]) - slack[0], float(ends[-1]) + slack[-1]
        for value in measured[str(claim.line)]:
            if not low <= value <= high:
                wrong.append(f"{claim.five_seeds} does not hold {value}")
                break
    return wrong


def outside_functions(tree: ast.AST) -> list[ast.AST]:
    """The nodes of a tree that run with it: asserts in functions guard every call."""
    found = [tree]
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            found += outside_functions(child)
    return found


class Recorder(ast.NodeTransformer):
    """Turn `assert a < b` into statements that evaluate each side once and note it."""

    def __init__(self, number_of_cell, enforce: bool):
        self.number_of_cell, self.enforce = number_of_cell, enforce

    def leave(self, node: ast.AST) -> ast.AST:
        return node

    visit_FunctionDef = visit_ClassDef = visit_Lambda = leave

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        compared = isinstance(node.test, ast.Compare)
        sides = [node.test.left, *node.test.comparators] if compared else [node.test]
        names = [f"__side{i}" for i in range(len(sides))]
        found = [
            ast.Assign([ast.Name(name, ast.Store())], side)
            for name, side in zip(names, sides, strict=True)
        ]
        loaded = [ast.Name(name, ast.Load()) for name in names]
        held = loaded[0]
        if compared:
            held = ast.Compare(loaded[0], node.test.ops, loaded[1:])
        place = [ast.Constant(self.number_of_cell()), ast.Constant(node.lineno)]
        values = ast.List(loaded if compared else [], ast.Load())
        note = ast.Name("__note_claim", ast.Load())
        found.append(ast.Expr(ast.Call(note, [*place, held, values], [])))
        if self.enforce:
            found.append(ast.Assert(held, node.msg))
        return [ast.fix_missing_locations(ast.copy_location(s, node)) for s in found]


def note_claim(cell: int, line: int, held, values: list) -> None:
    """Append a claim to the file $BOOK_CLAIMS."""

    def number(value) -> float | None:
        try:
            return float(getattr(value, "detach", lambda: value)())
        except (TypeError, ValueError, RuntimeError):
            return None

    entry = [cell, line, bool(held), [number(value) for value in values]]
    with open(os.environ["BOOK_CLAIMS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "kernel":
    builtins.__note_claim = note_claim
    shell = builtins.get_ipython()
    numbers = [0]  # of cells that ran; IPython 8 and 9 count before and after a cell
    shell.events.register("pre_run_cell", lambda info: numbers.append(len(numbers)))
    enforce = "BOOK_CLAIMS_ONLY" not in os.environ
    shell.ast_transformers.append(Recorder(lambda: numbers[-1], enforce))

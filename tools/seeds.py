"""Try every claim of the chapters over several seeds and thread counts.

    python tools/seeds.py                    # all chapters, seeds 0-4, 1 and 2 threads
    python tools/seeds.py 04 --seeds 0 1 --threads 1

A claim is an `assert` statement of a code cell. Each is recorded, with the values on
both sides, instead of stopping the run: the table shows which held, and by how much.
"""

import argparse
import ast
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, DeadKernelError

from chapters import execute, find_chapters

RECORD = """
def __claim(cell, line, held, values):
    import json, os

    def number(value):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            return None

    entry = [cell, line, bool(held), [number(value) for value in values]]
    with open(os.environ["BOOK_CLAIMS"], "a") as file:
        file.write(json.dumps(entry) + chr(10))
"""


class Recorder(ast.NodeTransformer):
    """Turn `assert a < b` into statements that evaluate each side once and record."""

    def __init__(self, cell: int):
        self.cell = cell

    def leave(self, node: ast.AST) -> ast.AST:
        """Asserts inside functions and classes guard every call: they are no claims."""
        return node

    visit_FunctionDef = visit_ClassDef = visit_Lambda = leave

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        test = node.test
        compared = isinstance(test, ast.Compare)
        sides = [test.left, *test.comparators] if compared else [test]
        names = [f"__side{i}" for i in range(len(sides))]
        code = "".join(
            f"{n} = {ast.unparse(s)}\n" for n, s in zip(names, sides, strict=True)
        )
        held = names[0]
        if compared:
            loaded = [ast.Name(n, ast.Load()) for n in names]
            held = ast.unparse(ast.Compare(loaded[0], test.ops, loaded[1:]))
        values = ", ".join(names) if compared else ""
        code += f"__claim({self.cell}, {node.lineno}, {held}, [{values}])"
        return ast.parse(code).body


def run(
    path: Path, seed: int, threads: int, parameters: str = ""
) -> tuple[list, dict, str]:
    """Run a chapter with one seed: claims recorded, their sources, an error or ''.

    The parameters are Python source that is put behind the chapter's first cell.
    """
    notebook = nbformat.read(path, as_version=4)
    sources = {}
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += f"\nSEED = {seed}\n{parameters}"
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                sources[i, node.lineno] = ast.unparse(node.test)
        if any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            cell.source = ast.unparse(Recorder(i).visit(tree))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(RECORD))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "claims")
        log.touch()
        error = ""
        try:
            execute(notebook, BOOK_CLAIMS=str(log), OMP_NUM_THREADS=str(threads))
        except CellExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}"
        except DeadKernelError:
            error = "the kernel died: out of memory?"
        claims = [json.loads(line) for line in log.read_text().splitlines()]
    return claims, sources, error


def span(values: list) -> str:
    """The smallest and the largest of the values, `-` if they are no numbers."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "-"
    low, high = min(numbers), max(numbers)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def try_chapter(path: Path, seeds: list[int], threads: list[int]) -> bool:
    """Print the table of one chapter; whether every claim held in every run."""
    held, sides, all_sources, errors = defaultdict(list), defaultdict(list), {}, []
    for count in threads:
        for seed in seeds:
            claims, sources, error = run(path, seed, count)
            all_sources |= sources
            for cell, line, ok, values in claims:
                held[cell, line].append(ok)
                sides[cell, line].append(values)
            if error:
                errors.append(f"seed {seed}, {count} threads: {error}")
    runs = len(seeds) * len(threads)
    good = sum(all(results) for results in held.values())
    print(
        f"\n## {path.stem}: {good} of {len(held)} claims held in all of {runs} runs\n"
    )
    print("| cell | claim | held | measured | bound |\n|---|---|---|---|---|")
    for key in sorted(held):
        claim = all_sources[key].replace("|", "\\|")
        columns = list(zip(*sides[key], strict=True)) or [[None]]
        row = [str(key[0]), f"`{claim}`", f"{sum(held[key])}/{len(held[key])}"]
        row += [span(columns[0]), "; ".join(span(c) for c in columns[1:]) or "-"]
        print(f"| {' | '.join(row)} |")
    for error in errors:
        print(f"\nstopped: {error}")
    print(flush=True)
    return good == len(held) > 0 and not errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", help="numbers or names; all if none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    chapters = find_chapters(options.chapters)
    results = [try_chapter(path, options.seeds, options.threads) for path in chapters]
    if not all(results):
        raise SystemExit("not every claim held")


if __name__ == "__main__":
    main()

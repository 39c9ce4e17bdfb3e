"""Try every claim of the chapters over several seeds.

    python tools/seeds.py                    # all chapters, seeds 0-4, one thread
    python tools/seeds.py 04 --seeds 0 1 --threads 2
    python tools/seeds.py 04 --write         # and write the comments anew

Each claim (tools/claims.py) is noted, with the values on both sides, instead of
stopping the run: the table shows which held, and the range of the side that was
measured, which is what a comment "five seeds: …" states. As many runs at once as there
are cores, one thread each.
"""

import argparse
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, DeadKernelError

from chapters import at_once, execute, find_chapters
from claims import COMMENT, find_claims

WIDTH = 88  # of a line of code


def run(
    path: Path, seed: int, threads: int, parameters: str = "", first: str = ""
) -> tuple[list, dict, str]:
    """Run a chapter with one seed: claims noted, their sources, an error or ''.

    The parameters are Python source put behind the chapter's first cell, and `first`
    is source put before it. A claim is [position of its cell, line, whether it held,
    values of its sides]; its text is found by its position and line.
    """
    notebook = nbformat.read(path, as_version=4)
    code = {i: c for i, c in enumerate(notebook.cells) if c.cell_type == "code"}
    sources = {
        (i, claim.line): claim
        for i, cell in code.items()
        for claim in find_claims(cell.source)
    }
    places = list(code)
    start = code[places[0]]
    start.source = f"{first}\n{start.source}\nSEED = {seed}\n{parameters}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "claims")
        log.touch()
        error = ""
        try:
            execute(notebook, log, BOOK_CLAIMS_ONLY="1", OMP_NUM_THREADS=str(threads))
        except CellExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}"
        except DeadKernelError:
            error = "the kernel died: out of memory?"
        except TimeoutError:
            error = "a cell hit its limit"
        claims = [json.loads(line) for line in log.read_text().splitlines()]
    return [[places[cell - 1], *rest] for cell, *rest in claims], sources, error


def span(values: list) -> str:
    """The smallest and the largest of the values, rounded outwards, `-` if no numbers.

    Three digits of the larger one: `0.941 to 0.948`, or one number if both are equal.
    """
    numbers = [v for v in values if v is not None]
    if not numbers or not all(map(math.isfinite, numbers)):
        return "-"
    low, high = min(numbers), max(numbers)
    size = max(abs(low), abs(high))
    if low == high:
        return f"{low:.3g}"
    if size < 1e-3 or size >= 1e7:
        return f"{low:.1e} to {high:.1e}"
    decimals = max(0, 2 - math.floor(math.log10(size)))
    unit = 10.0**-decimals
    low, high = math.floor(low / unit) * unit, math.ceil(high / unit) * unit
    return f"{low + 0.0:.{decimals}f} to {high:.{decimals}f}"


def write_comments(path: Path, spans: dict[tuple[int, int], str]) -> int:
    """Write the comments "five seeds: …" of a chapter anew; how many changed.

    A comment that would make its line too long moves to the line above.
    """
    notebook, changed = nbformat.read(path, as_version=4), 0
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        lines = cell.source.split("\n")
        for claim in reversed(find_claims(cell.source)):
            text = spans.get((i, claim.line), "-")
            if claim.five_seeds is None or text in ("-", claim.five_seeds):
                continue
            changed += 1
            comment = f"# five seeds: {text}"
            above = claim.line - 2
            if above >= 0 and COMMENT.match(lines[above].strip()):
                del lines[above]
                last = claim.last_line - 2
            else:
                last = claim.last_line - 1
                lines[last] = COMMENT.split(lines[last])[0].rstrip()
            if len(lines[last]) + len(comment) + 2 <= WIDTH:
                lines[last] = f"{lines[last]}  {comment}"
            else:
                first = last - (claim.last_line - claim.line)
                indent = len(lines[first]) - len(lines[first].lstrip())
                lines.insert(first, " " * indent + comment)
        cell.source = "\n".join(lines)
    if changed:
        nbformat.write(notebook, path)
    return changed


def report(path: Path, runs: list[tuple], write: bool) -> bool:
    """Print the table of one chapter; whether every claim held in every run."""
    held, sides, all_sources, errors = defaultdict(list), defaultdict(list), {}, []
    for seed, threads, result in sorted(runs, key=lambda run: run[:2]):
        claims, sources, error = result
        all_sources |= sources
        for cell, line, ok, values in claims:
            held[cell, line].append(ok)
            sides[cell, line].append(values)
        if error:
            errors.append(f"seed {seed}, {threads} threads: {error}")
    good = sum(all(results) for results in held.values())
    print(
        f"\n## {path.stem}: {good} of {len(held)} claims held in all of "
        f"{len(runs)} runs\n"
    )
    print("| cell | claim | held | measured | bound |\n|---|---|---|---|---|")
    spans = {}
    for key in sorted(held):
        claim = all_sources[key]
        text = claim.test.replace("|", "\\|")
        columns = list(zip(*sides[key], strict=True)) or [[None]]
        spans[key] = span(columns.pop(claim.side if len(columns) > 1 else 0))
        row = [str(key[0]), f"`{text}`", f"{sum(held[key])}/{len(held[key])}"]
        row += [spans[key], "; ".join(map(span, columns)) or "-"]
        print(f"| {' | '.join(row)} |")
    for error in errors:
        print(f"\nstopped: {error}")
    if write:
        print(f"\n{write_comments(path, spans)} comments written")
    print(flush=True)
    return good == len(held) > 0 and not errors


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", help="numbers or names; all if none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    if options.write and len(set(options.seeds)) != 5:
        raise SystemExit("--write needs five seeds")
    chapters = find_chapters(options.chapters)
    runs, results = defaultdict(list), []
    calls = [(p, seed, options.threads) for p in chapters for seed in options.seeds]
    for (path, seed, threads), result in at_once(run, calls, options.threads):
        runs[path].append((seed, threads, result))
        if len(runs[path]) == len(options.seeds):
            results.append(report(path, runs[path], options.write))
    if not all(results):
        raise SystemExit("not every claim held")


if __name__ == "__main__":
    main()

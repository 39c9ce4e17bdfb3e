"""Execute the chapters: store their outputs, or measure what they need.

python tools/chapters.py refresh            # every chapter
python tools/chapters.py refresh 02 04      # the chapters named
python tools/chapters.py status             # the table of book/status.md
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from datetime import date
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
STATUS_TABLE = ROOT / "book" / "status_table.md"
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}

# Put behind a chapter to ask its kernel what it needed
MEASURE = """
import json as _json, resource as _resource, sys as _sys
import torch as _torch
_peak = _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss
_peak = _peak / (1024**3 if _sys.platform == "darwin" else 1024**2)
print(_json.dumps({"torch": _torch.__version__, "gib": _peak}))
"""


def find_chapters(names: list[str]) -> list[Path]:
    """The notebooks whose numbers or names are given; all of them if none is.

    Raises SystemExit, with the list of what there is, for a name that fits no chapter.
    """
    chapters = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    for name in names:
        if not any(path.name.startswith(Path(name).stem) for path in chapters):
            known = ", ".join(path.stem for path in chapters)
            raise SystemExit(f"no chapter {name!r}. There are: {known}.")
    wanted = tuple(Path(name).stem for name in names) or ("",)
    return [path for path in chapters if path.name.startswith(wanted)]


def execute(notebook: NotebookNode, **environment: str) -> NotebookNode:
    """Run the notebook among the chapters, with extra environment variables.

    Raises nbclient's CellExecutionError at the first cell that fails.
    """
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    client.execute(env={**os.environ, "TQDM_DISABLE": "1", **environment})
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def refresh(path: Path) -> None:
    """Store the outputs of a new run. If a cell fails, the file stays as it was."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    started = time.perf_counter()
    execute(notebook)
    new = path.with_suffix(".new")
    nbformat.write(notebook, new)
    os.replace(new, path)
    print(
        f"{path.stem}: stored after {time.perf_counter() - started:.0f} s", flush=True
    )


def data_read(notebook: NotebookNode) -> str:
    """Which data the code of a chapter names, and where they come from."""
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    kept = {path.name for path in (NOTEBOOKS / "data").glob("[!.]*")} - {"SHA256SUMS"}
    found = [f"{name} (repository)" for name in kept if f'"{name}"' in code]
    loaders = re.findall(r"from sklearn.datasets import (.+)", code)
    found += [f"{name} (scikit-learn)" for line in loaders for name in line.split(", ")]
    return ", ".join(sorted(found)) or "none"


def machine() -> str:
    """The processor, cores, memory, system and Python of this machine, in one line."""
    cpu, memory = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if "model name" in line]
        cpu = names[0] if names else cpu
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = f"{pages / 1024**3:.0f} GB of memory, "
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory}no GPU used, "
        f"{platform.system()}, Python {platform.python_version()}"
    )


def measure(path: Path) -> str:
    """Run a chapter without storing it; its row of the status table."""
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE))
    started = time.perf_counter()
    execute(notebook)
    seconds = time.perf_counter() - started
    found = json.loads(notebook.cells[-1].outputs[-1].text)
    row = [
        f"[{title}](../notebooks/{path.name})",
        f"{seconds:.0f}",
        f"{found['gib']:.1f}",
        data_read(notebook),
        found["torch"].split("+")[0],
        date.today().isoformat(),
    ]
    print(f"{path.stem}: {seconds:.0f} s, {found['gib']:.2f} GB", flush=True)
    return f"| {' | '.join(row)} |"


def status() -> None:
    """Measure every chapter, then write the table in one go."""
    rows = [measure(path) for path in find_chapters([])]
    head = "| chapter | seconds | peak memory (GB) | data read | torch | measured |"
    table = [
        f"Measured on: {machine()}.",
        "",
        head,
        "|---|---:|---:|---|---|---|",
        *rows,
    ]
    STATUS_TABLE.write_text("\n".join(table) + "\n", encoding="utf-8")
    print(f"wrote {STATUS_TABLE.relative_to(ROOT)}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["refresh", "status"])
    parser.add_argument("chapters", nargs="*", help="numbers or names; all if none")
    options = parser.parse_args(arguments)
    if options.command == "status":
        return status()
    failed = []
    for path in find_chapters(options.chapters):
        try:
            refresh(path)
        except CellExecutionError as error:
            failed.append(path.stem)
            print(
                f"{error}\n{path.name} is unchanged: mend the cell above",
                file=sys.stderr,
            )
    if failed:
        raise SystemExit(f"not refreshed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

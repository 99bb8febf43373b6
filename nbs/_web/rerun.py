"""Run notebooks, one after another, and store what they show: python nbs/_web/rerun.py [NOTEBOOK ...] [--time-only]

Without names, all of them; the index, which shows the times of the others, comes last. A notebook is stored only when every cell ran and none wrote to
standard error (progress bars do not count). Its seconds go to nbs/results/notebooks.json, from the first cell to the last, on two cores, as
Run All in JupyterLab takes them, and whether it showed a bar. --time-only stores these and leaves the notebooks as they are.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbdev.clean import nbdev_clean
from tidy import is_bar, tidy
from tqdm import tqdm

NBS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(NBS.parent))

from wave_rnns.core import atomic_write, data_root, from_json, to_json  # noqa: E402

RECORD = NBS / "results/notebooks.json"
CORES = 2


class Refused(Exception):
    "A notebook that must not be stored. The message says why."


def execute(path: Path, bar: tqdm) -> tuple:  # the notebook, its seconds, did it show a bar?
    "Run every cell in the notebook's own folder, as Run All does; the bar moves with the cells."
    nb = nbformat.read(path, as_version=4)
    times = []

    def step(cell, cell_index, **kwargs):
        times.append(time.perf_counter())
        bar.update(cell_index + 1 - bar.n)

    client = NotebookClient(
        nb,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=lambda cell, cell_index: times or times.append(time.perf_counter()),
        on_cell_executed=step,
    )
    bar.reset(len(nb.cells))
    bar.set_description(path.stem)
    try:
        client.execute()
    except CellExecutionError as error:
        raise Refused(f"a cell failed: {error.ename}: {error.evalue}") from error
    except DeadKernelError as error:
        raise Refused(f"the kernel died: {error}") from error
    bars = False
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            bars |= is_bar(out)
            if out.get("name") == "stderr" and not is_bar(out):
                raise Refused(
                    f"cell {cell.id} wrote to standard error: {out.text.strip()[:300]}"
                )
    return nb, times[-1] - times[0], bars


def rerun(path: Path, bar: tqdm, time_only: bool = False) -> tuple[float, bool]:
    "Run a notebook and store it in the house's form: its seconds, and did it show a bar? Refused leaves it as it was."
    nb, seconds, bars = execute(path, bar)
    if not time_only:
        atomic_write(path, nbformat.writes(nb) + "\n")
        nbdev_clean(path)
        tidy(path)
    return seconds, bars


def note(name: str, seconds: float, bars: bool, record: Path = RECORD):
    "What one notebook took; what the others took stays."
    known = from_json(record.read_bytes()) if record.exists() else {}
    times = known.get("seconds", {}) | {name: round(seconds, 1)}
    watched = set(known.get("bars", [])) - {name} | ({name} if bars else set())
    there = {p.stem for p in NBS.glob("*.ipynb")}
    times = {k: v for k, v in times.items() if k in there}
    text = to_json(
        {"cores": CORES, "seconds": times, "bars": sorted(watched & there)}, indent=1
    )
    atomic_write(record, text + "\n")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--time-only", action="store_true", help="measure, store no outputs")
    args = parser.parse_args(arguments)
    if not data_root().is_dir():
        sys.exit(
            f"{data_root()} is not there: name the folder of the data sets in WAVE_RNNS_DATA"
        )
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(NBS.parent), os.environ.get("PYTHONPATH", "")]
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(CORES))
    os.environ["JPY_SESSION_NAME"] = "rerun"  # bars as in JupyterLab; tidy drops them
    if hasattr(os, "sched_setaffinity"):  # the kernel inherits it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    failed = []
    with tqdm(unit="cell") as bar:
        for path in args.notebooks or sorted(NBS.glob("*.ipynb")):
            try:
                seconds, bars = rerun(path.resolve(), bar, args.time_only)
            except Refused as error:
                failed.append(path.name)
                bar.write(f"{path.name}: not stored, {error}", file=sys.stderr)
                continue
            note(path.stem, seconds, bars)
            bar.write(f"{seconds:7.1f} s  {path.name}{', with a bar' if bars else ''}")
    if failed:
        print(f"{len(failed)} not stored: {' '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

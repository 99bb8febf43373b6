"""Every notebook runs in Jupyter's own kernel, from the first cell to the last.

nbdev_test skips cells by flag and runs the others in one process; JupyterLab's Run All knows no flags. A reader presses Run All.
Two kernels work side by side; a cell that hangs is stopped.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CELL_SECONDS = 240  # a notebook is meant to take seconds; this only ends what hangs


def run_all(path: Path) -> str:
    "Run a notebook as JupyterLab's Run All does, in its own folder; returns what went wrong, empty when nothing did."
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(
        nb,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        force_raise_errors=True,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return str(error)[-3000:]
    except Exception as error:  # a cell that hangs, a kernel that dies
        return f"{type(error).__name__}: {error}"[-3000:]
    return ""


@pytest.fixture(scope="module")
def runs(request):
    "The selected notebooks, being run two at a time while the tests wait for theirs."
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    chosen = {
        i.callspec.params["path"]
        for i in request.session.items
        if i.fspath == request.fspath and hasattr(i, "callspec")
    }
    with ThreadPoolExecutor(2) as pool:
        futures: dict[Path, Future] = {p: pool.submit(run_all, p) for p in NOTEBOOKS if p in chosen}
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_all(path, runs):
    problem = runs[path].result()
    assert not problem, problem

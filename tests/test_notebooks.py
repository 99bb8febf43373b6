"""Notebooks run in Jupyter's own kernel, from the first cell to the last.

nbdev_test runs every notebook in processes of its own and skips cells by flag; JupyterLab's Run All knows no flags. A reader presses
Run All. So the first page and each notebook of which nbdev_test skips a cell run here too; with `WAVE_RNNS_RUN_ALL=1`, as in CI, every one.
"""

import configparser
import os
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

CELL_SECONDS = 240  # a notebook is meant to take seconds; this only ends what hangs


def chosen() -> list:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    flags = "|".join([*settings["DEFAULT"]["tst_flags"].split(), "eval: *false"])
    skipped = re.compile(rf'^ *"#\| *({flags})\b|skip_exec: *true', re.M)
    notebooks = sorted((ROOT / "nbs").glob("*.ipynb"))
    everything = os.environ.get("WAVE_RNNS_RUN_ALL")
    return [p for p in notebooks if everything or p.stem.startswith("00") or skipped.search(p.read_text())]


@pytest.mark.parametrize("path", chosen(), ids=lambda p: p.stem)
def test_run_all(path, monkeypatch):
    "As JupyterLab does, in the notebook's own folder; a cell that hangs is stopped."
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    options = dict(timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    NotebookClient(nbformat.read(path, as_version=4), force_raise_errors=True, **options).execute()

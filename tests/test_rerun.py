"Running the notebooks anew: what is stored, what is refused, and the seconds that are noted."

import json
import sys

import nbformat
import pytest
from conftest import ROOT, WEB
from tqdm import tqdm

sys.path.insert(0, str(WEB))

import rerun

PLOT = """
import matplotlib.pyplot as plt
from wave_rnns.core import plot_style
plot_style()
_, ax = plt.subplots(figsize=(4, 3))
ax.plot([0, 1]);
"""


def notebook(path, *sources):
    cells = [nbformat.v4.new_markdown_cell("# Title\n\n> summary")]
    cells += [nbformat.v4.new_code_cell(s) for s in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def run(path, **options) -> tuple[float, bool]:
    with tqdm(disable=True) as bar:
        return rerun.rerun(path, bar, **options)


def test_what_ran_is_stored_sharp_and_tidy(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JPY_SESSION_NAME", "rerun")
    bar = "from wave_rnns.core import progress\nfor _ in progress(range(3)): pass"
    path = notebook(tmp_path / "a.ipynb", "print(6 * 7)", bar, PLOT)
    before = path.read_bytes()
    seconds, bars = run(path, time_only=True)
    assert 0 < seconds < 60 and bars and path.read_bytes() == before
    assert not run(notebook(tmp_path / "b.ipynb", "print(1)"))[1]
    run(path)
    _, _, answer, quiet, figure = nbformat.read(path, as_version=4).cells
    assert answer.outputs[0].text == "42\n" and answer.execution_count is None
    assert quiet.outputs == []
    shown = figure.outputs[-1].metadata["image/png"]
    assert shown["width"] == pytest.approx(400, abs=12)  # of four inches
    assert "widgets" not in nbformat.read(path, as_version=4).metadata
    stored = path.read_bytes()
    assert not rerun.tidy(path) and path.read_bytes() == stored


@pytest.mark.parametrize(
    "source, says",
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; print('careful', file=sys.stderr)", "standard error: careful"),
        ("import warnings; warnings.warn('old')", "old"),
        ("import os; os._exit(1)", "kernel died"),
    ],
)
def test_what_fails_or_warns_is_refused(tmp_path, source, says):
    path = notebook(tmp_path / "a.ipynb", "print(1)", source)
    before = path.read_bytes()
    with pytest.raises(rerun.Refused, match=says):
        run(path)
    assert path.read_bytes() == before


def test_seconds_are_noted_one_by_one(tmp_path):
    record = tmp_path / "notebooks.json"
    rerun.note("09_core", 1.26, True, record)
    rerun.note("99_gone", 5.0, True, record)
    rerun.note("00_one_page", 30.04, True, record)
    rerun.note("09_core", 1.3, False, record)
    expected = {"cores": 2, "seconds": {"00_one_page": 30.0, "09_core": 1.3}, "bars": ["00_one_page"]}
    assert json.loads(record.read_text()) == expected

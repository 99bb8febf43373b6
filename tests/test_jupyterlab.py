"""Notebooks in JupyterLab itself, in a browser: opened, Run All pressed, read.

test_notebooks.py runs all of them through the kernel; this is about what a reader sees: equations typeset, figures drawn, progress bars, no error.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from urllib.request import urlopen

import nbformat
import pytest
from conftest import ROOT, run_node

NOTEBOOKS = ["index.ipynb", "01_wave_equation.ipynb"]
TRAINING = """
import matplotlib.pyplot as plt
import torch
from wave_rnns.paper.models import ModelConfig
from wave_rnns.paper.arrays import ArrayTask
from wave_rnns.paper.training import RunSettings, fit
task = ArrayTask(torch.rand(64, 10, 2), batch_size=16)
model = ModelConfig("wrnn", **task.sizes, n=8)
fit(task, model, [RunSettings(0, lr=1e-3)], steps=30, eval_every=30, log_every=10, device="cpu", progress=True)
plt.plot([0, 1]);
"""
TOKEN = "a-test-on-this-machine"
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are in the page too
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab with its own configuration on a copy of the notebooks; yields its address."
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns("_web", ".ipynb_checkpoints"))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(TRAINING)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), home / "nbs/training.ipynb")
    for name, values in SETTINGS.items():
        file = home / f"settings/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)}
    for name in ("JUPYTER_CONFIG", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES"):
        env[f"{name}_DIR"] = str(home / name.rpartition("_")[2].lower())
    log = home / "lab.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={home / 'nbs'}"]
    with open(log, "w") as out:
        server = subprocess.Popen(command, cwd=home, env=env, stdout=out, stderr=out)
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-3000:]
            address = re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())
            if address and answers(address[0]):
                break
            time.sleep(0.5)
        assert address and answers(address[0]), f"JupyterLab did not start: {log.read_text()[-3000:]}"
        yield address[0]
    finally:
        server.terminate()
        server.wait(30)


def answers(address: str) -> bool:
    try:
        return urlopen(f"{address}api/status?token={TOKEN}", timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def report(lab, npm_packages, chromium):
    names = json.dumps([*NOTEBOOKS, "training.ipynb"])
    return run_node("jupyterlab.mjs", chromium, npm_packages, lab, TOKEN, names, timeout=900)


@pytest.mark.browser
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_in_jupyterlab(name, report):
    seen = report[name]
    assert not seen["problems"], "\n".join(seen["problems"])
    assert seen["ran"] == seen["cells"] > 3, f"{seen['ran']} of {seen['cells']} cells ran"
    assert seen["figures"] >= 1 and seen["equations"] >= 1


@pytest.mark.browser
def test_fit_shows_its_bar(report):
    seen = report["training.ipynb"]
    assert not seen["problems"], "\n".join(seen["problems"])
    assert seen["bars"] == 1

"The demo's command and page, on a few steps: what was cut or did not work is said, mistakes are one line, no display is asked for."

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

from wave_rnns.paper import demo

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("digits", ["digits", "smnist"])
def test_both_networks_get_the_same_steps_and_the_same_batches(digits, gpu):
    half, whole = ([*demo.demo_experiments(gpu, digits, quick).values()] for quick in (0.5, 1.0))
    assert [e.task for e in half] == ["copy", "copy", "adding", "adding", digits, digits]
    assert [e.model.kind for e in half] == ["wrnn", "irnn"] * 3
    for wave, still in zip(half[::2], half[1::2], strict=True):
        for name in ("task", "task_options", "steps", "eval_every", "seeds"):
            assert getattr(wave, name) == getattr(still, name)
    assert all(cut.steps == e.steps / 2 for cut, e in zip(half, whole, strict=True))


def test_a_glimpse_without_display_home_or_mnist(script, tmp_path):
    "No backend, no home directory, no MNIST: the page is there, says what was cut, and which digits it used."
    env = {k: v for k, v in ENV.items() if k not in ("HOME", "WAVE_RNNS_DATA", "DISPLAY")}
    env |= {"MPLBACKEND": "no_such_backend", "WAVE_RNNS_DATA": str(tmp_path / "nothing")}
    command = [sys.executable, script("wrnn_demo"), "--quick", "0.01", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "wrnn_demo" / "index.html").read_text()
    for text in (page, done.stdout):
        assert "Cut short: every network was trained for 1% of its steps." in text and "did not learn to copy" in text
        assert "the 2,700 of MNIST that travel with the package" in text
    assert page.count("data:image/png") == 5 and page.count("data:image/webp") == 1
    assert "{{" not in page and 'src="http' not in page
    assert 'href="https://arxiv.org/abs/2309.08045"' in page and page.count("<th>") == 7 and page.count("<tr>") == 7
    assert len(list((tmp_path / "wrnn_demo/results/runs").glob("*/*.json"))) == 6


def test_ctrl_c_saves_and_the_same_command_goes_on(script, tmp_path):
    args = [sys.executable, script("wrnn_demo"), "--device", "cpu"]
    process = subprocess.Popen(args, cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("wrnn_demo/results/checkpoints/*.lock")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75 and err.count("\n") == 1 and "start again to go on" in err, err
    assert list(tmp_path.glob("wrnn_demo/results/checkpoints/*.safetensors"))
    assert not (tmp_path / "wrnn_demo" / "index.html").exists()


@pytest.mark.parametrize(
    ("wave", "still", "says"), [(0.999, 0.95, "Both networks learned to copy"), (None, 0.12, "did not learn to copy")]
)
def test_the_headline_is_what_happened(wave, still, says):
    "What notebook 19 does not see: an iRNN that learns, a wave that diverges."
    task, show = SimpleNamespace(metric="cross_entropy", name="copy"), []
    for model, score in (("wRNN", wave), ("iRNN", still)):
        status = "diverged" if score is None else "done"
        record = {"test_best": {"accuracy": score}, "status": status, "diverged_step": 7}
        show.append(demo.Trained("Copy", model, task, record, []))
    assert says in demo.headline(show)
    notes = demo.remarks(show, 1.0)
    assert ("Copy: the wRNN diverged at step 7." in notes) == (wave is None)
    assert not any("Cut short" in note for note in notes)

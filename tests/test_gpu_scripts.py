"""What the scripts in tests/gpu do beside measuring: they lay out the plans users get, and keep the weights of the right step."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wave_rnns.kernels import wave
from wave_rnns.paper.checkpoints import load_weights

GPU = Path(__file__).parent / "gpu"


@pytest.fixture
def script(monkeypatch):
    "A script of tests/gpu as a module."
    monkeypatch.syspath_prepend(str(GPU))
    return importlib.import_module


@pytest.mark.parametrize("name", [p.stem for p in sorted(GPU.glob("*.py"))])
def test_scripts_import_what_there_is(script, name):
    if name == "bench":
        pytest.importorskip("triton")
    assert callable(script(name).main)


def test_what_is_timed_is_what_users_get(script, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    properties = type("properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    bench = script("bench")
    for R in (1, 4):
        plan = bench.wave_plan("smnist", "faithful", R, {})
        assert plan == wave.plan_for(bench.GPU, 256, 16, 1, blocks=128 * R) and plan.mt == (2 if R == 1 else 4)
    rows = wave.rows_plan_for(bench.GPU, 256, 16, 9160, 4, 256, "relu", "fast", False)
    assert bench.wave_plan("nscifar", "fast", 4, {}) == rows
    copy = wave.rows_plan_for(bench.GPU, 100, 6, 10, 4, 128, "relu", "faithful", True)
    assert bench.wave_plan("copy", "faithful", 4, {}) == copy
    for (shape, precision), changes in bench.CHANGES.items():
        assert all(bench.wave_plan(shape, precision, 1, change) for change in changes)


def test_the_weights_before_an_overflow_are_kept(script, tmp_path, monkeypatch):
    watch = script("watch_overflow")
    sizes = {"T": 20, "batch_size": 4, "valid_size": 4, "test_size": 4}
    short = replace(watch.EXPERIMENTS[watch.EXPERIMENT], lr=1e9, task_options=sizes)
    monkeypatch.setattr(watch, "EXPERIMENTS", {watch.EXPERIMENT: short})
    monkeypatch.setattr(watch, "GROUPS", ((0, 1), (1,)))
    monkeypatch.setattr(sys, "argv", ["watch", "--out", str(tmp_path), "--device", "cpu", "--steps", "5"])
    watch.main()
    record = json.loads((tmp_path / "overflow.json").read_text())
    pair, alone = record["rows"]
    step = min(pair["diverged"])
    assert pair["kept"] == {"experiment": watch.EXPERIMENT, "seed": 0, "steps": step - 1, "beside": [0, 1]}
    assert pair["loss"][step - 1][0] is None and all(x is not None for x in pair["loss"][step - 2])
    assert [losses[1] for losses in pair["loss"]][: len(alone["loss"])] == [losses[0] for losses in alone["loss"]]

    kept = load_weights(tmp_path / "before_overflow")
    task = watch.make_task(short.task, **short.task_options)
    x, y = (t[0] for t in task.train_batch(torch.tensor([0]), torch.tensor(step - 1)))
    assert not torch.isfinite(task.loss(kept(x), y))

"""What the scripts in tests/gpu do beside measuring: read a profiler's table, keep the weights of the right step."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wave_rnns.paper.checkpoints import load_weights

GPU = Path(__file__).parent / "gpu"


@pytest.fixture
def script(monkeypatch):
    "A script of tests/gpu as a module."
    monkeypatch.syspath_prepend(str(GPU))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


LAUNCH = '"{id}","1","python","host","wide_step","1","7","(256, 1, 1)","(15, 4, 2)","0","9.0","Section","{name}","{unit}","{value}",""'
HEAD = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"'


def table(*rows):
    lines = [LAUNCH.format(id=i, name=name, unit=unit, value=value) for i, name, unit, value in rows]
    return "\n".join(["==PROF== Connected to process 1", HEAD, *lines])


def test_a_profile_is_read_in_our_units(script):
    text = table(
        (0, "Elapsed Cycles", "cycle", "25,744"),
        (0, "Duration", "ns", "17,410"),
        (0, "SM Frequency", "Ghz", "1.46"),
        (1, "Duration", "us", "17.2"),
        (1, "Something Else", "%", "3"),
    )
    first, second = script("bench_steps").read_ncu(text)
    assert first == {"grid": "(15, 4, 2)", "elapsed_cycles": 25744, "microseconds": 17.41, "sm_ghz": 1.46}
    assert second == {"grid": "(15, 4, 2)", "microseconds": 17.2}


@pytest.mark.parametrize(
    "text, error", [("==ERROR== no permission", StopIteration), (table((0, "Duration", "weeks", "1")), KeyError)]
)
def test_a_profile_that_cannot_be_read_is_an_error(script, text, error):
    with pytest.raises(error):
        script("bench_steps").read_ncu(text)


def test_the_weights_before_an_overflow_are_kept(script, tmp_path, monkeypatch):
    watch = script("watch_overflow")
    short = replace(
        watch.EXPERIMENTS[watch.EXPERIMENT],
        lr=1e9,
        task_options={"T": 20, "batch_size": 4, "valid_size": 4, "test_size": 4},
    )
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

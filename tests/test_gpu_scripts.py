"The scripts in tests/gpu: they import what there is, and time the plans that users get."

import importlib
from pathlib import Path

import pytest

from wave_rnns.kernels import wave

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


def test_what_is_timed_is_what_users_get(script, pretend_gpu):
    pytest.importorskip("triton")
    pretend_gpu(9)
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

"The scripts in tests/gpu: they import what there is, and time the plans that users get."

import importlib
import math
from pathlib import Path

import pytest

from wave_rnns.kernels import wave

GPU = Path(__file__).parent / "gpu"


@pytest.fixture
def script(monkeypatch):
    "A script of tests/gpu as a module."
    monkeypatch.syspath_prepend(str(GPU))
    return importlib.import_module


@pytest.mark.parametrize("name", [p.stem for p in sorted(GPU.glob("*.py")) if p.stem != "common"])
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


@pytest.mark.parametrize(
    "precision, change, over",
    [
        ("faithful", {}, []),
        ("faithful", {"h": 1e-6}, ["h"]),
        ("faithful", {"U": 6e-5}, ["U"]),
        ("faithful", {"U": 6e-5, "flips": 1}, []),
        ("faithful", {"U": 2e-3, "flips": 1}, ["U"]),
        ("faithful", {"same": 6e-5, "flips": 1}, ["U, same masks"]),
        ("faithful", {"flips": 12}, ["flips"]),
        ("fast", {"y": 2e-2}, ["y"]),
        ("fast", {"drive": 8e-2, "flips": 50}, []),
        ("fast", {"h_0": math.nan}, ["h_0"]),
    ],
)
def test_the_proof_can_fail(script, precision, change, over):
    error = dict.fromkeys(("h", "y", "drive", "U", "h_0"), 1e-8)
    row = {"precision": precision, "flips": change.get("flips", 0), "error_loop": dict(error), "error": error}
    row["error"] |= {k: v for k, v in change.items() if k in error}
    row["same_masks"] = {"U": change.get("same", 1e-8)}
    assert script("check_dense").out_of_bounds(row, 10**6) == over

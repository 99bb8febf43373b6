"The scripts in tests/gpu: they import what there is, and time the plans that users get."

import importlib
import math
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("n, c, mt", [(256, 16, 4), (100, 27, 1), (97, 5, 1), (100, 6, 2), (12, 3, 2)])
def test_kept_states_undoes_the_fragment_order(script, n, c, mt):
    "Write the number of each (channel, neuron) where the kernel would put it, by the layout's definition; read it back."
    p = wave.Plan(n, c, 1, precision="fast", mt=mt)
    words = torch.zeros(p.warps, 2 * mt, p.cq, 32, 2)
    for channel in range(c):
        for neuron in range(n):
            group, slot = divmod(neuron, 2 * mt)
            warp, g = divmod(group, 8)
            q, within = divmod(channel, 8)
            words[warp, slot, q, g * 4 + within // 2, within % 2] = (channel * n + neuron) % 251
    kept = words.to(torch.bfloat16).view(torch.int32).reshape(1, 1, 1, -1)
    want = torch.arange(c * n).view(c, n) % 251
    assert torch.equal(script("check_wave").kept_states(p, kept)[0, 0, 0].long(), want)

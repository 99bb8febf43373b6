"The dense kernels as far as a machine without a GPU can look: do they compile, fit, and step aside when they must?"

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiler import needs_compiler

from wave_rnns.kernels import dense, wave
from wave_rnns.kernels.dense import FUSED_UNITS, SOURCE, DenseBackend, DensePlan, fit_outer, outer_shared, plan_for
from wave_rnns.kernels.launch import KernelError, compile_kernel, compile_report, nvrtc_architectures
from wave_rnns.scan import BACKENDS

HOPPER, AMPERE = (132, True), (108, False)


def plans(gpu):
    "Every layout `plan_for` can choose on this GPU."
    seen = {}
    for m in (1, 3, 32, 33, 64, 65, 96, 97, 128, 129, 255, 256):
        for R in (1, 4, 64):
            for precision in ("faithful", "fast"):
                if plan := plan_for(m, 128, R, precision, *gpu):
                    seen[plan] = None
    return list(seen)


@pytest.mark.parametrize("gpu", [HOPPER, AMPERE])
def test_every_plan_is_consistent(gpu):
    for plan in plans(gpu):
        wm, wk = plan.warps
        tiles_of_16 = plan.padded // 16
        assert plan.m <= plan.padded <= max(128, 2 * plan.m) and plan.padded % (32 * plan.cluster) == 0
        assert wm * plan.rows * plan.cluster == tiles_of_16 and wk * plan.deep == tiles_of_16
        assert plan.items <= plan.threads <= 1024
        crews = 1 if plan.threads % plan.items else plan.threads // plan.items
        assert plan.tiles <= crews or plan.tiles % crews == 0
        assert plan.shared(2) <= 227 * 1024 - 1024
        assert plan.cluster <= 8
        for B in (1, 7, 8, 9, 128):
            blocks, runs = plan.grid(B, 5)
            assert runs == 5 and blocks % plan.cluster == 0
            assert blocks // plan.cluster * 8 * plan.tiles >= B > (blocks // plan.cluster - 1) * 8 * plan.tiles


def test_what_does_not_fit_has_no_plan():
    assert plan_for(FUSED_UNITS + 1, 128, 1, "faithful", *HOPPER) is None
    assert plan_for(FUSED_UNITS, 128, 1, "faithful", *HOPPER) is not None
    assert plan_for(129, 128, 1, "faithful", *AMPERE) is None
    assert plan_for(128, 128, 1, "faithful", *AMPERE).cluster == 1


COMPILED = [  # units, batch, runs, precision, GPU, activation, architecture, bytes spilled
    *((m, 128, R, p, HOPPER, "relu", "sm_90", 0) for m, R in ((100, 1), (256, 1)) for p in ("faithful", "fast")),
    (256, 128, 16, "fast", HOPPER, "relu", "sm_90", 0),
    (256, 128, 16, "faithful", HOPPER, "relu", "sm_90", 32),  # full to the brim: measured, worth it
    (100, 128, 4, "faithful", AMPERE, "relu", "sm_80", 0),
    (100, 128, 4, "faithful", AMPERE, "tanh", "sm_80", 0),
    (1, 1, 3, "fast", HOPPER, "identity", "sm_90", 0),
    (3, 1, 3, "fast", HOPPER, "identity", "sm_90", 0),
    (97, 1, 3, "fast", HOPPER, "identity", "sm_90", 0),
    (200, 8, 1, "faithful", HOPPER, "tanh", "newest", 0),
]


@needs_compiler
@pytest.mark.parametrize("m, B, R, precision, gpu, activation, arch, spilled", COMPILED)
def test_kernels_fit_in_registers(m, B, R, precision, gpu, activation, arch, spilled):
    plan = plan_for(m, B, R, precision, *gpu)
    arch = f"sm_{nvrtc_architectures()[-1]}" if arch == "newest" else arch
    for backward, last in ((False, False), (True, False), (True, True)):
        report = compile_report(SOURCE, plan.macros(activation, backward, last), arch, "dense")
        assert set(report) == {"dense_scan"} | ({"dense_outer", "dense_sum"} if backward else set())
        for name, use in report.items():
            assert max(use["spill_stores"], use["spill_loads"], use["stack"]) <= spilled, (name, use)
            assert use["registers"] * (plan.threads if name == "dense_scan" else 256) <= 65536


@needs_compiler
def test_a_layout_that_cannot_work_does_not_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path))
    three = replace(plan_for(256, 8, 1, "fast", *HOPPER), tiles=3)
    for plan in (DensePlan(256, 3, cluster=4, rows=4, deep=16), three):
        with pytest.raises(KernelError, match="crews"):
            compile_kernel(SOURCE, plan.macros("relu", False, False), "sm_90", "dense")


@pytest.mark.parametrize("source", [SOURCE, wave.SOURCE], ids=["dense", "wave"])
def test_no_float_atomics_and_no_headers(source):
    "Sums have one order (same bits twice), and NVRTC needs no files."
    assert not re.search(r"atomic(?!Max)|\bred\.|#include", source)


def test_the_sum_for_dU_fits_gpus_with_less_shared_memory():
    for limit, stages in ((227, 3), (163, 3), (99, 2)):
        plan = fit_outer(plan_for(100, 128, 1, "faithful", *AMPERE), limit << 10)
        assert plan.outer_stages == stages and outer_shared(stages) <= limit << 10


@pytest.mark.parametrize("last", [False, True])
def test_the_backend_around_its_kernels(monkeypatch, last):
    "PyTorch stands for the three kernels: what they are given, and where their results go."
    backend, torch_backend = DenseBackend(), BACKENDS["torch"]
    g = torch.Generator().manual_seed(0)
    drive, U, h_0 = (torch.randn(*s, generator=g) for s in ((2, 5, 3, 7), (2, 7, 7), (2, 3, 7)))
    z, z_kept = torch_backend.dense_forward(drive, U, h_0, "relu", last, True, "faithful")
    gy = torch.randn(z.shape, generator=g)
    exact = torch_backend.dense_backward(gy, drive, U, h_0, z, z_kept, "relu", last, "faithful")

    def forward(plan, drive, U, h_0, activation, states, end):
        y, _ = torch_backend.dense_forward(drive, U, h_0, activation, False, True, "faithful")
        if states is not None:
            states.copy_(y)
        if end is not None:
            end.copy_(y[:, -1])

    def backward(plan, gy, U, states, activation, last, ddrive, dh_0):
        ddrive.copy_(exact[0]), dh_0.copy_(exact[2])

    monkeypatch.setattr(backend, "_plan", lambda *_: None)
    monkeypatch.setattr(dense, "scan_forward", forward)
    monkeypatch.setattr(dense, "scan_backward", backward)
    monkeypatch.setattr(dense, "outer_sum", lambda plan, ddrive, *_: exact[1])
    for keep in (True, False):
        y, kept = backend.dense_forward(drive, U, h_0, "relu", last, keep, "faithful")
        shape, _ = backend.kept_shape("dense", 2, 5, 3, 1, 7, 0, 0, "relu", last, "faithful")
        assert torch.equal(y, z) and tuple(kept.shape) == (shape if keep else (0,))
    _, kept = backend.dense_forward(drive, U, h_0, "relu", last, True, "faithful")
    assert torch.equal(kept, z_kept)
    ours = backend.dense_backward(gy, drive, U, h_0, y, kept, "relu", last, "faithful")
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


PROOF = Path(__file__).parent / "gpu/check_dense.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_proof_on_the_gpu(tmp_path):
    done = subprocess.run([sys.executable, PROOF, "--out", tmp_path, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

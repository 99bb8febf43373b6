"""The kernels as far as a machine without a GPU can see them: who computes a call, and the wave kernels: they compile, and fit."""

import warnings

import pytest
import torch
from compiler import needs_compiler

import wave_rnns.kernels.wave as K
from wave_rnns.kernels import launch
from wave_rnns.scan import BACKENDS, BackendError, backend_for

ASK = {
    "cuda": dict(kind="wave", dtype=torch.float32, c=16, n=256, k=3, F=1),
    "cuda_dense": dict(kind="dense", dtype=torch.float32, c=1, n=256, k=0, F=0),
}
HOPPER, AMPERE, TURING = (9, 0), (8, 6), (7, 5)
CALLS = [  # whose call, changed how, on which GPU; why PyTorch computes it: None if it does not, "" without a word
    ("cuda", {}, HOPPER, None),
    ("cuda", dict(c=40), HOPPER, "c = 40 rings, at most 32"),
    ("cuda", dict(n=2), HOPPER, "n = 2 neurons, at least 3"),
    ("cuda", dict(n=20000), HOPPER, "threads, at most 512"),
    ("cuda", {}, TURING, "compute capability 7.5, at least 8.0"),
    ("cuda", dict(k=5), HOPPER, ""),
    ("cuda_dense", {}, HOPPER, None),
    ("cuda_dense", dict(n=257), HOPPER, "n = 257 units do not fit"),
    ("cuda_dense", dict(n=128), AMPERE, None),
    ("cuda_dense", dict(n=129), AMPERE, "n = 129 units do not fit"),
    ("cuda_dense", {}, TURING, "compute capability 7.5, at least 8.0"),
    *((name, change, HOPPER, "") for name in ASK for change in (dict(dtype=torch.float64), dict(device="cpu"))),
]


def choose(device, name, change):
    "The backend of a call, asked for twice, and what was said."
    ask = ASK[name] | dict(device=device) | change
    ask["device"] = torch.device(ask["device"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first = backend_for(**ask)
        backend_for.cache_clear()
        assert backend_for(**ask) is first
    return first, [str(w.message) for w in said]


@pytest.mark.parametrize("name, change, capability, why", CALLS, ids=str)
def test_what_a_kernel_cannot_do_goes_to_torch_and_the_reason_is_said_once(name, change, capability, why, pretend_gpu):
    backend, said = choose(pretend_gpu(*capability), name, change)
    assert backend is BACKENDS[name if why is None else "torch"]
    assert len(said) == bool(why) and all("slower torch path" in words and why in words for words in said)


@pytest.mark.parametrize("name", ASK)
def test_without_a_compiler_there_are_no_kernels(name, pretend_gpu, monkeypatch):
    def missing():
        raise launch.KernelError("NVRTC (libnvrtc.so.13) was not found")

    device = pretend_gpu(9)
    monkeypatch.setattr(launch, "nvrtc_architectures", missing)
    backend, (words,) = choose(device, name, {})
    assert backend is BACKENDS["torch"] and "NVRTC (libnvrtc.so.13) was not found" in words


# ------------------------------------------------------------------------------------------------- wave kernels

PAPER = {
    "smnist": dict(n=256, c=16, F=1),
    "adding": dict(n=100, c=27, F=2),
    "copy": dict(n=100, c=6, F=0, states=True, rows=10),
    "nscifar10": dict(n=256, c=16, F=0, emit=2, pair=2),
}
AWKWARD = [
    dict(n=3, c=1, F=1),
    dict(n=97, c=5, F=2, activation="tanh", states=True, emit=1),
    dict(n=97, c=5, F=0, emit=2),
    dict(n=33, c=20, F=1, activation="identity"),
    dict(n=256, c=16, F=0, emit=2, pair=2, precision="fast", mt=2),
    dict(n=512, c=16, F=1, keep=False),
]


@needs_compiler
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_machine_code_for_every_generation(arch, tmp_path, monkeypatch):
    if arch not in launch.nvrtc_architectures():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path))
    plan = K.Plan(97, 5, 2, limit=launch.SHARED_LIMIT.get(arch, 227) << 10)
    for forward in (True, False):
        assert launch.compile_kernel(K.SOURCE, plan.macros(forward), f"sm_{arch}")[:4] == b"\x7fELF"


@needs_compiler
@pytest.mark.parametrize("precision", ["faithful", "fast"])
@pytest.mark.parametrize("size", PAPER)
def test_the_papers_sizes_stay_in_registers(size, precision):
    plan = K.Plan(**PAPER[size], precision=precision)
    assert launch.compile_report(K.SOURCE, plan.macros(True))["wave_forward"]["stack"] == 0
    backward = launch.compile_report(K.SOURCE, plan.macros(False))["wave_backward"]
    assert backward["spill_stores"] <= 128  # adding: three rings of eight channels leave no register free


@needs_compiler
@pytest.mark.parametrize("size", AWKWARD, ids=str)
def test_awkward_sizes_compile(size):
    plan = K.Plan(**size)
    launch.compile_report(K.SOURCE, plan.macros(True))
    if plan.keep:
        launch.compile_report(K.SOURCE, plan.macros(False))


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("size", ["smnist", "adding", "copy"])
def test_shared_memory_fits_small_gpus_too(size, kilobytes):
    for precision in ("faithful", "fast"):
        plan = K.Plan(**PAPER[size] | {"rows": 0, "sums_shared": 0}, precision=precision, limit=kilobytes << 10)
        assert max(plan.shared()) <= kilobytes << 10, (precision, plan.shared())


def test_what_the_macros_say_about_shared_memory_is_what_the_plan_asks_for():
    """The kernel lays its arrays out one after the other; the plan adds their sizes up. The backward ring is the largest:
    one more step of it must cost exactly one more stage."""
    for size in PAPER.values():
        a, b = (K.Plan(**size, ring=r, limit=1 << 30) for r in (4, 8))
        stage = a.kept_terms * a.tile * 4 + (a.vals * a.threads * 16 if a.states else 0)
        assert b.shared()[1] - a.shared()[1] == 4 * a.pair * stage


def test_what_does_not_compile_leaves_the_backend(pretend_gpu, monkeypatch):
    "What becomes of such an error is the operator's business, see test_scan.py."

    def fail(*_, **__):
        raise launch.KernelError("ptxas had a bad day")

    pretend_gpu(9)
    monkeypatch.setattr(K, "run_forward", fail)
    monkeypatch.setattr(K, "run_backward", fail)
    T, B, c, n, rest = 5, 3, 2, 6, ("relu", False)
    for F in (1, 4):
        args = [torch.randn(2, *s) for s in ((T, B, F), (c, c, 3), (c, n, F), (c, n), (B, c, n))]
        with pytest.raises(BackendError, match="ptxas"):
            K.CudaBackend().wave_forward(*args, *rest, True, "faithful")
        with pytest.raises(BackendError, match="ptxas"):
            K.CudaBackend().wave_backward(None, *args, None, None, *rest, "faithful", True)
    for rows in (4, 5000):
        index = torch.zeros(1, T, B, dtype=torch.int64)
        args = [index, None, None, *(torch.randn(2, *s) for s in ((rows, c, n), (c, c, 3), (B, c, n)))]
        with pytest.raises(BackendError, match="ptxas"):
            K.CudaBackend().rows_forward(*args, *rest, True, "faithful")
        with pytest.raises(BackendError, match="ptxas"):
            K.CudaBackend().rows_backward(None, *args, None, None, *rest, "faithful")


def test_kept_holds_every_share(pretend_gpu):
    "The share of a thread depends on how many blocks there are; what is kept must be large enough for both."
    backend, gpu = K.CudaBackend(), pretend_gpu(9)
    for n, c in ((256, 16), (264, 9), (512, 16), (100, 27), (97, 5)):
        shape, dtype = backend.kept_shape("wave", 2, 7, 3, c, n, 3, 1, "relu", True, "faithful")
        assert dtype == torch.int32 and shape[:3] == (2, 3, 8)
        for blocks in (1, 10_000):
            p = K.plan_for(gpu, n, c, 1, "relu", "faithful", False, blocks)
            assert p.tile * p.kept_terms <= shape[3]


def test_row_sums_go_where_they_fit(pretend_gpu):
    gpu = pretend_gpu(9)
    assert K.rows_plan_for(gpu, 100, 6, 10, 1, 128, "relu", "faithful", True).rows == 10
    many = K.rows_plan_for(gpu, 256, 16, 9000, 1, 256, "relu", "faithful", False)
    assert (many.rows, many.emit, many.pair) == (0, 2, 2)
    assert K.rows_plan_for(gpu, 256, 16, 9000, 1, 255, "relu", "faithful", False).pair == 1

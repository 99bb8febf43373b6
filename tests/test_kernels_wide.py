"The kernel for wide matrices as far as a machine without a GPU can look: its threads are played by those of the processor."

import ctypes
import itertools
import shutil
import subprocess

import pytest
import torch
from compiler import needs_compiler

from wave_rnns.kernels import wide
from wave_rnns.kernels.dense import outer_shared
from wave_rnns.kernels.launch import compile_report, cuda_source
from wave_rnns.kernels.wide import OUTER, SOURCE, WidePlan, wide_plan_for
from wave_rnns.scan import BACKENDS

PLAYED = r"""
#include <barrier>
#include <cmath>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DEVICE inline
#define UNROLL
using std::fmaf;
using u32 = unsigned int;
using i64 = long long;
struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x = 0, y = 0, z = 0; };
static thread_local Index threadIdx;
static Index blockIdx;
static std::barrier<> gate(256);
inline void __syncthreads() { gate.arrive_and_wait(); }
struct Warp { std::barrier<> gate{32}; };
static Warp warps[8];
inline void __syncwarp() { warps[threadIdx.x / 32].gate.arrive_and_wait(); }
extern "C" { alignas(16) float4 pool[16384]; }
struct Copy { float4 *to; const float *from; };             // copies arrive as late as they may
static thread_local std::vector<Copy> open;
static thread_local std::deque<std::vector<Copy>> groups;
inline void copy16(float4 *to, const float *from) {
    if (reinterpret_cast<size_t>(from) % 16) throw "unaligned";
    open.push_back({to, from});
}
inline void copy_commit() { groups.push_back(open), open.clear(); }
template <int K> inline void copy_wait() {
    for (; groups.size() > K; groups.pop_front())
        for (auto &c : groups.front()) std::memcpy(c.to, c.from, 16);
}
inline void put(float *to, float4 v) { std::memcpy(to, &v, 16); }
inline float act(float v) { return ACT == 1 ? (v <= 0 ? 0 : v) : ACT == 2 ? std::tanh(v) : v; }
"""
PLAY = r"""
extern "C" void play(const Step *p, int across, int along, int runs) {
    for (blockIdx.z = 0; blockIdx.z < runs; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < along; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < across; blockIdx.x++) {
                std::vector<std::thread> threads;
                std::memset(pool, 0xff, sizeof pool);   // NaN: nothing counts that was not written
                for (int i = 0; i < 256; i++) threads.emplace_back([=] { threadIdx.x = i; wide_step(*p); });
                for (auto &t : threads) t.join();
            }
}
"""


class Played:
    "Stands for a module on a GPU: launches on the CPU."

    def __init__(self, macros, folder):
        name = "-".join(f"{k}{v}" for k, v in macros.items())
        source, library = folder / f"{name}.cpp", folder / f"{name}.so"
        if not library.exists():
            kernel = cuda_source(*(f"wide.cu:{part}" for part in ("sizes", "start", "sum", "end")))
            source.write_text("".join([PLAYED, kernel, PLAY]))
            sizes = [f"-D{k}={v}" for k, v in macros.items()]
            command = ["g++", "-O1", "-std=c++20", "-pthread", "-shared", "-fPIC", "-w", *sizes, source, "-o", library]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:3000]
        self.library = ctypes.CDLL(str(library))

    def launch(self, kernel, grid, block, shared, args):
        assert kernel == "wide_step" and block == (256,) and shared <= 16 * 16384
        words = [0 if a is None else a.data_ptr() if isinstance(a, torch.Tensor) else int(a) for a in args]
        self.library.play(ctypes.byref((ctypes.c_int64 * len(words))(*words)), *grid)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    return tmp_path_factory.mktemp("played")


@pytest.fixture
def played(monkeypatch, folder):
    monkeypatch.setattr(wide, "load_module", lambda source, macros, device, name: Played(macros, folder))


def problem(R, T, B, m, last, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    U = 0.9 * torch.eye(m) + 0.3 * rand(R, m, m) / (1 + m**0.5)
    return rand(R, T, B, m), U, rand(R, B, m), rand(R, B, m) if last else rand(R, T, B, m)


def scans(plan, drive, U, h_0, gy, activation, last):
    "States, last state, gradients of drive and h_0."
    states, ddrive = torch.full_like(drive, torch.nan), torch.full_like(drive, torch.nan)
    end, dh_0 = (torch.full_like(drive[:, 0], torch.nan) for _ in range(2))
    wide.scan_forward(plan, drive, U, h_0, activation, states, end)
    wide.scan_backward(plan, gy, U, states, activation, last, ddrive, dh_0)
    return states, end, ddrive, dh_0


@pytest.mark.parametrize(
    "m, B, R, T, units, samples, activation, last, start",
    [
        (70, 33, 2, 2, 9, 4, "relu", False, True),
        (70, 33, 1, 2, 9, 8, "relu", True, False),
        (33, 3, 1, 4, 8, 4, "tanh", True, True),
        (64, 70, 1, 2, 16, 8, "identity", False, False),
        (97, 1, 2, 1, 12, 8, "tanh", False, True),
        (1, 5, 3, 3, 8, 8, "relu", True, True),
        (257, 3, 1, 2, 16, 4, "relu", False, True),  # more rounds than there is place for pieces
    ],
)
def test_a_step_for_step_twin_of_the_loop(played, m, B, R, T, units, samples, activation, last, start):
    drive, U, h_0, gy = problem(R, T, B, m, last)
    h_0 = h_0 if start else None
    states, end, ddrive, dh_0 = scans(WidePlan(m, units, samples), drive, U, h_0, gy, activation, last)
    exact, _ = BACKENDS["torch"].dense_forward(drive, U, h_0, activation, False, True, "faithful")
    kept, y = (states, end) if last else (None, states)
    grads = BACKENDS["torch"].dense_backward(gy, drive, U, h_0, y, kept, activation, last, "faithful")
    exact = exact, exact[:, -1], grads[0], grads[2]
    for name, ours, theirs in zip(("states", "end", "drive", "h_0"), (states, end, ddrive, dh_0), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_same_bits_in_any_company_and_any_tile(played):
    drive, U, h_0, gy = problem(3, 2, 5, 27, False)
    first, *others = [
        scans(WidePlan(27, *tile), drive, U, h_0, gy, "relu", False) for tile in ((8, 4), (9, 8), (16, 8))
    ]
    alone = scans(WidePlan(27, 9, 4), drive[1:2], U[1:2], h_0[1:2], gy[1:2], "relu", False)
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone, strict=True))


def test_a_run_that_is_not_finite_stays_alone(played):
    drive, U, h_0, gy = problem(3, 2, 5, 27, False)
    good = scans(WidePlan(27, 9, 4), drive, U, h_0, gy, "relu", False)
    drive[1, 0, 2, 3] = gy[1, 1, 0] = torch.nan
    bad = scans(WidePlan(27, 9, 4), drive, U, h_0, gy, "relu", False)
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(good, bad, strict=True))
    assert bad[0][1].isnan().any() and bad[3][1].isnan().any()


def test_without_states_only_the_end(played):
    drive, U, h_0, _ = problem(2, 3, 4, 10, True)
    end = torch.empty(2, 4, 10)
    wide.scan_forward(WidePlan(10, 8, 4), drive, U, h_0, "relu", None, end)
    exact, _ = BACKENDS["torch"].dense_forward(drive, U, h_0, "relu", True, False, "faithful")
    torch.testing.assert_close(end, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("limit", [99, 163, 227])
def test_every_plan_fits(limit):
    "Also GPUs with less shared memory."
    for m, B, R in itertools.product((129, 257, 529, 625, 2048), (1, 128, 256), (1, 2, 4, 64)):
        plan = wide_plan_for(m, B, R, 132, limit << 10)
        units, samples = plan.tile
        assert max(plan.shared, outer_shared(plan.outer_stages)) <= limit << 10
        assert plan.shared >= 4 * 8 * units * (samples + 4)
        assert units % 4 == 0 and samples % 32 == 0 and plan.summands % 32 == 0
        for batch in (1, 31, 64, 65, 256):
            across, along, runs = plan.grid(batch, 7)
            assert runs == 7 and across * units >= plan.m > (across - 1) * units
            assert along * samples >= batch > (along - 1) * samples
    assert wide_plan_for(529, 256, 2, 132, limit << 10).outer_stages == (2 if limit == 99 else 3)


def test_no_processor_gets_two_tiles_where_one_is_enough():
    for R in (1, 2):
        plan = wide_plan_for(529, 256, R, 132)
        across, along, runs = plan.grid(256, R)
        assert 0.9 * 132 <= across * along * runs <= 132


@needs_compiler
@pytest.mark.parametrize("units, samples", [(8, 4), (9, 4), (9, 8), (12, 8), (16, 8)])
def test_kernels_fit_in_registers(units, samples):
    for activation, backward in (("relu", False), ("tanh", True)):
        macros = WidePlan(529, units, samples).macros(activation, backward)
        for arch in ("sm_80", "sm_90"):
            (use,) = compile_report(SOURCE, macros, arch).values()
            assert use["spill_stores"] == use["spill_loads"] == 0 and use["registers"] * 256 <= 65536


@needs_compiler
def test_the_sum_for_dU_compiles():
    report = compile_report(OUTER, wide_plan_for(529, 256, 2).macros("relu", True), "sm_90", "wide sum")
    assert set(report) == {"dense_outer", "dense_sum"}

"""Milliseconds of the wave kernels.  python tests/gpu/bench_wave.py --out DIR [--runs 1 4 16] [--shapes smnist ...] [--variants]

Forward, backward and the sums over the batch, per run, CUDA events, median and spread. Without --variants: the plans users get.
Writes DIR/bench_wave.json, one row for each (shape, plan, R).
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import wave_rnns.kernels.wave as K
from wave_rnns.core import environment

# T, B, n, c, features (0: table rows), all states?, rows of the table ("shared" and "own": nsCIFAR10's steps)
SHAPES = {
    "smnist": dict(T=784, B=128, n=256, c=16, F=1, states=False),
    "adding": dict(T=1000, B=128, n=100, c=27, F=2, states=False),
    "copy": dict(T=510, B=128, n=100, c=6, F=0, states=True, rows=10),
    "nscifar": dict(T=1000, B=256, n=256, c=16, F=0, states=False, own=32),
}
# what to try beside the default plan
VARIANTS = {
    "smnist": {
        "faithful": [dict(mt=4), dict(mt=2), dict(mt=4, sums_shared=0), dict(mt=2, weights_shared=1)]
        + [dict(state_bits=0, weight_bits=8)],
        "fast": [dict(mt=2), dict(ring=8), dict(sums_shared=1), dict(weights_shared=1)],
    },
    "adding": {
        "faithful": [dict(sums_shared=0), dict(state_bits=0, weight_bits=8)],
        "fast": [dict(min_forward=1), dict(min_forward=2), dict(sums_shared=1)],
    },
    "copy": {p: [dict(mt=1), dict(mt=4), dict(ring=2)] for p in ("faithful", "fast")},
    "nscifar": {p: [dict(pair=1), dict(mt=2)] for p in ("faithful", "fast")},
}


def plan(shape, precision, R, **more):
    "The plan users get, but for what `more` changes."
    s, backend, device = SHAPES[shape], K.CudaBackend(), torch.device("cuda", 0)
    if "own" in s:
        more = {"emit": 2, "pair": 2} | more
    many = R * s["B"]
    return backend.plan(
        device, s["n"], s["c"], s["F"], "relu", precision, s["states"], many, rows=s.get("rows", 0), **more
    )


def median_ms(f, reps):
    "Median, lower and upper quartile of a replay of f as a CUDA graph (as in training: no Python between launches)."
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    started = time.perf_counter()
    while time.perf_counter() - started < 0.15:  # an idle GPU clocks down, and takes tens of milliseconds to come back
        graph.replay()
        torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)]
    for a, b in events:
        a.record(), graph.replay(), b.record()
    torch.cuda.synchronize()
    del graph
    ms = sorted(a.elapsed_time(b) for a, b in events)
    return [round(v, 4) for v in (statistics.median(ms), ms[len(ms) // 4], ms[-1 - len(ms) // 4])]


def measure(shape, p, R, reps):
    s = SHAPES[shape]
    T, B, n, c = s["T"], s["B"], s["n"], s["c"]
    g = torch.Generator("cuda").manual_seed(0)
    randn = lambda *z: torch.randn(*z, generator=g, device="cuda")  # noqa: E731
    u = randn(R, c, c, 3) * 0.1 / (3 * c) ** 0.5
    for i in range(c):
        u[:, i, i, 2] += 0.99 * (1 - 0.5 * i / c)
        u[:, i, i, 1] += 0.99 * 0.5 * i / c
    extra = {}
    if p.F:
        x, V, b = torch.rand(R, T, B, p.F, generator=g, device="cuda"), randn(R, p.F, c, n) * 0.1, randn(R, c, n) * 0.01
    elif p.rows:
        x, V, b = torch.randint(0, p.rows, (R, T, B), generator=g, device="cuda"), randn(R, p.rows, c, n) * 0.1, None
    else:
        own, t = s["own"], torch.arange(T, device="cuda")[:, None].expand(T, B)
        x = torch.where(t < own, T - own + t * B + torch.arange(B, device="cuda"), t - own)[None].contiguous()
        rows = T - own + own * B
        V, b = randn(R, rows, c, n) * 0.1, None
        order, offsets = K._sort_rows(x, rows)
        wait = torch.bfloat16 if p.precision == "fast" else torch.float32
        extra = dict(
            place=K.place_rows(x, offsets),
            deltas=torch.empty(R, T, B, c, n, dtype=wait, device="cuda"),
            dtable=torch.empty_like(V),
        )
    f = median_ms(lambda: K.run_forward(p, u, V, b, None, x, T, B), reps)
    y, kept = K.run_forward(p, u, V, b, None, x, T, B)
    gy = torch.randn_like(y) / y.numel() ** 0.5
    w = median_ms(lambda: K.run_backward(p, gy, u, x, kept, T, B, **extra), reps)
    sums = (
        median_ms(lambda: K.sum_rows(p, extra["deltas"], extra["place"], order, offsets, extra["dtable"]), reps)
        if extra
        else (0, 0, 0)
    )
    return {
        "forward": f,
        "backward": w,
        "row_sums": sums,
        "per_run": round((f[0] + w[0] + sums[0]) / R, 4),
        "kept_GiB": round(kept.numel() / 2**28, 3),
    }


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--out", type=Path, required=True)
    a.add_argument("--runs", type=int, nargs="+", default=[1, 4, 16])
    a.add_argument("--shapes", nargs="+", default=list(SHAPES))
    a.add_argument("--variants", action="store_true")
    a.add_argument("--reps", type=int, default=9)
    a = a.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    todo = []
    for shape, precision in itertools.product(a.shapes, ("faithful", "fast")):
        changes = [{}] + (VARIANTS[shape][precision] + [{"stub": 1}] if a.variants else [])
        for change, R in itertools.product(changes, a.runs):
            if R <= (4 if shape == "nscifar" or "stub" in change else 99):
                name = " ".join(f"{k}={v}" for k, v in change.items()) or "default"
                todo.append((shape, precision, name, R, plan(shape, precision, R, **change)))
    arch = K.architecture_for(torch.cuda.get_device_capability())
    macros = {tuple(p.macros(f).items()) for *_, p in todo for f in (True, False)}

    def build(m):
        try:
            K.compile_kernel(K.WAVE_SOURCE, dict(m), arch, "wave scan")
        except K.KernelError as e:
            print(e, flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, macros))
    result, device = {"environment": environment(), "shapes": SHAPES, "rows": []}, torch.device("cuda", 0)
    for shape, precision, name, R, p in todo:
        row = dict(shape=shape, variant=name, precision=precision, R=R, T=SHAPES[shape]["T"], B=SHAPES[shape]["B"])
        row |= {k: getattr(p, k) for k in ("mt", "ring", "weights_shared", "sums_shared", "pair")}
        try:
            row |= measure(shape, p, R, a.reps)
            fi = p.module(True, device).attributes("wave_forward", p.threads, p.shared()[0])
            bi = p.module(False, device).attributes("wave_backward", p.threads * p.pair, p.shared()[1])
            row |= {"forward_resources": fi, "backward_resources": bi}
            one = [row[k][0] / R for k in ("forward", "backward", "row_sums")]
            print(
                f"{shape:8s} {precision:8s} {name:36s} mt={p.mt} R={R:2d}  {one[0]:.3f} + {one[1]:.3f} + {one[2]:.3f} = {row['per_run']:.3f} ms"
                f" | regs {fi['registers']}/{bi['registers']} local {fi['local_bytes']}/{bi['local_bytes']} blocks {fi['blocks_per_sm']}/{bi['blocks_per_sm']}",
                flush=True,
            )
        except Exception as e:
            row["failed"] = repr(e)[:400]
            print("FAIL", shape, precision, name, R, repr(e)[:300], flush=True)
        result["rows"].append(row)
        torch.cuda.empty_cache()
    (a.out / "bench_wave.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

"""Milliseconds of the kernels on a GPU: what the notebooks 04_kernels_* read.

python tests/gpu/bench.py --out nbs/results/gpu [--only wave dense] [--runs 1 4 16]

Writes DIR/bench_wave.json and bench_dense.json. Everything is timed as a CUDA graph by triton.testing.
"""

import dataclasses

import torch
from common import compile_all, options, save
from triton.testing import do_bench, do_bench_cudagraph

import wave_rnns.kernels.wave as W
from wave_rnns.kernels import dense
from wave_rnns.kernels.launch import architecture_for, compile_report
from wave_rnns.scan import dense_loop, dense_scan

GPU = torch.device("cuda", 0)
# T, B, n, c, features (0: table rows), all states?, rows of the table ("own": so many steps of nsCIFAR10 have rows of their own)
WAVE = {
    "smnist": dict(T=784, B=128, n=256, c=16, F=1, states=False),
    "adding": dict(T=1000, B=128, n=100, c=27, F=2, states=False),
    "copy": dict(T=510, B=128, n=100, c=6, F=0, states=True, rows=10),
    "nscifar": dict(T=1000, B=256, n=256, c=16, F=0, states=False, own=32),
}
CHANGES = {  # of the plan users get; what each choice buys
    ("smnist", "faithful"): [dict(mt=4), dict(mt=2), dict(mt=4, sums_shared=0), dict(mt=2, weights_shared=1)]
    + [dict(state_bits=0, weight_bits=8)],
    ("smnist", "fast"): [dict(mt=2), dict(ring=8), dict(sums_shared=1), dict(weights_shared=1)],
    ("nscifar", "faithful"): [dict(pair=1), dict(mt=2)],
}
DENSE = {"sMNIST iRNN": (784, 128, 256), "copy iRNN": (510, 128, 100), "adding iRNN": (1000, 128, 100)}


def timed(work, R=1, graph=True):
    "Median and quartiles, milliseconds a run, of some work: as a CUDA graph, or as Python calls it."
    torch.cuda.empty_cache()
    how = do_bench_cudagraph if graph else do_bench
    median, low, high = (ms / R for ms in how(work, rep=200, quantiles=[0.5, 0.25, 0.75]))
    return {"median": median, "low": low, "high": high}


# ------------------------------------------------------------------------------------------------- wave


def wave_plan(shape, precision, R, change):
    s = WAVE[shape]
    more = ({"emit": 2, "pair": 2} if "own" in s else {}) | {"rows": s.get("rows", 0)} | change
    return W.plan_for(GPU, s["n"], s["c"], s["F"], "relu", precision, s["states"], R * s["B"], **more)


def wave_inputs(shape, p, R, device=GPU):
    "x, u, V, b, and what the backward of table rows needs."
    s, g = WAVE[shape], torch.Generator(device).manual_seed(0)
    T, B, n, c = s["T"], s["B"], s["n"], s["c"]
    randn = lambda *z: torch.randn(*z, generator=g, device=device)  # noqa: E731
    u = randn(R, c, c, 3) * 0.1 / (3 * c) ** 0.5
    for i in range(c):
        u[:, i, i, 2] += 0.99 * (1 - 0.5 * i / c)
        u[:, i, i, 1] += 0.99 * 0.5 * i / c
    if p.F:
        x = torch.rand(R, T, B, p.F, generator=g, device=device)
        return x, u, randn(R, p.F, c, n) * 0.1, randn(R, c, n) * 0.01, {}, ()
    if p.rows:
        x = torch.randint(0, p.rows, (R, T, B), generator=g, device=device)
        return x, u, randn(R, p.rows, c, n) * 0.1, None, {}, ()
    own, t = s["own"], torch.arange(T, device=device)[:, None].expand(T, B)
    x = torch.where(t < own, T - own + t * B + torch.arange(B, device=device), t - own)[None].contiguous()
    table = randn(R, T - own + own * B, c, n) * 0.1
    order, offsets = W.sort_rows(x, table.shape[1])
    dtype = torch.bfloat16 if p.precision == "fast" else torch.float32
    deltas, dtable = torch.empty(R, T, B, c, n, dtype=dtype, device=device), torch.empty_like(table)
    extra = dict(place=W.place_rows(x, offsets), deltas=deltas, dtable=dtable)
    return x, u, table, None, extra, (order, offsets)


def wave_row(shape, precision, R, change):
    p, s = wave_plan(shape, precision, R, change), WAVE[shape]
    T, B = s["T"], s["B"]
    x, u, V, b, extra, order = wave_inputs(shape, p, R)
    y, kept = W.run_forward(p, u, V, b, None, x, T, B)
    gy = torch.randn_like(y) / y.numel() ** 0.5
    parts = {
        "forward": lambda: W.run_forward(p, u, V, b, None, x, T, B),
        "backward": lambda: W.run_backward(p, gy, u, x, kept, T, B, **extra),
    }
    if extra:
        parts["row_sums"] = lambda: W.sum_rows(p, extra["deltas"], extra["place"], *order, extra["dtable"])
    ms = {k: [round(v, 4) for v in timed(f).values()] for k, f in parts.items()}
    name = " ".join(f"{k}={v}" for k, v in change.items()) or "default"
    row = dict(shape=shape, variant=name, precision=precision, R=R, T=T, B=B, row_sums=(0, 0, 0)) | ms
    row |= {k: getattr(p, k) for k in ("mt", "ring", "weights_shared", "sums_shared", "pair")}
    arch = architecture_for(torch.cuda.get_device_capability())
    for way, forward in (("forward", True), ("backward", False)):
        use = compile_report(W.SOURCE, p.macros(forward), arch)[f"wave_{way}"]
        row[f"{way}_resources"] = {"registers": use["registers"], "local_bytes": use["stack"]}
    return row | {"per_run": round(sum(m[0] for m in ms.values()) / R, 4), "kept_GiB": kept.numel() / 2**28}


def bench_wave(save, runs):
    todo = []
    for shape in WAVE:
        for precision in ("faithful", "fast"):
            for change in [{}, {"stub": 1}, *CHANGES.get((shape, precision), [])]:
                few = shape == "nscifar" or change
                todo += [(shape, precision, R, change) for R in runs if R <= 4 or not few]
    plans = [wave_plan(*t) for t in todo]
    compile_all([(W.SOURCE, p.macros(forward)) for p in plans for forward in (True, False)])
    rows = []
    for t in todo:
        rows.append(wave_row(*t))
        print(*t, f"{rows[-1]['per_run']:.3f} ms a run", flush=True)
        save(shapes=WAVE, rows=rows)


# ------------------------------------------------------------------------------------------------- dense


def dense_problem(R, T, B, m, seed=0):
    "Drive, U near the identity, gradient of the last state."
    g = torch.Generator(device="cuda").manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g, device="cuda")  # noqa: E731
    U = torch.eye(m, device="cuda") * 0.95 + rand(R, m, m) * 0.1 / m**0.5
    return rand(R, T, B, m) * 0.3, U, rand(R, B, m)


def error(a, b):
    "Relative 2-norm, the largest over the runs."
    a, b = a.double().flatten(1), b.double().flatten(1)
    return ((a - b).norm(dim=1) / b.norm(dim=1)).max().item()


def scan_parts(plan, R, T, B, last):
    "Forward scan, backward scan and dU, milliseconds a run."
    drive, U, gy = dense_problem(R, T, B, plan.m)
    states, ddrive, end, dh_0 = (torch.empty_like(t) for t in (drive, drive, gy, gy))
    gy = gy if last else torch.randn_like(drive)
    parts = {
        "forward": lambda: dense.scan_forward(plan, drive, U, None, "relu", states, end),
        "backward": lambda: dense.scan_backward(plan, gy, U, states, "relu", last, ddrive, dh_0),
        "dU": lambda: dense.outer_sum(plan, ddrive, states, None, "relu", last),
    }
    return {k: timed(f, R) for k, f in parts.items()}


def layers(T, B, m):
    "The whole layer, one input feature, last state: nn.RNN, the eager loop and dense_scan, and their errors against float64."
    torch.manual_seed(0)
    rnn = torch.nn.RNN(1, m, nonlinearity="relu").cuda()
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.eye(m) * 0.95 + torch.randn(m, m) * 0.1 / m**0.5)
        rnn.weight_ih_l0.normal_(std=0.3)
        rnn.bias_hh_l0.zero_()
    x, gy = torch.rand(T, B, 1, device="cuda"), torch.randn(B, m, device="cuda")
    weights = [rnn.weight_hh_l0, rnn.weight_ih_l0, rnn.bias_ih_l0]
    ways = {
        "nn.RNN (cuDNN)": lambda: rnn(x)[0][-1],
        "dense_scan faithful": lambda: dense_scan(x, *weights, last=True),
        "dense_scan fast": lambda: dense_scan(x, *weights, last=True, precision="fast"),
        "eager loop": lambda: dense_loop(x, *weights, last=True),
    }
    double = [w.detach().double().requires_grad_() for w in weights]
    exact = dense_loop(x.double(), *double, last=True)
    exact = (exact, *torch.autograd.grad(exact, double, gy.double()))
    rows = {}
    for name, forward in ways.items():

        def both(forward=forward):
            y = forward()
            return (y, *torch.autograd.grad(y, weights, gy))

        errors = {k: error(a[None], b[None]) for k, a, b in zip(("h", "U", "V", "b"), both(), exact, strict=True)}
        rows[name] = {"forward": timed(forward, graph=False), "both": timed(both, graph=False)}
        rows[name] |= {"both_graph": timed(both), "error": errors}
        print(name, {k: round(v["median"], 3) for k, v in rows[name].items() if k != "error"}, flush=True)
    return rows


def sums_for_dU(T, B, m, R):
    "The sum for dU: ours with two and three terms, cuBLAS in fp32."
    delta, states = (dense_problem(R, T, B, m, seed)[0] for seed in (1, 2))
    exact = (delta[0, 1:].double().reshape(-1, m).mT @ states[0, :-1].double().reshape(-1, m))[None]
    ways = {"cuBLAS fp32": lambda: torch.bmm(delta[:, 1:].flatten(1, 2).mT, states[:, :-1].flatten(1, 2))}
    for k in (2, 3):
        plan = dataclasses.replace(dense.plan_for(m, B, R, "faithful"), outer_terms=k)
        ways[f"ours, {k} terms"] = lambda plan=plan: dense.outer_sum(plan, delta, states, None, "relu", True)
    return {name: {"ms": timed(work, R), "error": error(work()[:1], exact)} for name, work in ways.items()}


def bench_dense(save, runs):
    T, B, m = DENSE["sMNIST iRNN"]
    found = {"layer": layers(T, B, m), "dU": {f"R={R}": sums_for_dU(T, B, m, R) for R in (1, 16)}, "kernels": {}}
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for name, (T, B, m) in DENSE.items():
        last, rows = name != "copy iRNN", found["kernels"].setdefault(name, [])
        for precision in ("faithful", "fast"):
            for R in runs:
                plan = dense.plan_for(m, B, R, precision, processors)
                row = dict(T=T, B=B, m=m, R=R, precision=precision, last=last, plan=dataclasses.asdict(plan))
                row |= scan_parts(plan, R, T, B, last)
                if R == 1:
                    row["stub"] = scan_parts(dataclasses.replace(plan, stub=True), R, T, B, last)
                rows.append(row)
                print(name, precision, R, {k: round(row[k]["median"], 3) for k in ("forward", "backward", "dU")})
        save(**found)


def main():
    names = {"wave": bench_wave, "dense": bench_dense}
    only, runs = dict(nargs="+", default=[*names], choices=names), dict(type=int, nargs="+", default=[1, 4, 16])
    chosen = options(__doc__, quick=None, only=only, runs=runs)
    for name in chosen.only:
        names[name](lambda name=name, **found: save(chosen.out / f"bench_{name}.json", found), chosen.runs)


if __name__ == "__main__":
    main()

"""Speed of the dense scan on a GPU, beside cuDNN's nn.RNN and an eager loop, in one run.

python tests/gpu/bench_dense.py --out DIR [--sweep]      writes DIR/bench_dense.json; --sweep tries every layout
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from check_dense import error, precompile

from wave_rnns.core import atomic_write, environment, to_json
from wave_rnns.kernels.wave import architecture_for, load_module
from wave_rnns.kernels.dense import SOURCE, DensePlan, outer_sum, plan_for, scan_backward, scan_forward
from wave_rnns.scan import dense_loop, dense_scan

SHAPES = {"sMNIST iRNN": (784, 128, 256), "copy iRNN": (510, 128, 100), "adding iRNN": (1000, 128, 100)}


def milliseconds(work, repeats=15, warm=3):
    "Median, and spread between the quartiles, of GPU time; the clock is warmed up first."
    start = time.time()
    while warm > 0 or time.time() - start < 0.05:
        work()
        torch.cuda.synchronize()
        warm -= 1
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        work()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    q = statistics.quantiles(times, n=4)
    return {"median": statistics.median(times), "low": q[0], "high": q[2]}


def problem(R, T, B, m, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g, device="cuda")  # noqa: E731
    U = torch.eye(m, device="cuda") * 0.95 + rand(R, m, m) * 0.1 / m**0.5
    return rand(R, T, B, m) * 0.3, U, rand(R, B, m)


def time_plan(plan, R, T, B, activation="relu", last=True):
    "Milliseconds per run of forward, backward scan and dU."
    drive, U, gy = problem(R, T, B, plan.m)
    states, ddrive, end, dh_0 = (
        torch.empty_like(drive),
        torch.empty_like(drive),
        torch.empty_like(gy),
        torch.empty_like(gy),
    )
    if not last:
        gy = torch.randn_like(drive)
    parts = {
        "forward": lambda: scan_forward(plan, drive, U, None, activation, states, end),
        "backward": lambda: scan_backward(plan, gy, U, states, activation, last, ddrive, dh_0),
        "dU": lambda: outer_sum(plan, ddrive, states, None, activation, last),
    }
    return {k: {q: v / R for q, v in milliseconds(f).items()} for k, f in parts.items()}


def layouts(m, precision):
    "What the sweep tries."
    terms = 3 if precision == "faithful" else 2
    if m <= 128:
        shapes = [dict(cluster=1, rows=4, deep=2), dict(cluster=2, rows=2, deep=2), dict(cluster=4, rows=2, deep=1)]
    else:
        shapes = [
            dict(cluster=8, rows=2, deep=4),
            dict(cluster=4, rows=4, deep=2),
            dict(cluster=4, rows=2, deep=4),
            dict(cluster=2, rows=4, deep=4),
            dict(cluster=2, rows=4, deep=4, ahead=2),
        ]
    plans = [DensePlan(m, terms, **s) for s in shapes]
    return plans + [
        dataclasses.replace(p, diagonals=3) for p in plans if p.terms == 3 and p.cluster in (2, 4) and p.ahead == 4
    ]


def fits(plan):
    "Enough threads to finish the results, and a tile count the crews can share?"
    crews = 1 if plan.threads % plan.items else plan.threads // plan.items
    if plan.threads < plan.items or plan.threads > 1024 or plan.padded // 16 // plan.cluster % plan.rows:
        return False
    return (
        (plan.tiles <= crews or plan.tiles % crews == 0)
        and plan.shared(2) < 220_000
        and plan.tiles * plan.cluster <= 16
    )


def sweep(T, B, m, precision):
    rows = []
    tasks = [
        (R, dataclasses.replace(p, tiles=t))
        for R in (1, 4, 16)
        for p in layouts(m, precision)
        for t in ((1,) if R == 1 else (1, 2, 4, 8))
    ]
    for R, plan in tasks:
        if not fits(plan) or (plan.ahead == 2 and plan.tiles < 4):
            continue
        row = {"R": R, "plan": dataclasses.asdict(plan)}
        try:
            row |= time_plan(plan, R, T, B)
            total = row["forward"]["median"] + row["backward"]["median"]
            text = f"{row['forward']['median']:.3f} + {row['backward']['median']:.3f} = {total:.3f}, dU {row['dU']['median']:.3f}"
        except Exception as e:
            row["error"] = text = f"{type(e).__name__}: {e}"[:300]
        name = " ".join(
            f"{k}={v}"
            for k, v in row["plan"].items()
            if k in ("cluster", "rows", "deep", "tiles", "ahead", "diagonals")
        )
        print(f"m={m} {precision:8s} R={R:2d} {name}: {text}", flush=True)
        rows.append(row)
    return rows


def compile_sweep(widths):
    arch, jobs = architecture_for(torch.cuda.get_device_capability()), []
    for m in widths:
        for precision in ("faithful", "fast"):
            for p in layouts(m, precision):
                for tiles in (1, 2, 4, 8):
                    plan = dataclasses.replace(p, tiles=tiles)
                    if fits(plan):
                        jobs += [(plan.macros("relu", False, False), arch), (plan.macros("relu", True, True), arch)]
    precompile(jobs)


def occupancy(plan):
    "Registers, spills and blocks per multiprocessor, as the driver reports them."
    out = {}
    for name, back, streams in (("forward", False, 1), ("backward", True, 1)):
        module = load_module(
            SOURCE, plan.macros("relu", back, True), torch.device("cuda"), "dense scan" + " backward" * back
        )
        out[name] = module.attributes("dense_scan", plan.threads, plan.shared(streams))
    return out


def against_cudnn(T, B, m):
    "The whole layer, input of one feature, last state: nn.RNN beside dense_scan. Errors of both against the float64 loop."
    torch.manual_seed(0)
    rnn = torch.nn.RNN(1, m, nonlinearity="relu").cuda()
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.eye(m) * 0.95 + torch.randn(m, m) * 0.1 / m**0.5)
        rnn.weight_ih_l0.normal_(std=0.3)
        rnn.bias_hh_l0.zero_()
    x, gy = torch.rand(T, B, 1, device="cuda"), torch.randn(B, m, device="cuda")
    weights = [rnn.weight_hh_l0, rnn.weight_ih_l0, rnn.bias_ih_l0]

    def step(forward):
        def work():
            y = forward()
            return (y, *torch.autograd.grad(y, weights, gy))

        return work

    def loop():
        h = x.new_zeros(B, m)
        for t in range(T):
            h = torch.relu(x[t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T)
        return h

    ways = {
        "nn.RNN (cuDNN)": lambda: rnn(x)[0][-1],
        "dense_scan faithful": lambda: dense_scan(x, *weights, last=True),
        "dense_scan fast": lambda: dense_scan(x, *weights, last=True, precision="fast"),
        "eager loop": loop,
    }
    double = [w.detach().double().requires_grad_() for w in weights]
    exact = dense_loop(x.double(), *double, last=True)
    exact = (exact, *torch.autograd.grad(exact, double, gy.double()))
    rows = {}
    for name, forward in ways.items():
        few = dict(repeats=4, warm=1) if "eager" in name else {}
        work = step(forward)
        errors = {k: error(a[None], b[None]) for k, a, b in zip(("h", "U", "V", "b"), work(), exact, strict=True)}
        rows[name] = {"forward": milliseconds(forward, **few), "both": milliseconds(work, **few), "error": errors}
        try:
            rows[name]["both_graph"] = in_a_graph(work)
        except Exception as e:
            rows[name]["graph_error"] = f"{type(e).__name__}: {e}"[:300]
        r = rows[name]
        print(
            f"{name}: forward {r['forward']['median']:.3f}, both {r['both']['median']:.3f}, in a graph {r.get('both_graph', {}).get('median')}, errors {errors}",
            flush=True,
        )
    return rows


def products_for_dU(T, B, m, R):
    "The sum for dU: ours with two and three terms, cuBLAS in fp32."
    delta, _, _ = problem(R, T, B, m, 1)
    states, _, _ = problem(R, T, B, m, 2)
    exact = (delta[0, 1:].double().reshape(-1, m).mT @ states[0, :-1].double().reshape(-1, m))[None]
    out = {}
    ways = {
        f"ours, {k} terms": (
            lambda k=k: outer_sum(
                dataclasses.replace(plan_for(m, B, R, "faithful"), outer_terms=k), delta, states, None, "relu", True
            )
        )
        for k in (2, 3)
    }
    ways["cuBLAS fp32"] = lambda: torch.bmm(delta[:, 1:].flatten(1, 2).mT, states[:, :-1].flatten(1, 2))
    for name, work in ways.items():
        out[name] = {"ms": {q: v / R for q, v in milliseconds(work).items()}, "error": error(work()[:1], exact)}
        print(f"dU R={R} {name}: {out[name]['ms']['median']:.3f} ms a run, error {out[name]['error']:.1e}", flush=True)
    return out


def in_a_graph(work):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return milliseconds(graph.replay, 7, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true", help="also time every layout")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("highest")
    start, record = time.time(), {"environment": environment(), "kernels": {}, "sweep": {}}
    processors = torch.cuda.get_device_properties(0).multi_processor_count

    def save():
        record["seconds"] = time.time() - start
        atomic_write(options.out / "bench_dense.json", to_json(record, indent=1))

    if options.sweep:
        compile_sweep([256, 100])
        print(f"compiled in {time.time() - start:.0f} s", flush=True)
    record["layer"] = against_cudnn(*SHAPES["sMNIST iRNN"])
    save()
    for name, (T, B, m) in SHAPES.items():
        for precision in ("faithful", "fast"):
            for R in (1, 4, 16):
                plan = plan_for(m, B, R, precision, processors)
                row = time_plan(plan, R, T, B, last=name != "copy iRNN")
                row |= {
                    "T": T,
                    "B": B,
                    "m": m,
                    "R": R,
                    "precision": precision,
                    "plan": dataclasses.asdict(plan),
                    "last": name != "copy iRNN",
                }
                if R == 1:
                    row["one step"] = time_plan(plan, R, 1, B, last=True)
                    row["stub"] = time_plan(dataclasses.replace(plan, stub=True), R, T, B, last=name != "copy iRNN")
                    row["occupancy"] = occupancy(plan)
                record["kernels"].setdefault(name, []).append(row)
                parts = [row[k]["median"] for k in ("forward", "backward", "dU")]
                print(
                    f"{name} {precision} R={R}: {parts[0]:.3f} + {parts[1]:.3f} + dU {parts[2]:.3f} = {sum(parts):.3f} ms a run",
                    flush=True,
                )
            save()
    T, B, m = SHAPES["sMNIST iRNN"]
    record["dU"] = {f"R={R}": products_for_dU(T, B, m, R) for R in (1, 16)}
    save()
    if options.sweep:
        for name in ("sMNIST iRNN", "adding iRNN"):
            for precision in ("faithful", "fast"):
                record["sweep"][f"{name} {precision}"] = sweep(*SHAPES[name], precision)
                save()
    print(f"bench_dense: {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()

"""Proof of the dense scan on a GPU: values and every gradient against a float64 loop.

python tests/gpu/check_dense.py --out DIR [--quick]      writes DIR/check_dense.json, exit code 1 if anything is out of bounds
"""

import dataclasses
import itertools
import json
import math
import sys
import time

import torch
from common import MANY, ROUNDING, compile_all, options, save

from wave_rnns.kernels.dense import SOURCE, DenseBackend, plan_for
from wave_rnns.scan import dense_loop, dense_scan
from wave_rnns.scan_operator import backend_for

# Gradients by precision: where no relu mask flips, and where one does. A flip changes a gradient by itself, in the float32 loop too: where
# that is beyond the bound, ours may be twice as far. A second reference, a float64 loop that opens and shuts its rectifiers as the kernel
# did, holds ours to the first bound in every case. (fast: flips are too many for any bound but that one.)
BOUNDS = {"faithful": {"clean": 5e-5, "flipped": 1e-3}, "fast": {"clean": 1e-2, "flipped": None}}
GRADIENTS = ("drive", "U", "h_0")
FEW = 3  # units: so few numbers are no measure of the float32 loop, which may be lucky with them. Then 16 times the runs, and their median


def act(z, activation):
    return {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda z: z}[activation](z)


def reference(drive, U, h_0, gy, activation, last, dtype, masks=None):
    "The recurrence and its gradients by a plain loop and autograd, in `dtype`. `masks` [R, T, B, m]: which rectifiers are open."
    drive, U, h_0, gy = (t.to(dtype).detach().requires_grad_() for t in (drive, U, h_0, gy))
    h, states = h_0, []
    for t in range(drive.shape[1]):
        z = torch.baddbmm(drive[:, t], h, U.mT)
        h = act(z, activation) if masks is None else z * masks[:, t]
        states.append(h)
    states = torch.stack(states, 1)
    grads = torch.autograd.grad(states[:, -1] if last else states, (drive, U, h_0), gy)
    return states.detach(), dict(zip(GRADIENTS, grads, strict=True))


def case_inputs(R, T, B, m, last, seed):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    U = 0.9 * torch.eye(m) + rand(R, m, m) * 0.3 / (1 + m**0.5)
    tensors = rand(R, T, B, m) * 0.5, U, rand(R, B, m), rand(R, B, m) if last else rand(R, T, B, m)
    return [t.cuda() for t in tensors]


def error(a, b, over_runs=torch.max):
    "Relative 2-norm, of the runs the largest, or what `over_runs` makes of them."
    a, b = a.double().flatten(1), b.double().flatten(1)
    return over_runs((a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-300)).item() if b.any() else a.norm().item()


def out_of_bounds(row, states):
    "Names of what is beyond its bound in a case that has been measured: errors, gradients at the kernel's own masks, flips."
    faithful, bounds = row["precision"] == "faithful", BOUNDS[row["precision"]]
    limits = dict.fromkeys(("h", "y", *GRADIENTS), bounds["clean"])
    if faithful:
        limits |= {k: 8 * max(row["error_loop"][k], ROUNDING) for k in ("h", "y")}
    if row["flips"]:
        limits |= {k: max(bounds["flipped"], 2 * row["error_loop"][k]) if faithful else math.inf for k in GRADIENTS}
    over = [k for k, limit in limits.items() if not row["error"][k] <= limit]
    over += [f"{k}, same masks" for k, e in row.get("same_masks", {}).items() if not e <= bounds["clean"]]
    return over + ["flips"] * (row["flips"] > max(1, MANY[row["precision"]] * states))


def check_case(R, T, B, m, activation, last, with_h_0, rows):
    drive, U, h_0, gy = case_inputs(R, T, B, m, last, hash((R, T, B, m)) % 2**31)
    h_0 = h_0 if with_h_0 else torch.zeros_like(h_0)
    exact, exact_grads = reference(drive, U, h_0, gy, activation, last, torch.float64)
    loop, loop_grads = reference(drive, U, h_0, gy, activation, last, torch.float32)
    start = h_0 if with_h_0 else None
    for precision in ("faithful", "fast"):
        backend = backend_for("dense", drive.device, drive.dtype, 1, m, 0, 0, activation, precision)
        y, kept = torch.ops.wave_rnns.dense_forward(drive, U, start, activation, last, True, precision)
        ours = torch.ops.wave_rnns.dense_backward(gy, drive, U, start, y, kept, activation, last, precision)
        again = torch.ops.wave_rnns.dense_backward(gy, drive, U, start, y, kept, activation, last, precision)
        states = kept if last else y
        row = dict(R=R, T=T, B=B, m=m, activation=activation, last=last, h_0=with_h_0, precision=precision)
        row["path"] = "fused" if isinstance(backend, DenseBackend) else "torch"
        row["flips"] = int(((states > 0) != (exact > 0)).sum()) if activation == "relu" else 0
        row["flips_loop"] = int(((loop > 0) != (exact > 0)).sum()) if activation == "relu" else 0
        end, loop_end = (exact[:, -1], loop[:, -1]) if last else (exact, loop)
        over_runs = torch.median if m <= FEW else torch.max
        row["error"] = {"h": error(states, exact, over_runs), "y": error(y, end, over_runs)}
        row["error_loop"] = {"h": error(loop, exact, over_runs), "y": error(loop_end, end, over_runs)}
        for name, grad in zip(GRADIENTS, ours, strict=True):
            row["error"][name] = error(grad, exact_grads[name], over_runs)
            row["error_loop"][name] = error(loop_grads[name], exact_grads[name], over_runs)
        row["repeats"] = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        if row["flips"]:
            _, same = reference(drive, U, h_0, gy, activation, last, torch.float64, states > 0)
            row["same_masks"] = {k: error(grad, same[k], over_runs) for k, grad in zip(GRADIENTS, ours, strict=True)}
        row["over"] = out_of_bounds(row, states.numel())
        row["ok"] = row["repeats"] and not row["over"]
        rows.append(row)
        if not row["ok"]:
            print("OUT OF BOUNDS", json.dumps(row), flush=True)


# ------------------------------------------------------------------------------------------------- beyond single cases


def both_ways(backend, drive, U, h_0, gy, activation="relu", last=True):
    "Output and gradients; `backend`: an object with the two halves, or torch.ops.wave_rnns."
    y, kept = backend.dense_forward(drive, U, h_0, activation, last, True, "faithful")
    return y, *backend.dense_backward(gy, drive, U, h_0, y, kept, activation, last, "faithful")


def same(*results, part=slice(None)):
    "Whether all are the first's bits, or those of a part of its runs."
    return all(torch.equal(a[part], b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def same_bits_whatever_the_tiles():
    "A run's bits do not depend on how many tiles a block works on, nor on the runs beside it."
    tensors, out = case_inputs(3, 20, 40, 200, True, 1), []
    for tiles in (1, 2):
        plan = dataclasses.replace(plan_for(200, 8, 1, "faithful"), tiles=tiles)
        b = DenseBackend(lambda *_, plan=plan: plan)
        out.append(both_ways(b, *tensors))
    return same(*out) and same(out[0], both_ways(b, *(t[1:2] for t in tensors)), part=slice(1, 2))


def dense_problem(m=100, T=30, B=5, F=2, seed=3):
    g = torch.Generator().manual_seed(seed)
    x, V = torch.randn(T, B, F, generator=g), torch.randn(m, F, generator=g)
    U, b = torch.eye(m) + 0.02 * torch.randn(m, m, generator=g), 0.1 * torch.randn(m, generator=g)
    return [t.cuda().requires_grad_() for t in (x, U, V, b, torch.randn(B, m, generator=g))]


def public_operator_agrees():
    "dense_scan, its gradients by name, against dense_loop in float64."
    worst = 0.0
    for last in (False, True):
        tensors = dense_problem()
        double = [t.detach().double().requires_grad_() for t in tensors]
        y, z = dense_scan(*tensors, last=last), dense_loop(*double, last=last)
        gy = torch.randn_like(y)
        ours, exact = torch.autograd.grad(y, tensors, gy), torch.autograd.grad(z, double, gy.double())
        worst = max(worst, *(error(a[None], b[None]) for a, b in zip((y, *ours), (z, *exact), strict=True)))
    return worst < 1e-4, worst


def vmap_agrees():
    "vmap over runs gives each run's own bits."
    runs = [dense_problem(m=64, seed=s) for s in range(3)]
    stacked = [torch.stack([r[i].detach() for r in runs]) for i in range(5)]
    loss = lambda *t: dense_scan(*t, last=True).square().mean()  # noqa: E731
    grads = torch.vmap(torch.func.grad(loss, argnums=(1,)))(*stacked)[0]
    return all(
        torch.allclose(grads[i], torch.autograd.grad(loss(*r), r[1])[0], rtol=1e-4, atol=1e-7)
        for i, r in enumerate(runs)
    )


def graph_replays_the_same_bits():
    "Forward and backward captured in a CUDA graph, of the fused kernels and of what is too large for them."
    for m in (200, 529):
        tensors = case_inputs(2, 30, 5, m, True, 5)
        eager = both_ways(torch.ops.wave_rnns, *tensors)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            both_ways(torch.ops.wave_rnns, *tensors)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both_ways(torch.ops.wave_rnns, *tensors)
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        if not same(eager, captured):
            return False, {"m": m}
    return True


def tf32_switch_does_not_matter():
    "PyTorch's global tf32 switch does not reach the scan, fused or not."
    was, equal = torch.get_float32_matmul_precision(), []
    for m in (256, 529):
        tensors = case_inputs(1, 50, 5, m, True, 6)
        before = both_ways(torch.ops.wave_rnns, *tensors)
        torch.set_float32_matmul_precision("high")
        after = both_ways(torch.ops.wave_rnns, *tensors)
        torch.set_float32_matmul_precision(was)
        equal.append(same(before, after))
    return all(equal)


def a_diverged_run_stays_alone():
    "Runs beside one that is not finite keep their bits; the bad one is not finite."
    drive, U, h_0, gy = case_inputs(3, 20, 9, 150, True, 7)
    good = both_ways(torch.ops.wave_rnns, drive, U, h_0, gy)
    drive[1, 3, 2, 5] = float("nan")
    bad = both_ways(torch.ops.wave_rnns, drive, U, h_0, gy)
    others = same(good, [t[[0, 2]] for t in bad], part=[0, 2])
    return others and not bad[0][1].isfinite().all() and not bad[2][1].isfinite().all()


def opcheck_passes():
    drive, U, h_0, gy = case_inputs(2, 4, 3, 33, False, 8)
    for last in (False, True):
        args = (drive.clone().requires_grad_(), U.clone().requires_grad_(), h_0, "tanh", last, True, "faithful")
        torch.library.opcheck(torch.ops.wave_rnns.dense_forward, args)
        y, kept = torch.ops.wave_rnns.dense_forward(drive, U, h_0, "tanh", last, True, "faithful")
        g = gy[:, 0].contiguous() if last else gy
        torch.library.opcheck(
            torch.ops.wave_rnns.dense_backward,
            (g, drive, U, h_0, y, kept, "tanh", last, "faithful"),
            test_utils=("test_schema", "test_faketensor"),
        )
    return True


def every_layout_agrees():
    "Each against the float64 loop."
    worst = {}
    for plan in layouts():
        drive, U, h_0, gy = case_inputs(2, 40, 21, plan.m, False, 9)
        exact, grads = reference(drive, U, h_0, gy, "relu", False, torch.float64)
        ours = both_ways(DenseBackend(lambda *_, plan=plan: plan), drive, U, h_0, gy, last=False)
        key = " ".join(f"{k}={getattr(plan, k)}" for k in ("cluster", "rows", "deep", "tiles", "terms", "m"))
        worst[key] = [error(a, b) for a, b in zip(ours, (exact, *grads.values()), strict=True)]
        print(f"  {key}: h, {', '.join(GRADIENTS)}", *(f"{e:.1e}" for e in worst[key]), flush=True)
        if not max(worst[key]) < (1e-4 if plan.terms == 3 else 5e-2):
            return False, worst
    return True, worst


def layouts():
    "Every layout that users get on this GPU, one or more tiles, both precisions."
    gpu = torch.cuda.get_device_properties(0)
    sizes = itertools.product((30, 60, 91, 100, 255), (1, 4, 8, 16), BOUNDS)
    plans = (plan_for(m, 128, R, p, gpu.multi_processor_count, gpu.major >= 9) for m, R, p in sizes)
    return [plan for plan in dict.fromkeys(plans) if plan]


def run_cases(quick):
    rows = []
    Ts, Bs, ms = (
        ((1, 15), (1, 3), (3, 100, 256)) if quick else ((1, 2, 15, 63, 300), (1, 3, 128), (1, 2, 3, 100, 256, 529))
    )
    for i, (T, B, m, R, last) in enumerate(itertools.product(Ts, Bs, ms, (1, 3), (True, False))):
        R *= 16 if m <= FEW else 1
        for activation in ("relu",) if T not in (1, 15, 63) else ("relu", "tanh", "identity"):
            check_case(R, T, B, m, activation, last, i // 2 % 2 == 0 or T == 1, rows)
    return rows


def compile_everything():
    gpu = torch.cuda.get_device_properties(0)
    modes = [(False, False), (True, False), (True, True)]
    jobs = [(SOURCE, p.macros("relu", *mode)) for p in layouts() for mode in modes[:2]]
    sizes = [(m, B, R) for m in (1, 2, 3, 100, 256) for B in (1, 128) for R in (1, 3)]
    for (m, B, R), precision, act_, mode in itertools.product(sizes, BOUNDS, ("relu", "tanh", "identity"), modes):
        if plan := plan_for(m, B, R, precision, gpu.multi_processor_count, gpu.major >= 9):
            jobs.append((SOURCE, plan.macros(act_, *mode)))
    compile_all(jobs)


EXTRA = [
    every_layout_agrees,
    same_bits_whatever_the_tiles,
    public_operator_agrees,
    vmap_agrees,
    graph_replays_the_same_bits,
    tf32_switch_does_not_matter,
    a_diverged_run_stays_alone,
    opcheck_passes,
]


def summary(rows):
    "Worst error of each quantity by precision, where no relu mask flips and where one does."
    table = {}
    for row in rows:
        key = (row["precision"], row["path"], "flipped" if row["flips"] else "clean")
        entry = table.setdefault(" ".join(key), {"cases": 0, "flips": 0, "ok": True, "worst": {}, "worst_loop": {}})
        entry["cases"] += 1
        entry["flips"] += row["flips"]
        entry["ok"] &= row["ok"]
        for name in ("error", "error_loop", "same_masks"):
            worst = entry.setdefault(name.replace("error", "worst"), {})
            for k, v in row.get(name, {}).items():
                worst[k] = max(worst.get(k, 0.0), v)
        if row["error_loop"]["h"] > ROUNDING:
            entry["ratio"] = max(entry.get("ratio", 0.0), row["error"]["h"] / row["error_loop"]["h"])
    return table


def main():
    chosen, start = options(__doc__), time.time()
    compile_everything()
    record = {"compile_seconds": time.time() - start, "bounds": BOUNDS, "checks": {}}
    for check in EXTRA:
        try:
            result = check()
            ok, detail = result if isinstance(result, tuple) else (result, None)
        except Exception as e:  # one broken check must not hide the others
            ok, detail = False, f"{type(e).__name__}: {e}"[:2000]
        record["checks"][check.__name__] = {"ok": bool(ok), "detail": detail, "what": check.__doc__}
        print(f"{'ok  ' if ok else 'FAIL'} {check.__name__} {detail if not ok else ''}", flush=True)
    try:
        rows = run_cases(chosen.quick)
    except Exception as e:
        rows, record["error"] = [], f"{type(e).__name__}: {e}"
        print("FAIL", record["error"])
    worst = {
        f"{p} {k}": max((r for r in rows if r["precision"] == p), key=lambda r, k=k: r["error"][k], default=None)
        for p in BOUNDS
        for k in ("h", *GRADIENTS)
    }
    record |= {"summary": summary(rows), "worst_cases": worst, "out_of_bounds": [r for r in rows if not r["ok"]][:100]}
    record["ok"] = bool(rows) and all(r["ok"] for r in rows) and all(c["ok"] for c in record["checks"].values())
    save(chosen.out / "check_dense.json", record)
    for key, entry in record["summary"].items():
        worst = " ".join(f"{k} {v:.1e} ({entry['worst_loop'].get(k, 0):.1e})" for k, v in entry["worst"].items())
        about = f"{key}: {entry['cases']} cases, {entry['flips']} flips, ok {entry['ok']}"
        print(f"{about}, x{entry.get('ratio', 0):.1f} of the fp32 loop; {worst}")
    print(f"check_dense: {'all within bounds' if record['ok'] else 'OUT OF BOUNDS'}")
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

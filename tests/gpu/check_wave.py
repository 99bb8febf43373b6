"""The proof of the wave kernels on a GPU.  python tests/gpu/check_wave.py --out DIR [--quick] [--only WORD]

Every case compares value and every named gradient with a float64 loop, beside the float32 loop on the same numbers.
Writes DIR/check_wave.json. Exit code 1 if anything is out of bounds.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import torch
from common import MANY, ROUNDING, compile_all, options, save

import wave_rnns.kernels.wave as K
from wave_rnns.scan import Rows, rows, wave_loop, wave_scan

# faithful: output within 8 times the float32 loop's error (which is at least one rounding), gradients 5e-5, or 1e-3 when a mask flips.
# A flipped mask (a state whose sign rounding decides) changes a gradient by itself, in the float32 loop too. So where one flips there is
# a second reference, a float64 loop that opens and shuts its rectifiers as the kernel did, and to that one the bounds apply without flips.
FAITHFUL, FLIPPED, FAST = 5e-5, 1e-3, 2e-2


def problem(n, c, R, B, T, kind, F, seed, u_init="shift"):
    "Weights near the shift (wave speeds between 1/2 and 1), or random; everything on the GPU in float32."
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    u = randn(R, c, c, 3) * (0.1 if u_init == "shift" else 0.7) / (3 * c) ** 0.5
    if u_init == "shift":
        for i in range(c):
            u[:, i, i, 2] += 0.99 * (1 - 0.5 * i / c)
            u[:, i, i, 1] += 0.99 * 0.5 * i / c
    p = {"u": u, "V": randn(R, c, n, F) * 0.1, "b": randn(R, c, n) * 0.01, "h_0": randn(R, B, c, n).abs() * 0.1}
    p = {k: v.float().cuda() for k, v in p.items()}
    if kind == "x":
        x = torch.rand(R, T, B, F, generator=g)
    elif kind == "tokens":
        x = torch.randint(0, F, (R, T, B), generator=g)
    else:  # rows: the first steps have a row for each sample, the others share one, a few rows nobody uses
        own = T // 3
        index = torch.arange(T)[:, None].expand(T, B) - own
        first = T - own + torch.arange(own)[:, None] * B + torch.arange(B)
        index = torch.cat([first, index[own:]]) if own else index
        x = Rows(torch.rand(R, T - own + own * B + 2, F, generator=g), index, None, None)
    return p, x


def forced_loop(x, u, V, b, h, masks):
    "wave_loop with rectifiers that open where `masks` [T, B, c, n] says so."
    states = []
    for t, mask in enumerate(masks):
        now = Rows(x.table, x.index[t : t + 1], None, None) if isinstance(x, Rows) else x[t : t + 1]
        h = wave_loop(now, u, V, b, h, "identity", True) * mask
        states.append(h)
    return torch.stack(states)


def run_loop(p, x, dtype, activation, last, w, kind, masks=None):
    "The reference: -> output, states, gradients, one run after the other. `masks` [R, T, B, c, n]: which rectifiers are open."
    outs, states, grads = [], [], []
    for r in range(w.shape[0]):
        q = {k: v[r].to(dtype).requires_grad_() for k, v in p.items()}
        if kind == "x":
            q["x"] = x[r].cuda().to(dtype).requires_grad_()
            xr = q["x"]
        elif kind == "tokens":
            xr = x[r].cuda()
        else:
            q["table"] = x.table[r].cuda().to(dtype).requires_grad_()
            xr = Rows(q["table"], x.index.cuda(), None, None)
        args = (xr, q["u"], q["V"], q["b"], q["h_0"])
        s = wave_loop(*args, activation, False) if masks is None else forced_loop(*args, masks[r])
        y = s[-1] if last else s
        g = torch.autograd.grad((y * w[r].to(dtype)).sum(), list(q.values()))
        outs.append(y.detach()), states.append(s.detach()), grads.append(dict(zip(q, g, strict=True)))
    return torch.stack(outs), torch.stack(states), {k: torch.stack([g[k] for g in grads]) for k in grads[0]}


def run_value(q, x, activation, last, precision, kind):
    "The operator under vmap, as the population trainer calls it, on the leaves `q` (what x or a table has of them included)."
    lead = q.get("x", q.get("table"))
    index = rows(lead[0].detach(), x.index.cuda())[1:] if kind == "rows" else None

    def one_run(u, V, b, h, t):
        return wave_scan(Rows(t, *index) if index else t, u, V, b, h, activation, last, precision)

    return torch.func.vmap(one_run)(q["u"], q["V"], q["b"], q["h_0"], x.cuda() if lead is None else lead)


def leaves(p, x, kind):
    "Weights, and x or a table where it has a gradient, each asking for one."
    more = {"x": x} if kind == "x" else {"table": x.table} if kind == "rows" else {}
    return {k: v.cuda().clone().requires_grad_() for k, v in (p | more).items()}


def run_kernel(p, x, activation, last, precision, w, kind):
    "-> output, gradients"
    q = leaves(p, x, kind)
    y = run_value(q, x, activation, last, precision, kind)
    g = torch.autograd.grad((y * w).sum(), list(q.values()))
    return y.detach(), dict(zip(q, g, strict=True))


def run_states(p, x, activation, last, precision, kind):
    "All states, or the last one, by the kernel that keeps nothing."
    with torch.no_grad():
        return run_value(leaves(p, x, kind), x, activation, last, precision, kind)


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() if torch.isfinite(a).all() else float("inf")


def one(case, precisions=("faithful", "fast")):
    "-> records, one for each precision"
    R, B, T, c, n, kind, act, last = (case[k] for k in ("R", "B", "T", "c", "n", "kind", "activation", "last"))
    p, x = problem(n, c, R, B, T, kind, case["F"], case["seed"], case["u_init"])
    if not case["h_0"]:
        p["h_0"] = torch.zeros_like(p["h_0"])
    gen = torch.Generator().manual_seed(case["seed"] + 1)
    w = torch.randn(R, *((B,) if last else (T, B)), c, n, generator=gen).cuda() / (R * B * c * n) ** 0.5
    ref, ref_states, ref_g = run_loop(p, x, torch.float64, act, last, w, kind)
    f32, f32_states, f32_g = run_loop(p, x, torch.float32, act, last, w, kind)
    masks = ref_states > 0
    records = []
    for precision in precisions:
        y, g = run_kernel(p, x, act, last, precision, w, kind)
        y2, g2 = run_kernel(p, x, act, last, precision, w, kind)
        states = y if not last else run_states(p, x, act, False, precision, kind)
        flips, flips_float32 = (int(((h > 0) != masks).sum()) if act == "relu" else 0 for h in (states, f32_states))
        rec = dict(case, precision=precision, flips=flips, flips_float32=flips_float32)
        rec["error"] = {"y": relative(y, ref), **{k: relative(v, ref_g[k]) for k, v in g.items()}}
        rec["float32"] = {"y": relative(f32, ref), **{k: relative(v, ref_g[k]) for k, v in f32_g.items()}}
        rec["same_bits"] = bool(torch.equal(y, y2) and all(torch.equal(g[k], g2[k]) for k in g))
        faithful = precision == "faithful"
        clean, flipped = (FAITHFUL, FLIPPED) if faithful else (FAST, math.inf)
        bound = dict.fromkeys(g, flipped if flips else clean)
        bound["y"] = 8 * max(rec["float32"]["y"], ROUNDING) if faithful else FAST
        rec["over"] = [k for k, v in bound.items() if not rec["error"][k] <= v]
        if flips:
            same = run_loop(p, x, torch.float64, act, last, w, kind, states > 0)[2]
            rec["same_masks"] = {k: relative(v, same[k]) for k, v in g.items()}
            rec["over"] += [f"{k}, same masks" for k, v in rec["same_masks"].items() if not v <= clean]
        if flips > max(1, MANY[precision] * states.numel()):
            rec["over"].append("flips")
        rec["ok"] = rec["same_bits"] and not rec["over"]
        records.append(rec)
    return records


def cases(quick):
    base = dict(n=100, c=6, R=2, B=3, T=15, kind="x", F=1, activation="relu", last=True, h_0=True, u_init="shift")

    def case(**k):
        return base | k | {"seed": zlib.crc32(str(sorted(k.items())).encode()) % 1000}

    Ts, Bs = ((1, 15), (1, 3)) if quick else ((1, 2, 15, 63), (1, 3))
    for n, c in itertools.product((3, 100) if quick else (3, 100, 256), (1, 6, 16, 27)):
        for T, B in itertools.product(Ts, Bs):
            yield case(n=n, c=c, T=T, B=B, F=1 + (c == 27))
            yield case(n=n, c=c, T=T, B=B, kind="tokens", F=3 if n * c > 2000 else 10, last=False)
    for T, B in ((1, 1), (2, 1), (15, 3), (16, 4)):
        yield case(n=97, c=5, T=T, B=B, F=2, last=False)
        yield case(n=97, c=5, T=T, B=B, kind="rows", F=4)
        yield case(n=256, c=16, T=T, B=B, kind="rows", F=4)
        yield case(n=256, c=16, T=T, B=B, kind="rows", F=4, last=False)
        yield case(n=100, c=6, T=T, B=B, F=7)  # more features than the kernel takes: a table of drives
        for act in ("tanh", "identity"):
            yield case(n=100, c=6, T=T, B=B, activation=act, last=False)
            yield case(n=97, c=16, T=T, B=B, activation=act)
    yield case(n=5, c=17, T=7, B=2)
    yield case(n=33, c=20, T=20, B=2, last=False)
    yield case(n=100, c=16, T=30, B=3, h_0=False, u_init="random")
    if not quick:
        yield case(n=100, c=6, T=300, B=128, kind="tokens", F=10, last=False)
        yield case(n=100, c=27, T=300, B=16, F=2)
        yield case(n=256, c=16, T=300, B=32)
        yield case(n=512, c=16, T=20, B=2)
        yield case(n=256, c=16, T=784, B=8, R=1)
        yield case(n=100, c=27, T=1000, B=8, F=2, R=1)
        yield case(n=256, c=16, T=300, B=16, R=1, kind="rows", F=8)


def compile_everything(todo):
    "All kernels at once, on all cores."
    jobs, start = [], time.time()
    for k, precision in itertools.product(todo, ("faithful", "fast")):
        device, n, c, R, B, act = torch.device("cuda", 0), k["n"], k["c"], k["R"], k["B"], k["activation"]
        F = k["F"] if k["kind"] == "x" and k["F"] <= K.FEATURES else 0
        if k["kind"] == "x":
            p = K.plan_for(device, n, c, F, act, precision, not k["last"], R * B, emit=1)
        else:
            own = k["T"] // 3
            many = k["F"] if k["kind"] == "tokens" else k["T"] - own + own * B + 2
            p = K.rows_plan_for(device, n, c, many, R, B, act, precision, not k["last"])
        jobs.append((K.SOURCE, p.macros(False)))
        for states, keep in ((not k["last"], True), (True, False)):
            q = K.plan_for(device, n, c, F, act, precision, states, R * B, keep=keep, mt=p.mt)
            jobs.append((K.SOURCE, q.macros(True)))
    return {"modules": compile_all(jobs), "seconds": round(time.time() - start, 1)}


def kept_states(p, kept):  # [R,B,T+1,words] -> [R,B,T+1,c,n]
    "The states as they are stored for backward, out of fragment order."
    v = kept[..., : p.kept_terms * p.tile].contiguous().view(torch.bfloat16).float()
    # term, warp, slot, channel tile, group, lane in it, pair
    v = v.view(*kept.shape[:3], p.kept_terms, p.warps, 2 * p.mt, p.cq, 8, 4, 2).sum(3)
    v = v.permute(0, 1, 2, 5, 7, 8, 3, 6, 4)
    return v.reshape(*kept.shape[:3], 8 * p.cq, -1)[..., : p.c, : p.n]


def long_runs(bits=((8, 12), (8, 10), (7, 11), (0, 8)), B=8):
    "Long sequences: y and du against float64, beside the float32 loop, for ways to shorten first terms (state, weight)."
    sizes = (256, 16, 784, 1, 0), (256, 16, 784, 1, 1), (100, 27, 1000, 2, 0), (100, 6, 500, 1, 0), (48, 8, 300, 1, 0)
    out = []

    def plan(n, c, F, state_bits, weight_bits):
        device, more = torch.device("cuda", 0), dict(state_bits=state_bits, weight_bits=weight_bits)
        return K.plan_for(device, n, c, F, "relu", "faithful", False, B, **more)

    plans = [plan(n, c, F, *two) for n, c, _, F, _ in sizes for two in bits]
    compile_all([(K.SOURCE, p.macros(f)) for p in plans for f in (True, False)])
    for n, c, T, F, seed in sizes:
        p, x = problem(n, c, 1, B, T, "x", F, seed)
        w = torch.randn(1, B, c, n, generator=torch.Generator().manual_seed(seed)).cuda() / (B * c * n) ** 0.5
        ref, ref_states, ref_g = run_loop(p, x, torch.float64, "relu", True, w, "x")
        f32, _, f32_g = run_loop(p, x, torch.float32, "relu", True, w, "x")
        row = dict(n=n, c=c, T=T, seed=seed, float32={"y": relative(f32, ref), "u": relative(f32_g["u"], ref_g["u"])})
        for state_bits, weight_bits in bits:
            k = plan(n, c, F, state_bits, weight_bits)
            xc, V = x.cuda(), p["V"].permute(0, 3, 1, 2).contiguous()
            y, kept = K.run_forward(k, p["u"], V, p["b"], p["h_0"], xc, T, B)
            du = K.run_backward(k, w, p["u"], xc, kept, T, B)["u"]
            flips = int(((kept_states(k, kept)[:, :, 1:].permute(0, 2, 1, 3, 4) > 0) != (ref_states > 0)).sum())
            row[f"{state_bits},{weight_bits}"] = {"y": relative(y, ref), "u": relative(du, ref_g["u"]), "flips": flips}
        print(rounded(row), flush=True)
        out.append(row)
    return out


def diverging():
    "R = 3, one run explodes: the other two must not notice."
    p, x = problem(100, 6, 3, 4, 60, "x", 1, 5)
    alone = run_states(p, x, "relu", True, "faithful", "x")
    q = {k: v.clone() for k, v in p.items()}
    q["u"][1] = 1e6
    with_bad = run_states(q, x, "relu", True, "faithful", "x")
    found = {
        "others_same_bits": torch.equal(alone[[0, 2]], with_bad[[0, 2]]),
        "bad_is_not_finite": not bool(torch.isfinite(with_bad[1]).all()),
    }
    assert all(found.values()), found
    return found


def graph():
    "Forward and backward in a CUDA graph give the same bits as outside."
    p, x = problem(100, 6, 2, 4, 20, "x", 1, 6)
    w = torch.randn(2, 4, 6, 100, device="cuda")
    y, g = run_kernel(p, x, "relu", True, "faithful", w, "x")
    q = leaves(p, x, "x")

    def step():
        out = run_value(q, x, "relu", True, "faithful", "x")
        return out, torch.autograd.grad((out * w).sum(), list(q.values()))

    s = torch.cuda.Stream()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        step()
    torch.cuda.current_stream().wait_stream(s)
    cg = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cg):
        out, grads = step()
    cg.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, y) and all(torch.equal(a, g[k]) for k, a in zip(q, grads, strict=True))
    return {"same_bits": True}


def opcheck():
    "torch.library.opcheck on the two forward operators; gradients of dx checked above."
    p, x = problem(12, 2, 2, 3, 5, "x", 1, 7)
    q = leaves(p, x, "x")
    index = torch.randint(0, 4, (1, 5, 3), device="cuda")
    table = torch.randn(2, 4, 2, 12, device="cuda", requires_grad=True)
    calls = {
        "wave": (q["x"], q["u"], q["V"], q["b"], q["h_0"], "relu", True, True, "faithful"),
        "rows": (index, None, None, table, q["u"], q["h_0"], "relu", False, True, "faithful"),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.wave_rnns, f"{name}_forward").default, arguments)
    return dict.fromkeys(calls, "ok")


def fallbacks():
    "What cannot run says so once and gives the reference's result."
    out = {}
    for name, n, c, k in (("c=40", 16, 40, 3), ("kernel size 5", 16, 4, 5), ("float64", 16, 4, 3)):
        like = {"device": "cuda", "dtype": torch.float64 if name == "float64" else torch.float32}
        u, V, b = torch.randn(c, c, k, **like) * 0.05, torch.randn(c, n, 1, **like), torch.zeros(c, n, **like)
        x = torch.rand(6, 2, 1, **like)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            y = wave_scan(x, u, V, b)
            wave_scan(x, u, V, b)
        out[name] = {"error": relative(y, wave_loop(x, u, V, b).double()), "warnings": [str(m.message) for m in seen]}
        assert out[name]["error"] < 1e-6 and len(seen) <= 1, out[name]
    return out


SANITIZED = """
import sys; sys.path.insert(0, {root!r})
import torch
from wave_rnns.scan import Rows, rows, wave_scan
torch.manual_seed(0)
for n, c, last, kind in ((24, 6, True, "x"), (19, 5, False, "x"), (64, 16, True, "rows"), (20, 27, True, "x"), (24, 6, False, "tokens")):
    for precision in ("faithful", "fast") if c == 6 else ("faithful",):
        T, B, F = 6, 2, 1 if kind == "x" else 4
        u = (torch.randn(c, c, 3, device="cuda") * 0.2).requires_grad_()
        V, b = torch.randn(c, n, F, device="cuda").requires_grad_(), torch.zeros(c, n, device="cuda").requires_grad_()
        x = torch.rand(T, B, F, device="cuda") if kind == "x" else torch.randint(0, F, (T, B), device="cuda")
        if kind == "rows": x = rows(torch.rand(3000, F, device="cuda"), torch.arange(T, device="cuda")[:, None].expand(T, B).contiguous())
        wave_scan(x, u, V, b, None, "relu", last, precision).sum().backward()
torch.cuda.synchronize()
print("ran")
"""


def sanitizer():
    "memcheck and racecheck on a small run."
    tool, out = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer", {}
    if not Path(tool).exists():
        return {"skipped": "compute-sanitizer not found"}
    script = SANITIZED.format(root=str(Path(__file__).resolve().parents[2]))
    subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)  # fills the kernel cache
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        start = time.time()
        # only our kernels: the tensor library's own are not under test and take minutes
        command = [tool, "--tool", check, "--kernel-regex", "kns=wave_", "--error-exitcode", "9"]
        if check == "memcheck":  # cuda.bindings asks for functions that an older driver lacks: no error
            command += ["--report-api-errors", "no"]
        command += [sys.executable, "-c", script]
        try:
            r = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ)
            ok, output = r.returncode == 0 and "ran" in r.stdout, (r.stdout + r.stderr)[-1500:]
        except subprocess.TimeoutExpired:
            ok, output = False, "timed out"
        out[check] = {"ok": ok, "seconds": round(time.time() - start, 1), "output": output}
    return out


def rounded(x):
    "Three significant digits are enough for errors."
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    return float(f"{x:.3g}") if isinstance(x, float) else x


def worst_errors(rows):
    "The largest error of each quantity, by precision and by whether a mask flipped."
    table = {}
    for precision, flipped in itertools.product(("faithful", "fast"), (False, True)):
        some = [r for r in rows if r["precision"] == precision and bool(r["flips"]) == flipped]
        ratios = [r["error"]["y"] / max(r["float32"]["y"], ROUNDING) for r in some]
        entry = {"cases": len(some), "y_over_float32": max(ratios, default=0)}
        for r in some:
            for k, v in (r["error"] | {f"{k}, same masks": v for k, v in r.get("same_masks", {}).items()}).items():
                entry[k] = max(entry.get(k, 0), v)
        table[f"worst_{precision}{'_flipped' if flipped else ''}"] = entry
        print(precision, "flipped" if flipped else "clean", rounded(entry), flush=True)
    return table


def main():
    chosen = options(__doc__, only=dict(default="", help="cases that have this in them"))
    todo = [k for k in cases(chosen.quick) if chosen.only in str(k)]
    record = {"compiled": compile_everything(todo), "cases": []}
    print(record["compiled"], flush=True)
    for k in todo:
        try:
            found = one(k)
        except Exception as e:
            found = [dict(k, ok=False, precision="?", failed=repr(e)[:600])]
        record["cases"] += found
        for rec in found:
            if not rec["ok"]:
                print("BAD", rounded(rec), flush=True)
    record |= worst_errors([r for r in record["cases"] if "error" in r])
    more = [long_runs, diverging, graph, opcheck, fallbacks, sanitizer]
    for f in more:
        try:
            record[f.__name__] = f()
        except Exception as e:
            record[f.__name__] = {"failed": repr(e)[:600]}
        print(f.__name__, json.dumps(record[f.__name__])[:1500], flush=True)
    bad = sum(not r["ok"] for r in record["cases"])
    record["ok"] = not bad and all("failed" not in record[f.__name__] for f in more)
    found = record.get("sanitizer", {})
    record["ok"] &= all(found[tool]["ok"] for tool in ("memcheck", "racecheck") if tool in found)
    save(chosen.out / "check_wave.json", rounded(record))
    print(f"{len(record['cases'])} cases, {bad} out of bounds", flush=True)
    return int(not record["ok"])


if __name__ == "__main__":
    sys.exit(main())

"""Speed of a dense scan that is too wide to fuse: a launch a step, beside PyTorch's own products and cuDNN, in one run.

python tests/gpu/bench_wide.py --out DIR [--quick]      writes DIR/bench_wide.json
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_dense import in_a_graph, milliseconds, problem
from check_dense import error, precompile

from wave_rnns.core import atomic_write, environment, to_json
from wave_rnns.kernels.wave import architecture_for
from wave_rnns.kernels.wide import (
    OUTER,
    SOURCE,
    TILES,
    WideBackend,
    WidePlan,
    outer_sum,
    scan_backward,
    scan_forward,
    wide_plan_for,
)
from wave_rnns.scan import BACKENDS, dense_scan

SHAPES = {"nsCIFAR10 iRNN": (1000, 256, 529), "copy iRNN": (500, 128, 625)}


def tiles(m):
    return [WidePlan(m, *tile) for tile in TILES]


def time_parts(plan, R, T, B):
    "Milliseconds a run of the two scans and of dU, each as a CUDA graph."
    drive, U, gy = problem(R, T, B, plan.m)
    states, ddrive, end, dh_0 = (torch.empty_like(t) for t in (drive, drive, gy, gy))
    parts = {
        "forward": lambda: scan_forward(plan, drive, U, None, "relu", states, end),
        "backward": lambda: scan_backward(plan, gy, U, states, "relu", True, ddrive, dh_0),
        "dU": lambda: outer_sum(plan, ddrive, states, None, "relu", True, OUTER),
    }
    return {k: {q: v / R for q, v in in_a_graph(f).items()} for k, f in parts.items()}


def whole(backend, R, T, B, m):
    "Milliseconds a run of forward and backward through the operator's backend as a CUDA graph; and what came out."
    drive, U, gy = problem(R, T, B, m)
    out = []

    def work():
        y, kept = backend.dense_forward(drive, U, None, "relu", True, True, "faithful")
        out[:] = (y, *backend.dense_backward(gy, drive, U, None, y, kept, "relu", True, "faithful"))

    ms = {q: v / R for q, v in in_a_graph(work).items()}
    return ms, [t.clone() for t in out]


def cudnn(T, B, m):
    "nn.RNN, without tf32, and our layer on the same input: forward and backward, called from Python and as a CUDA graph."
    torch.manual_seed(0)
    rnn = torch.nn.RNN(1, m, nonlinearity="relu").cuda()
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.eye(m) * 0.95 + torch.randn(m, m) * 0.1 / m**0.5)
        rnn.bias_hh_l0.zero_()
    x, gy = torch.rand(T, B, 1, device="cuda"), torch.randn(B, m, device="cuda")
    weights = [rnn.weight_hh_l0, rnn.weight_ih_l0, rnn.bias_ih_l0]
    rows, outputs = {}, {}
    for name, forward in {"nn.RNN": lambda: rnn(x)[0][-1], "ours": lambda: dense_scan(x, *weights, last=True)}.items():

        def work(forward=forward):
            y = forward()
            return y, torch.autograd.grad(y, weights, gy)

        outputs[name] = work()[0].detach()
        rows[name] = {"eager": milliseconds(work, 7, 2)}
        try:
            rows[name]["graph"] = in_a_graph(work)
        except Exception as e:
            rows[name]["graph_error"] = f"{type(e).__name__}: {e}"[:300]
    rows["difference"] = error(outputs["ours"][None], outputs["nn.RNN"][None])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one shape, one and two runs, no other tiles")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    start, record = time.time(), {"environment": environment(), "rows": [], "tiles": [], "cudnn": {}}
    processors, arch = (
        torch.cuda.get_device_properties(0).multi_processor_count,
        architecture_for(torch.cuda.get_device_capability()),
    )
    shapes = dict(list(SHAPES.items())[: 1 if options.quick else None])
    precompile(
        [(p.macros("relu", b), arch) for _, _, m in shapes.values() for p in tiles(m) for b in (False, True)], SOURCE
    )

    def save():
        record["seconds"] = time.time() - start
        atomic_write(options.out / "bench_wide.json", to_json(record, indent=1))

    for name, (T, B, m) in shapes.items():
        for R in (1, 2) if options.quick else (1, 2, 4, 16):
            row = {"name": name, "T": T, "B": B, "m": m, "R": R}
            plan = wide_plan_for(m, B, R, processors)
            row |= {"plan": dataclasses.asdict(plan)} | time_parts(plan, R, T, B)
            row["whole"], ours = whole(WideBackend(), R, T, B, m)
            if R <= 4:
                row["torch"], theirs = whole(BACKENDS["torch"], R, T, B, m)
                row["difference"] = [error(a, b) for a, b in zip(ours, theirs, strict=True)]
            record["rows"].append(row)
            print(
                {k: round(v["median"], 2) if "median" in v else v for k, v in row.items() if isinstance(v, dict)},
                flush=True,
            )
            save()
        if not options.quick:
            record["cudnn"][name] = cudnn(T, B, m)
            print(record["cudnn"][name], flush=True)
    for R in () if options.quick else (1, 2, 4, 16):
        for plan in tiles(529):
            parts = time_parts(plan, R, 100, 256)
            record["tiles"].append({"R": R, "T": 100, "B": 256, "plan": dataclasses.asdict(plan)} | parts)
        best = min((r for r in record["tiles"] if r["R"] == R), key=lambda r: r["forward"]["median"])
        print(f"R={R}: fastest tile {best['plan']}", flush=True)
        save()
    print(f"bench_wide: {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()

"""What a training step is made of, kernel by kernel; and one launch of the wide scan, as NVIDIA's profiler sees it.

python tests/gpu/bench_steps.py --out DIR      writes DIR/copy_step.json and, where `ncu` is installed, DIR/wide_profile.json
"""

import argparse
import csv
import io
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_dense import milliseconds, problem

from wave_rnns.core import atomic_write, environment, to_json
from wave_rnns.paper.experiments import EXPERIMENTS
from wave_rnns.kernels.wide import WideBackend
from wave_rnns.paper.models import StepsLinear
from wave_rnns.paper.tasks import make_task
from wave_rnns.paper.training import Population, RunSettings

PROFILED = (("copy80_wrnn", 4), ("copy80_wrnn", 16), ("copy80_irnn", 4))
TIMED = [(name, R) for name in ("copy80_wrnn", "copy80_irnn") for R in (1, 4, 16, 64)]
LONGEST, NAME, STEPS = 22, 150, 3  # kernels kept of a step, characters kept of a name, steps profiled
WIDE = {"R": 2, "T": 12, "B": 256, "m": 529}
SKIP, COUNT = 20, 2  # launches of the wide scan that pass before the profiler looks, and those it looks at

# The profiler's name of a metric -> ours, and what one of its units is in ours.
METRICS = {
    "DRAM Throughput": ("dram_percent", {"%": 1}),
    "Elapsed Cycles": ("elapsed_cycles", {"cycle": 1}),
    "Executed Ipc Active": ("ipc_active", {"inst/cycle": 1}),
    "Executed Ipc Elapsed": ("ipc_elapsed", {"inst/cycle": 1}),
    "Issue Slots Busy": ("issue_busy_percent", {"%": 1}),
    "L2 Cache Throughput": ("l2_percent", {"%": 1}),
    "Duration": ("microseconds", {"ns": 1e-3, "us": 1, "usecond": 1, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}),
    "No Eligible": ("no_eligible_percent", {"%": 1}),
    "Achieved Occupancy": ("occupancy_percent", {"%": 1}),
    "Registers Per Thread": ("registers", {"register/thread": 1}),
    "SM Frequency": ("sm_ghz", {"hz": 1e-9, "mhz": 1e-3, "ghz": 1, "cycle/nsecond": 1, "cycle/usecond": 1e-3}),
}


def step_of(name, R):
    "A training step of R runs of an experiment, as one CUDA graph."
    e = EXPERIMENTS[name]
    task = make_task(e.task, **e.task_options)
    runs = [RunSettings(seed, e.lr, e.clip) for seed in range(R)]
    return Population(task, e.model, runs, torch.device("cuda")).step_function(graph=True)


def kernels_of(step):
    "The longest kernels of a step, microseconds and launches a step, and microseconds of them all."
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    rows = [
        {"name": k.key[:NAME], "launches": k.count / STEPS, "us": round(k.self_device_time_total / STEPS, 1)}
        for k in profile.key_averages()
        if k.self_device_time_total
    ]
    rows.sort(key=lambda row: -row["us"])
    return {"kernels": rows[:LONGEST], "total_us": round(sum(row["us"] for row in rows), 1)}


def both_readouts(name, R):
    "Milliseconds a step with the readout's gradient as one product, and in pieces of time, round by round."
    with patch.object(StepsLinear, "forward", torch.nn.Linear.forward):
        one = step_of(name, R)
    pieces, laps = step_of(name, R), ([], [])
    for _ in range(5):
        for step, lap in zip((one, pieces), laps, strict=True):
            lap.append(milliseconds(step, 15)["median"])
    row = {"experiment": name, "R": R}
    for way, lap in zip(("one_product", "in_pieces"), laps, strict=True):
        row[f"{way}_ms"] = round(statistics.median(lap), 4)
        row[f"{way}_range"] = [round(min(lap), 4), round(max(lap), 4)]
    return row


def wide_launches():
    "What the profiler looks at."
    drive, U, _ = problem(WIDE["R"], WIDE["T"], WIDE["B"], WIDE["m"])
    for _ in range(3):
        WideBackend().dense_forward(drive, U, None, "relu", True, True, "faithful")
    torch.cuda.synchronize()


def read_ncu(text):
    "The launches in the profiler's CSV: one dictionary each, with the names and units of METRICS."
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    launches = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row["Metric Name"] in METRICS and row["Metric Value"]:
            name, units = METRICS[row["Metric Name"]]
            value = float(row["Metric Value"].replace(",", "")) * units[row["Metric Unit"].lower()]
            launches.setdefault(row["ID"], {"grid": row["Grid Size"]})[name] = round(value, 4)
    return list(launches.values())


def profile_wide(out):
    "Write wide_profile.json from a run of this script under ncu."
    command = ["ncu", "--set", "full", "--csv", "--page", "details", "-k", "regex:wide_step"]
    command += ["--launch-skip", str(SKIP), "-c", str(COUNT), "--target-processes", "all"]
    run = subprocess.run(
        [*command, sys.executable, __file__, "--launches"], capture_output=True, text=True, timeout=300
    )
    try:
        launches = read_ncu(run.stdout)
    except (StopIteration, KeyError, ValueError) as e:
        raise SystemExit(
            f"ncu gave no table that can be read ({e!r}):\n{run.stdout[-3000:]}\n{run.stderr[-1000:]}"
        ) from e
    grid = [int(x) for x in launches[0]["grid"].strip("() ").split(",")]
    launches = [{k: v for k, v in launch.items() if k != "grid"} for launch in launches]
    what = (
        f"ncu --set full on one forward step, T={WIDE['T']} B={WIDE['B']} m={WIDE['m']} R={WIDE['R']}, launches {SKIP + 1} to {SKIP + COUNT}, "
        "clocks fixed by the tool, caches flushed before it"
    )
    record = {"what": what, "environment": environment(), "kernel": "wide_step", "grid": grid, "launches": launches}
    atomic_write(out / "wide_profile.json", to_json(record, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--launches", action="store_true", help="only the launches that the profiler looks at")
    options = parser.parse_args()
    if options.launches:
        return wide_launches()
    if not options.out:
        parser.error("--out DIR says where the records go")
    options.out.mkdir(parents=True, exist_ok=True)
    what = (
        f"what a training step of the copy task is made of (torch.profiler, the {LONGEST} longest kernels of a step in a CUDA graph, "
        "microseconds a step), and milliseconds a step with the readout's gradient as one product and in pieces of time, taken in turns"
    )
    steps = [{"experiment": name, "R": R} | kernels_of(step_of(name, R)) for name, R in PROFILED]
    record = {"what": what, "environment": environment(), "steps": steps, "readout": []}
    for name, R in TIMED:
        record["readout"].append(both_readouts(name, R))
        print(record["readout"][-1], flush=True)
        torch.cuda.empty_cache()
    atomic_write(options.out / "copy_step.json", to_json(record, indent=1))
    if shutil.which("ncu"):
        profile_wide(options.out)
        print("wide_profile.json written")
    else:
        print("ncu is not installed: no wide_profile.json")


if __name__ == "__main__":
    main()

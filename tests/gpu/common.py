"What the scripts of this folder share: their options, compiling side by side, and the record that they write."

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from wave_rnns.core import atomic_write, environment, to_json
from wave_rnns.kernels.launch import architecture_for, compile_kernel

ROUNDING = 2.0**-24  # a float32 result is at least once rounded; a loop that does better on a few numbers was lucky
MANY = {"faithful": 1e-5, "fast": 1e-3}  # so many of all rectifiers may flip (one always may)
START = time.time()


def options(doc, quick="a few sizes only", **more):
    "--out, --quick and `more`: {name: keywords of add_argument}. From here on, float32 is float32."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    for name, keywords in more.items():
        parser.add_argument(f"--{name}", **keywords)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return chosen


def compile_all(jobs) -> int:
    "Fill the cache on all cores with pairs of source and macros. -> how many modules"
    arch = architecture_for(torch.cuda.get_device_capability())
    unique = {(source, tuple(sorted(macros.items()))) for source, macros in jobs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: compile_kernel(job[0], dict(job[1]), arch), unique))
    return len(unique)


def save(path, record, indent=1) -> None:
    "The record with its machine and the seconds since the start."
    record = {"environment": environment(), "seconds": time.time() - START} | record
    atomic_write(path, to_json(record, indent) + "\n")

"""Ten thousand tiny runs through one sweep: do memory, open files and the time for a run stay what they are?

    python tests/soak.py --runs 10000 --out nbs/results/soak.json

takes some ten minutes on two cores, and makes the record that notebook 17 draws. Every second each worker, and the process that started
them, is looked at from outside, in /proc (so: Linux only)."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wave_rnns.core import atomic_write, environment, to_json
from wave_rnns.paper.sweeps import grid_from, sweep

WORKERS, ROWS = 2, 200
WARM = 0.2  # share of the runs after which everything has been loaded, compiled and cached


def soak_grid(runs: int, together: int = 100) -> dict:
    "As little work as a run can be, so that what surrounds it shows."
    return {
        "name": "soak",
        "experiments": ["copy0_wrnn"],
        "axes": {
            "model.n": [4], "model.c": [1], "steps": [4], "eval_every": [4], "log_every": [2], "lr": [1e-2],
            "task_options.batch_size": [2], "task_options.valid_size": [8], "task_options.test_size": [8],
        },
        "seeds": list(range(runs)),
        "together": together,
    }  # fmt: skip


def look_at(pid: int) -> dict:
    "Memory, open files, threads and processor seconds of a process. Raises OSError where there is none."
    proc = Path(f"/proc/{pid}")
    fields = (proc / "stat").read_text().rsplit(")", 1)[1].split()
    return {
        "rss_mb": int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "fds": len(os.listdir(proc / "fd")),
        "threads": int(fields[17]),
        "cpu_seconds": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
    }


def children() -> list[int]:
    "Workers: processes that we started, in the order in which they were."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return sorted(found)


class Sampler(threading.Thread):
    "Looks every `every` seconds until told to stop."

    def __init__(self, results: Path, every: float):
        super().__init__(daemon=True)
        self.results, self.every, self.over, self.begin = results, every, threading.Event(), time.time()
        self.file = tempfile.TemporaryFile("w+")  # rows in memory would grow, in a process that is looked at

    def run(self) -> None:
        while not self.over.wait(self.every):
            self.look()

    def look(self) -> None:
        workers = []
        for pid in children():
            try:
                workers.append(look_at(pid))
            except OSError:  # it has just ended
                continue
        done = sum(name.endswith(".json") for name in os.listdir(folder)) if (folder := self.folder()).exists() else 0
        row = {"seconds": time.time() - self.begin, "done": done, "workers": workers, "sweep": look_at(os.getpid())}
        self.file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        self.file.seek(0)
        return list(map(json.loads, self.file))

    def folder(self) -> Path:
        return self.results / "runs" / "copy"


def slope(xs: list[float], ys: list[float]) -> float:
    "Of the straight line through the points."
    return statistics.linear_regression(xs, ys).slope if len(set(xs)) > 1 else 0.0


def at(rows: list[dict], done: float, what) -> float:
    "`what(row)` at the moment when so many runs were done, between two looks in proportion."
    for a, b in zip(rows, rows[1:], strict=False):
        if a["done"] <= done <= b["done"] and a["done"] < b["done"]:
            return what(a) + (what(b) - what(a)) * (done - a["done"]) / (b["done"] - a["done"])
    raise ValueError(f"never were {done} runs done")


def by_decile(rows: list[dict], runs: int, what) -> list[float]:
    "How much `what` grew with each tenth of the runs, for a run."
    marks = [at(rows, runs * k / 10, what) for k in range(11)]
    return [(b - a) / (runs / 10) for a, b in zip(marks, marks[1:], strict=False)]


def verdict(rows: list[dict], runs: int) -> dict:
    "The numbers that must be flat."
    started = next(i for i, row in enumerate(rows) if row["done"]) - 1
    rows = rows[max(0, started) :]  # what importing takes is no time for a run
    full = [row for row in rows if len(row["workers"]) == WORKERS and row["done"] < runs]
    warm = [row for row in full if row["done"] >= WARM * runs] or full
    done = [row["done"] / 1000 for row in warm]
    memory = [[row["workers"][k]["rss_mb"] for row in warm] for k in range(WORKERS)]
    memory.append([row["sweep"]["rss_mb"] for row in warm])
    tenths = [[row for row in full if k * runs / 10 <= row["done"] < (k + 1) * runs / 10] for k in range(10)]
    most = [max((w["fds"] for row in tenth for w in row["workers"]), default=None) for tenth in tenths]
    wall = by_decile(rows, runs, lambda row: row["seconds"])
    cpu = by_decile(
        [row for row in rows if len(row["workers"]) == WORKERS],
        full[-1]["done"],
        lambda row: sum(w["cpu_seconds"] for w in row["workers"]),
    )
    return {
        "memory_mb_per_1000_runs": {
            "worker_0": slope(done, memory[0]), "worker_1": slope(done, memory[1]), "sweep": slope(done, memory[2])
        },
        "memory_mb": {name: [min(m), max(m)] for name, m in zip(("worker_0", "worker_1", "sweep"), memory, strict=True)},
        "most_open_files_by_decile": most,
        "threads": [min(w["threads"] for r in full for w in r["workers"]), max(w["threads"] for r in full for w in r["workers"])],
        "seconds_per_run_by_decile": wall,
        "cpu_seconds_per_run_by_decile": cpu,
        "last_over_first_decile": {"seconds": wall[-1] / wall[0], "cpu_seconds": cpu[-1] / cpu[0]},
    }  # fmt: skip


def rounded(value, digits: int = 5):
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def thinned(rows: list[dict], most: int = ROWS) -> list[dict]:
    "The first, the last, and others spread evenly."
    if len(rows) <= most:
        return rows
    return [rows[round(k * (len(rows) - 1) / (most - 1))] for k in range(most)]


def soak(runs: int, together: int = 100, every: float = 1.0, folder: Path | None = None) -> dict:
    "Sweep, and look on."
    grid = grid_from(soak_grid(runs, together))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        sampler, begin = Sampler(Path(scratch), every), time.time()
        sampler.start()
        end = sweep(grid, Path(scratch), "cpu", WORKERS, progress=sys.stderr.isatty(), checkpoint_seconds=0)
        seconds = time.time() - begin
        sampler.over.set()
        sampler.join()
        sampler.look()
        rows = sampler.rows()
        assert (end.over, len(end.failed)) == (runs, 0), f"{end.over} of {runs} runs ended, {len(end.failed)} failed"
    return rounded({
        "runs": runs, "seconds": seconds, "together": together, "workers": WORKERS, "looked_every_seconds": every,
        "grid": {**soak_grid(0, together), "seeds": f"0 to {runs - 1}"}, "environment": environment(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load_average": os.getloadavg()[2],
        "verdict": verdict(rows, runs), "looks": len(rows), "rows": thinned(rows),
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--together", type=int, default=100, help="runs in one training loop")
    parser.add_argument("--out", type=Path, help="where to write the record; printed only, if left out")
    options = parser.parse_args()
    record = soak(options.runs, options.together)
    if options.out:
        head = {k: v for k, v in record.items() if k != "rows"}
        rows = ",\n  ".join(json.dumps(row, sort_keys=True) for row in record["rows"])
        atomic_write(options.out, to_json(head, indent=1)[:-2] + f',\n "rows": [\n  {rows}\n ]\n}}\n')
    print(to_json({"seconds": record["seconds"], **record["verdict"]}, indent=1))


if __name__ == "__main__":
    main()

"""Sweeps whose workers are killed, stopped and woken at random moments: in the end each run has one record, that of a sweep in peace.

`WAVE_RNNS_CHAOS` sets the number of sweeps (3 unless set), `WAVE_RNNS_CHAOS_SEED` repeats the choices of an earlier time, though not
the moments at which they fall."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
from conftest import state_of

import wave_rnns.paper.sweeps as sw
import wave_rnns.paper.workers as wk
from wave_rnns.core import WaveRNNError
from wave_rnns.paper.checkpoints import listen_for
from wave_rnns.paper.grids import grid_from
from wave_rnns.paper.records import read_record
from wave_rnns.paper.training import Interrupted, Training

SWEEPS = int(os.environ.get("WAVE_RNNS_CHAOS", 3))
SEED = int(os.environ.get("WAVE_RNNS_CHAOS_SEED", time.time_ns() % 1_000_000))
PATIENCE = 120  # seconds after the last disturbance within which a sweep must be through
GRID = {
    "name": "chaos",
    "experiments": ["copy0_wrnn"],
    "axes": {
        "task_options.batch_size": [2], "task_options.valid_size": [8], "task_options.test_size": [8],
        "model.n": [4, 5, 6], "model.c": [1], "model.activation": ["identity"], "steps": [24], "eval_every": [8], "log_every": [2], "clip": [0],
        "lr": [1e-2, 1e-3, 1e12],  # the last one diverges: failures are records too, and must not be lost either
    },
    "seeds": [0, 1],
    "together": 3,
}  # fmt: skip
HALVED = {**GRID, "name": "halved", "together": 6, "halving": [[8, 4], [16, 1]]}  # each population of six is a search
CLOCKS = ("seconds", "steps_per_second", "finished", "environment", "sha256")  # what two equal runs need not share


def until(condition, seconds: float = PATIENCE):
    "Wait for what must come; what it was, if it does not."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)
    return found


def worker(grid: dict, results: str, slow: float) -> int:
    "One worker, slowed down so that a signal can hit anything; its exit code is a command's."
    real_step, real_fsync = Training.make_step, os.fsync

    def make_step(self, graph=None):
        real_step(self, graph)
        time.sleep(slow)

    def fsync(fd):
        real_fsync(fd)
        time.sleep(slow / 4)

    Training.make_step, os.fsync = make_step, fsync
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with listen_for(wk.STOPPING) as asked:
        try:
            whole = grid_from(grid)
            failed = sw.work(whole.runs(), Path(results), "cpu", whole.together, interrupt=asked, checkpoint_seconds=0)
        except Interrupted as e:
            return e.exit_code
    return 2 if failed else 0


def numbers(results: Path) -> dict[str, tuple]:
    "Record and curve of each run, without clocks."
    found = {}
    for path in Path(results).glob("runs/*/*.json"):
        record = {k: v for k, v in read_record(path).items() if k not in CLOCKS}
        found[path.stem] = json.dumps(record, sort_keys=True), path.with_suffix(".csv").read_bytes()
    return found


def is_clean(results: Path) -> bool:
    "Is nothing left but records, curves and weights?"
    return not [*results.rglob("*.tmp"), *results.glob("checkpoints/*")]


def is_through(nursery, grid, results) -> bool:
    "A last worker, undisturbed, does what is left."
    return start(nursery, results, grid=grid).end() == 0 and is_clean(results)


def start(nursery, results: Path, slow: float = 0.0, *, grid: dict = GRID):
    return nursery("test_chaos:worker", grid, str(results), slow)


def stop_when(life, condition) -> None:
    "Freeze a worker at a moment at which the condition holds: it is looked at while the worker cannot move."
    while True:
        life.send(signal.SIGSTOP)
        until(lambda: state_of(life.pid) in ("T", "Z"))
        if condition():
            return
        assert life.alive(), "it was through before the moment came"
        life.send(signal.SIGCONT)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    "Grid -> what it gives in peace, by a single worker."
    results = {"chaos": tmp_path_factory.mktemp("chaos"), "halved": tmp_path_factory.mktemp("halved")}
    assert is_through(nursery, GRID, results["chaos"]) and is_through(nursery, HALVED, results["halved"])
    found = {name: numbers(folder) for name, folder in results.items()}
    assert list(map(len, found.values())) == [18, 18]
    return found


def begun(results: Path) -> list[Path]:
    return list(results.glob("checkpoints/*.safetensors"))


@pytest.mark.parametrize("number", range(SWEEPS))
def test_chaos(nursery, undisturbed, tally, tmp_path, number):
    "Three workers, started at once; one after the other is killed, asked to stop, or frozen for a while, and replaced."
    chance, results = random.Random(SEED + number), tmp_path / "results"
    grid = chance.choice([GRID, HALVED])
    fresh = functools.partial(start, nursery, results, 0.02, grid=grid)
    workers, seen = [fresh() for _ in range(3)], {}
    counts = {"kills": 0, "stops": 0, "frozen": 0}
    for _ in range(8):
        time.sleep(chance.uniform(0, 0.4))
        for path in results.glob("runs/*/*.json"):  # a record that is there never changes
            assert seen.setdefault(path, path.read_bytes()) == path.read_bytes()
        k = chance.randrange(len(workers))
        if not workers[k].alive():
            workers[k].end()
            workers[k] = fresh()
            continue
        act = chance.choice(["kills", "kills", "stops", "frozen"])
        counts[act] += 1
        if act == "frozen":
            workers[k].send(signal.SIGSTOP)
            time.sleep(chance.uniform(0, 0.5))
            workers[k].send(signal.SIGCONT)
            continue
        workers[k].send(signal.SIGKILL if act == "kills" else signal.SIGTERM)
        # a SIGTERM of its first instant, before it listens, kills it
        assert workers[k].end() in ((-signal.SIGKILL, 0) if act == "kills" else (75, 0, -signal.SIGTERM))
        workers[k] = fresh()
    assert {w.end() for w in workers} <= {0}
    assert is_through(nursery, grid, results)
    assert numbers(results) == undisturbed[grid["name"]]
    assert all(path.read_bytes() == data for path, data in seen.items())
    tally(f"chaos (seed {SEED})", sweeps=1, **counts, bit_equal=1)


def test_a_worker_that_is_frozen_keeps_its_runs(nursery, undisturbed, tally, tmp_path):
    "Others do the rest; nobody takes what it holds, and when it wakes it goes on where it was."
    frozen = start(nursery, tmp_path, 0.02)
    stop_when(frozen, lambda: begun(tmp_path))
    held = begun(tmp_path)
    assert start(nursery, tmp_path).end() == 0
    assert 18 - 3 <= len(numbers(tmp_path)) < 18 and held == begun(tmp_path)
    frozen.send(signal.SIGCONT)
    assert frozen.end() == 0 and numbers(tmp_path) == undisturbed["chaos"] and is_clean(tmp_path)
    tally("frozen and woken", workers=1, bit_equal=1)


def test_a_folder_copied_while_it_is_swept(nursery, undisturbed, tally, tmp_path):
    "Whatever moment the copy caught, it can be finished, with the same records."
    original, copies = tmp_path / "original", 3
    life = start(nursery, original, 0.02)
    for k in range(copies):
        copy = tmp_path / f"copy{k}"
        until(lambda: begun(original) or not life.alive())
        with contextlib.suppress(shutil.Error):  # files that vanish while they are copied
            shutil.copytree(original, copy)
        for path in begun(copy)[:1] if k == 1 else []:  # and one that the copy has torn
            os.truncate(path, path.stat().st_size // 2)
        assert start(nursery, copy).end() == 0
        assert numbers(copy).keys() == undisturbed["chaos"].keys()
        time.sleep(0.1)
    assert life.end() == 0 and numbers(original) == undisturbed["chaos"]
    tally("copied while it was swept", copies=copies, finished=copies)


# The process that starts workers ------------------------------------------------------------------------------------------


def swept(grid: dict, results: str, workers: int) -> int:
    "The command's inside, in a process of its own."
    try:
        return 2 if wk.sweep(grid_from(grid), Path(results), "cpu", workers, checkpoint_seconds=0) else 0
    except WaveRNNError as e:
        Path(results, "said").write_text(str(e))
        return getattr(e, "exit_code", 1)


LONG = {**GRID, "axes": {**GRID["axes"], "steps": [160], "lr": [1e-2, 1e-3]}, "together": 4}


def workers_of(life) -> set[int]:
    "The living children of a process."
    children = Path(f"/proc/{life.pid}/task/{life.pid}/children").read_text().split()
    return {int(pid) for pid in children if state_of(int(pid)) not in "ZX"}


def test_a_dead_worker_is_replaced_and_sigterm_saves(nursery, tally, tmp_path):
    "One of two workers is killed, later the sweep is asked to stop: exit code 75, no worker left; the same command goes on."
    life = nursery("test_chaos:swept", LONG, str(tmp_path), 2)
    until(lambda: begun(tmp_path))
    workers = workers_of(life)
    os.kill(max(workers), signal.SIGKILL)
    until(lambda: workers_of(life) - workers or not life.alive())
    workers |= workers_of(life)
    life.send(signal.SIGTERM)
    assert life.end() in (75, 0)  # 0: it was through before it heard
    assert all(state_of(pid) in "ZX" for pid in workers)
    assert is_through(nursery, LONG, tmp_path) and len(numbers(tmp_path)) == 12
    tally("a worker killed, then the sweep stopped", runs=12, lost=0)


def test_workers_end_with_the_one_who_started_them(nursery, tmp_path):
    "kill -9 of the sweep: its workers notice, save and end."
    life = nursery("test_chaos:swept", {**LONG, "axes": {**LONG["axes"], "steps": [20_000]}}, str(tmp_path), 2)
    until(lambda: begun(tmp_path))
    workers = workers_of(life)
    assert len(workers) == 2
    life.send(signal.SIGKILL)
    life.end()
    until(lambda: all(state_of(pid) in "ZX" for pid in workers))
    assert not list(tmp_path.glob("runs/*/*.json")), "they ended, and were not through"


def test_workers_that_die_in_a_row_end_the_sweep(nursery, tmp_path):
    assert nursery("test_chaos:doomed", str(tmp_path)).end() == 1
    assert "5 workers died in a row" in (tmp_path / "said").read_text()


def doomed(results: str) -> int:
    wk.WORKER = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    return swept(GRID, results, 2)

"""Sweeps whose workers are killed, stopped and woken at random moments: in the end each run has one record, and nobody made it twice.

`WAVE_RNNS_CHAOS` sets the number of sweeps (10 unless set), `WAVE_RNNS_CHAOS_SEED` repeats the choices of an earlier time (though not
the moments at which they fall). What "none doubled" means here: no two living processes ever train the same run, no record is
written where there is one, and no record or curve changes once the record is there. Workers are audited for the first two; the
third is seen from outside."""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import wave_rnns.core as core
import wave_rnns.paper.experiments as ex
import wave_rnns.paper.sweeps as sw
import wave_rnns.paper.training as training
from wave_rnns.paper.checkpoints import load_checkpoint
from wave_rnns.core import WaveRNNError
from wave_rnns.paper.sweeps import grid_from
from wave_rnns.paper.training import Interrupted, Training

SWEEPS = int(os.environ.get("WAVE_RNNS_CHAOS", 10))
SEED = int(os.environ.get("WAVE_RNNS_CHAOS_SEED", time.time_ns() % 1_000_000))
HERE = Path(__file__).resolve().parent
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
RUNS = {run.key: run for run in grid_from(GRID).runs()}
CLOCKS = ("seconds", "steps_per_second", "finished", "environment", "sha256")  # what two equal runs need not share

# What happens in the processes that are disturbed ------------------------------------------------------------------------


def stat_of(pid: int) -> tuple[str, int, int, str]:
    "State, parent, flags and start time of a process. Raises OSError where there is none."
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return fields[0], int(fields[1]), int(fields[6]), fields[19]


def lives(pid: int, born: str) -> bool:
    "Can this process, and not another one with its number, still run a line of code?"
    try:
        state, _, flags, start = stat_of(pid)
    except OSError:
        return False
    return start == born and state not in "ZX" and not flags & 4  # 4: killed, and about to give back its locks


class Audit:
    "What workers write down about themselves, outside of the results."

    def __init__(self, folder):
        self.folder, self.me = Path(folder), f"{os.getpid()}.{stat_of(os.getpid())[3]}"
        for name in ("training", "workers"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def note(self, what: str, **more) -> None:
        with (self.folder / "log").open("a") as log:
            log.write(json.dumps({"what": what, "who": self.me, **more}) + "\n")

    def notes(self, what: str) -> list[dict]:
        log = self.folder / "log"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if line["what"] == what]

    def workers(self) -> list[int]:
        names = [p.name.split(".") for p in (self.folder / "workers").iterdir()]
        return [int(pid) for pid, born in names if lives(int(pid), born)]

    @contextlib.contextmanager
    def training(self, keys):
        "Say it first, look then: of two processes at the same run, one at least sees the other."
        mine = [self.folder / "training" / f"{key}.{self.me}" for key in keys]
        for path in mine:
            path.touch()
        for path in (self.folder / "training").iterdir():
            key, pid, born = path.name.split(".")
            if key in keys and path not in mine and lives(int(pid), born):
                self.note("doubled", key=key, how=f"process {pid} was training it")
        try:
            yield
        finally:  # also when it is interrupted: then it gives back its claims, and lives a moment longer
            for path in mine:
                path.unlink()


def become_audited(folder, slow_steps=0.0, slow_disk=0.0) -> None:
    "From here on this process writes down what it trains, and takes its time, so that a signal can hit anything."
    audit, real_fit, real_write, group = Audit(folder), ex.fit_group, ex.write_record, []
    (audit.folder / "workers" / audit.me).touch()
    real_fsync, real_step = os.fsync, Training.make_step

    def fit_group(runs, *args, **kwargs):
        group[:] = [run.key for run in runs]
        with audit.training(group):
            audit.note("begins", keys=group)
            return real_fit(runs, *args, **kwargs)

    def write_record(results, record, curve):
        with audit.training([record["key"]]):
            if ex.run_path(results, record["config"]["task"], record["key"]).exists():
                audit.note("doubled", key=record["key"], how="it had a record")
            audit.note("writes", key=record["key"], group=group)
            return real_write(results, record, curve)

    def fsync(fd):
        real_fsync(fd)
        time.sleep(slow_disk)

    def make_step(self, graph=None):
        real_step(self, graph)
        time.sleep(slow_steps)

    ex.fit_group, ex.write_record, os.fsync, Training.make_step = fit_group, write_record, fsync, make_step
    sw.Pulse.__init__.__defaults__ = None, 0.05  # two seconds are a whole life here


class Forked:
    "What `Crew` needs of `subprocess.Popen`, by a fork: a worker without the seconds that importing torch takes."

    def __init__(self, *_, stdin, stdout, become, **__):
        self.code, self.said, self.read = None, io.BytesIO(), os.pipe()
        self.stdin, self.pid = os.fdopen(self.read[1], "wb"), os.fork()
        if self.pid:
            os.close(self.read[0])
            return
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            os.close(self.read[1])
            sys.stdin = os.fdopen(self.read[0])
            sys.stdout = os.fdopen(1, "w")
            become_audited(*become)
            code = sw.be_worker()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def poll(self):
        if self.code is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(found[1])
        return self.code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=1e9):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.01)
        return self.code


def spare_time(patch=setattr) -> None:
    "What stays as it is while the tests run is asked once."
    for module, name in ((core, "environment"), (training, "environment"), (training, "code_hash")):
        patch(module, name, functools.cache(getattr(module, name)))
        getattr(module, name)()


def swept(grid, results, workers, become, seconds=0.0) -> int:
    "`sweep` with workers that are forks of this process. The exit code is the command's."
    Audit(become[0])
    sw.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": functools.partial(Forked, become=become)})
    spare_time()
    warnings.simplefilter("ignore")  # that a torn checkpoint is passed over is what we want
    try:
        end = sw.sweep(grid_from(grid), Path(results), "cpu", workers, checkpoint_seconds=seconds)
    except (WaveRNNError, OSError) as e:
        (Path(become[0]) / "said").write_text(str(e))
        return getattr(e, "exit_code", 1)
    return 1 if end.failed else 0


def worked(grid, results, most, become) -> int:
    "A worker that nobody looks after."
    become_audited(*become)
    spare_time()
    try:
        sw.work(grid_from(grid), Path(results), "cpu", most=most, checkpoint_seconds=0)
    except Interrupted as e:
        return e.exit_code
    return 0


# The real command, with an audit put into its workers; checkpoints as often as above, which the command has no option for.
SCRIPT = """
import functools, sys
from wave_rnns.paper import sweeps
from wave_rnns.paper.sweeps import wrnn_sweep
sweeps.sweep = functools.partial(sweeps.sweep, checkpoint_seconds=0)
sweeps.WORKER = "import sys; sys.path.append({tests!r}); import test_chaos; test_chaos.become_audited(*{become!r}); " + sweeps.WORKER
if __name__ == "__main__":
    sys.exit(wrnn_sweep())
"""


class Command:
    "A `wrnn_sweep` of its own, seen like a `Life` of the nursery."

    def __init__(self, grid, results, workers, become):
        folder = Path(become[0])
        (folder / "chaos.json").write_text(json.dumps(grid))
        script = folder / "wrnn_sweep"
        script.write_text(SCRIPT.format(tests=str(HERE), become=list(become)))
        env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
        with (folder / "command.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, script, folder / "chaos.json", "--results", results, "--workers", str(workers)]
                + ["--device", "cpu"],
                env=env,
                stdout=log,
                stderr=log,
            )
        self.pid = self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number=signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait()


# The disturbance ---------------------------------------------------------------------------------------------------------


class Watch:
    "Looks at the records again and again: how often did one change that was there?"

    def __init__(self, results):
        self.folder, self.seen, self.changed = Path(results) / "runs" / "copy", {}, 0

    def look(self) -> int:
        "How many records there are."
        for path in self.folder.glob("*.json"):
            if not path.name.startswith("."):
                now = [(s.st_ino, s.st_mtime_ns, s.st_size) for s in (path.stat(), path.with_suffix(".csv").stat())]
                self.changed += self.seen.setdefault(path.stem, now) != now
                self.seen[path.stem] = now
        return len(self.seen)


def numbers(results, key) -> tuple[dict, bytes]:
    "Record and curve of a run without what a clock says."
    run = RUNS[key]
    record = ex.read_record(run.path(results))
    return {k: v for k, v in record.items() if k not in CLOCKS}, run.path(results, ".csv").read_bytes()


def left_overs(results) -> list[str]:
    "Every file that is neither a record, nor a curve, nor a log."
    wanted = {run.path(results, suffix) for run in RUNS.values() for suffix in (".json", ".csv")}
    there = {p for p in Path(results).rglob("*") if p.is_file() and p not in wanted}
    begun = set(Path(results).glob("checkpoints/*/.runs.json.*.tmp"))
    there -= {p for p in begun if not p.with_name("runs.json").exists()}  # of a population that was never begun
    return sorted(str(p.relative_to(results)) for p in there if p.parent.name != "logs")


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    "The same grid, swept in peace: `undisturbed(key, group)`, also for other groups than the grid's."
    patched = pytest.MonkeyPatch()
    spare_time(patched.setattr)
    folder = tmp_path_factory.mktemp("undisturbed")
    assert nursery("test_chaos:swept", GRID, str(folder / "sweep"), 3, (str(folder / "audit"),)).end() == 0
    declared = {frozenset(r.key for r in g) for g in sw.populations(list(RUNS.values()), GRID["together"])}
    whole = {key: numbers(folder / "sweep", key) for key in RUNS}
    statuses = [record["status"] for record, _ in whole.values()]
    assert statuses.count("diverged") == statuses.count("done") / 2 == 6
    assert not left_overs(folder / "sweep")

    @functools.cache
    def other(group):
        results = folder / sw.population_folder(Path(), [RUNS[k] for k in group]).name
        ex.train([RUNS[k] for k in group], results, "cpu", progress=False)
        return {key: numbers(results, key) for key in group}

    def find(key, group):
        return (whole if frozenset(group) in declared else other(tuple(group)))[key], frozenset(group) in declared

    yield find
    patched.undo()


class Begun:
    "A process that sweeps, once it is over too."

    def __init__(self, life):
        self.life, self.pid, self.code = life, life.pid, None

    def over(self) -> bool:
        if self.code is None and not self.life.alive():
            self.code = self.life.end()
        return self.code is not None


class Chaos:
    "One sweep, and what is done to it. `start(sweep number)` starts, or starts again, a process that sweeps."

    def __init__(self, chance, results, audit, start, sweeps):
        self.chance, self.watch, self.audit, self.start = chance, Watch(results), audit, start
        self.sweeps = {number: Begun(start(number)) for number in range(sweeps)}
        self.wake, self.deadline = {}, None  # a stopped process -> the signal it gets, and when
        names = "kills kills_of_stopped_ones stops wakes whole_sweeps_killed whole_sweeps_asked_to_stop gave_up"
        self.counts = dict.fromkeys(names.split(), 0)

    def send(self, pid, number) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def act(self) -> None:
        "Do something to somebody."
        chance, what = self.chance, self.chance.random()
        workers = [pid for pid in self.audit.workers() if pid not in self.wake]
        sweep = self.sweeps[chance.choice(list(self.sweeps))]
        if what < 0.15 and not sweep.over():
            asked = what < 0.05
            self.send(sweep.pid, signal.SIGTERM if asked else signal.SIGKILL)
            self.counts["whole_sweeps_asked_to_stop" if asked else "whole_sweeps_killed"] += 1
        elif what < 0.65 and workers:
            self.counts["kills"] += self.send(chance.choice(workers), signal.SIGKILL)
        elif workers:
            pid = chance.choice(workers)
            if self.send(pid, signal.SIGSTOP):
                self.counts["stops"] += 1
                number = signal.SIGCONT if chance.random() < 0.6 else signal.SIGKILL
                self.wake[pid] = number, time.monotonic() + chance.uniform(0.05, 1.5)

    def look(self) -> int:
        "What goes on by itself: who sleeps is woken, who ended before everything was done is started again."
        for pid, (number, when) in [*self.wake.items()]:
            if time.monotonic() > when:
                del self.wake[pid]
                if self.send(pid, number):
                    self.counts["wakes" if number == signal.SIGCONT else "kills_of_stopped_ones"] += 1
        done = self.watch.look()
        for number, sweep in self.sweeps.items():
            if sweep.over() and (sweep.code or done < len(RUNS)):
                assert sweep.code in (0, 1, 75, -signal.SIGKILL, -signal.SIGTERM), f"a sweep ended with {sweep.code}"
                self.counts["gave_up"] += sweep.code == 1
                self.sweeps[number] = Begun(self.start(number))
        return done

    def run(self, actions: int, seconds: tuple[float, float]) -> None:
        "Disturb, then wait for the end."
        for _ in range(actions):
            until = time.monotonic() + self.chance.uniform(*seconds)
            while time.monotonic() < until:
                if self.look() == len(RUNS):
                    break
                time.sleep(0.01)
            self.act()
        self.deadline = time.monotonic() + PATIENCE
        # A worker that was stopped while its sweep was killed, and wakes when all is done, still looks for work: it is left to end by itself.
        while (
            self.look() < len(RUNS)
            or self.wake
            or not all(s.over() for s in self.sweeps.values())
            or self.audit.workers()
        ):
            assert time.monotonic() < self.deadline, f"{len(self.watch.seen)} of {len(RUNS)} runs, and it does not end"
            time.sleep(0.01)
        self.watch.look()


@pytest.mark.parametrize("number", range(SWEEPS))
def test_chaos(nursery, undisturbed, tally, tmp_path, number):
    chance, results, audit = random.Random(f"{SEED}-{number}"), tmp_path / "results", Audit(tmp_path / "audit")
    become = (str(audit.folder), *chance.choice([(0.0, 0.0), (0.01, 0.0), (0.0, 0.01)]))
    kind = "command" if number % 10 == 9 else chance.choice(["sweep", "sweep", "two sweeps", "other groups", "workers"])

    def start(sweep):
        if kind == "command":
            return Command(GRID, results, 3, become)
        if kind == "workers":
            return nursery("test_chaos:worked", GRID, str(results), 3, become)
        grid = {**GRID, "together": 4} if sweep and kind == "other groups" else GRID
        return nursery("test_chaos:swept", grid, str(results), 3, become)

    chaos = Chaos(chance, results, audit, start, {"workers": 3, "two sweeps": 2, "other groups": 2}.get(kind, 1))
    actions, seconds = (5, (1.0, 3.0)) if kind == "command" else (chance.randint(6, 14), (0.02, 0.35))
    try:
        chaos.run(actions, seconds)
    finally:
        print(f"seed {SEED}, sweep {number}: {kind}, {actions} disturbances, {become[1:]}, {chaos.counts}")
        for pid in [*audit.workers(), *(s.pid for s in chaos.sweeps.values() if not s.over())]:
            chaos.send(pid, signal.SIGKILL)

    # Workers that nobody looks after leave traces of their dead, until somebody looks in who has nothing to train.
    if kind == "workers":
        assert nursery("test_chaos:swept", GRID, str(results), 1, become).end() == 0

    lost, equal, regrouped = 0, 0, 0
    company = {note["key"]: note["group"] for note in audit.notes("writes")}  # the last one who began to write it did
    for key, run in RUNS.items():
        if ex.record_of(results, run) is None:
            lost += 1
            continue
        expected, as_declared = undisturbed(key, company[key])
        found = numbers(results, key)
        equal += found == expected
        if found != expected:
            different = {k: (v, expected[0][k]) for k, v in found[0].items() if v != expected[0][k]}
            print(f"{key} in {company[key]}: {different}, curves equal: {found[1] == expected[1]}")
        regrouped += not as_declared
    doubled = audit.notes("doubled")
    tally("chaos sweeps", sweeps=1, runs=len(RUNS), **chaos.counts)
    tally("  their runs", lost=lost, doubled=len(doubled) + chaos.watch.changed, numbers_bit_equal=equal)
    tally("  of these", trained_in_other_company=regrouped, left_over_files=len(left_overs(results)), seed=str(SEED))
    assert not lost and not doubled and not chaos.watch.changed
    assert equal == len(RUNS)
    assert not left_overs(results)


def until(what, seconds=PATIENCE):
    "Wait until it is true."
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not in {seconds} seconds"
        time.sleep(0.005)


def is_undisturbed(results, audit, undisturbed) -> bool:
    "One sound record a run, numbers as in peace, nothing beside them?"
    company = {note["key"]: note["group"] for note in audit.notes("writes")}
    assert not left_overs(results) and not audit.notes("doubled")
    return all(numbers(results, key) == undisturbed(key, company[key])[0] for key in RUNS)


def test_a_folder_copied_while_it_is_swept(nursery, undisturbed, tally, tmp_path):
    "cp -r takes what it meets: claims, pulses, files in the middle of being written. The copy goes on by itself."
    results, audit = tmp_path / "results", Audit(tmp_path / "audit")
    sweep = nursery("test_chaos:swept", GRID, str(results), 3, (str(audit.folder), 0.03, 0.002))
    copies = [tmp_path / f"copy{number}" for number in range(4)]
    for copy, done in zip(copies, (0, 1, 5, 9), strict=True):
        until(lambda done=done: len(audit.notes("writes")) >= done and [*results.glob("checkpoints/*/*.safetensors")])
        subprocess.run(["cp", "-r", results, copy], stderr=subprocess.DEVNULL)  # "file vanished" is no reason to stop
    assert sweep.alive(), "it was over before the last copy was made"
    assert sweep.end() == 0 and is_undisturbed(results, audit, undisturbed)
    for copy in copies:
        had = len(list(copy.glob("runs/copy/*.json")))
        own = Audit(copy.with_name(f"{copy.name}.audit"))
        shutil.copy(audit.folder / "log", own.folder)
        assert nursery("test_chaos:swept", GRID, str(copy), 3, (str(own.folder),)).end() == 0
        assert is_undisturbed(copy, own, undisturbed)
        tally("folders copied while they are swept", copies=1, complete_and_bit_equal=1, records_found=had)


def test_a_copy_with_a_torn_checkpoint_begins_that_population_anew(nursery, undisturbed, tally, tmp_path):
    "File and list of hashes from different moments, and no older checkpoint: set aside, not trusted, and no obstacle."
    results, audit = tmp_path / "results", Audit(tmp_path / "audit")
    become = (str(audit.folder), 0.03)
    sweep = nursery("test_chaos:swept", GRID, str(results), 2, become)
    until(lambda: len(list(results.glob("checkpoints/*/population.previous.safetensors"))) == 2)
    sweep.send(signal.SIGTERM)
    assert sweep.end() == 75
    first, second = results.glob("checkpoints/*/population.safetensors")
    first.write_bytes(first.read_bytes()[:-7])
    second.write_bytes(second.read_bytes()[::-1])
    for path in (first, second):
        path.with_name("population.previous.safetensors").unlink()
    assert nursery("test_chaos:swept", GRID, str(results), 2, become).end() == 0
    aside = {p.parent.with_name(f"{p.parent.name}.broken1") / p.name for p in (first, second)}
    assert {p for p in results.glob("checkpoints/*/population.safetensors")} == aside, "set aside, nothing deleted"
    for path in aside:
        shutil.rmtree(path.parent)
    assert is_undisturbed(results, audit, undisturbed)
    tally("torn checkpoints", set_aside=2, begun_anew_and_bit_equal=2)


@pytest.mark.parametrize("end", ["woken", "killed"])
def test_a_worker_that_is_frozen_keeps_its_runs(nursery, undisturbed, tally, tmp_path, end):
    results, audit = tmp_path / "results", Audit(tmp_path / "audit")
    sweep = nursery("test_chaos:swept", GRID, str(results), 2, (str(audit.folder), 0.01))
    until(lambda: list((audit.folder / "training").iterdir()))
    pid = int(next((audit.folder / "training").iterdir()).name.split(".")[1])
    os.kill(pid, signal.SIGSTOP)
    until(lambda: stat_of(pid)[0] == "T")
    held = {p.name.split(".")[0] for p in (audit.folder / "training").iterdir() if p.name.split(".")[1] == str(pid)}
    watch = Watch(results)
    until(lambda: watch.look() == len(RUNS) - len(held))
    time.sleep(2.0)  # time enough for somebody to lose patience
    assert sweep.alive() and watch.look() == len(RUNS) - len(held) and not held & watch.seen.keys()
    os.kill(pid, signal.SIGCONT if end == "woken" else signal.SIGKILL)
    assert sweep.end() == 0 and is_undisturbed(results, audit, undisturbed) and watch.look() == len(RUNS)
    writers = {note["who"].split(".")[0] for note in audit.notes("writes") if note["key"] in held}
    assert (writers == {str(pid)}) == (end == "woken") and not watch.changed
    tally("frozen workers", **{end: 1}, runs_that_waited=len(held))


@pytest.fixture
def small_disk(tmp_path):
    "A disk of one megabyte."
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk, and not everywhere")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_in_the_middle_of_a_sweep(nursery, undisturbed, tally, tmp_path, small_disk):
    results, audit = small_disk / "results", Audit(tmp_path / "audit")
    become = (str(audit.folder), 0.02)
    sweep = nursery("test_chaos:swept", GRID, str(results), 2, become)
    stopped = []

    def half_way() -> bool:
        "Is there a checkpoint of a population that has no record yet?"
        keys = [
            json.loads(p.with_name("runs.json").read_text())
            for p in results.glob("checkpoints/*/population.safetensors")
        ]
        return any(not any((results / f"runs/copy/{key}.json").exists() for key in group) for group in keys)

    def stopped_half_way() -> bool:
        "A population's last record takes its checkpoint away: so the workers stand still while somebody looks, and while the disk fills."
        stopped[:] = audit.workers()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: all(stat_of(pid)[0] == "T" for pid in stopped))
        if len(audit.notes("writes")) >= 4 and half_way():
            return True
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        return False

    until(stopped_half_way)
    filler = small_disk / "somebody else's"

    def is_full() -> bool:
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as f:
            while True:
                f.write(bytes(4096))
        return shutil.disk_usage(small_disk).free < 2**14

    until(is_full)  # a write that failed gives back what it had
    records = {p: p.read_bytes() for p in results.glob("runs/copy/*.json")}
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    until(lambda: is_full() and not sweep.alive())
    assert sweep.end() == 1
    said = (audit.folder / "said").read_text()
    assert "no space left" in said.lower(), said
    assert not [p for p in results.rglob("*") if p.suffix in (".tmp", ".new")]
    assert all(p.read_bytes() == content for p, content in records.items())
    begun = [load_checkpoint(p)[1]["history"]["step"] for p in results.glob("checkpoints/*/population.safetensors")]
    filler.unlink()
    assert nursery("test_chaos:swept", GRID, str(results), 2, become).end() == 0
    assert is_undisturbed(results, audit, undisturbed)
    tally("full disks", sweeps_that_said_so=1, checkpoints_intact=len(begun), went_on_bit_equal=1)
    assert begun and min(begun) > 0

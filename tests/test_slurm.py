"""Sweeps on a real Slurm of one machine: nothing lost, and what is preempted goes on as if nothing had been.

In CI a missing Slurm is a failure; elsewhere it is a reason to skip."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT
from slurm_cluster import SlurmOnOneMachine, what_is_missing
from test_chaos import numbers

from wave_rnns.paper.grids import find_grid

TINY = {
    "name": "tiny",
    "task": "copy",
    "task_options": {"T": 10, "batch_size": 8, "valid_size": 32, "test_size": 32},
    "model": {"kind": "wrnn", "input_size": 10, "output_size": 10, "n": 12, "c": 1, "every_step": True},
    **dict(lr=1e-2, clip=1.0, steps=300, eval_every=50, log_every=10),
}
GRID = {"experiments": [TINY], "axes": {"lr": [1e-2, 1e-3]}, "seeds": [0, 1, 2, 3], "together": 2}
RUNS, WORKERS = 8, 3  # four populations: one more than there are workers


@pytest.fixture(scope="module")
def slurm():
    if reason := what_is_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # pytest's own folders are too deep for a socket
    # Else frozen jobs would outlive a pytest that is ended.
    as_before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with SlurmOnOneMachine(folder, cpus=WORKERS + 1, grace_time=30) as cluster:
            yield cluster
        assert cluster.processes() == []
    finally:
        signal.signal(signal.SIGTERM, as_before)
        shutil.rmtree(folder)


class Sweep:
    "A sweep whose workers are Slurm's, and what a test wants to know of it."

    def __init__(self, slurm: SlurmOnOneMachine, folder: Path):
        self.slurm, self.folder, self.results, self.grid = slurm, folder, folder / "results", folder / "grid.json"
        folder.mkdir(exist_ok=True)
        self.grid.write_text(json.dumps(GRID))

    def start(self, partition: str, workers: int = WORKERS) -> list[str]:
        "As a user would: the command writes the script, sbatch gets it, with one more option."
        command = self.folder / "wrnn_sweep"
        command.write_text(SCRIPT.format(module="wave_rnns.paper.cli", name="wrnn_sweep"))
        environ = {**self.slurm.environ, "PYTHONPATH": str(ROOT)}
        options = f"--device cpu --slurm --workers {workers} --minutes 10".split()
        words = [sys.executable, command, self.grid, "--results", self.results, *options]
        script = subprocess.check_output(words, env=environ, text=True)
        (self.folder / "sweep.sh").write_text(script)
        sbatch = ["sbatch", "--parsable", f"--partition={partition}", "sweep.sh"]
        job = subprocess.check_output(sbatch, env=environ, text=True, cwd=self.folder).strip()
        return [f"{job}_{task}" for task in range(workers)]

    def wait_until(self, condition, what: str, seconds: float = 180) -> None:
        try:
            self.slurm.wait_until(condition, what, seconds)
        except RuntimeError as e:
            pytest.fail(f"{e}\n{self.slurm.run('squeue', check=False)}\n{self.logs()}")

    def freeze(self, jobs: list[str]) -> dict[str, int]:
        "Stop each worker in the middle of its training, so that nobody is through before its turn comes; their processes."
        frozen = {}

        def every_one() -> bool:
            for job in set(jobs) - frozen.keys():
                pid = self.process(job)
                if pid and self.holds_a_lock(pid):
                    os.kill(pid, signal.SIGSTOP)
                    frozen[job] = pid
            return len(frozen) == len(jobs)

        self.wait_until(every_one, "every worker trains")
        return frozen

    def holds_a_lock(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            files = [os.readlink(p) for p in Path(f"/proc/{pid}/fd").iterdir()]
            return any(name.startswith(str(self.results)) and name.endswith(".lock") for name in files)
        return False

    def process(self, job: str) -> int | None:
        "The Python of a job, once it runs: not srun, which has the same words on its command line."
        array, task = job.split("_")
        wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"}
        for pid in self.slurm.processes():
            with contextlib.suppress(OSError):
                words, environ = (
                    Path(f"/proc/{pid}/{name}").read_text().split("\0") for name in ("cmdline", "environ")
                )
                if words[0] == sys.executable and wanted <= set(environ):
                    return pid
        return None

    def let_go_on(self, job: str) -> None:
        "Slurm lets what it requeued wait for two minutes; nobody here wants to."
        # slurmd counts in seconds: a start within that of the requeue would be refused, "credential revoked", and the job lost.
        self.slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def records_of_all(self, jobs: list[str]) -> dict:
        "Once no job is left and all of these have come to a good end."
        self.wait_until(lambda: not self.slurm.jobs(), "no job is left")
        assert self.states(jobs) == ["COMPLETED"] * len(jobs), self.logs()
        return numbers(self.results)

    def states(self, jobs: list[str]) -> list[str]:
        "What Slurm says has become of each job."
        return [self.slurm.show(job)["JobState"] for job in jobs]

    def came_back(self, jobs: list[str]) -> list[str]:
        "Those of the jobs that wait for another start."
        shown = {job: self.slurm.show(job) for job in jobs}
        return [job for job, s in shown.items() if s["JobState"] == "PENDING" and s["Restarts"] == "1"]

    def logs(self) -> str:
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("*.log")))


def preempt_one(slurm: SlurmOnOneMachine) -> str:
    "A job of higher priority that needs one CPU more than are free: Slurm takes it from a worker."
    wanted = ("--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1")
    return slurm.run("sbatch", "--parsable", *wanted)


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory) -> dict:
    "A sweep that nothing happens to."
    whole = Sweep(slurm, tmp_path_factory.mktemp("undisturbed"))
    found = whole.records_of_all(whole.start("low"))
    assert not list(whole.results.glob("checkpoints/*"))
    assert found.keys() == {run.key for run in find_grid(str(whole.grid)).runs()} and len(found) == RUNS
    return found


def test_warnings_are_heeded_and_the_end_is_bit_equal(slurm, undisturbed, tmp_path, tally):
    """Slurm warns of a preemption and of the time limit with SIGTERM, while the job still counts as running.

    Whoever only leaves then has failed, in Slurm's eyes: the job must put itself back into the queue."""
    disturbed = Sweep(slurm, tmp_path)
    jobs = disturbed.start("patient")
    processes = disturbed.freeze(jobs)
    preempt_one(slurm)
    for pid in processes.values():
        os.kill(pid, signal.SIGCONT)
    disturbed.wait_until(lambda: disturbed.came_back(jobs), "one worker is preempted and in the queue again")
    back = disturbed.came_back(jobs)
    for job in back:
        assert "start again to go on" in (disturbed.folder / f"wave_rnns-{job}.log").read_text()
        disturbed.let_go_on(job)
    found = disturbed.records_of_all(jobs)
    tally("Slurm, preempted with a warning", requeued=len(back), runs=RUNS, records=len(found))
    assert found == undisturbed, disturbed.logs()


def test_killed_cancelled_and_requeued_by_slurm(slurm, undisturbed, tmp_path, tally):
    "One worker is preempted without a warning, one is killed with SIGKILL, one cancelled; then the sweep is started again."
    disturbed = Sweep(slurm, tmp_path)
    jobs = disturbed.start("low")
    processes = disturbed.freeze(jobs)
    preempt_one(slurm)
    disturbed.wait_until(lambda: disturbed.came_back(jobs), "Slurm requeues one worker")
    (preempted,) = disturbed.came_back(jobs)
    killed, cancelled = (job for job in jobs if job != preempted)
    os.kill(processes[killed], signal.SIGKILL)
    slurm.run("scancel", cancelled)
    with contextlib.suppress(ProcessLookupError):
        os.kill(processes[cancelled], signal.SIGCONT)
    disturbed.wait_until(lambda: len(slurm.jobs()) <= 1, "killed and cancelled are gone")
    states = disturbed.states([preempted, killed, cancelled])
    assert states == ["PENDING", "FAILED", "CANCELLED"]  # in particular: what is cancelled is not requeued
    before = len(numbers(disturbed.results))
    assert before < RUNS
    again = disturbed.start("low", workers=2)
    disturbed.let_go_on(preempted)
    found = disturbed.records_of_all([preempted, *again])
    tally("Slurm, preempted, killed, cancelled and started again", done_before=before, runs=RUNS, records=len(found))
    assert found == undisturbed, disturbed.logs()

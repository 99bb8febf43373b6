"""Sweeps on a real Slurm of one machine: nothing lost, nothing twice, and what is preempted goes on as if nothing had been.

In CI a missing Slurm is a failure; elsewhere it is a reason to skip what needs one."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SCRIPT
from slurm_cluster import SlurmOnOneMachine, what_is_missing

from wave_rnns.core import ConfigError, WaveRNNError
from wave_rnns.paper.experiments import read_record
from wave_rnns.paper.sweeps import check_words, come_back, find_grid, need_slurm, submit

STEPS = 300
TINY = {
    "name": "tiny",
    "task": "copy",
    "task_options": {"T": 10, "batch_size": 8, "valid_size": 32, "test_size": 32},
    "model": {"kind": "wrnn", "input_size": 10, "output_size": 10, "n": 12, "c": 1, "every_step": True},
    **dict(lr=1e-2, clip=1.0, steps=STEPS, eval_every=50, log_every=10),
}
GRID = {"experiments": [TINY], "axes": {"lr": [1e-2, 1e-3]}, "seeds": [0, 1, 2, 3], "together": 2}
RUNS, WORKERS = 8, 3  # four populations: one more than there are workers
OF_THE_CLOCK = {
    "seconds",
    "steps_per_second",
    "finished",
    "environment",
    "sha256",
}  # what may differ between equal runs


def sweep(environ: dict, grid: Path, *arguments) -> subprocess.CompletedProcess:
    "The command `wrnn_sweep`, as a process of its own."
    script = grid.with_name("wrnn_sweep")
    script.write_text(SCRIPT.format(module="wave_rnns.paper.sweeps", name="wrnn_sweep"))
    environ = {**environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, (script, grid, *arguments))]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def slurm():
    reason = what_is_missing()
    if reason is None and not importlib.util.find_spec("submitit"):
        reason = "no submitit here: pip install 'wave-rnns[slurm]'"
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # pytest's own folders are too deep for a socket
    as_before = signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # else frozen jobs would outlive a pytest that is ended
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
        self.slurm, self.results, self.grid = slurm, folder / "results", folder / "grid.json"
        folder.mkdir(exist_ok=True)
        self.grid.write_text(json.dumps(GRID))

    def start(self, partition: str, workers: int = WORKERS) -> list[str]:
        options = ("--results", self.results, "--device", "cpu", "--slurm", "--workers", workers, "--minutes", 10)
        done = sweep(self.slurm.environ, self.grid, *options, "--partition", partition)
        assert done.returncode == 0, done.stderr
        found = re.match(
            rf"{workers} Slurm jobs \(1 cores, no GPU, 10 minutes each\): (\d+)_0 to \1_{workers - 1};", done.stdout
        )
        assert found and str(self.results / "slurm") in done.stdout and f"scancel {found[1]}" in done.stdout, (
            done.stdout
        )
        return [f"{found[1]}_{task}" for task in range(workers)]

    def wait_until(self, condition, what: str, seconds: float = 90) -> None:
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
                if pid and (self.results / "checkpoints/workers" / f"{socket.gethostname()}-{pid}.json").exists():
                    os.kill(pid, signal.SIGSTOP)
                    frozen[job] = pid
            return len(frozen) == len(jobs)

        self.wait_until(every_one, "every worker trains")
        return frozen

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

    def wait_until_over(self) -> None:
        self.wait_until(lambda: not self.slurm.jobs(), "no job is left")

    def let_go_on(self, job: str) -> None:
        "Slurm lets what it requeued wait for two minutes; nobody here wants to."
        # slurmd counts in seconds: a start within that of the requeue would be refused, "credential revoked", and the job lost.
        self.slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def states(self, jobs: list[str]) -> list[str]:
        "What Slurm says has become of each job."
        return [self.slurm.show(job)["JobState"] for job in jobs]

    def log(self, job: str) -> str:
        return (self.results / "slurm" / f"{job}_0_log.out").read_text()

    def logs(self) -> str:
        return "\n".join(p.read_text() for p in sorted((self.results / "slurm").glob("*.out")))

    def trained(self) -> int:
        "How many runs were brought to their end, as the workers tell."
        return sum(int(n) for n in re.findall(r"(\d+) x \S+( \.\.\.)?: trained in", self.logs()) for n in n[:1])

    def numbers(self) -> dict[str, tuple]:
        "Record and curve of each run, all of it that must not depend on interruptions."
        found = {}
        for path in (self.results / "runs").glob("*/*.json"):
            record = {k: v for k, v in read_record(path).items() if k not in OF_THE_CLOCK}
            found[path.stem] = json.dumps(record, sort_keys=True), path.with_suffix(".csv").read_bytes()
        return found


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory) -> Sweep:
    "A sweep that nothing happens to."
    whole = Sweep(slurm, tmp_path_factory.mktemp("undisturbed"))
    whole.jobs = whole.start("low")
    whole.wait_until_over()
    return whole


def preempt_one(slurm: SlurmOnOneMachine, cpus: int = 2) -> str:
    "A job of higher priority that needs one CPU more than are free: Slurm takes it from a worker. Returns that job's id."
    return slurm.run(
        "sbatch", "--parsable", "--partition=high", f"--cpus-per-task={cpus}", "--output=/dev/null", "--wrap=sleep 1"
    )


def came_back(slurm: SlurmOnOneMachine, jobs: list[str]) -> list[str]:
    "Those of the jobs that wait for another start."
    shown = {job: slurm.show(job) for job in jobs}
    return [job for job, s in shown.items() if s["JobState"] == "PENDING" and s["Restarts"] == "1"]


def stopped_at(log: str) -> list[int]:
    return [int(n) for n in re.findall(r"stopped at step (\d+)", log)]


def test_everything_is_done_and_nothing_twice(undisturbed, tally):
    slurm, expected = undisturbed.slurm, {run.key for run in find_grid(str(undisturbed.grid)).runs()}
    numbers, trained = undisturbed.numbers(), undisturbed.trained()
    busy = sum("trained in" in undisturbed.log(job) for job in undisturbed.jobs)
    tally("Slurm, undisturbed", jobs=len(undisturbed.jobs), busy=busy, runs=RUNS, records=len(numbers), trained=trained)
    assert numbers.keys() == expected and len(expected) == RUNS == trained
    assert busy >= 2
    states = Counter((slurm.show(job)["JobState"], slurm.show(job)["ExitCode"]) for job in undisturbed.jobs)
    assert states == {("COMPLETED", "0:0"): WORKERS}
    assert not list(undisturbed.results.rglob("*.safetensors"))


def test_warnings_are_heeded_and_the_end_is_bit_equal(undisturbed, tmp_path, tally):
    """Slurm warns of a preemption with SIGTERM, and of the time limit with SIGUSR2, while the job still counts as running.

    Whoever only leaves then has failed, in Slurm's eyes: the worker must put itself back into the queue."""
    disturbed, slurm = Sweep(undisturbed.slurm, tmp_path), undisturbed.slurm
    jobs = disturbed.start("patient")
    processes = disturbed.freeze(jobs)
    preempt_one(slurm)
    disturbed.wait_until(lambda: came_back(slurm, jobs), "one worker is preempted and in the queue again")
    (preempted,) = came_back(slurm, jobs)
    left_alone, warned = (job for job in jobs if job != preempted)
    slurm.run("scancel", "--signal=USR2", warned)  # what `--signal=USR2@120` does when 120 s are left
    os.kill(processes[warned], signal.SIGCONT)
    disturbed.wait_until(lambda: len(came_back(slurm, jobs)) == 2, "one that was warned is in the queue again")
    for job in (preempted, warned):
        assert all(0 < n < STEPS for n in stopped_at(disturbed.log(job))) and stopped_at(disturbed.log(job))
        assert f"Job {job} is requeued" in disturbed.log(job)
        disturbed.let_go_on(job)
    os.kill(processes[left_alone], signal.SIGCONT)
    disturbed.wait_until_over()
    same = sum(disturbed.numbers().get(key) == n for key, n in undisturbed.numbers().items())
    tally("Slurm, preempted and at its time limit", requeued=2, runs=RUNS, trained=disturbed.trained(), bit_equal=same)
    assert disturbed.numbers() == undisturbed.numbers(), disturbed.logs()
    assert disturbed.trained() == RUNS
    assert disturbed.states(jobs) == ["COMPLETED"] * WORKERS, slurm.logs()


def test_killed_cancelled_and_requeued_by_slurm(undisturbed, tmp_path, tally):
    "One worker is preempted without a warning, one is killed with SIGKILL, one cancelled; then the sweep is started again."
    disturbed, slurm = Sweep(undisturbed.slurm, tmp_path), undisturbed.slurm
    jobs = disturbed.start("low")
    processes = disturbed.freeze(jobs)
    preempt_one(slurm)
    disturbed.wait_until(lambda: came_back(slurm, jobs), "Slurm requeues one worker")
    (preempted,) = came_back(slurm, jobs)
    killed, cancelled = (job for job in jobs if job != preempted)
    os.kill(processes[killed], signal.SIGKILL)
    slurm.run("scancel", cancelled)
    disturbed.wait_until(lambda: len(slurm.jobs()) <= 1, "killed and cancelled are gone")
    states = [slurm.show(job)["JobState"] for job in (preempted, killed, cancelled)]
    assert states == ["PENDING", "FAILED", "CANCELLED"]  # in particular: what is cancelled is not requeued
    for job in (preempted, cancelled):
        assert stopped_at(disturbed.log(job)) and "exit code 75" in disturbed.log(job)
    assert "start the same wrnn_sweep again: it goes on from here" in disturbed.log(cancelled)
    before = len(disturbed.numbers())
    assert before < RUNS

    again = disturbed.start("low", workers=2)
    disturbed.let_go_on(preempted)
    disturbed.wait_until_over()
    same = sum(disturbed.numbers().get(key) == n for key, n in undisturbed.numbers().items())
    tally(
        "Slurm, preempted, killed, cancelled and started again",
        **dict(done_before=before, runs=RUNS, trained=disturbed.trained(), bit_equal=same),
    )
    assert disturbed.numbers() == undisturbed.numbers(), disturbed.logs()
    assert disturbed.trained() == RUNS
    assert disturbed.states([preempted, *again]) == ["COMPLETED"] * 3, disturbed.logs()
    assert disturbed.states([killed, cancelled]) == ["FAILED", "CANCELLED"]


def test_a_refusal_of_sbatch_is_one_line(slurm, tmp_path):
    refused = Sweep(slurm, tmp_path)
    done = sweep(slurm.environ, refused.grid, "--results", refused.results, "--slurm", "--partition", "nowhere")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode in (1, 2) and "sbatch refused" in last and "invalid partition" in done.stderr.lower()
    assert "Traceback" not in done.stderr and slurm.jobs() == []


# Without a Slurm ------------------------------------------------------------------------------------------------------


def test_no_slurm_is_one_line(tmp_path):
    (tmp_path / "grid.json").write_text(json.dumps(GRID))
    done = sweep({**os.environ, "PATH": str(tmp_path)}, tmp_path / "grid.json", "--results", tmp_path / "r", "--slurm")
    assert done.returncode in (1, 2) and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "sbatch" in line or "submitit" in line, line
    assert not (tmp_path / "r").exists()


def test_no_submitit_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'wave-rnns\[slurm\]'"):
        need_slurm()


@pytest.mark.parametrize("results", ["50%", "a\\b", "a\nrm -rf x", "a\0b"])
def test_folders_that_mean_something_to_sbatch_are_refused(results):
    with pytest.raises(ConfigError, match="must not contain"):
        check_words(Path(results))


@pytest.mark.parametrize(
    "name, value", [("comment", "a\nrm -rf x"), ("a b", "1"), ("comment\ntouch x #", "1"), ("", "1")]
)
def test_options_that_would_become_lines_of_shell_are_refused(name, value):
    with pytest.raises(ConfigError, match="no option of sbatch"):
        check_words(Path("results"), **{name: value})


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    "squeue and scontrol that answer as told and write down what they are asked."

    def pretend(state: str, code: int = 0) -> Path:
        for name, answer in (("squeue", state), ("scontrol", "")):
            file = tmp_path / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\necho "{answer}"\nexit {code}\n')
            file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        return tmp_path / "asked"

    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "28")
    return pretend


def test_one_task_of_an_array_is_requeued_by_its_own_name(pretended, monkeypatch):
    "The last task of array 28 has the plain id 28 as well: requeued by that, all tasks would stop."
    asked = pretended("RUNNING")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "28")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert "28_2 is requeued" in come_back()
    assert asked.read_text().splitlines()[-1] == "scontrol requeue 28_2" and "--jobs=28_2" in asked.read_text()


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", "CANCELLED", ""])
def test_what_slurm_has_decided_is_not_undone(pretended, state):
    asked = pretended(state)
    assert "start the same wrnn_sweep again" in come_back()
    assert "scontrol" not in asked.read_text()


def test_a_controller_that_does_not_answer_is_an_error_that_names_it(pretended, monkeypatch):
    asked, waited = pretended("", code=1), []
    monkeypatch.setattr(
        "wave_rnns.paper.sweeps.time", SimpleNamespace(sleep=waited.append)
    )  # the others need the real one
    with pytest.raises(WaveRNNError, match="squeue"):
        come_back()
    assert len(asked.read_text().splitlines()) == 4 and sum(waited) == 12, "a busy one is asked again, with patience"


def test_a_missing_slurm_has_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr("slurm_cluster.path_with_daemons", lambda: str(tmp_path))
    assert re.fullmatch(r"no munged, slurmctld, slurmd.* here: apt-get install .*slurmctld.*", what_is_missing())
    with pytest.raises(FileNotFoundError, match="apt-get install"), SlurmOnOneMachine(tmp_path):
        pass
    with pytest.raises(ConfigError, match="no sbatch"):
        monkeypatch.setenv("PATH", str(tmp_path))
        submit(find_grid("copy_wrnn"), tmp_path)


def test_nothing_is_left_of_a_cluster_that_cannot_start(slurm, tmp_path):
    "slurmctld dies of a configuration that it does not understand: the error shows its log, and munged is ended too."
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    broken = SlurmOnOneMachine(folder, cpus="many")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="(?s)died.*many"), broken:
        pass
    assert broken.processes() == [] and time.monotonic() - began < 20
    shutil.rmtree(folder)

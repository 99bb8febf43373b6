"""kill -9 at random moments, SIGTERM, and going on: the end is that of a run that was never touched, bit for bit.

`WAVE_RNNS_KILLS` sets the number of kills (20 unless set). A life of a process costs no import: a parent that has imported torch,
and runs one thread, forks it."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wave_rnns.checkpoints import load_checkpoint

KILLS = int(os.environ.get("WAVE_RNNS_KILLS", 20))
HERE = Path(__file__).parent

NURSERY = """
import json, os, sys, time, traceback
import torch, tiny_task, wave_rnns.checkpoints
from wave_rnns.training import Training, fit
torch.set_num_threads(1)
fit(tiny_task.TinyTask(), tiny_task.WAVE, tiny_task.RUNS, **{**tiny_task.RHYTHM, "steps": 1})  # what loads late is loaded now
say = lambda *words: print(*words, flush=True)
say("ready")
for line in sys.stdin:
    slow_disk, slow_steps, *arguments = json.loads(line)
    if (pid := os.fork()) == 0:
        real_fsync, real_step = os.fsync, Training.make_step
        def fsync(fd):
            real_fsync(fd), time.sleep(slow_disk)
        def make_step(self, graph=None):
            open(arguments[2] + ".begun", "w").close()
            time.sleep(slow_steps), real_step(self, graph)
        os.fsync, Training.make_step = fsync, make_step
        code = 1
        try:
            code = tiny_task.main(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    say(pid)
    sys.stdin.readline()  # until then the number stays the child's, dead or alive
    say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.fixture(scope="module")
def nursery():
    "A function that starts one life: (pid, a function that waits for its exit code)."
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert parent.stdout.readline() == "ready\n"

    def start(checkpoint, every, report, slow_disk=0.0, slow_steps=0.0):
        parent.stdin.write(json.dumps([slow_disk, slow_steps, str(checkpoint), str(every), str(report)]) + "\n")
        parent.stdin.flush()
        return int(parent.stdout.readline()), end

    def end():
        parent.stdin.write("\n")
        parent.stdin.flush()
        return int(parent.stdout.readline())

    yield start
    parent.stdin.close()
    parent.wait()


def state(path):
    "What a checkpoint holds, as bits, without the clock."
    tensors, meta = load_checkpoint(path)
    meta["history"].pop("seconds")
    meta.pop("environment")
    return {k: t.flatten().tolist().__repr__() for k, t in tensors.items()}, meta


@pytest.fixture(scope="module")
def untouched(nursery, tmp_path_factory):
    "The run that was never interrupted: its results and its last checkpoint."
    folder = tmp_path_factory.mktemp("untouched")
    _, end = nursery(folder / "x.safetensors", 3, folder / "report.json")
    assert end() == 0
    return json.loads((folder / "report.json").read_text()), state(folder / "x.safetensors")


@pytest.mark.parametrize(
    "slow_disk, slow_steps, every", [(0.0, 0.01, 3), (0.01, 0.0, 2)], ids=["while computing", "while writing"]
)
def test_kill_9(nursery, untouched, tmp_path, slow_disk, slow_steps, every):
    chance, path, report = random.Random(every), tmp_path / "x.safetensors", tmp_path / "report.json"
    kills = torn = 0
    for _ in range(50 * KILLS):
        begun = tmp_path / "report.json.begun"
        begun.unlink(missing_ok=True)
        pid, end = nursery(path, every, report, slow_disk, slow_steps)
        if chance.random() < 0.8:  # the others are killed while they start
            wait_for(begun, pid)
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        if end() == 0:  # it had finished: begin anew, until there were enough kills
            compare(path, report, untouched, every)
            for p in tmp_path.iterdir():
                p.unlink()
            continue
        kills += 1
        torn += any(p.suffix in (".tmp", ".new") for p in tmp_path.iterdir())
        if kills == KILLS // 2 + KILLS % 2:
            break
    _, end = nursery(path, every, report)
    assert end() == 0
    compare(path, report, untouched, every)
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".tmp", ".new")]
    print(f"{kills} kills, {torn} in the middle of a write")
    assert kills >= KILLS // 2 and (torn or not slow_disk)


def wait_for(file, pid):
    "Until the file is there, or the process is at its end."
    while not file.exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.001)


def compare(path, report, untouched, every):
    assert json.loads(report.read_text()) == untouched[0]
    assert state(path) == untouched[1]


def test_sigterm_saves_and_asks_to_be_started_again(nursery, untouched, tmp_path):
    path, report = tmp_path / "x.safetensors", tmp_path / "report.json"
    for life in range(3):
        pid, end = nursery(path, 1000, report, 0.0, 0.02)  # no checkpoint on its own before the end
        wait_for(tmp_path / "report.json.begun", pid)
        time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)
        code = end()
        if code == 0:
            break
        assert code == 75 and not report.exists(), f"life {life}: exit code {code}"
    assert life > 0
    if code == 75:
        _, end = nursery(path, 1000, report)
        assert end() == 0
    compare(path, report, untouched, 1000)


def test_a_copied_checkpoint_goes_on_too(nursery, untouched, tmp_path):
    "A folder copied half-way through writing: file and list from different moments."
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    pid, end = nursery(first / "x.safetensors", 1, first / "report.json", 0.005, 0.0)
    while not (first / "x.previous.safetensors").exists():
        time.sleep(0.001)
    for name in ("x.safetensors.sha256", "x.previous.safetensors", "x.safetensors"):
        time.sleep(0.013)
        with contextlib.suppress(FileNotFoundError):  # a copying tool says "file vanished" and goes on
            (second / name).write_bytes((first / name).read_bytes())
    os.kill(pid, signal.SIGKILL)
    end()
    _, end = nursery(second / "x.safetensors", 3, second / "report.json")
    if end():  # nothing in the copy could be trusted: refused, not silently begun anew
        assert not (second / "report.json").exists()
    else:
        compare(second / "x.safetensors", second / "report.json", untouched, 3)

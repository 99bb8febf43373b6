"""kill -9 at random moments, and going on: the end is that of a run that was never touched, bit for bit.

`WAVE_RNNS_KILLS` sets the number of kills (20 unless set). Each kill is judged alone: what lies on the disk is copied, and the copy
goes on to its end without another kill. The original goes on too, and is killed again."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny_task

from wave_rnns.paper.checkpoints import CheckpointFile
from wave_rnns.paper.training import Training

KILLS = int(os.environ.get("WAVE_RNNS_KILLS", 20))


def live(folder, every, slow_disk=0.0, slow_steps=0.0) -> int:
    "One life of a training process. It notes the step at which it begins, and is slowed down so that a kill can hit anything."
    folder, real_fsync, real_step = Path(folder), os.fsync, Training.make_step

    def fsync(fd):
        real_fsync(fd)
        time.sleep(slow_disk)

    def make_step(self, graph=None):
        if not (folder / "begun").exists():
            (folder / "begun.part").write_text(str(self.history.step))
            os.replace(folder / "begun.part", folder / "begun")
        time.sleep(slow_steps)
        real_step(self, graph)

    os.fsync, Training.make_step = fsync, make_step
    return tiny_task.main(str(folder / "x.safetensors"), str(every), str(folder / "report.json"))


def start(nursery, folder, every, slow_disk=0.0, slow_steps=0.0):
    (folder / "begun").unlink(missing_ok=True)
    return nursery("test_resume_kill:live", str(folder), every, slow_disk, slow_steps)


def wait_until_it_trains(life, folder):
    while not (folder / "begun").exists() and life.alive():
        time.sleep(0.001)


def step_on_disk(folder) -> int:
    "The step of the newest checkpoint, 0 where none was completed."
    found = CheckpointFile(folder / "x.safetensors").load()
    return found[1]["history"]["step"] if found else 0


def begun_at(folder) -> int:
    "The step at which the last life began to train; where only the last step's results were missing, that is the last."
    begun = folder / "begun"
    return int(begun.read_text()) if begun.exists() else tiny_task.RHYTHM["steps"]


def end(folder):
    "Results, and what the last checkpoint holds: weights, Adam's averages, best weights and history, without the clock."
    tensors, meta = CheckpointFile(folder / "x.safetensors").load()
    meta["history"].pop("seconds")
    meta.pop("environment")
    return json.loads((folder / "report.json").read_text()), {k: repr(t.tolist()) for k, t in tensors.items()}, meta


@pytest.fixture(scope="module")
def untouched(nursery, tmp_path_factory):
    "The end of the run that was never interrupted."
    folder = tmp_path_factory.mktemp("untouched")
    assert start(nursery, folder, 3).end() == 0
    return end(folder)


@pytest.mark.filterwarnings("ignore:.*The checkpoint before it")
@pytest.mark.parametrize(
    "name, kills, slow_disk, slow_steps, every",
    [("computing", KILLS - KILLS // 2, 0.0, 0.01, 3), ("writing", KILLS // 2, 0.01, 0.0, 2)],
    ids=["while computing", "while writing"],
)
def test_kill_9(nursery, untouched, tally, tmp_path, name, kills, slow_disk, slow_steps, every):
    chance, folder, copy = random.Random(every), tmp_path / "run", tmp_path / "copy"
    folder.mkdir()
    counts, moments = Counter(kills=0, resumed_bit_equal=0), set()
    while counts["kills"] < kills:
        life = start(nursery, folder, every, slow_disk, slow_steps)
        if chance.random() < 0.8:  # the others are killed while they start, or read what lies there
            wait_until_it_trains(life, folder)
        time.sleep(chance.uniform(0.0, 0.3))
        life.send(signal.SIGKILL)
        code = life.end()
        if code == 0:  # it was faster: the end of a chain of kills, which is looked at too
            assert end(folder) == untouched
            counts["chains_of_kills_ended_bit_equal"] += 1
            shutil.rmtree(folder)
            folder.mkdir()
            continue
        assert code == -signal.SIGKILL
        shutil.copytree(folder, copy)
        step = step_on_disk(copy)
        counts["kills" if step else "before_the_first_checkpoint"] += 1
        counts["in_the_middle_of_a_write"] += any(p.suffix == ".tmp" for p in copy.iterdir())
        assert start(nursery, copy, every).end() == 0
        assert begun_at(copy) == step, "it must have gone on, not begun anew"
        assert end(copy) == untouched, f"killed after step {step}: another end"
        assert not [p for p in copy.iterdir() if p.suffix == ".tmp"]
        counts["resumed_bit_equal"] += step > 0
        moments.add(step)
        shutil.rmtree(copy)
    assert start(nursery, folder, every).end() == 0 and end(folder) == untouched
    tally(f"kill -9 while {name}", **counts, different_steps=len(moments))
    assert counts["resumed_bit_equal"] == counts["kills"] == kills

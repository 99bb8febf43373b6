"The commands as a user meets them: help, one-line errors, exit codes, interruption."

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT, entry_points

from wave_rnns.paper.cli import beside_full
from wave_rnns.paper.config import merge
from wave_rnns.paper.experiments import ABLATIONS, EXPERIMENTS, Run, from_config, to_config
from wave_rnns.paper.grids import H200, Grid, beginning, find_grid, grid_from, h200_seconds
from wave_rnns.paper.records import read_records, shipped_results
from wave_rnns.paper.sweeps import train

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
TINY = {
    "base": "copy30_wrnn",
    "task_options": {"T": 1, "batch_size": 8, "valid_size": 50, "test_size": 50},
    "model": {"n": 8, "c": 2},
    **dict(lr=1e-2, steps=20, eval_every=5, log_every=5),
}
SMALL = {"task_options.batch_size": [8], "task_options.valid_size": [50], "task_options.test_size": [50]}
SMALL |= {"model.n": [8], "model.c": [2], "eval_every": [100], "log_every": [20]}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def grid(tmp_path):
    "A search of two points and three seeds."
    axes = {**SMALL, "steps": [8], "eval_every": [4], "log_every": [2], "lr": [1e-2, 1e-3]}
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"experiments": ["copy0_wrnn"], "axes": axes, "seeds": [0, 1, 2], "together": 2}))
    return path


def test_entry_points_exist():
    names = ("train", "todo", "sweep", "tables", "demo", "bench", "show")
    assert entry_points().keys() == {f"wrnn_{name}" for name in names}
    for name, module in entry_points().items():
        assert callable(getattr(importlib.import_module(module), name))


SAYS = {
    "wrnn_train --help": "demo_copy30_wrnn | --seeds | --device | --results | --resume | --list | 75 | a pattern like",
    "wrnn_todo --help": "no record yet | --results | diverged run counts as done",
    "wrnn_tables --help": "from the records of all runs | --results",
    "wrnn_sweep --help": "--workers | --seeds | --results | --show | --slurm | --finals | 75 | none is counted twice",
    "wrnn_train --list": " | ".join(EXPERIMENTS),
    "wrnn_todo copy80_* --results none": "copy80_wrnn | runs to do",
    "wrnn_sweep --list": "paper 421 runs | smnist_wrnn 60 runs: 1 experiments x 3 lr x 5 clip",
}


@pytest.mark.parametrize("command", SAYS)
def test_what_only_looks_does_not_wait_for_torch(script, command):
    name, *args = command.split()
    code = (
        f"import runpy, sys; sys.argv = [{str(script(name))!r}, *{args!r}]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules, 'it waited for torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(words in " ".join(done.stdout.split()) for words in SAYS[command].split(" | ")), done.stdout


def test_train_todo_tables(call, tiny, tmp_path):
    "What `wrnn_todo` prints can be pasted: it names the file and the folder."
    todo = f"wrnn_train {tiny} --seeds {{}} --results r\n# {{}} runs to do, {{}} done"
    assert call("wrnn_todo", tiny, "--results", "r")[1].startswith(todo.format("0,1,2,3,4", 5, 0))
    code, out, err = call("wrnn_train", tiny, "--seeds", "0-3", "--results", "r", "--device", "cpu")
    assert code == 0 and "tiny seed 0: done; test cross_entropy" in out and err == ""
    code, out, _ = call("wrnn_todo", tiny, "--results", "r")
    assert out.startswith(todo.format("4", 1, 4))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "r/runs/copy").iterdir()}
    pasted = shlex.split(out.splitlines()[0])
    assert call(*pasted, "--device", "cpu")[0] == 0 and call("wrnn_todo", tiny, "--results", "r")[1].startswith("# 0 ")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "r/runs/copy").iterdir()}
    assert written.items() > stamps.items()  # what was done was left alone
    assert call("wrnn_tables", "--results", "r")[1].startswith("5 records -> summary.md")
    assert call(*pasted, "--device", "cpu", "--resume", "no")[0] == 0  # seed 4 begins anew
    (record,) = (p for p, stamp in written.items() if p.stat().st_mtime_ns != stamp and p.suffix == ".json")
    record.write_text("{")
    code, out, err = call("wrnn_todo", tiny, "--results", "r")
    assert code == 0 and out.startswith(todo.format("4", 1, 4))
    assert err.count("\n") == 1 and "the run counts as not done" in err


WRONG = {  # exit code and what is said of mistakes that both commands answer alike
    "--seeds one": (2, "expected whole numbers like 0,1"),
    "--together -1": (2, "--together"),
    "--device foo": (1, "use cpu, cuda"),
    "--device cuda:99": (1, "leave --device out"),
}


@pytest.mark.parametrize(
    "command, code, says",
    [
        *((f"{name} {words}", *end) for name in ("wrnn_train tiny.json", "wrnn_sweep grid.json") for words, end in WRONG.items()),
        ("wrnn_train", 2, "wrnn_train --list shows all"),
        ("wrnn_train smnist_wrn", 1, "did you mean 'smnist_wrnn'"),
        ("wrnn_train no_such_*", 1, "wrnn_train --list"),
        ("wrnn_train missing.json", 1, "missing.json"),
        ("wrnn_train wrong.json", 1, "did you mean 'lr'"),
        ("wrnn_train broken.json", 1, "is not JSON"),
        ("wrnn_train tiny.json --device cpu --results tiny.json", 1, "tiny.json/"),
        ("wrnn_sweep", 2, "wrnn_sweep --list shows all"),
        ("wrnn_sweep grid.json --workers -1", 2, "must not be negative"),
        ("wrnn_sweep grid.json --gpus 2 --slurm", 2, "--gpus 0 or 1"),
        ("wrnn_sweep grid.json --finals 5 --slurm", 2, "start it without --slurm"),
        ("wrnn_sweep copy_wrn", 1, "grids are copy_wrnn"),
        ("wrnn_sweep missing.json", 1, "missing.json"),
        ("wrnn_sweep grid.json --show --results typo", 1, "there is no results folder"),
        ("wrnn_tables --results typo", 1, "there is no results folder typo"),
        ("wrnn_bench --device quantum", 1, "unknown device 'quantum'"),
        ("wrnn_demo --device foo", 1, "unknown device 'foo': use cpu, cuda"),
        *((f"wrnn_demo --quick {q}", 2, f"--quick {q}: expected a fraction of the steps, 0 to 1") for q in (-1, "nan")),
        ("wrnn_demo --quick 0.01 --out tiny.json/x --device cpu", 1, "tiny.json"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_a_remedy(call, tiny, grid, tmp_path, command, code, says):
    (tmp_path / "wrong.json").write_text('{"base": "copy30_wrnn", "lrr": 1}')
    (tmp_path / "broken.json").write_text("{")
    name, *args = command.split()
    found, out, err = call(name, *args)
    assert (found, out) == (code, "") and says in err and err.count("\n") == 1 and err.startswith(f"{name}: ")
    assert {p.name for p in tmp_path.iterdir()} == {"bin", "tiny.json", "grid.json", "wrong.json", "broken.json"}


def test_missing_data_is_one_line(call, tmp_path):
    nowhere = {"WAVE_RNNS_DATA": str(tmp_path / "none"), "WAVE_RNNS_MNIST_URL": "http://127.0.0.1:9/"}
    code, _, err = call("wrnn_train", "smnist_cpu", "--results", "r", **nowhere)
    assert code == 1 and err.count("\n") <= 2 and "WAVE_RNNS_DATA" in err
    assert not list((tmp_path / "r").glob("runs/*/*"))


def test_todo_into_head(script, tmp_path):
    command = f"{sys.executable} {script('wrnn_todo')} --results none | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("wrnn_train ") and done.stderr == ""


def once_it_trains(process, results) -> None:
    while not list(results.glob("checkpoints/*.lock")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def ends(results) -> dict:
    return {p.name: json.loads(p.read_text())["test_final"] for p in results.glob("runs/copy/*.json")}


def test_interrupted_saves_exits_75_and_goes_on(script, call, tmp_path):
    "Stop it in the middle; the same command goes on; the records are those of a run that was never stopped."
    (tmp_path / "long.json").write_text(json.dumps({**TINY, "steps": 1000, "eval_every": 100, "log_every": 20}))
    args = ["long.json", "--seeds", "0", "--device", "cpu", "--results", "r"]
    command = [sys.executable, script("wrnn_train"), *args]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    once_it_trains(process, tmp_path / "r")
    process.send_signal(signal.SIGTERM)  # Ctrl-C: test_reproduce_goes_on_where_it_was_stopped
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "start again to go on" in err and err.count("\n") == 1 and "Traceback" not in err
    assert list((tmp_path / "r").glob("checkpoints/*.safetensors")) and not list((tmp_path / "r").glob("runs/*/*"))
    assert call("wrnn_train", *args)[0] == 0
    assert call("wrnn_train", *args[:-1], "whole")[0] == 0
    assert len(ends(tmp_path / "r")) == 1 and ends(tmp_path / "r") == ends(tmp_path / "whole")


def test_a_sweep_from_beginning_to_end(call, grid, tmp_path):
    code, out, _ = call("wrnn_sweep", grid, "--results", "r", "--device", "cpu", "--workers", "1", "--finals", "5,6")
    assert code == 0 and "grid: 6 runs: 6 done" in out and "grid_finals: 2 runs: 2 done" in out
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*")}
    code, out, err = call("wrnn_sweep", grid, "--results", "r", "--show")
    assert code == 0 and out.count("validation cross_entropy") == 2 and err == ""
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*")}  # a look changes nothing
    _, _, err = call("wrnn_sweep", grid, "--results", "r", "--show", "--finals", "0")
    assert err.count("took part in the choice") == 1


def test_runs_that_fail_make_exit_code_1_and_the_rest_is_done(call, grid, tmp_path):
    points = [to_config(point) for *_, point in find_grid(str(grid)).points()]
    wrong = merge(points[0], {"name": "wrong", "task_options": {"delay": 3}})
    (tmp_path / "both.json").write_text(json.dumps({"experiments": [wrong, *points], "axes": {}}))
    code, out, err = call("wrnn_sweep", "both.json", "--results", "r", "--device", "cpu", "--workers", "1")
    assert code == 1 and "1 populations failed" in err and "no option 'delay'" in err and "2 done, 1 left" in out


def test_slurm_prints_a_script_that_can_be_edited(call, grid, tmp_path):
    "A folder's name is one word of the script, whatever it says."
    args = "--slurm --workers 3 --gpus 1 --cpus 4 --minutes 90 --device cuda --seeds 0-4".split()
    code, out, err = call("wrnn_sweep", grid, *args, "--results", folder := "a folder; touch x; $(touch y) `z`")
    assert code == 0 and err == "" and not (tmp_path / folder).exists()
    for line in "--array=0-2 --time=90 --cpus-per-task=4 --gpus-per-task=1 --requeue --signal=TERM@120".split():
        assert f"#SBATCH {line}\n" in out
    (command,) = (line for line in out.splitlines() if line.startswith("srun "))
    words = shlex.split(command)
    assert words[words.index("--results") + 1] == str(tmp_path / folder)
    assert words[words.index("--workers") + 1] == "1" and str(grid) in words and "0-4" in words


@pytest.fixture
def make(script, tmp_path):
    "`make reproduce` of a tiny grid, as a process on one core, so that one worker trains: two populations of two runs."
    bin = tmp_path / "venv"
    bin.mkdir()
    for name in ("wrnn_sweep", "wrnn_tables"):
        (bin / name).write_text(f'#!/bin/sh\nexec {sys.executable} {script(name)} "$@"\n')
        (bin / name).chmod(0o755)
    grid = {"experiments": ["copy0_wrnn", "copy10_wrnn"], "axes": {**SMALL, "steps": [300]}, "seeds": [0, 1]}
    (tmp_path / "tiny.json").write_text(json.dumps(grid))

    def start(grid="tiny.json", **variables):
        variables = {"BIN": bin, "READY": "tiny.json", "GRID": grid, "RESULTS": "r", **variables}
        words = [f"{name}={value}" for name, value in variables.items()]
        command = ["make", "-f", ROOT / "Makefile", "-o", "tiny.json", "reproduce", *words]
        return subprocess.Popen(
            command, cwd=tmp_path, env={**ENV, "CUDA_VISIBLE_DEVICES": ""}, text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,  # Ctrl-C goes to all of it, as in a terminal
        )  # fmt: skip

    return start


def test_reproduce_goes_on_where_it_was_stopped(make, tmp_path):
    "Saved, and the same line ends where an undisturbed one ends, with all tables."
    process = make(DEVICE="cpu")
    once_it_trains(process, tmp_path / "r")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode and "start again to go on" in err, err
    assert list((tmp_path / "r").glob("checkpoints/*.safetensors")) and not (tmp_path / "r/tables").exists()
    out, err = (process := make(DEVICE="cpu")).communicate(timeout=240)
    assert process.returncode == 0 and "tiny: 4 runs: 4 done" in out, err
    assert "0 of 4 runs done" in err and re.search(r"2 of 4 runs done, about \d+ \w+ left", err), err
    assert "4 of 4 runs done\n" in err
    tables = {p.name for p in (tmp_path / "r/tables").iterdir()}
    assert {"table1.md", "table4.md", "table7.md", "runs.md"} <= tables
    train(find_grid(str(tmp_path / "tiny.json")).runs(), tmp_path / "whole", "cpu", progress=False)
    assert len(ends(tmp_path / "r")) == 4 and ends(tmp_path / "r") == ends(tmp_path / "whole")


def test_reproduce_without_a_gpu_says_what_it_takes(make, tmp_path):
    process = make(grid="quick")
    _, err = process.communicate(timeout=120)
    assert process.returncode and re.search(r"about \d+ min on one H200", err) and "DEVICE=cpu" in err
    assert not list((tmp_path / "r").glob("*/*"))


def test_quick_is_the_beginning_of_the_full_run(tmp_path, monkeypatch):
    "To the last digit; its table says so, and no table of the paper takes it."
    whole = grid_from({"name": "g", "experiments": ["copy0_wrnn"], "axes": {**SMALL, "steps": [400]}})
    full = replace(whole.points()[0][2], name="tiny_full")
    monkeypatch.setitem(EXPERIMENTS, "tiny_full", full)
    train([Run(full, 0)], tmp_path / "full", "cpu", progress=False)
    short = beginning("tiny_full", 1) | {"steps": 200}
    grid = grid_from({"name": "quick", "experiments": [short], "seeds": [0]})
    train(grid.runs(), tmp_path / "r", "cpu", progress=False)
    table = beside_full(grid, tmp_path / "r", tmp_path / "full")
    (row,) = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| tiny_full")]
    assert row[2] == "200" and row[4] == row[5] != "–"
    assert beside_full(Grid("g", (full,)), tmp_path / "full", None) == ""


def test_quick_holds_every_row_of_the_full_run_and_none_of_its_lengths():
    "Of Table 4's search it takes the declared row of each kind. That it takes minutes: notebook 17."
    runs = find_grid("quick").runs()
    quick = {run.experiment.name.removeprefix("quick_") for run in runs}
    full = {run.experiment.name for run in find_grid("paper").runs()}
    assert quick - full <= {f"copy80_{row}" for row in ABLATIONS}
    assert all(run.experiment.steps < 10_000 and run.experiment.epochs <= 20 for run in runs)


def test_the_costs_are_those_of_the_records():
    "Within a factor of two, for every record on a GPU whose run had company."
    compared = set()
    for record in read_records(shipped_results()):
        if record["device"] == "cpu" or record["together"] < 3 or "pruned" in record:
            continue
        e = from_config(record["config"])
        if (e.task, e.model.kind, e.model.n) not in H200:
            continue
        guess = h200_seconds(Run(e, record["seed"]))
        took = record["steps"] / record["steps_per_second"] / record["together"]
        assert 0.45 < guess / took < 2.2, (e.name, guess, took)
        compared.add((e.task, e.model.kind))
    assert len(compared) >= 5

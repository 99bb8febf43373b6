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
from pathlib import Path

import pytest
from conftest import entry_points

from wave_rnns.paper.cli import beside_full
from wave_rnns.paper.experiments import EXPERIMENTS, Run, from_config, to_config
from wave_rnns.paper.records import read_records, shipped_results
from wave_rnns.paper.grids import Grid, beginning, find_grid, grid_from, h200_seconds, populations
from wave_rnns.paper.sweeps import train

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
TINY = {
    "base": "copy30_wrnn",
    "task_options": {"T": 1, "batch_size": 8, "valid_size": 50, "test_size": 50},
    "model": {"n": 8, "c": 2},
    **dict(lr=1e-2, steps=20, eval_every=5, log_every=5),
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def test_entry_points_exist():
    assert entry_points().keys() == {
        f"wrnn_{name}" for name in ("train", "todo", "sweep", "tables", "demo", "bench", "show")
    }
    for name, module in entry_points().items():
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    "name, says",
    [
        (
            "wrnn_train",
            ["demo_copy30_wrnn", "--seeds", "--device", "--results", "--resume", "--list", "75", "a pattern like"],
        ),
        ("wrnn_todo", ["no record yet", "--results", "diverged run counts as done"]),
        ("wrnn_tables", ["from the records of all runs", "--results"]),
        (
            "wrnn_sweep",
            [
                "--workers",
                "--seeds",
                "--results",
                "--show",
                "--slurm",
                "exit code 75",
                "no run is lost, none is counted twice",
            ],
        ),
    ],
)
def test_help_explains_and_does_not_wait_for_torch(script, name, says):
    path = str(script(name))
    code = (
        f"import runpy, sys; sys.argv = [{path!r}, '--help']\n"
        f"try: runpy.run_path({path!r}, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch'} & sys.modules.keys(), 'help waited for torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(word in " ".join(done.stdout.split()) for word in says)


@pytest.mark.parametrize("command", ["wrnn_train --list", "wrnn_todo", "wrnn_todo copy80_*", "wrnn_sweep --list"])
def test_what_only_looks_does_not_wait_for_torch(script, command):
    name, *args = command.split()
    code = (
        f"import runpy, sys; sys.argv = [{str(script(name))!r}, *{args!r}]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys(), 'it waited for torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("\n") > 2, done.stderr


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
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())  # what was done was left alone
    code, out, err = call("wrnn_tables", "--results", "typo")
    assert code == 1 and "there is no results folder typo" in err and not (tmp_path / "typo").exists()
    code, out, err = call("wrnn_tables", "--results", "r")
    assert code == 0 and out.startswith("5 records -> summary.md")


def test_begin_anew(call, tiny, tmp_path):
    for args in ([], ["--resume"], ["--resume", "no"]):
        assert call("wrnn_train", tiny, "--seeds", "0", "--results", "r", "--device", "cpu", *args)[0] == 0
        stamps = [p.stat().st_mtime_ns for p in (tmp_path / "r/runs/copy").glob("*.json")]
        if args == []:
            first = stamps
        assert (stamps == first) == (args != ["--resume", "no"])


def test_list_shows_every_experiment(call):

    code, out, _ = call("wrnn_train", "--list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(EXPERIMENTS)


def test_todo_knows_what_is_declared(call):
    code, out, _ = call("wrnn_todo", "adding1000_*", "--results", "none")
    assert code == 0
    first, second, *_ = (shlex.split(line) for line in out.splitlines())
    assert first[:2] == ["wrnn_train", "adding1000_wrnn"] and second[:2] == ["wrnn_train", "adding1000_irnn"]
    assert first[2:] == ["--seeds", "0,1,2,3,4", "--results", "none"]


@pytest.mark.parametrize(
    "args, code, says",
    [
        ([], 2, "wrnn_train --list shows all"),
        (["--no-such-option"], 2, "unrecognized arguments"),
        (["smnist_cpu", "--seeds", "one"], 2, "expected whole numbers like 0,1"),
        (["smnist_cpu", "--together", "x"], 2, "invalid int value"),
        (["smnist_wrn"], 1, "did you mean 'smnist_wrnn'"),
        (["no_such_*"], 1, "wrnn_train --list"),
        (["missing.json"], 1, "missing.json"),
        (["copy30_wrnn", "--together", "-1"], 2, "expected a number of runs, 0 or more"),
        (["copy30_wrnn", "--device", "foo"], 1, "use cpu, cuda"),
        (["copy30_wrnn", "--device", "meta"], 1, "use cpu, cuda"),
        (["copy30_wrnn", "--device", "cuda:99"], 1, "leave --device out"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(call, tmp_path, args, code, says):
    found, out, err = call("wrnn_train", *args, WAVE_RNNS_RESULTS=str(tmp_path / "r"))
    assert (found, out) == (code, "") and says in err
    if code == 1 or "unrecognized" not in err and "invalid" not in err:  # argparse adds its own usage lines
        assert err.count("\n") == 1 and err.startswith("wrnn_train: ")
    assert not list(Path.cwd().glob("runs"))


def test_wrong_files(call, tmp_path):
    for text, says in (
        ('{"base": "copy30_wrnn", "lrr": 1}', "did you mean 'lr'"),
        ("{", "is not JSON"),
        ('{"base": "copy"}', "no experiment"),
    ):
        (tmp_path / "wrong.json").write_text(text)
        code, _, err = call("wrnn_train", "wrong.json")
        assert code == 1 and says in err and err.count("\n") == 1


def test_missing_data_is_one_line(call, tmp_path):
    code, _, err = call(
        "wrnn_train",
        "smnist_cpu",
        "--results",
        "r",
        WAVE_RNNS_DATA=str(tmp_path / "none"),
        WAVE_RNNS_MNIST_URL="http://127.0.0.1:9/",
    )
    assert code == 1 and err.count("\n") <= 2 and "WAVE_RNNS_DATA" in err
    assert not list((tmp_path / "r").glob("runs/*/*"))


def test_a_results_folder_that_cannot_be_written(call, tiny, tmp_path):
    (tmp_path / "r").write_text("a file, not a folder")
    code, _, err = call("wrnn_train", tiny, "--results", "r", "--device", "cpu")
    assert code == 1 and err.count("\n") == 1 and "r/" in err


def test_a_damaged_record_is_one_warning(call, tiny, tmp_path):
    call("wrnn_train", tiny, "--results", "r", "--device", "cpu", "--seeds", "0")
    (record,) = (tmp_path / "r/runs/copy").glob("*.json")
    record.write_text("{")
    code, out, err = call("wrnn_todo", tiny, "--results", "r")
    assert code == 0 and "5 runs to do" in out
    assert err.count("\n") == 1 and "the run counts as not done" in err


def test_todo_into_head(script, tmp_path):
    command = f"{sys.executable} {script('wrnn_todo')}" + " --results none | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("wrnn_train ") and done.stderr == ""


def test_interrupted_saves_exits_75_and_goes_on(script, call, tmp_path):
    "Stop it in the middle; the same command goes on; the records are those of a run that was never stopped."
    (tmp_path / "long.json").write_text(json.dumps({**TINY, "steps": 1000, "eval_every": 100, "log_every": 20}))
    args = ["long.json", "--seeds", "0", "--device", "cpu", "--results", "r"]
    process = subprocess.Popen(
        [sys.executable, script("wrnn_train"), *args],
        cwd=tmp_path,
        env=ENV,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / "r").glob("checkpoints/*.lock")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)  # Ctrl-C: test_reproduce_goes_on_where_it_was_stopped
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "start again to go on" in err and err.count("\n") == 1 and "Traceback" not in err
    assert list((tmp_path / "r").glob("checkpoints/*.safetensors")) and not list((tmp_path / "r").glob("runs/*/*"))
    assert call("wrnn_train", *args)[0] == 0
    assert call("wrnn_train", *args[:-1], "whole")[0] == 0
    a, b = (
        {p.name: json.loads(p.read_text())["test_final"] for p in tmp_path.glob(f"{r}/runs/copy/*.json")}
        for r in ("r", "whole")
    )
    assert len(a) == len(b) == 1 and a == b


# One command ----------------------------------------------------------------------------------------------------------

SMALL = {"task_options.batch_size": [8], "task_options.valid_size": [50], "task_options.test_size": [50]}
SMALL |= {"model.n": [8], "model.c": [2], "eval_every": [100], "log_every": [20]}


@pytest.fixture
def make(script, tmp_path):
    "`make reproduce` of a tiny grid, as a process: two populations of two runs."
    bin = tmp_path / "venv"
    bin.mkdir()
    for name in ("wrnn_sweep", "wrnn_tables"):
        (bin / name).write_text(f'#!/bin/sh\nexec {sys.executable} {script(name)} "$@"\n')
        (bin / name).chmod(0o755)
    grid = {"experiments": ["copy0_wrnn", "copy10_wrnn"], "axes": {**SMALL, "steps": [300]}, "seeds": [0, 1]}
    (tmp_path / "tiny.json").write_text(json.dumps(grid))

    def start(results="r", grid="tiny.json", **variables):
        words = {"BIN": bin, "READY": "tiny.json", "GRID": grid, "RESULTS": results, **variables}
        return subprocess.Popen(
            ["make", "-f", ROOT / "Makefile", "-o", "tiny.json", "reproduce", *(f"{k}={v}" for k, v in words.items())],
            cwd=tmp_path,
            env={**ENV, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that Ctrl-C can be sent to all of it, as a terminal does
        )

    return start


def test_reproduce_goes_on_where_it_was_stopped(make, tmp_path):
    "Saved, and the same line ends where an undisturbed one ends, with all tables."
    process = make(DEVICE="cpu")
    while not list((tmp_path / "r").glob("checkpoints/*.lock")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.7)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode and "start again to go on" in err, err
    assert list((tmp_path / "r").glob("checkpoints/*.safetensors")) and not (tmp_path / "r/tables").exists()
    out, err = (process := make(DEVICE="cpu")).communicate(timeout=240)
    assert process.returncode == 0 and "tiny: 4 runs: 4 done" in out, err
    assert "0 of 4 runs done" in err and re.search(r"2 of 4 runs done, about \d+ \w+ left", err), err
    assert "4 of 4 runs done\n" in err
    tables = {p.name for p in (tmp_path / "r/tables").iterdir()}
    assert {"table1.md", "table4.md", "table7.md", "runs.md"} <= tables
    train(find_grid(str(tmp_path / "tiny.json")).runs(), tmp_path / "whole", "cpu", progress=False)
    ends = [
        {p.name: json.loads(p.read_text())["test_final"] for p in (tmp_path / r).glob("runs/copy/*.json")}
        for r in ("r", "whole")
    ]
    assert len(ends[0]) == 4 and ends[0] == ends[1]


@pytest.mark.parametrize("grid", ["paper", "quick"])
def test_reproduce_without_a_gpu_says_what_it_takes(make, tmp_path, grid):
    process = make(grid=grid)
    out, err = process.communicate(timeout=120)
    assert process.returncode and re.search(r"about (\d h )?\d+ min on one H200", err) and "DEVICE=cpu" in err
    assert not list((tmp_path / "r").glob("*/*"))


def test_quick_is_the_beginning_of_the_full_run(tmp_path, monkeypatch):
    "To the last digit; its table says so, and no table of the paper takes it."

    full = replace(
        grid_from({"name": "g", "experiments": ["copy0_wrnn"], "axes": {**SMALL, "steps": [400]}}).points()[0][2],
        name="tiny_full",
    )
    monkeypatch.setitem(EXPERIMENTS.declared, "tiny_full", (None, json.loads(json.dumps(to_config(full)))))
    train([Run(full, 0)], tmp_path / "full", "cpu", progress=False)
    short = beginning("tiny_full", 1) | {"steps": 200}
    grid = grid_from({"name": "quick", "experiments": [short], "seeds": [0]})
    train(grid.runs(), tmp_path / "r", "cpu", progress=False)
    table = beside_full(grid, tmp_path / "r", tmp_path / "full")
    (row,) = [line.split(" | ") for line in table.splitlines() if line.startswith("| tiny_full")]
    assert row[2] == "200" and row[4] == row[5] != "–"
    assert beside_full(Grid("g", (full,)), tmp_path / "full", None) == ""


def test_quick_takes_less_than_a_quarter_of_an_hour():
    "On one H200, by what the committed records and the runs named in notebook 17 took, and six seconds to start each population."
    runs = find_grid("quick").runs()
    assert sum(map(h200_seconds, runs)) + 6 * len(populations(runs, 64)) < 15 * 60
    full = {run.experiment.name for run in find_grid("paper").runs()}
    assert {run.experiment.name.removeprefix("quick_") for run in runs} - full <= {
        f"copy80_{row}" for row in ("wrnn_no_V", "wrnn_no_u", "wrnn_identity", "wrnn_no_both", "irnn_identity")
    } | {f"copy80_{row}" for row in ("irnn_random", "irnn_sigma", "irnn_sigma_V")}
    assert all(run.experiment.steps != 60_000 for run in runs)


def test_the_costs_are_those_of_the_records():
    "Within a factor of two, for every record on a GPU whose run had company."
    compared = set()
    for record in read_records(shipped_results()):
        if record["device"] == "cpu" or record["together"] < 3 or "pruned" in record:
            continue
        e = from_config(record["config"])
        guess = h200_seconds(Run(e, record["seed"]))
        if guess is None:
            continue
        took = record["steps"] / record["steps_per_second"] / record["together"]
        assert 0.45 < guess / took < 2.2, (e.name, guess, took)
        compared.add((e.task, e.model.kind))
    assert len(compared) >= 5

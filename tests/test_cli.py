"The commands as a user meets them: help, one-line errors, exit codes, interruption."

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import entry_points

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
    from wave_rnns.paper.experiments import EXPERIMENTS

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_saves_exits_75_and_goes_on(script, call, tmp_path, number):
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
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "start again to go on" in err and err.count("\n") == 1 and "Traceback" not in err
    assert list((tmp_path / "r").glob("checkpoints/*.safetensors")) and not list((tmp_path / "r").glob("runs/*/*"))
    assert call("wrnn_train", *args)[0] == 0
    if number == signal.SIGINT:
        return  # once is enough for the comparison
    assert call("wrnn_train", *args[:-1], "whole")[0] == 0
    a, b = (
        {p.name: json.loads(p.read_text())["test_final"] for p in tmp_path.glob(f"{r}/runs/copy/*.json")}
        for r in ("r", "whole")
    )
    assert len(a) == len(b) == 1 and a == b

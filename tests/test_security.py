"""Nothing that is read can run code, nothing that is named can leave its folder.

Ruff follows names through imports and aliases. That a pickle in the place of a checkpoint does not run:
test_checkpoints.py; that no name becomes a word of a shell: test_cli.py and notebook 17_workers."""

import contextlib
import getpass
import json
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_task
from conftest import ROOT

from wave_rnns.core import ConfigError, RecordError, WaveRNNError, environment
from wave_rnns.paper import cli, data, grids, records, sweeps
from wave_rnns.paper import experiments as ex

SOURCES = sorted([*ROOT.glob("wave_rnns/**/*.py"), *ROOT.glob("nbs/_web/*.py")])

BANNED = """pickle _pickle cloudpickle dill joblib shelve marshal jsonpickle pandas multiprocessing torch.multiprocessing concurrent.futures
code codeop imp runpy yaml importlib.import_module torch.load torch.save torch.jit.load torch.hub torch.export.load torch.package numpy.load
numpy.lib.format.read_array os.system os.popen os.execl os.execv os.execvp os.spawnl os.spawnv os.posix_spawn pty.spawn subprocess.run
subprocess.Popen subprocess.call subprocess.check_call subprocess.check_output subprocess.getoutput subprocess.getstatusoutput tempfile.mktemp
shutil.unpack_archive ctypes.CDLL""".split()
# banned names, getattr of a constant, exec, eval, shells
RULES = "TID251 B009 S102 S307 S506 S602 S604 S605 S606".split()
WORDS = re.compile(
    r"(?<![.\w])compile(?=\()|__import__|\.extract(?:all)?(?=\()|allow_pickle(?!=False)|weights_only|shell=|set_executable"
)
ALLOWED = {  # (file, what) -> why
    ("launch.py", "importlib.import_module"): "cuda.bindings, by constant names",
    ("__init__.py", "importlib.import_module"): "the layer, by a constant name",
    ("api.py", "importlib.import_module"): "lists the package's own modules",
    ("tasks.py", "importlib.import_module"): "a task of the user's own, where the caller is trusted (test_tasks.py)",
    ("data.py", "numpy.load"): "the shipped digits, with allow_pickle=False",
    ("core.py", "subprocess.check_output"): "git and nvidia-smi: words in a list",
    ("workers.py", "subprocess.Popen"): "workers: words in a list",
    ("finish.py", "subprocess.run"): "node: words in a list",
    ("build.py", "__import__"): "smalldocs, by a constant name",
    ("build.py", "yaml"): "safe_load only",
    ("stage.py", "yaml"): "safe_load only",
}


def dangers(paths: list[Path], folder: Path) -> set[tuple[str, str]]:
    "File and name of everything that could run what it reads, or hand a string to a shell."
    banned = "".join(f'"{name}".msg = "say why in ALLOWED"\n' for name in BANNED)
    (folder / "ruff.toml").write_text(f"[lint]\nselect = {RULES}\n[lint.flake8-tidy-imports.banned-api]\n{banned}")
    command = "-m ruff check --no-cache --ignore-noqa --output-format json --config".split()
    done = subprocess.run([sys.executable, *command, folder / "ruff.toml", *paths], capture_output=True, text=True)
    found = {(path.name, m[0]) for path in paths for m in WORDS.finditer(path.read_text())}
    for problem in json.loads(done.stdout):
        name = re.match(r"`([\w.]+)` is banned", problem["message"])
        found.add((Path(problem["filename"]).name, name[1] if name else problem["code"]))
    return found


def test_nothing_that_is_read_can_run(tmp_path):
    "And an exception whose reason has gone is no exception any more."
    assert dangers(SOURCES, tmp_path) == set(ALLOWED)


DISGUISES = {  # one for each way in which something is found
    "def f():\n    from pickle import loads as l": "pickle",
    "import torch as t\nt.load('x', weights_only=True)  # noqa": "torch.load",
    "import torch\ngetattr(torch, 'load')('x')": "B009",
    "import numpy as np\nnp.load('x', allow_pickle=maybe)": "allow_pickle",
    "eval(x)": "S307",
    "exec(compile(x, '', 'exec'))": "S102",
    "import subprocess\nsubprocess.run(['ls'], shell=flag)": "shell=",
    "import yaml\nyaml.load(x)": "S506",
    "tar.extractall(folder)": ".extractall",
    "import re, json, torch, safetensors.torch\nre.compile('x'); model.eval(); json.load(f); safetensors.torch.load(d)": None,
}


def test_disguises_are_seen_through_and_the_harmless_left_alone(tmp_path):
    paths = [tmp_path / f"{number}.py" for number in range(len(DISGUISES))]
    for path, source in zip(paths, DISGUISES, strict=True):
        path.write_text(source + "\n")
    found = dangers(paths, tmp_path)
    for path, what in zip(paths, DISGUISES.values(), strict=True):
        here = {name for file, name in found if file == path.name}
        assert what in here if what else not here


MODEL = tiny_task.ModelConfig("wrnn", 10, 10, n=12, c=2, every_step=True)
SIZES = {"T": 1, "batch_size": 4, "valid_size": 5, "test_size": 5}
TINY = ex.Experiment("tiny", "copy", SIZES, MODEL, lr=1e-2, steps=4, eval_every=2, log_every=1)

CONFIG, EVIL = ex.to_config(TINY), {"command": ["rm"]}
UNKNOWN = {
    "experiment": {"experiments": [CONFIG | EVIL]},
    "model": {"experiments": [CONFIG | {"model": CONFIG["model"] | EVIL}]},
    "grid": {"experiments": [CONFIG]} | EVIL,
    "axis": {"experiments": [CONFIG], "axes": EVIL},
}


@pytest.mark.parametrize("where", UNKNOWN)
def test_an_unknown_key_is_refused_and_named(where, tmp_path):
    "Beside a base: test_cli.py; in weights: test_checkpoints.py; among a task's options: notebook 12_tasks."
    (tmp_path / "x.json").write_text(json.dumps({"axes": {}, **UNKNOWN[where]}))
    with pytest.raises(ConfigError, match="command"):
        grids.find_grid(str(tmp_path / "x.json")).runs()


# Names and their folders ----------------------------------------------------------------------------------------------

NAMES = [
    "../x", "..", ".", "a/b", "/etc/passwd", "x\0y", "x\ny", "$(touch x)", "; touch x", "`touch x`", "-rf", "~", "x" * 300, "", "\u202e", "CON\\x",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    "A results folder inside a folder in which nothing else may appear."
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious.json").write_text("not a record")
    (tmp_path / "results" / "runs").mkdir(parents=True)
    yield tmp_path / "results"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside", "results"]
    assert [p.name for p in (tmp_path / "outside").iterdir()] == ["precious.json"]
    assert (tmp_path / "outside" / "precious.json").read_text() == "not a record"


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_would_leave_the_folder(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for task, key in ((name, "0123456789abcdef"), ("copy", name)):  # run_path itself: notebook 15_records
        with pytest.raises(RecordError):
            records.write_record(folder, {"config": {"task": task}, "key": key, "best_step": None}, [])
    for field in ("name", "task"):
        with pytest.raises(ConfigError):
            ex.from_config({**CONFIG, field: name})
    for command in (cli.wrnn_train, cli.wrnn_sweep, cli.wrnn_todo):
        with pytest.raises((WaveRNNError, OSError)):
            command(name, results=str(folder))
    for call in (lambda name: grids.Grid(name, (TINY,)), data.have_data, data.fetch, data.load_raw):
        with pytest.raises(ConfigError):
            call(name)
    assert [p.name for p in folder.rglob("*")] == ["runs"]


@pytest.mark.filterwarnings("ignore:.*has not the name of a record")
@pytest.mark.parametrize("link", ["runs/copy", "runs", "a record", "a curve"])
def test_links_out_of_the_results_folder(link, folder):
    "Neither written, nor renamed, nor taken for a record."
    run, outside = ex.Run(TINY, 0), folder.parent / "outside"
    if link == "runs":
        (folder / "runs").rmdir()
    path = {"a record": run.path(folder), "a curve": run.path(folder, ".csv")}.get(link, folder / link)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside if "r" == link[0] else outside / "precious.json")
    for act in (lambda: records.read_records(folder), lambda: sweeps.train([run], folder, "cpu", progress=False)):
        # refused, or the link itself replaced: `folder` looks at what is outside
        with contextlib.suppress(RecordError):
            assert all(r["key"] == run.key for r in act())
    assert not (outside / "copy").exists()


@pytest.mark.filterwarnings("ignore:.*has not the name of a record")
def test_strangers_among_the_records_stop_nothing(folder):
    record, path = sweeps.train([ex.Run(TINY, 0)], folder, "cpu", progress=False), ex.Run(TINY, 0).path(folder)
    for name in ("notes.json", "0123.json", "x" * 200 + ".json", "copy of a record.json"):
        (path.parent / name).write_text("{}")
    assert records.read_records(folder) == record


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_in_the_place_of_the_checkpoints(resume, folder):
    "`--resume no` deletes half-finished populations: not in a folder that somebody put there as a link."
    (folder / "checkpoints").symlink_to(folder.parent / "outside")
    with pytest.raises(RecordError, match="leads out"):
        sweeps.train([ex.Run(TINY, 0)], folder, "cpu", resume=resume, progress=False)


def test_no_secret_in_the_environment_of_a_record(monkeypatch):
    "A record tells the machine's versions, and nothing of its user."
    for name in ("USER", "LOGNAME", "HOME"):
        monkeypatch.setenv(name, "alice")
    for module, name in ((platform, "node"), (socket, "gethostname"), (getpass, "getuser")):
        monkeypatch.setattr(module, name, lambda: "alice")
    assert "alice" not in json.dumps(environment())

"""Nothing that is read can run code, nothing that is named can leave its folder, no name becomes a word of a shell.

The package's source is walked, not searched: what a name stands for is followed through imports and aliases. Then a process lives the
package's whole life under Python's audit hooks, which see what the source does not show."""

import ast
import contextlib
import json
import os
import re
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_task
from conftest import ROOT

from wave_rnns.paper import checkpoints, cli, data, records, reports, sweeps, tasks
from wave_rnns.paper import experiments as ex
from wave_rnns.core import CheckpointError, ConfigError, RecordError, WaveRNNError, environment
from wave_rnns.paper.models import build_model

SOURCES = sorted([*ROOT.glob("wave_rnns/**/*.py"), *ROOT.glob("nbs/_web/*.py")])

MODULES = {  # whose very import is to be justified: they unpickle, or hand work over as pickles
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "pandas", "multiprocessing",
    "torch.multiprocessing", "concurrent.futures", "code", "codeop", "commands", "imp", "runpy", "yaml",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "importlib.import_module",
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.export.load", "torch.package.PackageImporter",
    "torch.hub.load_state_dict_from_url", "numpy.lib.format.read_array",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "os.execl", "os.execv", "os.execvp", "os.spawnl",
    "os.spawnv", "os.posix_spawn", "pty.spawn", "tempfile.mktemp", "shutil.unpack_archive",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "ctypes.CDLL",
}  # fmt: skip
METHODS = {"extract", "extractall", "read_pickle", "to_pickle", "set_executable"}  # whatever they are called on
RUNNERS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}

ALLOWED = {  # (file, what) -> why
    ("launch.py", "importlib.import_module"): "cuda.bindings, by constant names",
    ("__init__.py", "importlib.import_module"): "the layer, by a constant name",
    ("api.py", "importlib.import_module"): "lists the package's own modules",
    ("tasks.py", "importlib.import_module"): "a task of the user's own, where the caller says trusted=True (test_tasks.py)",
    ("build.py", "__import__"): "smalldocs, by a constant name",
    ("build.py", "yaml"): "safe_load only",
    ("stage.py", "yaml"): "safe_load only",
}  # fmt: skip


def dangers(source: str) -> list[tuple[int, str]]:
    "Line and name of everything in some source that could run what it reads, or hand a string to a shell."
    tree, names, found = ast.parse(source), {}, []

    def full(node) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}  # `compile` may be one
    for node in ast.walk(tree):  # imports first, wherever they stand
        if isinstance(node, ast.Import):
            for a in node.names:  # `import a.b` binds a, `import a.b as c` binds a.b
                names[a.asname or a.name.split(".")[0]] = a.name if a.asname else a.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{a.name}" for a in node.names]
        else:
            imported = []
        for name in imported:
            parents = {name.rsplit(".", k)[0] for k in range(name.count(".") + 1)}
            found += [(node.lineno, m) for m in MODULES & parents]
            found += [(node.lineno, name)] * (name in CALLS)
        loads = isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Load)
        if loads and full(node) in CALLS - parameters:
            found.append((node.lineno, full(node)))  # also where it is passed on instead of called
        if isinstance(node, ast.Call):
            found += [(node.lineno, what) for what in wrong_call(node, full)]
    return sorted(set(found))


def wrong_call(node: ast.Call, full) -> list[str]:
    called, keywords, wrong = full(node.func), {k.arg: k.value for k in node.keywords}, []
    constants = {k: v.value for k, v in keywords.items() if isinstance(v, ast.Constant)}
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        wrong.append(f".{node.func.attr}")
    if "shell" in keywords and constants.get("shell", True) is not False:
        wrong.append("shell=True")
    if "allow_pickle" in keywords and constants.get("allow_pickle", True) is not False:
        wrong.append("allow_pickle")
    if "weights_only" in keywords:
        wrong.append("weights_only")
    if called in RUNNERS and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr, ast.BinOp)):
        wrong.append("a command in one string")
    if called in ("getattr", "operator.attrgetter", "attrgetter"):
        words = {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        wrong += [f"getattr {w}" for w in words & {"load", "system", "popen", "eval", "exec", "loads", "__reduce__"}]
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_nothing_that_is_read_can_run(path):
    found = [(line, what) for line, what in dangers(path.read_text()) if (path.name, what) not in ALLOWED]
    assert not found, f"{path.name}: {found}; if there is no other way, say why in ALLOWED"


def test_what_is_allowed_is_needed():
    "An exception whose reason has gone is no exception any more."
    used = {(path.name, what) for path in SOURCES for _, what in dangers(path.read_text())}
    assert set(ALLOWED) <= used, set(ALLOWED) - used


@pytest.mark.parametrize(
    "source, what",
    [
        ("import pickle", "pickle"),
        ("def f():\n    from pickle import loads as l", "pickle"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch as t\nt.load('x', weights_only=True)", "torch.load"),
        ("from torch import load as l\nl('x')", "torch.load"),
        ("import torch\nread = torch.load", "torch.load"),
        ("import torch\nmap(torch.load, paths)", "torch.load"),
        ("import torch.jit\ntorch.jit.load('x')", "torch.jit.load"),
        ("import torch\ngetattr(torch, 'load')('x')", "getattr load"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
        ("import numpy as np\nnp.load('x', allow_pickle=maybe)", "allow_pickle"),
        ("eval(x)", "eval"),
        ("exec(compile(x, '', 'exec'))", "exec"),
        ("import os as o\no.system('ls')", "os.system"),
        ("from os import popen\npopen('ls')", "os.popen"),
        ("import subprocess\nsubprocess.run('ls ' + name)", "a command in one string"),
        ("from subprocess import run as r\nr(f'ls {name}')", "a command in one string"),
        ("import subprocess\nsubprocess.run(['ls'], shell=flag)", "shell=True"),
        ("import yaml\nyaml.load(x)", "yaml.load"),
        ("from multiprocessing.pool import Pool", "multiprocessing"),
        ("tar.extractall(folder)", ".extractall"),
        ("import marshal", "marshal"),
        ("import shelve", "shelve"),
    ],
)
def test_the_walk_sees_through_disguises(source, what):
    assert what in {w for _, w in dangers(source)}


def test_the_walk_leaves_the_harmless_alone():
    source = "import re, torch, subprocess, numpy as np, safetensors.torch\nre.compile('x'); torch.compile(f); model.eval(); task.load()\n"
    source += "subprocess.run(['ls', name]); np.load('x', allow_pickle=False); safetensors.torch.load(data); json.load(f); 'torch.load'\n"
    assert dangers(source) == []


MODEL = tiny_task.ModelConfig("wrnn", 10, 10, n=12, c=2, every_step=True)
SIZES = {"T": 1, "batch_size": 4, "valid_size": 5, "test_size": 5}
TINY = ex.Experiment("tiny", "copy", SIZES, MODEL, lr=1e-2, steps=4, eval_every=2, log_every=1)

# ------------------------------------------------------------------------------------------------- under audit hooks


def live(folder: str) -> int:
    "The package's whole life: train, stop, go on, records, tables, a sweep's overview, weights, raw data; what was forbidden is written down."
    watched, seen, folder = "pickle.find_class marshal.load marshal.loads os.system os.exec".split(), [], Path(folder)

    def hook(event, arguments):
        # Python loads its own compiled modules by marshal: that is importing, not reading.
        if event in watched and not any("importlib" in f.f_code.co_filename for f in frames()):
            names = [f.f_code.co_name for f in frames()]
            if "read_cifar10" in names:  # torchvision unpickles batches whose every byte was compared
                assert arguments[0].startswith("numpy"), arguments
            else:
                seen.append(f"{event} {arguments!r:.100} {names[:8]}")

    def frames():
        frame = sys._getframe(2)
        while frame:
            yield frame
            frame = frame.f_back

    sys.addaudithook(hook)
    e = replace(TINY, steps=6)
    asked = iter([False, False, True] + [False] * 100)
    runs = [ex.Run(e, seed) for seed in (0, 1)]
    warnings.simplefilter("ignore")
    try:
        sweeps.train(runs, folder, "cpu", progress=False, interrupt=lambda: next(asked))
    except WaveRNNError as error:
        assert "stopped at step" in str(error)
    done = sweeps.train(runs, folder, "cpu", progress=False)
    assert len(done) == len(ex.read_records(folder)) == 2
    ex.read_curve(runs[0].path(folder, ".csv"))
    reports.write_tables(folder)
    sweeps.ranking(sweeps.Grid("g", (e,), seeds=(0, 1)), folder)
    checkpoints.save_weights(folder / "w", build_model(MODEL, 0).state_dict(), MODEL)
    checkpoints.load_weights(folder / "w")
    data.load_digits()
    for name in filter(data.have_data, data.FOLDERS):
        data.load_raw(name)
    try:
        import pickle

        pickle.loads(pickle.dumps(SimpleNamespace(a=1)))
    finally:
        (folder / "seen.json").write_text(json.dumps(seen))
    return 0


def test_a_whole_life_without_a_pickle(nursery, tmp_path):
    "The one unpickling that the hook sees is the one that the test itself makes, to prove that the hook is awake."
    assert nursery("test_security:live", str(tmp_path)).end() == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert len(seen) == 1 and "SimpleNamespace" in seen[0], seen


# ---------------------------------------------------------------------------------------- configurations: unknown keys


@pytest.mark.parametrize(
    "where", ["experiment", "model", "task", "base", "grid", "grid's experiment", "axis", "weights"]
)
def test_an_unknown_key_is_refused_and_named(where, tmp_path):
    path, config = tmp_path / "x.json", ex.to_config(TINY)
    grid = {"experiments": [config], "axes": {"lr": [0.1]}}
    load = lambda: ex.read_experiment(path)  # noqa: E731
    if where in ("experiment", "base"):
        (config if where == "experiment" else config.setdefault("model", {}))["command"] = "rm"
    if where == "base":
        config = {"base": "copy30_wrnn", "command": "rm"}
    if where == "model":
        config["model"]["command"] = "rm"
    if where == "task":
        config["task_options"]["command"] = "rm"
        load = lambda: tasks.make_task("copy", **ex.read_experiment(path).task_options)  # noqa: E731
    if where in ("grid", "grid's experiment", "axis"):
        {"grid": grid, "axis": grid["axes"]}.get(where, config)["command"] = ["rm"]
        config, load = grid, lambda: sweeps.find_grid(str(path)).runs()
    path.write_text(json.dumps(config))
    if where == "weights":
        checkpoints.save_weights(tmp_path, build_model(MODEL, 0).state_dict(), MODEL)
        content = json.loads((tmp_path / "config.json").read_text())
        content["model"]["command"] = "rm"
        (tmp_path / "config.json").write_text(json.dumps(content))
        load = lambda: checkpoints.load_weights(tmp_path)  # noqa: E731
    with pytest.raises((ConfigError, CheckpointError), match="command"):
        load()


# ---------------------------------------------------------------------------------------------- names and their folders

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
    key = "0123456789abcdef"
    for task, k in ((name, key), ("copy", name)):
        with pytest.raises(RecordError):
            ex.run_path(folder, task, k)
    record = {"config": {"task": name}, "key": key, "best_step": None}
    for evil in (record, {**record, "config": {"task": "copy"}, "key": name}):
        with pytest.raises(RecordError):
            ex.write_record(folder, evil, [])
    for field in ("name", "task"):
        with pytest.raises(ConfigError):
            ex.from_config({**ex.to_config(TINY), field: name})
    with pytest.raises(ConfigError):
        sweeps.Grid(name, (TINY,))
    for command in (cli.wrnn_train, cli.wrnn_sweep):
        with pytest.raises((WaveRNNError, OSError)):
            command(name, results=str(folder))
    with pytest.raises(ConfigError):
        cli.wrnn_todo(name, results=str(folder))
    for call in (data.have_data, data.fetch, data.load_raw):
        with pytest.raises(ConfigError):
            call(name)
    assert [p.name for p in folder.rglob("*")] == ["runs"]


def test_a_record_that_names_another_place(folder):
    "A record is found by where it lies; what it says of itself does not lead anywhere."
    sweeps.train([ex.Run(TINY, 0)], folder, "cpu", progress=False)
    path = ex.Run(TINY, 0).path(folder)
    record = records.read_record(path)
    for change in ({"key": "../../outside/x"}, {"config": {**record["config"], "task": "../../outside"}}):
        evil = {**record, **change}
        path.write_text(json.dumps({**evil, "sha256": records.content_hash(evil)}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = ex.read_records(folder)
        for r in read:
            with pytest.raises(WaveRNNError):
                ex.write_record(folder, r, [])
        for aside in path.parent.glob("*.broken*"):
            aside.unlink()


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
    for act in (lambda: ex.read_records(folder), lambda: sweeps.train([run], folder, "cpu", progress=False)):
        # refused, or the link itself replaced: `folder` looks at what is outside
        with contextlib.suppress(RecordError):
            assert all(r["key"] == run.key for r in act())
    assert not (outside / "copy").exists()


def test_a_stray_file_among_the_records_stops_nothing(folder):
    record = sweeps.train([ex.Run(TINY, 0)], folder, "cpu", progress=False)
    for name in ("notes.json", "0123.json", "x" * 200 + ".json", "copy of a record.json"):
        (folder / "runs" / "copy" / name).write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ex.read_records(folder) == record


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_in_the_place_of_the_checkpoints(resume, folder):
    "`--resume no` deletes half-finished populations: not in a folder that somebody put there as a link."
    (folder / "checkpoints").symlink_to(folder.parent / "outside")
    with pytest.raises(RecordError, match="leads out"):
        sweeps.train([ex.Run(TINY, 0)], folder, "cpu", resume=resume, progress=False)


def test_words_for_a_batch_script(tmp_path):
    "A folder's name is one word of the script, whatever it says; a line break would begin a line of shell."
    text = sweeps.sbatch_text(["wrnn_sweep", "x; rm -rf ~", "$(touch y)", "`z`"])
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    assert shlex.split(line)[-3:] == ["x; rm -rf ~", "$(touch y)", "`z`"]
    for word in ("x\nrm -rf ~", "x\0", "x\r"):
        with pytest.raises(ConfigError, match="control characters"):
            sweeps.sbatch_text(["wrnn_sweep", word])


def test_the_workflow_of_a_release_names_the_audit():
    "pip-audit says `clean` of packages that it could not look up, unless it is told to be strict."
    text = (ROOT / "tests/README.md").read_text()
    assert re.search(r"pip-audit --strict", text)


def test_no_secret_in_the_environment_of_a_record():
    "A record tells the machine's versions, and nothing of its user."
    told = json.dumps(environment())
    for private in (os.environ.get("USER"), os.environ.get("HOME"), os.uname().nodename):
        assert not private or len(private) < 4 or private not in told

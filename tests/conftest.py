"""What the whole suite shares: one thread (two cores are busy enough), a copy of the checkout to work on, npm's packages,
the commands, a table of what was counted, and a nursery of processes that may be killed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere

import configparser
import json
import runpy
import shutil
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WEB = ROOT / "nbs/_web"
SKIP = set(".git .venv _docs _proc node_modules __pycache__ build dist .pytest_cache .ruff_cache demo_out".split())
BROWSER = {"test_docs.py", "test_jupyterlab.py", "test_play.py"}


def unit(nodeid: str) -> str:
    "What stays together: a file, so that what its tests share is made once; those that share a browser; a notebook alone."
    file = nodeid.split("::")[0].rpartition("/")[2]
    return nodeid if file == "test_notebooks.py" else "browser" if file in BROWSER else file


def pytest_collection_modifyitems(items):
    "What waits a lot comes first, notebooks last: they fill what time is left on each process."
    order = ["test_slurm.py", "browser"]
    items.sort(key=lambda i: order.index(u) if (u := unit(i.nodeid)) in order else 2 + ("::" in u))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Several processes (`-n`) take units from one queue."
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = unit
    return scheduler


@pytest.fixture
def copied(tmp_path) -> Path:
    "A copy of the checkout that a test may change."
    target = tmp_path / "copy"
    shutil.copytree(ROOT, target, ignore=lambda _, names: SKIP & set(names), symlinks=True)
    return target


def run_python(*args: str, cwd: Path, timeout: int = 300) -> str:
    "Run this Python with the copy's own package in front; returns what it printed, fails with it."
    env = {**os.environ, "PYTHONPATH": str(cwd), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(args)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def small_disk(tmp_path):
    "small_disk('1m'): a folder that is a disk of this size, where mounting is allowed; called again, the disk grows."
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str) -> Path:
        options = f"remount,size={size}" if os.path.ismount(disk) else f"size={size}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def pretend_gpu(monkeypatch):
    "pretend_gpu(9, 0): a device that is a GPU of this compute capability, as far as choosing a backend and a plan goes."
    import torch

    from wave_rnns import scan_operator
    from wave_rnns.kernels import launch

    def pretend(major: int, minor: int = 0):
        gpu = types.SimpleNamespace(major=major, minor=minor, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: gpu)
        monkeypatch.setattr(launch, "nvrtc_architectures", lambda: (80, 90))
        monkeypatch.setattr(scan_operator, "_WARNED", set())
        scan_operator.backend_for.cache_clear()
        return torch.device("cuda", 0)

    yield pretend
    scan_operator.backend_for.cache_clear()


# ------------------------------------------------------------------------------------------------- the commands

SCRIPT = "import sys\nfrom {module} import {name}\nif __name__ == '__main__':\n    sys.exit({name}())\n"


def entry_points() -> dict[str, str]:
    "Name of each command that pip installs -> the module that has the function of this name."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    points = (point.partition("=") for point in settings["DEFAULT"]["console_scripts"].split())
    return {name: target.removesuffix(f":{name}") for name, _, target in points}


@pytest.fixture
def script(tmp_path):
    "What pip makes of an entry point, a file that imports the function and exits with what it returns: script(name) -> path."

    def make(name: str) -> Path:
        path = tmp_path / "bin" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(SCRIPT.format(module=entry_points()[name], name=name))
        return path

    return make


@pytest.fixture
def call(script, tmp_path, monkeypatch, capfd):
    "Run a command in an empty folder -> (exit code, stdout, stderr). In this process: only importing torch is spared."

    def run(name: str, *args, **env):
        path = str(script(name))
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path)
            patched.setattr(sys, "argv", [path, *map(str, args)])
            patched.setattr(warnings, "showwarning", warnings.showwarning)  # commands show them their own way
            for key, value in {"COLUMNS": "100", **env}.items():
                patched.setenv(key, value)
            capfd.readouterr()  # what came before is not the command's
            with pytest.raises(SystemExit) as end, warnings.catch_warnings():
                warnings.simplefilter("default")
                runpy.run_path(path, run_name="__main__")
        out, err = capfd.readouterr()
        return end.value.code or 0, out, err

    return run


# ---------------------------------------------------------------------------------------------- what was counted


@pytest.fixture
def tally(record_property):
    """A function that puts numbers into the table at the end of pytest's output, which shows also when everything passes:

        tally("kill -9 while computing", kills=10, resumed_bit_equal=10)

    is the row "kill -9 while computing   10 kills, 10 resumed bit equal". In the same row whole numbers are added, of other
    numbers the largest stays, of words the last. Call it before the assertion on a count: a failure shows it too."""
    return lambda row, **counts: record_property("tally", (row, counts))


def pytest_terminal_summary(terminalreporter):
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ())]
    table: dict[str, dict] = {}
    for name, value in (pair for report in reports for pair in report.user_properties):
        row, counts = value if name == "tally" else ("", {})
        for what, number in counts.items():
            kept = table.setdefault(row, {})
            combine = {int: int.__add__, float: max}.get(type(number), lambda before, new: new)
            kept[what] = combine(kept[what], number) if what in kept else number
    if table:
        terminalreporter.section("what was counted")
    for row, counts in table.items():
        words = (
            f"{v} {k}" if isinstance(v, int) else f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in counts.items()
        )
        terminalreporter.write_line(f"{row:{max(map(len, table))}}   {', '.join(words)}".replace("_", " "))


# ----------------------------------------------------------------------------------- processes that may be killed

NURSERY = """
import functools, importlib, json, os, sys, threading, traceback
import torch, tiny_task
from tqdm import tqdm
from wave_rnns.paper import training
torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared by forks: one that is killed while it holds it would stop them all
tqdm.monitor_interval = 0  # no second thread
for name in ("code_hash", "environment"):  # half of a tiny run's time; both stay what they are while the tests run
    setattr(training, name, functools.cache(getattr(training, name)))
    getattr(training, name)()
training.fit(tiny_task.TinyTask(), tiny_task.WAVE, tiny_task.RUNS, **{**tiny_task.RHYTHM, "steps": 1})  # what loads late is loaded now
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a life prints must not look like an answer
say = lambda word: print(word, file=answers, flush=True)
say("ready")
for line in sys.stdin:
    order, *arguments = json.loads(line)
    if order == "end":  # until it is asked for, the number stays the child's, dead or alive
        say(os.waitstatus_to_exitcode(os.waitpid(arguments[0], 0)[1]))
        continue
    module, name = order.split(":")
    live = getattr(importlib.import_module(module), name)
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = live(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code or 0)
    say(pid)
"""


def state_of(pid: int) -> str:
    "'R' runs, 'S' waits, 'T' is stopped, 'Z' is dead and not yet buried, 'X' is gone."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"


class Life:
    "A process of the nursery."

    def __init__(self, pid: int, ask):
        self.pid, self.ask = pid, ask

    def alive(self) -> bool:
        return state_of(self.pid) not in "ZX"

    def send(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        "Wait for it; the exit code is minus the number of the signal that killed it."
        return int(self.ask("end", self.pid))


@pytest.fixture(scope="session")
def nursery():
    """Processes that cost no import: `nursery("module_of_tests:function", argument, ...)` forks one off a parent that has loaded
    torch and runs one thread, and returns a `Life`. Arguments are JSON; the exit code is what the function returns, 1 for an exception."""
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert parent.stdout.readline() == "ready\n"

    def ask(*words) -> str:
        parent.stdin.write(json.dumps(words) + "\n")
        parent.stdin.flush()
        return parent.stdout.readline()

    yield lambda function, *arguments: Life(int(ask(function, *arguments)), ask)
    parent.stdin.close()
    parent.wait()
    parent.stdout.close()


# ------------------------------------------------------------------------------------------ the documentation site


def absent(reason: str):
    "In CI a failure, elsewhere a reason to skip."
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def npm_packages() -> Path:
    "node_modules with KaTeX, fonts and the browser's driver; installed on first use."
    modules = WEB / "node_modules"
    if not shutil.which("node") or not shutil.which("npm"):
        absent("Node and npm are not installed: apt-get install nodejs npm")
    lock, stamp = WEB / "package-lock.json", modules / ".package-lock.json"
    if not stamp.exists() or stamp.stat().st_mtime < lock.stat().st_mtime:
        command = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run(command, cwd=WEB, capture_output=True, text=True)
        if done.returncode:
            absent(f"npm ci failed (no network?): {done.stderr[-1000:]}")
        stamp.touch()
    return modules


def run_node(script: str, *args, timeout: int):
    "What a script of this folder prints in Node, as JSON."
    command = ["node", str(HERE / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def chromium() -> str:
    "Path of a Chromium."
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome"]
    found = next((p for n in names if n and (p := shutil.which(n))), None)
    if found is None:
        absent("no Chromium here: apt-get install chromium, or name one in $CHROMIUM")
    return found


@pytest.fixture(scope="session")
def site(npm_packages, tmp_path_factory) -> Path:
    "The documentation site, built once from this checkout."
    out = tmp_path_factory.mktemp("docs") / "site"
    print(run_python(str(WEB / "build.py"), str(out), cwd=ROOT, timeout=600))
    return out

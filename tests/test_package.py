"What a stranger installs: the wheel and the sdist, built without a network, unpacked and used far from the checkout."

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT, SKIP, entry_points, run_python
from test_house import tracked

import wave_rnns

PACKAGE = {str(p.relative_to(ROOT)) for p in tracked() if p.is_relative_to(ROOT / "wave_rnns")}
MOST = 15_000_000  # bytes
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
CFG = SETTINGS["DEFAULT"]
REQUIRED = {re.match(r"[\w-]+", r)[0] for r in CFG["requirements"].split()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    "A folder with the sdist of a clean copy, and the wheel that is built from this sdist."
    copy, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, copy, ignore=lambda _, names: SKIP & set(names), symlinks=True)
    printed = run_python("-m", "build", "--no-isolation", "--outdir", str(out), ".", cwd=copy)
    assert "would be ignored" not in printed  # setuptools' warning about folders of data
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> zipfile.ZipFile:
    (path,) = dist.glob("*.whl")
    assert path.stat().st_size < MOST
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel):
    return message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))))


@pytest.fixture(scope="module")
def stranger(wheel, tmp_path_factory):
    "Run Python where only the unpacked wheel is at hand, in a folder with the commands: stranger(argument, ...) -> the finished process."
    site, home = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    wheel.extractall(site)
    env = {k: v for k, v in os.environ.items() if not k.startswith("WAVE_RNNS")}
    env |= {"PYTHONPATH": str(site), "HOME": str(home), "COLUMNS": "100"}
    for name, module in entry_points().items():
        (home / name).write_text(SCRIPT.format(name=name, module=module))

    def run(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *args], cwd=home, env=env, capture_output=True, text=True, timeout=300)

    return run


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    kinds = {".cu", ".cuh", ".typed", ".mplstyle", ".safetensors", ".json", ".npz", ".csv", ".html"}
    assert kinds <= {Path(n).suffix if Path(n).name != "py.typed" else ".typed" for n in names}
    assert {n for n in names if ".dist-info/" not in n} == PACKAGE


def test_the_sdist_holds_what_builds_it(dist):
    (path,) = dist.glob("*.tar.gz")
    assert path.stat().st_size < MOST
    with tarfile.open(path) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames()}
    assert {*PACKAGE, "settings.ini", "setup.py", "README.md", "LICENSE", "CITATION.cff"} <= names
    assert not [n for n in names if n.startswith(("tests", "nbs"))]


def test_the_metadata_say_what_the_settings_say(metadata, wheel):
    assert metadata["Version"] == wave_rnns.__version__
    assert metadata["Requires-Python"] == f">={CFG['min_python']}"
    assert metadata["License-Expression"] == "MIT" and metadata["License-File"] == "LICENSE"
    pythons = {c.rpartition(" ")[2] for c in metadata.get_all("Classifier") if re.search(r"Python :: 3\.", c)}
    assert pythons == set(CFG["tested_pythons"].split()) and CFG["min_python"] in pythons
    assert set(metadata.get_all("Provides-Extra")) == {"dev", "hub"}
    assert {re.match(r"[\w-]+", r)[0] for r in metadata.get_all("Requires-Dist") if "extra ==" not in r} == REQUIRED
    commands = next(n for n in wheel.namelist() if n.endswith("/entry_points.txt"))
    assert all(f"{name} = " in wheel.read(commands).decode() for name in entry_points())


def test_no_link_of_the_description_needs_the_repository(metadata):
    "A package index shows README.md without the files around it."
    text = re.sub(r"```.*?```", "", metadata.get_payload(), flags=re.S)
    links = re.findall(r"\[[^\]]*\]\(([^)]*)\)", text)
    assert links and all(link.startswith(("https://", "#")) for link in links), links


def test_every_requirement_is_used_and_every_use_is_required():
    "What the package imports is Python's own, itself, or stands in settings.ini."
    used = set()
    for name in (n for n in PACKAGE if n.endswith(".py")):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add(node.module.partition(".")[0])
    outside = used - sys.stdlib_module_names - {"wave_rnns"}
    there_when_needed = {"cuda", "triton"}  # which torch brings
    there_when_needed |= {"IPython", "matplotlib_inline"}  # which a notebook brings
    assert outside - there_when_needed == REQUIRED


USE = """
import pkgutil, importlib, torch, wave_rnns
from wave_rnns.paper.data import load_digits
from wave_rnns.paper.weights import shipped_weights
print(wave_rnns.__file__)
for module in pkgutil.walk_packages(wave_rnns.__path__, "wave_rnns."):
    importlib.import_module(module.name)
for name, card in shipped_weights().items():
    model = wave_rnns.load(name)
    with torch.no_grad():
        answer = model(torch.rand(50, 2, card["model"]["input_size"]))  # [T, B, F]
    assert answer.isfinite().all() and answer.shape[-1] == card["model"]["output_size"], name
assert len(load_digits()) == 3
layer = wave_rnns.WaveRNN(10, 100, c=6)
output, state = layer(torch.randn(50, 8, 10))
output.sum().backward()
assert output.shape == (50, 8, 600) and all(p.grad is not None for p in layer.parameters())
"""


def test_imported_elsewhere_it_loads_weights_and_answers(stranger):
    done = stranger("-c", USE)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).is_relative_to(ROOT)
    assert not done.stderr


@pytest.mark.parametrize("name", sorted(entry_points()))
def test_every_command_explains_itself_elsewhere(name, stranger):
    done = stranger(name, "--help")
    assert done.returncode == 0 and f"usage: {name}" in done.stdout, done.stderr


def test_without_records_the_tables_say_what_to_do(stranger):
    done = stranger("wrnn_tables")
    assert done.returncode == 1
    assert "--results" in done.stderr and "wrnn_train" in done.stderr and "Traceback" not in done.stderr


def test_what_is_public_is_there_listed_and_explained():
    for name in wave_rnns.__all__:
        assert getattr(wave_rnns, name).__doc__, name
        assert name in dir(wave_rnns)
        assert re.search(rf"^{name} +\S", wave_rnns.__doc__, re.M), f"the docstring does not mention {name}"
    with pytest.raises(AttributeError, match="no attribute 'WaveRnn'"):
        wave_rnns.WaveRnn  # noqa: B018

"The worked examples of CONTRIBUTING.md, the code of README.md and the commands of the first page, run as printed."

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, entry_points

from wave_rnns.paper.experiments import select

FILE = re.compile(r"^`([\w.]+)`: ", re.M)
BASH = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)


def blocks(name: str) -> list[tuple[str, str, str]]:
    "(language, code, the text before it) of every fenced block, in order."
    parts = re.split(r"^```(\w+)\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    return list(zip(parts[1::3], parts[2::3], parts[0::3], strict=False))


@pytest.fixture
def run(script, tmp_path):
    "Run a command line in an empty folder, with our commands on the path."

    def go(line: str, timeout: int = 300) -> str:
        words = line.split("#")[0].split()
        words = [sys.executable, str(script(words[0]))] + words[1:] if words[0] in entry_points() else words
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return go


def test_the_worked_examples(run, tmp_path):
    "A cell, a task and an experiment, in files of their own, one after the other."
    named = []
    for language, code, before in blocks("CONTRIBUTING.md"):
        if language == "bash" and "make" in code:
            continue  # the targets; CI runs them
        if language == "bash":
            for line in code.splitlines():
                run(line)
            continue
        named.append(FILE.findall(before)[-1])
        (tmp_path / named[-1]).write_text(code)
        if language == "python":
            run(f"{sys.executable} -W error::FutureWarning {named[-1]}")
    assert named == ["my_cell.py", "my_task.py", "first.json"]
    (record,) = (json.loads(p.read_text()) for p in (tmp_path / "results/runs").rglob("*.json"))
    assert record["status"] == "done" and record["test_best"]["mse"] < 1 / 12 / 4


def commands() -> list[list[str]]:
    "The words of every command that the site's first page prints; README.md is a part of it."
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    lines = (line.split("#")[0] for code in BASH.findall(text) for line in code.splitlines())
    return [command.split() for line in lines if line.strip() for command in line.split("&&")]


def test_python_of_the_readme_runs_in_order(tmp_path):
    "One program of all Python blocks; where the README prints a value after a block, it is the value."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    python = re.findall(r"^```python\n(.*?)^```\n((?:\n|    .*\n)*)", text, re.M | re.S)
    assert python, "no Python in README.md"
    program = ["import ast", "def run(code, names={}):", "    *body, last = ast.parse(code).body"]
    program += [
        "    value = isinstance(last, ast.Expr)",
        "    exec(compile(ast.Module(body if value else [*body, last], []), 'README.md', 'exec'), names)",
    ]
    program += ["    return eval(compile(ast.Expression(last.value), 'README.md', 'eval'), names) if value else None"]
    for code, after in python:
        shown = "\n".join(line[4:] for line in after.splitlines() if line.startswith("    "))
        program.append(f"value = run({code!r})")
        if shown and not re.search(r"\d\.\d", shown):  # a measured number differs from machine to machine
            program.append(f"assert repr(value) == {shown!r}, (repr(value), {shown!r})")
    (tmp_path / "readme.py").write_text("\n".join(program))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_commands_of_the_first_page_exist():
    "Every command and make target that it prints is known to the program that it names."
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    known = {*entry_points(), "make", "git", "cd", "pip", "python", "pytest"}
    assert {word for word, *_ in commands()} <= known and commands()
    assert {rest[0] for word, *rest in commands() if word == "make"} <= targets


@pytest.mark.parametrize(
    "words", [c for c in commands() if re.match(r"wrnn_(train|sweep|todo|tables)", c[0])], ids=" ".join
)
def test_commands_of_the_first_page_mean_something(words, run):
    "Experiments, grids and options: what would take days is asked for its help or its list, the rest runs."
    word, *rest = words
    options = [w for w in rest if w.startswith("-")]
    known = run(f"{word} --help") if rest else ""
    assert all(option in known for option in options), words
    if word == "wrnn_train":
        assert all(select(name) for name in rest if not name.startswith("-"))
    elif not rest:
        run(word)

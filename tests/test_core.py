"What is too broad to read in 09_core and 10_random: random numbers against plain integers, files under attack."

import errno
import io
import itertools
import math
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from wave_rnns import core
from wave_rnns.core import atomic_write, data_root, environment, plot_style, progress, to_json
from wave_rnns.paper.random import counter_bits, counter_integers, counter_permutation, counter_uniform

M64 = 2**64


def python_bits(seed, step, stream, count, bits=32):
    "Equation 2 and its key once more, in plain integers and written apart from the module."
    z = (seed * 0xD1342543DE82EF95 + stream * 0x2545F4914F6CDD1D + step * 0x9E3779B97F4A7C15) % M64
    key = (z ^ z >> 32) * 0xBF58476D1CE4E5B9 % M64
    words = []
    for i in range(count):
        w = (key + (i + 1) * 0x9E3779B97F4A7C15) % M64
        w = (w ^ w >> 30) * 0xBF58476D1CE4E5B9 % M64
        w = (w ^ w >> 27) * 0x94D049BB133111EB % M64
        words.append(w >> 64 - bits)
    return words


# ---------------------------------------------------- random numbers: how good they are is measured in notebook 10


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 2**31, 2**63 - 1, -(2**63)])
def test_random_numbers_equal_plain_integers(seed):
    seeds = torch.tensor([4, seed])
    for step, stream in itertools.product([0, 1, 60_000, 2**40, 2**63 - 1], [0, 1, 7, 2**20]):
        call, where = (seed, step, stream), (seeds, step)
        for given in (step, torch.tensor(step)):
            assert counter_bits(seeds, given, (5,), stream)[1].tolist() == python_bits(*call, 5), call
        for bits in (1, 31, 33, 63):
            assert counter_bits(*where, (5,), stream, bits)[1].tolist() == python_bits(*call, 5, bits)
        uniform = [w / 2**24 for w in python_bits(*call, 5, 24)]
        assert counter_uniform(*where, (5,), stream)[1].tolist() == uniform
        for low, high in ((1, 9), (-5, 5), (0, 1), (0, 2**31)):
            scaled = [low + (w * (high - low) >> 32) for w in python_bits(*call, 5)]
            assert counter_integers(low, high, *where, (5,), stream)[1].tolist() == scaled
        words = python_bits(*call, 100, 63)
        order = sorted(range(100), key=words.__getitem__)
        assert counter_permutation(*where, 100, stream)[1].tolist() == order


FROZEN_UNIFORM = [0.2700548768043518, 0.23710721731185913, 0.8576142191886902]
FROZEN_UNIFORM += [0.08978128433227539, 0.37406057119369507, 0.6653549671173096]


def test_frozen_values():
    "These name the data sets of every record ever written."
    seeds = torch.tensor([0, 1])
    assert counter_uniform(seeds, 5, (3,), 1).flatten().tolist() == FROZEN_UNIFORM
    assert counter_integers(1, 9, seeds, 5, (8,), 1).tolist() == [[3, 2, 7, 3, 2, 2, 8, 2], [1, 3, 6, 8, 1, 1, 8, 5]]
    assert counter_permutation(seeds, 5, 8, 1).tolist() == [[4, 7, 5, 1, 0, 3, 2, 6], [4, 5, 0, 1, 7, 2, 3, 6]]


def test_shapes_only_arrange():
    flat = counter_bits(torch.tensor([1]), 0, (30,), 0)
    assert torch.equal(counter_bits(torch.tensor([1]), 0, (2, 3, 5), 0), flat.view(1, 2, 3, 5))
    assert torch.equal(counter_bits(torch.tensor([1]), 0, (7,), 0), flat[:, :7])  # a shorter block is a beginning
    for shape in ((), (0,), (3, 0, 2)):
        for R in (0, 3):
            assert counter_bits(torch.arange(R), 0, shape, 0).shape == (R, *shape)
    assert counter_permutation(torch.arange(2), 0, 0, 0).shape == (2, 0)


def test_no_global_generator_no_default_dtype():
    before, seeds = torch.get_rng_state(), torch.tensor([4])
    first = counter_uniform(seeds, 1, (100,), 0)
    torch.set_default_dtype(torch.float64)
    try:
        again = counter_uniform(seeds, 1, (100,), 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert first.dtype == again.dtype == torch.float32 and torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state()) and seeds.tolist() == [4]


@pytest.mark.parametrize(
    "call, words",
    [  # more of them: notebook 10_random
        (lambda: counter_bits(torch.tensor([1.0]), 0, (2,), 0), "float32"),
        (lambda: counter_bits(torch.tensor([1]), torch.tensor(0.0), (2,), 0), "0-dim int64"),
        (lambda: counter_integers(0, 2**32, torch.tensor([1]), 0, (2,), 0), "high - low"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(core.ConfigError, match=words):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu_and_is_capturable():
    seeds = torch.arange(5)
    on_gpu, step = seeds.cuda(), torch.zeros((), dtype=torch.int64, device="cuda")

    def draw():
        return counter_uniform(on_gpu, step, (33, 7), 2), counter_integers(1, 9, on_gpu, step, (33,), 3)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        draw()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step += 1
        uniform, integers = draw()
    for number in range(1, 4):
        graph.replay()
        assert torch.equal(uniform.cpu(), counter_uniform(seeds, number, (33, 7), 2))
        assert torch.equal(integers.cpu(), counter_integers(1, 9, seeds, number, (33,), 3))
    assert torch.equal(counter_permutation(on_gpu, 1, 57_000, 0).cpu(), counter_permutation(seeds, 1, 57_000, 0))


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_a_file_is_written_and_replaced_with_the_usual_mode(tmp_path, umask, mode):
    path, before = tmp_path / "a.json", os.umask(umask)
    try:
        assert atomic_write(path, "ä") == path and path.read_bytes() == "ä".encode()
        atomic_write(str(path), b"\x00\xff")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"\x00\xff" and stat.S_IMODE(path.stat().st_mode) == mode
    assert os.listdir(tmp_path) == ["a.json"]


def test_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
def test_failure_leaves_the_old_file(tmp_path, monkeypatch, function, error):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(type(error)) as caught:
            atomic_write(path, "new")
    if isinstance(error, OSError):
        assert caught.value.filename == str(path) and caught.value.errno == errno.EIO
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_full_disk(small_disk):
    disk = small_disk("1m")
    path = atomic_write(disk / "checkpoint", b"x" * 400_000)
    with pytest.raises(OSError, match="no space left") as caught:
        atomic_write(path, b"y" * 900_000)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes() == b"x" * 400_000 and os.listdir(disk) == ["checkpoint"]


# ----------------------------------------------------------------------------------------- JSON, the rest


@dataclass
class Point:
    x: float
    where: Path = Path("here")
    tags: tuple = ("a", "b")


@pytest.mark.parametrize(
    "value, text",
    [
        (Point(1.5), '{"tags": ["a", "b"], "where": "here", "x": 1.5}'),
        ({"b": [Point(math.inf).x], "a": {2: -math.inf}}, '{"a": {"2": null}, "b": [null]}'),
        ([np.float32(0.5), np.int64(3), np.array([1, 2])], "[0.5, 3, [1, 2]]"),
        ([torch.tensor(2.5), torch.tensor([math.nan])], "[2.5, [null]]"),
        ([True, None, "é"], '[true, null, "\\u00e9"]'),
    ],
)
def test_json(value, text):
    assert to_json(value) == text


@pytest.mark.parametrize("wrong", [{1, 2}, object(), Point, b"bytes"])
def test_what_json_cannot_hold(wrong):
    with pytest.raises(TypeError):
        to_json(wrong)


@pytest.mark.parametrize("value, place", [("~/elsewhere", "elsewhere"), ("", ".cache/wave_rnns")])
def test_data_root(monkeypatch, value, place):
    monkeypatch.setenv("WAVE_RNNS_DATA", value)
    assert data_root() == Path.home() / place


def test_commit_is_ours_or_none(tmp_path, monkeypatch):
    "Installed inside somebody else's repository, we report no commit; of a copy the one that we are told."
    monkeypatch.delenv("WAVE_RNNS_COMMIT", raising=False)
    commit = environment()["commit"]
    if (ROOT / ".git").exists():
        assert commit is None or len(commit.rstrip("+")) == 40
    package = tmp_path / ".venv" / "wave_rnns"
    package.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    author = ["-c", "user.name=A", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *author, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(core.wave_rnns, "__file__", str(package / "__init__.py"))
    assert core.git_commit.__wrapped__() is None
    monkeypatch.setenv("WAVE_RNNS_COMMIT", "53676f6")
    assert core.git_commit.__wrapped__() == "53676f6"


@pytest.mark.parametrize("session, drawn", [("a.ipynb", True), (None, False)])
def test_a_bar_is_drawn_where_a_jupyter_server_opened_the_notebook(monkeypatch, session, drawn):
    "ipykernel's standard error is no terminal; nbconvert and nbclient, whose outputs are stored, have no session."
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if session:
        monkeypatch.setenv("JPY_SESSION_NAME", session)
    assert list(progress(range(3))) == [0, 1, 2]
    assert ("3/3" in stream.getvalue()) is drawn


def test_style_can_be_left():
    import matplotlib

    matplotlib.rcParams["font.size"] = 13
    with plot_style():
        assert matplotlib.rcParams["font.size"] == 9
        colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        assert [matplotlib.colors.to_hex(c).upper() for c in colours[:2]] == [core.WAVE, core.BUMP]
    assert matplotlib.rcParams["font.size"] == 13


def test_imports_are_light():
    "The package and core load no torch, no plotting, no data sets; torch comes with what needs it, and CUDA is left alone."
    code = """import sys, wave_rnns, wave_rnns.core
print([m for m in ('torch', 'matplotlib', 'torchvision', 'tqdm.auto', 'IPython') if m in sys.modules])
assert callable(wave_rnns.wave_scan)
print([m for m in ('matplotlib', 'torchvision', 'IPython') if m in sys.modules], sys.modules['torch'].cuda.is_initialized())"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert run.stdout == "[]\n[] False\n", run.stderr


def test_errors_are_one_family():
    for error in (core.DataError, core.CheckpointError, core.RecordError, core.ConfigError):
        assert issubclass(error, core.WaveRNNError)
    assert issubclass(core.ConfigError, ValueError)

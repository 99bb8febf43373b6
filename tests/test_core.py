"What is too broad to read in 09_core: random numbers under a microscope, files under attack."

import errno
import itertools
import math
import io
import os
import random
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from wave_rnns import core
from wave_rnns.core import atomic_write, data_root, environment, plot_style, progress, sha256, to_json
from wave_rnns.paper.random import counter_bits, counter_integers, counter_permutation, counter_uniform

REPOSITORY = Path(__file__).resolve().parent.parent
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


# ---------------------------------------------------------------------------------------------- random numbers


def test_bits_equal_plain_integers():
    seeds, steps = [0, 1, -1, 12345, 2**31, 2**63 - 1, -(2**63)], [0, 1, 60_000, 2**40, 2**63 - 1]
    for seed, step, stream in itertools.product(seeds, steps, [0, 1, 7, 2**20]):
        for given in (step, torch.tensor(step)):
            found = counter_bits(torch.tensor([seed]), given, (5,), stream)[0].tolist()
            assert found == python_bits(seed, step, stream, 5), (seed, step, stream)
    for bits in (1, 24, 31, 32, 33, 63):
        assert counter_bits(torch.tensor([3, 4]), 9, (50,), 2, bits=bits)[1].tolist() == python_bits(4, 9, 2, 50, bits)


FROZEN_UNIFORM = [0.2700548768043518, 0.23710721731185913, 0.8576142191886902]
FROZEN_UNIFORM += [0.08978128433227539, 0.37406057119369507, 0.6653549671173096]


def test_frozen_values():
    "These name the data sets of every record ever written."
    seeds = torch.tensor([0, 1])
    assert counter_uniform(seeds, 5, (3,), 1).flatten().tolist() == FROZEN_UNIFORM
    assert counter_integers(1, 9, seeds, 5, (8,), 1).tolist() == [[3, 2, 7, 3, 2, 2, 8, 2], [1, 3, 6, 8, 1, 1, 8, 5]]
    assert counter_permutation(seeds, 5, 8, 1).tolist() == [[4, 7, 5, 1, 0, 3, 2, 6], [4, 5, 0, 1, 7, 2, 3, 6]]


def test_shapes():
    for shape in ((), (1,), (0,), (3, 0, 2), (2, 3, 5)):
        for seeds in (torch.tensor([1]), torch.tensor([1, 2, 3]), torch.empty(0, dtype=torch.int64)):
            assert counter_bits(seeds, 0, shape, 0).shape == (len(seeds), *shape)
            assert counter_uniform(seeds, 0, shape, 0).dtype == torch.float32
    flat = counter_bits(torch.tensor([1]), 0, (30,), 0)
    assert torch.equal(counter_bits(torch.tensor([1]), 0, (2, 3, 5), 0), flat.view(1, 2, 3, 5))  # it only arranges
    assert torch.equal(counter_bits(torch.tensor([1]), 0, (7,), 0), flat[:, :7])  # a shorter block is a beginning


def test_no_state_no_global_generator_no_default_dtype():
    torch.manual_seed(0)
    before, seeds = torch.get_rng_state(), torch.tensor([4])
    first = counter_uniform(seeds, 1, (100,), 0)
    counter_uniform(seeds, 2, (100,), 0)
    torch.set_default_dtype(torch.float64)
    try:
        again = counter_uniform(seeds, 1, (100,), 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert first.dtype == again.dtype == torch.float32 and torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state()) and seeds.tolist() == [4]


def chi_square_z(counts, expected):
    "How many standard deviations a chi-square statistic lies from its mean (normal for many cells)."
    degrees = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


MILLION = 2**20


def draws(axis, lag):
    "Two blocks of a million words that differ by `lag` in one argument only."
    seeds = torch.tensor([10])
    base = counter_bits(seeds, 20, (MILLION + lag,), 3)[0]
    if axis == "position":
        return base[:-lag], base[lag:]
    seed, step, stream = (lag * (axis == name) for name in ("seed", "step", "stream"))
    other = counter_bits(seeds + seed, 20 + step, (MILLION,), 3 + stream)
    return base[:MILLION], other[0]


@pytest.mark.parametrize("axis", ["position", "seed", "step", "stream"])
@pytest.mark.parametrize("lag", [1, 128])
def test_neighbours_are_jointly_uniform(axis, lag):
    "Every pair of nibbles is as frequent as every other, not only uncorrelated; so is every pair of bits."
    words = draws(axis, lag)
    for shift in (0, 14, 28):
        a, b = ((w >> shift) & 15 for w in words)
        counts = torch.bincount(a * 16 + b, minlength=256).double()
        assert abs(chi_square_z(counts, MILLION / 256)) < 4
    bits_a, bits_b = (((w[: 2**16, None] >> torch.arange(32)) & 1).double() * 2 - 1 for w in words)
    z = bits_a.T @ bits_b / 2**8
    assert z.abs().max() < 5 and abs(z.std() - 1) < 0.1


def test_no_two_blocks_overlap():
    "400 blocks of 4,096 words: as many equal words as chance gives, so no stretch is read twice."
    seeds = torch.arange(20)
    words = torch.cat([counter_bits(seeds, step, (4096,), 0).flatten() for step in range(20)])
    pairs = len(words) - len(words.unique())
    expected = len(words) ** 2 / 2 / 2**32
    assert abs(pairs - expected) < 4 * math.sqrt(expected)


def test_uniform_grid():
    u = counter_uniform(torch.tensor([0, 1]), 0, (MILLION,), 0)
    assert u.min() >= 0 and u.max() < 1
    assert torch.equal(u.double() * 2**24, (u.double() * 2**24).round())
    assert abs((u.double().mean() - 0.5) * math.sqrt(12 * u.numel())) < 4
    ordered = u[0].double().sort().values  # Kolmogorov and Smirnov's largest gap
    grid = torch.arange(1, MILLION + 1, dtype=torch.float64) / MILLION
    assert (ordered - grid).abs().max() * math.sqrt(MILLION) < 1.95  # 1 chance in 1,000


def test_integers_are_uniform():
    for low, high in ((1, 9), (0, 2), (-5, 5), (0, 1), (0, 50), (100, 357)):
        values = counter_integers(low, high, torch.tensor([3]), 4, (MILLION,), 5)[0]
        assert values.min() == low and values.max() == high - 1
        if high - low > 1:
            counts = torch.bincount(values - low).double()
            assert chi_square_z(counts, MILLION / (high - low)) < 5
    widest = counter_integers(0, 2**31, torch.tensor([3]), 4, (1000,), 5)
    assert widest.min() >= 0 and 2**30 < widest.max() < 2**31


@pytest.mark.parametrize("m", [0, 1, 2, 3, 784, 57_000])
def test_permutation_is_one(m):
    order = counter_permutation(torch.tensor([0, 1, 2]), 7, m, 3)
    assert torch.equal(order.sort().values, torch.arange(m).expand(3, m))
    if m > 100:
        assert not torch.equal(order[0], order[1])
        assert not torch.equal(order[0], counter_permutation(torch.tensor([0]), 8, m, 3)[0])


def test_permutation_every_order_equally_often():
    orders = counter_permutation(torch.arange(24_000), 0, 4, 0)
    counts = torch.bincount(orders @ torch.tensor([64, 16, 4, 1]), minlength=256)
    counts = counts[counts > 0].double()
    assert len(counts) == 24 and chi_square_z(counts, 1000) < 5


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: counter_bits(torch.tensor(1), 0, (2,), 0), "int64 tensor of shape [R]"),
        (lambda: counter_bits(torch.tensor([1.0]), 0, (2,), 0), "float32"),
        (lambda: counter_bits(torch.tensor([1], dtype=torch.int32), 0, (2,), 0), "int32"),
        (lambda: counter_bits(torch.tensor([1]), torch.tensor([0]), (2,), 0), "0-dim int64"),
        (lambda: counter_bits(torch.tensor([1]), torch.tensor(0.0), (2,), 0), "0-dim int64"),
        (lambda: counter_integers(5, 5, torch.tensor([1]), 0, (2,), 0), "high - low"),
        (lambda: counter_integers(0, 2**32, torch.tensor([1]), 0, (2,), 0), "high - low"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(core.ConfigError, match=words.replace("[", r"\[").replace("]", r"\]")):
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


def test_write_and_replace(tmp_path):
    path = tmp_path / "a.json"
    assert atomic_write(path, "ä") == path
    assert path.read_bytes() == "ä".encode()
    atomic_write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_mode(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"]
)
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


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/a"):
        atomic_write(tmp_path / "nowhere" / "a", "x")


def test_full_disk(small_disk):
    disk = small_disk("1m")
    path = atomic_write(disk / "checkpoint", b"x" * 400_000)
    with pytest.raises(OSError, match="no space left") as caught:
        atomic_write(path, b"y" * 900_000)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes() == b"x" * 400_000 and os.listdir(disk) == ["checkpoint"]


def test_kill_at_any_moment(tmp_path):
    "A writer is frozen 21 times and killed 3 times; what we find is always one of its whole versions."
    path = tmp_path / "a"
    writer = (
        "import itertools, sys; sys.path.insert(0, sys.argv[2])\n"
        "from wave_rnns.core import atomic_write\n"
        "for i in itertools.count(): atomic_write(sys.argv[1], bytes([i % 256]) * 300_000); print(i, flush=True)"
    )
    moments = random.Random(0)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    looks = 0
    for _ in range(3):  # starting Python with torch is the slow part, so each process is also stopped and let go
        process = subprocess.Popen(
            [sys.executable, "-c", writer, path, REPOSITORY], stdout=subprocess.PIPE, env=environ
        )
        process.stdout.readline()
        for _ in range(7):
            time.sleep(moments.random() * 0.02)
            process.send_signal(signal.SIGSTOP)
            content = path.read_bytes()
            assert len(content) == 300_000 and len(set(content)) == 1
            looks += 1
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        content = path.read_bytes()
        assert len(content) == 300_000 and len(set(content)) == 1
    assert looks == 21


# ----------------------------------------------------------------------------------------- hashes, JSON, the rest


def test_sha256_of_a_large_file(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == sha256(content)


@dataclass(frozen=True)
class Point:
    x: float
    where: Path = Path("here")
    tags: tuple = ("a", "b")


def test_json():
    assert to_json(Point(1.5)) == '{"tags": ["a", "b"], "where": "here", "x": 1.5}'
    assert to_json({"b": [Point(float("inf"))], "a": {2: float("-inf")}}).startswith('{"a": {"2": null}, "b": [{')
    assert to_json([np.float32(0.5), np.int64(3), np.array([1, 2]), torch.tensor(2.5), torch.tensor([math.nan])]) == (
        "[0.5, 3, [1, 2], 2.5, [null]]"
    )
    assert to_json([True, None, "é"]) == '[true, null, "\\u00e9"]'
    assert "\n" in to_json({"a": 1}, indent=1)
    for wrong in ({1, 2}, object(), Point, b"bytes"):
        with pytest.raises(TypeError):
            to_json(wrong)


def test_data_root(monkeypatch):
    monkeypatch.setenv("WAVE_RNNS_DATA", "~/elsewhere")
    assert data_root() == Path.home() / "elsewhere"
    for unset in ("", None):
        monkeypatch.delenv("WAVE_RNNS_DATA", raising=False)
        if unset is not None:
            monkeypatch.setenv("WAVE_RNNS_DATA", unset)
        assert data_root() == Path.home() / ".cache" / "wave_rnns"


def test_environment_is_json():
    commit = environment()["commit"]
    assert to_json(environment())
    if (REPOSITORY / ".git").exists():
        assert commit is None or len(commit.rstrip("+")) == 40


def test_commit_is_never_a_strangers(tmp_path, monkeypatch):
    "Installed inside somebody else's repository, we report no commit."
    package = tmp_path / ".venv" / "wave_rnns"
    package.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(core.wave_rnns, "__file__", str(package / "__init__.py"))
    assert core.git_commit.__wrapped__() is None


def test_a_bar_is_drawn_where_a_jupyter_server_opened_the_notebook(monkeypatch):
    "ipykernel's standard error is no terminal; nbconvert and nbclient, whose outputs are stored, have no session."

    class OutStream(io.StringIO):
        __module__ = "ipykernel.iostream"

    for session, drawn in (("a.ipynb", True), (None, False)):
        monkeypatch.setattr(sys, "stderr", OutStream())
        monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
        if session:
            monkeypatch.setenv("JPY_SESSION_NAME", session)
        assert list(progress(range(3))) == [0, 1, 2]
        assert ("3/3" in sys.stderr.getvalue()) is drawn


def test_style_can_be_left(monkeypatch):
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
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert run.stdout == "[]\n[] False\n", run.stderr


def test_errors_are_one_family():
    for error in (core.DataError, core.CheckpointError, core.RecordError, core.ConfigError):
        assert issubclass(error, core.WaveRNNError)
    assert issubclass(core.ConfigError, ValueError)

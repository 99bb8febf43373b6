"""Spoiled files by the thousand into every loader: a result that makes sense, or the documented error; bounded memory, bounded time.

Hypothesis invents the files, and shrinks one that breaks a promise to what matters in it. `WAVE_RNNS_FUZZ` is their number (5,000 unless
set), divided among the loaders; `WAVE_RNNS_FUZZ_SEED` gives others. Each loader runs in a process of its own, with little memory.

A new loader is one more function below, with `@loader`: it returns a `Target`."""

import contextlib
import json
import math
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_task
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from wave_rnns.core import CheckpointError, ConfigError, DataError, RecordError, plain, sha256, to_json
from wave_rnns.kernels import launch as kernels
from wave_rnns.paper import bench, checkpoints, grids, ranking, records, sweeps, training
from wave_rnns.paper import data as raw
from wave_rnns.paper import experiments as ex
from wave_rnns.paper.models import build_model

FILES = int(os.environ.get("WAVE_RNNS_FUZZ", 5000))
SEED = int(os.environ.get("WAVE_RNNS_FUZZ_SEED", 0))
MEMORY = 2**28  # bytes that reading one file may need
SECONDS = 5.0  # of processor time, for one file; nearly all take less than a thousandth of it


@dataclass
class Target:
    "A loader, ready to be fed."

    corpus: list[bytes]  # valid files
    load: Callable[[bytes], object]  # reads the file; asserts what its result must be
    path: Path | None = None  # where each file is put first
    files: Callable[[list], st.SearchStrategy] = lambda corpus: spoiled(corpus)  # other files, given the valid ones
    seal: Callable[[bytes], object] = lambda data: None  # what an attacker could write beside the file: its hash


LOADERS = {}


def loader(name: str, *errors: type):
    "Declare a loader: `errors` are the documented ones."
    return lambda prepare: LOADERS.setdefault(name, (prepare, errors))


# ------------------------------------------------------------------------------------------------------ how to spoil

TOKENS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 5000, b"null", b"[" * 50, b'{"a":' * 50,
    b'"\\ud800"', b"../", b"\n", b",", b"\r\n", b"\x80\x05", b"PK\x03\x04", b"\x1f\x8b", (2**63).to_bytes(8, "little"),
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e-320, math.nan, math.inf, 2**31, 2**53, 2**63, -(2**64), 10**400, "", "x", "..", "/", "a\0b",
    "\ud800", "é" * 300, "1", [], {}, [[]], [None], [0, 1], {"": 0}, {"a": {"b": []}}, ["x"] * 300, list(range(300)), "F32", "C64", "done", "wrnn",
    "@1e999@", "@01@", "@'x'@", "@undefined@", f"@{'9' * 5000}@", f"@{'[' * 30}{']' * 30}@", f"@{'[' * 5000}{']' * 5000}@", "@[@",
]  # fmt: skip


@st.composite
def spoiled(draw, corpus: list[bytes]) -> bytes:
    "A valid file of which up to three pieces are cut out, doubled or replaced."
    data = draw(st.sampled_from(corpus))
    for _ in range(draw(st.integers(1, 3))):
        a = draw(st.integers(0, len(data)))
        b = draw(st.sampled_from([a, a + 1, len(data)]) | st.integers(a, len(data)))
        pieces = st.sampled_from([*TOKENS, data[a:b] * 2, data[b:]]) | st.binary(max_size=100)
        data = data[:a] + draw(pieces) + data[b:]
    return data


def spots(tree) -> list[tuple]:
    "Every place in a tree of dictionaries and lists: (container, key)."
    if not isinstance(tree, (dict, list)):
        return []
    here = [(tree, key) for key in (list(tree) if isinstance(tree, dict) else range(len(tree)))]
    return here + [spot for node, key in here for spot in spots(node[key])]


@st.composite
def spoiled_tree(draw, corpus: list[bytes]):
    "A valid file's content of which up to three values are removed, renamed or replaced."
    tree = json.loads(draw(st.sampled_from(corpus)))
    for _ in range(draw(st.integers(1, 3))):
        if not (found := spots(tree)):
            break
        (node, key), (other, its) = draw(st.sampled_from(found)), draw(st.sampled_from(found))
        how = draw(st.sampled_from(["value", "value", "value", "other", "wrapped", "removed", "renamed"]))
        if how == "removed" or how == "renamed":
            value = node.pop(key)
            if how == "renamed" and isinstance(node, dict):
                node[draw(st.sampled_from([f"{key}x", "", key.upper(), "\0", "extra"]))] = value
        else:
            new = {"value": draw(st.sampled_from(VALUES)), "other": other[its], "wrapped": [node[key]]}[how]
            node[key] = json.loads(json.dumps(new))  # a copy
    return tree


def text_of(tree) -> bytes:
    "JSON; what stands between two @ as it is, without quotation marks."
    return re.sub('"@([^@]*)@"', lambda m: m[1].replace("'", '"'), json.dumps(tree)).encode()


def spoiled_json(corpus: list[bytes]) -> st.SearchStrategy:
    return spoiled_tree(corpus).map(text_of) | spoiled(corpus)


@st.composite
def spoiled_header(draw, corpus: list[bytes]) -> bytes:
    "A safetensors file with another table of contents: offsets, shapes and types that cannot be."
    data = draw(st.sampled_from(corpus))
    n = int.from_bytes(data[:8], "little")
    text = draw(spoiled_json([data[8 : 8 + n]]))
    length = draw(st.sampled_from([len(text)] * 9 + [0, 1, 2**26 + 1, 2**64 - 1]))
    return length.to_bytes(8, "little") + text + data[8 + n :]


def spoiled_tensors(corpus: list[bytes]) -> st.SearchStrategy:
    return spoiled_header(corpus) | spoiled(corpus)


def spoiled_sealed(corpus: list[bytes]) -> st.SearchStrategy:
    "Records with other content and the hash of it."

    def seal(record):
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            record["sha256"] = records.content_hash(record)
        return text_of(record)

    return spoiled_tree(corpus).map(seal) | spoiled(corpus)


# ------------------------------------------------------------------------------------------------------------- loaders

TENSORS = {"x": torch.arange(6.0), "half": torch.ones(2, 3, dtype=torch.bfloat16), "none": torch.empty(0, 3)}
PACKED = [checkpoints.pack(TENSORS, {"step": n, "history": {"curves": [[{"loss": 0.5}]]}}) for n in (10, 20)]


@loader("a checkpoint whose name fits it", CheckpointError)
def _(folder):
    path, place = folder / "spoiled", checkpoints.CheckpointFile(folder / "x.safetensors")

    def seal(data):
        place.remove()
        (folder / f"x.1.{sha256(data)[: checkpoints.DIGITS]}.safetensors").symlink_to(path)

    def load(data):
        tensors, meta = place.load()
        assert isinstance(meta, dict) and all(isinstance(t, torch.Tensor) for t in tensors.values())

    return Target(PACKED, load, path, spoiled_tensors, seal)


def stored_weights(folder, name: str, **more) -> Target:
    "A folder of weights, of which one file is spoiled."
    weights = build_model(tiny_task.WAVE, 0).state_dict()
    checkpoints.save_weights(folder, weights, tiny_task.WAVE, {"task": "tiny", "seed": 0})
    return Target([(folder / name).read_bytes()], lambda _: checkpoints.load_weights(folder), folder / name, **more)


@loader("config.json of stored weights", CheckpointError)
def _(folder):
    return stored_weights(folder, "config.json", files=spoiled_json)


@loader("stored weights and their hash", CheckpointError)
def _(folder):
    def seal(data):
        (folder / "model.safetensors.sha256").write_text(f"{sha256(data)}  model.safetensors\n")

    return stored_weights(folder, "model.safetensors", files=spoiled_tensors, seal=seal)


@loader("what a checkpoint holds, on resuming", CheckpointError)
def _(folder):
    rhythm = {k: tiny_task.RHYTHM[k] for k in ("steps", "eval_every", "log_every")}
    population = training.Population(tiny_task.TinyTask(), tiny_task.WAVE, tiny_task.RUNS, "cpu")
    whole = training.Training(population, **rhythm)
    facts, place, kept = whole.facts({"runs": ["0" * 16]}), checkpoints.CheckpointFile(folder / "x.safetensors"), {}
    whole.run(progress=False)
    whole.save(SimpleNamespace(save=lambda tensors, meta: kept.update(tensors=tensors, meta=meta)), facts)

    def load(data):
        for old in folder.iterdir():
            old.unlink()
        with contextlib.suppress(ValueError, RecursionError, TypeError):  # not JSON, or NaN: no checkpoint
            place.save(kept["tensors"], dict(json.loads(data)))
        assert all(isinstance(key, str) for key in sweeps.half_finished(place))  # or it is set aside
        training.Training(population, **rhythm).resume(place, facts)

    return Target([to_json(kept["meta"]).encode()], load, files=spoiled_json)


def trained() -> tuple:
    "A run, its record, its curve."
    sizes = {"T": 1, "batch_size": 4, "valid_size": 5, "test_size": 5}
    model = replace(tiny_task.WAVE, input_size=10, output_size=10, every_step=True)
    run = ex.Run(ex.Experiment("tiny", "copy", sizes, model, lr=1e-2, steps=4, eval_every=2, log_every=1), 0)
    with tempfile.TemporaryDirectory() as folder:
        sweeps.train([run], Path(folder), "cpu", progress=False)
        return run, run.path(folder).read_bytes(), run.path(folder, ".csv").read_bytes()


@loader("a record in a sweep", ConfigError)
def _(folder):
    run, record, _ = trained()
    path = run.path(folder)
    path.parent.mkdir(parents=True)
    grid = grids.Grid("g", (run.experiment,), {"lr": [run.experiment.lr, 0.5]})

    def load(data):
        found = ex.record_of(folder, run)
        aside = [p for p in path.parent.iterdir() if ".broken" in p.name]
        assert (found is None) == bool(aside) and path.exists() == (found is not None), "kept, or set aside"
        assert not found or found["key"] == run.key
        assert not found or all(math.isfinite(v or 0) for v in found["test_best"].values())
        for p in aside:
            p.unlink()
        ranking.ranking_text(grid, folder)

    return Target([record], load, path, spoiled_sealed)


@loader("a curve", RecordError)
def _(folder):
    def load(data):
        rows, torn = records.read_curve(folder / "x.csv")
        assert torn >= 0 and all(v is None or isinstance(float(v), float) for row in rows for v in row.values())

    return Target([trained()[2], b"step,loss\n1,0.5\n2,\n"], load, folder / "x.csv")


@loader("an experiment's file", ConfigError)
def _(folder):
    based = {"base": "copy30_wrnn", "lr": 1e-3, "model": {"n": 50}, "task_options": {"T": 5}, "seeds": [0, 1]}

    def load(data):
        e = ex.read_experiment(folder / "tiny.json")
        assert ex.from_config(json.loads(json.dumps(ex.to_config(e)))) == e

    whole = ex.to_config(trained()[0].experiment)
    return Target([json.dumps(c).encode() for c in (whole, based)], load, folder / "tiny.json", spoiled_json)


@loader("a grid's file", ConfigError)
def _(folder):
    whole = {"experiments": [ex.to_config(trained()[0].experiment)], "seeds": [0, 1]}
    whole["axes"] = {"lr": [1e-2, 1e-3], "model.n": [8, 9]}
    named = {"name": "g", "experiments": ["copy0_*"], "axes": {"clip": [0, 1]}, "together": 4, "source": "here"}

    def load(data):
        grid = grids.find_grid(str(folder / "grid.json"))
        assert grid.runs() and grids.grid_from(json.loads(json.dumps(plain(grid)))) == grid

    return Target([json.dumps(c).encode() for c in (whole, named)], load, folder / "grid.json", spoiled_json)


@loader("a record of speed", RecordError)
def _(folder):
    record = {"kind": "speed", "started": "2026-11-24T10:00:00Z"}
    record["sections"] = {"cpu": {"rows": [{"ms": 1.0}], "load": 1.0}}

    def load(data):
        bench.rows_of(bench.read_speed(folder), "cpu")

    return Target([json.dumps(record).encode()], load, folder / "x.json", spoiled_json)


@loader("the shipped digits", DataError)
def _(folder):
    good = raw.DIGITS_FILE.read_bytes()
    raw.DIGITS_FILE = folder / raw.DIGITS_FILE.name

    def load(data):
        assert [len(y) for _, y in raw.load_digits().values()] == [2000, 200, 500]

    return Target([good], load, raw.DIGITS_FILE)


@loader("machine code in the cache")
def _(folder):
    path = folder / "x.cubin"
    kernels.write_cached(path, b"machine code")

    def load(data):
        assert kernels.read_cached(path) == (b"machine code" if data == good else None)

    good = path.read_bytes()
    return Target([good], load, path)


# ----------------------------------------------------------------------------------------------------------- the tests

LIARS = {  # what is said of a loader that breaks its promise
    "KeyError": lambda data: data == b"good" or {}["which nobody has documented"],
    "MemoryError": lambda data: data == b"good" or bytearray(2**31),
}
BOMBS = [b"[" * 2_000_000, b'{"a":' * 500_000, b"1" * 3_000_000, b'"' + b"x" * 3_000_000 + b'"', b"\n" * 2_000_000]
HOLE = 2**33  # bytes of a last file, all zeros, that needs no disk


def live(name: str, folder: str, count: int) -> int:
    "The process of one loader: feeds it, and writes down what was wrong, or how many files were accepted and how many refused."
    warnings.simplefilter("ignore")
    said, files = Path(folder) / "said", Path(folder) / "files"
    files.mkdir()
    prepare, errors = LOADERS.get(name) or (lambda _: Target([b"good"], LIARS[name]), ())
    target, counts = prepare(files), Counter()

    def feed(data):
        if target.path:
            target.path.unlink(missing_ok=True)
            target.path.write_bytes(data)
            target.seal(data)
        read(data)

    def read(data):
        begin = time.process_time()
        try:
            target.load(data)
            counts["accepted"] += 1
        except errors as error:
            counts["refused"] += 1
            assert 0 < len(str(error)) < 100_000
        assert time.process_time() - begin < SECONDS, "it took too much processor time"

    some = settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    try:
        for data in target.corpus:
            feed(data)
        assert counts["accepted"] == len(target.corpus), "a valid file is refused: this tests nothing"
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = now + 2 * MEMORY  # addresses, twice the pages: what is asked for beyond raises MemoryError
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for data in BOMBS:
            feed(data)
        if target.path:
            target.path.write_bytes(b"")
            os.truncate(target.path, HOLE)
            read(b"zeros")
        seed(SEED)(some(given(target.files(target.corpus))(feed)))()
    except BaseException:
        said.write_text(traceback.format_exc())
        return 1
    said.write_text(json.dumps(counts))
    return 0


@pytest.mark.parametrize("name", LOADERS)
def test_spoiled_files(name, nursery, tally, tmp_path):
    code = nursery("test_fuzz:live", name, str(tmp_path), FILES // len(LOADERS)).end()
    said = (tmp_path / "said").read_text() if code >= 0 else f"the process died ({code}); the file is in {tmp_path}"
    assert code == 0, f"{said}\nagain: WAVE_RNNS_FUZZ_SEED={SEED} WAVE_RNNS_FUZZ={FILES}"
    counts = json.loads(said)
    tally("spoiled files in all", files=sum(counts.values()), **counts, seed=str(SEED))


@pytest.mark.parametrize("name", LIARS)
def test_the_machinery_notices(name, nursery, tmp_path):
    "A loader that breaks its promise is reported."
    assert nursery("test_fuzz:live", name, str(tmp_path), 3).end() == 1
    assert name in (tmp_path / "said").read_text()


def test_every_reading_function_is_among_them():
    "A loader that reads files and is not fuzzed is noticed: add it above, or here with a reason."
    source = Path(__file__).read_text()
    # sums from the device; a kernel onto it; parts of most of the above; an address; a signal
    not_files = "read_sums load_module read_small read_object read_address read_back".split()
    # parts of the above; raw data, of which no byte is looked at before all were compared: test_data.py
    inside = "read_trusted read_config read_record read_records load_raw load_splits read_images".split()
    for module in {m for n, m in sys.modules.items() if n.startswith("wave_rnns.")}:
        for name in getattr(module, "__all__", ()):
            if re.match(r"(read|load)_", name) and name not in not_files + inside:
                assert f".{name}(" in source, f"{module.__name__}.{name} is not fuzzed"

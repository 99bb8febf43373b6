"""Spoiled files by the thousand into every loader: a result that makes sense, or the documented error; bounded memory, bounded time.

`WAVE_RNNS_FUZZ` files in all (5,000 unless set), divided among the loaders by their `share`. File number i of a loader is a function of
(`WAVE_RNNS_FUZZ_SEED`, loader, i). Each loader runs in a process of its own that may take no more memory than is left to it. What it cannot
bear is written to a file that the failure names.

A new loader is one more function below, with `@loader`: it returns a `Target`."""

import contextlib
import copy
import functools
import gzip
import io
import json
import math
import os
import random
import re
import resource
import sys
import tarfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_task
import torch

from wave_rnns.kernels import launch as kernels
from wave_rnns.paper import bench, checkpoints, grids, ranking, records, sweeps, training
from wave_rnns.paper import data as raw
from wave_rnns.paper import experiments as ex
from wave_rnns.core import CheckpointError, ConfigError, DataError, RecordError, sha256, to_json
from wave_rnns.paper.models import build_model

FILES = int(os.environ.get("WAVE_RNNS_FUZZ", 5000))
SEED = int(os.environ.get("WAVE_RNNS_FUZZ_SEED", 0))
MEMORY = 2**28  # bytes that reading one file may need
SECONDS = 5.0  # of processor time, for one file; nearly all take less than a thousandth of it


@dataclass
class Target:
    "A loader, ready to be fed."

    corpus: list[bytes]  # valid files
    load: Callable[[], object]  # reads `path`, or (path None) is given the bytes; asserts what its result must be
    path: Path | None = None
    spoilers: tuple = ()  # beside those of bytes
    seal: Callable[[bytes], object] = lambda data: None  # what an attacker could write beside the file: its hash
    hole: int = 2**33  # bytes of a file of zeros that needs no disk; fewer where all of a file is read for its hash


LOADERS = {}


def loader(name: str, *errors: type, share: int, memory: int = MEMORY, among: dict = LOADERS):
    "Declare a loader: `errors` are the documented ones."
    return lambda prepare: among.setdefault(
        name, SimpleNamespace(prepare=prepare, errors=errors, share=share, memory=memory)
    )


# ------------------------------------------------------------------------------------------------------ how to spoil


TOKENS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 400, b"null", b"[" * 50, b'{"a":' * 50,
    b'"\\ud800"', b"../", b"\n", b",", b"\r\n", b"\x80\x05", b"PK\x03\x04", b"\x1f\x8b", (2**63).to_bytes(8, "little"),
]  # fmt: skip
NUMBERS = [b"0", b"-1", b"1e400", b"0.5", b"9" * 30, b"1" * 5000, str(2**69 + 1).encode(), b"00", b"1_0"]


def spoil_bytes(chance, data, corpus):
    "One of the ways to spoil a file of any kind."
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    match chance.randrange(8):
        case 0:  # noise, perhaps behind a good beginning
            return data[: chance.choice([0, a % 20])] + chance.randbytes(int(2 ** chance.uniform(0, 11)))
        case 1:  # a piece is all there is
            return data[a:] if chance.random() < 0.3 else data[:b]
        case 2:  # more than there should be
            kind = chance.choice([bytes, chance.randbytes, lambda n: data[:n], lambda n: b" " * n])
            more = kind(int(2 ** chance.uniform(0, 14)))
            return data + more if chance.random() < 0.7 else more + data
        case 3:  # flipped bits
            data = bytearray(data or b"\0")
            for _ in range(chance.choice([1, 1, 1, 2, 8, 64])):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 4:  # what parsers stumble over, in the place of something or between
            data = bytearray(data)
            for _ in range(chance.choice([1, 1, 2, 5])):
                at, token = chance.randrange(len(data) + 1), chance.choice(TOKENS)
                data[at : at + chance.choice([0, 1, len(token), 8])] = token
        case 5:  # the end of another file
            other = chance.choice(corpus)
            return data[:a] + other[chance.randrange(len(other) + 1) :]
        case 6:  # a piece left out, or there several times
            return data[:a] + data[a:b] * chance.choice([0, 2, 3, min(20, 100_000 // max(1, b - a))]) + data[b:]
        case _:  # another number in the place of one that is written in digits
            found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
            at = chance.choice(found)  # without one: the file stays as it is
            return data[: at.start()] + chance.choice(NUMBERS) + data[at.end() :]
    return bytes(data)


RAW = [
    "NaN", "Infinity", "-Infinity", "1e999", "-0", "01", "1.", "0x10", "True", "'x'", "undefined", '"\\ud800"', '{"a": 1, "a": 2}', "9" * 5000,
    "[" * 30 + "]" * 30, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "[", "}", "", "1,",
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e-320, 2**31, 2**53, 2**63, -(2**64), 10**400, "", "x", "..", "/", "a\0b", "é" * 300, "1",
    [], {}, [[]], [None], [0, 1], {"": 0}, {"a": {"b": []}}, ["x"] * 300, list(range(300)), "F32", "done", "wrnn",
]  # fmt: skip


def spots(tree) -> Iterator[tuple]:
    "Every place in a tree of dictionaries and lists: (container, key)."
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from spots(tree[key])


def spoil_tree(chance, tree, raw: bool = True):
    "A few changes inside; with `raw`, placeholders of what no JSON writer would write."
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        found = list(spots(tree)) if isinstance(tree, (dict, list)) else []
        if not found or chance.random() < 0.02:
            return copy.deepcopy(chance.choice(VALUES))
        (node, key), (other, its) = chance.choice(found), chance.choice(found)
        match chance.randrange(6):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[chance.choice([key + "x", "", key.upper(), "\u0000", "extra"])] = node.pop(key)
            case 2:
                node[key] = copy.deepcopy(other[its])
            case 3:
                node[key] = chance.choice([[node[key]], {"a": node[key]}])
            case 4 if raw:
                node[key] = f"@{chance.randrange(len(RAW))}@"
            case _:
                node[key] = copy.deepcopy(chance.choice(VALUES))
    return tree


def text_of(chance, tree) -> bytes:
    text = json.dumps(tree, ensure_ascii=chance.random() < 0.8, indent=chance.choice([None, 1]))
    text = re.sub('"@(\\d+)@"', lambda m: RAW[int(m[1])], text)
    if chance.random() < 0.1 and (keys := list(re.finditer(r'"(\w+)": ', text))):  # the same key twice
        at = chance.choice(keys)
        text = text[: at.start()] + at[0] + chance.choice(["1", "null", "{}", '"x"']) + ", " + text[at.start() :]
    return text.encode("utf-8", "surrogatepass")


def spoil_json(chance, data, corpus):
    return text_of(chance, spoil_tree(chance, json.loads(data)))


def spoil_header(chance, data, corpus):
    "A safetensors file with another table of contents: offsets, shapes and types that cannot be."
    n = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + n])
    for _ in range(chance.choice([0, 1, 1, 2])):
        entry = tree[chance.choice([k for k in tree if k != "__metadata__"])]
        sizes = [0, 1, -1, 3, 8, 2**31, 2**40, 2**63, 2**64, 1.5, None, "1", len(data)]
        what = chance.choice(["dtype", "shape", "data_offsets"])
        if what == "dtype":
            entry[what] = chance.choice([*"F32 F64 F16 BF16 I8 U8 BOOL F8_E4M3 F4 C64 X".split(), "", None, 3])
        else:
            entry[what] = [chance.choice(sizes) for _ in range(2 if what == "data_offsets" else chance.randrange(5))]
    text = text_of(chance, spoil_tree(chance, tree) if chance.random() < 0.5 else tree)
    lengths = [0, 1, len(text) - 1, 2**26, 2**26 + 1, 2**62, 2**64 - 1]
    length = len(text) if chance.random() < 0.9 else chance.choice(lengths)
    return length.to_bytes(8, "little") + text + data[8 + n :]


def spoil(chance: random.Random, target: Target) -> bytes:
    "One spoiled file; now and then by two spoilers in turn."
    data = chance.choice(target.corpus)
    for _ in range(1 + (chance.random() < 0.15)):
        special = target.spoilers and chance.random() < 0.6
        with contextlib.suppress(Exception):  # what was spoiled once may be no JSON any more
            data = (chance.choice(target.spoilers) if special else spoil_bytes)(chance, data, target.corpus)
    return data


# ------------------------------------------------------------------------------------------- loaders: checkpoints (08)


def tensors(step: int) -> dict:
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    return {"x": torch.arange(6.0), "n": torch.tensor(step), "half": half, "none": torch.empty(0, 3)}


PACKED = [
    checkpoints.pack(tensors(step), {"step": step, "history": {"curves": [[{"loss": 0.5}]], "best": [None]}})
    for step in (10, 20)
]


def list_hash(path: Path, content: bytes):
    Path(f"{path}.sha256").write_text(f"{sha256(content)}  {path.name}\n")


def name_of(data: bytes, number: int) -> str:
    "What a checkpoint with this content is called."
    return f"x.{number}.{sha256(data)[: checkpoints.DIGITS]}.safetensors"


@loader("a checkpoint whose name fits it", CheckpointError, share=8)
def _(folder):
    path = folder / "spoiled"

    def seal(data):
        for old, _ in checkpoints.checkpoints_of(folder / "x.safetensors"):
            old.unlink()
        (folder / name_of(data, 1)).symlink_to(path)

    def load():
        got, meta = checkpoints.load_checkpoint(folder / "x.safetensors")
        assert isinstance(meta, dict) and all(isinstance(t, torch.Tensor) for t in got.values())

    return Target(PACKED, load, path, (spoil_header,), seal, hole=2**29)


@loader("a checkpoint beside the one before", share=5)
def _(folder):
    (folder / name_of(PACKED[0], 1)).write_bytes(PACKED[0])

    def load():
        got, meta = checkpoints.load_checkpoint(folder / "x.safetensors")
        assert meta["step"] in (10, 20) and all(torch.equal(got[k], t) for k, t in tensors(meta["step"]).items())

    return Target(PACKED[1:], load, folder / name_of(PACKED[1], 2), (spoil_header,), hole=2**29)


@loader("a table of contents", ValueError, share=5)
def _(folder):
    path = folder / "x.safetensors"

    def load():
        with path.open("rb") as file:
            assert isinstance(checkpoints.read_header(file, path.stat().st_size), dict)

    return Target(PACKED, load, path, (spoil_header,))


MODELS = [tiny_task.WAVE, replace(tiny_task.WAVE, kind="irnn", c=1, n=7)]
MODELS += [replace(tiny_task.WAVE, kind="mlp", input_size=6, c=1)]


def stored_weights(folder, name: str, models=tuple(MODELS[:1]), **more) -> Target:
    "A folder of weights, of which one file is spoiled."
    corpus = []
    for config in models:
        checkpoints.save_weights(folder, build_model(config, 0).state_dict(), config, {"task": "tiny", "seed": 0})
        corpus.append((folder / name).read_bytes())

    def load():
        assert isinstance(checkpoints.load_weights(folder), torch.nn.Module)

    return Target(corpus, load, folder / name, **more)


@loader("a list of hashes", CheckpointError, share=4)
def _(folder):
    return stored_weights(folder, "model.safetensors.sha256")


@loader("config.json of stored weights", CheckpointError, share=5)
def _(folder):
    return stored_weights(folder, "config.json", MODELS, spoilers=(spoil_json,))


@loader("stored weights and their hash", CheckpointError, share=4)
def _(folder):
    seal = lambda data: list_hash(folder / "model.safetensors", data)  # noqa: E731
    return stored_weights(folder, "model.safetensors", spoilers=(spoil_header,), seal=seal, hole=2**29)


@loader("what a checkpoint holds, on resuming", CheckpointError, share=3)
def _(folder):
    rhythm = {k: tiny_task.RHYTHM[k] for k in ("steps", "eval_every", "log_every")}
    task, cpu = tiny_task.TinyTask(), torch.device("cpu")
    population = training.Population(task, tiny_task.WAVE, tiny_task.RUNS, cpu, torch.float32)
    place = SimpleNamespace(save=lambda tensors, meta: saved.append((tensors, json.loads(to_json(meta)))))
    saved, whole = [], training.Training(population, **rhythm)
    facts = whole.facts()
    whole.run(progress=False)
    whole.save(place, facts)

    def load(data):
        kept = dict(saved[0][0])
        if len(data) > 3 and data.startswith(b"-"):  # a tensor of another shape or type
            name = sorted(kept)[data[1] % len(kept)]
            kept[name] = (kept[name][None], kept[name].flatten()[:-1], kept[name].double())[data[2] % 3]
            data = data[3:]
        try:
            meta = json.loads(data)
            assert isinstance(meta, dict)
        except (ValueError, RecursionError, AssertionError):
            raise CheckpointError("seen to by `unpack`") from None
        training.Training(population, **rhythm).resume(SimpleNamespace(load=lambda: (kept, meta)), facts)

    text = json.dumps(saved[0][1]).encode()
    return Target([text], load, None, (spoil_json, lambda chance, data, corpus: b"-" + chance.randbytes(2) + data))


# ---------------------------------------------------------------------------------------- loaders: records (09, 10, 11)


@functools.cache
def trained() -> tuple:
    "A run, its record, its curve."
    import tempfile

    sizes = {"T": 1, "batch_size": 4, "valid_size": 5, "test_size": 5}
    model = replace(tiny_task.WAVE, input_size=10, output_size=10, every_step=True)
    run = ex.Run(ex.Experiment("tiny", "copy", sizes, model, lr=1e-2, steps=4, eval_every=2, log_every=1), 0)
    with tempfile.TemporaryDirectory() as folder:
        sweeps.train([run], Path(folder), "cpu", progress=False)
        return run, run.path(folder).read_bytes(), run.path(folder, ".csv").read_bytes()


def spoil_sealed(chance, data, corpus):
    "A record with other content and the hash of it."
    record = spoil_tree(chance, json.loads(data), raw=False)
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        record["sha256"] = records.content_hash(record)
    return text_of(chance, record)


@loader("a record", RecordError, share=8)
def _(folder):
    run, record, _ = trained()
    path = folder / f"{run.key}.json"

    def load():
        record = records.read_record(path)
        assert record["key"] == run.key and all(math.isfinite(v or 0) for v in record["test_best"].values())

    return Target([record], load, path, (spoil_json, spoil_sealed))


@loader("a record of a run that may be done", ConfigError, share=4)
def _(folder):
    run, record, _ = trained()
    path = run.path(folder)
    path.parent.mkdir(parents=True)

    def load():
        found = ex.record_of(folder, run)
        aside = [p for p in path.parent.iterdir() if ".broken" in p.name]
        assert (found is None) == bool(aside) and path.exists() == (found is not None), "kept, or set aside"
        for p in aside:
            p.unlink()

    return Target([record], load, path, (spoil_json, spoil_sealed))


@loader("a curve", RecordError, share=6)
def _(folder):
    path = folder / "x.csv"

    def load():
        rows, torn = records.read_curve(path)
        assert torn >= 0 and all(v is None or isinstance(float(v), float) for row in rows for v in row.values())

    return Target([trained()[2], b"step,loss\n1,0.5\n2,\n"], load, path)


@loader("an experiment's file", ConfigError, share=6)
def _(folder):
    path = folder / "tiny.json"
    based = {"base": "copy30_wrnn", "lr": 1e-3, "model": {"n": 50}, "task_options": {"T": 5}, "seeds": [0, 1]}

    def load():
        e = ex.read_experiment(path)
        assert ex.from_config(json.loads(json.dumps(ex.to_config(e)))) == e

    whole = ex.to_config(trained()[0].experiment)
    return Target([json.dumps(whole).encode(), json.dumps(based).encode()], load, path, (spoil_json,))


@loader("whose checkpoint it is", CheckpointError, share=4)
def _(folder):
    place = checkpoints.CheckpointFile(folder / "x.safetensors")
    good = {"facts": {"about": {"runs": ["0" * 16, "1" * 16]}}, "history": {"step": 3}}

    def load(data):
        for old in folder.iterdir():
            old.unlink()
        with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
            checkpoints.save_checkpoint(place.path, {}, dict(json.loads(data)))
        assert all(isinstance(key, str) for key in sweeps.half_finished(place))

    return Target([json.dumps(good).encode()], load, None, (spoil_json,))


@loader("a grid's file", ConfigError, share=6)
def _(folder):
    path = folder / "grid.json"
    whole = {"experiments": [ex.to_config(trained()[0].experiment)], "seeds": [0, 1]}
    whole["axes"] = {"lr": [1e-2, 1e-3], "model.n": [8, 9]}
    named = {"name": "g", "experiments": ["copy0_*"], "axes": {"clip": [0, 1]}, "together": 4, "source": "here"}

    def load():
        grid = grids.find_grid(str(path))
        assert grid.runs() and grids.grid_from(json.loads(json.dumps(grids.grid_config(grid)))) == grid

    return Target([json.dumps(whole).encode(), json.dumps(named).encode()], load, path, (spoil_json,))


@loader("why a population failed", share=3)
def _(folder):
    run, _, _ = trained()
    grid = grids.Grid("g", (run.experiment,), seeds=(0, 1))
    path = sweeps.population_path(folder, grid.runs()).with_suffix(".failed")
    path.parent.mkdir(parents=True)

    def load():
        assert all(isinstance(why, str) for why in sweeps.failures(grid, folder).values())

    return Target([b"2 x tiny: it broke\nTraceback ...\n"], load, path)


@loader("a record in a sweep", ConfigError, share=4)
def _(folder):
    run, record, _ = trained()
    path = run.path(folder)
    path.parent.mkdir(parents=True)
    grid = grids.Grid("g", (run.experiment,), {"lr": [run.experiment.lr, 0.5]})

    def load():
        assert isinstance(ranking.ranking_text(grid, folder), str)
        for p in path.parent.iterdir():
            p.unlink()

    return Target([record], load, path, (spoil_sealed, spoil_sealed, spoil_json))


@loader("a record of speed", RecordError, share=3)
def _(folder):
    path, row = folder / "x.json", {"name": "ours", "ms": 1.0}
    record = {"kind": "speed", "started": "2026-11-24T10:00:00Z", "environment": {"device": "cpu"}}
    record["sections"] = {"cpu": {"rows": [row], "load": 1.0}}
    (folder / "y.json").write_text(json.dumps(record))

    def load():
        found = bench.read_speed(folder)
        assert len(found) == 2
        bench.rows_of(found, "cpu")

    return Target([json.dumps(record).encode()], load, path, (spoil_json,))


# -------------------------------------------------------------------------------------------- loaders: raw data (12)


@loader("a raw file", DataError, share=8)
def _(folder):
    path, good = folder / "t10k-labels-idx1-ubyte.gz", gzip.compress(random.Random(0).randbytes(300))
    raw.FILES[path.name] = (len(good), sha256(good))

    def load():
        with path.open("rb") as file:
            raw.copy_checked(path, file, copy := io.BytesIO())
        assert copy.getvalue() == good

    return Target([good], load, path)


@loader("the shipped digits", DataError, share=3)
def _(folder):
    good = raw.DIGITS_FILE.read_bytes()
    raw.DIGITS_FILE = folder / raw.DIGITS_FILE.name

    def load():
        assert [len(y) for _, y in raw.load_digits().values()] == [2000, 200, 500]

    return Target([good], load, raw.DIGITS_FILE)


@loader("CIFAR-10's archive", DataError, share=4)
def _(folder):
    path, good = folder / raw.ARCHIVE, io.BytesIO()
    inside = folder / "inside" / raw.FOLDERS["cifar10"]
    inside.mkdir(parents=True)
    with tarfile.open(fileobj=good, mode="w:gz", compresslevel=1) as tar:
        for part in raw.CIFAR_PARTS:
            member = tarfile.TarInfo(f"{raw.FOLDERS['cifar10']}/{part}")
            member.size = 700
            tar.addfile(member, io.BytesIO(random.Random(part).randbytes(700)))
    raw.FILES[raw.ARCHIVE] = (len(good.getvalue()), sha256(good.getvalue()))
    raw.atomic_write = lambda path, content: path.write_bytes(content)  # a thousand times faster

    def load():
        try:
            raw.unpack_cifar10(path, inside)
        except DataError:
            assert not list(inside.iterdir())  # nothing is taken from an archive that is not the published one
            raise
        for part in raw.CIFAR_PARTS:
            assert (inside / part).read_bytes() == random.Random(part).randbytes(700)
            (inside / part).unlink()

    return Target([good.getvalue()], load, path)


@loader("a server's answers", DataError, share=4)
def _(folder):
    book, part = random.Random(0).randbytes(5000), folder / "book.part"
    digest = sha256(book)

    class Answer(io.BytesIO):
        headers = {}

    def ask(chance, request, timeout=None):
        "Sometimes what was asked for, sometimes anything else."
        start = int((request.get_header("Range") or "bytes=0-")[6:-1]) if chance.random() < 0.8 else 0
        if chance.random() < 0.1:
            late, reset = TimeoutError("timed out"), ConnectionResetError(104, "reset")
            raise chance.choice([late, reset, raw.http.client.IncompleteRead(b""), ValueError("odd")])
        content = book[start:] if chance.random() < 0.8 else chance.randbytes(chance.choice([0, 10, 5000, 9000]))
        answer = Answer(content[: chance.randrange(len(content) + 1)] if chance.random() < 0.4 else content)
        answer.headers = {"Content-Length": str(len(content)), "Content-Range": f"bytes {start}-4999/5000"}
        for name in ("Content-Length", "Content-Range"):
            if chance.random() < 0.1:
                answer.headers[name] = chance.choice(["", "0", "-1", "x", "bytes 0-", "bytes */5000", "9" * 50])
            elif chance.random() < 0.1:
                del answer.headers[name]
        return answer

    def load(answers):
        chance = random.Random(answers)
        part.write_bytes(book[: answers[0] * 20] if answers and answers[0] < 128 else answers)
        raw.urllib.request.urlopen = functools.partial(ask, chance)
        try:
            raw.download(["http://a/book", "http://b/book"], part, len(book), digest)
            assert part.read_bytes() == book
        except DataError:
            assert not part.exists() or sha256(part) != digest
            raise

    return Target([bytes([k]) + b"seed" for k in range(0, 250, 9)], load)


# ---------------------------------------------------------------------------------------------- loaders: kernels (04)


@loader("the cache of kernels", share=2)
def _(folder):
    os.environ["WAVE_RNNS_DATA"] = str(folder)
    kernels._compile = lambda *_: (b"machine code", "")
    kernels.nvrtc_version, kernels.print = lambda: (13, 0), lambda *_, **__: None
    kernels.atomic_write = lambda path, content: path.write_bytes(content)

    def load():
        assert kernels.compile_kernel("source", {"N": 3}, "sm_90") == b"machine code"

    load()
    (path,) = (folder / "kernels").iterdir()
    return Target([path.read_bytes()], load, path)


# ------------------------------------------------------------------------------------------- loaders that break promises


LIARS = {}


def be_wrong():
    raise AssertionError("a wrong result")


def liar(name: str, lie: Callable[[], object]):
    load = lambda data: data == b"good" or lie()  # noqa: E731
    loader(name, ValueError, share=0, memory=2**25, among=LIARS)(lambda folder: Target([b"good"], load))


liar("KeyError", lambda: {}["which nobody has documented"])
liar("MemoryError", lambda: bytearray(2**28))
liar("AssertionError", be_wrong)


# ----------------------------------------------------------------------------------------------------------- the tests


def most_so_far() -> int:
    "Bytes of memory that this process ever had at once."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_no_more_than(memory: int):
    "From here on, what this process asks for beyond `memory` raises MemoryError."
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * memory, resource.RLIM_INFINITY))  # addresses, twice the pages


ZEROS = None  # in the place of content: as many zeros as the target's hole has


def live(name: str, folder: str, count: int) -> int:
    "The process of one loader: feeds it, and writes report.json."
    warnings.simplefilter("ignore")
    case, folder = {**LOADERS, **LIARS}[name], Path(folder)
    (folder / "files").mkdir()
    target = case.prepare(folder / "files")
    report = {"kinds": Counter(), "slowest": 0.0, "wrong": []}

    def feed(number, data: bytes | None):
        arguments = () if target.path else (data,)
        if target.path:
            target.path.unlink(missing_ok=True)
            target.path.write_bytes(data or b"")
            os.truncate(target.path, target.hole) if data is ZEROS else target.seal(data)
        before, begin, kind, wrong = most_so_far(), time.process_time(), "accepted", ""
        try:
            target.load(*arguments)
        except case.errors as error:
            kind, length = type(error).__name__, len(str(error))
            wrong = "" if 0 < length < 100_000 else f"a message of {length} letters"
        except Exception as error:
            kind, wrong = "wrong", "".join(traceback.format_exception(error, limit=-4))[-1500:]
        seconds, more = time.process_time() - begin, most_so_far() - before
        if seconds > SECONDS or more > case.memory:
            wrong = wrong or f"{seconds:.1f} s of processor time, {more / 1e6:.0f} MB of memory"
        report["kinds"][kind] += 1
        report["slowest"] = max(report["slowest"], seconds)
        if wrong and len(report["wrong"]) < 10:
            (folder / f"wrong_{number}").write_bytes(data or b"zeros")
            report["wrong"].append(f"number {number}, kept in {folder}: {wrong}")

    for data in target.corpus:
        feed("of the corpus", data)
    bombs = [b"[" * 2_000_000, b'{"a":' * 500_000, b"1" * 3_000_000, b'"' + b"x" * 3_000_000 + b'"']
    bombs += [b"\n" * 2_000_000, bytes(3_000_000), *([ZEROS] if target.path else [])]
    take_no_more_than(case.memory)
    start = most_so_far()
    for number in range(count):
        (folder / "number").write_text(str(number))  # for the case that this process dies
        feed(number, spoil(random.Random(f"{SEED} {name} {number}"), target))
    for number, data in enumerate(bombs):
        feed(f"bomb {number}", data)
    report |= {"bombs": len(bombs), "memory": most_so_far() - start}
    (folder / "report.json").write_text(json.dumps(report))
    return 0


def portion(name: str) -> int:
    return math.ceil(FILES * LOADERS[name].share / sum(c.share for c in LOADERS.values()))


@pytest.fixture(scope="module")
def totals(tally):
    "A row below the others."
    counts = Counter()
    yield counts
    tally("spoiled files in all", **counts, seed=str(SEED))


@pytest.mark.parametrize("name", LOADERS)
def test_spoiled_files(name, nursery, tally, totals, tmp_path):
    code = nursery("test_fuzz:live", name, str(tmp_path), portion(name)).end()
    number = (tmp_path / "number").read_text() if (tmp_path / "number").exists() else "none"
    again = f"again: WAVE_RNNS_FUZZ_SEED={SEED} WAVE_RNNS_FUZZ={FILES}"
    assert code == 0, f"the process died ({code}) at file {number}, which is somewhere in {tmp_path / 'files'}; {again}"
    report = json.loads((tmp_path / "report.json").read_text())
    kinds = {"accepted": 0, **report["kinds"]}
    bombs, wrong = report["bombs"], kinds.pop("wrong", 0)
    kinds |= {"MB_more_memory": report["memory"] / 1e6, "s_the_slowest": report["slowest"]}
    tally(f"spoiled: {name}", files=portion(name), bombs=bombs, other_errors=wrong, **kinds)
    totals.update(files=portion(name), bombs=bombs, other_errors=wrong)
    assert not report["wrong"], f"{again}\n" + "\n\n".join(report["wrong"])
    assert kinds["accepted"], "not even a valid file was accepted: this test tests nothing"


def test_every_reading_function_is_among_them():
    "A loader that reads files and is not fuzzed is noticed: add it above, or here with a reason."
    source = Path(__file__).read_text()
    # sums from the device; a kernel onto it; parts of most of the above; an address; a signal
    not_files = "read_sums load_module read_small read_object read_address read_back".split()
    inside = "load_raw load_splits read_mnist read_cifar10 read_trusted read_config read_records read_cached".split()
    for module in {m for n, m in sys.modules.items() if n.startswith("wave_rnns.")}:
        for name in getattr(module, "__all__", ()):
            if re.match(r"(read|load)_", name) and name not in not_files:
                assert name in inside or f".{name}(" in source, f"{module.__name__}.{name} is not fuzzed"


@pytest.mark.parametrize("name", LIARS)
def test_the_machinery_notices(name, nursery, tmp_path):
    "A loader that breaks its promise is reported, and the file is kept."
    assert nursery("test_fuzz:live", name, str(tmp_path), 3).end() == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert name in report["wrong"][0] and list(tmp_path.glob("wrong_*"))

"Every way we know of spoiling a file, and what must come of it: one error type, a name, a cause, and the file left where it was."

import errno
import io
import json
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import tiny_task
import torch
from tiny_task import RHYTHM, RUNS, WAVE, TinyTask

from wave_rnns.core import CheckpointError, sha256
from wave_rnns.paper import checkpoints, training
from wave_rnns.paper.checkpoints import DIGITS, CheckpointFile, listen_for, load_weights, pack, save_weights
from wave_rnns.paper.config import merge
from wave_rnns.paper.models import ModelConfig, build_model
from wave_rnns.paper.population import RunSettings
from wave_rnns.paper.training import ResumeRefused, fit

TENSORS = {
    "theta": torch.randn(3, 40, generator=torch.Generator().manual_seed(0)),
    "step": torch.tensor(17),
    "running": torch.tensor([True, False]),
    "sums": torch.tensor([[0.1, float("nan")], [float("inf"), -0.0]], dtype=torch.float64),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "nothing": torch.empty(0, 3),
    "view": torch.arange(12.0).view(3, 4).T[1:],
}


def newest(place):
    return place.files()[0][0]


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def two(tmp_path):
    "A checkpoint of step 10 and, after it, one of step 20."
    place = CheckpointFile(tmp_path / "run.safetensors")
    for step in (10, 20):
        place.save({**TENSORS, "step": torch.tensor(step)}, {"step": step})
    return place


def test_round_trip_is_exact(tmp_path):
    meta = {"a": [0.1, 1 / 3, 1e-320, 2**60], "b": {"c": None, "d": "ü"}}
    place = CheckpointFile(tmp_path / "deep" / "x.safetensors")
    assert place.load() is None
    place.save(TENSORS, meta)
    tensors, back = place.load()
    assert back == meta and tensors.keys() == TENSORS.keys()
    for k, t in TENSORS.items():
        as_bytes = [x.contiguous().flatten().view(torch.uint8) for x in (tensors[k], t)]
        assert tensors[k].dtype == t.dtype and tensors[k].shape == t.shape and torch.equal(*as_bytes)


def test_two_generations_and_nothing_else(two, tmp_path):
    "What writers that were killed left unfinished goes with the next save."
    (tmp_path / ".run.3.abcd.safetensors.123-abcd.tmp").write_bytes(b"half a checkpoint")
    two.save(TENSORS, {"step": 30})
    names = [p.name for p, _ in two.files()]
    assert [n.split(".")[1] for n in names] == ["3", "2"] and sorted(files(tmp_path)) == sorted(names)
    assert all(sha256(path)[:DIGITS] == known for path, known in two.files())
    assert two.load()[1] == {"step": 30}
    newest(two).rename(tmp_path / "renamed.safetensors")
    assert two.load()[1] == {"step": 20}
    (tmp_path / ".other.3.abcd.safetensors.123-abcd.tmp").write_bytes(b"not ours")
    two.remove()
    assert sorted(files(tmp_path)) == [".other.3.abcd.safetensors.123-abcd.tmp", "renamed.safetensors"]


class Innocent:
    "A pickle that leaves a mark when it is opened."

    def __reduce__(self):
        return os.mkdir, ("OPENED",)


torch.save({"theta": torch.zeros(3)}, torch_saved := io.BytesIO())
ATTACKS = {  # of the bytes of a file; nothing else comes of any others: test_fuzz.py
    "truncated": lambda d: (d[:-1], "changed"),
    "truncated in the length": lambda d: (d[:5], "no safetensors"),
    "empty": lambda d: (b"", "is empty"),
    "trailing junk": lambda d: (d + b"junk", "changed"),
    "a data bit flipped": lambda d: (d[:-5] + bytes([d[-5] ^ 1]) + d[-4:], "changed"),
    "a table key changed": lambda d: (d.replace(b"theta", b"thetb"), "changed"),
    "an endless table": lambda d: ((2**62).to_bytes(8, "little") + d[8:], "changed"),
    "a pickle": lambda d: (pickle.dumps(Innocent()), "pickle"),
    "an old pickle": lambda d: (pickle.dumps(Innocent(), protocol=0), "no safetensors"),
    "torch.save": lambda d: (torch_saved.getvalue(), "torch.save"),
    "another's safetensors": lambda d: (safetensors.torch.save({"x": torch.zeros(3)}), "changed"),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_damage_is_named_and_the_one_before_is_used(two, attack, tmp_path, monkeypatch):
    "Nothing is deleted, nothing executed, also where an attacker could choose the name too."
    monkeypatch.chdir(tmp_path)
    bad, cause = attack(newest(two).read_bytes())
    newest(two).write_bytes(bad)
    with pytest.warns(UserWarning, match=r"run\.2\..*" + cause):
        tensors, meta = two.load()
    assert meta == {"step": 10} and int(tensors["step"]) == 10
    two.files()[1][0].write_bytes(b"{}")
    spoiled = files(tmp_path)
    with pytest.raises(CheckpointError, match=rf"(?s)run\.2\..*{cause}.*run\.1\."):
        two.load()
    assert files(tmp_path) == spoiled and len(spoiled) == 2
    (tmp_path / f"other.7.{sha256(bad)[:DIGITS]}.safetensors").write_bytes(bad)
    if cause != "changed":
        with pytest.raises(CheckpointError, match=rf"other\.7\..*{cause}"):
            CheckpointFile("other.safetensors").load()
    assert not (tmp_path / "OPENED").exists()


def test_what_is_hashed_is_what_is_loaded(two, monkeypatch):
    "A file that is exchanged while it is read: the bytes that were hashed are the bytes that come back."
    path = newest(two)
    other = pack(TENSORS, {"step": 666})

    def swap(data):
        path.write_bytes(other)
        return sha256(data)

    monkeypatch.setattr(checkpoints, "sha256", swap)
    assert two.load()[1] == {"step": 20}


def test_no_length_of_the_table_is_taken_for_a_pickle(tmp_path):
    "The first bytes are the length of the table of contents, a multiple of 8, and may be any."
    for n in range(0, 264, 8):
        (tmp_path / "x").write_bytes(data := pack({"x": torch.zeros(2)}, {"name": "a" * n}))
        assert checkpoints.read_trusted(tmp_path / "x", [sha256(data)])[1] == {"name": "a" * n}


def test_what_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / f"x.1.{'0' * DIGITS}.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="x.1.0.* cannot be read") as e:
        CheckpointFile(tmp_path / "x.safetensors").load()
    assert isinstance(e.value.__cause__, OSError)  # sweeps do not set it aside


def test_a_bad_file_does_not_push_out_a_good_one(two):
    newest(two).write_bytes(b"junk")
    two.save(TENSORS, {"step": 30})
    newest(two).write_bytes(b"junk again")
    with pytest.warns(UserWarning):
        assert two.load()[1] == {"step": 10}


def test_names_with_a_meaning_elsewhere(tmp_path):
    "Brackets and stars in a name are letters, and runs whose names begin alike do not meet; the tenth comes after the ninth."
    places = [CheckpointFile(tmp_path / f"{name}.safetensors") for name in ("a[1]*", "a", "a.b")]
    for number in range(10):
        for place in places:
            place.save(TENSORS, {"name": place.path.stem, "number": number})
    for place in places:
        assert place.load()[1] == {"name": place.path.stem, "number": 9}
        assert len(place.files()) == 2


def test_a_really_full_disk(small_disk):
    place = CheckpointFile(small_disk("1m") / "run.safetensors")
    place.save({"x": torch.zeros(50_000)}, {"step": 1})
    with pytest.raises(OSError, match="no space left.*run.2.") as e:
        place.save({"x": torch.zeros(500_000)}, {"step": 2})
    assert e.value.errno == errno.ENOSPC and place.load()[1] == {"step": 1}
    assert not place.left_overs()


MODELS = [  # one of each kind: test_survival.py
    WAVE,
    ModelConfig("irnn", 2, 3, n=7, U_init="sigma", activation="tanh"),
    ModelConfig("wrnn", 10, 10, n=7, every_step=True, kernel_size=5, freeze=("recurrent", "encoder")),
]


@pytest.mark.parametrize("config", MODELS)
def test_weights_come_back(tmp_path, config):
    model, x = build_model(config, 5), torch.randn(4, 3, config.input_size)
    save_weights(tmp_path, build_model(config, 6).state_dict(), config)
    save_weights(tmp_path, model.state_dict(), config, about={"task": "x", "accuracy": 0.5})  # over the old ones
    assert sorted(files(tmp_path)) == ["config.json", "model.safetensors", "model.safetensors.sha256"]
    back = load_weights(tmp_path)
    assert back.config == config and back.about == {"task": "x", "accuracy": 0.5} and torch.equal(back(x), model(x))
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]
    save_weights(tmp_path, model.double().state_dict(), config)
    assert {p.dtype for p in load_weights(tmp_path).parameters()} == {torch.float64}


SPOILED_CONFIGS = {  # nothing else comes of any file: test_fuzz.py
    r"size mismatch for layer.cells.0.V: .*\[24, 1\].*\[26, 1\]": {"model": {"n": 13}},
    "size mismatch": {"model": {"n": 10**12}},
    "unknown key 'neurons'": {"model": {"neurons": 3}},
    "format 2 is not known": {"format": 2},
}


@pytest.mark.parametrize("said, spoil", SPOILED_CONFIGS.items())
def test_configs_that_do_not_belong(tmp_path, said, spoil):
    save_weights(tmp_path, build_model(WAVE, 0).state_dict(), WAVE)
    content = merge(json.loads((tmp_path / "config.json").read_text()), spoil)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        load_weights(tmp_path)


def test_weights_that_do_not_belong(tmp_path):
    weights = build_model(WAVE, 0).state_dict()
    for wrong in ({k: t for k, t in weights.items() if k != "readout.bias"}, {**weights, "more": torch.zeros(2)}):
        with pytest.raises(CheckpointError, match="readout.bias|more"):
            save_weights(tmp_path / "x", wrong, WAVE)
    with pytest.raises(CheckpointError, match="expected floating-point"):
        save_weights(tmp_path / "x", {**weights, "readout.bias": torch.zeros(1, dtype=torch.int64)}, WAVE)
    assert not (tmp_path / "x").exists()
    save_weights(tmp_path / "x", weights, WAVE)
    data = (tmp_path / "x" / "model.safetensors").read_bytes()
    (tmp_path / "x" / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="model.safetensors has changed"):
        load_weights(tmp_path / "x")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        load_weights(tmp_path / "nowhere")


def broken(path, saves: int, *call, every: int = 1, **options) -> CheckpointFile:
    "The checkpoint of a `fit` that broke after so many saves. Processes that are killed: test_resume_kill.py."
    place, left = CheckpointFile(path), iter(range(saves - 1))

    def save(tensors, meta):
        place.save(tensors, meta)
        next(left)  # raises StopIteration after the last

    with pytest.raises(StopIteration):
        fit(*call, checkpoint=SimpleNamespace(save=save, load=place.load), checkpoint_every=every, **options)
    return place


PARTLY = replace(WAVE, freeze=("recurrent",))  # what does not move is part of a checkpoint too


@pytest.mark.parametrize("every, saves", [(1, 1), (1, 13), (2, 6), (7, 3), (1, 43)])
def test_resumed_equals_uninterrupted(tmp_path, every, saves):
    "Broken at a log, an evaluation, the end of an epoch, in between, before and after the end."
    call = TinyTask(), PARTLY if every == 7 else WAVE, RUNS
    place = broken(tmp_path / "x.safetensors", saves, *call, every=every, **RHYTHM)
    assert place.load()[1]["history"]["step"] == every * saves
    assert ("fixed.layer.cells.0.u" in place.load()[0]) == (every == 7)
    again, whole = fit(*call, checkpoint=place, checkpoint_every=every, **RHYTHM), fit(*call, **RHYTHM)
    assert list(map(tiny_task.summary, again)) == list(map(tiny_task.summary, whole))


def test_all_dead_before_the_next_log(tmp_path):
    "The row of the broken interval is written after the resume too."
    call, rhythm = (TinyTask(poison=(1, 7)), WAVE, [RunSettings(1, 1e-3)]), {**RHYTHM, "log_every": 20}
    place = broken(tmp_path / "x.safetensors", 9, *call, **rhythm)
    again, whole = fit(*call, checkpoint=place, **rhythm), fit(*call, **rhythm)
    assert whole[0].curve == again[0].curve and whole[0].curve[-1]["step"] == 7
    assert whole[0].steps == again[0].steps == 20


@pytest.fixture
def half(tmp_path):
    "A half-finished run, at step 10."
    return broken(tmp_path / "x.safetensors", 2, every=5, **CALL)


CALL = dict(task=TinyTask(), model=WAVE, runs=RUNS, about={"recipe": 1}, **RHYTHM)
CHANGES = {  # settings of a run: notebook 14_checkpoints
    "model.c: 2 then, 3 now": dict(model=ModelConfig("wrnn", 1, 1, n=12, c=3)),
    "task.batch_size: 8 then, 4 now": dict(task=TinyTask(batch_size=4)),
    "steps: 43 then, 50 now": dict(steps=50),
    "about.recipe: 1 then, 2 now": dict(about={"recipe": 2}),
    "dtype: 'torch.float32' then, 'torch.float64' now": dict(dtype=torch.float64),
    "halving.0.0: absent then, 10 now": dict(halving=[(10, 1)]),
}


@pytest.mark.parametrize("said, change", CHANGES.items(), ids=CHANGES)
def test_a_changed_configuration_is_refused(half, said, change):
    before = files(half.path.parent)
    with pytest.raises(ResumeRefused, match=said):
        fit(**{**CALL, **change}, checkpoint=half)
    assert files(half.path.parent) == before


def test_changed_code_is_refused(half, monkeypatch):
    "Another machine is only told."
    there = {**training.environment(), "torch": "3.0"}
    monkeypatch.setattr(training, "environment", lambda: there)
    with pytest.warns(UserWarning, match="another machine.*torch: .* then, '3.0' now"):
        fit(**CALL, checkpoint=half)
    monkeypatch.setattr(training, "code_hash", lambda: "0123456789abcdef")
    with pytest.raises(ResumeRefused, match="code: .* then, '0123456789abcdef' now"):
        fit(**CALL, checkpoint=half)


def test_a_valid_file_of_something_else(half):
    "What else its history may hold: test_fuzz.py."
    tensors, meta = half.load()
    narrow, double = {"theta": tensors["theta"][:, :-1]}, {"m": tensors["m"].double()}
    lacking = {k: t for k, t in tensors.items() if k != "v"}
    for forged in ({**tensors, **narrow}, {**tensors, **double}, {**tensors, "extra": torch.zeros(1)}, lacking):
        half.save(forged, meta)
        with pytest.raises(CheckpointError):
            fit(**CALL, checkpoint=half)


def test_signals_leave_a_note_and_the_old_ears_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with listen_for() as heard:
        assert not heard()
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_a_handler_that_was_set_from_c_is_left_alone(monkeypatch):
    "Python cannot put it back: `signal.getsignal` returns None for it."
    real, touched = signal.getsignal, []
    monkeypatch.setattr(signal, "getsignal", lambda s: None if s == signal.SIGTERM else real(s))
    monkeypatch.setattr(signal, "signal", lambda s, handler: touched.append(s) or real(s))
    with listen_for() as heard:
        assert not heard()
    assert touched == [signal.SIGINT, signal.SIGINT]


def test_other_threads_hear_no_signals():
    def asked():
        with listen_for() as heard:
            return heard()

    with ThreadPoolExecutor() as pool:
        assert pool.submit(asked).result() is False


SEARCH = [RunSettings(k, lr) for k, lr in enumerate([1e-2, 1e12, 1e-3, 3e-2, 1e-4])]
HALVED = dict(RHYTHM, halving=[(10, 3), (22, 1)])


@pytest.fixture(scope="module")
def searched():
    return fit(TinyTask(), WAVE, SEARCH, **HALVED)


def test_halving_keeps_the_best_by_validation(searched):
    "And those that go on make the steps that they would have made anyway."
    plain = fit(TinyTask(), WAVE, SEARCH, **RHYTHM)
    (number,) = (k for k, r in enumerate(searched) if r.status == "done")
    winner = searched[number]
    for step, count in ((10, 1), (22, 2)):  # the fifth diverges
        out = [r for r in searched if r.pruned and r.pruned["step"] == step]
        assert len(out) == count and all(r.stopped_step == step == r.curve[-1]["step"] for r in out)
        seen = [row["valid_mse"] for row in winner.curve if "valid_mse" in row and row["step"] <= step]
        assert all(min(seen) <= r.valid_best["mse"] and r.test_best is not None for r in out)
    assert winner.curve[-1]["step"] == plain[number].curve[-1]["step"]
    assert winner.curve[-1]["loss"] == pytest.approx(plain[number].curve[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("saves", [9, 10, 11, 22, 43])
def test_halving_resumed_equals_uninterrupted(tmp_path, searched, saves):
    "Broken before, at and after each rung."
    place = broken(tmp_path / "x.safetensors", saves, TinyTask(), WAVE, SEARCH, **HALVED)
    again = fit(TinyTask(), WAVE, SEARCH, checkpoint=place, checkpoint_every=9, **HALVED)
    for a, b in zip(again, searched, strict=True):
        assert tiny_task.summary(a) == tiny_task.summary(b)
        assert (a.pruned, a.stopped_step) == (b.pruned, b.stopped_step)

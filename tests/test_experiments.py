"Experiments, keys and records, where notebooks 15 and 16 would get dull."

import json
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

import wave_rnns.paper.experiments as ex
import wave_rnns.paper.records as rc
from wave_rnns.core import ConfigError, RecordError
from wave_rnns.paper.config import ModelConfig
from wave_rnns.paper.experiments import EXPERIMENTS, Experiment, Run, from_config, run_key, to_config, todo
from wave_rnns.paper.models import build_model, count_parameters
from wave_rnns.paper.grids import GRIDS, find_grid
from wave_rnns.paper.outcomes import paper_numbers
from wave_rnns.paper.sweeps import train
from wave_rnns.paper.tasks import make_task

SIZES = {"T": 1, "batch_size": 8, "valid_size": 50, "test_size": 50}
MODEL = ModelConfig("wrnn", input_size=10, output_size=10, n=8, c=2, every_step=True)
TINY = Experiment("tiny", "copy", SIZES, MODEL, lr=1e-2, clip=1.0, steps=20, eval_every=5, log_every=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train([Run(TINY, 0)], folder, "cpu", progress=False)
    return folder


@pytest.fixture
def one_record(trained, tmp_path):
    "The record of a run, in a results folder of the test's own."
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return Run(TINY, 0).path(tmp_path)


def rewrite(path, record):
    "Write a record with a right hash."
    path.write_text(json.dumps({**record, "sha256": rc.content_hash(record)}))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_declared_experiment_fits_its_task(name):
    e = EXPERIMENTS[name]
    task = make_task(e.task, **e.task_options)
    features = task.length * task.input_size if e.model.kind == "mlp" else task.input_size
    shape = e.model.input_size, e.model.output_size, e.model.every_step
    assert shape == (features, task.output_size, task.every_step)
    rhythm = ex.rhythm_of(e, task)
    assert rhythm["eval_every"] % rhythm["log_every"] == 0 and rhythm["steps"] >= rhythm["eval_every"]
    assert e.source and e.name == name and from_config(to_config(e)) == e


def test_ablations_differ_in_what_their_row_says():
    rows = {"wrnn": {}, "wrnn_no_V": {"V_init": "normal"}, "wrnn_no_u": {"u_init": "random"}}
    rows |= {"wrnn_no_both": {"u_init": "random", "V_init": "normal"}, "wrnn_identity": {"u_init": "identity"}}
    rows |= {"irnn_identity": {}, "irnn_random": {"U_init": "random"}, "irnn_sigma": {"U_init": "sigma"}}
    rows |= {"irnn_sigma_V": {"U_init": "sigma", "V_init": "sparse"}}
    for row, start in rows.items():
        base = EXPERIMENTS["copy10_wrnn" if row.startswith("wrnn") else "copy10_irnn_identity"].model
        assert EXPERIMENTS[f"copy10_{row}"].model == replace(base, **start)


def test_parameter_counts_are_the_papers():
    printed = [p for p in paper_numbers() if p["measure"] == "parameters" and p["experiment"] and p["value"] != 47_000]
    assert len(printed) >= 10
    for p in printed:
        model = build_model(EXPERIMENTS[p["experiment"]].model, 0)
        counts = [count_parameters(model, biases) for biases in (True, False)]
        exact = p["table"] == "Figure 7" or p["value"] == 10_287
        digits = 1 if exact else 100 if p["value"] == 10_300 else 1000
        assert p["value"] in [round(c / digits) * digits for c in counts], p


def test_every_committed_record_still_counts():
    "It is read, its key is that of its settings, it belongs to a declared experiment or grid, and `wrnn_todo` agrees."
    records = sorted(rc.shipped_results().glob("runs/*/*.json"))
    assert len(records) >= 90
    declared = {Run(e, seed).key: Run(e, seed) for e in EXPERIMENTS.values() for seed in e.seeds}
    swept = {run.key: run for name in GRIDS for run in find_grid(name).runs()}
    _, done = todo(rc.shipped_results())
    counted = {run.key for run in done}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in records:
            record = rc.read_record(path)
            rows, torn = rc.read_curve(path.with_suffix(".csv"))
            assert torn == 0 and len(rows) <= record["curve"]["rows"] <= len(rows) + 1
            assert run_key(from_config(record["config"]), record["seed"], record["recipe"]) == path.stem
            run = declared.get(path.stem) or swept.get(path.stem)
            run = run or Run(EXPERIMENTS[record["experiment"]], record["seed"])  # a seed more than declared
            assert run.key == path.stem, f"{record['experiment']} seed {record['seed']} is declared nowhere"
            assert ex.record_of(rc.shipped_results(), run) == record
            assert (path.stem in counted) == (path.stem in declared)


WRONG = {  # `task` and `name`: test_security.py
    "lr must be positive": {"lr": float("nan")},
    "eval_every must be given": {"eval_every": 0},
    "steps must be 0 or more": {"steps": -1},
    "log_every must be 0 or more, below 2^63": {"log_every": 10**400},
    "drop_factor": {"drop_factor": 0.1},
    "clip": {"clip": -1},
    "lr must be positive, at most": {"lr": 10**400},
    "n must be at least 1, below 2^63": {"model": {**to_config(TINY)["model"], "n": 2**63}},
    "seeds": {"seeds": [-1]},
    "seeds must be list": {"seeds": 3},
    "halving must be pairs": {"halving": [[5, 1], [10, 2]]},
    "task_options must be what JSON can hold": {"task_options": {"T": float("nan")}},
    "model: expected an object": {"model": None},
}


def test_seeds_may_come_from_an_iterator():
    assert replace(EXPERIMENTS["copy0_wrnn"], seeds=iter([0, 1])).seeds == (0, 1)


@pytest.mark.parametrize("message", WRONG)
def test_wrong_configurations_name_the_key(message):
    "More of them: notebook 16; each kind of value: notebook 10."
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_config({**to_config(TINY), **WRONG[message]})


def test_a_record_says_everything(one_record):
    r = rc.read_record(one_record)
    assert from_config(r["config"]) == TINY and r["key"] == run_key(TINY, 0) == one_record.stem
    assert (r["seed"], r["recipe"], r["status"], r["steps"]) == (0, ex.RECIPE, "done", 20)
    assert r["test_best"].keys() == r["test_final"].keys() == r["valid_best"].keys() == r["valid_final"].keys()
    rows, _ = rc.read_curve(one_record.with_suffix(".csv"))
    valid = {row["step"]: row["valid_cross_entropy"] for row in rows if row["valid_cross_entropy"]}
    assert list(valid) == [5, 10, 15, 20] and r["best_step"] == min(valid, key=valid.get)
    assert valid[r["best_step"]] == pytest.approx(r["valid_best"]["cross_entropy"], rel=1e-5)
    model = build_model(MODEL, 0)
    assert r["parameters"] == {"with_biases": count_parameters(model), "without_biases": count_parameters(model, False)}
    assert "lowest validation cross_entropy" in r["selection"] and r["seconds"] > 0 and r["steps_per_second"] > 0
    assert r["environment"]["torch"] and r["device"] == "cpu" and r["code"] and r["finished"].endswith("Z")


def test_every_flipped_byte_is_noticed(one_record):
    data = one_record.read_bytes()
    for i in range(0, len(data), 3):
        one_record.write_bytes(data[:i] + bytes([data[i] ^ 0x15]) + data[i + 1 :])
        with pytest.raises(RecordError, match=one_record.name):
            rc.read_record(one_record)


@pytest.mark.parametrize("cut", [0, 500, -2])
def test_truncated_records_are_set_aside_and_made_again(one_record, cut):
    before = rc.read_record(one_record)
    one_record.write_bytes(one_record.read_bytes()[:cut])
    results = one_record.parents[2]
    with pytest.warns(UserWarning, match="counts as not done"):
        assert rc.read_records(results) == []
    assert ex.record_of(results, Run(TINY, 0)) is None
    again = train([Run(TINY, 0)], results, "cpu", progress=False)[0]
    assert again["test_best"] == before["test_best"]
    assert one_record.with_name(one_record.name + ".broken1").exists()


def test_setting_aside_never_overwrites(tmp_path):
    for number in "123":
        (tmp_path / "a.json").write_text(number)
        assert rc.set_aside(tmp_path / "a.json").name == f"a.json.broken{number}"
    assert [(tmp_path / f"a.json.broken{number}").read_text() for number in "123"] == ["1", "2", "3"]


def test_a_default_that_changed_under_a_record_is_named(one_record):
    record = rc.read_record(one_record)
    record["config"]["model"]["activation"] = "tanh"  # as if tanh had been the default then
    rewrite(one_record, record)
    with pytest.raises(ConfigError, match="tanh.*raise RECIPE"):
        ex.record_of(one_record.parents[2], Run(TINY, 0))


def test_options_that_come_and_go_keep_old_records(one_record):
    "Absent then: at its default. Absent now: it was at its default, or the key would be another."
    record = rc.read_record(one_record)
    del record["config"]["model"]["precision"], record["config"]["log_every"], record["config"]["halving"]
    record["config"]["model"]["removed_since"], record["config"]["also_removed"] = "its default", 3
    rewrite(one_record, record)
    assert ex.record_of(one_record.parents[2], Run(TINY, 0)) == rc.read_record(one_record)


def test_a_damaged_record_that_cannot_be_moved_is_one_warning(one_record, monkeypatch):
    "A folder that may only be read: the other records are there all the same."
    results = one_record.parents[2]
    train([Run(TINY, 1)], results, "cpu", progress=False)
    one_record.write_text("{")
    monkeypatch.setattr(Path, "rename", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.warns(UserWarning, match="could not be renamed") as said:
        assert [r["seed"] for r in rc.read_records(results)] == [1]
    assert len(said) == 1 and one_record.read_text() == "{"
    with pytest.warns(UserWarning, match="could not be renamed"):
        assert ex.record_of(results, Run(TINY, 0)) is None


def test_left_overs_of_a_killed_writer_go_with_the_next(one_record):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, others = (one_record.with_name(f".{one_record.name}.{pid}-abcd.tmp") for pid in (dead.pid, os.getpid()))
    for path in (left, others):
        path.write_text("half a record")
    rc.write_record(one_record.parents[2], rc.read_record(one_record), rc.read_curve(one_record.with_suffix(".csv"))[0])
    assert not left.exists() and others.exists()  # a writer that lives is left alone


def test_an_edited_curve_is_noticed(one_record):
    "A torn one is read to its last whole line, as ever: notebook 15."
    curve, record = one_record.with_suffix(".csv"), rc.read_record(one_record)
    curve.write_text(curve.read_text().replace("\n10,", "\n11,"))
    with pytest.raises(RecordError, match="not the curve that its record was written with"):
        rc.read_curve(curve)
    del record["curve"]["sha256"]
    rewrite(one_record, record)
    assert len(rc.read_curve(curve)[0]) == record["curve"]["rows"]


@pytest.mark.filterwarnings("ignore:.*c.csv")
def test_a_curve_cut_anywhere_gives_its_whole_lines(tmp_path):
    rows = [{"step": s, "epoch": None, "loss": 1 / s, "valid_accuracy": 0.5 if s % 2 else None} for s in range(1, 8)]
    rows += [{"step": 8, "loss": float("nan")}, {"step": 9, "loss": float("inf")}]  # not finite: an empty place
    path, data = tmp_path / "c.csv", rc.curve_text(rows).encode()
    path.write_bytes(data)
    whole, dropped = rc.read_curve(path)
    assert dropped == 0 and [r["step"] for r in whole] == list(range(1, 10)) and whole[1]["valid_accuracy"] is None
    assert whole[7]["loss"] is None and whole[8]["loss"] is None
    header = data.index(b"\n") + 1
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        lines = data[header:cut].split(b"\n")
        if cut >= header:
            assert rc.read_curve(path) == (whole[: len(lines) - 1], len(lines[-1]))
        else:
            with pytest.raises(RecordError):
                rc.read_curve(path)

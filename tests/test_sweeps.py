"Grids, boards, workers, crews, what a sweep shows, and its command: where notebook 17 would get dull."

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chaos import Audit, lives, spare_time, stat_of, until

import wave_rnns.paper.experiments as ex
import wave_rnns.paper.sweeps as sw
from wave_rnns.paper.checkpoints import load_checkpoint
from wave_rnns.core import ConfigError, WaveRNNError
from wave_rnns.paper.experiments import EXPERIMENTS, Run, to_config
from wave_rnns.paper.models import ModelConfig
from wave_rnns.paper.sweeps import (
    Board,
    Grid,
    Overview,
    View,
    find_grid,
    grid_config,
    grid_from,
    populations,
    sweep,
    work,
)
from wave_rnns.paper.training import Interrupted

HERE = Path(__file__).resolve().parent
ENV = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
SIZES = {
    "model.n": [4], "model.c": [1], "steps": [8], "eval_every": [4], "log_every": [2],
    "task_options.batch_size": [2], "task_options.valid_size": [8], "task_options.test_size": [8],
}  # fmt: skip
TINY = {
    "name": "tiny",
    "experiments": ["copy0_wrnn"],
    "axes": {**SIZES, "lr": [1e-2, 1e-3]},
    "seeds": [0, 1, 2],
    "together": 2,
}


def tiny(**changes) -> dict:
    return {
        **TINY,
        **{k: v for k, v in changes.items() if k != "axes"},
        "axes": {**TINY["axes"], **changes.get("axes", {})},
    }


GRID = grid_from(TINY)
RUNS = GRID.runs()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    spare_time(monkeypatch.setattr)


def records(results, runs=RUNS) -> list[dict]:
    "What the records of runs say, without clocks."
    clocks = ("seconds", "steps_per_second", "finished", "environment", "sha256")
    found = [ex.record_of(results, run) for run in runs]
    return [r and {k: v for k, v in r.items() if k not in clocks} for r in found]


def break_task(monkeypatch, what, when=lambda runs: True):
    "Training fails with this exception, where `when(runs)`."
    fit = ex.fit_group

    def fit_group(runs, *args, **kwargs):
        if when(runs):
            raise what
        return fit(runs, *args, **kwargs)

    monkeypatch.setattr(ex, "fit_group", fit_group)


# Grids ----------------------------------------------------------------------------------------------------------------

PAPER = {  # experiments x axes of the search, from the authors' sweep files
    "copy_wrnn": 4 * 3 * 3,
    "copy_irnn": 4 * 3 * 3 * 2 * 2 * 2,
    "adding_wrnn": 5 * 3 * 5,
    "adding_irnn": 5 * 3 * 5,
    "smnist_wrnn": 3 * 5 * 2 * 2,
    "smnist_irnn": 3 * 5 * 2 * 2,
    "psmnist_wrnn": 3 * 5 * 2 * 2,
    "psmnist_irnn": 3 * 5 * 2 * 2,
    "nscifar10_wrnn": 3 * 2,
    "nscifar10_irnn": 3 * 4,
}


def test_the_declared_grids_are_the_papers():
    assert {name: len(find_grid(name).runs()) for name in sw.GRIDS} == PAPER
    values = {
        (re.sub("_.*", "", name), setting): tuple(sorted(v))
        for name in sw.GRIDS
        for setting, v in sw.GRIDS[name]["axes"].items()
        if not setting.startswith("model")
    }
    for task in ("copy", "adding"):
        assert values[task, "lr"] == (1e-4, 1e-3, 1e-2)
    for task in ("smnist", "psmnist", "nscifar10"):
        assert values[task, "lr"] == (1e-5, 1e-4, 1e-3)
    assert values["copy", "clip"] == (0, 1, 10)
    for task in ("adding", "smnist", "psmnist"):
        assert values[task, "clip"] == (0, 1, 10, 100, 1000)
    for task in ("smnist", "psmnist"):
        assert (values[task, "drop_factor"], values[task, "drop_every"]) == ((10 / 3, 10), (40, 100))
    epochs = {name: {p.epochs for *_, p in find_grid(name).points()} for name in sw.GRIDS if "mnist" in name}
    assert epochs == {n: {250 if n.endswith("irnn") else 120} for n in epochs}
    sizes = {name: {p.model.n for *_, p in find_grid(name).points()} for name in sw.GRIDS}
    assert sizes["copy_irnn"] == {100, 625}
    assert sizes["nscifar10_wrnn"] == {144, 256} and sizes["nscifar10_irnn"] == {144, 256, 529, 1024}


@pytest.mark.parametrize("name", PAPER)
def test_a_grid_is_its_plain_data(name):
    grid = find_grid(name)
    again = grid_from(json.loads(json.dumps(grid_config(grid))))
    assert [r.key for r in again.runs()] == [r.key for r in grid.runs()]
    assert (again.name, again.seeds, again.together, again.axes) == (grid.name, grid.seeds, grid.together, grid.axes)
    names = [point.name for *_, point in grid.points()]
    assert len({*names}) == len(names), "two points of one name cannot be told apart"


def test_a_point_that_is_declared_keeps_its_name_and_its_run():
    base = EXPERIMENTS["smnist_wrnn"]
    points = [p for *_, p in find_grid("smnist_wrnn").points()]
    (same,) = [p for p in points if p.name == base.name]
    assert same == base and Run(same, 0).key == Run(base, 0).key
    assert (same.lr, same.clip, same.drop_factor, same.drop_every) == (1e-4, 1, 10, 100)
    others = [p for p in points if p.name != base.name]
    assert all(p.name.startswith("smnist_wrnn_lr") for p in others) and len(others) == 59


OTHER = {  # a value for each setting, unlike what adding100_wrnn has
    "task": "copy", "task_options": {"T": 7}, "model": {"n": 7}, "lr": 0.5, "clip": 3.0, "drop_factor": 2.0, "drop_every": 9,
    "steps": 77, "eval_every": 11, "log_every": 11, "kind": "irnn", "input_size": 3, "output_size": 3, "n": 9, "c": 9,
    "kernel_size": 5, "activation": "tanh", "u_init": "identity", "V_init": "normal", "U_init": "sigma", "readout": "mlp",
    "every_step": True, "bias": False, "freeze": ["encoder"], "precision": "fast",
}  # fmt: skip


def settings_of_an_experiment():
    own = [f.name for f in fields(ex.Experiment) if f.name not in (*ex.WORDS, "epochs")]
    return [*own, *(f"model.{f.name}" for f in fields(ModelConfig)), "task_options.T", "task_options.new_option"]


@pytest.mark.parametrize("setting", settings_of_an_experiment())
def test_every_setting_can_be_an_axis(setting):
    base, value = EXPERIMENTS["adding100_wrnn"], OTHER.get(setting.removeprefix("model."), 7)
    grid = Grid("g", (base,), {setting: [value]})
    ((*_, point),) = grid.points()
    before, after = to_config(base), to_config(point)
    head, _, tail = setting.partition(".")
    assert after[head] != before[head]
    assert after[head] == (
        {**before[head], **value} if isinstance(value, dict) else {**before[head], tail: value} if tail else value
    )
    for k in before:  # and nothing else changes
        if k not in (head, "name"):
            assert after[k] == before[k], k
    assert grid.runs()[0].key != Run(base, 0).key and from_config_again(grid) == grid.runs()


def from_config_again(grid):
    return grid_from(json.loads(json.dumps(grid_config(grid)))).runs()


def test_epochs_can_be_an_axis():
    grid = Grid("g", (EXPERIMENTS["smnist_wrnn"],), {"epochs": [3, 120]})
    assert [p.epochs for *_, p in grid.points()] == [3, 120]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"experiments": "copy80_wrnn"}, "experiments must be"),
        ({"experiments": []}, "experiments must name at least one"),
        ({"experiments": [3]}, "experiments must be a list"),
        ({"experiments": ["copy8_wrnn"]}, "did you mean copy80_wrnn"),
        ({"experiments": ["none*"]}, "no experiment is called"),
        ({"experiments": [{"name": "x"}]}, "missing"),
        ({"axs": {}}, "unknown key 'axs'; did you mean 'axes'"),
        ({"zzz": 1}, "unknown key 'zzz'; known are name"),
        ({"name": "a b"}, "name must be letters"),
        ({"name": "../x"}, "name must be letters"),
        ({"name": ""}, "name must be letters"),
        ({"name": 3}, "name must be str"),
        ({"axes": []}, "axes must be dict"),
        ({"axes": {"lr": 1e-3}}, "axes are lists of values"),
        ({"axes": {"lr": []}}, "axes are lists of values"),
        ({"axes": {"lr": "ab"}}, "axes are lists of values"),
        ({"axes": {"lrr": [1]}}, "unknown key 'lrr'; did you mean 'lr'"),
        ({"axes": {"model.m": [1]}}, "unknown key 'm'"),
        ({"axes": {"lr.x": [1]}}, "has no setting 'lr.x'"),
        ({"axes": {"lr": [-1e-2]}}, "lr must be positive"),
        ({"axes": {"lr": ["fast"]}}, "lr must be float"),
        ({"axes": {"model.n": [1.5]}}, "n must be int"),
        ({"axes": {"seeds": [[0], [1]]}}, "seeds"),
        ({"axes": {"name": ["a", "b"]}}, "name"),
        ({"seeds": []}, "seeds must hold at least one"),
        ({"seeds": 3}, "seeds must be tuple"),
        ({"seeds": ["x"]}, "seeds must be whole numbers"),
        ({"seeds": [-1]}, "seeds must be whole numbers"),
        ({"seeds": [1.5]}, "seeds must be whole numbers"),
        ({"seeds": [True]}, "seeds must be whole numbers"),
        ({"together": 0}, "together must be at least 1"),
        ({"together": "all"}, "together must be int"),
        ({"together": True}, "together must be int"),
    ],
)
def test_a_wrong_grid_is_named(change, says):
    with pytest.raises(ConfigError) as e:
        grid_from({"name": "g", "experiments": ["copy80_wrnn"], **change})
    assert says in str(e.value)


@pytest.mark.parametrize("what", [None, 3, "copy80_wrnn", ["copy80_wrnn"], {}])
def test_what_is_no_grid_at_all(what):
    with pytest.raises(ConfigError):
        grid_from(what)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
AXES = ["lr", "clip", "model", "model.n", "model.kind", "task", "task_options", "task_options.T", "steps", "epochs", ""]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TINY)), json_values, st.sampled_from(AXES), st.lists(json_values, min_size=1, max_size=3))
def test_any_value_anywhere_is_a_grid_or_refused(key, value, axis, values):
    for change in ({key: value}, {"axes": {axis: values}}):
        try:
            text = json.dumps(
                grid_config(grid_from({"name": "g", "experiments": ["copy80_wrnn"], **change})), allow_nan=False
            )
        except ConfigError:
            continue
        except ValueError as e:  # a number that JSON does not have: no file can hold it
            assert "JSON compliant" in str(e)
            continue
        grid = grid_from(json.loads(text))
        assert len({r.key for r in grid.runs()}) == len(grid.runs()) >= 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{", "null", "[" * 100_000, '{"experiments": ' + "[" * 100_000, '{"name": "g", "experiments": 3}', "\x00",
     '{"experiments": ["copy80_wrnn"], "axes": {"lr": [NaN]}}', '{"experiments": ["copy80_wrnn"]' + " " * (1 << 20) + "}"],
    ids=["empty", "list", "number", "cut", "null", "deep", "deep inside", "wrong", "zero", "not a number", "huge"],
)  # fmt: skip
def test_a_wrong_file(tmp_path, text):
    path = tmp_path / "g.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        find_grid(str(path))
    assert len(str(e.value)) < 1000


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="nowhere.json"):
        find_grid(str(tmp_path / "nowhere.json"))


def test_experiments_by_pattern_by_file_and_inline(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "mine.json").write_text(json.dumps({"base": "copy80_wrnn", "lr": 0.5}))
    whole = to_config(replace(EXPERIMENTS["copy80_wrnn"], name="whole", lr=0.25))
    config = {"experiments": ["copy1*_wrnn", "mine.json", whole], "axes": {"clip": [2, 3]}}
    (folder / "both.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)  # files are found beside the grid, wherever we are
    grid = find_grid("elsewhere/both.json")
    assert grid.name == "both" and [e.name for e in grid.experiments] == ["copy10_wrnn", "mine", "whole"]
    assert [e.lr for e in grid.experiments] == [1e-3, 0.5, 0.25] and len(grid.runs()) == 6
    (folder / "both.json").write_text(json.dumps({**config, "experiments": ["gone.json"]}))
    with pytest.raises(OSError, match="gone.json"):
        find_grid("elsewhere/both.json")


def test_a_pattern_or_an_experiment_is_a_grid_of_its_declared_runs(tmp_path):
    assert [r.key for r in find_grid("copy80_*").runs()] == [
        Run(EXPERIMENTS[n], s).key for n in EXPERIMENTS if n.startswith("copy80_") for s in (0, 1)
    ]
    assert find_grid("smnist_cpu").seeds == (0,) and find_grid("copy?0_wrnn").name
    (tmp_path / "e.json").write_text(json.dumps({"base": "copy80_wrnn", "lr": 0.5, "seeds": [5]}))
    assert [(r.experiment.lr, r.seed) for r in find_grid(str(tmp_path / "e.json")).runs()] == [(0.5, 5)]
    with pytest.raises(ConfigError, match="grids are copy_wrnn"):
        find_grid("no_such_thing")


def test_a_run_is_there_once():
    base = EXPERIMENTS["copy80_wrnn"]
    for grid in (
        Grid("g", (base,), {"lr": [1e-2, 0.01, 1e-3]}, seeds=(0, 1, 0)),
        Grid("g", (base, replace(base, name="other")), {"lr": [1e-2, 1e-3]}, seeds=(0, 1)),
        Grid("g", (base,), {"clip": [1, 1.0], "lr": [1e-2, 1e-3]}, seeds=(0, 1)),
    ):
        runs = grid.runs()
        assert len(runs) == len({r.key for r in runs}) == 4


def test_names_say_what_is_varied():
    assert sw.point_name(["smnist_wrnn"], {"lr": 0.001, "clip": 1}) == "smnist_wrnn_lr0_001_clip1"
    names = [p.name for *_, p in find_grid("copy_irnn").points()]
    assert "copy80_irnn_lr0_01_clip0_n625_U_init_random_activation_tanh" in names
    assert all(re.fullmatch(r"\w{1,64}", n) for n in names)
    assert sw.point_name(["x"], {"task_options.T": "../../etc/passwd\n"}) == "x_T_etc_passwd_"
    (point,) = {p.name for *_, p in GRID.points() if p.lr == 1e-3}
    assert point == "tiny_copy0_wrnn_lr0_001"  # what is the same everywhere is in the grid's name


# Board ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(tmp_path):
    "The tiny grid, done."
    assert work(GRID, tmp_path, "cpu") == len(RUNS)
    return tmp_path


def test_a_record_is_read_once(swept, monkeypatch):
    read, real = [], ex.read_record
    monkeypatch.setattr(ex, "read_record", lambda path: read.append(path.stem) or real(path))
    board = Board(RUNS, swept)
    for _ in range(3):
        assert len(board.look().records) == len(RUNS) and not board.left()
    assert sorted(read) == sorted(board.runs)
    assert {(r.status, r.metric, r.sign) for r in board.records.values()} == {("done", "cross_entropy", -1)}
    assert sum(map(sys.getsizeof, board.records.values())) < 150 * len(RUNS), "it may remember ten thousand"


def test_only_what_belongs_to_the_grid_is_read(swept, monkeypatch):
    folder = swept / "runs" / "copy"
    for name in ("0123456789abcdef.json", f".{RUNS[0].key}.json.1-a.tmp", f"{RUNS[0].key}.json.broken1", "x", ".json"):
        (folder / name).write_text("{")
    board = Board(RUNS[:2], swept).look()
    assert board.records.keys() == {r.key for r in RUNS[:2]} and (folder / "0123456789abcdef.json").exists()
    assert not Board(RUNS, swept / "nowhere").look().records and not (swept / "nowhere").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff" * 100, b"[" * 100_000])
def test_a_broken_record_is_set_aside_and_its_run_done_again(swept, damage):
    before, broken = records(swept), RUNS[1].path(swept)
    stamps = {r.key: r.path(swept).stat().st_mtime_ns for r in RUNS if r != RUNS[1]}
    broken.write_bytes(damage)
    with pytest.warns(UserWarning, match="counts as not done, its file is now"):
        assert work(GRID, swept, "cpu") == 1
    assert broken.with_name(f"{broken.name}.broken1").read_bytes() == damage
    again = records(swept)
    # It was trained alone this time: the same run, up to how sums of floats are ordered.
    assert [r["key"] for r in again] == [r["key"] for r in before] and again[1]["together"] == 1
    assert again[1]["valid_best"]["cross_entropy"] == pytest.approx(before[1]["valid_best"]["cross_entropy"], rel=1e-5)
    assert stamps == {r.key: r.path(swept).stat().st_mtime_ns for r in RUNS if r != RUNS[1]}


def change_settings_under(record: Path):
    content = ex.read_record(record)
    content["config"]["model"]["activation"] = "tanh"  # as if tanh had been the default then
    content["sha256"] = ex.content_hash(content)
    record.write_text(json.dumps(content))


def test_settings_that_changed_under_a_record_are_no_result(swept, monkeypatch):
    change_settings_under(RUNS[0].path(swept))
    with pytest.raises(ConfigError, match="raise RECIPE"):
        Board(RUNS, swept).look()
    with pytest.raises(ConfigError, match="raise RECIPE"):
        work(GRID, swept, "cpu")
    with pytest.raises(ConfigError, match="raise RECIPE"):
        sweep(GRID, swept, "cpu", 1, progress=False)


def test_populations_differ_in_nothing_but_what_a_run_may_choose():
    grid = grid_from(tiny(axes={"model.n": [4, 5], "clip": [0, 1]}, seeds=[0, 1, 2]))
    groups = populations(grid.runs(), 5)
    assert [len(g) for g in groups] == [5, 5, 2, 5, 5, 2]
    for group in groups:
        ex.check_population(group)
    assert [r for g in groups for r in g] == sorted(grid.runs(), key=lambda r: r.experiment.model.n)
    assert populations(grid.runs(), 5) == groups and populations([], 5) == []
    assert [len(g) for g in populations(grid.runs(), 1)] == [1] * 24


def test_what_somebody_began_comes_first(tmp_path, monkeypatch):
    last = populations(RUNS, 2)[-1]
    folder = ex.population_folder(tmp_path, last)
    folder.mkdir(parents=True)
    (folder / "runs.json").write_text(json.dumps([r.key for r in last]))
    assert Board(RUNS, tmp_path, 2).look().groups() == [last, *populations(RUNS, 2)[:-1]]
    begun, fit = [], ex.fit_group
    monkeypatch.setattr(ex, "fit_group", lambda runs, *a, **k: begun.append(runs) or fit(runs, *a, **k))
    work(GRID, tmp_path, "cpu")
    assert begun[0] == last and len(begun) == 3


# Work -----------------------------------------------------------------------------------------------------------------


def test_work_trains_everything_once(swept, monkeypatch):
    assert all(r["status"] == "done" for r in records(swept)) and not left_overs_of(swept)
    monkeypatch.setattr(ex, "fit_group", lambda *_, **__: pytest.fail("trained twice"))
    assert work(GRID, swept, "cpu") == 0


def left_overs_of(results, runs=RUNS):
    "Files beside records, curves and logs."
    wanted = {run.path(results, suffix) for run in runs for suffix in (".json", ".csv")}
    files = {p for p in Path(results).rglob("*") if p.is_file() and p.parent.name != "logs"}
    return sorted(str(p.relative_to(results)) for p in files - wanted)


def test_a_failure_is_written_down_and_waits_for_the_next_session(tmp_path, monkeypatch, capsys):
    bad, tries = populations(RUNS, 2)[1], []
    with monkeypatch.context() as broken:
        break_task(broken, RuntimeError("no luck\ntoday"), lambda runs: runs == bad and not tries.append(1))
        assert work(GRID, tmp_path, "cpu", session="first") == len(RUNS) - 2
        assert work(GRID, tmp_path, "cpu", session="first") == 0 and len(tries) == 1
        board = Board(RUNS, tmp_path, 2)
        assert sw.failure(tmp_path, bad, "first")["error"] == "no luck today"
        assert sw.failure(tmp_path, bad, "second") is None
        now = sw.overview(board, "first")
        assert now.failed == {r.key: "no luck today" for r in bad} and now.over == len(RUNS) - 2
        assert "4 done, 2 failed" in now.line()
        assert work(GRID, tmp_path, "cpu", session="second") == 0 and len(tries) == 2
    note = json.loads((ex.population_folder(tmp_path, bad) / "failed.json").read_text())
    assert (
        note["sessions"] == ["first", "second"]
        and "RuntimeError" in note["traceback"]
        and note["worker"] == sw.worker_name()
    )
    assert "2 x tiny_copy0_wrnn_lr0_01 ... failed: no luck today" in capsys.readouterr().out
    assert work(GRID, tmp_path, "cpu", session="third") == 2  # the cause is gone
    assert not left_overs_of(tmp_path) and not sw.overview(board, "third").failed


def test_two_sessions_do_not_try_a_failing_population_in_turn_for_ever(tmp_path, monkeypatch):
    tries = []
    break_task(monkeypatch, RuntimeError("no luck"), lambda runs: not tries.append(1))
    boards = [Board(RUNS[:2], tmp_path, 2) for _ in "ab"]
    for _ in range(4):
        for board, session in zip(boards, "ab", strict=True):
            sw.attempt(board, session, sw.Pulse(tmp_path), "cpu", 60)
    assert len(tries) == 2 and all(sw.failure(tmp_path, RUNS[:2], s) for s in "ab")


def test_what_failed_is_split_where_less_is_asked_for(tmp_path, monkeypatch):
    "After 'about 2 runs would fit', --together 2 must not meet the old population of four again."
    with monkeypatch.context() as broken:
        break_task(broken, RuntimeError("no memory"), lambda runs: True)
        assert work(GRID, tmp_path, "cpu", most=4) == 0
    sizes = [len(group) for group in Board(RUNS, tmp_path, 1).groups()]
    assert sizes == [1] * len(RUNS)
    assert sw.overview(Board(RUNS, tmp_path, 1)).failed  # it is still said that it failed


def test_a_population_that_kills_its_workers_fails_and_the_others_go_on(tmp_path):
    board = Board(RUNS, tmp_path, 2)
    deaths, group = sw.Deaths(board, "s"), RUNS[:2]
    (tmp_path / "logs").mkdir(parents=True)
    for number in range(sw.DEATHS):
        assert sw.failure(tmp_path, group, "s") is None
        path = sw.pulse_path(tmp_path, f"w{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(pulse(f"w{number}", group)))
        deaths.note(f"w{number}", "was killed")
    assert "5 workers died at it" in sw.failure(tmp_path, group, "s")["error"]
    assert set(sw.overview(board, "s").failed) == {run.key for run in group}
    with pytest.raises(WaveRNNError, match="before they began anything"):
        for _ in range(sw.DEATHS):
            deaths.note("nobody", "died")


def test_a_device_that_is_not_there_is_found_out_before_anything_is_begun(tmp_path):
    with pytest.raises(ConfigError, match="unknown device 'cdua'"):
        sweep(GRID, tmp_path / "r", "cdua", 1)
    assert not (tmp_path / "r").exists()


def test_grids_that_are_a_slip_are_refused_before_they_are_built():
    many = [k / 1e4 for k in range(1, 1001)]
    with pytest.raises(ConfigError, match="1,000,000 runs; more than 100,000"):
        grid_from(
            {"name": "g", "experiments": ["copy0_wrnn"], "axes": {"lr": many, "drop_factor": [1 + x for x in many]}}
        )


def test_a_run_that_can_never_work_does_not_stop_the_others(tmp_path):
    wrong = grid_from(tiny(axes={"task_options.delay": [3]}, seeds=[0]))
    both = Grid("both", tuple(p for g in (wrong, GRID) for *_, p in g.points()), seeds=(0,))
    assert work(both, tmp_path, "cpu", session="s") == 2
    failed = sw.overview(Board(both.runs(), tmp_path), "s").failed
    assert len(failed) == 2 and all("no option 'delay'" in why for why in failed.values())


@pytest.mark.parametrize(
    "note", ["", "{", "[]", '{"session": 3}', '{"session": "s", "error": 3}', '{"session": "s"}', "\x00"]
)
def test_a_broken_note_is_no_failure(tmp_path, note):
    group = populations(RUNS, 2)[0]
    folder = ex.population_folder(tmp_path, group)
    folder.mkdir(parents=True)
    (folder / "failed.json").write_text(note)
    assert sw.failure(tmp_path, group, "s") is None and sw.failure(tmp_path, group, None) is None


def test_a_disk_that_cannot_be_written_ends_the_worker(tmp_path, monkeypatch):
    "One that is full, or was mounted read-only: nobody pretends, and nothing half-written stays."
    import wave_rnns.core as core

    real, broken = core.atomic_write, []

    def atomic_write(path, data):
        if broken:
            raise OSError(28, "not written, what was there before is untouched: no space left on the device", str(path))
        return real(path, data)

    monkeypatch.setattr(core, "atomic_write", atomic_write)
    break_task(monkeypatch, None, lambda runs: len(list(tmp_path.glob("runs/*/*.json"))) == 2 and broken.append(1))
    with pytest.raises(OSError, match="no space left"):
        work(GRID, tmp_path, "cpu")
    monkeypatch.undo()
    assert sum(map(bool, records(tmp_path))) == 2
    assert work(GRID, tmp_path, "cpu") == len(RUNS) - 2 and not left_overs_of(tmp_path)


def test_interrupted_anywhere_nothing_is_lost(swept, tmp_path):
    expected = records(swept)
    for asked in (
        0,
        5,
        8,
        9,
        13,
    ):  # a population makes eight steps, and is asked after each, and once when it is through
        results, count = tmp_path / f"cut{asked}", itertools.count()
        with pytest.raises(Interrupted, match="start again to go on"):
            work(GRID, results, "cpu", lambda count=count, asked=asked: next(count) >= asked)
        had = sum(map(bool, records(results)))
        assert had == (0 if asked < 8 else 2), asked
        assert not list(results.glob("checkpoints/workers/*"))
        assert work(GRID, results, "cpu") == len(RUNS) - had
        assert records(results) == expected and not left_overs_of(results)


def test_a_worker_says_where_it_is(tmp_path, monkeypatch):
    seen = []
    real = sw.Pulse.__call__

    def ask(self):
        self.last = -math.inf  # as if two seconds had passed
        answer = real(self)
        seen.append(json.loads(self.path.read_text()))
        return answer

    monkeypatch.setattr(sw.Pulse, "__call__", ask)
    work(GRID, tmp_path, "cpu")
    assert len(seen) == 3 * 8 and all(map(sw.is_pulse, seen))
    assert [n["step"] for n in seen[:8]] == [*range(1, 9)] and {n["steps"] for n in seen} == {8}
    assert seen[0]["runs"] == [r.key for r in RUNS[:2]] and seen[0]["label"] == sw.label(RUNS[:2])
    assert "loss" in seen[5]["line"] and seen[5]["worker"] == sw.worker_name()
    assert not list(tmp_path.glob("checkpoints/workers/*"))


def test_a_worker_without_a_pulse_works(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "workers").write_text("a file, not a folder")
    monkeypatch.setattr(sw.Pulse.__init__, "__defaults__", (None, 0.0))
    assert work(GRID, tmp_path, "cpu") == len(RUNS)


def worked_with_few_files(hard, *arguments) -> int:
    "A worker on a system that lets a process open 64 files, unless it asks for more."
    import resource

    from test_chaos import worked

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard or resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        return worked(*arguments)
    except ConfigError as e:
        return 3 if "lower --together" in str(e) else 4


@pytest.mark.parametrize("hard, code", [(None, 0), (100, 3)])
def test_a_population_of_more_runs_than_files_may_be_open(nursery, tmp_path, hard, code):
    grid = tiny(seeds=[*range(40)], together=80, axes={"steps": [2], "eval_every": [2]})
    arguments = grid, str(tmp_path / "r"), 80, (str(tmp_path / "audit"),)
    assert nursery("test_sweeps:worked_with_few_files", hard, *arguments).end() == code
    assert len(list(tmp_path.glob("r/runs/copy/*.json"))) == (0 if code else 80)


# What a sweep shows ---------------------------------------------------------------------------------------------------


def pulse(worker, runs, **more) -> dict:
    note = {"worker": worker, "runs": [r.key for r in runs], "label": "2 x e", "line": "loss 1", "step": 4, "steps": 8}
    return {**note, "time": time.time(), **more}


def put_pulses(results, *notes):
    folder = Path(results) / "checkpoints" / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    for number, note in enumerate(notes):
        (folder / f"{number}.json").write_text(note if isinstance(note, str) else json.dumps(note))


def test_the_overview_counts_what_is_there(tmp_path):
    wild = grid_from(tiny(axes={"model.activation": ["identity"], "lr": [1e-2, 1e12]}, seeds=[0], together=1))
    runs = [*wild.runs(), *RUNS]
    work(wild, tmp_path, "cpu")
    put_pulses(tmp_path, pulse("b", RUNS[2:4]), pulse("a", RUNS[:2]))
    now = sw.overview(Board(runs, tmp_path, 2))
    assert (now.total, now.over, now.ended) == (8, 2, {"done": 1, "diverged": 1})
    assert [w["worker"] for w in now.running] == ["a", "b"]
    assert re.fullmatch(r"1 done, 1 diverged, 4 running; best validation cross_entropy [\d.]+: \w+ seed 0", now.line())
    assert sw.overview(Board(RUNS, tmp_path / "empty")).line() == "nothing yet"
    assert not (tmp_path / "empty").exists()


def test_pulses_of_the_past_of_others_and_of_nobody(swept, tmp_path):
    runs = grid_from(tiny(seeds=[7, 8])).runs()
    strange = [
        "",
        "{",
        "[]",
        "3",
        "[" * 100_000,
        json.dumps(pulse("x", runs, step="4")),
        json.dumps({**pulse("x", runs), "runs": [3]}),
    ]
    strange += [json.dumps({**pulse("x", runs), "time": None})]
    put_pulses(tmp_path, *strange, pulse("ended", RUNS[:2]), pulse("another grid", grid_from(tiny(seeds=[9])).runs()))
    assert not sw.overview(Board([*RUNS, *runs], tmp_path, 2)).running
    # Of two that name the same run, one is dead: the older.
    put_pulses(tmp_path, pulse("dead", runs, time=time.time() - 99), pulse("alive", runs))
    assert [w["worker"] for w in sw.overview(Board([*RUNS, *runs], tmp_path, 2)).running] == ["alive"]


def test_a_silent_worker_is_named(tmp_path):
    put_pulses(tmp_path, pulse("a", RUNS[:2], time=time.time() - 3 * sw.SILENT), pulse("b", RUNS[2:3]))
    assert "1 running, 2 silent for a minute, perhaps dead" in sw.overview(Board(RUNS, tmp_path)).line()


def moment(over=3, running=(), failed=(), best="") -> Overview:
    return Overview(10, {"done": over} if over else {}, list(running), dict.fromkeys(failed, "why"), best)


def test_where_nobody_watches_a_line_comes_when_something_changed(capsys):
    view = View("g", every=0.0)
    for now in (moment(0), moment(0), moment(1), moment(1)):
        view.show(now)
    view.show(moment(10, best="best x"), last=True)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "g: 0 of 10: nothing yet", "g: 1 of 10: 1 done", "g: 10 of 10: 10 done; best x"
    ]  # fmt: skip
    view = View("g", every=1e9)  # often enough is often enough, but the end is always told
    for now in (moment(0), moment(1), moment(2)):
        view.show(now)
    view.show(moment(10), last=True)
    assert len(capsys.readouterr().err.splitlines()) == 2
    silent = View("g", progress=False, every=0.0)
    silent.show(moment(1))
    silent.say("something")
    silent.close()
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_where_somebody_watches_there_are_bars(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    view = View("mygrid")
    a, b = pulse("a", RUNS[:2], label="2 x first"), pulse("b", RUNS[2:4], label="2 x second", time=time.time() - 500)
    view.show(moment(3, [a, b], ["k"], "best so far"))
    assert len(view.bars) == 3 and [(bar.n, bar.total) for bar in view.bars] == [(3, 10), (4, 8), (4, 8)]
    view.say("a worker died")
    view.show(moment(10, best="best so far"), last=True)
    assert [bar.n for bar in view.bars] == [10, 0, 0]
    view.close()
    text = terminal.getvalue()
    for word in (
        "mygrid: 3 of 10",
        "3 done, 2 running, 2 silent for a minute, perhaps dead, 1 failed",
        "best so far",
        "2 x first",
        "loss 1",
        "a worker died",
    ):
        assert word in text, word
    assert re.search(r"2 x second.*silent for 50\d s", text)


def test_time_left_counts_parts_of_runs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(sw.time, "monotonic", lambda: clock[0])
    view = View("g")
    assert view.time_left(moment(2)) == ""
    clock[0] = 10.0
    assert view.time_left(moment(2)) == "" and view.time_left(moment(10)) == ""
    half = pulse("a", RUNS[:2])  # two runs, half done
    assert view.time_left(moment(2, [half])) == "about 70 s left"  # one in ten seconds, seven to go
    assert view.time_left(moment(2, [half], ["k"] * 1)) == "about 60 s left"  # of failed ones nobody expects anything
    assert view.time_left(moment(2, [{**half, "steps": 0}])) == ""


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (99, "99 s"), (150, "2 min"), (5990, "100 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert sw.duration(seconds) == text


# Choosing -------------------------------------------------------------------------------------------------------------


def board_with(grid, score, status="done", metric="accuracy", sign=1) -> Board:
    "As if all runs had ended with these validation scores; a run without one has diverged."
    board = Board(grid.runs(), Path("nowhere"))
    for run in grid.runs():
        value = score(run)
        board.records[run.key] = sw.Ended(status if value is not None else "diverged", metric, value, sign)
    return board


def test_the_best_point_is_chosen_by_the_mean_over_seeds():
    grid = Grid("g", (EXPERIMENTS["smnist_wrnn"], EXPERIMENTS["smnist_irnn"]), {"lr": [1e-3, 1e-4, 1e-5]}, (0, 1))
    best = {1e-3: (0.99, 0.5), 1e-4: (0.8, 0.9), 1e-5: (0.7, 0.7)}  # one lucky seed is not enough
    board = board_with(grid, lambda run: best[run.experiment.lr][run.seed])
    assert [(e.model.kind, e.lr) for e in sw.winners(grid, board)] == [("wrnn", 1e-4), ("irnn", 1e-4)]
    rows = sw.ranking(grid, board)
    assert [r["settings"]["lr"] for r in rows] == [1e-4, 1e-3, 1e-5] * 2 and [r["runs"] for r in rows] == [2] * 6
    text = sw.ranking_text(grid, board, most=2)
    assert text.count("\n") == 3 and "lr 0.0001" in text and "validation accuracy 85.00% (2 runs)" in text
    (base,) = {r["point"].name for r in rows if r["base"] == "smnist_wrnn" and r["settings"]["lr"] == 1e-4}
    assert base == "smnist_wrnn"


def test_a_point_that_diverges_is_last_and_never_chosen():
    grid = Grid("g", (EXPERIMENTS["smnist_wrnn"],), {"lr": [1e-3, 1e-4, 1e-5]}, (0, 1))
    board = board_with(grid, lambda run: (None if run.seed else 0.99) if run.experiment.lr == 1e-3 else 0.5)
    assert sw.ranking(grid, board)[-1]["settings"]["lr"] == 1e-3 and sw.winners(grid, board)[0].lr == 1e-4
    assert "(2 runs, 1 diverged)" in sw.ranking_text(grid, board)
    everywhere = board_with(grid, lambda run: None)
    assert sw.winners(grid, everywhere) == [] and sw.ranking_text(grid, everywhere).count("no score") == 3
    assert (
        sw.ranking_text(grid, Board(grid.runs(), Path("nowhere"))) == "" == sw.best_so_far(Board([], Path("nowhere")))
    )


def test_what_is_remembered_of_a_record():
    record = {"status": "done", "metric": "mse", "selection": "lowest validation mse, ...", "valid_best": {"mse": 0.5}}
    assert sw.Ended.of(record) == ("done", "mse", 0.5, -1)
    assert sw.Ended.of({**record, "status": "diverged"}).score is None
    assert sw.Ended.of({**record, "valid_best": {}, "selection": "highest validation mse"}) == ("done", "mse", None, 1)


def test_less_is_better_where_it_is():
    grid = Grid("g", (EXPERIMENTS["adding100_wrnn"],), {"lr": [1e-3, 1e-4]})
    board = board_with(grid, lambda run: 0.1 if run.experiment.lr == 1e-4 else 0.2, metric="mse", sign=-1)
    assert sw.winners(grid, board)[0].lr == 1e-4 and "0.1: " in sw.best_so_far(board)


# Crews ----------------------------------------------------------------------------------------------------------------

LONG = tiny(axes={"steps": [3000], "eval_every": [1000], "log_every": [10]})


def begun(results) -> bool:
    "Does somebody train?"
    return bool(list(Path(results).glob("checkpoints/*/runs.json")))


def workers_of(pid: int) -> list[tuple[int, str]]:
    "Children of a process that are workers, each with its time of birth."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent, _, born = stat_of(int(stat.parent.name))
            if parent == pid:
                found.append((int(stat.parent.name), born))
        except OSError:
            continue
    return found


@pytest.fixture
def fast_workers(monkeypatch):
    "Workers that are this line of Python."

    def be(code):
        monkeypatch.setattr(sw, "WORKER", code)

    return be


def test_five_deaths_in_a_row_end_a_sweep(tmp_path, fast_workers, capsys):
    fast_workers("import sys; print('many words'); sys.exit('the last words')")
    with pytest.raises(WaveRNNError) as e:
        sweep(GRID, tmp_path, "cpu", 1)
    log = tmp_path / "logs" / re.search(r"log: .*/(.*-0\.log)\)", str(e.value))[1]
    said = "5 workers died in a row before they began anything; the last: worker 0 ended with code 1 (the last words; log: "
    assert said in str(e.value)
    assert log.read_text().count("the last words") == 5 == log.read_text().count("many words")
    assert capsys.readouterr().err.count("worker 0 ended with code 1 (the last words") == 5


def test_a_worker_without_last_words_and_one_killed(tmp_path, fast_workers):
    fast_workers("import sys; sys.exit(3)")
    with pytest.raises(WaveRNNError, match=r"ended with code 3 \(it said nothing"):
        sweep(GRID, tmp_path, "cpu", 1, progress=False)
    fast_workers("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(WaveRNNError, match=r"the last: worker \d was killed by signal 9"):
        sweep(GRID, tmp_path, "cpu", 2, progress=False)


def one_population() -> int:
    "A worker that trains one population, and dies."
    order = json.load(sys.stdin)
    board = Board(grid_from(order["grid"]).runs(), Path(order["results"]), order["most"])
    sw.attempt(board, order["session"], sw.Pulse(board.results), "cpu", 0)
    raise SystemExit("one is enough")


def swept_by_mortals(*arguments) -> int:
    from test_chaos import swept

    sw.be_worker = one_population
    return swept(*arguments)


def test_deaths_between_which_something_happened_are_no_row(nursery, tmp_path):
    "A sweep of more populations than it has patience for deaths goes on."
    populations_ = sw.DEATHS + 2
    grid = tiny(seeds=[*range(2 * populations_)], axes={"lr": [1e-2]})
    life = nursery("test_sweeps:swept_by_mortals", grid, str(tmp_path / "r"), 1, (str(tmp_path / "audit"),))
    assert life.end() == 0
    assert all(records(tmp_path / "r", grid_from(grid).runs()))
    log = "".join(p.read_text() for p in (tmp_path / "r/logs").iterdir())
    assert log.count("SystemExit: one is enough") == populations_


def test_nothing_to_do_starts_nobody(swept, fast_workers):
    fast_workers("import sys; sys.exit('nobody needs me')")
    end = sweep(GRID, swept, "cpu", 3, progress=False)
    assert end.over == len(RUNS) and not list((swept / "logs").iterdir())


def test_there_are_not_more_workers_than_runs(tmp_path, fast_workers):
    fast_workers("import sys; sys.exit('here')")
    with pytest.raises(WaveRNNError):
        sweep(grid_from(tiny(axes={"lr": [1e-2]}, seeds=[0, 1])), tmp_path, "cpu", 40, progress=False)
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_workers_end_when_the_one_who_started_them_is_killed(nursery, tmp_path):
    results = tmp_path / "results"
    life = nursery("test_chaos:swept", LONG, str(results), 2, (str(tmp_path / "audit"), 0.005))
    until(lambda: len(list(results.glob("checkpoints/*/runs.json"))) == 2)
    workers = workers_of(life.pid)
    assert len(workers) == 2
    life.send(signal.SIGKILL)
    assert life.end() == -signal.SIGKILL
    until(lambda: not any(lives(*worker) for worker in workers), 20)
    assert len(list(results.glob("checkpoints/*/population.safetensors"))) == 2, "they must have saved before they left"
    # What they left behind goes on.
    steps = [
        json.loads((p.parent / "runs.json").read_text()) for p in results.glob("checkpoints/*/population.safetensors")
    ]
    assert len({key for keys in steps for key in keys}) == sum(map(len, steps))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_all_is_saved_and_the_same_goes_on(nursery, tmp_path, number):
    grid = tiny(axes={"steps": [200], "eval_every": [50], "log_every": [4]})
    arguments = (2, (str(tmp_path / "audit"), 0.005), 60.0)  # no checkpoint but the one that is asked for
    life = nursery("test_chaos:swept", grid, str(tmp_path / "r"), *arguments)
    until(lambda: training(tmp_path / "r"))
    workers = workers_of(life.pid)
    life.send(number)
    assert life.end() == 75 and not any(lives(*worker) for worker in workers)
    said = (tmp_path / "audit" / "said").read_text()
    assert re.fullmatch(r"stopped with \d of 6 runs done; everything is saved; the same command goes on", said)
    saved = [load_checkpoint(p)[1]["history"]["step"] for p in tmp_path.glob("r/checkpoints/*/population.safetensors")]
    assert len(saved) == len(workers) == 2 and all(0 < step < 200 for step in saved)
    assert nursery("test_chaos:swept", grid, str(tmp_path / "r"), 2, (str(tmp_path / "audit"),)).end() == 0
    runs = grid_from(grid).runs()
    work(grid_from(grid), tmp_path / "peace", "cpu", most=2)
    assert records(tmp_path / "r", runs) == records(tmp_path / "peace", runs) and not left_overs_of(
        tmp_path / "r", runs
    )


def test_a_second_signal_does_not_wait(nursery, tmp_path):
    "Here on workers whose disk takes nine seconds for everything."
    results = tmp_path / "results"
    life = nursery("test_chaos:swept", LONG, str(results), 2, (str(tmp_path / "audit"), 0.005, 9.0))
    until(lambda: len(list((tmp_path / "audit").glob("training/*"))) >= 2)
    workers = workers_of(life.pid)
    life.send(signal.SIGINT)
    time.sleep(0.5)
    begin = time.monotonic()
    life.send(signal.SIGINT)
    assert life.end() != 0 and time.monotonic() - begin < 6
    assert not any(lives(*worker) for worker in workers)


# Several at once ------------------------------------------------------------------------------------------------------


def trained(config, seeds, results, become) -> int:
    "`train` as `wrnn_train` calls it: the exit code is the command's."
    from test_chaos import become_audited

    become_audited(*become)
    grid = grid_from(config)
    try:
        for *_, point in grid.points():
            ex.train([Run(point, s) for s in seeds], Path(results), "cpu", progress=False, checkpoint_seconds=0)
    except WaveRNNError as e:
        (Path(become[0]) / "train_said").write_text(str(e))
        return 1
    return 0


def trainings(audit) -> dict[str, int]:
    "How often training of each run began."
    begun = [key for note in audit.notes("begins") for key in note["keys"]]
    return {key: begun.count(key) for key in begun}


@pytest.mark.parametrize("number", range(3))
def test_two_sweeps_started_at_once_train_each_run_once(nursery, tally, tmp_path, number):
    "Of one grid, of overlapping grids, and in other groups."
    results, audit = tmp_path / "results", Audit(tmp_path / "audit")
    second = [TINY, tiny(seeds=[2, 1, 3], together=3), tiny(axes={"lr": [1e-3, 1e-4]}, together=1)][number]
    lives = [nursery("test_chaos:swept", g, str(results), 2, (str(audit.folder), 0.02)) for g in (TINY, second)]
    assert [life.end() for life in lives] == [0, 0]
    runs = list({r.key: r for g in (TINY, second) for r in grid_from(g).runs()}.values())
    assert trainings(audit) == {r.key: 1 for r in runs} and not audit.notes("doubled")
    assert sorted(n["key"] for n in audit.notes("writes")) == sorted(r.key for r in runs)
    assert all(r["status"] == "done" for r in records(results, runs)) and not left_overs_of(results, runs)
    tally("two at once", sweeps=2, runs=len(runs), trained_once=len(runs))


def test_wrnn_train_and_a_sweep_over_the_same_runs(nursery, tally, tmp_path):
    "`train` waits for nobody: it trains what it gets, or says who is at it; together they do everything once."
    results, audit = tmp_path / "results", Audit(tmp_path / "audit")
    become = (str(audit.folder), 0.02)
    told = 0
    for order in range(4):
        first = nursery("test_sweeps:trained", TINY, [0, 1, 2], str(results), become) if order % 2 else None
        time.sleep(0.05 * (order // 2))
        sweep_ = nursery("test_chaos:swept", TINY, str(results), 2, become)
        time.sleep(0.3 * (order // 2))
        first = first or nursery("test_sweeps:trained", TINY, [0, 1, 2], str(results), become)
        codes = first.end(), sweep_.end()
        assert codes[0] in (0, 1) and codes[1] == 0
        if codes[0]:
            told += 1
            assert "another process is training tiny_copy0_wrnn_lr0_0" in (audit.folder / "train_said").read_text()
        assert trainings(audit) == {r.key: 1 for r in RUNS} and not audit.notes("doubled")
        assert all(r["status"] == "done" for r in records(results)) and not left_overs_of(results)
        (audit.folder / "log").unlink()
        shutil.rmtree(results)
    tally("wrnn_train beside a sweep", rounds=4, runs_trained_once=4 * len(RUNS), told_to_wait=told)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def test_list_counts_what_is_declared(call):
    code, out, err = call("wrnn_sweep", "--list")
    lines = [re.fullmatch(r"(\w+) +(\d+) runs: .*", line) for line in out.splitlines()]
    assert (code, err) == (0, "") and {m[1]: int(m[2]) for m in lines} == PAPER


@pytest.mark.parametrize(
    "args, code, says",
    [
        ([], 2, "wrnn_sweep --list shows all"),
        (["--no-such-option"], 2, "unrecognized arguments"),
        (["copy_wrnn", "--workers", "two"], 2, "invalid int value"),
        (["copy_wrnn", "--workers", "-1"], 2, "must not be negative"),
        (["copy_wrnn", "--together", "-1"], 2, "must not be negative"),
        (["copy_wrnn", "--minutes", "0"], 2, "at least 1"),
        (["copy_wrnn", "--cpus", "0"], 2, "at least 1"),
        (["copy_wrnn", "--gpus", "-1"], 2, "must not be negative"),
        (["copy_wrnn", "--seeds", "one"], 2, "expected whole numbers like 0,1"),
        (["copy_wrnn", "--sbatch", "account"], 2, "'account' has no value"),
        (["copy_wrnn", "--sbatch", "=physics"], 2, "has no value"),
        (["copy_wrn"], 1, "did you mean"),
        (["no_such_*"], 1, "grids are copy_wrnn"),
        (["missing.json"], 1, "missing.json"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(call, tmp_path, args, code, says):
    found, out, err = call("wrnn_sweep", *args)
    assert (found, out) == (code, "") and says in err
    if "unrecognized" not in err and "invalid" not in err:  # argparse adds its own lines of usage
        assert err.count("\n") == 1 and err.startswith("wrnn_sweep: ")
    assert {p.name for p in tmp_path.iterdir()} == {"bin"}


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(call, file, tmp_path, device):
    code, out, err = call("wrnn_sweep", file, "--device", device, "--results", "r", "--workers", "1")
    assert code == 1 and "device" in err.splitlines()[-1] and not list((tmp_path / "r").glob("runs/*/*"))


def test_show_changes_nothing(call, file, tmp_path, swept):
    code, out, err = call("wrnn_sweep", file, "--show", "--results", tmp_path / "none")
    assert (code, err) == (0, "") and "0 of 6 runs: nothing yet" in out and not (tmp_path / "none").exists()
    before = {p: p.stat().st_mtime_ns for p in swept.rglob("*") if p != file}
    code, out, err = call("wrnn_sweep", file, "--show", "--results", swept, "--seeds", "0-3")
    assert (code, err) == (0, "") and "6 of 8 runs: 6 done; best validation cross_entropy" in out
    lines = [line for line in out.splitlines() if line.startswith("copy0_wrnn")]
    assert len(lines) == 2 and all("(3 runs)" in line for line in lines)
    assert {p: p.stat().st_mtime_ns for p in swept.rglob("*") if p != file and p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }


def test_options_of_sbatch():
    assert sw.sbatch_options("") == {} == sw.sbatch_options("  ")
    text = "account=physics  --mem=8G mail-user=me@x.org constraint=a&b=c"
    assert sw.sbatch_options(text) == {
        "account": "physics",
        "mem": "8G",
        "mail-user": "me@x.org",
        "constraint": "a&b=c",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"account": "physics\nrm -rf /"},
        {"a b": "1"},
        {"Account": "x"},
        {"": "x"},
        {"x;y": "1"},
        {"mem": "8G\x00"},
        {"a\n": "1"},
    ],
)
def test_words_that_would_be_a_shell_are_refused(options):
    with pytest.raises(ConfigError, match="is no option of sbatch"):
        sw.check_words(Path("results"), **options)


@pytest.mark.parametrize("folder", ["100%", "a\\b", "a\nb", "a\x00b"])
def test_folders_that_sbatch_would_read_otherwise_are_refused(folder):
    with pytest.raises(ConfigError, match="must not contain"):
        sw.check_words(Path(folder))


def test_slurm_without_slurm_is_one_line(call, file, tmp_path, monkeypatch):
    "Without its commands, and without submitit."
    (tmp_path / "empty").mkdir()
    code, out, err = call("wrnn_sweep", file, "--slurm", "--results", "r", PATH=str(tmp_path / "empty"))
    assert code == 1 and out == "" and err.count("\n") == 1
    assert ("no sbatch" in err and "login node" in err) or "pip install 'wave-rnns[slurm]'" in err
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, out, err = call("wrnn_sweep", file, "--slurm", "--results", "r")
    assert code == 1 and err.count("\n") == 1 and "pip install 'wave-rnns[slurm]'" in err
    assert not (tmp_path / "r").exists()


def test_runs_that_fail_make_exit_code_1_and_the_rest_is_done(call, nursery, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(tiny(axes={"lr": [1e-2], "task_options.delay": [3]}, seeds=[0, 1])))
    code, out, err = call("wrnn_sweep", "bad.json", "--results", "r", "--device", "cpu", "--workers", "1")
    assert code == 1 and "0 of 2 runs: 2 failed" in out
    last = err.splitlines()[-1]
    assert "2 runs failed" in last and "no option 'delay'" in last and "The same command tries them again" in last
    (log,) = (tmp_path / "r/logs").iterdir()
    assert "Traceback" in log.read_text()


@pytest.mark.slow
def test_the_command_from_beginning_to_end(script, tmp_path, tally):
    "Ctrl-C and kill -9 in the middle, and each time the same command again; in the end the numbers of peace."
    grid = tiny(axes={"steps": [400], "eval_every": [100], "log_every": [4]})
    (tmp_path / "g.json").write_text(json.dumps(grid))
    command = [sys.executable, script("wrnn_sweep"), "g.json", "--device", "cpu", "--workers", "2", "--results"]
    streams = {"cwd": tmp_path, "env": ENV, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    results = tmp_path / "r"
    for number, code in ((signal.SIGINT, 75), (signal.SIGKILL, -9)):
        process = subprocess.Popen([*command, "r"], **streams)
        logs = len(list(results.glob("logs/*"))) if results.exists() else 0
        until(lambda logs=logs: len(list(results.glob("logs/*"))) >= logs + 2 and training(results))
        workers = workers_of(process.pid)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        if code == 75:
            assert "everything is saved; the same command goes on" in err.splitlines()[-1] and "Traceback" not in err
        until(lambda workers=workers: not any(lives(*worker) for worker in workers), 30)
        assert list(results.glob("checkpoints/*/population.safetensors")), "saved"
    done = subprocess.run([*command, "r"], timeout=300, **streams)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 runs: 6 done; best validation cross_entropy" in done.stdout
    runs = grid_from(grid).runs()
    work(grid_from(grid), tmp_path / "peace", "cpu", most=2)
    assert records(results, runs) == records(tmp_path / "peace", runs) and not left_overs_of(results, runs)
    tally("the command", stopped_by_Ctrl_C=1, by_kill_9=1, orphans=0, ended_bit_equal=1)


def training(results) -> bool:
    "Has a living worker said that it is in the middle of something?"
    notes = [sw.small_json(p) for p in results.glob("checkpoints/workers/*.json")]
    return any(sw.is_pulse(n) and 0 < n["step"] < n["steps"] and time.time() - n["time"] < 3 for n in notes)


# Finals ---------------------------------------------------------------------------------------------------------------


def test_finals_train_the_winners_with_more_seeds(call, tmp_path):
    (tmp_path / "g.json").write_text(json.dumps(tiny(seeds=[0])))
    code, out, err = call(
        "wrnn_sweep", "g.json", "--finals", "0-2", "--results", "r", "--device", "cpu", "--workers", "1"
    )
    assert code == 0 and "tiny: 2 of 2 runs" in out, err
    assert "tiny_finals: 3 of 3 runs: 3 done" in out
    (best,) = sw.winners(grid_from(tiny(seeds=[0])), Board(grid_from(tiny(seeds=[0])).runs(), tmp_path / "r").look())
    assert all(records(tmp_path / "r", [Run(best, seed) for seed in range(3)]))
    assert len(list((tmp_path / "r/runs/copy").glob("*.json"))) == 4, "seed 0 of the winner is not trained again"


def test_finals_wait_until_the_grid_is_done(call, tmp_path):
    (tmp_path / "g.json").write_text(json.dumps(tiny(seeds=[0])))
    code, out, err = call("wrnn_sweep", "g.json", "--finals", "0-2", "--show", "--results", "r")
    assert code == 0 and "finals" not in out


def test_wrong_seeds_of_finals_are_told_at_once(call, file, tmp_path):
    code, out, err = call("wrnn_sweep", file, "--finals", "one", "--results", "r", "--device", "cpu", "--workers", "1")
    assert code == 2 and "expected whole numbers" in err and not (tmp_path / "r").exists()


# The soak -------------------------------------------------------------------------------------------------------------


def test_the_soak_says_flat():
    "What notebook 17 draws: ten thousand runs, after which a worker is what it was before."
    record = json.loads((HERE.parent / "nbs/results/soak.json").read_text())
    verdict = record["verdict"]
    assert record["runs"] >= 10_000 and record["workers"] == 2 and len(record["rows"]) <= 200
    assert record["rows"][-1]["done"] == record["runs"]
    for who, growth in verdict["memory_mb_per_1000_runs"].items():
        assert growth < 0.6, (who, growth)  # MB: some hundred bytes a run are what a sweep remembers of it
    files = verdict["most_open_files_by_decile"]
    assert max(files) - files[0] <= 5 and max(files) < 2 * record["together"], files
    assert verdict["threads"][1] <= 4
    assert verdict["last_over_first_decile"]["cpu_seconds"] < 1.25


def test_a_small_soak(tmp_path):
    "The script that makes the record, on two hundred runs."
    env = {**ENV, "TMPDIR": str(tmp_path)}
    args = [
        sys.executable,
        str(HERE / "soak.py"),
        "--runs",
        "200",
        "--together",
        "20",
        "--out",
        str(tmp_path / "soak.json"),
    ]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["runs"] == 200 == record["rows"][-1]["done"] and record["environment"]["torch"]
    assert all(len(row["workers"]) <= 2 for row in record["rows"])
    assert any(w["rss_mb"] > 100 and w["fds"] > 3 for row in record["rows"] for w in row["workers"])
    # PyTorch keeps a folder of its own where temporary files go.
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("torchinductor")] == ["soak.json"]

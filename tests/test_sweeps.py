"Grids, populations, the loop that trains them, halving and choosing: where notebooks 17 and 18 would get dull."

import errno
import itertools
import json
import re
from dataclasses import replace
from unittest.mock import Mock

import pytest

import wave_rnns.paper.sweeps as sw
import wave_rnns.paper.workers as wk
from wave_rnns.core import ConfigError, WaveRNNError, plain
from wave_rnns.paper.config import decisive
from wave_rnns.paper.experiments import EXPERIMENTS, Run, record_of, to_config
from wave_rnns.paper.records import content_hash, read_curve, read_record, run_path
from wave_rnns.paper.grids import OWN_SETTINGS, Grid, find_grid, grid_from, populations
from wave_rnns.paper.ranking import ranking, ranking_text, winners
from wave_rnns.paper.sweeps import population_path, train, work
from wave_rnns.paper.training import Interrupted

SIZES = {
    "model.n": [4], "model.c": [1], "steps": [8], "eval_every": [4], "log_every": [2],
    "task_options.batch_size": [2], "task_options.valid_size": [8], "task_options.test_size": [8],
}  # fmt: skip
TINY = {"name": "tiny", "experiments": ["copy0_wrnn"], "axes": {**SIZES, "lr": [1e-2, 1e-3]}}
TINY |= {"seeds": [0, 1, 2], "together": 2}
GRID = grid_from(TINY)
RUNS = GRID.runs()
QUIET = dict(progress=False, checkpoint_seconds=0.0)


def trained(results, runs=RUNS):
    return [run for run in runs if run.path(results).exists()]


PAPER = {  # experiments x axes of the search, from the authors' sweep files; copy_ablations: the other rows of Table 4
    "copy_wrnn": 4 * 3 * 3,
    "copy_irnn": 4 * 3 * 3 * 2 * 2 * 2,
    "copy_ablations": 4 * 8 * 3 * 3,
    "adding_wrnn": 5 * 3 * 5,
    "adding_irnn": 5 * 3 * 5,
    **dict.fromkeys(("smnist_wrnn", "smnist_irnn", "psmnist_wrnn", "psmnist_irnn"), 3 * 5 * 2 * 2),
    "nscifar10_wrnn": 3 * 2,
    "nscifar10_irnn": 3 * 4,
    "paper": 5 * (13 + 2 * 4 + 5) + 3 + 4 * 8 * 3 * 3,  # five seeds, three for the iRNN on nsCIFAR10, Table 4's search
    "quick": 95,
}


@pytest.mark.parametrize("name", PAPER)
def test_a_declared_grid_is_its_plain_data(name):
    grid = find_grid(name)
    assert len(grid.runs()) == PAPER[name]
    assert grid_from(json.loads(json.dumps(plain(grid)))) == grid
    names = [point.name for *_, point in grid.points()]
    assert len({*names}) == len(names), "two points of one name cannot be told apart"


WRONG = [  # more of them: notebook 17_grids
    ({"experiments": []}, "experiments must name at least one"),
    ({"experiments": 3}, "experiments must be list"),
    ({"experiments": [3]}, "experiments must be names, patterns"),
    ({"experiments": ["grid:no_such_grid"]}, "grid:no_such_grid"),
    ({"experiments": [{"name": "x"}]}, "missing"),
    ({"axes": {"lr": 1e-3}}, "axes must be lists of values"),
    ({"axes": {"lr": []}}, "axes must be lists of values"),
    ({"axes": {"lr": [2**63]}}, "axes must hold finite numbers"),
    ({"axes": {"lr.x": [1]}}, "has no setting 'lr.x'"),
    ({"axes": {"seeds": [[0], [1]]}}, "seeds"),
    ({"axes": {"lr": list(range(1, 1000)), "clip": list(range(1000))}}, "more than 100,000 runs"),
    ({"seeds": [-1]}, "seeds must be whole numbers"),
    ({"seeds": [True]}, "seeds must be whole numbers"),
    ({"together": 0}, "together must be at least 1"),
    ({"halving": [[10, 2]], "seeds": [0, 1, 2], "together": 2}, "must be trained together, and together is 2"),
]


@pytest.mark.parametrize("change, says", WRONG)
def test_a_wrong_grid_is_named(change, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        grid_from({"name": "g", "experiments": ["copy80_wrnn"], **change})


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
    assert len(grid.runs()) == 6
    declared = {Run(e, s).key for n, e in EXPERIMENTS.items() if n.startswith("smnist_") for s in e.seeds}
    assert {r.key for r in find_grid("smnist_*").runs()} == declared


def test_a_run_is_there_once():
    base = EXPERIMENTS["copy80_wrnn"]
    for grid in (
        Grid("g", (base,), {"lr": [1e-2, 0.01, 1e-3], "clip": [1, 1.0]}, seeds=(0, 1, 0)),
        Grid("g", (base, replace(base, name="other")), {"lr": [1e-2, 1e-3]}, seeds=(0, 1)),
    ):
        assert len(grid.runs()) == len({r.key for r in grid.runs()}) == 4


def test_the_partition_depends_on_the_grid_alone():
    "How large the parts are: notebook 17."
    for group in populations(find_grid("copy_irnn").runs(), 64):
        shared = [{k: v for k, v in decisive(r.experiment).items() if k not in OWN_SETTINGS} for r in group]
        assert all(s == shared[0] for s in shared)
    names = [population_path("r", group) for group in populations(RUNS, 2)]
    assert len({*names}) == len(names) == 3 and population_path("r", RUNS[::-1]) == population_path("r", RUNS)


def test_only_what_is_missing_is_trained_and_that_once(tmp_path, monkeypatch):
    with pytest.raises(Interrupted, match="between two populations"):
        work(RUNS, tmp_path, "cpu", 2, interrupt=lambda: True, **QUIET)
    (before,) = train(RUNS[1:2], tmp_path, "cpu", **QUIET)
    assert work(RUNS, tmp_path, "cpu", 2, **QUIET) == {} and trained(tmp_path) == RUNS
    assert [record_of(tmp_path, run)["together"] for run in RUNS] == [1, 1, 2, 2, 2, 2]
    assert record_of(tmp_path, RUNS[1]) == before and not list(tmp_path.glob("checkpoints/*"))
    train(RUNS[1:2], tmp_path, "cpu", resume=False, **QUIET)
    assert record_of(tmp_path, RUNS[1]) != before
    stamps = {run.key: run.path(tmp_path).stat().st_mtime_ns for run in RUNS}
    monkeypatch.setattr(sw, "fit_population", lambda *_, **__: pytest.fail("trained twice"))
    assert work(RUNS, tmp_path, "cpu", 2, **QUIET) == {}
    assert stamps == {run.key: run.path(tmp_path).stat().st_mtime_ns for run in RUNS}


@pytest.fixture
def half_finished(tmp_path):
    "Results in which two runs were stopped after five steps."
    count = iter(range(5))
    with pytest.raises(Interrupted, match="stopped"):
        train(RUNS[:2], tmp_path, "cpu", interrupt=lambda: next(count, None) is None, **QUIET)
    return tmp_path


def killed(*_):
    raise KeyboardInterrupt


def test_killed_between_two_records_of_a_population(tmp_path, monkeypatch):
    "The first record is kept as it is, the second comes from the checkpoint, and no step is made again."
    runs, write = RUNS[:2], sw.write_record
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sw, "write_record", lambda *record: killed(write(*record)))
        train(runs, tmp_path, "cpu", **QUIET)
    first = runs[0].path(tmp_path).read_bytes()
    step = "wave_rnns.paper.training.Population.train_step"
    monkeypatch.setattr(step, lambda self: pytest.fail("a step was made again"))
    assert [r["together"] for r in train(runs, tmp_path, "cpu", **QUIET)] == [2, 2]
    assert runs[0].path(tmp_path).read_bytes() == first and not list(tmp_path.glob("checkpoints/*"))


def test_killed_before_the_files_were_removed(tmp_path, monkeypatch):
    "All records are there: the next worker trains nothing and clears up, whatever state the checkpoint is in."
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("wave_rnns.paper.checkpoints.CheckpointFile.remove", killed)
        train(RUNS[:2], tmp_path, "cpu", **QUIET)
    monkeypatch.setattr(sw, "fit_population", lambda *_, **__: pytest.fail("trained twice"))
    files = list(tmp_path.glob("checkpoints/*.safetensors"))
    files[0].write_bytes(b"junk")
    assert trained(tmp_path) == RUNS[:2] and work(RUNS[:2], tmp_path, "cpu", **QUIET) == {}
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_claimed_population_is_left_alone(tmp_path, capsys):
    with sw.claimed(population_path(tmp_path, RUNS[:2])) as ours, sw.claimed(population_path(tmp_path, RUNS[:2])) as no:
        assert ours and not no
        assert work(RUNS, tmp_path, "cpu", 2, **QUIET) == {} and trained(tmp_path) == RUNS[2:]
        with pytest.raises(WaveRNNError, match="another process is training 2 x tiny"):
            train(RUNS[:2], tmp_path, "cpu", **QUIET)
    assert len(train(RUNS[:2], tmp_path, "cpu", **QUIET)) == 2


def test_damaged_checkpoints_are_set_aside_and_the_runs_begin_anew(half_finished):
    for path in (files := list(half_finished.glob("checkpoints/*.safetensors"))):
        path.write_bytes(b"junk")
    with pytest.warns(UserWarning, match="set aside, its runs begin anew"):
        assert len(train(RUNS[:2], half_finished, "cpu", **QUIET)) == 2
    aside = sorted(f"{p.name}.broken1" for p in files)
    assert sorted(p.name for p in half_finished.glob("checkpoints/*")) == aside
    with sw.claimed(population_path(half_finished, RUNS[:2])):  # they are not left over: nothing is claimed for them
        assert len(train(RUNS[:2], half_finished, "cpu", **QUIET)) == 2


def test_workers_that_die_between_checkpoints_go_on(tmp_path, monkeypatch):
    "Only deaths without progress count as in a row."
    (tmp_path / "checkpoints").mkdir()
    codes = iter([-9] * (2 * wk.DEATHS) + [0])

    def start(order, device, log):
        log.touch()
        if (code := next(codes)) != 0:
            (tmp_path / "checkpoints" / f"x.{next(numbers)}.safetensors").touch()
        return Mock(poll=lambda: code)

    numbers = itertools.count()
    monkeypatch.setattr(wk, "start_worker", start)
    monkeypatch.setattr(wk.time, "sleep", lambda seconds: None)
    wk.run_workers({"results": str(tmp_path), "grid": {"name": "g"}}, ["cpu"], RUNS, lambda: False)
    assert next(codes, None) is None


def test_what_nobody_has_timed_is_not_refused(tmp_path):
    long = [Run(replace(RUNS[0].experiment, steps=10**9), 0)]
    wk.refuse_to_crawl("mine", long, tmp_path)
    known = [Run(EXPERIMENTS["smnist_wrnn"], 0)]
    with pytest.raises(ConfigError, match="smnist takes about .* on one H200"):
        wk.refuse_to_crawl("smnist", known, tmp_path)


def test_other_code_under_a_half_finished_run_is_refused(half_finished, monkeypatch):
    monkeypatch.setattr("wave_rnns.paper.training.code_hash", lambda: "other")
    with pytest.raises(WaveRNNError, match="code: .*'other' now.*--resume no begins anew"):
        train(RUNS[:2], half_finished, "cpu", **QUIET)
    assert train(RUNS[:2], half_finished, "cpu", resume=False, **QUIET)[0]["code"] == "other"


def test_a_failure_is_written_down_and_the_next_start_tries_again(tmp_path, monkeypatch, capsys):
    fit, tried = sw.fit_population, []

    def fails(runs, *args, **kwargs):
        tried.append(len(runs))
        if runs[0] == RUNS[0]:
            raise MemoryError("so large")
        return fit(runs, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(sw, "fit_population", fails)
        failed = work(RUNS, tmp_path, "cpu", 2, **QUIET)
        with pytest.raises(MemoryError, match="so large"):  # for a caller who wants to see it
            train(RUNS[:2], tmp_path, "cpu", **QUIET)
    assert list(failed.values()) == ["so large"] and trained(tmp_path) == RUNS[2:] and tried == [2, 2, 2, 2]
    (note,) = tmp_path.glob("checkpoints/*.failed")
    assert note.read_text().startswith("2 x tiny") and "MemoryError: so large" in note.read_text()
    assert sw.failures(GRID, tmp_path) == failed
    assert work(RUNS, tmp_path, "cpu", 2, **QUIET) == {} and trained(tmp_path) == RUNS
    assert sw.failures(GRID, tmp_path) == {} and not list(tmp_path.glob("checkpoints/*"))
    with pytest.raises(ConfigError, match="no runs"):
        train([], tmp_path, "cpu")


BAD_GPU = type("AcceleratorError", (RuntimeError,), {})  # as torch's


@pytest.mark.parametrize("error", [BAD_GPU("an illegal memory access"), OSError(errno.ENOSPC, "no space left")])
def test_what_the_next_population_would_meet_too_ends_the_worker(tmp_path, monkeypatch, error):
    monkeypatch.setattr(sw, "fit_population", fit := Mock(side_effect=error))
    with pytest.raises((WaveRNNError, OSError), match=str(error.args[-1])) as e:
        work(RUNS, tmp_path, "cpu", 2, **QUIET)
    assert fit.call_count == 1
    if isinstance(error, BAD_GPU):
        assert e.value.exit_code == sw.BROKEN and len(list(tmp_path.glob("checkpoints/*.failed"))) == 1


RATES = {"lr": [1e-1, 1e-2, 1e-3, 1e-4, 1e12], "clip": [0], "model.activation": ["identity"]}  # 1e12 diverges
SEARCH = {"name": "search", "axes": {**SIZES, **RATES}, "seeds": [0], "together": 64, "halving": [[2, 3], [4, 1]]}
SEARCH = grid_from({**TINY, **SEARCH})


def test_a_search_is_halved_and_its_records_say_so(tmp_path):
    assert work(SEARCH.runs(), tmp_path, "cpu", **QUIET) == {}
    records = [record_of(tmp_path, run) for run in SEARCH.runs()]
    ends = {(r["status"], r.get("pruned", {}).get("rung")) for r in records}
    assert ends == {("done", None), ("stopped", 1), ("stopped", 2), ("diverged", None)}
    for r in records:
        if "pruned" in r:
            p = r["pruned"]
            assert r["stopped_step"] == p["step"] == {1: 2, 2: 4}[p["rung"]] and p["kept"] < p["rank"] <= p["of"]
            assert [list(rung) for rung in SEARCH.halving] == r["config"]["halving"]
            assert read_curve(run_path(tmp_path, "copy", r["key"], ".csv"))[0][-1]["step"] == p["step"]
    rows = ranking(SEARCH, tmp_path)
    assert [row["rung"] for row in rows] == [None, 2, 2, 1, None] and rows[-1]["diverged"] == 1
    (best,) = winners(SEARCH, tmp_path)
    assert best.halving == () and best.lr == rows[0]["settings"]["lr"]  # to be trained without a search
    for run, r in zip(SEARCH.runs(), records, strict=True):
        if "pruned" in r:  # however good it was when it was stopped
            better = {**r, "valid_best": {**r["valid_best"], "cross_entropy": 1e-9}}
            run.path(tmp_path).write_text(json.dumps({**better, "sha256": content_hash(better)}))
    assert [row["rung"] for row in ranking(SEARCH, tmp_path)] == [None, 2, 2, 1, None]
    assert winners(SEARCH, tmp_path) == [best]
    Run(rows[0]["point"], 0).path(tmp_path).unlink()
    assert winners(SEARCH, tmp_path) == []


def test_a_search_of_which_a_record_was_lost_is_ranked_anew(tmp_path):
    "A rank says nothing where others are missing: all run again, and what is there stays as it is."
    work(SEARCH.runs(), tmp_path, "cpu", **QUIET)
    before = {run.key: run.path(tmp_path).read_bytes() for run in SEARCH.runs()}
    (lost,) = [r for r in SEARCH.runs() if record_of(tmp_path, r).get("pruned", {}).get("rung") == 2][:1]
    lost.path(tmp_path).unlink()
    work(SEARCH.runs(), tmp_path, "cpu", **QUIET)
    after = {run.key: run.path(tmp_path).read_bytes() for run in SEARCH.runs()}
    assert {k for k in after if after[k] != before[k]} == {lost.key}
    assert read_record(lost.path(tmp_path))["pruned"] == json.loads(before[lost.key])["pruned"]


def test_the_best_point_is_chosen_by_validation_over_seeds(tmp_path):
    work(RUNS, tmp_path, "cpu", **QUIET)
    rows = ranking(GRID, tmp_path)
    for row in rows:
        scores = [record_of(tmp_path, Run(row["point"], s))["valid_best"]["cross_entropy"] for s in GRID.seeds]
        assert row["score"] == pytest.approx(sum(scores) / 3) and row["runs"] == 3
    assert rows[0]["score"] <= rows[1]["score"] and winners(GRID, tmp_path) == [rows[0]["point"]]
    assert ranking_text(GRID, tmp_path).count("\n") == 1
    path = Run(rows[0]["point"], 1).path(tmp_path)
    record = {**read_record(path), "status": "diverged"}  # one of three seeds: however good the others are
    path.write_text(json.dumps({**record, "sha256": content_hash(record)}))
    assert winners(GRID, tmp_path) == [rows[1]["point"]] == [ranking(GRID, tmp_path)[0]["point"]]
    Run(rows[1]["point"], 0).path(tmp_path).unlink()  # a point of which a run is missing is not chosen yet
    assert winners(GRID, tmp_path) == []

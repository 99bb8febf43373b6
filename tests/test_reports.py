"Intervals, outcomes, tables and curves against hand-made records."

import json
import math
from dataclasses import replace
from statistics import mean, stdev

import matplotlib.pyplot as plt
import pytest

import wave_rnns.paper.experiments as ex
import wave_rnns.paper.reports as rp
from wave_rnns.core import RecordError
from wave_rnns.paper.experiments import EXPERIMENTS, Run, run_key, to_config, write_record

PAPER = rp.paper_numbers()


def made(experiment, seed, status="done", solved=None, recipe=None, **metrics):
    "A sound record without training."
    e = EXPERIMENTS[experiment] if isinstance(experiment, str) else experiment
    diverged = status == "diverged"
    record = {
        "key": run_key(e, seed, recipe),
        "experiment": e.name,
        "config": to_config(e),
        "seed": seed,
        "recipe": recipe or ex.RECIPE,
        "status": status,
        "diverged_step": 17 if diverged else None,
        "metric": next(iter(metrics), ""),
        "selection": "highest validation score",
        "valid_best": metrics,
        "valid_final": metrics,
        "test_best": metrics,
        "test_final": metrics,
        "best_step": None if diverged else 100,
        "steps": 100,
        "finished": "2026-01-01T00:00:00Z",
        "parameters": {"with_biases": 49_946, "without_biases": 45_824},
        "seconds": 12.0,
        "environment": {"device": "a GPU", "commit": "0123456789abcdef"},
        "solved": {"column": "loss", "threshold": 0.05, "step": solved},
    }
    return {**record, "sha256": ex.content_hash(record)}


def cells(table, *start):
    "The cells of the table's lines that begin with `start`."
    lines = [[c.strip() for c in line.strip("| ").split("|")] for line in table.splitlines() if line.startswith("|")]
    return [line for line in lines if tuple(line[: len(start)]) == start]


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level, df, t", [(0.95, 1, 12.7062), (0.95, 2, 4.30265), (0.95, 7, 2.36462), (0.95, 8, 2.30600), (0.95, 40, 2.02108),
                                          (0.99, 3, 5.84091), (0.99, 10, 3.16927), (0.9, 5, 2.01505), (0.5, 1, 1.0), (0.999, 1, 636.619)])  # fmt: skip
def test_t_quantiles_are_the_printed_ones(level, df, t):
    assert rp.t_quantile(df, level) == pytest.approx(t, rel=2e-5)
    assert rp.t_probability(rp.t_quantile(df, level), df) == pytest.approx(level, abs=1e-12)


def test_an_outcome_is_mean_and_interval():
    values = (97.1, 97.9, 96.6, 97.4, 97.7)
    o = rp.Outcome("accuracy", values)
    assert o.mean == pytest.approx(mean(values)) and o.half == pytest.approx(
        2.77645 * stdev(values) / math.sqrt(5), rel=1e-5
    )
    one, none = rp.Outcome("accuracy", (97.0,)), rp.Outcome("accuracy")
    assert (str(one), one.half, str(none)) == ("97.00", math.inf, "–") and math.isnan(none.mean)
    assert rp.Outcome("accuracy", (97.0, 97.0)).half == 0


@pytest.mark.parametrize(
    "value, measure, text",
    [
        (97.4266, "accuracy", "97.43"),
        (-0.5, "valid_accuracy", "−0.50"),
        (4.2e-6, "mse", "4.2e-6"),
        (-4.2e-6, "mse", "−4.2e-6"),
        (9.96e-12, "", "1.0e-11"),
        (1234.0, "solved_step", "1,234"),
        (1234.0, "", "1.2e3"),
        (0.0, "mse", "0"),
        (math.inf, "mse", "–"),
        (None, "mse", "–"),
    ],
)
def test_numbers_as_shown(value, measure, text):
    assert rp.show(value, measure) == text


# The paper's numbers --------------------------------------------------------------------------------------------------


def test_paper_json_is_complete_and_consistent():
    keys = {"table", "section", "task", "model", "measure", "value", "unit", "experiment", "origin", "setting", "note"}
    for p in PAPER:
        assert keys <= p.keys() <= keys | {"spread", "seeds"}, p
        assert p["origin"] in ("paper", "cited", "rerun") and (p["value"] is None or p["value"] > 0)
        assert p["experiment"] is None or EXPERIMENTS[p["experiment"]].task == p["task"]
        if p["experiment"] and "T" in p["setting"]:
            assert EXPERIMENTS[p["experiment"]].task_options["T"] == p["setting"]["T"]
    named = [(p["experiment"], p["measure"], p["origin"]) for p in PAPER if p["experiment"]]
    assert len(named) == len(set(named))


def test_paper_json_against_the_papers_tables():
    number = lambda name, measure, origin="paper": rp.paper_number(name, measure, PAPER, origin)  # noqa: E731
    lengths = (100, 200, 400, 700, 1000)
    assert [number(f"adding{T}_irnn", "mse") for T in lengths] == [1e-5, 4e-5, 1e-4, 0.16, 0.16]
    assert [number(f"adding{T}_irnn", "solved_step") for T in lengths] == [14_000, 22_000, 30_000, None, None]
    assert [number(f"adding{T}_wrnn", "mse") for T in lengths] == [4e-6, 2e-5, 4e-5, 8e-5, 6e-5]
    assert [number(f"adding{T}_wrnn", "solved_step") for T in lengths] == [300, 1000, 1000, 3000, 2000]
    models = ("irnn", "wrnn", "wrnn_mlp")
    assert [[number(f"{t}_{m}", "accuracy") for m in models] for t in ("smnist", "psmnist")] == [
        [98.5, 97.6, 97.5],
        [92.5, 96.7, 97.6],
    ]
    assert [number(f"nscifar10_{m}", "accuracy") for m in ("irnn", "wrnn")] == [51.3, 55.0]
    rows = {
        "wrnn": [9e-12, 1e-10, 8e-11, 1e-11],
        "wrnn_no_V": [1e-11, 2e-11, 4e-10, 4e-11],
        "wrnn_no_u": [5e-11, 3e-10, 7e-4, 6e-4],
        "wrnn_no_both": [8e-10, 1e-4, 3e-4, 7e-4],
        "irnn": [1e-4, 3e-3, 2e-3, 1e-3],
        "irnn_sigma": [1e-8, 1e-7, 2e-7, 2e-5],
        "irnn_sigma_V": [1e-7, 1e-7, 1e-6, 8e-6],
    }
    for row, values in rows.items():
        assert [number(f"copy{T}_{row}", "paper_scale") for T in (0, 10, 30, 80)] == values
    assert [number(f"{t}_wrnn", "accuracy", "rerun") for t in ("smnist", "psmnist", "nscifar10")] == [
        97.27,
        96.74,
        54.30,
    ]
    cited = {
        (p["model"], p["task"]): p["value"] for p in PAPER if p["origin"] == "cited" and p["measure"] == "accuracy"
    }
    assert (cited["LEM", "smnist"], cited["FlexTCN", "psmnist"], cited["LEM", "nscifar10"], len(cited)) == (
        99.5,
        98.6,
        60.5,
        29,
    )


def test_a_missing_or_broken_paper_json_is_said(tmp_path, monkeypatch):
    (tmp_path / "paper.json").write_text('{"number": []}')
    with pytest.raises(RecordError, match="git checkout"):
        rp.paper_numbers(tmp_path)
    monkeypatch.setattr(rp, "shipped_results", lambda: None)
    monkeypatch.setenv("WAVE_RNNS_RESULTS", str(tmp_path / "nothing"))
    with pytest.raises(RecordError, match="inside a clone"):
        rp.paper_numbers(tmp_path / "none")


# Outcomes -------------------------------------------------------------------------------------------------------------


def test_records_belong_by_key_and_not_by_name():
    stranger = replace(EXPERIMENTS["smnist_wrnn"], lr=1e-3)  # the same name, another run
    renamed = replace(EXPERIMENTS["smnist_wrnn"], name="old_name")
    records = [
        made(stranger, 0, accuracy=0.1),
        made(renamed, 1, accuracy=0.97),
        made("smnist_wrnn", 0, accuracy=0.98, recipe=99),
    ]
    o = rp.outcome("smnist_wrnn", "accuracy", records, PAPER)
    assert o.values == (97.0,) and o.seeds == (1,) and o.paper == 97.6


def test_diverged_runs_are_counted_and_not_averaged():
    records = [
        made("smnist_irnn", 0, accuracy=0.98),
        made("smnist_irnn", 7, "diverged", accuracy=0.1),
        made("smnist_irnn", 2, accuracy=0.96),
    ]
    o = rp.outcome("smnist_irnn", "accuracy", records)
    assert o.values == (98.0, 96.0) and o.diverged == 1 and rp.runs_cell(o) == "2, 1 diverged"
    only = rp.outcome("smnist_irnn", "accuracy", records[1:2])
    assert str(only) == "–" and rp.runs_cell(only) == "0, 1 diverged"


def test_unsolved_runs_are_counted():
    records = [made("adding100_wrnn", s, mse=1e-5, solved=step) for s, step in enumerate((300, 500, None))]
    o = rp.outcome("adding100_wrnn", "solved_step", records)
    assert o.values == (300, 500) and rp.solved_cell(o).endswith("(2 of 3)") and rp.runs_cell(o) == "3"
    assert rp.solved_cell(rp.outcome("adding100_wrnn", "solved_step", records[2:])) == "not solved"
    assert rp.solved_cell(rp.outcome("adding100_wrnn", "solved_step", [])) == "–"


# Tables ---------------------------------------------------------------------------------------------------------------


def test_every_table_without_records():
    for name, make in rp.TABLES.items():
        text = make([], PAPER)
        assert text.startswith("# ") and "nan" not in text and "inf" not in text, name
        for part in text.split("\n\n"):
            assert len({line.count("|") for line in part.splitlines() if line.startswith("|")}) <= 1, (
                name
            )  # rows as long as their header
    assert "No run has left a record yet" in rp.runs_table([])
    (line,) = cells(rp.table_1([], PAPER), "iRNN n=100", "700")
    assert line[2:] == ["0.16", "–", "–", "not solved", "–", "–"]


def test_table_1_puts_ours_beside_the_papers():
    records = [made("adding1000_wrnn", s, mse=m, solved=x) for s, m, x in ((0, 1.6e-4, 2100), (1, 0.8e-4, 1900))]
    (line,) = cells(rp.table_1(records, PAPER), "wRNN n=100, c=27", "1000")
    assert line == ["wRNN n=100, c=27", "1000", "6e-5", "1.2e-4 ± 5.1e-4", "+6.0e-5", "2,000", "2,000 ± 1,271", "2"]


def test_table_2_puts_ours_beside_the_papers():
    records = [made("psmnist_wrnn", s, accuracy=a) for s, a in ((0, 0.964), (1, 0.966), (2, 0.965))]
    records += [made("psmnist_irnn_bitreversal", 0, accuracy=0.9)]
    text = rp.table_2(records, PAPER)
    sequential, permuted, four = text.split("## ")[1:]
    (line,) = cells(permuted, "wRNN n=256, c=16")
    assert line == ["wRNN n=256, c=16", "47,000", "49,946", "96.7", "96.50 ± 0.25", "−0.20", "3", "96.74 ± 0.17"]
    assert cells(sequential, "wRNN n=256, c=16")[0][4] == "–"
    assert cells(permuted, "LEM (cited)")[0] == ["LEM (cited)", "68,000", "–", "96.6", "–", "–", "–", "–"]
    assert cells(four, "torch12008")[0][1:3] == ["96.50 ± 0.25", "3"] and cells(four, "bitreversal")[0] == [
        "bitreversal",
        "–",
        "–",
        "90.00",
        "1",
    ]


def test_table_3_and_4():
    records = [made("nscifar10_irnn", 0, "diverged"), made("nscifar10_wrnn_fresh", 0, accuracy=0.5)]
    text = rp.table_3(records, PAPER)
    assert (
        cells(text, "iRNN n=529")[0][-2:] == ["0, 1 diverged", "–"]
        and cells(text, "wRNN, fresh noise each time")[0][4] == "50.00"
    )
    records = [made("copy80_wrnn_no_u", 0, cross_entropy=0.128, paper_scale=0.001, accuracy=0.75)]
    (line,) = cells(rp.table_4(records, PAPER), "− u-shift-init (random)", "80")
    assert line[2:] == ["6e-4", "1.0e-3", "+4.0e-4", "0.128", "75.00", "1"]


def test_summary_and_list_of_runs():
    records = [made("copy80_irnn", 1, "diverged"), made("smnist_irnn", 0, accuracy=0.98)]
    assert cells(rp.summary_table(records, PAPER), "sMNIST (accuracy %)")[0] == [
        "sMNIST (accuracy %)",
        "97.6",
        "–",
        "–",
        "98.5",
        "98.00",
        "1",
    ]
    text = rp.runs_table(records)
    assert cells(text, "copy80_irnn")[0][2:4] == ["diverged at 17", "–"]
    assert cells(text, "smnist_irnn")[0][1:7] == ["0", "done", "98.00 accuracy", "12", "a GPU", "0123456789"]


def test_tables_are_written_once_and_for_all(tmp_path):
    for seed in (0, 1):
        write_record(tmp_path, made("smnist_wrnn", seed, accuracy=0.97 + seed / 100), [{"step": 1, "loss": 1.0}])
    first = {p.name: p.read_bytes() for p in rp.write_tables(tmp_path)}
    assert first.keys() == {f"{name}.md" for name in rp.TABLES} and b"97.50" in first["summary.md"]
    assert {p.name: p.read_bytes() for p in rp.write_tables(tmp_path)} == first
    assert not any(b"NaN" in data or b"nan" in data for data in first.values())


def test_the_committed_tables_are_those_of_the_committed_records():
    results = ex.shipped_results()
    records = ex.read_records(results)
    for name, make in rp.TABLES.items():
        text = (results / "tables" / f"{name}.md").read_text()
        assert text.startswith(make(records, PAPER)), f"{name}.md is stale: run wrnn_tables"


# Curves ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three_curves(tmp_path):
    "Three runs to step 60, and one that diverged at step 30."
    records = [made("smnist_wrnn", s, "diverged" if s == 3 else "done", accuracy=0.97) for s in range(4)]
    for s, r in enumerate(records):
        rows = [
            {"step": 10 * i, "loss": (1 + s) / i, "valid_accuracy": None if i % 2 else 0.9 + s / 100}
            for i in range(1, 7)
        ]
        write_record(tmp_path, r, rows[:2] if s == 3 else rows)
    return tmp_path, records


def test_curves_and_bands(three_curves):
    results, records = three_curves
    curves = rp.curves_of("smnist_wrnn", "valid_accuracy", records, results)
    assert curves[0] == [(20, 90.0), (40, 90.0), (60, 90.0)] and curves[3] == [(20, 93.0)]
    steps, means, low, high = zip(*rp.band(curves), strict=True)  # of those that came to the end
    half = 4.30265 / math.sqrt(3)
    assert (
        steps == (20, 40, 60) and means == pytest.approx((91,) * 3) and low == pytest.approx((91 - half,) * 3, rel=1e-6)
    )
    losses = rp.curves_of("smnist_wrnn", "loss", records, results)
    step, middle, low, high = rp.band(losses, log=True)[0]
    assert (step, middle) == (10, pytest.approx(6 ** (1 / 3))) and low * high == pytest.approx(middle**2) and low > 0
    two = rp.band({s: losses[s] for s in (0, 1)})
    assert all(lo == mid == hi for _, mid, lo, hi in two)  # no band for two seeds
    assert rp.band({}) == [] and rp.curves_of("smnist_irnn", "loss", records, results) == {}


def test_a_missing_curve_is_an_empty_line(three_curves):
    results, records = three_curves
    Run(EXPERIMENTS["smnist_wrnn"], 1).path(results, ".csv").unlink()
    assert rp.curves_of("smnist_wrnn", "loss", records, results)[1] == []


def test_figures_are_drawn_with_and_without_records(three_curves):
    results, records = three_curves
    fig, axs = plt.subplots(1, 3)
    rp.draw_curves(
        axs[0],
        {"wave": ("smnist_wrnn", "C0"), "bump": ("smnist_irnn", "C1")},
        "valid_accuracy",
        records,
        results,
        PAPER,
        "accuracy",
    )
    rp.draw_curves(axs[1], {}, "loss", [], results, log=True)
    rp.draw_outcomes(
        axs[2], {"a": (rp.Outcome("accuracy"), "C0"), "b": (rp.Outcome("accuracy", (1.0, 2.0), paper=3.0), "C1")}
    )
    dashed = [line.get_ydata()[0] for line in axs[0].lines if line.get_linestyle() == "--"]
    assert dashed == [97.6, 98.5]
    assert [t.get_text() for t in axs[0].get_legend().get_texts()] == ["wave (4 runs)", "bump (0 runs)"]
    plt.close(fig)


# Verdicts -------------------------------------------------------------------------------------------------------------


def test_verdicts():
    good, bad, none = rp.Outcome("accuracy", (97.0, 97.2)), rp.Outcome("accuracy", (10.0, 10.1)), rp.Outcome("accuracy")
    assert rp.verdict("{0} > {1}", rp.clearly_above, good, bad) == f"{good} > {bad}"
    assert rp.verdict("{0} > {1}", rp.clearly_above, good, none).startswith("Not measured yet")
    assert rp.verdict("{0}", lambda o: True, good, least=3).startswith("Not measured yet")
    with pytest.raises(AssertionError, match="the records contradict"):
        rp.verdict("{1} > {0}", lambda a, b: b.mean > a.mean, good, bad)
    one = rp.Outcome("accuracy", (99.0,))
    assert not rp.clearly_above(one, bad)  # one run is never clearly anything


def test_records_round_trip_through_json(tmp_path):
    record = made("smnist_wrnn", 0, accuracy=0.97)
    path = write_record(tmp_path, record, [{"step": 1}])
    assert ex.read_record(path) == record == json.loads(path.read_text())

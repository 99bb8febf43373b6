"Statistics against scipy, outcomes, tables and curves against hand-made records."

import functools
import math
from dataclasses import replace
from statistics import fmean, geometric_mean, stdev

import matplotlib.pyplot as plt
import pytest

import wave_rnns.paper.experiments as ex
import wave_rnns.paper.outcomes as oc
import wave_rnns.paper.records as rc
import wave_rnns.paper.reports as rp
import wave_rnns.paper.tables as tb
from wave_rnns.core import RecordError
from wave_rnns.paper.experiments import EXPERIMENTS, run_key, to_config

PAPER = oc.paper_numbers()


def made(experiment, seed, status="done", solved=None, recipe=ex.RECIPE, last=None, **metrics):
    "A sound record without training."
    e = EXPERIMENTS[experiment] if isinstance(experiment, str) else experiment
    diverged = status == "diverged"
    record = {
        "key": run_key(e, seed, recipe),
        **{"experiment": e.name, "config": to_config(e), "seed": seed, "recipe": recipe, "status": status},
        "diverged_step": 8027 if diverged else None,
        "metric": next(iter(metrics), ""),
        "selection": "highest validation score",
        **dict.fromkeys(("valid_best", "valid_final", "test_best"), metrics),
        "test_final": last or metrics,
        "best_step": None if diverged else 100,
        "steps": 100,
        "finished": "2026-01-01T00:00:00Z",
        "parameters": {"with_biases": 49_946, "without_biases": 45_824},
        "seconds": 12.0,
        "environment": {"device": "a GPU", "commit": "0123456789abcdef"},
        "solved": {"column": "loss", "threshold": 0.05, "step": solved} if e.task == "adding" else None,
    }
    return {**record, "sha256": rc.content_hash(record)}


def line(table, *start):
    "The table's line that begins with `start`, as header -> cell."
    for part in table.split("\n\n"):
        header, *rows = [[c.strip() for c in row.strip("| ").split(" | ")] for row in part.splitlines()] or [[]]
        for row in rows:
            if tuple(row[: len(start)]) == start:
                return dict(zip(header, row, strict=True))
    raise AssertionError(f"no line {start}")


def shared(name, **values):
    "Records of an experiment that differ in their values: shared(name, accuracy=(0.97, 0.98))."
    ((measure, numbers),) = values.items()
    return [made(name, seed, **{measure: v}) for seed, v in enumerate(numbers)]


def test_welch_and_equivalence_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for a, b in (((97.3, 97.4, 97.1, 97.6, 97.2), (97.0, 97.9, 97.6)), ((1.0, 2.0), (5.0, 5.1, 4.7, 9.0))):
        c = oc.welch(oc.Sample.of(a), oc.Sample.of(b), bound=0.3)
        test = functools.partial(stats.ttest_ind, equal_var=False)
        interval = test(a, b).confidence_interval(0.95)
        assert (c.p, c.low, c.high) == pytest.approx((test(a, b).pvalue, interval.low, interval.high), rel=1e-8)
        assert c.p_above == pytest.approx(test(a, b, alternative="greater").pvalue)
        above = test([x + 0.3 for x in a], b, alternative="greater").pvalue
        below = test([x - 0.3 for x in a], b, alternative="less").pvalue
        assert c.p_apart == pytest.approx(max(above, below))
    with pytest.raises(ValueError, match="two runs"):
        oc.welch(oc.Sample(1.0, math.nan, 1), oc.Sample(1.0, 1.0, 3))
    with pytest.raises(ValueError, match="nothing to test"):
        oc.welch(oc.Sample(1.0, 0.0, 3), oc.Sample(2.0, 0.0, 3))


def test_the_records_decide_what_is_said_of_fast_and_faithful():
    faithful = shared("smnist_wrnn", accuracy=(0.9730, 0.9741, 0.9725, 0.9738, 0.9733))
    assert tb.equivalence(faithful) is None
    same = shared("smnist_wrnn_fast", accuracy=(0.9736, 0.9728, 0.9745, 0.9731, 0.9740))
    assert "are equivalent within 0.3 points" in tb.equivalence(faithful + same)
    other = shared("smnist_wrnn_fast", accuracy=(0.969, 0.970, 0.968, 0.971, 0.9695))
    assert "not shown to be equivalent" in tb.equivalence(faithful + other)


def test_five_values_are_summarised():
    "Fewer are printed: notebook 18."
    values = (97.1, 97.9, 96.6, 97.4, 97.7)
    half = 2.776445 * stdev(values) / math.sqrt(5)
    low, high = fmean(values) - half, fmean(values) + half
    assert str(oc.Outcome("accuracy", values)) == f"{fmean(values):.2f} ± {stdev(values):.2f} [{low:.2f}, {high:.2f}]"
    losses = (1e-5, 2e-5, 1e-4, 3e-5, 5e-5)
    half = 2.776445 * stdev(map(math.log, losses)) / math.sqrt(5)
    center, low, high = oc.Outcome("mse", losses).center_and_interval()
    assert (center, high / center) == pytest.approx((geometric_mean(losses), math.exp(half)), rel=1e-5)


def test_numbers_as_shown():
    "Without a measure: notebook 18_outcomes."
    shown = [(97.4266, "accuracy", "97.43"), (-0.5, "valid_accuracy", "−0.50"), (-4.2e-6, "mse", "−4.2e-6")]
    for value, measure, text in [
        *shown,
        (1234.0, "solved_step", "1,234"),
        (9.96e-12, "", "1.0e-11"),
        (1234.0, "", "1.2e3"),
    ]:
        assert oc.show(value, measure) == text


def test_records_belong_by_key_and_not_by_name():
    stranger = replace(EXPERIMENTS["smnist_wrnn"], lr=1e-3)  # the same name, another run
    renamed = replace(EXPERIMENTS["smnist_wrnn"], name="old_name")
    records = [made(stranger, 0, accuracy=0.1), made(renamed, 1, accuracy=0.97)]
    records.append(made("smnist_wrnn", 0, accuracy=0.98, recipe=99))
    o = oc.outcome("smnist_wrnn", "accuracy", records, PAPER)
    assert o.values == (97.0,) and o.paper == 97.6


def test_a_diverged_run_keeps_what_validation_chose():
    "It solved the task before; what happened later is said beside it, and it has no value at the last step."
    records = [made("adding100_wrnn", s, mse=(1 + s) * 1e-5, solved=300) for s in range(4)]
    records.append(made("adding100_wrnn", 4, "diverged", solved=500, last={"mse": 1e58}, mse=9.7e-4))
    o = oc.outcome("adding100_wrnn", "mse", records)
    assert o.values[-1] == 9.7e-4 and oc.runs_text(records) == "5 of 5 solved, 1 diverged at step 8,027"
    assert oc.last_step(records, "mse") == "1.0e-5, 2.0e-5, 3.0e-5, 4.0e-5"
    row = line(tb.table_1(records, PAPER), "wRNN T=100 †")
    assert row["runs"].startswith("5 of 5") and row["ours"].startswith("4.7e-5")  # all five, geometric


def test_unsolved_runs_are_counted_and_not_tested():
    records = [made("adding100_wrnn", s, mse=1e-5, solved=step) for s, step in enumerate((300, 500, None, 400))]
    o = oc.outcome("adding100_wrnn", "solved_step", records)
    assert o.values == (300, 500, 400) and o.without == 1 and oc.runs_text(records) == "3 of 4 solved"
    assert tb.against_paper(o, oc.paper_sample("adding100_wrnn", "solved_step", PAPER))["p"] == "–"
    never = [made("adding1000_irnn", s, mse=0.16) for s in (0, 1)]
    row = line(tb.section(tb.table_1(never, PAPER), "Steps"), "iRNN T=1000")
    assert (row["paper, best"], row["paper, mean ± sd of 3"], row["runs"]) == ("never", "never", "0 of 2 solved")


def test_paper_json_is_complete_and_consistent():
    "That none of its numbers changes unseen: the committed tables, below."
    keys = {"table", "section", "task", "model", "measure", "value", "unit", "experiment", "origin", "setting", "note"}
    for p in PAPER:
        assert keys <= p.keys() <= keys | {"spread", "seeds"}, p
        assert p["origin"] in ("paper", "preprint", "cited", "rerun") and (p["value"] is None or p["value"] > 0)
        assert ("spread" in p) == (p["origin"] in ("preprint", "rerun"))
        if e := p["experiment"] and EXPERIMENTS[p["experiment"]]:
            assert e.task == p["task"] and e.task_options.get("T") == p["setting"].get("T", e.task_options.get("T"))
    named = [(p["experiment"], p["measure"], p["origin"]) for p in PAPER if p["experiment"]]
    assert len(named) == len(set(named))


# Tables ---------------------------------------------------------------------------------------------------------------


def test_every_table_without_records():
    for name, make in tb.TABLES.items():
        text = make([], PAPER)
        assert text.startswith("# ") and not any(word in text for word in ("nan", "inf", "| – | – | – |")), name
    assert "No run has left a record yet" in tb.runs_table([])
    assert "iRNN T=700" in tb.table_1([], PAPER).split("No runs:")[1]


def test_welch_against_table_7_is_in_the_tables():
    stats = pytest.importorskip("scipy.stats")
    values = (96.4, 96.6, 96.5, 96.7, 96.55)
    records = shared("psmnist_wrnn", accuracy=[v / 100 for v in values])
    p = stats.ttest_ind_from_stats(fmean(values), stdev(values), 5, 96.6, 0.10, 3, equal_var=False).pvalue
    for text, start in ((tb.table_2(records, PAPER), "wRNN †"), (tb.table_7(records, PAPER), "psmnist wRNN †")):
        row = line(text, start)
        assert row["p"] == f"{p:.2g}" and row["verdict"] == "no difference found"
    assert row["ours, mean ± sd (runs)"] == f"{fmean(values):.2f} ± {stdev(values):.2f} (5)"


def test_verdicts_have_a_direction():
    worse = shared("psmnist_wrnn", accuracy=[0.9 + s / 1000 for s in range(5)])
    worse += [made("adding700_wrnn", s, mse=1e-5, solved=9000 + s) for s in range(5)]
    text = tb.table_7(worse, PAPER)
    assert line(text, "psmnist wRNN †")["verdict"] == "worse"
    assert line(text, "adding700 wRNN †", "steps to solve")["verdict"] == "later"
    pair = shared("psmnist_wrnn", accuracy=(0.96, 0.961, 0.962)) + shared("psmnist_irnn", accuracy=(0.91, 0.92, 0.93))
    text = tb.table_7(pair, PAPER)
    assert line(text, "psMNIST")["the wRNN is"] == "better" and "nsCIFAR10" not in text.split("one-sided")[1]


def test_values_without_a_spread_and_losses_of_zero_end_no_table():
    "The preprint prints 1,000 ± 0 steps; a cross-entropy in float32 may be rounded to 0."
    equal = [made("adding200_wrnn", s, mse=1e-5, solved=1000) for s in range(5)]
    row = line(tb.table_7(equal, PAPER), "adding200 wRNN †", "steps to solve")
    cells = [row[c] for c in ("paper, mean ± sd of 3", "ours, mean ± sd (runs)", "p")]
    assert cells == ["1,000 ± 0", "1,000 ± 0 (5)", "–"]
    zeros = shared("copy0_wrnn", cross_entropy=(0.0, 0.0, 0.0)) + shared("copy0_irnn", cross_entropy=(0.1, 0.2, 0.3))
    assert line(tb.table_7(zeros, PAPER), "copy T=0")["the wRNN is"] == "better"


def test_the_best_is_compared_where_the_paper_prints_only_a_best():
    records = shared("psmnist_wrnn_mlp", accuracy=(0.970, 0.976, 0.972))
    assert line(tb.table_2(records, PAPER), "wRNN + MLP †")["verdict"] == "best reached"
    assert line(tb.table_2(records[::2], PAPER), "wRNN + MLP †")["verdict"] == "best not reached"


def test_table_4_chooses_by_validation_and_shows_all_seeds_of_the_choice():
    e = EXPERIMENTS["copy80_wrnn_no_u"]
    good, bad = (replace(e, name=f"lr{lr:.0e}".replace("-", "_"), lr=lr) for lr in (1e-2, 1e-4))
    records = [made(good, s, cross_entropy=0.128, paper_scale=0.001, accuracy=0.75) for s in (0, 1)]
    records += [made(bad, 0, cross_entropy=0.2, paper_scale=0.0016, accuracy=0.3)]
    records[2]["test_best"] = {"cross_entropy": 1e-9, "paper_scale": 1e-11, "accuracy": 1.0}  # lucky on the test set
    del records[1]["config"]["model"]["precision"]  # as in records from before there was one
    row = line(tb.table_4(records, PAPER), "− u-shift-init (random)", "80")
    assert (row["ours, same scale"], row["cross-entropy per token"]) == ("1.0e-3, 1.0e-3", "0.128, 0.128")
    cells = [row[c] for c in ("tokens right %", "lr; clip", "settings tried", "seeds")]
    assert cells == ["75.00, 75.00", "0.01; 1", "2", "2"]
    assert "T=80 (" in tb.table_4(records, PAPER) and "T=0 (wRNN n=100, c=6, − V-init," in tb.table_4(records, PAPER)


def test_a_number_that_no_float_holds_is_no_metric(tmp_path):
    "JSON's whole numbers have no end; a mean over them would have ended every table with a traceback."
    record = rc.write_record(tmp_path, made("smnist_wrnn", 0, accuracy=10**400), [{"step": 1}])
    with pytest.raises(RecordError, match="not numbers that a float holds"):
        rc.read_record(record)


def test_the_committed_tables_are_those_of_the_committed_records():
    results = rc.shipped_results()
    records = tb.with_early(rc.read_records(results), results)
    committed = {p.stem: p.read_text() for p in (results / "tables").iterdir()}
    assert committed.keys() == tb.TABLES.keys()
    for name, make in tb.TABLES.items():
        text, note = committed[name].split("\n<!-- written by wrnn_tables")
        assert text == make(records, PAPER) and note.count("\n") == 1, f"{name}.md is stale: run wrnn_tables"


@pytest.fixture
def curves(tmp_path):
    "Five runs to step 60, and one that diverged at step 20."
    records = [made("smnist_wrnn", s, "diverged" if s == 5 else "done", accuracy=0.97) for s in range(6)]
    for s, r in enumerate(records):
        valid = [None, 0.9 + s / 100] * 3
        rows = [{"step": 10 * i, "loss": (1 + s) / i, "valid_accuracy": valid[i - 1]} for i in range(1, 7)]
        rc.write_record(tmp_path, r, rows[:2] if s == 5 else rows)
    return tmp_path, records


def test_curves_and_bands(curves):
    results, records = curves
    found = rp.curves_of("smnist_wrnn", "valid_accuracy", records, results)
    assert found[0] == [(20, 90.0), (40, 90.0), (60, 90.0)] and found[5] == [(20, 95.0)]
    steps, means, low, high = zip(*rp.band(found, "accuracy"), strict=True)  # of those that came to the end
    half = 2.776445 * stdev(range(5)) / math.sqrt(5)
    assert steps == (20, 40, 60) and (means[0], low[0], high[0]) == pytest.approx((92, 92 - half, 92 + half))
    losses = rp.curves_of("smnist_wrnn", "loss", records, results)
    step, middle, low, high = rp.band(losses)[0]
    assert (step, middle) == (10, pytest.approx(120 ** (1 / 5))) and low * high == pytest.approx(middle**2)
    few = rp.band({s: losses[s] for s in range(4)})
    assert all(lo == mid == hi for _, mid, lo, hi in few)  # no band below five
    assert rp.band({}) == [] and rp.curves_of("smnist_irnn", "loss", records, results) == {}


def test_a_figure_shows_what_has_run_beside_the_papers_number(curves):
    results, records = curves
    fig, ax = plt.subplots()
    families = {"wave": ("smnist_wrnn", "C0"), "bump": ("smnist_irnn", "C1")}
    rp.draw_curves(ax, families, "valid_accuracy", records, results, PAPER, "accuracy")
    dashed = [li.get_ydata()[0] for li in ax.lines if li.get_linestyle() == "--"]
    assert dashed == [97.6]  # a model without runs is not drawn
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["wave (6 runs)"]
    plt.close(fig)


def test_the_results_strip_has_a_dot_for_each_seed(curves):
    fig, axs = plt.subplots(1, len(tb.SUMMARY))
    rp.draw_results(axs, curves[1], PAPER, {"wRNN": "C0", "iRNN": "C1"})
    at = list(tb.SUMMARY).index("smnist")
    assert [list(li.get_xdata()) for li in axs[at].lines if li.get_marker() == "o"] == [[97.0] * 6, []]
    plt.close(fig)

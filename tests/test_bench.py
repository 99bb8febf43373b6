"The benchmark's parts where they can be tried without a GPU, and its command as a user meets it."

import json
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from wave_rnns.paper import bench
from wave_rnns.paper.bench import COMPILED, EXPERIMENTS, FAST, LOOP, OURS, RIVALS, SHAPES, Clock, Shape, Trial, Way
from wave_rnns.core import ConfigError, RecordError
from wave_rnns.kernels.wave import KernelError, compile_report, nvrtc
from wave_rnns.paper.tasks import make_task

CPU = torch.device("cpu")
WAVE, DENSE = Shape(7, 5, 9, 2, 3), Shape(7, 5, 9, 0, 3)
DRIVES = [WAVE, replace(WAVE, last=False), replace(WAVE, drive="tokens", last=False), Shape(40, 5, 9, 2, 3, "rows")]


def ready(way):
    "Everything but torch.compile, which takes a compiler and many seconds."
    return "compile" not in way.name


# ---------------------------------------------------------------------------------------------------- equal work


@pytest.mark.parametrize("shape", [*DRIVES, DENSE, replace(DENSE, drive="tokens", last=False)], ids=str)
def test_every_way_is_equal_to_the_double_loop(shape):
    checked = [way for way in (OURS, *RIVALS) if way.same and way.fits(shape) and ready(way)]
    assert len(checked) >= 5
    for way in checked:
        result = Trial(way, shape, CPU).check()
        assert result["equal"] and set(result["error"]) == {"y", "u" if shape.c else "U", "V", "b"}, (way.name, result)
        assert max(result["error"].values()) < 1e-5


@pytest.mark.parametrize("wrong", ["y", "u", "V", "b"])
def test_the_check_sees_each_of_the_results(wrong):
    def build(shape, x, w):
        forward, leaves = OURS.build(shape, x, w)
        if wrong == "y":
            return lambda: forward() * 1.02, leaves
        leaves[wrong].register_hook(lambda g: g * 1.02)
        return forward, leaves

    result = Trial(Way("wrong", build), WAVE, CPU).check()
    assert not result["equal"] and result["error"][wrong] == pytest.approx(0.02, rel=0.1)


def test_a_result_that_is_not_finite_is_not_equal():
    def build(shape, x, w):
        forward, leaves = OURS.build(shape, x, w)
        return lambda: forward() / 0, leaves

    assert not Trial(Way("wrong", build), WAVE, CPU).check()["equal"]


def test_only_the_checked_samples_count_and_all_are_timed():
    trial = Trial(OURS, WAVE, CPU)
    trial.check()
    assert trial.gy[bench.SAMPLES :].abs().sum() == 0 and trial.gy[: bench.SAMPLES].abs().sum() > 0
    trial.fill()
    assert (trial.gy != 0).all()


def test_problems_repeat_and_runs_differ():
    (x, w), (again, v) = (bench.problem(replace(WAVE, R=3), CPU) for _ in "ab")
    assert torch.equal(x, again) and all(torch.equal(w[k], v[k]) for k in w)
    assert not torch.equal(w["u"][0], w["u"][1])


def test_weights_keep_the_state_alive_and_finite():
    for shape in SHAPES.values():
        states = bench.reference(replace(shape, B=4, T=200), CPU)["states"]
        assert 0.1 < states[-1].norm() / states[9].norm() < 1e3 and (states[-1] > 0).double().mean() > 0.2
    bench.reference.cache_clear()


@pytest.mark.parametrize("shape", [*DRIVES, DENSE], ids=str)
def test_several_runs_are_what_each_is_alone(shape):
    many = replace(shape, R=3)
    y, grads = Trial(OURS, many, CPU).work()
    assert y.shape == (3, *(() if shape.last else (shape.T,)), shape.B, *shape.state)
    x, w = bench.problem(many, CPU)
    one = bench.of_first_run(x)
    alone = (bench.wave_loop if shape.c else bench.dense_loop)(one, *(v[0] for v in w.values()), last=shape.last)
    torch.testing.assert_close(y[0], alone)
    assert [g.shape[0] for g in grads] == [3, 3, 3]


def test_rows_are_shared_after_the_picture():
    x, _ = bench.problem(Shape(40, 3, 9, 2, 5, "rows"), CPU)
    assert len(x.table[0]) == 8 + 32 * 3
    assert (x.index[32:] == x.index[32:, :1]).all() and x.index[:32].unique().numel() == 96


def test_flips_are_counted(monkeypatch):
    assert bench.flips("faithful", WAVE, CPU) == 0
    true = bench.reference(WAVE, CPU)
    one = true["states"].clone()
    one[3, 2, 1, 4] = 1.0 if one[3, 2, 1, 4] <= 0 else -1.0
    monkeypatch.setattr(bench, "reference", lambda *_: {**true, "states": one})
    assert bench.flips("faithful", WAVE, CPU) == 1


def test_tf32_is_restored():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), bench.tf32(True):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        Trial(OURS, WAVE, CPU).work()  # the scan has a switch of its own
        raise ZeroDivisionError
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


# ------------------------------------------------------------------------------------------------------- clocks


def test_spread():
    assert bench.spread([1.23456789] * 3) == {"median": 1.235, "low": 1.235, "high": 1.235, "repeats": 3}
    assert bench.spread([4.0, 1.0])["median"] == 2.5


def test_rounds_take_turns():
    calls = []
    laps = bench.in_rounds(lambda: calls.append("a"), lambda: calls.append("b"), seconds=0, least=4)
    assert calls == list("ab" * 5) and [len(lap) for lap in laps] == [4, 4]


def test_ratio_of_a_row_is_within_rounds():
    ours, other = {"name": "a"}, {"name": "b"}
    row = bench.compare("s", WAVE, ours, other, ([1.0, 2.0, 4.0], [3.0, 6.0, 12.0]))
    assert row["ratio"] == {"median": 3.0, "low": 3.0, "high": 3.0, "repeats": 3}
    assert bench.compare("s", WAVE, ours, other)["ratio"] is None


def test_what_fails_or_comes_too_late_is_a_row():
    def broken(shape, x, w):
        raise RuntimeError("no compiler\nand many lines of it")

    side = bench.attempt(lambda: bench.measure(Way("broken", broken), WAVE, CPU), "broken")
    assert side == {"name": "broken", "failed": "RuntimeError: no compiler"}
    rows = list(bench.rivals(CPU, Clock(-1), {"toy": WAVE, "toy iRNN": DENSE}))
    assert rows and all(row["other"]["skipped"] == "out of time" and row["ratio"] is None for row in rows)
    rows = list(bench.on_cpu(CPU, Clock(-1), {"toy": WAVE, "toy iRNN": DENSE}))
    assert len(rows) == 6 and all(row["other"]["skipped"] == "out of time" and not row["ratio"] for row in rows)


# -------------------------------------------------------------------------------------- a GPU, played by an actor


@pytest.fixture
def acted(monkeypatch):
    "torch.cuda as far as the clocks need it; every call is noted."
    log, now = [], SimpleNamespace(ms=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now.ms

        def elapsed_time(self, other):
            return other.at - self.at

    class Graph:
        def replay(self):
            log.append("replay")
            now.ms += 2

    class Stream:
        def wait_stream(self, other):
            log.append("wait_stream")

    @contextmanager
    def context(what):
        log.append(f"enter {type(what).__name__}")
        yield
        log.append(f"exit {type(what).__name__}")

    fakes = dict(Event=Event, CUDAGraph=Graph, Stream=Stream, device=context, stream=context, graph=context)
    fakes |= dict(current_stream=Stream, empty_cache=lambda: log.append("empty"), synchronize=lambda *_: None)
    fakes |= dict(reset_peak_memory_stats=lambda *_: log.append("reset"))
    fakes |= dict(memory_allocated=lambda *_: 100, max_memory_allocated=lambda *_: 350)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return SimpleNamespace(log=log, now=now)


def test_graph_is_recorded_after_a_warm_up(acted):
    def work():
        acted.log.append("work")
        return "out"

    replay = bench.captured(work, torch.device("cuda"))
    inside = acted.log[acted.log.index("enter Graph") : acted.log.index("exit Graph")]
    assert inside == ["enter Graph", "work"] and acted.log.count("work") == 2
    assert acted.log[acted.log.index("enter Graph") - 1] == "empty"  # the warm-up's memory went back
    assert replay() == "out" and acted.log[-1] == "replay"


def test_events_measure_and_memory_is_what_was_added(acted, monkeypatch):
    monkeypatch.setattr(bench, "WARM", 0.001)

    def work():
        acted.now.ms += 3.5

    assert bench.times(work, torch.device("cuda"), least=4, most=4) == [3.5] * 4
    assert bench.peak_bytes(work, torch.device("cuda")) == 250
    assert "reset" in acted.log


def test_measure_checks_the_recorded_graph(acted, monkeypatch):
    "What is recorded is what is checked and then timed; memory is looked at before."
    recorded = []

    def captured(work, device):
        recorded.append(work)
        return lambda: (acted.log.append("replay"), work())[1]

    monkeypatch.setattr(bench, "captured", captured)
    side = bench.measure(OURS, WAVE, CPU, seconds=0.01)
    assert len(recorded) == 1 and side["equal"] and side["flips"] == 0
    assert acted.log.count("replay") > 1 + side["ms"]["repeats"]
    bench.measure(LOOP, WAVE, CPU, seconds=0.01)
    assert len(recorded) == 1


def test_a_side_of_ours_names_its_backend(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "backend_for", lambda *what: asked.append(what) or SimpleNamespace())
    for shape in (WAVE, replace(WAVE, drive="tokens"), Shape(40, 5, 9, 2, 3, "rows"), DENSE):
        assert bench.backend_of(shape, "fast", CPU) == "SimpleNamespace"
    assert [(what[0], *what[3:7]) for what in asked] == [
        ("wave", 2, 9, 3, 3),
        ("rows", 2, 9, 3, 3),
        ("rows", 2, 9, 3, 8 + 32 * 5),
        ("dense", 1, 9, 0, 0),
    ]


def test_a_run_of_several_is_its_share(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "times", lambda work, *_: seen.append(work()[0].shape[0]) or [8.0] * 3)
    monkeypatch.setattr(bench, "peak_bytes", lambda *_: 400)
    side = bench.measure(replace(OURS, runs=4), WAVE, CPU)
    assert (
        seen == [4]
        and side["backend"] == "TorchBackend"
        and side["ms"]["median"] == 2.0
        and side["peak_bytes"] == 100
        and "error" not in side
    )


# -------------------------------------------------------------------------------------------------------- floors


def test_counts_by_hand():
    shape = Shape(T=10, B=4, n=100, c=27, F=2, R=3)
    fast, faithful = (bench.counts(shape, p) for p in ("fast", "faithful"))
    assert fast["bytes"] == 3 * 10 * 4 * 2700 * 4 and faithful["bytes"] == 2 * fast["bytes"]
    assert fast["mma"] == 3 * 10 * 4 * 7 * (3 * 7 * 4 * 2)  # ceil(100 / 16) = 7 tiles, 32 x 32 channels = 4 x 2 blocks
    every = bench.counts(replace(shape, last=False), "fast")
    assert every["bytes"] - fast["bytes"] == 3 * 10 * 4 * 2700 * 8


def test_floor_is_the_larger():
    floor = bench.floor_ms(WAVE, "fast", {"bytes": 1e6, "mma": 1e12})
    assert floor["floor"] == floor["bytes"] > floor["mma"]


def test_mma_kernel_compiles_and_keeps_its_accumulators():
    try:
        nvrtc()
    except KernelError as reason:
        pytest.skip(str(reason))
    report = compile_report(bench.MMA_SOURCE, {}, "sm_90", "products")["products"]
    assert report["registers"] > 38 and report["spill_stores"] == report["stack"] == 0  # 32 sums and 6 operands


# ------------------------------------------------------------------------------------------------------ training


def test_needed_memory_grows_on_a_line():
    assert bench.needed({1: 10, 4: 25}, 16) == 85 and bench.needed({}, 4) == 0 and bench.needed({4: 25}, 8) == 50


def test_runs_that_do_not_fit_are_not_tried(monkeypatch):
    monkeypatch.setattr(bench, "memory", lambda _: 2**30)
    side = {"name": "s", "ms": bench.spread([1.0]), "shape": asdict(WAVE)}
    monkeypatch.setattr(bench, "train_side", lambda name, R, *_: {**side, "peak_bytes": R * 2**27})
    rows = list(bench.training(CPU, Clock(60), ("copy0_wrnn",), (1, 4, 16)))
    tried = {row["R"] for row in rows if "ms" in row}
    assert tried == {1, 4} and "2 GiB of 1" in next(row["skipped"] for row in rows if row["R"] == 16)
    assert all(row["ratio"] > 0 and row["layer"]["ms"]["median"] > 0 for row in rows if "ms" in row)


def test_images_that_are_not_here_are_random(monkeypatch, tmp_path):
    monkeypatch.setenv("WAVE_RNNS_DATA", str(tmp_path))
    side = bench.train_side("demo_smnist_wrnn", 1, "faithful", CPU, batch_size=2, limit=4)
    assert side["random_images"] and side["epoch_seconds"] > 0 and side["run_seconds"] > side["epoch_seconds"]
    assert side["shape"]["T"] == 196


def test_duration():
    task = SimpleNamespace(steps_per_epoch=100)
    out = bench.duration(10.0, task, {"steps": 1000, "eval_every": 100}, (2.0, 10))
    assert out == {"epoch_seconds": 1.0, "valid_seconds": 2.0, "run_seconds": 30.0, "steps": 1000}


@pytest.mark.parametrize("name", bench.TRAINED)
def test_shape_of_an_experiment_is_what_its_task_gives(name):
    e = EXPERIMENTS[name]
    shape = bench.shape_of(make_task(e.task, **e.task_options), e.model, 4)
    assert (shape.c > 0) == ("wrnn" in name) and shape.R == 4 and shape.F == e.model.input_size
    assert shape.last != (e.task == "copy") and shape.B == e.task_options["batch_size"]


# --------------------------------------------------------------------------------------- records and the command


def test_cases_cover_what_is_measured():
    cases = bench.cases(["rivals", "scaling", "training"])
    assert len(cases) == len(set(cases)) and {case.shape.T for case in cases} == {2}
    for shape in SHAPES.values():
        assert {(way.name, replace(shape, T=2), "check") for way in (OURS, FAST, COMPILED)} <= set(cases)
    for _, _, shape in bench.sweep_points(SHAPES["sMNIST"]):
        assert {(way.name, replace(shape, T=2), "step") for way in (OURS, FAST)} <= set(cases)
    assert {case.shape.B for case in cases if case.what == "evaluate"} == {128, 1000}
    assert bench.cases(["cpu"]) == []


@pytest.mark.parametrize("what", ["step", "check", "evaluate"])
def test_a_case_runs_what_will_be_measured(what, monkeypatch):
    seen = []
    monkeypatch.setattr(Trial, "both", lambda self: seen.append("step"))
    monkeypatch.setattr(bench, "flips", lambda *_: seen.append("check"))
    bench.compile_case(bench.Case(OURS.name, WAVE, what), "cpu")
    assert seen == {"step": ["step"], "check": ["step", "check"], "evaluate": []}[what]


def test_a_case_that_fails_keeps_quiet(capfd):
    bench.compile_case(bench.Case("no such way", WAVE, "step"), "cpu")
    assert capfd.readouterr() == ("", "")


def test_cases_run_in_other_processes():
    assert bench.precompile([bench.Case(OURS.name, WAVE, "check")] * 2, CPU) > 0


def test_sweeps_begin_in_the_middle():
    points = bench.sweep_points(SHAPES["sMNIST"])
    assert all(getattr(shape, letter) == value for letter, value, shape in points)
    assert [p[1] for p in points if p[0] == "T"][:1] == [784] and {p[0] for p in points} == set("TBncR")
    assert points[-1][1] in (1, 16, 3136)


def test_record_is_written_after_every_row(tmp_path, monkeypatch):
    out, seen = tmp_path / "a" / "r.json", []
    rows = [bench.compare("s", WAVE, {"name": "a"}, {"name": "b", "skipped": "out of time"}) for _ in range(3)]

    def section(name, *_):
        for i, row in enumerate(rows):
            if i:
                seen.append(len(json.loads(out.read_text())["sections"][name]["rows"]))
            yield row
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "section_rows", section)
    said = []
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(CPU, out, ["cpu"], 1.0, said.append)
    assert seen == [1, 2] and len(said) == 4
    (record,) = bench.read_speed(tmp_path / "a")
    assert len(record["sections"]["cpu"]["rows"]) == 3 and record["environment"]["device"] == "cpu"
    assert "load at most" in bench.source(record)


def test_sections_share_the_time(tmp_path, monkeypatch):
    clocks = {}

    def section(name, device, clock, rates):
        clocks[name] = clock.left()
        yield {"shape": "s", "ours": {"name": "a"}, "other": {"name": "b"}, "ratio": None}

    monkeypatch.setattr(bench, "section_rows", section)
    monkeypatch.setattr(bench, "SECTIONS", {"rivals": 0.25, "training": 0.75})
    bench.run_bench(CPU, tmp_path / "r.json", ["rivals", "training"], 2.0, lambda _: None)
    assert 25 < clocks["rivals"] <= 30 and 115 < clocks["training"] <= 120  # what the first leaves goes to the second


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "speed"}', '{"kind": "run", "sections": {}}', "\ufeffnull", ""])
def test_damaged_records_are_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RecordError, match="x.json"):
        bench.read_speed(tmp_path)


def test_tables_show_dashes_and_failures():
    ours = {"name": "a", "ms": bench.spread([2.0])}
    rows = [
        bench.compare("s", WAVE, ours, {"name": "b", "ms": bench.spread([1e4])}),
        bench.compare("s", WAVE, {"name": "a"}, {"name": "c", "failed": "x"}),
        bench.compare("t", WAVE, {"name": "a"}, {"name": "b", "skipped": "out of time"}),
        bench.compare("t", WAVE, ours, {"name": "c", "ms": bench.spread([1.0]), "equal": False}),
    ]
    lines = bench.rivals_table(rows).splitlines()
    assert lines[2:] == [
        "| a | 2 ms | 2 ms |",
        "| b | 10,000 ms (5e+03) | – |",
        "| c | failed | 1 ms (0.5), not equal |",
    ]
    row = {"experiment": "e", "R": 4, "precision": "fast", "name": "n"}
    skipped = bench.training_table([row | {"skipped": "4 runs would need 9 GiB of 8"}])
    assert "4 runs would need 9 GiB of 8" in skipped
    done = row | {
        "ms": bench.spread([8.0]),
        "peak_bytes": 2**31,
        "epoch_seconds": None,
        "run_seconds": 150.0,
        "ratio": 1.2,
    }
    assert "| e, fast | 4 | 8 ms | 2 ms | 1.20 | 2.00 GiB | – | 2.5 min |" in bench.training_table([done])
    assert bench.training_table([done, done | {"R": 1}]).splitlines()[2].startswith("| e, fast | 1 |")


def test_floors_stand_below_the_ways():
    ours = {"name": "a", "ms": bench.spread([2.0])}
    rows = [bench.compare(k, s, ours, ours | {"name": "b"}) for k, s in (("wave", WAVE), ("dense", DENSE))]
    lines = bench.rivals_table(rows, rates={"bytes": 1e6, "mma": 1e12}).splitlines()
    floor = bench.time_text(bench.floor_ms(WAVE, "fast", {"bytes": 1e6, "mma": 1e12})["floor"])
    assert lines[-1] == f"| *the floor, fast* | {floor} | – |"
    assert "GiB" not in bench.rivals_table(rows, bench.gib)


def test_durations_in_words():
    assert [bench.long_text(s) for s in (None, 0.48, 123.0, 63_000.0)] == ["–", "0.48 s", "2.05 min", "17.5 h"]
    assert [bench.time_text(s) for s in (None, 0.3921, 17.54, 1883.4)] == ["–", "0.392 ms", "17.5 ms", "1,883 ms"]


def test_command_explains_itself(call):
    code, out, _ = call("wrnn_bench", "--help")
    assert code == 0 and "--sections" in out and "--minutes" in out and "double precision" in out


@pytest.mark.parametrize(
    ("args", "words", "expected"),
    [
        (["--sections", "speed"], "unknown 'speed'; choose among rivals, scaling, training, cpu", 2),
        (["--device", "cpu", "--sections", "rivals"], "on a CPU there is only 'cpu'", 2),
        (["--minutes", "-1"], "expected a positive number", 2),
        (["--device", "quantum"], "unknown device 'quantum'", 1),
    ],
)
def test_command_refuses_in_one_line(call, args, words, expected):
    code, _, err = call("wrnn_bench", *args)
    assert code == expected and words in err and len(err.strip().splitlines()) == 1, err


def test_command_writes_where_it_says(call, monkeypatch, tmp_path):
    row = {"shape": "s", "ours": {"name": "a"}, "other": {"name": "b"}, "ratio": None}
    monkeypatch.setattr(bench, "section_rows", lambda *_: iter([row]))
    monkeypatch.setenv("WAVE_RNNS_RESULTS", str(tmp_path / "results"))
    code, out, _ = call("wrnn_bench", "--device", "cpu")
    (path,) = (tmp_path / "results" / "speed").glob("*.json")
    assert code == 0 and str(path) in out and json.loads(path.read_text())["sections"]["cpu"]["rows"] == [row]
    assert (
        call("wrnn_bench", "--device", "cpu", "--out", str(tmp_path / "mine.json"))[0] == 0
        and (tmp_path / "mine.json").exists()
    )


def test_default_sections(monkeypatch):
    assert bench.chosen_sections(None, CPU) == ["cpu"]
    assert bench.chosen_sections(None, torch.device("cuda")) == ["rivals", "scaling", "training"]
    assert bench.chosen_sections("cpu, scaling,cpu", torch.device("cuda")) == ["cpu", "scaling"]
    with pytest.raises(ConfigError, match="choose among"):
        bench.chosen_sections("", CPU)


def test_other_process():
    large = bytearray(1_500_000_000)  # ours: the other process must not report it as its own
    out = bench.in_process("peak_of_process", "our scan", asdict(WAVE))
    assert bench.peak_rss() > len(large) > out["peak_bytes"] >= out["before_bytes"] > 1e7
    assert out["name"] == "our scan"


def test_last_words_of_another_process(monkeypatch):
    done = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\n  many lines\nKeyError: 'why'\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match="^KeyError: 'why'$"):
        bench.in_process("peak_of_process", "our scan", asdict(WAVE))


@pytest.mark.slow
def test_compiled_step_is_equal():
    assert Trial(COMPILED, WAVE, CPU).check()["equal"]


def test_the_loop_keeps_its_own_biases():
    "Both layers of the authors' cell have one; that of the convolution is added once a ring."
    trial = Trial(LOOP, WAVE, CPU)
    assert set(trial.leaves) == {"u", "V", "b", "u_bias"}
    _, grads = trial.work()
    b, u_bias = grads[2], grads[3]
    torch.testing.assert_close(b.view(WAVE.c, WAVE.n).sum(1), u_bias)

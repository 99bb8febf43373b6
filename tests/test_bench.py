"The benchmark's parts where they can be tried without a GPU, and its command as a user meets it."

import json

import pytest
import torch

from wave_rnns.paper import bench
from wave_rnns.paper.bench import OURS, RIVALS, Shape, Way

CPU = torch.device("cpu")
WAVE = Shape(7, 5, 9, 2, 3)


@pytest.mark.parametrize("wrong", ["y", "u", "V", "b", "not finite"])
def test_the_check_sees_each_of_the_results(wrong):
    def build(shape, x, leaves):
        forward = OURS.build(shape, x, leaves)
        if wrong in ("y", "not finite"):
            return lambda: forward() * 1.02 if wrong == "y" else forward() / 0
        leaves[wrong].register_hook(lambda g: g * 1.02)
        return forward

    found = bench.errors(Way("wrong", build), WAVE, CPU)
    assert not found["equal"]
    assert wrong == "not finite" or found["error"][wrong] == pytest.approx(0.02, rel=0.1)


def test_the_loop_keeps_its_own_bias():
    "Both layers of the authors' cell have one; that of the convolution is added once a ring."
    x, w = bench.problem(WAVE, CPU)
    h = torch.rand(WAVE.B, *WAVE.state)
    zero = bench.authors_step(h, x[0], *w.values(), torch.zeros(WAVE.c))
    more = bench.authors_step(h, x[0], *w.values(), torch.tensor([1.0, 0.0]))
    assert (more[:, 0] > zero[:, 0]).any() and torch.equal(more[:, 1], zero[:, 1])


def test_tf32_is_off_on_a_gpu(monkeypatch, tmp_path):
    "With ten bits a loop forgets its input in hundreds of steps."
    monkeypatch.setattr(bench, "machine", lambda device: {"machine": "a GPU"})
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        bench.run_bench(torch.device("cuda"), tmp_path / "r.json", {})
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_on_a_gpu_ours_is_measured_once(monkeypatch):
    timed = []

    def gpu_times(way, shape, device):
        timed.append(way.name)
        return [4.0, 5.0, 6.0] if way is OURS else [50.0, 60.0, 70.0]

    monkeypatch.setattr(bench, "gpu_times", gpu_times)
    monkeypatch.setattr(bench, "errors", lambda *_: {"error": {"y": 0.0}, "equal": True})
    ours = {"name": OURS.name}
    rows = [bench.compare("s", WAVE, way, torch.device("cuda"), ours) for way in RIVALS[:3]]
    assert timed == [OURS.name, *(way.name for way in RIVALS[:3])]
    assert [row["ratio"]["median"] for row in rows] == [12.0] * 3 and rows[0]["ours"]["ms"]["median"] == 5.0


def test_what_fails_or_is_wrong_is_a_row_too(monkeypatch):
    def build(*_):
        raise torch.OutOfMemoryError("no memory\nmany lines")

    row = bench.compare("s", WAVE, Way("large", build), CPU, {"name": OURS.name})
    assert row["ratio"] is None and row["other"]["failed"] == "OutOfMemoryError: no memory"
    assert "no memory" in bench.row_text(row)
    ms = {"ms": bench.spread([1.0])}
    row = {"shape": "s", "ours": ms, "other": {"name": "b", "equal": False, "error": {"y": 0.5}} | ms}
    assert "NOT EQUAL: {'y': 0.5}" in bench.row_text(row | {"ratio": bench.spread([1.0])})


def test_record_is_written_after_every_row(tmp_path, monkeypatch):
    out, seen = tmp_path / "r.json", []

    def compare(name, shape, way, device, ours):
        seen.append(len(json.loads(out.read_text())["sections"]["cpu"]["rows"]) if out.exists() else 0)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return {"shape": name, "ours": ours, "other": {"name": way.name, "failed": "no"}, "ratio": None}

    monkeypatch.setattr(bench, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(CPU, out, dict.fromkeys("abcd", WAVE))
    assert seen == [0, 1, 2, 3]
    (record,) = bench.read_speed(tmp_path)
    assert len(record["sections"]["cpu"]["rows"]) == 3 and record["sections"]["cpu"]["rows"][0]["ours"]["equal"]


def test_command_writes_where_it_says(call, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.run_bench, "__defaults__", (None, {"toy": WAVE}))
    monkeypatch.setenv("WAVE_RNNS_RESULTS", str(tmp_path / "results"))
    code, out, _ = call("wrnn_bench", "--device", "cpu")
    (path,) = (tmp_path / "results" / "speed").glob("*.json")
    (row,) = json.loads(path.read_text())["sections"]["cpu"]["rows"]
    assert code == 0 and str(path) in out and row["other"]["name"] == "the loop, eager" and row["ratio"]["median"] > 0
    assert call("wrnn_bench", "--device", "cpu", "--out", str(tmp_path / "mine.json"))[0] == 0
    assert (tmp_path / "mine.json").exists()

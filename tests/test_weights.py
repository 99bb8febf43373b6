"The weights that travel with the package: whole, typical, and as good on the real test images as their cards say."

import math
import shutil

import pytest
import torch
from conftest import ROOT

from wave_rnns.core import CheckpointError
from wave_rnns.paper import weights
from wave_rnns.paper.experiments import EXPERIMENTS, run_key
from wave_rnns.paper.records import read_record
from wave_rnns.paper.tasks import make_task
from wave_rnns.paper.weights import load, shipped_weights

CARDS = shipped_weights()


def evaluate(name: str, metric: str, task=None) -> float:
    "A metric on the test sequences of the card's task, or of another."
    card, model = CARDS[name], load(name)
    task = task or make_task(card["task"], **card["task_options"])
    with torch.no_grad():
        sums = [task.measure(model(x), y) for x, y in task.eval_batches("test", batch=500)]
    return sum(float(s[metric]) for s in sums) / sum(float(s["count"]) for s in sums)


RECORDED = [name for name, card in CARDS.items() if card.get("record", True)]
SMALL = [name for name in CARDS if name not in RECORDED]  # notebook 19 trained them for its page


@pytest.mark.parametrize("name", RECORDED)
def test_a_card_is_the_record_of_a_typical_run(name):
    "The one in the middle, of two the worse; diverged ones count, if they were ever validated; and it solved its task."
    card, e = CARDS[name], EXPERIMENTS[CARDS[name]["experiment"]]
    paths = [ROOT / f"nbs/results/runs/{card['task']}/{run_key(e, seed)}.json" for seed in e.seeds]
    records = [read_record(path) for path in paths if path.exists()]
    (record,) = (r for r in records if r["seed"] == card["seed"])
    assert all(card[field] == record[field] for field in ("key", "test_best", "parameters"))
    assert card["model"] == record["config"]["model"]
    assert record["solved"] is None or record["solved"]["step"] is not None
    assert sum(p.numel() for p in load(name).parameters()) == card["parameters"]["with_biases"]
    assert (len(records), card["diverged"]) == (card["of_seeds"], sum(r["status"] == "diverged" for r in records))
    more_is_better = record["selection"].startswith("highest")
    values = sorted((r["test_best"][card["metric"]] for r in records if r["test_best"]), reverse=more_is_better)
    assert values[len(values) // 2] == card["test_best"][card["metric"]]


def test_the_recorded_accuracy_on_real_test_images():
    "On the 500 published test images that travel with the package, to three standard deviations of so many draws."
    name, recorded = "psmnist-wrnn", CARDS["psmnist-wrnn"]["test_best"]["accuracy"]
    found = evaluate(name, "accuracy", make_task("digits", permutation="torch12008"))
    assert abs(found - recorded) < 3 * math.sqrt(recorded * (1 - recorded) / 500)


MEASURED = [("adding100-wrnn", "mse", dict(rel=0.05)), ("adding200-irnn", "mse", dict(rel=0.05))]
MEASURED += [(name, "accuracy", dict(abs=2e-3)) for name in SMALL]


@pytest.mark.parametrize("name, metric, tolerance", MEASURED)
def test_the_recorded_number_on_the_whole_test_set(name, metric, tolerance):
    "The wRNN was trained in the kernels' fast precision, whose rounding is a few per cent of an error of 5e-6."
    assert evaluate(name, metric) == pytest.approx(CARDS[name]["test_best"][metric], **tolerance)


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    shutil.copytree(ROOT / "wave_rnns/weights", folder)
    data = bytearray((folder / "adding100-wrnn.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adding100-wrnn.safetensors").write_bytes(data)
    monkeypatch.setattr(weights, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="damaged"):
        load("adding100-wrnn")

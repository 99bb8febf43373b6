"""What must survive and is at home in no other file: weights of earlier releases, a sweep in which a run explodes, and the promise
that each row of the table in tests/README.md still names a test that exists.

`python tests/test_survival.py` stores weights and answers of the present release in `tests/releases/VERSION`, once; they are never changed."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import wave_rnns
from wave_rnns.paper import grids, sweeps
from wave_rnns.paper.checkpoints import CheckpointFile, load_weights, save_weights
from wave_rnns.paper.experiments import Experiment
from wave_rnns.paper.models import ModelConfig, build_model
from wave_rnns.paper.records import read_records

HERE = Path(__file__).parent
RELEASES = HERE / "releases"
PROMISES = HERE / "README.md"

# ----------------------------------------------------------------------------------------- weights of earlier releases

KINDS = {
    "wrnn": ModelConfig("wrnn", 2, 3, n=12, c=2),
    "wrnn_tokens": ModelConfig("wrnn", 10, 10, n=7, c=3, every_step=True, kernel_size=5, activation="tanh"),
    "wrnn_mlp": ModelConfig("wrnn", 2, 3, n=5, c=2, readout="mlp", u_init="random", V_init="normal"),
    "irnn": ModelConfig("irnn", 2, 3, n=9),
    "local": ModelConfig("local", 2, 3, n=6, c=2),
    "mlp": ModelConfig("mlp", 12, 3, n=8),
}


def question(config: ModelConfig) -> torch.Tensor:
    "An input that no generator of random numbers has a hand in: [T=6, B=4, F], or tokens."
    if config.every_step:
        return torch.arange(24).reshape(6, 4) * 7 % 10
    return ((torch.arange(48) * 5 % 17) - 8).reshape(6, 4, 2) / 8


@pytest.mark.parametrize("folder", sorted(RELEASES.glob("*/*")), ids=lambda p: f"{p.parent.name} {p.name}")
def test_weights_of_earlier_releases_give_the_same_answers(folder):
    "In double precision, where what a library may change in the order of its sums does not show."
    model, answer = load_weights(folder), json.loads((folder / "answer.json").read_text())
    said = model.double()(question(model.config) if model.config.every_step else question(model.config).double())
    expected = torch.tensor([float.fromhex(v) for v in answer["values"]], dtype=torch.float64).reshape(answer["shape"])
    torch.testing.assert_close(said, expected, rtol=1e-9, atol=1e-12)
    single = load_weights(folder)(question(model.config))
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_every_release_has_left_its_weights():
    present = RELEASES / wave_rnns.__version__
    assert present.is_dir(), f"python {Path(__file__).name} stores those of {wave_rnns.__version__}"
    for release in RELEASES.iterdir():
        assert {p.name for p in release.iterdir()} >= {"wrnn", "irnn", "mlp"}


def store(folder: Path) -> None:
    "The weights and answers of the present release."
    for name, config in KINDS.items():
        model = build_model(config, 3)
        save_weights(folder / name, model.state_dict(), config, {"release": wave_rnns.__version__})
        x = question(config)
        said = model.double()(x if config.every_step else x.double())
        answer = {"shape": list(said.shape), "values": [v.hex() for v in said.flatten().tolist()]}
        (folder / name / "answer.json").write_text(json.dumps(answer) + "\n")


# ------------------------------------------------------------------------------------------- a run explodes, others do not


def test_a_sweep_goes_on_when_runs_explode(tmp_path, monkeypatch, tally):
    "A hopeless learning rate is recorded as diverged, with its step; every checkpoint held finite weights; the others are done."
    model = ModelConfig("wrnn", 10, 10, n=8, c=2, every_step=True)
    sizes = {"T": 1, "batch_size": 8, "valid_size": 20, "test_size": 20}
    e = Experiment("tiny", "copy", sizes, model, lr=1e-2, steps=24, eval_every=8, log_every=4)
    grid = grids.Grid("g", (e,), {"lr": [1e-2, 1e18], "clip": [0, 1]}, seeds=(0, 1), together=8)
    finite, real = [], CheckpointFile.save

    def save(self, tensors, meta):
        real(self, tensors, meta)
        finite.append(all(t.isfinite().all() for t in tensors.values()))

    monkeypatch.setattr(CheckpointFile, "save", save)
    sweeps.work(grid.runs(), tmp_path, "cpu", 8, checkpoint_seconds=0)
    assert len(finite) > 2 and all(finite)
    records = read_records(tmp_path)
    lost = [r for r in records if r["config"]["lr"] == 1e18]
    assert all(r["status"] == "diverged" and 0 < r["diverged_step"] <= 4 for r in lost)  # long before the first log
    good = [r for r in records if r["config"]["lr"] == 1e-2]
    assert all(r["status"] == "done" and r["test_best"]["cross_entropy"] > 0 for r in good)
    tally("a sweep in which runs explode", runs=8, diverged=len(lost), done=len(good))
    assert len(lost) == len(good) == 4


# --------------------------------------------------------------------------------- the table that says which test shows what


def test_every_row_of_the_table_names_tests_that_exist():
    section = PROMISES.read_text().partition("## What must survive")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"(test_\w+\.py)::(test_\w+)|tests/(gpu/check_\w+\.py)", row)
        assert named, f"no test shows this: {row}"
        for file, name, script in named:
            code = (HERE / (file or script)).read_text()
            assert script or f"\ndef {name}(" in code, f"tests/README.md names {file}::{name}, which is not there"


if __name__ == "__main__":
    target = RELEASES / wave_rnns.__version__
    sys.exit(f"{target} exists, and is never changed") if target.exists() else store(target)

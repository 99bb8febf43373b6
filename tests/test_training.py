"The trainer: equal to torch.optim, equal alone and in company, frozen when it must be, and never asking the host in a step."

import ast
import gc
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_task import RHYTHM, RUNS, WAVE, TinyTask
from torch.utils._python_dispatch import TorchDispatchMode

from wave_rnns.core import ConfigError, WaveRNNError, sha256
from wave_rnns.paper.models import ModelConfig, build_model
from wave_rnns.paper.population import Population, RunSettings
from wave_rnns.paper.provenance import code_hash, skeleton
from wave_rnns.paper.tasks import make_task
from wave_rnns.paper.training import fit


def copy_task(**options):
    return make_task("copy", **{"T": 1, "batch_size": 8, "valid_size": 20, "test_size": 20, **options})


def small(task, kind="wrnn", **options):
    size = task.input_size * (task.length if kind == "mlp" else 1)
    return ModelConfig(kind, size, task.output_size, n=9, every_step=task.every_step, **options)


def adding_task():
    return make_task("adding", T=10, batch_size=8, valid_size=20, test_size=20)


CASES = {
    "copy wrnn": (copy_task, dict(c=2)),
    "copy irnn": (copy_task, dict(kind="irnn")),
    "copy local": (copy_task, dict(kind="local", c=2)),
    "adding wrnn": (adding_task, dict(c=3)),
    "adding mlp readout": (adding_task, dict(readout="mlp")),
    "adding mlp": (adding_task, dict(kind="mlp")),
    "frozen encoder": (copy_task, dict(c=2, freeze=("encoder",))),
    "frozen recurrence": (copy_task, dict(c=2, freeze=("recurrent",))),
    "epochs": (TinyTask, dict(c=2)),
}


def with_torch_optim(task, config, run, steps):
    "The same run in PyTorch's words and double precision: losses and final weights."
    model = build_model(config, run.seed).double()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=run.lr)
    every = run.drop_every * (task.steps_per_epoch or 1) or steps + 1
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, every, 1 / run.drop_factor)
    seeds, losses = torch.tensor([run.seed]), []
    for step in range(steps):
        if task.steps_per_epoch and step % task.steps_per_epoch == 0:
            task.prepare_epoch(seeds, step // task.steps_per_epoch)
        x, y = (a[0] for a in task.train_batch(seeds, torch.tensor(step)))
        loss = task.loss(model(x.double() if x.is_floating_point() else x), y)
        optimizer.zero_grad()
        loss.backward()
        if run.clip:
            torch.nn.utils.clip_grad_norm_(trained, run.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model.state_dict()


MIXED = [  # drops after so many steps, or epochs of five steps
    RunSettings(4, 5e-3, clip=0.05, drop_factor=3.33, drop_every=3),
    RunSettings(6, 3e-3),
    RunSettings(4, 1e-3, drop_factor=10, drop_every=2),
]


@pytest.mark.parametrize("make, options", CASES.values(), ids=CASES)
def test_each_run_of_a_population_is_torch_optim(make, options):
    "In company and alone: float64, 25 steps, so what is left is the order of additions."
    config = small(make(), **options)
    rhythm = dict(steps=25, eval_every=25, log_every=1, device="cpu", dtype=torch.float64, progress=False)
    together, alone = fit(make(), config, MIXED, **rhythm), fit(make(), config, MIXED[:1], **rhythm)
    for run, r in zip([*MIXED, MIXED[0]], [*together, *alone], strict=True):
        losses, weights = with_torch_optim(make().to("cpu"), config, run, 25)
        assert [row["loss"] for row in r.curve] == pytest.approx(losses, rel=1e-9, abs=1e-12)
        assert r.weights.keys() == weights.keys()
        for k, t in weights.items():
            torch.testing.assert_close(r.weights[k], t, rtol=1e-8, atol=1e-10, msg=lambda m, k=k: f"{k}: {m}")
    assert together[0].curve != together[1].curve != together[2].curve


@pytest.mark.parametrize("step", [0, 1, 17])
def test_frozen_at_the_last_finite_weights(step):
    """A NaN in one run's batch: the step is recorded, the weights are those before it, the row before it keeps its mean.
    To the neighbour nothing happens, to the bit; its weights: notebook 13_population."""
    runs, rhythm = [RunSettings(0, 1e-2), RunSettings(1, 1e-2)], {**RHYTHM, "steps": 25}
    neighbour, r = fit(TinyTask(poison=(1, step)), WAVE, runs, **rhythm)
    assert neighbour.curve == fit(TinyTask(), WAVE, runs, **rhythm)[0].curve
    assert (neighbour.status, r.status, r.diverged_step) == ("done", "diverged", step + 1)
    p, losses = Population(TinyTask(), WAVE, runs, "cpu"), []
    for s in range(step):
        if s % TinyTask.steps_per_epoch == 0:
            p.task.prepare_epoch(p.seeds, s // TinyTask.steps_per_epoch)
        p.train_step()
        losses.append(p.read_sums()[1]["loss"])
    expected = p.weights(p.theta, 1)
    if r.best_step is None:  # nothing was validated before: then these are the weights handed out
        assert all(torch.equal(t, expected[k]) for k, t in r.weights.items())
        assert r.test_best is None and r.valid_best is None
    else:
        assert r.best_step <= step
    assert r.valid_final == p.evaluate("valid")[1] and r.test_final == p.evaluate("test")[1]
    since = step - step % rhythm["log_every"]
    if step > since:
        mean = sum(losses[since:]) / (step - since)
        assert r.curve[-1]["step"] == step and r.curve[-1]["loss"] == pytest.approx(mean, rel=1e-12)


def test_it_ends_when_all_are_dead():
    results = fit(TinyTask(), WAVE, [RunSettings(s, 1e12) for s in range(2)], **{**RHYTHM, "steps": 10**9})
    assert [r.status for r in results] == ["diverged"] * 2 and results[0].steps < 100


def test_rows_average_every_step_since_the_last():
    each = fit(TinyTask(), WAVE, RUNS[:1], **{**RHYTHM, "log_every": 1})[0].curve
    some = fit(TinyTask(), WAVE, RUNS[:1], **RHYTHM)[0].curve
    logged = [row for row in some if "loss" in row]
    assert [row["step"] for row in logged] == [6, 12, 18, 24, 30, 36, 42, 43]
    for before, row in zip([0, *(row["step"] for row in logged)], logged, strict=False):
        part = each[before : row["step"]]
        for key in ("loss", "mse"):
            assert row[key] == pytest.approx(sum(p[key] for p in part) / len(part), rel=1e-12)
    assert [row["step"] for row in some if "valid_mse" in row] == [8, 16, 24, 32, 40, 43]
    assert [row["epoch"] for row in some] == [row["step"] / 5 for row in some]
    task = TinyTask()
    fit(task, WAVE, RUNS, **{**RHYTHM, "steps": 11})
    assert task.epochs == [0, 1, 2]  # each is prepared when it begins


def test_selection_is_on_validation_and_test_is_looked_at_once():
    task = TinyTask()
    (r,) = fit(task, WAVE, [RunSettings(0, 0.05)], **RHYTHM)
    valid = {row["step"]: row["valid_mse"] for row in r.curve if "valid_mse" in row}
    assert r.valid_best == {"mse": min(valid.values())} and valid[r.best_step] == min(valid.values())
    assert r.valid_final == {"mse": valid[43]}
    first_look = task.looked_at.index("test")  # after all others: with the last weights, and with the chosen ones
    assert task.looked_at[first_look:] in (["test"], ["test", "test"])
    model = build_model(WAVE, 0)
    model.load_state_dict(r.weights)
    with torch.no_grad():
        sums = [task.measure(model(x), y) for x, y in task.eval_batches("test")]
    measured = sum(float(s["mse"]) for s in sums) / sum(float(s["count"]) for s in sums)
    assert measured == pytest.approx(r.test_best["mse"], rel=1e-6)


def test_a_run_that_is_stopped_leaves_no_rows_with_its_neighbour():
    "That it freezes at once, and is validated: notebook 13_training."
    runs, steps = [RunSettings(0, 1e-2), RunSettings(1, 0.0)], {**RHYTHM, "steps": 200}
    stopped, plodding = fit(TinyTask(), WAVE, runs, **steps, stop_when=lambda row: row["loss"] < 0.01)
    assert (stopped.status, plodding.status) == ("stopped", "done")
    assert stopped.valid_final["mse"] == stopped.curve[-1]["valid_mse"]
    assert fit(TinyTask(), WAVE, runs, **steps)[1].curve == plodding.curve


HOST = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique2", "equal", "is_nonzero", "item"}


@pytest.mark.parametrize("name", ["copy", "nscifar10"])
@pytest.mark.parametrize("kind", ["wrnn", "irnn"])
def test_a_step_never_asks_the_host(name, kind):
    "What a CUDA graph needs: no value is read back, and none is uploaded. The batches of all tasks: test_tasks.py."
    task, seen = copy_task(T=8), set()
    if name == "nscifar10":  # any pictures will do
        pictures = torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.arange(64) % 10
        task = make_task(name, batch_size=4, limit=64, pool=2).hold(dict.fromkeys(("train", "valid", "test"), pictures))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    p = Population(task, small(task, kind), [RunSettings(0, 1e-3, 1.0, 3, 4), RunSettings(1, 1e-3)], "cpu")
    p.task.prepare_epoch(p.seeds, 0)
    p.train_step()  # what is made once may be made now
    before = {k: t.data_ptr() for k, t in p.state().items()}
    with Watch():
        p.train_step()
    assert not seen & HOST, seen & HOST
    assert before == {k: t.data_ptr() for k, t in p.state().items()}  # the state stays where it is
    assert int(p.step) == 2


def test_a_graph_that_cannot_be_recorded(monkeypatch):
    "Falls back with one warning; with graph=True it is an error. The warm-up leaves no trace."
    p = Population(copy_task(), small(copy_task()), RUNS, "cpu")
    p.device = torch.device("cuda")  # pretend

    def fail(self):
        raise RuntimeError("operation not permitted when stream is capturing\nlong story")

    monkeypatch.setattr(Population, "record_step", fail)
    monkeypatch.setattr(Population, "warm_up", lambda self: [self.train_step() for _ in range(3)])
    before = {k: t.clone() for k, t in p.state().items()}
    with pytest.warns(UserWarning, match="not permitted when stream is capturing.*graph=False"):
        assert p.step_function() == p.train_step
    with pytest.raises(WaveRNNError, match="graph=False trains without one"):
        p.step_function(graph=True)
    assert p.step_function(graph=False) == p.train_step
    assert all(torch.equal(t, before[k]) for k, t in p.state().items())


SETTINGS = {"seed": (-1, 0.5, True, 2**63), "lr": (math.inf, 1e31, None), "clip": (-1, math.nan), "drop_factor": (0,)}
LENGTHS = [*((name, 0.5) for name in ("eval_every", "log_every", "checkpoint_every")), ("checkpoint_every", -1)]
CALL = dict(task=TinyTask(), model=WAVE, runs=RUNS, **RHYTHM)
REFUSED = [  # lr, drop_every, steps: notebooks 10_config and 13_population
    *((name, RunSettings, {"seed": 0, "lr": 1e-3, name: v}) for name, values in SETTINGS.items() for v in values),
    *((f"{name}: expected a whole number of at least", fit, {**CALL, name: value}) for name, value in LENGTHS),
    *((name, fit, {**CALL, "model": replace(WAVE, **{name: 2})}) for name in ("input_size", "output_size")),
    ("every_step", fit, {**CALL, "model": replace(WAVE, every_step=True)}),
    ("at least one run", fit, {**CALL, "runs": []}),
    ("train on 'cuda'", fit, {**CALL, "graph": True}),
]


@pytest.mark.parametrize("message, function, options", REFUSED)
def test_what_cannot_be_meant_is_named(message, function, options):
    with pytest.raises(ConfigError, match=message):
        function(**options)


def test_settings_have_one_form():
    assert RunSettings(0, 1, clip=2, drop_every=3.0) == RunSettings(0, 1.0, 2.0, 1.0, 3)
    assert type(RunSettings(0, 1).lr) is float and type(RunSettings(0, 1, drop_every=3.0).drop_every) is int


SOURCE = """
@dataclass
class A(B, metaclass=C):
    "Words."

    async def f(self, *args: int, y=None, **kwargs) -> str:
        return f"{self.x!r:>{args[0]}} and {y}" "joined" if y else [*args, {**kwargs}, x[1:2, ...]]

match a:
    case {"k": [1, *rest]}:
        lambda z, /: z @ rest
"""


def test_the_code_hash_is_that_of_every_python():
    "The number was taken on 3.11; `ast.unparse` and `ast.dump` say something else on 3.12 and 3.13."
    form = repr(skeleton(ast.parse(SOURCE)))
    assert sha256(form.encode())[:16] == "c93592e4b273e84e"


def test_the_code_hash_covers_folders_and_kernels(monkeypatch, tmp_path):
    package = tmp_path / "wave_rnns"
    (package / "kernels").mkdir(parents=True)
    (package / "paper").mkdir()
    names = ("cell.py", "new_room.py", "kernels/wave.cu", "kernels/common.cuh", "kernels/wave.py", "paper/tasks.py")
    without = ("paper/reports.py", "paper/grids.py", "paper/sweeps.py", "paper/workers.py", "paper/ranking.py")
    for name in names + without:
        (package / name).write_text("x = 1\n")
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    seen = {code_hash.__wrapped__()}
    for name in names + without:
        (package / name).write_text("x = 2\n")
        seen.add(code_hash.__wrapped__())
    assert len(seen) == 1 + len(names)


def test_a_huge_gradient_that_is_finite_is_clipped_and_not_called_diverged():
    p = Population(make_task("adding", T=4), ModelConfig("wrnn", 2, 1, 4), [RunSettings(0, 1e-2, 1.0)] * 2, "cpu")
    grad = torch.zeros_like(p.theta)
    grad[:, 0], grad[0, 1] = 3e25, math.nan
    before, sums = p.theta.clone(), {k: torch.ones(2) for k in ("count", *p.names)}
    p.update(torch.ones(2), sums, grad)
    assert p.running.tolist() == [False, True] and p.diverged.tolist() == [1, 0]
    assert torch.equal(p.theta[0], before[0])
    assert abs((p.m[1, 0] - 0.1).item()) < 1e-6  # a gradient of norm 1 after the clip
    assert (before[1, 0] - p.theta[1, 0]).item() == pytest.approx(1e-2, rel=1e-4)


def test_an_error_that_is_kept_holds_no_memory(monkeypatch):
    "As in a notebook, where the last error lives on while smaller populations are tried."
    seen = []

    def full(self):
        seen.append(weakref.ref(self.theta))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More")

    monkeypatch.setattr(Population, "train_step", full)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this GPU")
    with pytest.raises(WaveRNNError, match="do not fit on this GPU .CUDA out of memory.: train them in") as kept:
        fit(copy_task(), small(copy_task()), RUNS, **RHYTHM)
    gc.collect()
    assert kept.value is not None and seen[0]() is None

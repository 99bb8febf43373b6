"""Tasks: definitions against slow and plain rewritings, purity of batches, vmap, capture safety, and rows of bad input.

Image tasks hold the shipped digits and random pictures here, so that nothing needs a download. Raw data: test_data.py."""

import functools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from wave_rnns.core import ConfigError, DataError, WaveRNNError
from wave_rnns.paper import tasks
from wave_rnns.paper.arrays import ArrayTask
from wave_rnns.paper.data import load_digits
from wave_rnns.paper.experiments import read_experiment, select
from wave_rnns.paper.generated_tasks import NOT_DUE
from wave_rnns.paper.stored_tasks import PERMUTATIONS, permutation, pool_images
from wave_rnns.paper.tasks import TASKS, Task, find_task, make_task, register_task, task_options
from wave_rnns.scan import Rows

ALL_TASKS = [
    ("copy", {"T": 0}), ("copy", {"T": 7}), ("adding", {"T": 2}), ("adding", {"T": 11}), ("smnist", {}), ("psmnist", {}),
    ("psmnist", {"permutation": "bitreversal", "pool": 2}), ("digits", {}), ("digits", {"permutation": "numpy92916", "pool": 2}),
    ("nscifar10", {}), ("nscifar10", {"noise": "fresh", "pool": 2}),
]  # fmt: skip
GOALS = ["class at the end", "class at each step", "numbers at the end", "next step", "lengths", "lengths, numbers"]
ALL_TASKS += [("arrays", {"goal": goal}) for goal in GOALS]
every_task = pytest.mark.parametrize(("name", "options"), ALL_TASKS)
SEEDS = torch.tensor([0, 1, 8045])


@functools.cache
def pictures():
    "Random colour pictures in the place of CIFAR-10's."
    drawn = torch.randint(0, 256, (360, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sets = zip(("train", "valid", "test"), drawn.split([300, 30, 30]), strict=True)
    return {split: (images, torch.arange(len(images)) % 10) for split, images in sets}


def arrays(goal, n=100):
    "Noise, and something to ask about it."
    g = np.random.RandomState(1)
    x = g.standard_normal((n, 9, 2)).astype("f4")
    if goal.startswith("lengths"):
        y = g.standard_normal((n, 2)) if "numbers" in goal else g.randint(0, 3, n)
        return [s[: 3 + k % 7] for k, s in enumerate(x)], y
    y = {
        "class at the end": g.randint(0, 3, n),
        "class at each step": g.randint(0, 3, (n, 9)),
        "numbers at the end": g.standard_normal((n, 2)),
        "next step": None,
    }
    return x, y[goal]


@functools.cache
def ready(name, **options):
    "A small task, with its data read once for all tests."
    if name == "arrays":
        return ArrayTask(*arrays(options["goal"]), batch_size=8, valid=0.25, test=0.25)
    if name in ("copy", "adding"):
        return make_task(name, batch_size=8, **options)
    return make_task(name, batch_size=8, limit=40, **options).hold(pictures() if name == "nscifar10" else load_digits())


def batch_of(task, seeds, step, epoch=0):
    task.prepare_epoch(seeds, epoch)
    return task.train_batch(seeds, step)


def dense(x):
    "What a network sees, written out: [..., T, B, F] or tokens."
    return x.table[..., x.index, :] if isinstance(x, Rows) else x


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def guess_for(task, y):
    "Some output of the right shape for y, float32 and not trivial."
    shape = (*y.shape[: 1 + task.every_step], task.output_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------- every task


@every_task
def test_shapes_agree_with_the_attributes(name, options):
    task = ready(name, **options)
    x, y = batch_of(task, SEEDS, torch.tensor(2))
    seen, b = dense(x), task.every_step  # where the batch is, behind the run dimension
    assert seen.shape[:3] == (3, task.length, 8) and y.shape[1 + b] == 8
    if seen.dtype == torch.int64:
        assert seen.max() < task.input_size and seen.min() >= 0
    else:
        assert seen.shape[3] == task.input_size and seen.dtype == torch.float32
    held, target = next(task.eval_batches("valid", batch=5))
    assert dense(held).shape == (task.length, 5, *seen.shape[3:]) and target.shape[0 + b] == 5
    assert target.dtype == y.dtype and y.shape == (3, *target.shape[:b], 8, *target.shape[b + 1 :])
    assert task.sizes == {k: getattr(task, k) for k in ("input_size", "output_size", "every_step")}
    total = torch.vmap(lambda x: dense(x).double().sum(), in_dims=(task.x_dims,))(x)  # runs are where x_dims says
    torch.testing.assert_close(total, seen.double().flatten(1).sum(1))


@every_task
def test_a_batch_is_a_function_of_seed_and_step_and_nothing_else(name, options):
    task = ready(name, **options)
    torch.manual_seed(1), np.random.seed(1)
    before = torch.get_rng_state()
    x, y = batch_of(task, SEEDS, torch.tensor(3))
    held, _ = next(task.eval_batches("test", batch=3))
    assert torch.equal(before, torch.get_rng_state())  # the global random state is not moved ...
    assert np.random.randint(10**6) == np.random.RandomState(1).randint(10**6)
    torch.manual_seed(2)  # ... nor used
    x_again, y_again = batch_of(task, SEEDS, 3)
    same(dense(x), dense(x_again)), same(y, y_again)
    same(dense(next(task.eval_batches("test", batch=3))[0]), dense(held))
    alone, y_alone = batch_of(task, SEEDS[1:2], torch.tensor(3))
    same(dense(alone)[0], dense(x)[1]), same(y_alone[0], y[1])
    assert not torch.equal(dense(batch_of(task, SEEDS, torch.tensor(4))[0]), dense(x))
    assert not torch.equal(dense(x)[0], dense(x)[1])


@every_task
def test_train_batch_never_asks_the_device_for_a_value(name, options):
    "Fake tensors have no values: anything that would wait for the device (item, nonzero, bool) raises."
    task = ready(name, **options)
    task.prepare_epoch(SEEDS, 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x, y = task.train_batch(fake.from_tensor(SEEDS), fake.from_tensor(torch.tensor(2)))
        out = torch.empty(guess_for(task, y[0]).shape)
        task.loss(out, y[0]), task.measure(out, y[0])
    assert y.shape[0] == 3


@every_task
def test_loss_and_measure_under_vmap_and_their_agreement(name, options):
    task = ready(name, **options)
    _, y = batch_of(task, SEEDS, 0)
    out = torch.stack([guess_for(task, y[r]) * (r + 1) for r in range(3)])
    losses, sums = torch.vmap(task.loss)(out, y), torch.vmap(task.measure)(out, y)
    for r in range(3):
        torch.testing.assert_close(losses[r], task.loss(out[r], y[r]))
        for key, value in task.measure(out[r], y[r]).items():
            assert value.shape == () and value.dtype == torch.float64
            torch.testing.assert_close(sums[key][r], value)
    key = "mse" if task.metric == "mse" else "cross_entropy"  # what is descended is also what is reported
    torch.testing.assert_close((sums[key] / sums["count"]).float(), losses, rtol=1e-5, atol=1e-6)
    assert task.metric in sums and (name == "arrays" or (sums["count"] == 8).all())


@every_task
def test_held_out_sets_do_not_depend_on_how_they_are_read(name, options):
    "That no training sequence is among them: each purpose has its own stream, notebook 12_generated_tasks."
    task = ready(name, **options)

    def whole(split, batch):
        xs, ys = zip(*task.eval_batches(split, batch=batch, limit=20), strict=True)
        return torch.cat([dense(x) for x in xs], 1), torch.cat(ys, int(task.every_step))

    for split in ("valid", "test"):
        (x, y), (x_again, y_again) = whole(split, 7), whole(split, 20)
        same(x, x_again), same(y, y_again)
        assert y.shape[int(task.every_step)] == 20
    assert not torch.equal(whole("valid", 20)[0], whole("test", 20)[0])


@every_task
def test_a_look_under_inference_mode_does_no_harm(name, options):
    "What a task keeps can be saved for a backward pass, whoever asked for it first."
    ready.cache_clear()
    with torch.inference_mode():
        task = ready(name, **options).to("cpu")
        next(task.eval_batches("valid", batch=3))
        batch_of(task, SEEDS, 0)
    x, y = batch_of(task, SEEDS, 1)
    assert not any(v.is_inference() for v in (x if isinstance(x, Rows) else [x, y]))
    ready.cache_clear()


# ------------------------------------------------------------------------------------------------- definitions


def test_copy_measures_by_hand():
    task = make_task("copy", T=3)
    y = torch.zeros(23, 2, dtype=torch.int64)
    y[13:] = torch.arange(10)[:, None] % 8 + 1
    out = F.one_hot(y, 10).float() * 50
    out[13, 1], out[15, 1] = 0, 0  # sample 1 gets two of ten wrong: equal logits, argmax 0
    sums = {k: float(v) for k, v in task.measure(out, y).items()}
    assert sums["count"] == 2 and sums["exact"] == 1 and math.isclose(sums["accuracy"], 1.8)
    assert math.isclose(sums["cross_entropy"], 2 * math.log(10) / 23, rel_tol=1e-9)
    assert math.isclose(sums["paper_scale"] * 128, sums["cross_entropy"])


@pytest.mark.parametrize("T", [2, 3, 1001])
def test_adding_is_the_sum_of_one_marked_value_from_each_half(T):
    x, y = (v[0] for v in ready("adding", T=T).train_batch(torch.tensor([3]), 17))
    values, marks = x.unbind(-1)
    assert 0 <= values.min() and values.max() < 1 and ((marks == 0) | (marks == 1)).all()
    assert (marks[: T // 2].sum(0) == 1).all() and (marks[T // 2 :].sum(0) == 1).all()
    torch.testing.assert_close(y.flatten(), (values * marks).sum(0))


def test_tokens_are_uniform_and_markers_visit_every_pair_of_steps_alike():
    "Chi-squared, at a level of 1 in 1,000."
    tokens, _ = make_task("copy", T=0, batch_size=20_000).train_batch(torch.tensor([0]), 0)
    x, _ = make_task("adding", T=9, batch_size=40_000).train_batch(torch.tensor([0]), 0)
    first, second = x[0, :4, :, 1].argmax(0), x[0, 4:, :, 1].argmax(0)
    for drawn, kinds, most in ((tokens[0, :10].flatten() - 1, 8, 24.3), (5 * first + second, 20, 43.8)):
        counts, expected = drawn.bincount(minlength=kinds).double(), drawn.numel() / kinds
        assert len(counts) == kinds and ((counts - expected).square() / expected).sum() < most


def test_pooling_is_the_average_of_four_rounded():
    images = torch.randint(0, 256, (3, 2, 6, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sums = images.int().view(3, 2, 3, 2, 2, 2).sum((3, 5))
    pooled = pool_images(images, 2)
    assert pooled.dtype == torch.uint8 and torch.equal(pooled.long(), (sums + 2) // 4)
    assert torch.equal(pool_images(images, 1), images)


@pytest.mark.parametrize("order", [None, *PERMUTATIONS])
@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_pixels_arrive_in_the_published_order(name, order):
    name = {"digits": "digits", "mnist": "psmnist" if order else "smnist"}[name]
    task = ready(name, **{"permutation": order} if order else {})
    places = permutation(order) if order else torch.arange(784)
    for split in ("test", "valid"):
        images, labels = load_digits()[split]
        x, y = next(task.eval_batches(split, batch=9))
        assert torch.equal(y, labels[:9].long())
        assert torch.equal(x[..., 0].T, images[:9].flatten(1)[:, places].float() / 255)


def test_an_epoch_visits_each_image_at_most_once_and_drops_the_rest():
    task = make_task("smnist", limit=100, batch_size=30).hold(load_digits())
    assert task.steps_per_epoch == 3 and task.n_train == 100
    steps = (3, 4, 5)  # counted from the start of training
    seen = torch.cat([batch_of(task, torch.tensor([5]), step, epoch=1)[0][0, ..., 0].T for step in steps])
    assert len(seen.unique(dim=0)) == 90


def test_fresh_noise_differs_between_samples_steps_and_runs():
    task = ready("nscifar10", noise="fresh", pool=1)
    x, _ = batch_of(task, SEEDS, 0)
    later, _ = batch_of(task, SEEDS, 1)
    noise = torch.cat([x, later])[:, 32:].transpose(1, 2).flatten(0, 1)
    likeness = torch.corrcoef(noise.flatten(1)[:, :20_000]).fill_diagonal_(0)
    assert likeness.abs().max() < 0.04 and torch.isfinite(noise).all()  # 5 standard deviations for independent noise


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_permutations_of_any_size_and_another_one_is_noticed(name, monkeypatch):
    for n in (1, 2, 5, 196):  # 784: notebook 12_stored_tasks
        assert permutation(name, n).sort().values.tolist() == list(range(n))
    monkeypatch.setitem(PERMUTATIONS, name, "0" * 64)  # as if a library drew another one
    with pytest.raises(DataError, match=f"permutation {name}: expected sha256 0000"):
        permutation(name)


# ------------------------------------------------------------------------------------------------- arrays of one's own


@pytest.mark.parametrize("goal", GOALS)
def test_what_is_asked_follows_from_y(goal):
    task, (x, y) = ready("arrays", goal=goal), arrays(goal)
    assert task.goal == ("numbers" if "numbers" in goal else goal if y is None else "classes")
    assert task.every_step == (goal not in ("class at the end", "numbers at the end"))
    assert task.output_size == (3 if task.goal == "classes" else 2)
    together = sum(len(part) for part in task.parts)
    assert together == 100 == len({int(i) for part in task.parts for i in part})
    numbers = task.parts[1].tolist()  # validation, written out
    seen, target = next(task.eval_batches("valid"))
    for b, i in enumerate(numbers):
        n = len(x[i]) - (goal == "next step")
        assert np.array_equal(seen[:n, b], x[i][:n]) and not seen[n:, b].any()
        if goal == "next step":
            assert np.array_equal(target[:n, b], x[i][1:]) and target[n:, b].isnan().all()
        elif goal == "lengths, numbers":
            assert np.allclose(target[n - 1, b], y[i]) and target[:, b].isnan().all(1).sum() == len(target) - 1
        elif goal == "lengths":
            assert target[:, b].tolist() == [NOT_DUE] * (n - 1) + [y[i]] + [NOT_DUE] * (9 - n)
        else:
            assert np.allclose(target[:, b] if task.every_step else target[b], y[i])


def test_baselines_of_arrays_by_hand():
    words = np.array(["a", "b", "b", "b", "c", "a"] * 10)
    task = ArrayTask(np.zeros((60, 4, 1)), words, batch_size=4)
    _, _, test = task.parts
    assert list(task.classes) == ["a", "b", "c"] and task.baseline_text.endswith("commonest class, b")
    assert math.isclose(task.baseline, (words[test] == "b").mean(), rel_tol=1e-6)
    numbers = np.random.RandomState(0).standard_normal(60)
    task = ArrayTask(np.zeros((60, 4)), numbers, batch_size=4)
    train, _, test = task.parts
    assert math.isclose(task.baseline, ((numbers[test] - numbers[train].mean()) ** 2).mean(), rel_tol=1e-5)
    steps = np.tile(np.arange(5.0), (60, 1)) + numbers[:, None]  # always one more: "the same as now" costs 1
    task = ArrayTask(list(steps), batch_size=4)
    assert task.baseline_text == "the same as now" and math.isclose(task.baseline, 1, rel_tol=1e-5)


def test_the_split_and_what_it_is_known_by():
    x, y = arrays("class at the end")
    data = ArrayTask(x, y).options["data"]  # a checkpoint is of these arrays and this split, and no others
    assert data == ArrayTask(torch.from_numpy(x), torch.from_numpy(y)).options["data"]
    changed = x.copy()
    changed[3, 1, 0] += 1
    assert data not in (ArrayTask(changed, y).options["data"], ArrayTask(x, y, seed=1).options["data"])
    parts = range(60), range(60, 80), range(80, 100)  # one's own: by time, say
    task = ArrayTask(x, y, batch_size=60, split=parts)
    assert task.steps_per_epoch == 1 and [p.tolist() for p in task.parts] == [list(p) for p in parts]


@pytest.fixture
def registry(monkeypatch):
    "What a test registers is forgotten afterwards."
    monkeypatch.setattr(tasks, "TASKS", dict(TASKS))
    monkeypatch.setattr(sys, "path", list(sys.path))


MODULE = """
from pathlib import Path
from wave_rnns.paper.tasks import CopyTask
(Path(__file__).parent / "it ran").touch()
class Mine(CopyTask):
    name = "mine"
"""


def test_a_module_is_imported_only_where_it_is_trusted(tmp_path, registry, monkeypatch):
    "A name that is merely read imports nothing: only `wrnn_train FILE.json` trusts the file that it is given."
    (tmp_path / "my_own_tasks.py").write_text(MODULE)
    (tmp_path / "e.json").write_text('{"base": "adding100_wrnn", "task": "my_own_tasks:Mine"}')
    monkeypatch.chdir(tmp_path)
    name, ran = "my_own_tasks:Mine", tmp_path / "it ran"
    for untrusted in (find_task, make_task, task_options, lambda n: make_task(n, trusted=True)):
        with pytest.raises(ConfigError, match="would import a module: only a file named on the command line"):
            untrusted(name)
    for read in (read_experiment, select):
        with pytest.raises(ConfigError, match="task must be"):
            read("e.json")
    assert not ran.exists() and "my_own_tasks" not in sys.modules
    (e,) = select("e.json", trusted=True)
    assert e.task == "mine" and ran.exists() and find_task(name, trusted=True).name == "mine"
    assert make_task("mine", T=5).delay == 5  # from here on by its name


# ------------------------------------------------------------------------------------------------- bad input

X, Y = arrays("class at the end", 20)
SMALL = functools.partial(ArrayTask, batch_size=4)


def registered(bases=(Task,), **body):
    return register_task(type("T", bases, body))


def found(name):
    return find_task(name, trusted=True)


REFUSED = [  # more of them: notebooks 12_tasks and 12_generated_tasks
    (lambda: make_task(None), "task: expected one of"),
    (lambda: make_task("copy", valid_size=0), "valid_size: expected a whole number of at least 1, got 0"),
    (lambda: make_task("smnist", permutation="bitreversal"), "smnist has no option 'permutation'"),
    (lambda: make_task("smnist", limit=100), "batch_size: expected a whole number from 1 to 100, got 128"),
    (lambda: make_task("smnist", pool=3), "pool: expected a whole number from 1 to 2, got 3"),
    (lambda: make_task("digits", limit=2001), "limit: expected a whole number from 1 to 2000, got 2001"),
    (lambda: make_task("digits", permutation="mine"), "permutation: expected one of 'torch12008', 'torch5544'"),
    (lambda: make_task("nscifar10", limit=47_001), "limit: expected a whole number from 1 to 47000, got 47001"),
    (lambda: next(make_task("copy").eval_batches("train")), "split: expected one of 'valid', 'test'"),
    (lambda: next(make_task("digits").eval_batches(None)), "split: expected one of 'valid', 'test'"),
    (lambda: next(make_task("copy").eval_batches("valid", batch=0)), "batch: expected a whole number of at least 1"),
    (lambda: next(make_task("digits").eval_batches("valid", batch=0)), "batch: expected a whole number of at least 1"),
    (lambda: SMALL([]), "x: no sequences"),
    (lambda: SMALL(np.zeros((5, 4, 2, 1))), "x[0]: expected shape [T, F], got [4, 2, 1]"),
    (lambda: SMALL([np.zeros((4, 2)), np.zeros((4, 3))]), "x[1]: expected shape [T, 2], got [4, 3]"),
    (lambda: SMALL([np.zeros(4), np.zeros(0)]), "x[1]: expected shape [T, 1], got [0, 1]"),
    (lambda: SMALL([np.zeros(4), np.array([0, np.nan])]), "x[1] has values that are not finite"),
    (lambda: SMALL([np.zeros(4), np.zeros(1)]), "x[1]: the next step needs two steps or more"),
    (lambda: SMALL(X, Y[:-1]), "y: expected one for each of 20 sequences, got 19"),
    (lambda: SMALL(X, np.zeros((20, 5), int)), "y[0]: expected 9 steps as in x, got 5"),
    (lambda: SMALL(X, np.full(20, np.inf)), "y[0] has values that are not finite"),
    (lambda: SMALL(X, Y, batch_size=50), "batch_size: expected a whole number from 1 to 14, got 50"),
    (lambda: SMALL(X, Y, valid=0.6, test=0.4), "valid=0.6, test=0.4: expected shares that leave some of 20"),
    (lambda: SMALL(X, Y, valid=0), "valid=0, test=0.15: expected shares"),
    (lambda: SMALL(X, Y, split=([0, 1], [1], [2])), "split: expected three lists of numbers from 0 to 19"),
    (lambda: SMALL(X, Y, split=([0], [1], [20])), "split: expected three lists"),
    (lambda: SMALL(X, Y, split=([0], [1])), "split: expected three lists"),
    (lambda: registered(bases=(), name="t"), "expected a subclass of Task"),
    (lambda: registered(name="No Name"), "T.name: expected lower-case letters, digits and under"),
    (lambda: registered(name="copy"), "T.name: 'copy' is another task's name already"),
    (lambda: registered(name="t", __init__=lambda self, T: None), "the option 'T' needs a default"),
    (lambda: found("json:NoSuchClass"), "cannot be imported: module 'json' has no attribute 'NoSuchClass'"),
    (lambda: found("json:dumps"), "expected a subclass of Task"),
    (lambda: found("os;x:y"), "expected a name, or 'module:Class'"),
    (lambda: found(":"), "expected a name, or 'module:Class'"),
]


@pytest.mark.parametrize("ask, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_meant_is_one_line(ask, message, registry):
    with pytest.raises(ConfigError) as caught:
        ask()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_without_its_epoch_and_images_of_another_set_are_refused():
    task = make_task("digits")
    with pytest.raises(WaveRNNError, match="digits: call prepare_epoch"):
        task.train_batch(SEEDS, 0)
    task.prepare_epoch(SEEDS[:2], 0)
    with pytest.raises(WaveRNNError, match="with these 3 seeds"):
        task.train_batch(SEEDS, 0)
    with pytest.raises(DataError, match="smnist: 57,000 training images expected, got 2,000"):
        make_task("smnist").hold(load_digits())

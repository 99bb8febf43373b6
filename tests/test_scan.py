"The operator against its definition: an independent float64 loop, and every way PyTorch has of calling a function."

import inspect
import itertools
import math
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from wave_rnns import cell as cells
from wave_rnns import scan, scan_operator
from wave_rnns.core import ConfigError
from wave_rnns.layer import IdentityRNN, LocalRNN, WaveRNN
from wave_rnns.scan import Rows, ScanError, dense_scan, reference_loop, rows, wave_scan
from wave_rnns.scan_cpu import TorchBackend
from wave_rnns.scan_operator import BACKENDS, BackendError, backend_for, full_precision

SCANS = {"wave": wave_scan, "dense": dense_scan}
both_scans = pytest.mark.parametrize("kind", SCANS)
ACT = {"relu": lambda z: z.clamp(min=0), "tanh": torch.tanh, "identity": lambda z: z}
NEEDS_2_13 = pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.compile cannot do it before torch 2.13")
FORMS = ("float", "tokens", "rows", "table")  # a short table, and one too long to be multiplied by one-hot columns
TABLE = {"rows": 5, "table": 80}


def inputs(kind, T=7, B=3, c=2, n=5, k=3, F=2, form="float", dtype=torch.float64, seed=0):
    "Arguments of a scan by name; kernel and matrix neither grow nor shrink the state much."
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=dtype)
    F = 4 if form == "tokens" else F
    if kind == "wave":
        a = dict(u=draw(c, c, k) / (c * k) ** 0.5, V=draw(c, n, F), b=0.3 * draw(c, n), h_0=draw(B, c, n))
    else:
        a = dict(U=draw(n, n) / n**0.5, V=draw(n, F), b=0.3 * draw(n), h_0=draw(B, n))
    many = TABLE.get(form, F)
    index = torch.randint(0, many, (T, B), generator=g)
    if form in TABLE:
        return dict(table=draw(many, F), index=index) | a
    x = draw(T, B, F) if form == "float" else index
    return dict(x=x) | a


def reference(a, activation="relu", last=False):
    "The recurrence written with indices only; every tensor of shape [B, c, n] (dense: [B, m])."
    V, b, kernel = a["V"], a["b"], a.get("u", a.get("U"))
    if "table" in a:
        x = a["table"][a["index"]]
    else:
        x = a["x"] if a["x"].is_floating_point() else torch.eye(V.shape[-1], dtype=V.dtype)[a["x"]]
    h, states = a["h_0"] if a["h_0"] is not None else x.new_zeros(x.shape[1], *b.shape), []
    if "u" in a:
        n, k = b.shape[1], kernel.shape[2]
        reads = (torch.arange(n)[:, None] + torch.arange(k) - k // 2) % n  # neuron x reads x - k//2 ... x + k//2
        move = lambda h: torch.einsum("oik,bixk->box", kernel, h[:, :, reads])  # noqa: E731
    else:
        move = lambda h: torch.einsum("ij,bj->bi", kernel, h)  # noqa: E731
    for t in range(len(x)):
        h = ACT[activation](move(h) + torch.einsum("...f,bf->b...", V, x[t]) + b)
        states.append(h)
    return h if last else torch.stack(states)


def call(kind, a, **options):
    "A scan; a table becomes Rows."
    a = dict(a)
    if "table" in a:
        a["x"] = rows(a.pop("table"), a.pop("index"))
    return SCANS[kind](**a, **options)


def trainable(a, but=()):
    "Copies that ask for a gradient, where one exists."
    learns = {k: v is not None and v.is_floating_point() and k not in but for k, v in a.items()}
    return {k: v.detach().clone().requires_grad_() if learns[k] else v for k, v in a.items()}


def value_and_gradients(function, a, but=()):
    "By name: the value, and gradients with a random weight for each number of it."
    t = trainable(a, but)
    y = function(t)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype))
    grads = {name: v.grad for name, v in t.items() if v is not None and (v.requires_grad or name in but)}
    return {"value": y.detach()} | grads


def same(function, other, a, **tolerance):
    "Value and every gradient of two functions of the same arguments."
    got, want = value_and_gradients(function, a), value_and_gradients(other, a)
    for name, t in want.items():
        assert_close(got[name], t, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def stacked(each):
    "The arguments of several calls, one behind the other in a new first dimension."
    return {k: torch.stack([a[k] for a in each]) for k in each[0]}


def one(a, r):
    return {k: v[r] for k, v in a.items()}


def covering(count, **values):
    "Cases that bring together as many pairs of values as so few can, none too large for a test; drawn, always alike."
    draw, cases, seen = random.Random(0), [], set()
    while len(cases) < count:
        tried = [{k: draw.choice(v) for k, v in values.items()} for _ in range(30)]
        fit = [a for a in tried if math.prod(a.get(k, 1) for k in "TBnc") <= 2**19 and a["n"] >= a.get("k", 1)]
        new = [set(itertools.combinations(case.items(), 2)) - seen for case in fit]
        best = max(range(len(fit)), key=lambda i: len(new[i]))
        cases.append(fit[best])
        seen |= new[best]
    return cases


ALL = dict(form=FORMS, last=(False, True), h_0=(False, True), activation=tuple(ACT))
SIZES = dict(T=(1, 2, 15, 63, 300), B=(1, 3, 128), n=(1, 2, 3, 100, 256))
CASES = covering(32, kind=("wave",), **SIZES, k=(1, 3, 5, 7), c=(1, 6, 16, 27), **ALL)
CASES += covering(16, kind=("dense",), **SIZES, **ALL)
PAPER = dict(kind="wave", B=128, k=3, h_0=False, activation="relu")
CASES += [
    dict(T=40, n=100, c=6, form="tokens", last=False, **PAPER),  # copy
    dict(T=15, n=100, c=27, form="float", last=True, **PAPER),  # adding
    dict(T=15, n=256, c=16, form="float", last=True, **PAPER),  # sMNIST
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_scan_is_the_loop_in_value_and_gradients(case):
    options, sizes = {k: case[k] for k in ("activation", "last")}, {k: case[k] for k in case if k not in ALL}
    a = inputs(form=case["form"], **sizes)
    a = a if case["h_0"] else a | dict(h_0=None)
    same(lambda a: call(case["kind"], a, **options), lambda a: reference(a, **options), a)


@both_scans
@pytest.mark.parametrize("T, B", [(300, 3), (63, 128)])
def test_float32_keeps_float32_precision(kind, T, B):
    a = inputs(kind, T, B, c=6, n=100, dtype=torch.float32)
    exact = {k: v.double() for k, v in a.items()}  # tanh: a flipped ReLU mask would be the reference's noise, not ours
    got = value_and_gradients(lambda a: call(kind, a, activation="tanh"), a)
    want = value_and_gradients(lambda a: reference(a, "tanh"), exact)
    off = {k: ((got[k].double() - t).norm() / t.norm()).item() for k, t in want.items()}
    assert got["value"].dtype == torch.float32 and off.pop("value") < 1e-6
    assert max(off.values()) < 1e-5


# vmap and compile: what a population and a compiler ask of an operator. A gradient for each sample: notebook 03_scan


SHARED = [("float", ""), ("tokens", ""), ("float", "x"), ("float", "uUVb"), ("float", ["h_0"]), ("rows", ["index"])]


@both_scans
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("form, common", SHARED)
def test_vmap_is_one_run_after_the_other(kind, last, runs, form, common):
    "What the runs share has the sum of their gradients."
    each = [inputs(kind, form=form, seed=seed) for seed in range(runs)]
    a = {k: v if k in common else torch.stack([b[k] for b in each]) for k, v in each[0].items()}
    run, dims = partial(call, kind, last=last), {k: None if k in common else 0 for k in a}
    own = lambda a, r: {k: v if k in common else v[r] for k, v in a.items()}  # noqa: E731
    same(torch.func.vmap(run, in_dims=(dims,)), lambda a: torch.stack([run(own(a, r)) for r in range(runs)]), a)


@both_scans
def test_vmap_inside_vmap(kind):
    "The inner one over the second dimension, in front and behind."
    run = partial(call, kind, last=True)
    a = stacked([stacked([inputs(kind, seed=3 * i + j) for j in range(3)]) for i in range(2)])
    inner = torch.func.vmap(run, in_dims=1, out_dims=1)
    mapped = lambda a: torch.func.vmap(inner)({k: v.transpose(1, 2) for k, v in a.items()})  # noqa: E731
    row = lambda a: torch.stack([run(one(a, j)) for j in range(3)], 1)  # noqa: E731
    same(mapped, lambda a: torch.stack([row(one(a, i)) for i in range(2)]), a)


@both_scans
def test_activation_checkpointing_and_inference_mode(kind):
    a, run = inputs(kind), partial(call, kind)
    again = lambda a: checkpoint(lambda *t: SCANS[kind](*t), *a.values(), use_reentrant=False)  # noqa: E731
    same(again, run, a, rtol=0, atol=0)
    with torch.inference_mode():
        inferred = run(a)
    assert torch.equal(inferred, run(trainable(a)))


def op_arguments(kind, keep):
    "Two runs of four steps and three samples; two rings of five neurons, or five units."
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).requires_grad_(keep)  # noqa: E731
    if kind == "wave":
        return draw(1, 4, 3, 2), draw(2, 2, 2, 3), draw(2, 2, 5, 2), draw(2, 2, 5), draw(2, 3, 2, 5)
    if kind == "rows":
        index = torch.randint(0, 4, (2, 4, 3), generator=g)
        return index, None, None, draw(2, 4, 2, 5), draw(2, 2, 2, 3), draw(2, 3, 2, 5)
    return draw(2, 4, 3, 5), draw(2, 5, 5), draw(2, 3, 5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["wave", "rows", "dense"])
def test_opcheck(kind, last):
    forward, backward = (getattr(torch.ops.wave_rnns, f"{kind}_{way}").default for way in ("forward", "backward"))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for keep in (False, True):
        arguments = (*op_arguments(kind, keep), "relu", last, keep, "faithful")
        torch.library.opcheck(forward, arguments, test_utils=tests)
    tensors, need_x = op_arguments(kind, False), (True,) if kind == "wave" else ()
    y, kept = forward(*tensors, "relu", last, True, "faithful")
    arguments = (torch.rand_like(y), *tensors, y, kept, "relu", last, "faithful", *need_x)
    torch.library.opcheck(backward, arguments, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize(
    "kind, form, last", [("wave", "float", False), ("wave", "rows", True), ("dense", "tokens", True)]
)
def test_compile_fullgraph_of_any_length(kind, form, last):
    torch._dynamo.reset()
    run = partial(call, kind, last=last)
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for T, B in [(6, 4), (11, 3)]:
        same(compiled, run, inputs(kind, T, B, form=form, dtype=torch.float32))


@NEEDS_2_13
@both_scans
def test_compile_of_a_population(kind):
    torch._dynamo.reset()
    runs = torch.func.vmap(partial(call, kind, last=True))
    a = stacked([inputs(kind, seed=s, dtype=torch.float32) for s in range(3)])
    same(torch.compile(runs, fullgraph=True), runs, a)


# Precision, streaming, strides, what is trained


@both_scans
def test_autocast_computes_in_float32_and_backward_inside_it_too(kind):
    a, run = inputs(kind, dtype=torch.float32), partial(call, kind)
    want, rounded = value_and_gradients(run, a), {k: a[k].bfloat16() for k in ("x", "h_0")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, half = value_and_gradients(run, a), run(a | rounded)
    assert got["value"].dtype == half.dtype == torch.float32
    for name in ("value", "u" if kind == "wave" else "U"):
        assert torch.equal(got[name], want[name])
    assert_close(half, run(a | {k: v.float() for k, v in rounded.items()}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_scans
def test_half_precision_weights_are_computed_in_float32(kind, dtype):
    a = {k: v.to(dtype) for k, v in inputs(kind).items()}
    y = call(kind, a)
    assert y.dtype == dtype and torch.equal(y, call(kind, {k: v.float() for k, v in a.items()}).to(dtype))


@both_scans
def test_what_is_allowed_elsewhere_does_not_reach_the_recurrence(kind, monkeypatch):
    "TF32 and bfloat16 are off inside, in many threads, and allowed again behind the last, also when an error leads out."
    allowed, seen, forward = ["tf32", "bf16"], [], getattr(TorchBackend, f"{kind}_forward")
    precisions = lambda: [switch.fp32_precision for switch in scan_operator._SWITCHES]  # noqa: E731

    def set_precisions(values):
        for switch, value in zip(scan_operator._SWITCHES, values, strict=True):
            switch.fp32_precision = value

    def look(self, *args):
        seen.append(precisions())
        y = forward(self, *args)
        seen.append(precisions())
        return y

    monkeypatch.setattr(TorchBackend, f"{kind}_forward", look)
    a, before = inputs(kind, T=2), precisions()
    try:
        set_precisions(allowed)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: SCANS[kind](**a), range(100)))
        assert precisions() == allowed and seen == [["ieee", "ieee"]] * 200
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert precisions() == allowed
    finally:
        set_precisions(before)


@both_scans
def test_strides_do_not_matter(kind):
    a = inputs(kind)
    turned = {k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in a.items()}
    wide = {k: torch.stack([v, v], -1)[..., 0] for k, v in a.items()}
    for strange in (turned, wide):
        assert not any(v.is_contiguous() for v in strange.values() if v.dim() > 1)
        same(partial(call, kind, activation="tanh"), lambda a: reference(a, "tanh"), strange)
    t = trainable(a)
    call(kind, t).sum().backward()  # an expanded gradient: all strides zero
    grads = torch.func.grad(lambda a: reference(a).sum())(a)
    for name in a:
        assert_close(t[name].grad, grads[name])


@both_scans
@pytest.mark.parametrize("frozen", [("x",), ("u", "U"), ("V", "b"), ("x", "u", "U", "V", "b")])
def test_only_what_is_trained_gets_a_gradient(kind, frozen):
    a = inputs(kind)
    got, want = value_and_gradients(partial(call, kind), a, frozen), value_and_gradients(reference, a)
    assert all(got[name] is None for name in frozen if name in a)
    assert_close({k: t for k, t in got.items() if k not in frozen}, {k: t for k, t in want.items() if k not in frozen})


def test_a_backward_may_be_asked_for_twice():
    a = trainable(inputs("wave"))
    y = wave_scan(**a)
    first = torch.autograd.grad(y.square().sum(), a["u"], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.square().sum(), a["u"])[0], first)


@pytest.mark.parametrize("form", FORMS)
@both_scans
def test_states_are_kept_only_if_somebody_may_ask_for_a_gradient(kind, form, monkeypatch):
    name = "rows" if kind == "wave" and form != "float" else kind
    kept, forward = [], getattr(TorchBackend, f"{name}_forward")

    def spy(self, *args):
        kept.append(args[-2])
        return forward(self, *args)

    monkeypatch.setattr(TorchBackend, f"{name}_forward", spy)
    a, run = inputs(kind, form=form), partial(call, kind)
    two = stacked([a, a])
    run(a)
    with torch.no_grad():
        run(trainable(a))
    torch.func.vmap(run)(two)
    assert kept == [False, False, False]
    run(trainable(a))
    torch.func.vmap(run)(trainable(two))
    torch.func.grad(lambda b: run(a | dict(b=b)).sum())(a["b"])
    assert kept[3:] == [True, True, True]


@pytest.mark.parametrize("half", ["forward", "backward"])
@pytest.mark.parametrize("kind, form", [("wave", "float"), ("wave", "rows"), ("dense", "float")])
def test_a_backend_that_fails_gives_way_to_the_next(kind, form, half, monkeypatch):
    "Whichever half fails: value and gradients are the next one's, the user is told once, and it is not asked again."
    name, asked = "rows" if form == "rows" else kind, []

    class Fails(TorchBackend):
        "Keeps its states in an order of its own."

    def forward(self, *args):
        y, kept = getattr(super(Fails, self), f"{name}_forward")(*args)
        return y, kept.flatten(1)

    def fail(self, *args):
        asked.append(half)
        raise BackendError("this is an example")

    setattr(Fails, f"{name}_forward", forward)
    setattr(Fails, f"{name}_{half}", fail)
    for used in ("_FAILED", "_WARNED"):
        monkeypatch.setattr(scan_operator, used, set())
    a, run = inputs(kind, form=form), partial(call, kind, last=True)
    want, again = value_and_gradients(run, a), [trainable(a) for _ in range(2)]
    with monkeypatch.context() as more, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        more.setitem(BACKENDS, "fails", Fails())
        backend_for.cache_clear()
        losses = [run(t).sum() for t in again]  # both wait for their backward pass
        torch.stack(losses).sum().backward()
        assert_close(value_and_gradients(run, a), want, rtol=0, atol=0)
    backend_for.cache_clear()
    grads = torch.func.grad(lambda b: run(a | dict(b=b)).sum())(a["b"])
    assert all(torch.equal(t["b"].grad, grads) for t in again)
    assert asked == [half] and ["this is an example" in str(w.message) for w in seen] == [True]


@both_scans
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_loop_has_all_derivatives_and_the_same_checks(kind, form):
    a, run = inputs(kind, form=form), partial(call, kind, activation="tanh")
    with reference_loop():
        same(partial(run, last=True), lambda a: reference(a, "tanh", True), a)
        t = trainable(a)
        (first,) = torch.autograd.grad(run(t).square().sum(), t["b"], create_graph=True)
        first.square().sum().backward()
        with pytest.raises(ScanError, match="Expected hidden size"):
            run(a | dict(h_0=a["h_0"][:1]))
    assert t["b"].grad.abs().sum() > 0
    assert "Backward" in str(run(trainable(a)).grad_fn)


# One step, one home

LAYERS = {
    "wave": (lambda: WaveRNN(2, 5, c=3), ("wave_step", (4, 3, 5), (3, 3, 3), "relu")),
    "local": (lambda: LocalRNN(2, 86, c=3), ("wave_step", (4, 3, 86), (86, 3, 3, 3), "relu")),
    "dense": (lambda: IdentityRNN(2, 5), ("dense_step", (4, 5), (5, 5), "relu")),
}


@pytest.mark.parametrize("make, expected", LAYERS.values(), ids=LAYERS)
def test_cells_loops_and_layers_on_the_reference_path_share_one_step(make, expected, monkeypatch):
    steps = []  # every call of the two steps, in the one place where cells and loops find them
    for name in ("wave_step", "dense_step"):
        step = getattr(cells, name)

        def recorder(h, drive, weights, activation, name=name, step=step):
            steps.append((name, tuple(h.shape), tuple(weights.shape), activation))
            return step(h, drive, weights, activation)

        monkeypatch.setattr(cells, name, recorder)
    layer, x = make(), torch.randn(6, 4, 2)
    with reference_loop():
        output, _ = layer(x)
    assert steps == [expected] * 6  # every step of the layer
    cell, h = layer.cells[0], torch.zeros(expected[1])
    for x_t in x:
        h = cell(x_t, h)
    assert steps == [expected] * 12
    assert_close(h.flatten(1), output[-1])
    if not isinstance(layer, LocalRNN):  # which, of this size, has no other way
        assert_close(layer(x)[0], output)
        assert len(steps) == 12  # the operator has its own


@pytest.mark.parametrize("make", [lambda: WaveRNN(2, 5, c=3), lambda: IdentityRNN(2, 5)], ids=SCANS)
def test_few_functions_of_ours_stand_between_a_layer_and_its_backend(make, monkeypatch):
    "Four, the layer's forward included; in a population six."
    package, stacks = str(Path(scan.__file__).parent), []
    for name in ("wave_forward", "dense_forward"):
        forward = getattr(TorchBackend, name)

        def spy(self, *args, forward=forward):
            stacks.append([f.function for f in inspect.stack()[1:] if f.filename.startswith(package)])
            return forward(self, *args)

        monkeypatch.setattr(TorchBackend, name, spy)
    layer, x = make(), torch.randn(6, 4, 2)
    loss = lambda p: torch.func.functional_call(layer, p, (x,))[0].sum()  # noqa: E731
    population, _ = torch.func.stack_module_state([make() for _ in range(3)])
    layer(x)
    torch.func.vmap(loss)(population)
    torch.func.vmap(torch.func.grad(loss))(population)
    assert len(stacks) == 3 and all(stack[-1] == "forward" for stack in stacks)
    assert [len(stack) <= limit for stack, limit in zip(stacks, (4, 6, 6), strict=True)] == [True] * 3, stacks


# Bad calls


@both_scans
def test_an_integer_out_of_range_is_an_error_in_a_population(kind):
    a = stacked([inputs(kind, form="tokens", seed=s) for s in range(2)])
    a["x"][1, 2, 0] = 4
    with pytest.raises(ScanError, match="from 0 to 3, got 0 to 4"):
        torch.func.vmap(partial(call, kind))(a)


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


GOOD = {kind: inputs(kind) for kind in SCANS}
TOKENS = zeros(7, 3, dtype=torch.int64)
ONE_BELOW, ONE_ABOVE = (TOKENS.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(i)) for i in (-1, 4))
BAD = [  # more of them, and a compiled program that raises them: notebook 03_scan
    ("wave", dict(x=zeros(0, 3, 2)), "sequence length T of at least 1, got 0"),
    ("wave", dict(x=zeros(7, 0, 2), h_0=None), "batch size B of at least 1, got 0"),
    ("wave", dict(x=zeros(7, 2)), "x: expected shape [T, B, F]"),
    ("wave", dict(x=[1.0, 2.0]), "x: expected a Tensor, got list"),
    ("wave", dict(h_0=GOOD["wave"]["h_0"].float()), "h_0: expected torch.float64 like the weights, got torch.float32"),
    ("wave", dict(b=zeros(2, 5).to("meta")), "b: expected a tensor on cpu like the weights, got one on meta"),
    ("wave", dict(u=zeros(2, 3, 3)), "u: expected shape [c, c, k] with c = 2, got [2, 3, 3]"),
    ("wave", dict(u=zeros(2, 2, 2)), "odd number k of taps, at most n = 5, got k = 2"),
    ("wave", dict(V=zeros(10, 2)), "V: expected shape [c, n, F]"),
    ("wave", dict(b=zeros(5)), "b: expected shape [c, n] with c = 2, n = 5, got [5]"),
    ("wave", dict(precision="half"), "precision: expected one of 'faithful', 'fast', got 'half'"),
    *((kind, dict(x=ONE_ABOVE), "x: expected integers from 0 to 1, got 0 to 4") for kind in SCANS),
    *((kind, dict(x=ONE_BELOW), "x: expected integers from 0 to 1, got -1 to 0") for kind in SCANS),
    *((kind, dict(x=Rows(zeros(4, 2), ONE_ABOVE)), "x: expected integers from 0 to 3, got 0 to 4") for kind in SCANS),
    ("wave", dict(x=TOKENS.int()), "x (tokens): expected torch.int64, got torch.int32"),
    ("wave", dict(x=TOKENS[0]), "x (tokens): expected shape [T, B]"),
    ("wave", dict(x=rows(zeros(4, 7), TOKENS)), "x.table: expected shape [rows, F]"),
    ("wave", dict(x=rows(zeros(4, 2).float(), TOKENS)), "x.table: expected torch.float64"),
    ("wave", dict(x=Rows(zeros(4, 2), TOKENS, TOKENS)), "both order and offsets"),
    ("dense", dict(U=zeros(5, 3)), "U: expected shape [m, m]"),
    ("dense", dict(V=zeros(3, 2)), "V: expected shape [m, F] with m = 5"),
    ("dense", dict(h_0=zeros(1, 5)), "Expected hidden size (3, 5), got [1, 5]"),
    ("dense", dict(x=zeros(7, 3, 2).float()), "x: expected torch.float64"),
]


@pytest.mark.parametrize("kind, change, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_a_bad_call_says_what_was_expected(kind, change, message):
    with pytest.raises((ScanError, ConfigError, TypeError)) as error:
        SCANS[kind](**GOOD[kind] | change)
    assert message in str(error.value)


@pytest.mark.parametrize("T", [1, 7, 100, 128])
def test_a_product_in_pieces_of_time_is_the_product(T):
    "What a GPU does for encoders and readouts, in value and gradients, for several runs too."
    g = torch.Generator().manual_seed(T)
    draw = lambda *shape: torch.randn(3, *shape, generator=g, dtype=torch.float64)  # noqa: E731
    a = dict(x=draw(T, 4, 5), W=draw(6, 5), b=draw(6))
    runs = lambda product: lambda a: torch.vmap(product)(*a.values())  # noqa: E731
    same(runs(scan._in_pieces), runs(torch.nn.functional.linear), a)

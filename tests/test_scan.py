"The operator against its definition: an independent float64 loop, and every way PyTorch has of calling a function."

import inspect
import itertools
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from wave_rnns import cell as cells
from wave_rnns import scan
from wave_rnns.core import ConfigError
from wave_rnns.layer import IdentityRNN, LocalRNN, WaveRNN
from wave_rnns.scan import Rows, ScanError, dense_scan, reference_loop, rows, wave_scan
from wave_rnns.scan_cpu import TorchBackend

SCANS = {"wave": wave_scan, "dense": dense_scan}
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


def reference(a, activation, last):
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


def call(function, a, **options):
    "Call a scan or a loop; a table becomes Rows."
    a = dict(a)
    if "table" in a:
        a["x"] = rows(a.pop("table"), a.pop("index"))
    return function(**a, **options)


def trainable(a):
    "Copies that ask for a gradient, where one exists."
    return {
        k: v.detach().clone().requires_grad_() if v is not None and v.is_floating_point() else v for k, v in a.items()
    }


def same_gradients(got, want, **tolerance):
    for name, t in want.items():
        if t is not None and t.is_floating_point():
            assert_close(got[name].grad, t.grad, msg=lambda m, name=name: f"d{name}: {m}", **tolerance)


def compare(function, a, activation, last):
    "Value and every named gradient of `function` against the reference."
    want, got = trainable(a), trainable(a)
    y, z = reference(want, activation, last), call(function, got, activation=activation, last=last)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    y.backward(gy)
    z.backward(gy)
    assert_close(z, y, msg=lambda m: f"value: {m}")
    same_gradients(got, want)


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
WAVES = covering(32, **SIZES, k=(1, 3, 5, 7), c=(1, 6, 16, 27), **ALL)
WAVES += [
    dict(T=40, B=128, n=100, k=3, c=6, form="tokens", last=False, h_0=False, activation="relu"),  # copy
    dict(T=15, B=128, n=100, k=3, c=27, form="float", last=True, h_0=False, activation="relu"),  # adding
    dict(T=15, B=128, n=256, k=3, c=16, form="float", last=True, h_0=False, activation="relu"),  # sMNIST
]
DENSES = covering(16, **SIZES, **ALL)


def check(kind, form, last, h_0, activation, **sizes):
    a = inputs(kind, form=form, **sizes)
    compare(SCANS[kind], a if h_0 else a | dict(h_0=None), activation, last)


@pytest.mark.parametrize("case", WAVES, ids=lambda case: "-".join(map(str, case.values())))
def test_wave_scan_is_the_loop_in_value_and_gradients(case):
    check("wave", **case)


@pytest.mark.parametrize("case", DENSES, ids=lambda case: "-".join(map(str, case.values())))
def test_dense_scan_is_the_loop_in_value_and_gradients(case):
    check("dense", **case)


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("T, B", [(300, 3), (63, 128)])
def test_float32_keeps_float32_precision(kind, T, B):
    a = inputs(kind, T, B, c=6, n=100, dtype=torch.float32)
    exact = {k: v.double() for k, v in a.items()}
    got, want = trainable(a), trainable(exact)  # tanh: a flipped ReLU mask would be the reference's noise, not ours
    z, y = call(SCANS[kind], got, activation="tanh"), reference(want, "tanh", False)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    y.backward(gy)
    z.backward(gy.float())
    off = lambda p, q: ((p.double() - q).norm() / q.norm()).item()  # noqa: E731
    assert z.dtype == torch.float32 and off(z, y) < 1e-6
    assert {name: off(t.grad, want[name].grad) < 1e-5 for name, t in got.items()} == dict.fromkeys(got, True)


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("form", ["float", "tokens"])
def test_vmap_is_one_run_after_the_other(kind, last, runs, form):
    each = [inputs(kind, form=form, seed=seed) for seed in range(runs)]
    stacked = trainable({k: torch.stack([a[k] for a in each]) for k in each[0]})
    y = torch.func.vmap(lambda a: call(SCANS[kind], a, last=last))(stacked)
    gy = torch.randn_like(y)
    y.backward(gy)
    for r, a in enumerate(each):
        alone = trainable(a)
        y_r = call(SCANS[kind], alone, last=last)
        y_r.backward(gy[r])
        assert_close(y[r], y_r)
        for name, t in alone.items():
            if t.is_floating_point():
                assert_close(stacked[name].grad[r], t.grad, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("kind", SCANS)
def test_vmap_inside_vmap(kind):
    grid = [[inputs(kind, seed=3 * i + j) for j in range(3)] for i in range(2)]
    a = {k: torch.stack([torch.stack([one[k] for one in row]) for row in grid]) for k in grid[0][0]}
    a = trainable(a)
    function = lambda a: SCANS[kind](**a, last=True)  # noqa: E731
    y = torch.func.vmap(torch.func.vmap(function, in_dims=1 if kind == "wave" else 0, out_dims=1))(
        {k: v if kind == "dense" else v.transpose(1, 1 + min(1, v.dim() - 2)) for k, v in a.items()}
    )
    y.sum().backward()
    for i in range(2):
        for j in range(3):
            alone = trainable({k: v.detach()[i, j] for k, v in a.items()})
            y_ij = function(alone)
            y_ij.sum().backward()
            assert_close(y[i, :, j], y_ij)
            for name, t in alone.items():
                assert_close(a[name].grad[i, j], t.grad, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("shared", ["x", "weights", "h_0"])
def test_vmap_with_something_shared_sums_its_gradient(kind, shared):
    each = [inputs(kind, seed=s) for s in range(3)]
    common = {"x": ("x",), "weights": ("u", "U", "V", "b"), "h_0": ("h_0",)}[shared]
    a = trainable({k: each[0][k] if k in common else torch.stack([e[k] for e in each]) for k in each[0]})
    dims = ({k: None if k in common else 0 for k in a},)
    torch.func.vmap(lambda a: SCANS[kind](**a), in_dims=dims)(a).square().sum().backward()
    b = trainable({k: v.detach() for k, v in a.items()})
    for r in range(3):
        SCANS[kind](**{k: v if k in common else v[r] for k, v in b.items()}).square().sum().backward()
    same_gradients(a, b)


def test_vmap_of_rows_with_a_shared_index():
    index = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(0))
    each = [inputs("wave", 6, 4, form="rows", seed=s) | dict(index=index) for s in range(3)]
    a = {k: torch.stack([e[k] for e in each]) for k in each[0] if k != "index"}
    shared = rows(a["table"][0], index)
    x, dims = Rows(a.pop("table"), *shared[1:]), Rows(0, None, None, None)
    y = torch.func.vmap(lambda x, a: wave_scan(x, **a), in_dims=(dims, 0))(x, a)
    for r, e in enumerate(each):
        assert_close(y[r], call(wave_scan, e))


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("last", [False, True])
def test_func_grad_and_a_gradient_for_each_sample(kind, last):
    a = inputs(kind)
    x, h_0 = a.pop("x"), a.pop("h_0")
    loss = lambda a, x, h_0: SCANS[kind](x, **a, h_0=h_0, last=last).square().sum()  # noqa: E731
    whole = torch.func.grad(loss)(a, x, h_0)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1, 0))(a, x.unsqueeze(2), h_0.unsqueeze(1))
    t = trainable(a)
    loss(t, x, h_0).backward()
    for name in a:
        assert_close(whole[name], t[name].grad)
        assert_close(each[name].sum(0), t[name].grad, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("kind", SCANS)
def test_a_whole_jacobian(kind):
    a = inputs(kind, T=4, B=2)
    function = lambda f: lambda x: f(a | dict(x=x))  # noqa: E731
    got = torch.func.jacrev(function(lambda a: SCANS[kind](**a, last=True)))(a["x"])
    assert_close(got, torch.func.jacrev(function(lambda a: reference(a, "relu", True)))(a["x"]))


@pytest.mark.parametrize("kind", SCANS)
def test_activation_checkpointing_and_inference_mode(kind):
    a, b = trainable(inputs(kind)), trainable(inputs(kind))
    y = SCANS[kind](**a)
    z = checkpoint(lambda *t: SCANS[kind](*t), *b.values(), use_reentrant=False)
    y.sum().backward()
    z.sum().backward()
    for name in a:
        assert torch.equal(a[name].grad, b[name].grad)
    with torch.inference_mode():
        assert torch.equal(SCANS[kind](**a), y)


def op_arguments(kind, keep, R=2, T=4, B=3, c=2, n=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype).requires_grad_(keep)  # noqa: E731
    if kind == "wave":
        return draw(1, T, B, 2), draw(R, c, c, 3), draw(R, c, n, 2), draw(R, c, n), draw(R, B, c, n)
    if kind == "rows":
        index = torch.randint(0, 4, (R, T, B), generator=g)
        return index, None, None, draw(R, 4, c, n), draw(R, c, c, 3), draw(R, B, c, n)
    return draw(R, T, B, n), draw(R, n, n), draw(R, B, n)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["wave", "rows", "dense"])
def test_opcheck(kind, keep, last):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    op = getattr(torch.ops.wave_rnns, f"{kind}_forward").default
    torch.library.opcheck(op, (*op_arguments(kind, keep), "relu", last, keep, "faithful"), test_utils=tests)


@pytest.mark.parametrize("kind", ["wave", "rows", "dense"])
def test_opcheck_of_the_gradient(kind):
    forward, backward = (getattr(torch.ops.wave_rnns, f"{kind}_{way}").default for way in ("forward", "backward"))
    tensors = op_arguments(kind, False)
    y, kept = forward(*tensors, "relu", False, True, "faithful")
    need_x = (True,) if kind == "wave" else ()
    arguments = (torch.rand_like(y), *tensors, y, kept, "relu", False, "faithful", *need_x)
    torch.library.opcheck(backward, arguments, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize(
    "kind, form, last", [("wave", "float", False), ("wave", "rows", True), ("dense", "tokens", True)]
)
def test_compile_fullgraph_of_any_length(kind, form, last):
    torch._dynamo.reset()
    compiled = torch.compile(partial(call, SCANS[kind], last=last), fullgraph=True, dynamic=True)
    for T, B in [(6, 4), (11, 3)]:
        a = inputs(kind, T, B, form=form, dtype=torch.float32)
        got, want = trainable(a), trainable(a)
        y, z = call(SCANS[kind], want, last=last), compiled(got)
        assert_close(z, y)
        y.square().sum().backward()
        z.square().sum().backward()
        same_gradients(got, want)


@NEEDS_2_13
@pytest.mark.parametrize("kind", SCANS)
def test_compile_of_a_population(kind):
    torch._dynamo.reset()
    each = [inputs(kind, seed=s, dtype=torch.float32) for s in range(3)]
    got = trainable({k: torch.stack([a[k] for a in each]) for k in each[0]})
    want = trainable(got)
    runs = torch.func.vmap(lambda a: SCANS[kind](**a, last=True))
    y, z = runs(want), torch.compile(runs, fullgraph=True)(got)
    assert_close(z, y)
    y.square().sum().backward()
    z.square().sum().backward()
    same_gradients(got, want)


@pytest.mark.parametrize("kind", SCANS)
def test_autocast_computes_in_float32_and_backward_inside_it_too(kind):
    a = inputs(kind, dtype=torch.float32)
    got, want = trainable(a), trainable(a)
    y = SCANS[kind](**want)
    y.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = SCANS[kind](**got)
        half = SCANS[kind](**got | dict(x=got["x"].bfloat16(), h_0=got["h_0"].bfloat16()))
        z.sum().backward()
    assert z.dtype == half.dtype == torch.float32
    assert torch.equal(z, y)
    recurrent = "u" if kind == "wave" else "U"
    assert torch.equal(got[recurrent].grad, want[recurrent].grad)
    assert_close(half, SCANS[kind](**a | dict(x=a["x"].bfloat16().float(), h_0=a["h_0"].bfloat16().float())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SCANS)
def test_half_precision_weights_are_computed_in_float32(kind, dtype):
    a = {k: v.to(dtype) for k, v in inputs(kind).items()}
    y = SCANS[kind](**a)
    assert y.dtype == dtype and torch.equal(y, SCANS[kind](**{k: v.float() for k, v in a.items()}).to(dtype))


def test_what_the_user_allows_elsewhere_does_not_reach_the_recurrence():
    a = inputs("wave", 20, 32, 16, 40, dtype=torch.float32)
    y, before = wave_scan(**a), torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("medium")
        z = wave_scan(**a)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = before
    assert torch.equal(y, z)


@pytest.mark.parametrize("kind", SCANS)
def test_streaming_in_pieces_gives_value_and_gradients_of_the_whole(kind):
    a, b = trainable(inputs(kind, T=23)), trainable(inputs(kind, T=23))
    whole = SCANS[kind](**a)
    h, parts = b["h_0"], []
    for piece in b["x"].split([1, 2, 7, 13]):
        parts.append(SCANS[kind](**b | dict(x=piece, h_0=h)))
        h = parts[-1][-1]
    assert_close(torch.cat(parts), whole)
    whole.square().sum().backward()
    torch.cat(parts).square().sum().backward()
    same_gradients(b, a)


@pytest.mark.parametrize("kind", SCANS)
def test_strides_do_not_matter(kind):
    a = inputs(kind)
    turned = {k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in a.items()}
    assert not any(v.is_contiguous() for v in turned.values() if v.dim() > 1)
    compare(SCANS[kind], turned, "relu", False)
    wide = {k: torch.stack([v, v], -1)[..., 0] for k, v in a.items()}
    compare(SCANS[kind], wide, "tanh", True)
    y = SCANS[kind](**trainable(a))
    y.sum().backward()  # an expanded gradient: all strides zero


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("frozen", ["x", "recurrent", "encoder", "all but h_0"])
def test_only_what_is_trained_gets_a_gradient(kind, frozen):
    off = {"x": {"x"}, "recurrent": {"u", "U"}, "encoder": {"V", "b"}, "all but h_0": {"x", "u", "U", "V", "b"}}[frozen]
    a = inputs(kind)
    got = {k: v.clone().requires_grad_(k not in off) for k, v in a.items()}
    want = trainable(a)
    SCANS[kind](**got).square().sum().backward()
    reference(want, "relu", False).square().sum().backward()
    for name in a:
        if name in off:
            assert got[name].grad is None
        else:
            assert_close(got[name].grad, want[name].grad)


# Memory that one call keeps must never be another call's.

BIG = dict(T=40, B=32, c=4, n=64)


def test_several_forwards_may_live_at_once():
    kinds = [("wave", s) for s in range(3)] + [("dense", s) for s in range(2)]
    alone = [trainable(inputs(kind, **BIG, seed=s)) for kind, s in kinds]
    for (kind, _), a in zip(kinds, alone, strict=True):
        SCANS[kind](**a, last=kind == "wave").square().mean().backward()
    together = [trainable(inputs(kind, **BIG, seed=s)) for kind, s in kinds]
    ys = [SCANS[kind](**a, last=kind == "wave") for (kind, _), a in zip(kinds, together, strict=True)]
    kept = [y.detach().clone() for y in ys]
    for i in (2, 0, 4, 3, 1):  # not in the order of the forwards
        ys[i].square().mean().backward()
    for y, z in zip(ys, kept, strict=True):
        assert torch.equal(y, z)
    for a, b in zip(alone, together, strict=True):
        for name in a:
            assert torch.equal(a[name].grad, b[name].grad), name


def test_a_backward_may_be_asked_for_twice():
    a = trainable(inputs("wave", **BIG))
    y = wave_scan(**a)
    first = torch.autograd.grad(y.square().sum(), a["u"], retain_graph=True)[0]
    wave_scan(**inputs("wave", **BIG, seed=1))  # in between, others work
    assert torch.equal(torch.autograd.grad(y.square().sum(), a["u"])[0], first)


def test_threads_do_not_disturb_each_other():
    def gradient(seed):
        torch.set_num_threads(1)
        start.wait()
        grads = []
        for i in range(4):
            a = trainable(inputs("wave", **BIG, seed=4 * seed + i))
            wave_scan(**a, last=True).sum().backward()
            grads.append(a["u"].grad)
        return grads

    start = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(gradient, range(3)))
    start = threading.Barrier(1)
    for seed, grads in enumerate(together):
        for g, h in zip(grads, gradient(seed), strict=True):
            assert torch.equal(g, h)


@pytest.fixture
def kept(monkeypatch):
    "What the CPU's backend was asked to keep, call by call."
    asked = []
    for name in ("wave", "rows", "dense"):
        forward = getattr(TorchBackend, f"{name}_forward")

        def spy(self, *args, forward=forward):
            asked.append(args[-2])
            return forward(self, *args)

        monkeypatch.setattr(TorchBackend, f"{name}_forward", spy)
    return asked


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SCANS)
def test_states_are_kept_only_if_somebody_may_ask_for_a_gradient(kind, form, kept):
    a = inputs(kind, form=form)
    call(SCANS[kind], a)
    with torch.no_grad():
        call(SCANS[kind], trainable(a))
    stacked = {k: torch.stack([v, v]) for k, v in a.items()}
    torch.func.vmap(lambda a: call(SCANS[kind], a))(stacked)
    assert kept == [False, False, False]
    call(SCANS[kind], trainable(a))
    torch.func.vmap(lambda a: call(SCANS[kind], a))(trainable(stacked))
    torch.func.grad(lambda b: call(SCANS[kind], a | dict(b=b)).sum())(a["b"])
    assert kept[3:] == [True, True, True]


# One step, one home


@pytest.fixture
def steps(monkeypatch):
    "Every call of the two steps by name, in the one place where cells and loops find them."
    calls = []
    for name in ("wave_step", "dense_step"):
        step = getattr(cells, name)

        def recorder(h, drive, weights, activation, name=name, step=step):
            calls.append((name, tuple(h.shape), tuple(weights.shape), activation))
            return step(h, drive, weights, activation)

        monkeypatch.setattr(cells, name, recorder)
    return calls


LAYERS = {
    "wave": (lambda: WaveRNN(2, 5, c=3), ("wave_step", (4, 3, 5), (3, 3, 3), "relu")),
    "local": (lambda: LocalRNN(2, 86, c=3), ("wave_step", (4, 3, 86), (86, 3, 3, 3), "relu")),
    "dense": (lambda: IdentityRNN(2, 5), ("dense_step", (4, 5), (5, 5), "relu")),
}


@pytest.mark.parametrize("make, expected", LAYERS.values(), ids=LAYERS)
def test_cells_loops_and_layers_on_the_reference_path_share_one_step(make, expected, steps):
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


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_loop_has_all_derivatives_and_the_same_checks(kind, form):
    a = inputs(kind, form=form)
    with reference_loop():
        compare(SCANS[kind], a, "tanh", True)
        t = trainable(a)
        (first,) = torch.autograd.grad(
            call(SCANS[kind], t, activation="tanh").square().sum(), t["b"], create_graph=True
        )
        first.square().sum().backward()
        with pytest.raises(ScanError, match="Expected hidden size"):
            call(SCANS[kind], a | dict(h_0=a["h_0"][:1]))
    assert t["b"].grad.abs().sum() > 0
    assert call(SCANS[kind], trainable(a)).grad_fn is not None


# How far it is from a layer to a backend


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


# Precision


def test_full_precision_is_counted_across_threads():
    "The first in remembers the switch, the last out restores it, whatever happens in between."
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with scan.full_precision():
            inside.set()
            assert leave.wait(30)

    try:
        switch.fp32_precision = "tf32"
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(stay)
            assert inside.wait(30)
            with pytest.raises(KeyError), scan.full_precision():
                raise KeyError
            assert switch.fp32_precision == "ieee"  # the other one still computes
            switch.fp32_precision = "tf32"  # who changes it now waits for the last one to leave
            with scan.full_precision():
                assert switch.fp32_precision == "ieee"
            assert switch.fp32_precision == "ieee"
            leave.set()
            other.result()
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


def test_scans_in_many_threads_never_see_tf32(monkeypatch):
    seen, forward = set(), TorchBackend.dense_forward

    def look(self, *args):
        seen.add(torch.backends.cuda.matmul.fp32_precision)
        y = forward(self, *args)
        seen.add(torch.backends.cuda.matmul.fp32_precision)
        return y

    monkeypatch.setattr(TorchBackend, "dense_forward", look)
    before = torch.backends.cuda.matmul.fp32_precision
    a = inputs("dense", T=2)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: dense_scan(**a), range(200)))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen == {"ieee"}


# Integers out of range


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_2_13)])
@pytest.mark.parametrize("form", ["tokens", "rows"])
@pytest.mark.parametrize("kind", SCANS)
def test_an_integer_out_of_range_is_an_error_in_both_scans_compiled_or_not(kind, form, compiled):
    torch._dynamo.reset()
    function, a = SCANS[kind], inputs(kind, form=form)
    if form == "rows":
        a["x"] = rows(a.pop("table"), a.pop("index"))
    if compiled:
        function = torch.compile(function, fullgraph=True)
        assert_close(function(**a), SCANS[kind](**a))
    for wrong in (-1, 4 if form == "tokens" else 5):
        index = (a["x"] if form == "tokens" else a["x"].index).clone()
        index[3, 1] = wrong
        bad = a | dict(x=index if form == "tokens" else a["x"]._replace(index=index))
        with pytest.raises(ScanError, match="x: expected integers from 0 to"):
            function(**bad)


@pytest.mark.parametrize("kind", SCANS)
def test_an_integer_out_of_range_is_an_error_in_a_population(kind):
    each = [inputs(kind, form="tokens", seed=s) for s in range(2)]
    stacked = {k: torch.stack([a[k] for a in each]) for k in each[0]}
    stacked["x"][1, 2, 0] = 4
    with pytest.raises(ScanError, match="from 0 to 3, got 0 to 4"):
        torch.func.vmap(lambda a: SCANS[kind](**a))(stacked)


GOOD = inputs("wave")
TOKENS = torch.zeros(7, 3, dtype=torch.int64)
BAD = {
    "no step": (dict(x=torch.zeros(0, 3, 2).double()), "sequence length T of at least 1, got 0"),
    "no sample": (dict(x=torch.zeros(7, 0, 2).double(), h_0=None), "batch size B of at least 1, got 0"),
    "features": (
        dict(x=torch.zeros(7, 3, 5).double()),
        "x: expected shape [T, B, F] with T = 7, B = 3, F = 2, got [7, 3, 5]",
    ),
    "dimensions": (dict(x=torch.zeros(7, 2).double()), "x: expected shape [T, B, F]"),
    "not a tensor": (dict(x=[1.0, 2.0]), "x: expected a Tensor, got list"),
    "float64 input": (dict(u=GOOD["u"].float(), V=GOOD["V"].float(), b=GOOD["b"].float()), "x: expected torch.float32"),
    "float32 state": (dict(h_0=GOOD["h_0"].float()), "h_0: expected torch.float64 like the weights, got torch.float32"),
    "half input": (dict(x=GOOD["x"].half()), "x: expected torch.float64 like the weights, got torch.float16"),
    "device": (dict(b=GOOD["b"].to("meta")), "b: expected a tensor on cpu like the weights, got one on meta"),
    "rings in and out": (
        dict(u=torch.zeros(2, 3, 3).double()),
        "u: expected shape [c, c, k] with c = 2, got [2, 3, 3]",
    ),
    "even kernel": (dict(u=torch.zeros(2, 2, 2).double()), "odd number k of taps, at most n = 5, got k = 2"),
    "small ring": (dict(u=torch.zeros(2, 2, 7).double()), "at most n = 5, got k = 7"),
    "encoder": (dict(V=torch.zeros(10, 2).double()), "V: expected shape [c, n, F]"),
    "bias": (dict(b=torch.zeros(5).double()), "b: expected shape [c, n] with c = 2, n = 5, got [5]"),
    "flat state": (dict(h_0=torch.zeros(3, 10).double()), "Expected hidden size (3, 2, 5), got [3, 10]"),
    "batch of state": (dict(h_0=torch.zeros(1, 2, 5).double()), "Expected hidden size (3, 2, 5), got [1, 2, 5]"),
    "activation": (dict(activation="gelu"), "activation: expected one of 'relu', 'tanh', 'identity', got 'gelu'"),
    "precision": (dict(precision="half"), "precision: expected one of 'faithful', 'fast', got 'half'"),
    "token too large": (dict(x=TOKENS + 2), "x: expected integers from 0 to 1, got 2 to 2"),
    "token negative": (dict(x=TOKENS - 1), "x: expected integers from 0 to 1, got -1 to -1"),
    "token dtype": (dict(x=TOKENS.int()), "x (tokens): expected torch.int64, got torch.int32"),
    "token shape": (dict(x=TOKENS[0]), "x (tokens): expected shape [T, B]"),
    "table": (dict(x=rows(torch.zeros(4, 7).double(), TOKENS)), "x.table: expected shape [rows, F]"),
    "table dtype": (dict(x=rows(torch.zeros(4, 2), TOKENS)), "x.table: expected torch.float64"),
    "order alone": (dict(x=rows(torch.zeros(4, 2).double(), TOKENS)._replace(offsets=None)), "both order and offsets"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_a_bad_call_says_what_was_expected(change, message):
    with pytest.raises((ScanError, ConfigError, TypeError)) as error:
        wave_scan(**GOOD | change)
    assert message in str(error.value)


def test_a_bad_dense_call_says_what_was_expected():
    good = inputs("dense")
    x, U, V, h_0 = good["x"], good["U"], good["V"], good["h_0"]
    for change, message in [
        (dict(U=U[:, :3]), "U: expected shape [m, m]"),
        (dict(V=V[:3]), "V: expected shape [m, F] with m = 5"),
        (dict(h_0=h_0[:1]), "Expected hidden size (3, 5), got [1, 5]"),
        (dict(x=x.float()), "x: expected torch.float64"),
        (dict(x=x[:0]), "sequence length T"),
    ]:
        with pytest.raises(ScanError) as error:
            dense_scan(**good | change)
        assert message in str(error.value)


@pytest.mark.parametrize("T", [1, 7, 100, 128])
def test_a_product_in_pieces_of_time_is_the_product(T):
    "What a GPU does for encoders and readouts, in value and gradients, for several runs too."
    g = torch.Generator().manual_seed(T)
    runs = [torch.randn(3, *s, generator=g, dtype=torch.float64) for s in ((T, 4, 5), (6, 5), (6,))]

    def grads(product):
        loss = lambda *one: product(*one).square().sum()  # noqa: E731
        return torch.vmap(torch.func.grad_and_value(loss, argnums=(0, 1, 2)))(*runs)

    (pieces, value), (whole, expected) = grads(scan._in_pieces), grads(torch.nn.functional.linear)
    torch.testing.assert_close(value, expected)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b)

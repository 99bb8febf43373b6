"Layers as PyTorch users treat them: nn.RNN's shapes and errors, hooks, packed batches, compile, export, func, autocast, copies, workers."

import copy
import inspect
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import wave_rnns
from wave_rnns import IdentityRNN, WaveRNN
from wave_rnns.core import ConfigError
from wave_rnns.layer import LocalRNN
from wave_rnns.scan import rows

LAYERS = {
    "wave": lambda **kw: WaveRNN(3, 8, c=2, **kw),
    "identity": lambda **kw: IdentityRNN(3, 16, **kw),
    "local": lambda **kw: LocalRNN(3, 8, c=2, **kw),
}


@pytest.fixture(params=LAYERS, ids=str)
def make(request):
    torch.manual_seed(0)
    return LAYERS[request.param]


@pytest.fixture(params=["wave", "identity"])
def make_fast(request):
    "Those that run operators; the plain loop of the third is unrolled by compilers."
    torch.manual_seed(0)
    return LAYERS[request.param]


@pytest.mark.parametrize("lengths", [[9, 5, 2], [2, 9, 5], [4, 4, 4], [7, 1, 7, 3, 1]], ids=str)
@pytest.mark.parametrize("options", [{}, dict(num_layers=2), dict(num_layers=2, bidirectional=True)], ids=str)
@pytest.mark.parametrize("overflowing", [1e30, 0.0])  # in the padding: one by one
def test_packed_sequences_are_each_sequence_alone_in_value_and_gradient(
    make, lengths, options, overflowing, monkeypatch
):
    monkeypatch.setattr(wave_rnns.layer, "OVERFLOWING", overflowing)
    layer, falling = make(**options).double(), lengths == sorted(lengths, reverse=True)
    sequences = [torch.randn(t, 3, dtype=torch.float64, requires_grad=True) for t in lengths]
    start = torch.rand(len(layer.cells), len(lengths), 16, dtype=torch.float64, requires_grad=True)

    def with_gradients(ys, h_n):
        loss = sum((i + 1) * y.square().sum() for i, y in enumerate(ys)) + h_n.tanh().sum()
        grads = torch.autograd.grad(loss, [*layer.parameters(), *sequences, start], materialize_grads=True)
        return [*ys, h_n, *grads]

    for h_0 in (None, start):
        ends = [layer(s.unsqueeze(1), None if h_0 is None else h_0[:, b : b + 1]) for b, s in enumerate(sequences)]
        alone = with_gradients([y[:, 0] for y, _ in ends], torch.cat([h for _, h in ends], 1))
        y, h_n = layer(pack_sequence(sequences, enforce_sorted=falling), h_0)
        padded = pad_packed_sequence(y)[0]
        packed = with_gradients([padded[:t, b] for b, t in enumerate(lengths)], h_n)
        assert_close(packed, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["batch", "batch_first", "unbatched", "packed"])
def test_with_the_weights_of_rnn_it_is_rnn(num_layers, bidirectional, form):
    torch.manual_seed(0)
    options = dict(num_layers=num_layers, bidirectional=bidirectional, batch_first=form == "batch_first")
    rnn = nn.RNN(3, 6, nonlinearity="relu", **options)
    twin, pairs = IdentityRNN(3, 6, recurrent_bias=True, **options), []
    names = {"V": "weight_ih", "U": "weight_hh", "b": "bias_ih", "U_bias": "bias_hh"}
    for i, cell in enumerate(twin.cells):
        level, reverse = divmod(i, 1 + bidirectional)
        suffix = f"_l{level}" + ("_reverse" if reverse else "")
        pairs += [(getattr(cell, ours), getattr(rnn, theirs + suffix)) for ours, theirs in names.items()]
    with torch.no_grad():
        for mine, its in pairs:
            mine.copy_(its)
    x = torch.randn(7, 3) if form == "unbatched" else torch.randn(7, 4, 3)
    if form == "packed":
        x = pack_padded_sequence(x, [3, 7, 7, 1], enforce_sorted=False)
    for name in ("hidden_size", "num_layers", "batch_first", "bidirectional"):
        assert getattr(twin, name) == getattr(rnn, name)
    theirs, ours = rnn(x), twin(x)
    assert_close(ours, theirs)
    h_0 = torch.rand_like(theirs[1])
    theirs, ours = rnn(x, h_0), twin(x, h_0)
    assert_close(ours, theirs)
    for y, h in (theirs, ours):
        ((y.data if form == "packed" else y).square().sum() + h.sum()).backward()
    for mine, its in pairs:
        assert_close(mine.grad, its.grad)
    assert_close(twin.final(x, h_0), theirs[1])
    assert twin.extra_repr().count("bidirectional") == 1


BAD_CALLS = [
    (torch.randn(5, 4, 7), None, "input.size(-1) must be equal to input_size. Expected 3, got 7"),
    (torch.randn(5, 4, 3), torch.randn(1, 2, 16), r"Expected hidden size (1, 4, 16), got [1, 2, 16]"),
    (torch.randn(5, 4, 3), torch.randn(4, 16), r"Expected hidden size (1, 4, 16), got [4, 16]"),
    (torch.randn(5, 3), torch.randn(1, 1, 16), r"Expected hidden size (1, 16), got [1, 1, 16]"),
    (torch.randn(2, 5, 4, 3), None, "expected a 3D input"),
    (torch.randn(0, 4, 3), None, "sequence length T of at least 1"),
    ([1.0, 2.0], None, "must be a Tensor"),
    (torch.randn(5, 4, 3, dtype=torch.float64), None, "float64"),
    (torch.randn(5, 4, 3, device="meta"), None, "on cpu like the weights, got one on meta"),
]


@pytest.mark.parametrize("x, h_0, message", BAD_CALLS, ids=[m[:30] for *_, m in BAD_CALLS])
def test_bad_calls_say_what_was_expected(make, x, h_0, message):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        make()(x, h_0)
    assert message in str(error.value)


def test_hidden_state_given_as_rings_gets_the_remedy():
    with pytest.raises(RuntimeError, match="flatten"):
        WaveRNN(3, 8, c=2)(torch.randn(5, 4, 3), torch.zeros(1, 4, 2, 8))


BAD_LAYERS = [  # what the cells refuse: test_cell.py
    dict(u_init="shfit"), dict(num_layers=0), dict(num_layers=True), dict(precision="half"),
    dict(dropout=1.5), dict(dropout=True), dict(dropout="0.1"),
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_LAYERS, ids=str)
def test_bad_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        WaveRNN(3, 8, **options)


def test_compile_fullgraph_forward_and_backward(make_fast):
    layer, x = make_fast(), torch.randn(6, 4, 3)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    expected, got = layer(x), compiled(x)
    assert_close(got, expected)
    expected[0].square().sum().backward()
    got[0].square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), compiled.parameters(), strict=True):
        assert_close(q.grad, p.grad, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_autocast_computes_the_recurrence_in_float32(make):
    layer, x = make(), torch.randn(6, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, h = layer(x)
        z, _ = layer(nn.Linear(3, 3)(x))  # a bfloat16 input
    assert y.dtype == h.dtype == z.dtype == torch.float32
    assert_close(y, layer(x)[0])


def test_double_and_dtype_argument(make):
    layer = make(dtype=torch.float64)
    assert layer(torch.randn(6, 4, 3, dtype=torch.float64))[0].dtype == torch.float64
    assert make().double()(torch.randn(6, 4, 3, dtype=torch.float64))[0].dtype == torch.float64


def test_pickle_and_a_state_dict_that_went_through_a_file(make):
    layer, other, x, file = make(num_layers=2), make(num_layers=2), torch.randn(6, 4, 3), io.BytesIO()
    torch.nn.init.normal_(layer.cells[1].V)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x)[0], layer(x)[0])


def test_freeze_trains_the_rest():
    layer = WaveRNN(3, 8, freeze=("recurrent",))
    layer(torch.randn(5, 4, 3))[0].sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {"cells.0.V", "cells.0.V_bias"}


def test_dropout_only_between_layers_and_in_training():
    torch.manual_seed(0)
    layer, x = WaveRNN(3, 8, num_layers=2, dropout=0.5, V_init="uniform"), torch.randn(6, 4, 3)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


# ------------------------------------------------------------------------------- hooks: what others hang onto a cell


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


HOOKS = {
    "prune": lambda cell, name: prune.l1_unstructured(cell, name, 0.5),
    "old weight_norm": lambda cell, name: nn.utils.weight_norm(cell, name),
    "old spectral_norm": lambda cell, name: nn.utils.spectral_norm(cell, name),
    "weight_norm": lambda cell, name: parametrizations.weight_norm(cell, name),
    "parametrize": lambda cell, name: parametrize.register_parametrization(cell, name, Doubled()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("hook", HOOKS, ids=str)
@pytest.mark.parametrize("part", ["recurrent", "encoder"])
def test_hooks_on_a_cell_run(make, hook, part):
    "Weights changed behind a hook: the answer follows, also after loading them elsewhere; gradients pass it."
    x, layer, other = torch.randn(6, 4, 3), make(), make()
    with torch.no_grad():
        for p in (*layer.parameters(), *other.parameters()):
            p.add_(0.1 * torch.rand_like(p))
    recurrent = "U" if isinstance(layer, IdentityRNN) else "u"
    name = recurrent if part == "recurrent" else "V"
    for each in (layer, other):
        HOOKS[hook](each.cells[0], name)
    layer(x)
    layer.eval()  # spectral norm's estimate stands still
    other.eval()
    other.load_state_dict(layer.state_dict())
    expected = layer(x)[0]
    assert_close(other(x)[0], expected)
    plain = make()
    with torch.no_grad():
        for key, p in plain.cells[0].named_parameters():
            p.copy_(getattr(layer.cells[0], key))
    assert_close(plain(x)[0], expected)
    other(x)[0].square().sum().backward()
    assert all(p.grad.any() for p in other.cells[0].parameters())


def test_hooks_see_the_call(make):
    layer, seen = make(num_layers=2), []
    for cell in layer.cells:
        cell.register_forward_pre_hook(lambda module, args: seen.append(module))
    layer(torch.randn(5, 4, 3))
    layer.register_forward_hook(lambda *_: seen.append("layer"))
    layer.final(torch.randn(5, 4, 3))
    assert seen == [*layer.cells, *layer.cells, "layer"]


# --------------------------------------------------------------------------------- what nn.RNN takes, and what it refuses


@pytest.mark.parametrize("options", [{}, dict(num_layers=2), dict(bidirectional=True), dict(batch_first=True)], ids=str)
def test_in_place_dropout_on_the_output(make, options):
    layer, x = make(**options), torch.randn(5, 4, 3)
    expected = layer(x)[0]
    y, h_n = layer(x)
    nn.functional.dropout(y, 1.0, training=True, inplace=True)
    h_n.mul_(2)
    (y.sum() + h_n.sum() + expected.square().sum()).backward()  # every gradient of the scan is still right
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    (2 * layer(x)[1].sum() + layer(x)[0].square().sum()).backward()
    assert_close(got, [p.grad for p in layer.parameters()])


def test_dropout_warns_and_refuses_as_rnn_does(make):
    for build in (make, lambda **kw: nn.RNN(3, 16, **kw)):
        with pytest.warns(UserWarning, match="num_layers") as caught:
            build(dropout=0.5)
        with pytest.raises(ValueError, match="dropout"):
            build(dropout=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build(dropout=0.5, num_layers=2)
    assert Path(caught[0].filename).name != "layer.py"


BAD_OPTIONS = [
    (lambda Layer: Layer(3, 8, 2, 3), "go by name"),
    (lambda Layer: Layer(3, hidden_size=16), "hidden_size.*say n"),
    (lambda Layer: Layer(3, 8, nonlinearity="tanh"), "nonlinearity.*say activation"),
    (lambda Layer: Layer(3, 8, proj_size=2), "proj_size.*nn.Linear"),
    (lambda Layer: Layer(3, 8, batchfirst=True), "batchfirst.*known are.*batch_first"),
]


@pytest.mark.parametrize("Layer", [WaveRNN, IdentityRNN, LocalRNN])
@pytest.mark.parametrize("build, message", BAD_OPTIONS, ids=[m for _, m in BAD_OPTIONS])
def test_options_that_mean_something_else_are_answered_by_name(Layer, build, message):
    with pytest.raises(TypeError, match=f"{Layer.__name__}.*{message}"):
        build(Layer)


def test_the_signature_is_the_one_that_is_documented():
    kinds = {name: p.kind for name, p in inspect.signature(WaveRNN).parameters.items()}
    assert [n for n, k in kinds.items() if k is not inspect.Parameter.KEYWORD_ONLY] == ["input_size", "n"]


def test_tokens_are_one_hot_features(make):
    tokens = torch.randint(0, 3, (7, 4))
    floats = nn.functional.one_hot(tokens, 3).float()
    for options in ({}, dict(bidirectional=True, num_layers=2)):
        layer = make(**options)
        assert_close(layer(tokens), layer(floats))
        if not isinstance(layer, LocalRNN):
            assert_close(layer(rows(torch.eye(3), tokens)), layer(floats))
        assert_close(layer(tokens[:, 0]), layer(floats[:, 0]))
        packed = [pack_padded_sequence(t, [3, 7, 2, 7], enforce_sorted=False) for t in (tokens, floats)]
        assert_close(*[layer(p)[0].data for p in packed])
    assert_close(make(batch_first=True)(tokens.T)[0].shape, (4, 7, 16))


# ------------------------------------------------------------------------------------------------ starts, biases, dtypes


def test_layers_above_the_first_start_for_dense_inputs():
    assert [cell.V_init for cell in WaveRNN(3, 8, num_layers=3).cells] == ["sparse", "uniform", "uniform"]
    assert [cell.V_init for cell in WaveRNN(3, 8, num_layers=2, V_init="sparse").cells] == ["sparse"] * 2


def test_gradients_of_two_biases_are_two_gradients(make):
    "In memory too: a second backward pass adds to both once, and scaling one leaves the other alone."
    layer, x = make(**dict(recurrent_bias=True) if make is LAYERS["identity"] else {}), torch.randn(6, 4, 3)
    cell = layer.cells[0]
    first, second = (cell.b, cell.U_bias) if isinstance(layer, IdentityRNN) else (cell.V_bias, cell.u_bias)
    layer(x)[0].sum().backward()
    once = first.grad.clone(), second.grad.clone()
    layer(x)[0].sum().backward()
    assert_close((first.grad, second.grad), (2 * once[0], 2 * once[1]))
    assert_close(second.grad.sum(), first.grad.sum())
    second.grad.zero_()
    assert_close(first.grad, 2 * once[0])


def test_recurrent_bias_starts_where_the_authors_start_it():
    for U_init in ("identity", "sigma"):
        assert IdentityRNN(3, 16, recurrent_bias=True, U_init=U_init).cells[0].U_bias.eq(0).all()
    two = IdentityRNN(3, 16, recurrent_bias=True, U_init="random").cells[0]
    assert 0 < two.U_bias.abs().max() <= 16**-0.5
    torch.manual_seed(3)
    one = IdentityRNN(3, 16, U_init="random").cells[0]
    torch.manual_seed(3)
    two = IdentityRNN(3, 16, U_init="random", recurrent_bias=True).cells[0]
    assert torch.equal(one.b, two.b + two.U_bias) and torch.equal(one.U, two.U)
    frozen = IdentityRNN(3, 16, recurrent_bias=True, freeze=("recurrent",))
    assert {n for n, p in frozen.named_parameters() if not p.requires_grad} == {"cells.0.U", "cells.0.U_bias"}
    with pytest.raises(ConfigError, match="recurrent_bias"):
        IdentityRNN(3, 16, recurrent_bias=True, bias=False)


# ------------------------------------------------------------------------------------------- export, counting, packaging


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
def test_torchscript_is_refused_in_one_line(make):
    with pytest.raises(NotImplementedError, match="^torch.jit.script cannot compile .*torch.export.export") as e:
        torch.jit.script(nn.Sequential(make()))
    assert "\n" not in str(e.value)


def test_onnx_gets_the_plain_loop(make, monkeypatch):
    "No operator of ours is in the graph; the exporter itself needs onnxscript."
    layer, x = make(num_layers=2, bidirectional=True), torch.randn(6, 4, 3)
    expected = layer(x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(layer, (x,))
    assert_close(program.module()(x), expected)
    assert not [n for n in program.graph.nodes if "wave_rnns" in str(n.target)]


def test_onnx_export_runs_elsewhere(make_fast, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = make_fast(), torch.randn(6, 4, 3)
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close([torch.tensor(t) for t in got], list(layer(x)), rtol=1e-5, atol=1e-5)


def test_exports_keep_length_and_batch_open_and_load_after_a_plain_import(tmp_path):
    sizes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    code, x = "import torch, wave_rnns\n", torch.randn(17, 3, 3)
    for name in ("wave", "identity"):
        layer, path = LAYERS[name](), str(tmp_path / f"{name}.pt2")
        exported = torch.export.export(layer, (torch.randn(6, 4, 3),), dynamic_shapes=(sizes,))
        assert_close(exported.module()(x), layer(x))
        torch.export.save(exported, path)
        code += f"print(tuple(torch.export.load({path!r}).module()(torch.randn(17, 3, 3))[0].shape))\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "(17, 3, 16)\n" * 2, run.stderr


def test_the_import_says_nothing_without_triton():
    "PyTorch for CUDA without triton (Windows, say) warns when its FLOP counter is imported; other warnings stay."
    code = """if True:
    import logging, sys, torch
    sys.modules["triton"] = sys.modules["triton.runtime.jit"] = None
    torch.version.cuda = "13.0"
    import wave_rnns.layer
    logging.getLogger("torch.utils.flop_counter").warning("something else")
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "", run.stderr
    assert "triton not found" not in run.stderr and "something else" in run.stderr


def test_types_are_shipped(checkout):
    assert (Path(wave_rnns.__file__).parent / "py.typed").exists()
    assert '"py.typed"' in (checkout / "setup.py").read_text()


T, B, F, N, C = 6, 4, 3, 8, 2
FLOPS = {  # of a forward and a backward pass without a gradient for the input
    "wave": 2 * T * B * C * N * (3 * C * 3 + 2 * F),
    "identity": 2 * T * B * 16 * (3 * 16 + 2 * F),
}


@pytest.mark.parametrize("name", FLOPS)
def test_the_flop_counter_sees_a_scan(name):
    layer, x = LAYERS[name](), torch.randn(T, B, F)
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    assert counter.get_total_flops() == FLOPS[name]
    x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    assert counter.get_total_flops() == FLOPS[name] + 2 * T * B * 16 * F
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randint(0, F, (T, B)))
    assert counter.get_total_flops() >= 2 * T * B * 16 * (3 * C if name == "wave" else 16)

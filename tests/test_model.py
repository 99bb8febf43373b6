"Layers as PyTorch users treat them: nn.RNN's shapes and errors, compile, export, func, autocast, copies, workers, packed batches."

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing import assert_close

from wave_rnns import IdentityRNN, WaveRNN
from wave_rnns.core import ConfigError
from wave_rnns.layer import LocalRNN
from wave_rnns.paper.models import ModelConfig, build_model, count_parameters
from wave_rnns.scan import rows

LAYERS = {"wave": lambda **kw: WaveRNN(3, 8, c=2, **kw), "identity": lambda **kw: IdentityRNN(3, 16, **kw)}


@pytest.fixture(params=LAYERS, ids=str)
def make(request):
    torch.manual_seed(0)
    return LAYERS[request.param]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 3), (1, 1, 3)])
def test_shapes_are_those_of_rnn(make, num_layers, batch_first, shape):
    kw = dict(num_layers=num_layers, batch_first=batch_first)
    layer, rnn, x = make(**kw), nn.RNN(3, 16, **kw), torch.randn(shape)
    (y, h), (y_rnn, h_rnn) = layer(x), rnn(x)
    assert (y.shape, h.shape) == (y_rnn.shape, h_rnn.shape)
    h_0 = torch.rand_like(h)
    assert_close(layer.final(x, h_0), layer(x, h_0)[1])
    assert not torch.equal(layer(x, h_0)[0], y)


def test_layers_on_top_of_each_other_are_the_cells_in_turn(make):
    layer, x = make(num_layers=2), torch.randn(6, 4, 3)
    h = [torch.zeros(4, *layer.state_shape) for _ in range(2)]
    for x_t in x:
        h[0] = layer.cells[0].step(x_t, h[0])
        h[1] = layer.cells[1].step(layer.flat(h[0]), h[1])
    assert_close(layer(x)[1], torch.stack([layer.flat(z) for z in h]))


def test_streaming_in_pieces(make):
    layer, x = make(num_layers=2), torch.randn(23, 4, 3)
    whole, h_n = layer(x)
    parts, h = [], None
    for piece in x.split([1, 2, 7, 13]):
        y, h = layer(piece, h)
        parts.append(y)
    assert_close(torch.cat(parts), whole)
    assert_close(h, h_n)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_packed_sequences_keep_order_and_ends(make, enforce_sorted, num_layers):
    layer, rnn = make(num_layers=num_layers), nn.RNN(3, 16, num_layers=num_layers)
    lengths = [9, 5, 2] if enforce_sorted else [2, 9, 5]
    sequences, h_0 = [torch.randn(t, 3) for t in lengths], torch.rand(num_layers, 3, 16)
    packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
    (y, h_n), (y_rnn, _) = layer(packed, h_0), rnn(packed, h_0)
    assert torch.equal(y.batch_sizes, y_rnn.batch_sizes) and y.data.shape == y_rnn.data.shape
    for b, sequence in enumerate(sequences):
        alone, h = layer(sequence, h_0[:, b])
        assert_close(pad_packed_sequence(y)[0][: lengths[b], b], alone)
        assert_close(h_n[:, b], h)


def test_code_written_for_rnn_swaps_in_one_line():
    class Model(nn.Module):
        def __init__(self, rnn):
            super().__init__()
            self.rnn, self.out = rnn, nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), 1)

        def forward(self, x, lengths):
            self.rnn.flatten_parameters()
            h_0 = x.new_zeros(self.rnn.num_layers, x.size(0), self.rnn.hidden_size)
            packed = pack_padded_sequence(x, lengths, batch_first=self.rnn.batch_first, enforce_sorted=False)
            return self.out(self.rnn(packed, h_0)[1][-1])

    def train(rnn):
        torch.manual_seed(1)
        model, x, lengths = Model(rnn), torch.randn(16, 10, 2), torch.randint(3, 10, (16,))
        target, losses = x[:, 0, :1], []
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            loss = (model(x, lengths) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    for rnn in (nn.RNN(2, 32, batch_first=True, num_layers=2), WaveRNN(2, 32, batch_first=True, num_layers=2)):
        losses = train(rnn)
        assert losses[-1] < 0.5 * losses[0]


BAD_CALLS = [
    (torch.randn(5, 4, 7), None, "input.size(-1) must be equal to input_size. Expected 3, got 7"),
    (torch.randn(5, 4, 3), torch.randn(1, 2, 16), r"Expected hidden size (1, 4, 16), got [1, 2, 16]"),
    (torch.randn(5, 4, 3), torch.randn(4, 16), r"Expected hidden size (1, 4, 16), got [4, 16]"),
    (torch.randn(5, 3), torch.randn(1, 1, 16), r"Expected hidden size (1, 16), got [1, 1, 16]"),
    (torch.randn(3), None, "expected a 3D input"),
    (torch.randn(2, 5, 4, 3), None, "expected a 3D input"),
    (torch.randn(0, 4, 3), None, "T"),
    ([1.0, 2.0], None, "must be a Tensor"),
    (torch.randn(5, 4, 3, dtype=torch.float64), None, "float64"),
]


@pytest.mark.parametrize("x, h_0, message", BAD_CALLS, ids=[m[:30] for *_, m in BAD_CALLS])
def test_bad_calls_say_what_was_expected(make, x, h_0, message):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        make()(x, h_0)
    assert message in str(error.value)


def test_hidden_state_given_as_rings_gets_the_remedy():
    with pytest.raises(RuntimeError, match=r"flatten"):
        WaveRNN(3, 8, c=2)(torch.randn(5, 4, 3), torch.zeros(1, 4, 2, 8))


BAD_LAYERS = [
    (dict(u_init="shfit"), "u_init"),
    (dict(V_init="dense"), "V_init"),
    (dict(activation="gelu"), "activation"),
    (dict(kernel_size=4), "kernel_size"),
    (dict(n=2), "n"),
    (dict(c=0), "c"),
    (dict(num_layers=0), "num_layers"),
    (dict(dropout=1.5), "dropout"),
    (dict(freeze=("readout",)), "freeze"),
    (dict(precision="half"), "precision"),
]


@pytest.mark.parametrize("options, name", BAD_LAYERS, ids=[n for _, n in BAD_LAYERS])
def test_bad_options_are_named(options, name):
    with pytest.raises(ConfigError, match=name):
        WaveRNN(**(dict(input_size=3, n=8) | options))


@pytest.mark.parametrize("options", [dict(kind="lstm"), dict(readout="deep"), dict(n=0), dict(u_init="x")])
def test_bad_model_configs_are_refused(options):
    with pytest.raises(ConfigError):
        build_model(ModelConfig(**(dict(kind="wrnn", input_size=1, output_size=2, n=8) | options)), seed=0)


def test_compile_fullgraph_forward_and_backward(make):
    layer, x = make(), torch.randn(6, 4, 3)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    expected, got = layer(x), compiled(x)
    assert_close(got, expected)
    expected[0].square().sum().backward()
    got[0].square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), compiled.parameters(), strict=True):
        assert_close(q.grad, p.grad, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_export_keeps_length_and_batch_open(make):
    layer, sizes = make(), {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    exported = torch.export.export(layer, (torch.randn(6, 4, 3),), dynamic_shapes=(sizes,)).module()
    x = torch.randn(17, 3, 3)
    assert_close(exported(x), layer(x))


def test_func_grad_and_vmap_of_grad(make):
    layer, x = make(), torch.randn(6, 4, 3)
    params = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(layer, params, (x,))[0].square().mean()

    whole = torch.func.grad(loss)(params, x)
    layer(x)[0].square().mean().backward()
    for name, p in layer.named_parameters():
        assert_close(whole[name], p.grad)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(params, x)  # unbatched input [T, F]
    for name in params:
        assert_close(each[name].mean(0), whole[name])


def test_population_of_layers_under_vmap(make):
    layers, x = [make() for _ in range(3)], torch.randn(6, 4, 3)
    for seed, layer in enumerate(layers):
        torch.manual_seed(seed)
        layer.reset_parameters()
    params, buffers = torch.func.stack_module_state(layers)
    run = lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,))[0]  # noqa: E731
    ys = torch.func.vmap(run)(params, buffers)
    ys.square().sum().backward()
    for r, layer in enumerate(layers):
        y = layer(x)[0]
        assert_close(ys[r], y)
        y.square().sum().backward()
        for name, p in layer.named_parameters():
            assert_close(params[name].grad[r], p.grad)


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


def test_state_dict_deepcopy_and_pickle(make):
    layer, other, x = make(num_layers=2), make(num_layers=2), torch.randn(6, 4, 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.rand_like(p) * 0.1)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x)[0], layer(x)[0])


class Encoded(torch.utils.data.Dataset):
    "A data set that runs a layer in the worker process."

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 4

    def __getitem__(self, i):
        torch.set_num_threads(1)
        with torch.no_grad():
            return self.layer(torch.full((5, 3), float(i)))[0]


def test_dataloader_workers():
    data = Encoded(WaveRNN(3, 8, c=2))
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert_close(torch.cat(list(loader)), torch.stack([data[i] for i in range(4)]))


def test_freeze_trains_the_rest():
    layer = WaveRNN(3, 8, freeze=("recurrent",))
    layer(torch.randn(5, 4, 3))[0].sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {"cells.0.V", "cells.0.V_bias"}


def test_dropout_only_between_layers_and_in_training():
    layer, x = WaveRNN(3, 8, num_layers=2, dropout=0.9), torch.randn(6, 4, 3)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    single = WaveRNN(3, 8, dropout=0.9)
    assert torch.equal(single(x)[0], single(x)[0])


def test_local_layer_with_equal_kernels_is_the_wave_layer():
    torch.manual_seed(0)
    wave, local, x = WaveRNN(3, 8, c=2, u_init="random"), LocalRNN(3, 8, c=2), torch.randn(6, 4, 3)
    cell, tied = local.cells[0], wave.cells[0]
    with torch.no_grad():
        cell.u.copy_(tied.u.expand_as(cell.u))
        cell.u_bias.copy_(tied.u_bias[:, None].expand_as(cell.u_bias))
        cell.V.copy_(tied.V)
        cell.V_bias.copy_(tied.V_bias)
    assert_close(local(x)[0], wave(x)[0])


def test_models_take_tokens_and_rows_as_well_as_floats():
    torch.manual_seed(0)
    for kind in ("wrnn", "irnn"):
        model = build_model(ModelConfig(kind, 10, 10, 12, every_step=True), seed=1)
        tokens = torch.randint(0, 10, (7, 3))
        floats = nn.functional.one_hot(tokens, 10).float()
        assert_close(model(tokens), model(floats))
        assert_close(model(rows(torch.eye(10), tokens)), model(floats))
        assert model(tokens).shape == (7, 3, 10)
        last = build_model(ModelConfig(kind, 10, 4, 12), seed=1)
        assert last(tokens).shape == (3, 4)


def test_building_is_seeded_and_leaves_the_global_state_alone():
    config = ModelConfig("wrnn", 2, 1, 20, 3, u_init="random", V_init="normal")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, other = build_model(config, 0), build_model(config, 0), build_model(config, 1)
    assert torch.equal(torch.rand(3), expected)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if name != "layer.cells.0.V_bias":
            assert not torch.equal(p, r), name


@pytest.mark.parametrize(
    "config, without, with_biases",
    [
        (ModelConfig("irnn", 10, 10, 100, every_step=True), 12_000, None),
        (ModelConfig("irnn", 10, 10, 625, every_step=True), 403_125, None),
        (ModelConfig("irnn", 2, 1, 100), 10_300, None),
        (ModelConfig("wrnn", 2, 1, 100, 27), 10_287, None),
        (ModelConfig("irnn", 1, 10, 256), 68_352, None),
        (ModelConfig("wrnn", 1, 10, 256, 16), 45_824, 49_946),
        (ModelConfig("wrnn", 1, 10, 256, 16, readout="mlp"), None, 419_686),
        (ModelConfig("wrnn", 96, 10, 256, 16), 434_944, None),
        (ModelConfig("irnn", 96, 10, 529), 335_915, None),
        (ModelConfig("mlp", 784, 10, 256), None, 784 * 256 + 256 + 2570),
    ],
)
def test_parameter_counts_of_the_paper(config, without, with_biases):
    model = build_model(config, seed=0)
    assert without is None or count_parameters(model, biases=False) == without
    assert with_biases is None or count_parameters(model) == with_biases

"What is too broad to read in 02_cell: awkward sizes in PyTorch's own layers, initial values, bad options."

import math

import pytest
import torch
from torch import nn

from wave_rnns.cell import ACTIVATIONS, DenseCell, LocalCell, WaveCell, ring_kernel
from wave_rnns.core import ConfigError

SIZES = [(1, 3, 1, 3), (1, 4, 2, 3), (2, 5, 3, 5), (3, 7, 1, 1), (10, 100, 6, 3), (2, 9, 4, 9)]


@pytest.mark.parametrize("F, n, c, k", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_wave_step_equals_the_frameworks_layers(F, n, c, k, activation, bias):
    "Its parameters are those of an nn.Linear and a circular nn.Conv1d. (Other cells: 03_recurrence, 05_layer, test_layer.py)"
    cell = WaveCell(F, n, c, k, activation, "random", "uniform", bias, dtype=torch.float64)
    linear = nn.Linear(F, c * n, bias=bias, dtype=torch.float64)
    conv = nn.Conv1d(c, c, k, padding=k // 2, padding_mode="circular", bias=bias, dtype=torch.float64)
    with torch.no_grad():
        cell.V.copy_(linear.weight)
        cell.u.copy_(conv.weight)
        if bias:
            cell.V_bias.copy_(linear.bias)
            cell.u_bias.copy_(conv.bias)
    x, h = torch.randn(4, F, dtype=torch.float64), torch.randn(4, c, n, dtype=torch.float64)
    z = linear(x).view(4, c, n) + conv(h)
    expected = {"relu": z.relu(), "tanh": z.tanh(), "identity": z}[activation]
    torch.testing.assert_close(cell(x, h), expected, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_shift_moves_by_one_and_identity_stays_whatever_the_kernel(k):
    h, silence = torch.rand(3, 2, 20), torch.zeros(3, 1)
    assert torch.equal(WaveCell(1, 20, 2, k, u_init="identity", bias=False)(silence, h), h)
    if k > 1:
        assert torch.equal(WaveCell(1, 20, 2, k, bias=False)(silence, h), h.roll(-1, -1))


def within(values, bound):
    "Uniform within +-bound, by its largest value and its variance."
    return values.abs().max() <= bound and abs(values.var() / (bound**2 / 3) - 1) < 0.1


def test_wave_initial_values():
    torch.manual_seed(0)
    cell = WaveCell(4, 500, c=40, u_init="random", V_init="uniform")
    assert within(cell.u, 1 / math.sqrt(120)) and within(cell.V, 0.5) and within(cell.V_bias, 0.5)
    biases = torch.cat([WaveCell(1, 3, c=40).u_bias.detach() for _ in range(50)])
    assert within(biases, 1 / math.sqrt(120))
    assert abs(WaveCell(4, 500, c=40, V_init="normal").V.std() / 0.001 - 1) < 0.02
    cell = WaveCell(4, 500, c=40)
    assert cell.V_bias.eq(0).all() and cell.V.sum() == 40 * 4 and cell.V_rings[:, 0].eq(1).all()


def test_local_initial_values():
    torch.manual_seed(0)
    assert within(LocalCell(1, 100, c=8, u_init="random").u, 1 / math.sqrt(24))
    for u_init in ("shift", "identity"):
        cell, tied = LocalCell(1, 10, c=3, u_init=u_init), WaveCell(1, 10, c=3, u_init=u_init)
        assert torch.equal(cell.u, tied.u.expand(10, 3, 3, 3)) and cell.u_bias.eq(0).all()


def test_dense_initial_values():
    torch.manual_seed(0)
    cell = DenseCell(1, 400, U_init="random", V_init="sparse")
    assert within(cell.U, 0.05) and within(cell.b, 0.05) and cell.V[0] == 1 and cell.V[1:].eq(0).all()
    cell = DenseCell(4, 4000, V_init="uniform", U_init="identity")
    assert within(cell.V, 0.5) and within(cell.b, 0.5) and torch.equal(cell.U, torch.eye(4000))
    cell = DenseCell(4, 4000)
    assert abs(cell.V.std() / 0.001 - 1) < 0.05 and within(cell.b, 0.5)
    assert torch.equal(DenseCell(1, 5, U_init="sigma").U, torch.eye(5).roll(1, 1))
    assert DenseCell(1, 5, V_init="sparse").b.eq(0).all()


@pytest.mark.parametrize("kind, random", [(WaveCell, "u_init"), (LocalCell, "u_init"), (DenseCell, "U_init")])
def test_reset_draws_what_a_new_cell_has(kind, random):
    options = {random: "random", "V_init": "uniform"}
    cell = kind(2, 10, **options)
    torch.manual_seed(3)
    new = kind(2, 10, **options).state_dict()
    torch.manual_seed(3)
    cell.reset_parameters()
    assert all(torch.equal(value, new[name]) for name, value in cell.state_dict().items())


# ---------------------------------------------------------------------------------------------- freezing


FROZEN = {  # by recurrent, by encoder, by both
    WaveCell: ({"u", "u_bias"}, {"V", "V_bias"}, {"u", "u_bias", "V", "V_bias"}),
    LocalCell: ({"u", "u_bias"}, {"V", "V_bias"}, {"u", "u_bias", "V", "V_bias"}),
    DenseCell: ({"U"}, {"V"}, {"U", "V", "b"}),  # one bias for two terms
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", FROZEN)
def test_freeze(kind, bias):
    for freeze, frozen in zip(("recurrent", ["encoder"], ("encoder", "recurrent")), FROZEN[kind], strict=True):
        cell = kind(1, 5, bias=bias, freeze=freeze)
        names = {name for name, p in cell.named_parameters() if not p.requires_grad}
        assert names == (frozen if bias else frozen - {"u_bias", "V_bias", "b"})


# ------------------------------------------------------------------------------------------------------ errors, use


BAD = [
    (lambda: WaveCell(0, 10), "input_size: expected a positive integer, got 0"),
    (lambda: WaveCell(1, 10.0), "n: expected a positive integer, got 10.0"),
    (lambda: WaveCell(1, True), "n: expected a positive integer, got True"),
    (lambda: WaveCell(1, 10, c=0), "c: expected a positive integer"),
    (lambda: WaveCell(1, 10, kernel_size=0), "kernel_size: expected a positive integer"),
    (lambda: WaveCell(1, 10, kernel_size=4), "kernel_size: expected an odd number"),
    (lambda: WaveCell(1, 2), "n: expected at least kernel_size = 3"),
    (lambda: WaveCell(1, 10, kernel_size=1), "u_init='shift' reads from a neighbour"),
    (lambda: WaveCell(1, 10, activation="ReLU"), "activation: expected one of 'relu', 'tanh', 'identity', got 'ReLU'"),
    (lambda: WaveCell(1, 10, u_init="xavier"), "u_init: expected one of 'shift', 'identity', 'random', got 'xavier'"),
    (lambda: WaveCell(1, 10, bias="no"), "bias: expected one of True, False, got 'no'"),
    (lambda: WaveCell(1, 10, freeze="yes"), "freeze: expected one of 'recurrent', 'encoder', got 'yes'"),
    (lambda: LocalCell(1, 10, u_init="sigma"), "'random', 'xavier', got 'sigma'"),
    (lambda: DenseCell(1, 10, U_init="shift"), "U_init: expected one of 'identity', 'sigma', 'random', got 'shift'"),
    (lambda: DenseCell(1, 0), "n: expected a positive integer"),
    (lambda: WaveCell(2, 10)(torch.zeros(3, 1), torch.zeros(3, 1, 10)), r"Expected input size \[B, 2\], got \[3, 1\]"),
    (lambda: WaveCell(1, 10, 6)(torch.zeros(3, 1), torch.zeros(3, 60)), r"Expected hidden size \[3, 6, 10\], got \[3, 60\]"),
    (lambda: DenseCell(1, 10)(torch.zeros(3, 1), torch.zeros(2, 10)), r"Expected hidden size \[3, 10\], got \[2, 10\]"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", BAD)
def test_bad_options(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_kernel_that_no_memory_holds_is_described_at_once():
    "A damaged config.json may ask for it; a loop over its rings would take a minute."
    with torch.device("meta"):
        assert ring_kernel(10**8, 3, "shift").shape == (10**8, 10**8, 3)

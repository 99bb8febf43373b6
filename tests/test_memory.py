"Decoding of the past against cases with known answers; bad calls."

import math

import numpy as np
import pytest
import torch
from torch import nn

from wave_rnns.core import ConfigError
from wave_rnns.layer import WaveRNN
from wave_rnns.memory import decode_past, fit_ridge, gradient_norms, participation_ratio, perturbation_cone, ring_theory
from wave_rnns.wave_equation import shift_matrix


def test_what_is_there_is_found_and_what_is_not_is_not():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 400))  # [T, B]
    states = np.stack([x[-1], x[-3] + x[-4], 0 * x[0]], axis=1)
    r2 = decode_past(states, x, [0, 1, 2, 3])
    assert r2[0] == pytest.approx(1, abs=1e-6) and abs(r2[1]) < 0.05
    assert r2[2:] == pytest.approx([0.5, 0.5], abs=0.1)


def test_no_optimism():
    "More neurons than sequences, all of them noise: held out, nothing is predicted."
    rng = np.random.default_rng(0)
    r2 = decode_past(rng.normal(size=(60, 200)), rng.normal(size=(5, 60, 2)), range(5))
    assert np.all(r2 < 0.15) and np.all(r2 > -0.1)


def test_the_axes_of_the_states_do_not_matter():
    "Also where the readout could fit everything, and the penalty is chosen between numbers near zero."
    rng = np.random.default_rng(0)
    states, x = rng.normal(size=(60, 200)), rng.normal(size=(5, 60, 2))
    turn, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    np.testing.assert_allclose(decode_past(states @ turn, x, range(5)), decode_past(states, x, range(5)), atol=1e-4)


def test_ridge_is_the_normal_equations():
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(200, 5)) + 3, rng.normal(size=(5, 2))
    predict = fit_ridge(h, h @ w + 7)
    new = rng.normal(size=(10, 5))
    np.testing.assert_allclose(predict(new), new @ w + 7, atol=1e-5)


@pytest.mark.parametrize("n, T", [(10, 10), (10, 15), (16, 8)])
def test_a_ring_holds_n_inputs(n, T):
    "Exactly the last n; those that meet in one neuron share it."
    torch.manual_seed(0)
    x = torch.rand(T, 600, 1, dtype=torch.float64)
    with torch.no_grad():
        last = WaveRNN(1, n, bias=False, dtype=torch.float64)(x)[0][-1]
    shared = [T > lag + n or lag >= n for lag in range(T)]
    expected = [0.5 if s else 1.0 for s in shared]
    assert decode_past(last, x, range(T)) == pytest.approx(expected, abs=0.1)
    assert ring_theory(shift_matrix(n), np.eye(n)[0], T, 1e-4) == pytest.approx(expected, abs=1e-4)


def test_participation_ratio():
    rng = np.random.default_rng(0)
    h = np.zeros((3, 4000, 6))
    h[1, :, 2] = rng.normal(size=4000)
    h[2, :, :4] = rng.normal(size=(4000, 4))
    assert participation_ratio(h) == pytest.approx([0, 1, 4], rel=0.02)


def test_gradient_of_a_plain_rnn():
    "Against the Jacobian itself."
    torch.manual_seed(0)
    rnn, x = nn.RNN(2, 4).double(), torch.rand(5, 1, 2).double()
    J = torch.autograd.functional.jacobian(lambda z: rnn(z)[0][-1, 0], x)  # [4, 5, 1, 2]
    exact = J.square().sum((0, 2, 3)).sqrt().flip(0)
    assert gradient_norms(rnn, x, draws=4000) == pytest.approx(exact.numpy(), rel=0.06)


def test_bad_calls():
    h, x = torch.zeros(20, 4), torch.rand(5, 20)
    for states, options, words in (
        (h[:19], dict(lags=[0]), "20 sequences, got 19"),
        (h, dict(lags=[5]), "0 to 4"),
        (h, dict(lags=[-1]), "0 to 4"),
        (h, dict(lags=[0], folds=1), "folds"),
        (h * math.nan, dict(lags=[0]), "finite"),
    ):
        with pytest.raises(ConfigError, match=words):
            decode_past(states, x, **options)
    with pytest.raises(ConfigError, match="at: expected"):
        perturbation_cone(nn.RNN(1, 2), torch.rand(5, 1, 1), 5)
    with pytest.raises(ConfigError, match="two or more"):
        participation_ratio(torch.zeros(5, 1, 3))

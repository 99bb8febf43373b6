"What is too broad to read in 01_wave_equation: every size, batches, precisions."

import math

import pytest
import torch

from wave_rnns.wave_equation import courant_number, exact_travel, shift_matrix, two_way_energy, two_way_step
from wave_rnns.wave_equation import upwind_kernel, upwind_step, varying_speed_step

SIZES = [1, 2, 3, 7, 64, 100]


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", SIZES)
def test_steps_and_matrix_are_the_index_formula(n):
    h, speeds = noise(n), torch.rand(n, dtype=torch.float64)
    for courant in (-0.5, 0.0, 0.25, 1.0, 1.5):
        by_hand = torch.stack([(1 - courant) * h[x] + courant * h[(x + 1) % n] for x in range(n)])
        torch.testing.assert_close(upwind_step(h, courant), by_hand, rtol=0, atol=1e-15)
        torch.testing.assert_close(shift_matrix(n, courant) @ h, by_hand, rtol=0, atol=1e-14)
    by_hand = torch.stack([(1 - speeds[x]) * h[x] + speeds[x] * h[(x + 1) % n] for x in range(n)])
    torch.testing.assert_close(varying_speed_step(h, speeds), by_hand, rtol=0, atol=1e-15)


@pytest.mark.parametrize("n", SIZES)
def test_shift_matrix_is_a_permutation_that_closes(n):
    Sigma = shift_matrix(n)
    assert torch.equal(Sigma, Sigma.bool().double()) and torch.equal(Sigma.T @ Sigma, torch.eye(n).double())
    powers = [torch.linalg.matrix_power(Sigma, p) for p in range(n + 1)]
    assert [p for p in range(1, n + 1) if torch.equal(powers[p], powers[0])] == [n]  # not a step earlier


def test_batches_and_kernel():
    h = noise(2, 3, 20)
    assert torch.equal(upwind_step(h, 0.3)[1, 2], upwind_step(h[1, 2], 0.3))
    assert torch.equal(two_way_step(h, h, 0.3)[1, 2], two_way_step(h[1, 2], h[1, 2], 0.3))
    assert two_way_energy(h, h, 0.3).shape == (2, 3)
    assert varying_speed_step(h, torch.rand(20).double()).shape == h.shape
    assert upwind_kernel(0.25).tolist() == [0.0, 0.75, 0.25]
    for make in (upwind_kernel, shift_matrix):
        assert make(1, dtype=torch.float32).dtype == torch.float32
    assert courant_number(2.0) == 2.0


@pytest.mark.parametrize("n", [2, 3, 16, 33])
def test_exact_travel(n):
    h = noise(2, n)
    for distance in range(-n, 2 * n):
        torch.testing.assert_close(exact_travel(h, distance), h.roll(-distance, -1), rtol=0, atol=1e-12)
    assert exact_travel(h.float(), 0.5).dtype == torch.float32
    if n % 2:  # without a mode at k = pi, fractions compose too
        torch.testing.assert_close(exact_travel(exact_travel(h, 0.3), 0.7), exact_travel(h, 1), rtol=0, atol=1e-12)


def test_exact_travel_solves_the_equation():
    "dh/dt = nu dh/dx, checked by small differences in both directions."
    x = torch.arange(64, dtype=torch.float64)
    h, eps = torch.exp(torch.cos(2 * math.pi * x / 64)), 1e-4
    dh_dt = (exact_travel(h, eps) - exact_travel(h, -eps)) / (2 * eps)
    slope = -torch.sin(2 * math.pi * x / 64) * 2 * math.pi / 64 * h
    torch.testing.assert_close(dh_dt, slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize("courant", [0.2, 0.5, 0.9])
def test_two_way_dispersion(courant):
    "A leapfrog mode turns by theta with cos(theta) = 1 - C^2 (1 - cos k)."
    k = 2 * math.pi * 5 / 32
    theta = math.acos(1 - courant**2 * (1 - math.cos(k)))
    x = torch.arange(32, dtype=torch.float64)
    before, now = torch.cos(k * x), torch.cos(k * x + theta)
    for t in range(2, 100):
        before, now = now, two_way_step(now, before, courant)
        torch.testing.assert_close(now, torch.cos(k * x + t * theta), rtol=0, atol=1e-10)

"What is too broad to read in 01_wave_equation: every size, batches, precisions, and the edges of stability."

import math

import pytest
import torch

from wave_rnns.wave_equation import (
    courant_number,
    exact_travel,
    growth_factor,
    shift_matrix,
    two_way_energy,
    two_way_step,
)
from wave_rnns.wave_equation import upwind_kernel, upwind_step, varying_speed_step

SIZES = [1, 2, 3, 7, 64, 100]
COURANTS = [-0.5, 0.0, 0.25, 1.0, 1.5]


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("courant", COURANTS)
def test_step_matrix_and_index_formula_agree(courant):
    for n in SIZES:
        h = noise(n)
        by_hand = torch.stack([(1 - courant) * h[x] + courant * h[(x + 1) % n] for x in range(n)])
        torch.testing.assert_close(upwind_step(h, courant), by_hand, rtol=0, atol=1e-15)
        torch.testing.assert_close(shift_matrix(n, courant) @ h, by_hand, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", SIZES)
def test_shift_matrix_is_a_permutation_that_closes(n):
    Sigma = shift_matrix(n)
    assert torch.equal(Sigma, Sigma.bool().double()) and torch.equal(Sigma.sum(0), torch.ones(n).double())
    assert torch.equal(Sigma.T @ Sigma, torch.eye(n).double())
    powers = [torch.linalg.matrix_power(Sigma, p) for p in range(n + 1)]
    assert [p for p in range(1, n + 1) if torch.equal(powers[p], powers[0])] == [n]  # not a step earlier


@pytest.mark.parametrize("courant", COURANTS)
def test_total_is_kept(courant):
    "Each column of Sigma sums to 1, so the step moves h around but makes none."
    h = noise(50)
    torch.testing.assert_close(upwind_step(h, courant).sum(), h.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("courant", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_stable_interval(courant):
    "Inside [0, 1] no shape grows, in any of three norms, and maxima are never exceeded."
    h = noise(33)
    for _ in range(200):
        after = upwind_step(h, courant)
        for p in (1, 2, math.inf):
            assert after.norm(p) <= h.norm(p) * (1 + 1e-14)
        assert after.max() <= h.max() + 1e-15 and after.min() >= h.min() - 1e-15
        h = after


@pytest.mark.parametrize("courant", [-0.01, 1.01])
def test_unstable_just_outside(courant):
    assert growth_factor(courant, torch.linspace(0, math.pi, 100)).abs().max() > 1.01
    assert torch.linalg.matrix_norm(shift_matrix(64, courant), 2) > 1.01


def test_batches_and_kernel():
    h = noise(2, 3, 20)
    assert torch.equal(upwind_step(h, 0.3)[1, 2], upwind_step(h[1, 2], 0.3))
    assert torch.equal(two_way_step(h, h, 0.3)[1, 2], two_way_step(h[1, 2], h[1, 2], 0.3))
    assert two_way_energy(h, h, 0.3).shape == (2, 3)
    assert varying_speed_step(h, torch.rand(20).double()).shape == h.shape
    assert upwind_kernel(0.25).tolist() == [0.0, 0.75, 0.25]
    assert upwind_kernel(0.25, dtype=torch.float32).dtype == torch.float32
    assert shift_matrix(4, dtype=torch.float32).dtype == torch.float32
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
    n, m = 32, 5
    k = 2 * math.pi * m / n
    theta = math.acos(1 - courant**2 * (1 - math.cos(k)))
    x = torch.arange(n, dtype=torch.float64)
    before, now = torch.cos(k * x), torch.cos(k * x + theta)
    for t in range(2, 100):
        before, now = now, two_way_step(now, before, courant)
        torch.testing.assert_close(now, torch.cos(k * x + t * theta), rtol=0, atol=1e-10)


def test_two_way_explodes_above_one():
    h = before = noise(32)
    for _ in range(300):
        h, before = two_way_step(h, before, 1.05), h
    assert h.abs().max() > 1e10


def test_two_way_at_one_contains_the_one_way_wave():
    "Started as a wave that moves left, the two-way step keeps it moving left, bit by bit."
    start = noise(40)
    h, before = start.roll(-1), start
    for t in range(2, 80):
        h, before = two_way_step(h, before, 1.0), h
        torch.testing.assert_close(h, start.roll(-t), rtol=0, atol=1e-11)


def test_varying_speed_reduces_to_constant():
    h = noise(3, 20)
    torch.testing.assert_close(varying_speed_step(h, torch.full((20,), 0.3).double()), upwind_step(h, 0.3))


def test_varying_speed_is_local():
    "A neuron with C = 0 keeps its value, one with C = 1 copies its right neighbour."
    h = noise(6)
    after = varying_speed_step(h, torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 1.0], dtype=torch.float64))
    assert torch.equal(after[[0, 2]], h[[0, 2]]) and torch.equal(after[[1, 3, 5]], h[[2, 4, 0]])

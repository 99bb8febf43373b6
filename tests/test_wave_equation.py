"What is too broad to read in 01_wave_equation: every size, batches, precisions."

import pytest
import torch

from wave_rnns.wave_equation import exact_travel, shift_matrix, two_way_energy, two_way_step
from wave_rnns.wave_equation import upwind_kernel, upwind_step, varying_speed_step

SIZES = [1, 2, 3, 7, 64, 100]


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", SIZES)
def test_steps_and_matrix_are_the_index_formula(n):
    h = noise(n)
    for courant in (-0.5, 0.0, 0.25, 1.0, 1.5):
        by_hand = torch.stack([(1 - courant) * h[x] + courant * h[(x + 1) % n] for x in range(n)])
        same_speed = torch.full((n,), courant, dtype=torch.float64)
        for found in (upwind_step(h, courant), shift_matrix(n, courant) @ h, varying_speed_step(h, same_speed)):
            torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", SIZES)
def test_exact_travel(n):
    h = noise(2, n)
    for distance in range(-n, 2 * n):
        torch.testing.assert_close(exact_travel(h, distance), h.roll(-distance, -1), rtol=0, atol=1e-12)


def test_batches_and_dtypes():
    h = noise(2, 3, 20)
    assert torch.equal(upwind_step(h, 0.3)[1, 2], upwind_step(h[1, 2], 0.3))
    assert torch.equal(two_way_step(h, h, 0.3)[1, 2], two_way_step(h[1, 2], h[1, 2], 0.3))
    assert two_way_energy(h, h, 0.3).shape == (2, 3)
    for make in (upwind_kernel, shift_matrix):
        assert make(1, dtype=torch.float32).dtype == torch.float32
    assert exact_travel(h.float(), 0.5).dtype == torch.float32

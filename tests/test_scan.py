"The operator against its definition: an independent float64 loop, and every way PyTorch has of calling a function."

import pytest
import torch
from torch.testing import assert_close

from wave_rnns.scan import dense_scan, rows, wave_loop, wave_scan  # noqa: F401


def inputs(kind, T=7, B=3, c=2, n=5, k=3, F=2, dtype=torch.float64, seed=0):
    "x, kernel or matrix, encoder, bias, first state."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    if kind == "wave":
        return draw(T, B, F), draw(c, c, k) / (c * k) ** 0.5, draw(c, n, F), draw(c, n), draw(B, c, n)
    return draw(T, B, F), draw(n, n) / n**0.5, draw(n, F), draw(n), draw(B, n)


SCANS = {"wave": wave_scan, "dense": dense_scan}


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("runs", [1, 3])
def test_vmap_is_one_run_after_the_other(kind, last, runs):
    scan, each = SCANS[kind], [inputs(kind, seed=seed) for seed in range(runs)]
    stacked = [torch.stack(t).requires_grad_() for t in zip(*each, strict=True)]
    y = torch.func.vmap(lambda *t: scan(*t, last=last))(*stacked)
    gy = torch.randn_like(y)
    grads = torch.autograd.grad(y, stacked, gy)
    for r, tensors in enumerate(each):
        alone = [t.requires_grad_() for t in tensors]
        y_r = scan(*alone, last=last)
        assert_close(y[r], y_r)
        for name, g, e in zip("x u V b h_0".split(), grads, torch.autograd.grad(y_r, alone, gy[r]), strict=True):
            assert_close(g[r], e, msg=lambda m, name=name: f"gradient of {name}: {m}")

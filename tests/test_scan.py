"The operator against its definition: an independent float64 loop, and every way PyTorch has of calling a function."

import pytest
import torch
from torch.testing import assert_close

from wave_rnns.core import ConfigError
from wave_rnns.scan import ScanError, dense_scan, rows, wave_scan


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


GOOD = dict(zip("x u V b h_0".split(), inputs("wave"), strict=True))
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
    x, U, V, b, h_0 = inputs("dense")
    for change, message in [
        (dict(U=U[:, :3]), "U: expected shape [m, m]"),
        (dict(V=V[:3]), "V: expected shape [m, F] with m = 5"),
        (dict(h_0=h_0[:1]), "Expected hidden size (3, 5), got [1, 5]"),
        (dict(x=x.float()), "x: expected torch.float64"),
        (dict(x=x[:0]), "sequence length T"),
    ]:
        with pytest.raises(ScanError) as error:
            dense_scan(**dict(x=x, U=U, V=V, b=b, h_0=h_0) | change)
        assert message in str(error.value)

"Models as data: the paper's parameter counts, seeds that give the same weights for ever, and no trace left behind."

import hashlib

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wave_rnns.core import ConfigError
from wave_rnns.paper.experiments import EXPERIMENTS, from_config, run_key, to_config
from wave_rnns.paper.models import ModelConfig, build_model, count_parameters
from wave_rnns.scan import rows


WRONG = [dict(kind="lstm"), dict(readout="deep"), dict(n=0), dict(u_init="x"), dict(recurrent_bias=True)]


@pytest.mark.parametrize("options", [*WRONG, dict(kind="irnn", bias=False, recurrent_bias=True)])
def test_bad_model_configs_are_refused(options):
    with pytest.raises(ConfigError, match=[*options][-1]):
        build_model(ModelConfig(**(dict(kind="wrnn", input_size=1, output_size=2, n=8) | options)), seed=0)


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


def test_another_seed_gives_other_weights():
    config = ModelConfig("wrnn", 2, 1, 20, 3, u_init="random", V_init="normal")
    for (name, p), q in zip(
        build_model(config, 0).named_parameters(), build_model(config, 1).parameters(), strict=True
    ):
        assert name == "layer.cells.0.V_bias" or not torch.equal(p, q), name


COUNTS = [  # without biases, with them; those of the paper's tables: notebook 11
    (ModelConfig("local", 1, 10, 256, 16), 256 * 768 + 4_096 + 40_960, 256 * 768 + 3 * 4_096 + 40_960 + 10),
    (ModelConfig("mlp", 784, 10, 256), 784 * 256 + 2560, 784 * 256 + 256 + 2570),
    (ModelConfig("irnn", 2, 1, 100, recurrent_bias=True), 10_300, 10_501),
]


@pytest.mark.parametrize("config, without, with_biases", COUNTS)
def test_parameter_counts(config, without, with_biases):
    model = build_model(config, seed=0)
    assert (count_parameters(model, biases=False), count_parameters(model)) == (without, with_biases)


# -------------------------------------------------------------------------------- the same weights, whatever the surroundings

COPY = dict(kind="wrnn", n=100, c=6, input_size=10, output_size=10, every_step=True)
DENSE = COPY | dict(kind="irnn", c=1)
MNIST = dict(kind="wrnn", n=256, input_size=1, output_size=10)
WEIGHTS = [  # of seed 7, computed by release 0.1.0
    (COPY, "4de6976b465ff85a"),
    (COPY | dict(V_init="normal"), "e0efe2e6de73747a"),
    (COPY | dict(u_init="random"), "3d3f9d847048e868"),
    (COPY | dict(u_init="identity"), "ae78c581b55e96ca"),
    (COPY | dict(V_init="normal", u_init="random"), "4888204005d279d2"),
    (DENSE, "4dc95eec28583bc9"),
    (DENSE | dict(U_init="random"), "d987a44b6a6e4010"),
    (DENSE | dict(U_init="sigma"), "1dd4aefc6f8189c0"),
    (DENSE | dict(U_init="sigma", V_init="sparse"), "6b8ad34dc866a30b"),
    (dict(kind="wrnn", n=100, c=27, input_size=2, output_size=1), "fa1e4ecae3b53cac"),
    (dict(kind="irnn", n=100, input_size=2, output_size=1), "d501e1f9a52ff910"),
    (MNIST | dict(c=16, precision="fast", readout="mlp"), "0218baa40d3a90d7"),
    (MNIST | dict(kind="irnn", V_init="uniform"), "c0072ae2267a034c"),
    (MNIST | dict(kind="mlp", input_size=784), "9bc2149e99522310"),
]


def weight_hash(model):
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu" and value.dtype == torch.float32
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()[:16]


@pytest.mark.parametrize("config, expected", WEIGHTS, ids=[h for _, h in WEIGHTS])
def test_the_weights_of_a_seed_never_change(config, expected):
    assert weight_hash(build_model(ModelConfig(**config), 7)) == expected


KINDS = [
    dict(kind="wrnn", c=2, u_init="random", V_init="normal"),
    dict(kind="irnn", U_init="random"),
    dict(kind="irnn", U_init="sigma", recurrent_bias=True, every_step=True),
    dict(kind="local", c=2, u_init="xavier", V_init="uniform"),
    dict(kind="wrnn", readout="mlp"),
    dict(kind="mlp"),
]


@pytest.fixture(params=KINDS, ids=lambda c: "-".join(map(str, c.values())))
def config(request):
    return ModelConfig(input_size=3, output_size=4, n=8, **request.param)


def test_nothing_around_it_matters_and_nothing_is_left_behind(config, monkeypatch):
    "Default dtype and device, the random state before and after, an error within."
    before, expected = torch.get_rng_state(), weight_hash(build_model(config, 1))
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert weight_hash(build_model(config, 1)) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        model = build_model(config, 1)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    monkeypatch.setattr(nn.Linear, "__init__", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_model(config, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_gpu_generator_is_seeded(config, monkeypatch):
    "torch.manual_seed would seed every GPU's, now or, before CUDA has started, later; fork_rng(devices=[]) restores none of them."
    seeded = []
    for name in ("manual_seed", "manual_seed_all", "_lazy_call"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **_: seeded.append(args))
    torch.manual_seed(0)
    assert seeded, "the recorder sees what torch.manual_seed does"
    seeded.clear()
    with torch.random.fork_rng(devices=[]):
        build_model(config, 1)
    assert not seeded


# ------------------------------------------------------------------------------------------------------------ keys of records


def test_two_biases_are_another_run():
    plain = to_config(EXPERIMENTS["smnist_wrnn"])
    model = {**plain["model"], "kind": "irnn", "c": 1}
    options = ({}, {"recurrent_bias": False}, {"recurrent_bias": True})
    one, off, two = (run_key(from_config({**plain, "model": model | o}), 0) for o in options)
    assert one == off != two


def test_a_hook_on_the_layer_of_a_model_runs(config):
    if config.kind == "mlp":  # it has no layer
        return
    model, seen = build_model(config, 0), []
    model.layer.register_forward_pre_hook(lambda *_: seen.append(1))
    model(torch.randn(5, 2, 3))
    assert model.states(torch.randn(5, 2, 3)).shape == (5, 2, *model.layer.state_shape)
    assert len(seen) == 2

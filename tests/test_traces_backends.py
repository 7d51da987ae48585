"""The backends of `sample_traces`: the same traces from each, and which models they run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trace_data import (
    ACTIONS,
    F32,
    F64,
    OBSERVATIONS,
    assert_same,
    make_model,
    make_noise,
    make_start,
)

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.traces import TraceNoise, draw_noise
from torchrl_recall.traces.eager import unsupported

NETWORKS = [
    ((), nn.ReLU),
    ((32,), nn.ReLU),
    ((32, 32), nn.ReLU),
    ((32,), nn.Tanh),
    ((32, 32), nn.SiLU),
]


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize(("num_cells", "activation"), NETWORKS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_backends_agree_to_rounding(observation, action, num_cells, activation, stop):
    model = make_model(
        observation, action, num_cells=num_cells, activation_class=activation, stop=stop
    )
    start, noise = make_start(model, 20), make_noise(model, 6, 20)
    traces = [
        sample_traces(model, start, num_steps=6, noise=noise, backend=backend)
        for backend in ("reference", "eager")
    ]
    # Six steps of a chain amplify rounding, most without hidden layers.
    assert_same(*traces, tolerance=1e-11)
    assert bool(torch.isfinite(traces[0]["action_log_prob"]).all())


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_backends_agree_to_single_precision(observation, action):
    model = make_model(observation, action, dtype=F32, num_cells=(32, 32), stop=True)
    start, noise = make_start(model, 50), make_noise(model, 2, 50)
    traces = [
        sample_traces(model, start, num_steps=2, noise=noise, backend=backend)
        for backend in ("reference", "eager")
    ]
    assert_same(*traces, tolerance=5e-5)


@pytest.mark.parametrize("observation", ["normal", "support"])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_tiles_do_not_show(observation, backend):
    model = make_model(observation, "categorical", stop=True)
    start, noise = make_start(model, 1300), make_noise(model, 3, 1300)
    whole = sample_traces(model, start, num_steps=3, noise=noise, backend=backend)
    for low in (0, 500, 511, 512, 1023, 1024, 1299):
        rows = slice(low, low + 2)
        part = TraceNoise(*(column[:, rows] for column in noise[:3]))
        alone = sample_traces(model, start[rows], num_steps=3, noise=part, backend=backend)
        assert_same(whole[rows], alone, tolerance=1e-10)


def test_auto_is_eager_where_it_can_be():
    model = make_model(stop=True)
    start, noise = make_start(model, 4), make_noise(model, 3, 4)
    auto = sample_traces(model, start, num_steps=3, noise=noise)
    assert_same(auto, sample_traces(model, start, num_steps=3, noise=noise, backend="eager"), 0)


class Residual(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


def replaced(kind):
    """A model whose stop network the eager backend must not touch."""
    model = make_model(stop=True)
    linear = [nn.Linear(3, 8, dtype=F64), nn.Linear(8, 8, dtype=F64), nn.Linear(8, 1, dtype=F64)]
    networks = {
        "mixed": nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.Tanh(), linear[2]),
        "settings": nn.Sequential(
            linear[0], nn.LeakyReLU(0.1), linear[1], nn.LeakyReLU(0.5), linear[2]
        ),
        "own_forward": Residual(linear[0], nn.ReLU(), linear[2]),
        "norm": nn.Sequential(linear[0], nn.LayerNorm(8, dtype=F64), linear[2]),
        "order": nn.Sequential(linear[0], linear[1], nn.ReLU(), linear[2]),
        "dropout": nn.Sequential(linear[0], nn.ReLU(), nn.Dropout(0.0), linear[2]),
        "no_bias": nn.Sequential(nn.Linear(3, 1, bias=False, dtype=F64)),
        "module": nn.Bilinear(3, 3, 1, dtype=F64),
    }
    model.stop_network = networks[kind]
    if kind == "module":
        network = networks[kind]
        model.stop_network = nn.Module()
        model.stop_network.add_module("bilinear", network)
        model.stop_network.forward = lambda x: network(x, x)
    return model


KINDS = ["mixed", "settings", "own_forward", "norm", "order", "dropout", "no_bias", "module"]


@pytest.mark.parametrize("kind", KINDS)
def test_networks_that_eager_cannot_run_fall_back_with_a_warning(kind):
    model = replaced(kind)
    assert "stop_network" in unsupported(model)
    start, noise = make_start(model, 4), make_noise(model, 3, 4)
    options = {"num_steps": 3, "noise": noise}
    with pytest.warns(UserWarning, match="falls back to the reference backend: stop_network"):
        auto = sample_traces(model, start, **options)
    assert_same(auto, sample_traces(model, start, **options, backend="reference"), 0)
    with pytest.raises(ValueError, match="backend='eager' cannot run this model: stop_network"):
        sample_traces(model, start, **options, backend="eager")


def test_a_large_constant_feature_does_not_cancel():
    torch.manual_seed(0)
    model = BacktrackModel(3, 2, num_cells=(32,))
    states = torch.randn(1000, 3)
    states[:, 2] = 1e5
    action, before = torch.zeros(1000, 2), states + 0.1 * torch.randn(1000, 3)
    before[:, 2] = 1e5
    model.update_normalization(before, action, states)
    noise = draw_noise(model, 5, 100)
    eager, reference = (
        sample_traces(model, states[:100], num_steps=5, noise=noise, backend=backend)
        for backend in ("eager", "reference")
    )
    for key in ("action", "observation"):
        torch.testing.assert_close(eager[key], reference[key], rtol=1e-5, atol=1e-4)

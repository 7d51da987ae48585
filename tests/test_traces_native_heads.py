"""The C kernel's mixtures and uniform actions: against float64, torch's laws and its own stream."""

from __future__ import annotations

import copy

import philox_stream
import pytest
import torch
from scipy import stats
from torchrl.data import Bounded, Categorical
from trace_data import F32, F64, assert_same, make_model, make_noise, make_start

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.native import interface
from torchrl_recall.traces import TraceNoise, native

pytestmark = pytest.mark.skipif(
    interface.load()[0] is None, reason=f"no native library: {interface.load()[1]}"
)
# Sampling tests fail a correct sampler this often over all seeds; the seeds are fixed.
ERROR_RATE = 1e-4
OPTIONS = [
    {"num_components": 3},
    {"reverse_action": "uniform"},
    {"num_components": 2, "reverse_action": "uniform"},
]


def in_double(model, start, noise):
    """The reference in float64, fed the same states and noise."""
    noise = TraceNoise(*(None if part is None else part.double() for part in noise))
    start = start.double() if start.is_floating_point() else start
    double = copy.deepcopy(model).double()
    return sample_traces(
        double, start, num_steps=len(noise.action), noise=noise, backend="reference"
    )


def assert_like_the_reference(model, start, noise, tolerance=2e-4):
    options = {"num_steps": len(noise.action), "noise": noise, "backend": "native"}
    found, expected = sample_traces(model, start, **options), in_double(model, start, noise)
    for key, value in expected.items(True, True):
        if value.is_floating_point():
            error = (found[key] - value).abs().max() / value.abs().max().clamp_min(1)
            assert float(error) < tolerance, (key, float(error))
        else:
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("action", ["tanh", "normal", "categorical"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_numbers_against_float64(options, action, stop):
    if action == "normal":
        options = {**options, "reverse_action": "learned"}
    model = make_model("normal", action, dtype=F32, num_cells=(64, 48), stop=stop, **options)
    assert_like_the_reference(model, make_start(model, 70), make_noise(model, 6, 70))


@pytest.mark.parametrize(
    ("size", "action", "num_components", "num_cells"),
    [(11, 3, 2, (64, 64)), (1, 1, 7, ()), (30, 7, 5, (33, 17)), (4, 2, 20, (8,))],
)
def test_sizes_against_float64(size, action, num_components, num_cells):
    torch.manual_seed(size)
    model = BacktrackModel(
        size, action, num_cells=num_cells, num_components=num_components, stop=True
    )
    assert_like_the_reference(model, torch.randn(65, size), make_noise(model, 5, 65))


@pytest.mark.parametrize("action", ["tanh", "categorical"])
@pytest.mark.parametrize("observation", ["lattice", "support", "class"])
def test_uniform_actions_of_other_states(observation, action):
    """Also by the kernel's tables, which need enough steps to be worth while."""
    model = make_model(observation, action, dtype=F32, stop=True, reverse_action="uniform")
    assert_like_the_reference(model, make_start(model, 200), make_noise(model, 5, 200))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_instruction_sets_agree(options):
    model = make_model(dtype=F32, num_cells=(33,), stop=True, **options)
    start, plan = make_start(model, 70), native.plan_of(model)
    widest, results = plan.instruction_set, {}
    sets = [one for one in (0, 256, 512) if one <= interface.load()[0].recall_instruction_set()]
    try:
        for plan.instruction_set in sets:
            results[plan.instruction_set] = native.walk(plan, start, 2, 5, seed=2**61 + 11)
    finally:
        plan.instruction_set = widest
    for columns in results.values():
        for one, other in zip(columns, results[sets[0]], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_draws_the_stream_that_is_stated(options):
    model = make_model(dtype=F32, stop=True, **options)
    start, seed = make_start(model, 20), 2**55 + 7
    columns = native.walk(native.plan_of(model), start, 1, 3, seed=seed)
    noise = philox_stream.trace_noise(model, seed, 3, 20)
    expected = native.walk(native.plan_of(model), start, 1, 3, noise=noise)
    for one, other in zip(columns, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_components_are_drawn_as_often_as_their_logits_say():
    model = BacktrackModel(1, 1, num_cells=(), num_components=3)
    share = torch.tensor([0.2, 0.5, 0.3])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        bias = model.delta_network[-1].bias
        bias[:3] = torch.tensor([-100.0, 0.0, 100.0])
        bias[3:6] = -100  # exp(-6)
        bias[6:] = share.log()
    options = {"num_traces": 20_000, "generator": torch.Generator().manual_seed(0)}
    trace = sample_traces(model, torch.zeros(1), num_steps=1, backend="native", **options)
    index = (trace["observation"].flatten() / 100).round().long() + 1
    counts = index.bincount(minlength=3).numpy()
    assert stats.chisquare(counts, 20_000 * share.double().numpy()).pvalue > ERROR_RATE


def test_actions_of_a_box_are_uniform():
    model = BacktrackModel(3, Bounded(-2, 5, (2,)), num_cells=(8,), reverse_action="uniform")
    options = {"num_traces": 20_000, "generator": torch.Generator().manual_seed(0)}
    trace = sample_traces(model, torch.zeros(3), num_steps=1, backend="native", **options)
    for column in trace["action"][:, 0].T.numpy():
        assert stats.kstest(column, stats.uniform(-2, 7).cdf).pvalue > ERROR_RATE


def test_changed_parameters_and_statistics_are_seen():
    model = make_model(dtype=F32, num_components=2)
    start, noise = make_start(model, 9), make_noise(model, 2, 9)
    sample_traces(model, start, num_steps=2, noise=noise, backend="native")
    with torch.no_grad():
        model.delta_network[-1].bias += 0.5
        model.delta_head.normalizer.mean += 1
        model.delta_head.normalizer.variance *= 4
    assert_like_the_reference(model, start, noise)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_auto_takes_the_kernel_also_in_a_compiled_graph(options):
    model = make_model(dtype=F32, stop=True, **options)
    start, noise = make_start(model, 9), make_noise(model, 2, 9)
    expected = sample_traces(model, start, num_steps=2, noise=noise, backend="native")
    assert_same(sample_traces(model, start, num_steps=2, noise=noise), expected, 0)
    if options == OPTIONS[0]:

        @torch.compile(backend="eager", fullgraph=True)
        def walk(start, noise):
            return sample_traces(model, start, num_steps=2, noise=noise)

        assert_same(walk(start, noise), expected, 0)


def test_a_broken_component_masks_what_it_is_drawn_for():
    model = BacktrackModel(1, Categorical(2), num_cells=(), num_components=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.delta_network[-1].bias[1] = torch.finfo(F32).max
        model.delta_head.normalizer.variance.fill_(1e6)
    noise = make_noise(model, 1, 40)
    options = {"num_steps": 1, "noise": noise}
    found = sample_traces(model, torch.zeros(40, 1), **options, backend="native")
    good = noise.delta[0, :, 1] < 0
    assert torch.equal(found["collector", "mask"][:, 0], good)
    assert all(bool(torch.isfinite(x.to(F64)).all()) for x in found.values(True, True))
    other = sample_traces(model, torch.zeros(40, 1), **options, backend="eager")
    assert_same(found, other, 1e-4)

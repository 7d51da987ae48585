"""Traces: both backends the same, laid out as rollouts, and distributed as the model says."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from exact_model import exact_model
from scipy import stats
from tensordict import TensorDict
from torch import nn
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    OneHot,
    Unbounded,
)
from torchrl.envs import ExplorationType, InitTracker, TransformedEnv, set_exploration_type

from torchrl_recall import BacktrackLoss, BacktrackModel, sample_traces
from torchrl_recall.diagnostics import tabular_kernel
from torchrl_recall.envs import (
    FourRoomsEnv,
    forward_log_probability,
    trajectory_log_probability,
    transition_probability,
)
from torchrl_recall.traces import TraceNoise, draw_noise
from torchrl_recall.traces.eager import unsupported
from torchrl_recall.traces.masks import last_visit

F32, F64 = torch.float32, torch.float64
# Sampling tests fail a correct sampler this often over all seeds; the seeds are fixed.
ERROR_RATE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More threads only cost on networks of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LATTICE = torch.tensor([[0.5, 0.0], [-0.5, 0.0], [0.0, 0.5], [0.0, -0.5]])
CELLS = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])

OBSERVATIONS = {
    "normal": lambda dtype: (Unbounded((3,), dtype=dtype), None),
    "lattice": lambda dtype: (Bounded(-2, 2, (2,), dtype=dtype), LATTICE),
    "support": lambda dtype: (MultiCategorical([5, 6]), CELLS),
    "class": lambda dtype: (Categorical(7), None),
    "large": lambda dtype: (MultiCategorical([40, 50]), CELLS),
}
ACTIONS = {
    "tanh": lambda dtype: Bounded(-2, 5, (2,), dtype=dtype),
    "normal": lambda dtype: Unbounded((2,), dtype=dtype),
    "categorical": lambda dtype: Categorical(4),
    "one_hot": lambda dtype: OneHot(3),
}


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def make_model(observation="normal", action="tanh", *, dtype=F64, seed=0, **kwargs):
    torch.manual_seed(seed)
    spec, support = OBSERVATIONS[observation](dtype)
    options = {"num_cells": (32,), **kwargs}
    model = BacktrackModel(
        spec, ACTIONS[action](dtype), delta_support=support, dtype=dtype, **options
    )
    # Statistics that are not those of fresh data, or a backend that forgot them would pass.
    size = model.observation.size
    rows, change = randn(64, size, dtype=dtype), 0.3 * randn(64, size, seed=1, dtype=dtype) + 0.1
    action_rows = 2 * randn(64, 2, seed=2, dtype=dtype) + 1
    if not model.observation.is_discrete:
        model.update_normalization(2 * rows + 1 + change, action_rows, 2 * rows + 1)
    else:
        model.action.update_normalization(action_rows)
    return model


def make_start(model, *batch, seed=5):
    generator = torch.Generator().manual_seed(seed)
    codec = model.observation
    if codec.is_discrete:
        index = torch.randint(codec.num_states, batch, generator=generator)
        return codec.restore(codec.from_joint_index(index))["observation"]
    if model.delta_head.noise_kind == "uniform":
        return torch.randint(-4, 5, (*batch, 2), generator=generator).to(model.dtype) / 2
    return torch.randn(*batch, 3, generator=generator, dtype=F64).to(model.dtype)


def make_noise(model, num_steps, rows, seed=7):
    return draw_noise(model, num_steps, rows, torch.Generator().manual_seed(seed))


def assert_same(one, other, tolerance):
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    for key, value in one.items(True, True):
        if value.is_floating_point():
            torch.testing.assert_close(value, other[key], rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(value, other[key]), key


# The backends. ----------------------------------------------------------------------------------

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
        part = TraceNoise(*(column[:, rows] for column in noise))
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


# Randomness. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_the_generator_decides(backend):
    model = make_model(stop=True)
    start = make_start(model, 600)

    def draw(generator):
        return sample_traces(model, start, num_steps=3, generator=generator, backend=backend)

    first, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert_same(first, again, 0)
    for key in ("observation", "action"):
        assert not torch.allclose(first[key], other[key])
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    untouched = torch.get_rng_state()
    draw(generator)
    assert torch.equal(torch.get_rng_state(), untouched)
    assert not torch.allclose(draw(generator)["action"], first["action"])


def test_without_a_generator_torchs_own_decides():
    model = make_model()
    start = make_start(model, 5)
    traces = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        traces.append(sample_traces(model, start, num_steps=3))
    assert_same(traces[0], traces[1], 0)
    assert not torch.allclose(traces[0]["action"], traces[2]["action"])


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("kind", list(ExplorationType))
def test_the_global_exploration_type_does_not_matter(kind, backend):
    model = make_model()
    start, noise = make_start(model, 5), make_noise(model, 3, 5)
    expected = sample_traces(model, start, num_steps=3, noise=noise, backend=backend)
    with set_exploration_type(kind):
        found = sample_traces(model, start, num_steps=3, noise=noise, backend=backend)
    assert_same(found, expected, 0)


# Layout. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_traces", [None, 1, 4])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("observation", ["normal", "support"])
def test_a_trace_is_a_rollout_that_ends_in_its_start(observation, batch, num_traces):
    model = make_model(observation, "categorical", stop=True)
    start = make_start(model, *batch)
    trace = sample_traces(model, start, num_steps=5, num_traces=num_traces)
    rows = batch if num_traces is None else (*batch, num_traces)
    assert trace.shape == (*rows, 5)
    if num_traces is not None:
        start = start.unsqueeze(-2).expand(*rows, -1)
    following = trace["next", "observation"]
    assert torch.equal(following[..., -1, :], start)
    assert torch.equal(trace["observation"][..., 1:, :], following[..., :-1, :])
    assert trace["action"].shape == (*rows, 5)
    for key in ("action_log_prob", "delta_log_prob", ("collector", "mask")):
        assert trace[key].shape == (*rows, 5)
    assert trace["collector", "mask"].dtype == torch.bool
    if num_traces == 4:
        # Several traces of one start are not copies of each other.
        assert not torch.equal(
            trace["action_log_prob"][..., 0, :], trace["action_log_prob"][..., 1, :]
        )


def test_keys_shapes_and_dtypes_are_those_of_the_environment():
    observation = Composite(
        camera=Unbounded((2, 2)), agent=Composite(speed=Unbounded(()), place=Unbounded((3,)))
    )
    model = BacktrackModel(
        observation, OneHot(3, dtype=torch.bool), num_cells=(8,), action_key=("agent", "act")
    )
    start = TensorDict(
        {
            "camera": torch.ones(4, 2, 2),
            "agent": {"speed": torch.ones(4), "place": torch.ones(4, 3)},
        },
        [4],
    )
    trace = sample_traces(model, start, num_steps=3)
    shapes = {
        "camera": (4, 3, 2, 2),
        ("agent", "speed"): (4, 3),
        ("agent", "place"): (4, 3, 3),
    }
    for key, shape in shapes.items():
        nested = key if isinstance(key, tuple) else (key,)
        assert trace[key].shape == trace[("next", *nested)].shape == shape
        assert bool((trace[("next", *nested)][:, -1] == 1).all())
    assert trace["agent", "act"].dtype == torch.bool
    assert bool((trace["agent", "act"].sum(-1) == 1).all())
    # One flat tensor of all keys will do as well.
    flat = sample_traces(model, torch.ones(4, 8), num_steps=3)
    assert bool((flat["next", "agent", "place"][:, -1] == 1).all())


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_log_probs_are_those_of_the_trace_as_real_data(observation, action, stop):
    model = make_model(observation, action, stop=stop)
    trace = sample_traces(model, make_start(model, 30), num_steps=4)
    with torch.no_grad():
        terms = model.step_log_prob(*model.read(trace))
    torch.testing.assert_close(trace["action_log_prob"], terms["action"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(trace["delta_log_prob"], terms["delta"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_stop_masks_all_that_came_before(backend):
    model = make_model(stop=True)
    noise = make_noise(model, 10, 400)
    mask = sample_traces(model, make_start(model, 400), num_steps=10, noise=noise, backend=backend)[
        "collector", "mask"
    ]
    assert 0 < int(mask.sum()) < mask.numel()
    # Once kept, always kept: False, ..., False, True, ..., True.
    assert bool((mask[:, 1:] >= mask[:, :-1]).all())
    logit = model.stop_logit(make_start(model, 400))
    assert torch.equal(mask[:, -1], noise.stop[-1] >= torch.sigmoid(logit))


def test_without_a_stop_head_everything_is_kept():
    trace = sample_traces(make_model(), randn(5, 3), num_steps=4)
    assert bool(trace["collector", "mask"].all())


def test_no_gradient_flows_through_a_trace():
    model = make_model(stop=True)
    start = make_start(model, 5).requires_grad_()
    for backend in ("reference", "eager"):
        trace = sample_traces(model, start, num_steps=3, backend=backend)
        assert not any(value.requires_grad for value in trace.values(True, True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_statistics_do_not_learn_from_traces():
    model = make_model(stop=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample_traces(model, make_start(model, 50), num_steps=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_the_model_changes_the_next_traces():
    model = make_model()
    start, noise = make_start(model, 5), make_noise(model, 3, 5)
    before = sample_traces(model, start, num_steps=3, noise=noise)
    data = TensorDict(
        {
            "observation": randn(8, 3),
            "action": randn(8, 2).tanh(),
            "next": {"observation": randn(8, 3)},
        },
        [8],
    )
    BacktrackLoss(model)(data)  # the statistics alone
    after = sample_traces(model, start, num_steps=3, noise=noise)
    assert not torch.allclose(after["observation"], before["observation"])


# Last visit. ------------------------------------------------------------------------------------


def last_visit_by_definition(states):
    """Keep step t iff ``s_t`` is none of ``s_{t+1}, …, s_T``."""
    return [states[t] not in states[t + 1 :] for t in range(len(states) - 1)]


def test_the_last_exit_is_kept_not_the_first():
    # A detour from 1 through 2 back to 1: its steps teach the detour; the last exit leads on.
    states = [0, 1, 2, 1, 3]
    assert last_visit_by_definition(states) == [True, False, True, True]
    found = last_visit(torch.tensor(states).unsqueeze(-1))
    assert found.tolist() == [True, False, True, True]
    # What comes back to the goal itself was a detour from the goal.
    assert last_visit(torch.tensor([[3], [1], [3]])).tolist() == [False, True]
    # Waiting: only the last of equal states moves on.
    assert last_visit(torch.tensor([[1], [1], [1], [2]])).tolist() == [False, False, True]


@pytest.mark.parametrize("batch", [(), (7,), (3, 4)])
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_last_visit_is_its_definition(batch, num_steps):
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(3, (*batch, num_steps + 1, 2), generator=generator)
    found = last_visit(states).reshape(-1, num_steps).tolist()
    walks = states.reshape(-1, num_steps + 1, 2).tolist()
    assert found == [last_visit_by_definition(walk) for walk in walks]


@pytest.mark.parametrize("observation", ["support", "class", "lattice"])
def test_traces_are_masked_by_last_visit_and_stop(observation):
    model = make_model(observation, "categorical", stop=True)
    start, noise = make_start(model, 40), make_noise(model, 12, 40)
    options = {"num_steps": 12, "noise": noise}
    every = sample_traces(model, start, **options)
    last = sample_traces(model, start, **options, last_visit=True)
    assert torch.equal(every["observation"], last["observation"])
    column = ("collector", "mask")
    states = torch.cat([every["observation"].reshape(40, 12, -1), start.reshape(40, 1, -1)], 1)
    wanted = torch.tensor([last_visit_by_definition(walk) for walk in states.tolist()])
    assert torch.equal(last[column], every[column] & wanted)
    assert 0 < int(last[column].sum()) < int(every[column].sum())


def test_last_visit_keeps_all_of_a_continuous_walk():
    model = make_model(stop=False)
    trace = sample_traces(model, make_start(model, 5), num_steps=4, last_visit=True)
    assert bool(trace["collector", "mask"].all())


# What leaves the numbers. -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("action", ACTIONS)
def test_overflow_is_masked_and_everything_is_finite(action, stop, backend):
    model = make_model("normal", action, dtype=F32, stop=stop, num_cells=(8,))
    start = torch.cat([make_start(model, 9), torch.zeros(1, 3)])
    with torch.no_grad():
        # Only states right of the origin explode, within a few steps.
        for parameter in model.delta_network.parameters():
            parameter.mul_(300.0)
    trace = sample_traces(
        model, start, num_steps=30, noise=make_noise(model, 30, 10), backend=backend
    )
    for key, value in trace.items(True, True):
        assert bool(torch.isfinite(value).all()), key
    mask = trace["collector", "mask"]
    assert not bool(mask[:, 0].all())
    assert bool((mask[:, 1:] >= mask[:, :-1]).all())
    if not stop:
        assert bool(mask[:, -1].all())


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_an_action_can_overflow_before_the_state_does(backend):
    model = BacktrackModel(1, Unbounded((1,)), num_cells=(1,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # The state grows by 5 a step, whatever the action, which overflows where the state is
        # above 12: the ReLU of minus infinity is 0.
        model.delta_network[0].weight[0, 1] = -1
        model.delta_network[2].weight[0, 0] = 1
        model.delta_network[2].bias[:] = torch.tensor([5.0, -100.0])
        model.action_network[0].weight[0, 0] = 1
        model.action_network[2].weight[0, 0] = 3.4e38 / 12
    trace = sample_traces(
        model, torch.zeros(1, 1), num_steps=6, noise=make_noise(model, 6, 1), backend=backend
    )
    # An action is conditioned on the next state: 25, 20, 15, 10, 5, 0.
    assert trace["collector", "mask"].tolist() == [[False, False, False, True, True, True]]
    assert trace["next", "observation"][0, 3:, 0].tolist() == pytest.approx([10, 5, 0], abs=0.5)
    for key, value in trace.items(True, True):
        assert bool(torch.isfinite(value).all()), key


# What is refused. -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": -3}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be an int"),
        ({"num_steps": True}, TypeError, "num_steps must be an int"),
        ({"num_steps": None}, TypeError, "num_steps must be an int"),
        ({"num_traces": 0}, ValueError, "num_traces must be at least 1, got 0"),
        ({"num_traces": "2"}, TypeError, "num_traces must be an int"),
        ({"next_observation": torch.zeros(0, 3)}, ValueError, "next_observation is empty"),
        ({"next_observation": TensorDict({}, [2])}, KeyError, "'observation' is missing"),
        ({"next_observation": {}}, KeyError, "next_observation lacks"),
        ({"next_observation": [0.0] * 3}, TypeError, "next_observation must be a tensor"),
        ({"next_observation": torch.zeros(2, 4)}, ValueError, "next_observation has shape"),
        ({"next_observation": torch.zeros(())}, ValueError, "next_observation has shape"),
        ({"next_observation": torch.zeros(2, 3, dtype=F64)}, ValueError, "next_observation has d"),
        ({"next_observation": torch.zeros(2, 3, dtype=int)}, ValueError, "next_observation has d"),
        ({"next_observation": torch.full((2, 3), torch.nan)}, ValueError, "must be finite, got 6"),
        ({"next_observation": torch.full((2, 3), torch.inf)}, ValueError, "must be finite, got 6"),
        ({"next_observation": torch.zeros(2, 3, device="meta")}, ValueError, "is on device meta"),
        ({"backend": "native?"}, ValueError, "backend must be one of"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"model": nn.Linear(3, 3)}, TypeError, "model must be a BacktrackModel, got Linear"),
    ],
)
def test_refuses_by_name(arguments, error, message):
    model = make_model(dtype=F32)
    options = {"model": model, "next_observation": torch.zeros(2, 3), "num_steps": 4, **arguments}
    with pytest.raises(error, match=message):
        sample_traces(options.pop("model"), options.pop("next_observation"), **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_refuses_a_generator_of_another_device():
    generator = torch.Generator("cuda")
    with pytest.raises(ValueError, match="generator is on device cuda"):
        sample_traces(make_model(), randn(2, 3), num_steps=2, generator=generator)


@pytest.mark.parametrize("part", ["action", "delta", "stop"])
@pytest.mark.parametrize("how", ["steps", "rows", "none"])
def test_refuses_noise_of_the_wrong_shape(part, how):
    model = make_model(stop=True)
    noise = make_noise(model, 4, 6)
    value = getattr(noise, part)
    wrong = {"steps": value[1:], "rows": value[:, :-1], "none": None}[how]
    with pytest.raises(ValueError, match=rf"noise\.{part} has shape"):
        sample_traces(model, randn(6, 3), num_steps=4, noise=noise._replace(**{part: wrong}))


def test_refuses_stop_noise_without_a_stop_head():
    noise = make_noise(make_model(stop=True), 4, 6)
    with pytest.raises(ValueError, match=r"noise\.stop has shape \(4, 6\), expected None"):
        sample_traces(make_model(), randn(6, 3), num_steps=4, noise=noise)


# The distribution of traces. --------------------------------------------------------------------

UNIFORM = torch.full((25, 4), 0.25, dtype=F64)
GOAL = 18
MAZE = {"slip": 0.1, "max_steps": None}


def chi_square(counts, probability, total):
    """p-value of counts of outcomes; rare ones are pooled, impossible ones must not occur."""
    assert set(counts) <= {outcome for outcome, p in probability.items() if p > 0}
    assert sum(counts.values()) == total
    assert sum(probability.values()) == pytest.approx(1, abs=1e-6)
    observed, expected, pool = [], [], [0.0, 0.0]
    for outcome, p in probability.items():
        if total * p >= 10:
            observed.append(counts.get(outcome, 0))
            expected.append(total * p)
        else:
            pool[0] += counts.get(outcome, 0)
            pool[1] += total * p
    if pool[1] >= 10:
        observed.append(pool[0])
        expected.append(pool[1])
    elif pool[1]:
        observed[-1] += pool[0]
        expected[-1] += pool[1]
    expected = [e * sum(observed) / sum(expected) for e in expected]
    return stats.chisquare(observed, expected).pvalue


def as_cells(trace):
    """States ``[..., T + 1]`` and actions ``[..., T]`` of a maze's traces."""
    to_cell = torch.tensor([5, 1])
    states = trace["observation"] @ to_cell
    last = trace["next", "observation"][..., -1:, :] @ to_cell
    return torch.cat([states, last], -1), trace["action"]


def walk_maze(model, cell, number, num_steps, backend="auto", seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor(divmod(cell, 5))
    options = {"num_traces": number, "generator": generator, "backend": backend}
    trace = sample_traces(model, start, num_steps=num_steps, **options)
    return (*as_cells(trace), trace["collector", "mask"], trace)


@pytest.fixture(scope="module")
def fitted():
    """A model that has learned a little of the maze: any but the exact one will do."""
    torch.manual_seed(0)
    env = TransformedEnv(FourRoomsEnv(5, **MAZE, batch_size=(50,), seed=0), InitTracker())
    model = BacktrackModel.from_env(env, num_cells=(32,))
    loss = BacktrackLoss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = env.rollout(100, break_when_any_done=False)
    for _ in range(30):
        optimizer.zero_grad()
        loss(data)["loss_backtrack"].backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def exact():
    model, kernel = exact_model(FourRoomsEnv(5, **MAZE), UNIFORM)
    return model, kernel


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("cell", [6, 8, 13, GOAL])
def test_one_step_has_the_distribution_of_the_kernel(fitted, cell, backend):
    stop, predecessor = tabular_kernel(fitted, FourRoomsEnv(5))
    states, actions, mask, _ = walk_maze(fitted, cell, 20_000, 1, backend)
    counts = Counter()
    for before, action, kept in zip(
        states[:, 0].tolist(), actions[:, 0].tolist(), mask[:, 0].tolist(), strict=True
    ):
        counts[(action, before) if kept else "stop"] += 1
    probability = {"stop": float(stop[cell])}
    for action, before in itertools.product(range(4), range(25)):
        p = float((1 - stop[cell]) * predecessor[cell, action, before])
        probability[action, before] = p
    assert chi_square(counts, probability, 20_000) > ERROR_RATE


def test_two_steps_have_the_distribution_of_the_product(fitted):
    stop, predecessor = (part.tolist() for part in tabular_kernel(fitted, FourRoomsEnv(5)))
    number = 40_000
    states, actions, mask, _ = walk_maze(fitted, GOAL, number, 2)
    counts = Counter()
    for s, a, kept in zip(states.tolist(), actions.tolist(), mask.tolist(), strict=True):
        taken = [(a[t], s[t]) for t in (1, 0) if kept[t]]
        counts[tuple(taken)] += 1
    probability = {(): stop[GOAL]}
    for a1, s1 in itertools.product(range(4), range(25)):
        p1 = (1 - stop[GOAL]) * predecessor[GOAL][a1][s1]
        if p1 == 0:
            continue
        probability[((a1, s1),)] = p1 * stop[s1]
        for a0, s0 in itertools.product(range(4), range(25)):
            p0 = (1 - stop[s1]) * predecessor[s1][a0][s0]
            if p0 > 0:
                probability[(a1, s1), (a0, s0)] = p1 * p0
    assert chi_square(counts, probability, number) > ERROR_RATE


def test_traces_of_the_exact_model_are_as_long_as_episodes(exact):
    model, _ = exact
    number, longest = 10_000, 60
    _, _, mask, _ = walk_maze(model, GOAL, number, longest)
    length = mask.sum(-1).tolist()
    # Forwards, without any posterior: the first time at the goal.
    flow = (UNIFORM.unsqueeze(-1) * transition_probability(FourRoomsEnv(5, **MAZE))).sum(1)
    place, probability = torch.zeros(25, dtype=F64), {}
    place[6] = 1
    for t in range(1, longest):
        place = place @ flow
        probability[t] = float(place[GOAL])
        place[GOAL] = 0
    # Who has not stopped by then came from at least that long ago.
    probability[longest] = float(place.sum())
    assert chi_square(Counter(length), probability, number) > ERROR_RATE


def short_episodes(env, longest):
    """All episodes from (1, 1) to the goal of so many steps at most, and their probability."""
    linked = transition_probability(env) > 0
    steps = [
        [
            (action, after)
            for action in range(4)
            for after in linked[cell, action].nonzero().flatten().tolist()
        ]
        for cell in range(25)
    ]
    probability, walks = {}, [((6,), ())]
    for left in reversed(range(longest)):
        grown = [
            ((*s, after), (*a, action))
            for s, a in walks
            for action, after in steps[s[-1]]
            if abs(after // 5 - 3) + abs(after % 5 - 3) <= left
        ]
        walks = [walk for walk in grown if walk[0][-1] != GOAL]
        done = [walk for walk in grown if walk[0][-1] == GOAL]
        if done:
            s, a = (torch.tensor(column) for column in zip(*done, strict=True))
            log_probability = forward_log_probability(env, UNIFORM, s, a)
            probability.update(zip(done, log_probability.exp().tolist(), strict=True))
    return probability


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_whole_traces_of_the_exact_model_have_the_posterior_distribution(exact, backend):
    model, _ = exact
    number, longest = 40_000, 5
    # One more step than the longest episode counted, for its stop.
    states, actions, mask, _ = walk_maze(model, GOAL, number, longest + 1, backend)
    counts = Counter()
    for s, a, length in zip(states.tolist(), actions.tolist(), mask.sum(-1).tolist(), strict=True):
        first = longest + 1 - length
        short = length <= longest
        counts[(tuple(s[first:]), tuple(a[first:])) if short else "longer"] += 1
    probability = short_episodes(FourRoomsEnv(5, **MAZE), longest)
    probability["longer"] = 1 - sum(probability.values())
    assert chi_square(counts, probability, number) > ERROR_RATE


def test_whole_traces_of_the_exact_model_know_their_log_probability(exact):
    model, kernel = exact
    states, actions, mask, trace = walk_maze(model, GOAL, 300, 60)
    whole = ~mask[:, 0]
    assert int(whole.sum()) > 100
    step = trace["action_log_prob"] + trace["delta_log_prob"]
    cells = torch.stack([states // 5, states % 5], -1)
    with torch.no_grad():
        logit = model.stop_logit(cells)
    goes_on, stops = nn.functional.logsigmoid(-logit), nn.functional.logsigmoid(logit)
    for i in whole.nonzero().flatten().tolist():
        first = int((~mask[i]).sum())
        found = (step[i, first:] + goes_on[i, first + 1 :]).sum() + stops[i, first]
        expected = trajectory_log_probability(kernel, states[i, first:], actions[i, first:])
        assert float(found) == pytest.approx(float(expected), rel=1e-5, abs=1e-4)


def test_the_exact_model_only_takes_possible_steps(exact):
    model, _ = exact
    states, actions, mask, _ = walk_maze(model, GOAL, 500, 40)
    possible = transition_probability(FourRoomsEnv(5, **MAZE)) > 0
    assert bool(possible[states[:, :-1], actions, states[:, 1:]][mask].all())
    assert not bool((states[:, :-1][mask] == GOAL).any())


def test_a_gaussian_step_has_the_distribution_of_its_head():
    model = make_model("normal", "tanh")
    start = randn(3)
    trace = sample_traces(
        model, start, num_steps=1, num_traces=4000, generator=torch.Generator().manual_seed(0)
    )[:, 0]
    with torch.no_grad():
        loc, log_scale = model.action.head.split(model.action_parameters(start))
        pre = torch.atanh((trace["action"] - 1.5) / 3.5)
        action = ((pre - loc) / log_scale.exp()).numpy()
        next_state = start.expand(4000, 3)
        parameters = model.delta_parameters(trace["action"], next_state)
        loc, log_scale = model.delta_head.split(parameters)
        delta = model.delta_head.normalizer.normalize(trace["observation"] - next_state)
        change = ((delta - loc) / log_scale.exp()).numpy()
    for column in (*action.T, *change.T):
        assert stats.kstest(column, "norm").pvalue > ERROR_RATE

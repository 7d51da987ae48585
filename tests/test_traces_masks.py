"""The mask of a trace: stops, last visits, and what leaves the numbers."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import MultiCategorical, Unbounded
from trace_data import ACTIONS, F32, make_model, make_noise, make_start, randn

from torchrl_recall import BacktrackModel, BacktrackTransform, sample_traces
from torchrl_recall.traces.masks import last_visit


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


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_dead_end_ends_the_trace(backend):
    # Nothing leads to (2, 2) by a step up or left; from (0, 0) back it takes four to get there.
    support = torch.tensor([[0, 1], [1, 0]])
    model = BacktrackModel(MultiCategorical([3, 3]), 2, delta_support=support, num_cells=(8,))
    start = torch.tensor([[2, 2], [0, 0]])
    trace = sample_traces(model, start, num_steps=6, backend=backend)
    assert trace["collector", "mask"].tolist() == [[False] * 6, [False] * 2 + [True] * 4]
    assert (trace["observation"][0] == 2).all()
    assert (trace["observation"][1, :3] == 2).all()
    assert all(
        bool(torch.isfinite(x).all()) for x in trace.values(True, True) if x.is_floating_point()
    )


@pytest.mark.parametrize("observation", [3, MultiCategorical([3, 3])])
def test_a_model_of_nan_is_refused(observation):
    model = BacktrackModel(observation, 2, num_cells=(8,))
    model.delta_network[0].weight.data.fill_(torch.nan)
    start = model.observation.restore(torch.zeros_like(model.observation.low).expand(2, -1))
    with pytest.raises(ValueError, match="model gives NaN"):
        sample_traces(model, start, num_steps=2)


def test_a_model_elsewhere_is_refused():
    model = BacktrackModel(3, 2, num_cells=(8,), device="meta")
    with pytest.raises(ValueError, match=r"next_observation is on device cpu.*meta"):
        sample_traces(model, torch.zeros(2, 3), num_steps=2)
    batch = TensorDict({"next": {"observation": torch.zeros(2, 3)}}, [2])
    with pytest.raises(ValueError, match=r"observation.*is on device cpu.*meta"):
        BacktrackTransform(model, num_steps=2)(batch)

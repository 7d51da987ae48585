"""The exact model as part of the library: its kernel, every backend, and an ensemble of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torchrl.data import Categorical
from trace_data import F32, F64, chi_square

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.diagnostics import tabular_kernel
from torchrl_recall.envs import (
    FourRoomsEnv,
    backtrack_kernel,
    exact_backtrack_model,
    kernel_divergence,
)
from torchrl_recall.native import interface

# Sampling tests fail a correct sampler this often over all seeds; the seeds are fixed.
ERROR_RATE = 1e-4
UNIFORM = torch.full((25, 4), 0.25, dtype=F64)
GOAL = 18


def make_env(size=5, **kwargs):
    return FourRoomsEnv(size, **{"slip": 0.1, "max_steps": None, **kwargs})


def ensemble_of(model, num_members=3, **kwargs):
    """An ensemble each of whose members is the model."""
    width = model.delta_network[0].out_features
    ensemble = BacktrackModel.from_env(
        make_env(),
        num_cells=(width,),
        stop=True,
        num_members=num_members,
        dtype=model.dtype,
        **kwargs,
    )
    for networks in ensemble.members:
        for name in ("action_network", "delta_network", "stop_network"):
            getattr(networks, name).load_state_dict(getattr(model, name).state_dict())
    return ensemble


@pytest.mark.parametrize(("dtype", "error"), [(F32, 1e-6), (F64, 1e-12)])
def test_it_holds_the_kernel(dtype, error):
    env = make_env()
    torch.manual_seed(0)
    policy = torch.softmax(torch.randn(25, 4, dtype=F64), -1)
    model, exact = exact_backtrack_model(env, policy, dtype=dtype), backtrack_kernel(env, policy)
    assert model.dtype == dtype
    found = kernel_divergence(exact, *tabular_kernel(model, env))
    assert abs(float(found.per_step)) < error


def test_mazes_too_large_for_a_joint_code_are_exact_too():
    env = make_env(33)
    policy = torch.full((33**2, 4), 0.25, dtype=F64)
    model, exact = exact_backtrack_model(env, policy, dtype=F64), backtrack_kernel(env, policy)
    assert not model.observation.has_joint_code
    cells = torch.tensor([34, 35, 400, 33 * 31 + 31])
    after = torch.stack([cells // 33, cells % 33], -1)
    with torch.no_grad():
        action = model.action_parameters(after).softmax(-1)
        stop = model.stop_logit(after).sigmoid()
        before = after + torch.tensor([0, -1])
        taken = torch.full((4,), 3)
        delta = model.step_log_prob(before, taken, after)["delta"].exp()
    torch.testing.assert_close(action, exact.action[cells], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(stop, exact.stop[cells], rtol=1e-6, atol=1e-9)
    expected = exact.predecessor[cells, 3, cells - 1] / exact.action[cells, 3]
    torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "native", "table", "eager", "reference"])
def test_every_backend_walks_it(backend):
    if backend == "native" and interface.load()[0] is None:
        pytest.skip("no native library")
    env = make_env()
    model, number = exact_backtrack_model(env, UNIFORM), 8000
    options = {"num_traces": number, "generator": torch.Generator().manual_seed(0)}
    trace = sample_traces(model, torch.tensor([3, 3]), num_steps=1, backend=backend, **options)
    assert one_step_p(trace, number, backtrack_kernel(env, UNIFORM)) > ERROR_RATE


def one_step_p(trace, number, kernel):
    """p-value of the first steps back from the goal, under the exact kernel."""
    before = (trace["observation"][:, 0] @ torch.tensor([5, 1])).tolist()
    actions = trace["action"][:, 0].tolist()
    assert bool(trace["collector", "mask"].all())  # no episode begins in the goal
    probability = {
        (a, s): float(kernel.predecessor[GOAL, a, s]) for a in range(4) for s in range(25)
    }
    return chi_square(Counter(zip(actions, before, strict=True)), probability, number)


def test_an_ensemble_of_it_has_the_same_kernel():
    env = make_env()
    model = exact_backtrack_model(env, UNIFORM)
    ensemble = ensemble_of(model)
    for found, expected in zip(
        tabular_kernel(ensemble, env), tabular_kernel(model, env), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found = kernel_divergence(backtrack_kernel(env, UNIFORM), *tabular_kernel(ensemble, env))
    assert abs(float(found.per_step)) < 1e-6


@pytest.mark.parametrize("per", ["step", "trace"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_an_ensemble_of_it_walks_like_it(backend, per):
    """Traces back from the goal: first steps and lengths, counted against the exact kernel."""
    env, number = make_env(), 8000
    kernel = backtrack_kernel(env, UNIFORM)
    ensemble = ensemble_of(exact_backtrack_model(env, UNIFORM), member_per=per)
    options = {"num_traces": number, "generator": torch.Generator().manual_seed(1)}
    trace = sample_traces(ensemble, torch.tensor([3, 3]), num_steps=8, backend=backend, **options)
    assert one_step_p(trace[:, -1:], number, kernel) > ERROR_RATE
    # Where the chain of the kernel has stopped after so many steps, cell by cell.
    joint = (1 - kernel.stop)[:, None] * kernel.predecessor.sum(1)
    place, probability = torch.zeros(25, dtype=F64), {}
    place[GOAL] = 1
    for length in range(8):
        probability[length] = float(place @ kernel.stop)
        place = place @ joint
    probability[8] = float(place.sum())
    lengths = Counter(trace["collector", "mask"].sum(-1).tolist())
    assert chi_square(lengths, probability, number) > ERROR_RATE


def test_other_environments_are_refused():
    with pytest.raises(TypeError, match="env must be a FourRoomsEnv, got Categorical"):
        exact_backtrack_model(Categorical(3), UNIFORM)
    with pytest.raises(ValueError, match="action_probability must"):
        exact_backtrack_model(make_env(), UNIFORM[:3])

"""Calibration: a model that holds the truth is uniform, and one that does not is found out."""

from __future__ import annotations

import math

import pytest
import torch
from linear_gaussian import F64, LinearGaussianWorld
from model_data import make_maze, random_transitions
from scipy import stats
from tensordict import TensorDict
from torch import distributions as D
from torchrl.data import Categorical

from torchrl_recall import BacktrackModel, fit
from torchrl_recall.diagnostics import (
    calibration,
    held_out_likelihood,
    kolmogorov_p_value,
    uniform_distance,
)
from torchrl_recall.diagnostics.cdf import value_cdf
from torchrl_recall.envs import exact_backtrack_model
from torchrl_recall.model.heads import CategoricalHead

# A true model fails this often over all seeds; the seeds are fixed.
ERROR_RATE = 1e-3


def uniform_policy_data(slip=0.2):
    env = make_maze(batch_size=(50,), slip=slip)
    return env.rollout(60, break_when_any_done=False, policy=env.rand_action)


@pytest.mark.parametrize("factor", ["action", "delta"])
@pytest.mark.parametrize("options", [{}, {"num_components": 3}, {"num_members": 2}])
def test_the_true_model_of_a_linear_gaussian_world_is_calibrated(factor, options):
    world = LinearGaussianWorld()
    model = world.exact_model(**options)
    found = calibration(model, world.transitions(4000, seed=1), factor=factor)
    assert found.pit.shape == (4000, 2)
    assert float(found.p_value.min()) > ERROR_RATE
    # Binomial, four standard deviations.
    spread = (found.levels * (1 - found.levels) / 4000).sqrt()
    assert bool(((found.coverage - found.levels).abs() < 4 * spread).all())


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scale_that_is_off_by_two_is_found(factor):
    world = LinearGaussianWorld()
    model = world.exact_model(scale_factor=factor)
    data = world.transitions(400, seed=2)
    found = calibration(model, data)
    assert float(found.p_value.max()) < 1e-6
    assert float(calibration(model, data, factor="action").p_value.min()) > ERROR_RATE
    # In closed form: a central interval of a scale that is f times too wide.
    level = found.levels
    exact = 2 * D.Normal(0.0, 1.0).cdf(factor * D.Normal(0.0, 1.0).icdf((1 + level) / 2)) - 1
    spread = (exact * (1 - exact) / 400).sqrt()
    assert bool(((found.coverage - exact).abs() < 4 * spread).all())
    scalars = found.scalars()
    assert scalars["coverage_50"] == pytest.approx(float(found.coverage[:, 0].mean()))
    assert scalars["distance"] == float(found.distance.max())


@pytest.mark.parametrize("factor", ["action", "delta"])
def test_the_exact_model_of_a_maze_is_calibrated(factor):
    """Classes: the PIT is uniform only because it is randomised inside each jump."""
    torch.manual_seed(0)
    env = make_maze(slip=0.2)
    policy = torch.full((25, 4), 0.25)
    model = exact_backtrack_model(env.base_env, policy, dtype=F64)
    data = whole_episodes(make_maze(batch_size=(500,), slip=0.2), 3)
    generator = torch.Generator().manual_seed(0)
    found = calibration(model, data, factor=factor, generator=generator)
    assert found.pit.shape == (len(data), 1)
    # Steps of a maze repeat and depend on each other: every 20th is nearly independent.
    pit = found.pit[::20]
    p_value = kolmogorov_p_value(uniform_distance(pit), len(pit))
    assert float(p_value) > ERROR_RATE
    torch.manual_seed(0)
    other = BacktrackModel.from_env(env, num_cells=(16,))
    assert float(calibration(other, data, factor=factor).p_value) < 1e-6
    again = calibration(model, data, factor=factor, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.pit, again.pit)


def whole_episodes(env, count):
    data, steps, ended = env.reset(), [], torch.zeros(env.batch_size, dtype=torch.int64)
    while bool((ended < count).any()):
        step, data = env.step_and_maybe_reset(env.rand_action(data))
        steps.append(step.exclude("reward")[ended < count])
        ended += step["next", "done"].squeeze(-1)
    return torch.cat(steps)


def test_cumulative_distributions_against_torch():
    torch.manual_seed(0)
    data = random_transitions(50, size=2, dtype=F64)
    options = {"num_cells": (8,), "dtype": F64}
    model = BacktrackModel(2, 2, num_components=4, **options)
    state, action, following = model.read(data)
    model.update_normalization(state, action, following)
    with torch.no_grad():
        found = calibration(model, data).pit
        head = model.delta_head
        loc, log_scale, logits = head.split(model.delta_parameters(action, following))
        base = D.Normal(
            loc * head.normalizer.std + head.normalizer.mean, log_scale.exp() * head.normalizer.std
        )
        weights = torch.softmax(logits, -1).unsqueeze(-1)
        expected = (weights * base.cdf((state - following).unsqueeze(-2))).sum(-2)
        torch.testing.assert_close(found, expected)
        # The squashed action, by torch's own transformed distribution.
        loc, log_scale = model.action.head.split(model.action_parameters(following))
        squashed = D.TransformedDistribution(D.Normal(loc, log_scale.exp()), [D.TanhTransform()])
        found = calibration(model, data, factor="action").pit
        torch.testing.assert_close(found, squashed.cdf(action))
        uniform = BacktrackModel(2, 2, reverse_action="uniform", **options)
        found = calibration(uniform, data, factor="action").pit
        torch.testing.assert_close(found, (action + 1) / 2)


def test_an_ensemble_weighs_its_members_by_the_action():
    torch.manual_seed(0)
    data = random_transitions(30, dtype=F64)
    model = BacktrackModel(3, 2, num_cells=(8,), num_members=3, dtype=F64)
    found = calibration(model, data).pit
    weights, each = [], []
    for i in range(3):
        one = model.member(i)
        each.append(calibration(one, data).pit)
        weights.append(one.step_log_prob(*one.read(data))["action"].exp())
    weights = torch.stack(weights) / sum(weights)
    torch.testing.assert_close(found, (weights.unsqueeze(-1) * torch.stack(each)).sum(0))


def test_a_class_is_spread_over_its_jump():
    logits = torch.tensor([[0.1, 0.2, 0.7]], dtype=F64).log().expand(4, 3)
    uniform = torch.tensor([0.0, 0.5, 0.0, 0.5], dtype=F64)
    found = value_cdf(CategoricalHead(3), logits, torch.tensor([1, 1, 2, 0]), uniform)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.1, 0.2, 0.3, 0.05], dtype=F64))


@pytest.mark.parametrize("n", [10, 100, 3000])
def test_distances_and_p_values_against_scipy(n):
    values = torch.rand(n, 3, generator=torch.Generator().manual_seed(n), dtype=F64)
    values[:, 1] = values[:, 1] ** 1.3
    distance = uniform_distance(values)
    for i in range(3):
        exact = stats.kstest(values[:, i].numpy(), "uniform")
        assert float(distance[i]) == pytest.approx(exact.statistic, abs=1e-12)
    grid = torch.linspace(0.02, 2.5, 60, dtype=F64) / math.sqrt(n)
    exact = torch.tensor(stats.kstwo.sf(grid.clamp_max(1).numpy(), n))
    off = (kolmogorov_p_value(grid.clamp_max(1), n) - exact).abs().max()
    assert float(off) < {10: 0.025, 100: 0.013, 3000: 0.003}[n]


def test_both_series_agree_with_the_limit_distribution():
    scaled = torch.tensor([1e-6, 0.05, 0.3, 0.7, 0.99, 1.0, 1.01, 1.5, 3.0], dtype=F64)
    n = 10**12
    found = kolmogorov_p_value(scaled / math.sqrt(n), n)
    torch.testing.assert_close(
        found, torch.tensor(stats.kstwobign.sf(scaled.numpy())), atol=1e-6, rtol=0
    )


def against_a_wall(n, seed):
    """A point on a half-line, ``s' = max(s + a, 0)``, pushing against its end.

    With s even on [0, 1] and a even on [-1, 0], the steps that end in 0 are those with s <= -a:
    s given s' = 0 and a is even on [0, -a].
    """
    generator = torch.Generator().manual_seed(seed)
    state, action = torch.rand(2, n, 1, generator=generator)
    action = -action
    after = (state + action).clamp_min(0)
    data = TensorDict({"observation": state, "action": action, "next": {"observation": after}}, [n])
    return data[(after == 0).squeeze(-1)]


@pytest.fixture(scope="module")
def wall():
    models, data = {}, against_a_wall(12_000, seed=0)
    for components in (1, 5):
        torch.manual_seed(0)
        model = BacktrackModel(1, 1, num_cells=(64,), num_components=components)
        options = {"schedule": "cosine", "learning_rate": 1e-2, "progress": False}
        generator = torch.Generator().manual_seed(0)
        fit(model, data, num_steps=400, generator=generator, **options)
        models[components] = model
    return models


def test_against_a_wall_one_gaussian_is_the_moment_match(wall):
    model = wall[1]
    action = torch.tensor([[-1.0], [-0.6]])
    with torch.no_grad():
        loc, log_scale = model.delta_head.split(model.delta_parameters(action, torch.zeros(2, 1)))
        mean = model.delta_head.normalizer.denormalize(loc)
        std = log_scale.exp() * model.delta_head.normalizer.std
    # Even on [0, -a]: mean -a / 2, standard deviation -a / sqrt(12).
    torch.testing.assert_close(mean, -action / 2, rtol=0.06, atol=0)
    torch.testing.assert_close(std, -action / math.sqrt(12), rtol=0.06, atol=0)


def test_a_mixture_is_better_against_a_wall_and_calibration_shows_it(wall):
    rows = against_a_wall(10_000, seed=1)
    assert len(rows) > 4000
    one, five = (calibration(wall[k], rows) for k in (1, 5))
    print(f"KS against the wall: one {one.distance.item():.3f}, five {five.distance.item():.3f}")
    # Of an even distribution under its own moment match the distance is .057, in closed form.
    grid = torch.linspace(0, 1, 10_001, dtype=F64)
    own = D.Normal(0.5, math.sqrt(1 / 12)).cdf(grid)
    moment_match = float((own - grid).abs().max())
    assert moment_match == pytest.approx(0.0573, abs=1e-3)
    assert float(one.distance) > 0.8 * moment_match
    assert float(one.p_value) < 1e-3
    assert float(five.distance) < moment_match / 2
    likelihood = [-float(held_out_likelihood(wall[k], rows).delta) for k in (1, 5)]
    # In closed form: the moment match loses log(sqrt(2 pi e / 12)) to the even distribution.
    loss = 0.5 * math.log(2 * math.pi * math.e / 12)
    exact = float(-(-rows["action"]).log().mean())
    print(f"log-likelihood: exact {exact:.3f}, one {likelihood[0]:.3f}, five {likelihood[1]:.3f}")
    assert likelihood[0] == pytest.approx(exact - loss, abs=0.03)
    assert exact > likelihood[1] > likelihood[0] + loss / 3


def test_rows_that_do_not_count():
    torch.manual_seed(0)
    model, data = BacktrackModel(3, 2, num_cells=(8,)), random_transitions(60)
    expected = calibration(model, data[:40]).pit
    data["collector", "mask"] = torch.arange(60) < 50
    data["next", "observation"][40:] = torch.nan
    with pytest.raises(ValueError, match="10 of 60 transitions have NaN"):
        calibration(model, data)
    torch.testing.assert_close(calibration(model, data, mask_nonfinite=True).pit, expected)
    data["collector", "mask"] = torch.zeros(60, dtype=torch.bool)
    with pytest.raises(ValueError, match="no row to look at"):
        calibration(model, data)


def test_wrong_arguments():
    model, data = BacktrackModel(3, 2, num_cells=(8,)), random_transitions(5)
    with pytest.raises(TypeError, match="BacktrackModel"):
        calibration(torch.nn.Linear(1, 1), data)
    with pytest.raises(ValueError, match=r"factor must be one of .*, got 'stop'"):
        calibration(model, data, factor="stop")
    for level in (1.5, 1.0, 0.0):
        with pytest.raises(ValueError, match=rf"levels must lie in \(0.0, 1.0\), got {level}"):
            calibration(model, data, levels=(0.5, level))
    with pytest.raises(TypeError, match="Linear"):
        value_cdf(torch.nn.Linear(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1))
    lattice = BacktrackModel(1, Categorical(2), num_cells=(8,), delta_support=torch.tensor([[1.0]]))
    rows = TensorDict(
        {
            "observation": torch.zeros(3, 1),
            "action": torch.zeros(3, dtype=torch.int64),
            "next": {"observation": torch.tensor([[-1.0], [-1.0], [0.0]])},
        },
        [3],
    )
    with pytest.raises(ValueError, match="1 of 3 transitions have a displacement"):
        calibration(lattice, rows)

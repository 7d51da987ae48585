"""Distance to the data and coverage of goals, against loops, scipy and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tensordict import TensorDict

from torchrl_recall.diagnostics import distance as module
from torchrl_recall.diagnostics import (
    distance_to_data,
    goal_coverage,
    never_visited,
    outside_support,
    reached_goals,
)
from torchrl_recall.support.cell_support import CellSupport
from torchrl_recall.support.data_support import DataSupport

F64 = torch.float64


def data(n=200, size=3, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 10.0, 0.1], dtype=dtype)[:size]
    return torch.randn(n, size, generator=generator, dtype=dtype) * scale


@pytest.mark.parametrize("neighbors", [1, 3])
@pytest.mark.parametrize("pairs", [4_000_000, 450])
def test_distances_by_the_definition(neighbors, pairs, monkeypatch):
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", pairs)
    real, states = data(), data(24, seed=1).reshape(4, 6, 3)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.8
    found = distance_to_data(states, real, mask=mask, quantile=0.9, num_neighbours=neighbors)
    scale = real.std(0)

    def nearest(state, others):
        return ((others - state) / scale).square().sum(-1).sqrt().sort().values[neighbors - 1]

    own = torch.stack([nearest(real[i], torch.cat([real[:i], real[i + 1 :]])) for i in range(200)])
    torch.testing.assert_close(found.data_distance, own)
    torch.testing.assert_close(found.threshold, own.quantile(0.9))
    outside, kept = [0.0] * 6, [0] * 6
    for i in range(4):
        for t in range(6):
            if not mask[i, t]:
                assert bool(found.distance[i, t].isnan())
                continue
            distance = nearest(states[i, t], real)
            torch.testing.assert_close(found.distance[i, t], distance)
            outside[t] += float(distance > own.quantile(0.9))
            kept[t] += 1
    expected = torch.tensor([o / k for o, k in zip(outside, kept, strict=True)])
    torch.testing.assert_close(found.outside_by_step, expected)
    assert float(found.outside) == pytest.approx(sum(outside) / sum(kept))
    assert found.scalars()["threshold"] == float(found.threshold)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_states_of_the_same_distribution_are_outside_as_often_as_stated(dtype):
    """A binomial share: four standard deviations, and a little for the estimated quantile."""
    real, states = data(3000, dtype=dtype), data(3000, dtype=dtype, seed=1).reshape(150, 20, 3)
    found = distance_to_data(states, real)
    assert float(found.outside) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 1500))
    far = states.clone()
    far[:, :10] += 5 * real.std(0)
    shifted = distance_to_data(far, real)
    assert bool((shifted.outside_by_step[:10] > 0.9).all())
    torch.testing.assert_close(shifted.outside_by_step[10:], found.outside_by_step[10:])


def test_small_distances_do_not_cancel():
    real = 1000 + torch.linspace(0, 1, 100).unsqueeze(-1)
    found = distance_to_data(real[None, 3:4] + 2e-3, real, scale=torch.ones(1))
    assert float(found.distance) == pytest.approx(2e-3, rel=0.1)


def test_never_visited_states():
    visits = torch.tensor([3, 0, 1, 0])
    states = torch.tensor([[0, 1, 3], [2, 1, 0]])
    found = never_visited(states, visits)
    assert found.by_step.tolist() == [0.0, 1.0, 0.5]
    assert float(found.share) == 0.5
    masked = never_visited(states, visits > 0, torch.tensor([[True, False, True]] * 2))
    assert masked.by_step[0] == 0
    assert bool(masked.by_step[1].isnan())
    assert masked.scalars() == {"share": 0.25}


def test_outside_the_support_that_walks_are_kept_in():
    """`DataSupport` and this package measure the same: equal where their thresholds are."""
    real, states = data(500), data(60, seed=1).reshape(6, 10, 3) * 1.5
    support = DataSupport(num_references=500, factor=1.0)
    support.fit(TensorDict({"observation": real}, [500]))
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(2)) < 0.8
    found = outside_support(states, support, mask)
    expected = distance_to_data(states, real, scale=support.std, mask=mask)
    assert 0.1 < float(found.share) < 0.9
    assert float(found.share) == float(expected.outside)
    torch.testing.assert_close(found.by_step, expected.outside_by_step)
    cells = CellSupport("observation", cell_size=1.0)
    cells.fit(TensorDict({"observation": torch.zeros(1, 3)}, [1]))
    assert outside_support(torch.tensor([[[0.5] * 3, [1.5] * 3]]), cells).by_step.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"support returned torch.float64"):
        outside_support(states, lambda s: s[..., 0])


def test_wrong_arguments():
    states, real = torch.zeros(2, 3, 2), torch.zeros(5, 2)
    for message, arguments, options in (
        ("reference has shape", (states, real[0]), {}),
        ("more than 5 rows", (states, real), {"num_neighbours": 5}),
        ("states has shape", (states[..., :1], real), {}),
        ("scale must be 2 positive", (states, real), {"scale": torch.zeros(2)}),
        ("quantile", (states, real), {"quantile": 2.0}),
        ("mask keeps no step", (states, real), {"mask": torch.zeros(2, 3, dtype=torch.bool)}),
        ("mask is torch.float32", (states, real), {"mask": torch.ones(2, 3)}),
        ("reference must be finite", (states, real / 0), {}),
        ("states must be finite", (states / 0, real), {}),
    ):
        with pytest.raises(ValueError, match=message):
            distance_to_data(*arguments, **options)
    for index in (-1, 4):
        with pytest.raises(ValueError, match="states must lie in 0 to 3"):
            never_visited(torch.tensor([[index]]), torch.ones(4))


@pytest.mark.parametrize(("reached", "goals"), [(0, 7), (3, 10), (50, 81), (9, 9)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_interval_against_scipy(reached, goals, confidence):
    outcome = torch.arange(goals) < reached
    found = goal_coverage(outcome, confidence=confidence)
    exact = stats.binomtest(reached, goals).proportion_ci(confidence, method="wilson")
    assert found.share == pytest.approx(reached / goals)
    assert found.low == pytest.approx(exact.low, abs=1e-12)
    assert found.high == pytest.approx(exact.high, abs=1e-12)
    assert found.scalars() == {"share": found.share, "low": found.low, "high": found.high}


def test_goals_are_reached_by_the_nearest_state():
    generator = torch.Generator().manual_seed(0)
    goals = torch.rand(4, 5, 2, generator=generator)
    states = torch.rand(3, 8, 2, generator=generator)
    found = reached_goals(goals, states, 0.1)
    assert 0 < int(found.sum()) < 20
    for i in range(4):
        for j in range(5):
            near = (states - goals[i, j]).square().sum(-1).sqrt().min()
            assert bool(found[i, j]) == bool(near <= 0.1)
    cells = torch.tensor([[0, 0], [1, 2]])
    assert reached_goals(cells, torch.tensor([[1, 2]]), 0).tolist() == [False, True]


def test_wrong_goals():
    with pytest.raises(ValueError, match="reached must be bool"):
        goal_coverage(torch.ones(3))
    with pytest.raises(ValueError, match="at least one goal"):
        goal_coverage(torch.ones(0, dtype=torch.bool))
    for confidence in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"confidence must lie in \(0.0, 1.0\)"):
            goal_coverage(torch.ones(3, dtype=torch.bool), confidence=confidence)
    with pytest.raises(ValueError, match=r"\[\*G, D\]"):
        reached_goals(torch.zeros(3, 2), torch.zeros(3, 1), 0.1)
    with pytest.raises(ValueError, match="at least one state"):
        reached_goals(torch.zeros(3, 2), torch.zeros(0, 2), 0.1)

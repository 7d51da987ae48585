"""Whole trajectories drawn through a replay buffer: by value, then a step of each, evenly.

The chi-square tests refuse a right sampler with probability 1e-4 each; their seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engines import ENGINES, choose_engine
from refresh_data import GAMMA, Critic, recall_buffer, returns_by_loop, transitions
from scipy.stats import chisquare
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
)

from torchrl_recall import ValuePrioritizedSampler, ValueRefresh
from torchrl_recall.priorities.weights import best_count

KEY = ("collector", "traj_ids")
NONE, NAN = -math.inf, math.nan
DRAWS = 20_000
# Trajectory 4 is interleaved with 9; each step has its value.
IDS = [4, 4, 9, 4, 9, 2, 2, 2, 2, 7]
VALUES = [1.0, 6.0, 3.0, 2.0, 4.0, 5.0, -1.0, 0.0, 1.0, -9.0]


@pytest.fixture(params=ENGINES, autouse=True)
def engine(request, monkeypatch):
    torch.manual_seed(0)
    choose_engine(monkeypatch, request.param)
    return request.param


def rows(ids, values):
    data = {"v": torch.tensor(values).unsqueeze(-1), KEY: torch.tensor(ids)}
    return TensorDict(data, [len(ids)])


def buffer(ids=IDS, values=VALUES, *, capacity=10, storage=LazyTensorStorage, **kwargs):
    sampler = ValuePrioritizedSampler(capacity, trajectory_key=KEY, **kwargs)
    rb = TensorDictReplayBuffer(storage=storage(capacity), sampler=sampler, priority_key="v")
    rb.extend(rows(ids, values))
    return rb


def assert_draws(rb, weights):
    """Draws follow the weights of entries, and weight 0 is never drawn."""
    weights = np.asarray(weights, dtype=float)
    index = rb.sampler.sample(rb.storage, DRAWS)[0]
    counts = np.bincount(index.numpy(), minlength=len(weights))
    possible = weights > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        expected = DRAWS * weights[possible] / weights.sum()
        assert chisquare(counts[possible], expected).pvalue > 1e-4


def of_steps(weight):
    """The weights of trajectories, shared by their steps."""
    return [weight.get(i, 0.0) / IDS.count(i) for i in IDS]


CASES = {
    "best quarter": ({"top": 0.25}, {4: 1}),
    "best half": ({"top": 0.5}, {4: 1, 2: 1}),
    "best of means": ({"top": 0.25, "reduction": "mean"}, {9: 1}),
    "worst steps": ({"top": 0.25, "reduction": "min"}, {9: 1}),
    "first steps": ({"top": 0.25, "reduction": "first"}, {2: 1}),
    "soft": ({"mode": "soft", "temperature": 2.0}, {4: math.e**3, 9: math.e**2, 2: math.e**2.5}),
    "rank": ({"mode": "rank"}, {4: 1, 2: 1 / 2, 9: 1 / 3, 7: 1 / 4}),
    "per": ({"mode": "per"}, {4: 6, 9: 4, 2: 5, 7: 9}),
    "min_value": ({"mode": "rank", "min_value": 4.5}, {4: 1, 2: 1 / 2}),
    "uniform share": ({"top": 0.1, "uniform_share": 0.4}, {4: 0.7, 9: 0.1, 2: 0.1, 7: 0.1}),
}


@pytest.mark.parametrize(("parameters", "weight"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
def test_distribution(parameters, weight, storage):
    if "soft" in parameters.values():
        weight = weight | {7: math.exp(-4.5)}
    assert_draws(buffer(storage=storage, **parameters), of_steps(weight))


def test_mode_changes_and_new_values():
    rb = buffer(top=0.2)
    assert_draws(rb, of_steps({4: 1}))
    rb.sampler.mode = "rank"
    assert_draws(rb, of_steps({4: 1, 2: 1 / 2, 9: 1 / 3, 7: 1 / 4}))
    rb.update_priority(torch.tensor([9]), torch.tensor([100.0]))
    rb.sampler.mode = "top"
    assert_draws(rb, of_steps({7: 1}))
    rb.sampler.refresh(torch.tensor(VALUES).neg())
    assert_draws(rb, of_steps({7: 1}))
    rb.sampler.refresh(torch.tensor([-50.0]), torch.tensor([9]))
    assert_draws(rb, of_steps({2: 1}))
    rb.extend(rows([2, 5], [3.0, 99.0]))  # over two steps of trajectory 4
    assert_draws(rb, [0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    rb.empty()
    rb.extend(rows([1, 1, 3], [0.0, 1.0, 0.5]))
    assert_draws(rb, [1, 1, 0])


def test_steps_that_are_barred_are_left_out():
    rb = buffer(top=0.25)
    with pytest.warns(UserWarning, match="not finite"):
        rb.update_priority(torch.tensor([1, 9]), torch.tensor([NAN, NAN]))
    # Trajectory 7 is gone, 4 has the values 1 and 2 left; best of three: trajectory 2.
    assert_draws(rb, of_steps({2: 1}))
    rb.sampler.top = 1.0
    assert_draws(rb, [1 / 2, 0, 1 / 2, 1 / 2, 1 / 2, *[1 / 4] * 4, 0])
    refreshed = ValuePrioritizedSampler(10, trajectory_key=KEY)
    with pytest.warns(UserWarning, match="not finite"):
        refreshed.refresh(torch.full((10,), NAN))
    rb.set_sampler(refreshed)
    with pytest.raises(RuntimeError, match="non-finite"):
        rb.sample(3)


def test_no_values_yet():
    rb = buffer(values=[0.0] * 10)
    rb.sampler.mark_update(torch.arange(10))
    assert_draws(rb, of_steps(dict.fromkeys(IDS, 1)))
    rb.update_priority(torch.tensor([0]), torch.tensor([-1e30]))
    assert_draws(rb, of_steps({4: 1}))


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_importance_weights(beta, share):
    rb = buffer(mode="rank", beta=beta, uniform_share=share)
    weight = {4: 12 / 25, 2: 6 / 25, 9: 4 / 25, 7: 3 / 25}
    steps = of_steps({i: (1 - share) * w + share / 4 for i, w in weight.items()})
    index, info = rb.sampler.sample(rb.storage, 500)
    expected = [(steps[i] / min(steps)) ** -beta for i in index.tolist()]
    assert info["priority_weight"].dtype == torch.float32
    torch.testing.assert_close(info["priority_weight"], torch.tensor(expected))


def test_missing_key_and_wrong_entry():
    rb = TensorDictReplayBuffer(
        storage=LazyTensorStorage(4), sampler=ValuePrioritizedSampler(4, trajectory_key="ids")
    )
    rb.extend(TensorDict({"x": torch.zeros(4), "two": torch.zeros(4, 2)}, [4]))
    with pytest.raises(KeyError, match=r"no entry 'ids' in the storage, among .*two"):
        rb.sample(2)
    rb.sampler.trajectory_key = "two"
    with pytest.raises(ValueError, match="'two' must hold one number for each of 4"):
        rb.sample(2)
    rb.sampler.trajectory_key = "x"
    with pytest.raises(TypeError, match="trajectory ids must be integers"):
        rb.sample(2)


def first_values(rows, value):
    """The value of each trajectory's oldest stored step, in the order of time."""
    first = {}
    for name, v in zip(rows[KEY].tolist(), value.tolist(), strict=True):
        first.setdefault(name, v)
    return first


@pytest.mark.parametrize("total", [30, 40, 67, 95])
def test_best_returns_across_the_seam(total):
    """ValueRefresh computes returns-to-go, "first" takes those of the oldest stored steps."""
    sampler = ValuePrioritizedSampler(
        40, top=0.2, reduction="first", trajectory_key=KEY, dtype=torch.float64
    )
    rb = recall_buffer(40, sampler=sampler)
    data = transitions(total, dtype=torch.float64)
    data[KEY] = torch.arange(total) // 7
    for start in range(0, total, 10):
        rb.extend(data[start : start + 10].clone())
    ValueRefresh(rb, Critic(), gamma=GAMMA, target="return")()
    kept = data[-40:]
    first = first_values(kept, returns_by_loop(kept))
    best = sorted(first, key=first.get)[-best_count(0.2, len(first)) :]
    ids = kept[KEY].tolist()
    weights = [(i in best) / ids.count(i) for i in ids]
    assert_draws(rb, np.roll(weights, total % 40 if total > 40 else 0))


def test_storage_of_two_dimensions():
    """Three environments, time first in the storage; trajectories run across rows and the seam."""
    sampler = ValuePrioritizedSampler(24, top=0.3, reduction="first", trajectory_key=KEY)
    rb = recall_buffer(24, ndim=2, sampler=sampler, priority_key="v")
    ids = torch.arange(12) // 4 + 10 * torch.arange(3).unsqueeze(1)
    value = torch.randn(3, 12)
    data = TensorDict({KEY: ids, "v": value.unsqueeze(-1)}, [3, 12])
    for start in range(0, 12, 3):
        rb.extend(data[:, start : start + 3].clone())
    kept, seam = data[:, 4:], 12 % 8
    first = {}
    for env in range(3):
        first |= first_values(kept[env], kept[env]["v"].squeeze(-1))
    best = sorted(first, key=first.get)[-best_count(0.3, len(first)) :]
    inside = torch.tensor([[i in best for i in env] for env in kept[KEY].tolist()])
    weights = inside.roll(seam, 1).T.reshape(-1)
    index = rb.sampler.sample(rb.storage, DRAWS)[0]
    counts = np.bincount((index[0] * 3 + index[1]).numpy(), minlength=24)
    assert counts[~weights.numpy()].sum() == 0
    assert chisquare(counts[weights.numpy()]).pvalue > 1e-4


def test_state_keeps_the_seam():
    rb = buffer(reduction="first", top=0.2)
    rb.extend(rows([7, 1, 1], [8.0, 0.0, 0.0]))  # 7 began before the seam, with -9
    for sampler in (rb.sampler, ValuePrioritizedSampler(10, reduction="first", trajectory_key=KEY)):
        sampler.load_state_dict(rb.sampler.state_dict())
        assert sampler.state_dict()["_oldest"] == 3
        rb.set_sampler(sampler)
        assert_draws(rb, [0, 0, 0, 0, 0, 1, 1, 1, 1, 0])


def test_draws_in_a_view_that_is_written_meanwhile():
    """The sampler has seen fewer entries than the storage holds by the time it reads the ids."""
    rb = buffer()

    class Growing(LazyTensorStorage):
        def get(self, index):
            if len(self) < 10:
                self.set(range(8, 10), rows([4, 4], [0.0, 0.0]))
            return super().get(index)

    storage = Growing(10)
    storage.set(range(8), rows(IDS[:8], VALUES[:8]))
    index, _ = rb.sampler.sample(storage, 500)
    assert int(index.max()) < 8
    index, _ = rb.sampler.sample(storage, 500)
    assert int(index.max()) < 10

"""Trajectories among entries: against brute force, and steps drawn evenly.

The chi-square test refuses a right draw with probability 1e-4 in each case; seeds are fixed.
"""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from torchrl_recall.priorities.trajectories import REDUCTIONS, TrajectoryGroups

NONE, NAN = -math.inf, math.nan
CASES = {
    "in one piece": [0, 0, 0, 1, 2, 2],
    "interleaved": [5, -3, 5, -3, 9, 5],
    "descending": [4, 4, 3, 3, 2, 2],
    "each its own": [3, 1, 2, 0],
    "one": [-(2**31)] * 5,
    "empty": [],
}
ids = pytest.mark.parametrize("ids", CASES.values(), ids=CASES.keys())


def by_hand(ids, oldest):
    """Entries of each trajectory in the order of time, by ascending id."""
    groups = {i: [] for i in sorted(set(ids))}
    for entry in [*range(oldest, len(ids)), *range(oldest)]:
        groups[ids[entry]].append(entry)
    return groups


def reduced(values, reduction):
    if reduction == "first":
        return values[0]
    numbers = [v for v in values if v > NONE]
    if not numbers:
        return NONE if NONE in values else NAN
    functions = {"max": max, "min": min, "mean": statistics.fmean}
    return functions.get(reduction, statistics.median_low)(numbers)


@ids
@pytest.mark.parametrize("oldest", [0, 3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_groups(ids, oldest, dtype):
    oldest = min(oldest, max(len(ids) - 1, 0))
    groups = TrajectoryGroups.of(torch.tensor(ids, dtype=dtype).reshape(-1, 1), oldest)
    expected = by_hand(ids, oldest)
    assert groups.ids.tolist() == list(expected)
    got = [
        groups.entry[s : s + n].tolist() for s, n in zip(groups.start, groups.length, strict=True)
    ]
    assert got == list(expected.values())


@ids
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reductions(ids, reduction, dtype):
    generator = torch.Generator().manual_seed(0)
    groups = TrajectoryGroups.of(torch.tensor(ids, dtype=torch.int64))
    for _ in range(50):
        values = torch.randn(len(ids), generator=generator, dtype=dtype)
        kind = torch.randint(5, (len(ids),), generator=generator)
        values[kind == 0], values[kind == 1] = NAN, NONE
        values = torch.where(kind == 2, 1.0, values)
        expected = [
            reduced(values[e].tolist(), reduction)
            for e in map(torch.tensor, by_hand(ids, 0).values())
        ]
        got = groups.values(values, reduction)
        assert got.dtype == dtype
        torch.testing.assert_close(got, torch.tensor(expected, dtype=dtype), equal_nan=True)


def test_large_interleaved_groups_agree_with_sorting():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (5_000,), generator=generator)
    groups = TrajectoryGroups.of(ids)
    assert torch.equal(groups.entry, ids.argsort(stable=True))
    assert torch.equal(groups.length, ids.bincount())


def test_entries_that_are_never_drawn_are_left_out():
    ids = torch.tensor([1, 0, 1, 1, 0])
    drawable = torch.tensor([True, False, False, True, False])
    groups = TrajectoryGroups.of(ids).only(drawable)
    assert groups.length.tolist() == [0, 2]
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.99])
    assert groups.steps_of(torch.ones(4, dtype=torch.int64), uniform).tolist() == [0, 0, 3, 3]
    values = torch.tensor([4.0, 1.0, 2.0, 3.0, 5.0])
    for reduction in REDUCTIONS:
        got = groups.values(values, reduction)
        assert got.isnan().tolist() == [True, False]
        assert float(got[1]) == reduced([4.0, 3.0], reduction)


@pytest.mark.parametrize("oldest", [0, 4])
def test_steps_are_drawn_evenly(oldest):
    ids = torch.tensor([2, 2, 0, 2, 0, 1, 2, 2, 2])
    groups = TrajectoryGroups.of(ids, oldest)
    draws = 30_000
    uniform = torch.rand(
        draws, dtype=torch.float64, generator=torch.Generator().manual_seed(oldest)
    )
    for trajectory in range(3):
        drawn = groups.steps_of(torch.full((draws,), trajectory), uniform)
        counts = np.bincount(drawn.numpy(), minlength=len(ids))
        inside = (ids == trajectory).numpy()
        assert counts[~inside].sum() == 0
        if inside.sum() > 1:
            assert chisquare(counts[inside]).pvalue > 1e-4


@pytest.mark.parametrize("length", [1, 3, 2**20 - 1, 10**6 + 1])
def test_the_largest_uniform_number_draws_the_last_step(length):
    groups = TrajectoryGroups.of(torch.zeros(length, dtype=torch.int64))
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert groups.steps_of(torch.tensor([0]), largest).tolist() == [length - 1]
    assert groups.steps_of(torch.tensor([0]), torch.tensor([1.0])).tolist() == [length - 1]


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"ids must be integers, got torch\.float32"):
        TrajectoryGroups.of(torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \[n\] or \[n, 1\], got \(2, 2\)"):
        TrajectoryGroups.of(torch.zeros(2, 2, dtype=torch.int64))
    ids = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="oldest must be one of 2 entries, got 2"):
        TrajectoryGroups.of(ids, 2)
    groups = TrajectoryGroups.of(ids)
    with pytest.raises(ValueError, match=r"reduction must be one of .* got 'last'"):
        groups.values(torch.zeros(2), "last")
    with pytest.raises(ValueError, match=r"values must have one entry for each of 2, got \(3,\)"):
        groups.values(torch.zeros(3), "max")
    with pytest.raises(ValueError, match="drawable must have one entry"):
        groups.only(torch.ones(3, dtype=torch.bool))

"""What tests of traces share: models of every kind, starts and noise for them."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torchrl.data import Bounded, Categorical, MultiCategorical, OneHot, Unbounded

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.traces import draw_noise

F32, F64 = torch.float32, torch.float64

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


def walk(model, backend="auto", **options):
    """Nine traces of three steps, on given noise unless a generator is passed."""
    start, noise = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)), None
    if "generator" not in options:
        noise = make_noise(model, 3, 9)
    return sample_traces(
        model, start.to(model.dtype), num_steps=3, noise=noise, backend=backend, **options
    )


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

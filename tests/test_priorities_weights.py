"""Weights against brute force: every way to break ties is tried and averaged over."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from torchrl_recall.priorities.weights import value_weights

NONE, NAN = -math.inf, math.nan
CASES = {
    "signs": [-3.0, 2.0, 0.5, -0.25],
    "ties": [1.0, -1.0, 1.0, 1.0, -1.0],
    "all tied": [2.0, 2.0, 2.0],
    "no value yet": [NONE, -5.0, NONE, 3.0],
    "nothing has a value": [NONE, NONE, NAN],
    "barred": [NAN, 1.0, NONE, 1.0, NAN, -1.0],
    "all barred": [NAN, NAN],
    "one": [-7.0],
    "huge": [1e30, -1e30, 0.0],
}


def brute_force(values, mode, *, alpha, top, temperature, min_value, eps):
    """Probabilities by the definitions, in plain Python."""
    drawable = [i for i, v in enumerate(values) if not math.isnan(v)]
    if not drawable:
        return np.zeros(len(values))
    total = np.zeros(len(values))
    if all(values[i] == NONE for i in drawable):
        total[drawable] = 1.0
    elif mode in ("top", "rank"):
        k = next(
            k for k in range(1, len(drawable) + 1) if k * 100 >= round(top * 100) * len(drawable)
        )
        for order in itertools.permutations(drawable):
            for rank, i in enumerate(sorted(order, key=lambda i: -values[i]), 1):
                total[i] += (rank <= k) if mode == "top" else rank**-alpha
    else:
        best = max(values[i] for i in drawable)
        for i in drawable:
            if mode == "soft":
                total[i] = math.exp((values[i] - best) / temperature)
            else:
                total[i] = ((0.0 if values[i] == NONE else abs(values[i])) + eps) ** alpha
    enough = [min_value is not None and v > NONE and v >= min_value for v in values]
    if any(enough):
        total = total * enough
    return total / total.sum()


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("min_value", [None, 0.0, 1e35])
@pytest.mark.parametrize(
    ("mode", "parameters"),
    [
        ("top", {"top": 0.01}),
        ("top", {"top": 0.5}),
        ("top", {"top": 1.0}),
        ("soft", {"temperature": 1.0}),
        ("soft", {"temperature": 1e-6}),
        ("rank", {"alpha": 0.0}),
        ("rank", {"alpha": 1.7}),
        ("per", {"alpha": 0.6}),
        ("per", {"alpha": 2.0, "eps": 0.5}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_brute_force(values, min_value, mode, parameters, dtype):
    parameters = {"alpha": 1.0, "top": 0.1, "temperature": 1.0, "eps": 1e-8} | parameters
    parameters["min_value"] = min_value
    weights = value_weights(torch.tensor(values, dtype=dtype), mode, **parameters)
    assert weights.dtype == torch.float64
    got = weights / weights.sum().clamp(min=1e-300)
    np.testing.assert_allclose(
        got.numpy(), brute_force(values, mode, **parameters), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("percent", [1, 7, 10, 29, 57, 58, 100])
@pytest.mark.parametrize("n", [1, 29, 30, 100, 700])
def test_top_keeps_the_fraction_as_written(percent, n):
    # 0.07 * 100 and 0.1 * 30 exceed 7 and 3 in floats.
    weights = value_weights(torch.arange(float(n)), "top", top=percent / 100)
    assert int((weights > 0).sum()) == max(1, -(-percent * n // 100))


@pytest.mark.parametrize("mode", ["top", "soft", "rank"])
def test_larger_values_are_never_less_likely(mode):
    values = (
        torch.randn(200, generator=torch.Generator().manual_seed(0)).round(decimals=1).sort()[0]
    )
    assert bool((value_weights(values, mode, top=0.3, alpha=2.0).diff() >= 0).all())


def test_large_alpha_does_not_overflow():
    weights = value_weights(torch.tensor([1e30, -1e30, 1.0]), "per", alpha=50.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"mode must be one of .* got 'best'"):
        value_weights(torch.zeros(2), "best")

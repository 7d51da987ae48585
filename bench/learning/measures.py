"""What is said of runs: rliable's measures, with bootstrap intervals that repeat to the digit.

After Agarwal et al., *Deep RL at the edge of the statistical precipice*, NeurIPS 2021
(https://arxiv.org/abs/2108.13264). The library itself loops over resamples in Python and takes
minutes for one curve; a test holds these against it where it is installed. Each task has its own
runs, so that resampling the runs of a row is the stratified bootstrap of that task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
Array = NDArray[np.float64]
Values = Sequence[float] | Array


class Interval(NamedTuple):
    """An estimate and its 95 % bootstrap interval (percentiles)."""

    estimate: float
    low: float
    high: float


def iqm(values: Sequence[Any] | Array, axis: int = 0) -> Array:
    """Return the interquartile mean: the mean without the lowest and the highest fourth.

    A fourth is rounded down to whole runs, as rliable does.
    """
    ordered = np.sort(np.asarray(values, dtype=float), axis=axis)
    count = ordered.shape[axis]
    cut = count // 4
    return np.take(ordered, np.arange(cut, count - cut), axis=axis).mean(axis=axis)


def resamples(count: int, name: str, number: int = NUM_RESAMPLES) -> NDArray[np.int64]:
    """Return rows of runs drawn with replacement, ``[number, count]``, the same for a name."""
    seed = [ord(letter) for letter in name]
    return np.random.default_rng(seed).integers(count, size=(number, count))


def interval(values: Values, name: str, measure: Callable[..., Array] = iqm) -> Interval:
    """Return a measure of one number a run, such as its IQM."""
    values = np.asarray(values, dtype=float)
    drawn = measure(values[resamples(len(values), name)], axis=1)
    return Interval(float(measure(values, axis=0)), *_percentiles(drawn))


def difference(one: Values, other: Values, name: str) -> Interval:
    """Return the difference of the IQMs of two rows, ``one - other``."""
    first, second = _two(one, other, name)
    estimate = iqm(np.asarray(one, dtype=float)) - iqm(np.asarray(other, dtype=float))
    return Interval(float(estimate), *_percentiles(iqm(first, axis=1) - iqm(second, axis=1)))


def ratio(one: Values, other: Values, name: str) -> Interval:
    """Return the ratio of the means of two rows, ``one / other``.

    Means, not IQMs: a budget that was spent without solving is to count.
    """
    first, second = _two(one, other, name)
    estimate = np.asarray(one).mean() / np.asarray(other).mean()
    return Interval(float(estimate), *_percentiles(first.mean(1) / second.mean(1)))


def probability_of_improvement(one: Values, other: Values, name: str) -> Interval:
    """Return the probability that a run of one row has a larger value than one of the other.

    Ties count a half: the Mann-Whitney statistic over the number of pairs.
    """
    first, second = _two(one, other, name)
    drawn = [_larger(a, b) for a, b in zip(first, second, strict=True)]
    return Interval(_larger(np.asarray(one), np.asarray(other)), *_percentiles(np.array(drawn)))


def _larger(one: Array, other: Array) -> float:
    ordered = np.sort(other)
    below = np.searchsorted(ordered, one, "left")
    equal = np.searchsorted(ordered, one, "right") - below
    return float((below + 0.5 * equal).mean() / len(other))


def _two(one: Values, other: Values, name: str) -> tuple[Array, Array]:
    first, second = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    return (
        first[resamples(len(first), name + " one")],
        second[resamples(len(second), name + " other")],
    )


def _percentiles(values: Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def curve(
    places: Sequence[Values], scores: Sequence[Values], grid: Values, name: str
) -> tuple[Array, Array, Array]:
    """Return the IQM over runs at each point of a grid, and its 95 % band.

    Args:
        places: of each run, where it was evaluated (steps or seconds), rising.
        scores: of each run, its scores there.
        grid: where to say the IQM; a run counts with its last score before.
        name: of the row, which seeds its resamples.
    """
    grid = np.asarray(grid, dtype=float)
    held = np.stack([hold(x, y, grid) for x, y in zip(places, scores, strict=True)])
    drawn = resamples(len(held), name, 1000)
    bands = [np.percentile(iqm(column[drawn], 1), [2.5, 97.5]) for column in held.T]
    low, high = np.stack(bands, 1)
    return iqm(held), low, high


def hold(places: Values, scores: Values, grid: Values) -> Array:
    """Return the last score at or before each point of a grid, and the first one before that."""
    index = np.searchsorted(np.asarray(places, dtype=float), grid, "right") - 1
    return np.asarray(scores, dtype=float)[index.clip(0)]


def area(steps: Values, scores: Values, budget: int) -> float:
    """Return the mean score over the budget, each held until the next one."""
    steps = np.minimum(np.append(np.asarray(steps, dtype=float), budget), budget)
    return float((np.diff(steps) * np.asarray(scores, dtype=float)).sum() / (budget - steps[0]))


def exponent(sizes: Values, costs: Sequence[Values], name: str) -> Interval:
    """Fit ``cost ~ size ** k`` to the mean cost of each size, and return k.

    Args:
        sizes: at least two.
        costs: of each size, that of each run; runs are resampled within a size.
        name: seeds the resamples.
    """
    logs = np.log(np.asarray(sizes, dtype=float))
    place = logs - logs.mean()

    def slope(means: Array) -> Array:
        return (np.log(means) * place).sum(-1) / (place**2).sum()

    drawn = []
    for size, runs in zip(np.atleast_1d(sizes), costs, strict=True):
        values = np.asarray(runs, dtype=float)
        drawn.append(values[resamples(len(values), f"{name} {size}")].mean(1))
    estimate = slope(np.array([np.asarray(runs).mean() for runs in costs]))
    return Interval(float(estimate), *_percentiles(slope(np.stack(drawn, -1))))

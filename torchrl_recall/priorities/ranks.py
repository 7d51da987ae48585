"""The modes that need an order: the threshold of ``"top"`` and the weights of ``"rank"``.

Called by `levels.py`. What is named ``device_*`` never waits for a GPU.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from torchrl_recall.priorities.sums import running_sums
from torchrl_recall.priorities.weights import best_count

_SLICE = 1 << 18  # stays in the cache
_SAMPLE = 1 << 14
_ROW, _PART = 64, 8


def count_outside(values: Tensor, low: float, high: float) -> tuple[int, int]:
    """Count the values that are above ``high``, and those that are at least ``low``; NaN is not.

    Args:
        values: ``[n]``, floating, on the CPU.
        low: may be infinite, as ``high`` may.
        high: at least ``low``.
    """
    # A comparison into floats and their sum are vectorised; count_nonzero and masks are not.
    buffer, above, at_least = torch.empty(min(_SLICE, values.numel())), 0, 0
    for x in values.split(_SLICE):
        part = buffer[: x.numel()]
        above += int(torch.gt(x, high, out=part).sum().item())
        at_least += int(torch.ge(x, low, out=part).sum().item())
    return above, at_least


def top_threshold(values: Tensor, top: float, *, no_nan: bool = False) -> tuple[float, float, int]:
    """Find the least value that the mode ``"top"`` keeps.

    Args:
        values: ``[n]``, floating, on the CPU; NaN is never drawn.
        top: fraction that is kept.
        no_nan: whether none is known to be NaN.

    Returns:
        The threshold, the weight of the entries that equal it, and the number of drawable entries.

    Examples:
        >>> top_threshold(torch.tensor([3.0, 1.0, 1.0, -2.0]), 0.5)
        (1.0, 0.5, 4)
    """
    # Only NaN makes the sum NaN, or, harmlessly, an overflow.
    n = values.numel()
    if not no_nan and math.isnan(values.sum().item()):
        n = count_outside(values, -math.inf, math.inf)[1]
    if n == 0:
        return math.inf, 0.0, 0
    k = best_count(top, n)
    low, high = _bracket(values, k / n)
    above_high, at_least_low = count_outside(values, low, high)
    if not above_high < k <= at_least_low:  # the sample misled
        low, high = -math.inf, math.inf
    elif low == high:
        return low, (k - above_high) / (at_least_low - above_high), n
    elif at_least_low - above_high > _SAMPLE // 8 and math.isfinite(high - low):
        # Interpolate: fewer candidates are worth the chance that the threshold is not among them.
        m = at_least_low - above_high
        middle = low + (high - low) * (at_least_low - k) / m
        margin = (high - low) * (0.03 + 2 / math.sqrt(m))  # bent density, chance
        closer_low = _representable(max(low, middle - margin), values.dtype)
        closer_high = _representable(min(high, middle + margin), values.dtype)
        above, between = _split(values, closer_low, closer_high)
        if above < k <= above + between.numel():
            return *_among(between, k - above), n
    above, between = _split(values, low, high)
    return *_among(between, k - above), n


def _among(candidates: Tensor, k: int) -> tuple[float, float]:
    """The k-th largest, from 1, and the weight of those that equal it."""
    threshold = candidates.kthvalue(candidates.numel() - k + 1).values
    above, tied = int((candidates > threshold).sum()), int((candidates == threshold).sum())
    return threshold.item(), (k - above) / tied


def _bracket(values: Tensor, fraction: float) -> tuple[float, float]:
    """Values between which the threshold probably lies, from a strided sample."""
    sample = values[:: max(1, values.numel() // _SAMPLE)].contiguous()
    if math.isnan(sample.sum().item()):
        sample = sample[~sample.isnan()]
    m = sample.numel()
    if m == 0:
        return -math.inf, math.inf
    # Five standard deviations of the count of a sample, on either side.
    spread = 5 * math.sqrt(m * fraction * (1 - fraction)) + 2
    first, last = m * (1 - fraction) - spread, m * (1 - fraction) + spread
    low = sample.kthvalue(int(first)).values.item() if first >= 1 else -math.inf
    high = sample.kthvalue(math.ceil(last)).values.item() if last <= m else math.inf
    return low, high


def _representable(x: float, dtype: torch.dtype) -> float:
    return torch.tensor(x, dtype=dtype).item()


def _split(values: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many values are above ``high``, and those in [low, high], in one pass.

    The latter are few: masks go over rows in which there are some, and over parts of these.
    """
    whole = values.numel() // _ROW * _ROW
    buffer = torch.empty(min(_SLICE, whole))
    at_least, beyond = torch.empty(2, whole // _ROW)  # of each row
    for start in range(0, whole, _SLICE):
        x = values[start : min(start + _SLICE, whole)]
        part = slice(start // _ROW, (start + x.numel()) // _ROW)
        by_row = buffer[: x.numel()].view(-1, _ROW)
        torch.ge(x.view(-1, _ROW), low, out=by_row)
        torch.sum(by_row, 1, out=at_least[part])
        torch.gt(x.view(-1, _ROW), high, out=by_row)
        torch.sum(by_row, 1, out=beyond[part])
    above = int(beyond.double().sum().item())
    row = (at_least != beyond).nonzero().squeeze(1)
    rows = values[:whole].view(-1, _ROW).index_select(0, row)
    within = torch.ge(rows, low, out=torch.empty_like(rows, dtype=torch.float32))
    within -= torch.gt(rows, high, out=torch.empty_like(within))
    part = within.view(-1, _PART).sum(1).nonzero().squeeze(1)
    rest = values[whole:]
    some = torch.cat([rows.view(-1, _PART).index_select(0, part).view(-1), rest])
    return above + int((rest > high).sum()), some[(some >= low) & (some <= high)]


def device_top_threshold(values: Tensor, top: float) -> tuple[Tensor, Tensor, Tensor]:
    """`top_threshold` as 0-dimensional tensors, by a sort of all values."""
    ordered = values.sort().values  # NaN last
    n = (~values.isnan()).sum()
    k = _device_best_count(top, n)
    threshold = ordered.index_select(0, (n - k).clamp(min=0).view(1)).squeeze(0)
    above, tied = (values > threshold).sum(), (values == threshold).sum()
    return threshold, (k - above).double() / tied.clamp(min=1), n


def _device_best_count(top: float, n: Tensor) -> Tensor:
    """`best_count` of a 0-dimensional tensor, exact."""
    exact = Fraction(repr(top)).limit_denominator(2**60)
    estimate = (n.double() * top).floor().long()
    # The products may overflow, but wrap around: their small difference is right.
    left = n * exact.numerator - estimate * exact.denominator
    k = estimate + (left > 0).long() + (left > exact.denominator).long()
    return k.clamp(min=1)


def value_order(values: Tensor) -> Tensor:
    """Return the entries from the lowest value to the highest, then those that are NaN.

    Args:
        values: ``[n]``, floating.

    Returns:
        ``[n]``, int32, or int64 where that does not suffice.
    """
    order = values.sort().indices
    return order.int() if values.numel() < 2**31 else order


def rank_weights(values: Tensor, order: Tensor, alpha: float, parallel: bool) -> Tensor:
    """Return ``1 / rank^alpha``, where ties share the mean over their ranks.

    Args:
        values: ``[n]``, floating; NaN has weight 0.
        order: what `value_order` returned.
        alpha: exponent.
        parallel: as in `SumLevels`.

    Returns:
        ``[n]``, float64, in the order of ``order``.

    Examples:
        >>> values = torch.tensor([7.0, 5.0, 5.0])
        >>> rank_weights(values, value_order(values), 1.0, False)
        tensor([0.4167, 0.4167, 1.0000], dtype=torch.float64)
    """
    ordered = values.index_select(0, order)
    position = torch.arange(values.numel(), device=values.device)
    drawable = ~ordered.isnan()
    rank = (drawable.sum() - position).clamp_(min=1)
    by_rank = rank.double().pow_(-alpha).mul_(drawable)
    differs = ordered[1:] != ordered[:-1]
    edge = differs.new_ones(1)
    start = position.where(torch.cat([edge, differs]), 0).cummax(0).values
    last = position.where(torch.cat([differs, edge]), values.numel() - 1)
    last = last.flip(0).cummin(0).values.flip(0)
    # Summed from the worst rank on, so that the small terms are not lost beside the large.
    running = running_sums(by_rank, parallel)
    summed = running.index_select(0, last) - running.index_select(0, start)
    summed += by_rank.index_select(0, start)
    # The difference of two sums rounds; where nothing ties, there is no need for it.
    return by_rank.where(start == last, summed / (last - start + 1))

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

_SLICE = 1 << 17  # stays in the cache
_SAMPLE = 1 << 14
_ROW = 64


def count_at_least(values: Tensor, bound: float) -> int:
    """Count the values that are at least ``bound``; NaN is not.

    Args:
        values: ``[n]``, floating, on the CPU.
        bound: may be infinite.
    """
    # A comparison into floats and their sum are vectorised; count_nonzero and masks are not.
    part = torch.empty(min(_SLICE, values.numel()))
    return sum(
        int(torch.ge(x, bound, out=part[: x.numel()]).sum().item()) for x in values.split(_SLICE)
    )


def top_threshold(values: Tensor, top: float) -> tuple[float, float, int]:
    """Find the least value that the mode ``"top"`` keeps.

    Args:
        values: ``[n]``, floating, on the CPU; NaN is never drawn.
        top: fraction that is kept.

    Returns:
        The threshold, the weight of the entries that equal it, and the number of drawable entries.

    Examples:
        >>> top_threshold(torch.tensor([3.0, 1.0, 1.0, -2.0]), 0.5)
        (1.0, 0.5, 4)
    """
    # Only NaN makes the sum NaN, or, harmlessly, an overflow.
    n = values.numel()
    if math.isnan(values.sum().item()):
        n = count_at_least(values, -math.inf)
    if n == 0:
        return math.inf, 0.0, 0
    k = best_count(top, n)
    low, high = _bracket(values, k / n)
    above_high = count_at_least(values, _next_above(high, values.dtype))
    at_least_low = count_at_least(values, low)
    if not above_high < k <= at_least_low:  # the sample misled
        low, high, above_high = -math.inf, math.inf, 0
        at_least_low = n
    if at_least_low - above_high > _SAMPLE // 8 and math.isfinite(high - low):
        # Interpolate, and count again: a pass costs less than many candidates do.
        m = at_least_low - above_high
        middle = low + (high - low) * (at_least_low - k) / m
        margin = (high - low) * (0.03 + 2 / math.sqrt(m))  # bent density, chance
        closer = _representable(max(low, middle - margin), values.dtype)
        count = count_at_least(values, closer)
        if count >= k:
            low, at_least_low = closer, count
        closer = _representable(min(high, middle + margin), values.dtype)
        count = count_at_least(values, _next_above(closer, values.dtype))
        if count < k:
            high, above_high = closer, count
    if low == high:
        threshold, above, tied = low, above_high, at_least_low - above_high
    else:
        between = _between(values, low, high)
        threshold = between.kthvalue(between.numel() - (k - above_high) + 1).values
        above = above_high + int((between > threshold).sum())
        tied = int((between == threshold).sum())
        threshold = threshold.item()
    return threshold, (k - above) / tied, n


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


def _next_above(x: float, dtype: torch.dtype) -> float:
    x_tensor = torch.tensor(x, dtype=dtype)
    return torch.nextafter(x_tensor, x_tensor.new_tensor(math.inf)).item()


def _between(values: Tensor, low: float, high: float) -> Tensor:
    """The values in [low, high]: few, so that rows without any are skipped first."""
    parts = []
    buffers = torch.empty(2, min(_SLICE, values.numel()))
    for x in values.split(_SLICE):
        within, beyond = buffers[:, : x.numel()]
        torch.ge(x, low, out=within)
        within.sub_(torch.gt(x, high, out=beyond))
        whole = x.numel() // _ROW * _ROW
        row = within[:whole].view(-1, _ROW).sum(1).nonzero().squeeze(1)
        for part in (x[:whole].view(-1, _ROW).index_select(0, row).view(-1), x[whole:]):
            parts.append(part[(part >= low) & (part <= high)])
    return torch.cat(parts)


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

"""From values to weights, in float64 and at leisure: what each mode of the sampler means.

`native.py` and `levels.py` do it fast; tests compare them with `value_weights`.
"""

from __future__ import annotations

import math
import numbers
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_recall.checks import as_float, check_choice, check_tensor

MODES = ("top", "soft", "rank", "per")
_RANGES = {
    "top": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "temperature": (lambda x: 0 < x < math.inf, "positive and finite"),
    "alpha": (lambda x: 0 <= x < math.inf, "at least 0 and finite"),
    "beta": (lambda x: 0 <= x < math.inf, "at least 0 and finite"),
    "eps": (lambda x: 0 < x < math.inf, "positive and finite"),
    "uniform_share": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "min_value": (lambda x: not math.isnan(x), "a number or None"),
}


class Parameters(NamedTuple):
    """How values become probabilities; `ValuePrioritizedSampler` says what each means."""

    mode: str = "top"
    top: float = 0.1
    temperature: float = 1.0
    min_value: float | None = None
    alpha: float = 1.0
    eps: float = 1e-8
    uniform_share: float = 0.0


@lru_cache(maxsize=64)
def _as_written(number: float) -> Fraction:
    return Fraction(repr(number))


def best_count(top: float, n: int) -> int:
    """Return how many of ``n`` entries the mode ``"top"`` keeps, ties aside."""
    # In floats 0.1 * 30 is above 3 and would keep 4: take the decimal number that was written.
    fraction = _as_written(top)
    return max(1, -(-fraction.numerator * n // fraction.denominator))


def nothing_to_draw(size: int) -> RuntimeError:
    """Return the error for entries of which none may be drawn."""
    return RuntimeError(
        f"All {size} stored entries were given non-finite values, so none can be drawn; "
        "check what computes them, and set finite ones with update_priority or refresh."
    )


def checked_parameter(name: str, value: Any) -> Any:
    """Return a parameter as str, float or None, or say what is wrong with it."""
    if name == "mode":
        return check_choice("mode", value, MODES)
    if name == "min_value" and value is None:
        return None
    in_range, expected = _RANGES[name]
    number = value
    if getattr(value, "ndim", None) == 0:
        number = check_tensor(name, value).item() if isinstance(value, Tensor) else value.item()
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")
    number = as_float(number)
    if not in_range(number):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return number


@torch.no_grad()
def value_weights(
    values: Tensor,
    mode: str,
    *,
    alpha: float = 1.0,
    top: float = 0.1,
    temperature: float = 1.0,
    min_value: float | None = None,
    eps: float = 1e-8,
    uniform_share: float = 0.0,
) -> Tensor:
    """Compute the unnormalised probability of drawing each entry, given the values of all.

    The formulas are those of `ValuePrioritizedSampler`.

    Args:
        values: ``[n]``, floating. A number, ``-inf`` for "no value yet", or NaN for "never drawn".
        mode: ``"top"``, ``"soft"``, ``"rank"`` or ``"per"``.
        alpha: exponent of the modes ``"rank"`` and ``"per"``.
        top: fraction of the drawable entries that the mode ``"top"`` keeps.
        temperature: of the mode ``"soft"``.
        min_value: entries below it, or without a value, get weight 0, unless that leaves nothing.
        eps: added to the absolute value in the mode ``"per"``.
        uniform_share: share of draws that are uniform over the entries that may be drawn.

    Returns:
        ``[n]``, float64, at least 0; all 0 only if every entry is NaN.

    Raises:
        ValueError: if ``mode`` is unknown.

    Examples:
        >>> value_weights(torch.tensor([3.0, 1.0, 1.0, -2.0]), "top", top=0.5)
        tensor([1.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    drawable = ~values.isnan()
    if not drawable.all():
        part = value_weights(
            values[drawable],
            mode,
            alpha=alpha,
            top=top,
            temperature=temperature,
            min_value=min_value,
            eps=eps,
            uniform_share=uniform_share,
        )
        return part.new_zeros(values.shape).masked_scatter_(drawable, part)
    valued = values > -math.inf
    if not valued.any():
        return torch.ones_like(values, dtype=torch.float64)
    barred = None
    if min_value is not None:
        below = ~valued | (values < min_value)
        barred = None if below.all() else below

    if mode == "top":
        weights = _top(values, top)
    elif mode == "rank":  # the entries that are left are the best, so their ranks stay
        weights = _rank(values, alpha)
    else:
        v = values.double()
        if barred is not None:
            v = v.masked_fill(barred, -math.inf)
        if mode == "soft":
            weights = ((v - v.max()) / temperature).exp()
        else:
            priority = v.abs().masked_fill(v == -math.inf, 0.0) + eps
            # Only ratios matter, and dividing by the largest keeps a large alpha from overflowing.
            weights = (priority / priority.max()) ** alpha
    may_be_drawn = torch.ones_like(weights) if barred is None else (~barred).double()
    weights = weights * may_be_drawn
    if uniform_share > 0:
        weights = (1 - uniform_share) * weights / weights.sum()
        weights += uniform_share * may_be_drawn / may_be_drawn.sum()
    return weights


def _top(v: Tensor, top: float) -> Tensor:
    """Weights of the best ``ceil(top * n)``; entries tied at the threshold share what is left."""
    n = v.numel()
    k = best_count(top, n)
    threshold = v.kthvalue(n - k + 1).values
    above, tied = v > threshold, v == threshold
    share = (k - above.sum()).double() / tied.sum()
    return above.double().masked_fill_(tied, share)


def _rank(v: Tensor, alpha: float) -> Tensor:
    """Weights ``1 / rank^alpha``, averaged over the ranks that tied entries occupy."""
    ordered, order = v.sort(descending=True)
    by_rank = torch.arange(1, v.numel() + 1, dtype=torch.float64, device=v.device) ** -alpha
    _, group, count = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    mean = by_rank.new_zeros(count.numel()).index_add_(0, group, by_rank) / count
    return torch.empty_like(by_rank).index_copy_(0, order, mean[group])

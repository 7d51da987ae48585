"""Checks at the door: every refusal names the argument, what came and what was expected."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, get_args

import torch


def check_at_least_one(name: str, value: Any) -> int:
    """Return ``value`` as an int of at least 1, or refuse it by name."""
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int of at least 1, got {type(value).__name__} {value}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return int(value)


def check_interval(name: str, value: Any) -> tuple[float, float]:
    """Return ``value`` as an increasing pair of finite floats, or refuse it by name."""
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (low, high), got {value!r}.") from None
    if not -float("inf") < low < high < float("inf"):
        raise ValueError(f"{name} must be finite with low < high, got ({low}, {high}).")
    return low, high


def check_real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Return ``value`` as a float in ``[low, high]``, or refuse it by name."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    number = float(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}.")
    return number


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """Return ``value`` if it is one of a Literal's, or refuse it by name."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}.")
    return value


def check_device(name: str, device: torch.device, expected: torch.device) -> None:
    """Refuse a tensor or generator that lives on another device than the model."""
    if device == expected:
        return
    if device.type != expected.type or (
        device.index is not None and expected.index is not None and device.index != expected.index
    ):
        raise ValueError(
            f"{name} is on device {device}, but the model is on {expected}; move one of them "
            "(in a replay buffer: append a DeviceCastTransform before this transform)."
        )


def check_finite(name: str, value: torch.Tensor) -> None:
    """Refuse a tensor with NaN or infinite entries (not checked inside ``torch.compile``)."""
    if torch.compiler.is_compiling() or not value.is_floating_point():
        return
    # A finite sum is enough to tell that all is well, at a fraction of the cost.
    if math.isfinite(float(value.detach().sum())):
        return
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        raise ValueError(
            f"{name} must be finite, got {int((~finite).sum())} NaN or infinite of "
            f"{value.numel()} entries."
        )


def is_one_hot(value: torch.Tensor) -> bool:
    """Return whether every row holds a single one among zeros."""
    return bool((((value != 0).sum(-1) == 1) & (value.sum(-1) == 1)).all())

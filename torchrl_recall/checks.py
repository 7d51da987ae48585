"""Checks at the door: every refusal names the argument, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, get_args

import torch
from tensordict import NestedKey, unravel_key
from tensordict.nn import TensorDictModuleBase


def check_at_least_one(name: str, value: Any) -> int:
    """Return ``value`` as an int of at least 1, or refuse it by name."""
    if type(value) is int and 1 <= value < 2**63:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int of at least 1, got {type(value).__name__} {value}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    if int(value) >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value}.")
    return int(value)


def check_size(name: str, value: Any) -> int:
    """Return ``value`` as an int of at least 0, or refuse it by name."""
    if type(value) is int and 0 <= value < 2**63:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int of at least 0, got {type(value).__name__}.")
    if not 0 <= int(value) < 2**63:
        raise ValueError(f"{name} must be at least 0 (and below 2**63), got {value}.")
    return int(value)


def check_interval(name: str, value: Any) -> tuple[float, float]:
    """Return ``value`` as an increasing pair of finite floats, or refuse it by name."""
    try:
        low, high = (as_float(bound) for bound in value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a pair (low, high), got {value!r}.") from None
    if not -float("inf") < low < high < float("inf"):
        raise ValueError(f"{name} must be finite with low < high, got ({low}, {high}).")
    return low, high


def check_real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` as a float in ``[low, high]``, open ends apart, or refuse it by name."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    number = as_float(value)
    inside = (low < number if open_low else low <= number) and (
        number < high if open_high else number <= high
    )
    if not inside:
        ends = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name} must lie in {ends[0]}{low}, {high}{ends[1]}, got {value}.")
    return number


def as_float(value: Any) -> float:
    """Return a number as a float; an integer beyond all floats as infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if int(value) > 0 else -math.inf


def check_coefficient(name: str, value: Any, low: float = -1e30) -> float:
    """Return the factor of a loss, in [low, 1e30]: beyond, float32 has no room for the product."""
    return check_real(name, value, low, 1e30)


def usable_device(name: str, device: Any) -> torch.device | None:
    """Return a device that tensors can be put on (or None for None), or refuse it by name."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} {device!r} cannot be used: {reason}") from None
    return found


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False, or refuse it by name."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}.")
    return value


def check_key(name: str, key: Any) -> NestedKey:
    """Return a key in its short form, or refuse it by name."""
    # `unravel_key` passes over parts that are no strings.
    if not _is_key(key):
        raise TypeError(f"{name} must be a key, a string or a tuple of strings, got {key!r}.")
    return unravel_key(key)


def _is_key(key: Any) -> bool:
    return isinstance(key, str) or (
        isinstance(key, tuple) and len(key) > 0 and all(_is_key(part) for part in key)
    )


def check_keys(name: str, keys: Any) -> list[NestedKey]:
    """Return keys as a list, in their short form, or refuse them by name.

    As everywhere in TorchRL a string or a tuple of strings is *one* (nested) key; a list is
    several.

    Args:
        name (str): name of the argument, for refusals.
        keys (NestedKey or list of NestedKey): the keys.

    Returns:
        list of NestedKey: at least one.

    Raises:
        TypeError: no keys.
        ValueError: an empty list.

    Examples:
        >>> check_keys("in_keys", ("agent", "position")), check_keys("in_keys", ["x", "y"])
        ([('agent', 'position')], ['x', 'y'])
    """
    if isinstance(keys, str | tuple):
        return [check_key(name, keys)]
    if not isinstance(keys, Sequence) or isinstance(keys, bytes):
        raise TypeError(f"{name} must be a key or a list of keys, got {type(keys).__name__}.")
    if not keys:
        raise ValueError(f"{name} must name at least one key, got none.")
    return [check_key(name, key) for key in keys]


def as_keys(keys: NestedKey | Sequence[NestedKey]) -> list[NestedKey]:
    """Return keys as a list as `check_keys` does, those that were checked before."""
    return [keys] if isinstance(keys, str | tuple) else list(keys)


def check_network(name: str, network: Any) -> Any:
    """Return a TensorDictModule, or refuse by name what is none."""
    if not isinstance(network, TensorDictModuleBase):
        raise TypeError(f"{name} must be a TensorDictModule, got {type(network).__name__}.")
    return network


def check_tensor(name: str, value: Any) -> torch.Tensor:
    """Return ``value`` if it is a tensor that holds numbers, or refuse it by name."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device, where tensors hold no numbers.")
    return value


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """Return ``value`` if it is one of a tuple's or a Literal's, or refuse it by name."""
    choices = choices if isinstance(choices, tuple) else get_args(choices)
    # Asked first, as `in` compares, and an array or a tensor answers that with another one.
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
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


def check_not_nan(name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a result, or say that its inputs are too large (not inside ``torch.compile``)."""
    if not torch.compiler.is_compiling() and bool(torch.isnan(value).any()):
        raise ValueError(f"{name} is not a number: the data hold numbers too large for its dtype.")
    return value


def is_one_hot(value: torch.Tensor) -> bool:
    """Return whether every row holds a single one among zeros."""
    return bool((((value != 0).sum(-1) == 1) & (value.sum(-1) == 1)).all())

"""Entries, flat states and stored rows, without a model: for what looks at traces and at data.

`ObservationCodec` does the same for the model, with its specs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import ReplayBuffer, Storage

from torchrl_recall.checks import check_tensor
from torchrl_recall.model.observation import sorted_keys


def entry(data: TensorDictBase, key: NestedKey, name: str = "the data") -> Tensor:
    """Return an entry, or say which ones there are."""
    value = data.get(key, default=None)
    if value is None:
        raise KeyError(f"key {key!r} is missing from {name}, which has {sorted_keys(data)}.")
    return check_tensor(repr(key), value)


def read_states(data: TensorDictBase, keys: Sequence[NestedKey]) -> Tensor:
    """Return the entries of ``keys``, flattened and concatenated: ``[*B, D]``."""
    shape = (*data.shape, -1)
    parts = [entry(data, key).reshape(shape) for key in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def trace_entry(trace: TensorDictBase, key: NestedKey) -> Tensor:
    """Return an entry at all states of a trace, the end included: ``[*B, T + 1, ...]``."""
    before = entry(trace, key, "the trace")
    after = entry(trace, unravel_key(("next", key)), "the trace")
    time = trace.ndim - 1
    return torch.cat([before, after.narrow(time, after.shape[time] - 1, 1)], time)


def trace_states(trace: TensorDictBase, keys: Sequence[NestedKey]) -> Tensor:
    """Return the flat states of a trace, ``s_0, …, s_T``: ``[*B, T + 1, D]``."""
    if trace.ndim == 0:
        raise ValueError("the trace has no batch dimension, expected [*B, T].")
    entries: dict[Any, Tensor] = {key: trace_entry(trace, key) for key in keys}
    shape = torch.Size([*trace.shape[:-1], trace.shape[-1] + 1])
    return read_states(TensorDict(entries, shape), keys)


def to_cells(state: Tensor, cell_size: Tensor | None) -> Tensor:
    """Return the cells of states, ``floor(state / cell_size)``, in the states' shape.

    Args:
        state (Tensor): ``[*B, D]``.
        cell_size (Tensor or None): edge of a cell, in the unit of the states, one for all
            coordinates or ``[D]``. None takes the states themselves.
    """
    if cell_size is None:
        return state
    size = cell_size.to(state) if state.is_floating_point() else cell_size.to(state.device)
    return (state / size).floor()


def check_positive(name: str, value: Any) -> Tensor:
    """Return numbers, one or ``[D]``, as float64; refuse by name what is not finite and above 0.

    Raises:
        TypeError: no numbers.
        ValueError: not positive or not finite, or of more than one dimension.
    """
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        kind = type(value).__name__
        raise TypeError(
            f"{name} must be a number or one for each coordinate, got {kind}."
        ) from None
    if numbers.ndim > 1 or not bool(((numbers > 0) & torch.isfinite(numbers)).all()):
        raise ValueError(
            f"{name} must be positive and finite, one number or one for each coordinate, got "
            f"{numbers.tolist()}."
        )
    return numbers


def as_rows(found: Any) -> Any:
    """Return what a storage gave as a TensorDict: a list of them, as lists hold it, stacked."""
    if isinstance(found, list) and found and isinstance(found[0], TensorDictBase):
        return LazyStackedTensorDict.lazy_stack(found)
    return found


def storage_rows(storage: Any, part: slice = slice(None)) -> TensorDictBase:
    """Return rows of a storage, without a copy where it allows; refuse other than TensorDicts."""
    found = as_rows(storage.get(part))
    if not isinstance(found, TensorDictBase):
        raise TypeError(
            f"the storage must hold TensorDicts, got {type(storage).__name__} with "
            f"{type(found).__name__}."
        )
    return found


def stored_data(data: Any, name: str = "data") -> TensorDictBase:
    """Return what a buffer or storage holds, past the buffer's transforms, without a copy.

    Args:
        data (TensorDictBase, Storage or ReplayBuffer): real data.
        name (str): name of the argument, for refusals.

    Returns:
        TensorDictBase: all of it, as the storage holds it.

    Raises:
        TypeError: none of these, or a storage of something else.
        ValueError: nothing in it.
    """
    source: Any = data.storage if isinstance(data, ReplayBuffer) else data
    if isinstance(source, Storage):
        stored: Any = source
        if len(stored) == 0:
            raise ValueError(f"{name} is empty: nothing is stored yet.")
        source = as_rows(stored[:])
    if not isinstance(source, TensorDictBase):
        raise TypeError(
            f"{name} must be a TensorDict, or a Storage or ReplayBuffer that holds TensorDicts, "
            f"got {type(data).__name__} with {type(source).__name__}."
        )
    if source.shape.numel() == 0:
        raise ValueError(f"{name} is empty: batch size {tuple(source.shape)}.")
    return source if source.ndim else source.unsqueeze(0)


def finite_rows(data: TensorDictBase, states: Tensor) -> Tensor:
    """Return ``[*B]`` bool: which rows are finite and no padding (``("collector", "mask")``)."""
    finite = torch.isfinite(states).all(-1)
    mask = data.get(("collector", "mask"), default=None)
    return finite if mask is None else finite & mask.reshape(data.shape).bool()


def check_state_size(state: Tensor, size: int) -> None:
    """Refuse flat states of another size than the data's."""
    if state.ndim == 0 or state.shape[-1] != size:
        raise ValueError(f"state has shape {tuple(state.shape)}, expected [*B, {size}].")

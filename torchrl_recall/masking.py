"""Which rows count, and how those that do not are kept from doing harm.

For the two losses and the transform. A mask on the loss alone protects the forward pass only:
``nan * 0`` is NaN in gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives.common import LossModule

from torchrl_recall.checks import as_keys, check_choice, check_finite, check_tensor
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.observation import sorted_keys

Reduction = Literal["mean", "sum", "none"]


def check_reduction(reduction: str) -> Reduction:
    """Return ``reduction`` if there is such a one, or refuse it."""
    return check_choice("reduction", reduction, Reduction)


def kept_rows(loss: LossModule, data: TensorDictBase) -> Tensor:
    """Return which entries of ``data`` count: those that no mask TorchRL knows of leaves out."""
    kept = torch.ones(data.shape, dtype=torch.bool, device=data.device)
    for key in loss._loss_mask_keys():
        mask = data.get(key, default=None)
        if mask is not None:
            if check_tensor(f"mask {key!r}", mask).is_floating_point() or mask.is_complex():
                raise ValueError(f"mask {key!r} must be bool, got {mask.dtype}.")
            try:
                mask = loss._expand_loss_mask(mask.bool(), kept)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"mask {key!r} does not fit the data: {error}") from None
            kept = kept.to(mask.device) & mask
    check_tensor("the data", kept)
    return kept


def reduce_kept(value: Tensor, kept: Tensor, reduction: Reduction) -> Tensor:
    """Reduce over kept entries; nothing kept gives exactly zero."""
    value = torch.where(kept, value, torch.zeros_like(value))
    if reduction == "none":
        return value
    total = value.sum()
    return total / kept.sum().clamp_min(1) if reduction == "mean" else total


def blank_rows(
    data: TensorDictBase,
    kept: Tensor,
    model: BacktrackModel,
    observation_keys: Iterable[NestedKey],
    action_key: NestedKey | list[NestedKey] | None = None,
) -> TensorDictBase:
    """Put valid values where rows do not count, so that the model's checks pass them over.

    Padding, such as that of ``split_trajectories``, is no valid class, one-hot row or number.

    Args:
        data (TensorDictBase): ``[*B]``; not changed.
        kept (Tensor): ``[*B]`` bool, False = blank the row.
        model (BacktrackModel): says what is valid.
        observation_keys (iterable of NestedKey): where the model's observations are, in their
            order; once or several times over.
        action_key (NestedKey or list, optional): where the action is, or its parts.

    Returns:
        TensorDictBase: a shallow copy.
    """
    codec, action = model.observation, model.action
    observation = codec.restore(torch.zeros_like(codec.low))
    blanks = {key: observation[name] for key, name in zip(observation_keys, cycle(codec.keys))}
    if action_key is not None:
        blank = action.restore(action.blank(codec.unit))
        parts = blank if isinstance(blank, list) else [blank]
        blanks.update(zip(as_keys(action_key), parts, strict=True))
    data = data.copy()
    for key, blank in blanks.items():
        value = data.get(key, default=None)
        # What is missing or has a wrong shape is refused, by name, where it is read.
        if not isinstance(value, Tensor) or value.device != kept.device:
            continue
        if value.shape[kept.ndim :] == blank.shape:
            mask = kept.reshape(kept.shape + (1,) * blank.ndim)
            data.set(key, torch.where(mask, value, blank.to(value)))
    return data


def one_each(data: TensorDictBase, value: Tensor, name: str) -> Tensor:
    """Return an entry with one number for each row, ``[*B]`` or ``[*B, 1]``, as ``[*B]``."""
    if check_tensor(name, value).shape not in (data.shape, (*data.shape, 1)):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected one entry for each of "
            f"{tuple(data.shape)} rows."
        )
    return value.reshape(data.shape)


def finite_rows(kept: Tensor, *values: Tensor) -> Tensor:
    """Return ``[*B]``, shaped like ``kept``: whether all entries of a row are finite."""
    rows = [torch.isfinite(value).reshape(*kept.shape, -1).all(-1) for value in values]
    return torch.stack(rows).all(0)


def rows_in_range(kept: Tensor, *values: Tensor) -> Tensor:
    """Return ``[*B]``, shaped like ``kept``: whether a row can be fitted.

    Finite is not enough: squares of its entries, and sums of such, must be finite, too.
    """
    rows = [(value.abs() <= _largest(value.dtype)).reshape(*kept.shape, -1) for value in values]
    return torch.stack([row.all(-1) for row in rows]).all(0)


def _largest(dtype: torch.dtype) -> float:
    """Return a number whose square leaves room for sums: 2e16 in float32."""
    if not dtype.is_floating_point:
        return float("inf")
    limit = torch.finfo(dtype).max
    return limit**0.5 / 1024 if limit > 1e30 else limit


def fill_rows(value: Tensor, kept: Tensor) -> Tensor:
    """Put a kept row's entries where rows do not count: whatever reads them, they suit it.

    Args:
        value (Tensor): ``[*B, *event]``.
        kept (Tensor): ``[*B]`` bool, True somewhere (else all rows become zero).

    Returns:
        Tensor: like ``value``.
    """
    event = value.shape[kept.ndim :]
    # Not indexed by a 0-d tensor, which would wait for the device and break ``torch.compile``.
    first = kept.flatten().int().argmax(0, keepdim=True)
    row = value.reshape(kept.numel(), *event).index_select(0, first).squeeze(0)
    row = torch.where(kept.any(), row, torch.zeros_like(row))
    return torch.where(kept.reshape(kept.shape + (1,) * len(event)), value, row)


def filled_entries(trace: TensorDictBase, keys: Iterable[NestedKey], kept: Tensor) -> TensorDict:
    """Read what a network needs of a trace, without gradient and without what masked steps hold.

    Args:
        trace (TensorDictBase): ``[*B]``; not changed.
        keys (iterable of NestedKey): what to read.
        kept (Tensor): ``[*B]`` bool, True somewhere.

    Returns:
        TensorDict: ``[*B]``, those entries; kept rows are finite.

    Raises:
        KeyError: a key is missing.
        ValueError: kept rows hold NaN or infinite entries.
    """
    filled = TensorDict({}, kept.shape, device=trace.device)
    for key in dict.fromkeys(keys):
        value = trace.get(key, default=None)
        if value is None:
            raise KeyError(
                f"key {key!r} is missing from the trace, which has {sorted_keys(trace)}."
            )
        if check_tensor(f"trace {key!r}", value).is_complex():
            raise ValueError(f"trace {key!r} must be real, got {value.dtype}.")
        value = fill_rows(value.detach(), kept)
        check_finite(f"trace {key!r} at kept steps", value)
        filled.set(key, value)
    return filled

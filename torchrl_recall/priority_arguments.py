"""What TorchRL passes to a sampler as index and priority, turned into flat pairs of one index and one value.

Called by `ValuePrioritizedSampler` when data come in. The shapes are those that TorchRL 0.14's buffers and writers use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("max", "min", "mean", "median")


def integer_tensor(index: Any, device: torch.device) -> Tensor:
    """Return ``index`` as an int64 tensor, or refuse it with a TypeError."""
    index = torch.as_tensor(index, device=device)
    if index.numel() and (index.dtype == torch.bool or index.dtype.is_floating_point):
        raise TypeError(f"index must hold integers, got {index.dtype}")
    return index.long()


def flat_index(index: Any, storage: Any, device: torch.device) -> Tensor:
    """Turn an index into positions in the flattened storage.

    Args:
        index: an int or tensor ``[N]`` (flat already), a tensor ``[N, ndim]``, or a tuple of ``ndim`` tensors ``[N]``.
        storage: a TorchRL storage of ``ndim`` dimensions, or None for one dimension.
        device: where the result is wanted.

    Returns:
        ``[N]``, int64; -1 where an index is negative, as `TensorDictMaxValueWriter` marks data it rejects.

    Raises:
        TypeError: if ``index`` does not hold integers.
        ValueError: if its shape does not fit the storage.
        IndexError: if a coordinate is beyond the storage's later dimensions.

    Examples:
        >>> flat_index(torch.tensor([4, -1]), None, torch.device("cpu"))
        tensor([ 4, -1])
    """
    if isinstance(index, tuple) and any(isinstance(part, Tensor) for part in index):
        index = torch.stack(index, -1)
    index = integer_tensor(index, device)
    if index.ndim < 2:
        return index.reshape(-1).clamp(min=-1)
    ndim = 1 if storage is None else storage.ndim
    if index.shape[-1] != ndim:
        raise ValueError(
            f"index must have shape [N], or [N, {ndim}] for a storage of {ndim} dimension(s); got "
            f"{tuple(index.shape)}" + (" and no storage" if storage is None else "")
        )
    flat = index[..., 0]
    for dim in range(1, ndim):
        size = storage.shape[dim]
        if bool((index[..., dim] >= size).any()):
            raise IndexError(f"index must be below {size} in dimension {dim}, got {index}")
        flat = flat * size + index[..., dim]
    return flat.masked_fill((index < 0).any(-1), -1).reshape(-1)


def paired_values(priority: Any, flat: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Find one value for each index.

    Args:
        priority: one number for all, or values whose leading dimensions match ``flat``; the others are reduced.
        flat: ``[N]``, from `flat_index`.
        reduction: ``"max"``, ``"min"``, ``"mean"`` or ``"median"``.

    Returns:
        Indices and values, ``[M]`` and ``[M]`` float64, where M is N, or 1 if all of several indices are the same.

    Raises:
        ValueError: if the shapes do not match.

    Examples:
        >>> paired_values([[1.0, 2.0], [-3.0, -4.0]], torch.tensor([7, 5]), "max")
        (tensor([7, 5]), tensor([ 2., -3.], dtype=torch.float64))
    """
    priority = torch.as_tensor(priority, device=flat.device).detach().double()
    n = flat.numel()
    if n == 0 or priority.numel() == 1:
        return flat, priority.reshape(-1)[:1].expand(n)
    # `extend` of a storage of several dimensions passes N indices with priorities [B, T, 1], where B * T = N.
    if not any(priority.shape[:d].numel() == n for d in range(priority.ndim + 1)):
        raise ValueError(
            f"priority must be one number, or one for each of the {n} indices and further dimensions "
            f"behind; got shape {tuple(priority.shape)}"
        )
    # `add` of a stored trajectory passes the same index once for each of its steps.
    if bool((flat == flat[0]).all()):
        flat = flat[:1]
    values = priority.reshape(flat.numel(), -1)
    if reduction == "mean":
        return flat, values.mean(1)
    return flat, getattr(values, reduction)(1).values

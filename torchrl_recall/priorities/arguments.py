"""What a sampler is given as index and priority, turned into flat pairs of index and value.

Called by `ValuePrioritizedSampler` when data or new values come in. The shapes are those that
TorchRL 0.14's buffers and writers pass.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey
from torch import Tensor


def _numbers(name: str, value: Any, device: torch.device, **options: Any) -> Tensor:
    """Return what users give as numbers as a tensor, or refuse it by name."""
    try:
        found = torch.as_tensor(value, device=device, **options)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        came = f"a tensor on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must hold numbers, got {came}: {error}") from None
    if found.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {found.dtype}")
    return found


def integer_tensor(index: Any, device: torch.device) -> Tensor:
    """Return ``index`` as an int64 tensor, or refuse it with a TypeError."""
    index = _numbers("index", index, device)
    if index.numel() and (index.dtype == torch.bool or index.dtype.is_floating_point):
        raise TypeError(f"index must hold integers, got {index.dtype}")
    return index.long()


def flat_index(index: Any, storage: Any, device: torch.device) -> Tensor:
    """Turn an index into positions in the flattened storage.

    Args:
        index: an int or tensor ``[N]`` (flat already), a tensor ``[N, ndim]``, or a tuple of
            ``ndim`` tensors ``[N]``.
        storage: a TorchRL storage of ``ndim`` dimensions; None stands for one of 1 dimension.
        device: where the result is wanted.

    Returns:
        ``[N]``, int64; -1 where negative (data that `TensorDictMaxValueWriter` rejected).

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
    # The first dimension may still fill up; it does not matter for the position.
    sizes = (None,) if storage is None else storage.shape
    if index.shape[-1] != len(sizes):
        raise ValueError(
            f"index must have shape [N] or [N, {len(sizes)}] for a storage of {len(sizes)} "
            f"dimension(s), got {tuple(index.shape)}"
            + (" and no storage" if storage is None else "")
        )
    flat = index[..., 0]
    for dim, size in enumerate(sizes[1:], 1):
        if bool((index[..., dim] >= size).any()):
            raise IndexError(f"index must be below {size} in dimension {dim}, got {index}")
        flat = flat * size + index[..., dim]
    return flat.masked_fill((index < 0).any(-1), -1).reshape(-1)


def paired_values(priority: Any, flat: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Find one value for each index.

    Args:
        priority: one number for all, or values whose leading dimensions hold N entries; the others
            are reduced.
        flat: ``[N]``, from `flat_index`.
        reduction: one of `REDUCTIONS`.

    Returns:
        Indices and values (float64), ``[M]``; M is N, or 1 if several indices are all the same. One
        number for all stays one value.

    Raises:
        ValueError: if the shapes do not match.

    Examples:
        >>> paired_values([[1.0, 2.0], [-3.0, -4.0]], torch.tensor([7, 5]), "max")
        (tensor([7, 5]), tensor([ 2., -3.], dtype=torch.float64))
    """
    priority = _numbers("priority", priority, flat.device, dtype=torch.float64).detach()
    n = flat.numel()
    if n == 0 or priority.numel() == 1:
        return flat, priority.reshape(-1)[:1]
    # For a storage of two dimensions, `extend` passes B * T indices and priorities [B, T, 1].
    if not any(priority.shape[:d].numel() == n for d in range(priority.ndim + 1)):
        raise ValueError(
            f"priority must be one number, or one for each of {n} indices (with further dimensions "
            f"behind), got shape {tuple(priority.shape)}"
        )
    # `add` of a stored trajectory passes the same index once for each of its steps.
    if bool((flat == flat[0]).all()):
        flat = flat[:1]
    if not priority.numel():
        raise ValueError(f"priority must hold numbers, got shape {tuple(priority.shape)}")
    values = priority.reshape(flat.numel(), -1)
    if reduction == "mean":
        return flat, values.mean(1)
    if reduction == "first":
        return flat, values[:, 0]
    return flat, getattr(values, reduction)(1).values


def is_plain(index: Any, priority: Any, device: torch.device) -> bool:
    """Say whether these are flat indices and a number for each, as they are to be stored."""
    return (
        isinstance(index, Tensor)
        and isinstance(priority, Tensor)
        and index.dtype == torch.int64
        and index.ndim == 1
        and priority.numel() == index.numel()
        and priority.is_floating_point()
        and index.device == device == priority.device
    )


def selected_values(
    values: Any, index: Any, capacity: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Pair values set in bulk with the entries they are for, or say what does not fit.

    Args:
        values: ``[n]`` or ``[n, 1]``.
        index: None for the first ``n`` entries, ``[n]`` integers, or a bool mask that is True ``n``
            times.
        capacity: all indices must be in ``[0, capacity)``.
        device: where the results are wanted.

    Returns:
        Indices ``[n]``, or None for the first ``n`` entries, and values ``[n]``.

    Raises:
        TypeError: if ``index`` holds neither integers nor bools.
        ValueError: if a shape does not fit.
        IndexError: if an index is out of range.

    Examples:
        >>> selected_values([5.0], torch.tensor([False, True]), 3, torch.device("cpu"))
        (tensor([1]), tensor([5.]))
    """
    values = _numbers("values", values, device).detach()
    if values.ndim == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.ndim != 1:
        raise ValueError(f"values must have shape [n] or [n, 1], got {tuple(values.shape)}")
    n = values.numel()
    if index is None:
        if n > capacity:
            raise ValueError(f"values must hold at most max_capacity={capacity} numbers, got {n}")
        return None, values
    index = _numbers("index", index, device)
    if index.dtype == torch.bool and index.ndim == 1:
        index = index.nonzero().squeeze(1)
    index = integer_tensor(index, device)
    if index.shape != values.shape:
        raise ValueError(
            f"index must select one entry for each of {n} values, got {tuple(index.shape)}"
        )
    if n and (int(index.min()) < 0 or int(index.max()) >= capacity):
        raise IndexError(f"index must be in [0, {capacity}), got {index}")
    return index, values


def stored_entry(storage: Any, key: NestedKey) -> Tensor:
    """Read an entry of all that is stored, ``[n]``, in the order of flat indices.

    Args:
        storage: of TensorDicts; only this entry is read.
        key: where the entry is, one number for each stored element.

    Raises:
        KeyError: if the storage has no such entry.
        ValueError: if it has not one number for each element.
    """
    data = storage.get(slice(None))
    if isinstance(data, list):
        data = LazyStackedTensorDict.lazy_stack(data)
    entry = data.get(key, None)
    if entry is None:
        raise KeyError(
            f"no entry {key!r} in the storage, among {sorted(map(str, data.keys(True)))}"
        )
    if entry.numel() != data.numel():
        raise ValueError(
            f"{key!r} must hold one number for each of {data.numel()} stored elements, got shape "
            f"{tuple(entry.shape)}"
        )
    return entry.reshape(-1)

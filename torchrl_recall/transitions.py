"""Real transitions as `fit` and the diagnostics take them: out of a buffer, and which rows count.

Rows are read from the storage as they were written; nothing is drawn, and no transform runs.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.data import ReplayBuffer, Storage

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.masking import blank_rows, kept_rows, rows_in_range
from torchrl_recall.observation import sorted_keys

# Rows looked at together: memory for a copy of so many, whatever the size of the storage.
ROWS_AT_ONCE = 65536


def stored_transitions(buffer: ReplayBuffer | Storage | TensorDictBase) -> TensorDictBase:
    """Return what a buffer holds as a TensorDict ``[N]``, without its sampler and transforms.

    Args:
        buffer (ReplayBuffer, Storage or TensorDictBase): transitions in any batch shape.

    Returns:
        TensorDictBase: views of the storage where it holds tensors.

    Raises:
        TypeError: not a buffer, or one whose storage is in another process or holds no TensorDicts.
        ValueError: nothing is stored.
    """
    if isinstance(buffer, TensorDictBase):
        data: Any = buffer
    else:
        with ExitStack() as stack:
            local = isinstance(buffer, ReplayBuffer)
            storage: Any = getattr(buffer, "storage", None) if local else buffer
            if not issubclass(type(storage), Storage):
                raise TypeError(
                    "buffer must be a ReplayBuffer with its storage in this process, a Storage or "
                    f"a TensorDict, got {type(buffer).__name__}; read a remote one: buffer[:]."
                )
            if isinstance(buffer, ReplayBuffer):
                stack.enter_context(buffer._replay_lock)
                stack.enter_context(buffer._write_lock)
            stored = len(storage)
            if stored == 0:
                raise ValueError("buffer is empty, expected transitions.")
            width = 1 if storage.ndim == 1 else storage.shape[1:].numel()
            data = storage.get(slice(0, -(-stored // width)))
            if isinstance(data, list) and isinstance(data[0], TensorDictBase):
                data = LazyStackedTensorDict.lazy_stack(data)
    if not isinstance(data, TensorDictBase):
        raise TypeError(f"buffer must hold TensorDicts, got {type(data).__name__}.")
    if data.ndim == 0 or data.shape.numel() == 0:
        raise ValueError(f"buffer is empty: batch size {tuple(data.shape)}, expected transitions.")
    return data


def select_rows(
    loss: BacktrackLoss, data: TensorDictBase, *more: NestedKey | None
) -> TensorDictBase:
    """Return the entries that the loss reads, and ``more`` where there are such, as ``[N]``.

    Args:
        loss (BacktrackLoss): says what is read.
        data (TensorDictBase): transitions in any batch shape.
        *more (NestedKey): further keys, which may be missing.

    Returns:
        TensorDictBase: ``[N]``.

    Raises:
        KeyError: something that the loss reads is missing.
    """
    found = [key for key in loss.in_keys if data.get(key, default=None) is None]
    if found:
        raise KeyError(
            f"keys {found} are missing from the data, which has {sorted_keys(data)}. fit reads "
            "rows as they are stored: what a transform of the buffer adds (NextStateReconstructor) "
            "comes with fit(model, buffer[:])."
        )
    wanted = [unravel_key(key) for key in (*more, *loss._loss_mask_keys()) if key is not None]
    return data.select(*loss.in_keys, *wanted, strict=False).reshape(-1)


def backward_log_prob(loss: BacktrackLoss, data: TensorDictBase) -> dict[str, Tensor]:
    """Return the log-probability of rows that all count, by factor; an ensemble's as a mixture.

    Args:
        loss (BacktrackLoss): says what is read.
        data (TensorDictBase): transitions ``[N]``.

    Returns:
        dict: ``"action"`` and ``"delta"``, and with a stop head ``"stop"`` (of not stopping at the
        next state) and ``"start"`` (of stopping at the observation of an episode's first step, 0
        for the others), each ``[N]``.
    """
    model = loss.model
    keys, action_key = loss._observation_keys, loss.tensor_keys.action
    state, action, next_state = model.read(data, observation_keys=keys, action_key=action_key)
    terms = dict(model.step_log_prob(state, action, next_state))
    if bool(torch.isneginf(terms["delta"]).any()):
        raise ValueError(
            f"{int(torch.isneginf(terms['delta']).sum())} of {len(data)} transitions have a "
            "displacement s_t - s_(t+1) that is not in the model's delta_support; add it there."
        )
    if model.has_stop:
        members = [model.member(i) for i in range(model.num_members)]
        stops = torch.stack([nn.functional.logsigmoid(one.stop_logit(state)) for one in members])
        mean = stops.logsumexp(0) - math.log(len(members))
        terms["start"] = torch.where(loss._is_init(data), mean, 0.0)
    return terms


@torch.no_grad()
def usable_rows(loss: BacktrackLoss, data: TensorDictBase, *, mask_nonfinite: bool) -> Tensor:
    """Return which rows count: not masked, and finite.

    Args:
        loss (BacktrackLoss): says what is read, and by which masks.
        data (TensorDictBase): transitions ``[N]``.
        mask_nonfinite (bool): leave out rows with NaN or infinite entries instead of refusing them.

    Returns:
        Tensor: ``[N]`` bool, on the CPU.

    Raises:
        ValueError: non-finite entries that are not to be masked.
    """
    model, parts, refused = loss.model, [], 0
    keys = loss._observation_keys
    following = [unravel_key(("next", key)) for key in keys]
    action_key = loss.tensor_keys.action
    for start in range(0, len(data), ROWS_AT_ONCE):
        batch: Any = data[start : start + ROWS_AT_ONCE]
        batch = batch.to(model.device)
        kept = kept_rows(loss, batch)
        state, action, next_state = model.read(
            blank_rows(batch, kept, model, [*keys, *following], action_key),
            observation_keys=keys,
            action_key=action_key,
            require_finite=False,
        )
        finite = rows_in_range(kept, state, action, next_state)
        refused += int((kept & ~finite).sum())
        parts.append((kept & finite).cpu())
    if refused and not mask_nonfinite:
        raise ValueError(
            f"{refused} of {len(data)} transitions have NaN, infinite or huge entries "
            f"in {loss.in_keys}, expected finite ones; pass mask_nonfinite=True to leave them out."
        )
    return torch.cat(parts)

"""Real transitions for `fit` and the diagnostics: which entries, which rows, how likely."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor, nn

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.masking import blank_rows, kept_rows, rows_in_range
from torchrl_recall.model.ensemble import members_of
from torchrl_recall.model.observation import sorted_keys

# Rows looked at together: memory for a copy of so many, whatever the size of the storage.
ROWS_AT_ONCE = 65536


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
        members = members_of(model)
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

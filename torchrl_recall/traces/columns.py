"""What `sample_traces` fills: one tensor a column, a trace a row, oldest step first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_recall.heads import CategoricalHead
from torchrl_recall.model import BacktrackModel


class BadStart(ValueError):
    """A state to walk back from is not finite, or no state of the model."""

    def __init__(
        self, message: str = "next_observation must be finite and within the model's classes."
    ) -> None:
        super().__init__(message)


class NoFirstStep(ValueError):
    """Not a single trace could make a finite first step."""

    def __init__(
        self,
        message: str = (
            "model gives NaN or infinite numbers for every step back from finite states; "
            "expected finite parameters and statistics, and states of the data's own size."
        ),
    ) -> None:
        super().__init__(message)


class Columns(NamedTuple):
    """The steps of ``n`` traces of length ``T``; a backend fills every entry.

    Masked steps hold finite values: the walk's start for states, zero for what is not finite.

    Attributes:
        state (Tensor): ``[n, T, size]`` flat states ``s_t``.
        next_state (Tensor): ``[n, T, size]`` flat states ``s_{t+1}``; the last one is the start.
        action (Tensor): ``[n, T, A]`` or ``[n, T]`` indices.
        action_log_prob (Tensor): ``[n, T]``.
        delta_log_prob (Tensor): ``[n, T]``.
        mask (Tensor): ``[n, T]`` bool, True = keep.
    """

    state: Tensor
    next_state: Tensor
    action: Tensor
    action_log_prob: Tensor
    delta_log_prob: Tensor
    mask: Tensor

    @classmethod
    def empty(cls, model: BacktrackModel, num_rows: int, num_steps: int) -> Columns:
        """Return columns with memory but without values."""
        dtype, device, size = model.dtype, model.device, model.observation.size
        state_dtype = torch.int64 if model.observation.is_discrete else dtype
        state = torch.empty(num_rows, num_steps, size, dtype=state_dtype, device=device)
        if isinstance(model.action.head, CategoricalHead):
            action = torch.empty(num_rows, num_steps, dtype=torch.int64, device=device)
        else:
            width = model.action.head.size
            action = torch.empty(num_rows, num_steps, width, dtype=dtype, device=device)
        log_prob = torch.empty(num_rows, num_steps, dtype=dtype, device=device)
        mask = torch.empty(num_rows, num_steps, dtype=torch.bool, device=device)
        return cls(
            state, torch.empty_like(state), action, log_prob, torch.empty_like(log_prob), mask
        )

"""What `sample_traces` fills: one tensor a column, a trace a row, oldest step first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.factors import FactoredHead
from torchrl_recall.model.heads import CategoricalHead
from torchrl_recall.traces import large_columns


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
        action (Tensor): ``[n, T, A]`` numbers or indices, or ``[n, T]`` indices.
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
        head = model.action.head
        form = Form(
            state_size=model.observation.size,
            is_discrete=model.observation.is_discrete,
            action_size=None if isinstance(head, CategoricalHead) else head.size,
            dtype=model.dtype,
            action_is_class=isinstance(head, FactoredHead),
        )
        return form.empty(num_rows, num_steps, model.device, large_columns.empty)


class Form(NamedTuple):
    """What a model's columns look like, whatever their length.

    Attributes:
        state_size (int): numbers of a flat state.
        is_discrete (bool): whether they are int64.
        action_size (int or None): numbers of an action; None for an index.
        dtype (torch.dtype): dtype of all that is no integer.
        action_is_class (bool): whether an action's numbers are class indices.
    """

    state_size: int
    is_discrete: bool
    action_size: int | None
    dtype: torch.dtype = torch.float32
    action_is_class: bool = False

    def empty(
        self,
        num_rows: int,
        num_steps: int,
        device: torch.device | str,
        allocate: Callable[..., Tensor] = torch.empty,
    ) -> Columns:
        """Return columns with memory but without values."""

        def column(dtype: torch.dtype, *shape: int) -> Tensor:
            return allocate(num_rows, num_steps, *shape, dtype=dtype, device=device)

        state_dtype = torch.int64 if self.is_discrete else self.dtype
        size = self.action_size
        is_class = size is None or self.action_is_class
        action_dtype = torch.int64 if is_class else self.dtype
        return Columns(
            state=column(state_dtype, self.state_size),
            next_state=column(state_dtype, self.state_size),
            action=column(action_dtype) if size is None else column(action_dtype, size),
            action_log_prob=column(self.dtype),
            delta_log_prob=column(self.dtype),
            mask=column(torch.bool),
        )

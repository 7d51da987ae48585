"""Draws of whole trajectories by value, and of a step in each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchrl_recall.priorities.trajectories import TrajectoryGroups
from torchrl_recall.priorities.weights import Parameters


class TrajectoryDraws:
    """Draws a trajectory as `ValuePrioritizedSampler` draws an entry, then one of its steps evenly.

    Args:
        values: ``[n]``, of the stored entries, as in `TrajectoryGroups.values`.
        ids: ``[n]`` integers, the trajectory of each.
        oldest: the entry that was written first, for the reduction ``"first"``.
        reduction: how the values of its steps become a trajectory's.
        priorities: `NativePriorities` or `TorchPriorities`.

    Examples:
        >>> from torchrl_recall.priorities.native import NativePriorities
        >>> values, ids = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([4, 4, 9])
        >>> draws = TrajectoryDraws(values, ids, 0, "max", NativePriorities)
        >>> uniform = torch.tensor([[0.5, 0.5], [0.2, 0.7]], dtype=torch.float64)
        >>> draws.draw(uniform, Parameters("top", top=0.5), 0.0)
        (tensor([0, 1]), tensor([1., 1.]))
    """

    def __init__(
        self, values: Tensor, ids: Tensor, oldest: int, reduction: str, priorities: Any
    ) -> None:
        self.size = values.numel()
        groups = TrajectoryGroups.of(ids, oldest)
        self._groups = groups.only(~values.isnan())
        each = groups.values(values, reduction).masked_fill(self._groups.length == 0, math.nan)
        self._count = each.numel()
        self._priorities = priorities(self._count, values.dtype, values.device)
        self._priorities.restore(each)

    def draw(self, uniform: Tensor, parameters: Parameters, beta: float) -> tuple[Tensor, Tensor]:
        """Turn uniform numbers into entries.

        Args:
            uniform: ``[2, B]`` float64 in [0, 1), for the trajectories and for their steps.
            parameters: how values become probabilities.
            beta: exponent of the importance weights; 0 makes them 1.

        Returns:
            Entries ``[B]`` int64, and ``(p / min p)^-beta`` ``[B]`` float32, of the steps.
        """
        chosen, importance = self._priorities.draw(uniform[0], self._count, parameters, 0.0)
        entry = self._groups.steps_of(chosen, uniform[1])
        if beta:
            weights = self._priorities.weights(self._count, parameters)
            share = weights / self._groups.length.clamp(min=1)
            least = share.masked_fill(share <= 0, torch.inf).min()
            importance = ((share[chosen] / least) ** -beta).float()
        return entry, importance

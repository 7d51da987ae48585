"""How much of a space of goals has been reached, with an interval for the share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_recall.checks import check_real
from torchrl_recall.diagnostics.distance import nearest_distance


class GoalCoverage(NamedTuple):
    """Share of goals that were reached, with Wilson's interval.

    Examples:
        >>> import torch
        >>> found = goal_coverage(torch.tensor([True] * 8 + [False] * 2))
        >>> found.share, round(found.low, 3), round(found.high, 3)
        (0.8, 0.49, 0.943)
    """

    share: float
    """Of the goals."""
    low: float
    """Lower bound of the interval."""
    high: float
    """Upper bound of the interval."""
    reached: Tensor
    """Which goals, bool ``[*G]``."""

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {"share": self.share, "low": self.low, "high": self.high}


def goal_coverage(reached: Tensor, *, confidence: float = 0.95) -> GoalCoverage:
    """Summarise which goals of a grid were reached.

    Args:
        reached (Tensor): bool ``[*G]``, one outcome for each goal (or each trial of a goal).

    Keyword Args:
        confidence (float): of the interval, in (0, 1).

    Returns:
        GoalCoverage: the share and its interval, outcomes taken as independent.

    Raises:
        ValueError: not bool, or no goal.

    Source: Wilson, 1927, "Probable inference, the law of succession, and statistical inference".

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import goal_coverage
        >>> found = goal_coverage(torch.tensor([True] * 8 + [False] * 2))
        >>> found.share, round(found.low, 3), round(found.high, 3)
        (0.8, 0.49, 0.943)
    """
    if reached.dtype != torch.bool or reached.numel() == 0:
        raise ValueError(
            f"reached must be bool with at least one goal, got {reached.dtype} of shape "
            f"{tuple(reached.shape)}."
        )
    confidence = check_real("confidence", confidence, 0.0, 1.0, open_low=True, open_high=True)
    n, share = reached.numel(), float(reached.double().mean())
    half = torch.tensor((1 + confidence) / 2, dtype=torch.float64)
    z = float(torch.special.ndtri(half))
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = max(0.0, middle - spread), min(1.0, middle + spread)
    return GoalCoverage(share, low, high, reached)


@torch.no_grad()
def reached_goals(goals: Tensor, states: Tensor, radius: float) -> Tensor:
    """Return which goals some state came close to.

    Args:
        goals (Tensor): ``[*G, D]``, for example a grid.
        states (Tensor): ``[*B, D]`` states visited.
        radius (float): how close, in the unit of the states; 0 for discrete ones.

    Returns:
        Tensor: bool ``[*G]``.

    Raises:
        ValueError: no state, or widths that differ.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import reached_goals
        >>> grid = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0)).reshape(2, 2, 2)
        >>> reached_goals(grid, torch.tensor([[0.1, 0.0], [0.0, 0.9]]), 0.2).tolist()
        [[True, True], [False, False]]
    """
    if states.numel() == 0 or goals.shape[-1] != states.shape[-1]:
        raise ValueError(
            f"goals has shape {tuple(goals.shape)} and states {tuple(states.shape)}, expected "
            "[*G, D] and [*B, D] with at least one state."
        )
    radius = check_real("radius", radius, 0.0)
    dtype = torch.promote_types(goals.dtype, states.dtype)
    dtype = dtype if dtype.is_floating_point else torch.float64
    flat = states.reshape(-1, states.shape[-1]).to(dtype)
    found = nearest_distance(goals.reshape(-1, goals.shape[-1]).to(dtype), flat) <= radius
    return found.reshape(goals.shape[:-1])

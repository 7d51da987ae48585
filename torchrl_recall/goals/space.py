"""What `GoalGAN` works in: a bounded space of goals, and a memory of goals in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchrl.data.tensor_specs import Bounded

from torchrl_recall.checks import check_at_least_one, check_device, check_finite


class GoalSpace(nn.Module):
    """A box of goals, mapped to [-1, 1] in each coordinate.

    Args:
        goal (int or Bounded): number of coordinates in [-1, 1], or a bounded floating-point spec
            of shape ``[D]``.
        device (torch.device, optional): device of the bounds.

    Raises:
        TypeError: neither of these.
        ValueError: infinite or empty bounds, or another shape.

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> space = GoalSpace(Bounded(0.0, 4.0, shape=(2,)))
        >>> space.scaled(torch.tensor([[1.0, 4.0]]))
        tensor([[-0.5000,  1.0000]])
    """

    low: Tensor
    high: Tensor

    def __init__(self, goal: int | Bounded, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        if isinstance(goal, Bounded) and goal.dtype.is_floating_point:
            space: Any = goal.space
            low, high = space.low.clone(), space.high.clone()
            if low.ndim != 1 or low.numel() == 0:
                raise ValueError(f"goal must be a spec of shape [D], got {tuple(goal.shape)}.")
            if not bool((torch.isfinite(low) & torch.isfinite(high) & (low < high)).all()):
                raise ValueError(
                    "goal must have finite bounds, low < high, got "
                    f"{low.tolist()} to {high.tolist()}."
                )
        elif isinstance(goal, int) and not isinstance(goal, bool):
            high = torch.ones(check_at_least_one("goal", goal))
            low = -high
        else:
            found = f"{type(goal).__name__} of {getattr(goal, 'dtype', 'no dtype')}"
            raise TypeError(
                f"goal must be a size (int) or a floating-point Bounded spec, got {found}."
            )
        self.register_buffer("low", low.to(device))
        self.register_buffer("high", high.to(device))

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return len(self.low)

    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``[count, D]`` goals uniformly."""
        x = torch.rand((count, self.size), generator=generator, **self.factory)
        return self.unscaled(2 * x - 1)

    @property
    def factory(self) -> dict[str, Any]:
        """Device and dtype of goals, for whoever makes tensors."""
        return {"device": self.low.device, "dtype": self.low.dtype}

    def unscaled(self, x: Tensor) -> Tensor:
        """Map ``[*B, D]`` from [-1, 1] to goals."""
        goals = self.low + (self.high - self.low) * (x + 1) / 2
        return goals.clamp(self.low, self.high)

    def scaled(self, goals: Tensor) -> Tensor:
        """Map goals ``[n, D]`` to [-1, 1], or refuse what is none."""
        if not isinstance(goals, Tensor):
            raise TypeError(f"goals must be a tensor, got {type(goals).__name__}.")
        if goals.ndim != 2 or goals.shape[1] != self.size or len(goals) == 0:
            raise ValueError(
                f"goals has shape {tuple(goals.shape)}, expected [n, {self.size}], n at least 1."
            )
        if goals.dtype != self.low.dtype:
            raise ValueError(f"goals has dtype {goals.dtype}, but the space has {self.low.dtype}.")
        check_device("goals", goals.device, self.low.device)
        check_finite("goals", goals)
        x = 2 * (goals.detach() - self.low) / (self.high - self.low) - 1
        if bool((x.abs() > 1 + 1e-5).any()):
            raise ValueError(
                f"goals must lie within {self.low.tolist()} and {self.high.tolist()}, got "
                f"{goals.amin(0).tolist()} to {goals.amax(0).tolist()}."
            )
        return x


class GoalMemory(nn.Module):
    """A ring of goals that keep a distance from each other.

    Args:
        capacity (int): how many are kept; the oldest go first.
        size (int): coordinates of a goal.
        min_distance (float): a goal is kept only if it is farther than this from all that are.
        factory (dict): device and dtype.

    Examples:
        >>> import torch
        >>> memory = GoalMemory(5, 1, 0.5, {})
        >>> memory.extend(torch.tensor([[0.0], [0.4], [0.9]]))
        >>> memory.goals.flatten()
        tensor([0.0000, 0.9000])
    """

    ring: Tensor
    count: Tensor
    cursor: Tensor

    def __init__(
        self, capacity: int, size: int, min_distance: float, factory: dict[str, Any]
    ) -> None:
        super().__init__()
        self.min_distance = min_distance
        device = factory.get("device")
        self.register_buffer("ring", torch.zeros(capacity, size, **factory))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64, device=device))

    def __len__(self) -> int:
        return int(self.count)

    @property
    def goals(self) -> Tensor:
        """What is kept, ``[n, D]``; once the ring has turned, not in the order of writing."""
        return self.ring[: len(self)]

    @torch.no_grad()
    def extend(self, goals: Tensor) -> None:
        """Keep those of the goals ``[n, D]`` that are not near one that is kept, in turn."""
        for goal in goals:
            if bool(((self.goals - goal).norm(dim=-1) <= self.min_distance).any()):
                continue
            self.ring[int(self.cursor)] = goal
            self.cursor.add_(1).remainder_(len(self.ring))
            self.count.add_(1).clamp_(max=len(self.ring))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``[count, D]`` of the kept goals, with replacement."""
        if count == 0:
            return self.ring[:0]
        device = self.ring.device
        return self.ring[torch.randint(len(self), (count,), generator=generator, device=device)]

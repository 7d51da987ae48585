"""What differs between the mazes of `goal_coverage`, and the point's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.modules import TanhNormal

from bench.learning.goal_training import EVALUATION_SEED, Settings
from torchrl_recall.envs import PointMazeEnv

Policy = Callable[[Tensor, Tensor], Any]


class GoalMaze(ABC):
    """A maze that a policy with goals is trained in, and one to evaluate it in.

    The first two numbers of an observation are the place, which goals are compared with.
    """

    env: Any
    """Many mazes; a step reads ``"desired_goal"`` and ``"elapsed"`` from its TensorDict."""
    grid: Tensor
    """``[G, 2]``: the goals of which coverage is a share."""
    low: Tensor
    """``[2]``: corner of the box that goals are drawn from; walls in it are part of it."""
    high: Tensor
    """``[2]``: the other corner."""
    inputs: Callable[[], nn.Module]
    """Makes the module from observation and goal to the networks' input."""
    num_inputs: int

    def restart(self, done: Tensor) -> None:  # noqa: B027 (most mazes are stateless)
        """Put what is done, bool ``[num_envs, 1]``, back to the start, if it keeps a state."""

    @abstractmethod
    def reached(self, policy: Policy, goals: Tensor) -> Tensor:
        """Tell which goals ``[n, 2]``, all of the grid in order some times, an episode reaches."""


@dataclass(frozen=True)
class PointSettings(Settings):
    """Numbers of a run in the point maze."""

    maze: str = "u"
    step_size: float = 0.12

    def make(self, seed: int) -> PointGoals:
        """Make the maze."""
        return PointGoals(self, seed)


class Inputs(nn.Module):
    """State and goal as numbers of about unit size, and the way from the one to the other."""

    def __init__(self, env: PointMazeEnv) -> None:
        super().__init__()
        height, width = env.walls.shape
        self.middle = max(height, width) / 2
        self.step_size = env.step_size

    def forward(self, state: Tensor, goal: Tensor) -> Tensor:
        place, velocity = state[..., :2], state[..., 2:]
        parts = [
            place / self.middle - 1,
            velocity / self.step_size,
            goal / self.middle - 1,
            goal - place,
        ]
        return torch.cat(parts, -1)


class PointGoals(GoalMaze):
    """`PointMazeEnv` with velocities."""

    num_inputs = 8

    def __init__(self, settings: PointSettings, seed: int) -> None:
        self.settings = s = settings
        self.env: PointMazeEnv = self._maze(s.num_envs, seed)
        self.grid = self.env.goal_grid(s.grid_spacing)
        self.evaluation = self._maze(len(self.grid) * s.rollouts_per_goal, EVALUATION_SEED)
        height, width = self.env.walls.shape
        self.low, self.high = torch.ones(2), torch.tensor([width - 1.0, height - 1.0])
        self.inputs = lambda: Inputs(self.env)

    def _maze(self, count: int, seed: int) -> PointMazeEnv:
        s = self.settings
        return PointMazeEnv(
            s.maze,
            goal="any",
            goal_in_observation=True,
            dynamics="velocity",
            step_size=s.step_size,
            max_steps=s.max_steps,
            batch_size=(count,),
            seed=seed,
        )

    def reached(self, policy: Policy, goals: Tensor) -> Tensor:
        env = self.evaluation
        reached = torch.zeros(len(goals), dtype=torch.bool)
        state = env.reset()["observation"]
        for _ in range(self.settings.max_steps):
            loc, scale = policy(state, goals)
            action: Any = TanhNormal(loc, scale).sample()
            state = env.step_states(state, action)
            reached |= (state[:, :2] - goals).norm(dim=-1) <= env.goal_radius
        return reached

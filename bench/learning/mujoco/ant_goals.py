"""The ant's U-maze as `goal_coverage` wants a maze."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import TanhNormal

from bench.learning.goal_mazes import GoalMaze, Policy
from bench.learning.goal_training import EVALUATION_SEED, Settings
from bench.learning.mujoco.ant_maze import AntMazeEnv


@dataclass(frozen=True)
class AntSettings(Settings):
    """Numbers of a run in the ant maze; frozen before the seeds that are reported."""

    scale: float = 2.0  # edge of a cell, metres; gymnasium-robotics' is 4
    goal_radius: float = 0.45  # metres, as gymnasium-robotics
    max_steps: int = 150
    iterations: int = 42
    num_envs: int = 32
    rollout_steps: int = 64
    learning_rate: float = 1e-3
    gamma: float = 0.99
    epochs: int = 8
    minibatch: int = 512
    entropy_coeff: float = 1e-3
    # An episode takes some rollouts: fewer goals, for longer.
    round_iterations: int = 7
    goals_per_round: int = 24
    num_traces: int = 64
    trace_steps: int = 15
    model_steps: int = 20
    grid_spacing: float = 1 / 3  # cells
    rollouts_per_goal: int = 1
    evaluation_iterations: int = 14

    def make(self, seed: int) -> AntGoals:
        """Make the maze."""
        return AntGoals(self, seed)


class AntInputs(nn.Module):
    """State and goal as numbers of about unit size, and the way from the one to the other."""

    def __init__(self, half_side: float) -> None:
        super().__init__()
        self.half_side = half_side

    def forward(self, state: Tensor, goal: Tensor) -> Tensor:
        place, height = state[..., :2], state[..., 2:3]
        turn_and_joints, velocity = state[..., 3:15], state[..., 15:18]
        spin, joint_velocity = state[..., 18:21], state[..., 21:]
        parts = [
            place / self.half_side,
            4 * (height - 0.75),
            turn_and_joints,
            velocity,
            spin / 4,
            joint_velocity / 8,
            goal / self.half_side,
            goal - place,
        ]
        # Collisions with walls are violent.
        return torch.cat(parts, -1).clamp(-10, 10)


class AntGoals(GoalMaze):
    """`AntMazeEnv`, and one to evaluate in."""

    num_inputs = 33

    def __init__(self, settings: AntSettings, seed: int) -> None:
        self.settings = s = settings
        self.env: AntMazeEnv = self._maze(s.num_envs, seed)
        self.grid = self.env.goal_grid(round(1 / s.grid_spacing))
        self.evaluation = self._maze(len(self.grid) * s.rollouts_per_goal, EVALUATION_SEED)
        self.low, self.high = self.env.low, self.env.high
        self.inputs = lambda: AntInputs(float(self.high.max()))

    def _maze(self, count: int, seed: int) -> AntMazeEnv:
        s = self.settings
        return AntMazeEnv(
            (count,), scale=s.scale, goal_radius=s.goal_radius, max_steps=s.max_steps, seed=seed
        )

    def restart(self, done: Tensor) -> None:
        self.env.restart(done)

    def reached(self, policy: Policy, goals: Tensor) -> Tensor:
        env = self.evaluation
        state: Any = env.reset().set("desired_goal", goals)
        reached = torch.zeros(len(goals), 1, dtype=torch.bool)
        running = torch.ones(len(goals), 1, dtype=torch.bool)
        for _ in range(self.settings.max_steps):
            loc, scale = policy(state["observation"], goals)
            action: Any = TanhNormal(loc, scale).sample()
            # What has ended stands still: the simulation is most of the time.
            after = env._step(
                TensorDict(
                    {
                        "action": action,
                        "_step": running,
                        "desired_goal": goals,
                        "elapsed": state["elapsed"],
                    },
                    env.batch_size,
                )
            )
            reached |= running & after["success"]
            running = running & ~after["done"]
            state = after
        return reached.squeeze(-1)

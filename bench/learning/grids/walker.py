"""Steps in many mazes at once, as `FourRoomsEnv` makes them, by its own tables.

A policy that does not change within a rollout is a table over cells, so that neither network nor
environment is called at each step. That makes dozens of runs affordable; a test holds the steps
against the environment's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict

from torchrl_recall.envs import FourRoomsEnv


@dataclass
class Rollout:
    """Steps of all mazes, each array ``[num_envs, T]``; a cell is ``row * size + column``."""

    size: int
    cell: NDArray[np.int64]
    action: NDArray[np.int64]
    log_prob: NDArray[np.float32]
    next_cell: NDArray[np.int64]
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    done: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of steps in all."""
        return self.cell.size

    def tensordict(self) -> TensorDict:
        """Return them as TorchRL's rollouts have them."""

        def column(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).unsqueeze(-1)

        return TensorDict(
            {
                "observation": self._observation(self.cell),
                "action": torch.from_numpy(self.action),
                "action_log_prob": torch.from_numpy(self.log_prob),
                "next": {
                    "observation": self._observation(self.next_cell),
                    "reward": column(self.reward),
                    "terminated": column(self.terminated),
                    "done": column(self.done),
                },
            },
            list(self.cell.shape),
        )

    def _observation(self, cell: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.stack(divmod(cell, self.size), -1))


class Walker:
    """Walks a batch of mazes.

    Args:
        env: the mazes, of batch size ``[num_envs]``; it is read, never stepped.
        seed: of actions, slips and starts.
    """

    def __init__(self, env: FourRoomsEnv, seed: int) -> None:
        self.size, self.slip, self.max_steps = env.size, env.slip, env.max_steps
        self.next_cell = env.next_cell.numpy()
        goal = env.goal.tolist()
        self.goal = goal[0] * env.size + goal[1]
        self.starts = np.flatnonzero(env.start_probability.numpy())
        self.random = np.random.default_rng(seed)
        self.num_envs = env.batch_size[0]
        self.cell = self.random.choice(self.starts, self.num_envs)
        self.count = np.zeros(self.num_envs, dtype=np.int64)

    def rollout(self, policy: torch.Tensor, steps: int) -> Rollout:
        """Take steps with a policy ``[size², 4]``, going on where the last rollout ended."""
        table = policy.double().numpy()
        table = table / table.sum(-1, keepdims=True)
        thresholds = table.cumsum(-1)[:, :-1]
        shape = (self.num_envs, steps)
        cell, action, next_cell = (np.empty(shape, dtype=np.int64) for _ in range(3))
        terminated, done = (np.empty(shape, dtype=np.bool_) for _ in range(2))
        for t in range(steps):
            here = self.cell
            drawn = self.random.random((self.num_envs, 1))
            chosen = (drawn > thresholds[here]).sum(-1)
            taken = chosen
            if self.slip:
                slipped = self.random.random(self.num_envs) < self.slip
                taken = np.where(slipped, self.random.integers(4, size=self.num_envs), chosen)
            there = self.next_cell[here, taken]
            self.count += 1
            end = there == self.goal
            cell[:, t], action[:, t], next_cell[:, t] = here, chosen, there
            terminated[:, t] = end
            if self.max_steps is not None:
                end = end | (self.count >= self.max_steps)
            done[:, t] = end
            if end.any():
                there = np.where(end, self.random.choice(self.starts, self.num_envs), there)
                self.count[end] = 0
            self.cell = there
        log_prob = np.log(table[cell, action]).astype(np.float32)
        reward = terminated.astype(np.float32)
        return Rollout(self.size, cell, action, log_prob, next_cell, reward, terminated, done)


class Episodes:
    """Cuts rollouts into episodes, which may span several of them."""

    def __init__(self, num_envs: int) -> None:
        self._open: list[list[np.ndarray]] = [[] for _ in range(num_envs)]

    def finished(self, data: Rollout) -> list[np.ndarray]:
        """Return the episodes that end in this rollout: int64 ``[length, 4]`` each.

        Columns are cell, action, next cell, and whether the goal was reached.
        """
        steps = np.stack([data.cell, data.action, data.next_cell, data.terminated], -1)
        found = []
        for row, end in enumerate(data.done):
            begin = 0
            for t in np.flatnonzero(end):
                found.append(np.concatenate([*self._open[row], steps[row, begin : t + 1]]))
                self._open[row], begin = [], t + 1
            if begin < len(end):
                self._open[row].append(steps[row, begin:])
        return found

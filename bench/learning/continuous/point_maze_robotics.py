"""PointMaze of gymnasium-robotics: several points as one TorchRL environment."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from torchrl_recall.envs.seeded import SeededEnv

# Start and goal are the far ends of the package's own U.
U_MAZE = ("11111", "1r001", "11101", "1g001", "11111")


class RoboticsPointMazeEnv(SeededEnv):
    """``PointMaze_UMaze-v3`` of gymnasium-robotics, sparse, ending at the goal.

    The package's own environments, without Gymnasium's wrappers: reward 1 within .45 of the goal,
    which ends the episode, and 0 elsewhere. ``"observation"`` is theirs, position and velocity; the
    goal stays where it is but for the package's noise of ±.25, as the start does.

    Args:
        batch_size: number of points.
        maze: rows of characters, ``1`` wall, ``0`` free, ``r`` start, ``g`` goal.
        max_steps: steps after which an episode is truncated; the package's limit is 300.
        seed: of starts and goals.
    """

    _stream = "RoboticsPointMazeEnv"

    def __init__(
        self,
        batch_size: tuple[int] = (1,),
        *,
        maze: Sequence[str] = U_MAZE,
        max_steps: int = 300,
        seed: int | None = None,
    ) -> None:
        kind: Any = importlib.import_module("gymnasium_robotics.envs.maze.point_maze").PointMazeEnv
        super().__init__(device="cpu", batch_size=torch.Size(batch_size))
        self.max_steps = max_steps
        cells = [[int(x) if x in "01" else x for x in row] for row in maze]
        self._points = [kind(maze_map=cells, continuing_task=False) for _ in range(*batch_size)]
        self._state = np.zeros((*batch_size, 4), dtype=np.float32)
        self._elapsed = torch.zeros(*batch_size, 1, dtype=torch.int64)
        column = torch.Size([*batch_size, 1])
        flag = Categorical(2, shape=column, dtype=torch.bool)
        self.observation_spec = Composite(
            {"observation": Unbounded(shape=torch.Size([*batch_size, 4])), "success": flag},
            shape=self.batch_size,
        )
        self.action_spec = Bounded(-1.0, 1.0, shape=torch.Size([*batch_size, 2]))
        self.reward_spec = Unbounded(shape=column)
        ends = {name: flag.clone() for name in ("done", "terminated", "truncated")}
        self.full_done_spec = Composite(ends, shape=self.batch_size)
        self._make_generator(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        anew = None if tensordict is None else tensordict.get("_reset", None)
        rows = range(len(self._points)) if anew is None else anew.view(-1).nonzero().flatten()
        for row in map(int, rows):
            seed = torch.randint(2**31, (), generator=self._generator)
            observation, _ = self._points[row].reset(seed=int(seed))
            self._state[row] = observation["observation"]
            self._elapsed[row] = 0
        return TensorDict(
            {
                "observation": torch.from_numpy(self._state.copy()),
                "success": torch.zeros(*self.batch_size, 1, dtype=torch.bool),
            },
            self.batch_size,
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        actions = tensordict["action"].double().numpy()
        success = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        for row, (point, action) in enumerate(zip(self._points, actions, strict=True)):
            observation, reward, *_ = point.step(action)
            self._state[row] = observation["observation"]
            success[row] = bool(reward > 0)
        self._elapsed += 1
        truncated = ~success & (self._elapsed >= self.max_steps)
        return TensorDict(
            {
                "observation": torch.from_numpy(self._state.copy()),
                "success": success,
                "reward": success.float(),
                "terminated": success.clone(),
                "truncated": truncated,
                "done": success | truncated,
            },
            self.batch_size,
        )

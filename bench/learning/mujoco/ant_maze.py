"""Gymnasium's ant in gymnasium-robotics' U-maze: several ants as one TorchRL environment."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from bench.learning.mujoco.environments import check_batch_size
from torchrl_recall.checks import check_at_least_one, check_real
from torchrl_recall.envs.seeded import SeededEnv

FRAME_SKIP = 5  # steps of the physics for one of the environment, as Gymnasium's Ant
START = (3, 1)  # row and column of the cell: the lower left end of the U
WALL_HEIGHT = 0.5  # of a cell, as gymnasium-robotics


class AntMazeEnv(SeededEnv):
    """``AntMaze_UMaze-v5`` of gymnasium-robotics from a fixed start, with goals anywhere.

    The model that the package makes of its U and Gymnasium's Ant, and their steps: .05 seconds of
    simulation. All ants share the model. x grows to the right and y upwards, in metres from the
    maze's middle. The reward is 1 on a step that ends within ``goal_radius`` of the goal, which
    terminates the episode, and 0 otherwise. An ant that falls goes on, as in the package. A
    simulation that has diverged, which MuJoCo puts back to its first state, is terminated. A copy
    (``deepcopy``, pickle) goes on where the original is.

    Entries, each ``[*batch_size, ...]``: ``"observation"``, float32 ``[..., 29]``, the positions
    (x, y, height, orientation as a quaternion, 8 joints) and their velocities; ``"desired_goal"``
    ``[..., 2]``; ``"success"`` ``[..., 1]`` bool; ``"elapsed"`` ``[..., 1]`` int64, steps so far.
    A step reads the goal and ``"elapsed"``; positions are in the simulation. Goals are drawn anew
    each episode, uniform over the free cells.

    Args:
        batch_size: number of ants, at least 1.
        scale: edge of a cell, metres; the package's is 4.
        goal_radius: distance that counts as reached, metres; the package's is .45.
        max_steps: steps after which an episode is truncated; the package's limit is 700.
        seed: of the goals.

    Raises:
        ImportError: gymnasium-robotics is missing.
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.
    """

    _stream = "AntMazeEnv"

    def __init__(
        self,
        batch_size: tuple[int] = (1,),
        *,
        scale: float = 4.0,
        goal_radius: float = 0.45,
        max_steps: int = 700,
        seed: int | None = None,
    ) -> None:
        super().__init__(device="cpu", batch_size=check_batch_size(batch_size))
        self.scale: float = check_real("scale", scale, 0.0, open_low=True, open_high=True)
        self.goal_radius: float = check_real(
            "goal_radius", goal_radius, 0.0, open_low=True, open_high=True
        )
        self.max_steps: int = check_at_least_one("max_steps", max_steps)
        self._mujoco: Any = importlib.import_module("mujoco")
        self._model, self.walls, self.start_position = _load(self._mujoco, scale)
        kinds = self._mujoco.mjtWarning
        self._bad = [
            int(k) for k in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)
        ]
        self._ants = [self._mujoco.MjData(self._model) for _ in range(*batch_size)]
        free = (~self.walls).nonzero()
        self._lower_corners = (free.flip(1) - torch.tensor(self.walls.shape[::-1]) / 2) * scale
        self._make_specs(torch.Size([*batch_size, 1]))
        self._make_generator(seed)
        for ant in self._ants:
            self._restart(ant)

    walls: Tensor
    """bool ``[height, width]``: the cells that are wall, the lowest row first."""
    start_position: Tensor
    """``[2]``: where episodes begin, metres."""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_mujoco"]  # modules do not travel
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mujoco = importlib.import_module("mujoco")
        # MuJoCo's own copies of simulations bring a model each.
        arrived = self._ants
        self._ants = [self._mujoco.MjData(self._model) for _ in arrived]
        for ant, data in zip(self._ants, arrived, strict=True):
            self._mujoco.mj_copyData(ant, self._model, data)

    @property
    def low(self) -> Tensor:
        """``[2]``: the lower left corner of the box inside the outer wall."""
        return -self.high

    @property
    def high(self) -> Tensor:
        """``[2]``: the upper right corner of the box inside the outer wall."""
        height, width = self.walls.shape
        return torch.tensor([width / 2 - 1, height / 2 - 1]) * self.scale

    def free(self, places: Tensor) -> Tensor:
        """Tell which places ``[..., 2]`` lie in a free cell: bool ``[...]``."""
        size = torch.tensor(self.walls.shape[::-1])
        cell = (places / self.scale + size / 2).floor().nan_to_num(-1)
        inside = ((cell >= 0) & (cell < size)).all(-1)
        column, row = cell.long().clamp_min(0).minimum(size - 1).unbind(-1)
        return inside & ~self.walls[row, column]

    def goal_grid(self, per_cell: int) -> Tensor:
        """Lay ``per_cell`` x ``per_cell`` goals over each free cell: ``[G, 2]``."""
        steps = (torch.arange(per_cell) + 0.5) / per_cell * self.scale
        within = torch.cartesian_prod(steps, steps)
        return (self._lower_corners.unsqueeze(1) + within).flatten(0, 1)

    def restart(self, rows: Tensor) -> None:
        """Put ants back to the start, those where ``rows``, of any shape, is True."""
        for row in rows.view(-1).nonzero().flatten().tolist():
            self._restart(self._ants[row])

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        anew = None if tensordict is None else tensordict.get("_reset", None)
        rows = torch.ones(self.batch_size, dtype=torch.bool) if anew is None else anew
        self.restart(rows)
        cell = torch.randint(len(self._lower_corners), self.batch_size, generator=self._generator)
        within = torch.rand(*self.batch_size, 2, generator=self._generator) * self.scale
        elapsed = torch.zeros(*self.batch_size, 1, dtype=torch.int64)
        # Of a partial reset TorchRL keeps the rows that were asked for.
        return self._read(self._lower_corners[cell] + within, elapsed)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        actions = tensordict["action"].clamp(-1, 1).double().numpy()
        moving = tensordict.get("_step", None)
        mask = np.ones(len(actions), bool) if moving is None else moving.view(-1).numpy()
        step = self._mujoco.mj_step
        for ant, action, moves in zip(self._ants, actions, mask, strict=True):
            if moves:
                ant.ctrl[:] = action
                step(self._model, ant, FRAME_SKIP)
        moved = torch.from_numpy(mask).unsqueeze(-1)
        read = self._read(tensordict["desired_goal"], tensordict["elapsed"] + moved.long())
        diverged = torch.tensor([[self._diverged(ant)] for ant in self._ants])
        success = read["success"]
        read["reward"] = (success & moved).float()
        read["terminated"] = success | diverged
        read["truncated"] = read["elapsed"] >= self.max_steps
        read["done"] = read["terminated"] | read["truncated"]
        return read

    def _read(self, goal: Tensor, elapsed: Tensor) -> TensorDict:
        state = np.array([[*ant.qpos, *ant.qvel] for ant in self._ants], dtype=np.float32)
        observation = torch.from_numpy(state)
        distance = (observation[:, :2] - goal).norm(dim=-1, keepdim=True)
        return TensorDict(
            {
                "observation": observation,
                "desired_goal": goal.clone(),
                "success": distance <= self.goal_radius,
                "elapsed": elapsed,
            },
            self.batch_size,
        )

    def _restart(self, ant: Any) -> None:
        self._mujoco.mj_resetData(self._model, ant)
        ant.qpos[:2] = self.start_position
        self._mujoco.mj_forward(self._model, ant)

    def _diverged(self, ant: Any) -> bool:
        return any(ant.warning[kind].number > 0 for kind in self._bad)

    def _make_specs(self, column: torch.Size) -> None:
        batch = self.batch_size
        width = self._model.nq + self._model.nv
        flag = Categorical(2, shape=column, dtype=torch.bool)
        goal = Bounded(
            self.low.expand(*batch, 2), self.high.expand(*batch, 2), shape=torch.Size([*batch, 2])
        )
        read: dict[str, Any] = {
            "desired_goal": goal,
            "elapsed": Unbounded(shape=column, dtype=torch.int64),
        }
        state = Unbounded(shape=torch.Size([*batch, width]))
        written = {"observation": state, "success": flag, **read}
        self.observation_spec = Composite(
            {name: spec.clone() for name, spec in written.items()}, shape=batch
        )
        self.state_spec = Composite(
            {name: spec.clone() for name, spec in read.items()}, shape=batch
        )
        self.action_spec = Bounded(-1.0, 1.0, shape=torch.Size([*batch, self._model.nu]))
        self.reward_spec = Unbounded(shape=column)
        ends = {name: flag.clone() for name in ("done", "terminated", "truncated")}
        self.full_done_spec = Composite(ends, shape=batch)


def _load(mujoco: Any, scale: float) -> tuple[Any, Tensor, Tensor]:
    """Return the package's model of the ant in its U, its walls, and where the start is."""
    kind: Any = importlib.import_module("gymnasium_robotics.envs.maze.maze_v4").Maze
    cells = importlib.import_module("gymnasium_robotics.envs.maze.maps").U_MAZE
    gymnasium: Any = importlib.import_module("gymnasium.envs.mujoco.ant_v5")
    ant = Path(gymnasium.__file__).parent / "assets" / "ant.xml"
    maze, file = kind.make_maze(str(ant), cells, scale, WALL_HEIGHT)
    try:
        model = mujoco.MjModel.from_xml_path(file)
    finally:
        os.remove(file)
    walls = torch.tensor(cells).bool().flip(0)
    start = maze.cell_rowcol_to_xy(np.array(START))
    return model, walls, torch.from_numpy(start).float()

"""Four rooms: a batch of sparse-reward mazes as one TorchRL environment.

Small enough for exact answers (see :mod:`torchrl_recall.envs.exact`) and quick enough for a demo:
every maze of the batch steps in the same few tensor operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, MultiCategorical, Unbounded

from torchrl_recall.checks import check_at_least_one, check_real
from torchrl_recall.envs.seeded import SeededEnv

Start = Literal["fixed", "room", "any"]

# Up, down, left, right, as (row, column) steps; the index is the action.
_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


class FourRoomsEnv(SeededEnv):
    """Walk from one corner room to the opposite corner of a maze of four rooms.

    A ``size`` by ``size`` grid with an outer wall and walls along its middle row and column, each
    half of which has a one-cell door. The reward is 1 on entering the goal, which terminates the
    episode, and 0 otherwise. After Sutton, Precup and Singh, 1999, "Between MDPs and semi-MDPs".

    The observation is ``"observation"``, the cell as (row, column): int64 of shape
    ``[*batch_size, 2]``. Actions are 0 up, 1 down, 2 left, 3 right; walking into a wall stays.

    Args:
        size: cells along each side with the outer wall; odd, at least 5.
        start: ``"fixed"``, the outer corner cell (1, 1) of the start room; ``"room"``, uniform over
            that room; ``"any"``, uniform over all free cells but the goal.
        slip: probability in [0, 1] that a uniform draw from all four replaces the action.
        max_steps: steps after which an episode is truncated; ``"auto"`` is ``10 * size``, ``None``
            is no limit.
        batch_size: shape of the batch of mazes.
        device: where the mazes live; ``None`` is torch's default device.
        seed: seed of the environment's own random generator, which draws starts and slips;
            ``None`` takes one from torch's global generator, which forked workers share: seed
            them with :meth:`set_seed`.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> env = FourRoomsEnv(5, batch_size=(16,), seed=0)
        >>> env.reset()["observation"][0].tolist()
        [1, 1]
        >>> env.rollout(100, break_when_any_done=False).shape
        torch.Size([16, 100])
        >>> print(env.render())
        #####
        #S  #
        # # #
        #  G#
        #####
    """

    _stream = "FourRoomsEnv"

    def __init__(
        self,
        size: int = 15,
        *,
        start: Start = "fixed",
        slip: float = 0.0,
        max_steps: int | Literal["auto"] | None = "auto",
        batch_size: Sequence[int] = (),
        device: torch.device | str | int | None = None,
        seed: int | None = None,
    ) -> None:
        _check_arguments(size, start, slip, max_steps)
        device = torch.get_default_device() if device is None else device
        super().__init__(device=device, batch_size=torch.Size(batch_size))
        self.size = size
        self.start: Start = start
        self.slip: float = float(slip)
        self.max_steps: int | None = 10 * size if max_steps == "auto" else max_steps
        self._make_tables()
        self._make_specs()
        # What an episode remembers; saved with the state dict.
        self._cell: Tensor
        self._count: Tensor
        start_cells = torch.full(self.batch_size, size + 1, device=self.device)
        self.register_buffer("_cell", start_cells)
        self.register_buffer("_count", torch.zeros_like(start_cells))
        self._make_generator(seed)

    @property
    def delta_support(self) -> Tensor:
        """Displacements ``s_t - s_{t+1}`` that a step can have: int64 ``[5, 2]``, staying first."""
        return torch.tensor([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)], device=self.device)

    def render(self) -> str:
        """The maze as text: ``#`` wall, ``S`` the fixed start cell, ``G`` goal."""
        rows = [["#" if wall else " " for wall in row] for row in self.walls.tolist()]
        rows[1][1], rows[-2][-2] = "S", "G"
        return "\n".join("".join(row) for row in rows)

    def _make_tables(self) -> None:
        """Lay out the maze and tabulate where each (cell, action) leads and what it pays."""
        n, middle = self.size, self.size // 2
        doors = torch.tensor([middle // 2, n - 1 - middle // 2])
        walls = torch.zeros(n, n, dtype=torch.bool)
        for line in (0, middle, n - 1):
            walls[line] = walls[:, line] = True
        walls[middle, doors] = walls[doors, middle] = False
        goal = torch.tensor([n - 2, n - 2])
        goal_cell = (n - 2) * n + n - 2

        rows, columns = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        coordinates = torch.stack([rows, columns], -1).view(-1, 1, 2)
        target = (coordinates + torch.tensor(_MOVES)).clamp(0, n - 1)
        target = target[..., 0] * n + target[..., 1]
        cells = torch.arange(n * n).unsqueeze(1)
        # Goal and walls are absorbing: nothing leaves them, nothing enters a wall.
        stuck = walls.view(-1)[target] | walls.view(-1, 1) | (cells == goal_cell)
        next_cell = torch.where(stuck, cells, target)
        reward = ((next_cell == goal_cell) & (cells != goal_cell)).to(torch.float32)

        starts = torch.zeros(n, n, dtype=torch.bool)
        if self.start == "fixed":
            starts[1, 1] = True
        elif self.start == "room":
            starts[1:middle, 1:middle] = True
        else:
            starts = ~walls
            starts[n - 2, n - 2] = False
        start_cells = starts.view(-1).nonzero().squeeze(-1)

        self._goal_cell = goal_cell
        tables = {
            "walls": walls,
            "goal": goal,
            "start_probability": starts.view(-1).double() / len(start_cells),
            "next_cell": next_cell,
            "_reward": reward,
            "_coordinates": coordinates.view(-1, 2),
            "_start_cells": start_cells,
        }
        for name, table in tables.items():
            # Follows the device, but is given by the arguments: not saved.
            self.register_buffer(name, table.to(self.device), persistent=False)

    walls: Tensor
    """bool ``[size, size]``: True where no one can stand."""
    goal: Tensor
    """int64 ``[2]``: the goal's (row, column)."""
    start_probability: Tensor
    """float64 ``[size * size]``: the distribution of the first cell ``row * size + column``."""
    next_cell: Tensor
    """int64 ``[size * size, 4]``: where each move leads from each cell; goal and walls hold."""
    _reward: Tensor
    _coordinates: Tensor
    _start_cells: Tensor

    def _make_specs(self) -> None:
        batch, device = self.batch_size, self.device
        nvec = [self.size, self.size]
        cell = MultiCategorical(nvec, shape=torch.Size([*batch, 2]), device=device)
        self.observation_spec = Composite(observation=cell, shape=batch, device=device)
        self.action_spec = Categorical(4, shape=batch, device=device)
        column = torch.Size([*batch, 1])
        self.reward_spec = Unbounded(shape=column, dtype=torch.float32, device=device)
        flag = Categorical(2, shape=column, dtype=torch.bool, device=device)
        self.full_done_spec = Composite(
            done=flag,
            terminated=flag.clone(),
            truncated=flag.clone(),
            shape=batch,
            device=device,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        old = self._cell
        drawn = torch.randint(
            len(self._start_cells), old.shape, generator=self._generator, device=self.device
        )
        cell, count = self._start_cells[drawn], torch.zeros_like(old)
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is not None:
            mask = mask.view(old.shape)
            cell, count = torch.where(mask, cell, old), torch.where(mask, count, self._count)
        self._cell, self._count = cell, count
        return self._make({"observation": self._coordinates[cell]})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action, old = tensordict.get("action"), self._cell
        # Not on a GPU, where looking at the numbers would wait for it.
        if action.is_cpu and bool(((action < 0) | (action > 3)).any()):
            raise ValueError(f"action must lie in 0 to 3, got {action.min()} to {action.max()}.")
        if self.slip:
            options: dict[str, Any] = {"generator": self._generator, "device": self.device}
            slipped = torch.rand(old.shape, dtype=torch.float64, **options) < self.slip
            action = torch.where(slipped, torch.randint(4, old.shape, **options), action)
        move = old * 4 + action
        cell, count = self.next_cell.take(move), self._count + 1
        reward = self._reward.take(move)
        if (mask := tensordict.get("_step", None)) is not None:
            # TorchRL steps some mazes only (those not done yet); the others hold still.
            mask = mask.view(old.shape)
            cell, count = torch.where(mask, cell, old), torch.where(mask, count, self._count)
            reward = reward * mask
        self._cell, self._count = cell, count

        terminated = cell == self._goal_cell
        if self.max_steps is None:
            truncated, done = torch.zeros_like(terminated), terminated.clone()
        else:
            truncated = count >= self.max_steps
            done = terminated | truncated
        return self._make(
            {
                "observation": self._coordinates[cell],
                "reward": reward.unsqueeze(-1),
                "terminated": terminated.unsqueeze(-1),
                "truncated": truncated.unsqueeze(-1),
                "done": done.unsqueeze(-1),
            }
        )

    def _make(self, entries: dict[str, Any]) -> TensorDict:
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)


def _check_arguments(size: int, start: str, slip: float, max_steps: int | str | None) -> None:
    if check_at_least_one("size", size) < 5 or size % 2 == 0:
        raise ValueError(f"size must be an odd integer of at least 5, got {size!r}")
    if start not in get_args(Start):
        raise ValueError(f"start must be one of {get_args(Start)}, got {start!r}")
    check_real("slip", slip, 0.0, 1.0)
    if max_steps is not None and max_steps != "auto":
        check_at_least_one("max_steps", max_steps)

"""A point in a maze: a batch of continuous sparse-reward tasks as one TorchRL environment.

Stateless: a step depends on the entries of its tensordict only, so any state can be stepped from,
and all points of the batch step in the same few tensor operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from torchrl_recall.checks import check_at_least_one, check_finite, check_real
from torchrl_recall.envs.maze_map import GOAL, MARGIN, START, draw, locate, read_map, render, slide
from torchrl_recall.envs.seeded import SeededEnv

Place = Literal["fixed", "any"]
Dynamics = Literal["position", "velocity"]


class PointMazeEnv(SeededEnv):
    """Steer a point through a maze to a goal, with forces or steps in two dimensions.

    A maze of unit cells, given by characters; x grows to the right and y upwards, from the lower
    left corner of the map. The reward is 1 on a step that ends within ``goal_radius`` of the goal,
    which terminates the episode, and 0 otherwise.

    The action a, clipped to [-1, 1] an axis, moves the point by ``step_size * a`` (dynamics
    ``"position"``), or its velocity (cells a step, kept within ±``step_size``)::

        v' = inertia * v + (1 - inertia) * step_size * a

    moves it by v' (dynamics ``"velocity"``). The point moves along x first and along y then. On
    each axis it stops in front of the first wall on its way, however long the step, and slides on
    along the other one; a stopped velocity is 0. A point that was put into a wall stays there.

    Entries, each ``[*batch_size, ...]``: ``"observation"``, (x, y) or (x, y, v_x, v_y);
    ``"success"`` ``[..., 1]`` bool, within ``goal_radius``; with a time limit ``"elapsed"``
    ``[..., 1]`` int64, steps so far; with ``goal_in_observation`` ``"desired_goal"``
    and ``"achieved_goal"``, the position. A step reads ``"observation"``, ``"elapsed"`` and
    ``"desired_goal"``, and ``reset(tensordict, set_state=True)`` takes those that are there.

    Args:
        maze: ``"u"``, ``"large"``, or rows of ``#`` wall, space, ``S`` start, ``G`` goal (the
            uppermost first), as strings or one string with line breaks.
        start: ``"fixed"``, the centre of the cell ``S``; ``"any"``, uniform over all free cells but
            that of a fixed goal.
        goal: ``"fixed"``, the centre of the cell ``G``; ``"any"``, drawn anew each episode,
            uniform over all free cells but that of the start.
        dynamics: ``"position"`` or ``"velocity"``.
        step_size: length of the largest step along an axis, cells.
        inertia: share of the velocity that a step keeps, in [0, 1); ``"velocity"`` only.
        noise: standard deviation of Gaussian noise added to the clipped action.
        goal_radius: distance that counts as reached, cells, in (0, 0.5].
        goal_in_observation: whether each episode's goal is written and read; ``goal="any"`` needs
            it.
        max_steps: steps after which an episode is truncated; ``"auto"`` is 4 times as many as it
            takes to walk the length of all free cells, ``None`` is no limit.
        batch_size: shape of the batch of mazes.
        device: where the mazes live; ``None`` is torch's default device.
        dtype: of states, actions and rewards, float32 or float64.
        seed: seed of the environment's own random generator, which draws starts, goals and noise;
            ``None`` takes one from torch's global generator, which forked workers share: seed
            them with :meth:`set_seed`.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.

    Examples:
        >>> env = PointMazeEnv("u", batch_size=(16,), seed=0)
        >>> env.reset()["observation"][0].tolist()
        [1.5, 1.5]
        >>> env.rollout(100, break_when_any_done=False).shape
        torch.Size([16, 100])
        >>> print(env.render())
        #####
        #G  #
        ### #
        #S  #
        #####
    """

    _stream = "PointMazeEnv"
    # ``reset(tensordict, set_state=True)`` is honoured.
    _supports_set_state = True

    def __init__(
        self,
        maze: str | Sequence[str] = "u",
        *,
        start: Place = "fixed",
        goal: Place = "fixed",
        dynamics: Dynamics = "position",
        step_size: float = 0.25,
        inertia: float = 0.8,
        noise: float = 0.0,
        goal_radius: float = 0.25,
        goal_in_observation: bool = False,
        max_steps: int | Literal["auto"] | None = "auto",
        batch_size: Sequence[int] = (),
        device: torch.device | str | int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> None:
        for name, given, known in (("start", start, Place), ("goal", goal, Place)):
            if given not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, got {given!r}.")
        if dynamics not in get_args(Dynamics):
            raise ValueError(f"dynamics must be one of {get_args(Dynamics)}, got {dynamics!r}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
        if goal == "any" and not goal_in_observation:
            raise ValueError("goal='any' needs goal_in_observation=True, to be sought at all.")
        device = torch.get_default_device() if device is None else device
        super().__init__(device=device, batch_size=torch.Size(batch_size))
        self.start: Place = start
        self.goal_mode: Place = goal
        self.dynamics: Dynamics = dynamics
        self.step_size: float = check_real(
            "step_size", step_size, 0.0, open_low=True, open_high=True
        )
        self.inertia: float = check_real("inertia", inertia, 0.0, math.nextafter(1, 0))
        self.noise: float = check_real("noise", noise, 0.0, 1e6)
        self.goal_radius: float = check_real("goal_radius", goal_radius, 0.0, 0.5, open_low=True)
        self.goal_in_observation: bool = bool(goal_in_observation)
        self.dtype = dtype
        self._state_size = 2 if dynamics == "position" else 4
        self._make_tables(maze)
        if max_steps == "auto":
            max_steps = math.ceil(4 * len(self._free_cells) / self.step_size)
        self.max_steps: int | None = (
            None if max_steps is None else check_at_least_one("max_steps", max_steps)
        )
        self._make_specs()
        self._make_generator(seed)

    walls: Tensor
    """bool ``[height, width]``: the cells that are wall, the lowest row first."""
    goal: Tensor | None
    """``[2]``: the fixed goal, or None where the maze has none."""
    start_position: Tensor | None
    """``[2]``: the fixed start, or None where the maze has none."""

    def step_states(self, state: Tensor, action: Tensor, noise: Tensor | None = None) -> Tensor:
        """Compute where actions lead, without reward, noise of its own or any other effect.

        Args:
            state: ``[..., 2]``, or ``[..., 4]`` with velocities; of any batch shape.
            action: ``[..., 2]``, clipped to [-1, 1].
            noise: ``[..., 2]``, added to the clipped action.

        Returns:
            The next states, as ``state``.

        Raises:
            ValueError: the state has not the size of the dynamics.

        Examples:
            >>> env = PointMazeEnv("u")
            >>> env.step_states(torch.tensor([3.5, 1.5]), torch.tensor([1.0, 1.0]))
            tensor([3.7500, 1.7500])
            >>> env.step_states(torch.tensor([2.5, 1.9]), torch.tensor([1.0, 1.0]))  # a wall above
            tensor([2.7500, 1.9990])
        """
        if state.shape[-1] != self._state_size:
            raise ValueError(
                f"state must have {self._state_size} columns with dynamics={self.dynamics!r}, "
                f"got shape {list(state.shape)}."
            )
        action = action.clamp(-1, 1)
        if noise is not None:
            action = action + noise
        maze = (self.walls, self._corridor)
        if self.dynamics == "position":
            return slide(*maze, state, self.step_size * action)[0]
        position, velocity = state.split(2, -1)
        velocity = self.inertia * velocity + (1 - self.inertia) * self.step_size * action
        velocity = velocity.clamp(-self.step_size, self.step_size)
        after, stopped = slide(*maze, position, velocity)
        return torch.cat([after, torch.where(stopped, 0.0, velocity)], -1)

    def free(self, states: Tensor) -> Tensor:
        """Tell which states lie in a free cell.

        Args:
            states: ``[..., 2]`` or more columns, of which the first two are the position.

        Returns:
            bool ``[...]``; False in walls, outside the map and for NaN.

        Examples:
            >>> PointMazeEnv("u").free(torch.tensor([[1.5, 1.5], [1.5, 2.5], [9.0, 1.5]])).tolist()
            [True, False, False]
        """
        return locate(self.walls, states[..., :2])[0]

    def goal_grid(self, spacing: float = 0.5) -> Tensor:
        """Lay a square grid of goals over the free cells.

        Args:
            spacing: distance of neighbours, cells; the first is half of it from the corner.

        Returns:
            ``[G, 2]``, row by row.

        Raises:
            ValueError: the spacing is not positive, or too coarse to meet a free cell.

        Examples:
            >>> PointMazeEnv("u").goal_grid(1.0).shape
            torch.Size([7, 2])
        """
        spacing = check_real("spacing", spacing, 0.0, open_low=True, open_high=True)
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        rows, columns = (
            (torch.arange(max(0, math.ceil(side / spacing - 0.5)), **options) + 0.5) * spacing
            for side in self.walls.shape
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        grid = torch.stack([x, y], -1).view(-1, 2)
        grid = grid[self.free(grid)]
        if not len(grid):
            raise ValueError(f"spacing must be fine enough to meet a free cell, got {spacing}.")
        return grid

    def render(self) -> str:
        """The maze as text: ``#`` wall, ``S`` the fixed start cell, ``G`` the fixed goal's."""
        return render(self.walls, *self._marks())

    def draw(self, axis: Any) -> None:
        """Draw walls, fixed start and fixed goal.

        Args:
            axis (matplotlib Axes): where to draw.
        """
        draw(axis, self.walls, *self._marks(), self.goal_radius)

    def _marks(self) -> tuple[Tensor | None, Tensor | None]:
        """Start and goal as far as they are fixed."""
        start = self.start_position if self.start == "fixed" else None
        return start, self.goal if self.goal_mode == "fixed" else None

    def _make_tables(self, maze: str | Sequence[str]) -> None:
        layout = read_map(maze)
        ends = ((START, self.start, layout.start), (GOAL, self.goal_mode, layout.goal))
        for mark, mode, place in ends:
            if mode == "fixed" and place is None:
                raise ValueError(f"maze must have an '{mark}' for it to be fixed, got none.")
        free_cells = (~layout.walls).nonzero().flip(1)
        if len(free_cells) < 2:
            raise ValueError("maze must have at least two free cells, got one.")
        starts = torch.ones(len(free_cells), dtype=torch.bool)
        if layout.start is not None and self.start == "fixed":
            starts = (free_cells == layout.start.long()).all(1)
        elif layout.goal is not None and self.goal_mode == "fixed":
            starts = (free_cells != layout.goal.long()).any(1)
        tables: dict[str, Tensor | None] = {
            "walls": layout.walls,
            "goal": layout.goal,
            "start_position": layout.start,
            "_corridor": layout.corridor,
            "_free_cells": free_cells.double(),
            "_starts": starts.nonzero().squeeze(1),
        }
        for name, table in tables.items():
            if table is not None:
                table = table.to(self.device, self.dtype if table.is_floating_point() else None)
            # Follows the device, but is given by the arguments: not saved.
            self.register_buffer(name, table, persistent=False)

    _corridor: Tensor
    _free_cells: Tensor
    _starts: Tensor

    def _make_specs(self) -> None:
        batch, device = self.batch_size, self.device
        options: dict[str, Any] = {"device": device, "dtype": self.dtype}

        def box(low: list[float], high: list[float]) -> Bounded:
            bounds = (torch.tensor(bound, **options).expand(*batch, -1) for bound in (low, high))
            return Bounded(*bounds, shape=torch.Size([*batch, len(low)]), **options)

        height, width = self.walls.shape
        place = box([0.0, 0.0], [width, height])
        speed = [self.step_size] * (self._state_size - 2)
        state = box([0.0, 0.0, *(-v for v in speed)], [width, height, *speed])
        column = torch.Size([*batch, 1])
        flag = Categorical(2, shape=column, dtype=torch.bool, device=device)
        read: dict[str, Any] = {"observation": state}
        if self.max_steps is not None:
            read["elapsed"] = Unbounded(shape=column, dtype=torch.int64, device=device)
        if self.goal_in_observation:
            read["desired_goal"] = place
        written = read | {"success": flag}
        if self.goal_in_observation:
            written["achieved_goal"] = place
        self.observation_spec: Any = _composite(written, batch, device)
        self.state_spec: Any = _composite(read, batch, device)
        self.action_spec: Any = box([-1.0, -1.0], [1.0, 1.0])
        self.reward_spec = Unbounded(shape=column, **options)
        ends: dict[str, Any] = dict.fromkeys(("done", "terminated", "truncated"), flag)
        self.full_done_spec: Any = _composite(ends, batch, device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        # Of a partial reset TorchRL keeps the rows that were asked for.
        if kwargs.get("set_state"):
            return self._set_state(tensordict)
        options: dict[str, Any] = {"generator": self._generator, "device": self.device}
        batch = self.batch_size
        cell = self._starts[torch.randint(len(self._starts), batch, **options)]
        position = self._within(cell) if self.start == "any" else self._free_cells[cell] + 0.5
        state = torch.nn.functional.pad(position, (0, self._state_size - 2))
        goal = self.goal
        if self.goal_mode == "any":
            other = torch.randint(len(self._free_cells) - 1, batch, **options)
            goal = self._within(other + (other >= cell).long())
        assert goal is not None
        elapsed = torch.zeros(*batch, 1, dtype=torch.int64, device=self.device)
        return self._make(state, goal.expand(*batch, 2), elapsed)

    def _set_state(self, tensordict: TensorDictBase | None) -> TensorDict:
        if tensordict is None:
            raise KeyError("set_state=True needs a tensordict with the state, got none.")
        state = _need(tensordict, "observation").to(self.dtype)
        # Not on a GPU, where looking at the numbers would wait for it.
        if state.is_cpu and not bool(self.free(state).all()):
            raise ValueError("observation must lie in free cells of the maze to be set as state.")
        zero = torch.zeros(*self.batch_size, 1, dtype=torch.int64, device=self.device)
        elapsed, goal = tensordict.get("elapsed", zero), self.goal
        if self.goal_mode == "any" or (self.goal_in_observation and "desired_goal" in tensordict):
            goal = _need(tensordict, "desired_goal")
        assert goal is not None
        return self._make(state.clone(), goal.expand(*self.batch_size, 2), elapsed.clone())

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        state, action = _need(tensordict, "observation"), _need(tensordict, "action")
        if action.is_cpu:
            check_finite("action", action)
        noise = None
        if self.noise:
            options: dict[str, Any] = {"generator": self._generator, "device": self.device}
            noise = self.noise * torch.randn(action.shape, dtype=self.dtype, **options)
        after = self.step_states(state, action, noise)
        moving = tensordict.get("_step", None)
        if moving is not None:
            # TorchRL steps some mazes only (those not done yet); the others hold still.
            moving = moving.view(*self.batch_size, 1)
            after = torch.where(moving, after, state)
        goal = _need(tensordict, "desired_goal") if self.goal_in_observation else self.goal
        assert goal is not None
        if self.max_steps is None:
            made = self._make(after, goal, None)
            truncated = torch.zeros_like(made.get("success"))
        else:
            elapsed = _need(tensordict, "elapsed") + (1 if moving is None else moving.long())
            made = self._make(after, goal, elapsed)
            truncated = elapsed >= self.max_steps
        reached = made.get("success")
        reward = (reached if moving is None else reached & moving).to(self.dtype)
        ends = {"terminated": reached.clone(), "truncated": truncated}
        return made.update({"reward": reward, "done": reached | truncated, **ends})

    def _make(self, state: Tensor, goal: Tensor, elapsed: Tensor | None) -> TensorDict:
        position = state[..., :2]
        distance = torch.linalg.vector_norm(position - goal, dim=-1, keepdim=True)
        entries: dict[str, Any] = {"observation": state, "success": distance <= self.goal_radius}
        if self.max_steps is not None:
            entries["elapsed"] = elapsed
        if self.goal_in_observation:
            entries |= {"desired_goal": goal.clone(), "achieved_goal": position.clone()}
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    def _within(self, cell: Tensor) -> Tensor:
        """Uniform places in free cells, clear of walls."""
        options: dict[str, Any] = {"generator": self._generator, "device": self.device}
        place = torch.rand(*cell.shape, 2, dtype=self.dtype, **options)
        return self._free_cells[cell] + MARGIN + (1 - 2 * MARGIN) * place


def _need(tensordict: TensorDictBase, key: str) -> Tensor:
    value = tensordict.get(key, None)
    if value is None:
        raise KeyError(f"'{key}' must be in the tensordict; reset(..., set_state=True) writes it.")
    return value


def _composite(entries: dict[str, Any], shape: torch.Size, device: Any) -> Composite:
    clones = {key: spec.clone() for key, spec in entries.items()}
    return Composite(clones, shape=shape, device=device)

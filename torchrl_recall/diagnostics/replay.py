"""Environments as a function ``(state, action) -> next state``, for `compounding_error`.

Each puts an environment into given states, so it must not be in use elsewhere meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase

from torchrl_recall.checks import check_keys
from torchrl_recall.diagnostics.compounding import Step
from torchrl_recall.envs.four_rooms import FourRoomsEnv


def four_rooms_step(env: FourRoomsEnv) -> Step:
    """Step the cells of a maze without slips.

    Args:
        env (FourRoomsEnv): the maze; it is not stepped, its table is read.

    Returns:
        callable: ``(state [N, 2], action [N]) -> next state [N, 2]``, (row, column) as int64. The
        goal and the walls hold whoever is there.

    Raises:
        ValueError: a maze with slips, whose next state is not determined.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import four_rooms_step
        >>> from torchrl_recall.envs import FourRoomsEnv
        >>> step = four_rooms_step(FourRoomsEnv(5))
        >>> step(torch.tensor([[1, 1], [1, 1]]), torch.tensor([1, 0])).tolist()  # down, up (a wall)
        [[2, 1], [1, 1]]
    """
    if env.slip:
        raise ValueError(f"env has slips with probability {env.slip}, expected none.")

    def step(state: Tensor, action: Tensor) -> Tensor:
        cell = env.next_cell[state[:, 0] * env.size + state[:, 1], action]
        return torch.stack([cell // env.size, cell % env.size], -1)

    return step


def tensordict_step(
    env: EnvBase,
    observation_keys: NestedKey | list[NestedKey] = "observation",
    action_key: NestedKey = "action",
) -> Step:
    """Step a TorchRL environment whose whole state is what it observes.

    For environments that read their state from the TensorDict that they step, as TorchRL's
    ``PendulumEnv`` does; one that keeps its state to itself would step from where it is.

    Args:
        env (EnvBase): the environment; its batch size must be empty, with ``batch_locked=False``
            if it steps many states at once, or that of the states.
        observation_keys (NestedKey or list of NestedKey): the observations that make up the state.
        action_key (NestedKey): the action.

    Returns:
        callable: ``(state [N, D], action [N, *A]) -> next state [N, D]``.

    Raises:
        KeyError: an observation key that the environment does not have.
        ValueError: (when called) a number of states that the environment cannot step.

    Examples:
        >>> import torch
        >>> from torchrl.envs import PendulumEnv
        >>> from torchrl_recall.diagnostics import tensordict_step
        >>> step = tensordict_step(PendulumEnv(), ["th", "thdot"])
        >>> step(torch.zeros(2, 2), torch.zeros(2, 1)).tolist()  # upright, at rest
        [[0.0, 0.0], [0.0, 0.0]]
    """
    keys = check_keys("observation_keys", observation_keys)
    specs = env.observation_spec_unbatched
    leaves = [unravel_key(key) for key in specs.keys(True, True)]
    missing = [key for key in keys if key not in leaves]
    if missing:
        raise KeyError(f"observation_keys {missing} are not in the environment's {leaves}.")
    shapes = [specs[key].shape for key in keys]

    def rows(state: Tensor, action: Tensor, batch: torch.Size) -> Tensor:
        # The rest of a reset (parameters, flags) is what a step may need besides its state.
        data = env.reset(TensorDict({}, batch)) if not env.batch_locked else env.reset()
        parts = state.split([shape.numel() for shape in shapes], -1)
        for key, part, shape in zip(keys, parts, shapes, strict=True):
            data.set(key, part.reshape(batch + shape))
        data.set(action_key, action.reshape(batch + action.shape[1:]))
        data = env.step(data)["next"]
        return torch.cat([data[key].reshape(*batch, -1) for key in keys], -1)

    def step(state: Tensor, action: Tensor) -> Tensor:
        n = torch.Size([len(state)])
        if not env.batch_locked or env.batch_size == n:
            return rows(state, action, n)
        if env.batch_size:
            raise ValueError(
                f"env has batch size {tuple(env.batch_size)}, expected {tuple(n)} or none."
            )
        each = [rows(s, a.unsqueeze(0), env.batch_size) for s, a in zip(state, action, strict=True)]
        return torch.stack(each)

    return step


def mujoco_step(env: Any) -> Step:
    """Step a MuJoCo environment of Gymnasium whose observation is its positions and velocities.

    The whole state must be in the observation, in this order: ``InvertedPendulum``, and
    ``HalfCheetah``, ``Hopper``, ``Walker2d``, ``Swimmer`` and the like with
    ``exclude_current_positions_from_observation=False``. Where the observation is clipped (Hopper's
    and Walker2d's velocities, at 10) a state on the bound is not the real one.

    Args:
        env (gymnasium.Env): the environment; its wrappers are passed by. States are stepped one by
            one.

    Returns:
        callable: ``(state [N, D], action [N, A]) -> next state [N, D]``; NaN where the simulation
        failed.

    Raises:
        TypeError: not a MuJoCo environment.
        ValueError: the observation is not positions and velocities.

    Examples:
        >>> import gymnasium, torch
        >>> from torchrl_recall.diagnostics import mujoco_step
        >>> step = mujoco_step(gymnasium.make("InvertedPendulum-v5"))
        >>> tilted = torch.tensor([[0.0, 0.1, 0.0, 0.0]])  # cart, pole, and their velocities
        >>> bool(step(tilted, torch.zeros(1, 1))[0, 3] > 0.01)  # it falls
        True
    """
    inner = env.unwrapped
    for name in ("set_state", "_get_obs", "data", "model"):
        if not hasattr(inner, name):
            raise TypeError(f"env must be a MuJoCo environment of Gymnasium, got {inner} ({name}).")
    if getattr(inner, "data", None) is None:
        env.reset()
    positions, velocities = inner.model.nq, inner.model.nv

    def place(state: Any) -> None:
        # The solver begins where it ended last; from zero, a step depends on its state alone.
        inner.data.qacc_warmstart[:] = 0
        inner.set_state(state[:positions], state[positions:])
        inner.data.qacc_warmstart[:] = 0

    probe = np.concatenate([inner.init_qpos, inner.init_qvel]) + 1e-3
    place(probe)
    seen = np.asarray(inner._get_obs())
    if seen.shape != probe.shape or not np.allclose(seen, probe, atol=1e-9):
        raise ValueError(
            f"env observes {seen.shape} numbers, expected its {positions} positions and then its "
            f"{velocities} velocities as they are; build it with "
            "exclude_current_positions_from_observation=False if it has that."
        )

    def step(state: Tensor, action: Tensor) -> Tensor:
        result = np.full(tuple(state.shape), np.nan)
        rows = zip(state.double().cpu().numpy(), action.double().cpu().numpy(), strict=True)
        for i, (row, taken) in enumerate(rows):
            if np.isfinite(row).all() and np.isfinite(taken).all():
                place(row)
                inner.do_simulation(taken, inner.frame_skip)
                result[i] = inner._get_obs()
        return torch.as_tensor(result).to(state)

    return step

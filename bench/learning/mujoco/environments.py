"""Gymnasium's MuJoCo tasks, several copies as one TorchRL environment."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from torchrl_recall.checks import check_at_least_one, check_choice, check_real
from torchrl_recall.envs.seeded import SeededEnv

# Observations are positions and velocities alone: forces of contact and inertias, which the latter
# two add by default, are functions of these and most of their 105 and 348 numbers.
OPTIONS: dict[str, dict[str, bool]] = {
    "HalfCheetah": {},
    "Hopper": {},
    "Walker2d": {},
    "Swimmer": {},
    "Ant": {"include_cfrc_ext_in_observation": False},
    "Humanoid": {
        f"include_{part}_in_observation": False
        for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    },
}


def check_batch_size(batch_size: Any) -> torch.Size:
    """Return a batch size of one number, or refuse it by name."""
    if not isinstance(batch_size, tuple | list) or len(batch_size) != 1:
        raise ValueError(f"batch_size must be a tuple of one number, got {batch_size!r}.")
    return torch.Size([check_at_least_one("batch_size", batch_size[0])])


class MujocoEnv(SeededEnv):
    """Copies of a Gymnasium ``-v5`` task, stepped one after the other.

    Gymnasium's own steps, rewards and terminations, without its wrappers: TorchRL's ``GymEnv``
    costs as much again as the physics of the small ones. ``"observation"`` is float32,
    ``"position"`` the x of the torso, which Gymnasium leaves out. Actions lie in [-1, 1] and are
    stretched to the task's range. A copy (``deepcopy``, pickle) goes on where the original is.

    Args:
        name: one of `OPTIONS`.
        batch_size: number of copies, at least 1.
        max_steps: steps after which an episode is truncated; Gymnasium's limit is 1000.
        reward_scale: factor of the reward.
        seed: of the starts.

    Raises:
        ValueError: an unknown name, or an argument out of its range.
        TypeError: an argument of another type.
    """

    _stream = "MujocoEnv"

    def __init__(
        self,
        name: str,
        batch_size: tuple[int] = (1,),
        *,
        max_steps: int = 1000,
        reward_scale: float = 1.0,
        seed: int | None = None,
    ) -> None:
        import gymnasium

        check_choice("name", name, tuple(OPTIONS))
        super().__init__(device="cpu", batch_size=check_batch_size(batch_size))
        self.name = name
        self.max_steps: int = check_at_least_one("max_steps", max_steps)
        self.reward_scale: float = check_real(
            "reward_scale", reward_scale, open_low=True, open_high=True
        )
        self._envs: list[Any] = [
            gymnasium.make(f"{name}-v5", **OPTIONS[name]).unwrapped for _ in range(batch_size[0])
        ]
        space = self._envs[0].action_space
        self._half_range = (space.high - space.low) / 2
        self._middle = (space.high + space.low) / 2
        self._observed = [env.reset(seed=0)[0] for env in self._envs]
        self._elapsed = torch.zeros(*batch_size, 1, dtype=torch.int64)
        column = torch.Size([*batch_size, 1])
        width = len(self._observed[0])
        self.observation_spec = Composite(
            {
                "observation": Unbounded(shape=torch.Size([*batch_size, width])),
                "position": Unbounded(shape=column),
            },
            shape=self.batch_size,
        )
        self.action_spec = Bounded(-1.0, 1.0, shape=torch.Size([*batch_size, *space.shape]))
        self.reward_spec = Unbounded(shape=column)
        flag = Categorical(2, shape=column, dtype=torch.bool)
        ends = {name: flag.clone() for name in ("done", "terminated", "truncated")}
        self.full_done_spec = Composite(ends, shape=self.batch_size)
        self._make_generator(seed)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # Gymnasium pickles the arguments of its environments alone: they arrive as new ones. More
        # than positions and velocities must travel, as rewards read what the last step derived.
        state["_simulations"] = [(env.data, env.np_random) for env in self._envs]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        simulations = state.pop("_simulations")
        super().__setstate__(state)
        mujoco: Any = importlib.import_module("mujoco")  # its stubs lack what is compiled
        for env, (data, draws) in zip(self._envs, simulations, strict=True):
            if env.data is not data:  # a shallow copy shares the simulation
                mujoco.mj_copyData(env.data, env.model, data)
                env.np_random = draws

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        anew = None if tensordict is None else tensordict.get("_reset", None)
        rows = range(len(self._envs)) if anew is None else anew.view(-1).nonzero().flatten()
        for row in map(int, rows):
            seed = int(torch.randint(2**31 - 1, (), generator=self._generator))
            self._observed[row] = self._envs[row].reset(seed=seed)[0]
            self._elapsed[row] = 0
        return self._read()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        actions = tensordict["action"].clamp(-1, 1).numpy() * self._half_range + self._middle
        reward = np.empty((len(self._envs), 1), dtype=np.float32)
        terminated = np.empty((len(self._envs), 1), dtype=bool)
        for row, (env, action) in enumerate(zip(self._envs, actions, strict=True)):
            self._observed[row], reward[row], terminated[row], _, _ = env.step(action)
        self._elapsed += 1
        read = self._read()
        read["reward"] = torch.from_numpy(reward) * self.reward_scale
        read["terminated"] = torch.from_numpy(terminated)
        read["truncated"] = self._elapsed >= self.max_steps
        read["done"] = read["terminated"] | read["truncated"]
        return read

    def _read(self) -> TensorDict:
        place = np.array([env.data.qpos[0] for env in self._envs], dtype=np.float32)
        return TensorDict(
            {
                "observation": torch.from_numpy(np.stack(self._observed)).float(),
                "position": torch.from_numpy(place).unsqueeze(-1),
            },
            self.batch_size,
        )

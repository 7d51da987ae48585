"""Sparse mountain car: many cars of `MountainCarContinuous` as one TorchRL environment."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from torchrl_recall.envs.seeded import SeededEnv

POWER, GRAVITY = 0.0015, 0.0025
LOWEST, HIGHEST, FASTEST, GOAL = -1.2, 0.6, 0.07, 0.45


class SparseMountainCarEnv(SeededEnv):
    """Gymnasium's ``MountainCarContinuous-v0`` with reward 1 at the goal and 0 elsewhere.

    Stateless, and in float32 where Gymnasium computes in float64. No price on actions: with it
    standing still is a local optimum, which is another difficulty than sparse reward.

    Args:
        batch_size: number of cars.
        max_steps: steps after which an episode is truncated; Gymnasium's limit is 999.
        seed: of the starts.
    """

    _stream = "SparseMountainCarEnv"

    def __init__(
        self, batch_size: tuple[int] = (1,), *, max_steps: int = 999, seed: int | None = None
    ) -> None:
        super().__init__(device="cpu", batch_size=torch.Size(batch_size))
        self.max_steps = max_steps
        column = torch.Size([*batch_size, 1])
        low = torch.tensor([LOWEST, -FASTEST]).expand(*batch_size, 2)
        high = torch.tensor([HIGHEST, FASTEST]).expand(*batch_size, 2)
        flag = Categorical(2, shape=column, dtype=torch.bool)
        read: dict[str, Any] = {
            "observation": Bounded(low, high),
            "elapsed": Unbounded(shape=column, dtype=torch.int64),
        }
        self.observation_spec = Composite(read | {"success": flag}, shape=self.batch_size)
        self.state_spec = Composite({k: v.clone() for k, v in read.items()}, shape=self.batch_size)
        self.action_spec = Bounded(-1.0, 1.0, shape=column)
        self.reward_spec = Unbounded(shape=column)
        ends = {name: flag.clone() for name in ("done", "terminated", "truncated")}
        self.full_done_spec = Composite(ends, shape=self.batch_size)
        self._make_generator(seed)

    @staticmethod
    def step_states(state: Tensor, action: Tensor) -> Tensor:
        """Compute where actions lead: ``[..., 2]`` position and velocity, ``[..., 1]`` force."""
        position, velocity = state.unbind(-1)
        force = action.squeeze(-1).clamp(-1, 1)
        velocity = velocity + force * POWER - GRAVITY * torch.cos(3 * position)
        velocity = velocity.clamp(-FASTEST, FASTEST)
        position = (position + velocity).clamp(LOWEST, HIGHEST)
        stopped = (position <= LOWEST) & (velocity < 0)
        return torch.stack([position, velocity.masked_fill(stopped, 0.0)], -1)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        place = -0.6 + 0.2 * torch.rand(*self.batch_size, 1, generator=self._generator)
        return TensorDict(
            {
                "observation": torch.cat([place, torch.zeros_like(place)], -1),
                "elapsed": torch.zeros(place.shape, dtype=torch.int64),
                "success": torch.zeros(place.shape, dtype=torch.bool),
            },
            self.batch_size,
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        state = self.step_states(tensordict["observation"], tensordict["action"])
        success = ((state[..., 0] >= GOAL) & (state[..., 1] >= 0)).unsqueeze(-1)
        elapsed = tensordict["elapsed"] + 1
        truncated = elapsed >= self.max_steps
        return TensorDict(
            {
                "observation": state,
                "elapsed": elapsed,
                "success": success,
                "reward": success.float(),
                "terminated": success.clone(),
                "truncated": truncated,
                "done": success | truncated,
            },
            self.batch_size,
        )

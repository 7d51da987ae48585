"""TorchRL's own way to imagine: a `ModelBasedEnvBase` that steps back in time, rolled out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs import ModelBasedEnvBase

from bench.peers.modules import policy_and_transition
from torchrl_recall import BacktrackModel


class BackwardEnv(ModelBasedEnvBase):
    """An environment that goes from a state to a predecessor.

    Args:
        transition (TensorDictModule): writes ``"observation"`` and ``"delta_log_prob"``.
        start (Tensor): states to go back from, a row each.
    """

    def __init__(self, transition: TensorDictModule, start: Tensor) -> None:
        rows, device = start.shape[:1], start.device
        super().__init__(transition, batch_size=rows, device=device)
        self.observation_spec = Composite(
            observation=Unbounded(start.shape, dtype=start.dtype, device=device),
            # `_step` keeps what the spec names.
            delta_log_prob=Unbounded(rows, device=device),
            shape=rows,
        )
        self.full_reward_spec = Composite(shape=rows, device=device)
        self.start = start

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        log_prob = torch.zeros(self.batch_size, device=self.start.device)
        data = {"observation": self.start, "delta_log_prob": log_prob}
        return TensorDict(data, self.batch_size, device=self.start.device)


def walker(model: BacktrackModel, start: Tensor, num_steps: int) -> Callable[[], TensorDictBase]:
    """Return a function that walks ``num_steps`` back from ``start`` by TorchRL's rollout.

    Args:
        model (BacktrackModel): whose networks to use.
        start (Tensor): ``[B, size]`` states.
        num_steps (int): length of the walk.

    Returns:
        Callable: gives a rollout ``[B, T]``, newest step first. In its favour: no rewards.
    """
    policy, transition = policy_and_transition(model)
    env = BackwardEnv(transition, start)

    @torch.no_grad()
    def walk() -> TensorDictBase:
        return env.rollout(num_steps, policy)

    return walk

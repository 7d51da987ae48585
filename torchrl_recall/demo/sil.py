"""Self-imitation learning after Oh et al. (ICML 2018), the stronger baseline of the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.sampler import ValuePrioritizedSampler

if TYPE_CHECKING:
    from torchrl_recall.demo.train import A2C, Settings


class SelfImitation:
    """Imitates the policy's own past steps whose return beats the critic.

    ``max(R - V, 0) · -log π + 0.01 · max(R - V, 0)² / 2`` on prioritised samples without importance
    weights, four updates of 512 steps an iteration, priority exponent 0.6. Not tuned.
    """

    updates = 4
    batch_size = 512
    critic_coeff = 0.01

    def __init__(self, env: FourRoomsEnv, a2c: A2C, settings: Settings) -> None:
        self.a2c = a2c
        self.gamma = settings.gamma
        self.device = env.device
        horizon = env.max_steps or settings.steps
        self.observation = torch.zeros(settings.num_envs, horizon, 2, dtype=torch.int64)
        self.action = torch.zeros(settings.num_envs, horizon, dtype=torch.int64)
        self.length = torch.zeros(settings.num_envs, dtype=torch.int64)
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(100_000),
            sampler=ValuePrioritizedSampler(100_000, alpha=0.6, mode="per"),
            priority_key="priority",
            batch_size=self.batch_size,
        )

    def update(self, data: TensorDictBase) -> None:
        """Store finished episodes with their returns and imitate the best of the past."""
        for t in range(data.shape[1]):
            self._record(cast(TensorDictBase, data[:, t]))
        if not len(self.buffer):
            return
        for _ in range(self.updates):
            batch = self.buffer.sample().to(self.device)
            value = self.a2c.critic(batch.select("observation"))["state_value"].squeeze(-1)
            gap = (batch["return"] - value).clamp_min(0)
            log_prob = self.a2c.actor.get_dist(batch).log_prob(batch["action"])
            self.a2c.step(
                TensorDict(
                    {
                        "loss_imitation": -(gap.detach() * log_prob).mean(),
                        "loss_value": self.critic_coeff * 0.5 * gap.square().mean(),
                    }
                )
            )
            self.buffer.update_tensordict_priority(batch.set("priority", gap.detach()).cpu())

    def _record(self, step: TensorDictBase) -> None:
        rows = torch.arange(len(self.length))
        self.observation[rows, self.length] = step["observation"].cpu()
        self.action[rows, self.length] = step["action"].cpu()
        self.length += 1
        for row in step["next", "done"].squeeze(-1).nonzero().flatten().tolist():
            length = int(self.length[row])
            reward = step["next", "reward"][row].item()
            returns = reward * self.gamma ** torch.arange(length - 1, -1, -1)
            self.length[row] = 0
            # Episodes without reward have nothing above the critic to imitate.
            if reward > 0:
                episode = TensorDict(
                    {
                        "observation": self.observation[row, :length].clone(),
                        "action": self.action[row, :length].clone(),
                        "return": returns,
                        "priority": returns,
                    },
                    [length],
                )
                self.buffer.extend(episode)

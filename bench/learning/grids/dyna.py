"""A forward model, as Dyna uses it: imagined steps are replayed beside real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP

from bench.learning.grids.hosts import DQN, CellFeatures
from bench.learning.grids.walker import Rollout
from torchrl_recall.envs import FourRoomsEnv


@dataclass(frozen=True)
class DynaSettings:
    """Of the same cost as recall traces: as many steps of the model, and of the values on it."""

    updates: int = 8
    batch_size: int = 128
    model_updates: int = 8
    model_batch: int = 256
    model_cells: int = 64
    model_learning_rate: float = 1e-3


class Dyna:
    """Learns ``p(s' - s, r | s, a)`` and replays steps from stored states by any action."""

    def __init__(self, env: FourRoomsEnv, host: DQN, settings: DynaSettings) -> None:
        self.host, self.settings, self.size = host, settings, env.size
        self.moves = -env.delta_support
        self.features = CellFeatures(env.size, 1)
        # Logits of the displacements, and one of the reward.
        self.network = MLP(
            in_features=self.features.feature_size + 4,
            out_features=len(self.moves) + 1,
            num_cells=[settings.model_cells],
            activation_class=nn.ReLU,
        )
        self.optimizer = torch.optim.Adam(self.network.parameters(), settings.model_learning_rate)
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(200_000), batch_size=settings.model_batch
        )

    def update(self, data: Rollout) -> None:
        """Store, fit the model, and let the host learn from imagined steps."""
        self.buffer.extend(data.tensordict().exclude("action_log_prob").reshape(-1))
        for _ in range(self.settings.model_updates):
            self._fit()
        for _ in range(self.settings.updates):
            self.host.replay(self.imagine())

    def _fit(self) -> None:
        batch = self.buffer.sample()
        move, reward = self._logits(batch["observation"], batch["action"])
        delta = batch["next", "observation"] - batch["observation"]
        taken = (delta.unsqueeze(1) == self.moves).all(-1).long().argmax(-1)
        loss = nn.functional.cross_entropy(move, taken)
        rewarded = batch["next", "reward"].squeeze(-1)
        loss = loss + nn.functional.binary_cross_entropy_with_logits(reward, rewarded)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def imagine(self) -> TensorDict:
        """Return one-step transitions from stored states by uniform actions."""
        state = self.buffer.sample()["observation"][: self.settings.batch_size]
        action = torch.randint(4, (len(state),))
        move, reward = self._logits(state, action)
        taken = torch.distributions.Categorical(logits=move).sample()
        after = (state + self.moves[taken]).clamp(0, self.size - 1)
        done = torch.bernoulli(reward.sigmoid()).bool().unsqueeze(-1)
        return TensorDict(
            {
                "observation": state,
                "action": action,
                "next": {
                    "observation": after,
                    "reward": done.float(),
                    "terminated": done,
                    "done": done.clone(),
                },
            },
            [len(state)],
        )

    def _logits(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        chosen = nn.functional.one_hot(action, 4).to(torch.float32)
        logits = self.network(torch.cat([self.features(state), chosen], -1))
        return logits[:, :-1], logits[:, -1]

"""The host algorithms, from TorchRL's losses: A2C, PPO and DQN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import (
    LazyTensorStorage,
    MultiCategorical,
    PrioritizedSampler,
    RandomSampler,
    TensorDictReplayBuffer,
)
from torchrl.modules import MLP, QValueActor
from torchrl.objectives import ClipPPOLoss, DQNLoss, SoftUpdate
from torchrl.objectives.value.functional import generalized_advantage_estimate

from bench.learning.grids.task import cells
from bench.learning.grids.walker import Rollout
from torchrl_recall import RecallTraceLoss
from torchrl_recall.demo.train import A2C, Settings
from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.model.observation import ObservationCodec


@dataclass(frozen=True)
class ActorCriticSettings:
    """A2C, or PPO with ``epochs``."""

    num_envs: int = 16
    rollout: int = 8
    num_cells: int = 64
    learning_rate: float = 1e-3
    gamma: float = 0.99
    lmbda: float = 0.95
    entropy_coeff: float = 0.01
    max_grad_norm: float = 0.5
    epochs: int = 0
    """0: A2C, one step on each rollout; else PPO, this many passes."""
    minibatches: int = 1
    clip_epsilon: float = 0.2


@dataclass(frozen=True)
class DQNSettings:
    """Double DQN; ``alpha`` 0 replays uniformly, else PER."""

    num_envs: int = 16
    rollout: int = 8
    num_cells: int = 128
    learning_rate: float = 1e-3
    gamma: float = 0.99
    updates: int = 8
    """Gradient steps after each rollout."""
    batch_size: int = 128
    tau: float = 0.01
    epsilon_steps: int = 20_000
    """Environment steps in which exploration falls linearly from 1."""
    epsilon_end: float = 0.05
    """Exploration in the end, and of the policy whose success is measured."""
    alpha: float = 0.0
    beta: float = 0.4
    goals: bool = False
    """The network reads a goal beside the cell."""
    margin: float = 0.1
    """By which the value of an imitated action is to lead."""


class Host(Protocol):
    """What training asks of an algorithm."""

    settings: Any
    gradient_steps: int

    def policy(self) -> Tensor:
        """Return what acts, ``[size², 4]``."""
        ...

    def judged(self) -> Tensor:
        """Return what is measured, ``[size², 4]``."""
        ...

    def learn(self, data: Rollout) -> None:
        """Learn from a rollout."""
        ...

    def imitate(self, sample: TensorDictBase) -> None:
        """Take one step towards the actions of ``sample["trace"]``."""
        ...


class ActorCritic:
    """A2C or PPO."""

    def __init__(self, env: FourRoomsEnv, settings: ActorCriticSettings) -> None:
        self.settings = settings
        common = Settings(
            size=env.size,
            num_envs=settings.num_envs,
            rollout=settings.rollout,
            num_cells=(settings.num_cells,),
            learning_rate=settings.learning_rate,
            gamma=settings.gamma,
            lmbda=settings.lmbda,
            entropy_coeff=settings.entropy_coeff,
            max_grad_norm=settings.max_grad_norm,
        )
        self.a2c = A2C(env, common)
        # The same steps as the main job's optimizer, in one kernel.
        self.a2c.optimizer = torch.optim.Adam(
            self.a2c.parameters, settings.learning_rate, fused=True
        )
        self.loss: Any = self.a2c.loss
        if settings.epochs:
            self.loss = ClipPPOLoss(
                self.a2c.actor,
                self.a2c.critic,
                clip_epsilon=settings.clip_epsilon,
                entropy_coeff=settings.entropy_coeff,
                critic_coeff=0.5,
            )
        self.recall_loss = RecallTraceLoss(self.a2c.actor)
        self.cells = TensorDict({"observation": cells(env.size)}, [env.size**2])
        self.gradient_steps = 0

    @torch.no_grad()
    def policy(self) -> Tensor:
        """Return what acts, ``[size², 4]``."""
        logits: Any = self.a2c.actor.module[0].module
        return logits(self.cells["observation"]).softmax(-1)

    judged = policy

    def learn(self, data: Rollout) -> None:
        """Learn from a rollout."""
        batch = data.tensordict()
        if not self.settings.epochs:
            self._set_advantage(batch, data)
            self.step(self.loss(batch.reshape(-1)))
            return
        for _ in range(self.settings.epochs):
            self._set_advantage(batch, data)
            rows = batch.reshape(-1)
            for part in torch.randperm(len(rows)).chunk(self.settings.minibatches):
                self.step(self.loss(rows[part]))

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the critic's value of each cell, ``[size²]``."""
        critic: Any = self.a2c.critic.module
        return critic(self.cells["observation"]).squeeze(-1)

    def _set_advantage(self, batch: TensorDict, data: Rollout) -> None:
        """Write GAE, with the critic called once for all cells."""
        value = self.value()
        after: Any = batch["next"]
        before = value[torch.from_numpy(data.cell)].unsqueeze(-1)
        advantage, target = generalized_advantage_estimate(
            self.settings.gamma,
            self.settings.lmbda,
            before,
            value[torch.from_numpy(data.next_cell)].unsqueeze(-1),
            after["reward"],
            done=after["done"],
            terminated=after["terminated"],
        )
        batch.update({"advantage": advantage, "value_target": target, "state_value": before})

    def imitate(self, sample: TensorDictBase) -> None:
        """Take one step towards the actions of ``sample["trace"]``."""
        self.step(self.recall_loss(sample))

    def step(self, losses: TensorDictBase) -> None:
        """Descend the sum of all ``loss_*`` entries."""
        self.a2c.step(losses)
        self.gradient_steps += 1


class CellFeatures(nn.Module):
    """One-hot features of a cell, and of a goal behind it if there is one."""

    def __init__(self, size: int, num_cells: int) -> None:
        super().__init__()
        self.codec = ObservationCodec(
            {"observation": MultiCategorical([size, size])}, dtype=torch.float32
        )
        self.num_cells = num_cells
        self.feature_size = num_cells * self.codec.feature_size

    def forward(self, observation: Tensor) -> Tensor:
        return torch.cat([self.codec(part) for part in observation.chunk(self.num_cells, -1)], -1)


class DQN:
    """Double DQN with uniform or prioritised replay.

    Args:
        env: the mazes, read for their size and goal.
        settings: of the algorithm.
        budget: environment steps of a run.
        rows_per_step: how often a step is stored, each time with another goal.
    """

    def __init__(
        self, env: FourRoomsEnv, settings: DQNSettings, budget: int, rows_per_step: int = 1
    ) -> None:
        self.settings, self.size = settings, env.size
        features = CellFeatures(env.size, 1 + settings.goals)
        layers = MLP(
            in_features=features.feature_size,
            out_features=4,
            num_cells=[settings.num_cells],
            activation_class=nn.ReLU,
        )
        network = nn.Sequential(features, layers)
        module = TensorDictModule(network, in_keys=["observation"], out_keys=["action_value"])
        self.actor = QValueActor(module, in_keys=["observation"], action_space="categorical")
        self.loss = DQNLoss(
            self.actor, action_space="categorical", delay_value=True, double_dqn=True
        )
        self.loss.make_value_estimator(gamma=settings.gamma)
        self.target = SoftUpdate(self.loss, tau=settings.tau)
        self.optimizer = torch.optim.Adam(
            self.actor.parameters(), settings.learning_rate, fused=True
        )
        self.recall_loss = RecallTraceLoss(
            self.actor, loss_function="margin", margin=settings.margin
        )
        # Nothing is dropped within a run.
        capacity = (budget + settings.num_envs * settings.rollout) * rows_per_step
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(capacity),
            sampler=PrioritizedSampler(capacity, alpha=settings.alpha, beta=settings.beta)
            if settings.alpha
            else RandomSampler(),
            priority_key="td_error",
            batch_size=settings.batch_size,
        )
        observation = cells(env.size)
        if settings.goals:
            observation = torch.cat([observation, env.goal.expand_as(observation)], -1)
        self.cells = observation
        self.network, self.steps, self.gradient_steps = network, 0, 0

    @torch.no_grad()
    def _greedy(self, epsilon: float) -> Tensor:
        best = self.network(self.cells).argmax(-1)
        return (1 - epsilon) * nn.functional.one_hot(best, 4) + epsilon / 4

    def policy(self) -> Tensor:
        """Return what acts, ``[size², 4]``."""
        end = self.settings.epsilon_end
        return self._greedy(max(end, 1 - (1 - end) * self.steps / self.settings.epsilon_steps))

    def judged(self) -> Tensor:
        """Return what is measured: greedy but for the exploration that is left in the end."""
        return self._greedy(self.settings.epsilon_end)

    def learn(self, data: Rollout) -> None:
        """Learn from a rollout and what has been stored."""
        self.steps += len(data)
        if not self.settings.goals:
            self.buffer.extend(data.tensordict().exclude("action_log_prob").reshape(-1))
        for _ in range(self.settings.updates if len(self.buffer) else 0):
            self.replay(self.buffer.sample())

    def replay(self, batch: TensorDictBase) -> None:
        """Take one step of Q-learning on a batch."""
        self._descend(self.loss(batch)["loss"])
        self.target.step()
        if self.settings.alpha and batch.get("index", None) is not None:
            self.buffer.update_tensordict_priority(batch)

    def imitate(self, sample: TensorDictBase) -> None:
        """Take one step towards the actions of ``sample["trace"]``."""
        self._descend(self.recall_loss(sample)["loss_imitation"])

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.gradient_steps += 1

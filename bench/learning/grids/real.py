"""What imitates or replays real steps: best episodes, SIL, hindsight; and the count bonus."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from bench.learning.grids.hosts import DQN, ActorCritic
from bench.learning.grids.walker import Episodes, Rollout
from torchrl_recall import ValuePrioritizedSampler


@dataclass(frozen=True)
class BestSettings:
    """Imitation of the finished episodes of highest return, of equal ones the newest."""

    num_episodes: int = 64
    updates: int = 8
    batch_size: int = 512
    rewarded_only: bool = True


class BestReal:
    """Draws steps of the best real episodes."""

    def __init__(self, host: ActorCritic, settings: BestSettings) -> None:
        self.settings, self.gamma = settings, host.settings.gamma
        self.episodes = Episodes(host.settings.num_envs)
        self.best: list[tuple[float, int, np.ndarray]] = []
        self.num_finished = 0
        self.steps: np.ndarray | None = None

    def observe(self, data: Rollout) -> None:
        """Keep the best of the episodes that end."""
        finished = self.episodes.finished(data)
        for steps in finished:
            self.num_finished += 1
            reached = bool(steps[-1, 3])
            if reached or not self.settings.rewarded_only:
                value = self.gamma ** (len(steps) - 1) * reached
                self.best.append((value, self.num_finished, steps))
        if finished and self.best:
            ordered = sorted(self.best, key=lambda kept: kept[:2], reverse=True)
            self.best = ordered[: self.settings.num_episodes]
            self.steps = np.concatenate([steps for _, _, steps in self.best])
        self.size = data.size

    def sample(self) -> TensorDictBase | None:
        """Return single steps in the form of traces, or None before there are any."""
        if self.steps is None:
            return None
        rows = torch.randint(len(self.steps), (self.settings.batch_size,))
        cell, action = torch.from_numpy(self.steps[rows.numpy()][:, :2]).unbind(-1)
        trace = {
            "observation": torch.stack([cell // self.size, cell % self.size], -1),
            "action": action,
            "collector": {"mask": torch.ones(len(rows), dtype=torch.bool)},
        }
        return TensorDict({"trace": TensorDict(trace, [len(rows)]).unsqueeze(1)}, [len(rows)])


@dataclass(frozen=True)
class SelfImitationSettings:
    """Self-imitation learning (Oh et al., 2018)."""

    updates: int = 4
    batch_size: int = 512
    alpha: float = 0.6
    critic_coeff: float = 0.01


class SelfImitation:
    """``max(R - V, 0) · -log π`` and a critic's term, on prioritised steps of rewarded episodes."""

    def __init__(self, host: ActorCritic, settings: SelfImitationSettings) -> None:
        self.host, self.settings = host, settings
        self.episodes = Episodes(host.settings.num_envs)
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(100_000),
            sampler=ValuePrioritizedSampler(100_000, alpha=settings.alpha, mode="per"),
            priority_key="priority",
            batch_size=settings.batch_size,
        )

    def update(self, data: Rollout) -> None:
        """Store finished episodes with their returns and imitate the best of the past."""
        for steps in self.episodes.finished(data):
            # Episodes without reward have nothing above the critic to imitate.
            if steps[-1, 3]:
                self._store(torch.from_numpy(steps), data.size)
        for _ in range(self.settings.updates if len(self.buffer) else 0):
            batch = self.buffer.sample()
            a2c = self.host.a2c
            value = a2c.critic(batch.select("observation"))["state_value"].squeeze(-1)
            gap = (batch["return"] - value).clamp_min(0)
            log_prob = a2c.actor.get_dist(batch).log_prob(batch["action"])
            losses = {
                "loss_imitation": -(gap.detach() * log_prob).mean(),
                "loss_value": self.settings.critic_coeff * 0.5 * gap.square().mean(),
            }
            self.host.step(TensorDict(losses))
            self.buffer.update_tensordict_priority(batch.set("priority", gap.detach()))

    def _store(self, steps: torch.Tensor, size: int) -> None:
        to_end = torch.arange(len(steps) - 1, -1, -1)
        returns = self.host.settings.gamma**to_end
        episode = {
            "observation": torch.stack([steps[:, 0] // size, steps[:, 0] % size], -1),
            "action": steps[:, 1],
            "return": returns,
            "priority": returns,
        }
        self.buffer.extend(TensorDict(episode, [len(steps)]))


@dataclass(frozen=True)
class BonusSettings:
    """A count bonus, ``coeff / sqrt(N(s'))`` on each reward."""

    coeff: float = 0.01


class Bonus:
    """Adds the bonus to what the host learns from."""

    def __init__(self, size: int, settings: BonusSettings) -> None:
        self.coeff = settings.coeff
        self.visits = np.zeros(size**2, dtype=np.int64)

    def __call__(self, data: Rollout) -> Rollout:
        """Count a rollout and return it with the bonus."""
        np.add.at(self.visits, data.next_cell, 1)
        bonus = self.coeff / np.sqrt(self.visits[data.next_cell])
        return replace(data, reward=(data.reward + bonus).astype(np.float32))


@dataclass(frozen=True)
class HindsightSettings:
    """HER (Andrychowicz et al., 2017): goals from the future of the same episode."""

    num_goals: int = 4


class Hindsight:
    """Stores finished episodes with the goal that was asked for, and with those that were met."""

    def __init__(self, host: DQN, goal: torch.Tensor, settings: HindsightSettings) -> None:
        self.host, self.settings = host, settings
        self.goal = goal
        self.episodes = Episodes(host.settings.num_envs)

    def observe(self, data: Rollout) -> None:
        """Store the episodes that end in a rollout."""
        for steps in self.episodes.finished(data):
            cell, action, after = torch.from_numpy(steps[:, :3]).unbind(-1)
            size, length = data.size, len(steps)
            asked = (self.goal[0] * size + self.goal[1]).expand(length)
            goals = [asked]
            place = torch.arange(length)
            for _ in range(self.settings.num_goals):
                future = place + (torch.rand(length) * (length - place)).long()
                goals.append(after[future])
            goal = torch.cat(goals)
            repeat = len(goals)
            met = after.repeat(repeat) == goal
            self.host.buffer.extend(_goal_rows(cell, action, after, goal, met, size, repeat))


def _goal_rows(
    cell: torch.Tensor,
    action: torch.Tensor,
    after: torch.Tensor,
    goal: torch.Tensor,
    met: torch.Tensor,
    size: int,
    repeat: int,
) -> TensorDict:
    """Transitions towards goals, as the DQN with goals reads them."""

    def observe(state: torch.Tensor) -> torch.Tensor:
        state = state.repeat(repeat)
        return torch.stack([state // size, state % size, goal // size, goal % size], -1)

    done = met.unsqueeze(-1)
    rows = {
        "observation": observe(cell),
        "action": action.repeat(repeat),
        "next": {
            "observation": observe(after),
            "reward": done.float(),
            "terminated": done,
            "done": done.clone(),
        },
    }
    return TensorDict(rows, [len(goal)])

"""What recall traces are compared with: self-imitation, best trajectories and a count bonus."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_recall import RecallTraceLoss


class Control:
    """A control that adds to rewards or to the loss, and does nothing afterwards."""

    def finish(self) -> None:
        """Do nothing after an update."""


class SelfImitation(Control):
    """Self-imitation learning: real steps whose return beats the critic.

    ``max(R - V, 0) · -log π + 0.5 · value_coeff · max(R - V, 0)²`` on steps drawn with priority
    ``max(R - V, 0)`` (as of the last rollout), of finished episodes.

    Args:
        host: the learner.
        coeff: factor of the whole.
        value_coeff: factor of the critic's part.
        batch_size: steps of a loss.

    Source: Oh et al., *Self-Imitation Learning*, ICML 2018, https://arxiv.org/abs/1806.05635.
    """

    def __init__(
        self, host: Any, coeff: float = 1.0, value_coeff: float = 0.01, batch_size: int = 512
    ) -> None:
        self.host, self.coeff, self.value_coeff = host, coeff, value_coeff
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(host.seed + 4)
        self.rows: Tensor | None = None

    def update(self, data: TensorDictBase) -> None:
        """Find the steps worth imitating."""
        self.rows = None
        history = self.host.history
        seen = history.data
        if not bool((seen["next", "reward"] > 0).any()):
            return
        returns, finished = history.returns(self.host.settings.gamma)
        with torch.no_grad():
            value = self.host.critic(seen.select(*history.keys))["state_value"][:, 0]
        gap = torch.where(finished, returns - value, 0.0).clamp_min(0)
        if not bool((gap > 0).any()):
            return
        self.rows = gap.nonzero().flatten()
        self.returns, self.priority = returns[self.rows], gap[self.rows]

    def loss(self) -> Tensor | None:
        """Return the loss of a new draw."""
        if self.rows is None:
            return None
        drawn = torch.multinomial(self.priority, self.batch_size, True, generator=self.generator)
        batch = self.host.history.data[self.rows[drawn]]
        value = self.host.critic(batch.select(*self.host.history.keys))["state_value"][:, 0]
        gap = (self.returns[drawn] - value).clamp_min(0)
        log_prob = self.host.actor.get_dist(batch).log_prob(batch["action"])
        policy = -(gap.detach() * log_prob).mean()
        return self.coeff * (policy + 0.5 * self.value_coeff * gap.square().mean())


class BestTrajectories(Control):
    """Imitation of the real episodes of highest return, without a model.

    Args:
        host: the learner.
        coeff: factor of the imitation.
        num_best: episodes that are kept.
        batch_size: steps of a loss.
    """

    def __init__(
        self, host: Any, coeff: float = 0.3, num_best: int = 32, batch_size: int = 960
    ) -> None:
        self.host, self.num_best, self.batch_size = host, num_best, batch_size
        self.imitation = RecallTraceLoss(host.actor, imitation_coeff=coeff)
        self.generator = torch.Generator().manual_seed(host.seed + 4)
        self.rows: Tensor | None = None

    def update(self, data: TensorDictBase) -> None:
        """Choose the episodes."""
        history = self.host.history
        returns, finished = history.returns(self.host.settings.gamma)
        first = history.first_steps() & finished & (returns > 0)
        starts = first.nonzero().flatten()
        if not len(starts):
            return
        best = starts[returns[starts].argsort(descending=True)[: self.num_best]]
        self.rows = history.episode_rows(best)

    def loss(self) -> Tensor | None:
        """Return the imitation of a new draw of steps."""
        if self.rows is None:
            return None
        drawn = torch.randint(len(self.rows), (self.batch_size,), generator=self.generator)
        trace = self.host.history.data[self.rows[drawn]].select(*self.host.history.keys, "action")
        trace = trace.unsqueeze(0)
        return self.imitation(TensorDict({"trace": trace}, [1]))["loss_imitation"]


class CountBonus(Control):
    """Reward ``coeff / sqrt(visits)`` of the cell that a step leads into.

    Args:
        host: the learner.
        coeff: factor of the bonus.
        cell: edge of a cell, in the unit of the scaled observations.
    """

    def __init__(self, host: Any, coeff: float = 0.02, cell: float = 0.1) -> None:
        self.host, self.coeff, self.cell = host, coeff, cell
        self.keys = host.task.rarity_keys or host.task.keys
        self.shift, self.scale = host.task.scaling(self.keys)
        self.visits: dict[tuple[int, ...], int] = {}

    def update(self, data: TensorDictBase) -> None:
        """Count the visits of a rollout and add their bonus to its rewards."""
        state = torch.cat([data["next", key] for key in self.keys], -1)
        cells = ((state - self.shift) / self.scale / self.cell).floor().long()
        distinct, which, count = cells.view(-1, cells.shape[-1]).unique(
            dim=0, return_inverse=True, return_counts=True
        )
        total = torch.empty(len(distinct))
        for i, (cell, more) in enumerate(zip(distinct.tolist(), count.tolist(), strict=True)):
            total[i] = self.visits[tuple(cell)] = self.visits.get(tuple(cell), 0) + more
        bonus = (self.coeff / total.sqrt())[which].view(*cells.shape[:-1], 1)
        data["next", "reward"] = data["next", "reward"] + bonus

    def loss(self) -> Tensor | None:
        """Nothing is added to the loss."""
        return None

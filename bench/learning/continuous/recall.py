"""Recall traces beside the host: to the frontier, and after the first reward to rewarded states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from bench.learning.continuous.history import History
from bench.learning.continuous.trace_guide import RealSteps, TraceGuide, given_weight
from torchrl_recall import RecallTraceLoss
from torchrl_recall.imitation.weights import returns_along


@dataclass(frozen=True)
class RecallSettings:
    """Numbers of recall traces and of their control, the real past."""

    num_traces: int = 32
    trace_steps: int = 40
    model_steps: int = 2
    model_batch: int = 512
    model_cells: int = 64
    model_rate: float = 3e-3
    lowest_log_scale: float = -3.0  # of a change of state, in standard deviations
    even_cell: float = 0.1  # rows are drawn evenly over visited cells, in units of the inputs
    first_model_steps: int = 30  # divided by the number of fits so far, beside the others
    imitation_steps: int = 6  # after each update of the host
    imitation_batch: int = 256
    imitation_rate: float = 6e-3
    gate: bool = True  # steps count by what the critic does not expect yet
    num_choices: int = 4  # rewarded states, of which the best starts a trace
    hold: int = 2
    radius: float = 0.25  # of last visit, in standard deviations
    num_references: int = 256
    num_candidates: int = 2
    support_cell: float = 0.15  # one reference of each, in standard deviations
    support: bool = True
    num_targets: int = 4
    frontier: bool = True  # before the first reward
    until_reward: bool = True


class RewardedStarts:
    """Starts traces from states that a reward was given for, drawn from all there are.

    Args:
        history: what was seen.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.drawn: Tensor | None = None  # rows of the last call

    def rows(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Draw rows whose step was rewarded; None: there are none."""
        found = (self.history.data["next", "reward"][:, 0] > 0).nonzero().flatten()
        if not len(found):
            return None
        return found[torch.randint(len(found), (count,), generator=generator)]

    def __call__(self, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
        rows = self.drawn = self.rows(tensordict.shape.numel(), generator)
        any_row = torch.zeros(tensordict.shape, dtype=torch.int64) if rows is None else rows
        states: Any = self.history.data["next"]
        after = states.select(*self.history.keys)[any_row]
        kept = torch.full(tensordict.shape, rows is not None)
        return after.set(("collector", "mask"), kept)


class BestRewardedStarts(RewardedStarts):
    """Starts each trace from that of some rewarded states which the critic values most.

    Args:
        host: the learner, with ``history``, ``critic``, ``critic_keys`` and ``settings.gamma``.
        num_choices: how many are drawn for each trace.
    """

    def __init__(self, host: Any, num_choices: int) -> None:
        super().__init__(host.history)
        self.host, self.num_choices = host, num_choices
        self.reached: Tensor | None = None  # return of the step into each start of the last call

    @torch.no_grad()
    def rows(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Draw rows whose step was rewarded; None: there are none."""
        drawn = super().rows(count * self.num_choices, generator)
        if drawn is None:
            return None
        after: Any = self.history.data["next"][drawn]
        following = self.host.critic(after.select(*self.host.critic_keys))["state_value"]
        following = torch.where(after["terminated"], 0.0, following)
        gain = after["reward"] + self.host.settings.gamma * following
        self.reached, best = gain.view(count, -1).max(1)
        return drawn.view(count, -1).gather(1, best.unsqueeze(1))[:, 0]


def reward_nearness(data: TensorDictBase, gamma: float) -> float:
    """Return ``gamma ** k`` in the mean over a rollout ``[E, T]``, ``k`` steps before a reward.

    A step that is rewarded itself, with whatever sign, counts 1; one that no reward follows in its
    episode counts 0. What follows the rollout is not known: after an environment's last reward in
    it, the steps of an episode that goes on are left out; where there was none, they count 0.
    """
    reward, done = (data["next", name][..., 0] for name in ("reward", "done"))
    near, known = torch.zeros_like(reward), torch.zeros_like(done)
    following, end = torch.zeros_like(reward[:, 0]), torch.zeros_like(done[:, 0])
    for step in reversed(range(reward.shape[1])):
        following = gamma * torch.where(done[:, step], 0.0, following)
        following = torch.where(reward[:, step] != 0, 1.0, following)
        end = end | done[:, step] | (reward[:, step] != 0)
        near[:, step], known[:, step] = following, end
    return float(near[known | (reward == 0).all(1, keepdim=True)].mean())


class RecallTraces(TraceGuide):
    """Traces of the model, imitated after each update of the host by steps of its own.

    The imitation has its own optimizer: in the host's, its gradients would swell the moments that
    the host's own steps are divided by. Of these steps as many are taken as the traces are open:

    - the mean over kept steps of ``w = 1 - V(s_t) / R_t``, within 0 and 1, the share of the trace's
      return that the host's critic does not expect yet: where the policy gets there by itself, it
      vanishes (where ``R_t <= 0``, w is 1 as long as ``V(s_t)`` is clearly below it, else 0);
    - times ``1 - n``, where ``n`` says how near the next reward is in the host's own rollout, in
      the mean over its steps ``gamma ** k``, with ``k`` steps until a reward that is not zero:
      where rewards come all the time, the host learns from them, and w's zero is no level of
      ignorance.

    Args:
        host: the learner, with ``env``, ``actor``, ``critic``, ``history``, ``task``, ``seed``,
            ``settings.gamma`` and ``note``.
        settings: the numbers.
    """

    def __init__(self, host: Any, settings: RecallSettings) -> None:
        self.rewarded = BestRewardedStarts(host, settings.num_choices)
        super().__init__(
            host,
            settings,
            self.rewarded,
            until_reward=settings.until_reward,
            support_cell=settings.support_cell,
        )
        self.imitation = RecallTraceLoss(host.actor, weight=given_weight, normalize_weights=True)
        self.optimizer = torch.optim.Adam(
            host.actor.parameters(), lr=settings.imitation_rate, fused=True
        )
        self.batch: TensorDictBase | None = None
        self.open = 1.0
        self._fits = 0

    def update(self, data: TensorDictBase) -> None:
        """Fit the model and walk back anew, before the host learns from a rollout."""
        trace, rows = self.walk_back()
        self.batch = None
        if not len(rows[0]):
            return
        trace["weight"] = self._weight(trace)
        steps: Any = trace.select(*self.host.task.keys, "action", "weight")[rows]
        near = reward_nearness(data, self.host.settings.gamma)
        self.open = float(steps["weight"].mean()) * (1 - near)
        self.host.note("reward_nearness", near)
        self.host.note("trace_open", self.open)
        self.batch = steps

    @torch.no_grad()
    def _weight(self, trace: TensorDictBase) -> Tensor:
        """Return how much each step counts, ``[B, T]``."""
        if self.is_exploring or not self.settings.gate:
            return torch.ones(trace.shape)
        gamma, reached = self.host.settings.gamma, self.rewarded.reached
        assert reached is not None
        before = returns_along(reached, trace.shape[-1] - 1, gamma)
        promised = torch.cat([before, reached.unsqueeze(-1)], -1)
        value = self.host.critic(trace.select(*self.host.critic_keys))["state_value"][..., 0]
        gap = (promised - value).clamp_min(0) / promised.clamp_min(1e-6)
        return gap.clamp_max(1.0)

    def loss(self) -> Tensor | None:
        """Nothing is added to the host's loss."""
        return None

    def finish(self) -> None:
        """Imitate, after the host has learnt from the rollout."""
        if self.batch is None:
            return
        s = self.settings
        steps = int(s.imitation_steps * self.open)
        drawn = torch.randint(len(self.batch), (steps, s.imitation_batch), generator=self.generator)
        for rows in drawn:
            batch = TensorDict({"trace": self.batch[rows].unsqueeze(0)}, [1])
            loss = self.imitation(batch)["loss_imitation"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        # The host's next gradients are to be its own.
        self.optimizer.zero_grad()
        self.host.gradient_steps += steps

    def _model_steps(self) -> int:
        # In proportion to the share of the data that is new.
        self._fits += 1
        return self.settings.model_steps + round(self.settings.first_model_steps / self._fits)

    def _references(self) -> Tensor:
        # Each row once: repeats would make the data look denser than they are.
        return super()._references().unique()


class RealPast(RealSteps, RecallTraces):
    """The control of `RecallTraces`: the real past of the same states."""

"""Recall traces beside SAC and TD3, and their controls: the same states' real past, SIL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer

from bench.learning.continuous.recall import RewardedStarts, reward_nearness
from bench.learning.continuous.trace_guide import RealSteps, TraceGuide, given_weight
from torchrl_recall import RecallTraceLoss, ValuePrioritizedSampler
from torchrl_recall.imitation.weights import returns_along
from torchrl_recall.values import transition_value

# Where rewards are nearer than this leaves, traces are closed: of the six imitation steps of PPO's
# traces not one is left there either, whatever the critic expects.
LEAST_OPEN = 1 / 6


@dataclass(frozen=True)
class ReplayRecallSettings:
    """Numbers of recall traces off-policy, and of their control, the real past.

    An update is the guide's, every `OffPolicySettings.guide_every` steps.
    """

    num_traces: int = 32
    trace_steps: int = 40
    model_steps: int = 8
    model_batch: int = 512
    model_cells: int = 64
    model_rate: float = 3e-3
    lowest_log_scale: float = -3.0  # of a change of state, in standard deviations
    first_model_steps: int = 100  # at the first update, beside the others
    even_cell: float = 0.1  # rows are drawn evenly over visited cells, in units of the inputs
    imitation_coeff: float = 1.0
    imitation_batch: int = 256
    hold: int = 4
    num_targets: int = 4
    radius: float = 0.25  # of last visit, in standard deviations
    support: bool = True
    num_references: int = 512
    num_candidates: int = 4
    frontier: bool = True  # before the first reward
    starts: str = "rewarded"  # or "valued": the best share of all states, by the critic
    top: float = 0.05  # that share
    gate: str = "relative"  # or "advantage"
    near_steps: int = 128  # of each environment, in which the nearness of rewards is measured


class ValuedStarts:
    """Starts traces from the stored states that the critic values most.

    Args:
        host: the learner.
        top: the share of states.
    """

    def __init__(self, host: Any, top: float) -> None:
        self.host = host
        self.sampler = ValuePrioritizedSampler(host.history.size, mode="top", top=top)
        self.view = TensorDictReplayBuffer(
            storage=host.history.buffer.storage, sampler=self.sampler, batch_size=1
        )
        self.drawn: Tensor | None = None

    def __call__(self, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
        history = self.host.history
        values = transition_value(history.data, self.host.critic, gamma=self.host.settings.gamma)
        self.sampler.refresh(values)
        weight = self.sampler.weights(len(history))
        rows = torch.multinomial(weight, tensordict.shape.numel(), True, generator=generator)
        self.drawn = rows
        states: Any = history.data["next"]
        found = states.select(*history.keys)[rows]
        return found.set(("collector", "mask"), torch.ones(tensordict.shape, dtype=torch.bool))


class ReplayTraces(TraceGuide):
    """Traces of the model; minibatches of their steps are imitated in the host's updates.

    Before the first reward they lead to the rarest states and count fully. Then each step counts by
    ``1 - V(s_t) / R_t``, within 0 and 1, the share of the trace's return ``R_t`` that the critic
    does not expect from the policy yet (0 where ``R_t <= 0``; ``gate="relative"``), or by
    ``max(Q(s_t, a_t) - V(s_t), 0)`` (``"advantage"``; tried and left, see the reading of MuJoCo's
    tasks). Weights are those of the time when the traces were drawn, times ``1 - n`` with ``n`` the
    `reward_nearness` of the host's last steps, and 0 where that is less than `LEAST_OPEN`.

    Args:
        host: the learner, an `OffPolicy`.
        settings: the numbers.
    """

    def __init__(self, host: Any, settings: ReplayRecallSettings) -> None:
        self.chosen: Any = RewardedStarts(host.history)
        if settings.starts == "valued":
            self.chosen = ValuedStarts(host, settings.top)
        super().__init__(host, settings, self.chosen)
        imitation: dict[str, Any] = {"loss_function": "mse"} if host.algorithm == "td3" else {}
        self.imitation = RecallTraceLoss(
            host.actor,
            imitation_coeff=settings.imitation_coeff,
            weight=given_weight,
            **imitation,
        )
        self.steps: TensorDictBase | None = None

    def update(self, data: TensorDictBase) -> None:
        """Fit the model, walk back anew, and weigh the steps."""
        trace, rows = self.walk_back()
        near = reward_nearness(self._last_steps(), self.host.settings.gamma)
        self.host.note("reward_nearness", near)
        trace["weight"] = self._weight(trace) * (1 - near if 1 - near >= LEAST_OPEN else 0.0)
        self.steps = None
        if len(rows[0]):
            steps: Any = trace.select(*self.keys, "action", "weight")[rows]
            self.host.note("trace_weight", steps["weight"].mean())
            steps = steps[steps["weight"] > 0]
            self.steps = steps if len(steps) else None

    def _last_steps(self) -> TensorDictBase:
        data = self.history.data.select(("next", "reward"), ("next", "done"))
        ends = {
            name: self.history.along_time(data["next", name])[:, -self.settings.near_steps :]
            for name in ("reward", "done")
        }
        return TensorDict({"next": ends}, ends["done"].shape[:2])

    def loss(self) -> Tensor | None:
        """Return the imitation of some steps."""
        if self.steps is None:
            return None
        rows = torch.randint(
            len(self.steps), (self.settings.imitation_batch,), generator=self.generator
        )
        return self.imitation(TensorDict({"trace": self.steps[rows].unsqueeze(0)}, [1]))[
            "loss_imitation"
        ]

    @torch.no_grad()
    def _weight(self, trace: TensorDictBase) -> Tensor:
        """Return how much each step counts, ``[B, T]``."""
        if self.is_exploring or self.chosen.drawn is None:
            return torch.ones(trace.shape)
        host = self.host
        value = host.critic(trace.select(*self.keys))["state_value"][..., 0]
        if self.settings.gate == "advantage":
            taken = host.action_value(trace.select(*self.keys, "action"))[..., 0]
            return (taken - value).clamp_min(0)
        gamma = host.settings.gamma
        start: Any = self.history.data[self.chosen.drawn]
        reached = transition_value(start, host.critic, gamma=gamma)
        promised = torch.cat(
            [returns_along(reached, trace.shape[-1] - 1, gamma), reached.unsqueeze(-1)], -1
        )
        gap = (promised - value) / promised.clamp_min(1e-6)
        return torch.where(promised > 0, gap.clamp(0, 1), 0.0)

    def _model_steps(self) -> int:
        # Nothing is noted yet at the first update.
        s = self.settings
        return s.model_steps + (0 if self.host.log.get("trace_kept") else s.first_model_steps)


class ReplayRealPast(RealSteps, ReplayTraces):
    """The control of `ReplayTraces`: the real past of the same states."""

"""Recall traces beside SAC and TD3, and their controls: the same states' real past, SIL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer

from bench.learning.continuous.cells import Cells
from bench.learning.continuous.recall import RewardedStarts, reward_nearness
from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
)
from torchrl_recall.imitation.weights import returns_along
from torchrl_recall.starts import FrontierStarts
from torchrl_recall.support.data_support import DataSupport
from torchrl_recall.trace_masks import LastVisitRadius
from torchrl_recall.values import transition_value


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


class ReplayTraces:
    """Traces of the model; minibatches of their steps are imitated in the host's updates.

    Before the first reward they lead to the rarest states and count fully. Then each step counts by
    ``max(1 - V(s_t) / R_t, 0)``, the share of the trace's return ``R_t`` that the critic does not
    expect from the policy yet (``gate="relative"``), or by ``max(Q(s_t, a_t) - V(s_t), 0)``
    (``"advantage"``). Weights are those of the time when the traces were drawn, times ``1 - n``
    with ``n`` the `reward_nearness` of the host's last steps.

    Args:
        host: the learner, an `OffPolicy`.
        settings: the numbers.
    """

    def __init__(self, host: Any, settings: ReplayRecallSettings) -> None:
        self.host, self.settings, self.history = host, settings, host.history
        s, task = settings, host.task
        self.keys = list(dict.fromkeys([*task.keys, *host.critic_keys]))
        self.generator = torch.Generator().manual_seed(host.seed + 4)
        imitation: dict[str, Any] = {"imitation_coeff": s.imitation_coeff, "weight": own_weight}
        if host.algorithm == "td3":
            imitation["loss_function"] = "mse"
        self.imitation = RecallTraceLoss(host.actor, **imitation)
        chosen: Any = RewardedStarts(self.history)
        if s.starts == "valued":
            chosen = ValuedStarts(host, s.top)
        self.chosen = self.starts = chosen
        if s.frontier:
            self.starts: Any = FrontierStarts(
                self.history.buffer,
                hold=s.hold,
                num_targets=s.num_targets,
                then=chosen,
                observation_keys=self.keys,
                rarity_keys=list(task.rarity_keys) or None,
            )
        self.measured = list(task.rarity_keys or self.keys)
        inputs = [task.inputs[key] for key in self.measured]
        shift, scale = (torch.tensor(sum((x[i] for x in inputs), ())) for i in (0, 1))
        self.cells, self.counted = Cells(shift, scale, s.even_cell), 0
        self.steps: TensorDictBase | None = None
        self._make_source()

    def _make_source(self) -> None:
        s, host = self.settings, self.host
        # The host's random numbers stay those of the run without traces.
        with torch.random.fork_rng(devices=[]):
            self.model = BacktrackModel.from_env(
                host.env,
                num_cells=(s.model_cells, s.model_cells),
                observation_keys=self.keys,
                stop=False,
                delta_log_scale_range=(s.lowest_log_scale, 2.0),
            )
        self.model_loss = BacktrackLoss(self.model)
        self.model_optimizer = torch.optim.Adam(
            self.model.parameters(), lr=s.model_rate, fused=True
        )
        self.support = DataSupport(
            self.model,
            num_references=s.num_references,
            generator=torch.Generator().manual_seed(host.seed + 3),
        )
        self.transform = BacktrackTransform(
            self.model,
            num_steps=s.trace_steps,
            last_visit=False,
            start=self.starts,
            masks=[LastVisitRadius(s.radius, scale=self.model, in_keys=self.keys)],
            support=self.support if s.support else None,
            num_candidates=s.num_candidates,
            generator=self.generator,
        )

    def update(self, data: TensorDictBase) -> None:
        """Fit the model, walk back anew, and weigh the steps."""
        after = self.history.data["next"][self.counted :]
        self.cells.add(torch.cat([after[key] for key in self.measured], -1))
        self.counted = len(self.history)
        trace = self._traces()
        kept = trace["collector", "mask"]
        self.host.note("trace_kept", kept.float().mean())
        near = reward_nearness(self._last_steps(), self.host.settings.gamma)
        self.host.note("reward_nearness", near)
        trace["weight"] = self._weight(trace) * (1 - near)
        rows = kept.nonzero(as_tuple=True)
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

    @property
    def is_exploring(self) -> bool:
        """Whether traces still lead to the frontier."""
        return self.settings.frontier and not self.starts.found

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

    def _traces(self) -> TensorDictBase:
        self.fit()
        rows = self.cells.draw(4 * self.settings.num_references, self.generator)
        states: Any = self.history.data["next"]
        self.support.fit(states.select(*self.keys)[rows])
        return self.transform(TensorDict({}, [self.settings.num_traces]))["trace"]

    def fit(self) -> None:
        """Take the model's gradient steps of one update, on rows drawn evenly over cells."""
        s = self.settings
        steps = s.model_steps + (0 if self.host.log.get("trace_kept") else s.first_model_steps)
        keys = [*self.keys, "action", *(("next", key) for key in self.keys)]
        rows = self.cells.draw(steps * s.model_batch, self.generator)
        data: Any = self.history.data.select(*keys)[rows]
        for batch in data.split(s.model_batch):
            loss = self.model_loss(batch)["loss_backtrack"]
            self.model_optimizer.zero_grad()
            loss.backward()
            self.model_optimizer.step()


def own_weight(
    trace: TensorDictBase, tensordict: TensorDictBase, kept: Tensor, keys: Any
) -> Tensor:
    """Weigh the steps of a trace as its own entry says."""
    return trace["weight"]


class ReplayRealPast(ReplayTraces):
    """The control: what really came before the same states, without a model."""

    def _make_source(self) -> None:
        pass

    def _traces(self) -> TensorDictBase:
        s, history = self.settings, self.history
        start = self.starts(TensorDict({}, [s.num_traces]), self.generator)
        found = start.get(("collector", "mask"), torch.ones(s.num_traces, dtype=torch.bool))
        # A start is one of the seen states: this finds its row, at distance 0.
        seen = torch.cat([history.data["next", key] for key in self.keys], -1)
        state = torch.cat([start[key] for key in self.keys], -1)
        distinct, which = state.unique(dim=0, return_inverse=True)
        row = torch.stack([(seen - one).square().sum(-1).argmin() for one in distinct])[which]
        trace, kept = history.past(row, s.trace_steps)
        scale = seen.std(0).clamp_min(1e-4)
        mask = LastVisitRadius(s.radius, scale=scale, in_keys=self.keys)(trace)
        trace["collector"] = TensorDict({"mask": mask & kept & found.unsqueeze(-1)}, trace.shape)
        return trace

"""Recall traces beside the host: to the frontier, and after the first reward to rewarded states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from bench.learning.continuous.history import History
from torchrl_recall import BacktrackLoss, BacktrackModel, BacktrackTransform, RecallTraceLoss
from torchrl_recall.starts import FrontierStarts
from torchrl_recall.support.data_support import DataSupport
from torchrl_recall.trace_masks import LastVisitRadius


@dataclass(frozen=True)
class RecallSettings:
    """Numbers of recall traces and of their control, the real past."""

    num_traces: int = 32
    trace_steps: int = 40
    model_steps: int = 20
    model_batch: int = 512
    model_cells: int = 64
    model_rate: float = 3e-3
    lowest_log_scale: float = -3.0  # of a change of state, in standard deviations
    even_share: float = 1.0  # of the model's batches: evenly over visited cells
    even_cell: float = 0.25
    first_model_steps: int = 100  # at the first update, beside the others
    imitation_coeff: float = 0.3
    hold: int = 2
    radius: float = 0.25  # of last visit, in standard deviations
    num_references: int = 1024
    num_candidates: int = 4
    support_cell: float | None = 0.15  # in standard deviations; None: no support
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


class RecallTraces:
    """Traces of the model, imitated beside the host's loss.

    Args:
        host: the learner, with ``env``, ``actor``, ``history``, ``task``, ``seed`` and ``note``.
        settings: the numbers.
    """

    def __init__(self, host: Any, settings: RecallSettings) -> None:
        self.host, self.settings, self.history = host, settings, host.history
        s, task, seed = settings, host.task, host.seed
        keys = list(task.keys)
        self.generator = torch.Generator().manual_seed(seed + 4)
        self.imitation = RecallTraceLoss(host.actor, imitation_coeff=s.imitation_coeff)
        self.rewarded = RewardedStarts(self.history)
        self.starts: Any = self.rewarded
        if s.frontier:
            self.starts = FrontierStarts(
                self.history.buffer,
                hold=s.hold,
                num_targets=s.num_targets,
                then=self.rewarded,
                until_reward=s.until_reward,
                observation_keys=keys,
                rarity_keys=list(task.rarity_keys) or None,
            )
        self.batch: TensorDictBase | None = None
        self._make_source()

    def _make_source(self) -> None:
        s, host = self.settings, self.host
        self.model = BacktrackModel.from_env(
            host.env,
            num_cells=(s.model_cells, s.model_cells),
            observation_keys=list(host.task.keys),
            stop=False,
            # Dynamics without noise: without a floor the likelihood's peaks throw the model off.
            delta_log_scale_range=(s.lowest_log_scale, 2.0),
        )
        self.model_loss = BacktrackLoss(self.model)
        self.model_optimizer = torch.optim.Adam(self.model.parameters(), lr=s.model_rate)
        self.support: DataSupport | None = None
        if s.support_cell is not None:
            self.support = DataSupport(
                self.model,
                num_references=s.num_references,
                cell_size=s.support_cell,
                generator=torch.Generator().manual_seed(host.seed + 3),
            )
        self.transform = BacktrackTransform(
            self.model,
            num_steps=s.trace_steps,
            last_visit=False,
            start=self.starts,
            masks=[LastVisitRadius(s.radius, scale=self.model, in_keys=list(host.task.keys))],
            support=self.support,
            num_candidates=s.num_candidates,
            generator=self.generator,
        )

    def update(self, data: TensorDictBase) -> None:
        """Fit the model and walk back anew."""
        trace = self._traces()
        self.host.note("trace_kept", trace["collector", "mask"].float().mean())
        self.batch = TensorDict({"trace": trace}, trace.shape[:1])

    def loss(self) -> Tensor | None:
        """Return the imitation of the traces."""
        return None if self.batch is None else self.imitation(self.batch)["loss_imitation"]

    def _traces(self) -> TensorDictBase:
        self.fit()
        if self.support is not None:
            self.support.fit(self.history.buffer)
        return self.transform(TensorDict({}, [self.settings.num_traces]))["trace"]

    def fit(self) -> None:
        """Take the model's gradient steps of one update."""
        s = self.settings
        steps = s.model_steps + (s.first_model_steps if self.batch is None else 0)
        data = self.history.data
        rows = torch.randint(len(data), (steps, s.model_batch), generator=self.generator)
        even = round(s.even_share * s.model_batch)
        if even:
            weight = 1 / self._crowd().double()
            drawn = torch.multinomial(weight, steps * even, True, generator=self.generator)
            rows[:, :even] = drawn.view(steps, even)
        for batch in rows:
            loss = self.model_loss(data[batch])["loss_backtrack"]
            self.model_optimizer.zero_grad()
            loss.backward()
            self.model_optimizer.step()

    def _crowd(self) -> Tensor:
        """Return how many rows share each row's cell, ``[N]``."""
        data = self.history.data["next"]
        keys = self.host.task.rarity_keys or self.host.task.keys
        state = torch.cat([data[key] for key in keys], -1)
        cells = (state / state.std(0).clamp_min(1e-4) / self.settings.even_cell).floor().long()
        # One number for each cell: sorting numbers is much faster than sorting rows.
        cells -= cells.amin(0)
        code = torch.zeros_like(cells[:, 0])
        for column in cells.unbind(1):
            code = code * (int(column.max()) + 1) + column
        _, which, count = code.unique(return_inverse=True, return_counts=True)
        return count[which]


class RealPast(RecallTraces):
    """The control: what really came before the same states, without a model."""

    def _make_source(self) -> None:
        pass

    def _traces(self) -> TensorDictBase:
        s, history = self.settings, self.history
        start = self.starts(TensorDict({}, [s.num_traces]), self.generator)
        data = history.data
        found = start.get(("collector", "mask"), torch.ones(s.num_traces, dtype=torch.bool))
        # A start is one of the seen states: this finds its row, at distance 0.
        keys = list(self.host.task.keys)
        seen = torch.cat([data["next", key] for key in keys], -1)
        state = torch.cat([start[key] for key in keys], -1)
        distinct, which = state.unique(dim=0, return_inverse=True)
        row = torch.stack([(seen - one).square().sum(-1).argmin() for one in distinct])[which]
        trace, kept = history.past(row, s.trace_steps)
        scale = seen.std(0).clamp_min(1e-4)
        mask = LastVisitRadius(s.radius, scale=scale, in_keys=keys)(trace)
        mask = mask & kept & found.unsqueeze(-1)
        trace["collector"] = TensorDict({"mask": mask}, trace.shape)
        return trace

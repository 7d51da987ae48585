"""What recall traces beside both hosts share: the model, its fit, and walks back from starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from bench.learning.continuous.cells import Cells
from torchrl_recall import BacktrackLoss, BacktrackModel, BacktrackTransform
from torchrl_recall.starts import FrontierStarts
from torchrl_recall.support.data_support import DataSupport
from torchrl_recall.trace_masks import LastVisitRadius


def given_weight(
    trace: TensorDictBase, tensordict: TensorDictBase, kept: Tensor, keys: Any
) -> Tensor:
    """Weigh the steps of a trace as its own entry says."""
    return trace["weight"]


class TraceGuide(ABC):
    """Fits a model on rows drawn evenly over visited cells, and walks back from starts.

    Args:
        host: the learner, with ``env``, ``history``, ``critic_keys``, ``task``, ``seed`` and
            ``note``.
        settings: the numbers, `RecallSettings` or `ReplayRecallSettings`.
        rewarded: where traces start once a reward was met.
        until_reward: whether the frontier is left at the first reward.
        support_cell: edge of the cells of which the support keeps one row; None: all rows.
    """

    def __init__(
        self,
        host: Any,
        settings: Any,
        rewarded: Any,
        *,
        until_reward: bool = True,
        support_cell: float | None = None,
    ) -> None:
        self.host, self.settings, self.history = host, settings, host.history
        s, task = settings, host.task
        self.keys = list(dict.fromkeys([*task.keys, *host.critic_keys]))
        self.generator = torch.Generator().manual_seed(host.seed + 4)
        self.starts: Any = rewarded
        if s.frontier:
            self.starts = FrontierStarts(
                self.history.buffer,
                hold=s.hold,
                num_targets=s.num_targets,
                then=rewarded,
                until_reward=until_reward,
                observation_keys=self.keys,
                rarity_keys=list(task.rarity_keys) or None,
            )
        self.measured = list(task.rarity_keys or self.keys)
        shift, scale = task.scaling(self.measured)
        self.cells = Cells(shift, scale, s.even_cell)
        self._counted = 0
        self._make_source(support_cell)

    def _make_source(self, support_cell: float | None) -> None:
        s, host = self.settings, self.host
        # The host's random numbers stay those of the run without traces.
        with torch.random.fork_rng(devices=[]):
            self.model = BacktrackModel.from_env(
                host.env,
                num_cells=(s.model_cells, s.model_cells),
                observation_keys=self.keys,
                stop=False,
                # Dynamics without noise: the likelihood's peaks throw a model without a floor off.
                delta_log_scale_range=(s.lowest_log_scale, 2.0),
            )
        self.model_loss = BacktrackLoss(self.model)
        self.model_optimizer = torch.optim.Adam(
            self.model.parameters(), lr=s.model_rate, fused=True
        )
        self.support = DataSupport(
            self.model,
            num_references=s.num_references,
            cell_size=support_cell,
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

    @property
    def is_exploring(self) -> bool:
        """Whether traces still lead to the frontier."""
        return self.settings.frontier and not self.starts.found

    def walk_back(self) -> tuple[TensorDictBase, tuple[Tensor, ...]]:
        """Fit the model to what is new, and return traces and the places of kept steps."""
        states: Any = self.history.data["next"]
        new = states[self._counted :]
        self.cells.add(torch.cat([new[key] for key in self.measured], -1))
        self._counted = len(self.history)
        trace = self._traces()
        kept = trace["collector", "mask"]
        self.host.note("trace_kept", kept.float().mean())
        return trace, kept.nonzero(as_tuple=True)

    def _traces(self) -> TensorDictBase:
        self.fit(self._model_steps())
        states: Any = self.history.data["next"]
        self.support.fit(states.select(*self.keys)[self._references()])
        return self.transform(TensorDict({}, [self.settings.num_traces]))["trace"]

    @abstractmethod
    def _model_steps(self) -> int:
        """Return the model's gradient steps of this update."""

    def _references(self) -> Tensor:
        """Return the rows that say where data are."""
        return self.cells.draw(4 * self.settings.num_references, self.generator)

    def fit(self, steps: int) -> None:
        """Take gradient steps of the model."""
        s = self.settings
        keys = [*self.keys, "action", *(("next", key) for key in self.keys)]
        rows = self.cells.draw(steps * s.model_batch, self.generator)
        data: Any = self.history.data.select(*keys)[rows]
        for batch in data.split(s.model_batch):
            loss = self.model_loss(batch)["loss_backtrack"]
            self.model_optimizer.zero_grad()
            loss.backward()
            self.model_optimizer.step()


class RealSteps(TraceGuide):
    """The control, before a guide: what really came before the same states, without a model."""

    def _make_source(self, support_cell: float | None) -> None:
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

"""What imitates the way to chosen states: recall traces, and their control without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from bench.learning.best_episodes import BestEpisodes
from bench.learning.grids.hosts import ActorCritic, Host
from bench.learning.grids.walker import Rollout
from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    ValuePrioritizedSampler,
)
from torchrl_recall.envs import FourRoomsEnv

STORED = ("observation", "action", ("next", "observation"), ("next", "reward"))


@dataclass(frozen=True)
class TracesSettings:
    """Recall traces; by default the main job's (`torchrl_recall.demo`)."""

    start: Literal["found", "known", "value"] = "found"
    """From rewarded states and before the first reward from the rarest; from the goal; or from the
    states of highest value by the critic, as in the paper."""
    past: bool = False
    """The control: the real steps before the same states, and no model."""
    data: Literal["all", "best"] = "all"
    """Fit the model on all data, or on the ``num_best`` episodes of highest return."""
    last_visit: bool = True
    updates: int = 8
    """Imitation steps for each rollout."""
    num_traces: int = 16
    trace_length: int = 4
    """In sides of the maze."""
    model_updates: int = 8
    model_batch: int = 256
    model_cells: int = 64
    model_learning_rate: float = 1e-3
    frontier: int = 64
    """Before the first reward traces start from this many transitions, those of rarest ends."""
    frontier_share: float | None = None
    """A share of all stored transitions instead, which grows with them."""
    ranked_by: Literal["end", "begin"] = "end"
    """Whose visits say how rare a transition is: those of the cell it ends or begins in."""
    top: float = 0.05
    """Share of the states of highest value, for ``start="value"``."""
    num_best: int = 64


class Traces:
    """Draws what the host imitates: recall traces, or the real past of the same states."""

    def __init__(
        self, env: FourRoomsEnv, host: Host, settings: TracesSettings, budget: int
    ) -> None:
        self.env, self.host, self.settings = env, host, settings
        self.num_envs, self.rollout = host.settings.num_envs, host.settings.rollout
        self.num_steps = settings.trace_length * env.size
        block = self.num_envs * self.rollout
        storage = LazyTensorStorage(budget + block)
        self.sampler = ValuePrioritizedSampler(budget + block, top=1.0)
        self.goal = None
        if settings.start == "known":
            self.goal = env.goal.expand(settings.num_traces, 2)
        elif settings.start == "value":
            self.sampler.top = settings.top
        self.buffer = TensorDictReplayBuffer(
            storage=storage, sampler=self.sampler, batch_size=settings.num_traces
        )
        self.found = False
        self.visits = torch.zeros(env.size**2, dtype=torch.int64)
        self.previous = torch.full((budget + block,), -1)
        self.was_done = torch.ones(self.num_envs, dtype=torch.bool)
        self.num_stored = 0
        if not settings.past:
            self._make_model(storage)

    def _make_model(self, storage: LazyTensorStorage) -> None:
        settings = self.settings
        self.model = BacktrackModel.from_env(self.env, num_cells=(settings.model_cells,))
        self.transform = BacktrackTransform(
            self.model,
            num_steps=self.num_steps,
            in_keys=None if self.goal is None else ["goal"],
            last_visit=settings.last_visit,
        )
        self.model_loss = BacktrackLoss(self.model)
        self.optimizer = torch.optim.Adam(
            self.model_loss.parameters(), settings.model_learning_rate, fused=True
        )
        self.model_buffer: Any = TensorDictReplayBuffer(
            storage=storage, writer=self.buffer.writer, batch_size=settings.model_batch
        )
        if settings.data == "best":
            gamma = self.host.settings.gamma
            self.model_buffer = BestEpisodes(
                self.num_envs, settings.num_best, gamma, settings.model_batch
            )

    def observe(self, data: Rollout) -> None:
        """Store a rollout, say where traces start, and fit the model."""
        rows = data.tensordict()
        if self.settings.past:
            self._link(rows["next", "done"].squeeze(-1))
        elif self.settings.data == "best":
            self.model_buffer.extend(rows)
        flat = rows.select(*STORED).reshape(-1)
        self.buffer.extend(flat)
        self.num_stored += len(flat)
        self._set_values(data)
        if not self.settings.past and len(self.model_buffer):
            for _ in range(self.settings.model_updates):
                loss = self.model_loss(self.model_buffer.sample())["loss_backtrack"]
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()

    def _set_values(self, data: Rollout) -> None:
        """Value of a stored transition: its reward, or before the first one how rare its end."""
        if self.settings.start == "known":
            return
        stored = self.buffer.storage[:]
        if self.settings.start == "value":
            self.sampler.refresh(self._critic_value(stored["next"]))
            return
        if self.found or data.terminated.any():
            self.found = True
            self.sampler.top, self.sampler.min_value = 1.0, 0.5
            self.sampler.refresh(stored["next", "reward"])
            return
        size = self.env.size
        self.visits += torch.from_numpy(data.next_cell).flatten().bincount(minlength=size**2)
        # Half a row less, so that rounding up gives the number to the row.
        share = (self.settings.frontier - 0.5) / self.num_stored
        self.sampler.top = self.settings.frontier_share or min(1.0, share)
        ranked = stored["next"] if self.settings.ranked_by == "end" else stored
        cell = ranked["observation"]
        self.sampler.refresh(-self.visits[cell[:, 0] * size + cell[:, 1]].float())

    @torch.no_grad()
    def _critic_value(self, after: Any) -> Tensor:
        """Return ``r + γ V(s')`` of stored steps, from the critic's values of all cells."""
        assert isinstance(self.host, ActorCritic)
        size, gamma = self.env.size, self.host.settings.gamma
        table = self.host.value()
        cell, reward = after["observation"], after["reward"].squeeze(-1)
        value = table[cell[:, 0] * size + cell[:, 1]]
        # The goal is terminal: it has no value of its own.
        return torch.where(reward > 0, reward, gamma * value)

    def sample(self) -> TensorDictBase | None:
        """Return fresh traces, or None if there is nothing to go back from."""
        if self.settings.past:
            if self.goal is not None:
                raise ValueError("the real past of a goal is that of the rewards found.")
            return self._past(self.buffer.sample()["index"])
        if self.goal is None:
            return self.transform(self.buffer.sample())
        return self.transform(TensorDict({"goal": self.goal}, self.goal.shape[:1]))

    def _link(self, done: Tensor) -> None:
        """Note which stored row came before each new one in its episode; -1: none."""
        num_envs, steps = done.shape
        row = self.num_stored + torch.arange(num_envs * steps).view(num_envs, steps)
        previous = row - 1
        previous[:, 0] = row[:, 0] - num_envs * steps + steps - 1
        first = torch.cat([self.was_done.unsqueeze(1), done[:, :-1]], 1)
        previous[first] = -1
        self.was_done = done[:, -1]
        self.previous[self.num_stored : self.num_stored + row.numel()] = previous.flatten()

    def _past(self, row: Tensor) -> TensorDict:
        """Return the real steps up to and with the given ones, as traces."""
        rows = [row]
        for _ in range(self.num_steps - 1):
            row = torch.where(row < 0, row, self.previous[row])
            rows.append(row)
        index = torch.stack(rows[::-1], 1)
        stored = self.buffer.storage[:]
        observation = stored["observation"][index]
        after = stored["next", "observation"][index]
        kept = index >= 0
        if self.settings.last_visit:
            kept = kept & is_last_visit(observation, after[:, -1], kept, self.env.size)
        trace = TensorDict(
            {
                "observation": observation,
                "action": stored["action"][index],
                "next": {"observation": after},
                "collector": {"mask": kept},
            },
            list(index.shape),
        )
        return TensorDict({"trace": trace}, [len(index)])


def only_kept(sample: TensorDictBase) -> TensorDictBase:
    """Return the kept steps of traces alone, one a trace: the same mean over fewer rows."""
    trace: Any = sample["trace"]
    kept = trace["collector", "mask"]
    if kept.all() or not kept.any():
        return sample
    steps = trace.select("observation", "action", ("collector", "mask"))[kept]
    return TensorDict({"trace": steps.unsqueeze(1)}, steps.shape)


def is_last_visit(observation: Tensor, end: Tensor, real: Tensor, size: int) -> Tensor:
    """Tell which steps of traces are in a state that is not met again: bool ``[B, T]``.

    Args:
        observation: cells, oldest first, int64 ``[B, T, 2]``.
        end: the cells in which the traces end, ``[B, 2]``.
        real: which steps there are, ``[B, T]``.
        size: side of the maze.
    """
    states = torch.cat([observation, end.unsqueeze(1)], 1)
    code = states[..., 0] * size + states[..., 1]
    later = torch.ones(code.shape[1], code.shape[1], dtype=torch.bool).triu(1)
    again = (code.unsqueeze(2) == code.unsqueeze(1)) & later
    return real & ~again.any(-1)[:, :-1]

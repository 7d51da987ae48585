"""All steps of a run, read by row or along each environment's time."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler


class History:
    """What a learner has seen: a replay buffer that forgets nothing, with the past of each row.

    Rollouts ``[E, T]`` come in one after the other, all of one shape; row ``i`` of the buffer is
    step ``i % T`` of environment ``i // T % E`` of rollout ``i // (T E)``.

    Args:
        size: steps that are to fit.
        keys: of the observations; action, reward and ends are kept beside them.
        sampler: how the buffer draws; None: evenly.
        batch_size: how many it draws at a time.
    """

    def __init__(
        self, size: int, keys: tuple[str, ...], sampler: Sampler | None = None, batch_size: int = 1
    ) -> None:
        self.size, self.keys = size, keys
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(size), sampler=sampler, batch_size=batch_size
        )
        self.shape = torch.Size([1, 1])

    def extend(self, data: TensorDictBase) -> None:
        """Add a rollout ``[E, T]``."""
        self.shape = data.shape
        ends = [("next", name) for name in ("reward", "done", "terminated")]
        after = [("next", key) for key in self.keys]
        self.buffer.extend(data.select(*self.keys, "action", *after, *ends).reshape(-1))

    def __len__(self) -> int:
        return len(self.buffer)

    @property
    def data(self) -> TensorDictBase:
        """All steps, ``[N]``."""
        storage: Any = self.buffer.storage
        return storage[:]

    def along_time(self, values: Tensor) -> Tensor:
        """Lay ``[N, ...]`` out as ``[E, time, ...]``."""
        envs, steps = self.shape
        split = values.view(-1, envs, steps, *values.shape[1:]).transpose(0, 1)
        return split.reshape(envs, -1, *values.shape[1:])

    def row_before(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of the step before in the same environment, and if there is one."""
        envs, steps = self.shape
        first = row % steps == 0
        before = torch.where(first, row - envs * steps + steps - 1, row - 1)
        exists = before >= 0
        before = before.clamp_min(0)
        return before, exists & ~self.data["next", "done"][before, 0]

    def past(self, row: Tensor, length: int) -> tuple[TensorDictBase, Tensor]:
        """Return what really led to rows: steps ``[B, length]``, oldest first, and which exist."""
        rows, kept = [row], [torch.ones_like(row, dtype=torch.bool)]
        for _ in range(length - 1):
            before, exists = self.row_before(rows[0])
            rows.insert(0, before)
            kept.insert(0, kept[0] & exists)
        found: Any = self.data[torch.stack(rows, 1)]
        return found, torch.stack(kept, 1)

    def by_row(self, values: Tensor) -> Tensor:
        """Undo `along_time`."""
        envs, steps = self.shape
        split = values.view(envs, -1, steps, *values.shape[2:]).transpose(0, 1)
        return split.reshape(-1, *values.shape[2:])

    def returns(self, gamma: float) -> tuple[Tensor, Tensor]:
        """Return each step's discounted return, and whether its episode has ended, ``[N]``."""
        data = self.data
        reward = self.along_time(data["next", "reward"][:, 0])
        done = self.along_time(data["next", "done"][:, 0])
        total, ended = torch.empty_like(reward), torch.empty_like(done)
        following, end = torch.zeros_like(reward[:, 0]), torch.zeros_like(done[:, 0])
        for t in reversed(range(reward.shape[1])):
            end = done[:, t] | end
            following = reward[:, t] + gamma * torch.where(done[:, t], 0.0, following)
            total[:, t], ended[:, t] = following, end
        return self.by_row(total), self.by_row(ended)

    def first_steps(self) -> Tensor:
        """Tell which rows begin an episode, ``[N]``."""
        done = self.along_time(self.data["next", "done"][:, 0])
        return self.by_row(torch.cat([torch.ones_like(done[:, :1]), done[:, :-1]], 1))

    def episode_rows(self, first: Tensor) -> Tensor:
        """Return all rows of the episodes that begin at these rows, one episode after another."""
        done = self.along_time(self.data["next", "done"][:, 0])
        place = self.along_time(torch.arange(len(self)))
        number = done.long().cumsum(1) - done.long()  # of the episode in its environment
        at = torch.empty(len(self), 2, dtype=torch.long)
        at[place.flatten()] = torch.stack(
            [torch.arange(len(done)).repeat_interleave(done.shape[1]), number.flatten()], 1
        )
        return torch.cat([place[e][number[e] == n] for e, n in at[first].tolist()])

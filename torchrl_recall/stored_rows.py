"""Rows of a replay buffer, counted in the order of writing, read and valued piece by piece.

`refresh.py` reads through these, whether the storage is in this process or behind the public
methods of a remote buffer. A row is an index of the storage's first dimension, along which
TorchRL's writers go: one entry, or in a storage of several dimensions one step of all environments.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, Storage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter, RoundRobinWriter

from torchrl_recall.priorities.arguments import paired_values
from torchrl_recall.state_reading import storage_rows


class Ring(NamedTuple):
    """Where the writer stands."""

    stored: int  # rows
    written: int  # rows, those overwritten since included
    cursor: int  # the next row that is written
    capacity: int

    @property
    def oldest(self) -> int:
        """The oldest row that is still stored, counted as ``written`` is."""
        return self.written - self.stored

    def place(self, row: int) -> int:
        """Where a row is in the storage."""
        return (self.cursor - (self.written - row)) % self.capacity

    def follows(self, earlier: Ring) -> bool:
        """Whether rows are still counted and placed as they were at ``earlier``."""
        more = self.written - earlier.written
        return (
            more >= 0
            and self.capacity == earlier.capacity
            and (self.cursor - earlier.cursor - more) % self.capacity == 0
        )


class LocalRows:
    """Rows of a storage in this process, and the sampler that ranks them.

    Args:
        buffer: a replay buffer, or a storage.
        sampler: what has ``refresh``; None: the buffer's.

    Raises:
        TypeError: if there is no sampler with ``refresh``.
    """

    def __init__(self, buffer: Any, sampler: Any) -> None:
        self.buffer = buffer if isinstance(buffer, ReplayBuffer) else None
        self.storage: Any = buffer if self.buffer is None else buffer.storage
        if sampler is None and self.buffer is not None:
            sampler = self.buffer.sampler
        if not hasattr(sampler, "refresh"):
            raise TypeError(
                "sampler must be a ValuePrioritizedSampler, the buffer's or given as sampler=, got "
                f"{type(sampler).__name__}"
            )
        self.sampler: Any = sampler
        self.writer = None if self.buffer is None else self.buffer.writer
        # A ring, or rows that never change; another writer puts rows anywhere.
        self.in_time_order = isinstance(self.writer, RoundRobinWriter | ImmutableDatasetWriter)

    @property
    def one_dimensional(self) -> bool:
        """Whether a row is one entry."""
        return self.storage.ndim == 1

    @property
    def width(self) -> int:
        """Entries of a row; 1 as long as nothing is stored."""
        shape = None if self.storage.ndim == 1 else self.storage.shape
        return 1 if shape is None else shape[1:].numel()

    def lock(self) -> ExitStack:
        """Hold back what TorchRL's buffers hold back while they sample: writers and samplers."""
        stack = ExitStack()
        if self.buffer is not None:
            stack.enter_context(self.buffer._replay_lock)
            stack.enter_context(self.buffer._write_lock)
        return stack

    def ring(self) -> Ring:
        """Read where the writer stands; call it under the lock."""
        width = self.width
        stored = -(-len(self.storage) // width)
        capacity = max(stored, -(-self.storage.max_size // width), 1)
        if isinstance(self.writer, RoundRobinWriter):
            # `int`: the counters of a compilable writer are tensors.
            return Ring(stored, int(self.writer._write_count), int(self.writer._cursor), capacity)
        return Ring(stored, stored, stored % capacity, capacity)

    def read(self, start: int, end: int) -> TensorDictBase:
        """Read places ``start`` to ``end``; call it under the lock. No tensor is copied."""
        return storage_rows(self.storage, slice(start, end))

    def write(self, start: int, values: Tensor) -> None:
        """Hand over the values of rows from place ``start`` on; call it under the lock."""
        width = self.width
        entries = len(values) * width
        index = torch.arange(start * width, start * width + entries, device=values.device)
        if values.numel() != entries:
            # Entries that are trajectories: the sampler says how their steps become one value.
            index, values = paired_values(
                values.reshape(entries, -1), index, self.sampler.reduction
            )
        self.sampler.refresh(values.reshape(-1), index)


class RemoteRows:
    """Rows behind ``len``, ``buffer[start:end]`` and ``update_priority(index, priority)``.

    If the buffer also has ``write_count`` and ``stats()["capacity"]``, as TorchRL's
    `RayReplayBuffer`, its writer is taken for a ring. There is no lock.

    Raises:
        TypeError: if the buffer lacks a method.
    """

    in_time_order = False
    one_dimensional = True
    width = 1

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        for name in ("__len__", "__getitem__", "update_priority"):
            if not hasattr(buffer, name):
                raise TypeError(
                    "buffer must be a ReplayBuffer, a Storage, or have __len__, __getitem__ and "
                    f"update_priority, got {type(buffer).__name__} without {name}"
                )

    def lock(self) -> ExitStack:
        """Hold nothing back."""
        return ExitStack()

    def ring(self) -> Ring:
        """Ask where the writer stands."""
        stored = len(self.buffer)
        written = getattr(self.buffer, "write_count", None)
        stats = getattr(self.buffer, "stats", dict)()
        capacity = stats.get("capacity")
        if written is None or capacity is None:
            return Ring(stored, stored, stored, 2**62)
        return Ring(stored, int(written), int(written) % capacity, capacity)

    def read(self, start: int, end: int) -> TensorDictBase:
        """Read places ``start`` to ``end``, through the buffer's transforms if it has some."""
        data = self.buffer[start:end]
        if not isinstance(data, TensorDictBase) or data.batch_size != (end - start,):
            raise ValueError(
                f"buffer[{start}:{end}] must be a TensorDict of batch size {(end - start,)}, one "
                f"transition each, got {type(data).__name__} {tuple(getattr(data, 'shape', ()))}"
            )
        return data

    def write(self, start: int, values: Tensor) -> None:
        """Send the values of rows from place ``start`` on."""
        self.buffer.update_priority(torch.arange(start, start + len(values)), values.cpu())


def rows_of(buffer: Any, sampler: Any) -> LocalRows | RemoteRows:
    """Find out how to reach the rows of ``buffer``."""
    # A RayReplayBuffer is a ReplayBuffer whose storage is in another process.
    local = isinstance(buffer, ReplayBuffer) and isinstance(
        getattr(buffer, "storage", None), Storage
    )
    if local or isinstance(buffer, Storage):
        return LocalRows(buffer, sampler)
    if sampler is not None:
        raise TypeError(
            "sampler cannot be given with a remote buffer: its own gets the values through "
            f"update_priority, got {type(sampler).__name__}"
        )
    return RemoteRows(buffer)

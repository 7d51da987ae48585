"""How old the value of each stored row is, in 12 bytes for each block of rows.

`refresh.py` tells `BlockAges` what it has refreshed. Rows are counted by when they were written
(row 0 came first), so that a ring that overwrites its oldest rows needs no bookkeeping.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Entries that share an age.
BLOCK_ENTRIES = 256


class BlockAges:
    """Which call refreshed each block of rows, and up to which of its rows.

    Args:
        block_rows: rows of a block.
        capacity: rows that the ring holds.
        first: the oldest row, where the blocks begin.

    Examples:
        >>> ages = BlockAges(block_rows=4, capacity=100, first=0)
        >>> ages.mark(0, 6, call=1)
        >>> ages.mark(4, 8, call=2)
        >>> ages.of_rows(0, 10, call=2)
        tensor([ 1,  1,  1,  1,  0,  0,  0,  0, -1, -1], dtype=torch.int32)
    """

    def __init__(self, block_rows: int, capacity: int, first: int) -> None:
        self.block_rows, self.capacity, self.first = block_rows, capacity, first
        # Blocks beyond these take the slots of blocks that the ring has overwritten.
        self._slots = -(-capacity // block_rows) + 1
        self._call = torch.zeros(0, dtype=torch.int32)
        self._until = torch.zeros(0, dtype=torch.int64)  # the row after the last one refreshed

    def aligned(self, row: int) -> int:
        """Return the first row of the block of ``row``."""
        return row - (row - self.first) % self.block_rows

    def mark(self, low: int, high: int, call: int) -> None:
        """Note that rows from ``low`` to before ``high`` are refreshed.

        ``low`` begins a block or is the oldest row, ``high`` ends a block or is the newest one.
        """
        if high <= low:
            return
        begin, end = self._blocks(low, high)
        self._make_room(end)
        slots = torch.arange(begin, end) % self._slots
        until = self.first + (torch.arange(begin, end) + 1) * self.block_rows
        self._call[slots], self._until[slots] = call, until.clamp_(max=high)

    def _blocks(self, low: int, high: int) -> tuple[int, int]:
        return (low - self.first) // self.block_rows, -((self.first - high) // self.block_rows)

    def _make_room(self, num_blocks: int) -> None:
        if num_blocks > len(self._call) and len(self._call) < self._slots:
            more = min(self._slots, max(num_blocks, 2 * len(self._call))) - len(self._call)
            self._call = torch.cat([self._call, self._call.new_zeros(more)])
            self._until = torch.cat([self._until, self._until.new_zeros(more)])

    def _live(self, oldest: int, newest: int) -> tuple[Tensor, Tensor, Tensor]:
        """First rows of the blocks from ``oldest`` to before ``newest``, their calls and ends."""
        begin, end = self._blocks(oldest, newest)
        blocks = torch.arange(begin, end)
        slots = blocks % self._slots
        known = slots < len(self._call)
        start = self.first + blocks * self.block_rows
        call, until = torch.zeros_like(start), torch.zeros_like(start)
        call[known], until[known] = self._call[slots[known]].long(), self._until[slots[known]]
        start = start.clamp(min=oldest)
        # A slot of an earlier block ends before this one starts.
        return start, call, until.clamp(max=newest).maximum(start)

    def summary(self, oldest: int, newest: int, call: int) -> tuple[int, int, int]:
        """Return rows refreshed, the sum of their ages, and the largest age."""
        start, stamp, until = self._live(oldest, newest)
        count = until - start
        age = (call - stamp).masked_fill(count == 0, 0)
        return int(count.sum()), int((count * age).sum()), int(age.max()) if len(age) else 0

    def of_rows(self, oldest: int, newest: int, call: int) -> Tensor:
        """Return the age of each row from ``oldest`` to before ``newest``, int32; -1: none."""
        _, stamp, until = self._live(oldest, newest)
        row = torch.arange(oldest, newest)
        block = (row - self.first) // self.block_rows - (oldest - self.first) // self.block_rows
        age = (call - stamp)[block].masked_fill_(row >= until[block], -1)
        return age.int()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the ages, as tensors and ints."""
        return {
            "block_rows": self.block_rows,
            "capacity": self.capacity,
            "first": self.first,
            "call": self._call.clone(),
            "until": self._until.clone(),
        }

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> BlockAges:
        """Build anew what `state_dict` returned."""
        ages = cls(state_dict["block_rows"], state_dict["capacity"], state_dict["first"])
        ages._call, ages._until = state_dict["call"].clone(), state_dict["until"].clone()
        return ages

"""Memory of large columns, kept from one walk to the next.

What malloc maps for a large walk goes back to the system after it, and fresh pages cost the next
one up to a third of its time: they are zeroed, and a virtual machine's host must find them first.
So columns beyond what malloc keeps by itself lie in blocks that are used again once no tensor does.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes of a column from which on malloc never keeps it (the largest `M_MMAP_THRESHOLD`).
SMALLEST = 2**25
# Bytes of all blocks that are kept in mind: two walks of 8192 traces of 32 steps of 111 numbers.
# Beyond that, memory goes back to the system with its last tensor, as ever.
MOST = 2**29


class Block(NamedTuple):
    """Memory, and who uses it.

    Attributes:
        memory (mmap.mmap): private to the process; after a fork each has its own.
        user (weakref.ref): to what a storage holds, so that it is dead once the storage is.
    """

    memory: mmap.mmap
    user: weakref.ref[Any]


# A thread takes a block out before it looks at it. Both ends of a deque are atomic: there is no
# lock, which a fork could leave behind locked.
_blocks: deque[Block] = deque()


def empty_like(like: Tensor) -> Tensor:
    """Return a contiguous tensor on the CPU without values.

    Args:
        like (Tensor): of the same shape and dtype, contiguous; its own memory is not looked at.

    Returns:
        Tensor: its memory is used again when the storage is gone: the tensor, its views and what
        autograd keeps of them. The storage cannot be resized.
    """
    size = like.numel() * like.element_size()
    if size < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty_like(like)
    memory, others = _take_out(size)
    if memory is None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    user = (ctypes.c_char * size).from_buffer(memory)
    out = torch.frombuffer(user, dtype=like.dtype).view(like.shape)
    total = 0
    for block in [Block(memory, weakref.ref(user)), *others]:
        total += len(block.memory)
        if total <= MOST:
            _blocks.append(block)
    return out


def _take_out(size: int) -> tuple[mmap.mmap | None, list[Block]]:
    """Take all blocks out; return idle memory of a size, if there is any, and what to put back."""
    memory, others = None, []
    while True:
        try:
            block = _blocks.popleft()
        except IndexError:
            return memory, others
        if block.user() is not None:
            others.append(block)
        elif len(block.memory) == size:
            if memory is None:
                memory = block.memory
            else:
                others.append(block)
        # Idle memory of another size goes back: what lies idle is of one size.

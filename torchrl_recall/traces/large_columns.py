"""Memory of large columns, kept from one walk to the next.

What is mapped for a large walk goes back to the system after it, and fresh pages cost the next one
up to a third of its time: they are zeroed, and a virtual machine's host must find them first. So
the two largest columns of a walk lie in memory that is used again once no tensor does.

Memory that lies idle is the system's to take: it stays with the process until another needs it
(``MADV_FREE``), or until `release_memory`.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

# Bytes of a column from which on malloc never keeps it (the largest `M_MMAP_THRESHOLD`), and up to
# which it is kept here: 8192 traces of 32 steps of 111 numbers take 116 million.
SMALLEST, LARGEST = 2**25, 2**27
# Columns: the states and the next states of a walk.
MOST = 2

_CAN_KEEP = hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MADV_FREE")

# What no storage uses, and for what is in use, by its id, a weak reference to tell when it no
# longer is. Their operations are atomic: there is no lock, which a fork could leave behind locked,
# or which a garbage collection in the middle of `empty` would wait for for ever.
_idle: deque[mmap.mmap] = deque(maxlen=MOST)
_watches: dict[int, weakref.ref[Any]] = {}


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return a tensor without values, as `torch.empty` does.

    Args:
        *shape (int): its shape.
        dtype (torch.dtype): its dtype.
        device (torch.device): where it lives. Only memory of the CPU is used again.

    Returns:
        Tensor: contiguous. If its memory is kept, the storage cannot be resized in place.
    """
    size = math.prod(shape) * dtype.itemsize
    if (
        not SMALLEST <= size <= LARGEST
        or not _CAN_KEEP
        or torch.device(device).type != "cpu"
        or is_compiling()
    ):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = _take(size)
    if memory is None:
        try:
            memory = _map(size)
        except OSError:  # torch says it better
            return torch.empty(shape, dtype=dtype, device=device)
    # A storage holds this until it dies, with all views of it and whatever autograd keeps.
    user = (ctypes.c_char * size).from_buffer(memory)
    _watches[id(memory)] = weakref.ref(user, partial(_keep, memory))
    return torch.frombuffer(user, dtype=dtype).view(shape)


def release_memory() -> None:
    """Give the memory back that large walks on the CPU have left for the next one.

    Columns of 32 to 128 MiB leave it: at most two of them, 256 MiB, once no tensor uses them. The
    system takes it by itself where memory is short.

    Examples:
        >>> from torchrl_recall.traces import release_memory
        >>> release_memory()
    """
    _idle.clear()


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _take(size: int) -> mmap.mmap | None:
    """Return idle memory of a size, or None; what is of another size goes back to the system."""
    while True:
        try:
            memory = _idle.pop()
        except IndexError:
            return None
        if len(memory) == size:
            return memory


def _keep(memory: mmap.mmap, _: weakref.ref[Any]) -> None:
    """Note that no storage uses some memory any more."""
    _watches.pop(id(memory), None)
    try:
        # Before anything else can get at it.
        memory.madvise(mmap.MADV_FREE)
    except OSError:  # locked in memory, say: not the system's to take, so not ours to keep
        return
    _idle.append(memory)  # the oldest one beyond MOST goes back

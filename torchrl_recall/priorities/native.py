"""Exact draws by value in the C library, for values on the CPU.

A draw, or a write of a few values, touches only the way between these entries and the root of a
tree of sums, sixteen children a node; a refresh of all runs at about the speed of memory.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from torchrl_recall.native import interface, priorities
from torchrl_recall.priorities.weights import Parameters, best_count, nothing_to_draw

_MOST = 2**32 - 1


class NativePriorities:
    """Values of stored transitions, and draws by them, in the C library.

    Beside the values it keeps 0.54 bytes an entry, as much again with a uniform share, and 8 bytes
    an entry in the mode ``"rank"``. It is not safe to call from several threads at once.

    Args:
        capacity: number of entries, below 2^32.
        dtype: of the values, float32 or float64.
        device: None or the CPU.

    Raises:
        RuntimeError: if the library is not there.
        ValueError: if the capacity is too large for the library's counters.

    Examples:
        >>> priorities = NativePriorities(5, torch.float32)
        >>> priorities.write(torch.tensor([4, 0]), torch.tensor([3.0, 2.0]))
        True
        >>> priorities.values
        tensor([2., -inf, -inf, -inf, 3.])
        >>> uniform = torch.tensor([0.0, 0.6, 0.9], dtype=torch.float64)
        >>> priorities.draw(uniform, 5, Parameters("top", top=0.4), beta=0.0)
        (tensor([4, 0, 0]), tensor([1., 1., 1.]))
    """

    def __init__(
        self, capacity: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        library, reason = interface.load()
        if library is None:
            raise RuntimeError(f"the native backend is not there: {reason}")
        self._library = library
        self.num_refused = 0  # values that were not finite
        self._hold(torch.empty(0, dtype=dtype, device="cpu"), capacity, dtype)

    def _hold(self, values: Tensor, capacity: int, dtype: torch.dtype) -> None:
        """Start from values of the first entries; whatever depends on them is made when needed."""
        if capacity > _MOST:
            raise ValueError(f"max_capacity must be at most {_MOST} on the CPU, got {capacity}")
        if capacity < values.numel():
            raise ValueError(f"capacity must be at least {values.numel()}, got {capacity}")
        # The library reads sixteen at a time.
        padded = self._new(-(-capacity // 16) * 16, dtype).fill_(-math.inf)
        padded[: values.numel()] = values
        # Tensors that own the memory of what the structure points to.
        memory = {
            "nodes": self._new(self._library.recall_num_nodes(capacity), torch.float64),
            "band": self._new(priorities.MAX_BAND, torch.int32),
        }
        # All at last: where memory runs out, what was there stays.
        self.capacity, self.values, self._memory = capacity, padded[:capacity], memory
        self._parameters: Parameters | None = None
        self._state = priorities.Priorities(
            capacity=capacity,
            is_double=dtype == torch.float64,
            instruction_set=self._library.recall_instruction_set(),
            values=padded.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in memory.items()},
        )
        self._address = ctypes.addressof(self._state)

    def _new(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory that holds nothing yet."""
        memory = torch.empty(count, dtype=dtype, device="cpu")
        self._library.recall_expect(memory.data_ptr(), memory.nbytes)
        return memory

    def _allot(self, name: str, count: int, dtype: torch.dtype) -> None:
        if name not in self._memory:
            memory = self._new(count, dtype)
            self._memory[name] = memory
            setattr(self._state, name, memory.data_ptr())

    def grow(self, capacity: int) -> None:
        """Make room; new entries have no value yet."""
        self._hold(self.values, capacity, self.values.dtype)

    def restore(self, values: Tensor) -> None:
        """Start anew from the values of the first entries; ``-inf``: none yet, NaN: never drawn."""
        self._hold(values, self.capacity, self.values.dtype)

    def write(self, index: Tensor, values: Tensor, none: float = math.nan) -> bool:
        """Store values.

        Args:
            index: ``[n]`` int64; negative ones are skipped. Of an index that comes several times
                the last value wins.
            values: ``n`` in any shape, or ``[1]`` for one value for all, floating. One that is not
                finite bars its entry from being drawn.
            none: values equal to this number are skipped.

        Returns:
            False, and nothing is written, if several values are for one and the same index: who
            calls may know better how to make one of them.

        Raises:
            IndexError: if an index is not below the capacity. Nothing is written then.
            ValueError: if there are not as many values as indices.
        """
        index, values = index.contiguous(), _floats(values)
        if values.numel() not in (1, index.numel()):
            raise ValueError(
                f"values must be 1 or {index.numel()}, as many as indices, got {values.numel()}"
            )
        refused = self._library.recall_write(
            self._address,
            index.data_ptr(),
            values.data_ptr(),
            values.dtype is torch.float64,
            index.numel(),
            values.numel() > 1,
            none,
        )
        if refused == priorities.ONE_INDEX:
            return False
        self._refuse(refused)
        return True

    def erase(self, index: Tensor) -> None:
        """Take back the values of entries ``[n]`` int64: they have none yet.

        Raises:
            IndexError: if an index is not below the capacity. Nothing is written then.
        """
        index = index.contiguous()
        self._refuse(self._library.recall_erase(self._address, index.data_ptr(), index.numel()))

    def refresh(self, values: Tensor, none: float = math.nan) -> None:
        """Store the values ``[n]`` of the first ``n`` entries, and bring the sums up to date.

        Values equal to ``none`` stand for no value yet.

        Raises:
            IndexError: if there are more values than entries. Nothing is written then.
        """
        values = _floats(values)
        if self._parameters is not None and self._parameters.mode == "top":
            # If all may be drawn; else it is counted again below.
            self._state.num_best = best_count(self._parameters.top, self._state.size)
        self._refuse(
            self._library.recall_refresh(
                self._address,
                values.data_ptr(),
                values.dtype is torch.float64,
                values.numel(),
                none,
            )
        )
        if self._parameters is not None:
            self._count_best(self._parameters)
            # That nothing can be drawn is the affair of who draws.
            self._check(self._library.recall_prepare(self._address), priorities.NOTHING_TO_DRAW)

    def draw(
        self, uniform: Tensor, size: int, parameters: Parameters, beta: float
    ) -> tuple[Tensor, Tensor]:
        """Turn uniform numbers into entries.

        Args:
            uniform: ``[B]`` float64 in [0, 1).
            size: how many entries are stored; those behind are never drawn.
            parameters: how values become probabilities.
            beta: exponent of the importance weights; 0 makes them 1.

        Returns:
            Entries ``[B]`` int64, and ``(w / min w)^-beta`` ``[B]`` float32.

        Raises:
            RuntimeError: if none of the entries may be drawn.
            MemoryError: if there is no memory for the order of the mode ``"rank"``.
        """
        self._set(size, parameters)
        uniform = uniform.contiguous()
        entry = torch.empty(uniform.shape, dtype=torch.int64, device="cpu")
        importance = torch.ones(uniform.shape, dtype=torch.float32, device="cpu")
        self._check(
            self._library.recall_draw(
                self._address,
                uniform.data_ptr(),
                uniform.numel(),
                beta,
                entry.data_ptr(),
                importance.data_ptr() if beta else None,
            )
        )
        return entry, importance

    def weights(self, size: int, parameters: Parameters) -> Tensor:
        """Return the weights ``[size]`` float64 that draws go by, up to a factor."""
        self._set(size, parameters)
        weights = torch.empty(size, dtype=torch.float64, device="cpu")
        self._check(self._library.recall_weights(self._address, weights.data_ptr()))
        return weights

    def _set(self, size: int, parameters: Parameters) -> None:
        """Make the structure say what is to be drawn from."""
        if size > self.capacity:
            self.grow(size)
        state = self._state
        if size != state.size:
            self._library.recall_resize(self._address, size)
        if parameters != self._parameters:
            self._set_parameters(parameters)
        self._count_best(parameters)

    def _set_parameters(self, new: Parameters) -> None:
        state, old = self._state, self._parameters
        self._parameters = None  # where memory runs out below, neither old nor new ones hold
        if old is None or (old.mode, old.min_value) != (new.mode, new.min_value):
            state.census_is_valid = 0
        state.mode = priorities.MODES.index(new.mode)
        for name in ("temperature", "alpha", "eps", "uniform_share"):
            setattr(state, name, getattr(new, name))
        if new.uniform_share > 0:
            self._allot("eligible", self._library.recall_num_nodes(self.capacity), torch.float64)
        if new.mode == "rank":
            self._allot("order", self.capacity, torch.int32)
            self._allot("spare", self.capacity, torch.int32)
            self._allot("changed", self.capacity // 64 + 1, torch.int64)
        else:
            state.order_is_valid = 0
            for name in ("order", "spare", "changed"):
                self._memory.pop(name, None)
        state.has_min_value = new.min_value is not None
        if new.min_value is not None:
            # Rounded as the values are; "no value yet" is below every number.
            lowest = torch.finfo(self.values.dtype).min
            state.min_value = max(self.values.new_tensor(new.min_value).item(), lowest)
        state.least_is_valid = 0
        self._parameters = new

    def _count_best(self, parameters: Parameters) -> None:
        if parameters.mode == "top":
            state = self._state
            if not state.census_is_valid:
                self._library.recall_census(self._address)
            state.num_best = best_count(parameters.top, state.num_drawable)

    def _refuse(self, refused: int) -> None:
        if refused == priorities.OUT_OF_RANGE:
            raise IndexError(f"index must be below {self.capacity}")
        self.num_refused += refused

    def _check(self, status: int, expected: int = interface.OK) -> None:
        if status in (interface.OK, expected):
            return
        if status == priorities.NOTHING_TO_DRAW:
            raise nothing_to_draw(self._state.size)
        raise MemoryError("no memory to draw by value")


def _floats(values: Tensor) -> Tensor:
    """Return values as the library reads them."""
    if values.dtype not in (torch.float32, torch.float64):
        values = values.double()
    return values.resolve_neg().contiguous()

"""Draws in proportion to priorities by other means: what a user would take without this library.

Each peer has `draw`, `refresh` (all priorities anew) and `update` (some of them), and is ready to
draw after either: none puts work off. In favour of all of them: the exponent is 1, indices of a
refresh are prepared, importance weights are ones where they can be, and priorities are positive
numbers that nobody checks.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torchrl.data import PrioritizedSampler

from bench.peers.unavailable import Unavailable


class Drawing(Protocol):
    """What all contenders of the sampler's benchmark can do."""

    def draw(self, count: int) -> Tensor:
        """Return entries ``[count]``, drawn with replacement."""
        ...

    def refresh(self, values: Tensor) -> None:
        """Set all values, ``[n]`` float32."""
        ...

    def update(self, index: Tensor, values: Tensor) -> None:
        """Set the values ``[count]`` of the entries ``[count]`` int64."""
        ...


class TorchRLTrees:
    """TorchRL's `PrioritizedSampler`, by its own methods.

    Args:
        values (Tensor): ``[n]``, the first priorities.
        storage (Storage): of n entries; the sampler asks for its length.

    Raises:
        Unavailable: TorchRL's C++ extension, which has the trees, does not load.
    """

    def __init__(self, values: Tensor, storage: Any) -> None:
        try:
            self._sampler = PrioritizedSampler(values.numel(), alpha=1.0, beta=0.0)
        # An extension built for another torch fails in ways of its own.
        except Exception as error:
            raise Unavailable(f"its extension does not load: {error}".splitlines()[0]) from None
        self._storage, self._all = storage, torch.arange(values.numel())
        self._sampler.extend(self._all)
        self.refresh(values)

    def draw(self, count: int) -> Tensor:
        return self._sampler.sample(self._storage, count)[0]

    def refresh(self, values: Tensor) -> None:
        self._sampler.update_priority(self._all, values)

    def update(self, index: Tensor, values: Tensor) -> None:
        self._sampler.update_priority(index, values)


class CpprbBuffer:
    """cpprb's `PrioritizedReplayBuffer`.

    It has no sampler of its own, so a draw also gathers what is stored: one byte an entry. A draw
    takes one number of each of ``count`` equal shares of the sum, hence in rising order; the next
    draw overwrites it.

    Args:
        values (Tensor): ``[n]``, the first priorities.
        storage (Storage): not looked at.

    Raises:
        Unavailable: cpprb is not installed.
    """

    def __init__(self, values: Tensor, storage: Any) -> None:
        try:
            cpprb = import_module("cpprb")
        except ImportError as error:
            raise Unavailable(f"cpprb is not installed: {error}") from None
        rows = torch.zeros(values.numel(), dtype=torch.uint8).numpy()
        self._buffer = cpprb.PrioritizedReplayBuffer(
            values.numel(), {"row": {"dtype": rows.dtype}}, alpha=1.0, eps=1e-8
        )
        self._buffer.add(row=rows, priorities=values.numpy())
        self._all = torch.arange(values.numel()).numpy()

    def draw(self, count: int) -> Tensor:
        index = self._buffer.sample(count, beta=0.0)["indexes"]
        return torch.from_numpy(index.view("int64"))

    def refresh(self, values: Tensor) -> None:
        self._buffer.update_priorities(self._all, values.numpy())

    def update(self, index: Tensor, values: Tensor) -> None:
        self._buffer.update_priorities(index.numpy(), values.numpy())


class CumulativeSum:
    """The short way in torch: a cumulative sum, and a binary search of uniform numbers in it.

    Args:
        values (Tensor): ``[n]``, the first priorities.
        storage (Storage): not looked at.
    """

    def __init__(self, values: Tensor, storage: Any) -> None:
        # float32 would lose the small ones behind a large sum.
        self._values, self._sums = values.clone(), values.double()
        self.refresh(values)

    def draw(self, count: int) -> Tensor:
        place = torch.rand(count, dtype=torch.float64) * self._sums[-1]
        return torch.searchsorted(self._sums, place, right=True).clamp_(max=len(self._sums) - 1)

    def refresh(self, values: Tensor) -> None:
        self._values.copy_(values)
        torch.cumsum(self._values, 0, dtype=torch.float64, out=self._sums)

    def update(self, index: Tensor, values: Tensor) -> None:
        self._values[index] = values
        torch.cumsum(self._values, 0, dtype=torch.float64, out=self._sums)


SAMPLERS = {
    "TorchRL PrioritizedSampler": TorchRLTrees,
    "cpprb": CpprbBuffer,
    "cumsum, searchsorted": CumulativeSum,
}


def samplers(values: Tensor, storage: Any) -> tuple[dict[str, Drawing], dict[str, str]]:
    """Build all peers.

    Args:
        values (Tensor): ``[n]``, the first priorities.
        storage (Storage): of n entries.

    Returns:
        tuple: each peer that can run, and the reason for each that cannot.
    """
    built, skipped = {}, {}
    for name, peer in SAMPLERS.items():
        try:
            built[name] = peer(values, storage)
        except Unavailable as reason:
            skipped[name] = str(reason)
    return built, skipped

"""Weights summed by 16 and by 256, and draws that descend through the sums.

`levels.py` keeps the weights; here they become entries. Each sum is taken from its children in a
fixed order and never incremented, so that any sequence of updates ends in the bits of a rebuild.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FAN_OUT = 16
BLOCK = FAN_OUT**2
_ALMOST_ONE = 1 - 2**-53


class SumLevels:
    """Sums of 16 and of 256 leaves, and running sums over the latter.

    Args:
        num_leaves: number of leaves, a multiple of `BLOCK`.
        device: where the sums live.
        dtype: of the sums of 16; those above are float64.
        parallel: whether running sums are built in parallel, as a GPU needs it.

    Examples:
        >>> weights = torch.zeros(256)
        >>> weights[torch.tensor([3, 200])] = torch.tensor([1.0, 3.0])
        >>> sums = SumLevels(256, None)
        >>> sums.set_slice(0, weights)
        >>> sums.finish()
        >>> uniform = torch.tensor([0.0, 0.2, 0.3], dtype=torch.float64)
        >>> sums.draw(uniform, lambda row: weights.view(-1, 16)[row])
        tensor([  3,   3, 200])
    """

    def __init__(
        self,
        num_leaves: int,
        device: torch.device | None,
        dtype: torch.dtype = torch.float64,
        parallel: bool = False,
    ) -> None:
        self.by_16 = torch.zeros(num_leaves // FAN_OUT, dtype=dtype, device=device)
        self.by_256 = torch.zeros(num_leaves // BLOCK, dtype=torch.float64, device=device)
        self.running = self.by_256
        self._parallel = parallel

    def set_slice(self, start: int, leaves: Tensor) -> None:
        """Sum consecutive leaves.

        Args:
            start: the first leaf, a multiple of 16.
            leaves: ``[n]``, floating; n is a multiple of 16.
        """
        first = start // FAN_OUT
        out = self.by_16[first : first + leaves.numel() // FAN_OUT]
        torch.sum(leaves.view(-1, FAN_OUT), 1, dtype=out.dtype, out=out)

    def set_rows(self, row: Tensor, leaves: Tensor) -> None:
        """Sum the leaves of some rows of 16, and of what lies above them.

        Args:
            row: ``[n]`` int64, duplicates allowed.
            leaves: ``[n, 16]``, all leaves of these rows.
        """
        self.by_16.index_copy_(0, row, leaves.sum(1, dtype=self.by_16.dtype))
        above = row >> 4
        children = self.by_16.view(-1, FAN_OUT).index_select(0, above)
        self.by_256.index_copy_(0, above, children.sum(1, dtype=torch.float64))
        self.running = running_sums(self.by_256, self._parallel)

    def finish(self) -> None:
        """Sum what lies above the sums of 16, all of it."""
        torch.sum(self.by_16.view(-1, FAN_OUT), 1, dtype=torch.float64, out=self.by_256)
        self.running = running_sums(self.by_256, self._parallel)

    @property
    def total(self) -> Tensor:
        """Sum of all leaves, 0-dimensional float64."""
        return self.running[-1]

    def draw(self, uniform: Tensor, leaves: Callable[[Tensor], Tensor]) -> Tensor:
        """Draw leaves; none of weight 0 while the total is positive.

        Args:
            uniform: ``[B]``, float64, in [0, 1].
            leaves: from rows ``[B]`` int64 to their leaves ``[B, 16]``.

        Returns:
            ``[B]``, int64.
        """
        position = torch.minimum(uniform * self.total, self.total * _ALMOST_ONE)
        block = torch.searchsorted(self.running, position, right=True)
        if self._parallel:  # the host does not know whether the total is 0
            block = block.clamp_(max=self.by_256.numel() - 1)
        residual = position - _before(self.running).index_select(0, block)
        row, residual = self._child(
            block, self.by_16.view(-1, FAN_OUT).index_select(0, block), residual
        )
        return self._child(row, leaves(row), residual)[0]

    def _child(self, parent: Tensor, children: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Go down one level: the children in which the residuals fall, and what is left of them."""
        children = children.double()
        running = running_sums(children, self._parallel)
        # The sum above rounded differently, so the residual may reach the end.
        residual = torch.minimum(residual, running[:, -1] * _ALMOST_ONE).unsqueeze(1)
        child = torch.searchsorted(running, residual, right=True)
        if self._parallel:
            child = child.clamp_(max=FAN_OUT - 1)
        left = residual - _before(running).gather(1, child)
        return torch.add(child.squeeze(1), parent, alpha=FAN_OUT), left.squeeze(1)


class LeastWeights:
    """Least weight of each 64 entries that count.

    Args:
        num_leaves: number of entries, a multiple of 64.
        device: where the weights live.
    """

    def __init__(self, num_leaves: int, device: torch.device | None) -> None:
        self.by_64 = torch.zeros(num_leaves // 64, device=device)

    def set_slice(self, start: int, weights: Tensor, excluded: Tensor) -> None:
        """Take consecutive entries.

        Args:
            start: the first entry, a multiple of 64.
            weights: ``[n]`` float32; n is a multiple of 64.
            excluded: ``[n]`` float32, 1 for entries that do not count, else 0; overwritten.
        """
        first = start // 64
        out = self.by_64[first : first + weights.numel() // 64]
        torch.amin(self._kept(weights, excluded).view(-1, 64), 1, out=out)

    def set_rows(self, row: Tensor, weights: Tensor, excluded: Tensor) -> None:
        """Take all entries of some rows of 64: ``[n]`` int64, and twice ``[n, 64]`` float32."""
        self.by_64.index_copy_(0, row, self._kept(weights, excluded).amin(1))

    @staticmethod
    def _kept(weights: Tensor, excluded: Tensor) -> Tensor:
        return torch.maximum(weights, excluded.mul_(torch.finfo(torch.float32).max))

    @property
    def least(self) -> Tensor:
        """The least of all, 0-dimensional float32."""
        return self.by_64.amin()


def running_sums(x: Tensor, parallel: bool) -> Tensor:
    """Return inclusive running sums that never fall, and stay level where ``x`` is 0.

    Args:
        x: ``[..., n]``, float64, at least 0.
        parallel: build them by doubling, in the same order on each run: ``cumsum`` of a GPU
            promises none. Otherwise one after the other.
    """
    if not parallel:
        return x.cumsum(-1)
    total, shift = x, 1
    while shift < x.shape[-1]:
        total = torch.cat([total[..., :shift], total[..., shift:] + total[..., :-shift]], -1)
        shift *= 2
    # Neighbours were added in different orders, so rounding can make the sums fall.
    return (total * (x > 0)).cummax(-1).values


def _before(running: Tensor) -> Tensor:
    """Turn inclusive running sums into those before each entry."""
    return torch.nn.functional.pad(running[..., :-1], (1, 0))

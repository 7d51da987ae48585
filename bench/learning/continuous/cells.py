"""Which cell of the state space each stored step leads into, kept up rollout by rollout."""

from __future__ import annotations

import torch
from torch import Tensor


class Cells:
    """Numbers the cells that states fall into, and counts them.

    Adding rows costs time in their number, not in that of all rows so far.

    Args:
        shift: subtracted from states, ``[D]``.
        scale: what the result is divided by, ``[D]``.
        cell: edge of a cell, in units of ``scale``.
    """

    def __init__(self, shift: Tensor, scale: Tensor, cell: float) -> None:
        self.shift, self.unit = shift, scale * cell
        self.count = torch.zeros(0, dtype=torch.int64)
        self._numbers: dict[tuple[int, ...], int] = {}
        self._of_row: list[Tensor] = []

    def add(self, state: Tensor) -> Tensor:
        """Number the cells of new rows ``[n, D]``, count them and return the numbers ``[n]``."""
        cells = ((state - self.shift) / self.unit).floor().long()
        distinct, which, more = cells.unique(dim=0, return_inverse=True, return_counts=True)
        names = map(tuple, distinct.tolist())
        known = [self._numbers.setdefault(name, len(self._numbers)) for name in names]
        number = torch.tensor(known)
        new = torch.zeros(len(self._numbers) - len(self.count), dtype=torch.int64)
        self.count = torch.cat([self.count, new]).index_add(0, number, more)
        self._of_row.append(number[which])
        return number[which]

    @property
    def of_row(self) -> Tensor:
        """The number of each row's cell, ``[N]``."""
        if len(self._of_row) > 1:
            self._of_row = [torch.cat(self._of_row)]
        return self._of_row[0]

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Draw rows, each cell as often as any other, ``[number]``."""
        of_row = self.of_row
        upto = (1 / self.count.double())[of_row].cumsum(0)
        place = torch.rand(number, generator=generator, dtype=torch.float64) * upto[-1]
        return torch.searchsorted(upto, place).clamp_max(len(of_row) - 1)

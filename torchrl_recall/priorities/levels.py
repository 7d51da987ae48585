"""Values of stored transitions and exact draws by them, in plain torch operations on any device.

`weights.py` says what the modes mean; `scales.py` and `ranks.py` turn values into weights,
`sums.py` weights into draws. `native.py` does the same by the C library.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchrl_recall.priorities.late import LateNumber
from torchrl_recall.priorities.sums import BLOCK
from torchrl_recall.priorities.table import WeightTable
from torchrl_recall.priorities.weights import Parameters, nothing_to_draw


class TorchPriorities:
    """Values of N entries, and exact draws by them.

    Writes note what they changed. The next draw brings the weights up to date: along the paths of
    what changed, or all of them where what they are relative to has changed too (the threshold of
    ``"top"``, the ranks, the coarse scale of ``"soft"`` and ``"per"``). Either way the same bits
    result.

    On a GPU nothing waits for the device; hence every draw after a change rebuilds all, and what
    depends on the data is noticed in a later call: `num_refused`, and that nothing can be drawn.

    Beside the storage it keeps 8.6 bytes for each entry (float32 values), in the mode ``"rank"``
    12.6; with `uniform_share` or ``beta`` 0.1 more each. A rebuild of ``"rank"`` takes up to 60
    bytes more for each entry, as `torch.sort` returns int64 indices and ties need their positions;
    one of ``"top"`` on a GPU 12, also by a sort.

    Args:
        capacity: number of entries.
        dtype: of the values, ``torch.float32`` or ``torch.float64``.
        device: where they live. None: the CPU.

    Examples:
        >>> priorities = TorchPriorities(4, torch.float32, None)
        >>> priorities.write(torch.tensor([0, 2, 3]), torch.tensor([1.0, 5.0, 5.0]))
        True
        >>> parameters = Parameters("top", top=0.5)
        >>> priorities.weights(4, parameters)
        tensor([0., 0., 1., 1.], dtype=torch.float64)
        >>> uniform = torch.tensor([0.1, 0.6], dtype=torch.float64)
        >>> priorities.draw(uniform, 4, parameters, 0.0)
        (tensor([2, 3]), tensor([1., 1.]))
    """

    def __init__(
        self,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | None,
        *,
        _waits: bool | None = None,
    ) -> None:
        self.capacity = capacity
        # Whether the host may look at the data; tests take that away on the CPU.
        self._waits = (
            torch.empty(0, device=device).device.type == "cpu" if _waits is None else _waits
        )
        self._refused = 0
        self._late_refused = LateNumber(device) if not self._waits else None
        self._late_total = LateNumber(device) if not self._waits else None
        self._allocate(torch.full((0,), -math.inf, dtype=dtype, device=device), capacity)

    def _allocate(self, values: Tensor, capacity: int) -> None:
        # One entry more than needed: where indices that are skipped go.
        length = -(-(capacity + 1) // BLOCK) * BLOCK
        longer = values.new_full((length,), -math.inf)
        longer[: values.numel()] = values
        # Both or none, where memory runs out.
        self._values, self._table = longer, WeightTable(longer, self._waits)
        self._forget()

    def _forget(self) -> None:
        """Note that any value may have changed."""
        self._all_changed = True
        self._changed: list[Tensor] = []
        self._num_changed, self._highest = 0, -1

    @property
    def values(self) -> Tensor:
        """A view to read, ``[capacity]``; ``-inf``: no value yet, NaN: never drawn."""
        return self._values[: self.capacity]

    @property
    def num_refused(self) -> int:
        """How many non-finite values were refused so far; on a GPU, as far as is known."""
        return self._refused if self._late_refused is None else int(self._late_refused.last() or 0)

    def grow(self, capacity: int) -> None:
        """Make room for more entries, which have no value yet.

        Args:
            capacity: the new number of entries.

        Raises:
            ValueError: if it is less than before.
        """
        if capacity < self.capacity:
            raise ValueError(f"capacity must be at least {self.capacity}, got {capacity}")
        if capacity >= self._values.numel():
            self._allocate(self.values, capacity)
        self.capacity = capacity

    def restore(self, values: Tensor) -> None:
        """Start anew from the values of the first entries; ``-inf``: none yet, NaN: never drawn."""
        self._allocate(values.to(self._values), self.capacity)

    def write(self, index: Tensor, values: Tensor, none: float = math.nan) -> bool:
        """Set the values of some entries.

        Args:
            index: ``[n]`` int64, below the capacity. Negative ones are skipped; if one comes
                several times, any of its values may win.
            values: ``n`` in any shape, or ``[1]`` for one value for all, floating; a non-finite
                one bars its entry from being drawn.
            none: values equal to this number are skipped.

        Returns:
            False, and nothing is written, if several values are for one and the same index: who
            calls may know better how to make one of them. On a GPU this is not looked at.

        Raises:
            IndexError: if an index is not below the capacity. Nothing is written then. On a GPU it
                is torch that complains.
        """
        if not index.numel():
            return True
        values = values.detach().reshape(-1)
        several = values.numel() > 1
        if not math.isnan(none):
            index = index.masked_fill(values == none, -1)
        values = values.to(self._values)
        if not several:
            values = values.expand(index.numel())
        if not self._waits:
            values = self._refuse(values, index >= 0)
            self._values.index_copy_(0, self._skip_negative(index), values)
            self._values[-1:] = -math.inf
            self._forget()
            return True
        lowest, highest = (int(x.item()) for x in index.aminmax())
        if several and lowest == highest >= 0:
            return False
        index, keep = self._note(index, lowest, highest)
        values = values if keep is None else values[keep]
        # A sum is the cheapest look; it may overflow, but never hides what is not finite.
        if not math.isfinite(values.sum().item()):
            values = self._refuse(values, None)
        self._values.index_copy_(0, index, values)
        return True

    def erase(self, index: Tensor) -> None:
        """Take back the values of some entries: they have no value yet.

        Args:
            index: as for `write`.
        """
        if not index.numel():
            return
        if self._waits:
            index = self._note(index, *(int(x.item()) for x in index.aminmax()))[0]
        else:
            index = self._skip_negative(index)
            self._forget()
        self._values.index_fill_(0, index, -math.inf)

    def refresh(self, values: Tensor, none: float = math.nan) -> None:
        """Set the first values, all at once.

        Args:
            values: ``[n]``, floating, for the entries from 0 to n - 1, n at most the capacity.
            none: stands for no value yet.

        Raises:
            IndexError: if there are more values than entries. Nothing is written then.
        """
        self._check_below(values.numel() - 1)
        target = self.values[: values.numel()]
        self._forget()
        self._table.extremes.clear()
        length = self._table.slice
        for start in range(0, values.numel(), length):
            part, out = values[start : start + length], target[start : start + length]
            out.copy_(part)
            if self._waits:  # masks take several times as long as the copy; mostly there is no need
                extremes = self._table.extremes.of(start, out)
                if extremes.all_finite and (math.isnan(none) or extremes.lowest > none):
                    continue
                self._table.extremes.clear()
            out.copy_(self._refuse(out, None))
            if not math.isnan(none):
                out.masked_fill_(part == none, -math.inf)

    def _check_below(self, highest: int) -> None:
        if highest >= self.capacity:
            raise IndexError(f"index must be below {self.capacity}, got {highest}")

    def _refuse(self, values: Tensor, counted: Tensor | None) -> Tensor:
        """Count what is not finite, among what is counted, and put NaN in its place."""
        bad = ~values.isfinite()
        count = (bad if counted is None else bad & counted).sum()
        if self._late_refused is None:
            self._refused += int(count)
        else:
            self._late_refused.add(count)
        return values.masked_fill(bad, math.nan)

    def _skip_negative(self, index: Tensor) -> Tensor:
        return index.where(index >= 0, self._values.numel() - 1)

    def _note(self, index: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor | None]:
        """Note which entries change; return them without negative ones, and which those are."""
        self._check_below(highest)
        self._table.extremes.clear()
        keep = None
        if lowest < 0:
            keep = index >= 0
            index = index[keep]
        self._highest = max(self._highest, highest)
        self._num_changed += index.numel()
        if self._all_changed or self._num_changed > self._values.numel() // 16:
            self._forget()  # a rebuild is cheaper than so many paths
        elif index.numel():
            # The caller may write into its index later on.
            self._changed.append(index.clone() if keep is None else index)
        return index, keep

    def weights(self, size: int, parameters: Parameters) -> Tensor:
        """Compute what draws are proportional to.

        Args:
            size: number of stored entries.
            parameters: how values become probabilities.

        Returns:
            ``[size]``, float64.
        """
        self._settle(size, parameters)
        self._table.prepare(parameters.uniform_share, 0.0)
        return self._table.mixed(parameters.uniform_share)

    def draw(
        self, uniform: Tensor, size: int, parameters: Parameters, beta: float
    ) -> tuple[Tensor, Tensor]:
        """Draw entries, with replacement.

        Args:
            uniform: ``[B]``, float64, in [0, 1), on the device of the values.
            size: number of stored entries; those beyond are never drawn.
            parameters: how values become probabilities.
            beta: exponent of the importance weights; 0 makes them 1.

        Returns:
            The entries, ``[B]`` int64 in [0, size), and ``(w / min w)^-beta``, ``[B]`` float32,
            where the minimum is taken over positive weights.

        Raises:
            RuntimeError: if all entries have non-finite values. On a GPU a later call does it.
        """
        self._settle(size, parameters)
        share = parameters.uniform_share
        self._table.prepare(share, beta)
        entry = self._table.draw(uniform, share)
        return entry, self._table.importance(entry, share, beta)

    def _settle(self, size: int, parameters: Parameters) -> None:
        """Bring the table up to date with the values, the size and the parameters."""
        if size >= self._values.numel():
            self._allocate(self.values, size)
        table, core = self._table, parameters._replace(uniform_share=0.0)
        if self._late_total is not None and self._late_total.last() == 0:
            self._late_total.reset()
            self._all_changed = True  # so that a later draw says so too
            raise nothing_to_draw(size)
        changed = self._all_changed or bool(self._changed) or size != table.size
        if not changed and core == table.parameters:
            return
        if self._all_changed or core != table.parameters or size < table.size:
            table.rebuild(size, core, same_values=not changed)
        elif not (self._waits and table.update(self._changed_below(size), size)):
            table.rebuild(size, core, same_values=False)
        self._forget()
        self._all_changed = False
        if self._late_total is not None:
            self._late_total.set(table.total)
        elif table.total.item() == 0:
            self._all_changed = True  # so that the next draw says so too
            raise nothing_to_draw(size)

    def _changed_below(self, size: int) -> Tensor:
        """The stored entries that were written to, and those that are new."""
        old = self._table.size
        changed = [*self._changed]
        if self._highest >= old:  # what is new comes below; what is not stored yet, later
            changed = [index[index < old] for index in changed]
        if size > old:
            changed.append(torch.arange(old, size))
        return torch.cat(changed) if len(changed) > 1 else changed[0]

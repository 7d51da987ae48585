"""The weights of stored entries under present values and parameters, kept for fast draws.

`levels.py` owns the values and says what changed; `scales.py` and `ranks.py` turn values into
weights, `sums.py` weights into draws.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchrl_recall.priorities import ranks, scales
from torchrl_recall.priorities.scales import Reference, SliceExtremes
from torchrl_recall.priorities.sums import FAN_OUT, LeastWeights, SumLevels
from torchrl_recall.priorities.weights import Parameters

# In the cache on the CPU, few kernels on a GPU.
_CPU_SLICE, _DEVICE_SLICE = 1 << 17, 1 << 22


class WeightTable:
    """Weights of entries and their sums.

    Args:
        values: ``[L]``, floating, L a multiple of 256: a buffer that the caller goes on to change.
        waits: whether the host may look at the data; False where that would wait for a GPU.
    """

    def __init__(self, values: Tensor, waits: bool) -> None:
        self.size, self.parameters = 0, Parameters()
        self.extremes = SliceExtremes()  # who changes the values clears them
        self.slice = _CPU_SLICE if waits else _DEVICE_SLICE
        self._values, self._waits = values, waits
        self._weights = torch.zeros(values.numel(), device=values.device)
        self._sums = SumLevels(values.numel(), values.device, parallel=not waits)
        self._counts: SumLevels | None = None  # of what may be drawn, for the uniform share
        self._least: LeastWeights | None = None  # for the importance weights
        self._order: Tensor | None = None
        self._reference = Reference()
        self._granule = (0.0, 0.0)
        self._witness: int | None = None  # an entry in the granule of the largest
        self._all_drawable = True

    @property
    def total(self) -> Tensor:
        """Sum of the weights, 0-dimensional; 0 only if nothing can be drawn."""
        return self._sums.total

    def rebuild(self, size: int, parameters: Parameters, same_values: bool) -> None:
        """Compute all weights anew.

        Args:
            size: number of stored entries.
            parameters: how values become probabilities; the uniform share is left to `draw`.
            same_values: whether size and values are those of the last call, so that their order is.
        """
        if size < self.size:
            self._weights[size : self.size] = 0.0
            self._sums.by_16[size // FAN_OUT : -(-self.size // FAN_OUT)] = 0
        self.size, self.parameters = size, parameters
        self._counts = self._least = self._witness = None
        if parameters.mode != "rank" or not same_values:
            self._order = None
        floor = self._floor()
        if parameters.mode == "rank":
            self._reference = Reference(floor)
            self._fill_by_rank()
        else:
            self._reference = self._new_reference(floor)
            for start, values, _ in self._slices():
                plain = self._waits and not isinstance(floor, Tensor) and floor == -math.inf
                plain = plain and self.extremes.of(start, values).all_finite
                self._fill(start, plain)
        self._sums.finish()

    def update(self, index: Tensor, size: int) -> bool:
        """Follow changes of few values.

        Args:
            index: ``[n]`` int64, entries below ``size`` whose values changed or that are new;
                duplicates allowed.
            size: number of stored entries, at least that of the last call.

        Returns:
            False if that takes a `rebuild`.
        """
        if not index.numel():  # all of it lies beyond the size
            return True
        mode = self.parameters.mode
        if mode == "rank" or (mode == "top" and (size > self.size or not self._all_drawable)):
            return False
        values = self._values.index_select(0, index)
        self.size = size
        finite = math.isfinite(values.sum().item())
        if not self._reference_stays(values, finite):
            return False
        values = torch.nn.functional.pad(values, (0, -index.numel() % scales.LANES))
        weights = torch.empty_like(values, dtype=torch.float32)
        plain = (
            finite and bool(self._reference.floor == -math.inf) and self._reference.valued is True
        )
        scales.fill_weights(weights, values, self.parameters, self._reference, plain)
        weights = weights[: index.numel()]
        if mode == "top" and not weights.equal(self._weights.index_select(0, index)):
            return False
        self._weights.index_copy_(0, index, weights)
        row = index >> 4
        self._sums.set_rows(row, self._weight_rows(row))
        if self._counts is not None:
            self._counts.set_rows(row, self._drawable_rows(row))
        if self._least is not None:
            row = index >> 6
            weights = self._weights.view(-1, 64).index_select(0, row)
            self._least.set_rows(
                row, weights, self._excluded(weights, self._drawable_rows(row, 64))
            )
        return True

    def prepare(self, share: float, beta: float) -> None:
        """Build what only some draws need: for a uniform share, for importance weights."""
        if (self._counts is not None) != (share > 0):
            self._counts = self._least = None
            if share > 0:
                self._counts = SumLevels(
                    self._values.numel(), self._values.device, torch.uint8, not self._waits
                )
                for start, drawable in self._drawable_slices():
                    self._counts.set_slice(start, drawable)
                self._counts.finish()
        if (self._least is not None) != (beta > 0):
            self._least = None
            if beta > 0:
                self._least = LeastWeights(self._values.numel(), self._values.device)
                for start, drawable in self._drawable_slices():
                    weights = self._weights[start : start + drawable.numel()]
                    self._least.set_slice(start, weights, self._excluded(weights, drawable))

    def mixed(self, share: float) -> Tensor:
        """Return what draws are proportional to, ``[size]`` float64."""
        weights = self._weights[: self.size].double()
        if self._counts is not None:
            drawable = self._values[: self.size] >= self._reference.floor
            weights *= (1 - share) / self._sums.total
            weights += drawable * self._even(share)
        return weights

    def _even(self, share: float) -> Tensor:
        """The uniform part of a probability; not rounded to 0, as the least of all divides."""
        assert self._counts is not None
        return (share / self._counts.total).clamp_(min=torch.finfo(torch.float64).tiny)

    def draw(self, uniform: Tensor, share: float) -> Tensor:
        """Draw entries, ``[B]`` int64, from uniform numbers ``[B]`` float64."""
        if self._counts is None:
            entry = self._sums.draw(uniform, self._weight_rows)
        elif share == 1:
            entry = self._counts.draw(uniform, self._drawable_rows)
        else:  # the same uniform number decides, and is stretched again
            by_count = self._counts.draw(uniform / share, self._drawable_rows)
            by_weight = ((uniform - share) / (1 - share)).clamp_(min=0.0)
            by_weight = self._sums.draw(by_weight, self._weight_rows)
            entry = by_count.where(uniform < share, by_weight)
        # If nothing can be drawn, which only a later call sees: any entry, but a stored one.
        return entry if self._waits else entry.clamp_(max=self.size - 1)

    def importance(self, entry: Tensor, share: float, beta: float) -> Tensor:
        """Compute ``(w / min w)^-beta`` of drawn entries, ``[B]`` float32; the min is positive."""
        if self._least is None:
            return torch.ones_like(entry, dtype=torch.float32)
        weight, least = self._weights.index_select(0, entry).double(), self._least.least.double()
        if self._counts is not None:
            scale, offset = (1 - share) / self._sums.total, self._even(share)
            weight, least = weight * scale + offset, least * scale + offset
        return (weight / least).pow_(-beta).float()

    def _slices(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First entry, values and weights of slices that cover the stored entries."""
        for start in range(0, self.size, self.slice):
            stop = min(start + self.slice, self.size)
            yield start, self._values[start:stop], self._weights[start:stop]

    def _drawable_slices(self) -> Iterator[tuple[int, Tensor]]:
        """First entry, and 1.0 for what may be drawn, of slices that cover the whole buffer."""
        for start in range(0, self._values.numel(), self.slice):
            values = self._values[start : start + self.slice]
            drawable = torch.empty_like(values, dtype=torch.float32)
            torch.ge(values, self._reference.floor, out=drawable)
            if start + values.numel() > self.size:
                drawable[max(0, self.size - start) :] = 0.0
            yield start, drawable

    def _weight_rows(self, row: Tensor) -> Tensor:
        return self._weights.view(-1, FAN_OUT).index_select(0, row)

    def _drawable_rows(self, row: Tensor, width: int = FAN_OUT) -> Tensor:
        """Whether the entries of some rows may be drawn, ``[n, width]`` bool."""
        position = torch.arange(width, device=row.device) + row.unsqueeze(1) * width
        values = self._values.view(-1, width).index_select(0, row)
        return (values >= self._reference.floor) & (position < self.size)

    def _excluded(self, weights: Tensor, drawable: Tensor) -> Tensor:
        """1.0 for entries that cannot be drawn, whose weights the least leaves out."""
        return (1 - drawable.float()) if self._counts is not None else (weights == 0).float()

    def _min_value(self) -> float | None:
        """The parameter, rounded as the values are; "no value yet" is below every number."""
        least, dtype = self.parameters.min_value, self._values.dtype
        if least is None:
            return None
        # Not through a tensor: the host's numbers need not go near a device.
        rounded = ctypes.c_float(least).value if dtype == torch.float32 else least
        return max(rounded, torch.finfo(dtype).min)

    def _floor(self) -> float | Tensor:
        """The least value to draw, `-inf` if none reaches the given one."""
        least = self._min_value()
        if least is None:
            return -math.inf
        largest = self._largest(False, -math.inf)
        if not isinstance(largest, Tensor):
            return least if largest >= least else -math.inf
        none = torch.full_like(largest, -math.inf)
        return torch.where(largest >= least, torch.full_like(largest, least), none)

    def _largest(self, magnitude: bool, floor: float | Tensor) -> float | Tensor:
        """Largest value or magnitude of all, a number where the host may look."""
        if not self._waits:
            found = [scales.largest_key(v, magnitude, floor, False) for _, v, _ in self._slices()]
            return torch.stack(found).amax()
        assert isinstance(floor, float)
        largest = -math.inf
        for start, values, _ in self._slices():
            key = self.extremes.of(start, values).largest_key(magnitude, floor)
            if key is None:
                key = float(scales.largest_key(values, magnitude, floor, True).item())
            largest = max(largest, key)
        return largest

    def _new_reference(self, floor: float | Tensor) -> Reference:
        parameters = self.parameters
        if parameters.mode == "top":
            values = self._values[: self.size]
            if not self._waits:
                threshold, share, _ = ranks.device_top_threshold(values, parameters.top)
                return Reference(floor, threshold, share)
            no_nan = not any(self.extremes.of(at, v).has_nan for at, v, _ in self._slices())
            found = ranks.top_threshold(values, parameters.top, no_nan=no_nan)
            threshold, share, num_drawable = found
            self._all_drawable = num_drawable == self.size
            return Reference(floor, threshold, share)
        largest = self._largest(parameters.mode == "per", floor)
        if not isinstance(largest, Tensor):
            self._granule, center = self._granule_of(largest)
            return Reference(floor, center, valued=largest > -math.inf)
        if parameters.mode == "per":
            return Reference(floor, largest.double() + parameters.eps)
        return Reference(floor, largest, valued=largest > -math.inf)

    def _granule_of(self, largest: float) -> tuple[tuple[float, float], float]:
        if largest == -math.inf:
            return (largest, 0.0), largest
        if self.parameters.mode == "per":
            return scales.per_scale(largest + self.parameters.eps, self.parameters.alpha)
        return scales.soft_center(largest, self.parameters.temperature)

    def _reference_stays(self, values: Tensor, finite: bool) -> bool:
        """Whether the reference of all is the same after some entries took on these values."""
        least, floor = self._min_value(), self._reference.floor
        if least is not None and floor == -math.inf and bool((values >= least).any()):
            return False
        if self.parameters.mode == "top":  # it stays as long as no entry changes sides
            return finite or not bool(values.isnan().any())
        magnitude = self.parameters.mode == "per"
        largest = scales.largest_key(values, magnitude, floor, True).item()
        if self._granule_of(largest)[0] > self._granule:
            return False
        if self._witness is not None and self._is_witness(self._witness):
            return True
        keys = [scales.largest_key(v, magnitude, floor, True) for _, v, _ in self._slices()]
        start = int(torch.stack(keys).argmax()) * self.slice
        part = self._values[start : min(start + self.slice, self.size)]
        self._witness = start + scales.largest_entry(part, magnitude, floor)
        return self._is_witness(self._witness)

    def _is_witness(self, entry: int) -> bool:
        """Whether the value of an entry lies in the granule of the largest."""
        value = self._values[entry].item()
        if math.isnan(value) or value < self._reference.floor:
            return False
        if self.parameters.mode == "per":
            value = 0.0 if value == -math.inf else abs(value)
        return self._granule_of(value)[0] == self._granule

    def _fill(self, start: int, plain: bool) -> None:
        """Weigh the entries of a slice, and sum them while they are in the cache."""
        whole = -(-self.size // scales.LANES) * scales.LANES
        stop = min(start + self.slice, whole)
        weights = self._weights[start:stop]
        values = self._values[start:stop]
        scales.fill_weights(weights, values, self.parameters, self._reference, plain)
        if stop > self.size:
            weights[self.size - start :] = 0.0
        self._sums.set_slice(start, weights)

    def _fill_by_rank(self) -> None:
        values = self._values[: self.size]
        if self._order is None:
            self._order = ranks.value_order(values)
        weights = ranks.rank_weights(values, self._order, self.parameters.alpha, not self._waits)
        for order, part in zip(
            self._order.split(self.slice), weights.split(self.slice), strict=True
        ):
            self._weights.index_copy_(0, order.long(), part.float())
        if self.parameters.min_value is not None:
            for _, part, out in self._slices():
                out.mul_(part >= self._reference.floor)
        for start in range(0, self.size, self.slice):
            stop = min(start + self.slice, -(-self.size // FAN_OUT) * FAN_OUT)
            self._sums.set_slice(start, self._weights[start:stop])

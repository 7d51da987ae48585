"""From values to weights of single precision, relative to a reference that all values share.

`levels.py` asks for the reference, then for weights slice by slice. The reference is a function of
the present values only, but a coarse one: most writes leave it, and the other weights, as they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_recall.priorities.weights import Parameters

# Weights may exceed 1 by this power of two; 2^27 of them still sum to a finite float32.
_HEADROOM = 64
# The vectorised exp2 and log2 differ in the last bit from those for a remainder of few elements,
# and threads leave remainders too. In pieces of whole vectors, too short for threads, a value has
# the same bits wherever it is.
LANES = 64
_PIECE = 1 << 15


class Reference(NamedTuple):
    """What weights are relative to: numbers, or 0-dimensional tensors where a GPU has them."""

    floor: float | Tensor = -math.inf  # entries below it are not drawn
    center: float | Tensor = 0.0  # value, magnitude or threshold that stands for weight 1
    share: float | Tensor = 1.0  # weight of entries that equal the threshold
    valued: bool | Tensor = True  # whether anything has a value


class Extremes(NamedTuple):
    """The least and the largest of some values; both NaN if one of these is."""

    lowest: float
    highest: float

    @property
    def all_finite(self) -> bool:
        """Whether every value is a finite number."""
        return self.lowest > -math.inf and self.highest < math.inf

    @property
    def has_nan(self) -> bool:
        """Whether a value is NaN."""
        return math.isnan(self.lowest)

    def largest_key(self, magnitude: bool, floor: float) -> float | None:
        """What `largest_key` returns, or None where these two do not tell."""
        if not self.all_finite or (magnitude and self.lowest < floor):
            return None
        return max(-self.lowest, self.highest) if magnitude else self.highest


class SliceExtremes:
    """Extremes of slices of values, each looked for once, until values change.

    Examples:
        >>> extremes, values = SliceExtremes(), torch.tensor([3.0, -1.0, 2.0])
        >>> extremes.of(1, values[1:])
        Extremes(lowest=-1.0, highest=2.0)
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Extremes] = {}

    def clear(self) -> None:
        """Forget all, as values have changed."""
        self._known.clear()

    def of(self, start: int, values: Tensor) -> Extremes:
        """Return those of a slice, on the CPU.

        Args:
            start: where it begins.
            values: ``[n]``, what is there, floating.
        """
        place = (start, values.numel())
        if place not in self._known:
            self._known[place] = Extremes(*(float(x.item()) for x in values.aminmax()))
        return self._known[place]


def soft_center(largest: float, temperature: float) -> tuple[tuple[float, float], float]:
    """Return the granule of the largest value, which never falls when it rises, and its center."""
    granules = largest / (_HEADROOM * temperature)
    if abs(granules) <= 2**16:  # else too coarse for float32
        floor = float(math.floor(granules))
        return (floor, 0.0), floor * _HEADROOM * temperature
    return (granules, largest), largest


def per_scale(largest: float, alpha: float) -> tuple[tuple[float, float], float]:
    """Return the granule of the largest priority, as `soft_center` does, and its scale."""
    if alpha > _HEADROOM:
        return (largest, 0.0), largest
    bits = _HEADROOM if alpha <= 1 else int(_HEADROOM / alpha)
    exponent = (math.frexp(largest)[1] - 1) // bits * bits
    return (float(exponent), 0.0), 2.0**exponent


def largest_key(values: Tensor, magnitude: bool, floor: float | Tensor, waits: bool) -> Tensor:
    """Return the largest value, or the largest magnitude of those that are at least ``floor``.

    Args:
        values: ``[n]``, floating; NaN does not count, and "no value" has the magnitude 0.
        magnitude: which of the two.
        floor: may be ``-inf``; of magnitudes only.
        waits: whether the host may look at the data.

    Returns:
        0-dimensional, of the dtype of ``values``; ``-inf`` if there is none.
    """
    if waits and not (magnitude and floor != -math.inf):  # mostly all are finite
        largest = (values.abs() if magnitude else values).amax()
        if math.isfinite(largest.item()):
            return largest
    return _keys(values, magnitude, floor).amax()


def largest_entry(values: Tensor, magnitude: bool, floor: float | Tensor) -> int:
    """Return which value is the one that `largest_key` returns."""
    return int(_keys(values, magnitude, floor).argmax())


def _keys(values: Tensor, magnitude: bool, floor: float | Tensor) -> Tensor:
    if not magnitude:
        return values.nan_to_num(nan=-math.inf, neginf=-math.inf)
    keys = values.abs().nan_to_num_(nan=0.0, posinf=0.0)
    if isinstance(floor, float) and floor == -math.inf:
        return keys
    return keys.where(values >= floor, -math.inf)


def fill_weights(
    out: Tensor, values: Tensor, parameters: Parameters, reference: Reference, plain: bool
) -> None:
    """Compute the weights of the modes ``"top"``, ``"soft"`` and ``"per"``.

    Args:
        out: ``[n]``, float32; n is a multiple of `LANES`.
        values: ``[n]``, floating.
        parameters: of the mode.
        reference: of all values.
        plain: whether all values are known to be finite and at least the floor.
    """
    if parameters.mode == "top":
        _fill_top(out, values, reference)
        if plain:
            return
    elif parameters.mode == "soft":
        _fill_soft(out, values, parameters.temperature, reference)
        if plain:
            return
        out.nan_to_num_(nan=0.0)
        if reference.valued is not True:
            ones = torch.ones_like(out)
            out.copy_(ones if reference.valued is False else out.where(reference.valued, ones))
    else:
        _fill_per(out, values, parameters, reference, plain)
        if plain:
            return
    out.mul_(torch.ge(values, reference.floor, out=torch.empty_like(out)))


def _fill_top(out: Tensor, values: Tensor, reference: Reference) -> None:
    if isinstance(reference.share, float) and reference.share == 1.0:
        torch.ge(values, reference.center, out=out)
        return
    torch.eq(values, reference.center, out=out)
    # Into floats: masks take several times as long.
    out.mul_(reference.share).add_(torch.gt(values, reference.center, out=torch.empty_like(out)))


def _fill_soft(out: Tensor, values: Tensor, temperature: float, reference: Reference) -> None:
    precise = out if values.dtype == torch.float32 else torch.empty_like(values)
    torch.sub(values, reference.center, out=precise)
    # exp2 is several times faster than exp; the bounds keep 0 * inf away.
    factor = math.log2(math.e) / temperature
    most = torch.finfo(values.dtype).max
    factor = min(max(factor, 1 / most), most)
    for piece in precise.split(_PIECE):
        piece.mul_(factor).exp2_()
    if precise is not out:
        out.copy_(precise)


def _fill_per(
    out: Tensor, values: Tensor, parameters: Parameters, reference: Reference, plain: bool
) -> None:
    alpha, eps = parameters.alpha, parameters.eps
    if alpha == 0:
        out.fill_(1.0)
        return
    narrow = values.dtype == torch.float32 and 1e-18 < eps < 1e18 and alpha <= 16
    precise = out if narrow else torch.empty_like(values, dtype=torch.float64)
    if narrow:
        torch.abs(values, out=out)
    else:
        precise.copy_(values).abs_()
    if not plain:  # no value counts as 0; NaN is masked later
        precise.nan_to_num_(nan=0.0, posinf=0.0)
    precise.add_(eps).div_(reference.center)
    if alpha != 1:  # pow takes longer
        for piece in precise.split(_PIECE):
            piece.log2_().mul_(alpha).exp2_()
    if precise is not out:
        out.copy_(precise)

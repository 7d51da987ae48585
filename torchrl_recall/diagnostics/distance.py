"""Whether traces stay where data are: a model knows nothing of states that it never saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_recall.checks import check_at_least_one, check_finite, check_real

# Distances held at once: 32 MiB in float64.
PAIRS_AT_ONCE = 4_000_000


class DistanceToData(NamedTuple):
    """Nearest-neighbour distances of traces to real states, beside those of the real states.

    Examples:
        >>> import torch
        >>> real = torch.linspace(0, 1, 101).unsqueeze(-1)
        >>> found = distance_to_data(torch.tensor([[[0.5], [2.0]]]), real)
        >>> found.scalars()["outside"]
        0.5
    """

    distance: Tensor
    """Of each step to the nearest real state, ``[*B, T]``, in scales; NaN where masked."""
    threshold: Tensor
    """The data's own quantile of that distance, each state left out of its own neighbours."""
    outside: Tensor
    """Share of kept steps that are further than that; ``1 - quantile`` if traces were data."""
    outside_by_step: Tensor
    """The same by step, ``[T]``, oldest first; NaN where none is kept."""
    data_distance: Tensor
    """Of each real state to the nearest other one, ``[M]``."""

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {
            "outside": float(self.outside),
            "threshold": float(self.threshold),
            "median_distance": float(self.distance.nanmedian()),
        }


class OutsideData(NamedTuple):
    """Share of a trace's states that are outside the data.

    Examples:
        >>> import torch
        >>> visits = torch.tensor([5, 1, 0])
        >>> never_visited(torch.tensor([[2, 0], [1, 0]]), visits).scalars()
        {'share': 0.25}
    """

    share: Tensor
    """Over kept steps; NaN if there is none."""
    by_step: Tensor
    """By step, ``[T]``, oldest first; NaN where none is kept."""

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {"share": float(self.share)}


@torch.no_grad()
def distance_to_data(
    states: Tensor,
    reference: Tensor,
    *,
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    quantile: float = 0.95,
    num_neighbours: int = 1,
) -> DistanceToData:
    """Measure how far traces are from real states, in units of what is usual among these.

    Args:
        states (Tensor): ``[*B, T, D]`` states of traces, oldest step first.
        reference (Tensor): ``[M, D]`` real states; time and the first quantile grow with M², so
            pass some thousands of a large buffer.

    Keyword Args:
        scale (Tensor, optional): ``[D]`` what a dimension is divided by; defaults to the standard
            deviation of ``reference`` (1 where that is 0).
        mask (Tensor, optional): ``[*B, T]`` bool, True = keep.
        quantile (float): of the data's own distances, beyond which a step is outside.
        num_neighbours (int): which neighbour's distance to take; more is steadier.

    Returns:
        DistanceToData: distances, threshold and shares.

    Raises:
        ValueError: wrong shapes, too few real states, non-finite values or no kept step.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import distance_to_data
        >>> real = torch.linspace(0, 1, 101).unsqueeze(-1)
        >>> found = distance_to_data(torch.tensor([[[0.505], [0.5], [2.0]]]), real)
        >>> found.outside_by_step.tolist()
        [0.0, 0.0, 1.0]
    """
    num_neighbours = check_at_least_one("num_neighbours", num_neighbours)
    quantile = check_real("quantile", quantile, 0.0, 1.0)
    if reference.ndim != 2 or len(reference) <= num_neighbours:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}, expected [M, D] with more than "
            f"{num_neighbours} rows."
        )
    if states.ndim < 2 or states.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"states has shape {tuple(states.shape)}, expected [*B, T, {reference.shape[-1]}]."
        )
    mask = _mask_like(mask, states[..., 0])
    if scale is None:
        scale = reference.std(0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    elif scale.shape != reference.shape[1:] or not bool((scale > 0).all()):
        raise ValueError(f"scale must be {reference.shape[-1]} positive numbers, got {scale}.")
    check_finite("reference", reference)
    check_finite("states", states[mask])
    reference = reference / scale
    found = nearest_distance(states[mask] / scale, reference, num_neighbours)
    own = nearest_distance(reference, reference, num_neighbours, leave_one_out=True)
    threshold = own.quantile(quantile)
    distance = torch.full_like(mask, torch.nan, dtype=found.dtype)
    distance[mask] = found
    outside = distance > threshold
    return DistanceToData(
        distance, threshold, (found > threshold).float().mean(), _by_step(outside, mask), own
    )


def nearest_distance(
    states: Tensor, reference: Tensor, num_neighbours: int = 1, *, leave_one_out: bool = False
) -> Tensor:
    """Return the distance of each state to its nearest (or n-th nearest) real one.

    Args:
        states (Tensor): ``[N, D]``.
        reference (Tensor): ``[M, D]``, in the same units.
        num_neighbours (int): which neighbour.
        leave_one_out (bool): ``states`` is ``reference``, and no row is its own neighbour.

    Returns:
        Tensor: ``[N]``.
    """
    parts, rows = [], max(1, PAIRS_AT_ONCE // len(reference))
    for start in range(0, len(states), rows):
        part = states[start : start + rows]
        # Not by a product of matrices, which cancels where distances are small.
        pairs = torch.cdist(part, reference, compute_mode="donot_use_mm_for_euclid_dist")
        if leave_one_out:
            pairs.diagonal(start).fill_(torch.inf)
        parts.append(pairs.kthvalue(num_neighbours, -1).values)
    return torch.cat(parts) if parts else states.new_zeros(0)


@torch.no_grad()
def never_visited(states: Tensor, visits: Tensor, mask: Tensor | None = None) -> OutsideData:
    """Count steps of traces in discrete states that data never visited.

    Args:
        states (Tensor): ``[*B, T]`` int64 indices of states, oldest step first, as
            ``model.observation.joint_index`` gives them.
        visits (Tensor): ``[S]`` how often each state is in the data, or whether it is.
        mask (Tensor, optional): ``[*B, T]`` bool, True = keep.

    Returns:
        OutsideData: the share, overall and by step.

    Raises:
        ValueError: an index outside ``visits``, wrong shapes, or no kept step.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import never_visited
        >>> never_visited(torch.tensor([[2, 0], [1, 0]]), torch.tensor([5, 1, 0])).by_step.tolist()
        [0.5, 0.0]
    """
    mask = _mask_like(mask, states)
    kept = states[mask]
    if bool(((kept < 0) | (kept >= len(visits))).any()):
        raise ValueError(
            f"states must lie in 0 to {len(visits) - 1}, got {kept.min()} to {kept.max()}."
        )
    new = torch.zeros_like(mask)
    new[mask] = visits[kept] == 0
    return OutsideData(new[mask].float().mean(), _by_step(new, mask))


@torch.no_grad()
def outside_support(
    states: Tensor, support: Callable[[Tensor], Tensor], mask: Tensor | None = None
) -> OutsideData:
    """Count steps of traces outside a support, for example the one that walks are kept in.

    Args:
        states (Tensor): ``[*B, T, D]`` states of traces, oldest step first.
        support (callable): states to ``[*B, T]`` bool, True = inside:
            `DataSupport`, `CellSupport`.
        mask (Tensor, optional): ``[*B, T]`` bool, True = keep.

    Returns:
        OutsideData: the share, overall and by step.

    Raises:
        ValueError: wrong shapes, or no kept step.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import outside_support
        >>> states = torch.tensor([[[0.1], [0.2]], [[7.0], [0.3]]])
        >>> outside_support(states, lambda s: s[..., 0] < 1).by_step.tolist()
        [0.5, 0.0]
    """
    inside = support(states)
    if inside.shape != states.shape[:-1] or inside.dtype != torch.bool:
        raise ValueError(
            f"support returned {inside.dtype} of shape {tuple(inside.shape)}, expected bool "
            f"{tuple(states.shape[:-1])}."
        )
    mask = _mask_like(mask, states[..., 0])
    return OutsideData((~inside)[mask].float().mean(), _by_step(~inside, mask))


def _mask_like(mask: Tensor | None, steps: Tensor) -> Tensor:
    if mask is None:
        mask = torch.ones_like(steps, dtype=torch.bool)
    if mask.shape != steps.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}, expected bool "
            f"{tuple(steps.shape)}."
        )
    if not bool(mask.any()):
        raise ValueError("mask keeps no step, expected some.")
    return mask


def _by_step(what: Tensor, mask: Tensor) -> Tensor:
    what, mask = (x.reshape(-1, x.shape[-1]) for x in (what & mask, mask))
    return what.sum(0) / mask.sum(0)

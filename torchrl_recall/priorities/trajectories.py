"""Whole trajectories among stored entries: which there are, their values, a step of a drawn one.

`ValuePrioritizedSampler` draws a trajectory by its value as `weights.py` says, then a step of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("max", "min", "mean", "median", "first")


class TrajectoryGroups(NamedTuple):
    """Entries grouped by trajectory; trajectories are numbered by ascending id.

    Build it with `of`: O(n) and a sort of the runs of equal ids, of which there are few where
    trajectories lie in one piece.

    Examples:
        >>> groups = TrajectoryGroups.of(torch.tensor([7, 7, 3, 7, 3]))
        >>> groups.ids, groups.length
        (tensor([3, 7]), tensor([2, 3]))
        >>> groups.values(torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0]), "first")
        tensor([2., 1.])
        >>> groups.steps_of(torch.tensor([1, 1, 1]), torch.tensor([0.0, 0.4, 0.99]))
        tensor([0, 1, 3])
    """

    size: int  # number of entries
    ids: Tensor  # [m], ascending
    start: Tensor  # [m] int64, where each trajectory begins among the entries
    length: Tensor  # [m] int64
    entry: Tensor  # [k] int64, trajectory by trajectory, in the order of time

    @classmethod
    @torch.no_grad()
    def of(cls, ids: Tensor, oldest: int = 0) -> TrajectoryGroups:
        """Group entries by trajectory id.

        Args:
            ids: ``[n]`` or ``[n, 1]``, integers. Equal ones are one trajectory, wherever they are.
            oldest: the entry at which the order of time begins, and goes round: where a full ring
                is written next.

        Raises:
            TypeError: if the ids are not integers.
            ValueError: if a shape or ``oldest`` does not fit.
        """
        if ids.dtype == torch.bool or ids.dtype.is_floating_point or ids.dtype.is_complex:
            raise TypeError(f"trajectory ids must be integers, got {ids.dtype}")
        if ids.ndim == 2 and ids.shape[1] == 1:
            ids = ids.squeeze(1)
        if ids.ndim != 1:
            raise ValueError(
                f"trajectory ids must have shape [n] or [n, 1], got {tuple(ids.shape)}"
            )
        n = ids.numel()
        if not 0 <= oldest < max(n, 1):
            raise ValueError(f"oldest must be one of {n} entries, got {oldest}")
        in_time = torch.arange(n, device=ids.device).roll(-oldest)
        run_id, run_length = ids[in_time].unique_consecutive(return_counts=True)
        run_start = run_length.cumsum(0) - run_length
        run_id, order = run_id.sort(stable=True)
        run_length = run_length[order]
        # Each place among the entries is shifted as its run is.
        shift = run_start[order] - (run_length.cumsum(0) - run_length)
        place = torch.arange(n, device=ids.device) + shift.repeat_interleave(run_length)
        trajectory, of_run = run_id.unique_consecutive(return_inverse=True)
        length = torch.zeros_like(trajectory, dtype=torch.int64).index_add_(0, of_run, run_length)
        return cls(n, trajectory, length.cumsum(0) - length, length, in_time[place])

    def only(self, drawable: Tensor) -> TrajectoryGroups:
        """Leave out entries that are never drawn.

        Args:
            drawable: ``[n]``, bool.

        Returns:
            Groups with the same trajectories, some of which may have no step left.

        Raises:
            ValueError: if the shape does not fit.
        """
        self._check_shape("drawable", drawable)
        if bool(drawable.all()):
            return self
        keep = drawable[self.entry]
        before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
        start = before[self.start]
        return self._replace(
            start=start, length=before[self.start + self.length] - start, entry=self.entry[keep]
        )

    def values(self, values: Tensor, reduction: str) -> Tensor:
        """Reduce the values of entries to one for each trajectory.

        All but ``"first"`` go over the steps that have a number. A trajectory without any has no
        value yet (``-inf``) if one of its steps has no value yet, else it is never drawn (NaN).
        ``"first"`` takes the value of the oldest stored step as it is: with returns-to-go, the
        return of what is stored of the trajectory.

        Args:
            values: ``[n]``, floating. A number, ``-inf`` for "no value yet", NaN for "never drawn".
            reduction: ``"max"``, ``"min"``, ``"mean"``, ``"median"`` (of an even number the lower
                one, as in torch) or ``"first"``.

        Returns:
            ``[m]``, in the dtype of ``values``.

        Raises:
            ValueError: if ``reduction`` is unknown, or a shape does not fit.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        self._check_shape("values", values)
        m = self.ids.numel()
        ordered = values[self.entry]
        if reduction == "first":
            result = values.new_full((m,), math.nan)
            some = self.length > 0
            result[some] = ordered[self.start[some]]
            return result
        group = torch.arange(m, device=values.device).repeat_interleave(self.length)
        number = ordered > -math.inf
        waiting = torch.zeros(m, dtype=torch.int64, device=values.device)
        waiting = waiting.index_add_(0, group, (ordered == -math.inf).long()) > 0
        none = torch.where(waiting, -math.inf, math.nan).to(values)
        ordered, group = ordered[number], group[number]
        count = torch.zeros(m, dtype=torch.int64, device=values.device)
        count.index_add_(0, group, torch.ones_like(group))
        if reduction == "mean":
            total = torch.zeros(m, dtype=torch.float64, device=values.device)
            reduced = (total.index_add_(0, group, ordered.double()) / count).to(values)
        elif reduction == "median":
            ordered, by_value = ordered.sort(stable=True)
            by_group = group[by_value].argsort(stable=True)
            # Trajectories without a number point past their place, and are masked below.
            middle = count.cumsum(0) - count + (count - 1).clamp_(min=0) // 2
            padded = torch.cat([ordered[by_group], ordered.new_zeros(1)])
            reduced = padded[middle]
        else:
            reduced = values.new_zeros(m)
            reduced.scatter_reduce_(0, group, ordered, "a" + reduction, include_self=False)
        return torch.where(count > 0, reduced, none)

    def steps_of(self, trajectory: Tensor, uniform: Tensor) -> Tensor:
        """Turn drawn trajectories and uniform numbers into a step of each, uniformly.

        Args:
            trajectory: ``[B]`` int64, in ``[0, m)``, of trajectories with at least one step.
            uniform: ``[B]``, in [0, 1); float64, or long trajectories are not hit evenly.

        Returns:
            Entries ``[B]`` int64, in ``[0, n)``.
        """
        length = self.length[trajectory]
        # Rounding may make a product with a number below 1 the length itself.
        step = (uniform.double() * length).long().minimum(length - 1)
        return self.entry[self.start[trajectory] + step]

    def _check_shape(self, name: str, tensor: Tensor) -> None:
        if tensor.shape != (self.size,):
            raise ValueError(
                f"{name} must have one entry for each of {self.size}, got {tuple(tensor.shape)}"
            )

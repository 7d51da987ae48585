"""Which rows of a buffer `fit` learns from, and which it holds out."""

from __future__ import annotations

import torch
from torch import Tensor


def split_rows(
    rows: Tensor,
    held_out: float,
    trajectory: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Split rows at random into training and held-out ones, whole trajectories if they are known.

    Args:
        rows (Tensor): int64 ``[N]``.
        held_out (float): share of rows to hold out; of trajectories, as many as make up that share,
            without any that would make it more than twice as much, if there are others.
        trajectory (Tensor, optional): ``[N]`` which trajectory a row belongs to; one alone is
            split by rows.
        generator (torch.Generator, optional): on the CPU; None is torch's own.

    Returns:
        tuple: training rows and held-out rows, both ascending as ``rows`` is.

    Raises:
        ValueError: a side would be empty.
    """
    if held_out == 0:
        if len(rows) == 0:
            raise ValueError("no row is left to fit: all are masked or not finite.")
        return rows, rows[:0]
    wanted = max(1, round(held_out * len(rows)))
    left = torch.zeros(len(rows), dtype=torch.bool)
    numbers = None
    if trajectory is not None:
        names, numbers = trajectory.unique(return_inverse=True)
        numbers = None if len(names) < 2 else numbers
    if numbers is None:
        left[torch.randperm(len(rows), generator=generator)[:wanted]] = True
    else:
        lengths = numbers.bincount()
        order = torch.randperm(len(lengths), generator=generator)
        left = torch.isin(numbers, _held_out_trajectories(order, lengths, wanted))
    training, kept_out = rows[~left], rows[left]
    if len(training) == 0 or len(kept_out) == 0:
        raise ValueError(
            f"held_out={held_out} leaves {len(training)} rows to fit and {len(kept_out)} to hold "
            "out, expected at least one of each."
        )
    return training, kept_out


def _held_out_trajectories(order: Tensor, lengths: Tensor, wanted: int) -> Tensor:
    """Choose trajectories in a given order until they have ``wanted`` rows; never all of them."""
    chosen, total = [], 0
    for one, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if total >= wanted:
            break
        if total + length <= 2 * wanted:
            chosen.append(one)
            total += length
    # All are long: the shortest is nearest to what is wanted.
    chosen = chosen[: len(order) - 1] or [int(lengths.argmin())]
    return torch.tensor(chosen)

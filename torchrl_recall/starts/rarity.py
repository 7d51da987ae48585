"""How rare states are: distance to neighbours, or number of visits. For `FrontierStarts`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Up to here a permutation of all rows costs less than the distances between the candidates.
_PERMUTED = 65_536
# Up to here the smallest distances are found sooner by keeping them than by partitioning the row.
_QUICK_RANK = 32


def distinct_rows(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw rows without replacement, in random order.

    Args:
        n (int): how many there are, at least 1.
        count (int): how many to draw.
        generator (torch.Generator): source of randomness.

    Returns:
        Tensor: ``[min(n, count)]``; where ``n`` is large a few less, as repeats are dropped.
    """
    device = generator.device
    if n <= max(_PERMUTED, 2 * count):
        return torch.randperm(n, generator=generator, device=device)[:count]
    rows = torch.randint(n, (count,), generator=generator, device=device).unique()
    return rows[torch.randperm(len(rows), generator=generator, device=device)]


def neighbour_distance(states: Tensor, num_neighbours: int) -> Tensor:
    """Return the distance of each state to its k-th nearest other one.

    Args:
        states (Tensor): ``[n, D]``, floating and finite. Each coordinate is divided by its standard
            deviation; one that does not vary is left out.
        num_neighbours (int): k; with fewer others, the farthest of them counts.

    Returns:
        Tensor: ``[n]``, float64; zero for a single state.

    Examples:
        >>> import torch
        >>> neighbour_distance(torch.tensor([[0.0], [1.0], [5.0]]), 1).argmax()
        tensor(2)
    """
    states = states.double()
    if len(states) < 2:
        return states.new_zeros(len(states))
    scale = states.std(0)
    states = torch.where(scale > 0, (states - states.mean(0)) / scale, 0.0)
    # By differences: the product form loses the digits of near neighbours.
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")
    # The first is the state itself, at 0.
    rank = min(num_neighbours, len(states) - 1) + 1
    if rank <= _QUICK_RANK:
        return distance.topk(rank, dim=1, largest=False).values[:, -1]
    return distance.kthvalue(rank, dim=1).values


def visit_counts(states: Tensor) -> tuple[Tensor, Tensor]:
    """Count how often each integer state occurs.

    Args:
        states (Tensor): ``[n, K]``, integer or bool, ``n`` at least 1.

    Returns:
        tuple of Tensor: an index into ``states`` of each distinct state, ``[m]``, and its count.

    Examples:
        >>> import torch
        >>> first, count = visit_counts(torch.tensor([[0, 1], [2, 2], [0, 1]]))
        >>> sorted(count.tolist())
        [1, 2]
    """
    states = states.long()
    low = states.amin(0)
    spans = (states.amax(0) - low + 1).tolist()
    if math.prod(spans) < 2**62:
        # One number for each state: sorting numbers is much faster than sorting rows.
        code = torch.zeros_like(states[:, 0])
        for column, span in enumerate(spans):
            code = code * span + (states[:, column] - low[column])
        _, which, count = code.unique(return_inverse=True, return_counts=True)
    else:
        _, which, count = states.unique(dim=0, return_inverse=True, return_counts=True)
    row = torch.arange(len(states), device=states.device)
    return torch.empty_like(count).scatter_(0, which, row), count

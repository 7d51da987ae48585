"""Which steps of a trace are worth imitating."""

from __future__ import annotations

import torch
from torch import Tensor


def last_visit(states: Tensor) -> Tensor:
    """Keep a step only where its state is left for the last time.

    Step ``t`` is kept if ``s_t`` is none of ``s_{t+1}, …, s_T``: earlier visits are detours, and
    imitating them teaches the detour. Walking backwards it is the first visit that counts.

    Args:
        states (Tensor): ``[*B, T + 1, D]``, oldest first, the walk's start last.

    Returns:
        Tensor: ``[*B, T]`` bool, True = keep.

    Examples:
        >>> import torch
        >>> from torchrl_recall.traces.masks import last_visit
        >>> last_visit(torch.tensor([[0], [1], [0], [2]]))  # 0 -> 1 -> 0 -> 2
        tensor([False,  True,  True])
    """
    num_steps = states.shape[-2] - 1
    keep = torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
    for lag in range(1, num_steps + 1):
        again = (states[..., :-lag, :] == states[..., lag:, :]).all(-1)
        keep[..., :-lag] &= ~again
    return keep[..., :-1]


def since_start(good: Tensor) -> Tensor:
    """Keep a step, ``[T, n]``, only if it and all that the walk made before it are good."""
    return good.flip(0).int().cumprod(0).flip(0).bool()

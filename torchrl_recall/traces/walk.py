"""What a backend returns, and the reference backend: the walk as one would write it on paper."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.traces.noise import TraceNoise


class Walk(NamedTuple):
    """A tile of ``n`` traces of ``T`` steps, step first, oldest step first.

    Attributes:
        states (Tensor): ``[T + 1, n, size]``; the last one is the start of the walk.
        actions (Tensor): ``[T, n, A]`` or ``[T, n]`` indices.
        action_log_prob (Tensor): ``[T, n]``.
        delta_log_prob (Tensor): ``[T, n]``.
        alive (Tensor or None): ``[T, n]`` bool, False from the step before an episode's start on.
    """

    states: Tensor
    actions: Tensor
    action_log_prob: Tensor
    delta_log_prob: Tensor
    alive: Tensor | None


def reference_walk(model: BacktrackModel, start: Tensor, noise: TraceNoise) -> Walk:
    """Walk backwards with the model's own methods, one step after the other.

    Args:
        model (BacktrackModel): the model.
        start (Tensor): ``[n, size]`` flat states to walk back from.
        noise (TraceNoise): the random numbers, which also give the number of steps.

    Returns:
        Walk: the traces.
    """
    state = start
    alive = torch.ones(len(start), dtype=torch.bool, device=start.device)
    steps = []
    for t in reversed(range(len(noise.action))):
        if noise.stop is not None:
            alive = alive & (noise.stop[t] >= torch.sigmoid(model.stop_logit(state)))
        action, action_log_prob = model.action.head.sample(
            model.action_parameters(state), noise.action[t]
        )
        state, delta_log_prob = model.delta_head.predecessor(
            model.delta_parameters(action, state), state, noise.delta[t]
        )
        steps.append((state, action, action_log_prob, delta_log_prob, alive))
    states, actions, action_log_prob, delta_log_prob, alive = (
        torch.stack(column[::-1]) for column in zip(*steps, strict=True)
    )
    return Walk(
        torch.cat([states, start.unsqueeze(0)]),
        actions,
        action_log_prob,
        delta_log_prob,
        alive if noise.stop is not None else None,
    )

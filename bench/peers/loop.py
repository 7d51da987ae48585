"""A user's plain loop over TensorDict modules, without an environment, stacked at the end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from bench.peers.modules import policy_and_transition
from torchrl_recall import BacktrackModel

KEPT = ("observation", "action", "action_log_prob", "delta_log_prob")


def walker(model: BacktrackModel, start: Tensor, num_steps: int) -> Callable[[], TensorDictBase]:
    """Return a function that walks ``num_steps`` back from ``start``.

    Args:
        model (BacktrackModel): whose networks to use.
        start (Tensor): ``[B, size]`` states.
        num_steps (int): length of the walk.

    Returns:
        Callable: gives a TensorDict ``[B, T]``, newest step first, ``"observation"`` being the
        predecessor. In its favour: the parameters of distributions and the states that were gone
        back from are not stacked.
    """
    policy, transition = policy_and_transition(model)

    @torch.no_grad()
    def walk() -> TensorDictBase:
        state, steps = start, []
        for _ in range(num_steps):
            step = TensorDict({"observation": state}, start.shape[:1], device=start.device)
            step = transition(policy(step))
            state = step["observation"]
            steps.append(step.select(*KEPT))
        return torch.stack(steps, 1)  # pyright: ignore

    return walk

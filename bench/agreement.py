"""What a peer's walk is checked against: the reference on the same noise, or the noise it drew."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.plain import Noise
from torchrl_recall import BacktrackModel
from torchrl_recall.model.heads import GaussianHead
from torchrl_recall.traces import draw_noise
from torchrl_recall.traces.walk import reference_walk


@torch.no_grad()
def reference(model: BacktrackModel, start: Tensor, num_steps: int) -> tuple[Noise, list[Tensor]]:
    """Draw noise and walk with the library's readable reference.

    Args:
        model (BacktrackModel): the model.
        start (Tensor): ``[B, size]`` states.
        num_steps (int): length of the walk.

    Returns:
        tuple: the noise of both heads and the walk's states, actions, and log-probabilities of
        actions and changes; all ``[T, B, ...]``, newest step first, as peers walk.
    """
    noise = draw_noise(model, num_steps, len(start), torch.Generator().manual_seed(3))
    walk = reference_walk(model, start, noise)
    columns = walk.states[:-1], walk.actions, walk.action_log_prob, walk.delta_log_prob
    return (noise.action.flip(0), noise.delta.flip(0)), [column.flip(0) for column in columns]


@torch.no_grad()
def assert_standard_normal(
    model: BacktrackModel, start: Tensor, before: Tensor, action: Tensor
) -> None:
    """Assert that the noise that explains a walk has mean 0 and variance 1, to 5 errors.

    Args:
        model (BacktrackModel): a Gaussian model without statistics.
        start (Tensor): ``[B, D]`` states.
        before (Tensor): ``[B, T, D]`` predecessors, newest step first.
        action (Tensor): ``[B, T, A]`` actions in [-1, 1].
    """
    after = torch.cat([start.unsqueeze(1), before[:, :-1]], 1)
    for head, parameters, value in (
        (model.action.head, model.action_parameters(after), torch.atanh(action)),
        (model.delta_head, model.delta_parameters(action, after), before - after),
    ):
        assert isinstance(head, GaussianHead)
        loc, log_scale = head.split(parameters)
        noise = (value - loc) * torch.exp(-log_scale)
        assert noise.shape == value.shape
        assert abs(float(noise.mean())) < 5 * noise.numel() ** -0.5
        assert abs(float(noise.var()) - 1) < 5 * (2 / noise.numel()) ** 0.5

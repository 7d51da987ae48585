"""The walk in plain tensor operations, a function a step: what is compiled, or captured as a graph.

Fed with noise, so that tests can compare it with the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from torchrl_recall import BacktrackModel
from torchrl_recall.model.heads import (
    LOG_SQRT_2_PI,
    TANH_LIMIT,
    NormalDelta,
    TanhNormalHead,
    bounded_log_scale,
)


class Walked(NamedTuple):
    """A walk or a step of it: newest step first, ``[B, T, ...]`` when stacked.

    Attributes:
        observation (Tensor): the predecessors.
        action (Tensor): the actions.
        action_log_prob (Tensor): their log-probabilities.
        delta_log_prob (Tensor): log-probabilities of the changes of state.
    """

    observation: Tensor
    action: Tensor
    action_log_prob: Tensor
    delta_log_prob: Tensor


# From state, action noise and delta noise to the predecessor.
Step = Callable[[Tensor, Tensor, Tensor], Walked]
Noise = tuple[Tensor, Tensor]


def plain_step(model: BacktrackModel) -> Step:
    """Return one step back as a function of the state and of noise.

    Args:
        model (BacktrackModel): whose networks to use.

    Returns:
        Callable: from ``[B, size]`` states and the noise of both heads to a `Walked` step.
    """
    return _gaussian(model) if isinstance(model.delta_head, NormalDelta) else _categorical(model)


def _gaussian(model: BacktrackModel) -> Step:
    action_head, delta_head = model.action.head, model.delta_head
    assert isinstance(action_head, TanhNormalHead)
    assert isinstance(delta_head, NormalDelta)
    action_network, delta_network = model.action_network, model.delta_network
    action_range, delta_range = action_head.log_scale_range, delta_head.log_scale_range

    def step(state: Tensor, action_noise: Tensor, delta_noise: Tensor) -> Walked:
        loc, raw = action_network(state).chunk(2, -1)
        log_scale = bounded_log_scale(raw, action_range)
        pre = (loc + log_scale.exp() * action_noise).clamp(-TANH_LIMIT, TANH_LIMIT)
        action = torch.tanh(pre)
        squeeze = 2 * (math.log(2) - pre - softplus(-2 * pre))
        action_log_prob = _normal_log_prob(action_noise, log_scale) - squeeze.sum(-1)
        loc, raw = delta_network(torch.cat([state, action], -1)).chunk(2, -1)
        log_scale = bounded_log_scale(raw, delta_range)
        before = state + loc + log_scale.exp() * delta_noise
        return Walked(before, action, action_log_prob, _normal_log_prob(delta_noise, log_scale))

    return step


def _normal_log_prob(noise: Tensor, log_scale: Tensor) -> Tensor:
    return -(0.5 * noise * noise + log_scale + LOG_SQRT_2_PI).sum(-1)


def _categorical(model: BacktrackModel) -> Step:
    action_head, delta_head = model.action.head, model.delta_head

    def step(state: Tensor, action_noise: Tensor, delta_noise: Tensor) -> Walked:
        action, action_log_prob = action_head.sample(model.action_parameters(state), action_noise)
        parameters = model.delta_parameters(action, state)
        before, delta_log_prob = delta_head.predecessor(parameters, state, delta_noise)
        return Walked(before, action, action_log_prob, delta_log_prob)

    return step


def draws(model: BacktrackModel, rows: int, num_steps: int) -> Iterable[Noise]:
    """Draw the noise of both heads, step by step, while it is in the cache.

    Args:
        model (BacktrackModel): says which noise its heads take.
        rows (int): number of traces.
        num_steps (int): length of the walk.

    Yields:
        tuple: noise of the action and of the change.
    """
    heads = model.action.head, model.delta_head
    shapes = [(rows, head.noise_size) for head in heads]
    functions = [torch.randn if head.noise_kind == "normal" else torch.rand for head in heads]
    action, delta = functions
    for _ in range(num_steps):
        yield action(shapes[0], device=model.device), delta(shapes[1], device=model.device)


def walk(step: Step, start: Tensor, noise: Iterable[Noise]) -> Walked:
    """Walk back, step by step, and stack the steps.

    Args:
        step (Callable): one step back.
        start (Tensor): ``[B, size]`` states.
        noise (iterable): the random numbers of each step, newest step first.

    Returns:
        Walked: ``[B, T, ...]``.
    """
    state, steps = start, []
    for action_noise, delta_noise in noise:
        steps.append(step(state, action_noise, delta_noise))
        state = steps[-1].observation
    return Walked(*(torch.stack(column, 1) for column in zip(*steps, strict=True)))

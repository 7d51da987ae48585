"""Cumulative distributions of the heads at real values: the probability integral transform.

If data follow the model, ``F(value)`` is uniform on [0, 1] in each dimension. A class has a jump of
its own size in F; a uniform number picks a point of it (Smith, 1985, Czado et al., 2009).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.heads import (
    TANH_MARGIN,
    CategoricalHead,
    ClassDelta,
    NormalHead,
    SupportDelta,
    TanhNormalHead,
)
from torchrl_recall.model.mixture import MixtureDelta
from torchrl_recall.model.uniform import UniformHead


def delta_cdf(
    head: nn.Module, parameters: Tensor, state: Tensor, next_state: Tensor, uniform: Tensor
) -> Tensor:
    """Return where real changes lie in a delta head's distribution.

    Args:
        head (nn.Module): ``model.delta_head``.
        parameters (Tensor): ``[N, output_size]``.
        state (Tensor): ``[N, size]`` flat predecessors.
        next_state (Tensor): ``[N, size]`` flat states they led to.
        uniform (Tensor): ``[N]`` in [0, 1), for heads over classes.

    Returns:
        Tensor: ``[N, size]`` in [0, 1], of each dimension by itself; ``[N, 1]`` for classes.

    Raises:
        TypeError: a head that is not known here.
        ValueError: a displacement outside the support.
    """
    if isinstance(head, SupportDelta):
        delta = (state - next_state).unsqueeze(-2)
        match = ((delta - head.support).abs() <= head.tolerance).all(-1)
        if not bool(match.any(-1).all()):
            raise ValueError(
                f"{int((~match.any(-1)).sum())} of {len(match)} transitions have a displacement "
                "s_t - s_(t+1) that is not in the model's delta_support."
            )
        return _class_cdf(head.logits(parameters, next_state), match.int().argmax(-1), uniform)
    if isinstance(head, ClassDelta):
        return _class_cdf(parameters, head.codec.joint_index(state), uniform)
    return value_cdf(head, parameters, state - next_state, uniform)


def value_cdf(head: nn.Module, parameters: Tensor, value: Tensor, uniform: Tensor) -> Tensor:
    """Return where real values (actions, or changes of a continuous state) lie.

    Args:
        head (nn.Module): a Gaussian, squashed Gaussian, mixture, uniform or categorical head.
        parameters (Tensor): ``[N, output_size]``.
        value (Tensor): ``[N, size]``, or ``[N]`` indices of classes.
        uniform (Tensor): ``[N]`` in [0, 1), for heads over classes.

    Returns:
        Tensor: ``[N, size]`` in [0, 1]; ``[N, 1]`` for classes.

    Raises:
        TypeError: a head that is not known here.
    """
    if isinstance(head, CategoricalHead):
        return _class_cdf(parameters, value, uniform)
    if isinstance(head, UniformHead):
        return ((head.features(value).double() + 1) / 2).clamp(0, 1)
    if isinstance(head, MixtureDelta):
        loc, log_scale, logits = head.split(parameters)
        noise = head.normalizer.normalize(value).unsqueeze(-2) - loc
        each = torch.special.ndtr(noise.double() * torch.exp(-log_scale.double()))
        return (torch.softmax(logits.double(), -1).unsqueeze(-1) * each).sum(-2)
    if isinstance(head, NormalHead):
        noise = head.normalizer.normalize(value)
    elif isinstance(head, TanhNormalHead):
        # The squashing is monotone, so that it does not change where a value lies.
        inside = head.features(value).clamp(-1 + TANH_MARGIN, 1 - TANH_MARGIN)
        noise = torch.atanh(inside)
    else:
        raise TypeError(f"no cumulative distribution of a {type(head).__name__} is known.")
    gaussian: Any = head
    loc, log_scale = gaussian.split(parameters)
    return torch.special.ndtr((noise - loc).double() * torch.exp(-log_scale.double()))


def model_cdf(
    model: BacktrackModel,
    factor: str,
    state: Tensor,
    action: Tensor,
    next_state: Tensor,
    uniform: Tensor,
) -> Tensor:
    """Return where real steps lie in a model's distribution, that of a step going on.

    An ensemble's is the mixture of its members. Δ is given the action, so that a member counts as
    far as it predicted the action.

    Args:
        model (BacktrackModel): the model.
        factor (str): ``"action"`` or ``"delta"``.
        state (Tensor): ``[N, size]``.
        action (Tensor): flat actions, ``[N, A]`` or ``[N]``.
        next_state (Tensor): ``[N, size]``.
        uniform (Tensor): ``[N]`` in [0, 1), for heads over classes.

    Returns:
        Tensor: ``[N, size]``, ``[N, A]`` or ``[N, 1]`` in [0, 1], float64.
    """
    found, weights = [], []
    for i in range(model.num_members):
        one = model.member(i)
        action_parameters = one.action_parameters(next_state)
        weight = uniform.new_zeros(len(uniform))
        if one.has_stop:
            weight = torch.nn.functional.logsigmoid(-one.stop_logit(next_state)).double()
        if factor == "action":
            found.append(value_cdf(one.action.head, action_parameters, action, uniform))
        else:
            weight = weight + one.action.head.log_prob(action_parameters, action).double()
            parameters = one.delta_parameters(action, next_state)
            found.append(delta_cdf(one.delta_head, parameters, state, next_state, uniform))
        weights.append(weight)
    share = torch.softmax(torch.stack(weights), 0).unsqueeze(-1)
    return (share * torch.stack(found)).sum(0)


def _class_cdf(logits: Tensor, index: Tensor, uniform: Tensor) -> Tensor:
    probability = torch.softmax(logits.double(), -1)
    index = index.unsqueeze(-1)
    jump = probability.gather(-1, index)
    below = probability.cumsum(-1).gather(-1, index) - jump
    return (below + uniform.unsqueeze(-1) * jump).clamp(0, 1)

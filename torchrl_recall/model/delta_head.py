"""Which head of Δ fits a model's observations: one of those in `heads` and `mixture`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchrl_recall.checks import check_tensor
from torchrl_recall.model.heads import ClassDelta, NormalDelta, SupportDelta
from torchrl_recall.model.mixture import MixtureDelta
from torchrl_recall.model.observation import ObservationCodec


def build_delta_head(
    codec: ObservationCodec,
    support: Tensor | None,
    log_scale_range: tuple[float, float],
    factory: dict[str, Any],
    num_components: int = 1,
) -> NormalDelta | MixtureDelta | SupportDelta | ClassDelta:
    """Return the head that fits the observations, or say what to pass.

    Args:
        codec (ObservationCodec): the model's states.
        support (Tensor, optional): ``[M, D]`` displacements.
        log_scale_range (tuple of float): bounds of a Gaussian's log-scale.
        factory (dict): dtype and device.
        num_components (int): Gaussians of the mixture, for continuous observations.

    Returns:
        nn.Module: the head.

    Raises:
        ValueError: a support that does not fit, too many classes without one, or a mixture where
            the change is categorical.
    """
    if num_components > 1 and (support is not None or codec.is_discrete):
        raise ValueError(
            f"num_components is {num_components}, expected 1: a mixture is for continuous changes; "
            "the categorical head of a discrete observation or a delta_support has all modes."
        )
    if support is None:
        if not codec.is_discrete:
            if num_components > 1:
                return MixtureDelta(codec.size, num_components, log_scale_range, **factory)
            return NormalDelta(codec.size, log_scale_range, **factory)
        if codec.size == 1 or codec.has_joint_code:
            return ClassDelta(codec)
        raise ValueError(
            f"observation has {codec.num_states} joint states, too many to predict as classes; "
            "pass delta_support, the displacements s_t - s_{t+1} that can occur."
        )
    support = check_tensor("delta_support", support)
    if support.ndim != 2 or support.shape[1] != codec.size or len(support) == 0:
        raise ValueError(
            f"delta_support has shape {tuple(support.shape)}, expected [M, {codec.size}] "
            "with one displacement a row."
        )
    if len(support.unique(dim=0)) != len(support):
        raise ValueError("delta_support has the same displacement twice, expected unique rows.")
    if codec.is_discrete and (support.is_floating_point() or support.dtype == torch.bool):
        raise ValueError(f"delta_support must hold integers, got dtype {support.dtype}.")
    if not bool(torch.isfinite(support).all()):
        raise ValueError("delta_support must be finite.")
    return SupportDelta(support.to(device=codec.low.device, dtype=codec.low.dtype), codec)

"""`TraceMask`: the protocol of all masks, and what junk does not do to them.

A walk goes from its end backwards. Once it has stopped, met a dead end or left the numbers, that
step and all *older* ones are masked and hold junk: finite values that mean nothing. Every mask here
compares a step with *later* ones only, so junk is compared with later steps, never a good step with
junk. The holes that last visit leaves are another matter: the walk really passed there, so they
count, and their states come again later anyway. No mask needs to know what is masked already, and
the order of masks does not matter.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from tensordict import TensorDictBase
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.state_reading import check_positive
from torchrl_recall.traces.masks import since_start

Scale = float | Tensor | BacktrackModel


@runtime_checkable
class TraceMask(Protocol):
    """Says which steps of traces to keep.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel, BacktrackTransform
        >>> def near(trace):
        ...     return trace["observation"].norm(dim=-1) < 2
        >>> model = BacktrackModel(3, 1, num_cells=(32,))
        >>> transform = BacktrackTransform(model, num_steps=8, masks=[near])
        >>> isinstance(near, TraceMask)
        True
    """

    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return what to keep.

        Args:
            trace (TensorDictBase): ``[*B, T]``, oldest step first, as `sample_traces` returns it;
                not to be changed. Steps masked before hold finite values that mean nothing.

        Returns:
            Tensor: ``[*B, T]`` bool, True = keep.
        """
        ...


def until_bad(good: Tensor) -> Tensor:
    """Keep a step, ``[*B, T]``, only if it and all later ones are good: a walk stays wrong."""
    return since_start(good.movedim(-1, 0)).movedim(0, -1)


class StateScale:
    """The unit in which states are compared: numbers, or a model's running standard deviation.

    Args:
        scale (float, Tensor or BacktrackModel): one number, one for each coordinate, ``[D]``, or a
            model, whose statistics are read anew at each call.

    Raises:
        TypeError: none of these.
        ValueError: numbers that are not positive, or a model of discrete observations.
    """

    def __init__(self, scale: Scale) -> None:
        self.model: BacktrackModel | None = scale if isinstance(scale, BacktrackModel) else None
        if self.model is not None and self.model.observation.is_discrete:
            raise ValueError("scale is a model of discrete observations, which has no scale.")
        self.value: Tensor | None = (
            None if self.model is not None else check_positive("scale", scale)
        )

    def __call__(self, state: Tensor) -> Tensor:
        """Return the scale for states ``[*B, D]``, in their dtype and on their device."""
        if self.model is not None:
            normalizer = self.model.observation.normalizer
            assert normalizer is not None
            found = normalizer.std
        else:
            assert self.value is not None
            found = self.value
        if found.ndim and found.shape[0] != state.shape[-1]:
            raise ValueError(
                f"scale has {found.shape[0]} coordinates, but states have {state.shape[-1]}."
            )
        return found.to(state)


def require_floating(name: str, state: Tensor) -> Tensor:
    """Return continuous states, or say which mask does not suit discrete ones."""
    if not state.is_floating_point():
        raise TypeError(f"{name} needs continuous states, got dtype {state.dtype}.")
    return state

"""How far a policy's action is from a trace's: what `RecallTraceLoss(loss_function=...)` minimises.

For policies that have no log-probability to raise: deterministic ones (TD3, DDPG), by the distance
of the actions; and those that take the best of all actions' values (DQN), by the values.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torchrl.data.tensor_specs import Bounded, TensorSpec

Distance = Literal["mse", "l1", "smooth_l1", "margin", "cross_entropy"]
# These compare values of actions, the others actions.
OF_VALUES = ("margin", "cross_entropy")

_DISTANCES = {
    "mse": nn.functional.mse_loss,
    "l1": nn.functional.l1_loss,
    "smooth_l1": nn.functional.smooth_l1_loss,
}


def check_distance(name: str | None) -> Distance | None:
    """Return the name of a distance, None for log-probabilities, or refuse it."""
    if name is None or name in get_args(Distance):
        return name  # pyright: ignore[reportReturnType]
    raise ValueError(f"loss_function must be None or one of {get_args(Distance)}, got {name!r}.")


def half_range(spec: TensorSpec | None) -> Tensor | None:
    """Return half the range of a bounded action, ``[*action shape]``; None without bounds.

    Args:
        spec (TensorSpec, optional): the action's.

    Raises:
        TypeError: no spec, or one of classes.
        ValueError: a range that is infinite or empty.
    """
    if spec is None:
        return None
    if not isinstance(spec, TensorSpec):
        raise TypeError(f"action_spec must be a TensorSpec, got {type(spec).__name__}.")
    if not spec.dtype.is_floating_point:
        raise TypeError(f"distances are of continuous actions, got action_spec of {spec.dtype}.")
    if not isinstance(spec, Bounded):
        return None
    space: Any = spec.space
    half = (space.high - space.low) / 2
    if not bool((torch.isfinite(half) & (half > 0)).all()):
        raise ValueError(
            f"action_spec has bounds {space.low.tolist()} to {space.high.tolist()}, expected "
            "finite ones with low < high."
        )
    return half


def action_distance(
    name: Distance, chosen: Tensor, action: Tensor, half: Tensor | None, batch: torch.Size | None
) -> Tensor:
    """Measure how far the policy's actions are from given ones: the mean over an action's entries.

    Args:
        name (str): which distance.
        chosen (Tensor): the policy's actions, ``[*B, *action shape]``.
        action (Tensor): the given ones, of the same shape.
        half (Tensor, optional): half the action's range, the unit of distance; None: one.
        batch (torch.Size, optional): ``*B``; None: all but the last dimension.

    Returns:
        Tensor: ``[*B]``.

    Raises:
        TypeError: the actions are classes.
        ValueError: shapes differ.

    Examples:
        >>> zero, other = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        >>> action_distance("mse", zero, other, torch.tensor([1.0, 2.0]), None)
        tensor([6.5000])
    """
    if not chosen.is_floating_point():
        raise TypeError(
            f"distances are of continuous actions, got {chosen.dtype}; for values of actions (DQN) "
            "take loss_function='margin' or 'cross_entropy'."
        )
    if chosen.shape != action.shape:
        raise ValueError(
            f"the trace's action has shape {tuple(action.shape)}, but the actor's has "
            f"{tuple(chosen.shape)}."
        )
    if half is not None:
        chosen, action = chosen / half, action / half
    distance = _DISTANCES[name](chosen, action.to(chosen.dtype), reduction="none")
    events = 1 if batch is None else distance.ndim - len(batch)
    return distance.flatten(-events).mean(-1) if events else distance


def value_distance(name: Distance, values: Tensor, action: Tensor, margin: float) -> Tensor:
    """Measure how far the action with the largest value is from a given one.

    ``"margin"`` is ``max_a (Q(s, a) + margin 1[a ≠ a_t]) - Q(s, a_t)``, zero where the given action
    leads by the margin (Hester et al., *Deep Q-learning from Demonstrations*, AAAI 2018,
    https://arxiv.org/abs/1704.03732); ``"cross_entropy"`` takes values for logits.

    Args:
        name (str): which distance.
        values (Tensor): of all actions, ``[*B, n]``.
        action (Tensor): the given ones, one-hot ``[*B, n]`` or indices ``[*B]`` or ``[*B, 1]``.
        margin (float): by which the given action is to lead, in the unit of values.

    Returns:
        Tensor: ``[*B]``.

    Raises:
        ValueError: shapes do not fit, or an index is floating-point.

    Examples:
        >>> value_distance("margin", torch.tensor([[1.0, 0.5]]), torch.tensor([1]), 0.8)
        tensor([1.3000])
        >>> value_distance("margin", torch.tensor([[1.0, 0.5]]), torch.tensor([0]), 0.8)
        tensor([0.3000])
    """
    if action.shape == values.shape:
        index = action.to(torch.int8).argmax(-1)
    elif action.is_floating_point() or action.numel() != values[..., 0].numel():
        raise ValueError(
            f"the trace's action has shape {tuple(action.shape)} and dtype {action.dtype}, "
            f"expected indices or one-hot rows for values of shape {tuple(values.shape)}."
        )
    else:
        index = action.reshape(values.shape[:-1]).long()
    given = nn.functional.one_hot(index, values.shape[-1]).bool()
    taken = values.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    if name == "cross_entropy":
        return values.logsumexp(-1) - taken
    return torch.where(given, values, values + margin).amax(-1) - taken


def chosen_action(data: Any, key: NestedKey, out_keys: Any) -> Tensor:
    """Read what an actor wrote, or say what it writes."""
    chosen = data.get(key, default=None)
    if chosen is None:
        raise KeyError(f"the actor writes no {key!r}, its keys are {list(out_keys)}.")
    return chosen

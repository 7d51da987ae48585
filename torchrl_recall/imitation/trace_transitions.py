"""`trace_transitions`: traces as ordinary transitions, extra data for a critic.

Beside the imitation: the same traces go, with rewards, into TorchRL's value losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_recall.masking import fill_rows, one_each
from torchrl_recall.model.observation import sorted_keys

_MASK = ("collector", "mask")
# The backward model's: under such a name PPO would take it for the policy's own.
_DROPPED = ("action_log_prob", "delta_log_prob")


@torch.no_grad()
def trace_transitions(
    trace: TensorDictBase,
    *,
    reward: Callable[[TensorDictBase], Tensor] | TensorDictModuleBase,
    terminated: Callable[[TensorDictBase], Tensor] | TensorDictModuleBase | None = None,
    flatten: bool = True,
    reward_key: NestedKey = ("next", "reward"),
    terminated_key: NestedKey = ("next", "terminated"),
    done_key: NestedKey = ("next", "done"),
    truncated_key: NestedKey = ("next", "truncated"),
) -> TensorDictBase:
    """Turn traces into transitions that TorchRL's value losses (DQN, SAC, GAE with A2C) accept.

    A trace has no rewards: they come from a known reward function, or from a module that has
    learned them from real transitions. That holds for the last step, too: it leads into a real
    state, but by an imagined action, so the real transition's reward is not its own.

    The mask at ``("collector", "mask")`` stays, and TorchRL's losses obey it. Masked steps with
    non-finite entries get those of a kept step, whose reward and ends nobody counts.

    Rollouts (``flatten=False``) are for GAE and multi-step returns: their last step is truncated if
    it does not terminate, so that values bootstrap there. Such returns pass over masked steps as
    over any other: right for ``last_visit`` and the stop head, whose masked steps belong to the
    trace or come before it; where other masks cast doubt on a step, prefer one-step targets.

    Args:
        trace (TensorDictBase): ``[*B, T]``, oldest step first, as in ``batch["trace"]``.

    Keyword Args:
        reward (callable or TensorDictModuleBase): rewards of the steps, ``[*B, T]`` or
            ``[*B, T, 1]``, or a module that writes them at ``reward_key``.
        terminated (callable or TensorDictModuleBase, optional): ends of episodes likewise, bool.
            None: nowhere.
        flatten (bool): return transitions ``[prod(B) * T]``, else rollouts ``[*B, T]``.
        reward_key (NestedKey): where rewards go.
        terminated_key (NestedKey): where ends of episodes go.
        done_key (NestedKey): where ``terminated | truncated`` goes.
        truncated_key (NestedKey): where the ends of rollouts go; transitions are not truncated.

    Returns:
        TensorDictBase: a new one without gradient; rewards and ends ``[..., 1]``. Log-probabilities
        of the backward model are left out: they are not the policy's.

    Raises:
        KeyError: a module does not write its key.
        ValueError: rewards or ends of a wrong shape; non-finite entries at kept steps; a trace
            without a time dimension.

    Source: after Lai et al., *Bidirectional Model-based Policy Optimization*, ICML 2020,
    https://arxiv.org/abs/2007.01995.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel, sample_traces
        >>> model = BacktrackModel(3, 1, num_cells=(32,))
        >>> trace = sample_traces(model, torch.randn(4, 3), num_steps=8)
        >>> def reward(trace):
        ...     return -trace["next", "observation"].norm(dim=-1)
        >>> data = trace_transitions(trace, reward=reward)
        >>> data.shape, data["next", "reward"].shape
        (torch.Size([32]), torch.Size([32, 1]))
    """
    if trace.ndim == 0:
        raise ValueError("the trace has no time dimension, expected batch size [*B, T].")
    kept = _kept(trace)
    data = _finite(trace.exclude(*_DROPPED).detach(), kept)
    kept = kept.unsqueeze(-1)
    rewards = _column(reward, data, reward_key, "reward")
    data.set(reward_key, rewards.masked_fill(~kept & ~rewards.isfinite(), 0.0))
    if not bool(data.get(reward_key).isfinite().all()):
        raise ValueError("reward must be finite at kept steps, got NaN or infinite entries.")
    if terminated is None:
        ended = torch.zeros_like(kept)
    else:
        ended = _column(terminated, data, terminated_key, "terminated").bool()
    truncated = torch.zeros_like(ended)
    if not flatten:
        truncated[..., -1, :] = ~ended[..., -1, :]
    data.set(terminated_key, ended)
    data.set(truncated_key, truncated)
    data.set(done_key, ended | truncated)
    return data.reshape(-1) if flatten else data


def _kept(trace: TensorDictBase) -> Tensor:
    """Return the trace's mask, ``[*B, T]``."""
    mask = trace.get(_MASK, default=None)
    if mask is None:
        return torch.ones(trace.shape, dtype=torch.bool, device=trace.device)
    return one_each(trace, mask, f"trace {_MASK!r}").bool()


def _finite(data: TensorDictBase, kept: Tensor) -> TensorDictBase:
    """Replace masked rows that are not finite, and refuse kept ones."""
    sound = torch.ones_like(kept)
    for key, value in data.items(True, True):
        rows = value.isfinite().reshape(*kept.shape, -1).all(-1)
        if bool((kept & ~rows).any()):
            raise ValueError(f"trace {key!r} must be finite at kept steps, got {value.dtype} ones.")
        sound &= rows
    if bool(sound.all()):
        return data.copy()
    filled = TensorDict({}, data.shape, device=data.device)
    for key, value in data.items(True, True):
        if key == _MASK:
            filled.set(key, value)
            continue
        event = (1,) * (value.ndim - kept.ndim)
        filled.set(
            key, torch.where(sound.reshape(*kept.shape, *event), value, fill_rows(value, kept))
        )
    return filled


def _column(source: Any, data: TensorDictBase, key: NestedKey, name: str) -> Tensor:
    """Ask a function or a module for one entry for each step, ``[*B, T, 1]``."""
    if isinstance(source, TensorDictModuleBase):
        out = source(data.copy())
        value = out.get(key, default=None)
        if value is None:
            raise KeyError(f"{name} module writes no {key!r}, but {sorted_keys(out)}.")
    elif callable(source):
        value = source(data.copy())
    else:
        raise TypeError(f"{name} must be callable, got {type(source).__name__}.")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must give a tensor, got {type(value).__name__}.")
    return one_each(data, value, name).unsqueeze(-1)

"""`policy_log_prob`: what a policy's distribution says of a trace's actions, one number a step.

Between the actor and `RecallTraceLoss`, for actions of one key and of several.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch.distributions import Categorical

from torchrl_recall.checks import as_keys
from torchrl_recall.model.observation import sorted_keys


def policy_in_keys(actor: Any) -> list[NestedKey]:
    """Return what a policy reads, without what it writes itself.

    TorchRL lists the nested parameters of a composite distribution among its policy's ``in_keys``.

    Args:
        actor (TensorDictModule): the policy.

    Returns:
        list of NestedKey: keys of its inputs.
    """
    written = {key[0] for key in actor.out_keys if isinstance(key, tuple)}
    return [key for key in actor.in_keys if key not in written]


def action_leaves(trace: TensorDictBase, key: NestedKey | list[NestedKey]) -> list[NestedKey]:
    """Return the keys of a trace's action: its parts', if there are several.

    Args:
        trace (TensorDictBase): the traces.
        key (NestedKey or list of NestedKey): an action's key, that of a nested TensorDict of
            actions, or a list of keys.

    Returns:
        list of NestedKey: keys of tensors, if the trace has them.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> parts = {"move": torch.zeros(2), "force": torch.zeros(2, 3)}
        >>> action_leaves(TensorDict({"action": parts}, [2]), "action")
        [('action', 'force'), ('action', 'move')]
    """
    keys: list[NestedKey] = []
    for one in as_keys(key):
        value = trace.get(one, default=None)
        if isinstance(value, TensorDictBase):
            root = one if isinstance(one, tuple) else (one,)
            for leaf in sorted_keys(value):
                keys.append((*root, *(leaf if isinstance(leaf, tuple) else (leaf,))))
        else:
            keys.append(one)
    return keys


def policy_log_prob(
    distribution: Any, data: TensorDictBase, keys: list[NestedKey], batch: torch.Size | None
) -> Tensor:
    """Log-probability of the actions of some steps.

    Args:
        distribution (Distribution): of one action, or TorchRL's ``CompositeDistribution``.
        data (TensorDictBase): ``[*B]``, holds the actions.
        keys (list of NestedKey): where they are.
        batch (torch.Size, optional): ``*B``, which the result must have. None: not known.

    Returns:
        Tensor: ``[*B]``.

    Raises:
        KeyError: the distribution is over a key that is not among ``keys``.
        ValueError: several actions and a distribution of one, or shapes that do not match.
    """
    if isinstance(distribution, CompositeDistribution):
        # Not by its own `log_prob`: what that returns depends on a setting of the whole process.
        parts = {
            key if isinstance(key, str) or len(key) > 1 else key[0]: one
            for key, one in distribution.dists.items()
        }
        if set(parts) != set(keys):
            raise KeyError(f"the actor is over {list(parts)}, but the trace's action is {keys}.")
        log_probs = []
        for key, one in parts.items():
            log_prob = _log_prob(one, data.get(key), key)
            if batch is not None:
                log_prob = log_prob.reshape(*batch, -1).sum(-1)
            log_probs.append(log_prob)
        return torch.stack(log_probs).sum(0)
    if len(keys) != 1:
        raise ValueError(
            f"the trace's action has the keys {keys}, but the actor's distribution is a "
            f"{type(distribution).__name__}, expected a CompositeDistribution over them."
        )
    log_prob = _log_prob(distribution, data.get(keys[0]), keys[0])
    if batch is not None and log_prob.shape != batch:
        raise ValueError(
            f"the actor's log_prob has shape {tuple(log_prob.shape)}, expected one for each "
            f"step, {tuple(batch)}; its distribution should reduce the action."
        )
    return log_prob


def _log_prob(distribution: Any, action: Tensor, key: NestedKey) -> Tensor:
    # A narrower action would broadcast. (TorchRL's one-hot distributions state no event.)
    event = getattr(distribution, "event_shape", torch.Size())
    if event and action.shape[-len(event) :] != event:
        raise ValueError(
            f"trace {key!r} has shape {tuple(action.shape)}, but the actor's distribution is over "
            f"actions of shape {tuple(event)}."
        )
    _check_classes(distribution, action, key)
    # TorchRL's one-hot distributions cannot read the dtype of its one-hot specs.
    return distribution.log_prob(action.long() if action.dtype == torch.bool else action)


def _check_classes(distribution: Any, action: Tensor, key: NestedKey) -> None:
    """Refuse classes that do not exist: on a GPU they would end the process."""
    if not isinstance(distribution, Categorical) or torch.compiler.is_compiling():
        return
    *batch, classes = distribution.logits.shape
    if action.shape != torch.Size(batch):  # one-hot, or wrong, which the result's shape tells
        return
    if bool(((action < 0) | (action >= classes)).any()):
        raise ValueError(
            f"trace {key!r} must hold classes from 0 to {classes - 1} at kept steps, got "
            f"{action.min()} to {action.max()}."
        )

"""Values of stored transitions from a value network: what `ValuePrioritizedSampler` ranks by.

Beside the data's way, after critic steps: replay buffer -> `transition_value` -> ``refresh``.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer, Storage
from torchrl.modules import set_recurrent_mode

from torchrl_recall.checks import (
    check_at_least_one,
    check_key,
    check_network,
    check_real,
)
from torchrl_recall.masking import one_each
from torchrl_recall.state_reading import as_rows, entry

# Bounds the activations of the value network, whatever the size of the storage.
DEFAULT_CHUNK = 65_536


@torch.no_grad()
def transition_value(
    data: TensorDictBase | Storage | ReplayBuffer,
    value_network: TensorDictModuleBase,
    *,
    gamma: float,
    chunk_size: int | None = None,
    reward_key: NestedKey = ("next", "reward"),
    terminated_key: NestedKey = ("next", "terminated"),
    value_key: NestedKey = "state_value",
) -> Tensor:
    r"""Compute :math:`r + \gamma (1 - \text{terminated}) V(s')` for each transition.

    It ranks transitions by the state they lead to, from which traces start (Goyal et al. 2019,
    https://arxiv.org/abs/1804.00379). A terminal state has no value of its own: there the reward
    counts alone. A storage is read slice by slice, past the replay buffer's transforms;
    ``sampler.refresh(transition_value(buffer, critic, gamma=0.99).flatten())`` values all of it.

    Args:
        data: a TensorDict ``[*B]``, a storage, or a replay buffer, of whose storage all is read.
        value_network: reads its ``in_keys`` from ``data["next"]``, writes ``value_key``. It runs
            as it is (its training mode is the caller's affair), on the device of its parameters.
        gamma: discount, in [0, 1].
        chunk_size: transitions the network sees at a time, at least 1. None: 65536.
        reward_key: where the reward is, ``[*B]`` or ``[*B, 1]``.
        terminated_key: where the end of an episode is marked, ``[*B]`` or ``[*B, 1]``, bool.
        value_key: where the network writes its value, ``[*B]`` or ``[*B, 1]``.

    Returns:
        ``[*B]`` (of a storage: that of ``storage[:]``), without gradient, on the data's device.

    Raises:
        KeyError: if the data or the network's output lack a key.
        TypeError: if ``data`` is none of the above.
        ValueError: if ``gamma`` or ``chunk_size`` is out of range, or an entry has not one number
            for each transition.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> critic = TensorDictModule(lambda s: s.sum(-1, keepdim=True), ["state"], ["state_value"])
        >>> after = {"state": torch.ones(2, 3), "reward": torch.ones(2, 1)}
        >>> after["terminated"] = torch.tensor([[False], [True]])
        >>> transition_value(TensorDict({"next": after}, [2]), critic, gamma=0.5)
        tensor([2.5000, 1.0000])
    """
    gamma = check_real("gamma", gamma, 0.0, 1.0)
    check_network("value_network", value_network)
    keys = {"reward_key": reward_key, "terminated_key": terminated_key, "value_key": value_key}
    reward_key, terminated_key, value_key = (check_key(*pair) for pair in keys.items())
    if chunk_size is None:
        chunk_size = DEFAULT_CHUNK
    chunk_size = check_at_least_one("chunk_size", chunk_size)
    source: Any = data.storage if isinstance(data, ReplayBuffer) else data
    if isinstance(source, Storage):
        stored: Any = source
        if len(stored) == 0:
            return torch.zeros(0)
        source = as_rows(stored[:])
    if not isinstance(source, TensorDictBase):
        raise TypeError(
            "data must be a TensorDict, or a Storage or ReplayBuffer that holds TensorDicts, got "
            f"{type(data).__name__} with {type(source).__name__}"
        )
    batch_size = source.batch_size
    if not batch_size:
        source = source.unsqueeze(0)

    rows = max(1, chunk_size // max(1, source.shape[1:].numel()))
    options: Any = (gamma, reward_key, terminated_key, value_key)
    results = [
        bootstrapped_value(source[start : start + rows], value_network, *options)
        for start in range(0, len(source), rows)
    ]
    return torch.cat(results).reshape(batch_size) if results else torch.zeros(batch_size)


def bootstrapped_value(
    data: Any,
    value_network: TensorDictModuleBase,
    gamma: float,
    reward_key: NestedKey,
    terminated_key: NestedKey,
    value_key: NestedKey,
) -> Tensor:
    """Compute `transition_value` of a TensorDict ``[*B]`` at once."""
    reward = one_each(data, entry(data, reward_key), repr(reward_key))
    terminated = one_each(data, entry(data, terminated_key), repr(terminated_key)).bool()
    value = next_state_value(data, value_network, value_key).to(reward.device)
    # Not a product with (1 - terminated): the value of a terminal state may be NaN.
    return reward + gamma * value.masked_fill(terminated, 0.0)


def next_state_value(
    data: TensorDictBase,
    value_network: TensorDictModuleBase,
    value_key: NestedKey,
    rows: Tensor | None = None,
) -> Tensor:
    """Run the network on the next states ``[*B]``, or on ``rows`` ``[n]`` of them, flattened."""
    parameter = next(value_network.parameters(), None)
    # A TensorDict of its own: the network writes its output there, not into the storage.
    states = TensorDict({}, data.batch_size if rows is None else rows.shape)
    for key in value_network.in_keys:
        state = entry(data, unravel_key(("next", key)))
        if rows is not None:
            state = state.flatten(0, data.ndim - 1)[rows]
        states.set(key, state if parameter is None else state.to(parameter.device))
    # Each row is one step, with the hidden state that was stored with it, if there is one.
    with set_recurrent_mode(False):
        found = value_network(states)
    return one_each(found, entry(found, value_key), repr(value_key))

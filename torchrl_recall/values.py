"""Values of stored transitions from a value network: what `ValuePrioritizedSampler` ranks by.

Beside the data's way: replay buffer -> `transition_value` -> ``sampler.refresh``, after critic steps.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer, Storage

# Bounds the activations of the value network, whatever the size of the storage.
_DEFAULT_CHUNK = 65_536


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
    https://arxiv.org/abs/1804.00379); a terminal state has no value of its own, so there the reward
    counts alone. The storage is read in slices, past the replay buffer's transforms.

    Args:
        data: a TensorDict ``[*B]``, a storage, or a replay buffer, of whose storage all is read.
        value_network: reads its ``in_keys`` from ``data["next"]`` and writes ``value_key``. It runs as
            it is (its training mode is the caller's affair), on the device of its parameters.
        gamma: discount, in [0, 1].
        chunk_size: transitions the network sees at a time, at least 1. None: 65536.
        reward_key: where the reward is, ``[*B]`` or ``[*B, 1]``.
        terminated_key: where the end of an episode is marked, ``[*B]`` or ``[*B, 1]`` bool.
        value_key: where the network writes its value, ``[*B]`` or ``[*B, 1]``.

    Returns:
        ``[*B]`` (a storage's: that of ``storage[:]``), without gradient, on the data's device.

    Raises:
        KeyError: if the data or the network's output lack a key.
        TypeError: if ``data`` is none of the above.
        ValueError: if ``gamma`` or ``chunk_size`` is out of range, or an entry has not one number for
            each transition.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> from torchrl_recall.sampler import ValuePrioritizedSampler
        >>> critic = TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["state_value"])
        >>> sampler = ValuePrioritizedSampler(10)
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(10), sampler=sampler, batch_size=2)
        >>> after = {"observation": torch.randn(5, 3), "reward": torch.ones(5, 1)}
        >>> after["terminated"] = torch.zeros(5, 1, dtype=torch.bool)
        >>> index = buffer.extend(TensorDict({"next": after}, [5]))
        >>> sampler.refresh(transition_value(buffer.storage, critic, gamma=0.99))

        (For a storage of several dimensions: ``sampler.refresh(transition_value(...).flatten())``.)
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    if chunk_size is None:
        chunk_size = _DEFAULT_CHUNK
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}")
    source: Any = data.storage if isinstance(data, ReplayBuffer) else data
    if isinstance(source, Storage):
        source = source[:] if len(source) else []
    elif not isinstance(source, TensorDictBase):
        raise TypeError(
            f"data must be a TensorDict, a Storage or a ReplayBuffer, got {type(data).__name__}"
        )
    if isinstance(source, TensorDictBase) and source.ndim == 0:
        source = source.unsqueeze(0)
        squeeze = True
    else:
        squeeze = False
    if len(source) == 0:
        return torch.zeros(source.batch_size if isinstance(source, TensorDictBase) else 0)

    state_keys = {key: unravel_key(("next", key)) for key in value_network.in_keys}
    parameter = next(value_network.parameters(), None)
    device = None if parameter is None else parameter.device
    per_row = 1 if isinstance(source, list) else max(1, source[0].numel())
    rows = max(1, chunk_size // per_row)
    chunks = []
    for start in range(0, len(source), rows):
        chunk = source[start : start + rows]
        if isinstance(chunk, list):
            chunk = LazyStackedTensorDict.lazy_stack(chunk)
        reward = _one_each(chunk, reward_key)
        terminated = _one_each(chunk, terminated_key).bool()
        states = chunk.empty()
        for key, next_key in state_keys.items():
            states.set(key, _entry(chunk, next_key))
        value = _one_each(value_network(states if device is None else states.to(device)), value_key)
        # where, not a product: a terminal state may have a NaN value.
        chunks.append(reward + torch.where(terminated, 0.0, gamma * value.to(reward.device)))
    result = torch.cat(chunks)
    return result.squeeze(0) if squeeze else result


def _entry(data: TensorDictBase, key: NestedKey) -> Tensor:
    value = data.get(key, None)
    if value is None:
        raise KeyError(
            f"key {key!r} is missing; there are {sorted(map(str, data.keys(True, True)))}"
        )
    return value


def _one_each(data: TensorDictBase, key: NestedKey) -> Tensor:
    """Read an entry as ``[*B]``."""
    value = _entry(data, key)
    if value.numel() != data.numel():
        raise ValueError(
            f"{key!r} must hold one number for each transition of batch {tuple(data.batch_size)}, got "
            f"shape {tuple(value.shape)}"
        )
    return value.reshape(data.batch_size)

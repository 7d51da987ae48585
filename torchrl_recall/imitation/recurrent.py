"""Recurrent policies on recall traces: what they carry from step to step, and where it begins.

Between the traces and the actor, for `RecallTraceLoss`. A trace is imagined: it has no hidden state
of a collector's. So a policy's memory begins at a trace's first kept step, as at an episode's.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDict, unravel_key
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule

from torchrl_recall.checks import check_network

INIT_KEY = "is_init"  # the one name that TorchRL's recurrent modules read


def recurrent_modules(network: Any) -> list[Any]:
    """Return the parts of a network that have a memory which TorchRL can run along time.

    Args:
        network (nn.Module): a policy or a critic; of anything else there are none.

    Returns:
        list of LSTMModule and GRUModule: in the network's order.
    """
    parts = network.modules() if isinstance(network, nn.Module) else ()
    return [part for part in parts if isinstance(part, LSTMModule | GRUModule)]


def check_memoryless(name: str, network: Any) -> Any:
    """Return a TensorDictModule that reads one state at a time, or refuse by name what is none."""
    if recurrent_modules(check_network(name, network)):
        raise TypeError(
            f"{name} is recurrent, and a trace has no hidden state to weigh its steps by; give one "
            "that reads the state alone."
        )
    return network


def memory_keys(actor: Any) -> list[NestedKey]:
    """Return what a policy reads of its own past, by the names of its `LSTMModule` or `GRUModule`.

    Args:
        actor (TensorDictModule): the policy.

    Returns:
        list of NestedKey: the keys of hidden states and of ``is_init``; none for a policy without
        memory.

    Raises:
        ValueError: a bidirectional memory, which reads a step's future.

    Examples:
        >>> from torchrl.modules import GRUModule
        >>> memory_keys(GRUModule(3, 4, in_key="observation", out_key="embedding"))
        ['recurrent_state', 'is_init']
    """
    keys: list[NestedKey] = []
    for module in recurrent_modules(actor):
        cell = module.lstm if isinstance(module, LSTMModule) else module.gru
        if cell.bidirectional:
            raise ValueError(
                "actor is bidirectional, but a step's action cannot depend on later ones."
            )
        keys += [unravel_key(key) for key in module.in_keys[1:]]
    return list(dict.fromkeys(keys))


def kept_first(data: TensorDict, kept: Tensor) -> tuple[TensorDict, Tensor]:
    """Move each trace's kept steps to its front, in their order, and mark where memory begins.

    What is left out is no part of the way: the detours before a last visit, and what lies before an
    episode's beginning. A memory that runs along time from the front has then seen, at each kept
    step, the kept steps before it.

    Args:
        data (TensorDict): ``[*B, T]``.
        kept (Tensor): ``[*B, T]`` bool.

    Returns:
        tuple: the data with ``is_init``, ``[*B, T, 1]`` bool, and the ``[*B, T]`` int64 place of
        each step in it.

    Examples:
        >>> data = TensorDict({"observation": torch.arange(4)}, [4])
        >>> moved, place = kept_first(data, torch.tensor([False, True, False, True]))
        >>> moved["observation"], place
        (tensor([1, 3, 0, 2]), tensor([2, 0, 3, 1]))
    """
    order = torch.sort((~kept).to(torch.uint8), dim=-1, stable=True).indices
    time = kept.ndim - 1
    moved = TensorDict({}, kept.shape, device=data.device)
    for key in data.keys(True, True):
        value = data.get(key)
        event = (1,) * (value.ndim - kept.ndim)
        index = order.reshape(*order.shape, *event).expand(value.shape)
        moved.set(key, value.gather(time, index))
    first = torch.zeros_like(kept)
    first[..., 0] = True
    moved.set(INIT_KEY, first.unsqueeze(-1))
    return moved, order.argsort(-1)

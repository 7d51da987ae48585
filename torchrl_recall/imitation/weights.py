"""How much each step of a trace is worth imitating: what `RecallTraceLoss(weight=...)` accepts.

Between the traces and the imitation: a weight asks a critic which steps are better than what the
policy does already, as self-imitation learning does of real steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_recall.checks import check_choice, check_finite, check_flag, check_real
from torchrl_recall.imitation.recurrent import check_memoryless


def network_output(network: TensorDictModuleBase, data: TensorDictBase, key: NestedKey) -> Tensor:
    """Run a network and read what it wrote."""
    value = network(data).get(key, default=None)
    if value is None:
        raise KeyError(f"the network writes no {key!r}, its keys are {list(network.out_keys)}.")
    return value


def state_value(
    network: TensorDictModuleBase,
    data: TensorDictBase,
    key: NestedKey,
    kept: Tensor,
    check: bool = True,
) -> Tensor:
    """Run a network with one value for each row of ``data``, ``[*B]``."""
    value = network_output(network, data.select(*network.in_keys), key)
    return one_each_step(value, kept, key) if check else one_each(data, value, repr(key))


def one_each_step(value: Tensor, kept: Tensor, key: NestedKey) -> Tensor:
    """Return one finite number for each kept step, ``[*B]``."""
    if value.shape not in (kept.shape, (*kept.shape, 1)):
        raise ValueError(
            f"{key!r} has shape {tuple(value.shape)}, expected one entry for each step, "
            f"{tuple(kept.shape)}."
        )
    value = value.reshape(kept.shape)
    check_finite(f"{key!r} at kept steps", value.masked_fill(~kept, 0.0))
    return value


def _one_each_trace(key: NestedKey, value: Tensor, traces: Iterable[int]) -> Tensor:
    """Return ``[*B, N]`` of an entry that has one number for each row ``[*B]`` or trace."""
    traces = torch.Size(traces)
    for shape in (value.shape, value.shape[:-1] if value.shape[-1:] == (1,) else None):
        if (
            shape is not None
            and len(traces) - len(shape) in (0, 1)
            and traces[: len(shape)] == shape
        ):
            value = value.reshape(shape + (1,) * (len(traces) - len(shape)))
            return value.expand(traces)
    raise ValueError(
        f"value key {key!r} has shape {tuple(value.shape)}, expected one number for each row or "
        f"for each of {tuple(traces)} traces."
    )

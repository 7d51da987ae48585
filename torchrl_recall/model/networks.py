"""The networks of a backtracking model: one set of three, or a set for each member of an ensemble.

A set is what learns. Codecs, heads and running statistics are the model's, shared by all sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrl.modules import MLP

from torchrl_recall.checks import check_at_least_one, check_flag

# The names of a set's networks, on the model itself or on a member of an ensemble.
NETWORKS = ("action_network", "delta_network", "stop_network")


class StepNetworks(nn.Module):
    """A member's own networks.

    Args:
        networks (dict): of `build_networks`.
    """

    action_network: MLP | None
    delta_network: MLP
    stop_network: MLP | None

    def __init__(self, networks: dict[str, MLP | None]) -> None:
        super().__init__()
        for name, network in networks.items():
            setattr(self, name, network)


def add_networks(model: Any, **options: Any) -> None:
    """Give a model its networks: its own, or those of each member of an ensemble.

    Args:
        model (BacktrackModel): with its codecs and heads.
        **options: of `build_networks`.
    """
    _check_options(**options)
    sets = [build_networks(model, **options) for _ in range(model.num_members)]
    if model.num_members == 1:
        for name, network in sets[0].items():
            setattr(model, name, network)
    else:
        model.members = nn.ModuleList(StepNetworks(networks) for networks in sets)
    start_heads(model)


def build_networks(
    model: Any,
    *,
    stop: bool,
    num_cells: Sequence[int],
    activation_class: type[nn.Module],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> dict[str, MLP | None]:
    """Return a set of networks by name; None for one that the model does without.

    Args:
        model (BacktrackModel): with its codecs and heads, which say how wide the networks are.

    Keyword Args:
        stop (bool): whether there is a stop head.
        num_cells (sequence of int): width of each hidden layer.
        activation_class (type): activation between layers.
        dtype (torch.dtype): dtype of the parameters.
        device (torch.device, optional): device of the parameters.

    Returns:
        dict: a network, or None, for each of `NETWORKS`.
    """

    def network(in_features: int, out_features: int) -> MLP:
        return MLP(
            in_features=in_features,
            out_features=out_features,
            num_cells=num_cells,
            activation_class=activation_class,
            device=device,
        ).to(dtype)

    features, action = model.observation.feature_size, model.action
    learned = not action.is_uniform
    return {
        "action_network": network(features, action.head.output_size) if learned else None,
        "delta_network": network(features + action.head.feature_size, model.delta_head.output_size),
        "stop_network": network(features, 1) if stop else None,
    }


@torch.no_grad()
def start_heads(model: Any) -> None:
    """Let the last layers of all sets begin where the heads ask for it, see ``start_scale``.

    Args:
        model (BacktrackModel): with its heads and networks.
    """
    for networks in [model] if model.num_members == 1 else model.members:
        for network, head in (
            (networks.action_network, model.action.head),
            (networks.delta_network, model.delta_head),
        ):
            start_scale: Any = getattr(head, "start_scale", None)
            if network is not None and start_scale is not None:
                start_scale(list(network.children())[-1])


def _check_options(stop: Any, num_cells: Any, activation_class: Any, **_: Any) -> None:
    """Refuse what no networks can be built of."""
    check_flag("stop", stop)
    if not isinstance(num_cells, Sequence):
        raise TypeError(f"num_cells must be a sequence of widths, got {num_cells!r}.")
    for width in num_cells:
        check_at_least_one("num_cells", width)
    try:
        made = activation_class()
    except (TypeError, ValueError):
        made = None
    if not isinstance(made, nn.Module) or not isinstance(activation_class, type):
        raise TypeError(
            "activation_class must be a Module class that needs no arguments, got "
            f"{activation_class!r}."
        )


def choose_dtype(observations: Mapping[Any, Any], dtype: torch.dtype | None) -> torch.dtype:
    """Return the parameters' dtype: the one given, the first continuous observation's, torch's own.

    Args:
        observations (mapping): key to size or spec.
        dtype (torch.dtype, optional): what was asked for.

    Returns:
        torch.dtype: a floating-point one.

    Raises:
        ValueError: another one was asked for.
    """
    if dtype is None:
        dtypes = [getattr(spec, "dtype", None) for spec in observations.values()]
        floating = [d for d in dtypes if d is not None and d.is_floating_point]
        dtype = floating[0] if floating else torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, got {dtype}.")
    return dtype

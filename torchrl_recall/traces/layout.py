"""A model as plain data: a layout, which compares and serialises as a string, and live tensors.

What the native library and the operator know of a `BacktrackModel`: everything that is not a
tensor's value is in the layout, everything that is comes from the tensors, in a fixed order.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import chain, pairwise, repeat
from operator import contains, getitem
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.heads import CategoricalHead, GaussianHead, NormalHead, SupportDelta
from torchrl_recall.model.mixture import MixtureDelta
from torchrl_recall.model.networks import NETWORKS
from torchrl_recall.model.uniform import UniformHead
from torchrl_recall.native import interface
from torchrl_recall.traces import eager
from torchrl_recall.traces.columns import Form

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Softplus: "softplus",
    nn.Mish: "mish",
}


# What else a walk depends on: attributes of heads, normalizers and activations.
_SETTINGS = (
    "alpha",
    "approximate",
    "beta",
    "floor",
    "log_scale_range",
    "negative_slope",
    "threshold",
)


def unsupported(model: BacktrackModel) -> str | None:
    """Say why a model has no layout that the native library can run, or None if it has."""
    if not isinstance(model.action.head, CategoricalHead | GaussianHead | UniformHead):
        return "the actions are several choices at once"
    reason = eager.unsupported(model)
    if reason is not None:
        return reason
    for name in NETWORKS:
        network = getattr(model, name)
        layers: Any = [] if network is None else list(network)
        if len(layers) // 2 + 1 > interface.MAX_LAYERS:
            return f"{name} has more than {interface.MAX_LAYERS} Linear layers"
        for layer in layers[1::2]:
            if activation_of(layer) is None:
                return f"{name} has the activation {layer}"
        for one, other in pairwise(layers[::2]):
            if one.weight.shape[0] != other.weight.shape[1]:
                return f"{name} has layers that do not fit each other"
        if any(layer.bias.shape != layer.weight.shape[:1] for layer in layers[::2]):
            return f"{name} has a bias that does not fit its weight"
    for tensor in live_tensors(model):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"a parameter or statistic has dtype {tensor.dtype}"
        if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
            return f"a parameter or statistic is on {tensor.device} or not contiguous"
    if model.observation.is_discrete and model.observation.num_states >= 2**53:
        return "there are 2^53 states or more"
    for head in (model.action.head, model.delta_head):
        if isinstance(head, CategoricalHead) and head.output_size >= 2**22:
            return "a head has 2^22 classes or more"
    if model.observation.is_discrete and max(model.observation.cardinality) >= 2**24:
        return "a coordinate has 2^24 values or more"
    return None


def live_holders(model: BacktrackModel) -> list[dict[str, Tensor]]:
    """Return the modules' own dictionaries that hold the layout's tensors, in its order."""
    found: list[Any] = []
    for name in NETWORKS:
        network = getattr(model, name)
        if network is not None:
            found += [layer._parameters for layer in network._modules.values()]
    for part in (model.observation, model.action.head, model.delta_head):
        found.append(getattr(part, "normalizer", None) or part)
        found[-1] = found[-1]._buffers
    return found


class Watch:
    """Notices when a model is no longer built as it was, at little cost; values may change.

    Args:
        model (BacktrackModel): the model; not kept alive.
    """

    def __init__(self, model: BacktrackModel) -> None:
        networks: Any = [getattr(model, name) for name in NETWORKS]
        networks = [network for network in networks if network is not None]
        owners = [model, model.observation, model.action, model.action.head, model.delta_head]
        # Live views of the modules' own dictionaries, beside what they held.
        self.owners = [owner._modules for owner in owners]
        self.owned = [dict(modules) for modules in self.owners]
        self.stacks = [network._modules.values() for network in networks]
        self.stacked = [list(modules) for modules in self.stacks]
        layers: Any = [layer for network in networks for layer in network._modules.values()]
        called = [model.observation, *networks, *layers]
        self.hooks = [h for m in called for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.called = [module.__dict__ for module in called]
        parts: Any = [model.action.head, model.delta_head, model.observation]
        parts += [getattr(part, "normalizer", None) for part in parts]
        holders = [part.__dict__ for part in [*parts, *layers] if part is not None]
        settings = [(d, name) for d in holders for name in _SETTINGS if name in d]
        self.holders = [d for d, _ in settings]
        self.names = [name for _, name in settings]
        self.values = [d[name] for d, name in settings]
        self.live = [holder.values() for holder in live_holders(model)]
        # Their memory is held, even where ``.data`` is set: nothing else can come to lie there.
        self.tensors = [tensor.detach() for tensor in live_tensors(model)]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def sees_no_change(self) -> bool:
        """Return whether the model still has the modules, settings and tensors it had."""
        # Loops in C, by `map` and the like: this runs at every call.
        if self.owners != self.owned or [*map(list, self.stacks)] != self.stacked:
            return False
        if any(self.hooks) or any(map(contains, self.called, repeat("forward"))):
            return False
        if [*map(getitem, self.holders, self.names)] != self.values:
            return False
        try:
            # A tensor that is no longer contiguous is missing from the list.
            contiguous = filter(Tensor.is_contiguous, chain.from_iterable(self.live))
            return [*map(Tensor.data_ptr, contiguous)] == self.addresses
        except TypeError:  # a bias became None
            return False


def live_tensors(model: BacktrackModel) -> list[Tensor]:
    """Return the tensors of a model in the layout's order."""
    return [tensor for holder in live_holders(model) for tensor in holder.values()]


def layout_of(model: BacktrackModel) -> str:
    """Return all of a model but its tensors' values, as JSON.

    Args:
        model (BacktrackModel): one that is not `unsupported`.

    Returns:
        str: the same for models of the same form.
    """
    codec = model.observation
    parts = {
        "observation": codec if codec.normalizer is None else codec.normalizer,
        "action": model.action.head,
        "delta": model.delta_head,
    }
    for name in ("action", "delta"):
        parts[name] = getattr(parts[name], "normalizer", parts[name])
    head = model.delta_head
    return json.dumps(
        {
            "networks": [_network(getattr(model, name)) for name in NETWORKS],
            "buffers": {name: list(part._buffers) for name, part in parts.items()},
            "action": _head(model.action.head),
            "delta": _head(head),
            "state_size": codec.size,
            "feature_size": codec.feature_size,
            "is_discrete": codec.is_discrete,
            "has_joint_code": codec.is_discrete and codec.has_joint_code,
            "cardinality": codec.cardinality,
            "floor": 0.0 if codec.normalizer is None else codec.normalizer.floor,
            "has_dead_ends": isinstance(head, SupportDelta) and head.has_dead_ends,
        }
    )


@lru_cache(maxsize=64)
def parse(layout: str) -> dict[str, Any]:
    """Return what `layout_of` wrote."""
    return json.loads(layout)


def form_of(layout: str) -> Form:
    """Return what columns look like for a model of a layout."""
    model = parse(layout)
    action = model["action"]
    return Form(
        state_size=model["state_size"],
        is_discrete=model["is_discrete"],
        action_size=None if action["kind"] == interface.CLASS else action["size"],
    )


def named_tensors(layout: str, tensors: list[Tensor]) -> dict[str, Any]:
    """Return live tensors by name: ``networks`` as pairs of weight and bias, buffers by part."""
    form, rest = parse(layout), iter(tensors)
    networks = [
        [] if network is None else [(next(rest), next(rest)) for _ in network["widths"][1:]]
        for network in form["networks"]
    ]
    buffers = {
        part: {name: next(rest) for name in names} for part, names in form["buffers"].items()
    }
    return {"networks": networks, **buffers}


def _network(network: nn.Module | None) -> dict[str, Any] | None:
    if network is None:
        return None
    layers: Any = list(network._modules.values())
    activation = activation_of(layers[1]) if len(layers) > 1 else ("identity", 1.0)
    assert activation is not None
    widths = [layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers[::2])]
    return {"widths": widths, "activation": activation[0], "slope": activation[1]}


def activation_of(layer: nn.Module) -> tuple[str, float] | None:
    """Return an activation's name and slope, or None if the kernels have no such."""
    name, slope = _ACTIVATIONS.get(type(layer)), 1.0
    if isinstance(layer, nn.LeakyReLU):
        slope = float(layer.negative_slope)
    elif isinstance(layer, nn.ELU):
        slope = float(layer.alpha)
    elif isinstance(layer, nn.GELU) and layer.approximate == "tanh":
        name = "gelu_tanh"
    elif isinstance(layer, nn.Softplus) and (layer.beta, layer.threshold) != (1, 20):
        return None
    return None if name is None else (name, slope)


def _head(head: nn.Module) -> dict[str, Any]:
    if isinstance(head, CategoricalHead):
        kind = interface.SUPPORT if isinstance(head, SupportDelta) else interface.CLASS
        return {"kind": kind, "size": head.output_size}
    if isinstance(head, UniformHead):
        return {"kind": interface.BOX, "size": head.size}
    assert isinstance(head, GaussianHead | MixtureDelta)
    low, high = head.log_scale_range
    mixture = isinstance(head, MixtureDelta)
    normal = mixture or isinstance(head, NormalHead)
    kind = interface.NORMAL if normal else interface.TANH_NORMAL
    return {
        "kind": interface.MIXTURE if mixture else kind,
        "size": head.size,
        "components": head.num_components if mixture else 1,
        "low": low,
        "width": high - low,
        "floor": head.normalizer.floor if normal else 0.0,
    }

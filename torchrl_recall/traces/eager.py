"""The tiled eager backend: the reference walk with all that costs time taken out of the loop.

Against the reference it (1) folds the scale of the normalisation into the weights, (2) stacks the
first layers of all networks into one product, (3) adds the action's share of the first layer
instead of concatenating, (4) writes into buffers, and (5) computes log-probabilities at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, pad
from torchrl.modules import MLP

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.factors import FactoredHead
from torchrl_recall.model.heads import CategoricalHead, NormalHead, TanhNormalHead
from torchrl_recall.model.joint_action import JointHead
from torchrl_recall.model.mixture import MixtureDelta
from torchrl_recall.model.networks import NETWORKS
from torchrl_recall.model.uniform import UniformHead
from torchrl_recall.traces.eager_heads import (
    ClassActions,
    ClassDeltas,
    FactorActions,
    MixtureDeltas,
    NormalActions,
    NormalDeltas,
    UniformActions,
)
from torchrl_recall.traces.masks import since_start
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.walk import Walk

# Outputs of which products like a multiple: 222 take a sixth longer than 224.
OUTPUTS = 8
Activation = Callable[[Tensor], Tensor]
_IN_PLACE: dict[type[nn.Module], Activation] = {
    nn.ReLU: torch.relu_,
    nn.Tanh: torch.tanh_,
    nn.Sigmoid: torch.sigmoid_,
}


def is_changed(module: nn.Module) -> bool:
    """Return whether calling a module does something else than its class says."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or "forward" in module.__dict__


def unsupported(model: BacktrackModel) -> str | None:
    """Say why this backend cannot run a model, or None if it can."""
    if isinstance(model.action.head, JointHead):
        return "the action has several keys"
    if is_changed(model.observation):
        return "the observation has hooks or a forward of its own"
    for name in NETWORKS:
        network = getattr(model, name)
        if network is None:
            continue
        layers = list(network) if type(network) in (nn.Sequential, MLP) else []
        linear, activations = layers[::2], layers[1::2]
        if not layers or len(layers) % 2 == 0 or not all(type(m) is nn.Linear for m in linear):
            return f"{name} is not an alternation of Linear layers and activations"
        if any(map(is_changed, [network, *layers])):
            return f"{name} has hooks or a forward of its own"
        if any(m.bias is None for m in linear):
            return f"{name} has Linear layers without bias"
        kinds = {type(m) for m in activations}
        if len(kinds) == 1 and kinds <= _IN_PLACE.keys():
            continue
        if any(list(m.parameters()) or list(m.buffers()) for m in activations):
            return f"{name} has activations with parameters"
        if len({repr(m) for m in activations}) > 1:
            return f"{name} has more than one kind of activation"
    return None


class EagerWalk:
    """A model packed for walking; call it with starts and noise, tile by tile.

    Pack and walk under `torch.no_grad`, as `sample_traces` does. A walk lies in memory that the
    next one of its size uses again: fresh pages would take a twentieth of the time.

    Args:
        model (BacktrackModel): a model for which `unsupported` finds no reason.
    """

    def __init__(self, model: BacktrackModel) -> None:
        self.codec = model.observation
        self.action_head = model.action.head
        self.delta_head = model.delta_head
        self.is_uniform = model.action_network is None
        self._rooms: dict[str, Tensor] = {}
        found = (model.delta_network, model.action_network, model.stop_network)
        networks: list[list[Any]] = [list(network) for network in found if network is not None]
        layers = [[(m.weight, m.bias) for m in network[::2]] for network in networks]
        self.activations = [_activation(network[1:2]) for network in networks]

        width = self.codec.feature_size
        weight, bias = layers[0][0]
        self.action_weight: Tensor = weight[:, width:].t()
        layers[0][0] = weight[:, :width], bias
        if isinstance(self.delta_head, NormalHead):
            # The step multiplies the location by the unit of the change; its mean enters here.
            mean, self.delta_unit = self.delta_head.normalizer.mean, self.delta_head.normalizer.std
            weight, bias = layers[0][-1]
            layers[0][-1] = weight, bias + pad(mean / self.delta_unit, (0, len(mean)))
            low, high = self.delta_head.log_scale_range
            self.delta_scale = self.delta_unit.log() + low, high - low
        if isinstance(self.action_head, NormalHead | TanhNormalHead):
            low, high = self.action_head.log_scale_range
            self.action_scale = bias.new_full((), low), high - low
        self._stack_first([network_layers[0] for network_layers in layers])
        self.rest = [[(w.t(), b) for w, b in network_layers[1:]] for network_layers in layers]
        heads = [self.delta_head] if self.is_uniform else [self.delta_head, self.action_head]
        for network_layers, head in zip(self.rest, heads, strict=False):
            if network_layers and isinstance(head, NormalHead | TanhNormalHead):
                network_layers[-1] = _widened(*network_layers[-1])
        self.outputs = [
            len(network_layers[-1][1]) if network_layers else width
            for network_layers, width in zip(self.rest, self.widths, strict=True)
        ]

    def _stack_first(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Stack the first layers, which all read the state, with their input normalised."""
        weight = torch.cat([w.t() for w, _ in layers], 1)
        bias = torch.cat([b for _, b in layers])
        if self.codec.normalizer is not None:
            # The mean is subtracted in the walk: folded into the bias it would cancel to nothing
            # where a feature is large and nearly constant.
            weight /= self.codec.normalizer.std.unsqueeze(-1)
            self.mean, self.first_bias = self.codec.normalizer.mean, bias
        else:
            # Exactly one feature of the first coordinate is on, so its rows can carry the bias.
            weight[: self.codec.cardinality[0]] += bias
            self.first_bias = None
        self.first_weight = weight
        self.widths = [len(b) for _, b in layers]

    def __call__(self, start: Tensor, noise: TraceNoise) -> Walk:
        """Walk one tile backwards.

        Args:
            start (Tensor): ``[n, size]`` flat states.
            noise (TraceNoise): the random numbers of the tile.

        Returns:
            Walk: the traces.
        """
        num_steps, n = noise.action.shape[:2]
        states = self.room("states", start, num_steps + 1, n, self.codec.size)
        states[num_steps] = start
        state_at = states.unbind(0)
        first = noise.action.new_empty(n, sum(self.widths))
        delta_first, *firsts = first.split(self.widths, 1)
        delta_rest, *rests = (
            _Rest(layers, activation, n)
            for layers, activation in zip(self.rest, self.activations, strict=True)
        )
        actions = _sampler(_ACTIONS, self.action_head)(self, noise.action)
        deltas = _sampler(_DELTAS, self.delta_head)(self, noise.delta)
        stop_out = None if noise.stop is None else first.new_empty(num_steps, n, 1)

        for t in range(num_steps - 1, -1, -1):
            state = state_at[t + 1]
            self._enter(state, first)
            if stop_out is not None:
                rests[-1](firsts[-1], stop_out[t])
            if not self.is_uniform:
                rests[0](firsts[0], actions.parameters_at[t])
            actions.step(t, delta_first)
            delta_rest(delta_first, deltas.parameters_at[t])
            deltas.step(t, state, state_at[t])

        alive = None
        if stop_out is not None and noise.stop is not None:
            goes_on = noise.stop >= torch.sigmoid(stop_out.squeeze(-1))
            alive = since_start(goes_on)
        values, action_log_prob = actions.finish()
        return Walk(states, values, action_log_prob, deltas.log_prob(), alive)

    def room(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return memory for a tensor like another one, that of the last walk if it fits."""
        kept = self._rooms.get(name)
        if kept is None or kept.shape != shape:
            kept = self._rooms[name] = like.new_empty(shape)
        return kept

    def _enter(self, state: Tensor, first: Tensor) -> None:
        """Run the first layer of all networks at once."""
        if self.first_bias is None:
            index = self.codec.feature_index(state)
            first.copy_(embedding_bag(index, self.first_weight, mode="sum"))
        else:
            torch.addmm(self.first_bias, state - self.mean, self.first_weight, out=first)


def _widened(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Add outputs that are zero, up to a whole number of vectors: the rest of one costs as much."""
    more = -len(bias) % OUTPUTS
    return pad(weight, (0, more)), pad(bias, (0, more))


class _Rest:
    """The layers of a network behind its first one, with buffers for a tile of ``n`` rows."""

    def __init__(
        self, layers: list[tuple[Tensor, Tensor]], activation: Activation | None, n: int
    ) -> None:
        self.activation = activation
        self.hidden = [(weight, bias, bias.new_empty(n, len(bias))) for weight, bias in layers[:-1]]
        self.last = layers[-1] if layers else None

    def __call__(self, x: Tensor, out: Tensor) -> None:
        if self.last is None:
            out.copy_(x)
            return
        activation = self.activation
        assert activation is not None  # there is one between any two layers
        x = activation(x)
        for weight, bias, buffer in self.hidden:
            x = activation(torch.addmm(bias, x, weight, out=buffer))
        weight, bias = self.last
        torch.addmm(bias, x, weight, out=out)


_ACTIONS: dict[type[nn.Module], type[Any]] = {
    NormalHead: NormalActions,
    TanhNormalHead: NormalActions,
    UniformHead: UniformActions,
    CategoricalHead: ClassActions,
    FactoredHead: FactorActions,
}
_DELTAS: dict[type[nn.Module], type[Any]] = {
    NormalHead: NormalDeltas,
    MixtureDelta: MixtureDeltas,
    CategoricalHead: ClassDeltas,
}


def _sampler(kinds: dict[type[nn.Module], type[Any]], head: nn.Module) -> type[Any]:
    """Return what samples a head in a tile."""
    return next(kind for cls, kind in kinds.items() if isinstance(head, cls))


def _activation(modules: list[nn.Module]) -> Activation | None:
    """Return an activation, in place where it can be; None for a network of one layer."""
    return _IN_PLACE.get(type(modules[0]), modules[0]) if modules else None

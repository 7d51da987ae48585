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
from torch.nn.functional import embedding_bag, pad, softplus
from torchrl.modules import MLP

from torchrl_recall.heads import (
    TANH_LIMIT,
    CategoricalHead,
    NormalHead,
    SupportDelta,
    TanhNormalHead,
    normal_log_prob,
    sample_index,
)
from torchrl_recall.model import BacktrackModel
from torchrl_recall.traces.masks import since_start
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.walk import Walk

Activation = Callable[[Tensor], Tensor]
Head = NormalHead | TanhNormalHead | CategoricalHead
_IN_PLACE: dict[type[nn.Module], Activation] = {
    nn.ReLU: torch.relu_,
    nn.Tanh: torch.tanh_,
    nn.Sigmoid: torch.sigmoid_,
}


NETWORKS = ("action_network", "delta_network", "stop_network")


def is_changed(module: nn.Module) -> bool:
    """Return whether calling a module does something else than its class says."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or "forward" in module.__dict__


def unsupported(model: BacktrackModel) -> str | None:
    """Say why this backend cannot run a model, or None if it can."""
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

    Pack and walk under `torch.no_grad`, as `sample_traces` does.

    Args:
        model (BacktrackModel): a model for which `unsupported` finds no reason.
    """

    def __init__(self, model: BacktrackModel) -> None:
        self.codec = model.observation
        self.action_head: Head = model.action.head
        self.delta_head: Head = model.delta_head
        networks: list[list[Any]] = [list(model.delta_network), list(model.action_network)]
        if model.stop_network is not None:
            networks.append(list(model.stop_network))
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
        if not isinstance(self.action_head, CategoricalHead):
            low, high = self.action_head.log_scale_range
            self.action_scale = bias.new_full((), low), high - low
        self._stack_first([network_layers[0] for network_layers in layers])
        self.rest = [[(w.t(), b) for w, b in network_layers[1:]] for network_layers in layers]

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
        states = start.new_empty(num_steps + 1, n, self.codec.size)
        states[num_steps] = start
        state_at = states.unbind(0)
        first = noise.action.new_empty(n, sum(self.widths))
        delta_first, action_first, *stop_first = first.split(self.widths, 1)
        delta_rest, action_rest, *stop_rest = (
            _Rest(layers, activation, n)
            for layers, activation in zip(self.rest, self.activations, strict=True)
        )
        by_class = isinstance(self.action_head, CategoricalHead)
        actions = (_ClassActions if by_class else _NormalActions)(self, noise.action)
        by_class = isinstance(self.delta_head, CategoricalHead)
        deltas = (_ClassDeltas if by_class else _NormalDeltas)(self, noise.delta)
        stop_out = None if noise.stop is None else first.new_empty(num_steps, n, 1)

        for t in range(num_steps - 1, -1, -1):
            state = state_at[t + 1]
            self._enter(state, first)
            if stop_out is not None:
                stop_rest[0](stop_first[0], stop_out[t])
            action_rest(action_first, actions.parameters_at[t])
            actions.step(t, delta_first)
            delta_rest(delta_first, deltas.parameters_at[t])
            deltas.step(t, state, state_at[t])

        alive = None
        if stop_out is not None and noise.stop is not None:
            goes_on = noise.stop >= torch.sigmoid(stop_out.squeeze(-1))
            alive = since_start(goes_on)
        return Walk(states, *actions.finish(), deltas.log_prob(), alive)

    def _enter(self, state: Tensor, first: Tensor) -> None:
        """Run the first layer of all networks at once."""
        if self.first_bias is None:
            index = self.codec.feature_index(state)
            first.copy_(embedding_bag(index, self.first_weight, mode="sum"))
        else:
            torch.addmm(self.first_bias, state - self.mean, self.first_weight, out=first)


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


class _Normals:
    """Samples of a Gaussian head in one tile; keeps what their log-densities need.

    Args:
        noise (Tensor): ``[T, n, size]`` standard normal.
        low (Tensor): with ``width``, the log-scale is ``low + width * sigmoid(raw)``.
        width (float): see ``low``.
    """

    def __init__(self, noise: Tensor, low: Tensor, width: float) -> None:
        self.noise, self.low, self.width = noise, low, width
        # One call for all views: slicing step by step costs as much as the arithmetic.
        self.noise_at = noise.unbind(0)
        self.log_scale = torch.empty_like(noise)
        self.log_scale_at = self.log_scale.unbind(0)
        num_steps, n, size = noise.shape
        self.scale = noise.new_empty(n, size)
        self.parameters = noise.new_empty(n, 2 * size)
        self.parameters_at = (self.parameters,) * num_steps
        self.loc = self.parameters[:, :size]
        # The half that is not needed costs less than a step out of line.
        self.gates = torch.empty_like(self.parameters)
        self.gate = self.gates[:, size:]

    def sample(self, t: int, base: Tensor, out: Tensor) -> Tensor:
        """Write ``base + scale * noise`` of step ``t``."""
        torch.sigmoid(self.parameters, out=self.gates)
        log_scale = torch.add(self.low, self.gate, alpha=self.width, out=self.log_scale_at[t])
        torch.exp(log_scale, out=self.scale)
        return torch.addcmul(base, self.scale, self.noise_at[t], out=out)


class _NormalActions(_Normals):
    def __init__(self, walk: EagerWalk, noise: Tensor) -> None:
        super().__init__(noise, *walk.action_scale)
        assert isinstance(walk.action_head, NormalHead | TanhNormalHead)
        self.head, self.weight = walk.action_head, walk.action_weight
        self.squashes = isinstance(self.head, TanhNormalHead)
        self.values = torch.empty_like(noise)
        self.value_at = self.values.unbind(0)
        self.squashed = torch.empty_like(self.scale)

    def step(self, t: int, delta_first: Tensor) -> None:
        """Sample, and add the action's share of the delta network's first layer."""
        value = self.sample(t, self.loc, self.value_at[t])
        if self.squashes:
            value = torch.clamp(value, -TANH_LIMIT, TANH_LIMIT, out=self.squashed).tanh_()
        delta_first.addmm_(value, self.weight)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the actions in their own unit and their log-densities."""
        if isinstance(self.head, NormalHead):
            mean, std = self.head.normalizer.mean, self.head.normalizer.std
            log_prob = normal_log_prob(self.noise, self.log_scale) - std.log().sum()
            return torch.addcmul(mean, self.values, std), log_prob
        inside = self.values.clamp(-TANH_LIMIT, TANH_LIMIT)
        # The noise that would have led to the clamped value.
        noise = torch.addcdiv(self.noise, inside - self.values, self.log_scale.exp())
        # tanh changes the scale too, by 1 - tanh(x)², whose log is -2 (x + softplus(-2 x) - log 2).
        squeeze = torch.sub(inside, softplus(inside, beta=-2), alpha=2)
        log_scale = torch.sub(self.log_scale, squeeze, alpha=2)
        log_scale += (4 * self.head.half_range).log()
        log_prob = normal_log_prob(noise, log_scale)
        values = torch.addcmul(self.head.middle, self.head.half_range, inside.tanh_())
        return values, log_prob


class _NormalDeltas(_Normals):
    def __init__(self, walk: EagerWalk, noise: Tensor) -> None:
        super().__init__(noise, *walk.delta_scale)
        self.unit = walk.delta_unit

    def step(self, t: int, state: Tensor, before: Tensor) -> None:
        """Sample, and write the predecessor of ``state``."""
        self.sample(t, state, before).addcmul_(self.loc, self.unit)

    def log_prob(self) -> Tensor:
        """Return the log-densities of all steps."""
        return normal_log_prob(self.noise, self.log_scale)


class _Classes:
    """Samples of a categorical head in one tile; keeps what their log-probabilities need.

    Args:
        noise (Tensor): ``[T, n, 1]`` uniform in [0, 1).
        num_classes (int): number of classes.
    """

    def __init__(self, noise: Tensor, num_classes: int) -> None:
        self.noise_at = noise.squeeze(-1).unbind(0)
        self.parameters_at = noise.new_empty(*noise.shape[:2], num_classes).unbind(0)
        self.logits: list[Tensor] = []
        self.indices: list[Tensor] = []

    def sample(self, t: int, logits: Tensor) -> Tensor:
        """Return the class indices of step ``t``, the last step first."""
        index = sample_index(logits, self.noise_at[t])
        self.logits.append(logits)
        self.indices.append(index)
        return index

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the class indices and their log-probabilities."""
        logits, index = torch.stack(self.logits[::-1]), torch.stack(self.indices[::-1])
        # Classes first: torch vectorises over what follows, and there may be very few of them.
        log_prob = torch.log_softmax(logits.movedim(-1, 0).contiguous(), 0)
        return index, log_prob.gather(0, index.unsqueeze(0)).squeeze(0)


class _ClassActions(_Classes):
    def __init__(self, walk: EagerWalk, noise: Tensor) -> None:
        super().__init__(noise, walk.action_head.output_size)
        self.weight = walk.action_weight

    def step(self, t: int, delta_first: Tensor) -> None:
        """Sample, and add the action's share of the delta network's first layer."""
        delta_first.add_(self.weight[self.sample(t, self.parameters_at[t])])


class _ClassDeltas(_Classes):
    def __init__(self, walk: EagerWalk, noise: Tensor) -> None:
        super().__init__(noise, walk.delta_head.output_size)
        self.head, self.codec = walk.delta_head, walk.codec

    def step(self, t: int, state: Tensor, before: Tensor) -> None:
        """Sample, and write the predecessor of ``state``."""
        logits = self.parameters_at[t]
        if isinstance(self.head, SupportDelta):
            index = self.sample(t, self.head.logits(logits, state))
            before.copy_(self.head.displace(state, index))
        else:
            before.copy_(self.codec.from_joint_index(self.sample(t, logits)))

    def log_prob(self) -> Tensor:
        """Return the log-probabilities of all steps."""
        return self.finish()[1]


def _activation(modules: list[nn.Module]) -> Activation | None:
    """Return an activation, in place where it can be; None for a network of one layer."""
    return _IN_PLACE.get(type(modules[0]), modules[0]) if modules else None

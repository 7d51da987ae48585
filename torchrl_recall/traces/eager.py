"""The tiled eager backend: the reference walk with everything that costs time taken out of the loop.

Against the reference it (1) folds the normalisation into the weights, (2) stacks the first layers of
all networks into one product, (3) adds the action's share of the first layer instead of
concatenating, (4) writes into buffers, and (5) computes log-probabilities once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchrl.modules import MLP

from torchrl_recall.heads import (
    TANH_LIMIT,
    CategoricalHead,
    NormalDelta,
    NormalHead,
    TanhNormalHead,
    normal_log_prob,
    sample_index,
)
from torchrl_recall.model import BacktrackModel
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.walk import Walk


def unsupported(model: BacktrackModel) -> str | None:
    """Say why this backend cannot run a model, or None if it can."""
    for name in ("action_network", "delta_network", "stop_network"):
        network = getattr(model, name)
        if network is None:
            continue
        layers = list(network) if type(network) in (nn.Sequential, MLP) else []
        linear, activations = layers[::2], layers[1::2]
        if not layers or len(layers) % 2 == 0 or not all(type(m) is nn.Linear for m in linear):
            return f"{name} is not an alternation of Linear layers and activations"
        if any(m.bias is None for m in linear):
            return f"{name} has Linear layers without bias"
        if any(list(m.parameters()) or list(m.buffers()) for m in activations):
            return f"{name} has activations with parameters"
        if len({repr(m) for m in activations}) > 1:
            return f"{name} has more than one kind of activation"
    return None


class EagerWalk:
    """A model packed for walking; call it with starts and noise, tile by tile.

    Args:
        model (BacktrackModel): a model for which `unsupported` finds no reason.
    """

    def __init__(self, model: BacktrackModel) -> None:
        self.codec = model.observation
        self.action_head = model.action.head
        self.delta_head = model.delta_head
        nets = [model.delta_network, model.action_network]
        if model.stop_network is not None:
            nets.append(model.stop_network)
        layers = [[(m.weight.detach(), m.bias.detach()) for m in list(net)[::2]] for net in nets]
        activations = [_activation(net[1]) if len(net) > 1 else None for net in nets]

        width = self.codec.feature_size
        delta_weight, delta_bias = layers[0][0]
        self.action_weight = delta_weight[:, width:].t()
        layers[0][0] = (delta_weight[:, :width], delta_bias)
        if isinstance(self.action_head, CategoricalHead):
            self.action_weight = self.action_weight.contiguous()
        if isinstance(self.delta_head, NormalDelta):
            layers[0][-1], self.delta_low = self._fold_delta(*layers[0][-1])
            low, high = self.delta_head.log_scale_range
            self.delta_width = high - low
            self._fold_first_is_last(layers)
        if isinstance(self.action_head, NormalHead | TanhNormalHead):
            low, high = self.action_head.log_scale_range
            self.action_low, self.action_width = delta_bias.new_tensor(low), high - low

        first = [net_layers[0] for net_layers in layers]
        weight, bias = (torch.cat(column) for column in zip(*first, strict=True))
        if self.codec.normalizer is not None:
            weight = weight / self.codec.normalizer.std
            bias = bias - weight @ self.codec.normalizer.mean
            self.first_weight, self.first_bias = weight.t(), bias
        else:
            table = weight.t().contiguous()
            # Exactly one feature of the first coordinate is on, so its rows can carry the bias.
            table[: self.codec.cardinality[0]] += bias
            self.first_weight, self.first_bias = table, None
        self.widths = [len(layer[1]) for layer in first]
        self.rest = [[(w.t(), b) for w, b in net_layers[1:]] for net_layers in layers]
        self.activations = activations

    def _fold_delta(self, weight: Tensor, bias: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        normalizer = self.delta_head.normalizer
        size, std = self.delta_head.size, normalizer.std
        weight, bias = weight.clone(), bias.clone()
        weight[:size] *= std.unsqueeze(-1)
        bias[:size] = bias[:size] * std + normalizer.mean
        return (weight, bias), std.log() + self.delta_head.log_scale_range[0]

    def _fold_first_is_last(self, layers: list) -> None:
        # Without hidden layers the action enters the output itself, so its share is folded too.
        if len(layers[0]) == 1:
            size, std = self.delta_head.size, self.delta_head.normalizer.std
            self.action_weight = self.action_weight.clone()
            self.action_weight[:, :size] *= std

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
        action_out = noise.action.new_empty(num_steps, n, self.action_head.output_size)
        delta_out = noise.action.new_empty(num_steps, n, self.delta_head.output_size)
        classes = isinstance(self.action_head, CategoricalHead)
        actions = noise.action.new_empty(
            (num_steps, n) if classes else noise.action.shape,
            dtype=torch.int64 if classes else noise.action.dtype,
        )
        first = noise.action.new_empty(n, sum(self.widths))
        buffers = [[first.new_empty(n, len(b)) for _, b in net[:-1]] for net in self.rest]
        stop_out = first.new_empty(num_steps, n, 1) if noise.stop is not None else None
        delta_first, action_first, *stop_first = first.split(self.widths, 1)
        # One call for all views: slicing step by step costs as much as the arithmetic.
        columns = (states, action_out, noise.action, actions, delta_out, noise.delta)
        state_at, action_out_at, action_noise, action_at, delta_out_at, delta_noise = (
            column.unbind(0) for column in columns
        )
        action_parts = _halves(action_out) if not classes else None
        delta_parts = _halves(delta_out) if isinstance(self.delta_head, NormalDelta) else None

        for t in range(num_steps - 1, -1, -1):
            state, action = state_at[t + 1], action_at[t]
            self._enter(state, first)
            if stop_out is not None:
                self._finish(2, stop_first[0], buffers[2], stop_out[t])
            self._finish(1, action_first, buffers[1], action_out_at[t])
            if action_parts is None:
                action.copy_(sample_index(action_out_at[t], action_noise[t].squeeze(-1)))
                delta_first.add_(self.action_weight[action])
            else:
                loc, raw = action_parts[0][t], action_parts[1][t]
                scale = torch.add(self.action_low, torch.sigmoid(raw), alpha=self.action_width)
                torch.addcmul(loc, scale.exp_(), action_noise[t], out=action)
                if isinstance(self.action_head, TanhNormalHead):
                    action.clamp_(-TANH_LIMIT, TANH_LIMIT).tanh_()
                delta_first.addmm_(action, self.action_weight)
            self._finish(0, delta_first, buffers[0], delta_out_at[t])
            if delta_parts is None:
                before, _ = self.delta_head.predecessor(delta_out_at[t], state, delta_noise[t])
                state_at[t].copy_(before)
            else:
                loc, raw = delta_parts[0][t], delta_parts[1][t]
                scale = torch.add(self.delta_low, torch.sigmoid(raw), alpha=self.delta_width)
                torch.addcmul(state, scale.exp_(), delta_noise[t], out=state_at[t]).add_(loc)

        # Nothing was kept of the loop but outputs and noise: enough for all log-probabilities.
        if isinstance(self.action_head, CategoricalHead):
            action_log_prob = self.action_head.log_prob(action_out, actions)
        else:
            actions, action_log_prob = self.action_head.sample(action_out, noise.action)
        if delta_parts is None:
            delta_log_prob = self.delta_head.predecessor_log_prob(
                delta_out, states[:-1], states[1:]
            )
        else:
            raw = delta_out.chunk(2, -1)[1]
            log_scale = torch.add(self.delta_low, torch.sigmoid(raw), alpha=self.delta_width)
            delta_log_prob = normal_log_prob(noise.delta, log_scale)
        alive = None
        if stop_out is not None and noise.stop is not None:
            goes_on = noise.stop >= torch.sigmoid(stop_out.squeeze(-1))
            alive = goes_on.flip(0).int().cumprod(0).flip(0).bool()
        return Walk(states, actions, action_log_prob, delta_log_prob, alive)

    def _enter(self, state: Tensor, first: Tensor) -> None:
        """Run the first layer of all networks at once."""
        if self.first_bias is None:
            index = self.codec.feature_index(state)
            first.copy_(nn.functional.embedding_bag(index, self.first_weight, mode="sum"))
        else:
            torch.addmm(self.first_bias, state, self.first_weight, out=first)

    def _finish(self, net: int, hidden: Tensor, buffers: list[Tensor], out: Tensor) -> None:
        """Run the layers behind the first one."""
        if not self.rest[net]:
            out.copy_(hidden)
            return
        activation = self.activations[net]
        assert activation is not None
        hidden = activation(hidden)
        for (weight, bias), buffer in zip(self.rest[net][:-1], buffers, strict=True):
            hidden = activation(torch.addmm(bias, hidden, weight, out=buffer))
        weight, bias = self.rest[net][-1]
        torch.addmm(bias, hidden, weight, out=out)


def _halves(parameters: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return location and raw scale of every step."""
    loc, raw = parameters.chunk(2, -1)
    return loc.unbind(0), raw.unbind(0)


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the in-place form of an activation where there is one."""
    in_place = {nn.ReLU: torch.relu_, nn.Tanh: torch.tanh_, nn.Sigmoid: torch.sigmoid_}
    return in_place.get(type(module), module)

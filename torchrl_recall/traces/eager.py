"""The tiled eager backend: the reference walk with everything that costs time taken out of the loop.

Against the reference it (1) folds the normalisation into the weights, (2) stacks the first layers of
all networks into one product, (3) adds the action's share of the first layer instead of
concatenating, (4) writes into buffers, and (5) computes log-probabilities once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
        layers = list(network) if isinstance(network, nn.Sequential) else []
        linear, activations = layers[::2], layers[1::2]
        if not layers or len(layers) % 2 == 0 or not all(type(m) is nn.Linear for m in linear):
            return f"{name} is not an alternation of Linear layers and activations"
        if any(list(m.parameters()) or list(m.buffers()) for m in activations):
            return f"{name} has activations with parameters"
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
            layers[0][-1], self.delta_log_unit = self._fold_delta(*layers[0][-1])
            self._fold_first_is_last(layers)

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
        if isinstance(self.action_head, CategoricalHead):
            actions = torch.empty(num_steps, n, dtype=torch.int64, device=start.device)
        else:
            actions = torch.empty_like(noise.action)
        first = noise.action.new_empty(n, sum(self.widths))
        buffers = [[first.new_empty(n, len(b)) for _, b in net[:-1]] for net in self.rest]
        stop_out = first.new_empty(num_steps, n, 1) if noise.stop is not None else None
        delta_first, action_first, *stop_first = first.split(self.widths, 1)

        for t in range(num_steps - 1, -1, -1):
            state = states[t + 1]
            if self.first_bias is None:
                index = self.codec.feature_index(state)
                first.copy_(nn.functional.embedding_bag(index, self.first_weight, mode="sum"))
            else:
                torch.addmm(self.first_bias, state, self.first_weight, out=first)
            if stop_out is not None:
                self._finish(2, stop_first[0], buffers[2], stop_out[t])
            self._finish(1, action_first, buffers[1], action_out[t])
            self._act(action_out[t], noise.action[t], actions[t])
            self._add_action(delta_first, actions[t])
            self._finish(0, delta_first, buffers[0], delta_out[t])
            self._step_back(delta_out[t], state, noise.delta[t], states[t])

        # Nothing was kept of the loop but outputs and noise: enough for all log-probabilities.
        if isinstance(self.action_head, CategoricalHead):
            action_log_prob = self.action_head.log_prob(action_out, actions)
        else:
            values, action_log_prob = self.action_head.sample(action_out, noise.action)
            actions = values
        alive = None
        if stop_out is not None and noise.stop is not None:
            goes_on = noise.stop >= torch.sigmoid(stop_out.squeeze(-1))
            alive = goes_on.flip(0).int().cumprod(0).flip(0).bool()
        return Walk(
            states, actions, action_log_prob, self._delta_log_prob(delta_out, states, noise), alive
        )

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

    def _act(self, out: Tensor, noise: Tensor, action: Tensor) -> None:
        """Write the action as the delta network sees it (a class: its index)."""
        head = self.action_head
        if isinstance(head, CategoricalHead):
            action.copy_(sample_index(out, noise.squeeze(-1)))
            return
        loc, raw = out.chunk(2, -1)
        low, high = head.log_scale_range
        scale = torch.sigmoid(raw).mul_(high - low).add_(low).exp_()
        torch.addcmul(loc, scale, noise, out=action)
        if isinstance(head, TanhNormalHead):
            action.clamp_(-TANH_LIMIT, TANH_LIMIT).tanh_()

    def _add_action(self, first: Tensor, action: Tensor) -> None:
        if isinstance(self.action_head, CategoricalHead):
            first.add_(self.action_weight[action])
        else:
            first.addmm_(action, self.action_weight)

    def _step_back(self, out: Tensor, state: Tensor, noise: Tensor, previous: Tensor) -> None:
        if not isinstance(self.delta_head, NormalDelta):
            previous.copy_(self.delta_head.predecessor(out, state, noise)[0])
            return
        loc, raw = out.chunk(2, -1)
        low, high = self.delta_head.log_scale_range
        scale = torch.add(self.delta_log_unit, torch.sigmoid(raw), alpha=high - low).exp_()
        torch.addcmul(state, scale, noise, out=previous).add_(loc)

    def _delta_log_prob(self, out: Tensor, states: Tensor, noise: TraceNoise) -> Tensor:
        if isinstance(self.delta_head, NormalHead):
            raw = out.chunk(2, -1)[1]
            low, high = self.delta_head.log_scale_range
            log_scale = torch.add(self.delta_log_unit, torch.sigmoid(raw), alpha=high - low)
            return normal_log_prob(noise.delta, log_scale)
        return self.delta_head.predecessor_log_prob(out, states[:-1], states[1:])


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the in-place form of an activation where there is one."""
    in_place = {nn.ReLU: torch.relu_, nn.Tanh: torch.tanh_, nn.Sigmoid: torch.sigmoid_}
    return in_place.get(type(module), module)

"""Packing a model for the Triton kernels: padded weights in one tensor, the rest in another.

A gather does it, by an index that depends on sizes alone, so that every call reads the parameters
anew and only the index is kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.heads import TanhNormalHead

# What a packed vector holds of its source, see `pack_kernel`.
_COPY, _STATE_RECIPROCAL, _DELTA_SCALE, _DELTA_LOG_SCALE = range(4)
# Positions of two constants in the source of the packing.
_ZERO, _ONE = 0, 1
# Bytes of each row that a step of a product reads: a line of the cache.
LINE = 128


def networks(model: BacktrackModel) -> list[nn.Sequential]:
    """Return the networks in the order in which they are packed."""
    networks: list[Any] = [model.action_network, model.delta_network]
    return networks if model.stop_network is None else [*networks, model.stop_network]


class Sizes(NamedTuple):
    """Sizes of a model and of its padded form; all that the packed layout depends on."""

    features: int
    actions: int
    layers: int
    width: int
    stops: bool
    half: bool

    @classmethod
    def of(cls, model: BacktrackModel, precision: str) -> Sizes:
        """Read the sizes of a model."""
        linear: list[Any] = list(model.action_network)[::2]
        return cls(
            features=model.observation.size,
            actions=model.action.head.size,
            layers=len(linear) - 1,
            width=linear[0].out_features if len(linear) > 1 else 0,
            stops=model.has_stop,
            half=precision == "float16",
        )

    @property
    def padded_features(self) -> int:
        """Features of a power of two, as Triton's tensors have."""
        return _power_of_two(self.features, 8)

    @property
    def padded_actions(self) -> int:
        """The same of the action."""
        return _power_of_two(self.actions, 8)

    @property
    def inner(self) -> int:
        """Inner dimension of a step of a hidden layer's product."""
        return min(LINE // (2 if self.half else 4), self.padded_width)

    @property
    def input_inner(self) -> int:
        """The same of the first layer's."""
        most = LINE // (2 if self.half else 4)
        return min(most, _power_of_two(self.features + self.actions, 16))

    @property
    def padded_input(self) -> int:
        """Size of the input, the same for all networks: the features, then the action."""
        return _round_up(self.features + self.actions, self.input_inner)

    @property
    def padded_width(self) -> int:
        """Units of a hidden layer, a multiple of what is computed at a time."""
        return _power_of_two(self.width, 16) if self.width <= 64 else _round_up(self.width, 64)

    @property
    def columns(self) -> int:
        """Units of a hidden layer that are computed at a time."""
        return next(n for n in (256, 128, 64, 32, 16) if self.padded_width % n == 0)

    @property
    def scratch(self) -> int:
        """Numbers that a trace needs between layers: the input, and two layers in turns."""
        return self.padded_input + 2 * self.padded_width


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length()) if number > 0 else least


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class _Layout(NamedTuple):
    """Where each packed number comes from, in the concatenation of constants and sources.

    Attributes:
        constants (Tensor): ``[2]`` zero and one.
        origin (Tensor): int32, for all weights, then all vectors.
        kind (Tensor): int32, for all vectors, see `pack_kernel`.
        num_weights (int): number of weights.
    """

    constants: Tensor
    origin: Tensor
    kind: Tensor
    num_weights: int


@lru_cache(maxsize=32)
def _layout(sizes: Sizes, device: torch.device) -> _Layout:
    """Lay out the numbers of a model; depends on sizes alone, so it cannot go stale."""
    features, actions = sizes.features, sizes.actions
    padded_features, padded_actions = sizes.padded_features, sizes.padded_actions
    position = 2

    def take(*shape: int) -> Tensor:
        nonlocal position
        size = torch.Size(shape).numel()
        index = torch.arange(position, position + size, dtype=torch.int32, device=device)
        position += size
        return index.view(shape)

    def fit(index: Tensor, *shape: int, value: int = _ZERO) -> Tensor:
        margins = [(0, new - old) for old, new in zip(index.shape, shape, strict=True)]
        return pad(index, [m for margin in reversed(margins) for m in margin], value=value)

    weights, vectors = [], []
    outputs = [(actions, padded_actions), (features, padded_features)]
    for i in range(2 + sizes.stops):
        fan_in = features + actions if i == 1 else features
        padded = sizes.padded_input
        for _ in range(sizes.layers):
            weights.append(fit(take(sizes.width, fan_in), sizes.padded_width, padded))
            vectors.append(fit(take(sizes.width), sizes.padded_width))
            fan_in, padded = sizes.width, sizes.padded_width
        if i == 2:
            weights.append(fit(take(1, fan_in), 16, padded))
            vectors.append(fit(take(1), 16))
            continue
        # Location and raw scale of a value side by side, where one thread gets both.
        size, padded_size = outputs[i]
        weight, bias = take(2, size, fan_in).transpose(0, 1), take(2, size).t()
        weights.append(fit(weight, padded_size, 2, padded).reshape(2 * padded_size, padded))
        vectors.append(fit(bias, padded_size, 2).flatten())
    mean, variance, delta_mean, delta_variance = (take(features) for _ in range(4))
    statistics = [
        (fit(mean, padded_features), _COPY),
        (fit(variance, padded_features, value=_ONE), _STATE_RECIPROCAL),
        (fit(delta_variance, padded_features, value=_ONE), _DELTA_SCALE),
        (fit(delta_variance, padded_features, value=_ONE), _DELTA_LOG_SCALE),
        (fit(delta_mean, padded_features), _COPY),
        (fit(take(actions), padded_actions), _COPY),
        (fit(take(actions), padded_actions, value=_ONE), _COPY),
    ]
    kinds = [torch.zeros_like(vector) for vector in vectors]
    kinds += [torch.full_like(vector, kind) for vector, kind in statistics]
    vectors += [vector for vector, _ in statistics]
    flat = torch.cat([weight.flatten() for weight in weights])
    constants = torch.arange(2, dtype=torch.float32, device=device)
    return _Layout(constants, torch.cat([flat, *vectors]), torch.cat(kinds), len(flat))


def sources(model: BacktrackModel) -> list[Tensor]:
    """Return all that is packed, in the order of the layout."""
    head: Any = model.action.head
    state: Any = model.observation.normalizer
    delta: Any = model.delta_head.normalizer
    linear: list[Any] = [m for network in networks(model) for m in list(network)[::2]]
    tensors: list[Tensor] = [tensor for m in linear for tensor in (m.weight, m.bias)]
    tensors += [state.mean, state.variance, delta.mean, delta.variance]
    if isinstance(head, TanhNormalHead):
        return [*tensors, head.middle, head.half_range]
    return [*tensors, head.normalizer.mean, head.normalizer.variance]


@torch.no_grad()
def pack(model: BacktrackModel, precision: str) -> tuple[Tensor, Tensor]:
    """Gather a model's parameters and statistics into the layout of the kernel.

    Args:
        model (BacktrackModel): a model for which `unsupported` finds no reason.
        precision (str): as for `triton_walk`.

    Returns:
        tuple: the weights, float16 or float32, and the biases and statistics, float32; both flat.
    """
    from torchrl_recall.traces.triton_kernel import pack_kernel

    kernel: Any = pack_kernel
    # What is made while a CUDA graph is captured belongs to the graph, not to the cache.
    capturing = model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    make = _layout.__wrapped__ if capturing else _layout
    layout = make(Sizes.of(model, precision), model.device)
    source = torch.cat([layout.constants, *(tensor.reshape(-1) for tensor in sources(model))])
    dtype = torch.float16 if precision == "float16" else torch.float32
    weights = source.new_empty(layout.num_weights, dtype=dtype)
    vectors = source.new_empty(len(layout.kind))
    state: Any = model.observation.normalizer
    delta: Any = model.delta_head.normalizer
    size, block = len(layout.origin), 1024
    kernel[(-(-size // block),)](
        source, layout.origin, layout.kind, weights, vectors, layout.num_weights, size,
        state.floor, delta.floor, BLOCK=block, enable_fp_fusion=True,
    )  # fmt: skip
    return weights, vectors

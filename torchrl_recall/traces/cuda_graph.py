"""The eager walk as a CUDA graph: one launch a tile instead of hundreds, for any model it can run.

The graph packs the parameters itself, so every replay reads the ones of the moment. Noise comes in
from outside: what a graph draws would be the same at each replay, or not the caller's generator's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.traces import eager
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.walk import Walk

# Each graph keeps the memory of its walk.
GRAPHS_A_MODEL = 4
# By model, then by what a graph was captured for; None where that was seen only once.
_graphs: WeakKeyDictionary[BacktrackModel, OrderedDict[Hashable, _Graph | None]]
_graphs = WeakKeyDictionary()
_lock = Lock()


def unsupported(model: BacktrackModel) -> str | None:
    """Say why this backend cannot run a model, or None if it can.

    Args:
        model (BacktrackModel): the model.

    Returns:
        str or None: the reason.
    """
    if model.device.type != "cuda":
        return f"the model is on {model.device}, not on a GPU"
    return eager.unsupported(model)


class GraphedWalk:
    """Walks like `EagerWalk`, by a graph from the second walk of a size on.

    Capturing takes as long as many walks, so a size that is met only once is walked eagerly. A
    model keeps the graphs of its last few sizes; threads take turns.

    Args:
        model (BacktrackModel): a model for which `unsupported` finds no reason.
    """

    def __init__(self, model: BacktrackModel) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, start: Tensor, noise: TraceNoise) -> Walk:
        """Walk one tile backwards.

        Args:
            start (Tensor): ``[n, size]`` flat states.
            noise (TraceNoise): the random numbers of the tile.

        Returns:
            Walk: the traces, in memory of their own.
        """
        if torch.cuda.is_current_stream_capturing():
            return eager.EagerWalk(self.model)(start, noise)
        key = _key(self.model, start, noise)
        with _lock, torch.cuda.device_of(start):
            graphs = _graphs.setdefault(self.model, OrderedDict())
            seen = key in graphs
            graph = graphs.pop(key, None)
            if graph is None and seen:
                graph = _Graph(self.model, start, noise)
            graphs[key] = graph
            while len(graphs) > GRAPHS_A_MODEL:
                graphs.popitem(last=False)
            if graph is not None:
                return graph.replay(start, noise)
        return eager.EagerWalk(self.model)(start, noise)


class _Graph:
    """A captured walk with its buffers. Holds no reference to the model, which owns it."""

    def __init__(self, model: BacktrackModel, start: Tensor, noise: TraceNoise) -> None:
        self.inputs = [x.clone() for x in (start, *noise) if x is not None]
        fixed_start, *parts = self.inputs
        fixed_noise = TraceNoise(*parts, *[None] * (len(noise) - len(parts)))
        self.stream = torch.cuda.current_stream()
        self.done = torch.cuda.Event()
        # Libraries set themselves up in a first walk, which must not be captured.
        side = torch.cuda.Stream()
        side.wait_stream(self.stream)
        with torch.cuda.stream(side):
            eager.EagerWalk(model)(fixed_start, fixed_noise)
        self.stream.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.walk = eager.EagerWalk(model)(fixed_start, fixed_noise)
        self.done.record(self.stream)

    def replay(self, start: Tensor, noise: TraceNoise) -> Walk:
        """Walk from these starts with this noise."""
        stream = torch.cuda.current_stream()
        # Another stream may still be reading the buffers.
        stream.wait_event(self.done)
        given = [x for x in (start, *noise) if x is not None]
        for buffer, value in zip(self.inputs, given, strict=True):
            buffer.copy_(value)
            if stream != self.stream:
                buffer.record_stream(stream)
        self.graph.replay()
        walk = Walk(*(x if x is None else x.clone() for x in self.walk))  # pyright: ignore
        self.done.record(stream)
        return walk


def _key(model: BacktrackModel, start: Tensor, noise: TraceNoise) -> Hashable:
    """Return all that a graph has fixed: sizes, addresses, and what is no tensor."""
    # The modules' own dictionaries: walking over named parameters costs as much as a small walk.
    tensors: list[Tensor | None] = []
    fixed: list[Hashable] = []
    for network in (model.action_network, model.delta_network, model.stop_network):
        layers: list[Any] = [] if network is None else list(network._modules.values())
        for layer in layers:
            tensors += layer._parameters.values()
        # `eager.unsupported` saw that there is but one kind of activation.
        fixed += [len(layers), *map(repr, layers[1:2])]
    for part in (model.observation, model.action.head, model.delta_head):
        normalizer = getattr(part, "normalizer", None)
        tensors += part._buffers.values()
        if normalizer is not None:
            tensors += normalizer._buffers.values()
            fixed.append(normalizer.floor)
        fixed.append(getattr(part, "log_scale_range", None))
    places = [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors if x is not None]
    precision = torch.get_float32_matmul_precision()
    return (start.shape, start.dtype, len(noise.action), precision, *fixed, *places)

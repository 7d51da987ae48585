"""CUDA graph: the whole walk in plain tensor operations, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.plain import Walked, draws, plain_step, walk
from bench.peers.unavailable import Unavailable
from torchrl_recall import BacktrackModel


def walker(model: BacktrackModel, start: Tensor, num_steps: int) -> Callable[[], Walked]:
    """Return a function that replays the walk.

    Args:
        model (BacktrackModel): whose networks to use.
        start (Tensor): ``[B, size]`` states on a CUDA device.
        num_steps (int): length of the walk.

    Returns:
        Callable: gives a `Walked`, the same memory each time. In its favour: the starts are not
        copied in, nor the results out.

    Raises:
        Unavailable: not a CUDA device.
    """
    if start.device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    step = plain_step(model)

    @torch.no_grad()
    def run() -> Walked:
        return walk(step, start, draws(model, len(start), num_steps))

    # Libraries allocate on first use, which a capture forbids.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Walked:
        graph.replay()
        return out

    return replay

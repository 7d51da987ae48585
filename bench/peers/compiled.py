"""torch.compile: one step compiled, and looped in Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.plain import Walked, draws, plain_step, walk
from bench.peers.unavailable import Unavailable
from torchrl_recall import BacktrackModel


def walker(model: BacktrackModel, start: Tensor, num_steps: int) -> Callable[[], Walked]:
    """Return a function that walks back by a compiled step; the first call compiles.

    Args:
        model (BacktrackModel): whose networks to use.
        start (Tensor): ``[B, size]`` states.
        num_steps (int): length of the walk.

    Returns:
        Callable: gives a `Walked`. In its favour: fixed shapes, compile time left out, and
        random numbers by torch itself, which is faster than what the compiler makes of them.

    Raises:
        Unavailable: there is no C++ compiler, which torch.compile needs on the CPU.
    """
    on_cpu = start.device.type == "cpu"
    if on_cpu:
        _need_compiler()
    torch._dynamo.reset()  # pyright: ignore[reportAttributeAccessIssue]
    mode = "default" if on_cpu else "reduce-overhead"
    step = torch.compile(plain_step(model), mode=mode, dynamic=False)

    def kept(*inputs: Tensor) -> Walked:
        torch.compiler.cudagraph_mark_step_begin()
        # The next replay of its CUDA graph would overwrite what a step returned.
        return Walked(*(x.clone() for x in step(*inputs)))

    @torch.no_grad()
    def run() -> Walked:
        return walk(step if on_cpu else kept, start, draws(model, len(start), num_steps))

    run()
    return run


def _need_compiler() -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        raise Unavailable("no C++ compiler for torch.compile") from None

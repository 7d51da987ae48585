"""Our own walks in the benchmark: `sample_traces` with its options, and what cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.peers.unavailable import Unavailable
from torchrl_recall import BacktrackModel, sample_traces, traces


def backends() -> dict[str, str]:
    """Return the backends that this machine has, and with what."""
    return {name: status.detail for name, status in traces.backends().items() if status.available}


def ours(model: BacktrackModel, start: Tensor, num_steps: int, **options: Any) -> Callable[[], Any]:
    """Return a function that calls `sample_traces`.

    Args:
        model (BacktrackModel): the model to walk with.
        start (Tensor): ``[B, size]`` states.
        num_steps (int): length of the walk.
        **options: ``backend``, ``precision``, ``last_visit``.

    Returns:
        Callable: gives the traces.

    Raises:
        Unavailable: the library refuses a backend or a precision that is asked for.
    """

    def walk() -> Any:
        return sample_traces(model, start, num_steps=num_steps, **options)

    if options.get("precision") == "bfloat16" and "bfloat16" not in backends().get("native", ""):
        raise Unavailable("this processor does not multiply bfloat16")
    if options.keys() & {"backend", "precision"}:
        try:
            walk()
        except (ValueError, RuntimeError) as error:
            raise Unavailable(str(error).splitlines()[0]) from None
    return walk


def variants(
    wanted: dict[str, dict[str, Any]], model: BacktrackModel, start: Tensor, num_steps: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Build the walks of several options.

    Args:
        wanted (dict): options by name.
        model (BacktrackModel): the model to walk with.
        start (Tensor): ``[B, size]`` states.
        num_steps (int): length of the walk.

    Returns:
        tuple: a walk for each that can run, and the reason for each that cannot.
    """
    built, skipped = {}, {}
    for name, options in wanted.items():
        try:
            built[name] = ours(model, start, num_steps, **options)
        except Unavailable as reason:
            skipped[name] = str(reason)
    return built, skipped

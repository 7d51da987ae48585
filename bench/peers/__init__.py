"""The same walk by other means: what a user would write without this library.

Each peer walks back with the very networks of a `BacktrackModel` (JAX with a copy of the weights),
and draws new random numbers each call. In favour of all of them: no normalisation (the statistics
are those of a new model, mean 0 and scale 1), no checks, no masks, and time stays reversed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.peers import compiled, cuda_graph, jax_scan, loop, mbrl_env, rollout
from bench.peers.rollout import walker
from bench.peers.unavailable import Unavailable
from torchrl_recall import BacktrackModel

Walker = Callable[[BacktrackModel, Tensor, int], Callable[[], Any]]

PEERS: dict[str, Walker] = {
    "TorchRL rollout": rollout.walker,
    "TensorDictModule loop": loop.walker,
    "mbrl-lib ModelEnv": mbrl_env.walker,
    "JAX jit(scan)": jax_scan.walker,
    "torch.compile": compiled.walker,
    "CUDA graph": cuda_graph.walker,
}

__all__ = ["PEERS", "Unavailable", "Walker", "walker", "walks"]


def walks(
    names: list[str], model: BacktrackModel, start: Tensor, num_steps: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Build the named peers for a case.

    Args:
        names (list of str): keys of `PEERS`.
        model (BacktrackModel): whose networks to use.
        start (Tensor): ``[B, size]`` states to go back from.
        num_steps (int): length of the walk.

    Returns:
        tuple: a walk for each peer that can run, and the reason for each that cannot.
    """
    built, skipped = {}, {}
    for name in names:
        try:
            built[name] = PEERS[name](model, start, num_steps)
        except Unavailable as reason:
            skipped[name] = str(reason)
    return built, skipped

"""Our samplers in the benchmark: each mode of `ValuePrioritizedSampler`, and what has no C library.

The mode ``"per"`` draws by the probabilities of the peers in `bench.peers.trees`, so that theirs
are compared with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchrl_recall import ValuePrioritizedSampler
from torchrl_recall.priorities.levels import TorchPriorities
from torchrl_recall.sampler_state import backend_on

PER = "mode per"
MODES: dict[str, dict[str, Any]] = {
    PER: {"mode": "per"},
    "mode per, alpha 0.6": {"mode": "per", "alpha": 0.6},
    "mode top": {"mode": "top"},
    "mode soft": {"mode": "soft"},
    "mode rank": {"mode": "rank"},
}
IN_TORCH: dict[str, dict[str, Any]] = {
    "mode per, in torch": {"mode": "per"},
    "mode top, in torch": {"mode": "top"},
}


def take_torch_operations(sampler: ValuePrioritizedSampler) -> None:
    """Give a new sampler what it has where there is no C library."""
    sampler._priorities = TorchPriorities(sampler._max_capacity, sampler.dtype, None)


class OurSampler:
    """`ValuePrioritizedSampler`, by its own methods.

    Args:
        values (Tensor): ``[n]``, the first values.
        storage (Storage): of n entries.
        in_torch (bool): whether without the C library.
        **options: of the sampler.
    """

    def __init__(
        self, values: Tensor, storage: Any, *, in_torch: bool = False, **options: Any
    ) -> None:
        self._sampler = ValuePrioritizedSampler(values.numel(), **options)
        if in_torch:
            take_torch_operations(self._sampler)
        self._storage = storage
        self.refresh(values)

    def draw(self, count: int) -> Tensor:
        return self._sampler.sample(self._storage, count)[0]

    def refresh(self, values: Tensor) -> None:
        self._sampler.refresh(values)

    def update(self, index: Tensor, values: Tensor) -> None:
        self._sampler.update_priority(index, values)


class ReadySampler(OurSampler):
    """A sampler in torch operations whose refresh is not put off: it also draws one entry."""

    def refresh(self, values: Tensor) -> None:
        super().refresh(values)
        self.draw(1)


def our_samplers(values: Tensor, storage: Any) -> tuple[dict[str, OurSampler], dict[str, str]]:
    """Build ours in all modes, the one to compare with first.

    Args:
        values (Tensor): ``[n]``, the first values.
        storage (Storage): of n entries.

    Returns:
        tuple: each sampler, and the reason for each that is left out.
    """
    built = {name: OurSampler(values, storage, **options) for name, options in MODES.items()}
    if backend_on(torch.device("cpu")) is TorchPriorities:
        return built, dict.fromkeys(IN_TORCH, "there is no C library to do without")
    for name, options in IN_TORCH.items():
        built[name] = ReadySampler(values, storage, in_torch=True, **options)
    return built, {}

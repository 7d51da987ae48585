"""How a generator travels to another process: as bytes.

torch pickles a generator by way of a tensor, and a *spawned* process cannot open that tensor's
shared memory any more: whatever holds a generator would not reach a collector's workers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


class PortableGenerator:
    """Stands for a generator in a ``__getstate__``; unpickled, it is a generator again.

    Args:
        generator (torch.Generator): the generator.

    Examples:
        >>> import pickle
        >>> import torch
        >>> generator = torch.Generator().manual_seed(3)
        >>> arrived = pickle.loads(pickle.dumps(PortableGenerator(generator)))
        >>> bool((torch.rand(2, generator=arrived) == torch.rand(2, generator=generator)).all())
        True
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __reduce__(self) -> tuple[Any, ...]:
        state = bytes(self.generator.get_state().numpy())
        return _arrive, (str(self.generator.device), self.generator.initial_seed(), state)

    def __deepcopy__(self, memo: dict[int, Any]) -> PortableGenerator:
        # Within a process, objects that shared a generator share the copy, too.
        return PortableGenerator(copy.deepcopy(self.generator, memo))


def _arrive(device: str, seed: int, state: bytes) -> torch.Generator:
    generator = torch.Generator(device).manual_seed(seed)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def carry_generator(state: dict[str, Any]) -> dict[str, Any]:
    """Return a ``__getstate__`` dictionary whose ``"generator"`` can travel."""
    return {**state, "generator": PortableGenerator(state["generator"])}


def unpack_generator(state: dict[str, Any]) -> dict[str, Any]:
    """Return a ``__setstate__`` dictionary with the generator itself: copies carry it packed."""
    generator = state["generator"]
    if isinstance(generator, PortableGenerator):
        state = {**state, "generator": generator.generator}
    return state

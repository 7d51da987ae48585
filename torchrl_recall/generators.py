"""Generators that objects own: seeded, saved and copied with them, and sent to other processes.

torch pickles a generator by way of a tensor, and a *spawned* process cannot open that tensor's
shared memory any more: whatever holds a generator would not reach a collector's workers. So they
travel as bytes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def own_generator(
    generator: torch.Generator | None, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return an object's generator: the one given, or a new one, seeded from torch's own.

    Args:
        generator (torch.Generator, optional): the argument of that name.
        device (torch.device): where its owner draws.

    Returns:
        torch.Generator: on the device.

    Raises:
        TypeError: not a generator.
        ValueError: one of another device.

    Examples:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> own_generator(None).initial_seed() == own_generator(None).initial_seed()
        False
    """
    device = torch.device(device)
    if generator is None:
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        # There is no generator on the meta device; its owner will have moved before it draws.
        return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    if generator.device.type != device.type:
        raise ValueError(f"generator is on device {generator.device}, expected one on {device}.")
    return generator


def follow_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Return the generator; for an owner that has moved, a stream of the same seed over there."""
    if generator.device.type == device.type:
        return generator
    return torch.Generator(device).manual_seed(generator.initial_seed())


class PortableGenerator:
    """Stands for a generator in a ``__getstate__``; unpickled, it is a generator again.

    Objects that shared a generator each get a generator of their own, of the same state; copies
    within a process (``deepcopy``) go on sharing.

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


def carry_generator(state: dict[str, Any], name: str = "generator") -> dict[str, Any]:
    """Return a ``__getstate__`` dictionary whose generator can travel."""
    return {**state, name: PortableGenerator(state[name])}


def unpack_generator(state: dict[str, Any], name: str = "generator") -> dict[str, Any]:
    """Return a ``__setstate__`` dictionary with the generator itself: copies carry it packed."""
    generator = state[name]
    if isinstance(generator, PortableGenerator):
        state = {**state, name: generator.generator}
    return state


class RandomSource(nn.Module):
    """Holds a `torch.Generator`, so that what a module draws goes on where it was saved.

    Args:
        generator (torch.Generator, optional): the generator; None seeds one from torch's own.

    Raises:
        TypeError: not a generator.

    Examples:
        >>> import torch
        >>> source = RandomSource(torch.Generator().manual_seed(0))
        >>> saved = {name: value.clone() for name, value in source.state_dict().items()}
        >>> first = torch.rand(2, generator=source.on(torch.device("cpu")))
        >>> _ = source.load_state_dict(saved)
        >>> bool((first == torch.rand(2, generator=source.on(torch.device("cpu")))).all())
        True
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        # Of any device: it follows the data.
        self.generator = own_generator(generator, getattr(generator, "device", "cpu"))

    def on(self, device: torch.device) -> torch.Generator | None:
        """Return the generator for a device; None, torch's own, while `torch.compile` traces."""
        if torch.compiler.is_compiling():
            return None
        self.generator = follow_device(self.generator, device)
        return self.generator

    def get_extra_state(self) -> Tensor:
        """Return the state of the generator."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of the generator."""
        self.generator.set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        return carry_generator(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(unpack_generator(state))

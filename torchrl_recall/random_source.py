"""A generator that a module owns: saved with its state, copied with it, on the device that asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrl_recall.portable_generator import carry_generator, unpack_generator


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
        if generator is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
            generator = torch.Generator().manual_seed(seed)
        elif not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
        self.generator = generator

    def on(self, device: torch.device) -> torch.Generator | None:
        """Return the generator for a device; None, torch's own, while `torch.compile` traces."""
        if torch.compiler.is_compiling():
            return None
        if self.generator.device.type != device.type:
            # Goes on with a stream of the same seed over there.
            self.generator = torch.Generator(device).manual_seed(self.generator.initial_seed())
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

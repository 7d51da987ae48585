"""What the environments share: a random stream of their own, moved and saved with them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from torchrl_recall.generators import carry_generator, unpack_generator

if TYPE_CHECKING:
    from typing_extensions import Self


class SeededEnv(EnvBase):
    """An environment that draws from ``_generator`` only.

    A subclass calls ``_make_generator`` once its device is known.
    """

    _generator: torch.Generator
    # Part of the seed: environments of different kinds with one seed differ.
    _stream: str

    def to(self, device: torch.device | str | int) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move the environment; on another kind of device the random stream is another one."""
        super().to(device)
        old = self._generator
        if old.device != self.device:
            seed = int(torch.randint(2**62, (), generator=old, device=old.device))
            self._generator = torch.Generator(self.device).manual_seed(seed)
        return self

    def get_extra_state(self) -> Tensor:
        """State of the random generator, for the state dict."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the random generator from the state dict."""
        self._generator.set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        return carry_generator(super().__getstate__(), "_generator")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(unpack_generator(state, "_generator"))

    def _make_generator(self, seed: int | None) -> None:
        self._generator = torch.Generator(self.device)
        self._set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        # Not the seed itself: with ``torch.manual_seed(seed)`` it would give policy and environment
        # the same numbers. (torch's CPU generator uses 32 bits of a seed.)
        digest = hashlib.sha256(f"{self._stream} {seed}".encode()).digest()
        self._generator.manual_seed(int.from_bytes(digest[:4], "big"))

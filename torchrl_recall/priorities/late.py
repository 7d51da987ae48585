"""A number that a GPU computes and the host reads once it has arrived, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class LateNumber:
    """A number on a device, with a copy on the host that follows it.

    Args:
        device: where it is computed.

    Examples:
        >>> number = LateNumber(None)
        >>> number.last()
        >>> number.add(torch.tensor(3))
        >>> number.add(torch.tensor(4))
        >>> number.last()
        7.0
    """

    def __init__(self, device: torch.device | None) -> None:
        self._number = torch.zeros((), dtype=torch.float64, device=device)
        self._on_gpu = self._number.is_cuda
        self._copy = torch.zeros((), dtype=torch.float64, pin_memory=self._on_gpu)
        # Reading an array is no torch operation, so it can never be one that waits.
        self._host = self._copy.numpy()
        self._event: torch.cuda.Event | None = None
        self._last: float | None = None
        self._sent = False

    def set(self, number: Tensor) -> None:
        """Take on a 0-dimensional tensor of the device."""
        self._number.copy_(number)
        self._send()

    def add(self, number: Tensor) -> None:
        """Add a 0-dimensional tensor of the device."""
        self._number.add_(number)
        self._send()

    def reset(self) -> None:
        """Forget what has arrived."""
        self._last, self._sent = None, False

    def last(self) -> float | None:
        """Return what has arrived last, or None if nothing has."""
        if self._sent and (self._event is None or self._event.query()):
            self._last = float(self._host)
        return self._last

    def _send(self) -> None:
        self._copy.copy_(self._number, non_blocking=True)
        self._sent = True
        if self._on_gpu:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self._number.device))

"""Contenders take turns: times and ratios that slow moments of the machine do not bend."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

# Seconds that a turn lasts, about: quick contenders are called several times in a row.
TURN = 0.02
Contenders = dict[str, Callable[[], Any]]


class Turns:
    """Contenders that are timed side by side; the first is ours.

    Args:
        contenders (dict): functions by name.
        synchronize (Callable): waits for the device; nothing on the CPU.
        warmup (int): calls of each before the first round, at least 1.
    """

    def __init__(
        self, contenders: Contenders, synchronize: Callable[[], None], warmup: int = 3
    ) -> None:
        self.contenders, self.synchronize = contenders, synchronize
        self.times: dict[str, list[float]] = {name: [] for name in contenders}
        self.calls = dict.fromkeys(contenders, 1)
        self.rounds = 0
        for _ in range(warmup):
            for name in contenders:
                self.calls[name] = max(1, round(TURN / self._seconds(name, 1)))

    def _seconds(self, name: str, calls: int) -> float:
        """Return the mean time of some calls in a row."""
        function = self.contenders[name]
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        self.synchronize()
        return (time.perf_counter() - begin) / calls

    def round(self) -> None:
        """Give each its turn, starting with another each time."""
        names = list(self.contenders)
        first = self.rounds % len(names)
        for name in names[first:] + names[:first]:
            self.times[name].append(self._seconds(name, self.calls[name]))
        self.rounds += 1

    def record(self) -> dict[str, Any]:
        """Return the results.

        Returns:
            dict: ``"rounds"``; by contender the median ``"milliseconds"``, those of its
            ``"fastest"`` round, the median of each round's ratio to ours under ``"ratios"``, and
            their quartiles under ``"intervals"``.
        """
        medians = {name: statistics.median(times) for name, times in self.times.items()}
        ours = next(iter(self.times.values()))
        ratios = {
            name: [time / of_ours for time, of_ours in zip(times, ours, strict=True)]
            for name, times in self.times.items()
        }
        return {
            "rounds": self.rounds,
            "milliseconds": {name: 1e3 * median for name, median in medians.items()},
            "fastest": {name: 1e3 * min(times) for name, times in self.times.items()},
            "ratios": {name: statistics.median(values) for name, values in ratios.items()},
            "intervals": {name: quartiles(values) for name, values in ratios.items()},
        }


def quartiles(values: list[float]) -> list[float]:
    """Return the lower and the upper quartile; of fewer than two values, that value."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]

"""How long traces are: short while the model is poor, longer as it learns."""

from __future__ import annotations

from typing import Any, Protocol

from torchrl_recall.checks import check_at_least_one


class HasNumSteps(Protocol):
    """What a length can be set on: `BacktrackTransform`, above all."""

    num_steps: int


class TraceLengthScheduler:
    """Changes the length of traces linearly, one ``step()`` after the other.

    After ``k`` calls of ``step()`` traces have ``initial + (final - initial) (k - delay) /
    num_updates`` steps, rounded towards the initial length, from ``delay`` calls on and until
    ``num_updates`` later. As TorchRL's schedulers of samplers, it can stand in a ``SchedulerList``.
    Errors of a model add up along a trace: a poor model's should be short.

    Args:
        transform (BacktrackTransform): whose ``num_steps`` to set; what it has now is the initial
            length.

    Keyword Args:
        final_steps (int): length in the end, at least 1; shorter than the initial one is allowed.
        num_updates (int): calls of ``step()`` from the initial to the final length.
        delay (int): calls of ``step()`` before the first change.

    Raises:
        TypeError: a transform without ``num_steps``, or no ints.
        ValueError: ints below 1 (``delay``: below 0).

    Source: Lai et al., *Bidirectional Model-based Policy Optimization*, ICML 2020,
    https://arxiv.org/abs/2007.01995.

    Examples:
        >>> from torchrl_recall import BacktrackModel, BacktrackTransform, TraceLengthScheduler
        >>> transform = BacktrackTransform(BacktrackModel(3, 1, num_cells=(8,)), num_steps=1)
        >>> scheduler = TraceLengthScheduler(transform, final_steps=15, num_updates=28)
        >>> lengths = []
        >>> for _ in range(30):
        ...     scheduler.step()
        ...     lengths.append(transform.num_steps)
        >>> lengths[:5], lengths[-3:]
        ([1, 2, 2, 3, 3], [15, 15, 15])
    """

    def __init__(
        self, transform: HasNumSteps, *, final_steps: int, num_updates: int, delay: int = 0
    ) -> None:
        if not hasattr(transform, "num_steps"):
            raise TypeError(
                "transform must be a BacktrackTransform or have num_steps, got "
                f"{type(transform).__name__}."
            )
        self.transform = transform
        self.initial_steps: int = check_at_least_one("transform.num_steps", transform.num_steps)
        self.final_steps: int = check_at_least_one("final_steps", final_steps)
        self.num_updates: int = check_at_least_one("num_updates", num_updates)
        if isinstance(delay, bool) or not isinstance(delay, int):
            raise TypeError(f"delay must be an int, got {type(delay).__name__}.")
        if delay < 0:
            raise ValueError(f"delay must be at least 0, got {delay}.")
        self.delay = delay
        self._step_cnt = 0

    @property
    def num_steps(self) -> int:
        """The length that is due now."""
        done = min(max(self._step_cnt - self.delay, 0), self.num_updates)
        change = self.final_steps - self.initial_steps
        magnitude = abs(change) * done // self.num_updates
        return self.initial_steps + (magnitude if change >= 0 else -magnitude)

    def step(self) -> None:
        """Count an update and set the length."""
        self._step_cnt += 1
        self.transform.num_steps = self.num_steps

    def state_dict(self) -> dict[str, Any]:
        """Return all but the transform."""
        state = dict(self.__dict__)
        del state["transform"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, and set the length on the transform.

        Args:
            state_dict (dict): what `state_dict` returned.

        Raises:
            KeyError: entries are missing or unknown.
        """
        expected = self.state_dict().keys()
        if state_dict.keys() != expected:
            raise KeyError(f"state_dict has {sorted(state_dict)}, expected {sorted(expected)}.")
        self.__dict__.update(state_dict)
        self.transform.num_steps = self.num_steps

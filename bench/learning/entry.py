"""What can be run: one task, algorithm and variant, with its seeds and how to train it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(r"[a-z0-9]+([_.-][a-z0-9]+)*")


@dataclass(frozen=True)
class Entry:
    """One row of a table, before it is run.

    Args:
        task: name of the task, part of a path: lower case, digits, ``_``, ``.`` and ``-``.
        algorithm: name of the host algorithm, likewise.
        variant: what is added to it, likewise.
        seeds: the seeds that are reported.
        budget: environment steps at which a run ends at the latest.
        train: takes a seed and trains once; picklable. Returns a dictionary of ``steps`` and
            ``score`` (equally long, of each evaluation; scores in 0 to 1, or in the definition's
            ``score_range``), ``seconds`` (since the start, without the time of evaluations),
            ``solved_at`` (environment steps, or None) and ``log`` (anything that JSON holds).
        definition: the settings that say what is run, as JSON holds them. A result that was made
            with others is stale; the commit that a result names says the rest.
        label: how tables call the row; made from the variant if empty.

    Raises:
        ValueError: a name that is no part of a path, no seeds or a seed twice, no budget, or a
            definition that JSON does not hold.
    """

    task: str
    algorithm: str
    variant: str
    seeds: tuple[int, ...]
    budget: int
    train: Callable[[int], dict[str, Any]]
    definition: dict[str, Any]
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("task", "algorithm", "variant"):
            if not _NAME.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} must match {_NAME.pattern}, got {getattr(self, name)!r}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be some, each once, got {self.seeds}.")
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, got {self.budget}.")
        if json.loads(json.dumps(self.definition)) != self.definition:
            raise ValueError(f"definition must survive JSON, got {self.definition}.")

    @property
    def name(self) -> str:
        """Name of the row within its task, ``algorithm/variant``."""
        return f"{self.algorithm}/{self.variant}"

    @property
    def title(self) -> str:
        """What tables call the row."""
        return self.label or f"{self.algorithm.upper()}, {self.variant.replace('_', ' ')}"

    @property
    def full_definition(self) -> dict[str, Any]:
        """The definition with the budget."""
        return {**self.definition, "budget": self.budget}

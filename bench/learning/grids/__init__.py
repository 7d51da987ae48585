"""Four rooms: goals found by reward, goals known, and data in short fragments."""

from __future__ import annotations

from functools import partial

from bench.learning.entry import Entry
from bench.learning.grids.recipes import TUNED, TUNED_15
from bench.learning.grids.task import Task
from bench.learning.grids.training import Recipe, train
from bench.learning.suite import Section

TUNING_SEEDS = tuple(range(2000, 2005))
TUNING = {11: (TUNED, 40_000), 15: (TUNED_15, 100_000)}  # by size, with their budgets


def make(
    task: Task,
    algorithm: str,
    variant: str,
    recipe: Recipe,
    seeds: tuple[int, ...],
    budget: int,
    label: str = "",
    name: str | None = None,
) -> Entry:
    """Return the entry of a recipe on a maze."""
    definition = {"task": task.definition(), "recipe": recipe.definition()}
    run = partial(train, task=task, recipe=recipe, budget=budget)
    return Entry(name or task.name, algorithm, variant, seeds, budget, run, definition, label=label)


def tuning() -> list[Entry]:
    """Return the grids of settings, on seeds of their own."""
    return [
        make(
            Task(size),
            method,
            setting,
            recipe,
            TUNING_SEEDS,
            budget,
            f"{method}: {setting}",
            f"tuning_four_rooms_{size}",
        )
        for size, (tuned, budget) in TUNING.items()
        for method, settings in tuned.items()
        for setting, recipe in settings.items()
    ]


def entries() -> list[Entry]:
    """Return what there is to run."""
    return tuning()


def sections() -> list[Section]:
    """Return the parts of the report."""
    return []

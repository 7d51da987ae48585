"""All rows on continuous tasks, for `python -m bench.learning`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench.learning.continuous.controls import (
    BestTrajectories,
    CountBonus,
    NoveltyBonus,
    SelfImitation,
)
from bench.learning.continuous.ppo import PPO
from bench.learning.continuous.recall import RealPast, RecallSettings, RecallTraces
from bench.learning.continuous.tasks import TASKS, Task
from bench.learning.entry import Entry
from bench.learning.suite import Section

SEEDS = tuple(range(1100, 1110))
NUM_MUJOCO_SEEDS = 5
# Where PPO solves the task, whether there is harm was confirmed on ten seeds more.
CONFIRMED_SEEDS = tuple(range(1100, 1120))
CONFIRMED = {"u_maze_any": ("plain", "traces"), "open": ("plain", "traces")}
# Rows without traces that had been run before, unchanged, when traces got one recipe.
EARLIER_SEEDS = tuple(range(1000, 1010))
EARLIER = {
    "u_maze": ("plain", "sil", "count", "best"),
    "fragments": ("plain", "sil"),
    "half_cheetah": ("plain", "sil", "count"),
}


@dataclass(frozen=True)
class Variant:
    """What is added to the host: a guide and its arguments."""

    name: str
    label: str
    guide: Callable[..., Any] | None
    options: dict[str, Any]
    recalls: bool = False  # its options are those of `RecallSettings`


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("plain", "PPO", None, {}),
        Variant("traces", "PPO + recall traces", RecallTraces, {}, recalls=True),
        Variant("real_past", "PPO + real past of the same states", RealPast, {}, recalls=True),
        Variant("sil", "PPO + SIL", SelfImitation, {}),
        Variant("best", "PPO + best real trajectories", BestTrajectories, {}),
        Variant("count", "PPO + count bonus", CountBonus, {"coeff": 0.1}),
        Variant("rnd", "PPO + RND bonus", NoveltyBonus, {}),
    )
}


def settings_of(task: Task, variant: Variant) -> dict[str, Any]:
    """Return the arguments of a variant's guide; those of traces are the same on every task."""
    if variant.recalls:
        return {"settings": RecallSettings(**variant.options)}
    return {**variant.options, **task.tuned.get(variant.name, {})}


def seeds_of(task: Task, variant: str) -> tuple[int, ...]:
    """Return the seeds of a row."""
    seeds = EARLIER_SEEDS if variant in EARLIER.get(task.name, ()) else SEEDS
    if variant in CONFIRMED.get(task.name, ()):
        return CONFIRMED_SEEDS
    return seeds[:NUM_MUJOCO_SEEDS] if task.mujoco else seeds


def train(task_name: str, variant_name: str, seed: int, budget: int | None = None) -> dict:
    """Train one row with one seed; see `Entry.train`."""
    torch.set_num_threads(1)
    task, variant = TASKS[task_name], VARIANTS[variant_name]
    make = None
    if variant.guide is not None:
        make = partial(variant.guide, **settings_of(task, variant))
    return PPO(task, seed, make, budget).train()


def entries() -> list[Entry]:
    """Return all rows."""
    rows = []
    for task in TASKS.values():
        for name in task.variants:
            variant = VARIANTS[name]
            options = settings_of(task, variant)
            if variant.recalls:
                options = asdict(options["settings"])
            rows.append(
                Entry(
                    task=task.name,
                    algorithm="ppo",
                    variant=name,
                    seeds=seeds_of(task, name),
                    budget=task.budget,
                    train=partial(train, task.name, name),
                    definition={
                        "environment": task.environment(),
                        "ppo": asdict(task.ppo),
                        "options": options,
                        "evaluate_every": task.evaluate_every,
                        "num_tests": task.num_tests,
                        "score": task.score,
                    },
                    label=variant.label,
                )
            )
    return rows


def sections() -> list[Section]:
    """Return the part of the report that these tasks make."""
    return [
        Section(
            name="continuous",
            title="Sparse continuous tasks",
            tasks=tuple(TASKS),
            reference=("ppo/plain",),
            by_steps_to_solve=False,
        )
    ]

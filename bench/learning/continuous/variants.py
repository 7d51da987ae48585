"""All rows on continuous tasks, for `python -m bench.learning`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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

SEEDS = tuple(range(1000, 1010))
MUJOCO_SEEDS = SEEDS[:5]


@dataclass(frozen=True)
class Variant:
    """What is added to the host: a guide and its arguments."""

    label: str
    guide: Callable[..., Any] | None
    options: dict[str, Any]
    recalls: bool = False  # its options are those of `RecallSettings`


VARIANTS = {
    "plain": Variant("PPO", None, {}),
    "traces": Variant("PPO + recall traces", RecallTraces, {}, recalls=True),
    "real_past": Variant("PPO + real past of the same states", RealPast, {}, recalls=True),
    "sil": Variant("PPO + SIL", SelfImitation, {}),
    "best": Variant("PPO + best real trajectories", BestTrajectories, {}),
    "count": Variant("PPO + count bonus", CountBonus, {"coeff": 0.1}),
    "rnd": Variant("PPO + RND bonus", NoveltyBonus, {}),
}


def settings_of(task: Task, variant: Variant) -> dict[str, Any]:
    """Return the arguments of a variant's guide on a task."""
    if not variant.recalls:
        return dict(variant.options)
    return {"settings": replace(RecallSettings(**variant.options), **task.recall)}


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
                    seeds=MUJOCO_SEEDS if task.mujoco else SEEDS,
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

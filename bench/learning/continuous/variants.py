"""All rows on continuous tasks, for `python -m bench.learning`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from bench.learning.continuous.controls import BestTrajectories, CountBonus, SelfImitation
from bench.learning.continuous.ppo import PPO, SOLVED
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

    label: str
    guide: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Callable[..., Any] | None:
        """Return what builds the guide, given a host; None: there is none."""
        return None if self.guide is None else partial(self.guide, **self.options)

    def definition(self) -> dict[str, Any]:
        """Return the guide's arguments, as JSON holds them."""
        settings = self.options.get("settings")
        return dict(self.options) if settings is None else asdict(settings)


# Traces and the real past have the same settings on every task.
RECALL = {"settings": RecallSettings()}
VARIANTS = {
    "plain": Variant("PPO"),
    "traces": Variant("PPO + recall traces", RecallTraces, RECALL),
    "real_past": Variant("PPO + real past of the same states", RealPast, RECALL),
    "sil": Variant("PPO + SIL", SelfImitation),
    "best": Variant("PPO + best real trajectories", BestTrajectories),
    "count": Variant("PPO + count bonus", CountBonus, {"coeff": 0.1}),
}


def seeds_of(task: Task, variant: str) -> tuple[int, ...]:
    """Return the seeds of a row."""
    seeds = EARLIER_SEEDS if variant in EARLIER.get(task.name, ()) else SEEDS
    if variant in CONFIRMED.get(task.name, ()):
        return CONFIRMED_SEEDS
    return seeds[:NUM_MUJOCO_SEEDS] if task.mujoco else seeds


def train(
    task: Task, variant: str, seed: int, score_range: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Train one row with one seed; see `Entry.train`."""
    return clipped(PPO(task, seed, VARIANTS[variant].make()).train(), score_range)


def clipped(found: dict[str, Any], score_range: tuple[float, float] | None) -> dict[str, Any]:
    """Return a run whose scores lie in a range, and that is solved at `SOLVED` of it.

    Args:
        found: what the host returned.
        score_range: scores beyond it are its ends; None: from 0 to 1, which they do not leave.
    """
    if score_range is None:
        return found
    low, high = score_range
    score = [min(max(score, low), high) for score in found["score"]]
    enough = low + SOLVED * (high - low)
    solved = [at for at, value in zip(found["steps"], score, strict=True) if value >= enough]
    return {**found, "score": score, "solved_at": solved[0] if solved else None}


def entries_of(
    tasks: Iterable[Task],
    seeds_of: Callable[[Task, str], tuple[int, ...]] = seeds_of,
    range_of: Callable[[Task], tuple[float, float]] | None = None,
) -> list[Entry]:
    """Return PPO's rows of tasks.

    Args:
        tasks: with the variants to be run.
        seeds_of: the seeds of a task and variant.
        range_of: the range of a task's score; None: from 0 to 1, and scores cannot leave it.
    """
    rows = []
    for task in tasks:
        score_range = None if range_of is None else range_of(task)
        for name in task.variants:
            definition = {
                "environment": task.environment(),
                "ppo": asdict(task.ppo),
                "options": VARIANTS[name].definition(),
                "evaluate_every": task.evaluate_every,
                "num_tests": task.num_tests,
                "score": task.score,
            }
            if score_range is not None:
                definition["score_range"] = list(score_range)
            rows.append(
                Entry(
                    task=task.name,
                    algorithm="ppo",
                    variant=name,
                    seeds=seeds_of(task, name),
                    budget=task.budget,
                    train=partial(train, task, name, score_range=score_range),
                    definition=definition,
                    label=VARIANTS[name].label,
                )
            )
    return rows


def entries() -> list[Entry]:
    """Return all rows."""
    return entries_of(TASKS.values())


def sections() -> list[Section]:
    """Return the part of the report that these tasks make."""
    return [
        Section(
            name="continuous",
            title="Sparse continuous tasks",
            tasks=tuple(TASKS),
            reference=("ppo/plain",),
            by_steps_to_solve=False,
            algorithms=("ppo",),
        )
    ]

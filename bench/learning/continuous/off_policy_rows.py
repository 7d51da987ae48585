"""Off-policy rows of the sparse continuous tasks, for `python -m bench.learning`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from bench.learning.continuous.controls import SelfImitation
from bench.learning.continuous.off_policy import OffPolicy, OffPolicySettings, Replay
from bench.learning.continuous.off_policy_traces import (
    ReplayRealPast,
    ReplayRecallSettings,
    ReplayTraces,
)
from bench.learning.continuous.tasks import TASKS, Task
from bench.learning.continuous.variants import Variant, clipped
from bench.learning.entry import Entry
from bench.learning.suite import Section

# Nothing was tuned on these.
SEEDS = tuple(range(1100, 1110))
MUJOCO_SEEDS = SEEDS[:5]


@dataclass(frozen=True)
class OffPolicyVariant(Variant):
    """What is added to the host: a guide with its arguments, or prioritized replay."""

    replay: Replay | None = None


RECALL = {"settings": ReplayRecallSettings()}
VARIANTS = {
    "plain": OffPolicyVariant("uniform replay"),
    "per": OffPolicyVariant("PER, tuned", replay=Replay(0.6, 0.4)),
    "traces": OffPolicyVariant("recall traces", ReplayTraces, RECALL),
    "real_past": OffPolicyVariant("real past of the same states", ReplayRealPast, RECALL),
    # The critic learns from returns already, by SAC's own loss.
    "sil": OffPolicyVariant("SIL, tuned", SelfImitation, {"coeff": 1.0, "value_coeff": 0.0}),
}


@dataclass(frozen=True)
class OffPolicyTask:
    """A task with what is off-policy about it: budget and numbers of the host."""

    task: Task
    budget: int
    settings: OffPolicySettings = field(default_factory=OffPolicySettings)
    algorithms: tuple[str, ...] = ("sac",)
    variants: tuple[str, ...] = ("plain", "per", "traces")
    score_range: tuple[float, float] = (0.0, 1.0)


LONG = OffPolicySettings(gamma=0.99)  # where reward is further away
CONTROLS = ("plain", "per", "traces", "real_past", "sil")
# How much of a win is that SAC was given few updates? The same with eight times as many.
OFTEN, TIMES = "_often", 8
OFF_POLICY_TASKS = {
    task.task.name: task
    for task in (
        OffPolicyTask(
            replace(TASKS["mountain_car"], evaluate_every=1),
            12_288,
            LONG,
            algorithms=("sac", "sac_often"),
            variants=CONTROLS,
        ),
        OffPolicyTask(
            replace(TASKS["u_maze"], evaluate_every=1),
            20_480,
            algorithms=("sac", "sac_often"),
            variants=CONTROLS,
        ),
        OffPolicyTask(
            replace(TASKS["u_maze_any"], evaluate_every=1),
            12_288,
            algorithms=("sac", "sac_often"),
            variants=CONTROLS,
        ),
        OffPolicyTask(replace(TASKS["half_cheetah"], evaluate_every=2), 24_576, LONG),
    )
}


def host_of(task: OffPolicyTask, algorithm: str) -> tuple[str, OffPolicySettings]:
    """Return the learner and its numbers: ``sac_often`` is SAC with more updates."""
    name = algorithm.removesuffix(OFTEN)
    if name == algorithm:
        return name, task.settings
    return name, replace(task.settings, updates=TIMES * task.settings.updates)


def train(task: OffPolicyTask, algorithm: str, variant_name: str, seed: int) -> dict[str, Any]:
    """Train one row with one seed; see `Entry.train`."""
    variant = VARIANTS[variant_name]
    learner, settings = host_of(task, algorithm)
    host = OffPolicy(
        task.task, seed, settings, learner, variant.make(), variant.replay, task.budget
    )
    return clipped(host.train(), task.score_range)


def entries_of(tasks: dict[str, OffPolicyTask]) -> list[Entry]:
    """Return the rows of tasks."""
    rows = []
    for name, task in tasks.items():
        for algorithm in task.algorithms:
            learner, settings = host_of(task, algorithm)
            often = f", {TIMES} × the updates" if settings != task.settings else ""
            # Those that are not about the number of updates.
            left_out = ("real_past", "sil") if often else ()
            for variant_name in task.variants:
                if variant_name in left_out:
                    continue
                variant = VARIANTS[variant_name]
                rows.append(
                    Entry(
                        task=name,
                        algorithm=algorithm,
                        variant=variant_name,
                        seeds=MUJOCO_SEEDS if task.task.mujoco else SEEDS,
                        budget=task.budget,
                        train=partial(train, task, algorithm, variant_name),
                        definition={
                            "environment": task.task.environment(),
                            "host": asdict(settings),
                            "replay": None if variant.replay is None else asdict(variant.replay),
                            "options": variant.definition(),
                            "evaluate_every": task.task.evaluate_every,
                            "num_tests": task.task.num_tests,
                            "score": task.task.score,
                            "score_range": list(task.score_range),
                        },
                        label=f"{learner.upper()}{often}, {variant.label}",
                    )
                )
    return rows


def entries() -> list[Entry]:
    """Return all rows."""
    return entries_of(OFF_POLICY_TASKS)


def sections() -> list[Section]:
    """Return the part of the report that these tasks make."""
    return [
        Section(
            name="off_policy",
            title="Sparse continuous tasks, off-policy",
            tasks=tuple(OFF_POLICY_TASKS),
            reference=("sac/plain", "sac_often/plain", "td3/plain"),
            by_steps_to_solve=False,
            algorithms=("sac", "sac_often", "td3"),
            against=PAIRS,
            profile="profile.json",
        )
    ]


# Variants whose differences are shown.
PAIRS = (("traces", "plain"), ("traces", "per"), ("per", "plain"), ("traces", "real_past"))

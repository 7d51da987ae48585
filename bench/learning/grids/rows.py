"""The reported rows: which recipes run on which mazes, with how many seeds and steps."""

from __future__ import annotations

from functools import partial

from bench.learning.entry import Entry
from bench.learning.grids.recipes import LABELS, ROWS
from bench.learning.grids.task import Task
from bench.learning.grids.training import Recipe, train
from bench.learning.grids.tuned import (
    CHEAPER_15,
    DQN_11,
    DQN_15,
    FRONTIER_19,
    TUNED_11,
    TUNED_15,
    TUNED_19,
)
from bench.learning.suite import Section

SEEDS = tuple(range(1200, 1220))
FEWER_SEEDS = SEEDS[:10]
# Of the first runs; settings of the plain host are the same since.
FIRST_SEEDS = tuple(range(1000, 1020))
TUNING_SEEDS = tuple(range(2000, 2005))
# Task, grid, budget, seeds.
TUNING = (
    ("tuning_four_rooms_11", 11, TUNED_11, 40_000, TUNING_SEEDS),
    ("tuning_four_rooms_15", 15, TUNED_15, 100_000, TUNING_SEEDS),
    ("tuning_four_rooms_15", 15, CHEAPER_15, 100_000, TUNING_SEEDS[:3]),
    ("tuning_four_rooms_19", 19, FRONTIER_19, 100_000, TUNING_SEEDS),
    ("tuning_four_rooms_19", 19, TUNED_19, 100_000, TUNING_SEEDS[:3]),
    ("tuning_four_rooms_11", 11, DQN_11, 40_000, TUNING_SEEDS[:2]),
    ("tuning_four_rooms_15", 15, DQN_15, 60_000, TUNING_SEEDS[:2]),
)
BUDGET = 200_000

MAIN = ("a2c/traces", "a2c/known", "a2c/past", "a2c/bonus_sil", "a2c/sil", "a2c/best")
DQN_ROWS = ("dqn/traces", "dqn/known", "dqn/past", "dqn/per", "dqn/her")
PPO_ROWS = ("ppo/traces", "ppo/light", "ppo/plain", "ppo/past")
GROWN = ("a2c/known", "a2c/traces", "a2c/past", "a2c/bonus_sil")
STITCHED = ("a2c/traces", "a2c/past", "a2c/plain", "a2c/sil", "a2c/bonus", "a2c/best")

FOUR_ROOMS = {size: Task(size) for size in (11, 13, 15, 19, 23, 27, 31)}
FRAGMENTS = tuple(Task(13, fragment=10, slip=slip) for slip in (0.0, 0.1))
SLIPPERY, ANY_START = Task(15, slip=0.1), Task(15, start="any")

# What is run, in the order of its importance: tasks, rows, seeds, budget. Smaller budgets are of
# what takes long and is not solved soon; they make ratios to such rows lower bounds.
JOBS: tuple[tuple[tuple[Task, ...], tuple[str, ...], tuple[int, ...], int], ...] = (
    ((FOUR_ROOMS[15],), MAIN, SEEDS, BUDGET),
    ((FOUR_ROOMS[19],), MAIN, SEEDS, 60_000),
    ((FOUR_ROOMS[15],), DQN_ROWS[:4], SEEDS, 40_000),
    ((FOUR_ROOMS[15],), DQN_ROWS[4:], SEEDS, 20_000),
    ((FOUR_ROOMS[15],), ("a2c/plain",), FIRST_SEEDS, BUDGET),
    ((FOUR_ROOMS[23], FOUR_ROOMS[11], FOUR_ROOMS[13]), GROWN, FEWER_SEEDS, BUDGET),
    ((FOUR_ROOMS[27], FOUR_ROOMS[31]), GROWN[:3], FEWER_SEEDS, BUDGET),
    ((FOUR_ROOMS[11], FOUR_ROOMS[13], FOUR_ROOMS[23]), ("a2c/sil",), FEWER_SEEDS, BUDGET),
    ((FOUR_ROOMS[19],), ("dqn/known", "dqn/her"), SEEDS, 20_000),
    ((FRAGMENTS[0],), STITCHED, SEEDS, BUDGET),
    ((FRAGMENTS[1],), STITCHED[:4], SEEDS, BUDGET),
    ((FOUR_ROOMS[15],), PPO_ROWS, SEEDS, BUDGET),
    ((SLIPPERY, ANY_START), ("a2c/traces", "a2c/known", "a2c/past", "a2c/sil"), SEEDS, BUDGET),
    ((FOUR_ROOMS[15],), ("dqn/plain", "dqn/dyna"), FEWER_SEEDS, 20_000),
    ((SLIPPERY, ANY_START), ("a2c/best",), SEEDS, BUDGET),
    ((FOUR_ROOMS[15],), ("a2c/paper",), FEWER_SEEDS, 40_000),
    ((FOUR_ROOMS[27], FOUR_ROOMS[31]), ("a2c/bonus_sil",), FEWER_SEEDS, BUDGET),
)


def make(
    task: Task,
    row: str,
    recipe: Recipe,
    seeds: tuple[int, ...],
    budget: int,
    label: str,
    name: str | None = None,
) -> Entry:
    """Return the entry of a recipe on a maze.

    Args:
        task: the maze.
        row: ``algorithm/variant``.
        recipe: the algorithm's settings.
        seeds: that are reported.
        budget: environment steps.
        label: how tables call the row.
        name: of the task in paths; its own by default.
    """
    algorithm, variant = row.split("/")
    definition = {"task": task.definition(), "recipe": recipe.definition()}
    run = partial(train, task=task, recipe=recipe, budget=budget)
    return Entry(name or task.name, algorithm, variant, seeds, budget, run, definition, label=label)


def tuning() -> list[Entry]:
    """Return the grids of settings, on seeds of their own."""
    return [
        make(
            Task(size),
            f"{method}/{setting}",
            recipe,
            seeds,
            budget,
            f"{method}: {setting}",
            name,
        )
        for name, size, tuned, budget, seeds in TUNING
        for method, settings in tuned.items()
        for setting, recipe in settings.items()
    ]


def reported() -> list[Entry]:
    """Return the rows of the report, in the order in which to run them."""
    return [
        make(task, row, ROWS[row], seeds, budget, LABELS[row])
        for tasks, rows, seeds, budget in JOBS
        for task in tasks
        for row in rows
    ]


def sections() -> list[Section]:
    """Return the parts of the report."""
    fifteen, nineteen = FOUR_ROOMS[15].name, FOUR_ROOMS[19].name
    references = ("a2c/traces", "dqn/traces", "ppo/traces")
    shown = (
        "a2c/traces",
        "a2c/known",
        "a2c/past",
        "a2c/bonus_sil",
        "a2c/sil",
        "a2c/plain",
        "dqn/traces",
        "dqn/per",
        "dqn/her",
    )
    return [
        Section(
            "four_rooms",
            "Four rooms",
            (fifteen, nineteen),
            references,
            in_readme=shown,
            readme_tasks=(fifteen,),
        ),
        Section(
            "fragments",
            "Data in short fragments",
            tuple(task.name for task in FRAGMENTS),
            references,
            in_readme=("a2c/traces", "a2c/past", "a2c/sil", "a2c/plain"),
            readme_tasks=(FRAGMENTS[0].name,),
        ),
        Section(
            "growth",
            "Mazes that grow",
            tuple(task.name for task in FOUR_ROOMS.values()),
            references,
            sizes=tuple(FOUR_ROOMS),
            figures=False,
        ),
        Section(
            "four_rooms_others",
            "Four rooms with slips, and from any cell",
            (SLIPPERY.name, ANY_START.name),
            references,
        ),
        Section(
            "tuning_four_rooms",
            "Tuning on four rooms",
            tuple(dict.fromkeys(name for name, *_ in TUNING)),
            (),
            figures=False,
        ),
    ]

"""Tables of the report, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.learning import measures
from bench.learning.entry import Entry
from bench.learning.measures import Array, Interval
from bench.learning.suite import Section

# The largest loss, as a share of the score's range, that passes for none.
NO_HARM = 0.05
# Of the score's range.
SOLVED = 0.9
# Fewer runs on either side say nothing of a difference.
ENOUGH = 5


@dataclass(frozen=True)
class Row:
    """An entry with its runs, at least one."""

    entry: Entry
    runs: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """What seeds its resamples."""
        return f"{self.entry.task} {self.entry.name}"

    @property
    def scores(self) -> dict[int, tuple[list[int], list[float]]]:
        """Of each seed, when it was evaluated and what the score was."""
        return {run["seed"]: (run["steps"], run["score"]) for run in self.runs}

    @property
    def solved_at(self) -> list[int | None]:
        """Steps after which each run had solved the task: `SOLVED` of the score's range."""
        return [self._solved_at(run) for run in self.runs]

    def _solved_at(self, run: dict[str, Any]) -> int | None:
        # The run itself says it of scores from 0 to 1, and more finely than by its evaluations.
        if "score_range" not in self.entry.definition:
            return run["solved_at"]
        solved = np.flatnonzero(self.shares(run) >= SOLVED)
        return run["steps"][solved[0]] if len(solved) else None

    @property
    def num_solved(self) -> int:
        """Number of runs that solved the task."""
        return sum(at is not None for at in self.solved_at)

    @property
    def costs(self) -> Array:
        """Steps until solved; an unsolved run counts as the budget."""
        budget = self.entry.budget
        return np.array([budget if at is None else at for at in self.solved_at], dtype=float)

    @property
    def areas(self) -> Array:
        """Mean score over the budget, as a share of the score's range."""
        budget = self.entry.budget
        return np.array([measures.area(r["steps"], self.shares(r), budget) for r in self.runs])

    @property
    def finals(self) -> Array:
        """Last score, as a share of the score's range."""
        return np.array([self.shares(run)[-1] for run in self.runs])

    @property
    def seconds(self) -> Array:
        """How long the runs took."""
        return np.array([run["seconds"][-1] for run in self.runs])

    @property
    def gradient_steps(self) -> str:
        """Mean of the gradient steps that the policy took; empty if no run has logged them."""
        logged = [
            run["log"]["gradient_steps"] for run in self.runs if "gradient_steps" in run["log"]
        ]
        return f"{np.mean(np.ravel(logged)):,.0f}" if logged else ""

    def shares(self, run: dict[str, Any]) -> Array:
        """Return a run's scores as shares of the score's range."""
        low, high = self.entry.definition.get("score_range", (0.0, 1.0))
        return (np.array(run["score"], dtype=float) - low) / (high - low)


def reference_of(row: Row, rows: Sequence[Row], section: Section) -> Row | None:
    """Return what a row is compared with: the reference of its algorithm, or the first one."""
    found = [r for name in section.reference for r in rows if r.entry.name == name]
    same = [r for r in found if r.entry.algorithm == row.entry.algorithm]
    return (same or found or [None])[0]


def difference(row: Row, other: Row, of: str) -> Interval:
    """Return the difference of two rows' ``"areas"`` or ``"finals"``, ``row - other``.

    Rows whose runs are equal, seed by seed, are one method, and differ by 0 with no more to say:
    an interval would be of seeds against other seeds.
    """
    if row.scores == other.scores:
        return Interval(0.0, 0.0, 0.0)
    one, two = getattr(row, of), getattr(other, of)
    return measures.difference(one, two, f"{row.name} - {other.name}")


def table(rows: Sequence[Row], section: Section) -> str:
    """Return the table of a task."""
    if section.by_steps_to_solve:
        head = (
            "| | steps to solve, mean [95 %] | IQM | solved | × reference [95 %] | "
            "P(reference faster) [95 %] | area under curve, IQM [95 %] | s/run |"
        )
        lines = [_steps_line(row, reference_of(row, rows, section)) for row in rows]
    else:
        head = (
            "| | area under curve, IQM [95 %] | − reference [95 %] | P(better than reference) "
            "[95 %] | final score, IQM [95 %] | − reference [95 %] | solved | steps to solve, mean "
            "| policy's gradient steps | s/run |"
        )
        lines = [_area_line(row, reference_of(row, rows, section)) for row in rows]
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *lines])


def _steps_line(row: Row, reference: Row | None) -> str:
    costs = row.costs
    relative, probability = "", ""
    if reference is row:
        relative = "reference"
    elif reference is not None:
        names = f"{row.name} / {reference.name}"
        # A run that was cut off would have cost more.
        bound = "≥ " if row.num_solved < len(row.runs) else ""
        relative = bound + show(measures.ratio(costs, reference.costs, names), "{:.2f}")
        found = measures.probability_of_improvement(costs, reference.costs, names)
        probability = show(found, "{:.2f}")
    cells = (
        row.entry.title,
        show(measures.interval(costs, row.name, np.mean), "{:,.0f}"),
        f"{float(measures.iqm(costs)):,.0f}",
        f"{row.num_solved}/{len(row.runs)}",
        relative,
        probability,
        show(measures.interval(row.areas, row.name), "{:.2f}"),
        f"{row.seconds.mean():.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def _area_line(row: Row, reference: Row | None) -> str:
    areas, finals = row.areas, row.finals
    by_area, probability, by_final = "", "", ""
    if reference is row:
        by_area = "reference"
    elif reference is not None:
        by_area = show(difference(row, reference, "areas"), "{:+.3f}")
        by_final = show(difference(row, reference, "finals"), "{:+.3f}")
        if row.scores != reference.scores:
            names = f"{row.name} - {reference.name}"
            found = measures.probability_of_improvement(areas, reference.areas, names)
            probability = show(found, "{:.2f}")
    cells = (
        row.entry.title,
        show(measures.interval(areas, row.name), "{:.3f}"),
        by_area,
        probability,
        show(measures.interval(finals, row.name), "{:.3f}"),
        by_final,
        f"{row.num_solved}/{len(row.runs)}",
        f"{row.costs.mean():,.0f}",
        row.gradient_steps,
        f"{row.seconds.mean():.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def comparisons(tasks: Mapping[str, Sequence[Row]], pairs: Sequence[tuple[str, str]]) -> str:
    """Return the differences of variants' areas under the curve, tasks and hosts by pairs.

    Args:
        tasks: rows of each task.
        pairs: of variants; a row of the table is a task and host that has both of one pair.
    """
    head = "| task | host | " + " | ".join(f"{a} − {b}" for a, b in pairs).replace("_", " ") + " |"
    lines = [head, "|---" * (len(pairs) + 2) + "|"]
    for task, rows in tasks.items():
        for algorithm in dict.fromkeys(row.entry.algorithm for row in rows):
            of = {row.entry.variant: row for row in rows if row.entry.algorithm == algorithm}
            cells = [_versus(of.get(one), of.get(other)) for one, other in pairs]
            if any(cells):
                lines.append(f"| {task} | {algorithm.upper()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _versus(one: Row | None, other: Row | None) -> str:
    if one is None or other is None:
        return ""
    found = difference(one, other, "areas")
    text = show(found, "{:+.3f}")
    if min(len(one.runs), len(other.runs)) < ENOUGH:
        return f"{text}, {len(one.runs)} and {len(other.runs)} runs"
    if found.low > 0:
        return f"**{text}**"
    return text + (" †" if found.low < -NO_HARM else "")


def show(found: Interval, form: str) -> str:
    """Write an interval as ``estimate [low, high]``."""
    estimate, low, high = (form.format(value) for value in found)
    return f"{estimate} [{low}, {high}]"


def exponents(rows: Mapping[int, Sequence[Row]]) -> str:
    """Return how the cost of each row grows with the size, over sizes that 80 % of seeds solve.

    Args:
        rows: of each size.
    """
    titles: dict[str, str] = {}
    for some in rows.values():
        titles |= {row.entry.name: row.entry.title for row in some if row.entry.name not in titles}
    head = "| | sizes | steps to solve, mean at each | exponent [95 %] |"
    lines = [head, "|---|---|---|---|"]
    for name, title in titles.items():
        solved = {
            size: row
            for size, some in sorted(rows.items())
            for row in some
            if row.entry.name == name and row.num_solved >= 0.8 * len(row.runs)
        }
        if not solved:
            continue
        costs = [row.costs for row in solved.values()]
        means = ", ".join(f"{cost.mean():,.0f}" for cost in costs)
        found = "one size only"
        if len(solved) > 1:
            found = show(measures.exponent(list(solved), costs, name), "{:.2f}")
        lines.append(f"| {title} | {', '.join(map(str, solved))} | {means} | {found} |")
    return "\n".join(lines)


def made_by(rows: Sequence[Row]) -> str:
    """Return what made a table: command, seeds, commits, machines."""
    runs = [run for row in rows for run in row.runs]
    tasks = " ".join(dict.fromkeys(row.entry.task for row in rows))
    seeds = " and ".join(sorted({_seeds([run["seed"] for run in row.runs]) for row in rows}))
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    machines = ", ".join(sorted({run["machine"] for run in runs}))
    versions = {f"{name} {v}" for run in runs for name, v in run["versions"].items()}
    return (
        f"*`python -m bench.learning run --tasks {tasks}`; seeds {seeds}; commit {commits}; "
        f"{machines}; {', '.join(sorted(versions))}.*"
    )


def _seeds(seeds: Sequence[int]) -> str:
    first, last = min(seeds), max(seeds)
    if sorted(seeds) == list(range(first, last + 1)) and last > first:
        return f"{first} to {last}"
    return ", ".join(map(str, sorted(seeds)))

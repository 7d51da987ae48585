"""`RESULTS.md`, its figures and the README's table, from the results' JSON alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.learning import cost, goal_coverage, store
from bench.learning.continuous import step_profile
from bench.learning.entry import Entry
from bench.learning.figures import draw_comparison, draw_curves
from bench.learning.suite import Section
from bench.learning.tables import Row, comparisons, exponents, made_by, table

READINGS = Path(__file__).parent / "readings"
FIGURES = "figures"
START, END = "<!-- learning: start -->", "<!-- learning: end -->"
HEAD = """# Results

Written by `python -m bench.learning report` from the runs in `bench/results/learning/`, the same
bytes each time; only the paragraphs of reading are written by hand, in `bench/learning/readings/`.

Intervals are 95 % bootstrap intervals over the runs of a row (percentiles of 2,000 resamples, 1,000
for the bands of curves). IQM is the interquartile mean. A run that did not solve its task counts as
its budget, so that ratios with such runs are lower bounds (≥). "P" is the probability that one run
of the one row beats one run of the other; ties count half. Seconds leave out evaluations, and
depend on the machine and on what else it did. Rows whose runs are equal, seed by seed, are one
method, and their difference is written 0 [0, 0].
"""
DIFFERENCES = (
    "Area under the curve, IQM [95 %], as a share of the score's range. Bold: above 0 with its "
    "interval. †: a loss of more than .05 is not excluded. Of less than five runs neither is said."
)


def collect(entries: Sequence[Entry], folder: Path) -> dict[str, list[Row]]:
    """Read the rows of each task; entries without runs are left out.

    Raises:
        ValueError: a result is stale.
    """
    rows: dict[str, list[Row]] = {}
    for entry in entries:
        runs = store.load(folder, entry)
        if runs:
            rows.setdefault(entry.task, []).append(Row(entry, runs))
    return rows


def report(
    entries: Sequence[Entry], sections: Sequence[Section], folder: Path, to: Path
) -> list[Path]:
    """Write ``RESULTS.md`` and its figures.

    Args:
        entries: all there are.
        sections: the report's parts in order.
        folder: where the results are.
        to: where to write ``RESULTS.md``; figures go to ``figures/`` beside the results.

    Returns:
        The files written.
    """
    rows, shown = collect(entries, folder), set()
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    written, lines = [to / "RESULTS.md"], [HEAD]
    for section in sections:
        tasks = _of_section(rows, section)
        if not tasks:
            continue
        lines += [f"## {section.title}", "", *_reading(section.name)]
        for task, some in tasks.items():
            if (task, section.algorithms) not in shown:
                lines += [f"### {task}", "", f"Budget: {_budgets(some)}.", ""]
                lines += [table(some, section), "", made_by(some), ""]
            shown.add((task, section.algorithms))
        if section.against:
            lines += ["### Differences", "", DIFFERENCES, "", comparisons(tasks, section.against)]
            lines.append("")
        if section.sizes:
            by_size = {
                size: tasks[task]
                for size, task in zip(section.sizes, section.tasks, strict=True)
                if task in tasks
            }
            lines += ["### How the cost grows with the size", "", exponents(by_size), ""]
        if section.figures:
            for draw, name in ((draw_curves, "curves"), (draw_comparison, "comparison")):
                path = folder / FIGURES / f"{section.name}_{name}.png"
                draw(section, tasks, path)
                written.append(path)
                link = path.relative_to(to) if path.is_relative_to(to) else path
                lines += [f"![{section.title}: {name}]({link})", ""]
        measured = folder / section.profile
        if section.profile and measured.exists():
            lines += _profile(json.loads(measured.read_text()), folder, to, written)
    costs = folder / cost.FILE.name
    if costs.exists():
        measured = cost.table(json.loads(costs.read_text()))
        lines += ["## Time of a training step", "", *_reading("cost"), measured, ""]
    lines += _goals(folder.parent, to, written)
    lines += _missing(entries, rows)
    written[0].write_text("\n".join(lines).rstrip() + "\n")
    return written


def _profile(measured: dict[str, Any], folder: Path, to: Path, written: list[Path]) -> list[str]:
    """Draw where a training step's time goes, and return what the report says of it."""
    path = folder / FIGURES / "profile.png"
    step_profile.draw(measured, path)
    written.append(path)
    link = path.relative_to(to) if path.is_relative_to(to) else path
    lines = ["### Where a training step's time goes", ""]
    for task, hosts in measured["tasks"].items():
        lines += [f"- {task}: {'; '.join(step_profile.summary(hosts))}"]
    made = (
        f"*`python -m bench.learning.continuous.step_profile --steps {measured['steps']}`; commit "
        f"{measured['commit']}; {measured['machine']}.*"
    )
    return [*lines, "", made, "", f"![Where a training step's time goes]({link})", ""]


def _goals(root: Path, to: Path, written: list[Path]) -> list[str]:
    """Draw the coverage of goals in each maze that has runs, and return what the report says."""
    lines = []
    for name, maze in goal_coverage.MAZES.items():
        if not (root / maze.name).is_dir():
            continue
        try:
            runs = maze.load(root)
        except FileNotFoundError as error:
            lines += [f"### {maze.title}", "", f"Not complete: {error}", ""]
            continue
        path = goal_coverage.draw(maze, runs, root)
        written.append(path)
        link = path.relative_to(to) if path.is_relative_to(to) else path
        made = f"*`python -m bench.learning.goal_coverage run --maze {name}`*"
        said = f"{goal_coverage.described(runs)}; mean ± half of the 95 % t-interval. {made}"
        lines += [f"### {maze.title}", "", said, ""]
        for part in goal_coverage.tables(runs):
            lines += [part, ""]
        lines += [f"![{maze.title}: coverage]({link})", ""]
    return ["## Goals", "", *_reading("goals"), *lines] if lines else []


def _of_section(rows: dict[str, list[Row]], section: Section) -> dict[str, list[Row]]:
    """Return the rows of each of a section's tasks and algorithms, where there are any."""
    wanted = section.algorithms
    found = {
        task: [row for row in rows.get(task, ()) if not wanted or row.entry.algorithm in wanted]
        for task in section.tasks
    }
    return {task: some for task, some in found.items() if some}


def _reading(name: str) -> list[str]:
    """Return the hand-written paragraphs of a section."""
    file = READINGS / f"{name}.md"
    return [file.read_text().strip(), ""] if file.exists() else []


def _budgets(rows: Sequence[Row]) -> str:
    """Say the steps at which runs end, and which rows have others than most."""
    budgets = [row.entry.budget for row in rows]
    common = max(sorted(set(budgets)), key=budgets.count)
    others = [f"{r.entry.title} {r.entry.budget:,}" for r in rows if r.entry.budget != common]
    return f"{common:,} steps" + (f" ({'; '.join(others)})" if others else "")


def _missing(entries: Sequence[Entry], rows: dict[str, list[Row]]) -> list[str]:
    """Name what has not been run, or not with all its seeds."""
    there = {row.name: len(row.runs) for some in rows.values() for row in some}
    partial = []
    for entry in entries:
        done = there.get(f"{entry.task} {entry.name}", 0)
        if done < len(entry.seeds):
            partial.append(f"- {entry.task}, {entry.name}: {done} of {len(entry.seeds)} seeds")
    return ["## Not run, or not with all seeds", "", *partial, ""] if partial else []


def in_readme(
    entries: Sequence[Entry], sections: Sequence[Section], folder: Path = store.FOLDER
) -> str:
    """Return the README's tables: of each section the rows that it names."""
    rows, parts = collect(entries, folder), []
    for section in sections:
        for task in section.readme_tasks or section.tasks:
            some = [row for row in rows.get(task, ()) if row.entry.name in section.in_readme]
            if some:
                parts += [f"{section.title}, `{task}`:", "", _brief(table(some, section)), ""]
    return "\n".join(parts).strip()


def _brief(table: str) -> str:
    """Keep of a table what the README has room for: the first columns but the IQM."""
    rows = [line.split("|") for line in table.splitlines()]
    return "\n".join("|".join(["", row[1], row[2], *row[4:6], ""]) for row in rows)


def insert(text: str, tables: str) -> str:
    """Return a README with its tables between the markers replaced.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the text must hold {START!r} and then {END!r}, once each.")
    before, rest = text.split(START)
    return f"{before}{START}\n{tables}\n{END}{rest.split(END)[1]}"

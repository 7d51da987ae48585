"""The ablation as a table and a figure, from the runs' JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.learning.rows import BUDGET, ROWS, SEEDS, SIZE, Row
from bench.learning.runs import load
from bench.machine import RESULTS
from torchrl_recall.demo.report import half_width, ratio_interval

Runs = dict[str, list[dict[str, Any]]]
# The main job's own runs, the same task and seeds of their own.
MAIN_JOB = RESULTS / "four_rooms_15" / "results.json"
PEERS = {"a2c": "A2C", "a2c_sil": "A2C + SIL"}
HEAD = (
    "| | steps to 0.9 | × reference [95 %] | solved | success from every cell | s/run |",
    "|---|---|---|---|---|---|",
)


def read(folder: Path, size: int = SIZE, budget: int = BUDGET) -> Runs:
    """Read all rows' runs, in the order of the table; rows without runs are left out."""
    runs = {name: load(folder, row, size, budget) for name, row in ROWS.items()}
    return {name: found for name, found in runs.items() if found}


def costs(runs: list[dict[str, Any]], budget: int) -> np.ndarray:
    """Return each run's steps to 0.9; an unsolved one counts as the budget."""
    steps = [budget if run["t90"] is None else min(run["t90"], budget) for run in runs]
    return np.array(steps, dtype=float)


def table(runs: Runs, budget: int = BUDGET, seeds: int = len(SEEDS)) -> str:
    """Return the report in Markdown.

    Args:
        runs: of each row, as `read` returns them.
        budget: environment steps that an unsolved run counts.
        seeds: runs that a row should have.

    Returns:
        One table a group; rows that are missing or not complete are named.
    """
    lines = [
        "# Ablation of recall traces on four rooms",
        "",
        "Written by `python -m bench.learning.ablation report`; what it means is in",
        "`bench/learning/README.md`.",
        "",
        f"Environment steps until the stochastic policy's exact success reaches 0.9, mean ± 95 % "
        f"t-interval; a run not solved within {budget:,} steps counts as that many. × reference: "
        "ratio of means to the first row of the same task, 95 % bootstrap interval over seeds. "
        "Success from every cell: exact, of the policy at the end of the run (as soon as it is "
        "solved), mean over cells and seeds. s/run depends on how busy the machine was.",
    ]
    group = None
    for name, row in ROWS.items():
        if name not in runs:
            continue
        if row.group != group:
            lines += ["", f"## {row.group}", "", *HEAD]
            group = row.group
        lines.append(_line(row, runs, budget))
    lines += ["", *_peers(runs, budget)]
    missing = [name for name in ROWS if name not in runs]
    partial = [name for name, found in runs.items() if len(found) < seeds]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    if partial:
        lines += ["", f"Fewer than {seeds} seeds: {', '.join(partial)}."]
    return "\n".join(lines) + "\n"


def _line(row: Row, runs: Runs, budget: int) -> str:
    mine = runs[row.name]
    steps = costs(mine, budget)
    ratio = ""
    if row.name == row.reference:
        ratio = "reference"
    elif row.reference in runs:
        ratio = _ratio(steps, costs(runs[row.reference], budget))
    solved = sum(run["t90"] is not None for run in mine)
    everywhere = _mean([run["every_cell"] for run in mine], "{:.2f}")
    seconds = np.mean([run["wall_s"] for run in mine])
    return (
        f"| {row.label} | {_mean(steps, '{:,.0f}')} | {ratio} | {solved}/{len(mine)} | "
        f"{everywhere} | {seconds:.1f} |"
    )


def _peers(runs: Runs, budget: int) -> list[str]:
    """The main job's A2C and SIL, which do not know the goal."""
    if not MAIN_JOB.exists():
        return []
    lines = [
        "## For reference: without traces, the goal not known",
        "",
        f"From `{MAIN_JOB.relative_to(RESULTS.parent.parent)}`, other seeds, the same budget.",
        "",
        "| | steps to 0.9 | × found default [95 %] | solved |",
        "|---|---|---|---|",
    ]
    stored = json.loads(MAIN_JOB.read_text())
    for method, label in PEERS.items():
        mine = [run for run in stored if run["method"] == method]
        steps = costs(mine, budget)
        ratio = ""
        if "found_default" in runs:
            ratio = _ratio(steps, costs(runs["found_default"], budget))
        solved = sum(run["t90"] is not None and run["t90"] <= budget for run in mine)
        lines.append(f"| {label} | {_mean(steps, '{:,.0f}')} | {ratio} | {solved}/{len(mine)} |")
    return lines


def _ratio(steps: np.ndarray, reference: np.ndarray) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*ratio_interval(steps, reference))


def _mean(values: Any, form: str) -> str:
    values = np.asarray(values, dtype=float)
    spread = float(half_width(values))
    mean = form.format(values.mean())
    return mean if np.isnan(spread) else f"{mean} ± {form.format(spread)}"


def draw(runs: Runs, path: Path, budget: int = BUDGET) -> None:
    """Draw each row's mean and interval over its seeds, on a logarithmic scale.

    Args:
        runs: of each row, as `read` returns them.
        path: picture to write.
        budget: environment steps that an unsolved run counts.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for name, row in ROWS.items() if name in runs]
    figure, axis = plt.subplots(figsize=(8, 1 + 0.27 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        steps = costs(runs[row.name], budget)
        spread = np.nan_to_num(half_width(steps))
        same = row.name == row.reference
        colour = "#D55E00" if same else "#0072B2"
        axis.plot(steps, np.full(len(steps), place), "|", color="#999999", markersize=7)
        low = min(spread, steps.mean() * 0.9)
        axis.errorbar(
            steps.mean(), place, xerr=[[low], [spread]], fmt="o", color=colour, markersize=4
        )
    begin = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place].group != rows[begin].group:
            axis.axhline(place - 0.5, color="#cccccc", linewidth=0.6)
            axis.text(
                1.01,
                (begin + place - 1) / 2,
                rows[begin].group,
                transform=axis.get_yaxis_transform(),
                fontsize=7,
                va="center",
            )
            begin = place
    axis.axvline(budget, color="#999999", linestyle=":", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=7)
    axis.set(xscale="log", ylim=(len(rows) - 0.5, -0.5))
    low, high = axis.get_xlim()
    ticks = [digit * 10**power for power in range(2, 6) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("environment steps to 0.9 exact success; bars: seeds, dotted: budget")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)

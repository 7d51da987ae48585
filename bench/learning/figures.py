"""Figures of the report: curves against steps and seconds, and comparisons with a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.learning import measures
from bench.learning.suite import Section
from bench.learning.tables import Row, difference, reference_of

# Okabe and Ito's colours, which most eyes can tell apart, and a few greys.
COLOURS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6BB1",
    "#7F7F7F", "#A6761D", "#1B9E77", "#666666", "#B2182B", "#4D9221", "#C51B7D", "#35978F",
)  # fmt: skip
POINTS = 120


def draw_curves(section: Section, tasks: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw IQM scores with 95 % stratified-bootstrap bands, by steps above and by seconds below.

    Args:
        section: what they are of.
        tasks: rows of each task.
        path: picture to write.
    """
    plt = pyplot()
    names = dict.fromkeys(row.entry.name for rows in tasks.values() for row in rows)
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(4.2 * len(tasks) + 2.2, 6), layout="constrained", squeeze=False
    )
    handles: dict[str, Any] = {}
    for column, (task, rows) in enumerate(tasks.items()):
        for axis, what in zip(axes[:, column], ("steps", "seconds"), strict=True):
            for row in rows:
                line = _curve(axis, row, what, colour[row.entry.name])
                handles.setdefault(row.entry.title, line)
            axis.set_ylim(-0.02, 1.02)
            axis.set_xlabel("environment steps" if what == "steps" else "seconds")
            axis.spines[["top", "right"]].set_visible(False)
            if section.by_steps_to_solve or what == "seconds":
                axis.set_xscale("log")
        axes[0, column].set_title(task, fontsize=9)
        axes[0, 0].set_ylabel("score, IQM and 95 % band")
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _curve(axis: Any, row: Row, what: str, colour: str) -> Any:
    places = [np.array(run[what], dtype=float) for run in row.runs]
    scores = [row.shares(run) for run in row.runs]
    last = max(place[-1] for place in places)
    unsolved = [p[-1] for p, at in zip(places, row.solved_at, strict=True) if at is None]
    # Beyond its budget nothing is known of a run; one that was solved keeps its score.
    end = min([*unsolved, last])
    begin = max(end / 1000, min(place[min(1, len(place) - 1)] for place in places), 1e-3)
    grid = np.geomspace(begin, max(end, begin * 1.001), POINTS)
    middle, low, high = measures.curve(places, scores, grid, row.name + what)
    (line,) = axis.plot(grid, middle, color=colour, linewidth=1.4)
    axis.fill_between(grid, low, high, color=colour, alpha=0.13, linewidth=0)
    return line


def draw_comparison(section: Section, tasks: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw each row against its reference: sample efficiency and probability of improvement.

    Rows of equal runs are left out.

    Args:
        section: what they are of.
        tasks: rows of each task.
        path: picture to write.
    """
    plt = pyplot()
    pairs = [
        (row, reference)
        for rows in tasks.values()
        for row in rows
        if (reference := reference_of(row, rows, section)) is not None
        and reference is not row
        and row.scores != reference.scores
    ]
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.1 + 0.21 * max(len(pairs), 1)), layout="constrained", sharey=True
    )
    for place, (row, reference) in enumerate(pairs):
        if section.by_steps_to_solve:
            effect = measures.ratio(row.costs, reference.costs, f"{row.name} / {reference.name}")
            chance = measures.probability_of_improvement(
                row.costs, reference.costs, f"{row.name} / {reference.name}"
            )
        else:
            effect = difference(row, reference, "areas")
            chance = measures.probability_of_improvement(
                row.areas, reference.areas, f"{row.name} - {reference.name}"
            )
        for axis, found in zip(axes, (effect, chance), strict=True):
            axis.plot([found.low, found.high], [place, place], color="#0072B2", linewidth=1.5)
            axis.plot(found.estimate, place, "o", color="#0072B2", markersize=4)
    labels = [f"{row.entry.task}: {row.entry.title}" for row, _ in pairs]
    axes[0].set_yticks(range(len(pairs)), labels, fontsize=7)
    axes[0].invert_yaxis()
    axes[1].axvline(0.5, color="#999999", linewidth=0.8)
    axes[1].set_xlim(-0.02, 1.02)
    if section.by_steps_to_solve:
        axes[0].set_xscale("log")
        axes[0].axvline(1, color="#999999", linewidth=0.8)
        axes[0].set_xlabel("steps to solve, × reference (unsolved: budget)")
        axes[1].set_xlabel("P(reference faster)")
    else:
        axes[0].axvline(0, color="#999999", linewidth=0.8)
        axes[0].set_xlabel("area under curve, − reference")
        axes[1].set_xlabel("P(better than reference)")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt

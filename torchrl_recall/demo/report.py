"""What the main job prints and draws: a table, and a picture of curves, maze and traces."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_recall.demo import SOLVED

LABELS = {
    "a2c": "A2C",
    "a2c_sil": "A2C + SIL",
    "recall_found": "A2C + recall traces (goal found by reward)",
    "recall_known": "A2C + recall traces (goal known beforehand)",
}
# Colours of Okabe and Ito, with dashes, so that curves differ in greyscale too.
STYLES = {
    "a2c": ("#555555", ":"),
    "a2c_sil": ("#E69F00", "-."),
    "recall_found": ("#0072B2", "--"),
    "recall_known": ("#009E73", "-"),
}
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056),
    *(2.052, 2.048, 2.045, 2.042),
)


def half_width(values: np.ndarray) -> np.ndarray:
    """Half-width of the 95 % t-interval of the mean over the first axis; NaN for one seed.

    Args:
        values (np.ndarray): ``[seeds, ...]``.

    Returns:
        np.ndarray: ``[...]``.

    Examples:
        >>> import numpy as np
        >>> from torchrl_recall.demo.report import half_width
        >>> round(float(half_width(np.array([1.0, 2.0, 3.0]))), 3)
        2.484
    """
    n = len(values)
    if n < 2:
        return np.full(values.shape[1:], np.nan)
    quantile = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96
    return quantile * values.std(0, ddof=1) / np.sqrt(n)


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, draws: int = 10_000
) -> tuple[float, float, float]:
    """Ratio of two means with its 95 % percentile-bootstrap interval over seeds.

    Args:
        numerator (np.ndarray): ``[n]`` one value a seed.
        denominator (np.ndarray): ``[m]`` one value a seed.
        draws (int): bootstrap samples.

    Returns:
        tuple of float: ratio, lower and upper bound.
    """
    generator = np.random.default_rng(0)

    def means(values: np.ndarray) -> np.ndarray:
        return generator.choice(values, (draws, len(values))).mean(1)

    ratios = means(numerator) / means(denominator)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(numerator.mean() / denominator.mean()), float(low), float(high)


def costs(runs: Sequence[dict[str, Any]], method: str, budget: int) -> np.ndarray:
    """Return steps to 0.9 of each seed; an unsolved run counts as the whole budget."""
    found = [run["t90"] for run in runs if run["method"] == method]
    return np.array([budget if t90 is None else t90 for t90 in found], dtype=float)


def table(runs: Sequence[dict[str, Any]], budget: int) -> str:
    """Return the table of steps to 0.9 success.

    Args:
        runs (sequence of dict): as in ``results.json``.
        budget (int): environment steps that an unsolved run counts.

    Returns:
        str: one line a method.
    """
    methods = [method for method in LABELS if any(run["method"] == method for run in runs)]
    width = max(len(LABELS[method]) for method in methods)
    title = f"environment steps to {SOLVED} exact success"
    lines = [
        f"{title:{width}}  {'mean ± 95 %':>18}  {'solved':>7}  "
        f"{'A2C / this [95 %]':>20}  {'s/run':>6}"
    ]
    base = costs(runs, "a2c", budget)
    for method in methods:
        mine = [run for run in runs if run["method"] == method]
        steps = costs(runs, method, budget)
        solved = sum(run["t90"] is not None for run in mine)
        spread = float(half_width(steps))
        mean = f"{steps.mean():,.0f}" + ("" if np.isnan(spread) else f" ± {spread:,.0f}")
        ratio = ""
        if len(base) and method != "a2c":
            ratio = "{:.1f} [{:.1f}, {:.1f}]".format(*ratio_interval(base, steps))
        seconds = np.mean([run["wall_s"] for run in mine])
        lines.append(
            f"{LABELS[method]:{width}}  {mean:>18}  {f'{solved}/{len(mine)}':>7}  {ratio:>20}  "
            f"{seconds:6.1f}"
        )
    lines.append(f"Unsolved runs count as the budget of {budget:,} steps.")
    if "recall_found" in methods:
        lines.append(
            "Goal found by reward: until the first reward, traces lead to the rarest states so far."
        )
    if "recall_known" in methods:
        lines.append("Goal known beforehand: traces start from the goal, privileged information.")
    return "\n".join(lines)


def save_json(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the runs, without the traces."""
    rows = [{key: value for key, value in run.items() if key != "traces"} for run in runs]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def curve(run: dict[str, Any], grid: np.ndarray) -> np.ndarray:
    """Return a run's success on a grid of steps; what was reached last stays."""
    index = np.searchsorted(run["steps"], grid, side="right") - 1
    return np.asarray(run["success"])[index]


def draw(runs: Sequence[dict[str, Any]], walls: np.ndarray, budget: int, path: Path) -> None:
    """Draw learning curves, and recall traces early and late in training.

    Args:
        runs (sequence of dict): as returned by ``train``.
        walls (np.ndarray): ``[n, n]`` bool, the maze.
        budget (int): environment steps of a run.
        path (Path): picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Best those that lead to the goal from the beginning.
    traced = sorted(
        (run for run in runs if run.get("traces")), key=lambda run: not run["goal_known"]
    )
    shown = traced[0]["traces"] if traced else []
    figure, axes = plt.subplots(
        1, 1 + len(shown), figsize=(6.5 + 3.6 * len(shown), 4), layout="constrained", squeeze=False
    )
    _draw_curves(axes[0, 0], runs, budget)
    for axis, (step, states, mask) in zip(axes[0, 1:], shown, strict=True):
        when = "early" if step == shown[0][0] else "late"
        draw_traces(axis, walls, states, mask)
        axis.set_title(f"recall traces, {when}: after {step:,} steps", fontsize=10)
    if shown:
        label = LABELS[traced[0]["method"]]
        axes[0, 1].set_xlabel(
            f"{label},\nseed {traced[0]['seed']}; dark = near the star", fontsize=8
        )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_curves(axis: Any, runs: Sequence[dict[str, Any]], budget: int) -> None:
    grid = np.unique(np.geomspace(min(256, budget), budget, 200).astype(int))
    for method, (colour, dashes) in STYLES.items():
        curves = np.array([curve(run, grid) for run in runs if run["method"] == method])
        if not len(curves):
            continue
        mean = curves.mean(0)
        axis.plot(grid, mean, color=colour, linestyle=dashes, label=LABELS[method])
        spread = np.nan_to_num(half_width(curves))
        low, high = (mean - spread).clip(0, 1), (mean + spread).clip(0, 1)
        axis.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axhline(SOLVED, color="black", linewidth=0.5)
    axis.set(xscale="log", xlabel="environment steps", ylabel="exact success probability")
    axis.set_title("mean over seeds, 95 % bands", fontsize=10)
    axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def draw_traces(axis: Any, walls: np.ndarray, states: np.ndarray, mask: np.ndarray) -> None:
    """Draw the kept steps of traces over the maze.

    Args:
        axis (matplotlib Axes): where to draw.
        walls (np.ndarray): ``[n, n]`` bool.
        states (np.ndarray): ``[N, T + 1, 2]`` rows and columns, oldest first.
        mask (np.ndarray): ``[N, T]`` bool, steps kept.
    """
    import matplotlib.pyplot as plt

    axis.imshow(np.where(walls, 0.25, 1.0), cmap="gray", vmin=0, vmax=1)
    generator = np.random.default_rng(0)
    jitter = generator.uniform(-0.28, 0.28, (len(states), 1, 2))
    places = states + jitter
    num_steps = mask.shape[1]
    moved = (states[:, 1:] != states[:, :-1]).any(-1)
    # The oldest steps first, so that those near the goal lie on top.
    for n, t in sorted(np.argwhere(mask & moved).tolist(), key=lambda place: place[1]):
        (y0, x0), (y1, x1) = places[n, t], places[n, t + 1]
        age = (num_steps - 1 - t) / num_steps
        axis.plot([x0, x1], [y0, y1], color=plt.get_cmap("viridis")(age), linewidth=1)
    ends = np.unique(states[:, -1], axis=0)
    axis.plot(ends[:, 1], ends[:, 0], "*", color="#D55E00", markersize=12)
    axis.set(xticks=[], yticks=[])


def main() -> None:
    """Print the table of a committed ``results.json``: ``python -m torchrl_recall.demo.report``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder with results.json")
    parser.add_argument("--steps", type=int, default=200_000, help="budget of a run (200000)")
    options = parser.parse_args()
    print(table(json.loads((options.folder / "results.json").read_text()), options.steps))


if __name__ == "__main__":
    main()

"""What GoalGAN and traces from its goals are worth: coverage of a U-maze by a policy with goals.

`python -m bench.learning.goal_coverage run --seeds 10 --first-seed 0` makes what is missing, one
JSON a run under ``bench/results/goal_coverage/``; `python -m bench.learning.goal_coverage report`
draws the table and the figure from these files alone. All variants take the same environment steps
and the same PPO steps; coverage is the share of a grid of free goals that the policy reaches from
the start, in its own noise, in an environment of its own with a seed of its own.

- ``uniform``: each episode's goal is uniform over the box inside the outer wall.
- ``uniform + traces``: the same, and traces from states seen nearest to uniform goals: the control
  that tells what traces do without GoalGAN.
- ``GoalGAN``: goals of intermediate difficulty.
- ``GoalGAN + traces``: the same, and traces from states seen nearest to good goals.

- ``... + real past``: the control of the model. From the same states, the steps that really came
  before them in their episode are imitated, and no model is fitted. Added after the other four had
  been seen, with their settings.

A trace is imitated as an attempt at the goal where it ends. Settings were chosen on seeds from 1000
on, and frozen before any run that is reported.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import RESULTS, describe
from bench.result_files import write_result

FOLDER = RESULTS / "goal_coverage"
FIGURE = RESULTS / "goal_coverage.png"
ORDER = (
    "uniform",
    "uniform + traces",
    "uniform + real past",
    "GoalGAN",
    "GoalGAN + traces",
    "GoalGAN + real past",
)
PAIRS = (
    ("GoalGAN", "uniform"),
    ("GoalGAN + traces", "GoalGAN"),
    ("uniform + traces", "uniform"),
    ("GoalGAN + traces", "uniform + traces"),
    ("GoalGAN + traces", "uniform"),
    ("uniform + traces", "uniform + real past"),
    ("GoalGAN + traces", "GoalGAN + real past"),
)


def path_of(variant: str, seed: int) -> Path:
    return FOLDER / f"{variant.replace(' + ', '_').replace(' ', '_').lower()}_{seed}.json"


def run(first: int, count: int) -> None:
    """Make the runs that are missing; several processes may share the work."""
    import torch

    from bench.learning.goal_training import VARIANTS, Run, Settings

    assert tuple(VARIANTS) == ORDER
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    settings = Settings()
    for seed in range(first, first + count):
        for variant in ORDER:
            path = path_of(variant, seed)
            claim = path.with_suffix(".running")
            if path.exists():
                continue
            try:
                claim.touch(exist_ok=False)
            except FileExistsError:
                continue  # another process is at it; remove the file if it was killed
            try:
                result = Run(variant, seed, settings).run()
                result |= {"variant": variant, "seed": seed, "settings": asdict(settings)}
                result["machine"] = describe()
                write_result(path, result)
            finally:
                claim.unlink()
            print(f"{variant}, seed {seed}: {result['coverage'][-1]:.2f}", flush=True)


def load() -> dict[str, dict[int, dict[str, Any]]]:
    """Return the runs by variant and seed, of seeds that all variants have."""
    runs: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in ORDER}
    for path in sorted(FOLDER.glob("*.json")):
        result = json.loads(path.read_text())
        runs[result["variant"]][result["seed"]] = result
    common = set.intersection(*(set(seeds) for seeds in runs.values()))
    settings = {json.dumps(r[s]["settings"], sort_keys=True) for r in runs.values() for s in common}
    if len(common) < 2 or len(settings) != 1:
        raise SystemExit(f"{len(common)} complete seeds of {len(settings)} settings; run first.")
    return {v: {seed: found[seed] for seed in sorted(common)} for v, found in runs.items()}


def interval(values: np.ndarray) -> str:
    """Mean and the half width of its 95 % t-interval."""
    return f"{values.mean():+.3f} ± {half_width(values):.3f}".lstrip("+")


def half_width(values: np.ndarray, axis: int = 0) -> Any:
    """Half width of the 95 % t-interval of the mean."""
    from scipy import stats

    n = values.shape[axis]
    quantile = float(stats.t.ppf(0.975, n - 1))
    return quantile * values.std(axis, ddof=1) / math.sqrt(n)


def tables(runs: dict[str, dict[int, dict[str, Any]]]) -> tuple[str, str]:
    """Return the variants' coverage, and paired differences, as tables in Markdown."""
    curves = _curves(runs)
    steps = _steps(runs)
    numbers = {
        "final": {v: c[:, -1] for v, c in curves.items()},
        "area": {
            v: ((c[:, 1:] + c[:, :-1]) / 2 * np.diff(steps)).sum(1) / (steps[-1] - steps[0])
            for v, c in curves.items()
        },
    }
    variants = ["| variant | final coverage | area under the curve |", "|---|---|---|"]
    # No times: the machine was shared, and not alike by all.
    for variant in runs:
        final, area = (interval(numbers[name][variant]) for name in ("final", "area"))
        variants.append(f"| {variant} | {final} | {area} |")
    pairs = ["| paired difference | final coverage | area under the curve |", "|---|---|---|"]
    for one, other in PAIRS:
        parts = [numbers[name][one] - numbers[name][other] for name in ("final", "area")]
        cells = " | ".join(f"{x.mean():+.3f} ± {half_width(x):.3f}" for x in parts)
        pairs.append(f"| {one} − {other} | {cells} |")
    return "\n".join(variants), "\n".join(pairs)


def _curves(runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, np.ndarray]:
    return {v: np.array([r["coverage"] for r in found.values()]) for v, found in runs.items()}


def _steps(runs: dict[str, dict[int, dict[str, Any]]]) -> np.ndarray:
    return np.array(next(iter(runs["uniform"].values()))["steps"])


def report() -> None:
    """Print the tables and draw the figure."""
    runs = load()
    curves, steps = _curves(runs), _steps(runs)
    count = len(curves["uniform"])
    print(f"{count} seeds, {steps[-1]} environment steps; mean ± 95 % t-interval\n")
    print("\n\n".join(tables(runs)))
    draw(curves, steps)
    print(f"\n{FIGURE}")


def draw(curves: dict[str, np.ndarray], steps: np.ndarray) -> None:
    """Draw mean coverage by environment steps, with 95 % t-intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for variant, curve in curves.items():
        mean, width = curve.mean(0), half_width(curve)
        # Source of goals by colour and marker, kind of traces by dashes: greyscale tells both.
        color, marker = ("#0072B2", "o") if "uniform" in variant else ("#D55E00", "s")
        dashes = "--" if "traces" in variant else ":" if "past" in variant else "-"
        axis.plot(steps / 1000, mean, dashes, color=color, marker=marker, label=variant)
        axis.fill_between(
            steps / 1000, mean - width, mean + width, color=color, alpha=0.08, linewidth=0
        )
    axis.set_xlabel("environment steps (thousands)")
    axis.set_ylabel("coverage of the maze's goals")
    axis.set_ylim(0, 1)
    axis.set_title(f"Goals in a U-maze, {len(curves['uniform'])} seeds: mean, 95 % t-interval")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(FIGURE, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="make the runs that are missing")
    runs.add_argument("--seeds", type=int, default=10)
    runs.add_argument("--first-seed", type=int, default=0)
    commands.add_parser("report", help="table and figure from the committed runs")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.first_seed, arguments.seeds)
    else:
        report()


if __name__ == "__main__":
    main()

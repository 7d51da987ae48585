"""What GoalGAN and traces from its goals are worth: coverage of a U-maze by a policy with goals.

`python -m bench.learning.goal_coverage run --maze point --seeds 10` makes what is missing, one JSON
a run under ``bench/results/goal_coverage/``; `python -m bench.learning.goal_coverage report` draws
the table and the figure from these files alone. With ``--maze ant``, MuJoCo's ant walks through the
U (`bench.learning.mujoco.ant_maze`), and results are in ``bench/results/goal_coverage_ant/``. All
variants take the same environment steps and the same PPO steps; coverage is the share of a grid of
free goals that the policy reaches from the start, in its own noise, in an environment of its own
with a seed of its own.

- ``uniform``: each episode's goal is uniform over the box inside the outer wall.
- ``uniform + traces``: the same, and traces from states seen nearest to uniform goals: the control
  that tells what traces do without GoalGAN.
- ``GoalGAN``: goals of intermediate difficulty.
- ``GoalGAN + traces``: the same, and traces from states seen nearest to good goals.

- ``... + real past``: the control of the model. From the same states, the steps that really came
  before them in their episode are imitated, and no model is fitted. In the point maze added after
  the other four had been seen, with their settings.

A trace is imitated as an attempt at the goal where it ends. Settings were chosen on seeds from 1000
on, and frozen before any run that is reported.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.learning.store import commit
from bench.machine import RESULTS, describe
from bench.result_files import write_result

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
# Of a maze whose other rows are not complete these alone are reported.
MAIN = ("uniform", "uniform + traces", "GoalGAN", "GoalGAN + traces")
Runs = dict[str, dict[int, dict[str, Any]]]


@dataclass(frozen=True)
class Maze:
    """Where a maze's numbers and results are.

    Args:
        name: of the folder and of the figure.
        title: in headings.
        settings: class of its numbers, ``module:name``.
        seeds: how many are run.
    """

    name: str
    title: str
    settings: str
    seeds: int

    def path(self, variant: str, seed: int, root: Path = RESULTS) -> Path:
        """Return where a run's result is."""
        name = variant.replace(" + ", "_").replace(" ", "_").lower()
        return root / self.name / f"{name}_{seed}.json"

    def load(self, root: Path = RESULTS) -> Runs:
        """Return the runs by variant and seed, of the seeds that the main variants have.

        Raises:
            FileNotFoundError: fewer than two such seeds.
            ValueError: runs of different settings, or one under another's name.
        """
        found: Runs = {variant: {} for variant in ORDER}
        for path in sorted((root / self.name).glob("*.json")):
            result = json.loads(path.read_text())
            variant, seed = result["variant"], result["seed"]
            if path != self.path(variant, seed, root):
                raise ValueError(f"{path} holds {variant}, seed {seed}.")
            found[variant][seed] = result
        common = set.intersection(*(set(found[variant]) for variant in MAIN))
        if len(common) < 2:
            raise FileNotFoundError(f"{len(common)} complete seeds of {self.name}; run first.")
        whole = {
            v: {s: runs[s] for s in sorted(common)}
            for v, runs in found.items()
            if common <= set(runs)
        }
        settings = {
            json.dumps(r["settings"], sort_keys=True) for x in whole.values() for r in x.values()
        }
        if len(settings) != 1:
            raise ValueError(f"runs of {len(settings)} settings in {self.name}; run it anew.")
        return whole


MAZES = {
    "point": Maze(
        "goal_coverage", "Goals in a U-maze", "bench.learning.goal_mazes:PointSettings", 10
    ),
    "ant": Maze(
        "goal_coverage_ant",
        "Goals of an ant in a U-maze",
        "bench.learning.mujoco.ant_goals:AntSettings",
        5,
    ),
}


def run(maze: Maze, first: int, count: int, variants: Sequence[str] = ORDER) -> None:
    """Make the runs that are missing; several processes may share the work."""
    from bench.learning import jobs
    from bench.learning.goal_training import VARIANTS

    assert tuple(VARIANTS) == ORDER
    module, _, name = maze.settings.partition(":")
    settings = getattr(importlib.import_module(module), name)()
    made_by = commit()
    wanted = [(variant, seed) for seed in range(first, first + count) for variant in variants]
    make = functools.partial(_make, maze, settings, made_by)
    for (variant, seed), coverage in jobs.results(wanted, make):
        if coverage is not None:
            print(f"{variant}, seed {seed}: {coverage:.2f}", flush=True)


def _make(maze: Maze, settings: Any, made_by: str, job: tuple[str, int]) -> float | None:
    """Make one run, unless it is there or another process is at it; return the last coverage."""
    from bench.learning.goal_training import Run

    variant, seed = job
    path = maze.path(variant, seed)
    claim = path.with_suffix(".running")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return None
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        print(f"{variant}, seed {seed}: another process is at it; if none is, remove {claim}")
        return None
    try:
        result = Run(variant, seed, settings).run()
        result |= {"variant": variant, "seed": seed, "settings": asdict(settings)}
        write_result(path, result | {"commit": made_by, "machine": describe()})
    finally:
        claim.unlink()
    return result["coverage"][-1]


def interval(values: np.ndarray) -> str:
    """Mean and the half width of its 95 % t-interval."""
    return f"{values.mean():+.3f} ± {half_width(values):.3f}".lstrip("+")


def half_width(values: np.ndarray, axis: int = 0) -> Any:
    """Half width of the 95 % t-interval of the mean."""
    from scipy import stats

    n = values.shape[axis]
    quantile = float(stats.t.ppf(0.975, n - 1))
    return quantile * values.std(axis, ddof=1) / math.sqrt(n)


def tables(runs: Runs) -> tuple[str, str]:
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
    for one, other in (pair for pair in PAIRS if set(pair) <= set(runs)):
        parts = [numbers[name][one] - numbers[name][other] for name in ("final", "area")]
        cells = " | ".join(f"{x.mean():+.3f} ± {half_width(x):.3f}" for x in parts)
        pairs.append(f"| {one} − {other} | {cells} |")
    return "\n".join(variants), "\n".join(pairs)


def _curves(runs: Runs) -> dict[str, np.ndarray]:
    return {v: np.array([r["coverage"] for r in found.values()]) for v, found in runs.items()}


def _steps(runs: Runs) -> np.ndarray:
    return np.array(next(iter(runs["uniform"].values()))["steps"])


def described(runs: Runs) -> str:
    """Say how many runs of how many steps there are."""
    return f"{len(runs['uniform'])} seeds, {_steps(runs)[-1]:,} environment steps"


def report(maze: Maze) -> None:
    """Print the tables and draw the figure."""
    runs = maze.load()
    print(f"{maze.title}: {described(runs)}; mean ± 95 % t-interval\n")
    print("\n\n".join(tables(runs)))
    print(f"\n{draw(maze, runs)}")


def draw(maze: Maze, runs: Runs, root: Path = RESULTS) -> Path:
    """Draw mean coverage by environment steps, with 95 % t-intervals; return the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves, steps, path = _curves(runs), _steps(runs), root / f"{maze.name}.png"
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
    # Half of it where that is all that is reached, to tell the curves apart.
    axis.set_ylim(0, 1 if max(curve.mean(0).max() for curve in curves.values()) > 0.4 else 0.5)
    axis.set_title(f"{maze.title}, {len(runs['uniform'])} seeds: mean, 95 % t-interval")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="make the runs that are missing")
    runs.add_argument("--seeds", type=_count, help="how many (10 of the point, 5 of the ant)")
    runs.add_argument("--first-seed", type=int, default=0)
    runs.add_argument("--variants", nargs="+", choices=ORDER, default=ORDER, metavar="VARIANT")
    drawn = commands.add_parser("report", help="table and figure from the committed runs")
    for command in (runs, drawn):
        command.add_argument("--maze", choices=list(MAZES), default="point")
    arguments = parser.parse_args()
    maze = MAZES[arguments.maze]
    if arguments.command == "report":
        report(maze)
        return
    run(maze, arguments.first_seed, arguments.seeds or maze.seeds, arguments.variants)


if __name__ == "__main__":
    main()

"""Time of a training step with and without recall traces: `python -m bench.learning.cost`.

Both learners are in one process and take turns, rollout by rollout, so that what else the machine
does meets both. Each rollout is followed by all that a method does on it: learning, storing,
ranking, fitting the model, sampling traces and imitating them. Results go to
``bench/results/learning/cost.json``, which the report reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.learning import store
from bench.learning.grids.recipes import COSTS
from bench.learning.grids.task import Task
from bench.learning.grids.traces import only_kept
from bench.learning.grids.training import Learner
from bench.learning.grids.walker import Walker
from bench.result_files import write_result

FILE = store.FOLDER / "cost.json"
WARM_UP = 5


def measure(rollouts: int, size: int = 15, seed: int = 0) -> dict[str, Any]:
    """Time rollouts with what is learned from each, pair by pair.

    Args:
        rollouts: to time of each learner.
        size: side of the maze.
        seed: of all of them.

    Returns:
        Of each pair the median seconds without and with traces, the median of the ratios of turns,
        and the parts of the time that traces add.
    """
    found = {}
    for name, pair in COSTS.items():
        times: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
        task, made = Task(size), {}
        for kind, recipe in zip(times, pair, strict=True):
            torch.manual_seed(seed)
            steps = recipe.host.num_envs * recipe.host.rollout * (rollouts + WARM_UP + 1)
            learner = Learner(task, recipe, steps)
            walker = Walker(task.data(recipe.host.num_envs), seed)
            # All costs are there from the start: the traces' way to a reward that has been found.
            made[kind] = (learner, walker)
        for turn in range(rollouts + WARM_UP):
            for kind, (learner, walker) in made.items():
                parts = _turn(learner, walker)
                if turn >= WARM_UP:
                    times[kind].append(parts)
        found[name] = _summary(times)
    return found


def _turn(learner: Learner, walker: Walker) -> dict[str, float]:
    """Collect and learn once, and say how long each part took."""
    began = time.process_time()
    data = walker.rollout(learner.host.policy(), learner.host.settings.rollout)
    learner.host.learn(data)
    parts = {"host": time.process_time() - began, "model": 0.0, "traces": 0.0, "imitation": 0.0}
    for source, updates in learner.imitated:
        begin = time.process_time()
        source.observe(data)
        parts["model"] += time.process_time() - begin
        for _ in range(updates):
            begin = time.process_time()
            sample = source.sample()
            middle = time.process_time()
            if sample is not None:
                learner.host.imitate(only_kept(sample))
            parts["traces"] += middle - begin
            parts["imitation"] += time.process_time() - middle
    return parts


def _summary(times: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    sums = {kind: [sum(parts.values()) for parts in turns] for kind, turns in times.items()}
    ratios = [b / a for a, b in zip(sums["without"], sums["with"], strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    parts = {
        name: statistics.median(parts[name] for parts in times["with"]) for name in times["with"][0]
    }
    return {
        "seconds": {kind: round(statistics.median(found), 6) for kind, found in sums.items()},
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
        "parts": {name: round(value, 6) for name, value in parts.items()},
    }


def table(measured: dict[str, Any]) -> str:
    """Return what was measured, in Markdown."""
    head = (
        "| | ms without traces | ms with | ratio [quartiles] | host | model | traces | imitation |"
    )
    lines = [head, "|---" * 8 + "|"]
    for name, found in measured["pairs"].items():
        without, with_ = (1e3 * found["seconds"][kind] for kind in ("without", "with"))
        parts = " | ".join(f"{1e3 * value:.1f}" for value in found["parts"].values())
        low, high = found["quartiles"]
        lines.append(
            f"| {name} | {without:.1f} | {with_:.1f} | {found['ratio']:.2f} [{low:.2f}, "
            f"{high:.2f}] | {parts} |"
        )
    made = (
        f"*`python -m bench.learning.cost --rollouts {measured['rollouts']}`; commit "
        f"{measured['commit']}; {measured['machine']}. Milliseconds of the processor for a rollout "
        "and all that is learned from it; the last columns are the parts of the time with traces.*"
    )
    return "\n".join([*lines, "", made])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=60)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measured = {"rollouts": options.rollouts, **store.provenance()}
    measured["pairs"] = measure(options.rollouts)
    write_result(FILE, measured)
    print(table(json.loads(FILE.read_text())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

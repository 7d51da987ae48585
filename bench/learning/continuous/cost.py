"""Time of a run with and without recall traces: `python -m bench.learning.continuous.cost`.

Both learners are in one process and take turns, iteration by iteration, so that what else the
machine does meets both; processor time is counted. Whole runs are timed: traces cost most at first,
while the model has everything to learn and the critic expects nothing. Results go to
``bench/results/learning/cost_continuous.json``.
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
from bench.learning.continuous.ppo import PPO
from bench.learning.continuous.tasks import TASKS
from bench.learning.continuous.variants import VARIANTS
from bench.result_files import write_result

FILE = store.FOLDER / "cost_continuous.json"


def measure(task_name: str, seed: int = 2000) -> dict[str, Any]:
    """Time all iterations of both learners on a task.

    Args:
        task_name: of the task.
        seed: of both.

    Returns:
        Median seconds of an iteration by learner, the ratio of the runs' times, and the median and
        the quartiles of the turns' ratios.
    """
    task = TASKS[task_name]
    hosts = {"without": PPO(task, seed), "with": PPO(task, seed, VARIANTS["traces"].make())}
    times: dict[str, list[float]] = {name: [] for name in hosts}
    for _ in range(hosts["with"].iterations):
        for name, host in hosts.items():
            began = time.process_time()
            host.iterate()
            times[name].append(time.process_time() - began)
    ratios = [b / a for a, b in zip(times["without"], times["with"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "seconds": {name: round(statistics.median(found), 4) for name, found in times.items()},
        "ratio": round(sum(times["with"]) / sum(times["without"]), 3),
        "iterations": {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; tasks that are not measured anew keep what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made = store.provenance()
    tasks = json.loads(FILE.read_text())["tasks"] if FILE.exists() else {}
    for name in options.tasks:
        tasks[name] = {"traces": {**measure(name), **made}}
        print(name, tasks[name])
    write_result(FILE, {"tasks": {name: tasks[name] for name in TASKS if name in tasks}})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time of an iteration with and without recall traces: `python -m bench.learning.continuous.cost`.

Both learners are in one process and take turns, iteration by iteration, so that what else the
machine does meets both; processor time is counted. Results go to
``bench/results/learning/cost_continuous.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.learning import store
from bench.learning.continuous.ppo import PPO
from bench.learning.continuous.tasks import TASKS
from bench.learning.continuous.variants import VARIANTS, settings_of
from bench.result_files import write_result

FILE = store.FOLDER / "cost_continuous.json"
WARM_UP = 2


def measure(task_name: str, turns: int) -> dict[str, Any]:
    """Time iterations of both learners on a task.

    Args:
        task_name: of the task.
        turns: iterations of each learner that count.

    Returns:
        Median seconds by learner, the median of the turns' ratios, and their quartiles.
    """
    task, variant = TASKS[task_name], VARIANTS["traces"]
    guide: Any = variant.guide
    hosts = {
        "without": PPO(task, 0),
        "with": PPO(task, 0, partial(guide, **settings_of(task, variant))),
    }
    times: dict[str, list[float]] = {name: [] for name in hosts}
    for turn in range(WARM_UP + turns):
        for name, host in hosts.items():
            began = time.process_time()
            host.iterate()
            if turn >= WARM_UP:
                times[name].append(time.process_time() - began)
    ratios = [b / a for a, b in zip(times["without"], times["with"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "seconds": {name: round(statistics.median(found), 4) for name, found in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=12)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made = store.provenance()
    tasks = {name: measure(name, options.turns) for name in TASKS}
    write_result(FILE, {"turns": options.turns, "tasks": tasks, **made})
    for name, found in tasks.items():
        print(name, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What Ray collectors bring: `python -m bench.ray_throughput` measures 1, 2 and 4 of them.

For each number, rounds in turn: frames per second with nothing to do but to collect, then those of
the whole program (`torchrl_recall.demo.ray`) with where the learner's time goes. The result goes to
``bench/results/ray/``, a file each machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from functools import partial
from typing import Any

import torch

from bench.machine import RESULTS, describe, result_file
from torchrl_recall.demo.ray import make_env, train
from torchrl_recall.demo.ray_collectors import SupervisedCollectors, ray_running
from torchrl_recall.demo.train import A2C, Settings

NUMBERS = (1, 2, 4)
SETTINGS = Settings(size=11)
FRAMES = SETTINGS.num_envs * SETTINGS.rollout


def collect(number: int, rollouts: int) -> float:
    """Return frames per second of collectors whose rollouts nobody uses."""
    actor = A2C(make_env(SETTINGS, 0), SETTINGS).actor
    makers = [partial(make_env, SETTINGS, i) for i in range(number)]
    collectors = SupervisedCollectors(makers, actor, frames_per_batch=FRAMES, timeout=180.0)
    try:
        came = collectors.rollouts()
        for _ in range(4 * number):  # all have started
            next(came)
        began = time.perf_counter()
        for _ in range(rollouts):
            next(came)
            collectors.version += 1  # as if trained: weights are sent anew
        return rollouts * FRAMES / (time.perf_counter() - began)
    finally:
        collectors.shutdown()


def measure(number: int, rollouts: int) -> dict[str, Any]:
    """Return one round for one number of collectors."""
    alone = collect(number, rollouts)
    settings = Settings(**{**vars(SETTINGS), "steps": rollouts * FRAMES})
    done = train(settings, num_collectors=number, timeout=180.0, stop_when_solved=False)
    seconds = done["seconds"]
    # The first rollout ends before the clock starts.
    frames = done["steps"] - FRAMES
    return {
        "collect_frames_per_s": alone,
        "train_frames_per_s": frames / sum(seconds.values()),
        "wait_share": seconds["wait"] / sum(seconds.values()),
        "learner_ms_per_rollout": {k: 1e3 * v * FRAMES / frames for k, v in seconds.items()},
        "lag_mean": done["lag_mean"],
        "success": done["success"],
        "failures": done["failures"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the medians, save everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.ray_throughput")
    parser.add_argument("--rollouts", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    machine = describe()
    rounds: dict[int, list[Any]] = {number: [] for number in NUMBERS}
    loads = []
    with ray_running(max(NUMBERS) + 1, tries=10):
        for _ in range(options.rounds):
            for number in NUMBERS:
                loads.append(os.getloadavg()[0])
                rounds[number].append(measure(number, options.rollouts))
    shown = ("collect_frames_per_s", "train_frames_per_s", "wait_share", "lag_mean")
    medians = {
        number: {name: statistics.median(one[name] for one in found) for name in shown}
        for number, found in rounds.items()
    }
    result = {"machine": machine, "frames_per_rollout": FRAMES, "load_before": loads}
    result |= {"median": medians, "rounds": rounds}
    path = RESULTS / "ray" / result_file(machine).name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for number, median in medians.items():
        print(number, {name: round(value, 3) for name, value in median.items()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

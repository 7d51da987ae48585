"""What current values are worth to the main job: four rooms, values refreshed against stale ones.

`python -m bench.learning_sampler --minutes 20` runs what is missing, one file a run under
``bench/results/learning_sampler/``; `python -m bench.learning_sampler --report` sums it up. Until
the first reward, which is before any value of the critic means much, starts come from rare cells as
in the demo. Ways to rank stored transitions, each with the same seeds:

- ``counts_refreshed``: the demo's ``recall_found``, whose visit counts are current.
- ``counts_stale``: the visit counts of the moment when a transition was stored.
- ``critic_refreshed``: after the first reward, the share ``frontier`` of highest
  ``r + gamma V(s')``, by the critic of each iteration (`ValueRefresh`).
- ``critic_stale``: the same, by the critic that was there when the transition was stored.

After the first reward the demo draws transitions with reward, and ``recall_known`` draws none at
all: neither depends on a critic.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from bench.machine import RESULTS, describe
from bench.result_files import write_result
from torchrl_recall import ValueRefresh, transition_value
from torchrl_recall.demo import train
from torchrl_recall.demo.report import half_width

WAYS = ("counts_refreshed", "counts_stale", "critic_refreshed", "critic_stale")
FOLDER, SUMMARY = RESULTS / "learning_sampler", RESULTS / "learning_sampler.json"
PAIRS = (("counts_refreshed", "counts_stale"), ("critic_refreshed", "critic_stale"))


class Ranked(train.RecallTraces):
    """Recall traces whose starts are ranked in one of the ``WAYS``."""

    def __init__(self, env: Any, a2c: Any, settings: Any, goal_known: bool, *, way: str) -> None:
        super().__init__(env, a2c, settings, goal_known)
        self.by_critic, self.is_stale = way.startswith("critic"), way.endswith("stale")
        # In this environment a reward ends the episode, and the demo stores no more than it.
        options: Any = {"gamma": settings.gamma, "terminated_key": ("next", "reward")}
        self.value = partial(transition_value, value_network=a2c.critic, **options)
        self.refresh_by_critic = ValueRefresh(self.recall_buffer, a2c.critic, **options)
        self.at_storing: list[torch.Tensor] = []

    def _refresh_values(self, data: TensorDictBase) -> None:
        found = self.found or bool((data["next", "reward"] > 0).any())
        if not self.by_critic:
            self._by_counts(data, found)
            return
        if self.is_stale:
            self.at_storing.append(self.value(data))
        if not found:
            super()._refresh_values(data)
            return
        self.found = True
        if self.is_stale:
            self.sampler.refresh(torch.cat(self.at_storing))
        else:
            self.refresh_by_critic()

    def _by_counts(self, data: TensorDictBase, found: bool) -> None:
        if found or not self.is_stale:
            super()._refresh_values(data)
            return
        cell = self.model.observation.joint_index
        reached = cell(data["next", "observation"])
        self.visits += reached.bincount(minlength=len(self.visits))
        self.at_storing.append(-self.visits[reached].float())
        self.sampler.refresh(torch.cat(self.at_storing))


def run(way: str, seed: int, size: int, steps: int) -> dict[str, Any]:
    """Run one way with one seed."""
    settings = train.Settings(size=size, steps=steps)
    done = train.train("recall_found", seed, settings, recall_traces=partial(Ranked, way=way))
    return {"way": way, "seed": seed, "t90": done["t90"], "wall_s": round(done["wall_s"], 1)}


def summary(runs: list[dict[str, Any]], budget: int) -> dict[str, Any]:
    """Mean steps to 0.9 with 95 % intervals, and differences seed by seed; unsolved: the budget."""
    steps = {
        way: {
            r["seed"]: r["t90"] if r["t90"] is not None else budget for r in runs if r["way"] == way
        }
        for way in WAYS
    }

    def interval(values: list[float]) -> dict[str, float]:
        array = np.array(values, dtype=float)
        return {"n": len(values), "mean": array.mean(), "half_width_95": float(half_width(array))}

    result: dict[str, Any] = {
        way: interval(list(by_seed.values())) for way, by_seed in steps.items() if by_seed
    }
    for refreshed, stale in PAIRS:
        both = sorted(steps[refreshed].keys() & steps[stale].keys())
        if both:
            result[f"{stale} - {refreshed}"] = interval(
                [steps[stale][seed] - steps[refreshed][seed] for seed in both]
            )
    for way in steps:
        result.setdefault(way, {})["unsolved"] = sum(
            r["t90"] is None for r in runs if r["way"] == way
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="start no run after these")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--size", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20_000, help="budget; unsolved counts as it")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    for seed in range(arguments.seeds):
        for way in WAYS:
            file = FOLDER / f"{way}_{arguments.size}_{seed}.json"
            if file.exists() or arguments.report or time.monotonic() > end:
                continue
            result = run(way, seed, arguments.size, arguments.steps)
            write_result(file, result, indent=None)
            print(file.read_text(), flush=True)
    runs = [json.loads(file.read_text()) for file in sorted(FOLDER.glob(f"*_{arguments.size}_*"))]
    result = {
        "size": arguments.size,
        "machine": describe(),
        "steps": arguments.steps,
        "summary": summary(runs, arguments.steps),
        "runs": runs,
    }
    SUMMARY.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()

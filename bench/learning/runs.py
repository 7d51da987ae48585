"""Runs of the ablation: one JSON file each, none run twice, side by side in processes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from bench.learning.jobs import results
from bench.learning.rows import ROWS, Row
from bench.learning.variants import Variant, maker
from bench.result_files import write_result
from torchrl_recall.demo.train import train
from torchrl_recall.envs import success_probability

Job = tuple[str, int]


def run(row: Row, seed: int, size: int, budget: int) -> dict[str, Any]:
    """Train one row with one seed until it is solved or the budget is spent.

    Args:
        row: what to change of the main job.
        seed: of environment, networks and samplers.
        size: side of the maze.
        budget: environment steps.

    Returns:
        The definition of the run, and ``t90`` (steps to 0.9 exact success, or None), ``success``
        and ``every_cell`` (exact success in the end, from the start and over all cells but the
        goal), ``wall_s``.
    """
    made: list[Variant] = []
    result = train(
        row.method,
        seed,
        row.make_settings(size, budget),
        recall_traces=maker(row.options, made),
    )
    return {
        "row": row.name,
        "seed": seed,
        "definition": row.definition(size, budget),
        "t90": result["t90"],
        "success": round(result["success"][-1], 6),
        "every_cell": round(every_cell(made[0]), 6),
        "wall_s": round(result["wall_s"], 2),
    }


@torch.no_grad()
def every_cell(variant: Variant) -> float:
    """Return the exact success of the policy from each cell but the goal, on average."""
    env, actor = variant.env, variant.a2c.actor
    cells = torch.cartesian_prod(torch.arange(env.size), torch.arange(env.size)).to(env.device)
    policy: Any = actor.get_dist(TensorDict({"observation": cells}, [len(cells)]))
    inner = ~env.walls.view(-1)
    inner[env.goal[0] * env.size + env.goal[1]] = False
    return float(success_probability(env, policy.probs)[inner].mean())


def path_of(folder: Path, job: Job) -> Path:
    """Return where a run's result is."""
    return folder / job[0] / f"{job[1]}.json"


def load(folder: Path, row: Row, size: int, budget: int) -> list[dict[str, Any]]:
    """Read what has been run of a row, by seed.

    Raises:
        ValueError: a run was made with other settings than the row has now.
    """
    definition = json.loads(json.dumps(row.definition(size, budget)))
    runs = []
    for file in sorted((folder / row.name).glob("*.json")):
        run = json.loads(file.read_text())
        if run["definition"] != definition:
            raise ValueError(f"{file} was run with other settings than {row.name!r} has now.")
        runs.append(run)
    return sorted(runs, key=lambda run: run["seed"])


def run_missing(
    jobs: Sequence[Job], folder: Path, size: int, budget: int, workers: int = 1
) -> None:
    """Run what has no result yet, and say how it goes.

    Args:
        jobs: names of rows and seeds, in the order in which to run them.
        folder: where results go.
        size: side of the maze.
        budget: environment steps of a run.
        workers: processes side by side, of one thread each; 1 is this process.
    """
    waiting = [job for job in jobs if not path_of(folder, job).exists()]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are there.", flush=True)
    began = time.monotonic()
    finished = results(waiting, partial(_run, size=size, budget=budget), workers)
    for done, ((name, seed), result) in enumerate(finished, 1):
        write_result(path_of(folder, (name, seed)), result)
        solved = "not solved" if result["t90"] is None else f"{result['t90']:,} steps"
        left = (time.monotonic() - began) / done * (len(waiting) - done) / 60
        print(
            f"[{done}/{len(waiting)}] {name} {seed}: {solved}, {result['wall_s']:.1f} s; "
            f"about {left:.0f} min left",
            flush=True,
        )


def _run(job: Job, *, size: int, budget: int) -> dict[str, Any]:
    return run(ROWS[job[0]], job[1], size, budget)

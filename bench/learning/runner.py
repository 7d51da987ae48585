"""Run what has no result yet, and say how it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.learning import jobs, store
from bench.learning.entry import Entry

Run = tuple[Entry, int]


def run_missing(
    entries: Sequence[Entry],
    folder: Path = store.FOLDER,
    seeds: Sequence[int] | None = None,
    workers: int = 1,
) -> int:
    """Run the entries' seeds that have no result yet, in this order.

    Args:
        entries: what to run.
        folder: where results go.
        seeds: run only these of an entry's seeds; None is all of them.
        workers: processes side by side, of one thread each; 1 is this process.

    Returns:
        How many were run.

    Raises:
        ValueError: a result that is there is stale.
    """
    wanted = [(entry, seed) for entry in entries for seed in entry.seeds]
    wanted = [(entry, seed) for entry, seed in wanted if seeds is None or seed in seeds]
    times = {}
    for entry in entries:
        there = store.load(folder, entry)
        if there:
            times[entry.task, entry.name] = [run["seconds"][-1] for run in there]
    waiting = [job for job in wanted if not store.path_of(folder, *job).exists()]
    print(f"{len(wanted) - len(waiting)} of {len(wanted)} runs are there.", flush=True)
    made = store.provenance()
    began = time.monotonic()
    for done, ((entry, seed), measured) in enumerate(jobs.results(waiting, _train, workers), 1):
        result = store.save(folder, entry, seed, measured, made)
        solved = result["solved_at"]
        outcome = f"score {result['score'][-1]:.3f}"
        outcome += " not solved" if solved is None else f" solved at {solved:,} steps"
        times.setdefault((entry.task, entry.name), []).append(result["seconds"][-1])
        left = _left(waiting[done:], times, (time.monotonic() - began) / done, workers)
        print(
            f"[{done}/{len(waiting)}] {entry.task} {entry.name} {seed}: {outcome}, "
            f"{result['seconds'][-1]:.1f} s; about {left / 60:.0f} min left",
            flush=True,
        )
    return len(waiting)


def _train(job: Run) -> dict[str, Any]:
    entry, seed = job
    return entry.train(seed)


def _left(
    waiting: Sequence[Run], times: dict[tuple[str, str], list[float]], mean: float, workers: int
) -> float:
    """Estimate the seconds left: each run as long as others of its entry, or the mean so far."""
    total = 0.0
    for entry, _ in waiting:
        known = times.get((entry.task, entry.name))
        total += sum(known) / len(known) / workers if known else mean
    return total

"""Run what has no result yet, and say how it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
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

    Each run is saved as soon as it ends, by the process that made it; one whose result has come
    from elsewhere meanwhile is left out.

    Returns:
        How many were run.

    Raises:
        ValueError: a result that is there is stale or damaged, or a seed that no entry has.
    """
    known = {seed for entry in entries for seed in entry.seeds}
    if seeds is not None and not set(seeds) <= known:
        unknown = sorted(set(seeds) - known)
        raise ValueError(f"no entry has the seeds {unknown}; there are {sorted(known)}.")
    wanted = [(entry, seed) for entry in entries for seed in entry.seeds]
    wanted = [(entry, seed) for entry, seed in wanted if seeds is None or seed in seeds]
    times = {}
    for entry in entries:
        there = store.load(folder, entry)
        if there:
            times[entry.task, entry.name] = [run["seconds"][-1] for run in there]
    waiting = [job for job in wanted if not store.path_of(folder, *job).exists()]
    print(f"{len(wanted) - len(waiting)} of {len(wanted)} runs are there.", flush=True)
    train = partial(_train, folder, store.provenance())
    began, trained = time.monotonic(), 0
    for done, ((entry, seed), result) in enumerate(jobs.results(waiting, train, workers), 1):
        if result is None:
            print(f"[{done}/{len(waiting)}] {entry.task} {entry.name} {seed}: is there by now")
            continue
        trained += 1
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
    return trained


def _train(folder: Path, made: dict[str, Any], job: Run) -> dict[str, Any] | None:
    """Train and save one run, unless its result is there; return it."""
    entry, seed = job
    if store.path_of(folder, entry, seed).exists():
        return None
    return store.save(folder, entry, seed, entry.train(seed), made)


def _left(
    waiting: Sequence[Run], times: dict[tuple[str, str], list[float]], mean: float, workers: int
) -> float:
    """Estimate the seconds left: each run as long as others of its entry, or the mean so far."""
    total = 0.0
    for entry, _ in waiting:
        known = times.get((entry.task, entry.name))
        total += sum(known) / len(known) / workers if known else mean
    return total

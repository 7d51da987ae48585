"""All runs of the main job side by side, one process a core, with one progress bar."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from queue import Empty
from typing import Any

import torch
from tqdm import tqdm

from torchrl_recall.demo.train import Settings, train

# Progress goes to the parent in chunks of this many environment steps.
CHUNK = 2048
_queue: Any = None


def run_all(jobs: Sequence[tuple[str, int]], settings: Settings) -> list[dict[str, Any]]:
    """Run every (method, seed) and return the results in the order of the jobs.

    Args:
        jobs (sequence of tuple): method and seed of each run.
        settings (Settings): shared by all.

    Returns:
        list of dict: what `train` returns.
    """
    # A GPU is shared by none.
    workers = min(len(jobs), os.cpu_count() or 1) if settings.device == "cpu" else 1
    context = multiprocessing.get_context("spawn")
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    with context.Manager() as manager:
        queue = manager.Queue()
        with (
            ProcessPoolExecutor(
                workers, context, initializer=_start_worker, initargs=(queue,)
            ) as pool,
            tqdm(total=len(jobs) * settings.steps, unit="step", unit_scale=True) as bar,
        ):
            waiting = {pool.submit(_run, *job, settings): job for job in jobs}
            while waiting:
                _show_progress(queue, bar)
                for future in [future for future in waiting if future.done()]:
                    job = waiting.pop(future)
                    runs[job] = run = future.result()
                    solved = "not solved" if run["t90"] is None else f"{run['t90']:,} steps"
                    tqdm.write(f"{job[0]:13} seed {job[1]:<4} {solved}")
    return [runs[job] for job in jobs]


def _start_worker(queue: Any) -> None:
    global _queue
    _queue = queue
    # TorchRL's notes on storages would break the progress bar.
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    # Runs are the unit of parallelism; it also makes the numbers independent of the machine.
    torch.set_num_threads(1)


def _run(method: str, seed: int, settings: Settings) -> dict[str, Any]:
    done = 0

    def progress(steps: int) -> None:
        nonlocal done
        if steps - done >= CHUNK:
            _queue.put(steps - done)
            done = steps

    run = train(method, seed, settings, progress)
    # An early finish is worth the whole run to the progress bar.
    _queue.put(settings.steps - done)
    return run


def _show_progress(queue: Any, bar: Any) -> None:
    """Wait a moment for progress and show what has come."""
    try:
        bar.update(queue.get(timeout=0.2))
        while True:
            bar.update(queue.get_nowait())
    except Empty:
        return

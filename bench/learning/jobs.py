"""Jobs side by side in processes of one thread each."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
# TensorDict searches the disk for it at every call of a module that has not loaded it: a quarter of
# a step of SAC. Told that it is not there, it does not.
LOOKED_FOR = {"pandas"}


def results(
    jobs: Sequence[Job], run: Callable[[Job], Any], workers: int = 1
) -> Iterator[tuple[Job, Any]]:
    """Run jobs and yield each with its result as it comes.

    Args:
        jobs: picklable if there are several workers.
        run: takes a job; picklable likewise.
        workers: processes side by side; 1 is this process.
    """
    if workers == 1:
        threads = torch.get_num_threads()
        loaded = LOOKED_FOR & sys.modules.keys()
        _start_worker()
        try:
            for job in jobs:
                yield job, run(job)
        finally:
            torch.set_num_threads(threads)
            for name in LOOKED_FOR - loaded:
                sys.modules.pop(name, None)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _start_worker() -> None:
    for name in LOOKED_FOR:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.set_num_threads(1)

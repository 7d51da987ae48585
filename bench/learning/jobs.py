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

    The first job that fails ends it: no other is begun, those that run already are waited for and
    yielded, and then its error is raised.

    Args:
        jobs: picklable if there are several workers.
        run: takes a job; picklable likewise.
        workers: processes side by side; 1 is this process.
    """
    if workers == 1:
        logger = logging.getLogger("torchrl")
        threads, level = torch.get_num_threads(), logger.level
        loaded = LOOKED_FOR & sys.modules.keys()
        _start_worker()
        try:
            for job in jobs:
                yield job, run(job)
        finally:
            torch.set_num_threads(threads)
            logger.setLevel(level)
            for name in LOOKED_FOR - loaded:
                sys.modules.pop(name, None)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    failure: BaseException | None = None
    try:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(futures):
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                yield futures[future], future.result()
            elif failure is None:
                failure = error
                for waiting in futures:
                    waiting.cancel()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    for name in LOOKED_FOR:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.set_num_threads(1)

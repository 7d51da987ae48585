"""Two threads against one, both ours. A neighbour on the second core shows in this ratio."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases import SIZES, build
from bench.ours import ours

CASES = ["M", "L"]


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("name", CASES)
def test_threads(name: str, cores: set[int], take_turns: Callable) -> None:
    if len(cores) < 2:
        pytest.skip("this process may use one core only")
    size = SIZES[name]
    walk = ours(*build(name), size.num_steps)

    def with_threads(count: int) -> Callable[[], Any]:
        def run() -> Any:
            torch.set_num_threads(count)
            return walk()

        return run

    pinned = hasattr(os, "sched_setaffinity")
    alone = os.sched_getaffinity(0) if pinned else set()
    # Threads that start now inherit this.
    if pinned:
        os.sched_setaffinity(0, cores)
    try:
        contenders = {"two threads": with_threads(2), "one thread": with_threads(1)}
        take_turns(f"threads, {name}", contenders, rounds=size.rounds, warmup=size.warmup)
    finally:
        if pinned:
            os.sched_setaffinity(0, alone)

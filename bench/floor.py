"""The floor: the time that one core needs for the matrix products and the random numbers alone.

FLOPs of the products (two a multiply-add) divided by the measured peak, plus the measured time of
drawing the random numbers. ``floor.c`` measures both where there is a C compiler; elsewhere the
best large `torch.mm` and `torch.randn` stand in, which makes the floor higher than it is.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.cases import Size

SOURCE = Path(__file__).with_name("floor.c")
# The first that the compiler takes: by far the fastest code needs the machine's own instructions.
FLAGS = (["-march=native"], ["-mcpu=native"], [])


class Core(NamedTuple):
    """What one core can do.

    Attributes:
        flops (float): multiply-adds a second in float32, counted as two each.
        random_seconds (float): time for one standard normal number.
        source (str): what measured it.
    """

    flops: float
    random_seconds: float
    source: str


def products(size: Size) -> int:
    """Return the FLOPs of all matrix products of a Gaussian case.

    Args:
        size (Size): the case.

    Returns:
        int: two for each multiply-add.
    """
    state, action, width = size.observation, size.action, size.width
    action_network = state * width + width * width + width * 2 * action
    delta_network = (state + action) * width + width * width + width * 2 * state
    return 2 * size.rows * size.num_steps * (action_network + delta_network)


def random_numbers(size: Size) -> int:
    """Return how many random numbers a Gaussian case draws."""
    return size.rows * size.num_steps * (size.observation + size.action)


def seconds(size: Size, core: Core) -> float:
    """Return the floor of a Gaussian case."""
    return products(size) / core.flops + random_numbers(size) * core.random_seconds


def measure() -> Core:
    """Measure this machine's core, in well under a second."""
    out = run_c()
    if out is not None:
        return Core(out["peak"], out["random"], "C")
    matrix, numbers = torch.randn(1024, 1024), torch.empty(2**18)
    product = _fastest(lambda: torch.mm(matrix, matrix))
    drawing = _fastest(numbers.normal_)
    return Core(2 * math.prod([1024] * 3) / product, drawing / numbers.numel(), "torch")


def run_c() -> dict[str, float] | None:
    """Compile ``floor.c``, run it, and return what it says; None if no compiler can."""
    names = [os.environ.get("CC"), "cc", "gcc", "clang"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "floor"
        for flags in FLAGS:
            command = [compiler, "-O3", "-ffast-math", *flags, str(SOURCE), "-o", str(program)]
            if subprocess.run([*command, "-lm"], capture_output=True).returncode == 0:
                out = subprocess.run([program], capture_output=True, check=True, text=True)
                return json.loads(out.stdout)
    return None


def _fastest(function: Callable[[], object], trials: int = 20) -> float:
    best = math.inf
    for _ in range(trials):
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return best

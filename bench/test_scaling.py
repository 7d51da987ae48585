"""How the lead changes with rows, steps, observations and width, one at a time around M."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.cases import SIZES, gaussian
from bench.ours import ours
from bench.peers import walks

AXES = {
    "rows": [64, 256, 1024, 4096],
    "num_steps": [4, 8, 16, 32, 64],
    "observation": [4, 17, 64, 128],
    "width": [32, 64, 128, 256, 512],
}
LETTERS = {"rows": "B", "num_steps": "T", "observation": "D", "width": "h"}
PEERS = ["TorchRL rollout", "JAX jit(scan)"]
ROUNDS = 5


@pytest.mark.parametrize(
    ("axis", "value"), [(axis, value) for axis, values in AXES.items() for value in values]
)
def test_scaling(axis: str, value: int, device: torch.device, take_turns: Callable) -> None:
    size = SIZES["M"]._replace(**{axis: value})
    model, start = gaussian(size, device)
    others, skipped = walks(PEERS, model, start, size.num_steps)
    take_turns(
        f"scaling, {LETTERS[axis]} {value}",
        {"sample_traces": ours(model, start, size.num_steps), **others},
        rounds=ROUNDS,
        # Not the first call: it may build something.
        warmup=2,
        skipped=skipped,
        axis=LETTERS[axis],
        value=value,
    )

"""Replay buffer: what traces cost in a sample.

The case has size M of the traces: 1024 transitions, 16 steps, networks of width 256. A whole
sample may cost `BAR` times as much as its traces.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from bench.cases import SIZES
from torchrl_recall import (
    BacktrackModel,
    BacktrackTransform,
    ValuePrioritizedSampler,
    sample_traces,
)

CAPACITY = 10_000
BAR = 1.15

pytestmark = pytest.mark.usefixtures("cpu_only")


def test_sample(take_turns: Callable) -> None:
    size = SIZES["M"]
    model = BacktrackModel(size.observation, size.action, num_cells=(size.width, size.width))
    data = TensorDict(
        {
            "observation": torch.randn(CAPACITY, size.observation),
            "action": torch.rand(CAPACITY, size.action) * 2 - 1,
            "value_target": torch.randn(CAPACITY, 1),
            "next": {"observation": torch.randn(CAPACITY, size.observation)},
        },
        [CAPACITY],
    )

    def buffer(transform: BacktrackTransform | None) -> TensorDictReplayBuffer:
        out = TensorDictReplayBuffer(
            storage=LazyTensorStorage(CAPACITY),
            sampler=ValuePrioritizedSampler(CAPACITY),
            priority_key="value_target",
            transform=transform,
            batch_size=size.rows,
        )
        out.extend(data)
        return out

    recall = buffer(BacktrackTransform(model, num_steps=size.num_steps))
    plain = buffer(None)
    start = data["next", "observation"][: size.rows]
    record = take_turns(
        "buffer, sample",
        {
            "sample_traces alone": lambda: sample_traces(model, start, num_steps=size.num_steps),
            "with traces": recall.sample,
            "without traces": plain.sample,
        },
        rounds=15,
        bar={"with traces": BAR},
    )
    assert record["ratios"]["with traces"] <= BAR
    batch = recall.sample()
    assert batch["trace"].shape == (size.rows, size.num_steps)
    assert bool(torch.isfinite(batch["trace", "observation"]).all())

"""Replay buffer: what traces cost in a sample, and a draw of `ValuePrioritizedSampler`.

The buffer case has size M of the traces: 1024 transitions, 16 steps, networks of width 256. A whole
sample may cost `BAR` times as much as its traces.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer

from bench.cases import SIZES
from torchrl_recall import (
    BacktrackModel,
    BacktrackTransform,
    ValuePrioritizedSampler,
    sample_traces,
)

CAPACITY = 10_000
LARGE = 1_000_000
DRAWS = 256
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


@pytest.mark.parametrize("mode", ["top", "soft", "per"])
def test_draw(mode: str, take_turns: Callable) -> None:
    try:
        peer = PrioritizedSampler(LARGE, alpha=1.0, beta=0.0)
    except Exception as error:
        pytest.skip(f"TorchRL's PrioritizedSampler cannot be built here: {error}")
    ours = ValuePrioritizedSampler(LARGE, mode=mode)
    values, storage = torch.rand(LARGE), LazyTensorStorage(LARGE)
    storage.set(range(LARGE), TensorDict({"value": values}, [LARGE]))
    ours.refresh(values)
    peer.extend(torch.arange(LARGE))
    peer.update_priority(torch.arange(LARGE), values)
    take_turns(
        f"sampler, draw {DRAWS} of 1 M, {mode}",
        {
            "ValuePrioritizedSampler": lambda: ours.sample(storage, DRAWS),
            "PrioritizedSampler": lambda: peer.sample(storage, DRAWS),
        },
        rounds=50,
    )
    for sampler in (ours, peer):
        index = torch.as_tensor(sampler.sample(storage, DRAWS)[0])
        assert index.shape == (DRAWS,)
        assert 0 <= int(index.min()) <= int(index.max()) < LARGE

"""What tests of the transform share: a model, transitions that tell their row, a buffer of them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictPrioritizedReplayBuffer

from torchrl_recall import BacktrackModel

T, SIZE, WIDTH = 4, 32, 3


def make_model(observation=WIDTH, action=2, **kwargs):
    return BacktrackModel(observation, action, num_cells=(8,), **kwargs)


def transitions(*batch):
    """Transitions whose observations tell their row."""
    count = torch.Size(batch).numel()
    observation = torch.arange(count * WIDTH, dtype=torch.float32).reshape(*batch, WIDTH) / 100
    value = torch.linspace(-1, 1, count).reshape(*batch, 1)
    data = {"observation": observation, "action": torch.zeros(*batch, 2), "value_target": value}
    data["next"] = {"observation": observation + 1, "reward": value.clone()}
    return TensorDict(data, batch)


def trace_of(transform, data=None):
    return transform(transitions(5) if data is None else data)["trace"]


def same(a, b):
    return bool((a == b).all())


def has_extension():
    try:
        PrioritizedSampler(2, alpha=0.6, beta=0.4)
    except RuntimeError:
        return False
    return True


def make_buffer(cls, transform, *, storage=LazyTensorStorage, **kwargs):
    if cls is TensorDictPrioritizedReplayBuffer:
        if not has_extension():
            pytest.skip("TorchRL's C++ extension, which holds its sum trees, does not load here")
        kwargs |= {"alpha": 0.6, "beta": 0.4}
    rb = cls(storage=storage(SIZE), transform=transform, batch_size=8, **kwargs)
    rb.extend(transitions(SIZE))
    return rb


def check_traces(data):
    """Traces of the right shape, each a chain that ends in its own row's next state."""
    trace = data["trace"]
    assert trace.shape == (*data.shape, T)
    following = trace["next", "observation"]
    assert same(following[..., -1, :], data["next", "observation"])
    assert same(following[..., :-1, :], trace["observation"][..., 1:, :])

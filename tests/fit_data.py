"""Models, data and calls of `fit` for its tests."""

from __future__ import annotations

import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_recall import BacktrackModel, fit


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(**options):
    return BacktrackModel(3, 2, num_cells=(16,), **options)


def quick(model, data, **options):
    defaults = {"num_steps": 20, "progress": False, "generator": generator(), "batch_size": 32}
    return fit(model, data, **{**defaults, **options})


def in_buffer(data, storage=LazyTensorStorage, **options):
    buffer = TensorDictReplayBuffer(storage=storage(len(data)), batch_size=8, **options)
    buffer.extend(data)
    return buffer


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor) or hasattr(a, "batch_size"):
        assert bool((a == b).all())
    elif " at 0x" not in str(a):
        assert str(a) == str(b)

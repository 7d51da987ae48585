"""What tests of the model share: a maze, random transitions, statistics of data."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.envs import InitTracker, TransformedEnv

from torchrl_recall.envs import FourRoomsEnv


def make_maze(**kwargs):
    options = {"slip": 0.1, "max_steps": None, "seed": 0, **kwargs}
    return TransformedEnv(FourRoomsEnv(5, **options), InitTracker())


def update(model, data):
    state, action, next_state = model.read(data.reshape(-1))
    model.update_normalization(state, action, next_state)


def random_transitions(*batch, size=3, width=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(n):
        return torch.randn(*batch, n, generator=generator, dtype=dtype)

    return TensorDict(
        {
            "observation": randn(size),
            "action": torch.tanh(randn(width)),
            "next": {"observation": randn(size)},
            "other": randn(1),
        },
        batch,
    )

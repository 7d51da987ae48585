"""What is walked: the sizes of the benchmark, and a model and starting states for each.

``B`` traces of ``T`` steps, ``D`` observations, ``A`` actions, two hidden layers of ``h`` each. S,
M and L are Gaussian; four rooms is discrete, on the 11 by 11 grid, which has 121 states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_recall import BacktrackModel
from torchrl_recall.envs import FourRoomsEnv

FOUR_ROOMS = 11


class Size(NamedTuple):
    """A case, and how often it is run."""

    rows: int
    num_steps: int
    observation: int
    action: int
    width: int
    rounds: int
    warmup: int = 3


SIZES = {
    "S": Size(64, 10, 11, 3, 64, 60),
    "M": Size(1024, 16, 17, 6, 256, 15),
    "L": Size(8192, 32, 111, 8, 256, 7),
    "four rooms": Size(512, 12, 2, 4, 64, 40),
}


def gaussian(
    size: Size, device: torch.device | str = "cpu", **kwargs: Any
) -> tuple[BacktrackModel, Tensor]:
    """Return the model of a Gaussian case and the states to go back from.

    Args:
        size (Size): the case.
        device (torch.device): where both live.
        **kwargs: for the model.

    Returns:
        tuple: a `BacktrackModel` and ``[B, D]`` states.
    """
    cells = (size.width, size.width)
    model = BacktrackModel(size.observation, size.action, num_cells=cells, device=device, **kwargs)
    return model, torch.randn(size.rows, size.observation, device=device)


def build(
    name: str, device: torch.device | str = "cpu", **kwargs: Any
) -> tuple[BacktrackModel, Tensor]:
    """Return the model of a named case and the states to go back from."""
    size = SIZES[name]
    if name != "four rooms":
        return gaussian(size, device, **kwargs)
    env = FourRoomsEnv(FOUR_ROOMS, start="any", batch_size=(size.rows,), seed=0, device=device)
    model = BacktrackModel.from_env(env, num_cells=(size.width, size.width), **kwargs)
    return model, env.reset()["observation"]

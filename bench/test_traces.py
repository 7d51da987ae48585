"""Trace sampling: `sample_traces` against TorchRL's rollout of the same networks.

Sizes (``B`` traces of ``T`` steps, ``D`` observations, ``A`` actions, two hidden layers of ``h``):
S, M and L are Gaussian; four rooms is discrete, on the 11 by 11 grid, which has 121 states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.peers import walker
from torchrl_recall import BacktrackModel, sample_traces
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
    "L": Size(8192, 32, 111, 8, 256, 3, 0),
    "four rooms": Size(512, 12, 2, 4, 64, 40),
}


def build(name: str) -> tuple[BacktrackModel, Tensor]:
    """Return the model of a case and the states to go back from."""
    size = SIZES[name]
    cells = (size.width, size.width)
    if name != "four rooms":
        model = BacktrackModel(size.observation, size.action, num_cells=cells)
        return model, torch.randn(size.rows, size.observation)
    env = FourRoomsEnv(FOUR_ROOMS, start="any", batch_size=(size.rows,), seed=0)
    model = BacktrackModel.from_env(env, num_cells=cells)
    return model, env.reset()["observation"]


def contenders(name: str) -> dict[str, Callable[[], Any]]:
    """Return the walks of a case, ours first."""
    model, start = build(name)
    num_steps = SIZES[name].num_steps
    return {
        "sample_traces": lambda: sample_traces(model, start, num_steps=num_steps),
        "TorchRL rollout": walker(model, start, num_steps),
    }


@pytest.mark.parametrize("name", SIZES)
def test_ratio(name: str, take_turns: Callable) -> None:
    size = SIZES[name]
    ratios = take_turns(f"traces, {name}", contenders(name), rounds=size.rounds, warmup=size.warmup)
    assert ratios["TorchRL rollout"] > 0


@pytest.mark.parametrize("contender", ["sample_traces", "TorchRL rollout"])
@pytest.mark.parametrize("name", ["S", "M", "four rooms"])
def test_alone(name: str, contender: str, benchmark: Any) -> None:
    benchmark.group = f"traces, {name}"
    rounds = max(SIZES[name].rounds // 5, 3)
    out = benchmark.pedantic(contenders(name)[contender], rounds=rounds, warmup_rounds=1)
    assert out.shape == (SIZES[name].rows, SIZES[name].num_steps)
    assert all(bool(torch.isfinite(out[key]).all()) for key in ("observation", "action_log_prob"))

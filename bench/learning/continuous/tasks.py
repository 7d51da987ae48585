"""The tasks: which environment to train in, what is scored, and the hosts' settings for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from bench.learning.continuous.half_cheetah import SparseHalfCheetahEnv
from bench.learning.continuous.mountain_car import SparseMountainCarEnv
from bench.learning.continuous.point_maze_robotics import RoboticsPointMazeEnv
from bench.learning.ppo_parts import PPONumbers
from torchrl_recall.envs import PointMazeEnv


@dataclass(frozen=True)
class PPOSettings(PPONumbers):
    """Numbers of the PPO host, the same for all its variants."""

    learning_rate: float = 3e-3
    entropy_coeff: float = 1e-3


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        make: the environment to train in, from its number of copies and the seed.
        budget: environment steps.
        test: the environment to score in; None is the same.
        evaluate_every: iterations from one score to the next.
        num_tests: episodes of a score.
        keys: what the policy and the model read, in this order.
        inputs: by key, what is subtracted from its numbers and what the result is divided by,
            before the networks.
        critic_keys: what the critic reads; empty is the same.
        rarity_keys: on which keys the frontier is measured; empty is all of them.
        variants: the rows that are run.
        mujoco: whether MuJoCo makes it, where fewer seeds are run.
        score: ``"success"``, share of episodes with success; ``"reward"``, reward of an episode
            divided by its length.
    """

    name: str
    make: Callable[..., EnvBase]
    budget: int
    keys: tuple[str, ...]
    inputs: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    critic_keys: tuple[str, ...] = ()
    test: Callable[..., EnvBase] | None = None
    evaluate_every: int = 4
    num_tests: int = 32
    rarity_keys: tuple[str, ...] = ()
    score: str = "success"
    variants: tuple[str, ...] = ("plain", "traces", "real_past", "sil", "count", "best")
    mujoco: bool = False
    ppo: PPOSettings = field(default_factory=PPOSettings)

    def scaling(self, keys: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Return what to subtract from the numbers of these keys, and what to divide by."""
        shifts, scales = zip(*(self.inputs[key] for key in keys), strict=True)
        return torch.tensor(sum(shifts, ())), torch.tensor(sum(scales, ()))

    def environment(self) -> dict[str, Any]:
        """Return how the environments are made, as JSON holds it."""
        made = {}
        for name, make in (("train", self.make), ("test", self.test or self.make)):
            options = dict(getattr(make, "keywords", {}))
            options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
            made[name] = {"kind": getattr(make, "func", make).__name__, **options}
        return made


def make_maze(count: int, seed: int, **options: Any) -> PointMazeEnv:
    """Return ``count`` point mazes."""
    return PointMazeEnv(batch_size=(count,), seed=seed, **options)


def make_car(count: int, seed: int, **options: Any) -> SparseMountainCarEnv:
    """Return ``count`` mountain cars."""
    return SparseMountainCarEnv((count,), seed=seed, **options)


def make_cheetah(count: int, seed: int, **options: Any) -> SparseHalfCheetahEnv:
    """Return ``count`` cheetahs."""
    return SparseHalfCheetahEnv((count,), seed=seed, **options)


def make_point(count: int, seed: int, **options: Any) -> RoboticsPointMazeEnv:
    """Return ``count`` points in a maze of gymnasium-robotics."""
    return RoboticsPointMazeEnv((count,), seed=seed, **options)


def _maze_task(name: str, budget: int, maze: Any, height: int, width: int, **options: Any) -> Task:
    maze_options = {"maze": maze, "step_size": 0.25} | options.pop("maze_options")
    return Task(
        name=name,
        make=partial(make_maze, **maze_options),
        budget=budget,
        keys=("observation",),
        inputs={"observation": ((width / 2, height / 2), (width / 2, height / 2))},
        **options,
    )


# Two by two rooms of 3 x 3 cells, four doors.
ROOMS = (
    "#########",
    "#   #  G#",
    "#       #",
    "#   #   #",
    "## ### ##",
    "#   #   #",
    "#       #",
    "#S  #   #",
    "#########",
)
OPEN = ("#####", "#  G#", "#   #", "#S  #", "#####")

TASKS = {
    task.name: task
    for task in (
        _maze_task("u_maze", 40_960, "u", 5, 5, maze_options={"max_steps": 60}),
        _maze_task(
            "fragments",
            40_960,
            "u",
            5,
            5,
            maze_options={"max_steps": 5, "start": "any"},
            test=partial(make_maze, maze="u", step_size=0.25, max_steps=60),
            variants=("plain", "traces", "real_past", "sil"),
        ),
        _maze_task(
            "fragments_noise",
            40_960,
            "u",
            5,
            5,
            maze_options={"max_steps": 5, "start": "any", "noise": 0.3},
            test=partial(make_maze, maze="u", step_size=0.25, max_steps=60, noise=0.3),
            variants=("plain", "traces", "real_past"),
        ),
        _maze_task(
            "rooms",
            61_440,
            ROOMS,
            9,
            9,
            maze_options={"max_steps": 120},
            variants=("plain", "traces", "real_past", "sil", "count"),
        ),
        # These two PPO solves by itself: here traces are to do no harm.
        _maze_task(
            "u_maze_any",
            40_960,
            "u",
            5,
            5,
            maze_options={"max_steps": 60, "start": "any"},
            variants=("plain", "traces", "real_past"),
        ),
        _maze_task(
            "open",
            40_960,
            OPEN,
            5,
            5,
            maze_options={"max_steps": 60},
            variants=("plain", "traces", "real_past"),
        ),
        Task(
            name="mountain_car",
            make=make_car,
            budget=65_536,
            keys=("observation",),
            inputs={"observation": ((-0.3, 0.0), (0.9, 0.07))},
            variants=("plain", "traces", "real_past", "count"),
            ppo=PPOSettings(num_envs=16, rollout_steps=128, gamma=0.99, minibatch=512),
        ),
        Task(
            name="point_maze",
            make=make_point,
            budget=98_304,
            keys=("observation",),
            inputs={"observation": ((0.0,) * 4, (2.0, 2.0, 5.0, 5.0))},
            mujoco=True,
            variants=("plain", "traces", "real_past", "count"),
            num_tests=16,
            ppo=PPOSettings(num_envs=16, rollout_steps=128, gamma=0.99, minibatch=512),
        ),
        Task(
            name="half_cheetah",
            make=partial(make_cheetah, distance=3.0, max_steps=200),
            budget=49_152,
            # Whoever reads its place learns to run here and not there.
            keys=("observation",),
            critic_keys=("position", "observation"),
            inputs={
                "position": ((0.0,), (5.0,)),
                "observation": ((0.0,) * 17, (*(1.0,) * 8, *(5.0,) * 9)),
            },
            rarity_keys=("position",),
            score="reward",
            mujoco=True,
            variants=("plain", "traces", "real_past", "sil", "count"),
            num_tests=16,
            ppo=PPOSettings(num_envs=16, rollout_steps=128, gamma=0.99, minibatch=512),
        ),
    )
}

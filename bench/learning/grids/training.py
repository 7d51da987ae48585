"""One run: a host and what is added to it, on a maze, with the exact success as it learns."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.learning.grids.dyna import Dyna, DynaSettings
from bench.learning.grids.hosts import DQN, ActorCritic, ActorCriticSettings, DQNSettings
from bench.learning.grids.real import (
    BestReal,
    BestSettings,
    Bonus,
    BonusSettings,
    Hindsight,
    HindsightSettings,
    SelfImitation,
    SelfImitationSettings,
)
from bench.learning.grids.task import SOLVED, Task
from bench.learning.grids.traces import Traces, TracesSettings, only_kept
from bench.learning.grids.walker import Rollout, Walker
from torchrl_recall.envs import start_success

EVERY = 0.01  # evaluations are this share of the steps so far apart, or a rollout


@dataclass(frozen=True)
class Recipe:
    """A host's settings and those of each part that is added; None: not added."""

    host: ActorCriticSettings | DQNSettings = field(default_factory=ActorCriticSettings)
    traces: TracesSettings | None = None
    best: BestSettings | None = None
    sil: SelfImitationSettings | None = None
    bonus: BonusSettings | None = None
    hindsight: HindsightSettings | None = None
    dyna: DynaSettings | None = None

    def definition(self) -> dict[str, Any]:
        """Return all settings, without the parts that are not there."""
        return {name: part for name, part in asdict(self).items() if part is not None}


class Learner:
    """A host with its parts."""

    def __init__(self, task: Task, recipe: Recipe, budget: int) -> None:
        env = task.data(recipe.host.num_envs)
        if isinstance(recipe.host, DQNSettings):
            goals = 0 if recipe.hindsight is None else recipe.hindsight.num_goals
            self.host = DQN(env, recipe.host, budget, 1 + goals)
        else:
            self.host = ActorCritic(env, recipe.host)
        host: Any = self.host
        self.bonus = None if recipe.bonus is None else Bonus(env.size, recipe.bonus)
        self.sil = None if recipe.sil is None else SelfImitation(host, recipe.sil)
        self.dyna = None if recipe.dyna is None else Dyna(env, host, recipe.dyna)
        self.hindsight = None
        if recipe.hindsight is not None:
            self.hindsight = Hindsight(host, env.goal, recipe.hindsight)
        self.imitated: list[tuple[Traces | BestReal, int]] = []
        if recipe.traces is not None:
            traces = Traces(env, host, recipe.traces, budget)
            self.imitated.append((traces, recipe.traces.updates))
        if recipe.best is not None:
            self.imitated.append((BestReal(host, recipe.best), recipe.best.updates))

    def update(self, data: Rollout) -> None:
        """Learn from a rollout."""
        if self.hindsight is not None:
            self.hindsight.observe(data)
        self.host.learn(data if self.bonus is None else self.bonus(data))
        if self.sil is not None:
            self.sil.update(data)
        if self.dyna is not None:
            self.dyna.update(data)
        for source, updates in self.imitated:
            source.observe(data)
            for _ in range(updates):
                sample = source.sample()
                if sample is not None:
                    self.host.imitate(only_kept(sample))


def train(seed: int, *, task: Task, recipe: Recipe, budget: int) -> dict[str, Any]:
    """Train until the exact success reaches 0.9 or the budget is spent.

    Args:
        seed: of the mazes, networks and samplers.
        task: the maze.
        recipe: the algorithm.
        budget: environment steps.

    Returns:
        What `Entry.train` returns; seconds are of the processor, which are those of the clock on a
        core of one's own.
    """
    torch.manual_seed(seed)
    judged = task.judged()
    env = task.data(recipe.host.num_envs)
    began, paused = time.process_time(), 0.0
    learner = Learner(task, recipe, budget)
    host, walker = learner.host, Walker(env, seed)
    steps, first_reward = 0, None
    found: dict[str, list[Any]] = {"steps": [], "score": [], "seconds": []}

    def judge() -> float:
        nonlocal paused
        pause = time.process_time()
        score = start_success(judged, host.judged())
        found["steps"].append(steps)
        found["score"].append(score)
        found["seconds"].append(pause - began - paused)
        paused += time.process_time() - pause
        return score

    score, due = judge(), 0.0
    while score < SOLVED and steps < budget:
        data = walker.rollout(host.policy(), recipe.host.rollout)
        learner.update(data)
        steps += len(data)
        if first_reward is None and data.terminated.any():
            first_reward = steps
        if steps >= due or steps >= budget:
            score = judge()
            due = steps * (1 + EVERY)
    log = {"first_reward": first_reward, "gradient_steps": host.gradient_steps}
    return {**found, "solved_at": steps if score >= SOLVED else None, "log": log}

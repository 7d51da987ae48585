"""Recall traces of the main job with one part exchanged at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDictBase

from bench.learning.best_episodes import BestEpisodes
from torchrl_recall import (
    AdvantageWeight,
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    TraceLengthScheduler,
)
from torchrl_recall.demo.train import A2C, RecallTraces, Settings
from torchrl_recall.envs import FourRoomsEnv, exact_backtrack_model
from torchrl_recall.trace_masks import Disagreement, RisingValue, TraceMask

NUM_MEMBERS = 5
NUM_BEST = 64  # episodes
GROWTH = 16  # iterations in which growing traces reach their full length


@dataclass(frozen=True)
class Options:
    """What is exchanged; the defaults are the main job."""

    last_visit: bool = True
    trace_every: int = 1
    """New traces every so many iterations; those between imitate the same ones again."""
    model: Literal["learned", "exact"] = "learned"
    """Exact: the posterior of the uniform policy's episodes, never fitted."""
    data: Literal["all", "best"] = "all"
    """Best: the model sees the ``NUM_BEST`` finished episodes of highest return only."""
    mask: Literal["none", "rising_value", "disagreement"] = "none"
    weight: Literal["none", "advantage", "gate"] = "none"
    num_members: int = 1
    reverse_action: Literal["learned", "uniform"] = "learned"
    action_entropy_coeff: float = 0.0
    stop: bool = False
    growing: bool = False
    """Lengths grow linearly from a fourth of the full length in ``GROWTH`` iterations."""


class Variant(RecallTraces):
    """Recall traces with options."""

    def __init__(
        self, env: FourRoomsEnv, a2c: A2C, settings: Settings, goal_known: bool, *, options: Options
    ) -> None:
        self.options = options
        super().__init__(env, a2c, settings, goal_known)
        self.drawn: list[TensorDictBase] = []
        self.num_drawn = 0
        self.is_first = torch.ones(settings.num_envs, 1, dtype=torch.bool)
        if options.data == "best":
            self.model_buffer = BestEpisodes(
                settings.num_envs, NUM_BEST, settings.gamma, settings.model_batch
            )
        if options.stop:
            self.stored = (*self.stored, "is_init")
        self.scheduler = None
        if options.growing:
            transform: Any = self.transform
            full = transform.num_steps
            transform.num_steps = full // 4
            self.scheduler = TraceLengthScheduler(transform, final_steps=full, num_updates=GROWTH)

    def make_model(self) -> BacktrackModel:
        options = self.options
        if options.model == "exact":
            uniform = torch.full((self.env.size**2, 4), 0.25)
            return exact_backtrack_model(self.env, uniform)
        return BacktrackModel.from_env(
            self.env,
            num_cells=self.settings.num_cells,
            num_members=options.num_members,
            reverse_action=options.reverse_action,
            stop=options.stop,
        )

    def make_transform(self, in_keys: list[str] | None) -> BacktrackTransform:
        num_steps = self.settings.trace_length * self.settings.size
        masks: list[TraceMask] = []
        if self.options.mask == "rising_value":
            # Traces end in the goal, and a terminal state has no value of its own.
            masks = [RisingValue(self.a2c.critic, compare_end=False)]
        elif self.options.mask == "disagreement":
            masks = [Disagreement(self.model)]
        return BacktrackTransform(
            self.model,
            num_steps=num_steps,
            in_keys=in_keys,
            last_visit=self.options.last_visit,
            masks=masks,
        )

    def make_model_loss(self) -> BacktrackLoss:
        if not self.options.action_entropy_coeff:
            return super().make_model_loss()
        coeff = self.options.action_entropy_coeff
        return BacktrackLoss(self.model, action_entropy_coeff=coeff)

    def make_recall_loss(self) -> RecallTraceLoss:
        if self.options.weight == "none":
            return super().make_recall_loss()
        # The goal's value is what a step into it pays, 1.
        loss = RecallTraceLoss(
            self.a2c.actor,
            imitation_coeff=self.settings.imitation_coeff,
            weight=AdvantageWeight(
                self.a2c.critic,
                gamma=self.settings.gamma,
                gate=self.options.weight == "gate",
                value_of="transition",
            ),
        )
        loss.set_keys(value="goal_value")
        return loss

    def observe(self, data: TensorDictBase) -> None:
        if self.options.stop:
            done = data["next", "done"]
            before = [self.is_first.unsqueeze(1), done[:, :-1]]
            data = data.copy().set("is_init", torch.cat(before, 1))
            self.is_first = done[:, -1]
        if isinstance(self.model_buffer, BestEpisodes):
            self.model_buffer.extend(data)
        super().observe(data)
        if self.scheduler is not None:
            self.scheduler.step()
        for mask in self.transform.masks:
            if isinstance(mask, Disagreement):
                mask.calibrate(self.recall_buffer)

    def fit(self) -> None:
        if self.options.model == "learned" and len(self.model_buffer):
            super().fit()

    def sample(self) -> TensorDictBase:
        """Return fresh traces, or what was drawn for the same imitation step of a turn before."""
        turn, step = divmod(self.num_drawn, self.settings.imitation_updates)
        self.num_drawn += 1
        if turn % self.options.trace_every:
            return self.drawn[step]
        drawn = super().sample()
        if self.options.weight != "none":
            drawn.set("goal_value", torch.ones(drawn.shape))
        self.drawn[step : step + 1] = [drawn]
        return drawn


def maker(options: Options, made: list[Variant]) -> Any:
    """Return what `train` builds recall traces with; the one built goes to ``made``."""
    build = partial(Variant, options=options)

    def make(env: FourRoomsEnv, a2c: A2C, settings: Settings, goal_known: bool) -> Variant:
        made.append(build(env, a2c, settings, goal_known))
        return made[-1]

    return make

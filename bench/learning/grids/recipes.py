"""The algorithms of the reported rows, as they were frozen before the runs."""

from __future__ import annotations

from dataclasses import replace

from bench.learning.grids.dyna import DynaSettings
from bench.learning.grids.hosts import ActorCriticSettings, DQNSettings
from bench.learning.grids.real import (
    BestSettings,
    BonusSettings,
    HindsightSettings,
    SelfImitationSettings,
)
from bench.learning.grids.traces import TracesSettings
from bench.learning.grids.training import Recipe

A2C = ActorCriticSettings()
# Tuned for the wait until the first reward, on 19 x 19.
EXPLORING = replace(A2C, entropy_coeff=0.03)
PPO = ActorCriticSettings(rollout=32, epochs=4, minibatches=4)
DQN = DQNSettings()
# As many gradient steps as with traces, 16 for each rollout; HER's 32 were better still.
PER = replace(DQN, alpha=0.6, updates=16)
GOALS = replace(DQN, goals=True, updates=32)
# Traces to the frontier explore, so that less of it has to be left to chance.
GUIDED = replace(DQN, epsilon_steps=5_000)

# Fewer steps of imitation and of the model, for hosts that shall keep their speed.
LIGHT = TracesSettings(updates=2, model_updates=2)

ROWS: dict[str, Recipe] = {
    "a2c/plain": Recipe(A2C),
    "a2c/sil": Recipe(EXPLORING, sil=SelfImitationSettings(updates=32)),
    "a2c/best": Recipe(EXPLORING, best=BestSettings(updates=32)),
    "a2c/bonus": Recipe(A2C, bonus=BonusSettings(0.01)),
    "a2c/bonus_sil": Recipe(A2C, sil=SelfImitationSettings(updates=32), bonus=BonusSettings(0.03)),
    "a2c/past": Recipe(A2C, traces=TracesSettings(past=True, frontier=256)),
    "a2c/paper": Recipe(A2C, traces=TracesSettings(start="value", data="best", last_visit=False)),
    "a2c/traces": Recipe(A2C, traces=TracesSettings()),
    "a2c/known": Recipe(A2C, traces=TracesSettings(start="known")),
    "ppo/plain": Recipe(PPO),
    "ppo/past": Recipe(PPO, traces=TracesSettings(past=True, frontier=256)),
    "ppo/traces": Recipe(PPO, traces=TracesSettings()),
    "ppo/light": Recipe(PPO, traces=LIGHT),
    "dqn/plain": Recipe(DQN),
    "dqn/per": Recipe(PER),
    "dqn/her": Recipe(GOALS, hindsight=HindsightSettings()),
    "dqn/dyna": Recipe(DQN, dyna=DynaSettings()),
    "dqn/past": Recipe(GUIDED, traces=TracesSettings(past=True, frontier=256)),
    "dqn/traces": Recipe(GUIDED, traces=TracesSettings()),
    "dqn/known": Recipe(GUIDED, traces=TracesSettings(start="known")),
}

LABELS = {
    "a2c/plain": "A2C",
    "a2c/sil": "A2C + SIL, tuned",
    "a2c/best": "A2C + imitation of the best real episodes, tuned",
    "a2c/bonus": "A2C + count bonus",
    "a2c/bonus_sil": "A2C + count bonus + SIL, tuned",
    "a2c/past": "A2C + real past of the same states (no model), tuned",
    "a2c/paper": "A2C + recall traces, the paper's plain form",
    "a2c/traces": "A2C + recall traces, goal found",
    "a2c/known": "A2C + recall traces, goal known",
    "ppo/plain": "PPO",
    "ppo/past": "PPO + real past of the same states (no model)",
    "ppo/traces": "PPO + recall traces",
    "ppo/light": "PPO + recall traces, light",
    "dqn/plain": "DQN",
    "dqn/per": "DQN + PER, tuned",
    "dqn/her": "DQN + HER, tuned, goal known",
    "dqn/dyna": "DQN + forward model (Dyna)",
    "dqn/past": "DQN + real past of the same states (no model)",
    "dqn/traces": "DQN + recall traces",
    "dqn/known": "DQN + recall traces, goal known",
}

# A host without and with traces, whose training steps are timed side by side.
COSTS: dict[str, tuple[Recipe, Recipe]] = {
    "A2C, the rows' recipe": (ROWS["a2c/plain"], ROWS["a2c/traces"]),
    "A2C, 2 steps of imitation and of the model": (ROWS["a2c/plain"], Recipe(A2C, traces=LIGHT)),
    "PPO, the rows' recipe": (ROWS["ppo/plain"], ROWS["ppo/traces"]),
    "PPO, 2 steps of imitation and of the model": (ROWS["ppo/plain"], ROWS["ppo/light"]),
    "DQN, the rows' recipe": (ROWS["dqn/plain"], ROWS["dqn/traces"]),
    "DQN, 2 steps of imitation and of the model": (ROWS["dqn/plain"], Recipe(DQN, traces=LIGHT)),
}

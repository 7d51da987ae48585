"""The grids of settings that were tried on tuning seeds, before the rows were frozen."""

from __future__ import annotations

from dataclasses import replace

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
DQN = DQNSettings()
PPO = ActorCriticSettings(rollout=32, epochs=4, minibatches=4)
PER = replace(DQN, alpha=0.6)
GOALS = replace(DQN, goals=True)

Grid = dict[str, dict[str, Recipe]]


def a2c(**changes: float) -> ActorCriticSettings:
    """Return A2C's settings with changes."""
    return replace(A2C, **changes)


def sil(host: ActorCriticSettings = A2C, **settings: int) -> Recipe:
    """Return a host with SIL."""
    return Recipe(host, sil=SelfImitationSettings(**settings))


def best(host: ActorCriticSettings = A2C, **settings: int) -> Recipe:
    """Return a host that imitates its best episodes."""
    return Recipe(host, best=replace(BestSettings(), **settings))


def bonus_sil(coeff: float, updates: int, host: ActorCriticSettings = A2C) -> Recipe:
    """Return a host with a count bonus and SIL."""
    return Recipe(host, sil=SelfImitationSettings(updates=updates), bonus=BonusSettings(coeff))


# How settings use a reward: at 11 the first one comes soon.
TUNED_11: Grid = {
    "a2c": {
        "entropy_0.01": Recipe(A2C),
        "entropy_0.03": Recipe(a2c(entropy_coeff=0.03)),
        "rate_0.003": Recipe(a2c(learning_rate=3e-3)),
    },
    "a2c_sil": {
        **{f"updates_{n}": sil(updates=n) for n in (4, 8, 16, 32)},
        "rate_0.003": sil(a2c(learning_rate=3e-3)),
    },
    "a2c_best": {
        "best_64": best(),
        "best_16": best(num_episodes=16),
        "updates_16": best(updates=16),
        "updates_32": best(updates=32),
        "rate_0.003": best(a2c(learning_rate=3e-3)),
    },
    "a2c_bonus": {
        f"coeff_{coeff:g}": Recipe(A2C, bonus=BonusSettings(coeff))
        for coeff in (0.003, 0.01, 0.03, 0.1, 0.3)
    },
}

# What explores and imitates, on a maze where the first reward takes long.
TUNED_15: Grid = {
    "a2c_sil": {f"updates_{n}": sil(updates=n) for n in (16, 32)},
    "a2c_best": {f"updates_{n}": best(updates=n) for n in (16, 32)},
    "a2c_bonus_sil": {f"coeff_{c:g}": bonus_sil(c, 16) for c in (0.003, 0.01, 0.03)},
    "a2c_found": {
        "rows_64": Recipe(A2C, traces=TracesSettings()),
        "ranked_by_begin": Recipe(A2C, traces=TracesSettings(ranked_by="begin")),
    },
}

# What traces cost, and what is lost with less of them.
CHEAPER_15: Grid = {
    "a2c_found": {
        "model_4": Recipe(A2C, traces=TracesSettings(model_updates=4)),
        "model_2_rate_0.003": Recipe(
            A2C, traces=TracesSettings(model_updates=2, model_learning_rate=3e-3)
        ),
        "updates_4": Recipe(A2C, traces=TracesSettings(updates=4)),
    },
    "ppo_found": {
        "updates_8": Recipe(PPO, traces=TracesSettings()),
        "updates_2": Recipe(PPO, traces=TracesSettings(updates=2, model_updates=2)),
        "updates_2_rate_0.003": Recipe(
            PPO, traces=TracesSettings(updates=2, model_updates=2, model_learning_rate=3e-3)
        ),
        "updates_2_of_64": Recipe(
            PPO,
            traces=TracesSettings(
                updates=2, num_traces=64, model_updates=2, model_learning_rate=3e-3
            ),
        ),
    },
}

# Where traces start before the first reward.
FRONTIER_19: Grid = {
    "a2c_found": {
        **{f"rows_{n}": Recipe(A2C, traces=TracesSettings(frontier=n)) for n in (64, 16)},
        "ranked_by_begin": Recipe(A2C, traces=TracesSettings(ranked_by="begin")),
    },
}

# Three seeds of each.
TUNED_19: Grid = {
    "a2c_found": {
        "rows_256": Recipe(A2C, traces=TracesSettings(frontier=256)),
        "updates_16": Recipe(A2C, traces=TracesSettings(updates=16)),
    },
    "a2c_past": {
        **{
            f"rows_{n}": Recipe(A2C, traces=TracesSettings(past=True, frontier=n))
            for n in (64, 16, 256)
        },
        "ranked_by_begin": Recipe(A2C, traces=TracesSettings(past=True, ranked_by="begin")),
        "updates_16": Recipe(A2C, traces=TracesSettings(past=True, updates=16)),
    },
    "a2c_sil": {
        **{f"updates_{n}": sil(updates=n) for n in (16, 32, 64)},
        "entropy_0.03": sil(a2c(entropy_coeff=0.03), updates=32),
        "entropy_0.1": sil(a2c(entropy_coeff=0.1), updates=32),
        "rate_0.003": sil(a2c(learning_rate=3e-3), updates=32),
    },
    "a2c_best": {
        # Until the first reward both are the plain host: exploration is tuned with SIL.
        **{f"updates_{n}": best(updates=n) for n in (32, 64)},
    },
    "a2c_bonus_sil": {
        **{f"coeff_{c:g}": bonus_sil(c, 32) for c in (0.003, 0.01, 0.03, 0.1)},
        "updates_16": bonus_sil(0.01, 16),
        "updates_64": bonus_sil(0.01, 64),
        "entropy_0.03": bonus_sil(0.01, 32, a2c(entropy_coeff=0.03)),
    },
}

DQN_11: Grid = {
    "dqn_per": {
        "default": Recipe(PER),
        "alpha_0.4": Recipe(replace(PER, alpha=0.4)),
        "updates_16": Recipe(replace(PER, updates=16)),
        "updates_32": Recipe(replace(PER, updates=32)),
        "updates_16_alpha_0.4": Recipe(replace(PER, updates=16, alpha=0.4)),
        "rate_0.0003": Recipe(replace(PER, learning_rate=3e-4)),
        "exploration_40000": Recipe(replace(PER, epsilon_steps=40_000)),
        "exploration_5000": Recipe(replace(PER, epsilon_steps=5_000)),
    },
    "dqn_her": {
        "default": Recipe(GOALS, hindsight=HindsightSettings()),
        "goals_8": Recipe(GOALS, hindsight=HindsightSettings(num_goals=8)),
        "updates_16": Recipe(replace(GOALS, updates=16), hindsight=HindsightSettings()),
        "updates_32": Recipe(replace(GOALS, updates=32), hindsight=HindsightSettings()),
        "rate_0.0003": Recipe(replace(GOALS, learning_rate=3e-4), hindsight=HindsightSettings()),
        "exploration_40000": Recipe(
            replace(GOALS, epsilon_steps=40_000), hindsight=HindsightSettings()
        ),
        "exploration_5000": Recipe(
            replace(GOALS, epsilon_steps=5_000), hindsight=HindsightSettings()
        ),
    },
    # Traces to the frontier explore, so that less of it has to be left to chance.
    "dqn_found": {
        "default": Recipe(DQN, traces=TracesSettings()),
        "margin_0.5": Recipe(replace(DQN, margin=0.5), traces=TracesSettings()),
        "updates_4": Recipe(DQN, traces=TracesSettings(updates=4, model_updates=4)),
        "rate_0.0003": Recipe(replace(DQN, learning_rate=3e-4), traces=TracesSettings()),
        "exploration_5000": Recipe(replace(DQN, epsilon_steps=5_000), traces=TracesSettings()),
        "exploration_1000": Recipe(replace(DQN, epsilon_steps=1_000), traces=TracesSettings()),
    },
}

# What explores best where rewards are rarer.
DQN_15: Grid = {
    "dqn_per": {
        f"updates_16_exploration_{steps}": Recipe(replace(PER, updates=16, epsilon_steps=steps))
        for steps in (20_000, 60_000)
    },
    "dqn_found": {
        f"exploration_{steps}": Recipe(replace(DQN, epsilon_steps=steps), traces=TracesSettings())
        for steps in (20_000, 5_000)
    },
}

"""The MuJoCo tasks: which body, which reward, and the hosts' settings for each."""

from __future__ import annotations

from functools import partial
from typing import Any

from torchrl.envs import EnvBase, TransformedEnv

from bench.learning.continuous.tasks import PPOSettings, Task
from bench.learning.mujoco.environments import MujocoEnv
from bench.learning.mujoco.rewards import DelayedReward, DistanceReward
from torchrl_recall.checks import check_choice

BUDGET = 100_352  # 49 rollouts of PPO
MAX_STEPS = 500
EVALUATE_EVERY = 5
# Of each body: numbers of the observation that are positions, those that are velocities, and the
# score's range, in reward a step: what such budgets give, roughly.
BODIES = {
    "HalfCheetah": (8, 9, -1.0, 5.0),
    "Hopper": (5, 6, 0.0, 3.0),
    "Walker2d": (8, 9, 0.0, 4.0),
    "Swimmer": (3, 5, -0.1, 0.3),
    "Ant": (13, 14, -1.0, 3.0),
    "Humanoid": (22, 23, 0.0, 6.0),
}
DENSE = ("half_cheetah", "hopper", "walker2d", "swimmer", "ant", "humanoid")
REWARDS = ("dense", "delayed", "sparse")
NAMES = dict(zip(DENSE, BODIES, strict=True))


def make(
    count: int,
    seed: int,
    *,
    name: str,
    reward: str = "dense",
    every: int | None = None,
    distance: float | None = None,
    reward_scale: float = 1.0,
    max_steps: int = MAX_STEPS,
) -> EnvBase:
    """Return copies of a body.

    Args:
        count: how many.
        seed: of the starts.
        name: of the body, as Gymnasium has it.
        reward: ``"dense"``, Gymnasium's own; ``"delayed"``, its sum every so many steps (None: at
            the episode's end); ``"sparse"``, 1 on each step beyond a distance.
        every: steps from one payment to the next; ``"delayed"`` only.
        distance: metres along x, None as 0; ``"sparse"`` only.
        reward_scale: factor of Gymnasium's reward.
        max_steps: steps after which an episode is truncated.

    Raises:
        ValueError: an argument out of its range, or one that this reward does not use.
        TypeError: an argument of another type.
    """
    check_choice("reward", reward, REWARDS)
    for option, value, used_by in (("every", every, "delayed"), ("distance", distance, "sparse")):
        if value is not None and reward != used_by:
            raise ValueError(f"{option} needs reward={used_by!r}, got {value} with {reward!r}.")
    env = MujocoEnv(name, (count,), max_steps=max_steps, reward_scale=reward_scale, seed=seed)
    if reward == "dense":
        return env
    if reward == "delayed":
        return TransformedEnv(env, DelayedReward(every))
    return TransformedEnv(env, DistanceReward(0.0 if distance is None else distance))


def _task(task: str, body: str, reward: str, **options: Any) -> Task:
    positions, velocities, _, highest = BODIES[body]
    sparse = reward == "sparse"
    # Rewards near 1 a step suit the hosts' learning rates; the score is of the reward itself.
    scale = {} if sparse else {"reward_scale": round(1 / highest, 4)}
    environment = {"name": body, "reward": reward, **options}
    return Task(
        name=task,
        make=partial(make, **environment, **scale),
        test=partial(make, **environment),
        budget=BUDGET,
        keys=("observation",),
        critic_keys=("position", "observation") if sparse else (),
        rarity_keys=("position",),
        inputs={
            "position": ((0.0,), (5.0,)),
            "observation": (
                (0.0,) * (positions + velocities),
                (*(1.0,) * positions, *(5.0,) * velocities),
            ),
        },
        evaluate_every=EVALUATE_EVERY,
        num_tests=8,
        score="reward",
        variants=("plain", "traces"),
        mujoco=True,
        ppo=PPOSettings(
            num_envs=16,
            rollout_steps=128,
            learning_rate=1e-3,
            gamma=0.99,
            epochs=8,
            minibatch=256,
            entropy_coeff=0.0,
        ),
    )


TASKS = {
    task.name: task
    for task in (
        *(_task(f"{name}_dense", body, "dense") for name, body in NAMES.items()),
        *(_task(f"{name}_delayed", NAMES[name], "delayed", every=20) for name in DENSE),
        _task("half_cheetah_end", "HalfCheetah", "delayed"),
        _task("half_cheetah_sparse", "HalfCheetah", "sparse", distance=5.0),
        _task("hopper_sparse", "Hopper", "sparse", distance=1.0),
        _task("walker2d_sparse", "Walker2d", "sparse", distance=1.0),
        _task("swimmer_sparse", "Swimmer", "sparse", distance=1.0),
        _task("ant_sparse", "Ant", "sparse", distance=2.0),
    )
}

# Those whose rows are run, the most telling first; the others are there to be used.
CHOSEN = (
    "swimmer_sparse",
    "half_cheetah_sparse",
    "half_cheetah_delayed",
    "half_cheetah_dense",
    "hopper_dense",
    "walker2d_dense",
)


def score_range(task: Task) -> tuple[float, float]:
    """Return the range of a task's score, the mean reward of a step; beyond it, its end counts."""
    options: dict[str, Any] = getattr(task.make, "keywords", {})
    return (0.0, 1.0) if options["reward"] == "sparse" else BODIES[options["name"]][2:]

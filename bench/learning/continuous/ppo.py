"""The on-policy host: PPO from TorchRL's losses over a batch of environments."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn

from bench.learning.continuous.history import History
from bench.learning.continuous.tasks import Task
from bench.learning.ppo_parts import make_ppo

# Far from every training seed, so that evaluation shares no draws with any of them.
EVALUATION_SEED = 1_000_003
SOLVED = 0.9
# Inside of which tanh can be inverted.
LARGEST = 1 - 1e-6


class Guide(Protocol):
    """What a variant adds to the host."""

    def update(self, data: TensorDictBase) -> None:
        """Look at a new rollout ``[E, T]``, which the history holds already; may change reward."""
        ...

    def loss(self) -> Tensor | None:
        """Return what is added to the host's loss at a gradient step."""
        ...

    def finish(self) -> None:
        """Do what comes after the host has learnt from the rollout."""
        ...


class Scaled(nn.Module):
    """A network of the concatenated observations, shifted and scaled."""

    def __init__(
        self,
        task: Task,
        keys: tuple[str, ...],
        num_cells: int,
        *tail: nn.Module,
        outputs: int,
    ) -> None:
        super().__init__()
        self.shift: Tensor
        self.scale: Tensor
        shift, scale = task.scaling(keys)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(len(shift), num_cells),
            nn.Tanh(),
            nn.Linear(num_cells, num_cells),
            nn.Tanh(),
            nn.Linear(num_cells, outputs),
        )
        self.tail = nn.Sequential(*tail)

    def forward(self, *observations: Tensor) -> Any:
        state = torch.cat(observations, -1)
        return self.tail(self.layers((state - self.shift) / self.scale))


class PPO:
    """One seed of PPO on a task, with what a variant adds.

    Args:
        task: what to learn.
        seed: of everything.
        make_guide: builds the variant's addition, given this host; None is plain PPO.
        budget: environment steps; None is the task's.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        make_guide: Callable[[PPO], Guide] | None = None,
        budget: int | None = None,
    ) -> None:
        self.task, self.seed, self.settings = task, seed, task.ppo
        s = self.settings
        self.budget = task.budget if budget is None else budget
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.env = task.make(s.num_envs, seed)
        self.test = (task.test or task.make)(task.num_tests, EVALUATION_SEED)
        env: Any = self.env
        # A transformed environment adds the ends, which no step begins with.
        self.state: TensorDictBase = env._reset().exclude("done", "terminated", "truncated")
        size = self.env.action_spec.shape[-1]
        self.critic_keys = task.critic_keys or task.keys
        self.policy = policy = Scaled(
            task, task.keys, s.num_cells, NormalParamExtractor(), outputs=2 * size
        )
        value = Scaled(task, self.critic_keys, s.num_cells, outputs=1)
        # The first policy is the same everywhere, and no advantage is made of the critic's noise.
        last: Any = (policy.layers[-1], value.layers[-1])
        for head in last:
            with torch.no_grad():
                head.weight *= 0.01
                head.bias.zero_()
        self.critic = TensorDictModule(value, list(self.critic_keys), ["state_value"])
        self.actor, self.advantage, self.ppo_loss, self.optimizer = make_ppo(
            TensorDictModule(policy, list(task.keys), ["loc", "scale"]),
            self.critic,
            s,
            # Where there is no reward yet, normalised advantages are noise, blown up.
            normalize_advantage=False,
        )
        frames = s.num_envs * s.rollout_steps
        self.iterations = self.budget // frames
        self.history = History(frames * self.iterations, self._stored_keys())
        self.log: dict[str, list[float]] = {}
        self.gradient_steps = 0  # of the policy
        self.guide = None if make_guide is None else make_guide(self)

    def _stored_keys(self) -> tuple[str, ...]:
        task = self.task
        return tuple(dict.fromkeys([*task.keys, *self.critic_keys, *task.rarity_keys]))

    def note(self, name: str, value: float) -> None:
        """Append to the log."""
        self.log.setdefault(name, []).append(round(float(value), 5))

    def train(self) -> dict[str, Any]:
        """Train until the budget is spent; see `Entry.train`."""
        s, watch = self.settings, 0.0
        steps, score, seconds = [0], [self.evaluate()], [0.0]
        frames = s.num_envs * s.rollout_steps
        for iteration in range(1, self.iterations + 1):
            began = time.perf_counter()
            self.iterate()
            watch += time.perf_counter() - began
            if iteration % self.task.evaluate_every == 0 or iteration == self.iterations:
                steps.append(iteration * frames)
                score.append(self.evaluate())
                seconds.append(round(watch, 3))
        self.note("gradient_steps", self.gradient_steps)
        solved = [at for at, value in zip(steps, score, strict=True) if value >= SOLVED]
        return {
            "steps": steps,
            "score": score,
            "seconds": seconds,
            "solved_at": solved[0] if solved else None,
            "log": self.log,
        }

    def iterate(self) -> None:
        """Collect one rollout and learn from it."""
        data = self._collect()
        self.history.extend(data)
        if self.guide is not None:
            self.guide.update(data)
        self._learn(data)
        if self.guide is not None:
            self.guide.finish()

    @torch.no_grad()
    def _collect(self) -> TensorDictBase:
        steps = []
        for _ in range(self.settings.rollout_steps):
            step, self.state = walk(self.env, self.state, self.policy, self.task.keys)
            steps.append(step)
        data: Any = torch.stack(steps, 1)
        data["action_log_prob"] = self.actor.get_dist(data).log_prob(data["action"])
        self.note("reward", data["next", "reward"].mean())
        return data

    def _learn(self, data: TensorDictBase) -> None:
        s = self.settings
        with torch.no_grad():
            self.advantage(data)
        data = data.reshape(-1)
        for _ in range(s.epochs):
            order = torch.randperm(len(data), generator=self.generator)
            for rows in order.split(s.minibatch):
                losses = self.ppo_loss(data[rows])
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                added = None if self.guide is None else self.guide.loss()
                if added is not None:
                    total = total + added
                self.optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(self.ppo_loss.parameters(), s.max_grad_norm)
                self.optimizer.step()
                self.gradient_steps += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the score of the policy in its own noise, over one episode of each test."""
        # The learner's random numbers are not touched.
        with torch.random.fork_rng():
            torch.manual_seed(EVALUATION_SEED)
            self.test.set_seed(EVALUATION_SEED)
            return evaluate(self.test, self.policy, self.task)


def sample_action(policy: nn.Module, state: TensorDictBase, keys: tuple[str, ...]) -> Tensor:
    """Draw from the policy's squashed Gaussian, without the distribution object's overhead."""
    loc, scale = policy(*(state[key] for key in keys))
    return torch.tanh(loc + scale * torch.randn_like(loc)).clamp(-LARGEST, LARGEST)


def walk(
    env: Any, state: TensorDictBase, policy: nn.Module, keys: tuple[str, ...]
) -> tuple[TensorDictBase, TensorDictBase]:
    """Take a step in each environment; return it, and the states that follow, begun anew if done.

    As `EnvBase.step_and_maybe_reset`, without its checks: they took most of a run's time.
    """
    step = state.copy()
    step["action"] = sample_action(policy, state, keys)
    after = env._step(step)
    step["next"] = after
    following = after.exclude("reward", "done", "terminated", "truncated")
    done = after["done"]
    if done.any():
        fresh = env._reset(TensorDict({"_reset": done}, env.batch_size))
        for key, value in following.items():
            following[key] = torch.where(done, fresh[key], value)
    return step, following


def evaluate(env: Any, policy: nn.Module, task: Task) -> float:
    """Run one episode in each environment; see `Task.score`."""
    state = env._reset()
    alive = torch.ones(*env.batch_size, 1, dtype=torch.bool)
    total = torch.zeros(*env.batch_size, 1)
    for _ in range(env.max_steps):
        state["action"] = sample_action(policy, state, task.keys)
        state = env._step(state)
        total += state["reward"] * alive
        alive &= ~state["done"]
        if not alive.any():
            break
    if task.score == "reward":
        total /= env.max_steps
    return round(float(total.mean()), 6)

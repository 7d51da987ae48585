"""The off-policy hosts: SAC and TD3 from TorchRL's losses, uniform or prioritized replay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import PrioritizedSampler
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss, SoftUpdate, TD3Loss

from bench.learning.continuous.history import History
from bench.learning.continuous.ppo import EVALUATION_SEED, SOLVED, Guide, Scaled, evaluate, walk
from bench.learning.continuous.tasks import Task


@dataclass(frozen=True)
class OffPolicySettings:
    """Numbers of the off-policy hosts, the same for all variants.

    Few updates on large batches: on small networks a step of TorchRL's losses costs some
    milliseconds whatever the batch.
    """

    num_envs: int = 16
    rollout_steps: int = 4
    updates: int = 2  # after each rollout
    batch_size: int = 512
    num_cells: int = 64
    learning_rate: float = 3e-3
    gamma: float = 0.98
    tau: float = 0.02
    alpha_init: float = 0.05
    first_steps: int = 1024  # before the first update
    guide_every: int = 512  # steps from one update of what a variant adds to the next
    noise: float = 0.5  # of TD3's exploration, before tanh
    actor_every: int = 2  # TD3: critic updates to one of the actor


@dataclass(frozen=True)
class Replay:
    """Prioritized replay: TorchRL's `PrioritizedSampler`, and its exponents."""

    alpha: float
    beta: float


class QNetwork(nn.Module):
    """Value of observations and an action, the observations shifted and scaled."""

    def __init__(self, task: Task, keys: tuple[str, ...], num_cells: int, action: int) -> None:
        super().__init__()
        shift, scale = task.scaling(keys)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(len(shift) + action, num_cells),
            nn.ReLU(),
            nn.Linear(num_cells, num_cells),
            nn.ReLU(),
            nn.Linear(num_cells, 1),
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        state = (torch.cat(inputs[:-1], -1) - self.shift) / self.scale
        return self.layers(torch.cat([state, inputs[-1]], -1))


class Deterministic(nn.Module):
    """TD3's action, or with noise its location and scale before tanh.

    Args:
        network: reads the first of the observations, as many as there are keys.
        keys: the policy's.
        noise: standard deviation before tanh.
    """

    def __init__(
        self, network: nn.Module, keys: tuple[str, ...], noise: float | None = None
    ) -> None:
        super().__init__()
        self.network, self.keys, self.noise = network, keys, noise

    def forward(self, *observations: Tensor) -> Any:
        loc = self.network(*observations[: len(self.keys)])
        return torch.tanh(loc) if self.noise is None else (loc, torch.full_like(loc, self.noise))


class StateValue(TensorDictModuleBase):
    """V(s): the smaller of the target critics at the policy's deterministic action."""

    def __init__(self, host: OffPolicy) -> None:
        super().__init__()
        self.in_keys = list(dict.fromkeys([*host.task.keys, *host.critic_keys]))
        self.out_keys = ["state_value"]
        # In __dict__: nothing of it is this module's.
        self.__dict__["host"] = host

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        host: OffPolicy = self.__dict__["host"]
        found = host.policy(*(tensordict[key] for key in host.task.keys))
        data = tensordict.select(*self.in_keys).set("action", torch.tanh(found[0]))
        return tensordict.set("state_value", host.action_value(data))


class OffPolicy:
    """One seed of SAC or TD3 on a task, with what a variant adds.

    Args:
        task: what to learn.
        seed: of everything.
        settings: the numbers.
        algorithm: ``"sac"`` or ``"td3"``.
        make_guide: builds the variant's addition, given this host; None is the plain learner.
        replay: how replay is prioritized; None is uniform.
        budget: environment steps; None is the task's.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        settings: OffPolicySettings,
        algorithm: str = "sac",
        make_guide: Callable[[OffPolicy], Guide] | None = None,
        replay: Replay | None = None,
        budget: int | None = None,
    ) -> None:
        if algorithm not in ("sac", "td3"):
            raise ValueError(f"algorithm must be 'sac' or 'td3', got {algorithm!r}.")
        self.task, self.seed, self.settings, self.algorithm = task, seed, settings, algorithm
        self.budget = task.budget if budget is None else budget
        self.prioritized = replay is not None
        torch.manual_seed(seed)
        self.env = task.make(settings.num_envs, seed)
        self.test = (task.test or task.make)(task.num_tests, EVALUATION_SEED)
        env: Any = self.env
        self.state: TensorDictBase = env._reset().exclude("done", "terminated", "truncated")
        self.critic_keys = task.critic_keys or task.keys
        self._make_networks(self.env.action_spec.shape[-1])
        self.updater = SoftUpdate(self.rl_loss, tau=settings.tau)
        self.optimizer = torch.optim.Adam(
            self.rl_loss.parameters(), lr=settings.learning_rate, fused=True
        )
        frames = settings.num_envs * settings.rollout_steps
        self.iterations = self.budget // frames
        keys = tuple(dict.fromkeys([*task.keys, *self.critic_keys, *task.rarity_keys]))
        size = frames * self.iterations
        sampler = None
        if replay is not None:
            sampler = PrioritizedSampler(size, replay.alpha, replay.beta)
        self.history = History(size, keys, sampler, settings.batch_size)
        self.log: dict[str, list[float]] = {}
        self.parts: dict[str, float] = {}
        self.num_updates = 0
        self.guide = None if make_guide is None else make_guide(self)

    def _make_networks(self, size: int) -> None:
        task, s = self.task, self.settings
        keys: list[Any] = list(task.keys)
        value = TensorDictModule(
            QNetwork(task, self.critic_keys, s.num_cells, size),
            [*self.critic_keys, "action"],
            ["state_action_value"],
        )
        if self.algorithm == "sac":
            self.policy: nn.Module = Scaled(
                task, task.keys, s.num_cells, NormalParamExtractor(), outputs=2 * size
            )
            self.actor: Any = ProbabilisticActor(
                TensorDictModule(self.policy, keys, ["loc", "scale"]),
                in_keys=["loc", "scale"],
                distribution_class=TanhNormal,
                return_log_prob=True,
            )
            self.rl_loss: Any = SACLoss(
                self.actor,
                value,
                num_qvalue_nets=2,
                alpha_init=s.alpha_init,
                target_entropy=-float(size),
            )
        else:
            network = Scaled(task, task.keys, s.num_cells, outputs=size)
            self.policy = Deterministic(network, task.keys, s.noise)
            # TD3Loss hands the critic only what the actor reads, so it reads all and ignores some.
            read: list[Any] = list(dict.fromkeys([*keys, *self.critic_keys]))
            self.actor = TensorDictModule(Deterministic(network, task.keys), read, ["action"])
            self.rl_loss = TD3Loss(
                self.actor, value, num_qvalue_nets=2, action_spec=self.env.action_spec_unbatched
            )
        self.rl_loss.make_value_estimator(gamma=s.gamma)
        self.qvalue = value
        self.critic = StateValue(self)

    @torch.no_grad()
    def action_value(self, data: TensorDictBase) -> Tensor:
        """Return the smaller of the target critics, ``[*B, 1]``."""
        found = []
        for params in self.rl_loss.target_qvalue_network_params.unbind(0):
            with params.to_module(self.qvalue):
                found.append(self.qvalue(data.select(*self.qvalue.in_keys))["state_action_value"])
        return torch.minimum(*found)

    def note(self, name: str, value: float) -> None:
        """Append to the log."""
        self.log.setdefault(name, []).append(round(float(value), 5))

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Count the processor's time as that of a part of the training step."""
        began = time.process_time()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.process_time() - began

    def train(self) -> dict[str, Any]:
        """Train until the budget is spent; see `Entry.train`. Seconds are the processor's."""
        s, watch = self.settings, 0.0
        steps, score, seconds = [0], [self.evaluate()], [0.0]
        frames = s.num_envs * s.rollout_steps
        # The task counts in rollouts of PPO.
        ppo = self.task.ppo
        every = self.task.evaluate_every * ppo.num_envs * ppo.rollout_steps // frames
        for iteration in range(1, self.iterations + 1):
            began = time.process_time()
            self.iterate()
            watch += time.process_time() - began
            if iteration % every == 0 or iteration == self.iterations:
                steps.append(iteration * frames)
                score.append(self.evaluate())
                seconds.append(round(watch, 3))
        solved = [at for at, value in zip(steps, score, strict=True) if value >= SOLVED]
        parts = {name: round(spent, 3) for name, spent in self.parts.items()}
        return {
            "steps": steps,
            "score": score,
            "seconds": seconds,
            "solved_at": solved[0] if solved else None,
            "log": {**self.log, "seconds_of_parts": parts, "updates": self.num_updates},
        }

    def iterate(self) -> None:
        """Collect one rollout and learn from what was seen."""
        s = self.settings
        with self.clock("environment and policy"):
            data = self._collect()
        with self.clock("replay buffer"):
            self.history.extend(data)
        seen = len(self.history)
        if seen < s.first_steps:
            return
        if self.guide is not None and seen % s.guide_every < data.numel():
            with self.clock("model and traces"):
                self.guide.update(data)
        for _ in range(s.updates):
            self._update()

    @torch.no_grad()
    def _collect(self) -> TensorDictBase:
        steps = []
        for _ in range(self.settings.rollout_steps):
            step, self.state = walk(self.env, self.state, self.policy, self.task.keys)
            steps.append(step)
        data: Any = torch.stack(steps, 1)
        return data

    def _update(self) -> None:
        """Take one gradient step."""
        with self.clock("replay buffer"):
            batch = self.history.buffer.sample()
        with self.clock("losses"):
            losses = self.rl_loss(batch)
            total = losses["loss_qvalue"]
            if self.algorithm == "sac":
                total = total + losses["loss_actor"] + losses["loss_alpha"]
            elif self.num_updates % self.settings.actor_every == 0:
                total = total + losses["loss_actor"]
        if self.guide is not None:
            with self.clock("imitation"):
                added = self.guide.loss()
            if added is not None:
                total = total + added
        with self.clock("backward"):
            self.optimizer.zero_grad()
            total.backward()
        with self.clock("optimizer and targets"):
            self.optimizer.step()
            self.updater.step()
        if self.prioritized:
            with self.clock("replay buffer"):
                self.history.buffer.update_tensordict_priority(batch)
        self.num_updates += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the score over one episode of each test: SAC in its own noise, TD3 without."""
        policy = self.policy
        if isinstance(policy, Deterministic):
            policy = Deterministic(policy.network, policy.keys, 0.0)
        # The learner's random numbers are not touched.
        with torch.random.fork_rng():
            torch.manual_seed(EVALUATION_SEED)
            self.test.set_seed(EVALUATION_SEED)
            return evaluate(self.test, policy, self.task)

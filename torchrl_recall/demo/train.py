"""One run of the main job: A2C from TorchRL, alone or with what is compared.

The lines that a recall-traces user adds are in `RecallTraces`; everything else is stock TorchRL.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import A2CLoss
from torchrl.objectives.value import GAE

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.demo import METHODS, SOLVED
from torchrl_recall.demo.sil import SelfImitation
from torchrl_recall.envs import FourRoomsEnv, start_success
from torchrl_recall.envs.four_rooms import Start
from torchrl_recall.loss import RecallTraceLoss
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.observation import ObservationCodec
from torchrl_recall.sampler import ValuePrioritizedSampler
from torchrl_recall.transform import BacktrackTransform


@dataclass(frozen=True)
class Settings:
    """What all methods share, and the few numbers of recall traces."""

    size: int = 15
    start: Start = "fixed"
    steps: int = 200_000
    device: str = "cpu"
    num_envs: int = 16
    rollout: int = 8
    num_cells: tuple[int, ...] = (64,)
    learning_rate: float = 1e-3
    gamma: float = 0.99
    lmbda: float = 0.95
    entropy_coeff: float = 0.01
    max_grad_norm: float = 0.5
    model_updates: int = 8
    model_batch: int = 256
    imitation_updates: int = 8
    imitation_coeff: float = 0.5
    num_traces: int = 16
    trace_length: int = 4  # times size
    frontier: float = 0.02  # share of the rarest transitions that traces start from at first


class A2C:
    """Actor, critic, loss and optimizer of the host algorithm."""

    def __init__(self, env: FourRoomsEnv, settings: Settings) -> None:
        spec = env.observation_spec_unbatched["observation"]

        def network(outputs: int) -> nn.Sequential:
            codec = ObservationCodec({"observation": spec}, dtype=torch.float32)
            layers = MLP(
                in_features=codec.feature_size,
                out_features=outputs,
                num_cells=list(settings.num_cells),
                activation_class=nn.Tanh,
            )
            return nn.Sequential(codec, layers).to(env.device)

        logits = TensorDictModule(network(4), in_keys=["observation"], out_keys=["logits"])
        self.actor = ProbabilisticActor(
            logits,
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        self.critic = ValueOperator(network(1), in_keys=["observation"])
        self.advantage = GAE(gamma=settings.gamma, lmbda=settings.lmbda, value_network=self.critic)
        self.loss = A2CLoss(
            self.actor, self.critic, entropy_coeff=settings.entropy_coeff, critic_coeff=0.5
        )
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, settings.learning_rate)
        self.max_grad_norm = settings.max_grad_norm

    def step(self, losses: TensorDictBase) -> None:
        """Descend the sum of all ``loss_*`` entries."""
        total = sum(value for key, value in losses.items() if key.startswith("loss_"))
        self.optimizer.zero_grad()
        assert isinstance(total, Tensor)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()


class RecallTraces:
    """What a user of recall traces adds to a training script."""

    # What the model is fitted on, and what says where traces start.
    stored: tuple[Any, ...] = (
        "observation",
        "action",
        ("next", "observation"),
        ("next", "reward"),
    )

    def __init__(self, env: FourRoomsEnv, a2c: A2C, settings: Settings, goal_known: bool) -> None:
        self.settings, self.env, self.a2c = settings, env, a2c
        self.model = self.make_model()
        self.goal = env.goal.expand(settings.num_traces, 2) if goal_known else None
        self.transform = self.make_transform(["goal"] if goal_known else None)
        storage = LazyTensorStorage(
            settings.steps + settings.num_envs * settings.rollout, device=env.device
        )
        self.sampler = ValuePrioritizedSampler(settings.steps, top=settings.frontier)
        self.recall_buffer = TensorDictReplayBuffer(
            storage=storage,
            sampler=self.sampler,
            transform=None if goal_known else self.transform,
            batch_size=settings.num_traces,
        )
        self.model_buffer = TensorDictReplayBuffer(
            storage=storage, writer=self.recall_buffer.writer, batch_size=settings.model_batch
        )
        self.model_loss = self.make_model_loss()
        self.recall_loss = self.make_recall_loss()
        self.optimizer = torch.optim.Adam(self.model_loss.parameters(), settings.learning_rate)
        self.found = False
        self.visits = torch.zeros(settings.size**2, dtype=torch.int64, device=env.device)

    def make_model(self) -> BacktrackModel:
        """Build the backtracking model."""
        return BacktrackModel.from_env(self.env, num_cells=self.settings.num_cells)

    def make_transform(self, in_keys: list[str] | None) -> BacktrackTransform:
        """Build what walks back, from the states at ``in_keys``."""
        num_steps = self.settings.trace_length * self.settings.size
        return BacktrackTransform(self.model, num_steps=num_steps, in_keys=in_keys)

    def make_model_loss(self) -> BacktrackLoss:
        """Build what fits the model."""
        return BacktrackLoss(self.model)

    def make_recall_loss(self) -> RecallTraceLoss:
        """Build the imitation."""
        return RecallTraceLoss(self.a2c.actor, imitation_coeff=self.settings.imitation_coeff)

    def observe(self, data: TensorDictBase) -> None:
        """Store the rollout, say what is of value in it, and fit the model on all data."""
        data = data.select(*self.stored).reshape(-1)
        self.recall_buffer.extend(data)
        if self.goal is None:
            self._refresh_values(data)
        self.fit()

    def fit(self) -> None:
        """Fit the model."""
        for _ in range(self.settings.model_updates):
            loss = self.model_loss(self.model_buffer.sample())["loss_backtrack"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def _refresh_values(self, data: TensorDictBase) -> None:
        """Value of a stored transition: its reward, or before the first one how rare its end is."""
        stored = self.recall_buffer.storage[:]["next"]
        if self.found or bool((data["next", "reward"] > 0).any()):
            self.found = True
            self.sampler.top, self.sampler.min_value = 1.0, 0.5
            self.sampler.refresh(stored["reward"])
            return
        cell = self.model.observation.joint_index
        self.visits += cell(data["next", "observation"]).bincount(minlength=len(self.visits))
        self.sampler.refresh(-self.visits[cell(stored["observation"])].float())

    def sample(self) -> TensorDictBase:
        """Return fresh traces."""
        if self.goal is None:
            return self.recall_buffer.sample()
        return self.transform(TensorDict({"goal": self.goal}, self.goal.shape[:1]))


def train(
    method: str,
    seed: int,
    settings: Settings,
    progress: Callable[[int], None] | None = None,
    *,
    recall_traces: Callable[[FourRoomsEnv, A2C, Settings, bool], RecallTraces] = RecallTraces,
) -> dict[str, Any]:
    """Run one method with one seed until it is solved or the budget is spent.

    Args:
        method (str): one of ``METHODS``.
        seed (int): seed of environment, networks and samplers.
        settings (Settings): the numbers.
        progress (callable, optional): called with the environment steps so far.
        recall_traces (callable): builds what the recall methods add.

    Returns:
        dict: ``method``, ``seed``, ``goal_known``, ``steps``, ``success`` (exact), ``t90`` (first
        crossing of 0.9 or None), ``wall_s``; and ``traces``, early and late ones to draw, see
        `drawable`.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    began = time.perf_counter()
    torch.manual_seed(seed)
    env = FourRoomsEnv(
        settings.size,
        start=settings.start,
        batch_size=(settings.num_envs,),
        device=settings.device,
        seed=seed,
    )
    a2c = A2C(env, settings)
    goal_known = method == "recall_known"
    recall = None
    if method.startswith("recall"):
        recall = recall_traces(env, a2c, settings, goal_known)
    sil = SelfImitation(env, a2c, settings) if method == "a2c_sil" else None
    collector = Collector(
        env,
        a2c.actor,
        frames_per_batch=settings.num_envs * settings.rollout,
        total_frames=-1,
        device=settings.device,
        auto_register_policy_transforms=False,
    )
    steps, success, t90, traces = [0], [evaluate(env, a2c.actor)], None, []
    for data in collector:
        with torch.no_grad():
            a2c.advantage(data)
        a2c.step(a2c.loss(data.reshape(-1)))
        if sil is not None:
            sil.update(data)
        if recall is not None:
            recall.observe(data)
            for _ in range(settings.imitation_updates):
                trace = recall.sample()
                a2c.step(recall.recall_loss(trace))
                traces[1:] = [(steps[-1] + data.numel(), *drawable(trace))]
        steps.append(steps[-1] + data.numel())
        success.append(evaluate(env, a2c.actor))
        if progress is not None:
            progress(steps[-1])
        if success[-1] >= SOLVED:
            t90 = steps[-1]
        if t90 is not None or steps[-1] >= settings.steps:
            break
    collector.shutdown()
    return {
        "method": method,
        "seed": seed,
        "goal_known": goal_known,
        "steps": steps,
        "success": success,
        "t90": t90,
        "wall_s": time.perf_counter() - began,
        "traces": traces,
    }


def drawable(sample: TensorDictBase) -> tuple[np.ndarray, np.ndarray]:
    """Return the states of traces, oldest first and the goal last, and which steps are kept."""
    observation = sample["trace", "observation"]
    last = sample["trace", "next", "observation"][:, -1:]
    kept = sample["trace", "collector", "mask"]
    return torch.cat([observation, last], 1).cpu().numpy(), kept.cpu().numpy()


@torch.no_grad()
def evaluate(env: FourRoomsEnv, actor: TensorDictModule) -> float:
    """Return the exact success probability of the stochastic policy, by dynamic programming."""
    n = env.size
    cells = torch.cartesian_prod(torch.arange(n), torch.arange(n)).to(env.device)
    policy = actor.get_dist(TensorDict({"observation": cells}, [n * n])).probs
    return start_success(env, policy)

"""Recall traces in ordinary TorchRL scripts: the five lines marked ``# recall`` are all one adds.

`ppo`, `sac` and `a2c` are written as a user would write them; the README shows the first two.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import (
    LazyTensorStorage,
    PrioritizedSampler,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.envs import Compose, DoubleToFloat, GymEnv, InitTracker, StepCounter, TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss, SACLoss, SoftUpdate
from torchrl.objectives.value import GAE

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
    transition_value,
)
from torchrl_recall.envs import FourRoomsEnv


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_actor(env, **kwargs):
    size, actions = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    net = nn.Sequential(MLP(size, 2 * actions, num_cells=[16]), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ["loc", "scale"],
        spec=env.action_spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": env.action_spec.space.low, "high": env.action_spec.space.high},
        **kwargs,
    )


def ppo(env, actor, critic, *, prefetch=None, total_frames=256):
    """PPO on-policy: traces lead to the recent states of highest value."""
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    ppo_loss = ClipPPOLoss(actor, critic)
    model = BacktrackModel.from_env(env, num_cells=(16,))  # recall
    recall_buffer = TensorDictReplayBuffer(  # recall
        storage=LazyTensorStorage(1_000),
        sampler=ValuePrioritizedSampler(1_000),
        priority_key="value_target",
        transform=BacktrackTransform(model, num_steps=4),
        batch_size=16,
        prefetch=prefetch,
    )
    model_loss, recall_loss = BacktrackLoss(model), RecallTraceLoss(actor)  # recall
    optimizer = torch.optim.Adam([*ppo_loss.parameters(), *model.parameters()], lr=1e-3)
    log = []
    for data in Collector(env, actor, frames_per_batch=128, total_frames=total_frames):
        for _ in range(2):
            with torch.no_grad():
                advantage(data)
            recall_buffer.extend(data.reshape(-1))  # recall
            for batch in data.reshape(-1).split(64):
                losses = ppo_loss(batch)
                losses.update(model_loss(batch)).update(  # recall
                    recall_loss(recall_buffer.sample())
                )
                loss = sum(v for k, v in losses.items() if k.startswith("loss_"))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                log.append(losses.detach())
    return log


def sac(env, actor, critic, value, replay, *, generator, total_frames=256):
    """SAC off-policy: the recall buffer is a second view on the learner's data."""
    sac_loss = SACLoss(actor, critic, value, target_entropy=-1.0)
    updater = SoftUpdate(sac_loss, tau=0.005)
    model = BacktrackModel.from_env(env, num_cells=(16,))  # recall
    recall_buffer = TensorDictReplayBuffer(  # recall
        storage=replay.storage,
        writer=replay.writer,
        generator=generator,
        sampler=ValuePrioritizedSampler(1_000),
        transform=BacktrackTransform(model, num_steps=4),
        batch_size=16,
    )
    model_loss, recall_loss = BacktrackLoss(model), RecallTraceLoss(actor)  # recall
    optimizer = torch.optim.Adam([*sac_loss.parameters(), *model.parameters()], lr=1e-3)
    log = []
    # No transforms added by the collector: the policy here has no memory to reset.
    collector = Collector(
        env,
        actor,
        frames_per_batch=64,
        total_frames=total_frames,
        auto_register_policy_transforms=False,
    )
    for data in collector:
        replay.extend(data.reshape(-1))
        recall_buffer.sampler.refresh(transition_value(replay, value, gamma=0.99))  # recall
        for _ in range(2):
            batch = replay.sample()
            losses = sac_loss(batch)
            losses.update(model_loss(batch)).update(recall_loss(recall_buffer.sample()))  # recall
            loss = sum(v for k, v in losses.items() if k.startswith("loss_"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updater.step()
            replay.update_tensordict_priority(batch)
            log.append(losses.detach())
    return log


def a2c(env, actor, critic, *, total_frames=512):
    """A2C on a maze: categorical actions, displacements on a lattice, traces that end at starts."""
    a2c_loss = A2CLoss(actor, critic)
    a2c_loss.make_value_estimator(gamma=0.99)
    model = BacktrackModel.from_env(env, num_cells=(16,))  # recall
    recall_buffer = TensorDictReplayBuffer(  # recall
        storage=LazyTensorStorage(1_000),
        sampler=ValuePrioritizedSampler(1_000),
        priority_key="value_target",
        transform=BacktrackTransform(model, num_steps=8),
        batch_size=16,
    )
    model_loss, recall_loss = BacktrackLoss(model), RecallTraceLoss(actor)  # recall
    optimizer = torch.optim.Adam([*a2c_loss.parameters(), *model.parameters()], lr=1e-2)
    log = []
    for data in Collector(env, actor, frames_per_batch=128, total_frames=total_frames):
        with torch.no_grad():
            a2c_loss.value_estimator(data)
        recall_buffer.extend(data.reshape(-1))  # recall
        losses = a2c_loss(data)
        losses.update(model_loss(data)).update(recall_loss(recall_buffer.sample()))  # recall
        loss = sum(v for k, v in losses.items() if k.startswith("loss_"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(losses.detach())
    return log


def has_extension():
    try:
        PrioritizedSampler(2, alpha=0.6, beta=0.4)
    except RuntimeError:
        return False
    return True


class Watch:
    """Looks over the shoulder of a script: its model, and the traces that its loss is given."""

    def __init__(self, monkeypatch):
        from_env, forward = BacktrackModel.from_env, RecallTraceLoss.forward
        self.calls = 0

        def watched_from_env(*args, **kwargs):
            self.model = from_env(*args, **kwargs)
            self.fresh = deepcopy(self.model)
            return self.model

        def watched_forward(loss, tensordict):
            self.calls += 1
            out = forward(loss, tensordict)
            assert not any(value.requires_grad for value in tensordict["trace"].values(True, True))
            imitation, parameters = out["loss_imitation"], list(self.model.parameters())
            options = {"retain_graph": True, "allow_unused": True}
            assert torch.autograd.grad(imitation, parameters, **options) == (None,) * len(
                parameters
            )
            return out

        monkeypatch.setattr(BacktrackModel, "from_env", staticmethod(watched_from_env))
        monkeypatch.setattr(RecallTraceLoss, "forward", watched_forward)

    def check(self, log, names, *changes):
        """All losses are there and finite, and every parameter has moved."""
        assert self.calls == len(log) > 0
        for losses in log:
            assert {"loss_imitation", "loss_backtrack", "trace_kept"} | names <= set(losses.keys())
            assert all(torch.isfinite(value).all() for value in losses.values())
        for old, new in [(self.fresh, self.model), *changes]:
            for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True):
                assert not torch.equal(a, b), name


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.mark.parametrize("prefetch", [None, 2])
def test_ppo(prefetch, watch):
    env = TransformedEnv(GymEnv("Pendulum-v1"), Compose(StepCounter(max_steps=50), InitTracker()))
    actor = make_actor(env, return_log_prob=True)
    critic = ValueOperator(MLP(3, 1, num_cells=[16]))
    before = deepcopy([actor, critic])
    log = ppo(env, actor, critic, prefetch=prefetch)
    names = {"loss_objective", "loss_critic", "backtrack_stop_log_prob"}
    watch.check(log, names, (before[0], actor), (before[1], critic))


@pytest.mark.parametrize("prefetch", [None, 2])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("name", ["MountainCarContinuous-v0", "InvertedPendulum-v5"])
def test_sac(name, prioritized, prefetch, watch):
    if prioritized and not has_extension():
        pytest.skip("TorchRL's C++ extension, which holds its sum trees, does not load here")
    env = TransformedEnv(GymEnv(name), DoubleToFloat())
    size = env.observation_spec["observation"].shape[-1]
    actor = make_actor(env)
    critic = ValueOperator(MLP(size + 1, 1, num_cells=[16]), ["action", "observation"])
    value = ValueOperator(MLP(size, 1, num_cells=[16]))
    generator = torch.Generator().manual_seed(0)
    options = {"storage": LazyTensorStorage(1_000), "batch_size": 32, "generator": generator}
    # Only the learner's buffer may prefetch: each buffer has a lock of its own, and the recall
    # view's would not keep it from reading the shared storage while that is extended.
    options["prefetch"] = prefetch
    if prioritized:
        replay = TensorDictPrioritizedReplayBuffer(alpha=0.6, beta=0.4, **options)
    else:
        replay = TensorDictReplayBuffer(**options)
    before = deepcopy([actor, value])
    log = sac(env, actor, critic, value, replay, generator=generator)
    names = {"loss_actor", "loss_qvalue", "loss_value", "loss_alpha"}
    watch.check(log, names, (before[0], actor), (before[1], value))
    assert "trace" not in replay.sample()
    assert "trace" not in replay.storage[:]
    assert replay._rng is replay.storage._rng is generator


def test_a2c_on_four_rooms(watch):
    env = TransformedEnv(FourRoomsEnv(5, batch_size=(8,), max_steps=20, seed=0), InitTracker())
    net = nn.Sequential(ToFloat(), nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 4))
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["logits"]),
        ["logits"],
        distribution_class=torch.distributions.Categorical,
        spec=env.action_spec_unbatched,
        return_log_prob=True,
    )
    critic = ValueOperator(nn.Sequential(ToFloat(), MLP(2, 1, num_cells=[16])))
    before = deepcopy([actor, critic])
    log = a2c(env, actor, critic)
    names = {"loss_objective", "loss_critic", "backtrack_stop_log_prob"}
    watch.check(log, names, (before[0], actor), (before[1], critic))
    assert watch.model.has_stop
    assert log[-1]["loss_backtrack"] < log[0]["loss_backtrack"]
    assert all(0 < losses["trace_kept"] < 1 for losses in log)


class ToFloat(nn.Module):
    """Cells to numbers around zero."""

    def forward(self, cell):
        return cell.float() / 2 - 1

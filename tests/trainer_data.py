"""Trainers of TorchRL with `RecallTraceHook`, on- and off-policy."""

from __future__ import annotations

import torch
from test_integration import make_actor
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import ClipPPOLoss, SACLoss, SoftUpdate
from torchrl.objectives.value import GAE
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import (
    BatchSubSampler,
    ReplayBufferTrainer,
    TargetNetUpdaterHook,
    ValueEstimatorHook,
)

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
    ValueRefresh,
)
from torchrl_recall.trainer import RecallTraceHook


def make_env():
    torch.manual_seed(0)
    return GymEnv("Pendulum-v1")


def collect(env, actor, frames):
    return Collector(
        env,
        actor,
        frames_per_batch=32,
        total_frames=frames,
        auto_register_policy_transforms=False,
    )


def on_policy(env, loss_class=ClipPPOLoss, stepper=None, logger=None, held=True, frames=128):
    """Return a trainer, its hook and the model."""
    actor = make_actor(env, return_log_prob=True)
    critic = ValueOperator(MLP(3, 1, num_cells=[16]), in_keys=["observation"])
    loss = loss_class(actor, critic)
    model = BacktrackModel.from_env(env, num_cells=(16,))
    parameters = [*loss.parameters(), *(model.parameters() if held else [])]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    trainer = Trainer(
        collector=collect(env, actor, frames),
        total_frames=frames,
        frame_skip=1,
        optim_steps_per_batch=2,
        num_epochs=2,
        loss_module=loss,
        optimizer=optimizer,
        optimization_stepper=None if stepper is None else stepper(optimizer),
        logger=logger,
        log_interval=1,
        progress_bar=False,
    )
    gae = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    ValueEstimatorHook(gae).register(trainer)
    BatchSubSampler(batch_size=16).register(trainer)
    recall_buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(1_000),
        sampler=ValuePrioritizedSampler(1_000),
        priority_key="value_target",
        transform=BacktrackTransform(model, num_steps=4),
        batch_size=8,
    )
    hook = RecallTraceHook(recall_buffer, RecallTraceLoss(actor), BacktrackLoss(model))
    return trainer, hook, model


def off_policy(env, frames=128):
    """Return a SAC trainer, its hook and the model; the recall buffer is a view."""
    actor = make_actor(env, return_log_prob=True)
    value = ValueOperator(MLP(3, 1, num_cells=[16]), in_keys=["observation"])
    critic = ValueOperator(MLP(4, 1, num_cells=[16]), in_keys=["observation", "action"])
    loss = SACLoss(actor, critic, value, target_entropy=-1.0)
    model = BacktrackModel.from_env(env, num_cells=(16,))
    trainer = Trainer(
        collector=collect(env, actor, frames),
        total_frames=frames,
        frame_skip=1,
        optim_steps_per_batch=3,
        loss_module=loss,
        optimizer=torch.optim.Adam([*loss.parameters(), *model.parameters()], lr=1e-3),
        progress_bar=False,
    )
    generator = torch.Generator().manual_seed(0)
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(1_000),
        sampler=RandomSampler(),
        generator=generator,
        batch_size=16,
    )
    ReplayBufferTrainer(replay, flatten_tensordicts=True).register(trainer)
    TargetNetUpdaterHook(SoftUpdate(loss, tau=0.01)).register(trainer, "target")
    recall_buffer = TensorDictReplayBuffer(
        storage=replay.storage,
        writer=replay.writer,
        generator=generator,
        sampler=ValuePrioritizedSampler(1_000),
        transform=BacktrackTransform(model, num_steps=4),
        batch_size=8,
    )
    hook = RecallTraceHook(
        recall_buffer,
        RecallTraceLoss(actor),
        BacktrackLoss(model),
        extend=False,
        refresh=ValueRefresh(recall_buffer, value, gamma=0.99),
    )
    return trainer, hook, model

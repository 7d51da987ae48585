"""`RecallTraceHook` in TorchRL's own trainers, on- and off-policy, with loggers and checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from test_integration import make_actor
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss, SACLoss, SoftUpdate
from torchrl.objectives.value import GAE
from torchrl.record.loggers.csv import CSVLogger
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import (
    BatchSubSampler,
    DefaultOptimizationStepper,
    MixedPrecisionOptimizationStepper,
    OptimizationStepper,
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

pytestmark = pytest.mark.filterwarnings("ignore:The .* hook stage:FutureWarning")


@pytest.fixture
def env():
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


def parameters_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


STEPPERS = {
    "trainer's own": None,
    "default": lambda optimizer: DefaultOptimizationStepper(),
    "bfloat16": lambda optimizer: MixedPrecisionOptimizationStepper(
        optimizer, mixed_precision=True
    ),
}


@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize("loss_class", [A2CLoss, ClipPPOLoss])
def test_on_policy_trainer_imitates_and_fits(env, loss_class, stepper):
    trainer, hook, model = on_policy(env, loss_class, STEPPERS[stepper])
    hook.register(trainer)
    before = parameters_of(model)
    trainer.train()
    assert not torch.equal(before, parameters_of(model))
    # Each batch once, though each was used for two epochs.
    assert len(hook.recall_buffer) == 128
    assert hook.recall_buffer.sampler.values[:128].isfinite().all()
    for name in ("loss_imitation", "loss_backtrack", "trace_kept", "loss_critic"):
        logged = torch.stack([torch.as_tensor(x) for x in trainer._log_dict[name]])
        assert len(logged) == 4
        assert bool(torch.isfinite(logged).all()), name


def test_off_policy_trainer_refreshes_a_view(env):
    trainer, hook, model = off_policy(env)
    hook.register(trainer)
    before = parameters_of(model)
    trainer.train()
    assert not torch.equal(before, parameters_of(model))
    assert len(hook.recall_buffer) == 128
    assert trainer._log_dict["refresh/share"] == [1.0] * 4
    assert "loss_qvalue" in trainer._log_dict
    assert "loss_imitation" in trainer._log_dict


def test_terms_are_those_of_the_losses(env):
    trainer, hook, _ = on_policy(env)
    loss = trainer.loss_module
    batch = next(iter(trainer.collector))
    with torch.no_grad():
        batch = trainer._pre_epoch_hook(batch)
    torch.manual_seed(1)  # the entropy of a squashed Gaussian is estimated by sampling
    alone = loss(batch)
    hook.register(trainer)
    hook.recall_buffer.extend(batch)
    samples, sample = [], hook.recall_buffer.sample
    hook.recall_buffer.sample = lambda: samples.append(sample()) or samples[-1]
    torch.manual_seed(1)
    together = loss(batch)
    expected = {**alone, **hook.recall_loss(samples[0]), **hook.model_loss(batch)}
    # The second fit's statistics have moved by one batch: the same one, so by nothing much.
    assert together.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-5, msg=key)
    loss.eval()
    assert loss(batch).keys() == alone.keys()


def test_csv_logger_gets_the_terms(env, tmp_path):
    logger = CSVLogger("run", log_dir=str(tmp_path))
    trainer, hook, _ = on_policy(env, logger=logger)
    hook.register(trainer)
    trainer.train()
    for name in ("loss_imitation", "loss_backtrack", "trace_log_prob"):
        lines = next(tmp_path.rglob(f"{name}.csv")).read_text().splitlines()
        assert len(lines) >= 3


def test_state_goes_with_the_trainer(env):
    trainer, hook, model = off_policy(env)
    hook.register(trainer)
    batch = next(iter(trainer.collector)).reshape(-1)
    trainer._process_batch_hook(batch)
    trainer.optim_steps(batch)
    state = copy.deepcopy(trainer.state_dict())
    other, other_hook, other_model = off_policy(env)
    other_hook.register(other)
    other.loss_module.make_value_estimator()  # TorchRL makes it, with its buffers, when first used
    assert not torch.equal(parameters_of(model), parameters_of(other_model))
    other.load_state_dict(state)
    assert torch.equal(parameters_of(model), parameters_of(other_model))
    assert torch.equal(
        hook.recall_buffer.sampler.weights(32), other_hook.recall_buffer.sampler.weights(32)
    )


def test_optimizer_without_the_model_is_refused(env):
    trainer, hook, _ = on_policy(env, held=False)
    with pytest.raises(ValueError, match=r"trainer\.optimizer lacks 8 parameters"):
        hook.register(trainer)


def test_a_stepper_that_passes_by_the_loss_is_reported(env):
    class Parts(OptimizationStepper):
        def step(self, trainer, sub_batch):
            return trainer.loss_module.forward(sub_batch).detach()

    trainer, hook, _ = on_policy(env, stepper=lambda optimizer: Parts())
    hook.register(trainer)
    with pytest.raises(RuntimeError, match="without calling its loss module"):
        trainer.train()


def test_refusals(env):
    _, hook, model = on_policy(env)
    with pytest.raises(TypeError, match="recall_buffer must be a TensorDictReplayBuffer"):
        RecallTraceHook(None, hook.recall_loss)
    with pytest.raises(TypeError, match="recall_loss must be a RecallTraceLoss"):
        RecallTraceHook(hook.recall_buffer, hook.model_loss)
    with pytest.raises(TypeError, match="model_loss must be a BacktrackLoss"):
        RecallTraceHook(hook.recall_buffer, hook.recall_loss, model)
    with pytest.raises(TypeError, match="refresh must be callable"):
        RecallTraceHook(hook.recall_buffer, hook.recall_loss, refresh=3)

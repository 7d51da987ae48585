"""`RecallTraceHook` in TorchRL's own trainers, on- and off-policy, with loggers and checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torchrl.objectives import A2CLoss, ClipPPOLoss
from torchrl.record.loggers.csv import CSVLogger
from torchrl.trainers.trainers import (
    DefaultOptimizationStepper,
    MixedPrecisionOptimizationStepper,
    OptimizationStepper,
)
from trainer_data import make_env, off_policy, on_policy

from torchrl_recall.trainer import RecallTraceHook

pytestmark = pytest.mark.filterwarnings("ignore:The .* hook stage:FutureWarning")


@pytest.fixture
def env():
    return make_env()


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

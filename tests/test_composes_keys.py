"""Nested and renamed keys from the environment to both losses, and float64 observations."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import distributions as D
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Categorical, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    GymEnv,
    InitTracker,
    RenameTransform,
    TransformedEnv,
)
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
)
from torchrl_recall.envs import FourRoomsEnv

F64 = torch.float64
STATE, ACT, FIRST = ("agent", "sensors", "state"), ("agent", "act"), ("marks", "first")
TRACE, VALUE = ("memory", "recall"), ("critic", "target")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rename(env):
    """The environment with every name nested and changed."""
    return TransformedEnv(
        env,
        Compose(
            InitTracker(),
            RenameTransform(
                in_keys=["observation", "is_init"],
                out_keys=[STATE, FIRST],
                in_keys_inv=["action"],
                out_keys_inv=[ACT],
            ),
        ),
    )


def pendulum():
    """MuJoCo as it comes: float64 observations, float32 actions and rewards."""
    return GymEnv("InvertedPendulum-v5")


def make_actor(env, state=STATE, act=ACT, dtype=F64):
    if isinstance(env.full_action_spec[act], Categorical):

        class OneHot(nn.Module):
            def forward(self, state):
                return nn.functional.one_hot(state, 5).flatten(-2).to(dtype)

        net = nn.Sequential(OneHot(), MLP(10, 4, num_cells=[16])).to(dtype)
        return ProbabilisticActor(
            TensorDictModule(net, [state], [("p", "logits")]),
            {"logits": ("p", "logits")},
            [act],
            spec=env.full_action_spec,
            distribution_class=D.Categorical,
            return_log_prob=True,
            log_prob_key=("p", "log_prob"),
        )
    net = nn.Sequential(MLP(4, 2, num_cells=[16]), NormalParamExtractor()).to(dtype)
    spec = env.full_action_spec[act]
    return ProbabilisticActor(
        TensorDictModule(net, [state], [("p", "loc"), ("p", "scale")]),
        {"loc": ("p", "loc"), "scale": ("p", "scale")},
        [act],
        spec=env.full_action_spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low.to(dtype), "high": spec.space.high.to(dtype)},
        return_log_prob=True,
        log_prob_key=("p", "log_prob"),
    )


def make_critic(env, state=STATE, dtype=F64):
    class AsFloat(nn.Module):
        def forward(self, state):
            return state.to(dtype)

    width = env.full_observation_spec[state].shape[-1]
    net = nn.Sequential(AsFloat(), MLP(width, 1, num_cells=[16])).to(dtype)
    return ValueOperator(net, in_keys=[state], out_keys=[("critic", "value")])


ENVIRONMENTS = {
    "pendulum": pendulum,
    "maze": lambda: FourRoomsEnv(5, slip=0.1, max_steps=10),
}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_ppo_with_every_key_nested_and_renamed(kind):
    env = rename(ENVIRONMENTS[kind]())
    actor, critic = make_actor(env), make_critic(env)
    advantage = GAE(gamma=0.9, lmbda=0.9, value_network=critic)
    names = {"value": ("critic", "value"), "value_target": VALUE, "advantage": ("critic", "adv")}
    advantage.set_keys(**names)
    ppo = ClipPPOLoss(actor, critic, entropy_bonus=False)
    ppo.set_keys(**names, action=ACT, sample_log_prob=("p", "log_prob"))

    options = {"dtype": F64} if kind == "maze" else {}
    model = BacktrackModel.from_env(env, num_cells=(16,), is_init_key=FIRST, **options)
    assert model.dtype == F64
    assert model.in_keys == [("next", *STATE), STATE, ACT]
    assert model.has_stop
    model_loss, recall_loss = BacktrackLoss(model), RecallTraceLoss(actor)
    assert model_loss.in_keys == [STATE, ACT, ("next", *STATE), FIRST]
    recall_loss.set_keys(trace=TRACE, action=ACT)
    assert recall_loss.in_keys == [(*TRACE, *STATE), (*TRACE, *ACT)]
    transform = BacktrackTransform(
        model, num_steps=4, out_keys=[TRACE], min_value=-1e6, value_key=VALUE
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(200),
        sampler=ValuePrioritizedSampler(200),
        priority_key="priority",
        transform=transform,
        batch_size=16,
    )
    optimizer = torch.optim.Adam([*ppo.parameters(), *model.parameters()], lr=1e-3)
    collector = Collector(
        env,
        actor,
        frames_per_batch=40,
        total_frames=80,
        auto_register_policy_transforms=False,
    )
    for data in collector:
        with torch.no_grad():
            advantage(data)
        data["priority"] = data[VALUE].squeeze(-1)
        buffer.extend(data)
        batch = buffer.sample()
        trace = batch[TRACE]
        assert trace.shape == (16, 4)
        assert torch.equal(trace[("next", *STATE)][:, -1], batch[("next", *STATE)])
        out = ppo(data)
        out.update(model_loss(batch))
        out.update(recall_loss(batch))
        losses = [out[key] for key in out.keys() if key.startswith("loss_")]  # noqa: SIM118
        assert {loss.dtype for loss in losses} == {F64}
        assert out["trace_kept"] > 0
        optimizer.zero_grad()
        sum(losses).backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        optimizer.step()
    collector.shutdown()


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_data_by_other_names_than_the_models(kind):
    """The same data under the model's names and under others: the same loss, the same traces."""
    env = rename(ENVIRONMENTS[kind]())
    data = env.rollout(12, break_when_any_done=False).contiguous()
    plain = data.clone().rename_key_(STATE, "observation").rename_key_(ACT, "action")
    plain.rename_key_(FIRST, "is_init").rename_key_(("next", *STATE), ("next", "observation"))
    torch.manual_seed(1)
    model = BacktrackModel(
        env.full_observation_spec[STATE],
        env.full_action_spec[ACT],
        num_cells=(16,),
        stop=True,
        dtype=F64,
    )
    renamed = BacktrackLoss(model).eval()
    renamed.set_keys(observation=STATE, action=ACT, is_init=FIRST)
    expected = BacktrackLoss(model).eval()(plain)
    found = renamed(data)
    assert set(found.keys()) == set(expected.keys())
    for key in expected.keys():  # noqa: SIM118
        torch.testing.assert_close(found[key], expected[key])
    traces = []
    for batch, options in ((plain, {}), (data, {"in_keys": [("next", *STATE)]})):
        generator = torch.Generator().manual_seed(2)
        options |= {"generator": generator, "out_keys": [TRACE]}
        traces.append(BacktrackTransform(model, num_steps=3, **options)(batch)[TRACE])
    assert bool((traces[0] == traces[1]).all())


@pytest.mark.parametrize("cast", [False, True])
def test_float64_observations_beside_float32_actions(cast):
    """As they come, or cast on the way out of the buffer by TorchRL's own transform."""
    env = pendulum()
    data = env.rollout(30, policy=None, break_when_any_done=False)
    assert data["observation"].dtype == F64
    assert data["action"].dtype == torch.float32
    dtype = torch.float32 if cast else F64
    spec = env.observation_spec["observation"]
    model = BacktrackModel(spec, env.action_spec, num_cells=(16,), dtype=dtype if cast else None)
    assert model.dtype == dtype
    keys = ["observation", ("next", "observation")]
    transform = BacktrackTransform(model, num_steps=4)
    if cast:
        transform = Compose(DoubleToFloat(in_keys=keys), transform)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(30), transform=transform, batch_size=8
    )
    buffer.extend(data)
    batch = buffer.sample()
    assert buffer.storage[:]["observation"].dtype == F64
    for key in ("observation", "action", ("next", "observation"), "action_log_prob"):
        assert batch["trace"][key].dtype == dtype
    loss = BacktrackLoss(model)(batch)["loss_backtrack"]
    loss.backward()
    assert loss.dtype == dtype
    if not cast:
        with pytest.raises(ValueError, match=r"has dtype torch\.float64, .*DoubleToFloat"):
            BacktrackLoss(model.to(torch.float32))(batch)

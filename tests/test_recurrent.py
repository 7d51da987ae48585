"""Recurrent policies: imitated from an empty memory, along the kept steps of each trace."""

from __future__ import annotations

import copy

import pytest
import torch
from loss_data import make_model, transitions
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, OneHot, TensorDictReplayBuffer
from torchrl.envs import Compose, GymEnv, InitTracker, TransformedEnv
from torchrl.modules import (
    GRUModule,
    LSTMModule,
    ProbabilisticActor,
    QValueModule,
    TanhNormal,
    set_recurrent_mode,
)
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_recall import (
    AdvantageWeight,
    BacktrackModel,
    BacktrackTransform,
    QValueWeight,
    RecallTraceLoss,
    ValuePrioritizedSampler,
    ValueRefresh,
    transition_value,
)

B, T, WIDTH, HIDDEN = 4, 7, 3, 8
MODULES = {"lstm": LSTMModule, "gru": GRUModule}
pytestmark = pytest.mark.filterwarnings("ignore:.*inline_inbuilt_nn_modules:FutureWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_memory(kind, **options):
    return MODULES[kind](WIDTH, HIDDEN, in_key="observation", out_key="embedding", **options)


def head(*outputs, actions=2):
    net = nn.Sequential(nn.Linear(HIDDEN, 2 * actions), NormalParamExtractor())
    if outputs:
        net = nn.Linear(HIDDEN, actions)
    return TensorDictModule(net, ["embedding"], list(outputs) or ["loc", "scale"])


def make_actor(kind, actions=2, **options):
    return ProbabilisticActor(
        TensorDictSequential(make_memory(kind, **options), head(actions=actions)),
        ["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def make_traces(*batch, dtype=torch.float32):
    """Traces with every kind of gap: at the front, inside, at the end, and everywhere."""
    trace = transitions(*batch).to(dtype)
    kept = torch.rand(batch) < 0.6
    rows = kept.view(-1, batch[-1])
    rows[0] = True
    rows[1] = False
    rows[2] = torch.arange(batch[-1]) > 2
    trace["collector", "mask"] = kept
    for key in ("observation", "action"):
        trace[key][~kept] = torch.nan  # what is masked is not read
    return TensorDict({"trace": trace}, batch[:-1])


def cell_of(actor):
    return next(m for m in actor.modules() if isinstance(m, nn.RNNBase))


def by_hand(actor, trace):
    """The definition: each trace's kept steps, one after the other, from an empty memory."""
    cell = cell_of(actor)
    linear = next(m for m in actor.modules() if isinstance(m, nn.Linear))
    split = NormalParamExtractor()
    log_probs = []
    for row in trace.reshape(-1, trace.shape[-1]):
        memory = None
        for step in row:
            if not step["collector", "mask"]:
                continue
            out, memory = cell(step["observation"].reshape(1, 1, -1), memory)
            dist = TanhNormal(*split(linear(out[0, 0])))
            log_probs.append(dist.log_prob(step["action"]))
    return torch.stack(log_probs)


@pytest.mark.parametrize("batch", [(B, T), (2, 3, T), (T,)], ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_loss_is_that_of_the_loop_over_kept_steps(kind, batch):
    actor = make_actor(kind).double()
    data = make_traces(B, T, dtype=torch.float64)
    if batch == (2, 3, T):
        data = make_traces(2, 3, T, dtype=torch.float64)
    elif batch == (T,):
        data = TensorDict({"trace": data["trace"][2]})
    loss = RecallTraceLoss(actor)
    out = loss(data)
    expected = by_hand(actor, data["trace"])
    torch.testing.assert_close(out["loss_imitation"], -expected.mean())
    torch.testing.assert_close(out["trace_log_prob"], expected.mean())
    out["loss_imitation"].backward()
    found = [p.grad.clone() for p in actor.parameters()]
    actor.zero_grad()
    (-by_hand(actor, data["trace"]).mean()).backward()
    for a, b in zip(found, actor.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
        assert bool(b.grad.any())


@pytest.mark.parametrize("kind", MODULES)
def test_each_step_has_its_own_loss_and_weight(kind):
    """Steps keep their places, though the memory skips the gaps."""
    actor = make_actor(kind).double()
    data = make_traces(B, T, dtype=torch.float64)
    mask = data["trace", "collector", "mask"]
    value = RecallTraceLoss(actor, reduction="none")(data)["loss_imitation"]
    assert value.shape == (B, T)
    torch.testing.assert_close(value[mask], -by_hand(actor, data["trace"]))
    assert not value[~mask].any()
    discounted = RecallTraceLoss(actor, reduction="none", discount=0.5)(data)["loss_imitation"]
    factor = 0.5 ** torch.arange(T - 1, -1, -1).double()
    torch.testing.assert_close(discounted, value * factor)


@pytest.mark.parametrize("mode", [None, False, True])
@pytest.mark.parametrize("options", [{}, {"default_recurrent_mode": True}, {"python_based": True}])
@pytest.mark.parametrize("kind", MODULES)
def test_whatever_mode_is_set(kind, options, mode):
    actor = make_actor(kind, **options)
    plain = make_actor(kind)
    plain.load_state_dict(actor.state_dict())
    data = make_traces(B, T)
    with set_recurrent_mode(mode):
        found = RecallTraceLoss(actor)(data)["loss_imitation"]
    torch.testing.assert_close(found, -by_hand(plain, data["trace"]).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_a_traces_hidden_states_are_not_read(kind):
    actor = make_actor(kind)
    data = make_traces(B, T)
    expected = RecallTraceLoss(actor)(data)["loss_imitation"]
    for key in ("recurrent_state", "recurrent_state_h", "recurrent_state_c"):
        data["trace", key] = torch.randn(B, T, 1, HIDDEN)
    data["trace", "is_init"] = torch.rand(B, T, 1) < 0.5
    loss = RecallTraceLoss(actor)
    assert torch.equal(loss(data)["loss_imitation"], expected)
    assert loss.in_keys == [("trace", "observation"), ("trace", "action")]


@pytest.mark.parametrize("kind", MODULES)
def test_log_prob_is_that_of_the_acting_policy(kind):
    """An episode of the environment as a trace: what the policy did has the probability it had."""
    actor = make_actor(kind, actions=1)
    memory = actor.module[0].module[0]
    transforms = Compose(InitTracker(), memory.make_tensordict_primer())
    env = TransformedEnv(GymEnv("Pendulum-v1"), transforms)
    rollout = env.rollout(12, actor).detach()
    assert rollout[next(k for k in memory.in_keys if "state" in k)][1:].any()
    trace = rollout.select("observation", "action").unsqueeze(0)
    out = RecallTraceLoss(actor, reduction="none")(TensorDict({"trace": trace}, [1]))
    torch.testing.assert_close(
        out["loss_imitation"][0], -rollout["action_log_prob"], rtol=1e-4, atol=1e-4
    )


def test_deterministic_and_value_based_actors():
    data = make_traces(B, T)
    mask = data["trace", "collector", "mask"]
    actor = TensorDictSequential(make_memory("lstm"), head("action"))
    loss = RecallTraceLoss(actor, loss_function="mse", reduction="none")
    found = loss(data)["loss_imitation"]
    cell, linear = cell_of(actor), actor[1].module
    for row, kept, error in zip(data["trace"], mask, found, strict=True):
        if kept.any():
            action = linear(cell(row["observation"][kept].unsqueeze(0))[0])[0]
            expected = (action - row["action"][kept]).square().mean(-1)
            torch.testing.assert_close(error[kept], expected)

    spec = OneHot(2)
    values = QValueModule(action_space=None, spec=spec)
    actor = TensorDictSequential(make_memory("gru"), head("action_value"), values)
    data["trace", "action"] = spec.rand((B, T))
    loss = RecallTraceLoss(actor, loss_function="cross_entropy", reduction="none")
    found = loss(data)["loss_imitation"]
    cell, linear = cell_of(actor), actor[1].module
    for row, kept, error in zip(data["trace"], mask, found, strict=True):
        if kept.any():
            logits = linear(cell(row["observation"][kept].unsqueeze(0))[0])[0]
            expected = nn.functional.cross_entropy(
                logits, row["action"][kept].int().argmax(-1), reduction="none"
            )
            torch.testing.assert_close(error[kept], expected)


def test_copied_and_with_nothing_kept():
    data = make_traces(B, T)
    loss = RecallTraceLoss(make_actor("lstm"))
    expected = loss(data)["loss_imitation"]
    assert torch.equal(copy.deepcopy(loss)(data)["loss_imitation"], expected)
    data["trace", "collector", "mask"][:] = False
    assert loss(data)["loss_imitation"] == 0


# Of torch, where one graph is within another.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled():
    """In one graph where the memory is written in Python; others break it (TorchRL 0.14.1)."""
    data = make_traces(B, T)
    loss = RecallTraceLoss(make_actor("lstm", python_based=True, recurrent_backend="scan"))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(data)["loss_imitation"], loss(data)["loss_imitation"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.backward()
    assert all(bool(p.grad.isfinite().all()) for p in loss.parameters())


def test_beside_ppo_in_a_pipeline():
    """A recurrent policy and critic: PPO on slices, recall traces on states."""
    env = TransformedEnv(GymEnv("Pendulum-v1"), InitTracker())
    actor = make_actor("lstm", actions=1)
    env.append_transform(actor.module[0].module[0].make_tensordict_primer())
    embedded = TensorDictModule(nn.Linear(HIDDEN, 1), ["embedding"], ["state_value"])
    critic = TensorDictSequential(actor.module[0].module[0], embedded)
    ppo, advantage = (
        ClipPPOLoss(actor, critic),
        GAE(gamma=0.99, lmbda=0.95, value_network=critic, shifted=True),
    )
    model = BacktrackModel.from_env(env, num_cells=(8,))
    assert model.observation_keys == ["observation"]
    assert model.stop_network is not None
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(200),
        sampler=ValuePrioritizedSampler(200),
        priority_key="value_target",
        transform=BacktrackTransform(model, num_steps=T),
        batch_size=8,
    )
    recall_loss = RecallTraceLoss(actor)
    optimizer = torch.optim.Adam(ppo.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in actor.parameters()]
    collector = Collector(env, actor, frames_per_batch=50, total_frames=100)
    for data in collector:
        with torch.no_grad(), set_recurrent_mode(True):
            advantage(data)
        buffer.extend(data.reshape(-1))
        losses = ppo(data).update(recall_loss(buffer.sample()))
        optimizer.zero_grad()
        sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
        optimizer.step()
        assert losses["loss_imitation"].isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))

    # Values of stored steps go by the hidden states that were stored with them, each step its own.
    expected = [
        step["next", "reward"] + 0.99 * critic(step["next"].clone().unsqueeze(0))["state_value"][0]
        for step in buffer.storage[:]
    ]
    with set_recurrent_mode(True):
        found = transition_value(buffer, critic, gamma=0.99)
        ValueRefresh(buffer, critic, gamma=0.99)()
    torch.testing.assert_close(found, torch.cat(expected).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(buffer.sampler.values[: len(found)], found)


class Carrying(nn.Module):
    """A memory of somebody's own."""

    def forward(self, observation, memory):
        return observation[..., :2] + memory, memory + 1


def test_refusals():
    data = make_traces(B, T)
    bidirectional = make_actor("lstm", bidirectional=True)
    with pytest.raises(ValueError, match="actor is bidirectional"):
        RecallTraceLoss(bidirectional)
    own = TensorDictModule(Carrying(), ["observation", "memory"], ["action", ("next", "memory")])
    with pytest.raises(KeyError, match="'memory' is missing from the trace"):
        RecallTraceLoss(own, loss_function="mse")(data)
    step = TensorDict({"observation": torch.randn(WIDTH), "action": torch.zeros(2)})
    loss = RecallTraceLoss(make_actor("gru"))
    with pytest.raises(ValueError, match="no time dimension"):
        loss(TensorDict({"trace": step}))
    critic = TensorDictSequential(make_memory("gru"), head("state_value", actions=1))
    with pytest.raises(TypeError, match="critic is recurrent"):
        AdvantageWeight(critic, gamma=0.9)
    plain = TensorDictModule(nn.Linear(WIDTH, 2), ["observation"], ["action_value"])
    with pytest.raises(TypeError, match="actor is recurrent"):
        QValueWeight(plain, actor=make_actor("lstm"))
    after = {"observation": torch.zeros(2, WIDTH), "reward": torch.zeros(2)}
    after["terminated"] = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(KeyError, match="recurrent_state"):
        transition_value(TensorDict({"next": after}, [2]), critic, gamma=0.9)


def test_the_paper_form_with_a_model():
    actor, model = make_actor("gru"), make_model()
    both = transitions(B).update(make_traces(B, T))
    out = RecallTraceLoss(actor, model)(both)
    (out["loss_imitation"] + out["loss_backtrack"]).backward()
    assert all(p.grad is not None for p in [*actor.parameters(), *model.parameters()])

"""Imitation by policies without log-probability: against TorchRL's behaviour cloning, by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from loss_contract import LossContract
from loss_data import ACTIONS, WIDTH, close, gradients, make_actor, recall, same, steps
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, Unbounded
from torchrl.modules import QValueActor
from torchrl.objectives import DDPGLoss, TD3Loss
from torchrl.objectives.bc import BCLoss
from weight_data import make_critic

from torchrl_recall import AdvantageWeight, RecallTraceLoss
from torchrl_recall.imitation.distance import action_distance, value_distance


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_plain(keys=("observation",), out="action", shape=(ACTIONS,)):
    size = torch.Size(shape).numel()
    net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, size))
    return TensorDictModule(nn.Sequential(net, nn.Unflatten(-1, shape)), list(keys), [out])


class Cloning(BCLoss):
    """TorchRL's, with the annotation whose absence it warns of."""

    target_actor_network_params: object


class TestDistanceContract(LossContract):
    def make(self, **kwargs):
        spec = Bounded(-2.0, 3.0, (ACTIONS,))
        return RecallTraceLoss(make_plain(), loss_function="mse", action_spec=spec, **kwargs)

    def data(self, *batch):
        return recall(*batch, 5)

    def mask(self, data, key):
        return data["trace", "collector", "mask"]

    def networks(self, loss):
        return [loss.actor_network]


class TestBehaviourCloning:
    @pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1"])
    @pytest.mark.parametrize("batch", [(6,), (4, 5), (3, 2, 5)])
    @pytest.mark.parametrize("policy", ["deterministic", "stochastic"])
    def test_value_and_gradient(self, name, batch, policy):
        actor = make_plain() if policy == "deterministic" else make_actor()
        twin, data = copy.deepcopy(actor), recall(*batch)
        out = RecallTraceLoss(actor, loss_function=name)(data)
        # Its mean is over the entries of all actions: the same, each action having as many.
        expected = Cloning(twin, loss_function=name)(steps(data))["loss_bc"]
        close(out["loss_imitation"], expected, rtol=1e-6, atol=1e-7)
        close(out["trace_distance"], expected, rtol=1e-6, atol=1e-7)
        assert "trace_log_prob" not in out
        out["loss_imitation"].backward()
        expected.backward()
        for a, b in zip(gradients(actor), gradients(twin), strict=True):
            close(a, b, rtol=1e-6, atol=1e-7)

    def test_units_of_half_the_range(self):
        """By hand: errors of 1 and 4 in half ranges of 1 and 2: (1 + 4) / 2."""
        low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])
        spec, actor = Bounded(low, high), make_plain()
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.zero_()
        action = torch.tensor([[1.0, 4.0]])
        data = TensorDict({"trace": {"observation": torch.zeros(1, WIDTH), "action": action}}, [])
        data["trace"].batch_size = [1]
        loss = RecallTraceLoss(actor, loss_function="mse", action_spec=spec)
        assert loss(data)["loss_imitation"] == 2.5
        assert RecallTraceLoss(actor, loss_function="mse")(data)["loss_imitation"] == 8.5
        free = RecallTraceLoss(actor, loss_function="mse", action_spec=Unbounded(2))
        assert free(data)["loss_imitation"] == 8.5
        assert loss.to(torch.float64).half_range.dtype == torch.float64
        assert "half_range" not in loss.state_dict()

    def test_actions_of_two_dimensions(self):
        actor, data = make_plain(shape=(2, 3)), recall(4, 5)
        data["trace", "action"] = torch.rand(4, 5, 2, 3)
        spec = Bounded(-1.0, 3.0, (2, 3))
        rows = RecallTraceLoss(actor, loss_function="mse", action_spec=spec, reduction="none")(data)
        chosen = actor(data["trace"].select("observation"))["action"]
        expected = ((chosen - data["trace", "action"]) / 2).square().mean((-1, -2))
        kept = data["trace", "collector", "mask"]
        close(rows["loss_imitation"], torch.where(kept, expected, 0.0))


class TestMasks:
    @pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30])
    def test_junk_where_masked(self, junk):
        actor, data = make_plain(), recall(4, 5)
        loss = RecallTraceLoss(actor, loss_function="mse")
        value = loss(data)["loss_imitation"]
        value.backward()
        expected = gradients(actor)
        actor.zero_grad()
        kept = data["trace", "collector", "mask"]
        for key in ("observation", "action"):
            data["trace", key][~kept] = junk
        other = loss(data)["loss_imitation"]
        other.backward()
        assert value == other
        assert all(same(a, b) for a, b in zip(gradients(actor), expected, strict=True))

    def test_nothing_kept(self):
        actor, data = make_plain(), recall(4, 5)
        data["trace", "collector", "mask"] = torch.zeros(4, 5, dtype=torch.bool)
        out = RecallTraceLoss(actor, loss_function="mse")(data)
        assert out["loss_imitation"] == out["trace_distance"] == 0
        out["loss_imitation"].backward()
        assert all(same(p.grad, 0) for p in actor.parameters())

    def test_weights(self):
        actor, data = make_plain(), recall(4, 5)
        weight = AdvantageWeight(make_critic(), gamma=0.9)
        kept = data["trace", "collector", "mask"]
        plain = RecallTraceLoss(actor, loss_function="mse", reduction="none")(data)
        rows = weight(data["trace"], data, kept) * plain["loss_imitation"]
        out = RecallTraceLoss(actor, loss_function="mse", weight=weight)(data)
        close(out["loss_imitation"], rows.sum() / kept.sum())


@pytest.mark.parametrize("host", [TD3Loss, DDPGLoss])
def test_shares_the_actor_with_off_policy_losses(host):
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(WIDTH + ACTIONS, 1)

        def forward(self, observation, action):
            return self.net(torch.cat([observation, action], -1))

    actor = make_plain()
    critic = TensorDictModule(Critic(), ["observation", "action"], ["state_action_value"])
    options = {"bounds": (-1.0, 1.0)} if host is TD3Loss else {}
    other = host(actor, critic, **options)
    ours = RecallTraceLoss(actor, loss_function="mse", action_spec=Bounded(-1.0, 1.0, (ACTIONS,)))
    mine = {id(p) for p in ours.parameters()}
    assert mine <= {id(p) for p in other.parameters()}
    optimizer, data = torch.optim.SGD(other.parameters(), lr=0.1), recall(4, 5)
    before = ours(data)["loss_imitation"]
    before.backward()
    optimizer.step()
    assert ours(data)["loss_imitation"] < before


def test_keys():
    actor, data = make_plain(keys=[("agent", "obs")], out=("agent", "u")), recall(4, 5)
    loss = RecallTraceLoss(actor, loss_function="mse")
    loss.set_keys(action=("agent", "u"))
    trace = data["trace"]
    agent = {"obs": trace["observation"], "u": trace["action"]}
    inner = TensorDict({"agent": agent, "collector": trace["collector"]}, [4, 5])
    plain = make_plain()
    plain.load_state_dict(actor.state_dict())
    close(
        loss(TensorDict({"trace": inner}, [4]))["loss_imitation"],
        RecallTraceLoss(plain, loss_function="mse")(data)["loss_imitation"],
    )


def test_door():
    plain, data = make_plain(), recall(4, 5)
    with pytest.raises(TypeError, match=r"got TensorDictModule; imitate .* loss_function='mse'"):
        RecallTraceLoss(plain)
    with pytest.raises(ValueError, match=r"loss_function must be None or one of .*, got 'l7'"):
        RecallTraceLoss(plain, loss_function="l7")
    with pytest.raises(ValueError, match="action_spec is the unit of a loss_function"):
        RecallTraceLoss(make_actor(), action_spec=Bounded(-1.0, 1.0, (ACTIONS,)))
    with pytest.raises(TypeError, match="action_spec must be a TensorSpec, got tuple"):
        RecallTraceLoss(plain, loss_function="mse", action_spec=(-1.0, 1.0))
    spec = Bounded(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"action_spec has bounds .*, expected finite ones"):
        RecallTraceLoss(plain, loss_function="mse", action_spec=spec)
    with pytest.raises(TypeError, match="distances are of continuous actions"):
        RecallTraceLoss(plain, loss_function="mse", action_spec=Categorical(3))
    data["trace", "action"] = torch.rand(4, 5, 1)
    with pytest.raises(ValueError, match=r"action has shape \(4, 5, 1\), but the actor's has"):
        RecallTraceLoss(plain, loss_function="mse")(data)
    nameless = make_plain(out="u")
    with pytest.raises(KeyError, match=r"the actor writes no 'action', its keys are \['u'\]"):
        RecallTraceLoss(nameless, loss_function="mse")(recall(4, 5))


def test_classes_have_no_distance():
    actor, data = make_actor("categorical"), recall(4, 5, kind="categorical")
    with pytest.raises(
        TypeError, match=r"distances are of continuous actions, got torch\.int64; .*'margin'"
    ):
        RecallTraceLoss(actor, loss_function="mse")(data)


def test_an_actor_of_values_is_told_its_losses():
    actor = QValueActor(nn.Linear(3, 2), in_keys=["observation"], action_space="categorical")
    with pytest.raises(TypeError, match=r"with one of values \(DQN\) by 'margin'"):
        RecallTraceLoss(actor)


def test_distance_of_scalar_actions():
    rows = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    got = action_distance("mse", *rows, None, torch.Size([1, 2]))
    assert got.tolist() == [[1.0, 4.0]]


class TestValues:
    """Policies that take the best of all actions' values."""

    VALUES = ((1.0, 0.5, -1.0), (0.0, 2.0, 1.5))

    @pytest.mark.parametrize("name", ["margin", "cross_entropy"])
    @pytest.mark.parametrize("one_hot", [False, True])
    def test_by_hand(self, name, one_hot):
        values = torch.tensor(self.VALUES, dtype=torch.float64)
        index = torch.tensor([1, 1])
        action = nn.functional.one_hot(index, 3) if one_hot else index
        if name == "margin":  # 1 + .8 beats .5 by 1.3; 2 leads 1.5 + .8 by -.3
            expected = torch.tensor([1.3, 0.3], dtype=torch.float64)
        else:
            expected = nn.functional.cross_entropy(values, index, reduction="none")
        close(value_distance(name, values, action, 0.8), expected)

    def test_no_gradient_where_the_action_leads_by_the_margin(self):
        values = torch.tensor([[2.0, 1.0], [1.0, 1.5]], requires_grad=True)
        value_distance("margin", values, torch.tensor([0, 0]), 0.8).sum().backward()
        same(values.grad, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))

    @pytest.mark.parametrize("action", [torch.zeros(2), torch.zeros(2, 2).long()])
    def test_refusals(self, action):
        with pytest.raises(ValueError, match="the trace's action has shape"):
            value_distance("margin", torch.zeros(2, 3), action, 0.8)
        with pytest.raises(ValueError, match="margin must lie in"):
            RecallTraceLoss(make_plain(), loss_function="margin", margin=-1.0)
        data = recall(6, 5)
        with pytest.raises(KeyError, match="the actor writes no 'action_value'"):
            RecallTraceLoss(make_plain(), loss_function="margin")(data)

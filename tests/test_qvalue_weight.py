"""`QValueWeight`: against the formula written out, with the Q-networks of TorchRL's losses."""

from __future__ import annotations

import pytest
import torch
from loss_data import ACTIONS, CLASSES, WIDTH, close, gradients, make_actor, recall
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator
from torchrl.objectives import A2CLoss, DiscreteSACLoss, SACLoss, TD3Loss
from weight_data import WeightedContract, make_critic, weigh

from torchrl_recall import QValueWeight, RecallTraceLoss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Pair(nn.Module):
    """Q(s, a) of state and action side by side."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH + ACTIONS, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


def make_q():
    return ValueOperator(Pair(), in_keys=["observation", "action"])


def make_all_actions():
    net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return TensorDictModule(net, ["observation"], ["action_value"])


class TestQValueContract(WeightedContract):
    @pytest.fixture(autouse=True)
    def _networks_of_the_weight(self, _seed):
        self.critic = make_q()
        self.policy = make_actor()

    def make(self, **kwargs):
        weight = QValueWeight(self.critic, actor=self.policy)
        return RecallTraceLoss(make_actor(), weight=weight, **kwargs)

    def test_float64(self):
        self.policy.to(torch.float64)
        super().test_float64()


class TestPairs:
    @pytest.mark.parametrize("kind", ["tanh", "normal"])
    @pytest.mark.parametrize("gate", [False, True])
    @pytest.mark.parametrize("batch", [(4, 5), (3, 2, 5)])
    def test_formula(self, kind, gate, batch):
        q, actor, data = make_q(), make_actor(kind), recall(*batch, kind=kind)
        state, action = data["trace", "observation"], data["trace", "action"]
        scaled = actor.get_dist(TensorDict({"observation": state}, batch))
        own = scaled.deterministic_sample if kind == "tanh" else scaled.mean
        advantage = (q.module(state, action) - q.module(state, own)).squeeze(-1)
        expected = (advantage > 0).float() if gate else advantage.clamp_min(0)
        got = weigh(QValueWeight(q, actor=actor, gate=gate), data)
        kept = data["trace", "collector", "mask"]
        close(got[kept], expected[kept])
        assert 0 < (got[kept] > 0).sum() < kept.sum()
        assert not got.requires_grad

    def test_by_hand(self):
        """Q(s, a) = -(a - s)²; the policy plays 0."""
        q = TensorDictModule(
            lambda s, a: -((a - s) ** 2), ["observation", "action"], ["state_action_value"]
        )
        actor = TensorDictModule(torch.zeros_like, ["observation"], ["action"])
        state = torch.tensor([[[1.0], [1.0], [2.0]]])
        action = torch.tensor([[[0.5], [-1.0], [2.0]]])
        trace = TensorDict({"observation": state, "action": action}, [1, 3])
        trace["collector", "mask"] = torch.ones(1, 3) > 0
        data = TensorDict({"trace": trace}, [1])
        assert weigh(QValueWeight(q, actor=actor), data).tolist() == [[0.75, 0.0, 4.0]]
        assert weigh(QValueWeight(q, actor=actor, gate=True), data).tolist() == [[1.0, 0.0, 1.0]]
        critic = TensorDictModule(lambda s: -s, ["observation"], ["state_value"])
        assert weigh(QValueWeight(q, critic=critic), data).tolist() == [[0.75, 0.0, 2.0]]

    def test_gradient_reaches_the_policy_by_its_log_probability_alone(self):
        q, actor, data = make_q(), make_actor(), recall(4, 5)
        weight = QValueWeight(q, actor=actor)
        RecallTraceLoss(actor, weight=weight)(data)["loss_imitation"].backward()
        got = gradients(actor)
        trace, kept = data["trace"], data["trace", "collector", "mask"]
        log_prob = actor.get_dist(trace.select("observation")).log_prob(trace["action"])
        value = -(weigh(weight, data) * log_prob)[kept].mean()
        for a, b in zip(got, torch.autograd.grad(value, list(actor.parameters())), strict=True):
            close(a, b, rtol=1e-5, atol=1e-6)
        assert all(p.grad is None for p in q.parameters())

    def test_a_sampled_action_of_the_policy(self):
        """TorchRL's switch of a loss decides: the mean by default, a sample if asked for."""
        actor, data = make_actor(), recall(4, 5, mask=False)
        loss = RecallTraceLoss(actor, weight=QValueWeight(make_q(), actor=actor))
        first, second = loss(data)["trace_weight"], loss(data)["trace_weight"]
        assert first == second
        loss.deterministic_sampling_mode = ExplorationType.RANDOM
        assert loss(data)["trace_weight"] != loss(data)["trace_weight"]

    @pytest.mark.parametrize("kind", ["tanh", "normal"])
    def test_called_directly(self, kind):
        """Without a loss around it: no chance, and the numbers of the loss, unless asked for."""
        q, actor, data = make_q(), make_actor(kind), recall(4, 5, kind=kind, mask=False)
        weight = QValueWeight(q, actor=actor)
        trace, kept = data["trace"], torch.ones(4, 5, dtype=torch.bool)
        first = weight(trace, data, kept)
        close(first, weight(trace, data, kept), rtol=0, atol=0)
        within = RecallTraceLoss(actor, weight=weight)(data)["trace_weight"]
        close(first.mean(), within)
        with set_exploration_type(ExplorationType.RANDOM):
            assert not torch.equal(weight(trace, data, kept), weight(trace, data, kept))

    def test_junk_where_masked(self):
        q, actor, data = make_q(), make_actor(), recall(4, 5)
        loss = RecallTraceLoss(actor, weight=QValueWeight(q, actor=actor))
        value = loss(data)["loss_imitation"]
        kept = data["trace", "collector", "mask"]
        for key in ("observation", "action", ("next", "observation")):
            data["trace", key][~kept] = torch.nan
        other = loss(data)["loss_imitation"]
        other.backward()
        assert value == other
        assert value != 0
        assert all(torch.isfinite(p.grad).all() for p in actor.parameters())


class TestAllActions:
    @pytest.mark.parametrize("kind", ["categorical", "one_hot"])
    @pytest.mark.parametrize("gate", [False, True])
    def test_formula(self, kind, gate):
        q, actor, data = make_all_actions(), make_actor(kind), recall(4, 5, kind=kind)
        got = weigh(QValueWeight(q, actor=actor, gate=gate), data)
        trace = data["trace"]
        for i in range(4):
            for t in range(5):
                if not trace["collector", "mask"][i, t]:
                    continue
                state, action = trace["observation"][i, t], trace["action"][i, t]
                index = action if kind == "categorical" else action.argmax()
                values = q.module(state)
                probability = actor.get_dist(TensorDict({"observation": state})).probs
                gap = values[index] - sum(p * v for p, v in zip(probability, values, strict=True))
                close(got[i, t], (gap > 0).float() if gate else gap.clamp_min(0))

    def test_critic(self):
        q, critic = make_all_actions(), make_critic()
        data = recall(4, 5, kind="categorical", mask=False)
        trace = data["trace"]
        values = q.module(trace["observation"])
        taken = values.gather(-1, trace["action"].unsqueeze(-1)).squeeze(-1)
        expected = taken - critic.module(trace["observation"]).squeeze(-1)
        close(weigh(QValueWeight(q, critic=critic), data), expected.clamp_min(0))

    def test_indices_with_a_last_dimension(self):
        q, critic = make_all_actions(), make_critic()
        data = recall(4, 5, kind="categorical", mask=False)
        expected = weigh(QValueWeight(q, critic=critic), data)
        data["trace", "action"] = data["trace", "action"].unsqueeze(-1)
        close(weigh(QValueWeight(q, critic=critic), data), expected)

    def test_wrong_action(self):
        data = recall(4, 5, mask=False)
        with pytest.raises(ValueError, match=r"'action' has shape \(4, 5, 2\) and .* one-hot rows"):
            weigh(QValueWeight(make_all_actions(), critic=make_critic()), data)


class TestNetworksOfLosses:
    """SAC and others train copies; the weight follows those."""

    def make(self, which):
        if which == "discrete":
            actor = make_actor("one_hot")
            options = {"action_space": "one-hot", "num_actions": CLASSES}
            return DiscreteSACLoss(
                actor_network=actor, qvalue_network=make_all_actions(), **options
            ), actor
        actor = make_actor()
        if which == "td3":
            bounds = torch.tensor([-1.0, 1.0])
            plain = TensorDictModule(nn.Linear(WIDTH, ACTIONS), ["observation"], ["action"])
            return TD3Loss(plain, make_q(), bounds=bounds.tolist()), actor
        return SACLoss(actor, make_q(), num_qvalue_nets=3), actor

    @pytest.mark.parametrize("which", ["sac", "td3", "discrete"])
    def test_the_smallest_of_the_copies_as_they_are_now(self, which):
        host, actor = self.make(which)
        kind = "one_hot" if which == "discrete" else "tanh"
        data = recall(4, 5, kind=kind, mask=False)
        weight = QValueWeight(host, actor=actor)
        before = weigh(weight, data)
        with torch.no_grad():
            for parameter in host.qvalue_network_params.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        got = weigh(weight, data)
        assert not torch.equal(got, before)
        trace = data["trace"]
        states = trace.select("observation")

        def smallest(inputs, key):
            copies = []
            for k in range(len(host.qvalue_network_params)):
                net = make_all_actions() if which == "discrete" else make_q()
                host.qvalue_network_params[k].data.to_module(net)
                copies.append(net(inputs.copy())[key])
            return torch.stack(copies).min(0).values

        if which == "discrete":
            values = smallest(states, "action_value")
            taken = (values * trace["action"]).sum(-1)
            expected = taken - (actor.get_dist(states).probs * values).sum(-1)
        else:
            own = actor(states.copy())["action"]
            pair = smallest(trace.select("observation", "action"), "state_action_value")
            mine = smallest(states.copy().set("action", own), "state_action_value")
            expected = (pair - mine).squeeze(-1)
        close(got, expected.clamp_min(0))

    def test_the_user_s_network_is_not_what_sac_trains(self):
        """Why the loss itself is to be passed."""
        q, actor = make_q(), make_actor()
        host = SACLoss(actor, q)
        mine = {id(p) for p in q.parameters()}
        assert not mine & {id(p) for p in host.parameters()}

    def test_beside_sac(self):
        host, actor = self.make("sac")
        data = recall(4, 5)
        loss = RecallTraceLoss(actor, weight=QValueWeight(host, actor=actor))
        assert {id(p) for p in loss.parameters()} == {id(p) for p in actor.parameters()}
        loss(data)["loss_imitation"].backward()
        assert all(p.grad is None for p in host.qvalue_network_params.parameters())

    def test_a_loss_without_q(self):
        host = A2CLoss(make_actor(return_log_prob=True), make_critic())
        with pytest.raises(TypeError, match="is a A2CLoss, which has no qvalue_network"):
            QValueWeight(host, actor=make_actor())


class TestDoor:
    def test_arguments(self):
        with pytest.raises(ValueError, match="expected one of actor and critic"):
            QValueWeight(make_q())
        with pytest.raises(ValueError, match="expected one of actor and critic"):
            QValueWeight(make_q(), actor=make_actor(), critic=make_critic())
        with pytest.raises(TypeError, match="qvalue_network must be a TensorDictModule, got Pair"):
            QValueWeight(Pair(), critic=make_critic())
        with pytest.raises(TypeError, match="actor must be a TensorDictModule, got Linear"):
            QValueWeight(make_q(), actor=nn.Linear(1, 1))

    def test_outputs(self):
        data = recall(4, 5)
        nameless = TensorDictModule(nn.Linear(WIDTH, ACTIONS), ["observation"], ["u"])
        with pytest.raises(KeyError, match="the actor writes no 'action'"):
            weigh(QValueWeight(make_q(), actor=nameless), data)
        with pytest.raises(KeyError, match="the network writes no 'q'"):
            weigh(QValueWeight(make_q(), actor=make_actor()), data, state_action_value="q")
        q = make_q()
        with torch.no_grad():
            q.module.net[-1].bias.fill_(torch.nan)
        with pytest.raises(ValueError, match="'state_action_value' at kept steps must be finite"):
            weigh(QValueWeight(q, actor=make_actor()), data)
        greedy = TensorDictModule(nn.Linear(WIDTH, CLASSES), ["observation"], ["action"])
        with pytest.raises(TypeError, match="get_dist to weigh 'action_value', got TensorDictMod"):
            weigh(QValueWeight(make_all_actions(), actor=greedy), recall(4, 5, kind="categorical"))
        discrete = make_all_actions()
        with torch.no_grad():
            discrete.module[-1].bias[0] = torch.inf
        with pytest.raises(ValueError, match="'action_value' at kept steps must be finite"):
            weigh(QValueWeight(discrete, critic=make_critic()), recall(4, 5, kind="categorical"))

    def test_keys(self):
        q = ValueOperator(Pair(), in_keys=[("a", "o"), ("a", "u")], out_keys=[("a", "q")])
        actor = make_actor(keys=[("a", "o")], out_keys=[("a", "u")])
        loss = RecallTraceLoss(actor, weight=QValueWeight(q, actor=actor))
        loss.set_keys(action=("a", "u"), state_action_value=("a", "q"), trace=("r", "t"))
        assert loss.in_keys == [("r", "t", "a", "o"), ("r", "t", "a", "u")]
        data = recall(4, 5)
        trace = data["trace"]
        inner = {"o": trace["observation"], "u": trace["action"]}
        renamed = TensorDict({"a": inner, "collector": trace["collector"]}, [4, 5])
        got = loss(TensorDict({"r": {"t": renamed}}, [4]))
        plain_q = make_q()
        plain_q.module.load_state_dict(q.module.state_dict())
        plain = make_actor()
        plain.load_state_dict(actor.state_dict())
        plain_loss = RecallTraceLoss(plain, weight=QValueWeight(plain_q, actor=plain))
        expected = plain_loss(data)
        for key in plain_loss.out_keys:
            close(got[key], expected[key])

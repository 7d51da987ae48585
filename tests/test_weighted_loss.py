"""`RecallTraceLoss` with weights: against the expression on paper, and what is shared or owned."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from loss_data import WIDTH, close, gradients, make_actor, recall, same
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from weight_data import GAMMA, double, make_critic, weigh

from torchrl_recall import AdvantageWeight, RecallTraceLoss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestWeightedLoss:
    def expression(self, actor, data, weight):
        """The loss as it is written on paper, and its gradient."""
        trace = data["trace"]
        log_prob = actor.get_dist(trace.select("observation")).log_prob(trace["action"])
        kept = trace["collector", "mask"].double()
        value = -(weight.detach() * kept * log_prob).sum() / kept.sum()
        return value, torch.autograd.grad(value, list(actor.parameters()))

    @pytest.mark.parametrize("batch", [(4, 5), (3, 2, 5)])
    @pytest.mark.parametrize("gate", [False, True])
    def test_value_and_gradient(self, batch, gate):
        actor, critic = make_actor().double(), make_critic(dtype=torch.float64)
        data = double(recall(*batch))
        weight = AdvantageWeight(critic, gamma=GAMMA, gate=gate)
        value, expected = self.expression(actor, data, weigh(weight, data))
        out = RecallTraceLoss(actor, weight=weight)(data)
        out["loss_imitation"].backward()
        close(out["loss_imitation"], value, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients(actor), expected, strict=True):
            close(a, b, rtol=1e-10, atol=1e-12)
        assert all(p.grad is None for p in critic.parameters())
        kept = data["trace", "collector", "mask"]
        close(out["trace_weight"], weigh(weight, data)[kept].mean())
        close(out["trace_open"], (weigh(weight, data)[kept] > 0).double().mean())
        assert 0 < out["trace_open"] < 1

    def test_discount(self):
        actor, data = make_actor().double(), double(recall(4, 5))
        weight = 0.5 ** torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]).double().expand(4, 5)
        value, expected = self.expression(actor, data, weight)
        out = RecallTraceLoss(actor, discount=0.5)(data)
        out["loss_imitation"].backward()
        close(out["loss_imitation"], value, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients(actor), expected, strict=True):
            close(a, b, rtol=1e-10, atol=1e-12)
        close(out["trace_weight"], weight[data["trace", "collector", "mask"]].mean())
        last = RecallTraceLoss(actor, discount=0.0, reduction="none")(data)["loss_imitation"]
        assert same(last[:, :-1], 0)

    def test_both_multiply(self):
        data, weight = recall(4, 5), AdvantageWeight(make_critic(), gamma=GAMMA)
        actor = make_actor()
        plain = RecallTraceLoss(actor, reduction="none")(data)["loss_imitation"]
        got = RecallTraceLoss(actor, weight=weight, discount=0.5, reduction="none")(data)
        factor = 0.5 ** torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
        close(got["loss_imitation"], plain * weigh(weight, data) * factor)

    def test_normalized_weights_average_to_one(self):
        data, weight = recall(4, 5), AdvantageWeight(make_critic(), gamma=GAMMA)
        actor = make_actor()
        plain = RecallTraceLoss(actor, reduction="none")(data)["loss_imitation"]
        out = RecallTraceLoss(actor, weight=weight, normalize_weights=True)(data)
        kept = data["trace", "collector", "mask"]
        weights = weigh(weight, data) * kept
        close(out["loss_imitation"], (plain * weights).sum() / weights.sum())
        close(out["trace_weight"], weights.sum() / kept.sum())

    @pytest.mark.parametrize("options", [{}, {"normalize_weights": True}, {"discount": 0.5}])
    @pytest.mark.parametrize("gate", [False, True])
    def test_all_closed(self, gate, options):
        critic, actor, data = make_critic(), make_actor(), recall(4, 5)
        with torch.no_grad():
            critic.module[-1].bias.fill_(100.0)
        data["worth"] = torch.zeros(4)
        weight = AdvantageWeight(critic, gamma=GAMMA, gate=gate)
        loss = RecallTraceLoss(actor, weight=weight, **options)
        loss.set_keys(value="worth")
        out = loss(data)
        assert out["loss_imitation"] == out["trace_open"] == out["trace_weight"] == 0
        assert out["trace_kept"] > 0
        out["loss_imitation"].backward()
        assert all(same(p.grad, 0) for p in actor.parameters())

    def test_nothing_kept(self):
        data = recall(4, 5)
        data["trace", "collector", "mask"] = torch.zeros(4, 5, dtype=torch.bool)
        data["trace", "observation"] = torch.full((4, 5, WIDTH), torch.nan)
        weight = AdvantageWeight(make_critic(), gamma=GAMMA)
        out = RecallTraceLoss(make_actor(), weight=weight, discount=0.5)(data)
        assert out["loss_imitation"] == out["trace_weight"] == out["trace_open"] == 0

    def test_the_critic_is_shared(self):
        critic, data = make_critic(), recall(4, 5)
        loss = RecallTraceLoss(make_actor(), weight=AdvantageWeight(critic, gamma=GAMMA))
        plain = RecallTraceLoss(make_actor())
        assert loss.state_dict().keys() == plain.state_dict().keys()
        mine = {id(p) for p in critic.parameters()}
        assert not mine & {id(p) for p in loss.parameters()}
        before = loss(data)["trace_weight"]
        with torch.no_grad():
            critic.module[-1].bias -= 1.0
        # The return holds one critic value, discounted; it moves less than the state's.
        assert loss(data)["trace_weight"] > before
        loss.to(torch.float64)
        assert all(p.dtype == torch.float32 for p in critic.parameters())

    def test_a_copy_has_its_own_critic(self):
        shared = make_critic()
        loss = RecallTraceLoss(make_actor(), weight=AdvantageWeight(shared, gamma=GAMMA))
        other, data = copy.deepcopy(loss), recall(4, 5)
        with torch.no_grad():
            shared.module[-1].bias += 5.0
        assert loss(data)["trace_weight"] < other(data)["trace_weight"]

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_in_a_copy_the_weight_follows_the_copy_s_actor(self, copied):
        actor = make_actor()
        loss = RecallTraceLoss(actor, weight=AdvantageWeight(make_critic(), gamma=GAMMA))
        loss.weight.actor = actor
        other = copied(loss)
        for one in (loss, other):
            mine = {id(p) for p in one.parameters()}
            assert mine == {id(p) for p in one.weight.actor.parameters()}
        assert not mine & {id(p) for p in loss.parameters()}
        assert other.state_dict().keys() == loss.state_dict().keys()
        close(other(data := recall(4, 5))["loss_imitation"], loss(data)["loss_imitation"])

    def test_keyword_tensors(self):
        data = recall(4, 5, mask=False)
        data["worth"] = torch.rand(4, 1) + 1
        loss = RecallTraceLoss(
            make_actor(), weight=AdvantageWeight(make_critic(), gamma=GAMMA), discount=0.9
        )
        loss.set_keys(value="worth")
        out = loss(data)
        value, *_ = loss(
            trace_observation=data["trace", "observation"],
            trace_action=data["trace", "action"],
            worth=data["worth"],
        )
        close(value, out["loss_imitation"])

    def test_a_weight_that_is_a_module_is_not_owned(self):
        class Learned(nn.Module):
            def __init__(self):
                super().__init__()
                self.factor = nn.Parameter(torch.tensor(2.0))

            def forward(self, trace, tensordict, kept, keys):
                return self.factor.expand(kept.shape)

        weight, data, actor = Learned(), recall(4, 5), make_actor()
        loss = RecallTraceLoss(actor, weight=weight)
        assert {id(p) for p in loss.parameters()} == {id(p) for p in actor.parameters()}
        out = loss(data)
        close(out["loss_imitation"], 2 * RecallTraceLoss(actor)(data)["loss_imitation"])
        out["loss_imitation"].backward()
        assert weight.factor.grad is None

    def test_wrong_weights(self):
        data = recall(4, 5)

        def narrow(trace, tensordict, kept, keys):
            return torch.ones(4, 1)

        def unsound(trace, tensordict, kept, keys):
            return torch.full(kept.shape, torch.nan)

        with pytest.raises(ValueError, match=r"function gave weights of shape \(4, 1\)"):
            RecallTraceLoss(make_actor(), weight=narrow)(data)
        with pytest.raises(ValueError, match="weight at kept steps must be finite"):
            RecallTraceLoss(make_actor(), weight=unsound)(data)
        one = TensorDict({"trace": recall(1, mask=False)["trace"][0]}, [])
        with pytest.raises(ValueError, match="trace has no time dimension"):
            RecallTraceLoss(make_actor(), discount=0.5)(one)

    def test_keys(self):
        actor, critic = make_actor(keys=[("agent", "obs")]), make_critic([("agent", "obs")])
        critic.out_keys = [("agent", "v")]
        loss = RecallTraceLoss(actor, weight=AdvantageWeight(critic, gamma=GAMMA))
        loss.set_keys(
            trace=("extra", "recall"),
            action=("agent", "u"),
            state_value=("agent", "v"),
            trace_reward=("next", "r"),
            trace_terminated=("next", "end"),
        )
        where = ("extra", "recall")
        assert loss.in_keys == [
            (*where, "agent", "obs"),
            (*where, "agent", "u"),
            (*where, "next", "agent", "obs"),
        ]
        data = recall(4, 5)
        trace = data["trace"]
        reward, end = torch.randn(4, 5), torch.rand(4, 5) < 0.2
        renamed = TensorDict(
            {
                "agent": {"obs": trace["observation"], "u": trace["action"]},
                "next": {"agent": {"obs": trace["next", "observation"]}, "r": reward, "end": end},
                "collector": trace["collector"],
            },
            [4, 5],
        )
        trace["next", "reward"], trace["next", "terminated"] = reward, end
        plain_actor, plain_critic = make_actor(), make_critic()
        plain_actor.load_state_dict(actor.state_dict())
        plain_critic.load_state_dict(critic.state_dict())
        plain = RecallTraceLoss(plain_actor, weight=AdvantageWeight(plain_critic, gamma=GAMMA))
        got = loss(TensorDict({"extra": {"recall": renamed}}, [4]))
        expected = plain(data)
        for key in plain.out_keys:
            close(got[key], expected[key])
        loss.set_keys(value=("extra", "worth"))
        assert loss.in_keys[-1] == ("extra", "worth")

    def test_data_and_critic_of_two_dtypes(self):
        """The loss takes the policy's dtype, whatever the critic's is."""
        critic = TensorDictModule(lambda s: s.double().sum(-1), ["observation"], ["state_value"])
        loss = RecallTraceLoss(make_actor(), weight=AdvantageWeight(critic, gamma=GAMMA))
        assert loss(recall(4, 5))["loss_imitation"].dtype == torch.float32


# TorchRL's own, for any Trainer that is given an optimizer.
@pytest.mark.filterwarnings("ignore:The 'optimizer' hook stage will be:FutureWarning")
def test_coefficients_follow_a_schedule_in_a_trainer():
    """TorchRL's Trainer calls a hook after each batch, which sets the coefficient."""
    from torchrl.trainers import Trainer

    actor = make_actor()
    loss = RecallTraceLoss(actor)
    data = recall(4, 5)
    seen = []

    class Batches:
        requested_frames_per_batch, init_random_frames = 4, 0

        def __iter__(self):
            return iter([data.clone() for _ in range(5)])

        def set_seed(self, seed, static_seed=False):
            return seed

        def shutdown(self):
            pass

        def update_policy_weights_(self):
            pass

    trainer = Trainer(
        collector=Batches(),
        total_frames=20,
        frame_skip=1,
        optim_steps_per_batch=1,
        loss_module=loss,
        optimizer=torch.optim.SGD(actor.parameters(), lr=0.0),
        progress_bar=False,
    )

    def anneal():
        seen.append(loss.imitation_coeff.item())
        loss.imitation_coeff = 0.5 * loss.imitation_coeff.item()

    trainer.register_op("post_steps", anneal)
    first = loss(data)["loss_imitation"]
    trainer.train()
    assert seen == [1.0, 0.5, 0.25, 0.125, 0.0625]
    close(loss(data)["loss_imitation"], first / 32)
    assert loss.state_dict()["imitation_coeff"] == 1 / 32

"""`RecallTraceLoss`: against TorchRL's behaviour cloning, beside other losses, as a LossModule."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from loss_contract import LossContract
from loss_data import (
    ACTIONS,
    KINDS,
    WIDTH,
    close,
    gradients,
    make_actor,
    make_model,
    recall,
    same,
    steps,
    transitions,
)
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import distributions as D
from torch import nn
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, SACLoss
from torchrl.objectives.bc import BCLoss

from torchrl_recall import BacktrackLoss, BacktrackModel, BacktrackTransform, RecallTraceLoss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestRecallTraceLossContract(LossContract):
    def make(self, **kwargs):
        return RecallTraceLoss(make_actor(), **kwargs)

    def data(self, *batch):
        return recall(*batch, 5)

    def mask(self, data, key):
        return data["trace", "collector", "mask"]

    def networks(self, loss):
        return [loss.actor_network]


class TestBothContract(TestRecallTraceLossContract):
    """`RecallTraceLoss` that also fits the model on the batch's real transitions."""

    def make(self, **kwargs):
        return RecallTraceLoss(make_actor(), make_model(), **kwargs)

    def data(self, *batch):
        return super().data(*batch).update(transitions(*batch))

    def mask(self, data, key):
        if key == "loss_imitation":
            return data["trace", "collector", "mask"]
        return torch.ones(data.shape, dtype=torch.bool)

    def networks(self, loss):
        return [loss.actor_network, loss.backtrack.model]


class TestRecallTraceLoss:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("batch", [(6,), (4, 5), (3, 2, 5)])
    def test_imitation_is_behaviour_cloning_of_the_kept_steps(self, kind, batch):
        actor, data = make_actor(kind), recall(*batch, kind=kind)
        out = RecallTraceLoss(actor)(data)
        real = steps(data)
        if kind == "categorical":
            expected = -actor.get_dist(real).log_prob(real["action"]).mean()
        else:
            expected = cloning(actor)(real)["loss_bc"]
        close(out["loss_imitation"], expected)
        close(out["trace_log_prob"], -expected)
        assert out["trace_kept"] == data["trace", "collector", "mask"].float().mean()
        assert not out["trace_log_prob"].requires_grad

    def test_without_a_mask_everything_counts(self):
        actor, data = make_actor(), recall(4, 5).exclude(("trace", "collector"))
        expected = cloning(actor)(data["trace"].reshape(-1))["loss_bc"]
        out = RecallTraceLoss(actor)(data)
        close(out["loss_imitation"], expected)
        assert out["trace_kept"] == 1

    def test_one_step(self):
        data = TensorDict({"trace": recall(1, mask=False)["trace"][0]}, [])
        out = RecallTraceLoss(make_actor())(data)
        assert torch.isfinite(out["loss_imitation"])
        assert out["loss_imitation"].shape == ()

    @pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30, -99.0])
    @pytest.mark.parametrize("kind", KINDS)
    def test_masked_steps_count_for_nothing(self, kind, junk):
        actor, data = make_actor(kind), recall(4, 5, kind=kind)
        loss = RecallTraceLoss(actor)
        value = loss(data)["loss_imitation"]
        value.backward()
        expected = gradients(actor)
        actor.zero_grad()
        trace = data["trace"]
        masked = ~trace["collector", "mask"]
        for key in ("observation", "action", ("next", "observation")):
            fill = junk if trace[key].is_floating_point() else -99
            trace[key][masked] = torch.full_like(trace[key][masked], fill)
        other = loss(data)["loss_imitation"]
        other.backward()
        assert value == other
        assert all(same(a, b) for a, b in zip(gradients(actor), expected, strict=True))

    @pytest.mark.parametrize("junk", [0.0, torch.nan, -99.0])
    @pytest.mark.parametrize("kind", [*KINDS, "torch's one-hot, which refuses other rows"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_nothing_kept(self, kind, junk, reduction):
        actor, data = make_actor(kind), recall(4, 5, kind=kind)
        for key in ("observation", "action"):
            fill = junk if data["trace", key].is_floating_point() else -99
            data["trace", key] = torch.full_like(data["trace", key], fill)
        data["trace", "collector", "mask"] = torch.zeros(4, 5, dtype=torch.bool)
        out = RecallTraceLoss(actor, reduction=reduction)(data)
        assert same(out["loss_imitation"], 0)
        assert out["loss_imitation"].shape == ((4, 5) if reduction == "none" else ())
        assert out["trace_kept"] == out["trace_log_prob"] == 0
        out["loss_imitation"].sum().backward()
        assert all(same(p.grad, 0) for p in actor.parameters())

    def test_non_finite_kept_steps_are_refused(self):
        data = recall(4, 5)
        data["trace", "observation"][0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="'observation' at kept steps must be finite"):
            RecallTraceLoss(make_actor())(data)

    def test_no_gradient_through_a_trace(self):
        model, actor = make_model(), make_actor()
        data = recall(4, 5)
        for key in ("observation", "action"):
            data["trace", key] = data["trace", key].requires_grad_()
        RecallTraceLoss(actor)(data)["loss_imitation"].backward()
        assert data["trace", "observation"].grad is None
        assert data["trace", "action"].grad is None
        data = BacktrackTransform(model, num_steps=4)(transitions(5))
        out = RecallTraceLoss(actor, model)(data)
        out["loss_imitation"].backward(retain_graph=True)
        assert all(p.grad is None for p in model.parameters())
        actor.zero_grad()
        out["loss_backtrack"].backward()
        assert all(p.grad is not None for p in model.parameters())
        assert all(p.grad is None for p in actor.parameters())

    def test_with_a_model(self):
        model, actor = make_model(), make_actor()
        twin = copy.deepcopy(model)
        data = BacktrackTransform(model, num_steps=4)(transitions(5))
        out = RecallTraceLoss(actor, model, backtrack_coeff=0.5)(data)
        expected = BacktrackLoss(twin)(data)
        close(out["loss_backtrack"], 0.5 * expected["loss_backtrack"])
        close(out["backtrack_action_log_prob"], expected["backtrack_action_log_prob"])
        close(out["loss_imitation"], RecallTraceLoss(actor)(data)["loss_imitation"])

    def test_coefficients_are_set_in_place(self):
        loss = RecallTraceLoss(make_actor(), make_model(), imitation_coeff=0.5)
        data = BacktrackTransform(loss.backtrack.model, num_steps=4)(transitions(5))
        loss.eval()
        before = loss(data)
        buffer = loss.imitation_coeff
        loss.imitation_coeff, loss.backtrack_coeff = 0.25, 3
        assert loss.imitation_coeff is buffer
        after = loss(data)
        close(after["loss_imitation"], before["loss_imitation"] / 2)
        close(after["loss_backtrack"], before["loss_backtrack"] * 3)
        close(after["trace_log_prob"], before["trace_log_prob"])
        assert loss.state_dict()["imitation_coeff"] == 0.25

    @pytest.mark.parametrize("first", ["ours", "theirs"])
    @pytest.mark.parametrize("host", ["sac", "ppo"])
    def test_shares_the_actor_with_other_losses(self, host, first):
        actor = make_actor(return_log_prob=True)

        def theirs():
            if host == "ppo":
                return ClipPPOLoss(actor, ValueOperator(nn.Linear(WIDTH, 1)))
            critic = ValueOperator(nn.Linear(WIDTH + ACTIONS, 1), ["observation", "action"])
            critic.module = Concatenated(critic.module)
            return SACLoss(actor, critic, target_entropy=-1.0)

        if first == "ours":
            ours, other = RecallTraceLoss(actor), theirs()
        else:
            other = theirs()
            ours = RecallTraceLoss(actor)
        mine = {id(p) for p in ours.parameters()}
        assert mine == {id(p) for p in actor.parameters()}
        assert mine <= {id(p) for p in other.parameters()}
        ours.to(torch.float64)
        assert {id(p) for p in actor.parameters()} <= {id(p) for p in other.parameters()}
        ours.to(torch.float32)
        data = recall(4, 5)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        before = ours(data)["loss_imitation"]
        before.backward()
        optimizer.step()
        after = ours(data)["loss_imitation"]
        assert after < before
        close(after, RecallTraceLoss(actor)(data)["loss_imitation"])

    def test_keys(self):
        actor, data = make_actor(keys=[("agent", "obs")]), recall(4, 5)
        loss = RecallTraceLoss(actor)
        trace = data["trace"]
        loss.set_keys(trace=("extra", "recall"), action=("agent", "u"))
        assert loss.in_keys == [
            ("extra", "recall", "agent", "obs"),
            ("extra", "recall", "agent", "u"),
        ]
        agent = {"obs": trace["observation"], "u": trace["action"]}
        inner = TensorDict({"agent": agent, "collector": trace["collector"]}, [4, 5])
        moved = TensorDict({"extra": {"recall": inner}}, [4])
        close(
            loss(moved)["loss_imitation"],
            RecallTraceLoss(relabel(actor))(data)["loss_imitation"],
        )
        loss.set_keys(trace=None, action=None)
        assert loss.in_keys == [("trace", "agent", "obs"), ("trace", "action")]

    def test_keyword_tensors_of_equal_widths(self):
        net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), NormalParamExtractor())
        actor = ProbabilisticActor(
            TensorDictModule(net, ["observation"], ["loc", "scale"]),
            ["loc", "scale"],
            distribution_class=TanhNormal,
        )
        data = recall(4, 5, mask=False)
        data["trace", "action"] = torch.rand(4, 5, WIDTH)
        loss = RecallTraceLoss(actor)
        value, *_ = loss(
            trace_observation=data["trace", "observation"], trace_action=data["trace", "action"]
        )
        close(value, loss(data)["loss_imitation"])

    @pytest.mark.parametrize("kind", ["tanh", "normal"])
    def test_actions_on_their_bounds(self, kind):
        actor, data = make_actor(kind), recall(4, 5)
        data["trace", "action"] = torch.tensor([-1.0, 1.0]).expand(4, 5, 2)
        value = RecallTraceLoss(actor)(data)["loss_imitation"]
        value.backward()
        assert torch.isfinite(value)
        assert all(torch.isfinite(p.grad).all() for p in actor.parameters())

    def test_wrong_data(self):
        loss, data = RecallTraceLoss(make_actor()), recall(4, 5)
        with pytest.raises(KeyError, match=r"'trace' is missing.*BacktrackTransform"):
            loss(transitions(4))
        for key in ("observation", "action"):
            with pytest.raises(KeyError, match=f"'{key}' is missing from the trace"):
                loss(data.exclude(("trace", key)))
        with pytest.raises(ValueError, match="trace is empty"):
            loss(recall(0, 5, mask=False))

    def test_wrong_actors(self):
        plain = TensorDictModule(nn.Linear(WIDTH, ACTIONS), ["observation"], ["action"])
        with pytest.raises(TypeError, match=r"actor must be .* get_dist, got TensorDictModule"):
            RecallTraceLoss(plain)
        net = TensorDictModule(
            nn.Sequential(nn.Linear(WIDTH, 4), NormalParamExtractor()),
            ["observation"],
            ["loc", "scale"],
        )
        loose = ProbabilisticActor(net, ["loc", "scale"], distribution_class=D.Normal)
        with pytest.raises(ValueError, match=r"log_prob has shape \(4, 5, 2\)"):
            RecallTraceLoss(loose)(recall(4, 5))


class Concatenated(nn.Module):
    """A critic of observation and action side by side."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


class Cloning(BCLoss):
    """TorchRL's, with the annotation whose absence it warns of."""

    target_actor_network_params: object


def cloning(actor):
    return Cloning(actor)


def relabel(actor):
    """The same networks, reading ``"observation"``."""
    other = make_actor()
    other.load_state_dict(actor.state_dict())
    return other


def test_losses_of_a_lognormal_example():
    """One number by hand: a unit Gaussian policy and an action one standard deviation off."""
    net = nn.Linear(1, 2)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, NormalParamExtractor(scale_mapping="exp")),
            ["observation"],
            ["loc", "scale"],
        ),
        ["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    trace = TensorDict({"observation": torch.zeros(1, 2, 1), "action": torch.ones(1, 2, 1)}, [1, 2])
    out = RecallTraceLoss(actor)(TensorDict({"trace": trace}, [1]))
    assert out["loss_imitation"].item() == pytest.approx(0.5 + 0.5 * math.log(2 * math.pi))


def test_an_action_of_another_width_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ["loc", "scale"],
        distribution_class=TanhNormal,
    )
    transform = BacktrackTransform(BacktrackModel(3, 1, num_cells=(8,)), num_steps=2)
    batch = transform(TensorDict({"next": {"observation": torch.randn(4, 3)}}, [4]))
    message = r"'action' has shape \(4, 2, 1\), but the actor's .* actions of shape \(2,\)"
    with pytest.raises(ValueError, match=message):
        RecallTraceLoss(actor)(batch)


def test_a_trace_that_is_no_tensordict_is_refused():
    with pytest.raises(TypeError, match="'trace' must be a TensorDict, got Tensor"):
        RecallTraceLoss(make_actor())(TensorDict({"trace": torch.zeros(2)}, [2]))

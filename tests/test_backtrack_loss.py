"""`BacktrackLoss`: against torch.distributions, by its mask and its keys, and as a LossModule."""

from __future__ import annotations

import copy

import pytest
import torch
from loss_contract import LossContract
from loss_data import (
    CLASSES,
    KINDS,
    SPECS,
    WIDTH,
    close,
    gradients,
    make_actor,
    make_model,
    same,
    transitions,
)
from tensordict import TensorDict
from torch import distributions as D
from torch import nn
from torchrl.data import MultiCategorical

from torchrl_recall import BacktrackLoss, BacktrackModel, BacktrackTransform, RecallTraceLoss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestBacktrackLossContract(LossContract):
    def make(self, **kwargs):
        return BacktrackLoss(make_model(stop=True), **kwargs)

    def data(self, *batch):
        data = transitions(*batch)
        data["is_init"] = torch.rand(*batch, 1) < 0.5
        data["collector", "mask"] = torch.ones(batch, dtype=torch.bool)
        data["collector", "mask"].view(-1)[1:2] = False
        return data

    def mask(self, data, key):
        return data["collector", "mask"]

    def networks(self, loss):
        return [loss.model]

    def test_dispatch(self):
        # The keyword tensors carry no mask.
        original = self.data
        self.data = lambda *batch: original(*batch).exclude("collector")
        super().test_dispatch()


def normal(network, inputs, interval):
    loc, raw = network(inputs).chunk(2, -1)
    return loc, (interval[0] + (interval[1] - interval[0]) * torch.sigmoid(raw)).exp()


def by_hand(model, data):
    """``-log q(a|s') - log q(Δ|a,s')`` of a continuous model, from torch's distributions."""
    state, following, action = data["observation"], data["next", "observation"], data["action"]
    statistics = model.observation.normalizer
    features = (following - statistics.mean) / statistics.std
    loc, scale = normal(model.action_network, features, (-5.0, 2.0))
    if model.action.format != "continuous":
        index = action if model.action.format == "categorical" else action.argmax(-1)
        action = nn.functional.one_hot(index, CLASSES).float()
        prob = D.Categorical(logits=model.action_network(features)).log_prob(index)
        inputs = action
    elif hasattr(model.action.head, "normalizer"):
        head = model.action.head.normalizer
        base = D.Normal(loc * head.std + head.mean, scale * head.std)
        prob, inputs = base.log_prob(action).sum(-1), (action - head.mean) / head.std
    else:
        base = D.TransformedDistribution(D.Normal(loc, scale), [D.TanhTransform()])
        prob, inputs = base.log_prob(action).sum(-1), action
    loc, scale = normal(model.delta_network, torch.cat([features, inputs], -1), (-6.0, 2.0))
    change = model.delta_head.normalizer
    delta = D.Normal(loc * change.std + change.mean, scale * change.std)
    return -prob - delta.log_prob(state - following).sum(-1)


class TestBacktrackLoss:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("batch", [(), (6,), (2, 5)])
    def test_value(self, kind, batch):
        model = make_model(SPECS[kind])
        loss, data = BacktrackLoss(model), transitions(*batch, kind=kind)
        loss(transitions(9, kind=kind))
        value = loss(data)["loss_backtrack"]
        close(value, by_hand(model, data).mean())
        out = loss.eval()(data)
        close(out["loss_backtrack"], model.eval().log_prob(data).neg().mean())
        logs = out["backtrack_action_log_prob"] + out["backtrack_delta_log_prob"]
        close(out["loss_backtrack"], -logs)

    @pytest.mark.parametrize("shape", [(6,), (6, 1)])
    def test_stop_head(self, shape):
        model = make_model(stop=True)
        loss, data = BacktrackLoss(model, reduction="none").eval(), transitions(6)
        is_init = torch.tensor([True, False, False, True, False, False])
        data["is_init"] = is_init.reshape(shape)

        def stop(observation):
            return torch.sigmoid(model.stop_network(observation).squeeze(-1))

        expected = by_hand(model, data) - (1 - stop(data["next", "observation"])).log()
        expected -= torch.where(is_init, stop(data["observation"]).log(), 0.0)
        out = loss(data)
        close(out["loss_backtrack"], expected)
        close(out["backtrack_stop_log_prob"], (1 - stop(data["next", "observation"])).log().mean())

    def test_stop_head_needs_is_init(self):
        data = transitions(6)
        with pytest.raises(KeyError, match=r"is_init.*missing.*InitTracker"):
            BacktrackLoss(make_model(stop=True))(data)
        data["is_init"] = torch.zeros(6, 2, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"is_init.* \(6, 2\)"):
            BacktrackLoss(make_model(stop=True))(data)
        BacktrackLoss(make_model())(transitions(6))  # without a stop head it is not asked for

    @pytest.mark.parametrize("junk", ["nan", "inf", "zeros"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_masked_rows_count_for_nothing(self, kind, junk):
        """Neither for the loss, nor for gradients, nor for the running statistics."""
        model = make_model(SPECS[kind], stop=True)
        twin = copy.deepcopy(model)
        data = transitions(3, 4, kind=kind)
        data["is_init"] = torch.rand(3, 4, 1) < 0.5
        mask = torch.rand(3, 4) < 0.6
        value = {"nan": torch.nan, "inf": torch.inf, "zeros": 0.0}[junk]
        for key in ("observation", "action", ("next", "observation")):
            fill = value if data[key].is_floating_point() else 99
            data[key][~mask] = torch.full_like(data[key][~mask], fill)
        data["collector", "mask"] = mask
        loss, expected = BacktrackLoss(model), BacktrackLoss(twin)
        real = data[mask].exclude("collector")
        a, b = loss(data)["loss_backtrack"], expected(real)["loss_backtrack"]
        close(a, b)
        a.backward()
        b.backward()
        for x, y in zip(gradients(model), gradients(twin), strict=True):
            close(x, y)
        for x, y in zip(model.buffers(), twin.buffers(), strict=True):
            close(x, y)

    def test_nothing_kept(self):
        model = make_model(SPECS["one_hot"], stop=True)
        before = [b.clone() for b in model.buffers()]
        data = transitions(4, kind="one_hot").apply(lambda x: x * torch.nan)
        data["is_init"] = torch.ones(4, 1, dtype=torch.bool)
        data["collector", "mask"] = torch.zeros(4, dtype=torch.bool)
        out = BacktrackLoss(model)(data)
        assert out["loss_backtrack"] == 0
        out["loss_backtrack"].backward()
        assert all(same(p.grad, 0) for p in model.parameters())
        assert all(same(a, b) for a, b in zip(before, model.buffers(), strict=True))

    def test_the_mask_can_be_renamed_or_ignored(self):
        loss, data = BacktrackLoss(make_model(), reduction="none").eval(), transitions(4)
        data["collector", "mask"] = data["other"] = torch.tensor([True, False, True, True])
        assert (loss(data)["loss_backtrack"] == 0).sum() == 1
        loss.loss_mask_key = None
        assert (loss(data)["loss_backtrack"] == 0).sum() == 0
        loss.loss_mask_key = "other"
        assert (loss(data)["loss_backtrack"] == 0).sum() == 1

    @pytest.mark.parametrize("key", ["observation", "action", ("next", "observation")])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_non_finite_rows(self, key, bad):
        model = make_model()
        twin = copy.deepcopy(model)
        before = [b.clone() for b in model.buffers()]
        data = transitions(5)
        data[key][2, 0] = bad
        with pytest.raises(ValueError, match=r"1 of 5 transitions have NaN.*mask_nonfinite=True"):
            BacktrackLoss(model)(data)
        assert all(same(a, b) for a, b in zip(before, model.buffers(), strict=True))
        rest = torch.cat([data[:2], data[3:]])
        a = BacktrackLoss(model, mask_nonfinite=True)(data)["loss_backtrack"]
        b = BacktrackLoss(twin)(rest)["loss_backtrack"]
        close(a, b)
        a.backward()
        b.backward()
        for x, y in zip(gradients(model), gradients(twin), strict=True):
            close(x, y)
        for x, y in zip(model.buffers(), twin.buffers(), strict=True):
            close(x, y)

    def test_statistics_are_of_the_real_data(self):
        model = make_model(SPECS["normal"])
        loss, batches = BacktrackLoss(model), [transitions(n, kind="normal") for n in (5, 1, 7)]
        for batch in batches:
            loss(batch)
        data = torch.cat(batches)
        following = data["next", "observation"]
        for normalizer, rows in (
            (model.observation.normalizer, following),
            (model.delta_head.normalizer, data["observation"] - following),
            (model.action.head.normalizer, data["action"]),
        ):
            assert normalizer.count == 13
            close(normalizer.mean, rows.mean(0))
            close(normalizer.std, rows.std(0, unbiased=False))

    def test_statistics_change_by_real_data_in_training_only(self):
        model = make_model()
        loss, data = BacktrackLoss(model), transitions(5)
        loss(data)
        before = copy.deepcopy(model.state_dict())
        loss.eval()(data)
        transform = BacktrackTransform(model, num_steps=4)
        transform(data)
        RecallTraceLoss(make_actor())(data)
        RecallTraceLoss(make_actor(), model).eval()(data)
        assert all(same(value, before[name]) for name, value in model.state_dict().items())
        RecallTraceLoss(make_actor(), model)(data)
        assert model.observation.normalizer.count == 10

    @pytest.mark.parametrize("discrete", [True, False])
    def test_displacement_outside_the_support(self, discrete):
        support = torch.tensor([[0, 1], [1, 0]])
        spec = MultiCategorical([5, 5]) if discrete else 2
        loss = BacktrackLoss(make_model(observation=spec, delta_support=support))
        following = torch.tensor([[1, 1], [1, 1], [1, 1]])
        data = transitions(3)
        data["next", "observation"] = following if discrete else following.float()
        before = following + torch.tensor([[0, 1], [2, 0], [1, 0]])
        data["observation"] = before if discrete else before.float()
        with pytest.raises(ValueError, match=r"1 of 3 transitions have a displacement.*support"):
            loss(data)
        data["collector", "mask"] = torch.tensor([True, False, True])
        out = loss(data)["loss_backtrack"]
        assert torch.isfinite(out)
        out.backward()
        assert all(torch.isfinite(p.grad).all() for p in loss.parameters())

    def test_keyword_tensors_of_equal_widths(self):
        """No batch size can be read off shapes alone when all widths are the same."""
        loss = BacktrackLoss(make_model(action=WIDTH)).eval()
        data = transitions(6)
        data["action"] = torch.rand(6, WIDTH)
        value, *_ = loss(
            observation=data["observation"],
            action=data["action"],
            next_observation=data["next", "observation"],
        )
        close(value, loss(data)["loss_backtrack"])

    def test_keys(self):
        loss = BacktrackLoss(make_model(stop=True)).eval()
        data = transitions(4)
        data["is_init"] = torch.rand(4, 1) < 0.5
        expected = loss(data)["loss_backtrack"]
        moved = TensorDict({"o": data["observation"], "agent": {"a": data["action"]}}, [4])
        moved["next", "o"], moved["first"] = data["next", "observation"], data["is_init"]
        loss.set_keys(observation="o", action=("agent", "a"), is_init="first")
        assert loss.in_keys == ["o", ("agent", "a"), ("next", "o"), "first"]
        close(loss(moved)["loss_backtrack"], expected)
        loss.set_keys(observation=None, action=None, is_init=None)
        assert loss.in_keys == ["observation", "action", ("next", "observation"), "is_init"]
        close(loss(data)["loss_backtrack"], expected)
        with pytest.raises(ValueError, match="observation must name 1 keys"):
            loss.set_keys(observation=["a", "b"])

    def test_keys_of_the_model(self):
        model = BacktrackModel(
            {("agent", "x"): 2, "y": 1}, 1, num_cells=(8,), action_key=("agent", "u")
        )
        loss = BacktrackLoss(model)
        data = TensorDict({"agent": {"x": torch.randn(4, 2), "u": torch.zeros(4, 1)}}, [4])
        data["y"] = torch.randn(4, 1)
        data["next"] = data.clone()
        assert loss.in_keys == [
            ("agent", "x"),
            "y",
            ("agent", "u"),
            ("next", "agent", "x"),
            ("next", "y"),
        ]
        assert torch.isfinite(loss(data)["loss_backtrack"])
        loss.set_keys(action="v")
        loss.set_keys(action=None)
        assert loss.tensor_keys.action == ("agent", "u")

    def test_actions_on_their_bounds(self):
        data = transitions(4)
        data["action"] = torch.tensor([[-1.0, 1.0]]).expand(4, 2)
        loss = BacktrackLoss(make_model())
        value = loss(data)["loss_backtrack"]
        value.backward()
        assert torch.isfinite(value)
        assert all(torch.isfinite(p.grad).all() for p in loss.parameters())

    def test_wrong_arguments(self):
        with pytest.raises(TypeError, match="model must be a BacktrackModel, got Linear"):
            BacktrackLoss(nn.Linear(1, 1))
        with pytest.raises(ValueError, match="data is empty: batch size"):
            BacktrackLoss(make_model())(transitions(0))

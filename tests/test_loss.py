"""The two losses: against torch.distributions and TorchRL's, and the contract of a LossModule."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import distributions as D
from torch import nn
from torchrl.data import Categorical, MultiCategorical, OneHot, Unbounded
from torchrl.modules import (
    IndependentNormal,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss, SACLoss
from torchrl.objectives.bc import BCLoss

from torchrl_recall import BacktrackLoss, BacktrackModel, BacktrackTransform, RecallTraceLoss

WIDTH, ACTIONS, CLASSES = 3, 2, 4
SPECS = {
    "tanh": ACTIONS,
    "normal": Unbounded((ACTIONS,)),
    "categorical": Categorical(CLASSES),
    "one_hot": OneHot(CLASSES, dtype=torch.float32),
}
KINDS = list(SPECS)


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_model(action=ACTIONS, observation=WIDTH, **kwargs):
    return BacktrackModel(observation, action, num_cells=(8,), **kwargs)


def make_actor(kind="tanh", keys=("observation",), **kwargs):
    """A policy of one hidden layer."""

    def network(width, *rest):
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, width), *rest)

    if kind in ("tanh", "normal"):
        net = TensorDictModule(
            network(2 * ACTIONS, NormalParamExtractor()), list(keys), ["loc", "scale"]
        )
        cls, names = (TanhNormal if kind == "tanh" else IndependentNormal), ["loc", "scale"]
    else:
        net = TensorDictModule(network(CLASSES), list(keys), ["logits"])
        classes = {"categorical": D.Categorical, "one_hot": OneHotCategorical}
        cls, names = classes.get(kind, D.OneHotCategorical), ["logits"]
    return ProbabilisticActor(net, names, distribution_class=cls, **kwargs)


def make_action(kind, batch):
    if kind in ("tanh", "normal"):
        return torch.rand(*batch, ACTIONS) * 1.9 - 0.95
    index = torch.randint(CLASSES, batch)
    return index if kind == "categorical" else nn.functional.one_hot(index, CLASSES).float()


def transitions(*batch, kind="tanh"):
    observation = torch.randn(*batch, WIDTH) * 2 + 1
    following = observation + torch.randn(*batch, WIDTH) * torch.tensor([0.1, 1.0, 3.0])
    data = {"observation": observation, "action": make_action(kind, batch)}
    return TensorDict({**data, "next": {"observation": following}}, batch)


def recall(*batch, kind="tanh", mask=True):
    """A batch with traces, some of whose steps are masked."""
    trace = transitions(*batch, kind=kind)
    kept = torch.rand(batch) < 0.7 if mask else torch.ones(batch, dtype=torch.bool)
    if batch and mask:
        kept.view(-1)[:2] = torch.tensor([True, False])
    trace["collector", "mask"] = kept
    return TensorDict({"trace": trace}, batch[:-1])


def steps(data):
    """The steps that the mask keeps, as ordinary transitions."""
    trace = data["trace"].reshape(-1)
    return trace[trace["collector", "mask"]].exclude("collector")


def gradients(module):
    return [p.grad.clone() for p in module.parameters()]


def same(a, b):
    return bool((a == b).all())


def close(a, b, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(a, b, check_dtype=False, rtol=rtol, atol=atol)


class LossContract:
    """What holds of any loss of TorchRL; a subclass says how to make one and what it reads."""

    def make(self, **kwargs):
        raise NotImplementedError

    def data(self, *batch):
        raise NotImplementedError

    def networks(self, loss):
        """The modules as the user knows them."""
        raise NotImplementedError

    def total(self, out):
        return sum(value for key, value in out.items() if key.startswith("loss_"))

    def test_in_keys_are_enough(self):
        loss, data = self.make(), self.data(4)
        alone = data.select(*loss.in_keys)
        assert same(self.total(loss.eval()(alone)), self.total(loss(alone.clone())))
        for key in loss.in_keys:
            with pytest.raises(KeyError, match=str(key[-1] if isinstance(key, tuple) else key)):
                loss(alone.exclude(key))
        loss.in_keys = ["other"]
        assert loss.in_keys == ["other"]

    def test_dispatch(self):
        loss, data = self.make().eval(), self.data(4).exclude(("trace", "collector"))
        arguments = {"_".join([k] if isinstance(k, str) else k): data[k] for k in loss.in_keys}
        expected = loss(data)
        got = loss(**arguments)
        assert len(got) == len(loss.out_keys)
        for value, key in zip(got, loss.out_keys, strict=True):
            close(value, expected[key])
        name = loss.out_keys[0]
        loss.select_out_keys(name)
        close(loss(**arguments), expected[name])

    def test_out_keys_and_detached_logs(self):
        loss = self.make()
        out = loss(self.data(4))
        assert list(out.keys()) == loss.out_keys
        assert out.batch_size == ()
        for key, value in out.items():
            assert value.shape == ()
            assert torch.isfinite(value)
            assert value.requires_grad == key.startswith("loss_")

    def test_reductions(self):
        data = self.data(4)
        out = {r: self.make(reduction=r).eval() for r in ("mean", "sum", "none")}
        for other in out.values():
            other.load_state_dict(out["mean"].state_dict())
        results = {r: loss(data) for r, loss in out.items()}
        for key in out["mean"].out_keys:
            if not key.startswith("loss_"):
                close(results["mean"][key], results["none"][key])
                continue
            rows = results["none"][key]
            mask = self.mask(data, key)
            assert rows.shape == mask.shape
            assert same(rows[~mask], 0)
            close(results["sum"][key], rows.sum())
            close(results["mean"][key], rows.sum() / mask.sum())
        with pytest.raises(ValueError, match=r"reduction must be .*, got 'max'"):
            self.make(reduction="max")

    def test_input_is_not_changed(self):
        loss, data = self.make(), self.data(4)
        before, keys = data.clone(), set(data.keys(True, True))
        loss(data)
        data.lock_()
        loss(data)
        assert set(data.keys(True, True)) == keys
        assert same(data, before)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, copied):
        loss, data = self.make().eval(), self.data(4)
        other = copied(loss)
        close(self.total(other(data)), self.total(loss(data)))
        self.total(other(data)).backward()
        assert all(p.grad is None for p in loss.parameters())
        assert any(p.grad is not None for p in other.parameters())
        optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
        optimizer.step()
        assert self.total(other(data)) != self.total(loss(data))
        other.set_keys(action=None)

    def test_state_dict(self):
        loss, data = self.make(), self.data(4)
        loss(data)
        other = self.make()
        assert self.total(other.eval()(data)) != self.total(loss.eval()(data))
        other.load_state_dict(loss.state_dict())
        assert same(self.total(other(data)), self.total(loss(data)))

    def test_float64(self):
        loss, data = self.make(), self.data(4)
        networks = self.networks(loss)
        parameters = [p for network in networks for p in network.parameters()]
        loss.to(torch.float64)
        out = loss(data.apply(lambda x: x.double() if x.is_floating_point() else x))
        assert all(value.dtype == torch.float64 for value in out.values())
        self.total(out).backward()
        assert all(p.dtype == torch.float64 for p in parameters)
        assert all(a is b for a, b in zip(parameters, self.parameters(loss), strict=True))
        assert all(p.grad is not None for p in parameters)

    def test_reset_parameters(self):
        loss = self.make()
        before = [p.clone() for p in loss.parameters()]
        loss.reset_parameters_recursive()
        assert all(not same(a, b) for a, b in zip(before, loss.parameters(), strict=True))

    def test_parameters_are_the_networks_own(self):
        loss = self.make()
        ours = {id(p) for p in loss.parameters()}
        assert ours == {id(p) for network in self.networks(loss) for p in network.parameters()}

    def parameters(self, loss):
        return [p for network in self.networks(loss) for p in network.parameters()]

    def test_unknown_key(self):
        with pytest.raises(ValueError, match="not an accepted tensordict key"):
            self.make().set_keys(reward="r")

    # tensordict reads a setting that torch 2.15 has retired; torch 2.13 warns of its own tracing.
    @pytest.mark.filterwarnings("ignore:.*inline_inbuilt_nn_modules:FutureWarning")
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("batch", [(4,), (2, 3)])
    def test_compiled(self, batch):
        loss, data = self.make(), self.data(*batch)
        twin = copy.deepcopy(loss)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        out, expected = compiled(data), twin(data)
        for key in loss.out_keys:
            close(out[key], expected[key])
        self.total(out).backward()
        self.total(expected).backward()
        for a, b in zip(gradients(loss), gradients(twin), strict=True):
            close(a, b)
        for a, b in zip(loss.buffers(), twin.buffers(), strict=True):
            close(a, b)


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


# BacktrackLoss


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


# RecallTraceLoss


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

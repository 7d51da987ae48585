"""What the transform writes: under which keys, which steps it masks, and for which data."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import MultiCategorical, OneHot
from torchrl.envs import InitTracker, TransformedEnv
from torchrl.modules import OneHotCategorical, ProbabilisticActor, TanhNormal
from transform_data import WIDTH, T, make_model, same, trace_of, transitions

from torchrl_recall import BacktrackModel, BacktrackTransform, RecallTraceLoss
from torchrl_recall.envs import FourRoomsEnv


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gaussian_actor():
    net = TensorDictModule(
        nn.Sequential(nn.Linear(WIDTH, 4), NormalParamExtractor()),
        ["observation"],
        ["loc", "scale"],
    )
    return ProbabilisticActor(net, ["loc", "scale"], distribution_class=TanhNormal)


def one_hot_actor():
    net = TensorDictModule(nn.Linear(WIDTH, 3), ["observation"], ["logits"])
    return ProbabilisticActor(net, ["logits"], distribution_class=OneHotCategorical)


class TestKeys:
    def test_missing(self):
        transform = BacktrackTransform(make_model(), num_steps=T)
        data = transitions(5).exclude(("next", "observation"))
        with pytest.raises(KeyError, match=r"next.*observation.*missing.*value_target"):
            transform(data)
        transform.set_missing_tolerance(True)
        assert "trace" not in transform(data)

    @pytest.mark.parametrize("key", [("next", "state"), "goal", ("deep", "er", "goal")])
    @pytest.mark.parametrize("out", ["trace", "recall", ("extra", "trace")])
    def test_renamed(self, key, out):
        transform = BacktrackTransform(make_model(), num_steps=T, in_keys=[key], out_keys=[out])
        assert transform.in_keys == [key]
        assert transform.out_keys == [out]
        data = transitions(5)
        goal = torch.randn(5, WIDTH)
        data.set(key, goal)
        assert same(transform(data)[out]["next", "observation"][:, -1], goal)

    def test_nested_keys_and_several_observations(self):
        model = BacktrackModel(
            {("agent", "position"): 2, "speed": 1},
            1,
            num_cells=(8,),
            action_key=("agent", "action"),
        )
        following = {"agent": {"position": torch.randn(5, 2)}, "speed": torch.randn(5, 1)}
        data = TensorDict({"next": following}, [5])
        transform = BacktrackTransform(model, num_steps=T)
        assert transform.in_keys == [("next", "agent", "position"), ("next", "speed")]
        trace = transform(data)["trace"]
        for key in (("agent", "position"), "speed"):
            assert same(trace["next"][key][:, -1], data["next"][key])
        assert trace["agent", "action"].shape == (5, T, 1)
        renamed = BacktrackTransform(model, num_steps=T, in_keys=["position", "speed"])
        data = TensorDict({"position": torch.zeros(5, 2), "speed": torch.ones(5, 1)}, [5])
        end = renamed(data)["trace", "next"][:, -1]
        assert same(end["agent", "position"], 0)
        assert same(end["speed"], 1)

    def test_wrong_arguments(self):
        model = make_model()
        with pytest.raises(TypeError, match="model must be a BacktrackModel, got Linear"):
            BacktrackTransform(nn.Linear(1, 1), num_steps=T)
        with pytest.raises(ValueError, match=r"in_keys .* one for one"):
            BacktrackTransform(model, num_steps=T, in_keys=["a", "b"])
        with pytest.raises(ValueError, match="out_keys must name one key"):
            BacktrackTransform(model, num_steps=T, out_keys=["a", "b"])
        with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
            BacktrackTransform(model, num_steps=0)
        with pytest.raises(ValueError, match="num_traces must be at least 1, got 0"):
            BacktrackTransform(model, num_steps=T, num_traces=0)
        with pytest.raises(TypeError, match="num_steps must be an int"):
            BacktrackTransform(model, num_steps=2.0)
        with pytest.raises(TypeError, match="min_value must be a number"):
            BacktrackTransform(model, num_steps=T, min_value="high")
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
            BacktrackTransform(model, num_steps=T, generator=3)
        with pytest.raises(ValueError, match="backend must be one of"):
            BacktrackTransform(model, num_steps=T, backend="fast")

    def test_wrong_data(self):
        transform = BacktrackTransform(make_model(), num_steps=T)
        with pytest.raises(ValueError, match="data is empty: batch size"):
            transform(transitions(0))
        data = transitions(5)
        data["next", "observation"] = torch.zeros(5, WIDTH + 1)
        with pytest.raises(ValueError, match=r"shape \(5, 4\)"):
            transform(data)
        data["next", "observation"] = torch.zeros(5, WIDTH, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"float64.*DoubleToFloat"):
            transform(data)
        assert "trace" not in data


class TestMask:
    @pytest.mark.parametrize("shape", [(5,), (5, 1)])
    @pytest.mark.parametrize("num_traces", [None, 2])
    def test_min_value(self, shape, num_traces):
        transform = BacktrackTransform(
            make_model(), num_steps=T, num_traces=num_traces, min_value=0.5, value_key="v"
        )
        data = transitions(5)
        data["v"] = torch.tensor([0.0, 0.5, 0.49, torch.nan, 7.0]).reshape(shape)
        kept = transform(data)["trace", "collector", "mask"].reshape(5, -1)
        assert kept.all(-1).tolist() == kept.any(-1).tolist() == [False, True, False, False, True]

    @pytest.mark.parametrize("action", [2, OneHot(3)])
    def test_nothing_eligible_is_a_loss_of_zero(self, action):
        model = make_model(action=action)
        transform = BacktrackTransform(model, num_steps=T, min_value=2.0)
        data = transform(transitions(5))
        assert not data["trace", "collector", "mask"].any()
        assert all(torch.isfinite(value).all() for value in data["trace"].values(True, True))
        actor = gaussian_actor() if action == 2 else one_hot_actor()
        loss = RecallTraceLoss(actor)(data)["loss_imitation"]
        assert loss == 0
        loss.backward()
        assert all(same(p.grad, 0) for p in actor.parameters())

    def test_min_value_needs_the_value(self):
        transform = BacktrackTransform(make_model(), num_steps=T, min_value=0.5)
        with pytest.raises(KeyError, match="value_key 'value_target'"):
            transform(transitions(5).exclude("value_target"))
        data = transitions(5)
        data["value_target"] = torch.zeros(5, 2)
        with pytest.raises(ValueError, match=r"value_key 'value_target' has shape \(5, 2\)"):
            transform(data)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_non_finite_starts(self, bad):
        transform = BacktrackTransform(make_model(), num_steps=T)
        data = transitions(5)
        data["next", "observation"][2, 1] = bad
        trace = trace_of(transform, data)
        assert trace["collector", "mask"].any(-1).tolist() == [True, True, False, True, True]
        assert all(torch.isfinite(value).all() for value in trace.values(True, True))
        assert torch.isfinite(data["next", "observation"]).sum() == 14  # the data stay as they are

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1)])
    @pytest.mark.parametrize(
        ("spec", "padding"), [(WIDTH, 0.0), (OneHot(3), 0), (MultiCategorical([3, 3]), 7)]
    )
    def test_padding_is_no_start(self, shape, spec, padding):
        """As `split_trajectories` leaves it: no valid one-hot row, and no place to go back from."""
        support = torch.tensor([[0, 1], [0, 0]]) if isinstance(spec, MultiCategorical) else None
        model = make_model(spec, delta_support=support)
        mask = torch.tensor([[True, True, True], [True, False, False]])
        observation = torch.randn(2, 3, WIDTH) if spec == WIDTH else spec.rand((2, 3))
        observation[~mask] = torch.full_like(observation[~mask], padding)
        data = TensorDict({"next": {"observation": observation}}, [2, 3])
        data["collector", "mask"] = mask.reshape(shape)
        transform = BacktrackTransform(model, num_steps=T, last_visit=False)
        kept = transform(data)["trace", "collector", "mask"]
        assert same(kept[..., -1], mask)
        assert not kept[~mask].any()

    def test_reasons_to_mask_add_up(self):
        data = transitions(5)
        data["collector", "mask"] = torch.tensor([True, True, True, False, True])
        data["next", "observation"][1] = torch.nan
        data["value_target"][2] = -9.0
        trace = BacktrackTransform(make_model(), num_steps=T, min_value=-5.0)(data)["trace"]
        kept = trace["collector", "mask"]
        assert kept.all(-1).tolist() == kept.any(-1).tolist() == [True, False, False, False, True]
        data["collector", "mask"] = torch.ones(5, 2, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"'collector', 'mask'.* has shape \(5, 2\)"):
            BacktrackTransform(make_model(), num_steps=T)(data)

    def test_last_visit_is_the_default(self):
        env = FourRoomsEnv(5)
        model = BacktrackModel.from_env(env, num_cells=(8,))
        data = env.rollout(50, break_when_any_done=False)

        def mask_and_states(**kwargs):
            trace = BacktrackTransform(model, num_steps=12, **kwargs)(data)["trace"]
            states = torch.cat([trace["observation"], trace["next", "observation"][:, -1:]], 1)
            return trace["collector", "mask"], states.tolist()

        mask, states = mask_and_states()
        assert not mask.all()
        for row, path in zip(mask.tolist(), states, strict=True):
            assert row == [path[t] not in path[t + 1 :] for t in range(12)]
        assert mask_and_states(last_visit=False)[0].all()


class TestKindsOfData:
    def test_float64(self):
        transform = BacktrackTransform(make_model(dtype=torch.float64), num_steps=T)
        trace = trace_of(transform, transitions(5).double())
        assert trace["observation"].dtype == trace["action"].dtype == torch.float64

    def test_model_cast_later(self):
        model = make_model()
        transform = BacktrackTransform(model, num_steps=T)
        model.double()
        assert trace_of(transform, transitions(5).double())["observation"].dtype == torch.float64

    def test_named_dimensions(self):
        data = TransformedEnv(FourRoomsEnv(5, batch_size=(3,)), InitTracker()).rollout(6)
        assert data.names == [None, "time"]
        model = BacktrackModel.from_env(FourRoomsEnv(5), num_cells=(8,))
        out = BacktrackTransform(model, num_steps=T)(data)
        assert out["trace"].shape == (3, 6, T)
        assert out.names == [None, "time"]
        assert out["trace"].names == [None, "time", None]

    def test_lazily_stacked_data(self):
        data = TensorDict.lazy_stack([transitions(), transitions()])
        assert trace_of(BacktrackTransform(make_model(), num_steps=T), data).shape == (2, T)

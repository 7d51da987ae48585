"""Actions of several keys: composite specs, mixed kinds, nested names, composite policies."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, TensorDictModule
from torch import distributions as D
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    MultiOneHot,
    OneHot,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import EnvBase
from torchrl.modules import IndependentNormal, ProbabilisticActor

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    sample_traces,
)
from torchrl_recall.model.heads import CategoricalHead, NormalHead, TanhNormalHead
from torchrl_recall.traces import draw_noise

F64 = torch.float64
ACTIONS = {
    ("agent", "force"): Bounded(-2, 2, (2,)),
    ("agent", "push"): Unbounded((1,)),
    ("agent", "move"): Categorical(3),
    "hand": OneHot(4),
    ("lamps", "on"): Binary(2),
    ("lamps", "colour"): MultiOneHot([2, 3]),
}


def make_model(actions=ACTIONS, **kwargs):
    torch.manual_seed(0)
    model = BacktrackModel(3, actions, **{"num_cells": (16,), "dtype": F64, **kwargs})
    rows = torch.randn(64, 3, dtype=F64)
    model.update_normalization(
        2 * rows + 1, model.action.read(transitions(64), model.action_key, model.device), rows
    )
    return model


def transitions(*batch):
    data = TensorDict({"observation": torch.randn(*batch, 3, dtype=F64)}, batch)
    data["next", "observation"] = torch.randn(*batch, 3, dtype=F64)
    for key, spec in ACTIONS.items():
        data[key] = spec.expand(*batch, *spec.shape).rand()
    return data


class TestModel:
    def test_log_prob_is_that_of_its_parts(self):
        """Against models of one action each, with the same weights."""
        model, data = make_model(), transitions(20)
        state, action, next_state = model.read(data)
        assert action.shape == (20, 2 + 1 + 1 + 1 + 2 + 2)
        parameters = model.action_parameters(next_state)
        expected, low = 0, 0
        for key, part in zip(ACTIONS, model.action.parts, strict=True):
            own = parameters[:, low : low + part.head.output_size]
            low += part.head.output_size
            expected = expected + part.head.log_prob(own, part.read(data, key, model.device))
        terms = model.step_log_prob(state, action, next_state)
        torch.testing.assert_close(terms["action"], expected)
        kinds = [type(part.head) for part in model.action.parts][:4]
        assert kinds == [TanhNormalHead, NormalHead, CategoricalHead, CategoricalHead]

    def test_a_composite_of_the_same(self):
        spec = Composite(
            agent=Composite(move=Categorical(3), force=Bounded(-2, 2, (2,))), hand=OneHot(4)
        )
        model = BacktrackModel(3, spec, num_cells=(8,))
        assert model.action_key == [("agent", "move"), ("agent", "force"), "hand"]
        single = BacktrackModel(3, Composite(agent=Composite(move=Categorical(3))), num_cells=(8,))
        assert single.action_key == ("agent", "move")

    def test_samples_follow_each_parts_noise(self):
        model = make_model()
        start = torch.randn(20, 3, dtype=F64)
        noise = draw_noise(model, 1, 20, torch.Generator().manual_seed(1))
        trace = sample_traces(model, start, num_steps=1, noise=noise, backend="reference")
        parameters, low, place = model.action_parameters(start), 0, 0
        for key, part in zip(ACTIONS, model.action.parts, strict=True):
            head = part.head
            own = noise.action[0][:, place : place + head.noise_size]
            if head.noise_kind == "uniform":
                own = D.Normal(torch.zeros((), dtype=F64), 1.0).cdf(own)
            value, _ = head.sample(parameters[:, low : low + head.output_size], own)
            low, place = low + head.output_size, place + head.noise_size
            assert torch.equal(trace[key][:, 0], part.restore(value)), key

    @pytest.mark.parametrize(
        "options",
        [{}, {"stop": True}, {"num_members": 3}, {"num_components": 2}],
        ids=["plain", "stop", "ensemble", "mixture"],
    )
    def test_traces(self, options, recwarn):
        model = make_model(**options)
        start = torch.randn(20, 3, dtype=F64)
        trace = sample_traces(model, start, num_steps=5)
        assert "falls back to the reference backend" in str(recwarn.list[0].message)
        for key, spec in ACTIONS.items():
            assert trace[key].dtype == (F64 if spec.dtype == torch.float32 else spec.dtype)
            values = trace[key].to(spec.dtype)
            assert spec.expand(20, 5, *spec.shape).is_in(values), key
        assert bool(torch.isfinite(trace["action_log_prob"]).all())
        if not options:
            torch.testing.assert_close(
                model.log_prob(trace), trace["action_log_prob"] + trace["delta_log_prob"]
            )

    def test_uniform_actions(self):
        actions = {"force": Bounded(-2, 2, (2,)), "move": Categorical(3)}
        model = BacktrackModel(3, actions, num_cells=(8,), dtype=F64, reverse_action="uniform")
        with pytest.warns(UserWarning, match="reference backend: the action has several keys"):
            trace = sample_traces(model, torch.zeros(9, 3, dtype=F64), num_steps=2)
        expected = torch.full((9, 2), 1 / 16 / 3, dtype=F64)
        torch.testing.assert_close(trace["action_log_prob"].exp(), expected)

    def test_scales_begin_where_each_head_wants_them(self):
        model, lone = make_model(), BacktrackModel(3, 2, num_cells=(16,), dtype=F64)
        bias = model.action_network[-1].bias
        assert torch.equal(bias[2:4], lone.action_network[-1].bias[2:4])  # of the force
        assert bool((bias[5] == bias[2]).all())  # of the push

    @pytest.mark.parametrize("coeff", [0.0, 0.1])
    def test_the_loss_learns(self, coeff):
        model = make_model({("agent", "force"): Bounded(-2, 2, (2,)), "hand": OneHot(4)})
        loss = BacktrackLoss(model, action_entropy_coeff=coeff)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        values = []
        for _ in range(150):
            data = transitions(64)
            sign = (data["next", "observation"][:, 0] > 0).long()
            data["hand"] = nn.functional.one_hot(sign, 4).bool()
            out = loss(data)
            optimizer.zero_grad()
            out["loss_backtrack"].backward()
            optimizer.step()
            values.append(float(out["backtrack_action_log_prob"]))
        uniform_force = -torch.log(torch.tensor(16.0))
        assert values[0] < -3.5
        assert values[-1] > uniform_force - 0.4

    def test_padding_and_renamed_keys(self):
        model, data = make_model(), transitions(4)
        loss = BacktrackLoss(model).eval()
        expected = loss(data[:3])["loss_backtrack"]
        data["hand"][3] = False
        data["agent", "force"][3] = torch.nan
        data["collector", "mask"] = torch.tensor([True, True, True, False])
        torch.testing.assert_close(loss(data)["loss_backtrack"], expected)
        names = [("x", str(i)) for i in range(len(ACTIONS))]
        for old, new in zip(ACTIONS, names, strict=True):
            data.rename_key_(old, new)
        loss.set_keys(action=names)
        assert loss.in_keys[1:7] == names
        torch.testing.assert_close(loss(data)["loss_backtrack"], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda td: td.exclude("hand"), KeyError, "'hand' is missing"),
        (lambda td: td.set("hand", td["hand"][:, :2]), ValueError, "'hand' has shape"),
        (lambda td: td.set(("lamps", "on"), td["lamps", "on"] + 2), ValueError, "must lie in 0 to"),
    ],
)
def test_refuses_values_by_name(change, error, message):
    with pytest.raises(error, match=message):
        make_model().log_prob(change(transitions(4)))


def test_refuses_keys_and_specs():
    loss = BacktrackLoss(make_model())
    for wrong in ("hand", ["hand"]):
        with pytest.raises(ValueError, match="action must stand for"):
            loss.set_keys(action=wrong)
    with pytest.raises(ValueError, match="action must name 6 keys in a list"):
        make_model().read(transitions(4), action_key="hand")
    with pytest.raises(TypeError, match="action is a float"):
        BacktrackModel(3, {"a": 2, "b": 1.0})
    with pytest.raises(ValueError, match=r"300 classes, more than torch\.bfloat16 can count"):
        BacktrackModel(3, {"a": 2, "b": Categorical(300)}, dtype=torch.bfloat16)


class TwoHands(EnvBase):
    """A point that one hand pushes and another switches between directions."""

    def __init__(self):
        super().__init__(batch_size=[])
        self.observation_spec = Composite(observation=Unbounded((3,)))
        self.action_spec = Composite(
            action=Composite(force=Bounded(-1, 1, (2,)), move=Categorical(3))
        )
        self.reward_spec = Unbounded((1,))
        self.full_done_spec = Composite(done=Binary(1, dtype=torch.bool))

    def _reset(self, tensordict=None, **kwargs):
        return TensorDict({"observation": torch.zeros(3)}, [])

    def _step(self, tensordict):
        change = torch.zeros(3)
        change[tensordict["action", "move"]] = 1.0
        change[:2] += tensordict["action", "force"]
        following = {"observation": tensordict["observation"] + 0.1 * change}
        return TensorDict({**following, "reward": torch.zeros(1), "done": torch.zeros(1).bool()})

    def _set_seed(self, seed):
        torch.manual_seed(seed)


class Parameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 7)

    def forward(self, observation):
        out = self.net(observation)
        return out[..., :2], out[..., 2:4].exp(), out[..., 4:]


def make_actor():
    names = [("params", "force", "loc"), ("params", "force", "scale"), ("params", "move", "logits")]
    return ProbabilisticActor(
        TensorDictModule(Parameters(), ["observation"], names),
        ["params"],
        out_keys=[("action", "force"), ("action", "move")],
        distribution_class=CompositeDistribution,
        distribution_kwargs={
            "distribution_map": {"force": IndependentNormal, "move": D.Categorical},
            "name_map": {"force": ("action", "force"), "move": ("action", "move")},
        },
        return_log_prob=False,
    )


class TestPolicy:
    KEYS = (("action", "force"), ("action", "move"))

    def trace(self):
        torch.manual_seed(0)
        data = TensorDict({"observation": torch.randn(4, 5, 3)}, [4, 5])
        data["action", "force"] = torch.randn(4, 5, 2)
        data["action", "move"] = torch.randint(3, (4, 5))
        data["collector", "mask"] = torch.rand(4, 5) < 0.7
        return data

    @pytest.mark.parametrize("keys", [None, list(KEYS)])
    def test_imitation_is_the_sum_over_parts(self, keys):
        actor, trace = make_actor(), self.trace()
        loss = RecallTraceLoss(actor)
        if keys is not None:
            loss.set_keys(action=keys)
            assert ("trace", "action", "force") in loss.in_keys
        found = loss(TensorDict({"trace": trace}, [4]))["loss_imitation"]
        loc, scale, logits = actor.module[0].module(trace["observation"])
        expected = D.Normal(loc, scale).log_prob(trace["action", "force"]).sum(-1)
        expected = expected + D.Categorical(logits=logits).log_prob(trace["action", "move"])
        expected = -expected[trace["collector", "mask"]].mean()
        torch.testing.assert_close(found, expected)

    def test_refuses_other_keys(self):
        data = TensorDict({"trace": self.trace()}, [4])
        loss = RecallTraceLoss(make_actor())
        loss.set_keys(action=("action", "force"))
        with pytest.raises(KeyError, match=r"the actor is over .*'move'.*action is"):
            loss(data)
        net = TensorDictModule(Parameters(), ["observation"], ["loc", "scale", "logits"])
        single = ProbabilisticActor(net, ["loc", "scale"], distribution_class=IndependentNormal)
        with pytest.raises(ValueError, match="expected a CompositeDistribution over them"):
            RecallTraceLoss(single)(data)

    @pytest.mark.filterwarnings("ignore:sample_traces falls back to the reference")
    def test_end_to_end(self):
        torch.manual_seed(0)
        env, actor = TwoHands(), make_actor()
        model = BacktrackModel.from_env(env, num_cells=(16,))
        assert model.action_key == list(self.KEYS)
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(200),
            transform=BacktrackTransform(model, num_steps=4),
            batch_size=16,
        )
        collector = Collector(
            env,
            actor,
            frames_per_batch=50,
            total_frames=100,
            auto_register_policy_transforms=False,
        )
        for data in collector:
            buffer.extend(data)
        losses = BacktrackLoss(model), RecallTraceLoss(actor)
        optimizer = torch.optim.Adam([*actor.parameters(), *model.parameters()], lr=1e-3)
        before = [parameter.clone() for parameter in actor.parameters()]
        for _ in range(3):
            batch = buffer.sample()
            assert torch.equal(
                batch["trace", "next", "observation"][:, -1], batch["next", "observation"]
            )
            out = losses[0](batch)
            out.update(losses[1](batch))
            (out["loss_backtrack"] + out["loss_imitation"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(not torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))

"""Masks and supports in the transform: with buffers, copies, keys and losses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import InitTracker, TransformedEnv
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from transform_data import SIZE, WIDTH, T, make_buffer, make_model, same, trace_of, transitions

from torchrl_recall import (
    BacktrackModel,
    BacktrackTransform,
    CellSupport,
    DataSupport,
    RecallTraceLoss,
    sample_traces,
)
from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.trace_masks import (
    Disagreement,
    ForwardAgreement,
    InSupport,
    LastVisitCells,
    LastVisitRadius,
    RisingDistance,
    RisingValue,
)
from torchrl_recall.traces.masks import last_visit

MASK = ("collector", "mask")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plus_action(observation, action):
    return observation + action.sum(-1, keepdim=True)


def to_end(state, end):
    return (state - end).norm(dim=-1)


def cloud(number):
    """Transitions of states of a normal law, with short steps."""
    data = transitions(number)
    data["observation"] = torch.randn(number, WIDTH)
    data["next", "observation"] = data["observation"] + 0.3 * torch.randn(number, WIDTH)
    return data


def make_masks(model):
    """One of each kind."""
    value = ValueOperator(nn.Linear(WIDTH, 1), in_keys=["observation"])
    forward = TensorDictModule(plus_action, ["observation", "action"], ["predicted"])
    support = DataSupport(num_references=64, factor=3.0).fit(cloud(200))
    return [
        RisingValue(value),
        RisingDistance(to_end),
        LastVisitCells(1.0),
        LastVisitRadius(0.8, scale=model),
        ForwardAgreement(forward, 1.0),
        InSupport(support),
    ]


def nothing(trace):
    return torch.zeros(trace.shape, dtype=torch.bool)


def everything(trace):
    return torch.ones(trace.shape, dtype=torch.bool)


def near_zero(state):
    return state.abs().amax(-1) < 3


class TestMasks:
    @pytest.mark.parametrize("num_traces", [None, 3])
    @pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
    def test_the_mask_is_all_masks_at_once(self, batch, num_traces):
        model = make_model()
        masks = make_masks(model)
        generator = torch.Generator().manual_seed(1)
        options = {"num_steps": 6, "num_traces": num_traces, "generator": generator}
        data = transitions(*batch)
        found = BacktrackTransform(model, masks=masks, **options)(data)["trace"]
        generator.manual_seed(1)
        plain = sample_traces(model, data["next", "observation"], **options)
        assert same(found.exclude(MASK), plain.exclude(MASK))
        expected = plain[MASK].clone()
        for mask in masks:
            expected &= mask(plain)
        assert torch.equal(found[MASK], expected)

    def test_each_mask_leaves_something_out_and_the_order_does_not_matter(self):
        model = make_model()
        masks = make_masks(model)
        kept, data = [], cloud(200)
        for order in ([], *([mask] for mask in masks), masks, masks[::-1]):
            generator = torch.Generator().manual_seed(1)
            transform = BacktrackTransform(model, num_steps=6, masks=order, generator=generator)
            kept.append(transform(data.clone())["trace"][MASK])
        assert kept[0].all()
        for one in kept[1 : 1 + len(masks)]:
            assert 0.02 < one.double().mean() < 0.999
        assert torch.equal(kept[-1], kept[-2])
        assert torch.equal(kept[-1], torch.stack(kept[:-1]).all(0))

    @pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
    @pytest.mark.parametrize("prefetch", [None, 2])
    def test_in_buffers(self, storage, prefetch):
        model = make_model()
        seen = []

        def watch(trace):
            seen.append(torch.is_grad_enabled())
            return everything(trace)

        transform = BacktrackTransform(
            model, num_steps=T, num_traces=2, masks=[*make_masks(model), watch], support=near_zero
        )
        rb = make_buffer(TensorDictReplayBuffer, transform, storage=storage, prefetch=prefetch)
        for _ in range(4):
            trace = rb.sample()["trace"]
            assert trace.shape == (8, 2, T)
            inside = near_zero(trace["observation"])
            assert not (trace[MASK] & ~inside).any()
            assert not any(value.requires_grad for value in trace.values(True, True))
        assert not any(seen)

    def test_ineligible_starts_stay_masked(self):
        transform = BacktrackTransform(
            make_model(), num_steps=T, masks=[everything], support=near_zero, min_value=0.0
        )
        data = transitions(6)
        data["next", "observation"][5, 0] = torch.nan
        trace = transform(data)["trace"]
        assert not trace[MASK][[0, 1, 2, 5]].any()
        assert trace[MASK][[3, 4]].any(-1).all()
        assert all(torch.isfinite(value).all() for value in trace.values(True, True))

    def test_named_dimensions(self):
        data = TransformedEnv(FourRoomsEnv(5, batch_size=(3,)), InitTracker()).rollout(6)
        assert data.names == [None, "time"]
        model = BacktrackModel.from_env(FourRoomsEnv(5), num_cells=(8,))
        value = TensorDictModule(
            lambda s: s.sum(-1, keepdim=True).float(), ["observation"], ["state_value"]
        )
        support = CellSupport(model).fit(data)
        masks = [RisingValue(value), LastVisitCells(2), InSupport(support)]
        out = BacktrackTransform(model, num_steps=T, masks=masks, support=support)(data)
        assert out["trace"].names == [None, "time", None]

    def test_nested_keys(self):
        model = BacktrackModel(
            {("agent", "position"): 2, "speed": 1}, 1, num_cells=(8,), action_key=("agent", "act")
        )
        keys = [("agent", "position"), "speed"]
        value = ValueOperator(
            TensorDictModule(lambda p, s: p.sum(-1, True) + s, keys, ["v"]).module,
            in_keys=keys,
        )
        forward = TensorDictModule(
            lambda p, s: (p, s), keys, [("next", *keys[0]), ("next", keys[1])]
        )
        support = DataSupport(model, num_references=50)
        following = {"agent": {"position": torch.randn(50, 2)}, "speed": torch.randn(50, 1)}
        data = TensorDict({**copy.deepcopy(following), "next": following}, [50])
        support.fit(data)
        masks = [
            RisingValue(value),
            RisingDistance(to_end, in_keys=keys),
            LastVisitCells(0.5, in_keys=("agent", "position")),
            LastVisitRadius(0.5, in_keys=keys, scale=model),
            ForwardAgreement(forward, 1.0, in_keys=keys),
            InSupport(support),
        ]
        for mask in masks:
            trace = BacktrackTransform(
                model, num_steps=T, masks=[mask], support=support, out_keys=[("extra", "t")]
            )(data)["extra", "t"]
            assert trace[MASK].any()
            assert not trace[MASK].all()

    def test_refusals(self):
        model = make_model()
        with pytest.raises(TypeError, match="masks must be a sequence of TraceMasks, got function"):
            BacktrackTransform(model, num_steps=T, masks=everything)
        with pytest.raises(TypeError, match="masks must hold TraceMasks, got a Tensor"):
            BacktrackTransform(model, num_steps=T, masks=[torch.ones(5, T)])
        with pytest.raises(TypeError, match="support must be callable, got list"):
            BacktrackTransform(model, num_steps=T, support=[])
        with pytest.raises(ValueError, match="num_candidates must be at least 1"):
            BacktrackTransform(model, num_steps=T, num_candidates=0)

        def refused(mask, error, match):
            with pytest.raises(error, match=match):
                BacktrackTransform(model, num_steps=T, masks=[mask])(transitions(5))

        refused(lambda t: everything(t)[:, 1:], ValueError, r"shape \(5, 3\), expected bool of")
        refused(lambda t: everything(t).float(), ValueError, r"function in masks gave torch.float")
        refused(lambda t: everything(t)[..., None], ValueError, r"shape \(5, 4, 1\)")
        refused(lambda t: True, TypeError, "function in masks gave a bool, expected a bool tensor")


class TestSupport:
    def test_first_candidate_inside(self):
        model = make_model()
        data = cloud(300)
        support = DataSupport(model, num_references=256).fit(data)
        options = {"num_steps": 8, "masks": []}
        cut = BacktrackTransform(model, **options | {"masks": [InSupport(support)]})
        redrawn = BacktrackTransform(model, **options, support=support, num_candidates=8)
        lengths = []
        for transform in (cut, redrawn):
            trace = transform(data.clone())["trace"]
            assert not (trace[MASK] & ~support(trace)).any()
            lengths.append(trace[MASK].sum(-1).double().mean())
        # The same guarantee, by longer traces.
        assert lengths[1] > 1.5 * lengths[0] > 0

    def test_mask_and_support_agree(self):
        """What was drawn inside needs no cut."""
        model = make_model()
        support = DataSupport(model, num_references=64).fit(cloud(200))
        transform = BacktrackTransform(
            model, num_steps=6, masks=[], support=support, generator=torch.Generator()
        )
        trace = trace_of(transform, cloud(50))
        assert trace[MASK].any()
        assert torch.equal(trace[MASK], InSupport(support)(trace) & trace[MASK])

    def test_last_visit_is_of_the_redrawn_walk(self):
        env = FourRoomsEnv(5)
        model = BacktrackModel.from_env(env, num_cells=(8,))
        data = env.rollout(50, break_when_any_done=False)
        support = CellSupport(model).fit(data)
        trace = BacktrackTransform(model, num_steps=9, support=support)(data)["trace"]
        states = torch.cat([trace["observation"], trace["next", "observation"][:, -1:]], 1)
        kept = trace[MASK]
        assert not (kept & ~last_visit(states)).any()
        assert not (kept & ~support(trace)).any()
        assert kept.any()

    def test_state_dict_reproduces_it(self):
        model = make_model()
        transform = BacktrackTransform(model, num_steps=T, support=near_zero)
        state = transform.state_dict()
        assert list(state) == ["_extra_state"]
        expected = trace_of(transform)
        other = BacktrackTransform(model, num_steps=T, support=near_zero)
        other.load_state_dict(state)
        assert same(trace_of(other), expected)


class TestShared:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    @pytest.mark.parametrize("held", [False, True])
    def test_copies(self, copied, held):
        model = make_model()
        masks = make_masks(model)
        support = DataSupport(model, num_references=64, factor=3.0).fit(cloud(200))
        transform = BacktrackTransform(model, num_steps=T, masks=masks, support=support)
        if held:
            make_buffer(TensorDictReplayBuffer, transform, prefetch=None)
        other = copied(transform)
        assert other.support is not support
        assert other.masks[3].scale.model is other.model  # what was one stays one
        assert same(trace_of(other), trace_of(transform))

    def test_networks_are_not_the_transforms(self):
        model = BacktrackModel(WIDTH, 2, num_cells=(8,), num_members=2)
        masks = [*make_masks(model), Disagreement(model, max_disagreement=0.5)]
        transform = BacktrackTransform(model, num_steps=T, masks=masks, support=nn.Identity())
        assert list(transform.parameters()) == []
        assert list(transform.children()) == []
        assert list(transform.state_dict()) == ["_extra_state"]
        transform.eval().to(torch.float64)
        assert masks[0].value_network.training
        assert all(p.dtype == torch.float32 for p in masks[0].value_network.parameters())


def actor():
    net = TensorDictModule(
        nn.Sequential(nn.Linear(WIDTH, 4), NormalParamExtractor()),
        ["observation"],
        ["loc", "scale"],
    )
    return ProbabilisticActor(net, ["loc", "scale"], distribution_class=TanhNormal)


class TestLosses:
    @pytest.mark.parametrize(
        "options", [{"masks": [nothing]}, {"support": lambda s: torch.zeros(len(s)).bool()}]
    )
    def test_all_masked_is_a_loss_of_exactly_zero(self, options):
        policy = actor()
        rb = make_buffer(
            TensorDictReplayBuffer,
            BacktrackTransform(make_model(), num_steps=T, num_traces=2, **options),
            prefetch=None,
        )
        data = rb.sample()
        assert not data["trace"][MASK].any()
        assert all(torch.isfinite(value).all() for value in data["trace"].values(True, True))
        loss = RecallTraceLoss(policy)(data)["loss_imitation"]
        assert loss == 0
        loss.backward()
        assert all(same(p.grad, 0) for p in policy.parameters())

    def test_some_masked_is_the_mean_of_the_others(self):
        policy, model = actor(), make_model()
        transform = BacktrackTransform(
            model, num_steps=6, masks=[LastVisitCells(0.5)], support=near_zero
        )
        data = transform(transitions(SIZE))
        trace = data["trace"]
        kept = trace[MASK]
        assert 0 < kept.sum() < kept.numel()
        rows = trace[kept]
        distribution = policy.get_dist(rows.select("observation"))
        expected = -distribution.log_prob(rows["action"]).mean()
        found = RecallTraceLoss(policy)(data)["loss_imitation"]
        torch.testing.assert_close(found, expected)

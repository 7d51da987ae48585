"""The transform in buffers, environments and collectors: the contract of TorchRL's transforms."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    MultiCategorical,
    OneHot,
    PrioritizedSampler,
    ReplayBuffer,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
    traj,
)
from torchrl.envs import (
    Compose,
    ExplorationType,
    InitTracker,
    ParallelEnv,
    RewardScaling,
    RewardSum,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
    set_exploration_type,
)
from torchrl.modules import OneHotCategorical, ProbabilisticActor, TanhNormal

from torchrl_recall import BacktrackModel, BacktrackTransform, RecallTraceLoss, sample_traces
from torchrl_recall.envs import FourRoomsEnv

with warnings.catch_warnings():
    # TorchRL warns of a deprecated class of its own when its collectors are imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector

T, SIZE, WIDTH = 4, 32, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def forked():
    """Start worker processes by fork: spawned ones import TorchRL again, for seconds."""
    before = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method("fork", force=True)
    yield
    torch.multiprocessing.set_start_method(before, force=True)


def make_model(observation=WIDTH, action=2, **kwargs):
    return BacktrackModel(observation, action, num_cells=(8,), **kwargs)


def transitions(*batch):
    """Transitions whose observations tell their row."""
    count = torch.Size(batch).numel()
    observation = torch.arange(count * WIDTH, dtype=torch.float32).reshape(*batch, WIDTH) / 100
    value = torch.linspace(-1, 1, count).reshape(*batch, 1)
    data = {"observation": observation, "action": torch.zeros(*batch, 2), "value_target": value}
    data["next"] = {"observation": observation + 1, "reward": value.clone()}
    return TensorDict(data, batch)


def trace_of(transform, data=None):
    return transform(transitions(5) if data is None else data)["trace"]


def same(a, b):
    return bool((a == b).all())


def has_extension():
    try:
        PrioritizedSampler(2, alpha=0.6, beta=0.4)
    except RuntimeError:
        return False
    return True


def make_buffer(cls, transform, *, storage=LazyTensorStorage, **kwargs):
    if cls is TensorDictPrioritizedReplayBuffer:
        if not has_extension():
            pytest.skip("TorchRL's C++ extension, which holds its sum trees, does not load here")
        kwargs |= {"alpha": 0.6, "beta": 0.4}
    rb = cls(storage=storage(SIZE), transform=transform, batch_size=8, **kwargs)
    rb.extend(transitions(SIZE))
    return rb


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


class TestReplayBuffer:
    @pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
    @pytest.mark.parametrize("prefetch", [None, 2])
    @pytest.mark.parametrize(
        "cls", [ReplayBuffer, TensorDictReplayBuffer, TensorDictPrioritizedReplayBuffer]
    )
    def test_every_buffer(self, cls, prefetch, storage):
        transform = BacktrackTransform(make_model(), num_steps=T)
        rb = make_buffer(cls, transform, storage=storage, prefetch=prefetch)
        for _ in range(3):
            sample = rb.sample()
            trace = sample["trace"]
            assert sample.shape == (8,)
            assert trace.shape == (8, T)
            assert trace["observation"].shape == (8, T, WIDTH)
            assert trace["action"].shape == (8, T, 2)
            assert trace["collector", "mask"].all()
            assert same(trace["next", "observation"][:, -1], sample["next", "observation"])
            assert same(trace["next", "observation"][:, :-1], trace["observation"][:, 1:])
            if cls is not ReplayBuffer:
                assert same(
                    sample["observation"], transitions(SIZE)["observation"][sample["index"]]
                )
            if cls is TensorDictPrioritizedReplayBuffer:
                assert sample["priority_weight"].shape == (8,)
                sample["td_error"] = torch.rand(8)
                rb.update_tensordict_priority(sample)
            if cls is TensorDictReplayBuffer:
                assert rb.sample(return_info=True)[0]["trace"].shape == (8, T)

    def test_num_traces_and_batches_of_any_shape(self):
        transform = BacktrackTransform(make_model(), num_steps=T, num_traces=3)
        for batch in [(), (2,), (2, 5)]:
            data = transform(transitions(*batch))
            assert data.shape == batch
            trace = data["trace"]
            assert trace.shape == (*batch, 3, T)
            start = data["next", "observation"].unsqueeze(-2).expand(*batch, 3, WIDTH)
            assert same(trace["next", "observation"][..., -1, :], start)
            first, second = trace["observation"][..., 0, :, :], trace["observation"][..., 1, :, :]
            assert not same(first, second)

    def test_reading_by_index(self):
        rb = make_buffer(
            TensorDictReplayBuffer, BacktrackTransform(make_model(), num_steps=T), prefetch=None
        )
        assert rb[:]["trace"].shape == (SIZE, T)
        assert rb[3:5]["trace"].shape == (2, T)
        assert rb[0]["trace"].shape == (T,)
        assert rb["observation"].shape == (SIZE, WIDTH)

    def test_reading_by_query(self):
        data = transitions(SIZE)
        data["collector", "traj_ids"] = torch.arange(SIZE) // 8
        transform = BacktrackTransform(make_model(), num_steps=T)
        rb = TensorDictReplayBuffer(storage=LazyTensorStorage(SIZE), transform=transform)
        rb.extend(data)
        for found in (rb.query(traj.reward.sum() > 0), rb.query(lambda t: t.total_reward > 0)):
            assert [trajectory.data["trace"].shape for trajectory in found] == [(8, T)] * 2
        assert rb.query(traj.reward.sum() > 1000) == []

    def test_two_dimensional_storage(self):
        transform = BacktrackTransform(make_model(), num_steps=T)
        rb = TensorDictReplayBuffer(
            storage=LazyTensorStorage(SIZE, ndim=2), transform=transform, batch_size=8
        )
        rb.extend(transitions(4, 8))
        assert rb.sample()["trace"].shape == (8, T)

    def test_live_weights(self):
        model = make_model()
        rb = make_buffer(
            TensorDictReplayBuffer, BacktrackTransform(model, num_steps=T), prefetch=None
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        rb.transform[0].generator.manual_seed(1)
        before = rb[:]["trace"]
        (-model.log_prob(transitions(5)).mean()).backward()
        optimizer.step()
        rb.transform[0].generator.manual_seed(1)
        after = rb[:]["trace"]
        assert not same(before["observation"], after["observation"])
        expected = sample_traces(
            model,
            transitions(SIZE)["next", "observation"],
            num_steps=T,
            generator=torch.Generator().manual_seed(1),
        )
        assert same(after, expected)

    def test_only_one_of_several_transforms(self):
        double = RewardScaling(0, 2, in_keys=[("next", "reward")])
        transform = BacktrackTransform(make_model(), num_steps=T)
        rb = make_buffer(TensorDictReplayBuffer, Compose(double, transform), prefetch=None)
        assert rb.sample()["trace"].shape == (8, T)

    def test_storage_carries_no_traces(self):
        storage = LazyTensorStorage(SIZE)
        learner = TensorDictReplayBuffer(storage=storage, batch_size=8)
        learner.extend(transitions(SIZE))
        recall = TensorDictReplayBuffer(
            storage=storage,
            writer=learner.writer,
            transform=BacktrackTransform(make_model(), num_steps=T),
            batch_size=8,
        )
        assert "trace" in recall.sample()
        assert "trace" not in learner.sample()
        assert "trace" not in storage[:]


class TestModelIsShared:
    """The transform has the model, but does not own it."""

    def test_neither_parameter_nor_state_nor_child(self):
        model = make_model()
        transform = BacktrackTransform(model, num_steps=T)
        assert list(transform.parameters()) == []
        assert list(transform.children()) == []
        assert list(transform.state_dict()) == ["_extra_state"]
        assert transform.model is model

    def test_not_moved_nor_cast(self):
        model = make_model()
        transform = BacktrackTransform(model, num_steps=T)
        transform.to(torch.float64)
        transform.to("meta")
        assert model.dtype == torch.float32
        assert model.device.type == "cpu"
        assert all(p.dtype == torch.float32 and not p.is_meta for p in model.parameters())

    @pytest.mark.parametrize("place", ["buffer", "env", "constructor"])
    def test_training_flag_untouched(self, place):
        model = make_model()
        transform = BacktrackTransform(model, num_steps=T)
        if place == "buffer":
            rb = TensorDictReplayBuffer(storage=LazyTensorStorage(SIZE))
            rb.append_transform(transform)
        elif place == "constructor":
            TensorDictReplayBuffer(storage=LazyTensorStorage(SIZE), transform=transform)
        else:
            TransformedEnv(FourRoomsEnv(5)).append_transform(transform)
        assert all(module.training for module in model.modules())
        transform.eval()
        assert model.training

    @pytest.mark.parametrize("prefetch", [None, 2])
    def test_no_gradient_and_no_change_of_the_model(self, prefetch):
        model = make_model()
        before = copy.deepcopy(model.state_dict())
        transform = BacktrackTransform(model, num_steps=T)
        seen = []
        forward = transform._traces
        transform._traces = lambda data: (seen.append(torch.is_grad_enabled()), forward(data))[1]
        rb = make_buffer(TensorDictReplayBuffer, transform, prefetch=prefetch)
        for _ in range(3):
            sample = rb.sample()
        assert seen
        assert not any(seen)
        assert torch.is_grad_enabled()
        assert not any(value.requires_grad for value in sample.values(True, True))
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        for name, value in model.state_dict().items():
            assert same(value, before[name])

    def test_inference_of_a_model_with_frozen_parameters(self):
        model = make_model().requires_grad_(False)
        trace_of(BacktrackTransform(model, num_steps=T))
        assert not any(p.requires_grad for p in model.parameters())


class TestRandomness:
    def test_exploration_type_has_no_say(self):
        transform = BacktrackTransform(make_model(), num_steps=T)
        transform.generator.manual_seed(3)
        expected = trace_of(transform)
        kinds = (ExplorationType.DETERMINISTIC, ExplorationType.MEAN, ExplorationType.MODE)
        for kind in kinds:
            transform.generator.manual_seed(3)
            with set_exploration_type(kind):
                assert same(trace_of(transform), expected)

    def test_exploration_type_of_another_thread_has_no_say(self):
        transform = BacktrackTransform(make_model(), num_steps=T)
        inside, done = threading.Event(), threading.Event()

        def loss():
            with set_exploration_type(ExplorationType.DETERMINISTIC):
                inside.set()
                done.wait(10)

        thread = threading.Thread(target=loss)
        thread.start()
        inside.wait(10)
        data = transitions(1).expand(256).clone()
        spread = transform(data)["trace", "action"].std(0).min()
        done.set()
        thread.join()
        assert spread > 0.05

    def test_own_stream(self):
        """Neither does global randomness decide, nor does sampling use it up."""
        transform = BacktrackTransform(make_model(), num_steps=T)
        transform.generator.manual_seed(3)
        state = torch.get_rng_state()
        expected = trace_of(transform)
        assert same(torch.get_rng_state(), state)
        torch.manual_seed(17)
        transform.generator.manual_seed(3)
        assert same(trace_of(transform), expected)
        assert not same(trace_of(transform)["observation"], expected["observation"])

    def test_seeded_from_torch(self):
        model = make_model()
        traces = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            traces.append(trace_of(BacktrackTransform(model, num_steps=T)))
        assert same(traces[0], traces[1])
        assert not same(traces[0]["observation"], traces[2]["observation"])

    def test_given_generator(self):
        generator = torch.Generator().manual_seed(2)
        transform = BacktrackTransform(make_model(), num_steps=T, generator=generator)
        assert transform.generator is generator
        meta = make_model().to("meta")
        with pytest.raises(ValueError, match="generator is on device cpu"):
            BacktrackTransform(meta, num_steps=T, generator=generator)

    def test_state_dict(self):
        transform = BacktrackTransform(make_model(), num_steps=T)
        trace_of(transform)
        state = transform.state_dict()
        expected = trace_of(transform)
        other = BacktrackTransform(transform.model, num_steps=T)
        other.load_state_dict(state)
        assert same(trace_of(other), expected)
        other.load_state_dict(state)  # the state is a copy, not the generator's own
        assert same(trace_of(other), expected)

    @pytest.mark.parametrize("way", ["state_dict", "dumps"])
    def test_buffer_checkpoint(self, way, tmp_path):
        model = make_model()

        def build():
            transform = BacktrackTransform(model, num_steps=T)
            rb = make_buffer(TensorDictReplayBuffer, transform, prefetch=None)
            rb.set_rng(torch.Generator().manual_seed(0))
            return rb

        rb, other = build(), build()
        rb.sample()
        if way == "state_dict":
            state = rb.state_dict()
            expected = rb[:]["trace"]
            other.load_state_dict(state)
            assert not any("network" in key for key in state["_transforms"])
        else:
            rb.dumps(tmp_path)
            expected = rb[:]["trace"]
            other.loads(tmp_path)
        assert same(other[:]["trace"], expected)

    def test_reproducible_with_prefetch(self):
        model = make_model()
        runs = []
        for _ in range(2):
            generator = torch.Generator().manual_seed(4)
            transform = BacktrackTransform(model, num_steps=T, generator=generator)
            rb = TensorDictReplayBuffer(
                storage=LazyTensorStorage(SIZE), transform=transform, batch_size=8, prefetch=1
            )
            rb.set_rng(torch.Generator().manual_seed(1))
            rb.extend(transitions(SIZE))
            runs.append(torch.stack([rb.sample()["trace"] for _ in range(4)]))
        assert same(*runs)


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    @pytest.mark.parametrize("held", [False, True])
    def test_copy_goes_on_like_the_original(self, copied, held):
        transform = BacktrackTransform(make_model(), num_steps=T, min_value=0.0)
        if held:
            make_buffer(TensorDictReplayBuffer, transform, prefetch=None)
        other = copied(transform)
        assert other.model is not transform.model
        assert other.generator is not transform.generator
        assert same(trace_of(other), trace_of(transform))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copy_of_a_buffer(self, copied):
        rb = make_buffer(
            TensorDictReplayBuffer, BacktrackTransform(make_model(), num_steps=T), prefetch=None
        )
        other = copied(rb)
        assert same(other[:]["trace"], rb[:]["trace"])

    def test_clone_shares_model_and_generator(self):
        transform = BacktrackTransform(make_model(), num_steps=T)
        clone = transform.clone()
        assert clone is not transform
        assert clone.model is transform.model
        assert clone.generator is transform.generator
        assert trace_of(clone).shape == (5, T)

    def test_deepcopied_with_its_model_stays_with_it(self):
        both = copy.deepcopy(
            {"transform": BacktrackTransform(m := make_model(), num_steps=T), "m": m}
        )
        assert both["transform"].model is both["m"]


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


class TestEnvironment:
    """On an environment the transform does nothing."""

    def test_single(self):
        env = FourRoomsEnv(5)
        transform = BacktrackTransform(BacktrackModel.from_env(env, num_cells=(8,)), num_steps=T)
        transformed = TransformedEnv(env, Compose(InitTracker(), transform))
        check_env_specs(transformed)
        assert transform.parent is not None
        assert "trace" not in transformed.rollout(3)
        assert "trace" not in transformed.reset()
        assert "trace" not in list(transformed.observation_spec.keys(True, True))
        assert transformed.append_transform(RewardSum()).rollout(3).shape == (3,)

    @pytest.mark.parametrize("wrapper", [SerialEnv, ParallelEnv])
    @pytest.mark.parametrize("inner", [True, False])
    def test_batched(self, wrapper, inner):
        model = BacktrackModel.from_env(FourRoomsEnv(5), num_cells=(8,))

        def transform():
            return BacktrackTransform(model, num_steps=T)

        def make():
            return TransformedEnv(FourRoomsEnv(5), transform()) if inner else FourRoomsEnv(5)

        options = {"mp_start_method": "fork"} if wrapper is ParallelEnv else {}
        env = wrapper(2, make, **options)
        try:
            if not inner:
                env = TransformedEnv(env, transform())
            data = env.rollout(3)
            assert data.shape == (2, 3)
            assert "trace" not in data
        finally:
            env.close(raise_if_closed=False)

    def test_buffer_first_then_env(self):
        transform = BacktrackTransform(
            BacktrackModel.from_env(FourRoomsEnv(5), num_cells=(8,)), num_steps=T
        )
        rb = TensorDictReplayBuffer(
            storage=LazyTensorStorage(SIZE), transform=transform, batch_size=4
        )
        env = TransformedEnv(FourRoomsEnv(5), transform.clone())
        rb.extend(env.rollout(10))
        assert rb.sample()["trace"].shape == (4, T)


class TestCollector:
    FRAMES = 8

    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_single(self, device):
        model = BacktrackModel.from_env(FourRoomsEnv(5), num_cells=(8,))
        transform = BacktrackTransform(model, num_steps=T)
        collector = Collector(
            FourRoomsEnv(5),
            None,
            frames_per_batch=self.FRAMES,
            total_frames=2 * self.FRAMES,
            postproc=transform,
            storing_device=device,
        )
        assert model.training
        for data in collector:
            assert data["trace"].shape == (self.FRAMES, T)
            assert same(data["trace", "next", "observation"][:, -1], data["next", "observation"])
        collector.shutdown()

    def test_split_trajectories(self):
        model = BacktrackModel.from_env(FourRoomsEnv(5), num_cells=(8,))
        with pytest.warns(UserWarning, match="split_trajs"):
            collector = Collector(
                FourRoomsEnv(5, max_steps=5),
                None,
                frames_per_batch=self.FRAMES,
                total_frames=self.FRAMES,
                postproc=BacktrackTransform(model, num_steps=T),
                split_trajs=True,
            )
        data = next(iter(collector))
        mask = data["collector", "mask"]
        kept = data["trace", "collector", "mask"]
        assert not mask.all()
        assert kept.any()
        assert not kept[~mask].any()
        collector.shutdown()

    def test_multi_sync(self, forked):
        model = BacktrackModel.from_env(FourRoomsEnv(5), num_cells=(8,))
        collector = MultiSyncCollector(
            [FourRoomsEnv(5, seed=i) for i in range(2)],
            None,
            frames_per_batch=self.FRAMES,
            total_frames=2 * self.FRAMES,
            postproc=BacktrackTransform(model, num_steps=T),
        )
        actions = []
        for data in collector:
            assert data.numel() == self.FRAMES
            assert data["trace"].shape == (*data.shape, T)
            assert same(
                data["trace", "next", "observation"][..., -1, :], data["next", "observation"]
            )
            actions.append(data["trace", "action"])
            with torch.no_grad():
                model.action_network[-1].bias[2] = 100.0  # the next batch must see it
        collector.shutdown()
        assert not same(actions[0], 2)
        assert same(actions[1], 2)

    @pytest.mark.parametrize("wrap", [lambda x: x, Compose])
    def test_multi_async_is_refused(self, forked, wrap):
        model = BacktrackModel.from_env(FourRoomsEnv(5), num_cells=(8,))
        with pytest.raises(TypeError, match=r"MultiAsyncCollector .*frozen weights.*replay buffer"):
            MultiAsyncCollector(
                [FourRoomsEnv(5)],
                None,
                frames_per_batch=self.FRAMES,
                total_frames=self.FRAMES,
                postproc=wrap(BacktrackTransform(model, num_steps=T)),
            )

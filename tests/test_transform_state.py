"""What the transform holds: a model that it shares, a random stream of its own; its copies."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import ExplorationType, TransformedEnv, set_exploration_type
from transform_data import SIZE, T, make_buffer, make_model, same, trace_of, transitions

from torchrl_recall import BacktrackTransform
from torchrl_recall.envs import FourRoomsEnv


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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

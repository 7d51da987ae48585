"""The length of traces: set by hand, or grown by a scheduler."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers.scheduler import LinearScheduler, SchedulerList
from transform_data import T, make_buffer, make_model, trace_of, transitions

from torchrl_recall import BacktrackTransform, TraceLengthScheduler, ValuePrioritizedSampler


def make(num_steps=1):
    return BacktrackTransform(make_model(), num_steps=num_steps)


class TestLength:
    def test_set_at_any_time(self):
        transform = make(T)
        for length in (7, np.int64(2), 1):
            transform.num_steps = length
            assert type(transform.num_steps) is int
            assert trace_of(transform).shape == (5, length)

    def test_refused(self):
        transform = make(T)
        for bad in (0, -3):
            with pytest.raises(ValueError, match="num_steps must be at least 1"):
                transform.num_steps = bad
        for bad in (2.0, "3", True, None):
            with pytest.raises(TypeError, match="num_steps must be an int"):
                transform.num_steps = bad
        assert transform.num_steps == T

    def test_copies_keep_it(self):
        transform = make(T)
        transform.num_steps = 6
        for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
            assert other.num_steps == 6
            other.num_steps = 2
        assert transform.num_steps == 6

    @pytest.mark.parametrize("prefetch", [None, 2])
    def test_in_a_buffer(self, prefetch):
        transform = make(T)
        rb = make_buffer(TensorDictReplayBuffer, transform, prefetch=prefetch)
        rb.sample()
        transform.num_steps = 9
        lengths = [rb.sample()["trace"].shape[-1] for _ in range(5)]
        assert set(lengths) <= {T, 9}
        assert lengths[-1] == 9
        assert lengths == sorted(lengths)


def lengths_of(scheduler, number):
    found = []
    for _ in range(number):
        scheduler.step()
        found.append(scheduler.transform.num_steps)
    return found


class TestScheduler:
    def test_grows_as_bmpo(self):
        scheduler = TraceLengthScheduler(make(), final_steps=15, num_updates=100)
        expected = [1 + int(14 * min(k, 100) / 100 + 1e-9) for k in range(1, 131)]
        assert lengths_of(scheduler, 130) == expected
        assert expected[0] == 1
        assert expected[99] == 15

    def test_shrinks_and_waits(self):
        scheduler = TraceLengthScheduler(make(5), final_steps=1, num_updates=4, delay=2)
        assert lengths_of(scheduler, 8) == [5, 5, 4, 3, 2, 1, 1, 1]
        jump = TraceLengthScheduler(make(5), final_steps=9, num_updates=1)
        assert lengths_of(jump, 2) == [9, 9]

    def test_as_torchrls_linear_scheduler(self):
        """To rounding, the length is what that scheduler makes of a sampler's number."""
        sampler = ValuePrioritizedSampler(10, alpha=2.0)
        linear = LinearScheduler(sampler, "alpha", final_value=30.0, num_steps=13)
        scheduler = TraceLengthScheduler(make(2), final_steps=30, num_updates=13)
        both = SchedulerList([linear, scheduler])
        for _ in range(20):
            both.step()
            assert scheduler.transform.num_steps == int(float(sampler.alpha) + 1e-6)

    def test_state(self):
        scheduler = TraceLengthScheduler(make(), final_steps=15, num_updates=20, delay=1)
        lengths_of(scheduler, 9)
        state = copy.deepcopy(scheduler.state_dict())
        assert "transform" not in state
        other = TraceLengthScheduler(make(3), final_steps=4, num_updates=1)
        other.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert other.transform.num_steps == scheduler.transform.num_steps == 6
        assert lengths_of(other, 15) == lengths_of(scheduler, 15)
        with pytest.raises(KeyError, match="expected"):
            other.load_state_dict({"final_steps": 3})
        both = copy.deepcopy(scheduler)
        assert both.transform is not scheduler.transform

    def test_traces_grow(self):
        transform = make()
        scheduler = TraceLengthScheduler(transform, final_steps=3, num_updates=2)
        shapes = [transform(transitions(2))["trace"].shape[-1]]
        for _ in range(3):
            scheduler.step()
            shapes.append(transform(transitions(2))["trace"].shape[-1])
        assert shapes == [1, 2, 3, 3]

    def test_refused(self):
        for name in ("final_steps", "num_updates"):
            options = {"final_steps": 3, "num_updates": 3, name: 0}
            with pytest.raises(ValueError, match=f"{name} must be at least 1"):
                TraceLengthScheduler(make(), **options)
        with pytest.raises(ValueError, match="delay must be at least 0"):
            TraceLengthScheduler(make(), final_steps=3, num_updates=3, delay=-1)
        with pytest.raises(TypeError, match="transform must be a BacktrackTransform"):
            TraceLengthScheduler(make_model(), final_steps=3, num_updates=3)

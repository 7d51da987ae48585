"""The transform in replay buffers: every kind of buffer, storage and way of reading."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
    traj,
)
from torchrl.envs import Compose, RewardScaling
from transform_data import SIZE, WIDTH, T, make_buffer, make_model, same, transitions

from torchrl_recall import BacktrackTransform, sample_traces


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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

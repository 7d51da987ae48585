"""The transform on environments, where it does nothing, and after collectors."""

from __future__ import annotations

import pytest
import torch
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import (
    Compose,
    InitTracker,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
)
from transform_data import SIZE, T, same

from torchrl_recall import BacktrackModel, BacktrackTransform
from torchrl_recall.envs import FourRoomsEnv


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def forked():
    """Start worker processes by fork: spawned ones import TorchRL again, for seconds."""
    before = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method("fork", force=True)
    yield
    torch.multiprocessing.set_start_method(before, force=True)


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

"""The transform with everything TorchRL runs environments and collects data with.

Each cell samples, and finds that the traces end in the next state of the transition they belong to.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import (
    AsyncBatchedCollector,
    AsyncCollector,
    Collector,
    MultiAsyncCollector,
    MultiSyncCollector,
)
from torchrl.data import (
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.samplers import RandomSampler
from torchrl.envs import AsyncEnvPool, ParallelEnv, SerialEnv, TransformedEnv
from transform_data import SIZE, T, check_traces, same

from torchrl_recall import BacktrackModel, BacktrackTransform, ValuePrioritizedSampler
from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.model.heads import SupportDelta

BATCH, FRAMES = 8, 8
make_maze = partial(FourRoomsEnv, 5)


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


def make_transform(model):
    return BacktrackTransform(model, num_steps=T)


def maze_model():
    return BacktrackModel.from_env(make_maze(), num_cells=(8,))


def make_transformed(transform):
    return TransformedEnv(make_maze(), transform.clone())


ENVIRONMENTS = {
    "SerialEnv": lambda makers: SerialEnv(len(makers), makers),
    "ParallelEnv": lambda makers: ParallelEnv(len(makers), makers, mp_start_method="fork"),
    "threads": partial(AsyncEnvPool, backend="threading"),
    "threads_lazy": partial(AsyncEnvPool, backend="threading", stack="lazy"),
    "processes": partial(AsyncEnvPool, backend="multiprocessing", exchange="queue"),
    "processes_lazy": partial(
        AsyncEnvPool, backend="multiprocessing", exchange="queue", stack="lazy"
    ),
}


class TestEnvironment:
    @pytest.mark.parametrize("kind", ENVIRONMENTS)
    def test_model_data_and_traces(self, kind, forked):
        """The model reads the specs, the transform idles inside, the buffer gives traces."""
        idle = make_transform(maze_model())
        env = ENVIRONMENTS[kind]([partial(make_transformed, idle)] * 2)
        try:
            model = BacktrackModel.from_env(env, num_cells=(8,))
            data = env.rollout(6, break_when_any_done=False)
        finally:
            env.close(raise_if_closed=False)
        assert isinstance(model.delta_head, SupportDelta)
        assert data.shape == (2, 6)
        assert "trace" not in data
        storage = LazyStackStorage if "lazy" in kind else LazyTensorStorage
        buffer = TensorDictReplayBuffer(
            storage=storage(SIZE), transform=make_transform(model), batch_size=BATCH
        )
        buffer.extend(data.reshape(-1).exclude("env_index"))
        check_traces(buffer.sample())

    @pytest.mark.parametrize("stack", ["dense", "lazy"])
    def test_steps_of_an_asynchronous_environment(self, stack):
        env = AsyncEnvPool([make_maze] * 2, backend="threading", stack=stack)
        model = BacktrackModel.from_env(env, num_cells=(8,))
        buffer = TensorDictReplayBuffer(
            storage=ListStorage(SIZE), transform=make_transform(model), batch_size=BATCH
        )
        try:
            data = env.reset()
            while len(buffer) < 12:
                data["action"] = torch.randint(4, data.shape)
                env.async_step_send(data)
                steps = env.async_step_recv(min_get=1)
                buffer.extend(steps.exclude("env_index"))
                data = env.step_mdp(steps)
        finally:
            env.close()
        check_traces(buffer.sample())


def random_policy():
    def act(observation):
        return torch.randint(4, observation.shape[:-1])

    return TensorDictModule(act, ["observation"], ["action"])


COLLECTORS = {
    "Collector": lambda **kw: Collector(make_maze, None, **kw),
    "MultiSyncCollector": lambda **kw: MultiSyncCollector([make_maze] * 2, None, **kw),
    "MultiAsyncCollector": lambda **kw: MultiAsyncCollector([make_maze] * 2, None, **kw),
    "AsyncCollector": lambda **kw: AsyncCollector(make_maze, None, **kw),
    "AsyncBatchedCollector": lambda **kw: AsyncBatchedCollector(
        [make_maze] * 2, policy=random_policy(), env_backend="threading", **kw
    ),
}
COPIES_ITS_POSTPROC = ("MultiAsyncCollector", "AsyncCollector")


@pytest.mark.parametrize("kind", COLLECTORS)
class TestCollector:
    def collect(self, kind, **options):
        collector = COLLECTORS[kind](frames_per_batch=FRAMES, total_frames=4 * FRAMES, **options)
        try:
            yield from collector
        finally:
            collector.shutdown()

    def test_postproc(self, kind, forked):
        model = maze_model()
        if kind in COPIES_ITS_POSTPROC:
            with pytest.raises(TypeError, match=r"frozen weights.*replay buffer"):
                list(self.collect(kind, postproc=make_transform(model)))
            return
        count = 0
        for data in self.collect(kind, postproc=make_transform(model)):
            check_traces(data)
            count += data.numel()
        assert count == 4 * FRAMES

    def test_into_a_buffer(self, kind, forked):
        model = maze_model()
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(64), transform=make_transform(model), batch_size=BATCH
        )
        for data in self.collect(kind):
            buffer.extend(data.reshape(-1))
            check_traces(buffer.sample())
        assert len(buffer) == 4 * FRAMES

    @pytest.mark.parametrize("sampler", [RandomSampler, partial(ValuePrioritizedSampler, 64)])
    def test_a_buffer_that_its_workers_write(self, kind, sampler, forked, tmp_path):
        model = maze_model()
        # Of several processes: TorchRL's own storage in memory shows them rows not yet written.
        buffer = TensorDictReplayBuffer(
            storage=LazyMemmapStorage(64, scratch_dir=tmp_path),
            sampler=sampler(),
            transform=make_transform(model),
            batch_size=BATCH,
        )
        for _ in self.collect(kind, replay_buffer=buffer):
            check_traces(buffer.sample())
        assert len(buffer) >= 4 * FRAMES  # asynchronous workers may be ahead
        live = buffer.sample()
        with torch.no_grad():
            model.action_network[-1].bias[2] = 100.0
        assert not same(live["trace", "action"], 2)
        assert same(buffer.sample()["trace", "action"], 2)

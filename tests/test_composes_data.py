"""The transform with everything TorchRL stores, writes and draws data with.

Each cell samples, and finds that the traces end in the next state of the transition they belong to.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrl.data import (
    CompressedListStorage,
    HERReplayBuffer,
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    OfflineToOnlineReplayBuffer,
    PrioritizedReplayBuffer,
    RemoteTensorDictReplayBuffer,
    ReplayBuffer,
    ReplayBufferEnsemble,
    RoundRobinWriter,
    StorageEnsemble,
    TensorDictMaxValueWriter,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
    TensorStorage,
    WriterEnsemble,
)
from torchrl.data.replay_buffers.samplers import (
    ConsumingSampler,
    PrioritizedSampler,
    PrioritizedSliceSampler,
    RandomSampler,
    SamplerEnsemble,
    SamplerWithoutReplacement,
    SliceSampler,
    SliceSamplerWithoutReplacement,
    StalenessAwareSampler,
    StreamingSliceSampler,
)
from transform_data import (
    SIZE,
    WIDTH,
    T,
    check_traces,
    has_extension,
    make_model,
    same,
    transitions,
)

from torchrl_recall import (
    BacktrackModel,
    BacktrackTransform,
    ValuePrioritizedSampler,
)

BATCH = 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_transform():
    return BacktrackTransform(make_model(), num_steps=T)


def check_rows(data):
    """Return which rows of `transitions` these are, if they are whole."""
    assert same(data["next", "observation"], data["observation"] + 1)
    return (data["observation"][..., 0] * 100 / WIDTH).round()


STORAGES = {
    "ListStorage": lambda path: ListStorage(SIZE),
    "LazyTensorStorage": lambda path: LazyTensorStorage(SIZE),
    "LazyMemmapStorage": lambda path: LazyMemmapStorage(SIZE, scratch_dir=path),
    "TensorStorage": lambda path: TensorStorage(transitions(SIZE)),
    "LazyStackStorage": lambda path: LazyStackStorage(SIZE),
    "CompressedListStorage": lambda path: CompressedListStorage(SIZE),
}
WRITERS = {
    "RoundRobinWriter": RoundRobinWriter,
    "TensorDictRoundRobinWriter": TensorDictRoundRobinWriter,
    "TensorDictMaxValueWriter": partial(TensorDictMaxValueWriter, rank_key="value_target"),
}
# Prioritised buffers choose their writer themselves.
BUFFERS = [(cls, name) for cls in (ReplayBuffer, TensorDictReplayBuffer) for name in WRITERS]
BUFFERS += [(PrioritizedReplayBuffer, None), (TensorDictPrioritizedReplayBuffer, None)]


class TestBuffer:
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize(("cls", "writer"), BUFFERS)
    def test_every_storage_and_writer(self, cls, writer, storage, tmp_path):
        options = {}
        if writer is not None:
            options["writer"] = WRITERS[writer]()
        elif not has_extension():
            pytest.skip("TorchRL's C++ extension, which holds its sum trees, does not load here")
        else:
            options |= {"alpha": 0.6, "beta": 0.4}
        buffer = cls(
            storage=STORAGES[storage](tmp_path),
            transform=make_transform(),
            batch_size=BATCH,
            **options,
        )
        for data in transitions(SIZE).split(SIZE // 2):
            buffer.extend(data)
        for _ in range(2):
            sample = buffer.sample()
            assert sample.shape == (BATCH,)
            check_traces(sample)
            rows = check_rows(sample)
            if "index" in sample:
                assert same(sample["index"].flatten(), rows)
        assert "trace" not in buffer._storage[0]

    @pytest.mark.parametrize("cls", [ReplayBuffer, TensorDictReplayBuffer])
    def test_immutable_data(self, cls):
        buffer = cls(
            storage=TensorStorage(transitions(SIZE)),
            writer=ImmutableDatasetWriter(),
            transform=make_transform(),
            batch_size=BATCH,
        )
        check_traces(buffer.sample())
        with pytest.raises(RuntimeError, match="doesn't allow writing"):
            buffer.extend(transitions(SIZE))

    def test_the_best_transitions_are_those_that_the_writer_keeps(self):
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(4),
            writer=TensorDictMaxValueWriter(rank_key="value_target"),
            transform=make_transform(),
            batch_size=BATCH,
        )
        buffer.extend(transitions(SIZE))
        sample = buffer.sample()
        check_traces(sample)
        assert same(check_rows(sample) >= SIZE - 4, True)

    def test_remote(self):
        buffer = RemoteTensorDictReplayBuffer(
            storage=LazyTensorStorage(SIZE), transform=make_transform(), batch_size=BATCH
        )
        buffer.extend(transitions(SIZE))
        check_traces(buffer.sample())

    def test_offline_and_online(self):
        offline = TensorDictReplayBuffer(storage=LazyTensorStorage(SIZE))
        offline.extend(transitions(SIZE))
        buffer = OfflineToOnlineReplayBuffer(
            offline, online_capacity=SIZE, transform=make_transform(), batch_size=BATCH
        )
        online = transitions(SIZE)
        online["index"] = torch.arange(SIZE)
        buffer.extend(online)
        check_traces(buffer.sample())


SLICES = {"slice_len": 4, "traj_key": "episode"}
PRIORITIES = {"max_capacity": SIZE, "alpha": 0.6, "beta": 0.4}
SAMPLERS = {
    "random": RandomSampler,
    "without_replacement": SamplerWithoutReplacement,
    "consuming": ConsumingSampler,
    "slices": partial(SliceSampler, **SLICES),
    "slices_without_replacement": partial(SliceSamplerWithoutReplacement, **SLICES),
    "streaming_slices": partial(StreamingSliceSampler, **SLICES),
    "prioritized": partial(PrioritizedSampler, **PRIORITIES),
    "prioritized_slices": partial(PrioritizedSliceSampler, **PRIORITIES, **SLICES),
    "staleness": partial(StalenessAwareSampler, max_staleness=5),
    "by_value": partial(ValuePrioritizedSampler, SIZE),
}


@pytest.mark.parametrize("storage", ["LazyTensorStorage", "LazyMemmapStorage"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(sampler, storage, tmp_path):
    if "prioritized" in sampler and not has_extension():
        pytest.skip("TorchRL's C++ extension, which holds its sum trees, does not load here")
    data = transitions(SIZE)
    data["episode"] = torch.arange(SIZE) // BATCH
    data["policy_version"] = torch.zeros(SIZE)
    buffer = TensorDictReplayBuffer(
        storage=STORAGES[storage](tmp_path),
        sampler=SAMPLERS[sampler](),
        transform=make_transform(),
        batch_size=BATCH,
    )
    buffer.extend(data)
    sample = buffer.sample()
    check_traces(sample)
    assert same(check_rows(sample), sample["index"].flatten())
    if "slices" in sampler:
        assert same(sample["episode"].reshape(-1, 4).diff(dim=-1), 0)


class TestEnsemble:
    def member(self, **options):
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(SIZE), batch_size=BATCH, **options
        )
        buffer.extend(transitions(SIZE))
        return buffer

    @pytest.mark.parametrize(
        ("options", "shape"),
        [
            ({}, (2, BATCH // 2)),
            ({"sample_from_all": True}, (2, BATCH // 2)),
            ({"num_buffer_sampled": 1}, (1, BATCH)),
            ({"p": [0.9, 0.1]}, (2, BATCH // 2)),
        ],
    )
    @pytest.mark.parametrize("where", ["ensemble", "members"])
    def test_traces_of_the_ensemble_or_of_its_members(self, where, options, shape):
        inner = [make_transform() if where == "members" else None for _ in range(2)]
        if where == "ensemble":
            options = {**options, "transform": make_transform()}
        members = [self.member(transform=transform) for transform in inner]
        sample = ReplayBufferEnsemble(*members, batch_size=BATCH, **options).sample()
        assert sample.shape == shape
        check_traces(sample)
        check_rows(sample)

    def test_from_its_parts(self):
        storages = [self.member().storage for _ in range(2)]
        buffer = ReplayBufferEnsemble(
            storages=StorageEnsemble(*storages, transforms=[make_transform(), None]),
            samplers=SamplerEnsemble(RandomSampler(), RandomSampler()),
            writers=WriterEnsemble(RoundRobinWriter(), RoundRobinWriter()),
            transform=make_transform(),
            collate_fns=[lambda x: x] * 2,
            batch_size=BATCH,
        )
        check_traces(buffer.sample())

    def test_routed_writes(self):
        members = [TensorDictReplayBuffer(storage=LazyTensorStorage(SIZE)) for _ in range(2)]
        buffer = ReplayBufferEnsemble(
            *members,
            transform=make_transform(),
            batch_size=BATCH,
            routing_key="who",
            sample_from_all=True,
        )
        data = transitions(SIZE)
        data["who"] = torch.arange(SIZE) % 2
        buffer.extend(data)
        sample = buffer.sample()
        check_traces(sample)
        assert same(check_rows(sample) % 2, sample["who"])


class TestHindsight:
    """`HERReplayBuffer` gives its rows other goals *after* its transforms have run."""

    def data(self):
        data = transitions(SIZE)
        for key in ("desired_goal", "achieved_goal"):
            data[key], data["next", key] = torch.randn(2, SIZE, 2)
        data["next", "done"] = (torch.arange(SIZE) % 8 == 7).unsqueeze(-1)
        data["next", "terminated"] = data["next", "done"].clone()
        return data

    def buffer(self, **options):
        def reward(td):
            return (td["achieved_goal"] - td["desired_goal"]).norm(dim=-1, keepdim=True)

        buffer = HERReplayBuffer(
            reward, storage=LazyTensorStorage(SIZE), her_ratio=1.0, batch_size=BATCH, **options
        )
        buffer.extend(self.data())
        return buffer

    def test_states_without_goals(self):
        check_traces(self.buffer(transform=make_transform()).sample())

    def test_states_with_goals_are_walked_from_behind_the_buffer(self):
        model = BacktrackModel({"observation": WIDTH, "desired_goal": 2}, 2, num_cells=(8,))
        transform = BacktrackTransform(model, num_steps=T)
        sample = transform(self.buffer().sample())
        check_traces(sample)
        goal = sample["desired_goal"]
        assert same(goal, sample["next", "desired_goal"])
        assert same(sample["trace", "next", "desired_goal"][:, -1], goal)

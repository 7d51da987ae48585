"""Values that a refresh gives on TorchRL's storages: against loops over what is stored."""

from __future__ import annotations

import math

import pytest
import torch
from refresh_data import (
    GAMMA,
    IDS,
    Critic,
    recall_buffer,
    returns_by_loop,
    stored,
    transitions,
    values,
)
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, LazyStackStorage, LazyTensorStorage, ListStorage
from torchrl.modules import RandomPolicy

from torchrl_recall import ValuePrioritizedSampler, ValueRefresh, transition_value
from torchrl_recall.envs import FourRoomsEnv

STORAGES = [LazyTensorStorage, LazyMemmapStorage, ListStorage, LazyStackStorage]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_bootstrap_is_transition_value(storage, chunk_size):
    buffer = recall_buffer(40, storage=storage)
    for seed in range(3):
        buffer.extend(transitions(15, seed=seed))
    keys = set(stored(buffer).keys(True, True))
    critic = Critic()
    ValueRefresh(buffer, critic, gamma=GAMMA, chunk_size=chunk_size)()
    torch.testing.assert_close(
        values(buffer), transition_value(buffer, Critic(), gamma=GAMMA).double()
    )
    assert max(critic.sizes) <= (chunk_size or 40)
    assert set(stored(buffer).keys(True, True)) == keys


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("total", [25, 40, 67])
def test_return_over_the_seam(storage, chunk_size, total):
    buffer = recall_buffer(40, storage=storage, dtype=torch.float64)
    data = transitions(total, dtype=torch.float64)
    for start in range(0, total, 10):
        buffer.extend(data[start : start + 10].clone())
    ValueRefresh(
        buffer, Critic(), gamma=GAMMA, target="return", trajectory_key=None, chunk_size=chunk_size
    )()
    expected = returns_by_loop(data[-40:])
    torch.testing.assert_close(values(buffer), expected.roll(total % 40 if total > 40 else 0))


def test_return_by_hand():
    buffer = recall_buffer(8)
    data = transitions(6)
    data["next", "observation"] = torch.full((6, 3), 4.0 / 3)
    data["next", "reward"] = torch.tensor([[1.0], [2.0], [3.0], [0.0], [1.0], [0.0]])
    data["next", "terminated"] = torch.tensor([[0], [0], [1], [0], [0], [0]]).bool()
    data["next", "done"] = torch.tensor([[0], [0], [1], [1], [0], [0]]).bool()
    buffer.extend(data)
    ValueRefresh(buffer, Critic(), gamma=0.5, target="return", trajectory_key=None)()
    # Terminated with 3; truncated with 0 + 4 / 2; unfinished with 0 + 4 / 2.
    expected = torch.tensor([2.75, 3.5, 3.0, 2.0, 2.0, 2.0]).double()
    torch.testing.assert_close(values(buffer), expected)


@pytest.mark.parametrize("env_major", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_parallel_environments_flattened(env_major, chunk_size):
    envs, time = 4, 6
    buffer = recall_buffer(60, dtype=torch.float64)
    added = []
    for rollout in range(4):
        data = transitions(envs, time, seed=rollout, dtype=torch.float64)
        number = torch.arange(envs).unsqueeze(1).expand(envs, time)
        data[IDS] = number.clone()
        added.append((data if env_major else data.transpose(0, 1)).reshape(-1))
        buffer.extend(added[-1].clone())
    ValueRefresh(buffer, Critic(), gamma=GAMMA, target="return", chunk_size=chunk_size)()
    expected = returns_by_loop(torch.cat(added)[-60:])
    torch.testing.assert_close(values(buffer), expected.roll(96 % 60))


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("rollouts", [2, 5])
def test_storage_of_two_dimensions(storage, chunk_size, with_ids, rollouts):
    envs, time, kept = 3, 5, 12
    buffer = recall_buffer(envs * kept, storage=storage, ndim=2, dtype=torch.float64)
    data = transitions(envs, time * rollouts, dtype=torch.float64)
    if with_ids:
        data[IDS] = torch.arange(time * rollouts).div(4, rounding_mode="floor").expand(envs, -1)
    for rollout in range(rollouts):
        buffer.extend(data[:, rollout * time : (rollout + 1) * time].clone())
    refresh = ValueRefresh(
        buffer,
        Critic(),
        gamma=GAMMA,
        target="return",
        chunk_size=chunk_size,
        trajectory_key=IDS if with_ids else None,
    )
    assert refresh()["refresh/share"] == 1.0
    seam = (time * rollouts) % kept if rollouts * time > kept else 0
    columns = [returns_by_loop(data[env, -kept:]).roll(seam) for env in range(envs)]
    torch.testing.assert_close(values(buffer), torch.stack(columns, 1).reshape(-1))

    ValueRefresh(buffer, Critic(), gamma=GAMMA, chunk_size=chunk_size)()
    expected = transition_value(buffer, Critic(), gamma=GAMMA).flatten()
    torch.testing.assert_close(values(buffer), expected)


def test_collector_data_are_understood():
    env = FourRoomsEnv(5, batch_size=(3,), seed=0)
    buffer = recall_buffer(40, dtype=torch.float64)
    critic = TensorDictModule(
        lambda s: s.float().sum(-1, keepdim=True), ["observation"], ["state_value"]
    )
    torch.manual_seed(0)
    collector = Collector(
        env,
        RandomPolicy(env.action_spec),
        frames_per_batch=24,
        total_frames=72,
        reset_at_each_iter=True,
    )
    rows = []
    for data in collector:
        rows.append(data.reshape(-1).clone())
        buffer.extend(rows[-1].clone())
    collector.shutdown()
    ValueRefresh(buffer, critic, gamma=GAMMA, target="return")()
    expected = returns_by_loop(torch.cat(rows)[-40:]).roll(72 % 40)
    torch.testing.assert_close(values(buffer), expected, rtol=1e-5, atol=1e-5)


def test_entries_that_are_trajectories_are_reduced():
    sampler = ValuePrioritizedSampler(8, reduction="mean")
    buffer = recall_buffer(8, sampler=sampler)
    data = transitions(5, 4)
    buffer.extend(data.clone())
    ValueRefresh(buffer, Critic(), gamma=GAMMA, chunk_size=2)()
    expected = transition_value(data, Critic(), gamma=GAMMA).mean(1)
    torch.testing.assert_close(values(buffer), expected.double())


# No copy of the storage


class CountingStorage(LazyTensorStorage):
    """Keeps the sizes of what is read."""

    def get(self, index):
        data = super().get(index)
        self.__dict__.setdefault("reads", []).append(len(data))
        return data


@pytest.mark.parametrize("target", ["bootstrap", "return"])
def test_the_storage_is_read_once_in_chunks(target):
    buffer = recall_buffer(1000, storage=CountingStorage)
    buffer.extend(transitions(700))
    buffer.extend(transitions(700))
    refresh = ValueRefresh(
        buffer, Critic(), gamma=GAMMA, target=target, trajectory_key=None, chunk_size=64
    )
    buffer.storage.reads = []
    refresh()
    assert max(buffer.storage.reads) == 64
    assert sum(buffer.storage.reads) == 1000


def test_the_network_sees_the_storage_itself():
    buffer = recall_buffer(10)
    buffer.extend(transitions(10))
    inside = buffer.storage[:]["next", "observation"].data_ptr()
    seen = []
    critic = TensorDictModule(
        lambda s: (seen.append(s.data_ptr() - inside), s.sum(-1, keepdim=True))[1],
        ["observation"],
        ["state_value"],
    )
    ValueRefresh(buffer, critic, gamma=GAMMA, chunk_size=4)()
    assert seen == [6 * 12, 2 * 12, 0]


def test_other_keys_are_not_touched():
    buffer = recall_buffer(10)
    data = transitions(10)
    data["pixels"] = torch.full((10, 2), math.nan)
    buffer.extend(data)
    before = buffer.storage[:].clone()
    ValueRefresh(buffer, Critic(), gamma=GAMMA, target="return", trajectory_key=None)()
    assert bool((before == buffer.storage[:]).exclude("pixels").all())

"""Refresh beside other threads, behind remote buffers, and what it refuses."""

from __future__ import annotations

import threading

import pytest
import torch
from refresh_data import GAMMA, IDS, Critic, recall_buffer, returns_by_loop, transitions, values
from tensordict.nn import TensorDictModule
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyTensorStorage,
    RandomSampler,
    ReplayBuffer,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
    TensorStorage,
)

from torchrl_recall import ValuePrioritizedSampler, ValueRefresh, transition_value


def writing_critic(buffer, data):
    """A critic during whose first forward another thread writes."""
    critic = Critic()
    inner, waiting = critic.module, [data]

    def value(observation):
        if waiting:
            thread = threading.Thread(target=buffer.extend, args=(waiting.pop(),))
            thread.start()
            thread.join(timeout=20)
            assert not thread.is_alive()  # no lock is held
        return inner(observation)

    return TensorDictModule(value, ["observation"], ["state_value"])


@pytest.mark.parametrize("target", ["bootstrap", "return"])
@pytest.mark.parametrize("chunk_size", [None, 10])
def test_rows_overwritten_meanwhile_keep_what_their_writer_gave(target, chunk_size):
    buffer = recall_buffer(40, dtype=torch.float64)
    data = transitions(63, dtype=torch.float64)
    buffer.extend(data[:50].clone())
    refresh = ValueRefresh(
        buffer,
        writing_critic(buffer, data[50:].clone()),
        gamma=GAMMA,
        target=target,
        chunk_size=chunk_size,
        trajectory_key=None,
    )
    logs = refresh()
    # 10 ... 22 were overwritten while the first chunk was at the network.
    expected = returns_by_loop(data[10:50]).roll(10)
    if target == "bootstrap":
        expected = transition_value(data[10:50], Critic(), gamma=GAMMA).roll(10)
    kept = torch.arange(40).roll(-10) >= 0
    kept[10:23] = False
    torch.testing.assert_close(values(buffer)[kept], expected[kept])
    assert bool(values(buffer)[~kept].isneginf().all())
    assert logs["refresh/share"] == 27 / 40
    assert refresh()["refresh/share"] == 1.0
    assert bool(values(buffer).isfinite().all())


def test_a_buffer_emptied_meanwhile_is_left_alone():
    buffer = recall_buffer(40)
    buffer.extend(transitions(40))

    class EmptyingCritic(Critic):
        def value(self, observation):
            buffer.empty()
            return super().value(observation)

    refresh = ValueRefresh(buffer, EmptyingCritic(), gamma=GAMMA, chunk_size=10)
    assert refresh()["refresh/share"] == 0.0
    assert bool(buffer.sampler.values.isneginf().all())


def test_beside_prefetching():
    buffer = recall_buffer(200, prefetch=2)
    buffer.extend(transitions(200))
    refresh = ValueRefresh(buffer, Critic(), gamma=GAMMA, slice_size=1, chunk_size=16)
    for seed in range(30):
        refresh()
        assert buffer.sample()["next", "reward"].shape == (16, 1)
        buffer.extend(transitions(20, seed=seed))
    refresh()
    torch.testing.assert_close(
        values(buffer), transition_value(buffer, Critic(), gamma=GAMMA).double()
    )


def test_two_views_on_one_storage():
    learner = TensorDictReplayBuffer(storage=LazyTensorStorage(30), batch_size=4)
    recall = TensorDictReplayBuffer(
        storage=learner.storage, writer=learner.writer, sampler=ValuePrioritizedSampler(30)
    )
    refresh = ValueRefresh(recall, Critic(), gamma=GAMMA)
    learner.extend(transitions(20))
    refresh()
    learner.extend(transitions(20, seed=1))
    assert refresh.age.tolist() == [-1] * 10 + [0] * 10 + [-1] * 10
    assert refresh()["refresh/share"] == 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"shared": True},
        {"writer": TensorDictRoundRobinWriter(compilable=True), "compilable": True},
        {"delayed_init": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_other_kinds_of_local_buffers(arguments):
    sampler = ValuePrioritizedSampler(30)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(30), sampler=sampler, **arguments)
    refresh = ValueRefresh(buffer, Critic(), gamma=GAMMA, target="return", trajectory_key=None)
    data = transitions(44)
    buffer.extend(data.clone())
    assert refresh()["refresh/share"] == 1.0
    torch.testing.assert_close(
        values(buffer), returns_by_loop(data[-30:]).roll(14), rtol=1e-5, atol=1e-5
    )
    buffer.extend(data[:10].clone())
    assert refresh.share_refreshed == pytest.approx(2 / 3)


def test_an_immutable_dataset_is_in_order():
    data = transitions(20)
    buffer = recall_buffer(
        20, storage=lambda _: TensorStorage(data), writer=ImmutableDatasetWriter()
    )
    ValueRefresh(
        buffer, Critic(), gamma=GAMMA, target="return", trajectory_key=None, chunk_size=7
    )()
    torch.testing.assert_close(values(buffer), returns_by_loop(data), rtol=1e-5, atol=1e-5)


def test_three_dimensions():
    buffer = recall_buffer(48, ndim=3, dtype=torch.float64)
    data = transitions(2, 3, 8, dtype=torch.float64)
    buffer.extend(data.clone())
    refresh = ValueRefresh(
        buffer, Critic(), gamma=GAMMA, target="return", trajectory_key=None, chunk_size=13
    )
    refresh()
    # TorchRL swaps the first dimension and the last.
    expected = torch.zeros(8, 3, 2, dtype=torch.float64)
    for one in range(2):
        for other in range(3):
            expected[:, other, one] = returns_by_loop(data[one, other])
    torch.testing.assert_close(values(buffer), expected.flatten())


def test_a_storage_and_a_sampler():
    buffer = recall_buffer(30)
    buffer.extend(transitions(20))
    sampler = ValuePrioritizedSampler(30)
    ValueRefresh(buffer.storage, Critic(), gamma=GAMMA, sampler=sampler)()
    expected = transition_value(buffer, Critic(), gamma=GAMMA)
    torch.testing.assert_close(sampler.values[:20], expected)


def test_another_writer_can_be_bootstrapped():
    buffer = recall_buffer(10, writer=TensorDictMaxValueWriter(rank_key=("next", "reward")))
    buffer.extend(transitions(30))
    assert ValueRefresh(buffer, Critic(), gamma=GAMMA)()["refresh/share"] == 1.0
    expected = transition_value(buffer, Critic(), gamma=GAMMA)
    torch.testing.assert_close(values(buffer), expected.double())


def test_the_network_runs_in_the_mode_and_dtype_it_has():
    buffer = recall_buffer(50, dtype=torch.float64)
    buffer.extend(transitions(50, dtype=torch.float64))
    net = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5)).double()
    critic = TensorDictModule(net, ["observation"], ["state_value"])
    refresh = ValueRefresh(buffer, critic, gamma=GAMMA)
    refresh()
    in_training = values(buffer)
    assert critic.training
    critic.eval()
    refresh()
    assert torch.equal(values(buffer), transition_value(buffer, critic, gamma=GAMMA))
    assert not torch.equal(values(buffer), in_training)
    assert all(p.grad is None for p in critic.parameters())


# Remote buffers


class Remote:
    """Only the public methods that `RayReplayBuffer` passes on."""

    def __init__(self, buffer):
        self._hidden = buffer

    def __len__(self):
        return len(self._hidden)

    def __getitem__(self, index):
        return self._hidden[index].clone()

    def update_priority(self, index, priority):
        self._hidden.update_priority(index, priority)


class CountedRemote(Remote):
    @property
    def write_count(self):
        return self._hidden.write_count

    def stats(self):
        return self._hidden.stats()


@pytest.mark.parametrize("kind", [Remote, CountedRemote])
def test_remote_buffer(kind):
    buffer = recall_buffer(1000)
    buffer.extend(transitions(700))
    refresh = ValueRefresh(kind(buffer), Critic(), gamma=GAMMA, slice_size=300, chunk_size=100)
    assert refresh()["refresh/share"] < 1
    buffer.extend(transitions(100, seed=1))
    refresh()
    assert refresh()["refresh/share"] == 1.0
    expected = transition_value(buffer, Critic(), gamma=GAMMA).double()
    torch.testing.assert_close(values(buffer), expected)
    buffer.extend(transitions(300, seed=2))
    share = refresh.share_refreshed
    assert share == (0.7 if kind is CountedRemote else 0.8)
    refresh()
    expected = transition_value(buffer, Critic(), gamma=GAMMA).double()
    torch.testing.assert_close(values(buffer)[800:], expected[800:])
    if kind is CountedRemote:
        torch.testing.assert_close(values(buffer), expected)


def test_remote_buffer_gets_one_number_for_each_index():
    seen = []

    class Recording(RandomSampler):
        def update_priority(self, index, priority, *, storage=None):
            seen.append((index, priority))

    buffer = ReplayBuffer(storage=LazyTensorStorage(8), sampler=Recording(), batch_size=2)
    buffer.extend(transitions(8))
    ValueRefresh(Remote(buffer), Critic(), gamma=GAMMA, chunk_size=5)()
    assert [index.tolist() for index, _ in seen] == [[3, 4, 5, 6, 7], [0, 1, 2]]
    expected = transition_value(buffer, Critic(), gamma=GAMMA)
    torch.testing.assert_close(torch.cat([seen[1][1], seen[0][1]]), expected)


# Refusals


def test_wrong_buffers():
    with pytest.raises(TypeError, match=r"be a ValuePrioritizedSampler.* RandomSampler"):
        ValueRefresh(ReplayBuffer(storage=LazyTensorStorage(3)), Critic(), gamma=GAMMA)
    with pytest.raises(TypeError, match=r"sampler must be .* got NoneType"):
        ValueRefresh(LazyTensorStorage(3), Critic(), gamma=GAMMA)
    with pytest.raises(TypeError, match=r"buffer must be a ReplayBuffer, .* list without update"):
        ValueRefresh([], Critic(), gamma=GAMMA)
    with pytest.raises(TypeError, match="sampler cannot be given with a remote buffer"):
        ValueRefresh(Remote(None), Critic(), gamma=GAMMA, sampler=ValuePrioritizedSampler(3))
    sampler = ValuePrioritizedSampler(3)
    buffer = ReplayBuffer(storage=LazyTensorStorage(3), sampler=sampler)
    buffer.extend(torch.zeros(3, 2))
    with pytest.raises(TypeError, match="must hold TensorDicts, got LazyTensorStorage with"):
        ValueRefresh(buffer, Critic(), gamma=GAMMA)()


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "gamma must lie in", {"gamma": 1.5}),
        (ValueError, "target must be one of .* got 'td'", {"target": "td"}),
        (ValueError, "chunk_size must be at least 1", {"chunk_size": 0}),
        (ValueError, "slice_size must be at least 1, got 0", {"slice_size": 0}),
        (ValueError, r"slice_size as a share must be in \(0, 1\], got 1.5", {"slice_size": 1.5}),
        (TypeError, "slice_size must be an int", {"slice_size": "all"}),
        (TypeError, "value_network must be a TensorDictModule", {"value_network": len}),
    ],
)
def test_wrong_arguments(error, match, arguments):
    arguments = {"value_network": Critic(), "gamma": GAMMA} | arguments
    with pytest.raises(error, match=match):
        ValueRefresh(recall_buffer(4), **arguments)


def test_return_needs_the_order_of_time():
    buffer = recall_buffer(10, writer=TensorDictMaxValueWriter(rank_key=("next", "reward")))
    for source, name in [(buffer, "MaxValueWriter"), (Remote(buffer), "Remote")]:
        with pytest.raises(ValueError, match=f"order of time: .*{name}.*use 'bootstrap'"):
            ValueRefresh(source, Critic(), gamma=GAMMA, target="return")
    with pytest.raises(ValueError, match="needs rows in the order of time"):
        ValueRefresh(
            LazyTensorStorage(4),
            Critic(),
            gamma=GAMMA,
            target="return",
            sampler=ValuePrioritizedSampler(4),
        )


def test_return_needs_ids_or_a_word():
    buffer = recall_buffer(10)
    buffer.extend(transitions(5))
    with pytest.raises(ValueError, match=r"trajectory_key .* is not stored.*trajectory_key=None"):
        ValueRefresh(buffer, Critic(), gamma=GAMMA, target="return")()


def test_return_needs_single_steps():
    buffer = recall_buffer(10)
    buffer.extend(transitions(5, 4))
    with pytest.raises(ValueError, match=r"one step for each entry, got entries of .*ndim=2"):
        ValueRefresh(buffer, Critic(), gamma=GAMMA, target="return", trajectory_key=None)()


@pytest.mark.parametrize("key", ["observation", "reward", "terminated", "done"])
def test_missing_key_is_named(key):
    buffer = recall_buffer(10)
    buffer.extend(transitions(5, ends=0.0).exclude(("next", key)))
    refresh = ValueRefresh(buffer, Critic(), gamma=GAMMA, target="return", trajectory_key=None)
    with pytest.raises(KeyError, match=key):
        refresh()


def test_wrong_states():
    refresh = ValueRefresh(recall_buffer(4), Critic(), gamma=GAMMA)
    state = refresh.state_dict()
    with pytest.raises(KeyError, match=r"lacks .'calls'.; is it from a ValueRefresh"):
        refresh.load_state_dict({k: v for k, v in state.items() if k != "calls"})
    with pytest.raises(ValueError, match="_schema_version must be 1, got 7"):
        refresh.load_state_dict(state | {"_schema_version": 7})


def test_renamed_keys():
    buffer = recall_buffer(10)
    data = transitions(10)
    wanted = transition_value(data, Critic(), gamma=GAMMA).double()
    data[IDS] = torch.zeros(10, dtype=torch.int64)
    data.rename_key_(("next", "reward"), ("next", "agent", "r")).rename_key_(IDS, "episode")
    data.rename_key_(("next", "done"), "over").rename_key_(("next", "terminated"), "end")
    data.rename_key_(("next", "observation"), ("next", "agent", "s"))
    buffer.extend(data)
    critic = TensorDictModule(lambda s: s.sum(-1, keepdim=True), [("agent", "s")], [("agent", "v")])
    keys = {"reward_key": ("next", "agent", "r"), "terminated_key": "end", "done_key": "over"}
    keys |= {"value_key": ("agent", "v"), "trajectory_key": "episode"}
    ValueRefresh(buffer, critic, gamma=GAMMA, **keys)()
    torch.testing.assert_close(values(buffer), wanted)
    assert (
        ValueRefresh(buffer, critic, gamma=GAMMA, target="return", **keys)()["refresh/share"] == 1
    )

"""The sampler in a Ray actor, refreshed from outside by `ValueRefresh`."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from processes import ray_or_skip
from refresh_data import GAMMA, Critic, transitions
from torchrl.data import LazyTensorStorage, RayReplayBuffer, TensorDictReplayBuffer

from torchrl_recall import ValuePrioritizedSampler, ValueRefresh, transition_value

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray is not installed; it is optional"
    ),
    # Ray's own, of its files and processes.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


@pytest.fixture
def buffer():
    with ray_or_skip(1):
        made = RayReplayBuffer(
            replay_buffer_cls=TensorDictReplayBuffer,
            storage=partial(LazyTensorStorage, 1500),
            sampler=partial(ValuePrioritizedSampler, 1500, top=0.02),
            priority_key="value",
            batch_size=64,
            remote_config={"num_cpus": 1},
        )
        yield made
        made.close()


def drawn(buffer):
    """All that some batches hold."""
    return torch.cat([buffer.sample()["index"] for _ in range(5)]).unique()


def test_values_go_to_and_fro(buffer):
    data = transitions(1000)
    data["value"] = torch.arange(1000.0)
    assert buffer.extend(data).tolist() == list(range(1000))
    assert drawn(buffer).tolist() == list(range(980, 1000))

    critic = Critic()
    refresh = ValueRefresh(buffer, critic, gamma=GAMMA, slice_size=256)
    assert [refresh()["refresh/share"] for _ in range(4)] == [0.488, 0.744, 1.0, 1.0]
    expected = transition_value(data, critic, gamma=GAMMA)
    sampler = buffer.state_dict()["_sampler"]
    torch.testing.assert_close(sampler["_values"][:1000], expected)
    best = expected.topk(20).indices.sort().values
    assert torch.equal(drawn(buffer), best)

    # Another critic, more rows, and over the ring's end.
    refresh.value_network = critic = Critic(-3.0)
    more = transitions(700, seed=1)
    more["value"] = torch.full((700,), -1e6)
    buffer.extend(more)
    for _ in range(6):
        refresh()
    stored = torch.cat([more[500:], data[200:], more[:500]])
    expected = transition_value(stored, critic, gamma=GAMMA)
    torch.testing.assert_close(buffer.state_dict()["_sampler"]["_values"], expected)

    buffer.update_priority(torch.tensor([3, 7]), torch.tensor([1e6, 1e6]))
    state = buffer.state_dict()
    buffer.update_priority(torch.arange(1500), torch.zeros(1500))
    buffer.load_state_dict(state)
    assert {3, 7} <= set(drawn(buffer).tolist())
    assert state["_sampler"]["_values"][3] == 1e6
    local = ValuePrioritizedSampler(1500)
    local.load_state_dict(state["_sampler"])
    torch.testing.assert_close(local.values[4:7], expected[4:7])

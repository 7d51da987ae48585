"""Values of transitions: against the formula, in slices, without touching data or global state."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, set_interaction_type
from tensordict.nn.probabilistic import interaction_type
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
)

from torchrl_recall.sampler import ValuePrioritizedSampler
from torchrl_recall.values import transition_value

GAMMA = 0.9


class Critic(TensorDictModule):
    """Sums the observation, and keeps the sizes of the batches it has seen."""

    def __init__(self, key="observation", out="state_value"):
        self.sizes = []
        super().__init__(self.value, in_keys=[key], out_keys=[out])

    def value(self, observation):
        self.sizes.append(observation.shape[:-1].numel())
        return observation.sum(-1, keepdim=True)


def transitions(*batch):
    generator = torch.Generator().manual_seed(0)
    after = TensorDict(
        {
            "observation": torch.randn(*batch, 3, generator=generator),
            "reward": torch.randn(*batch, 1, generator=generator),
            "terminated": torch.rand(*batch, 1, generator=generator) < 0.3,
        },
        batch,
    )
    return TensorDict({"observation": torch.randn(*batch, 3), "next": after}, batch)


def by_formula(data):
    after = data["next"]
    alive = (~after["terminated"]).float()
    return (after["reward"] + GAMMA * alive * after["observation"].sum(-1, keepdim=True)).squeeze(
        -1
    )


@pytest.mark.parametrize("batch", [(), (7,), (4, 5), (0,)])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_formula(batch, chunk_size):
    data = transitions(*batch)
    keys = set(data.keys(True, True))
    value = transition_value(data, Critic(), gamma=GAMMA, chunk_size=chunk_size)
    torch.testing.assert_close(value, by_formula(data))
    assert value.shape == batch
    assert set(data.keys(True, True)) == keys


def test_chunks_count_transitions():
    critic = Critic()
    transition_value(transitions(5, 4), critic, gamma=GAMMA, chunk_size=9)
    assert critic.sizes == [8, 8, 4]


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
@pytest.mark.parametrize("buffer", [ReplayBuffer, TensorDictReplayBuffer])
def test_storages(storage, buffer):
    data = transitions(6)
    rb = buffer(storage=storage(10))
    rb.extend(data.clone())
    for source in (rb, rb.storage):
        value = transition_value(source, Critic(), gamma=GAMMA, chunk_size=4)
        torch.testing.assert_close(value, by_formula(data))
    assert rb[:].get("state_value", None) is None


def test_storage_is_not_copied():
    rb = ReplayBuffer(storage=LazyTensorStorage(10))
    rb.extend(transitions(6))
    stored = rb.storage[:]["next", "observation"]
    seen = []
    critic = TensorDictModule(
        lambda s: (seen.append(s.data_ptr()), s.sum(-1, keepdim=True))[1],
        in_keys=["observation"],
        out_keys=["state_value"],
    )
    transition_value(rb, critic, gamma=GAMMA, chunk_size=3)
    assert seen == [stored.data_ptr(), stored[3:].data_ptr()]


def test_empty_storage():
    assert transition_value(LazyTensorStorage(3), Critic(), gamma=GAMMA).shape == (0,)


def test_terminal_nan_does_not_spread():
    data = transitions(8)
    data["next", "observation"][data["next", "terminated"].squeeze(-1)] = math.nan
    value = transition_value(data, Critic(), gamma=GAMMA)
    assert bool(data["next", "observation"].isnan().any())
    torch.testing.assert_close(value[~value.isnan()], value)


def test_keys_can_be_renamed():
    data = transitions(5).rename_key_(("next", "observation"), ("next", "agent", "state"))
    data.rename_key_(("next", "reward"), ("next", "agent", "r"))
    data.rename_key_(("next", "terminated"), "end")
    value = transition_value(
        data,
        Critic(("agent", "state"), "v"),
        gamma=GAMMA,
        reward_key=("next", "agent", "r"),
        terminated_key="end",
        value_key="v",
    )
    alive = (~data["end"]).float()
    state = data["next", "agent", "state"].sum(-1, keepdim=True)
    expected = (data["next", "agent", "r"] + GAMMA * alive * state).squeeze(-1)
    torch.testing.assert_close(value, expected)


def test_no_gradient_and_no_global_state():
    critic = TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["state_value"])
    with set_interaction_type(InteractionType.RANDOM):
        value = transition_value(transitions(4), critic, gamma=GAMMA)
        assert interaction_type() is InteractionType.RANDOM
    assert not value.requires_grad
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in critic.parameters())


def test_refreshes_a_sampler_of_two_dimensions():
    sampler = ValuePrioritizedSampler(20, top=0.05)
    rb = TensorDictReplayBuffer(
        storage=LazyTensorStorage(20, ndim=2), sampler=sampler, batch_size=16
    )
    data = transitions(4, 5)
    rb.extend(data.clone())
    sampler.refresh(transition_value(rb, Critic(), gamma=GAMMA).flatten())
    # TorchRL stores time first.
    best = divmod(int(by_formula(data).T.argmax()), 4)
    assert rb.sample()["index"].unique(dim=0).tolist() == [list(best)]


@pytest.mark.parametrize(
    "key", [("next", "observation"), ("next", "reward"), ("next", "terminated")]
)
def test_missing_key_is_named(key):
    with pytest.raises(KeyError, match=key[1]):
        transition_value(transitions(3).exclude(key), Critic(), gamma=GAMMA)


def test_missing_output_is_named():
    with pytest.raises(KeyError, match=r"key .state_value. is missing from .*other"):
        transition_value(transitions(3), Critic(out="other"), gamma=GAMMA)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_gamma_out_of_range(gamma):
    with pytest.raises(ValueError, match="gamma must lie in"):
        transition_value(transitions(3), Critic(), gamma=gamma)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        transition_value(transitions(3), Critic(), gamma=GAMMA, chunk_size=0)
    data = transitions(3)
    data["next", "reward"] = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"'reward'\) has shape \(3, 2\), expected one entry for"):
        transition_value(data, Critic(), gamma=GAMMA)


@pytest.mark.parametrize("data", [torch.zeros(3), {"next": {}}])
def test_wrong_data(data):
    with pytest.raises(TypeError, match="data must be a TensorDict"):
        transition_value(data, Critic(), gamma=GAMMA)


def test_storage_of_plain_tensors_is_refused():
    rb = ReplayBuffer(storage=LazyTensorStorage(4))
    rb.extend(torch.zeros(3, 2))
    with pytest.raises(TypeError, match="ReplayBuffer with Tensor"):
        transition_value(rb, Critic(), gamma=GAMMA)

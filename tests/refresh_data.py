"""Buffers, critics and loops that the tests of value refresh share."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_recall import ValuePrioritizedSampler, ValueRefresh

GAMMA = 0.9
IDS = ("collector", "traj_ids")


class Critic(TensorDictModule):
    """A multiple of the observation's sum; keeps the sizes of the batches it has seen."""

    def __init__(self, factor=1.0):
        self.factor, self.sizes = factor, []
        super().__init__(self.value, in_keys=["observation"], out_keys=["state_value"])

    def value(self, observation):
        assert not torch.is_grad_enabled()
        self.sizes.append(observation.shape[:-1].numel())
        return self.factor * observation.sum(-1, keepdim=True)


def transitions(*batch, seed=0, dtype=torch.float32, ends=0.1):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(*batch, 1, generator=generator)
    after = {
        "observation": torch.randn(*batch, 3, generator=generator, dtype=dtype),
        "reward": torch.randn(*batch, 1, generator=generator, dtype=dtype),
        "terminated": kind < ends / 2,
        "done": kind < ends,
    }
    rest = {"observation": torch.randn(*batch, 3, generator=generator, dtype=dtype)}
    return TensorDict({"next": TensorDict(after, batch), **rest}, batch)


def recall_buffer(capacity, *, storage=LazyTensorStorage, ndim=1, dtype=torch.float32, **kwargs):
    kwargs.setdefault("sampler", ValuePrioritizedSampler(capacity, dtype=dtype))
    place = storage(capacity, ndim=ndim) if ndim > 1 else storage(capacity)
    return TensorDictReplayBuffer(storage=place, batch_size=16, **kwargs)


def stored(buffer):
    data = buffer.storage[:]
    if isinstance(data, list):
        data = torch.stack(data)
    return data.reshape(-1)


def returns_by_loop(rows, gamma=GAMMA, factor=1.0):
    """Returns-to-go of single steps in the order of time, told apart by id."""
    result, later = [0.0] * len(rows), {}
    for t in range(len(rows) - 1, -1, -1):
        after, name = rows[t]["next"], int(rows[t].get(IDS, torch.zeros(())))
        tail = 0.0
        if not after["terminated"]:
            tail = factor * float(after["observation"].sum())
            if not after["done"] and name in later:
                tail = later[name]
        later[name] = result[t] = float(after["reward"]) + gamma * tail
    return torch.tensor(result, dtype=torch.float64)


def values(buffer):
    return buffer.sampler.values[: len(buffer)].double()


def sliced(capacity=2048, n=1024, slice_size=256, **kwargs):
    buffer = recall_buffer(capacity, dtype=torch.float64)
    buffer.extend(transitions(n, dtype=torch.float64))
    critic = Critic()
    return (
        buffer,
        critic,
        ValueRefresh(buffer, critic, gamma=GAMMA, slice_size=slice_size, **kwargs),
    )

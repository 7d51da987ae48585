"""Random histories of a replay buffer: after each step, its sampler is what a fresh one would be.

Draws from given random numbers agree to the bit with those of a sampler built from the values
alone, and the weights with `value_weights`.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
import warnings

import pytest
import torch
from engines import ENGINES, choose_engine
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
)

from torchrl_recall import ValuePrioritizedSampler
from torchrl_recall.priorities.weights import MODES, value_weights

CAPACITY, WIDTH = 60, 3
STORAGES = {
    "tensor": lambda: LazyTensorStorage(CAPACITY),
    "memmap": lambda: LazyMemmapStorage(CAPACITY),
    "list": lambda: ListStorage(CAPACITY),
    "two dimensions": lambda: LazyTensorStorage(CAPACITY, ndim=2),
}
CHOICES = {
    "mode": MODES,
    "top": (0.05, 0.3, 1.0),
    "temperature": (0.1, 1.0, 30.0),
    "alpha": (0.0, 0.6, 1.0, 3.0),
    "eps": (1e-8, 0.5),
    "min_value": (None, None, 0.5, -1.0, 1e30, -math.inf),
    "uniform_share": (0.0, 0.0, 0.2, 1.0),
    "beta": (0.0, 0.5, 2.0),
}


class History:
    """A buffer, and random numbers that decide what is done to it."""

    def __init__(self, storage, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.two = storage == "two dimensions"
        dtype = (torch.float32, torch.float64)[seed % 2]
        # The sampler starts too small now and then, and grows.
        capacity = CAPACITY if seed % 3 else 7
        self.buffer = TensorDictReplayBuffer(
            storage=STORAGES[storage](),
            sampler=ValuePrioritizedSampler(capacity, dtype=dtype),
            priority_key="v",
            batch_size=8,
        )

    @property
    def sampler(self):
        return self.buffer.sampler

    def values(self, *shape):
        """Some are equal, negative, 0, none yet or not finite."""
        values = torch.randn(shape, generator=self.generator) * 10.0 ** self.random.randint(-1, 2)
        kind = torch.randint(20, shape, generator=self.generator)
        values = values.round().where(kind > 10, values)
        values = values.masked_fill(kind == 0, math.nan).masked_fill(kind == 1, math.inf)
        return values.masked_fill(kind == 2, self.sampler.default_priority)

    def index(self, n):
        low = -1 if self.random.random() < 0.3 else 0
        return torch.randint(low, len(self.buffer), (n,), generator=self.generator)

    def extend(self):
        n = self.random.randint(4, 25)  # TorchRL refuses a single column
        shape = (WIDTH, -(-n // WIDTH)) if self.two else (n,)
        data = TensorDict({"v": self.values(*shape).unsqueeze(-1), "x": torch.zeros(shape)}, shape)
        self.buffer.extend(data if self.random.random() < 0.8 else data.exclude("v"))

    def add(self):
        shape = (WIDTH,) if self.two else ()
        data = TensorDict({"v": self.values(*shape, 1), "x": torch.zeros(shape)}, shape)
        if not self.two:  # a column without its time would not be a row
            self.buffer.add(data)

    def update_priority(self):
        n = self.random.randint(1, 12)
        one = self.random.random() < 0.2
        self.buffer.update_priority(self.index(n), self.values(1 if one else n))

    def update_tensordict_priority(self):
        sample = self.buffer.sample()
        sample["v"] = self.values(8, 1)
        self.buffer.update_tensordict_priority(sample)

    def refresh(self):
        way, n = self.random.randrange(3), len(self.buffer)
        if way == 0:
            self.sampler.refresh(self.values(self.random.randint(0, n)))
        elif way == 1:
            index = self.index(5).clamp(min=0)
            self.sampler.refresh(self.values(5), index)
        else:
            mask = torch.rand(n, generator=self.generator) < 0.3
            self.sampler.refresh(self.values(int(mask.sum())), mask)

    def change(self):
        for name in self.random.sample(sorted(CHOICES), 2):
            setattr(self.sampler, name, self.random.choice(CHOICES[name]))

    def replace(self, folder):
        old, way = self.sampler, self.random.randrange(4)
        if way == 0:
            new = ValuePrioritizedSampler(3, dtype=old.dtype)
            new.load_state_dict(old.state_dict())
        elif way == 1:
            new = ValuePrioritizedSampler(CAPACITY, dtype=old.dtype)
            old.dumps(folder)
            new.loads(folder)
        else:
            new = copy.deepcopy(old) if way == 2 else pickle.loads(pickle.dumps(old))
        self.buffer.set_sampler(new)

    def step(self, folder):
        actions = [self.extend, self.add, self.update_priority, self.update_tensordict_priority]
        actions += [self.update_priority, self.refresh, self.change, self.change]
        actions += [lambda: self.replace(folder)]
        action = self.random.choice(actions)
        if self.random.random() < 0.02:
            action = self.buffer.empty
        if len(self.buffer) == 0:
            action = self.extend
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not finite")
            try:
                action()
            except RuntimeError as error:  # a sample of nothing but non-finite values
                assert "non-finite" in str(error)  # noqa: PT017


def rebuilt(sampler):
    """A sampler that has only been told the values and the parameters."""
    fresh = ValuePrioritizedSampler(len(sampler.values), dtype=sampler.dtype)
    fresh.load_state_dict(sampler.state_dict())
    return fresh


def check(buffer, seed):
    """Draws are a rebuild's, weights are `value_weights`."""
    sampler, n = buffer.sampler, len(buffer)
    if n == 0:
        return
    values = sampler.values[:n]
    if values.numel() < n:
        values = torch.nn.functional.pad(values, (0, n - values.numel()), value=-math.inf)
    if values.isnan().all():
        with pytest.raises(RuntimeError, match="non-finite"):
            sampler.weights(n)
        return
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(40, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    fresh = rebuilt(sampler)
    entry, importance = sampler._draw(uniform, buffer.storage)
    expected_entry, expected_importance = fresh._draw(uniform, buffer.storage)
    assert torch.equal(entry, expected_entry)
    assert torch.equal(importance, expected_importance)
    weights = sampler.weights(n)
    assert torch.equal(weights, fresh.weights(n))
    expected = value_weights(values, **sampler._parameters._asdict())
    torch.testing.assert_close(
        weights / weights.sum(), expected / expected.sum(), rtol=2e-5, atol=1e-37
    )
    assert bool((expected[entry] > 0).all())
    least = weights[weights > 0].min()
    torch.testing.assert_close(
        importance, ((weights[entry] / least) ** -sampler.beta).float(), rtol=1e-4, atol=1e-37
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("seed", range(5))
def test_any_history_ends_in_a_rebuild(monkeypatch, tmp_path, engine, storage, seed):
    choose_engine(monkeypatch, engine)
    torch.manual_seed(seed)
    history = History(storage, seed)
    for step in range(60):
        history.step(tmp_path)
        if step % 3:  # several changes before one draw
            check(history.buffer, step)
    assert type(history.sampler._priorities) is ENGINES[engine]

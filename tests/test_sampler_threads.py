"""Writers and readers of one sampler in many threads: no exception, no torn state.

TORCHRL_RECALL_THREAD_SECONDS sets how long; 3 by default.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import threading
import time

import pytest
import torch
from engines import ENGINES, choose_engine
from tensordict import TensorDict
from test_sampler_histories import check
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_recall import ValuePrioritizedSampler
from torchrl_recall.priorities.weights import MODES

CAPACITY = 3000
SECONDS = float(os.environ.get("TORCHRL_RECALL_THREAD_SECONDS", "3"))
KEY = ("collector", "traj_ids")


def rows(n, start=0):
    data = {"v": torch.randn(n, 1), KEY: torch.arange(start, start + n) // 50}
    return TensorDict(data, [n])


class Together:
    """Threads that repeat something until they are told to stop, or to wait."""

    def __init__(self, *actions):
        self.errors, self.counts = [], dict.fromkeys(range(len(actions)), 0)
        self.stop, self.go, self.resting = threading.Event(), threading.Event(), 0
        self.lock = threading.Lock()
        self.go.set()
        self.threads = [
            threading.Thread(target=self.repeat, args=each) for each in enumerate(actions)
        ]

    def repeat(self, number, action):
        chance = random.Random(number)
        while not self.stop.is_set():
            if not self.go.is_set():
                with self.lock:
                    self.resting += 1
                self.go.wait()
                with self.lock:
                    self.resting -= 1
            try:
                action(chance)
            except BaseException as error:
                self.errors.append(error)
                self.stop.set()
            self.counts[number] += 1

    def run(self, seconds, at_rest):
        for thread in self.threads:
            thread.start()
        end, stops = time.monotonic() + seconds, 0
        while time.monotonic() < end and not self.errors:
            self.stop.wait(min(0.3, seconds / 4))
            self.go.clear()
            while self.resting < len(self.threads) and not self.stop.is_set():
                time.sleep(0.001)
            if not self.errors:
                at_rest(stops)
                stops += 1
            self.go.set()
        self.stop.set()
        for thread in self.threads:
            thread.join()
        assert not self.errors, self.errors
        return stops


@pytest.mark.parametrize("with_trajectories", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_four_writers_and_a_reader(monkeypatch, engine, with_trajectories):
    choose_engine(monkeypatch, engine)
    torch.manual_seed(0)
    sampler = ValuePrioritizedSampler(
        CAPACITY, trajectory_key=KEY if with_trajectories else None, reduction="max"
    )
    storage = LazyTensorStorage(CAPACITY)
    writing = TensorDictReplayBuffer(storage=storage, sampler=sampler, priority_key="v")
    # A view: TorchRL's locks are per buffer, so the sampler has only its own.
    reading = TensorDictReplayBuffer(
        storage=storage,
        sampler=sampler,
        writer=writing.writer,
        priority_key="v",
        batch_size=64,
        prefetch=2,
    )
    writing.extend(rows(100))
    added = [100]

    def extend(chance):
        n = chance.randint(1, 200)
        writing.extend(rows(n, added[0]))
        added[0] += n

    def update(chance):
        index = torch.randint(len(storage), (chance.randint(1, 60),))
        sampler.update_priority(index, torch.randn(len(index)))

    def refresh(chance):
        if chance.random() < 0.3:
            sampler.refresh(torch.randn(chance.randint(1, CAPACITY)))
        else:
            sampler.refresh(torch.randn(9), torch.randint(CAPACITY, (9,)))

    def change(chance):
        sampler.mode = chance.choice(MODES)
        sampler.uniform_share = chance.choice((0.0, 0.3))
        sampler.beta = chance.choice((0.0, 0.5))
        sampler.min_value = chance.choice((None, 0.5))
        if chance.random() < 0.2:
            copy.deepcopy(sampler)
            pickle.loads(pickle.dumps(sampler))
            sampler.load_state_dict(sampler.state_dict())

    def read(chance):
        index = reading.sample()["index"]
        assert index.shape == (64,)
        assert 0 <= int(index.min()) <= int(index.max()) < len(storage)
        index, info = sampler.sample(storage, chance.randint(0, 100))
        assert bool((info["priority_weight"] >= 0).all())
        assert index.numel() == 0 or int(index.max()) < len(storage)

    def at_rest(seed):
        if with_trajectories:
            fresh = copy.deepcopy(sampler)
            uniform = torch.rand(2, 50, dtype=torch.float64)
            for got, expected in zip(
                sampler._draw(uniform, storage), fresh._draw(uniform, storage), strict=True
            ):
                assert torch.equal(got, expected)
        else:
            check(writing, seed)

    together = Together(extend, update, refresh, change, read)
    stops = together.run(SECONDS / 4, at_rest)
    assert stops >= 2
    assert min(together.counts.values()) > 0
    print(engine, with_trajectories, "stops", stops, "calls", together.counts)


def test_a_change_of_a_parameter_waits_for_another():
    """Or one of two changes would be lost: all parameters are replaced at once."""
    sampler = ValuePrioritizedSampler(3)
    thread = threading.Thread(target=setattr, args=(sampler, "top", 0.5))
    with sampler._lock:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        sampler.temperature = 7.0
    thread.join()
    assert (sampler.top, sampler.temperature) == (0.5, 7.0)

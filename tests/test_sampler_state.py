"""The sampler's parameters, random numbers, persistence and threads, and what it refuses."""

from __future__ import annotations

import copy
import math
import multiprocessing.context
import pickle
import threading

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    PrioritizedSampler,
    ReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.scheduler import LambdaScheduler, LinearScheduler, StepScheduler

from torchrl_recall.sampler import ValuePrioritizedSampler

NONE, NAN = -math.inf, math.nan
PARAMETERS = {
    "mode": "rank",
    "alpha": 0.5,
    "beta": 0.25,
    "top": 0.3,
    "temperature": 2.0,
    "min_value": -1.5,
    "eps": 1e-3,
    "uniform_share": 0.125,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def buffer(sampler, n=20, **kwargs):
    """A buffer of n values from -2 to 2; the entry after them has none, the next is barred."""
    rb = TensorDictReplayBuffer(
        storage=LazyTensorStorage(30), sampler=sampler, priority_key="v", **kwargs
    )
    values = torch.linspace(-2, 2, n).unsqueeze(-1)
    rb.extend(TensorDict({"v": values, "x": torch.arange(n)}, [n]))
    rb.add(TensorDict({"x": torch.tensor(n)}, []))
    rb.add(TensorDict({"x": torch.tensor(n + 1)}, []))
    with pytest.warns(UserWarning, match="not finite"):
        sampler.update_priority(n + 1, NAN)
    return rb


@pytest.fixture
def rb():
    return buffer(ValuePrioritizedSampler(30, **PARAMETERS))


def drawn(rb_or_sampler, storage=None, seed=3):
    sampler = rb_or_sampler.sampler if storage is None else rb_or_sampler
    storage = rb_or_sampler.storage if storage is None else storage
    torch.manual_seed(seed)
    index, info = sampler.sample(storage, 50)
    return index.tolist(), info["priority_weight"].tolist()


# Parameters


def test_is_torchrls_sampler_and_needs_no_extension(caplog):
    sampler = ValuePrioritizedSampler(3)
    assert isinstance(sampler, PrioritizedSampler)
    assert not caplog.records
    assert (sampler.alpha, sampler.beta, sampler.mode) == (1.0, 0.0, "top")
    assert (sampler.max_size, sampler.device) == (3, torch.device("cpu"))
    assert sampler.default_priority == torch.finfo(torch.float32).min
    assert repr(sampler) == (
        "ValuePrioritizedSampler(max_capacity=3, mode='top', top=0.1, temperature=1.0, "
        "min_value=None, alpha=1.0, eps=1e-08, uniform_share=0.0, beta=0.0)"
    )


@pytest.mark.parametrize(
    ("name", "value", "best_alone"),
    [
        ("top", 1e-6, True),
        ("temperature", np.float32(1e-4), True),
        ("min_value", torch.tensor(1.99), True),
        ("alpha", 60, True),
        ("beta", 2, False),
        ("eps", 1.0, False),
    ],
)
def test_parameters_can_be_set_at_any_time(name, value, best_alone):
    sampler = ValuePrioritizedSampler(30, mode="per" if name == "eps" else "soft", temperature=9.0)
    rb = buffer(sampler)
    sampler.mode = {"top": "top", "alpha": "rank"}.get(name, sampler.mode)
    assert len(set(drawn(rb)[0])) > 1
    setattr(sampler, name, value)
    assert getattr(sampler, name) == pytest.approx(float(value))
    assert type(getattr(sampler, name)) is float
    assert (set(drawn(rb)[0]) == {19}) is best_alone


def test_schedulers(rb):
    linear = LinearScheduler(rb, "beta", final_value=1.0, num_steps=3)
    halving = LambdaScheduler(rb, "temperature", lambda step: 0.5**step)
    steps = StepScheduler(rb, "top", gamma=0.5, n_steps=1, min_value=0.1)
    share = LinearScheduler(rb, "uniform_share", final_value=0.5, num_steps=3)
    for _ in range(3):
        for scheduler in (linear, halving, steps, share):
            scheduler.step()
    assert rb.sampler.uniform_share == pytest.approx(0.5)
    assert rb.sampler.beta == pytest.approx(1.0)
    assert rb.sampler.temperature == pytest.approx(0.25)
    assert rb.sampler.top == pytest.approx(0.1)


# Random numbers


def test_manual_seed_is_enough(rb):
    assert drawn(rb, seed=5) == drawn(rb, seed=5)
    assert drawn(rb, seed=5) != drawn(rb, seed=6)


def test_own_generator(rb):
    rb.set_rng(torch.Generator().manual_seed(1))
    first = drawn(rb, seed=1)
    second = drawn(rb, seed=1)
    assert first != second
    rb.set_rng(torch.Generator().manual_seed(1))
    assert [drawn(rb, seed=2), drawn(rb, seed=3)] == [first, second]


def test_prefetch():
    sampler = ValuePrioritizedSampler(30, mode="top", top=0.1)
    rb = buffer(sampler, prefetch=2, batch_size=16)
    rb.set_rng(torch.Generator().manual_seed(0))
    batches = torch.cat([rb.sample()["x"] for _ in range(5)])
    # Of 21 drawable entries the best 3.
    assert set(batches.tolist()) == {17, 18, 19}


# Persistence


def check_restored(restored, rb, expected):
    """The restored sampler draws the same, has all parameters, and stands on its own."""
    assert drawn(restored, rb.storage) == expected
    assert {name: getattr(restored, name) for name in PARAMETERS} == PARAMETERS
    torch.testing.assert_close(restored.values, rb.sampler.values, equal_nan=True)
    restored.refresh(torch.zeros(30))
    assert drawn(rb) == expected
    rb.sampler.refresh(torch.ones(30))
    assert restored.values.tolist() == [0.0] * 30


def test_state_dict(rb, tmp_path):
    expected, state = drawn(rb), rb.sampler.state_dict()
    kept = copy.deepcopy(state)
    torch.save(state, tmp_path / "sampler.pt")
    restored = ValuePrioritizedSampler(30)
    restored.load_state_dict(torch.load(tmp_path / "sampler.pt", weights_only=True))
    check_restored(restored, rb, expected)
    rb.sampler.load_state_dict(state)
    restored.load_state_dict(state)
    check_restored(restored, rb, expected)
    torch.testing.assert_close(state["_values"], kept["_values"], equal_nan=True)


def test_state_dict_of_the_buffer(rb, tmp_path):
    expected = drawn(rb)
    torch.save(rb.state_dict(), tmp_path / "rb.pt")
    other = TensorDictReplayBuffer(
        storage=LazyTensorStorage(30), sampler=ValuePrioritizedSampler(30), priority_key="v"
    )
    other.load_state_dict(torch.load(tmp_path / "rb.pt", weights_only=False))
    assert drawn(other) == expected
    check_restored(other.sampler, rb, expected)


@pytest.mark.parametrize("whole_buffer", [False, True])
def test_dumps(rb, tmp_path, whole_buffer):
    path = tmp_path / "new" / "folders"
    other = TensorDictReplayBuffer(
        storage=LazyTensorStorage(30), sampler=ValuePrioritizedSampler(30), priority_key="v"
    )
    source, target = (rb, other) if whole_buffer else (rb.sampler, other.sampler)
    if whole_buffer:
        path.mkdir(parents=True)
    source.dumps(path)
    rb.sampler.update_priority(torch.arange(5), 1.0)
    source.dumps(path)
    folder = path / "sampler" if whole_buffer else path
    assert {file.suffix for file in folder.iterdir()} == {".json", ".memmap"}
    target.loads(path)
    check_restored(other.sampler, rb, drawn(rb))


def test_loading_into_another_size_and_dtype():
    small = ValuePrioritizedSampler(2, dtype=torch.float64)
    small.update_priority(torch.tensor([0, 1]), torch.tensor([1.0, -1e300], dtype=torch.float64))
    large = ValuePrioritizedSampler(4)
    large.load_state_dict(small.state_dict())
    expected = torch.tensor([1.0, NAN, NONE, NONE])
    torch.testing.assert_close(large.values, expected, equal_nan=True)
    small.load_state_dict(large.state_dict())
    torch.testing.assert_close(small.values, expected.double(), equal_nan=True)


def test_dumps_over_a_smaller_one(tmp_path):
    for n in (2, 5):
        sampler = ValuePrioritizedSampler(n)
        sampler.refresh(torch.arange(float(n)))
        sampler.dumps(tmp_path)
    restored = ValuePrioritizedSampler(1)
    restored.loads(tmp_path)
    assert restored.values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(rb, copied):
    before = len(pickle.dumps(rb.sampler))
    expected = drawn(rb)
    assert len(pickle.dumps(rb.sampler)) == before  # what can be recomputed stays behind
    check_restored(copied(rb.sampler), rb, expected)


def test_pickled_buffer(rb):
    assert drawn(pickle.loads(pickle.dumps(rb))) == drawn(rb)


def test_refuses_to_be_sent_to_a_spawned_process():
    multiprocessing.context.set_spawning_popen(object())
    try:
        with pytest.raises(RuntimeError, match="values set in one would not reach the other"):
            pickle.dumps(ValuePrioritizedSampler(3))
    finally:
        multiprocessing.context.set_spawning_popen(None)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"_schema_version": 99}, ValueError, "_schema_version must be 2, got 99"),
        # As the version before wrote it, without the newer entries.
        (
            {"_schema_version": 1, "_oldest": None, "uniform_share": None},
            ValueError,
            "_schema_version must be 2, got 1",
        ),
        ({"top": 2.0}, ValueError, "top must be"),
        ({"_values": None}, KeyError, "lacks .'_values'."),
        ({"_oldest": None, "uniform_share": None}, KeyError, "lacks .'_oldest', 'uniform_share'."),
        ({"uniform_share": 1.5}, ValueError, "uniform_share must be"),
    ],
)
def test_bad_state_changes_nothing(rb, change, error, match):
    expected = drawn(rb)
    state = ValuePrioritizedSampler(30, top=0.9).state_dict() | change
    with pytest.raises(error, match=match):
        rb.sampler.load_state_dict(
            {k: v for k, v in state.items() if v is not None or k == "min_value"}
        )
    assert drawn(rb) == expected


# Threads


def test_a_write_during_sampling_is_not_lost():
    """Another view on a shared storage writes without this buffer's lock."""
    sampler = ValuePrioritizedSampler(500, mode="top", top=0.002)
    rb = ReplayBuffer(storage=LazyTensorStorage(500), sampler=sampler)
    rb.extend(torch.zeros(500))
    stop = threading.Event()

    def keep_sampling():
        while not stop.is_set():
            rb.sample(4)

    thread = threading.Thread(target=keep_sampling)
    thread.start()
    try:
        for i in range(300):
            best = i * 7 % 500
            sampler.update_priority(best, float(i))
            index = rb.sample(4, return_info=True)[1]["index"]
            assert index.tolist() == [best] * 4
    finally:
        stop.set()
        thread.join()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_capacity": 0}, ValueError),
        ({"max_capacity": 2.0}, TypeError),
        ({"max_capacity": True}, TypeError),
        ({"alpha": -0.1}, ValueError),
        ({"alpha": "1"}, TypeError),
        ({"alpha": None}, TypeError),
        ({"beta": -1}, ValueError),
        ({"beta": math.inf}, ValueError),
        ({"mode": "best"}, ValueError),
        ({"top": 0.0}, ValueError),
        ({"top": 1.01}, ValueError),
        ({"top": True}, TypeError),
        ({"temperature": 0.0}, ValueError),
        ({"temperature": math.inf}, ValueError),
        ({"temperature": NAN}, ValueError),
        ({"min_value": NAN}, ValueError),
        ({"min_value": "0"}, TypeError),
        ({"eps": 0.0}, ValueError),
        ({"uniform_share": -0.1}, ValueError),
        ({"uniform_share": 1.1}, ValueError),
        ({"uniform_share": NAN}, ValueError),
        ({"uniform_share": "0"}, TypeError),
        ({"dtype": torch.int64}, ValueError),
        ({"dtype": torch.float16}, ValueError),
        ({"reduction": "sum"}, ValueError),
    ],
)
def test_bad_arguments_are_named(arguments, error):
    ((name, value),) = arguments.items()
    with pytest.raises(error, match=f"^{name} must be .*, got "):
        ValuePrioritizedSampler(**({"max_capacity": 5} | arguments))
    if name in PARAMETERS:
        sampler = ValuePrioritizedSampler(5)
        before = sampler.state_dict()
        with pytest.raises(error, match=f"^{name} must be .*, got "):
            setattr(sampler, name, value)
        assert before[name] == getattr(sampler, name)


@pytest.mark.parametrize(
    ("values", "index", "error", "match"),
    [
        (
            torch.zeros(4),
            None,
            ValueError,
            "values must hold at most max_capacity=3 numbers, got 4",
        ),
        (torch.zeros(2, 2), None, ValueError, r"values must have shape \[n\] or \[n, 1\], got"),
        (torch.tensor(1.0), None, ValueError, "values must have shape"),
        (
            torch.zeros(2),
            torch.tensor([0]),
            ValueError,
            "index must select one entry for each of 2",
        ),
        (torch.zeros(1), torch.tensor([True, True]), ValueError, "index must select one entry"),
        (torch.zeros(1), torch.tensor([3]), IndexError, r"index must be in \[0, 3\)"),
        (torch.zeros(1), torch.tensor([-1]), IndexError, r"index must be in \[0, 3\)"),
        (torch.zeros(1), torch.tensor([1.0]), TypeError, "index must hold integers"),
    ],
)
def test_bad_refresh(values, index, error, match):
    sampler = ValuePrioritizedSampler(3)
    with pytest.raises(error, match=match):
        sampler.refresh(values, index)
    assert sampler.values.tolist() == [NONE] * 3


@pytest.mark.parametrize(
    ("index", "priority", "error", "match"),
    [
        (torch.tensor([0, 1]), torch.zeros(3), ValueError, "one for each of 2 indices"),
        (torch.tensor([[0, 1]]), 1.0, ValueError, r"\[N, 1\] .*got \(1, 2\) and no storage"),
        (torch.tensor([3]), 1.0, IndexError, "index must be below 3, got 3"),
        (torch.tensor([0.0]), 1.0, TypeError, "index must hold integers, got torch.float32"),
        (torch.tensor([True]), 1.0, TypeError, "index must hold integers, got torch.bool"),
    ],
)
def test_bad_update_priority(index, priority, error, match):
    sampler = ValuePrioritizedSampler(3)
    with pytest.raises(error, match=match):
        sampler.update_priority(index, priority)
    assert sampler.values.tolist() == [NONE] * 3


def test_index_beyond_the_storage():
    rb = ReplayBuffer(storage=LazyTensorStorage(6, ndim=2), sampler=ValuePrioritizedSampler(6))
    rb.extend(torch.zeros(2, 3))
    with pytest.raises(IndexError, match="index must be below 2 in dimension 1"):
        rb.update_priority(torch.tensor([[0, 2]]), 1.0)
    with pytest.raises(IndexError, match="index must be below 6, got 6"):
        rb.update_priority(torch.tensor([[3, 0]]), 1.0)

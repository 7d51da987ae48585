"""What users do to a sampler that nobody foresaw: odd tensors, extreme numbers, forks, failures."""

from __future__ import annotations

import copy
import ctypes
import math
import mmap
import os
import warnings

import numpy as np
import pytest
import torch
from engines import ENGINES, choose_engine
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ListStorage, TensorDictReplayBuffer

from torchrl_recall import ValuePrioritizedSampler
from torchrl_recall.native import interface, priorities
from torchrl_recall.priorities.native import NativePriorities
from torchrl_recall.priorities.weights import MODES, Parameters, value_weights

NONE, NAN = -math.inf, math.nan


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    torch.manual_seed(0)
    choose_engine(monkeypatch, request.param)
    return ENGINES[request.param]


def buffer(values, capacity=None, **kwargs):
    n = len(values)
    rb = TensorDictReplayBuffer(
        storage=LazyTensorStorage(capacity or n),
        sampler=ValuePrioritizedSampler(capacity or n, **kwargs),
        priority_key="v",
    )
    rb.extend(TensorDict({"v": torch.as_tensor(values).unsqueeze(-1)}, [n]))
    return rb


EXTREMES = [
    {"top": 1.0},
    {"top": 5e-324},
    {"mode": "soft", "temperature": 1e-6},
    {"mode": "soft", "temperature": 1e30},
    {"mode": "rank", "alpha": 0.0},
    {"mode": "rank", "alpha": 1000.0},
    {"mode": "rank", "alpha": 1e300},
    {"mode": "per", "alpha": 0.0},
    {"mode": "per", "alpha": 1000.0},
    {"mode": "per", "alpha": 1e300},
    {"mode": "per", "eps": 1e-300},
    {"mode": "per", "eps": 1e300},
    {"mode": "per", "eps": 1e300, "alpha": 0.6},
    *({"mode": m, "min_value": x} for m in MODES for x in (NONE, math.inf, 1e39, -1e39, 0.7)),
]


@pytest.mark.parametrize("parameters", EXTREMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 5e-324, 0.5])
def test_extreme_parameters(engine, parameters, dtype, share):
    values = torch.tensor([0.7, 0.1, 0.0, NONE, -3.0, 0.7, 1e30, NAN], dtype=dtype)
    for stored in (values, values[:6]):
        n = len(stored)
        priorities = engine(n, dtype, None)
        priorities.restore(stored)
        chosen = Parameters(**{"uniform_share": share} | parameters)
        expected = value_weights(stored, **chosen._asdict())
        got = priorities.weights(n, chosen)
        torch.testing.assert_close(got / got.sum(), expected / expected.sum(), rtol=1e-5, atol=1e-9)
        uniform = torch.rand(200, dtype=torch.float64)
        uniform[0] = 0.0
        entry, importance = priorities.draw(uniform, n, chosen, 0.5)
        assert bool((got[entry] > 0).all())
        assert bool(importance.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_very_high_temperature_is_uniform_in_double(engine, dtype):
    values = torch.tensor([1.0, -1.0, 0.0], dtype=dtype) * (1e300 if dtype.itemsize == 8 else 1)
    priorities = engine(3, dtype, None)
    priorities.restore(values)
    weights = priorities.weights(3, Parameters("soft", temperature=1e300))
    expected = value_weights(values, "soft", temperature=1e300)
    torch.testing.assert_close(
        weights / weights.sum(), expected / expected.sum(), atol=0, rtol=1e-5
    )


INDEX = torch.tensor([4, 0, 2])
PRIORITY = torch.tensor([1.0, -2.0, 3.0])
FORMS = {
    "int32": (INDEX.int(), PRIORITY),
    "strided": (INDEX.repeat_interleave(2)[::2], PRIORITY.repeat_interleave(3)[::3]),
    "list": (INDEX.tolist(), PRIORITY.tolist()),
    "numpy": (INDEX.numpy(), PRIORITY.numpy()),
    "numpy int32": (INDEX.numpy().astype(np.int32), PRIORITY.double().numpy()),
    "grad": (INDEX, PRIORITY.clone().requires_grad_()),
    "negative view": (INDEX, torch.complex(PRIORITY, -PRIORITY).conj().imag),
    "float16": (INDEX, PRIORITY.half()),
    "bfloat16": (INDEX, PRIORITY.bfloat16()),
    "integers": (INDEX, PRIORITY.int()),
    "column": (INDEX.unsqueeze(1), PRIORITY.unsqueeze(1)),
    "expanded": (INDEX, PRIORITY.unsqueeze(1).expand(3, 4)),
}


@pytest.mark.parametrize(("index", "priority"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forms_of_index_and_priority(engine, index, priority, dtype):
    sampler = ValuePrioritizedSampler(5, dtype=dtype)
    sampler.update_priority(index, priority)
    assert sampler.values.tolist() == [-2.0, NONE, 3.0, NONE, 1.0]
    if torch.as_tensor(priority).numel() == 3:
        sampler.refresh(torch.zeros(5))
        sampler.refresh(priority, torch.as_tensor(index).reshape(-1))
        assert sampler.values.tolist() == [-2.0, 0.0, 3.0, 0.0, 1.0]
    sampler.update_priority(torch.tensor(1).expand(3), torch.tensor([1.0, 7.0, 2.0]))
    assert sampler.values[1] == 7.0
    sampler.mark_update(torch.tensor([0]).expand(6))
    assert sampler.values[0] == NONE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", [None, "ids"])
def test_one_entry_and_all_batch_sizes(engine, mode, key):
    rb = TensorDictReplayBuffer(
        storage=LazyTensorStorage(1), sampler=ValuePrioritizedSampler(1, mode=mode, beta=0.5)
    )
    rb.sampler.trajectory_key = key
    rb.extend(TensorDict({"ids": torch.tensor([3])}, [1]))
    for n in (0, 1, 100_000):
        index, info = rb.sampler.sample(rb.storage, n)
        assert index.tolist() == [0] * n
        assert info["priority_weight"].tolist() == [1.0] * n


def test_a_million_draws(engine):
    rb = buffer(torch.randn(1000), mode="rank", beta=0.5, uniform_share=0.1)
    index, info = rb.sampler.sample(rb.storage, 1_000_000)
    assert len(index.unique()) == 1000
    assert bool(info["priority_weight"].isfinite().all())


def test_the_engines_agree():
    """The same random numbers give other entries, but the same distribution."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(1)).mul_(2).round_()
    uniform = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    for mode in MODES:
        for share in (0.0, 0.3):
            parameters = Parameters(mode, alpha=0.7, uniform_share=share)
            counts, importances = [], []
            for Priorities in ENGINES.values():
                priorities = Priorities(50, torch.float32, None)
                priorities.refresh(values)
                entry, importance = priorities.draw(uniform, 50, parameters, 0.5)
                counts.append(entry.bincount(minlength=50))
                each = torch.zeros(50)
                each[entry] = importance
                importances.append(each)
            # An evenly spaced grid hits each entry as often as it should, but for its ends.
            assert int((counts[0] - counts[1]).abs().max()) <= 50
            torch.testing.assert_close(*importances, rtol=1e-5, atol=0)


def test_weights_of_more_than_the_capacity_grow_it(engine):
    sampler = ValuePrioritizedSampler(2)
    sampler.refresh(torch.tensor([1.0, 2.0]))
    assert sampler.weights(5).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert sampler.max_size == len(sampler.values) == 5
    restored = ValuePrioritizedSampler(1)
    restored.load_state_dict(sampler.state_dict())
    assert restored.values.tolist() == sampler.values.tolist()


def test_storage_without_a_bound(engine):
    rb = TensorDictReplayBuffer(storage=ListStorage(), sampler=ValuePrioritizedSampler(1, top=0.01))
    rb.extend(TensorDict({"x": torch.zeros(70)}, [70]))
    rb.update_priority(torch.tensor([69]), torch.tensor([1.0]))
    assert rb.sample(9)["index"].tolist() == [69] * 9
    assert rb.sampler.max_size < 200


@pytest.mark.skipif(interface.load()[0] is None, reason="the C library is not built")
@pytest.mark.parametrize("capacity", [2**32, 2**62])
def test_a_capacity_beyond_the_librarys_counters_is_refused(capacity):
    with pytest.raises(ValueError, match="max_capacity must be at most 4294967295"):
        ValuePrioritizedSampler(capacity)
    sampler = ValuePrioritizedSampler(2)
    with pytest.raises(ValueError, match="max_capacity must be at most 4294967295"):
        sampler.weights(capacity)
    assert sampler.max_size == len(sampler.values) == 2


@pytest.mark.skipif(interface.load()[0] is None, reason="the C library is not built")
def test_no_memory_for_a_mode_leaves_the_one_before(monkeypatch):
    """The library must not be asked for ranks that have no memory."""
    rb = buffer([1.0, 2.0, 3.0], top=0.3)
    before = rb.sampler.weights(3)

    def without_memory(self, name, count, dtype):
        raise MemoryError(name)

    monkeypatch.setattr(NativePriorities, "_allot", without_memory)
    rb.sampler.mode = "rank"
    with pytest.raises(MemoryError, match="order"):
        rb.sample(2)
    rb.sampler.mode = "top"
    assert rb.sampler.weights(3).tolist() == before.tolist()
    assert rb.sample(4)["index"].tolist() == [2] * 4


@pytest.mark.skipif(os.name == "nt", reason="no mprotect")
@pytest.mark.skipif(interface.load()[0] is None, reason="the C library is not built")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_double", [0, 1])
def test_the_library_reads_nothing_behind_the_values(mode, is_double):
    """The values end where a page begins that must not be read: a look there ends the child."""
    library = interface.load()[0]
    assert library is not None
    count, page = 1024, mmap.PAGESIZE
    memory = mmap.mmap(-1, 8 * count + page)
    kind = ctypes.c_double if is_double else ctypes.c_float
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 8 * count
    start = end - count * ctypes.sizeof(kind)
    for i, value in enumerate((kind * count).from_address(start)):
        assert value == 0
        (kind * count).from_address(start)[i] = i / count
    nodes = [torch.zeros(library.recall_num_nodes(count), dtype=torch.float64) for _ in range(2)]
    order = [torch.zeros(count, dtype=torch.int32) for _ in range(2)]
    state = priorities.Priorities(
        capacity=count,
        is_double=is_double,
        instruction_set=library.recall_instruction_set(),
        values=start,
        mode=MODES.index(mode),
        temperature=1.0,
        alpha=0.6,
        eps=1e-8,
        uniform_share=0.5,
    )
    state.nodes, state.eligible, state.order, state.spare = (x.data_ptr() for x in nodes + order)
    changed = torch.zeros(count // 64 + 1, dtype=torch.int64)
    band = torch.zeros(priorities.MAX_BAND, dtype=torch.int32)
    state.changed, state.band = changed.data_ptr(), band.data_ptr()
    uniform = torch.rand(3000, dtype=torch.float64)
    entry, importance = torch.zeros(3000, dtype=torch.int64), torch.zeros(3000)
    weights = torch.zeros(count, dtype=torch.float64)
    child = forked(
        lambda: (
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
            and library.recall_resize(ctypes.addressof(state), count) == 0
            and library.recall_census(ctypes.addressof(state)) == 0
            and not setattr(state, "num_best", 10)
            and library.recall_draw(
                ctypes.addressof(state),
                uniform.data_ptr(),
                3000,
                0.5,
                entry.data_ptr(),
                importance.data_ptr(),
            )
            == 0
            and library.recall_weights(ctypes.addressof(state), weights.data_ptr()) == 0
        )
    )
    assert child == 0


def forked(action):
    """Return how a child ended that did something: 0 where it returned something true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if action() else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_use(engine):
    rb = buffer(torch.arange(40.0), mode="rank")
    rb.sample(8)
    values = rb.sampler.values

    def in_the_child():
        rb.sampler.update_priority(torch.tensor([3]), torch.tensor([1e9]))
        rb.sampler.mode = "top"
        rb.sampler.top = 1e-3
        return rb.sampler.sample(rb.storage, 5)[0].tolist() == [3] * 5

    assert forked(in_the_child) == 0
    assert torch.equal(rb.sampler.values, values)
    assert rb.sampler.mode == "rank"


def test_copies_and_generators_draw_the_same(engine):
    rb = buffer(torch.randn(40), mode="soft", uniform_share=0.2, beta=0.5)
    twins = [rb.sampler, copy.deepcopy(rb.sampler), copy.deepcopy(copy.deepcopy(rb.sampler))]
    drawn = []
    for sampler in twins:
        sampler._rng = torch.Generator().manual_seed(5)
        index, info = sampler.sample(rb.storage, 50)
        drawn.append((index.tolist(), info["priority_weight"].tolist()))
    assert drawn[0] == drawn[1] == drawn[2]


def test_inside_a_compiled_function(engine):
    rb = buffer(torch.arange(40.0), top=0.1)
    compiled = torch.compile(lambda n: rb.sampler.sample(rb.storage, n)[0] + 1, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Dynamo does not trace
        assert set(compiled(64).tolist()) == {37, 38, 39, 40}

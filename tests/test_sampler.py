"""The sampler in TorchRL's buffers: exact distributions, every way that data come in, persistence.

The chi-square tests refuse a right sampler with probability 1e-4 each; their seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engines import ENGINES, choose_engine
from scipy.stats import chisquare
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    PrioritizedSampler,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
)

from torchrl_recall.sampler import ValuePrioritizedSampler

NONE, NAN = -math.inf, math.nan
DRAWS = 20_000
VALUES = [-3.0, -1.0, -1.0, 2.0, 5.0, 5.0, 0.0, -7.0]
RANK = {5: (1 + 2**-1.5) / 2, 2: 3**-1.5, 0: 4**-1.5, -1: (5**-1.5 + 6**-1.5) / 2}
RANK |= {-3: 7**-1.5, -7: 8**-1.5}
SHARE = [0, 0, 0, 0.4 / 3, 0.3 + 0.4 / 3, 0.3 + 0.4 / 3, 0, 0]
MODES = {
    "top": ({"top": 0.5}, [0, 0, 0, 1, 1, 1, 1, 0]),
    "top, ties": ({"top": 0.6}, [0, 0.5, 0.5, 1, 1, 1, 1, 0]),
    "top, one": ({"top": 1e-9}, [0, 0, 0, 0, 1, 1, 0, 0]),
    "soft": ({"mode": "soft", "temperature": 4.0}, [math.exp(v / 4) for v in VALUES]),
    "rank": ({"mode": "rank", "alpha": 1.5}, [RANK[v] for v in VALUES]),
    "per": ({"mode": "per", "alpha": 0.6}, [(abs(v) + 1e-8) ** 0.6 for v in VALUES]),
    "min_value": ({"mode": "soft", "min_value": 1}, [0, 0, 0, 1, math.e**3, math.e**3, 0, 0]),
    "share": ({"top": 0.25, "uniform_share": 0.4}, [1 / 20] * 4 + [7 / 20] * 2 + [1 / 20] * 2),
    "share, min_value": ({"top": 0.2, "uniform_share": 0.4, "min_value": 1}, SHARE),
}
modes = pytest.mark.parametrize(("parameters", "weights"), MODES.values(), ids=MODES.keys())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def data(values):
    values = torch.as_tensor(values, dtype=torch.float32)
    return TensorDict({"v": values.unsqueeze(-1), "x": torch.rand(*values.shape, 2)}, values.shape)


def buffer(values=(), *, capacity=8, storage=LazyTensorStorage, sampler=None, **kwargs):
    """A buffer that takes values from the key "v"; kwargs go to the sampler."""
    if sampler is None:
        sampler = ValuePrioritizedSampler(capacity, **kwargs)
    if isinstance(storage, type):
        storage = storage(capacity)
    rb = TensorDictReplayBuffer(storage=storage, sampler=sampler, priority_key="v")
    if len(values):
        rb.extend(data(values))
    return rb


def indices(rb, n=64):
    """Draw flat indices."""
    index = rb.sampler.sample(rb.storage, n)[0]
    if isinstance(index, tuple):
        index = index[0] * rb.storage.shape[1] + index[1]
    return index


def assert_draws(rb, weights):
    """Draws follow the weights, and weight 0 is never drawn."""
    weights = np.asarray(weights, dtype=float)
    counts = np.bincount(indices(rb, DRAWS).numpy(), minlength=len(weights))
    assert len(counts) == len(weights)
    possible = weights > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        expected = DRAWS * weights[possible] / weights.sum()
        assert chisquare(counts[possible], expected).pvalue > 1e-4


# Distributions


@pytest.mark.parametrize("engine", ENGINES)
@modes
def test_distribution(monkeypatch, engine, parameters, weights):
    choose_engine(monkeypatch, engine)
    rb = buffer(VALUES, **parameters)
    assert type(rb.sampler._priorities) is ENGINES[engine]
    assert_draws(rb, weights)
    got, expected = rb.sampler.weights(8), torch.tensor(weights, dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got / got.sum(), expected / expected.sum(), rtol=1e-5, atol=0)


@modes
def test_distribution_after_overwriting(parameters, weights):
    rb = buffer([9.0] * 8, **parameters)
    indices(rb)
    rb.extend(data(VALUES[:5]))
    rb.extend(data(VALUES[5:]))
    assert_draws(rb, weights)


@modes
def test_distribution_after_update_tensordict_priority(parameters, weights):
    rb = buffer([1.0] * 8, mode="soft")
    sample = rb.sample(256)
    assert len(sample["index"].unique()) == 8
    sample["v"] = torch.tensor(VALUES)[sample["index"]].unsqueeze(-1)
    for name, value in ({"mode": "top"} | parameters).items():
        setattr(rb.sampler, name, value)
    rb.update_tensordict_priority(sample)
    assert_draws(rb, weights)


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
def test_distribution_on_storages(storage):
    rb = buffer(VALUES, storage=storage, mode="rank", alpha=1.5)
    assert_draws(rb, MODES["rank"][1])
    sample = rb.sample(100)
    assert sample["v"].squeeze(-1).tolist() == [VALUES[i] for i in sample["index"]]


@pytest.mark.parametrize("mode", ["top", "soft", "rank", "per"])
def test_uniform_while_nothing_has_a_value(mode):
    rb = buffer(mode=mode, alpha=2.0)
    rb.extend(data(torch.zeros(5)).exclude("v"))
    assert_draws(rb, [1] * 5)
    assert rb.sampler.values.tolist() == [NONE] * 8


def test_no_value_yet_is_the_lowest_class():
    rb = buffer([-4.0, -5.0], top=0.6)
    rb.extend(data(torch.zeros(3)).exclude("v"))
    assert_draws(rb, [1, 1, 1 / 3, 1 / 3, 1 / 3])
    rb.sampler.mode = "soft"
    assert_draws(rb, [1, math.exp(-1), 0, 0, 0])


def test_min_value_that_nothing_reaches_is_ignored():
    rb = buffer(VALUES, mode="top", top=0.5, min_value=100.0)
    assert_draws(rb, MODES["top"][1])
    rb.sampler.min_value = 3
    assert_draws(rb, [0, 0, 0, 0, 1, 1, 0, 0])


@pytest.mark.parametrize("beta", [0.0, 0.7])
@modes
def test_importance_weights(parameters, weights, beta):
    rb = buffer(VALUES, beta=beta, **parameters)
    index, info = rb.sampler.sample(rb.storage, 100)
    least = min(w for w in weights if w > 0)
    expected = torch.tensor([(weights[i] / least) ** -beta for i in index.tolist()])
    assert info["priority_weight"].dtype == torch.float32
    torch.testing.assert_close(info["priority_weight"], expected)


def test_per_agrees_with_torchrl():
    try:
        theirs = PrioritizedSampler(8, alpha=0.6, beta=0.4)
    except RuntimeError as error:
        pytest.skip(f"TorchRL's extension does not load here: {error}")
    values = [abs(v) for v in VALUES]
    ours = buffer(values, mode="per", alpha=0.6, beta=0.4)
    rb = buffer(values, sampler=theirs)
    np.random.seed(0)  # noqa: NPY002 (what TorchRL's sampler draws from)
    assert_draws(rb, MODES["per"][1])
    assert_draws(ours, MODES["per"][1])
    rb.set_rng(torch.Generator().manual_seed(0))
    theirs = rb.sample(2000)
    weight = dict(zip(theirs["index"].tolist(), theirs["priority_weight"], strict=True))
    sample = ours.sample(500)
    expected = torch.stack([weight[i] for i in sample["index"].tolist()])
    torch.testing.assert_close(sample["priority_weight"], expected, rtol=1e-4, atol=1e-6)


# How values come in


def test_order_of_extend_and_add():
    rb = buffer([1.0, 2.0, 3.0], capacity=4)
    rb.add(data(torch.tensor(4.0)))
    rb.add(data(torch.tensor(-5.0)))
    assert rb.sampler.values.tolist() == [-5.0, 2.0, 3.0, 4.0]
    rb.add(data(torch.tensor(0.0)).exclude("v"))
    rb.extend(data([6.0, 7.0]).exclude("v"))
    assert rb.sampler.values.tolist() == [-5.0, NONE, NONE, NONE]


@pytest.mark.parametrize("with_key", [True, False])
def test_two_dimensions(with_key):
    rb = buffer(storage=LazyTensorStorage(24, ndim=2), capacity=24, top=0.1)
    batch = data(torch.arange(12.0).reshape(3, 4))
    rb.extend(batch if with_key else batch.exclude("v"))
    if not with_key:
        rb.sampler.refresh(rb.storage[:]["x"][..., 0].flatten())
    # The storage has time first; rb[:] would turn it back.
    stored = rb.storage[:]["v" if with_key else "x"][..., 0]
    torch.testing.assert_close(rb.sampler.values[:12], stored.flatten())
    best = set(stored.flatten().topk(2).indices.tolist())
    assert set(indices(rb).tolist()) == best
    sample = rb.sample(64)
    assert {i * 3 + j for i, j in sample["index"].tolist()} == best
    sample["v"] = torch.full((64, 1), -1.0)
    rb.update_tensordict_priority(sample)
    assert set((rb.sampler.values[:12] == -1).nonzero().squeeze(1).tolist()) == best
    rb.sampler.mark_update(torch.tensor([[0, 1], [3, 2]]), storage=rb.storage)
    assert rb.sampler.values[[1, 11]].tolist() == [NONE, NONE]


@pytest.mark.parametrize(
    ("reduction", "expected"), [("max", 9.0), ("min", -2.0), ("mean", 2.5), ("median", 1.0)]
)
def test_stored_trajectories_are_reduced(reduction, expected):
    rb = buffer(reduction=reduction)
    trajectory = data([[1.0, -2.0, 9.0, 2.0]])
    rb.extend(trajectory.repeat(2, 1))
    rb.add(trajectory[0])
    assert rb.sampler.values[:4].tolist() == [expected, expected, expected, NONE]
    sample = rb.sample(4)
    sample["v"] += 1
    rb.update_tensordict_priority(sample)
    assert rb.sampler.values[sample["index"][:, 0]].tolist() == [expected + 1] * 4


@pytest.mark.parametrize(
    ("index", "priority", "expected"),
    [
        (1, -2.0, [NONE, -2.0, NONE]),
        (torch.tensor(2), torch.tensor([7]), [NONE, NONE, 7.0]),
        (torch.tensor([0, 2]), 3.0, [3.0, NONE, 3.0]),
        (torch.tensor([0, -1, 2]), torch.tensor([1.0, 2.0, 3.0]), [1.0, NONE, 3.0]),
        (torch.tensor([[2], [0]]), torch.tensor([[5.0], [6.0]]), [6.0, NONE, 5.0]),
        (np.array([1, 0]), np.array([1.0, 2.0]), [2.0, 1.0, NONE]),
        ((torch.tensor([1, 0]),), torch.tensor([1.0, 2.0]), [2.0, 1.0, NONE]),
        (-1, 5.0, [NONE] * 3),
        ((), 5.0, [NONE] * 3),
        (torch.zeros(0, dtype=torch.long), torch.zeros(0, 1), [NONE] * 3),
    ],
)
def test_forms_of_update_priority(index, priority, expected):
    sampler = ValuePrioritizedSampler(3)
    sampler.update_priority(index, priority)
    assert sampler.values.tolist() == expected
    sampler.mark_update(index)
    assert sampler.values.tolist() == [NONE] * 3


def test_shared_storage_and_writer():
    first = buffer(VALUES, top=0.2)
    view = TensorDictReplayBuffer(
        storage=first.storage,
        writer=first._writer,
        sampler=ValuePrioritizedSampler(8, top=0.2),
        priority_key="v",
    )
    assert view.sampler.values.tolist() == [NONE] * 8
    view.sampler.refresh(torch.arange(8.0))
    first.extend(data([100.0]))
    assert first.sampler.values.tolist() == [100.0, *VALUES[1:]]
    assert view.sampler.values.tolist() == [NONE, *range(1, 8)]
    assert_draws(view, [0, 0, 0, 0, 0, 0, 1, 1])
    assert_draws(first, [1, 0, 0, 0, 0.5, 0.5, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attached_to_a_full_buffer(dtype):
    filled = buffer(VALUES)
    rb = buffer(storage=filled.storage, capacity=3, dtype=dtype)
    assert_draws(rb, [1] * 8)
    rb.sampler.refresh(torch.ones(8))
    rb.update_tensordict_priority(rb.sample(256).exclude("v"))
    # The batch carries no value: what the entries have stays.
    assert rb.sampler.values.tolist() == [1.0] * 8
    filled.set_sampler(ValuePrioritizedSampler(3))
    assert_draws(filled, [1] * 8)


def test_grows_with_a_larger_storage():
    rb = buffer(VALUES, sampler=ValuePrioritizedSampler(1, top=0.5))
    assert rb.sampler.values.tolist() == VALUES
    assert rb.sampler.max_size == 8
    assert_draws(rb, MODES["top"][1])


def test_max_value_writer():
    rb = TensorDictReplayBuffer(
        storage=LazyTensorStorage(3),
        sampler=ValuePrioritizedSampler(3, mode="soft"),
        writer=TensorDictMaxValueWriter(rank_key="v"),
        priority_key="v",
    )
    rb.extend(data([1.0, 5.0, 2.0, 4.0, -1.0]))
    rb.add(data(torch.tensor(-9.0)))
    rb.add(data(torch.tensor(3.0)))
    assert sorted(rb.sampler.values.tolist()) == [3.0, 4.0, 5.0]
    assert rb.sampler.values.tolist() == rb[:]["v"].squeeze(-1).tolist()


def test_empty():
    rb = buffer(VALUES)
    indices(rb)
    rb.empty()
    assert rb.sampler.values.tolist() == [NONE] * 8
    with pytest.raises(RuntimeError, match="empty storage"):
        indices(rb)
    rb.extend(data([1.0, 2.0, 3.0]))
    assert_draws(rb, [0, 0, 1])


def test_refresh():
    sampler = buffer(VALUES).sampler
    sampler.refresh(torch.arange(3.0).unsqueeze(1).requires_grad_())
    assert sampler.values.tolist() == [0.0, 1.0, 2.0, *VALUES[3:]]
    sampler.refresh(torch.tensor([-1.0, -2.0]), torch.tensor([7, 5]))
    sampler.refresh(torch.tensor([8.0]), torch.arange(8) == 4)
    assert sampler.values.tolist() == [0.0, 1.0, 2.0, 2.0, 8.0, -2.0, 0.0, -1.0]
    sampler.refresh(torch.zeros(0))
    assert sampler.values.tolist() == [0.0, 1.0, 2.0, 2.0, 8.0, -2.0, 0.0, -1.0]


# Non-finite values


def test_refresh_of_one_entry_with_several_values():
    rb = buffer(VALUES)
    rb.sampler.refresh(torch.tensor([8.0, 9.0]), torch.tensor([3, 3]))
    assert rb.sampler.values[3] in (8.0, 9.0)


def test_one_number_for_an_index_that_comes_twice():
    rb = buffer(VALUES)
    rb.sampler.update_priority(torch.tensor([5, 5]), 0.75)
    assert rb.sampler.values[5] == 0.75


def test_priorities_with_a_gradient():
    rb = buffer(VALUES)
    for value in (torch.rand(2, 1), torch.rand(2, dtype=torch.float64), torch.rand(2).half()):
        rb.sampler.update_priority(torch.tensor([1, 4]), value.requires_grad_())
        assert torch.equal(rb.sampler.values[[1, 4]], value.detach().float().reshape(-1))
        assert not rb.sampler.values.requires_grad
        rb.sampler.refresh(value.reshape(-1), torch.tensor([2, 5]))
        assert torch.equal(rb.sampler.values[[2, 5]], value.detach().float().reshape(-1))
    rb.sampler.refresh(torch.rand(8).requires_grad_())
    assert rb.sampler.sample(rb.storage, 4)[0].shape == (4,)


def test_non_finite_values_are_stored_reported_once_and_never_drawn():
    rb = buffer(top=1.0)
    with pytest.warns(UserWarning, match=r"got 3 value\(s\) that are not finite in torch.float32"):
        rb.extend(data([1.0, NAN, math.inf, -math.inf, -2.0]))
    rb.extend(data([NAN]))
    torch.testing.assert_close(
        rb.sampler.values[:6], torch.tensor([1.0, NAN, NAN, NAN, -2.0, NAN]), equal_nan=True
    )
    assert len(rb) == 6
    assert_draws(rb, [1, 0, 0, 0, 1, 0])
    rb.extend(data(torch.zeros(2)).exclude("v"))
    assert_draws(rb, [1, 0, 0, 0, 1, 0, 1, 1])


def test_only_non_finite_values():
    rb = buffer([1.0, 2.0])
    indices(rb)
    with pytest.warns(UserWarning, match="got 2 value"):
        rb.sampler.refresh(torch.tensor([NAN, NAN]))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="All 2 stored entries were given non-finite"):
            indices(rb)
    rb.sampler.refresh(torch.tensor([5.0]), torch.tensor([1]))
    assert_draws(rb, [0, 1])


def test_value_too_large_for_the_dtype():
    sampler = ValuePrioritizedSampler(1)
    with pytest.warns(UserWarning, match="not finite in torch.float32"):
        sampler.update_priority(0, 1e300)
    double = ValuePrioritizedSampler(1, dtype=torch.float64)
    double.update_priority(0, -1e300)
    assert double.values.tolist() == [-1e300]

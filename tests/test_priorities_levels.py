"""Values to weights and draws, for every class that does it: against `value_weights`.

Chi-squared tests have fixed seeds; under the null each would fail for one seed in 10 000.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from test_priorities_weights import CASES

from torchrl_recall.priorities.levels import TorchPriorities
from torchrl_recall.priorities.native import NativePriorities
from torchrl_recall.priorities.weights import MODES, Parameters, value_weights


class WithoutWaiting(TorchPriorities):
    """The path of a GPU, on the CPU."""

    def __init__(self, capacity, dtype, device):
        super().__init__(capacity, dtype, device, _waits=False)


CLASSES = [NativePriorities, TorchPriorities, WithoutWaiting]
PARAMETERS = [
    Parameters("top", top=0.01),
    Parameters("top", top=0.5),
    Parameters("soft"),
    Parameters("soft", temperature=1e-6),
    Parameters("rank", alpha=0.0),
    Parameters("rank", alpha=1.7),
    Parameters("per", alpha=0.6),
    Parameters("per", alpha=2.0, eps=0.5),
    Parameters("per", alpha=0.0),
    Parameters("per", alpha=100.0),
]
EXTREMES = {
    "all equal": [0.5] * 40,
    "huge": [1e30, -1e30, 0.0, 5.0] * 20,
    "one above the floor": [-1e30] * 99 + [1e30],
    "one below": [1e30] * 99 + [-1e30],
    "tiny": [1e-30, -1e-30, 0.0] * 30,
}


@pytest.fixture(params=CLASSES)
def Priorities(request):
    return request.param


def uniforms(n, seed=0):
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def holding(Priorities, values, dtype=torch.float32):
    priorities = Priorities(len(values), dtype, None)
    values = torch.as_tensor(values, dtype=dtype)
    priorities.write(torch.arange(len(values)), values)
    priorities.erase((values == -math.inf).nonzero().squeeze(1))
    return priorities


def assert_right(priorities, size, parameters, rtol=1e-5):
    values = torch.nn.functional.pad(
        priorities.values, (0, max(0, size - priorities.capacity)), value=-math.inf
    )[:size]
    expected = value_weights(values, **parameters._asdict())
    got = priorities.weights(size, parameters)
    assert got.dtype == torch.float64
    # Single precision ends at 1e-38 of the largest weight.
    torch.testing.assert_close(got / got.sum(), expected / expected.sum(), rtol=rtol, atol=1e-37)


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("min_value", [None, 0.0, 1e35])
@pytest.mark.parametrize("uniform_share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_cases(Priorities, values, min_value, uniform_share, parameters, dtype):
    if all(math.isnan(v) for v in values):
        return
    parameters = parameters._replace(min_value=min_value, uniform_share=uniform_share)
    assert_right(holding(Priorities, values, dtype), len(values), parameters)


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES.keys())
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("uniform_share", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_extremes(Priorities, values, parameters, uniform_share, beta):
    parameters = parameters._replace(uniform_share=uniform_share)
    n = len(values)
    priorities = holding(Priorities, values)
    assert_right(priorities, n, parameters)
    uniform = torch.cat([torch.tensor([0.0, 5e-324, 1 - 2**-53]).double(), uniforms(500)])
    entry, importance = priorities.draw(uniform, n, parameters, beta)
    weights = priorities.weights(n, parameters)
    assert entry.dtype == torch.int64
    assert int(entry.min()) >= 0
    assert int(entry.max()) < n
    assert bool((weights[entry] > 0).all())
    expected = (weights[entry] / weights[weights > 0].min()) ** -beta
    torch.testing.assert_close(importance, expected.float(), rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("n", [100, 10_000, 1_000_000])
@pytest.mark.parametrize("kind", ["normal", "ties", "mixed"])
def test_weights_of_random_values(Priorities, parameters, n, kind):
    if parameters.mode == "rank" and n == 1_000_000 and kind != "mixed":
        pytest.skip("a sort of a million takes long, and one suffices")
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    if kind != "normal":
        values = values.mul_(3).round_()
    if kind == "mixed":
        values[::7], values[::11] = math.nan, -math.inf
    # Exponents up to 87 are rounded as floats are.
    assert_right(holding(Priorities, values), n, parameters, rtol=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [100, 10_000, 1_000_000])
@pytest.mark.parametrize("uniform_share", [0.0, 0.3])
def test_draws_have_the_right_frequencies(Priorities, mode, n, uniform_share):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).mul_(1.5)
    values[::5] = values[::5].round()
    values[::7] = math.nan
    parameters = Parameters(mode, alpha=0.6, uniform_share=uniform_share)
    priorities = holding(Priorities, values)
    num_draws = 300_000
    entry, _ = priorities.draw(uniforms(num_draws, seed=n), n, parameters, 0.0)
    weights = value_weights(values, **parameters._asdict())
    for bucket in (torch.arange(n) * 50 // n, torch.arange(n) % 16):  # regions, neighbours
        expected = torch.zeros(50, dtype=torch.float64).index_add_(0, bucket, weights)
        counts = bucket[entry].bincount(minlength=50)
        expected *= num_draws / expected.sum()
        used = expected > 0
        assert int(counts[~used].sum()) == 0
        statistic = ((counts - expected)[used] ** 2 / expected[used]).sum().item()
        assert stats.chi2.sf(statistic, int(used.sum()) - 1) > 1e-4


def random_step(priorities, generator, size):
    """Do something at random to the priorities; return the new size."""

    def integers(low, high, shape=()):
        return torch.randint(low, high, shape, generator=generator)

    action, n = int(integers(0, 10)), int(integers(1, 12))
    index = integers(-1, priorities.capacity, (n,))
    values = torch.randn(n, generator=generator) * 10.0 ** float(integers(-1, 3))
    if action == 0:
        priorities.refresh(torch.randn(priorities.capacity // 2, generator=generator))
    elif action == 1 and priorities.capacity < 3000:
        priorities.grow(priorities.capacity + int(integers(0, 300)))
    elif action == 2:
        priorities.erase(index)
    elif action == 3:
        return int(integers(1, priorities.capacity + 20))
    elif action == 4:
        return min(size + n, priorities.capacity)
    elif action == 5:
        priorities.write(index, values.where(values > 0, math.nan))
    elif action == 6:
        priorities.write(index, values.round())
    else:
        priorities.write(index, values)
    return size


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mode", MODES)
def test_any_history_ends_in_the_bits_of_a_rebuild(Priorities, mode, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = (torch.float32, torch.float64)[seed % 2]
    priorities, size = Priorities(700, dtype, None), 600
    priorities.refresh(torch.randn(700, generator=generator))
    parameters = Parameters(mode, top=0.3, min_value=(None, 0.3, 30.0)[seed % 3])
    for step in range(60):
        if step % 7 == 6:
            share = (0.0, 0.4, 1.0)[step % 3]
            temperature = 2.0 ** (step % 5 - 2)
            parameters = parameters._replace(uniform_share=share, temperature=temperature)
        size = random_step(priorities, generator, size)
        if step % 3 == 1:
            continue  # several changes before one draw
        fresh = Priorities(priorities.capacity, dtype, None)
        every = torch.arange(priorities.capacity)
        fresh.write(every, priorities.values)
        fresh.erase(every[priorities.values == -math.inf])
        beta = 0.5 * (step % 2)
        uniform = torch.cat([torch.tensor([0.0, 1 - 2**-53]).double(), uniforms(50, step)])
        for got, expected in zip(
            priorities.draw(uniform, size, parameters, beta),
            fresh.draw(uniform, size, parameters, beta),
            strict=True,
        ):
            assert torch.equal(got, expected)
        assert torch.equal(priorities.weights(size, parameters), fresh.weights(size, parameters))
        assert_right(priorities, size, parameters, rtol=2e-5)


def test_negative_indices_are_skipped_and_duplicates_agree(Priorities):
    priorities = Priorities(20, torch.float32, None)
    index = torch.tensor([-1, 3, 3, -7, 19])
    priorities.write(index, torch.tensor([math.inf, 2.0, 5.0, 1.0, 4.0]))
    values = priorities.values.tolist()
    assert values[3] in (2.0, 5.0)
    assert values[19] == 4.0
    assert values.count(-math.inf) == 18
    assert int(priorities.num_refused) == 0
    assert_right(priorities, 20, Parameters("soft"))
    index.fill_(0)  # ours no more
    assert_right(priorities, 20, Parameters("soft"))


def test_refused_values_are_counted(Priorities):
    priorities = Priorities(20, torch.float32, None)
    priorities.refresh(torch.tensor([1.0, math.nan, math.inf]))
    priorities.write(torch.tensor([4, 5]), torch.tensor([1e300, 3e38], dtype=torch.float64))
    assert int(priorities.num_refused) == 3
    assert priorities.values.isnan().nonzero().squeeze(1).tolist() == [1, 2, 4]


def test_nothing_to_draw(Priorities):
    priorities = holding(Priorities, [math.nan, math.nan])
    with pytest.raises(RuntimeError, match="All 2 stored entries were given non-finite values"):  # noqa: PT012
        for _ in range(2):  # without waiting, the second draw says so
            entry, _ = priorities.draw(uniforms(3), 2, Parameters(), 0.0)
            assert int(entry.max()) < 2
    priorities.write(torch.tensor([1]), torch.tensor([0.0]))
    entry, _ = priorities.draw(uniforms(3), 2, Parameters(), 0.0)
    assert entry.tolist() == [1, 1, 1]


def test_entries_beyond_the_size_are_never_drawn(Priorities):
    priorities = holding(Priorities, list(range(300)))
    for parameters in (Parameters(m, uniform_share=s) for m in MODES for s in (0.0, 0.5)):
        entry, _ = priorities.draw(uniforms(2000), 37, parameters, 0.0)
        assert int(entry.max()) < 37


def test_grown_entries_have_no_value(Priorities):
    priorities = holding(Priorities, [1.0, 2.0])
    priorities.grow(600)
    assert priorities.capacity == 600
    assert priorities.values[:3].tolist() == [1.0, 2.0, -math.inf]
    assert_right(priorities, 600, Parameters("rank"))

"""The threshold of mode "top" as values change: moved, or found anew, it is that of a sort."""

from __future__ import annotations

import math

import pytest
import torch

from torchrl_recall.native import interface
from torchrl_recall.priorities.native import NativePriorities
from torchrl_recall.priorities.weights import Parameters, best_count, value_weights

pytestmark = pytest.mark.skipif(interface.load()[0] is None, reason=str(interface.load()[1]))

KINDS = {
    "continuous": lambda x: x,
    "ties": lambda x: (x * 3).round(),
    "sparse": lambda x: (x > 2).to(x),
    "half tied": lambda x: x.where(x > 0, 0.0),
    "huge": lambda x: x * 1e30,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top", [0.001, 0.1, 0.9999])
def test_small_changes_end_in_the_bits_of_a_rebuild(kind, dtype, top):
    generator = torch.Generator().manual_seed(7)

    def values(n):
        return KINDS[kind](torch.randn(n, generator=generator, dtype=dtype))

    capacity, size = 9_000, 5_000  # enough for a sample, and a band of values, to be taken
    priorities = NativePriorities(capacity, dtype)
    priorities.refresh(values(capacity))
    parameters = Parameters("top", top=top)
    moved = 0
    for step in range(90):
        index = torch.randint(
            0, capacity, (int(torch.randint(1, 40, (), generator=generator)),), generator=generator
        )
        new = values(len(index))
        if step % 5 == 1:
            new[0] = math.nan
        if step % 5 == 2:
            priorities.erase(index)
        else:
            priorities.write(index, new)
        if step % 3 == 0:
            size += 11
        if step == 60:  # far away from where the threshold was
            priorities.refresh(values(capacity) + 50)
        band = priorities._state.band_is_valid and priorities._state.threshold
        got = priorities.weights(size, parameters)
        moved += bool(band) and priorities._state.threshold != band
        expected = value_weights(priorities.values[:size], **parameters._asdict())
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0.0)
        fresh = NativePriorities(capacity, dtype)
        fresh.values.copy_(priorities.values)
        assert torch.equal(got, fresh.weights(size, parameters))
        uniform = torch.rand(40, dtype=torch.float64, generator=generator)
        for one, other in zip(
            priorities.draw(uniform, size, parameters, 0.5),
            fresh.draw(uniform, size, parameters, 0.5),
            strict=True,
        ):
            assert torch.equal(one, other)
    if kind == "continuous" and top == 0.1:
        assert moved > 20


@pytest.mark.parametrize("n", [1, 2, 2047, 2048, 2049, 30_000])
@pytest.mark.parametrize("kind", KINDS)
def test_found_among_all(n, kind):
    values = KINDS[kind](torch.randn(n, generator=torch.Generator().manual_seed(n)))
    for top in (1e-9, 0.01, 0.5, 1.0):
        priorities = NativePriorities(n, torch.float32)
        priorities.refresh(values)
        priorities.weights(n, Parameters("top", top=top))
        k = best_count(top, n)
        assert priorities._state.threshold == values.sort(descending=True).values[k - 1].item()


@pytest.mark.parametrize("period", [2, 16, 64, 1024])
def test_periodic_values_do_not_mislead_the_sample(period):
    n = 65_536
    values = (torch.arange(n) % period).float() + torch.arange(n) * 1e-6
    priorities = NativePriorities(n, torch.float32)
    priorities.refresh(values)
    got = priorities.weights(n, Parameters("top", top=0.03))
    torch.testing.assert_close(got, value_weights(values, "top", top=0.03))


def test_unlucky_samples():
    # Three standard deviations are left about once in four hundred times.
    n, generator = 5_000, torch.Generator().manual_seed(0)
    priorities, parameters = NativePriorities(n, torch.float32), Parameters("top", top=0.3)
    for _ in range(3_000):
        values = torch.rand(n, generator=generator)
        priorities.refresh(values)
        priorities.draw(torch.zeros(1, dtype=torch.float64), n, parameters, 0.0)
        kth = values.kthvalue(n - best_count(0.3, n) + 1).values.item()
        assert priorities._state.threshold == kth


def test_a_sample_that_says_nothing_of_the_best():
    # One value is wanted, far above what any sample holds.
    values = torch.zeros(100_000)
    values[::3] = -1.0
    values[17] = 5.0
    for k in (1, 2, 40_000):
        priorities = NativePriorities(100_000, torch.float32)
        priorities.refresh(values)
        got = priorities.weights(100_000, Parameters("top", top=k / 100_000))
        torch.testing.assert_close(got, value_weights(values, "top", top=k / 100_000))

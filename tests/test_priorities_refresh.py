"""A refresh works out on its way what a draw needs: to the bit what is built from its values."""

from __future__ import annotations

import math

import pytest
import torch
from test_priorities_native import sets_here

from torchrl_recall.native import interface
from torchrl_recall.priorities.native import NativePriorities
from torchrl_recall.priorities.weights import Parameters, value_weights

pytestmark = pytest.mark.skipif(interface.load()[0] is None, reason=str(interface.load()[1]))

NONE = -7.5  # stands for no value yet
MODES = {
    "top": Parameters("top", top=0.1),
    "top, one": Parameters("top", top=1e-9),
    "top, nearly all": Parameters("top", top=0.9999),
    "top, all": Parameters("top", top=1.0),
    "top, from a value on": Parameters("top", top=0.1, min_value=0.0),
    "top, uniform share": Parameters("top", top=0.3, uniform_share=0.2),
    "per": Parameters("per"),
    "per, power": Parameters("per", alpha=0.6, eps=0.1),
    "soft": Parameters("soft"),
    "rank": Parameters("rank"),
}
KINDS = {
    "continuous": lambda x: x,
    "ties": lambda x: (x * 3).round(),
    "half tied": lambda x: x.where(x > 0, 0.0),
    "equal": lambda x: torch.full_like(x, 0.25),
    "rising": lambda x: x.sort().values,
    "first half above": lambda x: torch.cat([x[: x.numel() // 2] + 50, x[x.numel() // 2 :]]),
    "some without a value": lambda x: x.where(x < 1, NONE),
    "most without a value": lambda x: x.where(x > 2, NONE),
    "some not finite": lambda x: x.where(x < 2, math.inf),
}


def values_of(kind, n, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return KINDS[kind](torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype)


def made(capacity, dtype, kind):
    priorities = NativePriorities(capacity, dtype)
    priorities._state.instruction_set = kind
    return priorities


def nodes(priorities):
    """All nodes that are in use: levels lie behind one another, sixteen children a node."""
    memory, state = priorities._memory["nodes"].view(torch.int64), priorities._state
    room, count, start, parts = priorities.capacity, state.num_ranks or state.size, 0, []
    while not parts or count > 1:
        room, count = -(-room // 16), -(-count // 16)
        parts.append(memory[start : start + count])
        start += -(-room // 16) * 16
    return torch.cat(parts)


def assert_as_built(priorities, size, parameters):
    """Compare sums, weights and draws with those of the same values that came at once."""
    built = made(priorities.capacity, priorities.values.dtype, priorities._state.instruction_set)
    built.values.copy_(priorities.values)
    uniform = torch.linspace(0, 1, 302, dtype=torch.float64)[:-1]
    drawn = priorities.draw(uniform, size, parameters, 0.5)
    assert all(map(torch.equal, drawn, built.draw(uniform, size, parameters, 0.5)))
    assert torch.equal(nodes(priorities), nodes(built))
    for name in ("num_drawable", "num_valued", "largest", "num_above", "num_tied", "threshold"):
        assert getattr(priorities._state, name) == getattr(built._state, name), name
    if size > 1_000_000:
        return
    got = priorities.weights(size, parameters)
    expected = value_weights(priorities.values[:size], **parameters._asdict())
    torch.testing.assert_close(
        got / got.sum(), expected / expected.sum(), rtol=2e-5, atol=1e-37, check_dtype=False
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "capacity"), [(16_384, 16_384), (20_001, 40_000)])
def test_refreshed_is_as_built(mode, kind, size, capacity):
    parameters = MODES[mode]
    for instruction_set in sets_here():
        priorities = made(capacity, torch.float32, instruction_set)
        priorities.refresh(values_of("continuous", capacity, 1))
        priorities.draw(torch.rand(1, dtype=torch.float64), size, parameters, 0.0)
        for seed, count in enumerate((capacity, size, size // 2, capacity), start=2):
            values = values_of(kind, count, seed)
            priorities.refresh(values, NONE)
            stored = values.where(values.isfinite(), math.nan)
            stored = stored.where(values != NONE, -math.inf)
            assert torch.equal(priorities.values[:count].isnan(), stored.isnan())
            assert torch.equal(priorities.values[:count].nan_to_num(0), stored.nan_to_num(0))
            assert_as_built(priorities, size, parameters)


@pytest.mark.parametrize("mode", ["top", "per", "soft"])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_every_type(dtype, given, mode):
    size = 9_999
    for instruction_set in sets_here():
        priorities = made(size, dtype, instruction_set)
        for seed in range(3):
            values = values_of("some not finite", size, seed, given)
            priorities.refresh(values)
            expected = values.to(dtype).nan_to_num(posinf=math.nan)
            torch.testing.assert_close(priorities.values, expected, rtol=0, atol=0, equal_nan=True)
            assert_as_built(priorities, size, MODES[mode])


@pytest.mark.parametrize("mode", ["top", "per"])
def test_written_past_the_caches(mode):
    size = 4_300_007  # as floats beyond 16 MB
    for instruction_set in sets_here():
        priorities = made(size, torch.float32, instruction_set)
        for seed in range(2):
            values = torch.rand(size, generator=torch.Generator().manual_seed(seed))
            priorities.refresh(values)
            assert torch.equal(priorities.values, values)
            assert_as_built(priorities, size, MODES[mode])


@pytest.mark.parametrize("kind", ["continuous", "rising", "first half above"])
@pytest.mark.parametrize("mode", ["top", "per"])
def test_nothing_is_left_to_do(mode, kind):
    """Else a refresh would look at all values again, only slower."""
    size = 100_000
    priorities = NativePriorities(size, torch.float32)
    priorities.refresh(values_of(kind, size, 1))
    priorities.draw(torch.rand(1, dtype=torch.float64), size, MODES[mode], 0.0)
    done = []
    for seed in range(2, 12):
        values = values_of(kind, size, seed)
        priorities._library.recall_refresh(
            priorities._address, values.data_ptr(), False, size, math.nan
        )
        state = priorities._state
        done.append(state.nodes_are_valid and (mode == "per" or state.threshold_is_valid))
        assert_as_built(priorities, size, MODES[mode])
    # A sample misleads once in hundreds of times.
    assert sum(done) >= 9

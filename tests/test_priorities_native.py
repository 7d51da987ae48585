"""What holds of the C library alone: every instruction set draws the same, and memory is small."""

from __future__ import annotations

import pytest
import torch
from test_priorities_levels import uniforms

from torchrl_recall.native import interface
from torchrl_recall.priorities.native import NativePriorities
from torchrl_recall.priorities.weights import Parameters

# No exponentials and logarithms, so that all is the same to the bit.
EXACT = [
    Parameters("top", top=0.3),
    Parameters("top", top=0.01, uniform_share=0.3),
    Parameters("per", eps=0.5),
    Parameters("per", min_value=0.0, uniform_share=0.3),
    Parameters("rank"),
    Parameters("rank", alpha=0.0, uniform_share=0.3),
]
ROUNDED = [
    Parameters("soft"),
    Parameters("soft", temperature=0.2, min_value=0.0),
    Parameters("rank", alpha=0.7),
    Parameters("rank", alpha=2.0, uniform_share=0.3),
    Parameters("per", alpha=0.6),
    Parameters("per", alpha=3.0, min_value=0.0),
]
SIZES = [1, 7, 16, 17, 255, 257, 4097, 70_000]


def sets_here():
    library, _ = interface.load()
    return [kind for kind in (0, 256, 512) if kind <= library.recall_instruction_set()]


def holding(values, instruction_set):
    priorities = NativePriorities(values.numel(), values.dtype)
    priorities._state.instruction_set = instruction_set
    priorities.refresh(values)
    return priorities


def values_of(size, dtype):
    values = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    values[3::5] = values[3::5].round()
    values[5::9] = torch.nan
    return values


def on_each_set(size, dtype, parameters):
    """Draws, importance and weights of each instruction set, after some writes."""
    if len(sets_here()) < 2:
        pytest.skip("this processor has one instruction set")
    results = {}
    for kind in sets_here():
        priorities = holding(values_of(size, dtype), kind)
        priorities.draw(uniforms(3), size, parameters, 0.0)
        index = torch.arange(0, size, 11)
        priorities.write(index, index.to(dtype).sin())
        drawn = priorities.draw(uniforms(5000, size), size, parameters, 0.5)
        results[kind] = (*drawn, priorities.weights(size, parameters))
    return results


@pytest.mark.parametrize("parameters", EXACT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_instruction_sets_draw_the_same(size, dtype, parameters):
    first, *others = on_each_set(size, dtype, parameters).values()
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("parameters", ROUNDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_instruction_sets_round_alike(size, dtype, parameters):
    results = on_each_set(size, dtype, parameters)
    for entry, importance, weights in results.values():
        # A weight exp(-x) inherits the rounding of x, to 2^-23 of it.
        exponent = (weights / weights.max()).log().abs()
        error = (weights - results[0][2]).abs()
        assert bool((error <= (1e-6 + 1.2e-7 * exponent.nan_to_num(posinf=0)) * weights).all())
        same = entry == results[0][0]  # else the number lay at an edge
        assert same.double().mean() > 0.995
        torch.testing.assert_close(importance[same], results[0][1][same], rtol=5e-6, atol=0.0)
    if 512 in results:
        assert all(map(torch.equal, results[256], results[512]))


@pytest.mark.parametrize("parameters", EXACT[:1] + EXACT[4:5], ids=str)
def test_no_memory_is_an_error_and_then_all_goes_on(parameters, monkeypatch):
    values = values_of(50_000, torch.float32)
    priorities = holding(values, sets_here()[-1])
    library = priorities._library

    class NoMemory:
        """The library, with what it answers where an allocation fails."""

        def __getattr__(self, name):
            return getattr(library, name)

        def recall_draw(self, *_):
            return 1  # NO_MEMORY of recall.h; allocations that really fail: tests/sanitize

    monkeypatch.setattr(priorities, "_library", NoMemory())
    with pytest.raises(MemoryError, match="no memory to draw by value"):
        priorities.draw(uniforms(9), 50_000, parameters, 0.0)
    monkeypatch.undo()
    got = priorities.draw(uniforms(9), 50_000, parameters, 0.5)
    expected = holding(values, sets_here()[-1]).draw(uniforms(9), 50_000, parameters, 0.5)
    assert all(map(torch.equal, got, expected))

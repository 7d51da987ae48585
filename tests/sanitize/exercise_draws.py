"""Draws by value in every way that `NativePriorities` can, and some that it should not.

Run by ``run`` against a library built with sanitizers, as `exercise.py`. What torch allocates has
red zones too, so that the library may read and write just what `NativePriorities` gives it.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import sys

import torch

from torchrl_recall.native import interface
from torchrl_recall.priorities.native import NativePriorities
from torchrl_recall.priorities.weights import Parameters, value_weights

SETS = (0, 256, 512)
SIZES = (*range(1, 41), 255, 256, 257, 4096, 4097, 65537)
DRAWS = (0, 1, 31, 32, 33, 5000)
PARAMETERS = (
    Parameters("top", top=0.3),
    Parameters("soft", min_value=0.0),
    Parameters("rank"),
    Parameters("rank", alpha=0.7, min_value=0.0),
    Parameters("per", alpha=0.6),
    Parameters("per"),
)
calls = 0


def sets_here():
    best = int(interface.load()[0].recall_instruction_set())
    return [kind for kind in SETS if kind <= best]


def made(capacity, dtype, instruction_set):
    priorities = NativePriorities(capacity, dtype)
    priorities._state.instruction_set = instruction_set
    return priorities


def draw(priorities, size, parameters, counts=(33,), beta=0.5):
    """Draw, and see that what is drawn is there and has a weight."""
    global calls
    parameters = parameters._replace(uniform_share=0.2 * (calls % 3))
    for count in counts:
        calls += 1
        uniform = torch.rand(count, dtype=torch.float64)
        entry, importance = priorities.draw(uniform, size, parameters, beta)
        assert bool(((entry >= 0) & (entry < size)).all())
        assert bool(importance.isfinite().all())
    if size < 5000:
        weights = priorities.weights(size, parameters)
        assert bool((weights[entry] > 0).all())
        expected = value_weights(priorities.values[:size], **parameters._asdict())
        got = weights / weights.sum()
        torch.testing.assert_close(got, expected / expected.sum(), rtol=2e-5, atol=1e-37)


def live(size, dtype, instruction_set, parameters):
    """What a buffer goes through, from the first row to more than fit."""
    priorities = made(size, dtype, instruction_set)
    draw(priorities, size, parameters)  # no values yet
    values = torch.randn(size, dtype=dtype)
    values[::3] = values[::3].round()
    values[1::7] = math.nan
    priorities.refresh(values)
    draw(priorities, size, parameters, DRAWS if size in (40, 257, 4097, 65537) else (0, 1, 33))
    priorities.refresh(torch.randn(size, dtype=dtype))  # which now works out what draws need
    draw(priorities, size, parameters)
    priorities.refresh(values)
    stored = (size + 1) // 2
    draw(priorities, stored, parameters, beta=0.0)
    index = torch.randint(-2, size, (9,))
    priorities.write(index, torch.randn(9, dtype=torch.float64))
    draw(priorities, stored, parameters)
    priorities.write(index[:1], torch.tensor([1e9]))
    priorities.erase(index)
    for wrong in (size, 2**40):
        for refused in (
            lambda at: priorities.write(at, torch.ones(2)),
            lambda at: priorities.erase(at),
        ):
            try:
                refused(torch.tensor([0, wrong]))
            except IndexError:
                continue
            raise AssertionError("an index out of range was taken")
    priorities.refresh(torch.randn(stored, dtype=(torch.float32, torch.float64)[size % 2]))
    draw(priorities, size, parameters)
    priorities.grow(size + 17)
    # A grown one starts from the values, on the widest instruction set again: not on this one.
    priorities._state.instruction_set = instruction_set
    draw(priorities, size + 17, parameters)
    draw(priorities, max(1, size - 3), parameters)
    priorities.refresh(torch.full((size + 17,), math.nan))
    try:
        draw(priorities, size, parameters)
    except RuntimeError:
        return
    raise AssertionError("drawn from nothing")


def every_size():
    kinds = itertools.product(SIZES, (torch.float32, torch.float64), sets_here(), PARAMETERS)
    for size, dtype, instruction_set, parameters in kinds:
        live(size, dtype, instruction_set, parameters)


def many_values():
    """More than 16 MB, which are written past the caches."""
    size = 4_200_003
    for dtype, instruction_set in itertools.product((torch.float32, torch.float64), sets_here()):
        for parameters in (Parameters("top"), Parameters("per")):
            priorities = made(size, dtype, instruction_set)
            for _ in range(2):
                values = torch.randn(size)
                priorities.refresh(values)
                draw(priorities, size, parameters)
                assert torch.equal(priorities.values, values.to(dtype))


def failing_allocations():
    """MemoryError, and then the same draws as without."""
    global calls
    left = ctypes.c_longlong.in_dll(interface.load()[0], "allocations_left")
    failed = 0
    for dtype, instruction_set, mode in itertools.product(
        (torch.float32, torch.float64), sets_here(), ("top", "rank")
    ):
        parameters = Parameters(mode, uniform_share=0.1)
        one, other = (made(50_000, dtype, instruction_set) for _ in range(2))
        values = torch.randn(50_000, dtype=dtype)
        uniform = torch.rand(40, dtype=torch.float64)
        for step in range(4):
            afresh = step in (0, 3)
            one.refresh(values + step) if afresh else one.write(torch.arange(50), values[step] + 1)
            for after in range(3):
                left.value = after
                calls += 1
                try:
                    if afresh:
                        other.refresh(values + step)
                    else:
                        other.write(torch.arange(50), values[step] + 1)
                    other.draw(uniform, 50_000, parameters, 0.5)
                except MemoryError:
                    failed += 1
                left.value = -1
            got = other.draw(uniform, 50_000, parameters, 0.5)
            expected = one.draw(uniform, 50_000, parameters, 0.5)
            assert all(map(torch.equal, got, expected))
    assert failed >= 12, failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{interface.LIBRARY}, instruction sets {sets_here()}", flush=True)
    for part in (failing_allocations, many_values, every_size):
        if not sys.argv[1:] or part.__name__ in sys.argv:
            part()
            print(f"{part.__name__}: {calls} calls so far", flush=True)

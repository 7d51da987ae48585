"""What only `TorchPriorities` has: its path without host synchronisation, cheap updates, sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchrl_recall.priorities import ranks
from torchrl_recall.priorities.levels import TorchPriorities
from torchrl_recall.priorities.sums import SumLevels, running_sums
from torchrl_recall.priorities.table import WeightTable
from torchrl_recall.priorities.weights import MODES, Parameters, best_count

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "is_nonzero",
    "equal",
)


class NoWaiting(TorchDispatchMode):
    """Fail on operations for which the host would have to wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for arg in args[1:]
            for x in (arg if isinstance(arg, (list, tuple)) else [arg])
        )
        if by_mask or name.split(".")[0].lstrip("_").startswith(
            tuple(w.lstrip("_") for w in WAITING)
        ):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["item", "bool", "mask", "nonzero", "unique"])
def test_the_guard_notices(name):
    x = torch.arange(3.0)
    waits = {
        "item": lambda: x[0].item(),
        "bool": lambda: bool(x[0] > 0),
        "mask": lambda: x[x > 0],
        "nonzero": lambda: x.nonzero(),
        "unique": lambda: x.unique(),
    }
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        waits[name]()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("min_value", [None, 0.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nothing_waits_for_the_device(mode, min_value, share):
    priorities = TorchPriorities(1000, torch.float32, None, _waits=False)
    parameters = Parameters(mode, min_value=min_value, uniform_share=share)
    index, values = torch.arange(-3, 50), torch.randn(53)
    values[7] = math.nan
    uniform = torch.rand(30, dtype=torch.float64)
    with NoWaiting():
        priorities.refresh(torch.randn(900))
        priorities.draw(uniform, 950, parameters, 0.5)
        priorities.write(index, values)
        priorities.erase(index[:10])
        priorities.draw(uniform, 960, parameters, 0.0)
        priorities.draw(uniform, 960, parameters._replace(top=0.2, temperature=2.0), 0.5)
    assert priorities.num_refused == 1


@pytest.mark.parametrize("mode", ["soft", "per"])
def test_small_writes_rebuild_nothing(monkeypatch, mode):
    priorities = TorchPriorities(5000, torch.float32, None)
    priorities.refresh(torch.randn(5000))
    parameters, uniform = Parameters(mode), torch.rand(8, dtype=torch.float64)
    priorities.draw(uniform, 4000, parameters, 0.5)
    monkeypatch.delattr(WeightTable, "rebuild")
    for start in range(0, 1000, 100):
        priorities.write(torch.arange(start, start + 100), torch.rand(100) - 0.5)
        priorities.draw(uniform, 4000 + start, parameters, 0.5)


@pytest.mark.parametrize("top", [0.1, 0.29, 1e-9, 1.0, 1 / 3, 0.12345678901234568, 1e-18])
def test_device_counts_the_best_exactly(top):
    for n in (1, 30, 100, 699, 10**8 + 1):
        assert int(ranks._device_best_count(top, torch.tensor(n))) == best_count(top, n)


@pytest.mark.parametrize("kind", ["normal", "ties", "periodic", "no value", "two values", "nan"])
@pytest.mark.parametrize("top", [1e-6, 0.1, 0.5, 0.9, 1.0])
def test_threshold_is_that_of_a_sort(kind, top):
    n = 200_001
    values = torch.randn(n, generator=torch.Generator().manual_seed(1))
    if kind == "ties":
        values = values.mul(20).round()
    elif kind == "periodic":  # the strided sample sees nothing but zeros
        values[:: n // ranks._SAMPLE] = 0.0
    elif kind == "no value":
        values[values < 0.2] = -math.inf
    elif kind == "two values":
        values = (values > 1).float()
    elif kind == "nan":
        values[::3] = math.nan
    got = ranks.top_threshold(values, top)
    expected = ranks.device_top_threshold(values, top)
    assert got == tuple(x.item() for x in expected)


@pytest.mark.parametrize("parallel", [False, True])
def test_running_sums_are_flat_where_nothing_is_added(parallel):
    x = torch.rand(200, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 20
    x[x < 1e-3] = 0.0
    steps = running_sums(x, parallel).diff(dim=1)
    assert bool((steps >= 0).all())
    assert bool((steps[x[:, 1:] == 0] == 0).all())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64])
def test_sums_of_few_rows_have_the_bits_of_all(n):
    generator = torch.Generator().manual_seed(n)
    weights = torch.rand(4096, generator=generator).log_().mul_(9).exp_()
    whole, by_path = SumLevels(4096, None), SumLevels(4096, None)
    whole.set_slice(0, weights)
    whole.finish()
    by_path.set_slice(0, weights.flip(0))
    by_path.finish()
    for row in torch.arange(256).split(n):
        by_path.set_rows(row, weights.view(-1, 16)[row])
    assert torch.equal(whole.by_16, by_path.by_16)
    assert torch.equal(whole.by_256, by_path.by_256)
    assert torch.equal(whole.running, by_path.running)

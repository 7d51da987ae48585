"""Fixtures of the benchmark: one thread, contenders side by side, results saved as JSON.

`pytest bench/` runs everything and, when all has passed, overwrites this machine's file in
``bench/results/``; a part of it (a file, ``-k``) saves nothing. `python -m bench.report` prints the
table. Times differ between machines and moments, so ratios are what counts: the contenders of a
case take turns in one process, and a ratio is that of their medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.machine import describe, result_file

# Seconds that a turn lasts, about: quick contenders are called several times in a row.
TURN = 0.02
Contenders = dict[str, Callable[[], Any]]
_RECORDS = pytest.StashKey[list[dict[str, Any]]]()
_DESELECTED = pytest.StashKey[bool]()


def seconds(function: Callable[[], Any], calls: int) -> float:
    """Return the mean time of some calls in a row."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def take_turns(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., dict[str, float]]:
    """Time contenders in turns; the first is ours, the ratios are times relative to it."""

    def run(case: str, contenders: Contenders, *, rounds: int, warmup: int = 3) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        calls = dict.fromkeys(contenders, 1)
        for _ in range(warmup):
            for name, function in contenders.items():
                calls[name] = max(1, round(TURN / seconds(function, 1)))

        def one_round() -> None:
            for name, function in contenders.items():
                times[name].append(seconds(function, calls[name]))

        benchmark.pedantic(one_round, rounds=rounds, iterations=1)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ours = next(iter(medians.values()))
        ratios = {name: median / ours for name, median in medians.items()}
        record = {
            "case": case,
            "rounds": rounds,
            "milliseconds": {name: 1e3 * median for name, median in medians.items()},
            "ratios": ratios,
        }
        benchmark.extra_info.update(record)
        request.config.stash.setdefault(_RECORDS, []).append(record)
        return ratios

    return run


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_DESELECTED] = False


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[_DESELECTED] = True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Save the ratios of a full run."""
    config = session.config
    records = config.stash.get(_RECORDS, [])
    here = Path(__file__).parent
    named = [Path(config.invocation_params.dir, argument).resolve() for argument in config.args]
    if exitstatus != 0 or not records or config.stash[_DESELECTED] or here not in named:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    machine = describe()
    torch.set_num_threads(threads)
    path = result_file(machine)
    path.parent.mkdir(exist_ok=True)
    content = json.dumps({"machine": machine, "records": records}, indent=2)
    path.write_text(content + "\n", encoding="utf-8")

"""Fixtures of the benchmark: one core, contenders side by side, results saved as JSON.

`pytest bench/` runs everything and, when all has passed, overwrites this machine's file in
``bench/results/``; a part of it (a file, ``-k``, ``--benchmark-disable``) saves nothing. `python -m
bench.report` prints the tables. Times differ between machines and moments, so ratios are what
counts: the contenders of a case take turns in one process, and a ratio is the median of those of
all rounds. ``--device cuda`` runs what there is for a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import floor
from bench.machine import describe, result_file
from bench.turns import Contenders, Turns

_RECORDS = pytest.StashKey[list[dict[str, Any]]]()
_DESELECTED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the traces are walked: cpu or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device of the traces."""
    return torch.device(str(request.config.getoption("--device")))


@pytest.fixture
def cpu_only(device: torch.device) -> None:
    """Leave a test out that has nothing to do with a GPU."""
    if device.type != "cpu":
        pytest.skip("timed on the CPU only")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def cores(device: torch.device) -> Iterator[set[int]]:
    """Keep to one core, also those peers that do not ask torch; return all that are allowed."""
    if device.type != "cpu" or not hasattr(os, "sched_setaffinity"):
        yield set(range(os.cpu_count() or 1))
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    yield allowed
    os.sched_setaffinity(0, allowed)


@pytest.fixture(scope="session")
def core(cores: set[int]) -> floor.Core:
    """Return what the one core can do at best."""
    return floor.measure()


@pytest.fixture
def take_turns(
    benchmark: Any, device: torch.device, request: pytest.FixtureRequest
) -> Callable[..., dict[str, Any]]:
    """Time contenders in turns; the first is ours, the ratios are times relative to it."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def run(
        case: str, contenders: Contenders, *, rounds: int, warmup: int = 3, **more: Any
    ) -> dict[str, Any]:
        turns = Turns(contenders, synchronize, warmup)
        benchmark.pedantic(turns.round, rounds=rounds, iterations=1)
        record = {"case": case, **turns.record(), **more}
        benchmark.extra_info.update(record)
        request.config.stash.setdefault(_RECORDS, []).append(record)
        return record

    return run


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_DESELECTED] = False


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[_DESELECTED] = True


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the ratios, and what was left out and why."""
    for record in config.stash.get(_RECORDS, []):
        ratios = ", ".join(f"{name} {ratio:.3g}" for name, ratio in record["ratios"].items())
        terminalreporter.write_line(f"{record['case']}: {ratios}")
        for name, reason in record.get("skipped", {}).items():
            terminalreporter.write_line(f"    without {name}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Save the ratios of a full run."""
    config = session.config
    records = config.stash.get(_RECORDS, [])
    here = Path(__file__).parent
    named = [Path(config.invocation_params.dir, argument).resolve() for argument in config.args]
    is_part = config.stash[_DESELECTED] or config.getoption("benchmark_disable", False)
    if exitstatus != 0 or not records or is_part or here not in named:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    machine = describe(str(config.getoption("--device")))
    torch.set_num_threads(threads)
    path = result_file(machine)
    path.parent.mkdir(exist_ok=True)
    content = json.dumps({"machine": machine, "records": records}, indent=2)
    path.write_text(content + "\n", encoding="utf-8")

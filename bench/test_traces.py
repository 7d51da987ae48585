"""Trace sampling: `sample_traces` against its peers, walking with the same networks.

The sizes are in `bench.cases`. On a GPU M and L alone, in all precisions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import floor
from bench.cases import SIZES, build
from bench.ours import ours, variants
from bench.peers import PEERS, walker, walks

# The first is ours as it comes; all others are timed relative to it.
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"sample_traces": {}, "sample_traces, eager": {"backend": "eager"}},
    "cuda": {
        "sample_traces": {},
        "sample_traces, tf32": {"backend": "triton", "precision": "tf32"},
        "sample_traces, float16": {"backend": "triton", "precision": "float16"},
    },
}


@pytest.mark.parametrize("name", SIZES)
def test_ratio(
    name: str, device: torch.device, take_turns: Callable, request: pytest.FixtureRequest
) -> None:
    if device.type != "cpu" and name not in ("M", "L"):
        pytest.skip("timed on the CPU only")
    size = SIZES[name]
    model, start = build(name, device)
    own, refused = variants(OURS[device.type], model, start, size.num_steps)
    others, absent = walks(list(PEERS), model, start, size.num_steps)
    rounds, warmup = (size.rounds, size.warmup) if device.type == "cpu" else (30, 3)
    record = take_turns(
        f"traces, {name}", own | others, rounds=rounds, warmup=warmup, skipped=refused | absent
    )
    # Discrete states are looked up, so that no product is needed at every step.
    if device.type == "cpu" and name != "four rooms":
        core = request.getfixturevalue("core")
        milliseconds = 1e3 * floor.seconds(size, core)
        # The floor is the machine at its best, so our best round is set beside it.
        of_ours = record["fastest"]["sample_traces"] / milliseconds
        record["floor"] = {"milliseconds": milliseconds, "ours": of_ours, **core._asdict()}


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("contender", ["sample_traces", "TorchRL rollout"])
@pytest.mark.parametrize("name", ["S", "M", "four rooms"])
def test_alone(name: str, contender: str, benchmark: Any) -> None:
    benchmark.group = f"traces, {name}"
    rounds = max(SIZES[name].rounds // 5, 3)
    build_walk = ours if contender == "sample_traces" else walker
    walk = build_walk(*build(name), SIZES[name].num_steps)
    out = benchmark.pedantic(walk, rounds=rounds, warmup_rounds=1)
    assert out.shape == (SIZES[name].rows, SIZES[name].num_steps)
    assert all(bool(torch.isfinite(out[key]).all()) for key in ("observation", "action_log_prob"))

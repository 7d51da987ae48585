"""What our own options cost: the stop head, the last-visit mask, and a lower precision.

Times are relative to `sample_traces` without them on the same starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.cases import SIZES, build
from bench.ours import ours, variants

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "S": {"bfloat16": {"precision": "bfloat16"}},
    "M": {"bfloat16": {"precision": "bfloat16"}},
    "L": {"bfloat16": {"precision": "bfloat16"}},
    "four rooms": {"last visit": {"last_visit": True}},
}


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("name", OPTIONS)
def test_variant(name: str, take_turns: Callable) -> None:
    size = SIZES[name]
    model, start = build(name)
    contenders, skipped = variants({"plain": {}, **OPTIONS[name]}, model, start, size.num_steps)
    if name != "L":
        with_stop, _ = build(name, stop=True)
        contenders["stop head"] = ours(with_stop, start, size.num_steps)
    take_turns(
        f"variants, {name}", contenders, rounds=size.rounds, warmup=size.warmup, skipped=skipped
    )

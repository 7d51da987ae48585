"""What our own options cost: the stop head, the last-visit mask, a lower precision, and parameters
that have changed since the walk before, so that they are packed (and tables made) anew.

Times are relative to `sample_traces` without them on the same starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from bench.cases import SIZES, build
from bench.ours import ours, variants
from torchrl_recall import BacktrackModel

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "S": {"bfloat16": {"precision": "bfloat16"}},
    "M": {"bfloat16": {"precision": "bfloat16"}},
    "L": {"bfloat16": {"precision": "bfloat16"}},
    "four rooms": {"last visit": {"last_visit": True}},
}


def updated(model: BacktrackModel, start: Tensor, num_steps: int) -> Callable[[], Any]:
    """Return a walk whose parameters differ from those of the walk before, as in training."""
    walk = ours(model, start, num_steps)
    weights = [parameter.data for parameter in model.parameters()]

    def update_and_walk() -> Any:
        for weight in weights:
            weight.neg_()
        return walk()

    return update_and_walk


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("name", OPTIONS)
def test_variant(name: str, take_turns: Callable) -> None:
    size = SIZES[name]
    model, start = build(name)
    contenders, skipped = variants({"plain": {}, **OPTIONS[name]}, model, start, size.num_steps)
    if name != "L":
        # Another model: `model` itself keeps its packed parameters.
        trained, _ = build(name)
        contenders["after an update"] = updated(trained, start, size.num_steps)
        with_stop, _ = build(name, stop=True)
        contenders["stop head"] = ours(with_stop, start, size.num_steps)
    take_turns(
        f"variants, {name}", contenders, rounds=size.rounds, warmup=size.warmup, skipped=skipped
    )

"""The JAX peer walks the same model. Here and not in ``tests/``: after JAX no process may fork."""

from __future__ import annotations

import pytest
import torch

from bench.agreement import assert_standard_normal, reference
from bench.cases import SIZES, build
from bench.peers import jax_scan

pytest.importorskip("jax")
pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.mark.parametrize("name", ["S", "four rooms"])
def test_jax_gives_the_references_numbers(name: str) -> None:
    model, start = build(name)
    num_steps = SIZES[name].num_steps
    noise, expected = reference(model, start, num_steps)
    found = jax_scan.jax_walk(model, start, num_steps).on_noise(noise)
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(
            torch.tensor(theirs.tolist()), ours, rtol=1e-4, atol=1e-4, check_dtype=False
        )


@pytest.mark.parametrize("limit", [0, 2**22])
def test_jax_draws_new_normal_noise_each_call(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_scan, "DRAWN_BEFORE", limit)
    model, start = build("S")
    run = jax_scan.walker(model, start, SIZES["S"].num_steps)
    out, again = ([torch.tensor(x.tolist()) for x in run()] for _ in range(2))
    assert not torch.equal(out[0], again[0])
    assert_standard_normal(model, start, out[0].transpose(0, 1), out[1].transpose(0, 1))

"""The sampler's memory, by the program that measures it at a hundred million entries."""

from __future__ import annotations

import sys

import pytest

from bench.hundred_million import LIMITS, measure_apart


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.parametrize("mode", LIMITS)
def test_bytes_of_an_entry(mode):
    run = measure_apart(4_000_000, mode)
    values_alone = 4.0
    assert values_alone <= run["peak_bytes"] <= LIMITS[mode]

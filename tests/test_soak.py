"""The soak program: twenty seconds of it, and that it notices what it is there for."""

from __future__ import annotations

import gc
import itertools
import threading
from pathlib import Path

import pytest

from bench import soak

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads memory from /proc"
)


def test_twenty_seconds():
    gc.collect()
    result = soak.soak(20.0, 5000)
    assert result["spread"] <= soak.LIMIT
    assert all(count > 20 for count in result["steps"].values())
    assert result["rows_written"] > 5000  # the ring went round


def test_one_worker_is_deterministic():
    assert soak.is_deterministic(steps=60, capacity=1000)


def test_sees_a_leak(monkeypatch):
    kept, extend = [], soak.Learner.extend

    def leak(self):
        extend(self)
        kept.append(bytearray(b"x" * 2**20))

    monkeypatch.setattr(soak.Learner, "extend", leak)
    result = soak.soak(4.0, 1000)
    assert result["spread"] > 0.02
    assert result["drift"] > 0.02


def test_sees_a_thread_that_is_stuck(monkeypatch, capfd):
    held = threading.Event()
    monkeypatch.setattr(soak.Learner, "step", lambda self: held.wait(20) and 0.0)
    monkeypatch.setattr(soak, "STUCK", 1.0)
    with pytest.raises(RuntimeError, match="learner is stuck at step 0"):
        soak.soak(10.0, 1000)
    held.set()
    assert "test_soak" in capfd.readouterr().err  # the stack says where


def test_sees_an_error(monkeypatch):
    monkeypatch.setattr(soak.Learner, "step", lambda self: float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan"):
        soak.soak(5.0, 1000)


def test_sees_what_is_not_deterministic(monkeypatch):
    assert soak.is_deterministic(steps=5, capacity=1000)
    make, seeds = soak.Learner.__init__, itertools.count()
    monkeypatch.setattr(
        soak.Learner, "__init__", lambda self, seed, *rest: make(self, next(seeds), *rest)
    )
    assert not soak.is_deterministic(steps=5, capacity=1000)

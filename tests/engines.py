"""The two engines of the sampler, for the tests that go over both."""

from __future__ import annotations

import pytest

from torchrl_recall.native import interface
from torchrl_recall.priorities.levels import TorchPriorities
from torchrl_recall.priorities.native import NativePriorities

ENGINES = {"C": NativePriorities, "torch": TorchPriorities}


def choose_engine(monkeypatch, name):
    """Make samplers that are built from now on use this engine."""
    if name == "torch":
        monkeypatch.setattr(interface, "load", lambda: (None, "the test says so"))
    elif interface.load()[0] is None:
        pytest.skip("the C library is not built")

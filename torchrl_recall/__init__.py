"""Recall traces for TorchRL: learn what led to high-value states, and imitate it."""

from torchrl_recall.model import BacktrackModel
from torchrl_recall.traces import sample_traces

__all__ = ["BacktrackModel", "sample_traces"]

"""The backtracking model: how observations and actions enter, its networks, and their heads."""

from torchrl_recall.model.backtrack_model import BacktrackModel

__all__ = ["BacktrackModel"]

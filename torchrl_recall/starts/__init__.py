"""Where traces start: sources for `BacktrackTransform(start=...)`."""

from torchrl_recall.starts.batch import NextStates, StartStates
from torchrl_recall.starts.best import BestStarts, KeyScore, NextValueScore
from torchrl_recall.starts.frontier import FrontierStarts
from torchrl_recall.starts.goal import GoalStarts

__all__ = [
    "BestStarts",
    "FrontierStarts",
    "GoalStarts",
    "KeyScore",
    "NextStates",
    "NextValueScore",
    "StartStates",
]

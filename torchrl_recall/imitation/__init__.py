"""How `RecallTraceLoss` imitates: weights of steps, distances of actions, data for a critic."""

from torchrl_recall.imitation.qvalue_weight import QValueWeight
from torchrl_recall.imitation.trace_transitions import trace_transitions
from torchrl_recall.imitation.weights import AdvantageWeight, ImitationKeys, ImitationWeight

__all__ = [
    "AdvantageWeight",
    "ImitationKeys",
    "ImitationWeight",
    "QValueWeight",
    "trace_transitions",
]

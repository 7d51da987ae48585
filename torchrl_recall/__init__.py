"""Recall traces for TorchRL: learn what led to high-value states, and imitate it."""

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.encoder import EncoderTransform
from torchrl_recall.fitting import fit
from torchrl_recall.goals.gan import GoalGAN
from torchrl_recall.imitation.qvalue_weight import QValueWeight
from torchrl_recall.imitation.trace_transitions import trace_transitions
from torchrl_recall.imitation.weights import AdvantageWeight
from torchrl_recall.loss import RecallTraceLoss
from torchrl_recall.model import BacktrackModel
from torchrl_recall.refresh import ValueRefresh
from torchrl_recall.sampler import ValuePrioritizedSampler
from torchrl_recall.schedulers import TraceLengthScheduler
from torchrl_recall.support.cell_support import CellSupport
from torchrl_recall.support.data_support import DataSupport
from torchrl_recall.traces import sample_traces
from torchrl_recall.transform import BacktrackTransform
from torchrl_recall.values import transition_value

__version__ = "0.1.0"

__all__ = [
    "AdvantageWeight",
    "BacktrackLoss",
    "BacktrackModel",
    "BacktrackTransform",
    "CellSupport",
    "DataSupport",
    "EncoderTransform",
    "GoalGAN",
    "QValueWeight",
    "RecallTraceLoss",
    "TraceLengthScheduler",
    "ValuePrioritizedSampler",
    "ValueRefresh",
    "fit",
    "sample_traces",
    "trace_transitions",
    "transition_value",
]

"""Which steps of a trace to imitate: what `BacktrackTransform(masks=...)` accepts.

Behind the walk and before the loss: each mask looks at whole traces and leaves steps out.
"""

from torchrl_recall.trace_masks.mask import TraceMask
from torchrl_recall.trace_masks.rising import RisingDistance, RisingValue
from torchrl_recall.trace_masks.trust import Disagreement, ForwardAgreement, InSupport
from torchrl_recall.trace_masks.visits import LastVisitCells, LastVisitRadius

__all__ = [
    "Disagreement",
    "ForwardAgreement",
    "InSupport",
    "LastVisitCells",
    "LastVisitRadius",
    "RisingDistance",
    "RisingValue",
    "TraceMask",
]

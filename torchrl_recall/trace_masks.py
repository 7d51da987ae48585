"""Which steps of a trace to imitate: what `BacktrackTransform(masks=...)` accepts.

Behind the walk and before the loss: each mask looks at whole traces and leaves steps out.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from tensordict import TensorDictBase
from torch import Tensor


@runtime_checkable
class TraceMask(Protocol):
    """Says which steps of traces to keep."""

    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return what to keep.

        Args:
            trace (TensorDictBase): ``[*B, T]``, oldest step first, as `sample_traces` returns it;
                not to be changed. Steps masked before hold finite values that mean nothing.

        Returns:
            Tensor: ``[*B, T]`` bool, True = keep.
        """
        ...

"""Where traces start: what `BacktrackTransform(start=...)` accepts.

Between the batch that a buffer samples and the walk: a start source turns the one into states.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from tensordict import TensorDictBase


@runtime_checkable
class StartStates(Protocol):
    """A source of states to walk back from."""

    def __call__(self, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
        """Return a start for each row of a sampled batch.

        Args:
            tensordict (TensorDictBase): the batch, ``[*B]``; not to be changed.
            generator (torch.Generator): the transform's, on the model's device.

        Returns:
            TensorDictBase: ``[*B]``, the model's observation keys, and optionally
            ``("collector", "mask")``, ``[*B]`` bool: False where there is no start.
        """
        ...

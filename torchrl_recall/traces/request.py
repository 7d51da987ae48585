"""What is asked of a backend, in one parcel from the door to the walk."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.traces.noise import TraceNoise

Precision = Literal["float32", "tf32x3", "tf32", "float16", "bfloat16"]
PRECISIONS = get_args(Precision)


class Request(NamedTuple):
    """What to walk.

    Attributes:
        model (BacktrackModel): the model.
        start (Tensor): ``[S, size]`` flat states.
        num_traces (int): traces from each.
        num_steps (int): length of the traces.
        generator (torch.Generator or None): source of randomness, on the model's device.
        noise (TraceNoise or None): the random numbers themselves.
        last_visit (bool): mask steps whose state comes again.
        precision (str): least precision of the networks' products.
    """

    model: BacktrackModel
    start: Tensor
    num_traces: int
    num_steps: int
    generator: torch.Generator | None = None
    noise: TraceNoise | None = None
    last_visit: bool = False
    precision: Precision = "float32"

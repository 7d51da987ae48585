"""The random numbers of a walk, drawn before it starts, so that backends can be fed the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel


class TraceNoise(NamedTuple):
    """Noise of ``T`` steps of ``n`` traces; entry ``t`` of the first dimension leads to ``s_t``.

    Attributes:
        action (Tensor): ``[T, n, A]`` standard normal, or ``[T, n, 1]`` uniform in [0, 1).
        delta (Tensor): ``[T, n, D]`` standard normal (``[T, n, D + 1]`` for a mixture, the last
            number picks the component), or ``[T, n, 1]`` uniform in [0, 1).
        stop (Tensor or None): ``[T, n]`` uniform in [0, 1), with a stop head.
        member (Tensor or None): uniform in [0, 1), of an ensemble; its part of ``num_members``
            picks the member. ``[T, n]`` if that is drawn for each step, ``[1, n]`` for each trace.

    Examples:
        >>> from torchrl_recall import BacktrackModel
        >>> noise = draw_noise(BacktrackModel(3, 1, num_cells=(32,)), num_steps=8, num_rows=4)
        >>> noise.action.shape, noise.delta.shape, noise.stop is None
        (torch.Size([8, 4, 1]), torch.Size([8, 4, 3]), True)
    """

    action: Tensor
    delta: Tensor
    stop: Tensor | None
    member: Tensor | None = None


def draw_noise(
    model: BacktrackModel,
    num_steps: int,
    num_rows: int,
    generator: torch.Generator | None = None,
    out: TraceNoise | None = None,
) -> TraceNoise:
    """Draw the noise of a walk.

    Args:
        model (BacktrackModel): says which noise its heads take.
        num_steps (int): length ``T`` of the traces.
        num_rows (int): number ``n`` of traces.
        generator (torch.Generator, optional): on the model's device; None is torch's own.
        out (TraceNoise, optional): noise of these sizes, to be written over.

    Returns:
        TraceNoise: the noise, in the model's dtype and on its device.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel, sample_traces
        >>> model = BacktrackModel(3, 1, num_cells=(32,))
        >>> noise = draw_noise(model, num_steps=8, num_rows=4)
        >>> start = torch.zeros(4, 3)
        >>> a, b = (sample_traces(model, start, num_steps=8, noise=noise) for _ in range(2))
        >>> bool((a["action"] == b["action"]).all())
        True
    """
    dtype, device = model.dtype, model.device

    def draw(name: str, kind: str, *shape: int) -> Tensor:
        function = torch.randn if kind == "normal" else torch.rand
        to = None if out is None else getattr(out, name)
        return function(*shape, generator=generator, out=to, dtype=dtype, device=device)

    stop = draw("stop", "uniform", num_steps, num_rows) if model.has_stop else None
    member = None
    if model.num_members > 1:
        steps = num_steps if model.member_per == "step" else 1
        member = draw("member", "uniform", steps, num_rows)
    action_head, delta_head = model.action.head, model.delta_head
    return TraceNoise(
        action=draw("action", action_head.noise_kind, num_steps, num_rows, action_head.noise_size),
        delta=draw("delta", delta_head.noise_kind, num_steps, num_rows, delta_head.noise_size),
        stop=stop,
        member=member,
    )

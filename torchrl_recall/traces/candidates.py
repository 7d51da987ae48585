"""Walks that stay inside the data: at each step the first of several candidates that the data know.

Beside `backends.walk`, on top of it: a step is a walk of length one with several traces, so that
any backend does the work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchrl_recall.traces.backends import Backend, walk
from torchrl_recall.traces.columns import Columns, NoFirstStep
from torchrl_recall.traces.masks import last_visit
from torchrl_recall.traces.noise import TraceNoise, draw_noise
from torchrl_recall.traces.request import Request

Support = Callable[[Tensor], Tensor]


@torch.no_grad()
def walk_inside(
    request: Request, backend: Backend, support: Support, num_candidates: int
) -> Columns:
    r"""Walk back from states, by predecessors inside a support.

    Each step decides once whether to stop, and in an ensemble by which member, then draws
    ``num_candidates`` predecessors from :math:`q(s, a | s', \text{no stop})` and takes the first
    that is inside. So a step that is taken has the law of the model (or member) restricted to the
    support A, and it is taken with probability
    :math:`(1 - q(\text{stop}|s')) (1 - (1 - q(A|s'))^C)`. Where no candidate is inside the trace
    ends: this step and all older ones are masked and hold the state where it ended.

    Args:
        request (Request): what to walk, without ``noise``.
        backend (str): backend of `walk`.
        support (Callable): from flat states ``[n, size]`` to ``[n]`` bool, True = inside.
        num_candidates (int): number ``C`` of candidates.

    Returns:
        Columns: ``[S * num_traces, T]``; the log-probabilities are the model's own, not those of
        the restricted law.

    Raises:
        BadStart: a start is not finite, or no state of the model (on the CPU; masked elsewhere).
        NoFirstStep: every first step back is not finite (on the CPU; masked elsewhere).
        ValueError: a support that does not give one bool for each state.
    """
    model, num_steps = request.model, request.num_steps
    state = request.start
    alive = model.observation.are_states(state)
    if not state.is_cpu:
        # As in the walk itself: asking would wait for the device.
        state = torch.where(alive.unsqueeze(-1), state, torch.zeros_like(state))
    if request.num_traces > 1:
        state = state.repeat_interleave(request.num_traces, 0)
        alive = alive.repeat_interleave(request.num_traces)
    n = len(state)
    first_of_row = torch.arange(n, device=state.device) * num_candidates
    columns = Columns.empty(model, n, num_steps)
    one_step = request._replace(num_traces=num_candidates, num_steps=1, last_visit=False)
    per_trace, member = model.num_members > 1 and model.member_per == "trace", None
    for t in reversed(range(num_steps)):
        noise = _shared_noise(request, n, num_candidates, member)
        if noise is not None and per_trace:
            member = noise.member
        try:
            drawn = walk(one_step._replace(start=state, noise=noise), backend)
        except NoFirstStep:
            if t == num_steps - 1:
                raise
            _end(columns, state, t)
            break
        candidates = drawn.state[:, 0]
        inside = _checked(support(candidates), len(candidates)) & drawn.mask[:, 0]
        # The first of equal maxima.
        inside, chosen = inside.reshape(n, num_candidates).max(1)
        row = first_of_row + chosen
        alive = alive & inside
        columns.next_state[:, t] = state
        state = torch.where(alive.unsqueeze(-1), candidates[row], state)
        columns.state[:, t] = state
        for column, source in zip(columns[2:5], drawn[2:5], strict=True):
            column[:, t] = source[row, 0]
        columns.mask[:, t] = alive
    if request.last_visit:
        states = torch.cat([columns.state, columns.next_state[:, -1:]], 1)
        columns.mask.logical_and_(last_visit(states))
    return columns


def _shared_noise(
    request: Request, n: int, num_candidates: int, member: Tensor | None
) -> TraceNoise | None:
    """Return noise by which the candidates of a row have one member and stop together or not.

    None if there is nothing to share: then the backend draws its own.
    """
    model = request.model
    if not model.has_stop and model.num_members == 1:
        return None
    noise = draw_noise(model, 1, n * num_candidates, request.generator)

    def shared(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        return part[:, ::num_candidates].repeat_interleave(num_candidates, 1)

    member = shared(noise.member) if member is None else member
    return noise._replace(stop=shared(noise.stop), member=member)


def _checked(inside: Tensor, n: int) -> Tensor:
    """Return what a support said, if it is one bool for each state."""
    if not isinstance(inside, Tensor):
        raise TypeError(f"support must return a bool tensor, got {type(inside).__name__}.")
    if inside.dtype != torch.bool or inside.shape != (n,):
        raise ValueError(
            f"support gave {inside.dtype} of shape {tuple(inside.shape)}, expected bool of ({n},), "
            "one for each state."
        )
    return inside


def _end(columns: Columns, state: Tensor, t: int) -> None:
    """Fill step ``t`` and all older ones of traces that have ended."""
    columns.state[:, : t + 1] = columns.next_state[:, : t + 1] = state.unsqueeze(1)
    for column in columns[2:]:
        column[:, : t + 1] = 0

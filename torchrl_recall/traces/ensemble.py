"""How an ensemble walks: each step, or each trace, by a member that is drawn for it.

A member walks as any model does, by whatever backend: traces are grouped by their members. What a
trace holds, log-probabilities too, is that of the member that took the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.ensemble import members_of
from torchrl_recall.traces.columns import Columns, NoFirstStep
from torchrl_recall.traces.masks import last_visit, since_start
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.request import Request
from torchrl_recall.traces.walk import Walk, reference_walk


def member_index(uniform: Tensor, num_members: int) -> Tensor:
    """Return which member uniform numbers pick.

    Args:
        uniform (Tensor): any shape, in [0, 1).
        num_members (int): number of members.

    Returns:
        Tensor: int64, 0 to ``num_members - 1``.
    """
    # A float32 just below 1 can round up to the number of members.
    return (uniform * num_members).long().clamp(0, num_members - 1)


def reference_ensemble_walk(model: BacktrackModel, start: Tensor, noise: TraceNoise) -> Walk:
    """Walk backwards, written to be read: all members take each step, and a trace keeps its own's.

    Args:
        model (BacktrackModel): an ensemble.
        start (Tensor): ``[n, size]`` flat states to walk back from.
        noise (TraceNoise): the random numbers, which also give the number of steps.

    Returns:
        Walk: the traces.
    """
    assert noise.member is not None  # as the door makes sure
    num_steps, rows = len(noise.action), torch.arange(len(start), device=start.device)
    member = member_index(noise.member, model.num_members).expand(num_steps, -1)
    steps, state = [], start
    for t in reversed(range(num_steps)):
        here = _steps(noise, slice(t, t + 1))
        walks = [reference_walk(one, state, here) for one in members_of(model)]
        step = Walk(*(_pick(columns, member[t], rows) for columns in zip(*walks, strict=True)))  # pyright: ignore
        steps.append(step)
        state = step.states[0]
    return _joined(steps[::-1])


def _pick(columns: tuple[Tensor | None, ...], member: Tensor, rows: Tensor) -> Tensor | None:
    """Return each row's entry of its member's column, ``[steps, n, ...]``."""
    kept = [column for column in columns if column is not None]
    return torch.stack(kept)[member, :, rows].transpose(0, 1) if kept else None


def _room(column: Tensor, num_rows: int) -> Tensor:
    """Return memory for the same column of so many rows."""
    return column.new_empty((len(column), num_rows, *column.shape[2:]))


class EnsembleWalk:
    """The members packed for walking; call it with starts and noise, tile by tile.

    Args:
        model (BacktrackModel): an ensemble.
        kind (Callable): packs one member, as `EagerWalk` does.
    """

    def __init__(
        self,
        model: BacktrackModel,
        kind: Callable[[BacktrackModel], Callable[[Tensor, TraceNoise], Walk]],
    ) -> None:
        self.walks = [kind(one) for one in members_of(model)]
        self.per_step = model.member_per == "step"

    def __call__(self, start: Tensor, noise: TraceNoise) -> Walk:
        """Walk one tile backwards.

        Args:
            start (Tensor): ``[n, size]`` flat states.
            noise (TraceNoise): the random numbers of the tile.

        Returns:
            Walk: the traces.
        """
        assert noise.member is not None  # as the door makes sure
        groups = _groups(member_index(noise.member, len(self.walks)), len(self.walks))
        if not self.per_step:
            return self._by_members(start, noise, groups[0])
        steps, state = [], start
        for t in reversed(range(len(noise.action))):
            step = self._by_members(state, _steps(noise, slice(t, t + 1)), groups[t])
            steps.append(step)
            state = step.states[0]
        return _joined(steps[::-1])

    def _by_members(self, start: Tensor, noise: TraceNoise, groups: list[Tensor]) -> Walk:
        """Let each member walk its rows, and put them back in their order."""
        whole: list[Tensor | None] = []
        for walk, rows in zip(self.walks, groups, strict=True):
            if len(rows) == 0:
                continue
            part = walk(start[rows], _rows(noise, rows))
            if not whole:
                whole = [None if column is None else _room(column, len(start)) for column in part]
            for column, value in zip(whole, part, strict=True):
                if column is not None and value is not None:
                    column[:, rows] = value
        return Walk(*whole)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def grouped_walk(request: Request, walk: Callable[[Request], Columns]) -> Columns:
    """Walk back from states, each group of rows by its member's own walk.

    For backends that fill columns; one call for each member, or for each member and step. On a GPU
    the sizes of the groups are read from it once.

    Args:
        request (Request): for an ensemble.
        walk (Callable): walks for one member.

    Returns:
        Columns: ``[S * num_traces, T]``.

    Raises:
        BadStart: a start is not finite, or no state of the model.
        NoFirstStep: no first step back is finite.
    """
    model, num_steps = request.model, request.num_steps
    members, per_step = members_of(model), model.member_per == "step"
    state = request.start.repeat_interleave(request.num_traces, 0)
    if request.noise is None:
        shape = (num_steps if per_step else 1, len(state))
        options = {"generator": request.generator, "dtype": model.dtype, "device": model.device}
        uniform = torch.rand(shape, **options)
    else:
        assert request.noise.member is not None  # as the door makes sure
        uniform = request.noise.member
    groups = _groups(member_index(uniform, len(members)), len(members))
    parts = [slice(t, t + 1) for t in range(num_steps)] if per_step else [slice(num_steps)]
    columns = Columns.empty(model, len(state), num_steps)
    for part, group in zip(reversed(parts), reversed(groups), strict=True):
        any_finite = False
        for member, rows in zip(members, group, strict=True):
            if len(rows) == 0:
                continue
            noise = request.noise
            asked = request._replace(
                model=member,
                start=state[rows],
                num_traces=1,
                num_steps=1 if per_step else num_steps,
                noise=None if noise is None else _rows(_steps(noise, part), rows),
                last_visit=request.last_visit and not per_step,
            )
            try:
                found = walk(asked)
                any_finite = True
            except NoFirstStep:  # of this group; the others' may be finite
                found = _masked(member, asked)
            for column, value in zip(columns, found, strict=True):
                column[rows, part] = value
        if part.stop == num_steps and not any_finite:
            raise NoFirstStep
        state = columns.state[:, 0 if part.start is None else part.start]
    if per_step:
        columns.mask.copy_(since_start(columns.mask.t()).t())
        if request.last_visit:
            states = torch.cat([columns.state, columns.next_state[:, -1:]], 1)
            columns.mask.logical_and_(last_visit(states))
    return columns


def _masked(member: BacktrackModel, request: Request) -> Columns:
    """Return traces that stay where they start, all masked."""
    columns = Columns.empty(member, len(request.start), request.num_steps)
    for column in columns:
        column.zero_()
    for column in (columns.state, columns.next_state):
        column.copy_(request.start.unsqueeze(1))
    return columns


def _groups(member: Tensor, num_members: int) -> list[list[Tensor]]:
    """Return the rows of each member, for each row of ``[T, n]`` indices."""
    order = torch.argsort(member, dim=-1, stable=True)
    members = torch.arange(num_members, device=member.device)
    sizes = (member.unsqueeze(-1) == members).sum(1).tolist()
    return [list(rows.split(counts)) for rows, counts in zip(order, sizes, strict=True)]


def _steps(noise: TraceNoise, steps: slice) -> TraceNoise:
    """Return the noise of some steps, for one member."""
    return TraceNoise(*(part if part is None else part[steps] for part in noise[:3]))  # pyright: ignore


def _rows(noise: TraceNoise, rows: Tensor) -> TraceNoise:
    """Return the noise of some rows, for one member."""
    return TraceNoise(*(part if part is None else part[:, rows] for part in noise[:3]))  # pyright: ignore


def _joined(steps: list[Walk]) -> Walk:
    """Return walks of one step each, oldest first, as one."""
    alive = [step.alive for step in steps if step.alive is not None]
    return Walk(
        torch.cat([*(step.states[:1] for step in steps), steps[-1].states[1:]]),
        torch.cat([step.actions for step in steps]),
        torch.cat([step.action_log_prob for step in steps]),
        torch.cat([step.delta_log_prob for step in steps]),
        since_start(torch.cat(alive)) if alive else None,
    )

"""The torch backends' common road: a tile of traces after the other, then what must be masked."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.heads import SupportDelta
from torchrl_recall.traces.columns import BadStart, Columns, NoFirstStep
from torchrl_recall.traces.masks import last_visit as last_visit_mask
from torchrl_recall.traces.masks import since_start
from torchrl_recall.traces.noise import TraceNoise, draw_noise
from torchrl_recall.traces.request import Request
from torchrl_recall.traces.walk import Walk

# Rows whose activations stay in the cache through all steps; a GPU wants more at once.
TILE, CUDA_TILE = 512, 4096


@torch.no_grad()
def tiled_walk(walk: Callable[[Tensor, TraceNoise], Walk], request: Request) -> Columns:
    """Walk back from states, tile by tile.

    Args:
        walk (Callable): from ``[n, size]`` states and their noise to a `Walk`.
        request (Request): the model, where from, and how far.

    Returns:
        Columns: ``[S * num_traces, T]``.

    Raises:
        BadStart: a start is not finite, or no state of the model (on the CPU; masked elsewhere).
        NoFirstStep: no first step back is finite (on the CPU; masked elsewhere).
    """
    model, start, num_traces, num_steps, generator, noise, last_visit, _ = request
    good = model.observation.are_states(start)
    on_cpu = start.is_cpu and not torch.compiler.is_compiling()
    if on_cpu and not bool(good.all()):
        raise BadStart
    if not on_cpu:
        # Asking would wait for the device: such traces are masked, and hold zeros.
        start = torch.where(good.unsqueeze(-1), start, torch.zeros_like(start))
    rows = start.unsqueeze(1).expand(-1, num_traces, -1).reshape(-1, start.shape[-1])
    columns = Columns.empty(model, len(rows), num_steps)
    any_finite, tile_noise = False, None
    tile = CUDA_TILE if start.is_cuda else TILE
    for low in range(0, len(rows), tile):
        part = slice(low, low + tile)
        starts = rows[part]
        if noise is None:
            # In the same memory, tile by tile: fresh pages are dear.
            same = on_cpu and low > 0 and len(starts) == tile
            tile_noise = draw_noise(
                model, num_steps, len(starts), generator, tile_noise if same else None
            )
        else:
            tile_noise = TraceNoise(*(x if x is None else x[:, part] for x in noise))  # pyright: ignore
        any_finite |= _write(columns, part, walk(starts, tile_noise), model, last_visit)
    if on_cpu and not any_finite:
        raise NoFirstStep
    if not on_cpu:
        columns.mask.logical_and_(good.repeat_interleave(num_traces).unsqueeze(-1))
    return columns


def _write(
    columns: Columns, rows: slice, walk: Walk, model: BacktrackModel, last_visit: bool
) -> bool:
    """Copy a tile into its rows; return whether any first step is finite (not asked of a GPU)."""
    walk, any_finite = _finite(walk)
    columns.state[rows] = walk.states[:-1].transpose(0, 1)
    columns.next_state[rows] = walk.states[1:].transpose(0, 1)
    columns.action[rows] = walk.actions.transpose(0, 1)
    columns.action_log_prob[rows] = walk.action_log_prob.t()
    columns.delta_log_prob[rows] = walk.delta_log_prob.t()
    mask = columns.mask[rows]
    if walk.alive is None:
        mask.fill_(True)
    else:
        mask.copy_(walk.alive.t())
    if isinstance(model.delta_head, SupportDelta):
        dead = model.delta_head.dead_end(walk.states[1:])
        if dead is not None:
            mask &= since_start(~dead).t()
    if last_visit:
        mask &= last_visit_mask(walk.states.transpose(0, 1))
    return any_finite


def _finite(walk: Walk) -> tuple[Walk, bool]:
    """Mask what has left the numbers, and all before; put the walk's start in its place."""
    # Sums are enough to tell that all is well. A state that is not finite stays so on the way
    # back, but an action can overflow first.
    columns = (walk.states[0], walk.actions, walk.action_log_prob, walk.delta_log_prob)
    on_cpu = walk.states.is_cpu and not torch.compiler.is_compiling()
    if on_cpu and math.isfinite(sum(float(x.sum()) for x in columns)):
        return walk, True
    kept = torch.isfinite(walk.states[:-1]).all(-1)
    kept &= torch.isfinite(walk.action_log_prob) & torch.isfinite(walk.delta_log_prob)
    actions = walk.actions
    zero = walk.action_log_prob.new_zeros(())
    if actions.is_floating_point():
        kept &= torch.isfinite(actions).all(-1)
    any_finite = not on_cpu or bool(kept[-1].any())
    kept = since_start(kept)
    if actions.is_floating_point():
        actions = torch.where(kept.unsqueeze(-1), actions, zero)
    alive = kept if walk.alive is None else walk.alive & kept
    start = walk.states[-1:]
    masked = Walk(
        torch.cat([torch.where(kept.unsqueeze(-1), walk.states[:-1], start), start]),
        actions,
        torch.where(kept, walk.action_log_prob, zero),
        torch.where(kept, walk.delta_log_prob, zero),
        alive,
    )
    return masked, any_finite

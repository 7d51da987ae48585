"""The native backend: the walk in C, for float32 models on the CPU.

A `Plan` describes a model to the library by pointers to its live parameters, and owns the packed
form of their values. Before each walk the library compares the packed form's copy with the live
values, so a plan is never stale, however a parameter was written (an optimizer, ``.data``, NumPy).
"""

from __future__ import annotations

import threading
import weakref
from array import array
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.native import interface
from torchrl_recall.traces.columns import BadStart, Columns, NoFirstStep
from torchrl_recall.traces.layout import Watch, layout_of, unsupported
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.plan import MAX_KNOWN, Known, Plan, Sizes, check_status
from torchrl_recall.traces.request import Request

# Multiply-adds below which a further thread costs more than it gives.
WORK_OF_A_THREAD = 20_000_000
# Multiply-adds that take as long as a step by tables.
LOOK_UP_WORK = 2_000


def not_for(model: BacktrackModel) -> str | None:
    """Say why this backend is not meant for a model's dtype and device, or None if it is."""
    if model.dtype != torch.float32:
        return f"the model has dtype {model.dtype}, expected torch.float32"
    if model.device.type != "cpu":
        return f"the model is on {model.device}, expected the CPU"
    return None


_plans: tuple[weakref.WeakKeyDictionary[BacktrackModel, tuple[Watch, Plan]], ...] = (
    weakref.WeakKeyDictionary(),
    weakref.WeakKeyDictionary(),
)


def plan_of(model: BacktrackModel, bfloat16: bool = False) -> Plan | str:
    """Return a model's plan, or the reason why this backend cannot run it.

    Args:
        model (BacktrackModel): the model, as it is now.
        bfloat16 (bool): multiply in bfloat16, where the processor can.

    Returns:
        Plan or str: kept from call to call while the model has the same tensors.
    """
    found = _plans[bfloat16].get(model)
    if found is not None and found[0].sees_no_change():
        return found[1]
    _plans[bfloat16].pop(model, None)
    reason = interface.load()[1] or not_for(model) or unsupported(model)
    if reason is not None:
        return reason
    watch = Watch(model)
    plan = Plan(layout_of(model), watch.tensors, bfloat16)
    _plans[bfloat16][model] = watch, plan
    return plan


def recognised(model: BacktrackModel, bfloat16: bool, key: Hashable) -> tuple[Plan, Known] | None:
    """Return the plan of a model that has not changed since `remember`, and what was noted then."""
    found = _plans[bfloat16].get(model)
    if found is None:
        return None
    known = found[1].known.get(key)
    return (found[1], known) if known is not None and found[0].sees_no_change() else None


def remember(request: Request, batch: torch.Size, is_plain: bool, key: Hashable) -> None:
    """Note a call that has passed the door, if it was this backend that walked."""
    found = _plans[request.precision == "bfloat16"].get(request.model)
    if found is None:
        return
    plan = found[1]
    if len(plan.known) >= MAX_KNOWN:
        plan.known.clear()
    sizes = plan.sizes_of(len(request.start), request.num_traces, request.num_steps)
    plan.known[key] = Known(sizes, request.last_visit, batch, is_plain)


_NO_NOISE = (0, 0, 0)


def walk(
    plan: Plan,
    start: Tensor,
    num_traces: int,
    num_steps: int,
    *,
    seed: int = 0,
    noise: TraceNoise | None = None,
    last_visit: bool = False,
) -> Columns:
    """Walk back from states.

    Args:
        plan (Plan): the model.
        start (Tensor): ``[S, size]`` states, float32 or int64.
        num_traces (int): traces from each start.
        num_steps (int): length ``T`` of the traces.
        seed (int): key of the random numbers, an int64.
        noise (TraceNoise, optional): the random numbers themselves, float32.
        last_visit (bool): mask steps whose state comes again.

    Returns:
        Columns: ``[S * num_traces, T]``.

    Raises:
        BadStart: a start is not finite, or no state of the model.
        NoFirstStep: every first step back is not finite.
        MemoryError: no memory for the walk.
    """
    sizes = plan.sizes_of(start.shape[0], num_traces, num_steps)
    given = _NO_NOISE
    if noise is not None:
        noise = TraceNoise(*(x if x is None else x.resolve_neg().contiguous() for x in noise))  # pyright: ignore
        given = tuple(0 if part is None else part.data_ptr() for part in noise[:3])
    return walk_sizes(plan, start, sizes, seed, last_visit, given, noise)


def walk_sizes(
    plan: Plan,
    start: Tensor,
    sizes: Sizes,
    seed: int,
    last_visit: bool,
    given: tuple[int, ...] = _NO_NOISE,
    noise: TraceNoise | None = None,
    block: Tensor | None = None,
) -> Columns:
    """Walk back from states, see `walk`.

    Args:
        plan (Plan): the model.
        start (Tensor): ``[S, size]`` states, float32 or int64.
        sizes (Sizes): of `Plan.sizes_of`.
        seed (int): key of the random numbers, an int64.
        last_visit (bool): mask steps whose state comes again.
        given (tuple of int): addresses of the parts of ``noise``.
        noise (TraceNoise, optional): the random numbers themselves, float32, contiguous.
        block (Tensor, optional): packed values that are current. None has the library look whether
            the plan's are, which is quicker than to ask before.

    Returns:
        Columns: ``[S * num_traces, T]``.
    """
    packed = plan.block if block is None else block
    function, source, work = plan.library.recall_walk, packed, sizes.num_steps * plan.macs
    if plan.num_evaluations:
        kept = plan.tables  # once: another thread may set it meanwhile
        if kept is not None and kept[0] is packed:
            tables = kept[1]
        else:
            source = packed = block = plan.current_block() if block is None else block
            tables = plan.tables_for(packed, sizes.num_steps)
        if tables is not None:
            function, source = plan.library.recall_look_up, tables
            work = sizes.num_steps * LOOK_UP_WORK
    threads = min(torch.get_num_threads(), work // WORK_OF_A_THREAD)
    if threads > 1 and block is None:
        return walk_sizes(plan, start, sizes, seed, last_visit, given, noise, plan.current_block())
    start, columns = start.resolve_neg().contiguous(), plan.columns(sizes)
    columns_at, compared = map(Tensor.data_ptr, columns), packed.data_ptr() if block is None else 0
    options = last_visit, plan.instruction_set, 0, 0, 0, compared
    call = array(
        interface.WORD, (*sizes.of_call, start.data_ptr(), seed, *given, *columns_at, *options)
    )
    arguments = plan.address, source.data_ptr(), call.buffer_info()[0]
    if threads <= 1:
        status = function(*arguments)
        if status == interface.STALE:
            return walk_sizes(
                plan, start, sizes, seed, last_visit, given, noise, plan.current_block()
            )
        check_status(status)
    else:
        _in_threads(function, arguments, call, threads, keep=(plan, columns, start, noise, source))
    if call[interface.BAD_STARTS]:
        raise BadStart
    if not call[interface.FINITE_ROWS]:
        raise NoFirstStep
    return columns


def _in_threads(function: Any, arguments: tuple, call: Any, threads: int, keep: tuple) -> None:
    """Run the same call in several threads, which share its tiles; ctypes lets them run."""
    statuses: list[int] = []

    def run(*_kept: Any) -> None:
        statuses.append(function(*arguments))

    # Made for the call: nothing to keep alive, or to lose in a fork, for some 50 microseconds.
    others = [
        threading.Thread(target=run, args=(call, keep), daemon=True) for _ in range(threads - 1)
    ]
    started = []
    try:
        for other in others:
            try:
                other.start()
            except RuntimeError:  # no more threads to be had: those that there are do the work
                break
            started.append(other)
        run()
        for other in started:
            other.join()
    except BaseException:
        # Ctrl-C, say: no new tiles. What the others still write to is theirs, too.
        call[interface.NEXT_TILE] = 2**40
        raise
    check_status(max(statuses))

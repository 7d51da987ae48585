"""The native backend: the walk in C, for float32 models on the CPU.

A `Plan` describes a model to the library by pointers to its live parameters, and owns the packed
form of their values. Before each walk the library compares the packed form's copy with the live
values, so a plan is never stale, however a parameter was written (an optimizer, ``.data``, NumPy).
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from array import array
from typing import Any

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.native import interface
from torchrl_recall.traces import large_columns
from torchrl_recall.traces.columns import BadStart, Columns, NoFirstStep
from torchrl_recall.traces.layout import (
    Watch,
    form_of,
    layout_of,
    named_tensors,
    parse,
    unsupported,
)
from torchrl_recall.traces.noise import TraceNoise

# Multiply-adds below which a further thread costs more than it gives.
WORK_OF_A_THREAD = 20_000_000
# Shapes of columns that a plan remembers.
MAX_TEMPLATES = 64
# Multiply-adds that take as long as a step by tables.
LOOK_UP_WORK = 2_000
# Probabilities of changes in a table, beyond which it is not worth its memory.
MAX_TABLE = 2**21


class Plan:
    """A model as the library reads it.

    Args:
        layout (str): of `layout_of`.
        tensors (list of Tensor): of `live_tensors`, float32 on the CPU, contiguous.
        bfloat16 (bool): multiply in bfloat16, where the processor can.
    """

    def __init__(self, layout: str, tensors: list[Tensor], bfloat16: bool) -> None:
        library, reason = interface.load()
        if library is None:
            raise RuntimeError(f"the native backend is not there: {reason}")
        for tensor in tensors:
            wrong = tensor.is_floating_point() and tensor.dtype != torch.float32
            if wrong or not (tensor.is_cpu and tensor.is_contiguous()):
                raise ValueError(
                    f"the native backend needs contiguous float32 tensors on the CPU, got "
                    f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}."
                )
        self.library = library
        # Held, so that no other tensor can come to lie at their addresses.
        self.tensors = tensors
        self.constants: list[Tensor] = []
        self.instruction_set = min(int(library.recall_instruction_set()), 513 if bfloat16 else 512)
        form, named = parse(layout), named_tensors(layout, tensors)
        self.form = form_of(layout)
        by_class = self.form.action_size is None
        self.num_evaluations = 0  # of networks, for tables; 0 if there can be none
        if form["is_discrete"] and by_class:
            num_states = math.prod(form["cardinality"])
            size = num_states * form["action"]["size"] * form["delta"]["size"]
            if size <= MAX_TABLE:
                self.num_evaluations = num_states * (1 + form["action"]["size"])
        self.macs = sum(w.numel() for pairs in named["networks"] for w, _ in pairs)
        self.described = self._describe(form, named)
        self.address = ctypes.addressof(self.described)
        self.block = self._pack()
        self.state_bytes = self.form.state_size * (8 if self.form.is_discrete else 4)
        self.templates: dict[tuple[int, int], Columns] = {}
        # The tables, beside the packed values that they were made of.
        self.tables: tuple[Tensor, Tensor] | None = None

    def _describe(self, form: dict[str, Any], named: dict[str, Any]) -> interface.Model:
        described = interface.Model(
            action=_head(form["action"], named["action"]),
            delta=_head(form["delta"], named["delta"]),
            is_bfloat16=self.instruction_set == 513,
            **{
                name: form[name]
                for name in (
                    "state_size",
                    "feature_size",
                    "is_discrete",
                    "has_joint_code",
                    "floor",
                    "has_dead_ends",
                )
            },
        )
        for place, network, layers in zip(
            described.network, form["networks"], named["networks"], strict=True
        ):
            if network is None:
                continue
            place.num_layers = len(layers)
            place.activation = interface.ACTIVATIONS.index(network["activation"])
            place.slope = network["slope"]
            for i, width in enumerate(network["widths"]):
                place.width[i] = width
            for i, (weight, bias) in enumerate(layers):
                place.weight[i], place.bias[i] = weight.data_ptr(), bias.data_ptr()
        if form["is_discrete"]:
            cardinality = torch.tensor(form["cardinality"], device="cpu")
            described.cardinality = self._keep(cardinality)
        else:
            described.mean = named["observation"]["mean"].data_ptr()
            described.variance = named["observation"]["variance"].data_ptr()
        if form["delta"]["kind"] == interface.SUPPORT:
            described.support, described.lowest, described.highest = (
                self._keep(named["delta"][name].float()) for name in ("support", "low", "high")
            )
        return described

    def _keep(self, tensor: Tensor) -> int:
        self.constants.append(tensor)
        return tensor.data_ptr()

    def _pack(self) -> Tensor:
        block = _aligned(self.library.recall_packed_bytes(self.address))
        self.library.recall_pack(self.address, block.data_ptr())
        return block

    def current_block(self) -> Tensor:
        """Return the packed values; a walk in another thread may still hold earlier ones."""
        block = self.block
        if not self.library.recall_is_current(self.address, block.data_ptr()):
            self.block = block = self._pack()
        return block

    def tables_for(self, block: Tensor, num_steps: int) -> Tensor | None:
        """Return tables of the packed values if they cost less than to walk without.

        Args:
            block (Tensor): of `current_block`.
            num_steps (int): steps to be walked, of all traces.
        """
        kept = self.tables  # once: another thread may set it meanwhile
        if kept is not None and kept[0] is block:
            return kept[1]
        if not 0 < self.num_evaluations <= 2 * num_steps:
            return None
        tables = _aligned(self.library.recall_table_bytes(self.address))
        _check(
            self.library.recall_tables(
                self.address, block.data_ptr(), tables.data_ptr(), self.instruction_set
            )
        )
        self.tables = block, tables
        return tables

    def columns(self, num_rows: int, num_steps: int) -> Columns:
        """Return columns with memory but without values."""
        if num_rows * num_steps * self.state_bytes >= large_columns.SMALLEST:
            return self.form.empty(num_rows, num_steps, "cpu", large_columns.empty)
        like = self.templates.get((num_rows, num_steps))
        if like is None:
            # `empty_like` is the quickest way to a tensor, and needs no memory to be like.
            like = self.form.empty(num_rows, num_steps, "cpu")
            for column in like:
                column.untyped_storage().resize_(0)
            if len(self.templates) >= MAX_TEMPLATES:
                self.templates.clear()
            self.templates[num_rows, num_steps] = like
        return tuple.__new__(Columns, map(torch.empty_like, like))


def _head(form: dict[str, Any], buffers: dict[str, Tensor]) -> interface.Head:
    head = interface.Head(**form)
    if form["kind"] in (interface.NORMAL, interface.MIXTURE):
        head.mean, head.spread = buffers["mean"].data_ptr(), buffers["variance"].data_ptr()
    elif form["kind"] in (interface.TANH_NORMAL, interface.BOX):
        head.mean, head.spread = buffers["middle"].data_ptr(), buffers["half_range"].data_ptr()
    return head


def _aligned(size: int) -> Tensor:
    """Return ``size`` bytes that begin at a cache line."""
    memory = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
    return memory[-memory.data_ptr() % 64 :][:size]


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
    num_rows = start.shape[0] * num_traces
    if num_rows >= 2**32:
        raise ValueError(f"next_observation gives {num_rows} traces, expected fewer than 2^32.")
    start = start.resolve_neg().contiguous()
    columns, block = plan.columns(num_rows, num_steps), plan.current_block()
    given = [0, 0, 0]
    if noise is not None:
        noise = TraceNoise(*(x if x is None else x.resolve_neg().contiguous() for x in noise))  # pyright: ignore
        given = [0 if part is None else part.data_ptr() for part in noise[:3]]
    sizes, columns_at = (num_rows, num_traces, num_steps), map(Tensor.data_ptr, columns)
    options = last_visit, plan.instruction_set, 0, 0, 0
    call = array(interface.WORD, (*sizes, start.data_ptr(), seed, *given, *columns_at, *options))
    assert len(call) == len(interface.CALL_FIELDS)
    function, source = plan.library.recall_walk, block
    work = num_rows * num_steps * plan.macs
    if plan.num_evaluations:
        tables = plan.tables_for(block, num_rows * num_steps)
        if tables is not None:
            function, source = plan.library.recall_look_up, tables
            work = num_rows * num_steps * LOOK_UP_WORK
    arguments = plan.address, source.data_ptr(), call.buffer_info()[0]
    threads = min(torch.get_num_threads(), work // WORK_OF_A_THREAD)
    if threads <= 1:
        _check(function(*arguments))
    else:
        _in_threads(function, arguments, call, threads, keep=(plan, columns, start, noise, source))
    if call[interface.BAD_STARTS]:
        raise BadStart
    if not call[interface.FINITE_ROWS]:
        raise NoFirstStep
    return columns


def _check(status: int) -> None:
    if status != interface.OK:
        raise MemoryError("no memory for the walk.")


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
    _check(max(statuses))

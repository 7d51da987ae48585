"""A model as the C library reads it, and the packed form of its values."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_recall.native import interface
from torchrl_recall.traces import large_columns
from torchrl_recall.traces.columns import Columns
from torchrl_recall.traces.layout import form_of, named_tensors, parse

# Calls, and sizes of walks, that a plan remembers.
MAX_KNOWN = MAX_SIZES = 64
# Probabilities of changes in a table, beyond which it is not worth its memory.
MAX_TABLE = 2**21


class Sizes(NamedTuple):
    """A walk's sizes, and what they tell.

    Attributes:
        of_call (tuple): traces, traces from each start, steps, as the library is told.
        num_steps (int): of all traces together.
        like (Columns or None): columns without memory; None for large ones.
    """

    of_call: tuple[int, int, int]
    num_steps: int
    like: Columns | None


class Known(NamedTuple):
    """What was found out about a call of `sample_traces` that may come again.

    Attributes:
        sizes (Sizes): of its walk.
        last_visit (bool): mask steps whose state comes again.
        batch (torch.Size): of what is returned.
        is_plain (bool): whether the columns are returned as they are, each under one key.
    """

    sizes: Sizes
    last_visit: bool
    batch: torch.Size
    is_plain: bool


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
        self.sizes: dict[tuple[int, int, int], Sizes] = {}
        self.known: dict[Hashable, Known] = {}
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
        check_status(
            self.library.recall_tables(
                self.address, block.data_ptr(), tables.data_ptr(), self.instruction_set
            )
        )
        self.tables = block, tables
        return tables

    def sizes_of(self, num_starts: int, num_traces: int, num_steps: int) -> Sizes:
        """Return the sizes of a walk."""
        found = self.sizes.get((num_starts, num_traces, num_steps))
        if found is None:
            num_rows = num_starts * num_traces
            if num_rows >= 2**32:
                raise ValueError(
                    f"next_observation gives {num_rows} traces, expected fewer than 2^32."
                )
            like = None
            if num_rows * num_steps * self.state_bytes < large_columns.SMALLEST:
                # `empty_like` is the quickest way to a tensor, and needs no memory to be like.
                like = self.form.empty(num_rows, num_steps, "cpu")
                for column in like:
                    column.untyped_storage().resize_(0)
            found = Sizes((num_rows, num_traces, num_steps), num_rows * num_steps, like)
            if len(self.sizes) >= MAX_SIZES:
                self.sizes.clear()
            self.sizes[num_starts, num_traces, num_steps] = found
        return found

    def columns(self, sizes: Sizes) -> Columns:
        """Return columns with memory but without values."""
        if sizes.like is not None:
            return tuple.__new__(Columns, map(torch.empty_like, sizes.like))
        num_rows, _, num_steps = sizes.of_call
        return self.form.empty(num_rows, num_steps, "cpu", large_columns.empty)


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


def check_status(status: int) -> None:
    """Raise if the library could not do what it was asked."""
    if status != interface.OK:
        raise MemoryError("no memory for the walk.")

"""``torchrl_recall::walk``: the native walk as an operator, for `torch.compile` and `torch.export`.

Outside of a compiled graph `sample_traces` calls the walk directly: an operator costs more than a
small walk. A saved program holds the layout as a string and needs this library to run. Parameters
are read at every run; the layout (bounds of scales, slopes, hooks) is that of the compilation.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from torchrl_recall.model import BacktrackModel
from torchrl_recall.native import interface
from torchrl_recall.traces.columns import Columns
from torchrl_recall.traces.layout import form_of, layout_of, live_tensors, unsupported
from torchrl_recall.traces.native import not_for, walk
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.plan import Plan
from torchrl_recall.traces.request import Request

_SCHEMA = (
    "(Tensor start, Tensor seed, Tensor[] noise, Tensor[] tensors, str layout, SymInt num_traces, "
    "SymInt num_steps, bool last_visit, bool bfloat16) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_MAX_PLANS = 16
_plans: OrderedDict[tuple, Plan] = OrderedDict()


@torch.library.custom_op(
    "torchrl_recall::walk", mutates_args=(), device_types="cpu", schema=_SCHEMA
)
def _walk(start, seed, noise, tensors, layout, num_traces, num_steps, last_visit, bfloat16):
    key = (layout, bfloat16, *[tensor.data_ptr() for tensor in tensors])
    plan = _plans.pop(key, None)
    if plan is None:
        plan = Plan(layout, [tensor.detach() for tensor in tensors], bfloat16)
    _plans[key] = plan
    while len(_plans) > _MAX_PLANS:
        _plans.popitem(last=False)
    given = TraceNoise(*noise, *[None] * (3 - len(noise))) if noise else None
    return tuple(
        walk(
            plan,
            start,
            num_traces,
            num_steps,
            seed=int(seed),
            noise=given,
            last_visit=last_visit,
        )
    )


@_walk.register_fake
def _fake(start, seed, noise, tensors, layout, num_traces, num_steps, last_visit, bfloat16):
    rows = start.shape[0] * num_traces
    return tuple(form_of(layout).empty(rows, num_steps, start.device))


@torch.compiler.assume_constant_result
def why_not(model: BacktrackModel) -> str | None:
    """Say why the operator cannot run a model, or None if it can."""
    return interface.load()[1] or not_for(model) or unsupported(model)


_constant_layout = torch.compiler.assume_constant_result(layout_of)


def walk_in_graph(request: Request) -> Columns:
    """Walk back from states, as a node of the graph that is being traced; see `native.walk`."""
    seed = torch.randint(0, 2**63 - 1, (), generator=request.generator)
    # Traces carry no gradient, to nothing.
    given = [] if request.noise is None else [x.detach() for x in request.noise if x is not None]
    return Columns(
        *_walk(
            request.start.detach(),
            seed,
            given,
            [tensor.detach() for tensor in live_tensors(request.model)],
            _constant_layout(request.model),
            request.num_traces,
            request.num_steps,
            request.last_visit,
            request.precision == "bfloat16",
        )
    )

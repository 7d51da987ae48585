"""Which backends there are, and which one walks: the only place that knows them all."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.ensemble import members_of
from torchrl_recall.native import interface
from torchrl_recall.traces import cuda_graph, eager, native, operator, table, triton_walk
from torchrl_recall.traces.columns import Columns
from torchrl_recall.traces.ensemble import (
    EnsembleWalk,
    grouped_walk,
    reference_ensemble_walk,
)
from torchrl_recall.traces.layout import Watch
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.request import Request
from torchrl_recall.traces.tiles import tiled_walk
from torchrl_recall.traces.walk import Walk, reference_walk

Backend = Literal["auto", "reference", "eager", "table", "graph", "native", "triton"]
BACKENDS = get_args(Backend)


_Kind = Callable[[BacktrackModel], Callable[[Tensor, TraceNoise], Walk]]
_KINDS: dict[str, _Kind] = {
    "reference": lambda model: partial(reference_walk, model),
    "eager": eager.EagerWalk,
    "table": table.TableWalk,
    "graph": cuda_graph.GraphedWalk,
}
_UNSUPPORTED: dict[str, Callable[[BacktrackModel], str | None]] = {
    "reference": lambda model: None,
    "eager": eager.unsupported,
    "table": table.unsupported,
    "graph": cuda_graph.unsupported,
}


class BackendStatus(NamedTuple):
    """Whether a backend can be used on this machine.

    Attributes:
        available (bool): whether it can.
        detail (str): with what, or why not.

    Examples:
        >>> backends()["reference"].available
        True
    """

    available: bool
    detail: str


def backends() -> dict[str, BackendStatus]:
    """Tell which backends of `sample_traces` this machine has, and why it lacks the others.

    Returns:
        dict: a `BackendStatus` for each name that ``backend`` may have.

    Examples:
        >>> from torchrl_recall.traces import backends
        >>> backends()["eager"]
        BackendStatus(available=True, detail='torch operations')
    """
    library, reason = interface.load()
    if library is None:
        in_c = BackendStatus(False, str(reason))
    else:
        instructions = interface.INSTRUCTION_SETS[int(library.recall_instruction_set())]
        in_c = BackendStatus(True, f"C kernel with {instructions}")
    no_gpu = None if torch.cuda.is_available() else "there is no CUDA device"
    no_triton = triton_walk.unavailable() or no_gpu
    return {
        "native": in_c,
        "triton": BackendStatus(no_triton is None, no_triton or "Triton kernel, on CUDA"),
        "graph": BackendStatus(no_gpu is None, no_gpu or "CUDA graph of the eager form"),
        "table": BackendStatus(True, "torch operations, for states that can be counted"),
        "eager": BackendStatus(True, "torch operations"),
        "reference": BackendStatus(True, "torch operations, written to be read"),
    }


def walk(request: Request, backend: Backend) -> Columns:
    """Walk with a backend, or with the best one that can.

    Args:
        request (Request): what to walk.
        backend (str): a backend's name, or ``"auto"``.

    Returns:
        Columns: ``[S * num_traces, T]``.

    Raises:
        ValueError: a forced backend that cannot run the model, or an unknown one.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    model = request.model
    if model.num_members > 1:
        return _by_members(request, backend)
    if backend == "triton" or (backend == "auto" and request.start.is_cuda):
        reason = _why_not_triton(model)
        if reason is None:
            return _by_triton(request)
        if backend == "triton":
            raise _refusal("triton", reason)
        return _in_torch(request, reason)
    if backend in ("auto", "native"):
        if torch.compiler.is_compiling():
            reason = operator.why_not(model)
            if reason is None:
                return operator.walk_in_graph(request)
        else:
            plan = native.plan_of(model, request.precision == "bfloat16")
            if not isinstance(plan, str):
                return _natively(request, plan)
            reason = plan
        if backend == "native":
            raise _refusal("native", reason)
        return _in_torch(request, reason)
    reason = _UNSUPPORTED[backend](model)
    if reason is not None:
        raise _refusal(backend, reason)
    return _tiled(request, backend)


def _by_members(request: Request, backend: Backend) -> Columns:
    """Walk with an ensemble, its members by the backend that would walk with each alone."""
    members = members_of(request.model)
    if backend in ("auto", "native", "triton"):
        on_gpu = backend == "triton" or (backend == "auto" and request.start.is_cuda)
        name: Backend = "triton" if on_gpu else "native"
        if torch.compiler.is_compiling():
            reason = "torch.compile traces the torch operations"
        elif on_gpu:
            reason = _first(_why_not_triton, members)
        else:
            plans = [native.plan_of(one, request.precision == "bfloat16") for one in members]
            reason = next((plan for plan in plans if isinstance(plan, str)), None)
        if reason is None:
            return grouped_walk(request, partial(walk, backend=name))
        if backend != "auto":
            raise _refusal(name, reason)
        return _in_torch(request, reason)
    reason = _first(_UNSUPPORTED[backend], members)
    if backend == "graph":
        reason = "the members of an ensemble walk different numbers of traces each time"
    if reason is not None:
        raise _refusal(backend, reason)
    return _tiled(request, backend)


def _first(
    unsupported: Callable[[BacktrackModel], str | None], models: Iterable[BacktrackModel]
) -> str | None:
    """Return the first reason why one of the models cannot be run, or None."""
    return next((why for why in map(unsupported, models) if why is not None), None)


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"backend={name!r} cannot run this model: {reason}.")


class _Seeds(threading.local):
    """A place for each thread to draw seeds to: a new tensor takes as long as the drawing."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.place = torch.zeros((), dtype=torch.int64, device="cpu")


_seeds = _Seeds()


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw the key of a native walk."""
    return int(_seeds.place.random_(generator=generator))


def _natively(request: Request, plan: native.Plan) -> Columns:
    return native.walk(
        plan,
        request.start,
        request.num_traces,
        request.num_steps,
        seed=0 if request.noise is not None else draw_seed(request.generator),
        noise=request.noise,
        last_visit=request.last_visit,
    )


# Models that the Triton kernel can run, until they change.
_suited: weakref.WeakKeyDictionary[BacktrackModel, Watch] = weakref.WeakKeyDictionary()


def _why_not_triton(model: BacktrackModel) -> str | None:
    """Say why the Triton kernel cannot run a model; looks again when the model has changed."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the torch operations"
    watch = _suited.get(model)
    if watch is None or not watch.sees_no_change():
        reason = triton_walk.unsupported(model)
        if reason is not None:
            return reason
        _suited[model] = Watch(model)
    return None


def _by_triton(request: Request) -> Columns:
    model, start = request.model, request.start
    # Asking whether a start is finite would wait for the device: such traces are masked.
    good = model.observation.are_states(start)
    start = torch.where(good.unsqueeze(-1), start, 0.0)
    if request.num_traces > 1:
        start = start.repeat_interleave(request.num_traces, 0)
        good = good.repeat_interleave(request.num_traces)
    seed = None
    if request.noise is None:
        # Stays on the device, where the kernel reads it.
        seed = torch.empty(1, dtype=torch.int64, device=start.device)
        seed.random_(generator=request.generator)
    # `last_visit` has no meaning for the continuous states that this kernel walks.
    precision = "float32" if request.precision == "bfloat16" else request.precision
    columns = triton_walk.triton_walk(
        model, start, request.num_steps, seed=seed, noise=request.noise, precision=precision
    )
    columns.mask.logical_and_(good.unsqueeze(-1))
    return columns


def _in_torch(request: Request, reason: str) -> Columns:
    """Walk with the quickest torch backend; `reason` is why not natively."""
    model = request.model
    members = members_of(model)
    is_ensemble = len(members) > 1
    rows = 2 * len(request.start) * request.num_traces * request.num_steps
    evaluations = sum(
        table.num_evaluations(one) for one in members if table.unsupported(one) is None
    )
    if is_ensemble and torch.compiler.is_compiling():
        name: Backend = "reference"  # the only one whose shapes do not depend on who walks
    elif 0 < evaluations <= rows:
        name = "table"
    else:
        slow = _first(eager.unsupported, members)
        traced = (
            is_ensemble
            or torch.compiler.is_compiling()
            or cuda_graph.unsupported(model) is not None
        )
        name = "reference" if slow is not None else "eager" if traced else "graph"
        reason = slow or reason
    # Float64 and other devices have these backends, and a GPU the tables; that is no news.
    expected = model.dtype != torch.float32 or model.device.type not in ("cpu", "cuda")
    expected |= model.device.type == "cuda" and name == "table"
    if not torch.compiler.is_compiling() and (name == "reference" or not expected):
        _warn_once(model, name, reason)
    return _tiled(request, name)


def _tiled(request: Request, name: Backend) -> Columns:
    model, kind = request.model, _KINDS[name]
    with torch.no_grad():
        if model.num_members == 1:
            step_back = kind(model)
        elif name == "reference":
            step_back = partial(reference_ensemble_walk, model)
        else:
            step_back = EnsembleWalk(model, kind)
    return tiled_walk(step_back, request)


_warned: weakref.WeakKeyDictionary[BacktrackModel, set[str]] = weakref.WeakKeyDictionary()
_warned_of_library = False


def _warn_once(model: BacktrackModel, name: str, reason: str) -> None:
    """Say once that walking is slower than it could be: for a model, or for the machine."""
    global _warned_of_library
    if interface.load()[1] == reason:
        if _warned_of_library:
            return
        _warned_of_library = True
    else:
        known = _warned.setdefault(model, set())
        if reason in known:
            return
        known.add(reason)
    warnings.warn(f"sample_traces falls back to the {name} backend: {reason}.", stacklevel=5)

"""`sample_traces`: checks at the door, one backend, one TensorDict at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor
from torch.compiler import is_compiling

from torchrl_recall.checks import check_at_least_one, check_choice, check_device, check_flag
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.heads import CategoricalHead
from torchrl_recall.traces.backends import Backend, draw_seed, walk
from torchrl_recall.traces.candidates import Support, walk_inside
from torchrl_recall.traces.columns import BadStart, Columns
from torchrl_recall.traces.native import recognised, remember, walk_sizes
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.request import PRECISIONS, Precision, Request

# Of the arguments of a call that may be recognised: steps, traces, last visits.
_PLAIN_TYPES = {(int, type(None), bool), (int, int, bool)}


def sample_traces(
    model: BacktrackModel,
    next_observation: Tensor | Mapping[NestedKey, Tensor] | TensorDict,
    *,
    num_steps: int,
    num_traces: int | None = None,
    last_visit: bool = False,
    generator: torch.Generator | None = None,
    noise: TraceNoise | None = None,
    backend: Backend = "auto",
    precision: Precision = "float32",
    support: Support | None = None,
    num_candidates: int = 4,
) -> TensorDict:
    """Sample recall traces: walk backwards from states, and return the walks as ordinary rollouts.

    Args:
        model (BacktrackModel): the model to walk with.
        next_observation (Tensor, TensorDict or mapping): where the traces end, ``[*B, *observation
            shape]``: one tensor (several continuous keys: concatenated), or one for each key.

    Keyword Args:
        num_steps (int): length ``T`` of the traces.
        num_traces (int, optional): number ``N`` of traces from each state.
        last_visit (bool): mask steps whose state is visited again later in the trace (discrete
            states, and lattices whose steps are exact numbers; continuous states do not come back).
        generator (torch.Generator, optional): source of randomness, on the model's device. None is
            torch's own.
        noise (TraceNoise, optional): the random numbers themselves, for ``n = prod(B) N`` traces.
        backend (str): ``"auto"`` takes the quickest that can run the model, see
            `torchrl_recall.traces.backends`: ``"native"`` (C, float32 on the CPU), ``"triton"``
            (float32 on a GPU, continuous), ``"table"`` (states that can be counted), ``"graph"``
            (the eager form on a GPU), ``"eager"`` (any stack of Linear layers) or ``"reference"``
            (readable). Given the same noise, all give the same numbers to rounding; from the same
            generator ``"native"`` and ``"triton"`` draw one stream, and the others another. Inside
            `torch.compile`, ``generator`` breaks the graph.
        precision (str): least precision of the networks' products: ``"bfloat16"`` (native, where
            the processor multiplies it, about 1 % of error), ``"tf32x3"`` (nearly float32),
            ``"tf32"`` and ``"float16"`` (triton). A backend without it stays with the model's.
        support (callable, optional): keeps traces inside the data: from flat states ``[n, size]``
            to ``[n]`` bool, such as `torchrl_recall.support.DataSupport`. At each step the first of
            ``num_candidates`` predecessors that is inside is taken; where none is the trace ends.
        num_candidates (int): predecessors drawn for each step, with ``support``.

    Returns:
        TensorDict: batch ``[*B, T]`` (``[*B, N, T]`` with ``num_traces``), oldest step first, the
        last step leading into ``next_observation``: the observation keys, the action,
        ``("next", observation)``, ``"action_log_prob"`` and ``"delta_log_prob"`` of the model, and
        ``("collector", "mask")``: bool, True = keep. A stop masks all earlier steps; masked steps
        hold finite values. The log-probabilities are the model's, whatever the ``support``; in an
        ensemble, those of the member that took the step.

    Raises:
        KeyError: an observation key is missing.
        TypeError: an argument of the wrong type.
        ValueError: empty or non-finite observations (on a GPU these give masked traces of zeros, as
            asking would wait for it), wrong shapes, dtypes or devices, lengths below 1, ``noise``
            beside ``support``, or a forced backend that cannot run the model.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel, sample_traces
        >>> model = BacktrackModel(3, 1, num_cells=(32, 32))
        >>> trace = sample_traces(model, torch.zeros(4, 3), num_steps=8)
        >>> trace.shape, trace["observation"].shape
        (torch.Size([4, 8]), torch.Size([4, 8, 3]))
        >>> bool((trace["next", "observation"][:, -1] == 0).all())
        True
    """
    if not isinstance(model, BacktrackModel):
        raise TypeError(f"model must be a BacktrackModel, got {type(model).__name__}.")
    key = None
    if (
        type(next_observation) is Tensor
        and noise is None
        and support is None
        and (generator is None or _is_on_cpu(generator))
        # By type: 1.0 and True would be found under 1.
        and (type(num_steps), type(num_traces), type(last_visit)) in _PLAIN_TYPES
        and type(backend) is type(precision) is str
        and not is_compiling()
    ):
        key = (
            next_observation.shape,
            next_observation.dtype,
            num_steps,
            num_traces,
            last_visit,
            backend,
            precision,
        )
        again = _again(model, next_observation, generator, precision, key)
        if again is not None:
            return again
    num_steps = check_at_least_one("num_steps", num_steps)
    if num_traces is not None:
        num_traces = check_at_least_one("num_traces", num_traces)
    # By way of __dict__: a module's own look-up costs as much as a tensor operation.
    codec: Any = model._modules["observation"]
    start = codec.flatten(next_observation, "next_observation", check_values=False)
    if start.numel() == 0:
        raise ValueError(f"next_observation is empty: shape {tuple(start.shape)}, expected rows.")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
        check_device("generator", generator.device, model.device)
    check_choice("precision", precision, PRECISIONS)
    *batch, size = start.shape
    rows = start if len(batch) == 1 else start.reshape(-1, size)
    repeats = 1 if num_traces is None else num_traces
    batch += (num_steps,) if num_traces is None else (num_traces, num_steps)
    if support is not None:
        num_candidates = check_at_least_one("num_candidates", num_candidates)
        if not callable(support):
            raise TypeError(f"support must be callable, got {type(support).__name__}.")
        if noise is not None:
            raise ValueError(
                "noise is for one predecessor a step, so it cannot be given beside support; pass a "
                "generator."
            )
    if noise is not None:
        _check_noise(model, noise, num_steps, len(rows) * repeats)
    # States of a Gaussian walk come back by rounding only, so there is nothing to compare.
    last_visit = check_flag("last_visit", last_visit) and isinstance(
        model._modules["delta_head"], CategoricalHead
    )
    request = Request(model, rows, repeats, num_steps, generator, noise, last_visit, precision)
    shape = torch.Size(batch)
    try:
        if support is None:
            columns = walk(request, backend)
        else:
            columns = walk_inside(request, backend, support, num_candidates)
    except BadStart:
        # Looks again, to say what is wrong.
        codec.flatten(next_observation, "next_observation")
        raise
    if key is not None and rows is next_observation and backend in ("auto", "native"):
        out = _tensordict(model, columns, shape)
        remember(request, shape, _IS_PLAIN and _is_plain(model, columns, out), key)
        return out
    return _tensordict(model, columns, shape)


def _is_on_cpu(generator: object) -> bool:
    return type(generator) is torch.Generator and generator.device.type == "cpu"


def _again(
    model: BacktrackModel,
    start: Tensor,
    generator: torch.Generator | None,
    precision: Precision,
    key: tuple,
) -> TensorDict | None:
    """Walk natively if an equal call has done so before, with the model as it was; else None."""
    found = recognised(model, precision == "bfloat16", key)
    if found is None or not start.is_cpu:
        return None
    plan, (sizes, last_visit, shape, is_plain) = found
    try:
        columns = walk_sizes(plan, start, sizes, draw_seed(generator), last_visit)
    except BadStart:
        model.observation.flatten(start, "next_observation")  # says what is wrong
        raise
    return (_plain if is_plain else _tensordict)(model, columns, shape)


def _check_noise(model: BacktrackModel, noise: TraceNoise, num_steps: int, rows: int) -> None:
    if not isinstance(noise, TraceNoise):
        raise TypeError(f"noise must be a TraceNoise, got {type(noise).__name__}.")
    expected = {
        "action": (num_steps, rows, model.action.head.noise_size),
        "delta": (num_steps, rows, model.delta_head.noise_size),
        "stop": (num_steps, rows) if model.has_stop else None,
        "member": None,
    }
    if model.num_members > 1:
        expected["member"] = (num_steps if model.member_per == "step" else 1, rows)
    for name, shape in expected.items():
        part = getattr(noise, name)
        if part is not None and not isinstance(part, Tensor):
            raise TypeError(f"noise.{name} must be a tensor, got {type(part).__name__}.")
        found = None if part is None else tuple(part.shape)
        if found != shape:
            raise ValueError(f"noise.{name} has shape {found}, expected {shape}.")
        if part is None:
            continue
        if part.dtype != model.dtype:
            raise ValueError(f"noise.{name} has dtype {part.dtype}, expected {model.dtype}.")
        check_device(f"noise.{name}", part.device, model.device)


def _tensordict(model: BacktrackModel, columns: Columns, shape: torch.Size) -> TensorDict:
    """Return the columns under the model's keys, in batch ``shape``."""
    codec: Any = model._modules["observation"]
    action: Any = model._modules["action"]
    if len(shape) != 2:
        columns = Columns(*(column.reshape(*shape, *column.shape[2:]) for column in columns))
    state, next_state, restored, action_log_prob, delta_log_prob, mask = columns
    following: dict[Any, Any] = codec.restore(next_state)
    data: dict[Any, Any] = codec.restore(state)
    restored = action.restore(restored)
    if isinstance(restored, list):
        data.update(zip(model.action_key, restored, strict=True))
    else:
        data[model.action_key] = restored
    data["action_log_prob"] = action_log_prob
    data["delta_log_prob"] = delta_log_prob
    device = mask.device
    flat = _quick if _IS_PLAIN and not is_compiling() else _flat
    nest = _nested if tuple in map(type, data) else flat
    data["next"] = nest(following, shape, device)
    data["collector"] = flat({"mask": mask}, shape, device)
    return nest(data, shape, device)


def _is_plain(model: BacktrackModel, columns: Columns, out: TensorDict) -> bool:
    """Return whether `_plain` would return the same."""
    keys: Any = [*model.observation.keys, model.action_key]
    columns_of_keys = columns.state, columns.action
    return [str, str] == [type(key) for key in keys] and all(
        out.get(key) is column for key, column in zip(keys, columns_of_keys, strict=True)
    )


def _plain(model: BacktrackModel, columns: Columns, shape: torch.Size) -> TensorDict:
    """Return the columns as they are."""
    codec: Any = model._modules["observation"]
    state, next_state, action, action_log_prob, delta_log_prob, mask = columns
    (key,), device = codec.keys, mask.device
    data = {
        key: state,
        model.action_key: action,
        "action_log_prob": action_log_prob,
        "delta_log_prob": delta_log_prob,
        "next": _quick({key: next_state}, shape, device),
        "collector": _quick({"mask": mask}, shape, device),
    }
    return _quick(data, shape, device)


def _nested(data: dict[Any, Any], shape: torch.Size, device: torch.device) -> TensorDict:
    """Return a TensorDict of keys some of which are tuples."""
    out = TensorDict({}, shape, device=device)
    for key, value in data.items():
        out.set(key, value)
    return out


def _flat(data: dict[Any, Any], shape: torch.Size, device: torch.device) -> TensorDict:
    """Return a TensorDict of entries known to fit: checks would take a fifth of a small walk."""
    out = TensorDict._new_unsafe(data, batch_size=shape)
    # The constructor takes as long again if the device is given to it.
    out._device = device
    return out


def _quick(data: dict[Any, Any], shape: torch.Size, device: torch.device) -> TensorDict:
    """Return the same, without the constructor."""
    out = _new(TensorDict)
    out._tensordict = data
    out._batch_size = shape
    out._device = device
    out._td_dim_names = None
    return out


_new = TensorDict.__new__
# Whether these are all that a TensorDict's own constructor sets, and as simple as they look.
_EMPTY = TensorDict._new_unsafe({}, batch_size=torch.Size([])).__dict__
_PLAIN = {
    "_tensordict": {},
    "_batch_size": torch.Size([]),
    "_device": None,
    "_td_dim_names": None,
}
_IS_PLAIN = _EMPTY == _PLAIN and type(_EMPTY["_tensordict"]) is dict

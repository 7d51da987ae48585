"""`sample_traces`: checks at the door, one tile after the other, one TensorDict at the end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor

from torchrl_recall.checks import check_at_least_one, check_device
from torchrl_recall.heads import CategoricalHead, SupportDelta
from torchrl_recall.model import BacktrackModel
from torchrl_recall.traces.eager import EagerWalk, unsupported
from torchrl_recall.traces.masks import last_visit as last_visit_mask
from torchrl_recall.traces.masks import since_start
from torchrl_recall.traces.noise import TraceNoise, draw_noise
from torchrl_recall.traces.walk import Walk, reference_walk

Backend = Literal["auto", "reference", "eager"]
# Rows whose activations stay in the cache through all steps.
TILE = 512


@torch.no_grad()
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
) -> TensorDict:
    """Sample recall traces: walk backwards from states, and return the walks as ordinary rollouts.

    Args:
        model (BacktrackModel): the model to walk with.
        next_observation (Tensor, TensorDict or mapping): where the traces end, ``[*B, *observation
            shape]``: one tensor (several continuous keys: concatenated), or one for each key.

    Keyword Args:
        num_steps (int): length ``T`` of the traces.
        num_traces (int, optional): number ``N`` of traces from each state.
        last_visit (bool): mask steps whose state is visited again later in the trace (exact for
            discrete states and lattices; continuous states never come back).
        generator (torch.Generator, optional): source of randomness, on the model's device. None is
            torch's own.
        noise (TraceNoise, optional): the random numbers themselves, for ``n = prod(B) N`` traces.
        backend (str): ``"auto"``, ``"eager"`` (tiled) or ``"reference"`` (readable). Same noise,
            same numbers.

    Returns:
        TensorDict: batch ``[*B, T]`` (``[*B, N, T]`` with ``num_traces``), oldest step first, the
        last step leading into ``next_observation``: the observation keys, the action,
        ``("next", observation)``, ``"action_log_prob"`` and ``"delta_log_prob"`` of the model, and
        ``("collector", "mask")``: bool, True = keep. A stop masks all earlier steps; masked steps
        hold finite values.

    Raises:
        KeyError: an observation key is missing.
        TypeError: an argument of the wrong type.
        ValueError: empty or non-finite observations, wrong shapes, dtypes or devices, lengths
            below 1, or a forced backend that cannot run the model.

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
    num_steps = check_at_least_one("num_steps", num_steps)
    if num_traces is not None:
        num_traces = check_at_least_one("num_traces", num_traces)
    start = model.observation.flatten(next_observation, "next_observation")
    if start.numel() == 0:
        raise ValueError(f"next_observation is empty: shape {tuple(start.shape)}, expected rows.")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
        check_device("generator", generator.device, model.device)
    walk = _backend(model, backend)

    batch = start.shape[:-1]
    if num_traces is not None:
        batch = torch.Size([*batch, num_traces])
        start = start.unsqueeze(-2).expand(*batch, -1)
    rows = start.reshape(-1, start.shape[-1])
    if noise is not None:
        _check_noise(model, noise, num_steps, len(rows))
    columns = _Columns(model, num_steps, len(rows), last_visit)
    for low in range(0, len(rows), TILE):
        tile = rows[low : low + TILE]
        if noise is None:
            tile_noise = draw_noise(model, num_steps, len(tile), generator)
        else:
            stop = None if noise.stop is None else noise.stop[:, low : low + TILE]
            tile_noise = TraceNoise(
                noise.action[:, low : low + TILE], noise.delta[:, low : low + TILE], stop
            )
        columns.write(low, walk(tile, tile_noise))
    return columns.tensordict(batch)


def _backend(model: BacktrackModel, backend: str) -> Callable[[Tensor, TraceNoise], Walk]:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}.")
    if backend == "reference":
        return partial(reference_walk, model)
    reason = unsupported(model)
    if reason is None:
        return EagerWalk(model)
    if backend == "eager":
        raise ValueError(f"backend='eager' cannot run this model: {reason}.")
    warnings.warn(f"sample_traces falls back to the reference backend: {reason}.", stacklevel=4)
    return partial(reference_walk, model)


def _check_noise(model: BacktrackModel, noise: TraceNoise, num_steps: int, rows: int) -> None:
    if not isinstance(noise, TraceNoise):
        raise TypeError(f"noise must be a TraceNoise, got {type(noise).__name__}.")
    expected = {
        "action": (num_steps, rows, model.action.head.noise_size),
        "delta": (num_steps, rows, model.delta_head.noise_size),
        "stop": (num_steps, rows) if model.has_stop else None,
    }
    for name, shape in expected.items():
        part = getattr(noise, name)
        found = None if part is None else tuple(part.shape)
        if found != shape:
            raise ValueError(f"noise.{name} has shape {found}, expected {shape}.")


class _Columns:
    """The outputs, batch first, filled tile by tile."""

    def __init__(self, model: BacktrackModel, num_steps: int, rows: int, last_visit: bool) -> None:
        self.model = model
        dtype, device, size = model.dtype, model.device, model.observation.size
        self.is_discrete = model.observation.is_discrete
        # States of a Gaussian walk never come back exactly, so there is nothing to compare.
        self.last_visit = last_visit and isinstance(model.delta_head, CategoricalHead)
        state_dtype = torch.int64 if self.is_discrete else dtype
        self.state = torch.empty(rows, num_steps, size, dtype=state_dtype, device=device)
        self.next_state = torch.empty_like(self.state)
        if isinstance(model.action.head, CategoricalHead):
            self.action = torch.empty(rows, num_steps, dtype=torch.int64, device=device)
        else:
            width = model.action.head.size
            self.action = torch.empty(rows, num_steps, width, dtype=dtype, device=device)
        self.action_log_prob = torch.empty(rows, num_steps, dtype=dtype, device=device)
        self.delta_log_prob = torch.empty_like(self.action_log_prob)
        self.mask = torch.ones(rows, num_steps, dtype=torch.bool, device=device)

    def write(self, low: int, walk: Walk) -> None:
        """Copy a tile into its rows."""
        rows = slice(low, low + walk.states.shape[1])
        walk = self._finite(walk)
        self.state[rows] = walk.states[:-1].transpose(0, 1)
        self.next_state[rows] = walk.states[1:].transpose(0, 1)
        self.action[rows] = walk.actions.transpose(0, 1)
        self.action_log_prob[rows] = walk.action_log_prob.t()
        self.delta_log_prob[rows] = walk.delta_log_prob.t()
        if walk.alive is not None:
            self.mask[rows] = walk.alive.t()
        if isinstance(self.model.delta_head, SupportDelta):
            dead = self.model.delta_head.dead_end(walk.states[1:])
            if dead is not None:
                self.mask[rows] &= since_start(~dead).t()
        if self.last_visit:
            self.mask[rows] &= last_visit_mask(walk.states.transpose(0, 1))

    def _finite(self, walk: Walk) -> Walk:
        """Mask what has left the numbers, and all before; put the walk's start in its place."""
        # Sums are enough to tell that all is well. A state that is not finite stays so on the way
        # back, but an action can overflow first.
        columns = (walk.states[0], walk.actions, walk.action_log_prob, walk.delta_log_prob)
        total = sum(float(x.sum()) for x in columns) if walk.states.is_cpu else math.nan
        if math.isfinite(total):
            return walk
        kept = torch.isfinite(walk.states[:-1]).all(-1)
        kept &= torch.isfinite(walk.action_log_prob) & torch.isfinite(walk.delta_log_prob)
        actions = walk.actions
        zero = walk.action_log_prob.new_zeros(())
        if actions.is_floating_point():
            kept &= torch.isfinite(actions).all(-1)
        if walk.states.is_cpu and not bool(kept[-1].any()):
            raise ValueError(
                "model gives NaN or infinite numbers for every step back from finite states; "
                "expected finite parameters and statistics, and states of the data's own size."
            )
        kept = since_start(kept)
        if actions.is_floating_point():
            actions = torch.where(kept.unsqueeze(-1), actions, zero)
        alive = kept if walk.alive is None else walk.alive & kept
        start = walk.states[-1:]
        return Walk(
            torch.cat([torch.where(kept.unsqueeze(-1), walk.states[:-1], start), start]),
            actions,
            torch.where(kept, walk.action_log_prob, zero),
            torch.where(kept, walk.delta_log_prob, zero),
            alive,
        )

    def tensordict(self, batch: torch.Size) -> TensorDict:
        """Return the outputs under the model's keys."""
        shape = torch.Size([*batch, self.mask.shape[-1]])
        codec, action = self.model.observation, self.model.action

        def unflatten(value: Tensor) -> Tensor:
            return value.reshape(*shape, *value.shape[2:])

        data = {
            self.model.action_key: action.restore(unflatten(self.action)),
            "action_log_prob": unflatten(self.action_log_prob),
            "delta_log_prob": unflatten(self.delta_log_prob),
            ("collector", "mask"): unflatten(self.mask),
        }
        data.update(codec.restore(unflatten(self.state)))
        following = codec.restore(unflatten(self.next_state))
        out = TensorDict({}, shape, device=self.mask.device)
        for key, value in data.items():
            out.set(key, value)
        for key, value in following.items():
            out.set(("next", *key) if isinstance(key, tuple) else ("next", key), value)
        return out

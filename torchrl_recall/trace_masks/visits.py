"""Keep the last visit of a place, where states are continuous and never come back exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_recall.checks import check_real
from torchrl_recall.state_reading import as_keys, check_positive, to_cells, trace_states
from torchrl_recall.trace_masks.mask import Scale, StateScale, require_floating
from torchrl_recall.traces.masks import last_visit


class LastVisitCells:
    """Keep a step only if its state's cell is left for the last time.

    Last visit (`torchrl_recall.traces.masks.last_visit`) by bins of the state space: of several
    steps in a row in one cell only the one that leaves it counts.

    Args:
        cell_size (float, Tensor or callable): edge of a cell, in the unit of the states, one for
            all coordinates or ``[D]``; or a function from flat states ``[*B, T + 1, D]`` to cells,
            integers ``[*B, T + 1]`` or ``[*B, T + 1, K]``.

    Keyword Args:
        in_keys (NestedKey or list of NestedKey): the observations, in the order of concatenation (a
            tuple is one nested key). Leave out what is no place, such as velocities.

    Raises:
        TypeError: neither numbers nor callable.
        ValueError: sizes that are not positive, or no keys.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> walk = torch.tensor([[0.1], [0.3], [0.6], [0.2], [1.1]])
        >>> trace = TensorDict({"observation": walk[:-1], "next": {"observation": walk[1:]}}, [4])
        >>> LastVisitCells(0.5)(trace)
        tensor([False, False,  True,  True])
    """

    def __init__(
        self,
        cell_size: float | Tensor | Callable[[Tensor], Tensor],
        *,
        in_keys: NestedKey | Sequence[NestedKey] = "observation",
    ) -> None:
        self.to_cells = cell_size if callable(cell_size) else None
        self.cell_size = None if callable(cell_size) else check_positive("cell_size", cell_size)
        self.in_keys = as_keys("in_keys", in_keys)

    @torch.no_grad()
    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return which steps to keep, ``[*B, T]``, of traces ``[*B, T]``.

        Raises:
            KeyError: a key is not in the trace.
            TypeError: cells that are no integers.
            ValueError: not one cell for each state.
        """
        states = trace_states(trace, self.in_keys)
        if self.to_cells is None:
            return last_visit(to_cells(states, self.cell_size))
        cells = self.to_cells(states)
        if not isinstance(cells, Tensor) or cells.is_floating_point():
            kind = getattr(cells, "dtype", type(cells).__name__)
            raise TypeError(f"cell_size gave {kind}, expected a tensor of integers.")
        if cells.shape[: states.ndim - 1] != states.shape[:-1]:
            raise ValueError(
                f"cell_size gave shape {tuple(cells.shape)}, expected "
                f"{tuple(states.shape[:-1])} or one dimension more."
            )
        return last_visit(cells.reshape(*states.shape[:-1], -1))


class LastVisitRadius:
    """Keep a step only if no later state is within a radius of its state.

    As `LastVisitCells`, without a grid. With ``against="kept"`` later steps count that are
    themselves kept by this rule, and the end: walking backwards, a step is kept once the walk is
    new ground, and slow walks are thinned to steps ``radius`` apart. With ``"all"`` every later
    state counts: a walk whose steps are shorter than the radius then keeps nothing.

    Args:
        radius (float): Euclidean, in units of ``scale``; 0 is exact last visit.

    Keyword Args:
        scale (float, Tensor or BacktrackModel): what coordinates are divided by; a model's running
            standard deviation is read anew at each call.
        against (str): ``"kept"`` or ``"all"``.
        in_keys (NestedKey or list of NestedKey): the observations, in the order of concatenation (a
            tuple is one nested key).

    Raises:
        TypeError: arguments of the wrong type, or at the first call, discrete states.
        ValueError: a negative radius, a scale that is not positive, an unknown rule or no keys.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> walk = torch.tensor([[0.0], [0.2], [0.4], [0.6], [0.8]])
        >>> trace = TensorDict({"observation": walk[:-1], "next": {"observation": walk[1:]}}, [4])
        >>> LastVisitRadius(0.3)(trace)
        tensor([ True, False,  True, False])
        >>> LastVisitRadius(0.3, against="all")(trace).any()
        tensor(False)
    """

    def __init__(
        self,
        radius: float,
        *,
        scale: Scale = 1.0,
        against: Literal["kept", "all"] = "kept",
        in_keys: NestedKey | Sequence[NestedKey] = "observation",
    ) -> None:
        self.radius = check_real("radius", radius, 0.0)
        self.scale = StateScale(scale)
        if against not in ("kept", "all"):
            raise ValueError(f"against must be 'kept' or 'all', got {against!r}.")
        self.against = against
        self.in_keys = as_keys("in_keys", in_keys)

    @torch.no_grad()
    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return which steps to keep, ``[*B, T]``, of traces ``[*B, T]``.

        Raises:
            KeyError: a key is not in the trace.
            TypeError: discrete states.
        """
        states = require_floating("LastVisitRadius", trace_states(trace, self.in_keys))
        states = states / self.scale(states)
        kept = torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
        # One step after the other, so that the memory grows with T and not with its square.
        for t in reversed(range(states.shape[-2] - 1)):
            apart = (states[..., t + 1 :, :] - states[..., t : t + 1, :]).square().sum(-1)
            far = apart > self.radius**2
            if self.against == "kept":
                far |= ~kept[..., t + 1 :]
            kept[..., t] = far.all(-1)
        return kept[..., :-1]

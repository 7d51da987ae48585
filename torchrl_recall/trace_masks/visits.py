"""Keep the last visit of a place, where states are continuous and never come back exactly.

A place is a cell or a ball around a state. ``keep="visit"`` keeps all steps of the last visit;
``"exit"`` only the one that leaves, as exact last visit does. Places larger than a step want the
first: where only exits are imitated, a state near a border is only ever seen crossing it. (Four
rooms of 7 x 7 cells in bins of 2 x 2: expected steps after imitating exits infinite, last visits
30, every visit 135, single cells' exits 18.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_recall.checks import check_choice, check_keys, check_real
from torchrl_recall.state_reading import check_positive, to_cells, trace_states
from torchrl_recall.trace_masks.mask import Scale, StateScale, require_floating
from torchrl_recall.traces.masks import last_visit

Keep = Literal["visit", "exit"]


class LastVisitCells:
    """Keep a step only if the walk does not come back into its state's cell.

    Last visit (`torchrl_recall.traces.masks.last_visit`) by bins of the state space. What the walk
    does in the cell that it ends in, after entering it for the last time, is part of a last visit.

    Args:
        cell_size (float, Tensor or callable): edge of a cell, in the unit of the states, one for
            all coordinates or ``[D]``; or a function from flat states ``[*B, T + 1, D]`` to cells,
            integers ``[*B, T + 1]`` or ``[*B, T + 1, K]``.

    Keyword Args:
        keep (str): ``"visit"``, all steps of the last visit, or ``"exit"``, the one that leaves.
        in_keys (NestedKey or list of NestedKey): the observations, in the order of concatenation (a
            tuple is one nested key). Leave out what is no place, such as velocities.

    Raises:
        TypeError: neither numbers nor callable.
        ValueError: sizes that are not positive, an unknown rule or no keys.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> walk = torch.tensor([[0.1], [0.3], [0.6], [0.2], [1.1]])
        >>> trace = TensorDict({"observation": walk[:-1], "next": {"observation": walk[1:]}}, [4])
        >>> LastVisitCells(0.5)(trace)
        tensor([False, False,  True,  True])
        >>> LastVisitCells(0.7)(trace), LastVisitCells(0.7, keep="exit")(trace)
        (tensor([True, True, True, True]), tensor([False, False, False,  True]))
    """

    def __init__(
        self,
        cell_size: float | Tensor | Callable[[Tensor], Tensor],
        *,
        keep: Keep = "visit",
        in_keys: NestedKey | Sequence[NestedKey] = "observation",
    ) -> None:
        self.to_cells: Callable[[Tensor], Tensor] | None = (
            cell_size if callable(cell_size) else None
        )
        self.cell_size: Tensor | None = (
            None if callable(cell_size) else check_positive("cell_size", cell_size)
        )
        self.keep: Keep = check_choice("keep", keep, Keep)
        self.in_keys: list[NestedKey] = check_keys("in_keys", in_keys)

    @torch.no_grad()
    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return which steps to keep, ``[*B, T]``, of traces ``[*B, T]``.

        Raises:
            KeyError: a key is not in the trace.
            TypeError: cells that are no integers.
            ValueError: not one cell for each state.
        """
        states = trace_states(trace, self.in_keys)
        cells = self._cells(states)
        exits = last_visit(cells)
        if self.keep == "exit":
            return exits
        stays = (cells[..., 1:, :] == cells[..., :-1, :]).all(-1)
        # Backwards from the end, whose visit is a last one: a stay is kept as what follows it is.
        kept, follows = torch.empty_like(exits), torch.ones_like(exits[..., 0])
        for t in reversed(range(exits.shape[-1])):
            follows = torch.where(stays[..., t], follows, exits[..., t])
            kept[..., t] = follows
        return kept

    def _cells(self, states: Tensor) -> Tensor:
        if self.to_cells is None:
            return to_cells(states, self.cell_size)
        cells = self.to_cells(states)
        if not isinstance(cells, Tensor) or cells.is_floating_point():
            kind = getattr(cells, "dtype", type(cells).__name__)
            raise TypeError(f"cell_size gave {kind}, expected a tensor of integers.")
        if cells.shape[: states.ndim - 1] != states.shape[:-1]:
            raise ValueError(
                f"cell_size gave shape {tuple(cells.shape)}, expected "
                f"{tuple(states.shape[:-1])} or one dimension more."
            )
        return cells.reshape(*states.shape[:-1], -1)


class LastVisitRadius:
    """Keep a step only if the walk does not come back to within a radius of its state.

    As `LastVisitCells`, without a grid. With ``keep="visit"`` a step is left out only if the walk
    goes beyond the radius and later comes back within it; with ``"exit"`` if any later state is
    within the radius: a walk whose steps are shorter than the radius then keeps nothing.

    Args:
        radius (float): Euclidean, in units of ``scale``; with ``keep="exit"``, 0 is exact last
            visit.

    Keyword Args:
        scale (float, Tensor or BacktrackModel): what coordinates are divided by; a model's running
            standard deviation is read anew at each call.
        keep (str): ``"visit"`` or ``"exit"``.
        in_keys (NestedKey or list of NestedKey): the observations, in the order of concatenation (a
            tuple is one nested key).

    Raises:
        TypeError: arguments of the wrong type, or at the first call, discrete states.
        ValueError: a negative radius, a scale that is not positive, an unknown rule or no keys.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> walk = torch.tensor([[0.0], [0.2], [0.4], [0.6], [0.2], [0.8]])
        >>> trace = TensorDict({"observation": walk[:-1], "next": {"observation": walk[1:]}}, [5])
        >>> LastVisitRadius(0.3)(trace), LastVisitRadius(0.3, keep="exit")(trace)
        (tensor([False, False,  True, False,  True]), tensor([False, False, False, False,  True]))
    """

    def __init__(
        self,
        radius: float,
        *,
        scale: Scale = 1.0,
        keep: Keep = "visit",
        in_keys: NestedKey | Sequence[NestedKey] = "observation",
    ) -> None:
        self.radius: float = check_real("radius", radius, 0.0)
        self.scale: StateScale = StateScale(scale)
        self.keep: Keep = check_choice("keep", keep, Keep)
        self.in_keys: list[NestedKey] = check_keys("in_keys", in_keys)

    @torch.no_grad()
    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return which steps to keep, ``[*B, T]``, of traces ``[*B, T]``.

        Raises:
            KeyError: a key is not in the trace.
            TypeError: discrete states.
        """
        states = require_floating("LastVisitRadius", trace_states(trace, self.in_keys))
        states = states / self.scale(states)
        kept = torch.empty(trace.shape, dtype=torch.bool, device=states.device)
        # One step after the other, so that the memory grows with T and not with its square.
        for t in range(trace.shape[-1]):
            apart = (states[..., t + 1 :, :] - states[..., t : t + 1, :]).square().sum(-1)
            far = apart > self.radius**2
            # In a visit, what has not been beyond the radius yet is no return.
            back = ~far if self.keep == "exit" else ~far & (far.cumsum(-1) > 0)
            kept[..., t] = ~back.any(-1)
        return kept

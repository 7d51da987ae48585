"""Where the data are: whether a continuous state is near ones that were really visited.

For traces: `BacktrackTransform(support=...)` redraws predecessors until one is inside, the mask
`InSupport` cuts a trace where it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_recall.checks import check_at_least_one, check_keys, check_real
from torchrl_recall.generators import carry_generator, own_generator, unpack_generator
from torchrl_recall.model import BacktrackModel
from torchrl_recall.state_reading import (
    check_positive,
    check_state_size,
    finite_rows,
    read_states,
    stored_data,
)

# Distances computed at a time, which bounds the memory.
MAX_DISTANCES = 4_000_000
# Of squared distances between normalised states in float64.
ROUNDING = 1e-12
# Smallest scale, in the unit of the data, as in `RunningNormalizer`.
FLOOR = 1e-4

Keys = BacktrackModel | NestedKey | Sequence[NestedKey]


class _References(NamedTuple):
    """What `DataSupport` knows, in float64; replaced as a whole: sampling threads look at it."""

    states: Tensor  # [n, D], normalised
    mean: Tensor
    std: Tensor
    threshold: Tensor


class DataSupport:
    """Says whether a continuous state is about as near to the data as the data are to each other.

    A state is inside if the distance to its ``num_neighbours``-th neighbour among the references is
    at most ``factor`` times the ``quantile`` of the same distance among the references themselves
    (each without itself). Distances are Euclidean after division by the references' standard
    deviation. Where states repeat so often that this quantile is zero, each counts once; if there
    is only one, it alone is inside. For data on a lattice `CellSupport` is the better choice.

    Args:
        observation (BacktrackModel, NestedKey or list of NestedKey): the model whose observation
            keys to read, or the keys themselves (a tuple is one nested key).

    Keyword Args:
        num_references (int): states drawn from the data by `fit`, without replacement.
        num_neighbours (int): which neighbour's distance counts; larger ones forgive outliers less.
        quantile (float): in [0, 1].
        factor (float): above 0.
        cell_size (float, optional): draw references evenly over where the data have been instead of
            as often as they were there: one from each cell of this edge, in standard deviations,
            before ``num_references`` of them are drawn. Data of a learner crowd around its start,
            and what is rare, such as a frontier, would seldom be among the references. Each `fit`
            then reads all of its data: of a large buffer give it a part, each place as often.
        generator (torch.Generator, optional): draws the references, on the CPU. By default an own
            one, seeded from torch's.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, or a model of discrete observations.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> support = DataSupport("observation", num_references=256)
        >>> data = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> support.fit(TensorDict({"observation": data}, [1000]))(
        ...     torch.tensor([[0.5, 0.5], [2.0, 0.5]]))
        tensor([ True, False])
    """

    def __init__(
        self,
        observation: Keys = "observation",
        *,
        num_references: int = 2048,
        num_neighbours: int = 1,
        quantile: float = 0.95,
        factor: float = 1.5,
        cell_size: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(observation, BacktrackModel):
            if observation.observation.is_discrete:
                raise ValueError("observation is discrete, expected a continuous one; CellSupport.")
            observation = observation.observation_keys
        self.keys: list[NestedKey] = check_keys("observation", observation)
        self.num_references: int = check_at_least_one("num_references", num_references)
        self.num_neighbours: int = check_at_least_one("num_neighbours", num_neighbours)
        self.quantile: float = check_real("quantile", quantile, 0.0, 1.0)
        self.factor: float = float(check_positive("factor", factor))
        if cell_size is not None:
            cell_size = float(check_positive("cell_size", cell_size))
        self.cell_size: float | None = cell_size
        self.generator: torch.Generator = own_generator(generator)
        self._known: _References | None = None

    @torch.no_grad()
    def fit(self, data: Any) -> DataSupport:
        """Draw references from real data and measure how near to each other they are.

        Args:
            data (TensorDictBase, Storage or ReplayBuffer): real data of any batch shape; of a
                buffer all that is stored, past its transforms. Rows masked at ``("collector",
                "mask")`` and rows that are not finite do not count.

        Returns:
            DataSupport: itself.

        Raises:
            KeyError: a key is missing.
            TypeError: none of these kinds of data.
            ValueError: states that are not floating-point, or fewer than ``num_neighbours + 1`` of
                them, or of cells they lie in.
        """
        number = None if self.cell_size is not None else self.num_references
        states = _kept_rows(data, self.keys, number, self.generator)
        if not states.is_floating_point():
            raise ValueError(
                f"{self.keys} hold {states.dtype}, expected floating-point states; CellSupport is "
                "for discrete ones."
            )
        if len(states) <= self.num_neighbours:
            raise ValueError(
                f"data has {len(states)} finite states, expected more than num_neighbours="
                f"{self.num_neighbours}."
            )
        if self.cell_size is not None:
            # In random order already: the first of a cell is a fair draw, as are the first cells.
            spread = states.double().std(0, correction=0).clamp_min(FLOOR)
            first = _first_of_cells(states.double() / spread / self.cell_size)
            states = states[first[: max(self.num_references, self.num_neighbours + 1)]]
            if len(states) <= self.num_neighbours:
                raise ValueError(
                    f"data lie in {len(states)} cell(s) of cell_size="
                    f"{self.cell_size}, expected more than num_neighbours={self.num_neighbours}."
                )
        states = states.double()
        std, mean = torch.std_mean(states, 0, correction=0)
        std = std.clamp_min(FLOOR)
        states = (states - mean) / std
        near = self._own_quantile(states)
        if near.square() <= ROUNDING * (1 + states.square().sum(-1).amax()):
            # Repeats do not tell how near to each other states are, only those that differ do.
            states = states.unique(dim=0)
            near = self._own_quantile(states)
        self._known = _References(states, mean, std, self.factor * near)
        return self

    def _own_quantile(self, states: Tensor) -> Tensor:
        """Return the quantile of the references' distances to their own neighbours; alone, 0."""
        if len(states) == 1:
            return states.new_zeros(())
        near = self._squared_distance(states, states, leave_one_out=True).sqrt()
        return torch.quantile(near, self.quantile)

    @property
    def threshold(self) -> Tensor:
        """Largest distance to the neighbour that is inside, in normalised units."""
        return self._fitted().threshold

    @property
    def std(self) -> Tensor:
        """The references' standard deviation, ``[D]``."""
        return self._fitted().std

    @torch.no_grad()
    def __call__(self, state: Tensor | TensorDictBase) -> Tensor:
        """Say which states are inside.

        Args:
            state (Tensor or TensorDictBase): flat states ``[*B, D]``, or data ``[*B]`` with the
                keys.

        Returns:
            Tensor: ``[*B]`` bool; False for what is not finite.

        Raises:
            RuntimeError: not fitted yet.
            ValueError: states of another size than the data's.
        """
        state = read_states(state, self.keys) if isinstance(state, TensorDictBase) else state
        fitted = known = self._fitted()
        check_state_size(state, known.mean.shape[0])
        if known.states.device != state.device:
            known = _References(*(part.to(state.device) for part in fitted))
            if self._known is fitted:  # and not fitted anew by another thread
                self._known = known
        rows = ((state.double() - known.mean) / known.std).reshape(-1, state.shape[-1])
        inside = self._squared_distance(rows, known.states) <= known.threshold.square() + ROUNDING
        return inside.reshape(state.shape[:-1])

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was fitted, if anything was, and the state of the generator."""
        fitted = {} if self._known is None else self._known._asdict()
        state = {name: part.clone() for name, part in fitted.items()}
        return {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; the settings are the constructor's.

        Args:
            state_dict (dict): what `state_dict` returned.
        """
        self.generator.set_state(state_dict["generator"].cpu())
        parts = {name: state_dict.get(name) for name in _References._fields}
        given = {name: part.clone() for name, part in parts.items() if part is not None}
        if given and len(given) < len(parts):
            raise KeyError(f"state_dict lacks {sorted(parts.keys() - given.keys())}.")
        self._known = _References(**given) if given else None

    def __getstate__(self) -> dict[str, Any]:
        return carry_generator(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(unpack_generator(state))

    def _fitted(self) -> _References:
        if self._known is None:
            raise RuntimeError("this DataSupport has seen no data; call fit(buffer) first.")
        return self._known

    def _squared_distance(
        self, rows: Tensor, references: Tensor, *, leave_one_out: bool = False
    ) -> Tensor:
        """Return the squared distance of each row to its neighbour, ``[n]``, piece by piece."""
        found, piece = [], max(1, MAX_DISTANCES // len(references))
        squares, across = references.square().sum(-1), references.t()
        for start in range(0, len(rows), piece):
            part = rows[start : start + piece]
            # Ten times as quick as the differences, and in float64 nothing that counts cancels.
            distance = torch.addmm(squares, part, across, alpha=-2)
            if leave_one_out:
                distance.diagonal(start).fill_(torch.inf)
            near = self._kth(distance) + part.square().sum(-1)
            found.append(near.clamp_min(0))
        return torch.cat(found) if found else rows.new_zeros(0)

    def _kth(self, distance: Tensor) -> Tensor:
        # Of references that repeat only different ones are kept, at times too few.
        k = min(self.num_neighbours, max(1, distance.shape[1] - 1))
        if k == 1:
            return distance.amin(1)
        return distance.topk(k, largest=False).values[:, -1]


def _first_of_cells(scaled: Tensor) -> Tensor:
    """Return the row of each cell's first state, in order; ``scaled`` is ``[n, D]`` in cells."""
    cells = scaled.floor().long()
    _, which = cells.unique(dim=0, return_inverse=True)
    first = torch.full((int(which.max()) + 1,), len(cells), device=cells.device)
    rows = torch.arange(len(cells), device=cells.device)
    return first.scatter_reduce(0, which, rows, "amin").sort().values


def _kept_rows(
    data: Any, keys: list[NestedKey], number: int | None, generator: torch.Generator
) -> Tensor:
    """Draw states ``[n, D]``, n <= number, among those that are finite and no padding."""
    source = stored_data(data).select(*keys, ("collector", "mask"), strict=False)
    shape = source.shape
    index = torch.randperm(shape.numel(), generator=generator)
    number = shape.numel() if number is None else number
    found: list[Tensor] = []
    missing = number
    # One draw is enough unless there are gaps.
    for part in index.split(max(number, 1)):
        place = torch.unravel_index(part, shape)
        rows = source[tuple(coordinate.to(source.device or "cpu") for coordinate in place)]
        states = read_states(rows, keys)
        found.append(states[finite_rows(rows, states)][:missing])
        missing -= len(found[-1])
        if missing == 0:
            break
    return torch.cat(found)

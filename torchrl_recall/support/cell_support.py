"""Where the data are, by cells: whether a discrete state, or a binned one, was visited.

For traces, as `DataSupport` is: `BacktrackTransform(support=...)` and the mask `InSupport`.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_recall.checks import check_keys
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.observation import ObservationCodec
from torchrl_recall.state_reading import (
    check_positive,
    check_state_size,
    finite_rows,
    read_states,
    stored_data,
    to_cells,
)
from torchrl_recall.support.data_support import Keys

# Rows of a storage read at a time.
CHUNK = 65_536
# Countable states up to this many are a table of bools, others are hashed.
MAX_TABLE = 2**24


class CellSupport:
    """Says whether a state's cell was visited in the data: for discrete states, or binned ones.

    Discrete states that can be counted are kept as a table of bools; others, and cells of
    continuous states, as sorted 64-bit hashes, where one wrong answer in 1e13 is to be expected at
    a million cells.

    Args:
        observation (BacktrackModel, NestedKey or list of NestedKey): the model whose observations
            to read, or the keys (a tuple is one nested key). One-hot observations need the model.

    Keyword Args:
        cell_size (float or Tensor, optional): edge of a cell, in the unit of the states, one for
            all coordinates or ``[D]``. Needed for continuous states.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: sizes that are not positive, or missing for a continuous model.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> support = CellSupport("observation", cell_size=0.5)
        >>> _ = support.fit(TensorDict({"observation": torch.tensor([[0.1], [0.7]])}, [2]))
        >>> support(torch.tensor([[0.4], [0.99], [1.01]]))
        tensor([ True,  True, False])
    """

    def __init__(
        self, observation: Keys = "observation", *, cell_size: float | Tensor | None = None
    ) -> None:
        self.codec: ObservationCodec | None = None
        if isinstance(observation, BacktrackModel):
            codec = observation.observation
            if codec.is_discrete:
                self.codec = codec
            elif cell_size is None:
                raise ValueError("cell_size is needed for continuous observations, got None.")
            observation = observation.observation_keys
        self.keys = check_keys("observation", observation)
        self.cell_size: Tensor | None = (
            None if cell_size is None else check_positive("cell_size", cell_size)
        )
        codec = self.codec
        countable = codec is not None and cell_size is None and codec.num_states <= MAX_TABLE
        self.is_table = countable
        # A table of bools, or sorted hashes; replaced as a whole.
        self._visited: Tensor | None = None
        self._size = None if codec is None else codec.size

    def fit(self, data: Any) -> CellSupport:
        """Replace what was visited by real data; arguments and refusals of `extend`.

        Args:
            data (TensorDictBase, Storage or ReplayBuffer): as for `extend`.

        Returns:
            CellSupport: itself.
        """
        return self._add(data, None)

    def extend(self, data: Any) -> CellSupport:
        """Add the states of real data.

        Args:
            data (TensorDictBase, Storage or ReplayBuffer): as for `DataSupport.fit`.

        Returns:
            CellSupport: itself.

        Raises:
            KeyError: a key is missing.
            TypeError: none of these kinds of data.
            ValueError: states that do not exist, or floating-point ones without ``cell_size``.
        """
        return self._add(data, self._visited)

    @torch.no_grad()
    def __call__(self, state: Tensor | TensorDictBase) -> Tensor:
        """Say which states are in visited cells.

        Args:
            state (Tensor or TensorDictBase): flat states ``[*B, D]`` (of a discrete model: its
                coordinates), or data ``[*B]`` with the keys.

        Returns:
            Tensor: ``[*B]`` bool; False for what is not finite.

        Raises:
            RuntimeError: nothing visited yet.
            ValueError: states of another size than the data's.
        """
        state = self._read(state) if isinstance(state, TensorDictBase) else state
        visited = self._visited
        if visited is None or self._size is None:
            raise RuntimeError("this CellSupport has seen no data; call fit(buffer) first.")
        check_state_size(state, self._size)
        if visited.device != state.device:
            self._visited = visited = visited.to(state.device)
        if self.is_table:
            assert self.codec is not None
            known = self.codec.are_states(state)
            code = self._code(torch.where(known.unsqueeze(-1), state, torch.zeros_like(state)))
            return visited[code] & known
        code = self._code(state)
        place = torch.searchsorted(visited, code).clamp_max(len(visited) - 1)
        return (visited[place] == code) & torch.isfinite(state).all(-1)

    def state_dict(self) -> dict[str, Any]:
        """Return what was visited."""
        visited = self._visited
        return {"visited": None if visited is None else visited.clone(), "size": self._size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the settings are the constructor's.

        Args:
            state_dict (dict): what `state_dict` returned.
        """
        visited, self._size = state_dict["visited"], state_dict["size"]
        self._visited = None if visited is None else visited.clone()

    def _read(self, data: TensorDictBase) -> Tensor:
        return read_states(data, self.keys) if self.codec is None else self.codec.read(data)

    def _code(self, state: Tensor) -> Tensor:
        """Return one int64 for each state ``[*B, D]``."""
        if self.is_table:
            assert self.codec is not None
            return self.codec.joint_index(state)
        if self.cell_size is None and state.is_floating_point():
            raise ValueError(f"{self.keys} hold {state.dtype}; cell_size is needed for those.")
        cells = to_cells(state, self.cell_size)
        if cells.is_floating_point():
            cells = cells.nan_to_num(0.0).clamp(-(2.0**62), 2.0**62)
        code = torch.zeros_like(cells[..., 0], dtype=torch.int64)
        for cell in cells.long().unbind(-1):
            # An odd factor and a shift (of the bits, not of the sign) lose nothing of one cell.
            code = (code ^ cell) * -7046029254386353131
            code = code ^ ((code >> 29) & (2**35 - 1))
        return code

    @torch.no_grad()
    def _add(self, data: Any, visited: Tensor | None) -> CellSupport:
        source = stored_data(data).select(*self.keys, ("collector", "mask"), strict=False)
        for start in range(0, len(source), CHUNK):
            part = source[start : start + CHUNK]
            mask = part.get(("collector", "mask"), default=None)
            if mask is not None:
                # Padding need not be valid.
                part = part[mask.reshape(part.shape).bool()]
            if part.shape.numel() == 0:
                continue
            states = self._read(part)
            if self._size is None:
                self._size = states.shape[-1]
            check_state_size(states, self._size)
            visited = self._joined(visited, self._code(states[finite_rows(part, states)]))
        self._visited = visited
        return self

    def _joined(self, visited: Tensor | None, code: Tensor) -> Tensor | None:
        if not self.is_table:
            known = code if visited is None else torch.cat([visited.to(code.device), code])
            return known.unique() if len(known) else None
        assert self.codec is not None
        if visited is None:
            table = torch.zeros(self.codec.num_states, dtype=torch.bool, device=code.device)
        else:
            # A copy: a sampling thread may look at the old one.
            table = visited.to(code.device, copy=True)
        table[code] = True
        return table

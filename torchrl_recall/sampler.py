"""The replay-buffer sampler that picks transitions of high value, where traces shall start.

First station of the data's way: replay buffer -> `ValuePrioritizedSampler` -> BacktrackTransform.
How values become probabilities is in `priorities/`, how TorchRL's arguments become values in
`priorities/arguments.py`; `values.py` computes values from a value network.
"""

from __future__ import annotations

import json
import math
import warnings
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import torch
from tensordict import MemoryMappedTensor
from torch import Tensor
from torch.nn.functional import pad
from torchrl.data import PrioritizedSampler

from torchrl_recall.checks import check_at_least_one
from torchrl_recall.priorities.arguments import (
    REDUCTIONS,
    flat_index,
    paired_values,
    selected_values,
)
from torchrl_recall.priorities.weights import DrawTable, checked_parameter, value_weights

# "No value yet"; exact in float32, through which TorchRL passes `default_priority`.
_NO_VALUE = torch.finfo(torch.float32).min
_DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
_VERSION = 1


def _parameter(name: str, doc: str) -> Any:
    def fget(self: ValuePrioritizedSampler) -> Any:
        return self._parameters[name]

    def fset(self: ValuePrioritizedSampler, value: Any) -> None:
        self._parameters[name] = checked_parameter(name, value)
        self._changes += 1

    return property(fget, fset, doc=doc)


class ValuePrioritizedSampler(PrioritizedSampler):
    r"""Draw stored transitions by value, so that traces start where the return is high.

    Goyal et al. 2019, "Recall Traces" (https://arxiv.org/abs/1804.00379), roll the backtracking
    model out from high-value states; this sampler finds them. An entry has a value :math:`V_i` of
    any sign, or has *no value yet*, or was given a non-finite one and is never drawn. With
    :math:`n` the number of stored entries that may be drawn, entry :math:`i` has a probability
    proportional to

    - ``"top"``: 1 for the best :math:`k = \max(1, \lceil \text{top} \cdot n \rceil)`, else 0.
      Where :math:`m` entries tie at the threshold, and :math:`a` are above it, each of the
      :math:`m` has weight :math:`(k - a) / m`.
    - ``"soft"``: :math:`\exp(V_i / \text{temperature})`.
    - ``"rank"``: :math:`1 / \text{rank}_i^\alpha`, where the largest value has rank 1; ties share
      the mean over their ranks.
    - ``"per"``: :math:`(|V_i| + \text{eps})^\alpha`, TorchRL's prioritized replay. The only mode
      in which a larger value may be less likely.

    "No value yet" counts as :math:`-\infty`, and in ``"per"`` as :math:`|V_i| = 0`; while nothing
    has a value, the draw is uniform. With ``min_value``, only entries of at least this value are
    drawn (:math:`k` and the ranks stay those of all); if none reaches it, it is ignored, and
    BacktrackTransform can mask such starts.

    It is a `PrioritizedSampler` for TorchRL's priority paths, such as
    ``TensorDictReplayBuffer(priority_key=...)``, but needs neither sum trees nor TorchRL's
    extension. The first draw after a change takes one pass over all values (O(n), ``"rank"``
    O(n log n)); further ones take a binary search.

    Args:
        max_capacity: number of entries, that of the storage. With a larger storage, it grows.
        alpha: exponent of ``"rank"`` and ``"per"``, at least 0.
        beta: ``info["priority_weight"]`` is :math:`(w_i / \min_j w_j)^{-\beta}` over the entries of
            positive weight :math:`w`. The default 0 gives ones: to prefer high values is a choice,
            not a bias to undo.
        mode: ``"top"``, ``"soft"``, ``"rank"`` or ``"per"``.
        top: fraction that ``"top"`` keeps, in (0, 1].
        temperature: of ``"soft"``, positive.
        min_value: least value to draw, or None.
        eps: positive, for ``"per"``.
        dtype: of the stored values, ``torch.float32`` or ``torch.float64``.
        reduction: ``"max"``, ``"min"``, ``"mean"`` or ``"median"``, the value of a stored
            trajectory from those of its steps.
        device: where the values live. None: a CUDA storage's device, else the CPU.

    ``mode``, ``top``, ``temperature``, ``min_value``, ``alpha``, ``beta`` and ``eps`` can be set at
    any time, also by TorchRL's parameter schedulers.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if an argument is of the wrong type.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> sampler = ValuePrioritizedSampler(100, top=0.02)
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(100), sampler=sampler, priority_key="value", batch_size=64
        ... )
        >>> index = buffer.extend(TensorDict({"value": torch.arange(-100.0, 0.0)}, [100]))
        >>> buffer.sample()["value"].unique()
        tensor([-2., -1.])
        >>> sampler.refresh(torch.arange(100.0).flip(0))  # all values anew
        >>> buffer.sample()["index"].unique()
        tensor([0, 1])
    """

    mode = _parameter("mode", 'How values become probabilities: "top", "soft", "rank" or "per".')
    top = _parameter("top", 'Fraction of the entries that the mode "top" keeps.')
    temperature = _parameter("temperature", 'Temperature of the mode "soft".')
    min_value = _parameter("min_value", "Least value to draw, or None.")
    alpha = _parameter("alpha", 'Exponent of "rank" and "per".')  # pyright: ignore
    beta = _parameter("beta", "Exponent of the importance weights.")  # pyright: ignore
    eps = _parameter("eps", 'Added to the absolute value in the mode "per".')

    def __init__(
        self,
        max_capacity: int,
        alpha: float = 1.0,
        beta: float = 0.0,
        *,
        mode: str = "top",
        top: float = 0.1,
        temperature: float = 1.0,
        min_value: float | None = None,
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
        reduction: str = "max",
        device: torch.device | str | None = None,
    ) -> None:
        # PrioritizedSampler.__init__ would build the trees of TorchRL's extension.
        super(PrioritizedSampler, self).__init__()
        if dtype not in _DTYPES.values():
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        given = {"mode": mode, "top": top, "temperature": temperature, "min_value": min_value}
        given |= {"alpha": alpha, "beta": beta, "eps": eps}
        self._parameters = {name: checked_parameter(name, value) for name, value in given.items()}
        self._max_capacity = check_at_least_one("max_capacity", max_capacity)
        self.dtype = dtype
        self.reduction = reduction
        self._device = None if device is None else torch.device(device)
        self._warned = False
        self._changes = 0
        self._cache: tuple[int, DrawTable] | None = None
        self._init()

    def _init(self) -> None:
        device = self._values.device if hasattr(self, "_values") else self._device
        self._values = torch.full((self._max_capacity,), _NO_VALUE, dtype=self.dtype, device=device)
        self._changes += 1

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in self._parameters.items())
        return f"{type(self).__name__}(max_capacity={self._max_capacity}, {parameters})"

    @property
    def device(self) -> torch.device:
        """Where the values live."""
        return self._values.device

    @property
    def default_priority(self) -> float:
        """The number that stands for "no value yet", the lowest of float32."""
        return _NO_VALUE

    @property
    def values(self) -> Tensor:
        """A copy of the values, ``[max_size]``; ``-inf``: no value yet, NaN: never drawn."""
        return _as_minus_infinity(self._values)

    def sample(self, storage: Any, batch_size: int) -> Any:
        """Draw indices of stored entries, with replacement.

        Args:
            storage: the storage drawn from.
            batch_size: number of draws.

        Returns:
            A pair: the indices, ``[batch_size]`` int64, or a tuple of such for a storage of several
            dimensions; and ``{"priority_weight": weights}``, ``[batch_size]`` float32.

        Raises:
            RuntimeError: if the storage is empty, or all values in it are non-finite.
        """
        if len(storage) == 0:
            raise RuntimeError("Cannot sample from an empty storage.")
        self._maybe_init_from_storage(storage)
        table = self._current_table(len(storage))
        generator = self._rng
        uniform = torch.rand(
            batch_size,
            dtype=torch.float64,
            generator=generator,
            device=self.device if generator is None else generator.device,
        ).to(self.device)
        index, importance = table.draw(uniform, self.beta)
        if storage.ndim > 1:
            index = torch.unravel_index(index, storage.shape)
        return index, {"priority_weight": importance}

    def _current_table(self, size: int) -> DrawTable:
        # Counted before the values are read: a write that comes in between makes this table stale.
        changes = self._changes
        if self._cache is not None and self._cache[0] == changes and self._cache[1].size == size:
            return self._cache[1]
        # What a larger storage holds beyond the capacity has no value yet.
        values = pad(self._values[:size], (0, max(0, size - self._max_capacity)), value=_NO_VALUE)
        parameters = {name: value for name, value in self._parameters.items() if name != "beta"}
        table = DrawTable.of(value_weights(_as_minus_infinity(values), **parameters))
        if not table.entry.numel():
            raise RuntimeError(
                f"All {size} stored entries were given non-finite values, so none can be drawn; "
                "check what computes them, and set finite ones with update_priority or refresh."
            )
        self._cache = (changes, table)
        return table

    def add(self, index: Any) -> None:
        """Do nothing: `mark_update` has been told of the new entry."""

    def extend(self, index: Any) -> None:
        """Do nothing: `mark_update` has been told of the new entries."""

    def mark_update(self, index: Any, *, storage: Any = None) -> None:
        """Take back the values of entries that have been overwritten: they have no value yet.

        Args:
            index: as for `update_priority`.
            storage: as for `update_priority`.
        """
        self._maybe_init_from_storage(storage)
        flat = flat_index(index, storage, self.device)
        self._make_room(flat, storage)
        self._write(flat, self._values.new_full(flat.shape, _NO_VALUE))

    @torch.no_grad()
    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Set the values of some entries; TorchRL calls this when data with a priority key come in.

        Args:
            index: an int, a tensor ``[N]``, or for a storage of several dimensions ``[N, ndim]`` or
                a tuple of one tensor for each. Negative ones are skipped. If an index comes several
                times, any of its values may win (if no other index comes: their reduction).
            priority: values of any sign: one number for all, or ``[N, ...]``, where the reduction
                takes further dimensions. The default priority changes nothing. Non-finite
                values bar their entries from being drawn.
            storage: what the indices belong to; needed if it has several dimensions.

        Raises:
            TypeError: if ``index`` does not hold integers.
            ValueError: if ``priority`` does not fit ``index``, or ``index`` the storage.
            IndexError: if an index is beyond both the storage and ``max_capacity``.
        """
        self._maybe_init_from_storage(storage)
        flat = flat_index(index, storage, self.device)
        self._make_room(flat, storage)
        flat, values = paired_values(priority, flat, self.reduction)
        # TorchRL fills in the default where data carry no priority: that must not erase values.
        given = values != _NO_VALUE
        self._write(flat[given], values[given])

    @torch.no_grad()
    def refresh(self, values: Tensor, index: Tensor | None = None) -> None:
        """Set all values, or those at ``index``, at once, as after a critic's update.

        Args:
            values: ``[n]`` or ``[n, 1]``. Without ``index`` those of the storage's first ``n``
                entries, flattened if it has several dimensions. Non-finite ones are never drawn.
            index: which entries of the flattened storage, ``[n]`` integers, or a bool mask
                ``[<= max_capacity]`` that is True ``n`` times. If an index comes several times,
                any of its values may win.

        Raises:
            TypeError: if ``index`` holds neither integers nor bools.
            ValueError: if a shape does not fit.
            IndexError: if an index is out of range.
        """
        self._write(*selected_values(values, index, self._max_capacity, self.device))

    def _write(self, flat: Tensor, values: Tensor) -> None:
        """Store values at flat indices, negative ones skipped; report the first non-finite ones."""
        keep = flat >= 0
        values = values[keep].to(self._values)
        bad = ~values.isfinite()
        self._values[flat[keep]] = values.masked_fill(bad, math.nan)
        self._changes += 1
        # The data are stored already and must not be lost over a bad value: warn last.
        if not self._warned and bool(bad.any()):
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} got {int(bad.sum())} value(s) that are not finite in "
                f"{self.dtype}; their entries are not drawn until they get finite ones. "
                "This is said once per sampler.",
                UserWarning,
                stacklevel=4,
            )

    def _make_room(self, flat: Tensor, storage: Any) -> None:
        """Grow, up to the size of the storage, until there is a place for each index."""
        needed = int(flat.max()) + 1 if flat.numel() else 0
        if needed <= self._max_capacity:
            return
        room = 0 if storage is None else max(len(storage), storage.max_size)
        if needed > room:
            raise IndexError(
                f"index must be below {max(room, self._max_capacity)}, got {needed - 1}"
            )
        size = max(needed, min(room, 2 * self._max_capacity))
        more = self._values.new_full((size - self._max_capacity,), _NO_VALUE)
        self._values, self._max_capacity = torch.cat([self._values, more]), size

    def _maybe_init_from_storage(self, storage: Any) -> None:
        """Follow a CUDA storage to its device, unless a device was asked for."""
        device = getattr(storage, "device", None)
        if self._device is None and device not in (None, "auto"):
            device = torch.device(device)
            if device.type == "cuda" and self.device.type != "cuda":
                self._values = self._values.to(device)
                self._changes += 1

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the values and parameters, as tensors and Python scalars."""
        return {"_schema_version": _VERSION, "_values": self._values.clone(), **self._parameters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in this sampler's dtype and on its device.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if the version is unknown or an entry is out of its range.
        """
        names = ("_schema_version", "_values", *self._parameters)
        missing = [name for name in names if name not in state_dict]
        if missing:
            raise KeyError(f"state_dict lacks {missing}; is it from a ValuePrioritizedSampler?")
        if state_dict["_schema_version"] != _VERSION:
            raise ValueError(
                f"_schema_version must be {_VERSION}, got {state_dict['_schema_version']!r}"
            )
        self._parameters = {
            name: checked_parameter(name, state_dict[name]) for name in self._parameters
        }
        values = state_dict["_values"].detach().to(self._values)
        self._max_capacity = max(self._max_capacity, values.numel())
        self._init()
        # A float64 value may be too large for float32.
        self._values[: values.numel()] = values.masked_fill(values.isinf(), math.nan)

    def dumps(self, path: Any) -> None:  # pyright: ignore
        """Write the state into the folder ``path``: a memory-mapped tensor and a JSON file."""
        folder = Path(path).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        values = state.pop("_values").cpu()
        MemoryMappedTensor.from_tensor(values, filename=folder / "values.memmap", existsok=True)
        state |= {"capacity": values.numel(), "dtype": str(values.dtype)}
        (folder / "sampler_metadata.json").write_text(json.dumps(state))

    def loads(self, path: Any) -> None:  # pyright: ignore
        """Restore what `dumps` wrote."""
        folder = Path(path).absolute()
        state = json.loads((folder / "sampler_metadata.json").read_text())
        values = MemoryMappedTensor.from_filename(
            folder / "values.memmap",
            _DTYPES[state.pop("dtype")],
            torch.Size([state.pop("capacity")]),
        )
        self.load_state_dict({**state, "_values": values})

    def __getstate__(self) -> Any:
        if get_spawning_popen() is not None:
            raise RuntimeError(
                f"A {type(self).__name__} cannot be sent to another process: values set in one "
                "would not reach the other. Keep it with the learner; give workers a RandomSampler."
            )
        return {**self.__dict__, "_rng": None, "_cache": None}


def _as_minus_infinity(values: Tensor) -> Tensor:
    """Return a copy in which "no value yet" is ``-inf``."""
    return values.masked_fill(values == _NO_VALUE, -math.inf)

"""The replay-buffer sampler that picks transitions of high value, where traces shall start.

First station of the data's way: replay buffer -> `ValuePrioritizedSampler` -> BacktrackTransform. How values become
probabilities is in `value_weights.py`; `values.py` computes values from a value network.
"""

from __future__ import annotations

import json
import math
import numbers
import operator
import warnings
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import MemoryMappedTensor
from torch import Tensor
from torch.nn.functional import pad
from torchrl.data import PrioritizedSampler

from .priority_arguments import REDUCTIONS, flat_index, integer_tensor, paired_values
from .value_weights import checked_parameter, value_weights

# "No value yet". TorchRL passes `default_priority` through float32, which represents this number exactly.
_NO_VALUE = torch.finfo(torch.float32).min
_DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
_SCHEMA_VERSION = 1


def _parameter(name: str, doc: str) -> Any:
    def fget(self: ValuePrioritizedSampler) -> Any:
        return self._parameters[name]

    def fset(self: ValuePrioritizedSampler, value: Any) -> None:
        self._parameters[name] = checked_parameter(name, value)
        self._dirty = True

    return property(fget, fset, doc=doc)


class _Table(NamedTuple):
    """What a draw needs: the entries of positive weight among the first ``size``, and their cumulative weights."""

    size: int
    index: Tensor
    weight: Tensor
    cumulative: Tensor


class ValuePrioritizedSampler(PrioritizedSampler):
    r"""Draw stored transitions by value, so that traces start where the return is high.

    Goyal et al. 2019, "Recall Traces" (https://arxiv.org/abs/1804.00379), roll the backtracking model out from
    high-value states; this sampler finds them. An entry has a value :math:`V_i` (any sign), has *no value yet*, or had
    a non-finite one, which bars it from being drawn. With :math:`n` the number of stored entries that may be drawn, the
    probability of entry :math:`i` is proportional to

    - ``"top"``: 1 for the best :math:`k = \max(1, \lceil \text{top} \cdot n \rceil)`, else 0. Where :math:`m` entries
      tie at the threshold and :math:`a` are above it, each of the :math:`m` has weight :math:`(k - a) / m`.
    - ``"soft"``: :math:`\exp(V_i / \text{temperature})`.
    - ``"rank"``: :math:`1 / \text{rank}_i^\alpha`, where the largest value has rank 1; ties share the mean over their
      ranks.
    - ``"per"``: :math:`(|V_i| + \text{eps})^\alpha`, TorchRL's prioritized replay. The only mode in which a larger
      value may be less likely.

    "No value yet" counts as :math:`-\infty` (in ``"per"`` as :math:`|V_i| = 0`); while nothing has a value, the draw is
    uniform. With ``min_value``, only entries of at least this value are drawn (:math:`k` and the ranks stay those of
    all); if none reaches it, it is ignored, and `BacktrackTransform` can mask such starts.

    It is a `PrioritizedSampler` so that TorchRL's priority paths work, ``TensorDictReplayBuffer(priority_key=...)``
    among them, but needs neither sum trees nor TorchRL's extension. One pass over all values follows each change of
    them (O(n), for ``"rank"`` O(n log n)); a draw between changes costs a binary search.

    Args:
        max_capacity: number of entries, that of the storage. If the storage turns out larger, the sampler grows.
        alpha: exponent of ``"rank"`` and ``"per"``, at least 0.
        beta: ``info["priority_weight"]`` is :math:`(w_i / \min_j w_j)^{-\beta}` over the entries of positive weight
            :math:`w`. The default 0 gives ones: preferring high values is a choice, not a bias to undo.
        mode: ``"top"``, ``"soft"``, ``"rank"`` or ``"per"``.
        top: fraction kept by ``"top"``, in (0, 1].
        temperature: of ``"soft"``, positive.
        min_value: least value to draw, or None.
        eps: positive, for ``"per"``.
        dtype: of the stored values, ``torch.float32`` or ``torch.float64``.
        reduction: ``"max"``, ``"min"``, ``"mean"`` or ``"median"``: one value from those of a stored trajectory.
        device: where the values live. None: with a CUDA storage on its device, else on the CPU.

    ``mode``, ``top``, ``temperature``, ``min_value``, ``alpha``, ``beta`` and ``eps`` can be set at any time, also by
    TorchRL's parameter schedulers.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if an argument is of the wrong type.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> sampler = ValuePrioritizedSampler(100, top=0.02)
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(100), sampler=sampler, priority_key="value", batch_size=32
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
    alpha = _parameter("alpha", 'Exponent of the modes "rank" and "per".')
    beta = _parameter("beta", "Exponent of the importance weights.")
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
        if isinstance(max_capacity, bool) or not isinstance(max_capacity, numbers.Integral):
            raise TypeError(f"max_capacity must be an int, got {max_capacity!r}")
        if max_capacity < 1:
            raise ValueError(f"max_capacity must be at least 1, got {max_capacity}")
        if dtype not in _DTYPES.values():
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        given = {"mode": mode, "top": top, "temperature": temperature, "min_value": min_value}
        given |= {"alpha": alpha, "beta": beta, "eps": eps}
        self._parameters = {name: checked_parameter(name, value) for name, value in given.items()}
        self._max_capacity = operator.index(max_capacity)
        self.dtype = dtype
        self.reduction = reduction
        self._device = None if device is None else torch.device(device)
        self._warned = False
        self._init()

    def _init(self) -> None:
        device = self._values.device if hasattr(self, "_values") else self._device
        self._values = torch.full((self._max_capacity,), _NO_VALUE, dtype=self.dtype, device=device)
        self._table: _Table | None = None
        self._dirty = True

    def _empty(self) -> None:
        self._init()

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in self._parameters.items())
        return f"{type(self).__name__}(max_capacity={self._max_capacity}, {parameters})"

    @property
    def max_size(self) -> int:
        """Number of entries there is room for."""
        return self._max_capacity

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
        """A copy of the values, ``[max_size]``: ``-inf`` is "no value yet", NaN is "never drawn"."""
        return _as_minus_infinity(self._values)

    # Drawing

    def sample(self, storage: Any, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Draw indices of stored entries, with replacement.

        Args:
            storage: the storage drawn from.
            batch_size: number of draws.

        Returns:
            The indices, ``[batch_size]`` int64 (a tuple of such, one for each dimension, if the storage has several),
            and ``{"priority_weight": [batch_size] float32}``.

        Raises:
            RuntimeError: if the storage is empty, or no stored entry has a finite value or none yet.
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
        cumulative = table.cumulative
        position = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        position.clamp_(max=cumulative.numel() - 1)
        index = table.index[position]
        importance = torch.ones_like(uniform)
        if self.beta > 0:
            importance = (table.weight[position] / table.weight.min()) ** -self.beta
        if storage.ndim > 1:
            index = torch.unravel_index(index, storage.shape)
        return index, {"priority_weight": importance.float()}

    def _current_table(self, size: int) -> _Table:
        table = self._table
        if table is not None and table.size == size and not self._dirty:
            return table
        # Cleared before the values are read: a write that comes in between sets it again.
        self._dirty = False
        # A larger storage may have been attached: what lies beyond the capacity has no value yet.
        values = pad(self._values[:size], (0, max(0, size - self._max_capacity)), value=_NO_VALUE)
        parameters = {name: value for name, value in self._parameters.items() if name != "beta"}
        weights = value_weights(_as_minus_infinity(values), **parameters)
        # Entries of weight 0 are left out, so that no rounding can draw one.
        index = weights.nonzero().squeeze(1)
        if not index.numel():
            raise RuntimeError(
                f"Nothing can be drawn: all {size} stored entries had non-finite values. Check the value network, "
                "then give finite values by update_priority or refresh."
            )
        weight = weights[index]
        self._table = table = _Table(size, index, weight, weight.cumsum(0))
        return table

    # Writing

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
            index: an int, a tensor ``[N]``, or for a storage of several dimensions ``[N, ndim]`` or a tuple of one
                tensor for each. Negative ones are skipped. If an index comes several times, any of
                its values may win (if only one index comes, several times: their reduction).
            priority: values of any sign, one number for all, or ``[N, ...]``, where `reduction` reduces further
                dimensions. The default priority means "no value yet"; non-finite ones are never drawn.
            storage: the storage the indices belong to; needed if it has several dimensions.

        Raises:
            ValueError: if ``priority`` does not fit ``index``, or ``index`` has a shape that does not fit the storage.
            IndexError: if an index is beyond both the storage and ``max_capacity``.
        """
        self._maybe_init_from_storage(storage)
        flat = flat_index(index, storage, self.device)
        self._make_room(flat, storage)
        self._write(*paired_values(priority, flat, self.reduction))

    @torch.no_grad()
    def refresh(self, values: Tensor, index: Tensor | None = None) -> None:
        """Set all values, or those at ``index``, at once, as after a critic's update.

        Args:
            values: ``[n]`` or ``[n, 1]``; without ``index`` those of the first ``n`` entries of the storage (flattened,
                if it has several dimensions). Non-finite ones are never drawn.
            index: which entries, flat; int64 ``[n]``, or a bool mask of at most ``max_capacity`` with ``n`` times True.

        Raises:
            ValueError: if a shape does not fit.
            IndexError: if an index is out of range.
            TypeError: if ``index`` holds neither integers nor bools.
        """
        values = torch.as_tensor(values, device=self.device).detach()
        if values.ndim == 2 and values.shape[1] == 1:
            values = values.squeeze(1)
        if values.ndim != 1:
            raise ValueError(f"values must have shape [n] or [n, 1], got {tuple(values.shape)}")
        n = values.numel()
        if index is None:
            if n > self._max_capacity:
                raise ValueError(f"values must hold at most {self._max_capacity} numbers, got {n}")
            self._write(torch.arange(n, device=self.device), values)
            return
        index = torch.as_tensor(index, device=self.device)
        if index.dtype == torch.bool and index.ndim == 1:
            index = index.nonzero().squeeze(1)
        index = integer_tensor(index, self.device)
        if index.shape != values.shape:
            raise ValueError(
                f"index must select as many entries as there are values ({n}), got shape {tuple(index.shape)}"
            )
        if n and (int(index.min()) < 0 or int(index.max()) >= self._max_capacity):
            raise IndexError(f"index must be within [0, {self._max_capacity}), got {index}")
        self._write(index, values)

    def _write(self, flat: Tensor, values: Tensor) -> None:
        """Store values at flat indices, skipping negative ones; then report the first non-finite values."""
        keep = flat >= 0
        values = values[keep].to(self._values)
        bad = ~values.isfinite()
        self._values[flat[keep]] = values.masked_fill(bad, math.nan)
        self._dirty = True
        # The data are stored already, so a bad value must not fail the write: warn when all is done.
        if not self._warned and bool(bad.any()):
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} got {int(bad.sum())} value(s) that are not finite in {self.dtype}. Their "
                "entries are not drawn until they get a finite value. Further ones are not reported.",
                UserWarning,
                stacklevel=3,
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
            if device.type == "cuda" and device != self.device:
                self._values = self._values.to(device)
                self._dirty = True

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the values and parameters, as tensors and Python scalars."""
        return {
            "_schema_version": _SCHEMA_VERSION,
            "_values": self._values.clone(),
            **self._parameters,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. The sampler keeps its dtype and device, and grows if need be.

        Load after the replay buffer has been built: a buffer built on a filled storage resets all values.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if the version is unknown or an entry is out of its range.
        """
        names = ("_schema_version", "_values", *self._parameters)
        missing = [name for name in names if name not in state_dict]
        if missing:
            raise KeyError(f"state_dict lacks {missing}; is it from a ValuePrioritizedSampler?")
        if state_dict["_schema_version"] != _SCHEMA_VERSION:
            raise ValueError(
                f"state_dict must have _schema_version {_SCHEMA_VERSION}, got {state_dict['_schema_version']!r}"
            )
        self._parameters = {
            name: checked_parameter(name, state_dict[name]) for name in self._parameters
        }
        values = state_dict["_values"].detach().to(self._values)
        self._max_capacity = max(self._max_capacity, values.numel())
        self._init()
        # A float64 value may be too large for float32.
        self._values[: values.numel()] = values.masked_fill(values.isinf(), math.nan)

    def dumps(self, path: Any) -> None:
        """Write the state into the folder ``path``, made if missing: a memory-mapped tensor and a JSON file."""
        folder = Path(path).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        values = state.pop("_values").cpu()
        MemoryMappedTensor.from_tensor(values, filename=folder / "values.memmap", existsok=True)
        state |= {"capacity": values.numel(), "dtype": str(values.dtype)}
        (folder / "sampler_metadata.json").write_text(json.dumps(state))

    def loads(self, path: Any) -> None:
        """Restore what `dumps` wrote."""
        folder = Path(path).absolute()
        state = json.loads((folder / "sampler_metadata.json").read_text())
        values = MemoryMappedTensor.from_filename(
            folder / "values.memmap",
            _DTYPES[state.pop("dtype")],
            torch.Size([state.pop("capacity")]),
        )
        self.load_state_dict({**state, "_values": values})

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            raise RuntimeError(
                f"A {type(self).__name__} cannot be sent to another process: values set in one would not reach the "
                "other. Keep it in the learner's buffer, and give workers a buffer with a RandomSampler."
            )
        return {**self.__dict__, "_rng": None, "_table": None}


def _as_minus_infinity(values: Tensor) -> Tensor:
    """Return a copy in which "no value yet" is ``-inf``."""
    return values.masked_fill(values == _NO_VALUE, -math.inf)

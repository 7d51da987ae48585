"""The replay-buffer sampler that picks transitions of high value, where traces shall start.

First station of the data's way: replay buffer -> `ValuePrioritizedSampler` -> BacktrackTransform.
How values become probabilities and draws is in `priorities/`, which also reads TorchRL's arguments;
`values.py` and `refresh.py` compute values from a value network.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data.replay_buffers.samplers import Sampler

from torchrl_recall.checks import (
    check_at_least_one,
    check_choice,
    check_key,
    check_size,
    usable_device,
)
from torchrl_recall.priorities.arguments import (
    flat_index,
    is_plain,
    paired_values,
    selected_values,
    stored_entry,
)
from torchrl_recall.priorities.trajectories import REDUCTIONS
from torchrl_recall.priorities.trajectory_draws import TrajectoryDraws
from torchrl_recall.priorities.weights import Parameters, checked_parameter
from torchrl_recall.sampler_state import (
    DTYPES,
    NO_VALUE,
    SavedSampler,
    backend_on,
    checked_parameters,
)


def _parameter(name: str, doc: str) -> Any:
    def fget(self: ValuePrioritizedSampler) -> Any:
        return getattr(self._parameters, name)

    def fset(self: ValuePrioritizedSampler, value: Any) -> None:
        checked = checked_parameter(name, value)
        with self._lock:  # or another thread's change of another parameter may get lost
            self._parameters = self._parameters._replace(**{name: checked})

    return property(fget, fset, doc=doc)


class ValuePrioritizedSampler(SavedSampler):
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
    drawn (:math:`k` and the ranks stay those of all); if none reaches it, it is ignored;
    ``min_value`` of BacktrackTransform masks such starts.

    It is a `PrioritizedSampler` for TorchRL's priority paths, such as
    ``TensorDictReplayBuffer(priority_key=...)``, but needs neither sum trees nor TorchRL's
    extension. In the C library draws take O(batch), and so do small updates, unless they change
    what all weights refer to, as a new largest value does in ``"soft"``. That, a change of
    parameters, `refresh`, and with ``beta > 0`` the first draw after an update take O(n), at about
    the speed of memory; ``"rank"`` sorts. All methods may be called from several threads.

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
        eps: positive, for ``"per"``. Less than 1e-38 counts as that much beside float32 values.
        dtype: of the stored values, ``torch.float32`` or ``torch.float64``.
        reduction: ``"max"``, ``"min"``, ``"mean"``, ``"median"`` or ``"first"``: the value of a
            trajectory from those of its steps, where trajectories are stored as entries, or with
            ``trajectory_key``.
        uniform_share: share of draws, in [0, 1], that are uniform over all that may be drawn (with
            ``trajectory_key`` over trajectories).
        trajectory_key: where the storage holds the trajectory of each step, an integer, such as
            ``("collector", "traj_ids")``. The mode then draws a trajectory, by the value that
            ``reduction`` gives it (with returns-to-go and ``"first"``: its return), and a step of
            it evenly. None draws steps.
        device: where the values live. None: a CUDA storage's device, else the CPU.

    ``mode``, ``top``, ``temperature``, ``min_value``, ``alpha``, ``beta``, ``eps`` and
    ``uniform_share`` can be set at any time, also by TorchRL's parameter schedulers.

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

    mode: Any = _parameter("mode", 'What weighs values, "top", "soft", "rank" or "per".')
    top: Any = _parameter("top", 'Fraction of the entries that the mode "top" keeps.')
    temperature: Any = _parameter("temperature", 'Temperature of the mode "soft".')
    min_value: Any = _parameter("min_value", "Least value to draw, or None.")
    alpha: Any = _parameter("alpha", 'Exponent of "rank" and "per".')  # pyright: ignore
    eps: Any = _parameter("eps", 'Added to the absolute value in the mode "per".')
    uniform_share: Any = _parameter("uniform_share", "Share of draws that are uniform.")

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
        uniform_share: float = 0.0,
        trajectory_key: NestedKey | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        # PrioritizedSampler.__init__ would build the trees of TorchRL's extension.
        Sampler.__init__(self)
        if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        given = Parameters(mode, top, temperature, min_value, alpha, eps, uniform_share)
        self._parameters = checked_parameters(given._asdict())
        self.beta = beta
        self._max_capacity = check_at_least_one("max_capacity", max_capacity)
        self.dtype = dtype
        self.reduction: Any = check_choice("reduction", reduction, REDUCTIONS)
        if trajectory_key is not None:
            trajectory_key = check_key("trajectory_key", trajectory_key)
        self.trajectory_key = trajectory_key
        self._device = usable_device("device", device)
        if self._device is not None and self._device.type == "meta":
            raise ValueError("device must hold numbers, got meta")
        self._warned = False
        self._lock = threading.RLock()
        self._init()

    def _init(self) -> None:
        device = self.device if hasattr(self, "_priorities") else self._device
        with self._lock:
            self._priorities = backend_on(device)(self._max_capacity, self.dtype, device)
            self._oldest = 0
            self._trajectories = None

    def __repr__(self) -> str:
        given = {**self._parameters._asdict(), "beta": self.beta}
        parameters = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{type(self).__name__}(max_capacity={self._max_capacity}, {parameters})"

    @property
    def beta(self) -> float:  # pyright: ignore
        """Exponent of the importance weights."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = checked_parameter("beta", value)

    @property
    def default_priority(self) -> float:
        """The number that stands for "no value yet", the lowest of float32."""
        return NO_VALUE

    def weights(self, size: int) -> Tensor:
        """Return the probability of each of the first ``size`` entries, up to a factor.

        Args:
            size: how many entries are stored. Whole trajectories are not looked at.

        Returns:
            ``[size]``, float64.

        Raises:
            RuntimeError: if all values are non-finite.
        """
        size = check_at_least_one("size", size)
        with self._lock:
            if size > self._max_capacity:
                self._grow(size)
            return self._priorities.weights(size, self._parameters)

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
        check_size("batch_size", batch_size)
        self._maybe_init_from_storage(storage)
        with self._lock:
            generator = self._rng
            index, importance = self._draw(
                torch.rand(
                    (batch_size,) if self.trajectory_key is None else (2, batch_size),
                    dtype=torch.float64,
                    generator=generator,
                    device=self.device if generator is None else generator.device,
                ).to(self.device),
                storage,
            )
        if storage.ndim > 1:
            index = torch.unravel_index(index, storage.shape)
        return index, {"priority_weight": importance}

    def _draw(self, uniform: Tensor, storage: Any) -> tuple[Tensor, Tensor]:
        size = len(storage)
        if size > self._max_capacity:
            self._grow(size)
        if self.trajectory_key is None:
            return self._priorities.draw(uniform, size, self._parameters, self.beta)
        if self._trajectories is None or self._trajectories.size != size:
            # Another view on the storage may have written meanwhile: what came in is not drawn yet.
            ids = stored_entry(storage, self.trajectory_key)[:size].to(self.device)
            size = ids.numel()
            self._trajectories = TrajectoryDraws(
                self._priorities.values[:size],
                ids,
                self._oldest if self._oldest < size else 0,
                self.reduction,
                type(self._priorities),
            )
        return self._trajectories.draw(uniform, self._parameters, self.beta)

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
        with self._lock:
            self._trajectories = None
            if self.trajectory_key is not None and flat.numel():
                self._oldest = int(flat[-1]) + 1  # where a ring is written next
            try:
                self._priorities.erase(flat)
            except IndexError:
                self._make_room(flat, storage)
                self._priorities.erase(flat)

    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Set the values of some entries; TorchRL calls this when data with a priority key come in.

        Args:
            index: an int, a tensor ``[N]``, or for a storage of several dimensions ``[N, ndim]`` or
                a tuple of one tensor for each. Negative ones are skipped. If an index comes several
                times, the last of its values wins on the CPU (if no other index comes: their
                reduction), and any of them on a GPU.
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
        with self._lock:
            if not is_plain(index, priority, self.device) or not self._write(
                index, priority, storage
            ):
                flat = flat_index(index, storage, self.device)
                flat, values = paired_values(priority, flat, self.reduction)
                assert self._write(flat, values, storage)

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
        with self._lock:
            index, values = selected_values(values, index, self._priorities.capacity, self.device)
            self._trajectories = None
            if index is None:
                self._priorities.refresh(values, none=NO_VALUE)
            elif not self._priorities.write(index, values):
                self._priorities.write(index[-1:], values[-1:])
            self._report()

    def _write(self, flat: Tensor, values: Tensor, storage: Any) -> bool:
        """Store values, unless several are for one entry; the default priority changes nothing."""
        self._trajectories = None
        try:
            written = self._priorities.write(flat, values, none=NO_VALUE)
        except IndexError:
            self._make_room(flat, storage)
            written = self._priorities.write(flat, values, none=NO_VALUE)
        self._report()
        return written

    def _report(self) -> None:
        """Warn of values that are not finite: last, as the data are stored and must not be lost."""
        if self._warned or not self._priorities.num_refused:
            return
        self._warned = True
        warnings.warn(
            f"{type(self).__name__} got {self._priorities.num_refused} value(s) that are not "
            f"finite in {self.dtype}; their entries are not drawn until they get finite ones. "
            "This is said once per sampler.",
            UserWarning,
            stacklevel=4,
        )

    def _make_room(self, flat: Tensor, storage: Any) -> None:
        """Grow, up to the size of the storage, until there is a place for each index."""
        needed = int(flat.max()) + 1 if flat.numel() else 0
        room = 0 if storage is None else max(len(storage), storage.max_size)
        if needed > max(room, self._max_capacity):
            raise IndexError(
                f"index must be below {max(room, self._max_capacity)}, got {needed - 1}"
            )
        self._grow(max(needed, min(room, 2 * self._max_capacity)))

    def _grow(self, size: int) -> None:
        self._priorities.grow(size)
        self._max_capacity = size

    def _maybe_init_from_storage(self, storage: Any) -> None:
        """Follow a CUDA storage to its device, unless a device was asked for, and in its size."""
        device = getattr(storage, "device", None)
        if self._device is None and device not in (None, "auto"):
            device = torch.device(device)
            if device.type == "cuda" and self.device.type != "cuda":
                with self._lock:
                    self._hold(self._priorities.values.to(device))
        # There an index that is out of range is not noticed in time.
        if storage is not None and self.device.type != "cpu" and len(storage) > self._max_capacity:
            with self._lock:
                self._grow(len(storage))

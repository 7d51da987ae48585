"""Values of stored transitions kept up with the critic, all at once or a slice with each call.

Beside the data's way, after critic steps: replay buffer -> `ValueRefresh` -> sampler's ``refresh``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_recall.checks import (
    check_at_least_one,
    check_choice,
    check_key,
    check_network,
    check_real,
)
from torchrl_recall.masking import one_each
from torchrl_recall.priorities.ages import BLOCK_ENTRIES, BlockAges
from torchrl_recall.priorities.returns import ReturnsToGo
from torchrl_recall.state_reading import entry
from torchrl_recall.stored_rows import LocalRows, RemoteRows, Ring, rows_of
from torchrl_recall.values import (
    DEFAULT_CHUNK,
    bootstrapped_value,
    next_state_value,
)

TARGETS = ("bootstrap", "return")
_VERSION = 1


class ValueRefresh:
    r"""Recompute the values of stored transitions and hand them to the sampler.

    A critic step changes every value. Each call recomputes, first, those of all rows written since
    the last call, then those of ``slice_size`` older entries, from the newest to the oldest and
    over again. The storage is read in chunks and never copied; the network runs without gradient,
    in the training mode it is in, while no lock is held. Rows that are overwritten meanwhile keep
    what their writer gave them.

    Targets:

    - ``"bootstrap"``: :math:`r + \gamma (1 - \text{terminated}) V(s')`, as `transition_value`.
    - ``"return"``: the discounted sum of rewards from the step to the end of its trajectory. If
      that was a truncation, or the trajectory goes on beyond what is stored, :math:`\gamma V(s')`
      of its last stored step is added. Across slices, what follows a slice is as old as the slice
      before. It needs the order of time: a buffer with a round-robin writer (or an immutable
      dataset in order), whose cursor is the seam. In a storage of one dimension, steps of a
      trajectory have the same id under ``trajectory_key``, interleaved as they may be (parallel
      environments ``[B, T]`` flattened either way). In one of several, time is the first dimension,
      where `ReplayBuffer.extend` puts it.

    Ages are kept for blocks of 256 entries (slices are rounded up to them; 12 bytes a block), with
    the number of written rows, so that overwritten rows count as not refreshed. This is exact for
    round-robin writers, unless the buffer is emptied and refilled beyond its earlier write count
    between two calls (call `reset` then), or entries are set in place. Of other writers, and of a
    bare storage, overwriting is not seen, and they must not write during a call. TorchRL's locks
    are per buffer: on a storage with two views, refresh in the thread that writes.

    A remote buffer (`RayReplayBuffer`, or anything with ``len``, ``buffer[start:end]`` and
    ``update_priority(index, priority)``) is read and valued through these, which run its
    transforms: keep BacktrackTransform out of it. Only ``"bootstrap"`` works there, and rows
    written just while their values are on the way may get those of their predecessors.

    Args:
        buffer: a replay buffer whose sampler is a `ValuePrioritizedSampler`, a storage, or a remote
            buffer.
        value_network: as for `transition_value`.
        gamma: discount, in [0, 1].
        target: ``"bootstrap"`` or ``"return"``.
        slice_size: how many older entries to refresh per call: an int, a float in (0, 1] for a
            share of those stored, or None for all.
        chunk_size: entries read at a time, and most that the network sees. None: 65536.
        sampler: the `ValuePrioritizedSampler` of a storage; None: the buffer's.
        reward_key: where the reward is, one number for each entry.
        terminated_key: where the end of an episode is marked, bool.
        done_key: where any end is marked, truncation included; for ``"return"``.
        trajectory_key: where trajectory ids are, as `Collector` writes them; for ``"return"``. None
            says that each row continues the one before it, unless that one is done.
        value_key: where the network writes its value.

    Raises:
        TypeError: if an argument is of the wrong type, or the buffer has no fitting sampler.
        ValueError: if an argument is out of its range, or ``"return"`` is asked for where time's
            order is not known.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl_recall import ValuePrioritizedSampler
        >>> critic = TensorDictModule(lambda s: s.sum(-1, keepdim=True), ["state"], ["state_value"])
        >>> sampler = ValuePrioritizedSampler(100)
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), sampler=sampler)
        >>> after = {"state": torch.ones(2, 3), "reward": torch.ones(2, 1)}
        >>> after["terminated"] = torch.tensor([[False], [True]])
        >>> index = buffer.extend(TensorDict({"next": after}, [2]))
        >>> refresh = ValueRefresh(buffer, critic, gamma=0.5)
        >>> refresh()
        {'refresh/age_mean': 0.0, 'refresh/age_max': 0.0, 'refresh/share': 1.0}
        >>> sampler.values[:2]
        tensor([2.5000, 1.0000])
    """

    buffer: Any
    value_network: TensorDictModuleBase
    sampler: Any
    target: str
    slice_size: int | float | None
    calls: int

    def __init__(
        self,
        buffer: Any,
        value_network: TensorDictModuleBase,
        *,
        gamma: float,
        target: str = "bootstrap",
        slice_size: int | float | None = None,
        chunk_size: int | None = None,
        sampler: Any = None,
        reward_key: NestedKey = ("next", "reward"),
        terminated_key: NestedKey = ("next", "terminated"),
        done_key: NestedKey = ("next", "done"),
        trajectory_key: NestedKey | None = ("collector", "traj_ids"),
        value_key: NestedKey = "state_value",
    ) -> None:
        check_network("value_network", value_network)
        if isinstance(slice_size, float):
            if not 0 < slice_size <= 1:
                raise ValueError(f"slice_size as a share must be in (0, 1], got {slice_size}")
        elif slice_size is not None:
            slice_size = check_at_least_one("slice_size", slice_size)
        if chunk_size is None:
            chunk_size = DEFAULT_CHUNK
        self.buffer, self.value_network, self.sampler = buffer, value_network, sampler
        self.gamma: float = check_real("gamma", gamma, 0.0, 1.0)
        self.target, self.slice_size = check_choice("target", target, TARGETS), slice_size
        self.chunk_size: int = check_at_least_one("chunk_size", chunk_size)
        self.reward_key: NestedKey = check_key("reward_key", reward_key)
        self.terminated_key: NestedKey = check_key("terminated_key", terminated_key)
        self.done_key: NestedKey = check_key("done_key", done_key)
        self.value_key: NestedKey = check_key("value_key", value_key)
        if trajectory_key is not None:
            trajectory_key = check_key("trajectory_key", trajectory_key)
        self.trajectory_key = trajectory_key
        self._rows()
        self.reset()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(target={self.target!r}, gamma={self.gamma}, "
            f"slice_size={self.slice_size}, calls={self.calls})"
        )

    def reset(self) -> None:
        """Forget what has been refreshed; the next call begins a new pass."""
        self.calls = 0
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._ring: Ring | None = None  # as the last call left it
        self._ages: BlockAges | None = None
        self._position = 0  # the pass has come down to this row
        self._returns = self._new_returns(by_id=False)

    def _new_returns(self, by_id: bool) -> ReturnsToGo:
        return ReturnsToGo(self.gamma, by_id)

    def _rows(self) -> LocalRows | RemoteRows:
        # At each call: the buffer's sampler or storage may have been replaced.
        rows = rows_of(self.buffer, self.sampler)
        if self.target == "return" and not rows.in_time_order:
            writer = getattr(rows, "writer", None)
            raise ValueError(
                "target='return' needs rows in the order of time: a ReplayBuffer in this process "
                "with a round-robin writer (or an immutable dataset), got "
                f"{type(self.buffer).__name__} with {type(writer).__name__}; use 'bootstrap'"
            )
        return rows

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Refresh what is due.

        Returns:
            `logs`, after this call.

        Raises:
            KeyError: if the data or the network's output lack a key.
            TypeError: if the storage does not hold TensorDicts.
            ValueError: if an entry of the data has not one number for each transition, or the data
                do not tell trajectories apart.
        """
        rows = self._rows()
        with rows.lock():
            ring, width = rows.ring(), rows.width
        call = self.calls + 1
        if self._ring is None or not ring.follows(self._ring):
            self._begin_anew()
        if ring.stored:
            if self._ages is None:
                block_rows = max(1, BLOCK_ENTRIES // width)
                self._ages = BlockAges(block_rows, ring.capacity, ring.oldest)
                self._position = ring.oldest
            self._refresh(rows, ring, width, self._ages, call)
        self.calls = call
        self._ring = ring
        return self.logs()

    def _refresh(
        self, rows: LocalRows | RemoteRows, ring: Ring, width: int, ages: BlockAges, call: int
    ) -> None:
        # What came in since the last call, from where its block begins: a block has one age.
        newest = ring.written
        seen = newest if self._ring is None else self._ring.written
        fresh = max(ages.aligned(seen), ring.oldest) if seen < newest else newest
        by_id = self.trajectory_key is not None and rows.one_dimensional
        returns = self._new_returns(by_id)
        complete = self._refresh_range(rows, ring, fresh, newest, width, returns)
        position = self._position
        if position <= ring.oldest:  # the last pass is over
            position = fresh
        if position != fresh:  # the pass goes on below rows that are done already
            returns = self._returns
        low = ring.oldest
        if self.slice_size is not None:
            size = self.slice_size
            if isinstance(size, float):
                size = math.ceil(size * ring.stored * width)
            low = max(low, ages.aligned(max(low, position - -(-size // width))))
        if not (complete and self._refresh_range(rows, ring, low, position, width, returns)):
            return
        # Last, so that a network that raises leaves everything due.
        ages.mark(fresh, newest, call)
        ages.mark(low, position, call)
        self._position, self._returns = low, returns

    def _refresh_range(
        self,
        rows: LocalRows | RemoteRows,
        ring: Ring,
        low: int,
        high: int,
        width: int,
        returns: ReturnsToGo,
    ) -> bool:
        """Refresh rows ``low`` to ``high``, latest first; False: the buffer was emptied."""
        most = max(1, self.chunk_size // width)
        end = high
        while end > low:
            start = max(low, end - most)
            # A chunk ends where the ring begins again.
            start += min(ring.capacity - ring.place(start), end - start) % (end - start)
            place = ring.place(start)
            with rows.lock():
                now = rows.ring()
                if not now.follows(ring):
                    return False
                if end <= now.oldest:
                    return True
                data = rows.read(place, place + end - start)
            values = self._values(data, rows, width, returns)
            with rows.lock():
                now = rows.ring()
                if not now.follows(ring):
                    return False
                # Rows overwritten since are the oldest; what was read of them may be torn.
                gone = min(max(0, now.oldest - start), end - start)
                if gone < end - start:
                    rows.write(place + gone, values[gone:])
            end = start
        return True

    def _values(
        self,
        data: TensorDictBase,
        rows: LocalRows | RemoteRows,
        width: int,
        returns: ReturnsToGo,
    ) -> Tensor:
        """Compute the values of a chunk of rows, the first dimension of ``data``."""
        network, value_key = self.value_network, self.value_key
        if self.target == "bootstrap":
            keys = (self.reward_key, self.terminated_key, value_key)
            return bootstrapped_value(data, network, self.gamma, *keys)
        if data.numel() != len(data) * width:
            raise ValueError(
                f"target='return' needs one step for each entry, got entries of {tuple(data.shape)}"
                " steps; store steps, or use a storage with ndim=2"
            )

        def column(key: NestedKey) -> Tensor:
            return one_each(data, entry(data, key), repr(key)).reshape(-1, width)

        ids = None
        if self.trajectory_key is not None:
            if data.get(self.trajectory_key, None) is None:
                raise ValueError(
                    f"trajectory_key {self.trajectory_key!r} is not stored, and target='return' "
                    "must tell trajectories apart: store ids, as TorchRL's Collector does, or pass "
                    "trajectory_key=None if each row continues the one before it until done"
                )
            ids = column(self.trajectory_key)
        reward, terminated = column(self.reward_key), column(self.terminated_key).bool()
        done = column(self.done_key).bool()

        def next_value(steps: Tensor) -> Tensor:
            if not steps.numel():
                return reward.new_zeros(0)
            return next_state_value(data, network, value_key, steps)

        return returns(reward, terminated, done, ids, next_value)

    @property
    def age(self) -> Tensor:
        """Calls since the value of each stored entry was computed, ``[n]`` int32, or -1.

        In the order of the flattened storage. -1: not refreshed since it was written.
        """
        rows = self._rows()
        with rows.lock():
            ring, width = rows.ring(), rows.width
        if self._ages is None or not self._stands(ring):
            return torch.full((ring.stored * width,), -1, dtype=torch.int32)
        age = self._ages.of_rows(ring.oldest, ring.written, self.calls)
        return age.roll(ring.place(ring.oldest)).repeat_interleave(width)

    @property
    def share_refreshed(self) -> float:
        """Share of the stored entries that have been refreshed since they were written."""
        return self.logs()["refresh/share"]

    def logs(self) -> dict[str, float]:
        """Return what to log of staleness.

        Returns:
            ``refresh/age_mean`` and ``refresh/age_max``, in calls, over refreshed entries (NaN if
            there is none), and ``refresh/share``, `share_refreshed`.
        """
        rows = self._rows()
        with rows.lock():
            ring = rows.ring()
        count = total = oldest = 0
        if self._ages is not None and ring.stored and self._stands(ring):
            count, total, oldest = self._ages.summary(ring.oldest, ring.written, self.calls)
        return {
            "refresh/age_mean": total / count if count else math.nan,
            "refresh/age_max": float(oldest) if count else math.nan,
            "refresh/share": count / ring.stored if ring.stored else 0.0,
        }

    def _stands(self, ring: Ring) -> bool:
        return self._ring is not None and ring.follows(self._ring)

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the pass and the ages; the values are in the sampler's state."""
        return {
            "_schema_version": _VERSION,
            "calls": self.calls,
            "position": self._position,
            "ring": None if self._ring is None else list(self._ring),
            "ages": None if self._ages is None else self._ages.state_dict(),
            "by_id": self._returns.by_id,
            "returns": self._returns.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; restore the buffer too, or all counts as stale.

        Args:
            state_dict (dict): what `state_dict` returned.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if the version is unknown.
        """
        missing = [name for name in self.state_dict() if name not in state_dict]
        if missing:
            raise KeyError(f"state_dict lacks {missing}; is it from a ValueRefresh?")
        if state_dict["_schema_version"] != _VERSION:
            raise ValueError(
                f"_schema_version must be {_VERSION}, got {state_dict['_schema_version']!r}"
            )
        self.calls, self._position = state_dict["calls"], state_dict["position"]
        ring, ages = state_dict["ring"], state_dict["ages"]
        self._ring = None if ring is None else Ring(*ring)
        self._ages = None if ages is None else BlockAges.from_state_dict(ages)
        self._returns = self._new_returns(state_dict["by_id"])
        self._returns.load_state_dict(state_dict["returns"])

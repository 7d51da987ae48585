"""Traces to the edge of what is known: `FrontierStarts` aims at the rarest stored states.

Between the batch that a buffer samples and the walk, until the first reward has been seen: what
leads to rare states is worth imitating while nothing is known to be good.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import ReplayBuffer, Storage

from torchrl_recall.checks import check_at_least_one, check_flag, check_keys, check_real
from torchrl_recall.masking import one_each
from torchrl_recall.starts.batch import NextStates, StartStates, pick, unmasked_rows
from torchrl_recall.starts.rarity import distinct_rows, neighbour_distance, visit_counts
from torchrl_recall.state_reading import entry, storage_rows


class FrontierStarts:
    """Starts traces from the rarest states of a replay buffer, until the first reward.

    Every ``hold`` calls the target is chosen anew among the stored next states:

    - continuous states: ``num_candidates`` rows are drawn uniformly, and the rarest is the one
      farthest from its ``num_neighbours``-th nearest neighbour among them, each coordinate divided
      by its standard deviation over them;
    - integer states (cells, classes, one-hot): the rarest is stored least often, counted over the
      whole storage.

    Ties are fair. Rows masked at ``("collector", "mask")`` and non-finite ones do not count. All
    rows of the batch lead to the target; nothing to aim at masks them all. As soon as a stored
    reward exceeds ``reward_threshold``, ``then`` takes over for good.

    The storage is read past the buffer's transforms, under its locks. Until the first reward each
    call looks through all stored rewards.

    Args:
        buffer (ReplayBuffer or Storage): where the states are, of any number of dimensions.

    Keyword Args:
        num_candidates (int): rows among which to look for the rarest continuous state.
        num_neighbours (int): which neighbour's distance tells rarity; fewer rows than that: the
            farthest neighbour's.
        num_targets (int): how many of the rarest states to aim at; rows take them in turn.
        hold (int): calls for which a target is kept.
        until_reward (bool): hand over to ``then`` after the first reward.
        reward_threshold (float): a reward must exceed it.
        reward_key (NestedKey): where the reward is, one number for each row.
        then (StartStates, optional): the source after the first reward. By default the batch's
            own next states.
        observation_keys (NestedKey or list of NestedKey): the model's observation keys.
        rarity_keys (NestedKey or list of NestedKey, optional): on which of the stored observations
            rarity is measured, such as the position alone where velocities are rare without being
            anywhere new. They need not be the model's. By default all of ``observation_keys``.

    Raises:
        TypeError: an argument of the wrong type, or a storage that does not hold TensorDicts.
        ValueError: a number out of its range.
        KeyError: on call, if the storage or the batch lack a key.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(9), batch_size=4)
        >>> cells = torch.tensor([[0], [0], [0], [1], [1], [2]])
        >>> rows = {"next": {"observation": cells, "reward": torch.zeros(6, 1)}}
        >>> _ = buffer.extend(TensorDict(rows, [6]))
        >>> starts = FrontierStarts(buffer)
        >>> starts(buffer.sample(), torch.Generator().manual_seed(0))["observation"].flatten()
        tensor([2, 2, 2, 2])
    """

    def __init__(
        self,
        buffer: ReplayBuffer | Storage,
        *,
        num_candidates: int = 512,
        num_neighbours: int = 5,
        num_targets: int = 1,
        hold: int = 8,
        until_reward: bool = True,
        reward_threshold: float = 0.0,
        reward_key: NestedKey = ("next", "reward"),
        then: StartStates | None = None,
        observation_keys: NestedKey | Sequence[NestedKey] = "observation",
        rarity_keys: NestedKey | Sequence[NestedKey] | None = None,
    ) -> None:
        storage = getattr(buffer, "storage", None) if isinstance(buffer, ReplayBuffer) else buffer
        if not isinstance(storage, Storage):
            raise TypeError(
                f"buffer must be a ReplayBuffer in this process or a Storage, got "
                f"{type(buffer).__name__}."
            )
        self.buffer: Any = buffer
        self.num_candidates: int = check_at_least_one("num_candidates", num_candidates)
        self.num_neighbours: int = check_at_least_one("num_neighbours", num_neighbours)
        self.num_targets: int = check_at_least_one("num_targets", num_targets)
        self.hold: int = check_at_least_one("hold", hold)
        self.until_reward: bool = check_flag("until_reward", until_reward)
        self.reward_threshold: float = check_real("reward_threshold", reward_threshold)
        self.reward_key = unravel_key(reward_key)
        self.observation_keys: list[NestedKey] = check_keys("observation_keys", observation_keys)
        self.rarity_keys: list[NestedKey] = (
            self.observation_keys if rarity_keys is None else check_keys("rarity_keys", rarity_keys)
        )
        if then is not None and not callable(then):
            raise TypeError(f"then must be a StartStates, got {type(then).__name__}.")
        self.then: StartStates = NextStates(self.observation_keys) if then is None else then
        self._found = False
        self._calls = 0  # since the target was chosen
        self._target: dict[NestedKey, Tensor] | None = None

    @property
    def found(self) -> bool:
        """Whether a reward has been seen."""
        return self._found

    @property
    def target(self) -> TensorDict | None:
        """The states that traces lead to at present, ``[num_targets]`` or fewer; None: none yet."""
        if self._target is None:
            return None
        return TensorDict(dict(self._target), [len(next(iter(self._target.values())))])

    def __call__(self, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
        """Return a start for each row; see `StartStates`."""
        if self._found:
            return self.then(tensordict, generator)
        renew = self._target is None or self._calls >= self.hold
        if renew or self.until_reward:
            with self._lock():
                stored = self._stored()
                self._found = stored is not None and self.until_reward and self._rewarded(stored)
                if renew and not self._found:
                    self._target = None if stored is None else self._choose(stored, generator)
                    self._calls = 0
        if self._found:
            self._target = None
            return self.then(tensordict, generator)
        if self._target is None:
            # Any states of the right shape: all are masked.
            found = NextStates(self.observation_keys)(tensordict, generator)
            return found.set(("collector", "mask"), torch.zeros_like(unmasked_rows(tensordict)))
        self._calls += 1
        found = TensorDict({}, tensordict.shape)
        for key, state in self._target.items():
            state = state.to(generator.device)
            turn = torch.arange(tensordict.shape.numel(), device=state.device) % len(state)
            found.set(key, pick(state, 1, turn.reshape(tensordict.shape)))
        return found

    def _lock(self) -> ExitStack:
        """Hold back what TorchRL's buffers hold back while they sample: writers and samplers."""
        stack = ExitStack()
        if isinstance(self.buffer, ReplayBuffer):
            stack.enter_context(self.buffer._replay_lock)
            stack.enter_context(self.buffer._write_lock)
        return stack

    def _stored(self) -> TensorDictBase | None:
        """Return the stored rows, without a copy where the storage allows; None: there are none."""
        buffer: Any = self.buffer
        storage: Any = buffer.storage if isinstance(buffer, ReplayBuffer) else buffer
        if len(storage) == 0:
            return None
        return storage_rows(storage)

    def _rewarded(self, stored: TensorDictBase) -> bool:
        reward = one_each(stored, entry(stored, self.reward_key), f"reward {self.reward_key!r}")
        return bool(((reward > self.reward_threshold) & unmasked_rows(stored)).any())

    def _choose(
        self, stored: TensorDictBase, generator: torch.Generator
    ) -> dict[NestedKey, Tensor] | None:
        """Return the rarest states, ``[num_targets, *observation]`` by key; None: no candidate."""
        read = dict.fromkeys([*self.observation_keys, *self.rarity_keys])
        values = {key: entry(stored, unravel_key(("next", key))) for key in read}
        measured = [values[key] for key in self.rarity_keys]
        kinds = {value.is_floating_point() for value in measured}
        if len(kinds) > 1:
            raise ValueError(
                f"rarity_keys {self.rarity_keys} mix floating-point and integer states, "
                "expected one kind."
            )
        ndim, count = stored.ndim, stored.shape.numel()
        continuous = kinds.pop()
        device = measured[0].device
        if continuous:
            rows = distinct_rows(count, self.num_candidates, generator).to(device)
        else:
            rows = torch.arange(count, device=device)
        states = torch.cat([pick(x, ndim, rows).reshape(len(rows), -1) for x in measured], -1)
        kept = unmasked_rows(stored).flatten()[rows] & torch.isfinite(states).all(-1)
        for key in self.observation_keys:
            kept &= torch.isfinite(pick(values[key], ndim, rows).reshape(len(rows), -1)).all(-1)
        rows, states = rows[kept], states[kept]
        if len(rows) == 0:
            return None
        if continuous:
            commonness = -neighbour_distance(states, self.num_neighbours)
        else:
            first, commonness = visit_counts(states)
            # In random order, so that ties are fair; candidates already are.
            order = distinct_rows(len(first), len(first), generator).to(device)
            rows, commonness = rows[first[order]], commonness[order]
        rows = rows[commonness.argsort(stable=True)[: self.num_targets]]
        return {key: pick(values[key], ndim, rows).clone() for key in self.observation_keys}

    def state_dict(self) -> dict[str, Any]:
        """Return the target, for how many calls it was held, and whether a reward was seen."""
        target = None if self._target is None else [x.clone() for x in self._target.values()]
        then = getattr(self.then, "state_dict", dict)()
        return {"found": self._found, "calls": self._calls, "target": target, "then": then}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state_dict (dict): what `state_dict` returned.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if the target has not one entry for each of the observation keys.
        """
        missing = [key for key in ("found", "calls", "target", "then") if key not in state_dict]
        if missing:
            raise KeyError(f"state_dict lacks {missing}; is it from a FrontierStarts?")
        target = state_dict["target"]
        if target is not None and len(target) != len(self.observation_keys):
            raise ValueError(
                f"state_dict has a target of {len(target)} entries, expected one for each of "
                f"{self.observation_keys}."
            )
        if state_dict["then"]:
            self.then.load_state_dict(state_dict["then"])  # pyright: ignore
        self._found, self._calls = bool(state_dict["found"]), int(state_dict["calls"])
        self._target = None
        if target is not None:
            states = [state.detach().clone() for state in target]
            self._target = dict(zip(self.observation_keys, states, strict=True))

"""Traces from states that the user knows to be good: `GoalStarts`.

Between the batch that a buffer samples and the walk. Goals are privileged information: compare
what they achieve with other methods that are told the goal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor

from torchrl_recall.checks import check_finite, check_keys
from torchrl_recall.starts.batch import draw_rows, pick, unmasked_rows
from torchrl_recall.state_reading import entry

Goals = Callable[[int, torch.Generator], Tensor | TensorDictBase]


class GoalStarts:
    """Starts traces from goal states: a given set, a function, or an entry of the batch.

    Args:
        goals (Tensor, TensorDictBase, callable, NestedKey or list of NestedKey):

            - a tensor ``[G, *observation]`` (one observation key) or a TensorDict ``[G]`` with the
              observation keys: every start is drawn from it;
            - a function ``(count, generator)`` that returns ``count`` goals in one of these forms;
            - the batch's own key, or one key for each observation key: each row starts from its
              own goal. Padding, masked at ``("collector", "mask")``, has no start.

    Keyword Args:
        weights (Tensor, optional): ``[G]``, at least 0: how likely each given goal is drawn, up to
            a factor. By default all alike.
        observation_keys (NestedKey or list of NestedKey): the model's observation keys.

    Raises:
        TypeError: goals or weights of the wrong type.
        ValueError: no goals, non-finite goals, or weights that do not suit them.
        KeyError: goals or the batch lack a key.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> goals = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> starts = GoalStarts(goals, weights=torch.tensor([0, 1]))
        >>> batch = TensorDict({"next": {"observation": torch.zeros(3, 2)}}, [3])
        >>> starts(batch, torch.Generator().manual_seed(0))["observation"][0]
        tensor([2., 3.])
    """

    def __init__(
        self,
        goals: Tensor | TensorDictBase | Goals | NestedKey | Sequence[NestedKey],
        *,
        weights: Tensor | None = None,
        observation_keys: NestedKey | Sequence[NestedKey] = "observation",
    ) -> None:
        self.observation_keys: list[NestedKey] = check_keys("observation_keys", observation_keys)
        self.goals: TensorDictBase | None = None
        self.function: Any = None
        self.goal_keys: list[NestedKey] = []
        if isinstance(goals, Tensor) or is_tensor_collection(goals):
            states = self._as_states("goals", goals).clone()
            if len(states) == 0:
                raise ValueError("goals must hold at least one goal, got none.")
            for key in self.observation_keys:
                check_finite(f"goals[{key!r}]", states.get(key))
            self.goals = states
        elif callable(goals):
            self.function = goals
        else:
            self.goal_keys = check_keys("goals", goals)
            if len(self.goal_keys) != len(self.observation_keys):
                raise ValueError(
                    f"goals names {self.goal_keys}, expected one key for each of the "
                    f"observation_keys {self.observation_keys}."
                )
        self.weights = None if weights is None else self._checked(weights)

    def _checked(self, weights: Tensor) -> Tensor:
        if self.goals is None:
            raise ValueError("weights are for a tensor or TensorDict of goals only.")
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights must be a tensor, got {type(weights).__name__}.")
        if weights.shape != (len(self.goals),):
            raise ValueError(
                f"weights has shape {tuple(weights.shape)}, expected ({len(self.goals)},)."
            )
        check_finite("weights", weights)
        weights = weights.double()
        if bool((weights < 0).any()) or not bool(weights.sum() > 0):
            raise ValueError("weights must be at least 0 and not all 0.")
        return weights

    def _as_states(self, name: str, goals: Any) -> TensorDictBase:
        """Return goals as a TensorDict ``[n]`` with the observation keys."""
        if isinstance(goals, Tensor):
            if len(self.observation_keys) != 1:
                raise ValueError(
                    f"{name} must be a TensorDict with the keys {self.observation_keys}, got one "
                    "tensor."
                )
            if goals.ndim == 0:
                raise ValueError(f"{name} must have the shape [G, *observation], got a scalar.")
            return TensorDict({self.observation_keys[0]: goals.detach()}, goals.shape[:1])
        if not isinstance(goals, TensorDictBase):
            raise TypeError(f"{name} must be a tensor or a TensorDict, got {type(goals).__name__}.")
        if goals.ndim != 1:
            raise ValueError(f"{name} must have the batch size [G], got {tuple(goals.shape)}.")
        for key in self.observation_keys:
            entry(goals, key)
        return goals.select(*self.observation_keys).detach()

    def __call__(self, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
        """Return a start for each row; see `StartStates`."""
        shape = tensordict.shape
        # Of no device: goals are where the model is, even if the batch is not.
        found = TensorDict({}, shape)
        if self.goal_keys:
            for key, goal_key in zip(self.observation_keys, self.goal_keys, strict=True):
                found.set(key, entry(tensordict, goal_key))
            return found.set(("collector", "mask"), unmasked_rows(tensordict))
        if self.function is not None:
            goals = self.function(shape.numel(), generator)
            goals = self._as_states("what goals returns", goals)
            if len(goals) != shape.numel():
                raise ValueError(f"goals must return {shape.numel()} goals, got {len(goals)}.")
            for key in self.observation_keys:
                goal = goals.get(key)
                found.set(key, goal.reshape(*shape, *goal.shape[1:]))
            return found
        assert self.goals is not None
        if self.weights is None:
            count = len(self.goals)
            rows = torch.randint(count, shape, generator=generator, device=generator.device)
        else:
            self.weights = self.weights.to(generator.device)  # a copy only if the model has moved
            rows = draw_rows(self.weights, shape, generator)
        self.goals = goals = self.goals.to(generator.device)
        for key in self.observation_keys:
            found.set(key, pick(goals.get(key), 1, rows))
        return found

"""Where traces start: what `BacktrackTransform(start=...)` accepts, and the plainest of it.

Between the batch that a buffer samples and the walk: a start source turns the one into states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor

from torchrl_recall.checks import check_keys
from torchrl_recall.masking import one_each
from torchrl_recall.state_reading import entry


@runtime_checkable
class StartStates(Protocol):
    """A source of states to walk back from.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_recall import BacktrackModel, BacktrackTransform
        >>> def corner(tensordict, generator):
        ...     zeros = torch.zeros(*tensordict.shape, 3)
        ...     return TensorDict({"observation": zeros}, tensordict.shape)
        >>> model = BacktrackModel(3, 1, num_cells=(32,))
        >>> transform = BacktrackTransform(model, num_steps=8, start=corner)
        >>> transform(TensorDict({}, [4]))["trace"].shape
        torch.Size([4, 8])
    """

    def __call__(self, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
        """Return a start for each row of a sampled batch.

        Args:
            tensordict (TensorDictBase): the batch, ``[*B]``; not to be changed.
            generator (torch.Generator): the transform's, on the model's device.

        Returns:
            TensorDictBase: ``[*B]``, the model's observation keys, and optionally
            ``("collector", "mask")``, ``[*B]`` bool: False where there is no start.
        """
        ...


class NextStates:
    """The batch's own next states, row by row, as the transform takes without ``start``.

    Args:
        observation_keys (NestedKey or list of NestedKey): the model's observation keys; the
            states are under ``"next"``. A tuple of strings is one nested key.

    Raises:
        KeyError: on call, if the batch lacks a key.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"next": {"observation": torch.ones(2, 3)}}, [2])
        >>> NextStates()(batch, torch.Generator())["observation"].shape
        torch.Size([2, 3])
    """

    def __init__(self, observation_keys: NestedKey | Sequence[NestedKey] = "observation") -> None:
        self.observation_keys: list[NestedKey] = check_keys("observation_keys", observation_keys)

    def __call__(self, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
        """Return the next states, and which rows are no padding; see `StartStates`."""
        found = TensorDict({}, tensordict.shape, device=tensordict.device)
        for key in self.observation_keys:
            found.set(key, entry(tensordict, unravel_key(("next", key))))
        return found.set(("collector", "mask"), unmasked_rows(tensordict))


def unmasked_rows(tensordict: TensorDictBase) -> Tensor:
    """Return ``[*B]`` bool: which rows are data rather than padding."""
    kept = tensordict.get(("collector", "mask"), default=None)
    if kept is not None:
        return one_each(tensordict, kept, "('collector', 'mask')").bool()
    some = next(iter(tensordict.values(True, True)), None)
    device = None if some is None else some.device
    return torch.ones(tensordict.shape, dtype=torch.bool, device=device)


def draw_rows(weights: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw rows with replacement, proportionally to their weights.

    Args:
        weights (Tensor): ``[n]``, at least 0. All zero: any rows, which the caller masks.
        shape (torch.Size): of the draws.
        generator (torch.Generator): source of randomness.

    Returns:
        Tensor: indices of ``shape``, on the weights' device.
    """
    drawable = torch.where(weights.sum() > 0, weights, torch.ones_like(weights))
    drawable = drawable.to(generator.device)
    rows = torch.multinomial(drawable, shape.numel(), replacement=True, generator=generator)
    return rows.reshape(shape).to(weights.device)


def pick(value: Tensor, ndim: int, rows: Tensor) -> Tensor:
    """Return ``value[rows]`` for rows counted over the first ``ndim`` dimensions together."""
    return value.reshape(-1, *value.shape[ndim:])[rows]

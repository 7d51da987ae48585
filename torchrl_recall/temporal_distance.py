"""How many steps lie between two states, learned from any trajectories: for `RisingDistance`.

Beside the data's way: replay buffer with slices -> `TemporalDistanceLoss` -> `TemporalDistance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.data.tensor_specs import TensorSpec
from torchrl.modules import MLP
from torchrl.objectives.common import LossModule

from torchrl_recall.checks import as_keys, check_at_least_one, check_real
from torchrl_recall.masking import Reduction, check_reduction, kept_rows, one_each, reduce_kept
from torchrl_recall.model.networks import choose_dtype
from torchrl_recall.model.observation import ObservationCodec, as_mapping

__all__ = ["TemporalDistance", "TemporalDistanceLoss"]


class TemporalDistance(nn.Module):
    """Number of steps from one state to another, ``d(s, g) >= 0``.

    A network of both states' features (normalised, or one-hot), with a softplus at the end. Not
    symmetric: there may be no way back.

    Args:
        observation (int, TensorSpec or mapping): as for `BacktrackModel`.

    Keyword Args:
        num_cells (sequence of int): width of each hidden layer.
        activation_class (type): activation between layers.
        observation_keys (NestedKey or list of NestedKey, optional): as for `BacktrackModel`.
        dtype (torch.dtype, optional): dtype of the parameters. Defaults to the continuous
            observation's, else torch's default.
        device (torch.device, optional): device of the parameters.

    Raises:
        TypeError: a spec that is neither continuous nor discrete.
        ValueError: specs or keys that do not match each other.

    Examples:
        >>> import torch
        >>> from torchrl_recall.temporal_distance import TemporalDistance
        >>> distance = TemporalDistance(3, num_cells=(32,))
        >>> distance(torch.randn(4, 7, 3), torch.randn(4, 7, 3)).shape
        torch.Size([4, 7])
    """

    def __init__(
        self,
        observation: int | TensorSpec | Mapping[NestedKey, int | TensorSpec],
        *,
        num_cells: Sequence[int] = (256, 256),
        activation_class: type[nn.Module] = nn.ReLU,
        observation_keys: NestedKey | Sequence[NestedKey] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        widths = [check_at_least_one("num_cells", width) for width in num_cells]
        observations = as_mapping(observation, observation_keys)
        dtype = choose_dtype(observations, dtype)
        self.observation: ObservationCodec = ObservationCodec(
            observations, dtype=dtype, device=device
        )
        self.network = MLP(
            in_features=2 * self.observation.feature_size,
            out_features=1,
            num_cells=widths,
            activation_class=activation_class,
            device=device,
        ).to(dtype)

    def forward(self, state: Tensor, end: Tensor) -> Tensor:
        """Return the steps from ``state`` to ``end``, flat ``[*B, size]`` both: ``[*B]``.

        Args:
            state (Tensor): where to go from, flat ``[*B, size]``.
            end (Tensor): where to, flat ``[*B, size]``.

        Returns:
            Tensor: steps, ``[*B]``, at least 0.
        """
        features = torch.cat([self.observation(state), self.observation(end)], -1)
        return nn.functional.softplus(self.network(features)).squeeze(-1)


class TemporalDistanceLoss(LossModule):
    """Regresses the steps between any two states of one slice of a trajectory.

    The batch is ``[*B, L]``, time last, as the rollouts of an environment, or what a buffer with
    TorchRL's ``SliceSampler(slice_len=L, strict_length=True)`` samples, reshaped to ``[-1, L]``.
    All pairs ``i <= j`` of the ``L + 1`` states of a slice count that no ``done`` and no padding
    (``("collector", "mask")``) lies between. Distances beyond L steps are never seen: take slices
    as long as the traces.

    With ``expectile=0.5`` (the mean squared error) the distance becomes the mean number of steps in
    the data, of their policy, detours included; a smaller expectile leans to the shortest.

    Args:
        distance (TemporalDistance): the module to fit; in training its running statistics follow
            the data.

    Keyword Args:
        expectile (float): in (0, 1).
        reduction (str): ``"mean"`` over pairs, ``"sum"``, or ``"none"``: ``[*B, pairs]``.

    Returns:
        TensorDict: ``loss_temporal_distance``.

    Raises:
        TypeError: not a `TemporalDistance`.
        ValueError: an expectile out of range, or at a call, data without a time dimension or with
            states that are not finite.

    Source: regression of steps between states of a trajectory as in Hartikainen et al., *Dynamical
    Distance Learning*, ICLR 2020, https://arxiv.org/abs/1907.08225.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
        >>> from torchrl_recall.temporal_distance import TemporalDistance, TemporalDistanceLoss
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(20), batch_size=8,
        ...     sampler=SliceSampler(slice_len=4, strict_length=True, traj_key="trajectory"))
        >>> walk = torch.arange(21.0).unsqueeze(-1)
        >>> _ = buffer.extend(TensorDict({
        ...     "observation": walk[:-1], "next": {"observation": walk[1:]},
        ...     "trajectory": torch.arange(20) // 10}, [20]))
        >>> loss = TemporalDistanceLoss(TemporalDistance(1, num_cells=(32,)))
        >>> loss(buffer.sample().reshape(-1, 4))["loss_temporal_distance"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys(LossModule._AcceptedKeys):
        """Names of the entries.

        Attributes:
            observation (NestedKey or list of NestedKey): the observations, without ``"next"``.
            done (NestedKey): the end of an episode; may be missing: then slices have none.
        """

        observation: NestedKey | list[NestedKey] = "observation"
        done: NestedKey = ("next", "done")

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys  # pyright: ignore[reportIncompatibleMethodOverride]
    distance: TemporalDistance
    reduction: Reduction
    # The module stays itself, so that its running statistics stay shared.
    functional = False  # pyright: ignore

    def __init__(
        self,
        distance: TemporalDistance,
        *,
        expectile: float = 0.5,
        reduction: Reduction = "mean",
    ) -> None:
        if not isinstance(distance, TemporalDistance):
            raise TypeError(f"distance must be a TemporalDistance, got {type(distance).__name__}.")
        super().__init__()
        self.distance = distance
        self.expectile: float = check_real(
            "expectile", expectile, 0.0, 1.0, open_low=True, open_high=True
        )
        self.reduction = check_reduction(reduction)
        # ``set_keys(name=None)`` goes back to these.
        self.default_keys: Any = partial(
            self._AcceptedKeys, observation=list(distance.observation.keys)
        )
        self._tensor_keys = self.default_keys()
        self.out_keys: list[str] = ["loss_temporal_distance"]
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        """Follow ``set_keys``, which calls this."""
        keys = self._observation_keys
        expected = self.distance.observation.keys
        if len(keys) != len(expected):
            raise ValueError(f"observation must name {len(expected)} keys, got {keys}.")
        self.in_keys: Any = [*keys, *(unravel_key(("next", key)) for key in keys)]

    @property
    def _observation_keys(self) -> list[NestedKey]:
        return as_keys(self.tensor_keys.observation)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of a batch ``[*B, L]``, time last.

        Args:
            tensordict (TensorDictBase): slices of trajectories, ``[*B, L]``.

        Returns:
            TensorDict: the loss and its logs, as the class says.
        """
        if tensordict.ndim == 0 or tensordict.shape.numel() == 0:
            raise ValueError(
                f"the data has batch size {tuple(tensordict.shape)}, expected [*B, L] with time "
                "last."
            )
        keys = self._observation_keys
        kept = kept_rows(self, tensordict)
        states = self._states(tensordict, keys, kept)
        if self.training and self.distance.observation.normalizer is not None:
            rows = states[..., :-1, :].reshape(-1, states.shape[-1])
            self.distance.observation.normalizer.update(rows, kept.reshape(-1))
        i, j = torch.triu_indices(*[states.shape[-2]] * 2, device=states.device)
        valid = self._valid(tensordict, kept, i, j)
        found = self.distance(states[..., i, :], states[..., j, :])
        error = (j - i).to(found.dtype) - found
        weight = torch.where(error > 0, self.expectile, 1 - self.expectile)
        loss = reduce_kept(2 * weight * error.square(), valid, self.reduction)
        return TensorDict({"loss_temporal_distance": loss})

    def _states(self, data: TensorDictBase, keys: list[NestedKey], kept: Tensor) -> Tensor:
        """Return ``[*B, L + 1, size]``: each observation, and what the last step leads to."""
        codec = self.distance.observation
        following = [unravel_key(("next", key)) for key in keys]
        if not torch.compiler.is_compiling() and not bool(kept.all()):
            # Padding need not be valid; it takes no part in any pair.
            data, blank = data.copy(), codec.restore(torch.zeros_like(codec.low))
            for key, name in zip([*keys, *following], [*codec.keys] * 2, strict=True):
                value = data.get(key, default=None)
                if value is not None:
                    mask = kept.reshape(*kept.shape, *[1] * (value.ndim - kept.ndim))
                    data.set(key, torch.where(mask, value, blank[name].to(value)))
        states = codec.read(data, keys)
        final: Any = data[..., -1:]
        last = codec.read(final, following)
        return torch.cat([states, last], -2)

    def _valid(self, data: TensorDictBase, kept: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return ``[*B, pairs]``: which pairs have neither a done nor padding between them."""
        done = data.get(self.tensor_keys.done, default=None)
        breaks = ~kept
        if done is not None:
            breaks = breaks | one_each(data, done, repr(self.tensor_keys.done)).bool()
        # The state behind a last step that is done is still of its episode.
        breaks = torch.cat([breaks[..., :-1], ~kept[..., -1:]], -1).long()
        before = nn.functional.pad(breaks.cumsum(-1), (1, 0))
        real = torch.cat([kept, kept[..., -1:]], -1)
        return (before[..., i] == before[..., j]) & real[..., i] & real[..., j]

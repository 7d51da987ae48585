"""How observations become the model's states: one flat tensor, whatever the env's keys and specs.

Continuous observations become a float vector ``[*B, D]`` (several keys concatenated in the stated
order); discrete ones become integer coordinates ``[*B, K]``. First stop of a batch in the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.data.tensor_specs import (
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)

from torchrl_recall.checks import (
    as_keys,
    check_at_least_one,
    check_device,
    check_finite,
    check_key,
    check_keys,
    is_one_hot,
)
from torchrl_recall.model.normalization import RunningNormalizer

# A joint code makes small discrete spaces exactly tabular; beyond this it costs more than it gives.
MAX_JOINT_STATES = 1024


class ObservationCodec(nn.Module):
    """Flattens, checks, normalises and restores the observations of one environment.

    Args:
        observations (mapping): key to size (int: a continuous vector) or TorchRL spec, in the
            order of concatenation.
        dtype (torch.dtype): dtype of the features.
        device (torch.device, optional): device of the statistics.

    Raises:
        TypeError: a spec that is neither continuous nor discrete.
        ValueError: continuous and discrete keys mixed.

    Examples:
        >>> import torch
        >>> from torchrl.data import MultiCategorical
        >>> codec = ObservationCodec({"cell": MultiCategorical([2, 3])}, dtype=torch.float32)
        >>> codec(torch.tensor([1, 2]))  # row, column and joint code, each one-hot
        tensor([0., 1., 0., 0., 1., 0., 0., 0., 0., 0., 1.])
    """

    low: Tensor
    high: Tensor
    offsets: Tensor
    unit: Tensor

    def __init__(
        self,
        observations: Mapping[NestedKey, int | TensorSpec],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        # Follows ``.to(...)``, so that checks and features know the model's dtype and device.
        self.register_buffer("unit", torch.ones((), dtype=dtype, device=device), persistent=False)
        if not observations:
            raise ValueError("observation must name at least one key, got none.")
        self.keys: list[NestedKey] = [check_key("observation", key) for key in observations]
        self.shapes: list[torch.Size] = []
        self.formats: list[str] = []
        self.dtypes: list[torch.dtype] = []
        self.cardinality: list[int] = []
        low: list[Tensor] = []
        high: list[Tensor] = []
        for key, observation in zip(self.keys, observations.values(), strict=True):
            self._add(key, observation, dtype, low, high)
        self.is_discrete = bool(self.cardinality)
        if self.is_discrete and "continuous" in self.formats:
            raise ValueError(
                f"observation mixes continuous and discrete keys {self.keys}, expected one kind; "
                "leave one out of observation_keys or encode them (EncoderTransform)."
            )
        if self.is_discrete:
            self.size = len(self.cardinality)
            self.num_states = math.prod(self.cardinality)
            self.has_joint_code = self.size > 1 and self.num_states <= MAX_JOINT_STATES
            self.feature_size = sum(self.cardinality) + self.num_states * self.has_joint_code
            widths = [0, *self.cardinality][: self.size + self.has_joint_code]
            self.register_buffer("offsets", torch.tensor(widths, device=device).cumsum(0))
            bounds = torch.tensor(self.cardinality, device=device)
            self.register_buffer("low", torch.zeros_like(bounds))
            self.register_buffer("high", bounds - 1)
            self.normalizer = None
        else:
            self.size = self.feature_size = sum(math.prod(shape) for shape in self.shapes)
            self.register_buffer("low", torch.cat(low).to(device))
            self.register_buffer("high", torch.cat(high).to(device))
            self.normalizer = RunningNormalizer(self.size, dtype=dtype, device=device)

    def _add(self, key: NestedKey, observation: Any, dtype, low: list, high: list) -> None:
        if isinstance(observation, Integral):
            size = check_at_least_one(f"observation[{key!r}]", observation)
            observation = Unbounded(torch.Size([size]))
        shape = torch.Size(getattr(observation, "shape", ()))
        if isinstance(observation, OneHot) and not isinstance(observation, MultiOneHot):
            self.formats.append("one_hot")
            self.cardinality.append(int(observation.space.n))
            shape = shape[-1:]
        elif isinstance(observation, MultiCategorical):
            self.formats.append("categorical")
            nvec = torch.as_tensor(observation.nvec)
            self.cardinality.extend(int(n) for n in nvec.reshape(-1, nvec.shape[-1])[0])
            shape = shape[-1:]
        elif isinstance(observation, Categorical):
            self.formats.append("categorical")
            self.cardinality.extend([int(observation.space.n)] * shape.numel())
        elif isinstance(observation, Bounded | Unbounded) and observation.dtype.is_floating_point:
            self.formats.append("continuous")
            size = math.prod(shape)
            if isinstance(observation, Bounded):
                space: Any = observation.space
                low.append(space.low.reshape(-1).to(dtype).cpu())
                high.append(space.high.reshape(-1).to(dtype).cpu())
            else:
                low.append(torch.full((size,), -torch.inf, dtype=dtype))
                high.append(torch.full((size,), torch.inf, dtype=dtype))
        else:
            kind = type(observation).__name__
            found = f"{kind} of {getattr(observation, 'dtype', 'no dtype')}"
            raise TypeError(
                f"observation {key!r} is a {found}, expected a size (int) or a floating-point "
                "Bounded or Unbounded, a Categorical, MultiCategorical or OneHot spec."
            )
        self.shapes.append(shape)
        self.dtypes.append(observation.dtype)

    def read(
        self,
        data: TensorDictBase,
        keys: NestedKey | Sequence[NestedKey] | None = None,
        *,
        require_finite: bool = True,
        require_range: bool = True,
    ) -> Tensor:
        """Read the observation keys of ``data`` as one flat state.

        Args:
            data (TensorDictBase): holds the keys, with any batch shape ``*B``.
            keys (NestedKey or list of NestedKey, optional): read from here instead of the codec's
                own keys.
            require_finite (bool): refuse non-finite values.
            require_range (bool): refuse classes that do not exist.

        Returns:
            Tensor: ``[*B, size]``, float or int64.

        Raises:
            KeyError: a key is missing.
            ValueError: wrong shape, dtype, device, range or non-finite values.
        """
        parts = []
        for i, key in enumerate(self.keys if keys is None else as_keys(keys)):
            value = data.get(key, default=None)
            if value is None:
                raise KeyError(
                    f"key {key!r} is missing from the data, which has {sorted_keys(data)}."
                )
            parts.append(
                self._flatten(i, value, repr(key), data.ndim, require_finite, require_range)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def flatten(
        self,
        observation: Tensor | Mapping[NestedKey, Tensor],
        name: str,
        *,
        check_values: bool = True,
    ) -> Tensor:
        """Turn an observation as the env gives it into a flat state.

        Args:
            observation (Tensor, TensorDictBase or mapping): one tensor (several continuous keys:
                already concatenated, ``[*B, size]``), or one tensor for each key.
            name (str): name of the argument, for refusals.
            check_values (bool): refuse non-finite values and classes that do not exist.

        Returns:
            Tensor: ``[*B, size]``, float or int64.
        """
        if isinstance(observation, Tensor):
            if len(self.keys) == 1:
                if not check_values and self._is_flat(observation):
                    return observation
                return self._flatten(0, observation, name, None, check_values, check_values)
            if self.is_discrete:
                raise TypeError(
                    f"{name} must be a TensorDict or mapping with the keys {self.keys}."
                )
            shape = torch.Size([self.size])
            return self._check_continuous(observation, shape, name, None, check_values)
        if isinstance(observation, TensorDictBase):
            return self.read(observation, require_finite=check_values, require_range=check_values)
        if isinstance(observation, Mapping):
            missing = [key for key in self.keys if key not in observation]
            if missing:
                raise KeyError(f"{name} lacks {missing}, expected the keys {self.keys}.")
            parts = [
                self._flatten(i, observation[key], f"{name}[{key!r}]", None, *[check_values] * 2)
                for i, key in enumerate(self.keys)
            ]
            return torch.cat(parts, -1)
        raise TypeError(
            f"{name} must be a tensor, a TensorDict or a mapping of tensors, "
            f"got {type(observation).__name__}."
        )

    def _is_flat(self, value: Tensor) -> bool:
        """Return whether a tensor is a flat state as it is: the refusals' short cut."""
        unit: Any = self._buffers["unit"]
        return (
            value.ndim > 0
            and value.shape[-1:] == self.shapes[0]
            and value.dtype == (torch.int64 if self.cardinality else unit.dtype)
            and value.device == unit.device
            and self.formats[0] != "one_hot"
        )

    def _flatten(
        self, i: int, value: Tensor, name: str, ndim: int | None, finite: bool, in_range: bool
    ) -> Tensor:
        shape = self.shapes[i]
        if self.formats[i] == "continuous":
            return self._check_continuous(value, shape, name, ndim, finite)
        event = len(shape)
        self._check_shape(value, shape, name, ndim)
        unit: Any = self._buffers["unit"]
        check_device(name, value.device, unit.device)
        start = sum(self._coordinates(j) for j in range(i)) if i else 0
        n = self.cardinality[start]
        if self.formats[i] == "one_hot":
            if not torch.compiler.is_compiling() and not is_one_hot(value):
                raise ValueError(f"{name} must be one-hot over {n} classes, got other rows.")
            return value.to(torch.int8).argmax(-1, keepdim=True)
        if value.is_floating_point() or value.is_complex():
            raise ValueError(f"{name} must hold integers, got dtype {value.dtype}.")
        value = value.long()
        if event != 1:
            value = value.unsqueeze(-1) if event == 0 else value.flatten(-event)
        width = value.shape[-1]
        if in_range and not torch.compiler.is_compiling():
            low, high = self.low[start : start + width], self.high[start : start + width]
            if bool(((value < low) | (value > high)).any()):
                raise ValueError(
                    f"{name} must lie in {low.tolist()} to {high.tolist()}, "
                    f"got {value.min()} to {value.max()}."
                )
        return value

    def _coordinates(self, i: int) -> int:
        return self.shapes[i].numel() if self.formats[i] == "categorical" else 1

    def _check_continuous(self, value, shape, name: str, ndim: int | None, finite: bool) -> Tensor:
        self._check_shape(value, shape, name, ndim)
        unit: Any = self._buffers["unit"]  # quicker than by `Module.__getattr__`
        if value.dtype != unit.dtype:
            raise ValueError(
                f"{name} has dtype {value.dtype}, but the model has {unit.dtype}; cast the "
                "data (torchrl.envs.DoubleToFloat) or the model (model.to(dtype))."
            )
        check_device(name, value.device, unit.device)
        if finite:
            check_finite(name, value)
        if len(shape) == 1:
            return value
        return value.unsqueeze(-1) if len(shape) == 0 else value.flatten(-len(shape))

    @staticmethod
    def _check_shape(value: Tensor, shape: torch.Size, name: str, ndim: int | None) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
        found, event = value.shape, len(shape)
        batch = len(found) - event
        if batch < 0 or found[batch:] != shape or (ndim is not None and batch != ndim):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected [*batch, "
                f"{', '.join(map(str, shape))}] with the model's observation shape {tuple(shape)}."
            )

    def are_states(self, state: Tensor) -> Tensor:
        """Return ``[*B]`` bool: which flat states are finite, or classes that exist."""
        if self.is_discrete:
            return ((state >= self.low) & (state <= self.high)).all(-1)
        return torch.isfinite(state).all(-1)

    def restore(self, state: Tensor) -> dict[NestedKey, Tensor]:
        """Turn flat states back into the env's keys, shapes and dtypes.

        Args:
            state (Tensor): ``[*B, size]``.

        Returns:
            dict: key to tensor, each ``[*B, *observation shape]``.
        """
        if len(self.keys) == 1 and self.formats[0] == "continuous" and len(self.shapes[0]) == 1:
            return {self.keys[0]: state}
        if len(self.keys) == 1 and self.formats[0] == "categorical" and len(self.shapes[0]) == 1:
            same = state.dtype == self.dtypes[0]
            return {self.keys[0]: state if same else state.to(self.dtypes[0])}
        restored, start = {}, 0
        for i, key in enumerate(self.keys):
            width = self._coordinates(i) if self.is_discrete else self.shapes[i].numel()
            part = state[..., start : start + width]
            start += width
            if self.formats[i] == "one_hot":
                part = nn.functional.one_hot(part.squeeze(-1), self.shapes[i][-1])
            restored[key] = part.reshape(state.shape[:-1] + self.shapes[i])
            if self.is_discrete:
                restored[key] = restored[key].to(self.dtypes[i])
        return restored

    def joint_index(self, state: Tensor) -> Tensor:
        """Return the index ``[*B]`` of discrete states in row-major order."""
        index = state[..., 0]
        for i in range(1, self.size):
            index = index * self.cardinality[i] + state[..., i]
        return index

    def from_joint_index(self, index: Tensor) -> Tensor:
        """Return the discrete states ``[*B, size]`` of row-major indices."""
        coordinates = []
        for n in reversed(self.cardinality):
            coordinates.append(index % n)
            index = index // n
        return torch.stack(coordinates[::-1], -1)

    def feature_index(self, state: Tensor) -> Tensor:
        """Return which one-hot features of discrete states are on, ``[*B, size (+ 1)]``."""
        if self.has_joint_code:
            state = torch.cat([state, self.joint_index(state).unsqueeze(-1)], -1)
        return state + self.offsets

    def forward(self, state: Tensor) -> Tensor:
        """Return the network's features ``[*B, feature_size]`` of flat states."""
        if self.normalizer is not None:
            return self.normalizer.normalize(state)
        index = self.feature_index(state)
        features = self.unit.new_zeros(*state.shape[:-1], self.feature_size)
        return features.scatter(-1, index, 1.0)


def sorted_keys(data: TensorDictBase) -> list[NestedKey]:
    """Return the leaf keys of ``data`` in a readable order."""
    return sorted(data.keys(True, True), key=str)


def as_mapping(
    observation: Any, keys: NestedKey | Sequence[NestedKey] | None
) -> dict[NestedKey, Any]:
    """Return the sizes or specs of a model's observations by key, in the stated order."""
    if isinstance(observation, Composite):
        batch = observation.ndim
        leaves = {unravel_key(key): spec for key, spec in observation.items(True, True)}
        observation = {key: spec[(0,) * batch] if batch else spec for key, spec in leaves.items()}
    if isinstance(observation, TensorDictBase):
        raise TypeError("observation must be sizes or specs by key, got a TensorDict of data.")
    if not isinstance(observation, Mapping):
        keys = ["observation"] if keys is None else check_keys("observation_keys", keys)
        if len(keys) != 1:
            raise ValueError(f"observation is one size or spec, but observation_keys are {keys}.")
        return {keys[0]: observation}
    keys = list(observation) if keys is None else check_keys("observation_keys", keys)
    missing = [key for key in keys if key not in observation]
    if missing:
        raise KeyError(f"observation_keys {missing} are not in observation {list(observation)}.")
    return {key: observation[key] for key in keys}

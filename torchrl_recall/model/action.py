"""How actions become the model's: a flat vector or a class index, with the spec's head."""

from __future__ import annotations

from numbers import Integral

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.data.tensor_specs import Bounded, Categorical, OneHot, TensorSpec, Unbounded

from torchrl_recall.checks import check_at_least_one, check_device, check_finite, is_one_hot
from torchrl_recall.model.factors import Choices, FactoredHead, are_several
from torchrl_recall.model.heads import CategoricalHead, NormalHead, TanhNormalHead
from torchrl_recall.model.observation import sorted_keys
from torchrl_recall.model.uniform import UniformHead


class ActionCodec(nn.Module):
    """Reads, checks and restores actions, and owns the head of ``q(a|s')``.

    Args:
        action (int or TensorSpec): size of an action bounded to [-1, 1], or the action's spec.
        log_scale_range (pair of float): bounds of the log-scale of continuous actions.
        dtype (torch.dtype): dtype of the model.
        device (torch.device, optional): device of the statistics.
        uniform (bool): uniform over the classes or the bounded box, without a network.

    Raises:
        TypeError: a spec that has no head.
        ValueError: a spec with some, but not all, bounds finite, or an unbounded uniform action.
    """

    def __init__(
        self,
        action: int | TensorSpec,
        log_scale_range: tuple[float, float],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        uniform: bool = False,
    ) -> None:
        super().__init__()
        self.is_uniform = uniform
        if isinstance(action, Integral):
            action = Bounded(
                -1.0, 1.0, torch.Size([check_at_least_one("action", action)]), dtype=dtype
            )
        self.shape = torch.Size(getattr(action, "shape", ()))
        self.spec_dtype = getattr(action, "dtype", dtype)
        if are_several(action):
            self.format = "factors"
            self.choices = Choices(action)
            self.head = FactoredHead(self.choices.cardinality, device=device)
        elif isinstance(action, Categorical | OneHot):
            self.format = "one_hot" if isinstance(action, OneHot) else "categorical"
            if self.format == "one_hot":
                self.shape = self.shape[-1:]
            self.head = CategoricalHead(int(action.space.n))
        elif isinstance(action, Bounded | Unbounded) and action.dtype.is_floating_point:
            self.format = "continuous"
            # Samples have the model's own dtype: TorchRL casts actions to the spec's when it must.
            self.head = _continuous_head(action, log_scale_range, dtype, device)
            if uniform:
                self.head = _uniform_head(self.head)
        else:
            raise TypeError(
                f"action is a {type(action).__name__} of {getattr(action, 'dtype', 'no dtype')}, "
                "expected a size (int), a floating-point Bounded or Unbounded spec, or one of "
                "classes: Categorical, OneHot, MultiCategorical, MultiOneHot or Binary."
            )

    def read(
        self,
        data: TensorDictBase,
        key: NestedKey,
        device: torch.device,
        *,
        require_finite: bool = True,
    ) -> Tensor:
        """Read the action of ``data`` as ``[*B, A]`` (continuous) or ``[*B]`` indices.

        Several choices at once are ``[*B, n]`` indices.

        Args:
            data (TensorDictBase): holds the action, with any batch shape ``*B``.
            key (NestedKey): name of the action.
            device (torch.device): where the model is.
            require_finite (bool): refuse non-finite values.

        Returns:
            Tensor: flat actions.

        Raises:
            KeyError: the key is missing.
            ValueError: wrong shape, dtype, device, range or non-finite values.
        """
        value = data.get(key, default=None)
        if value is None:
            raise KeyError(f"key {key!r} is missing from the data, which has {sorted_keys(data)}.")
        if not isinstance(value, Tensor):
            raise TypeError(f"{key!r} must be a tensor, got {type(value).__name__}.")
        if value.shape != data.shape + self.shape:
            raise ValueError(
                f"{key!r} has shape {tuple(value.shape)}, expected {tuple(data.shape + self.shape)}"
                f" with the model's action shape {tuple(self.shape)}."
            )
        check_device(repr(key), value.device, device)
        if self.format == "continuous":
            if value.dtype not in (self.head_dtype, self.spec_dtype):
                raise ValueError(
                    f"{key!r} has dtype {value.dtype}, but the model has {self.head_dtype}; cast "
                    "the data (torchrl.envs.DoubleToFloat) or the model (model.to(dtype))."
                )
            if require_finite:
                check_finite(repr(key), value)
            # MuJoCo environments: float64 observations beside float32 actions.
            return value.reshape(*data.shape, self.head.size).to(self.head_dtype)
        if self.format == "factors":
            return self.choices.read(value, repr(key), data.shape)
        checked = not torch.compiler.is_compiling()
        n = self.head.output_size
        if self.format == "one_hot":
            if checked and not is_one_hot(value):
                raise ValueError(f"{key!r} must be one-hot over {n} classes, got other rows.")
            return value.to(torch.int8).argmax(-1)
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{key!r} must hold integers, got dtype {value.dtype}.")
        if checked and bool(((value < 0) | (value >= n)).any()):
            raise ValueError(
                f"{key!r} must lie in 0 to {n - 1}, got {value.min()} to {value.max()}."
            )
        return value.reshape(data.shape).long()

    @property
    def head_dtype(self) -> torch.dtype | None:
        """Dtype of continuous actions; follows ``.to(dtype)``."""
        if isinstance(self.head, NormalHead):
            return self.head.normalizer.mean.dtype
        if isinstance(self.head, TanhNormalHead | UniformHead):
            return self.head.half_range.dtype
        return None

    def restore(self, action: Tensor) -> Tensor:
        """Turn flat actions back into the spec's shape and dtype.

        Args:
            action (Tensor): ``[*B, A]``, or ``[*B]`` or ``[*B, n]`` indices.

        Returns:
            Tensor: ``[*B, *action shape]``.
        """
        if self.format == "continuous":
            flat = len(self.shape) == 1
            return action if flat else action.reshape(action.shape[:-1] + self.shape)
        if self.format == "factors":
            return self.choices.restore(action)
        if self.format == "one_hot":
            one_hot = nn.functional.one_hot(action, self.head.output_size)
            return one_hot.to(self.spec_dtype)
        if self.shape:
            action = action.reshape(action.shape + self.shape)
        return action if action.dtype == self.spec_dtype else action.to(self.spec_dtype)

    def blank(self, unit: Tensor) -> Tensor:
        """Return a flat action that is valid, of no batch, in the dtype and device of ``unit``."""
        if self.format == "continuous":
            return unit.new_zeros(self.head.size)
        return unit.new_zeros([self.head.size] if self.format == "factors" else []).long()

    def update_normalization(self, action: Tensor, mask: Tensor | None = None) -> None:
        """Merge real actions into the statistics of an unbounded head.

        Args:
            action (Tensor): ``[N, A]`` or ``[N]``.
            mask (Tensor, optional): ``[N]`` bool, True = use the row.
        """
        if isinstance(self.head, NormalHead):
            self.head.normalizer.update(action, mask)


def _continuous_head(action, log_scale_range, dtype, device) -> NormalHead | TanhNormalHead:
    size = action.shape.numel()
    if isinstance(action, Unbounded):
        return NormalHead(size, log_scale_range, dtype=dtype, device=device)
    low, high = (
        bound.reshape(-1).to(dtype=dtype, device="cpu")
        for bound in (action.space.low, action.space.high)
    )
    finite = torch.isfinite(low) & torch.isfinite(high)
    if bool(finite.all()):
        if bool((low >= high).any()):
            raise ValueError(f"action has low >= high: {low.tolist()} and {high.tolist()}.")
        return TanhNormalHead(low.to(device), high.to(device), log_scale_range)
    if bool((torch.isinf(low) & torch.isinf(high)).all()):
        return NormalHead(size, log_scale_range, dtype=dtype, device=device)
    raise ValueError(
        f"action has bounds {low.tolist()} to {high.tolist()}, expected all finite or all infinite."
    )


def _uniform_head(head: NormalHead | TanhNormalHead) -> UniformHead:
    if not isinstance(head, TanhNormalHead):
        raise ValueError(
            "reverse_action is 'uniform', but the action is unbounded, expected finite bounds: "
            "there is no uniform distribution over all numbers."
        )
    return UniformHead(head.middle - head.half_range, head.middle + head.half_range)

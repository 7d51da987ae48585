"""Actions of several keys: one flat row inside the model, whatever each key's kind.

Composite action specs (a gripper beside a motor, a move beside a force, agents of their own kinds):
independent given the state, each with the head of its own spec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.data.tensor_specs import Composite, TensorSpec

from torchrl_recall.checks import check_key
from torchrl_recall.model.action import ActionCodec
from torchrl_recall.model.heads import TanhNormalHead
from torchrl_recall.model.observation import as_mapping


class JointHead(nn.Module):
    """Independent heads side by side, given the state.

    A flat action holds the parts' numbers one after the other; class indices stand as numbers of
    the model's dtype. All noise is standard normal; where a part wants uniform noise, it gets its
    normal CDF.

    Args:
        heads (sequence of nn.Module): the parts' heads.
        unit (Tensor): tells dtype and device.

    Examples:
        >>> import torch
        >>> from torchrl_recall.model.heads import CategoricalHead, NormalHead
        >>> head = JointHead([CategoricalHead(2), NormalHead(1, (-5.0, 2.0))], torch.ones(()))
        >>> parameters = torch.tensor([0.0, 9.0, 5.0, -99.0])  # class 1, and a number near 5
        >>> head.sample(parameters, torch.zeros(2))[0]
        tensor([1., 5.])
    """

    noise_kind = "normal"
    unit: Tensor

    def __init__(self, heads: Sequence[nn.Module], unit: Tensor) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.register_buffer("unit", unit, persistent=False)
        parts: list[Any] = list(heads)
        self.sizes = [head.size for head in parts]
        self.noise_sizes = [head.noise_size for head in parts]
        self.output_sizes = [head.output_size for head in parts]
        self.size, self.noise_size = sum(self.sizes), sum(self.noise_sizes)
        self.output_size = sum(self.output_sizes)
        self.feature_size = sum(head.feature_size for head in parts)

    def split(self, value: Tensor) -> list[Any]:
        """Return the parts of a flat action as their own heads know them."""
        parts = value.split(self.sizes, -1)
        return [_as_class(head, part) for head, part in zip(self.heads, parts, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return a flat action, ``[*B, size]``, of the parts as their own heads know them."""
        rows = [
            part.to(self.unit.dtype) if _is_row(head) else part.unsqueeze(-1).to(self.unit.dtype)
            for head, part in zip(self.heads, parts, strict=True)
        ]
        return torch.cat(rows, -1)

    @torch.no_grad()
    def start_scale(self, layer: nn.Module) -> None:
        """Let a network's last layer begin where the parts' heads ask for it."""
        assert isinstance(layer, nn.Linear)
        low = 0
        for head, width in zip(self.heads, self.output_sizes, strict=True):
            start: Any = getattr(head, "start_scale", None)
            if start is not None:
                rows = nn.Linear(layer.in_features, width, device="meta")
                # Views: what is written there is the layer's own.
                rows.weight = nn.Parameter(layer.weight[low : low + width])
                rows.bias = nn.Parameter(layer.bias[low : low + width])
                start(rows)
            low += width

    def features(self, value: Tensor) -> Tensor:
        """Return the parts' features, as the delta network sees them."""
        parts: Any = zip(self.heads, self.split(value), strict=True)
        return torch.cat([head.features(part).to(value.dtype) for head, part in parts], -1)

    def log_prob(self, parameters: Tensor, value: Tensor) -> Tensor:
        """Log-density of a flat action: the sum of the parts'."""
        split = parameters.split(self.output_sizes, -1)
        parts: Any = zip(self.heads, split, self.split(value), strict=True)
        return torch.stack([head.log_prob(*part) for head, *part in parts]).sum(0)

    @property
    def samples_entropy(self) -> bool:
        """Whether a part's entropy is an estimate from noise."""
        return any(samples_entropy(head) for head in self.heads)

    def entropy(self, parameters: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the joint entropy, ``[*B]``; ``noise`` is ``[*B, size]`` standard normal."""
        split = parameters.split(self.output_sizes, -1)
        noises = [None] * len(split) if noise is None else noise.split(self.sizes, -1)
        parts: Any = zip(self.heads, split, noises, strict=True)
        return torch.stack([head.entropy(*part) for head, *part in parts]).sum(0)

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return a flat action and its log-density from standard normal ``noise``."""
        split = parameters.split(self.output_sizes, -1), noise.split(self.noise_sizes, -1)
        values, log_probs = [], []
        parts: Any = zip(self.heads, *split, strict=True)
        for head, parameter, numbers in parts:
            if head.noise_kind == "uniform":
                numbers = torch.special.ndtr(numbers)
            value, log_prob = head.sample(parameter, numbers)
            values.append(value)
            log_probs.append(log_prob)
        return self.join(values), torch.stack(log_probs).sum(0)


class JointActionCodec(nn.Module):
    """Reads, checks and restores actions of several keys; see `ActionCodec`.

    Args:
        actions (mapping): key to size (int: bounded to [-1, 1]) or spec, in the order of the row.
        log_scale_range (pair of float): bounds of the log-scale of continuous actions.
        dtype (torch.dtype): dtype of the model.
        device (torch.device, optional): device of the statistics.
        uniform (bool): uniform over all classes and boxes, without a network.

    Raises:
        TypeError: a spec that has no head.
        ValueError: no keys, or classes that the dtype cannot count.
    """

    format = "joint"

    def __init__(
        self,
        actions: Mapping[NestedKey, int | TensorSpec],
        log_scale_range: tuple[float, float],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        uniform: bool = False,
    ) -> None:
        super().__init__()
        if not actions:
            raise ValueError("action must name at least one key, got none.")
        self.keys: list[NestedKey] = [unravel_key(key) for key in actions]
        options: dict[str, Any] = {"dtype": dtype, "device": device, "uniform": uniform}
        self.is_uniform = uniform
        self.parts = nn.ModuleList(
            ActionCodec(one, log_scale_range, **options) for one in actions.values()
        )
        parts: list[Any] = list(self.parts)
        widest = max([0, *(p.head.output_size for p in parts if p.format != "continuous")])
        if widest > 1 / torch.finfo(dtype).eps:
            raise ValueError(
                f"action has {widest} classes, more than {dtype} can count; take a wider dtype."
            )
        heads = [part.head for part in parts]
        self.head = JointHead(heads, torch.ones((), dtype=dtype, device=device))
        self.shape = torch.Size([self.head.size])

    def read(
        self,
        data: TensorDictBase,
        key: Sequence[NestedKey],
        device: torch.device,
        *,
        require_finite: bool = True,
    ) -> Tensor:
        """Read the actions of ``data`` as one flat row.

        Args:
            data (TensorDictBase): holds the actions, with any batch shape ``*B``.
            key (list of NestedKey): their names, in the codec's order.
            device (torch.device): where the model is.
            require_finite (bool): refuse non-finite values.

        Returns:
            Tensor: ``[*B, size]``.

        Raises:
            KeyError: a key is missing.
            ValueError: wrong number of keys, shapes, dtypes, device, ranges or non-finite values.
        """
        if isinstance(key, str | tuple) or len(key) != len(self.keys):
            raise ValueError(
                f"action must name {len(self.keys)} keys in a list, in the order of {self.keys}, "
                f"got {key!r}."
            )
        parts: Any = zip(self.parts, key, strict=True)
        return self.head.join(
            [part.read(data, one, device, require_finite=require_finite) for part, one in parts]
        )

    def restore(self, action: Tensor) -> list[Tensor]:
        """Turn flat rows ``[*B, size]`` back into each key's shape and dtype.

        Args:
            action (Tensor): ``[*B, size]``.

        Returns:
            list of Tensor: in the order of the keys.
        """
        parts: Any = zip(self.parts, self.head.split(action), strict=True)
        return [part.restore(value) for part, value in parts]

    def blank(self, unit: Tensor) -> Tensor:
        """Return a flat action that is valid, of no batch, in the dtype and device of ``unit``."""
        return unit.new_zeros(self.head.size)

    def update_normalization(self, action: Tensor, mask: Tensor | None = None) -> None:
        """Merge real actions into the statistics of unbounded parts.

        Args:
            action (Tensor): ``[N, size]``.
            mask (Tensor, optional): ``[N]`` bool, True = use the row.
        """
        parts: Any = zip(self.parts, self.head.split(action), strict=True)
        for part, value in parts:
            part.update_normalization(value, mask)


def build_action(
    action: int | TensorSpec | Mapping[NestedKey, int | TensorSpec],
    action_key: NestedKey,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Return the codec of a model's action, and its key: a list of keys if there are several.

    Args:
        action (int, TensorSpec or mapping): size, spec, or a mapping or ``Composite`` of them.
        action_key (NestedKey): name of an action that is no mapping.
        *args: as for `ActionCodec`.
        **kwargs: as for `ActionCodec`.

    Returns:
        tuple: `ActionCodec` or `JointActionCodec`, and key or list of keys.
    """
    if not isinstance(action, Mapping | Composite):
        return ActionCodec(action, *args, **kwargs), check_key("action_key", action_key)
    actions = as_mapping(action, None)
    if len(actions) == 1:
        ((key, one),) = actions.items()
        return ActionCodec(one, *args, **kwargs), unravel_key(key)
    codec = JointActionCodec(actions, *args, **kwargs)
    return codec, codec.keys


def _is_row(head: Any) -> bool:
    """Return whether a head's values are rows, and not one index for each."""
    return head.noise_kind == "normal" or head.size > 1 or hasattr(head, "cardinality")


def _as_class(head: Any, part: Tensor) -> Tensor:
    """Return a part of a flat action as its head knows it."""
    if head.noise_kind == "normal":
        return part
    return part.long() if _is_row(head) else part.long().squeeze(-1)


def samples_entropy(head: Any) -> bool:
    """Return whether a head's entropy is an estimate from noise."""
    return isinstance(head, TanhNormalHead) or getattr(head, "samples_entropy", False)

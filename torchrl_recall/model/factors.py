"""Several choices at once: `FactoredHead`, and how such actions stand in data.

Multi-categorical, multi-one-hot and binary actions, and one choice for each of several agents:
inside the model they are one row of class indices, a factor each.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torchrl.data.tensor_specs import (
    Binary,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
)

from torchrl_recall.checks import is_one_hot
from torchrl_recall.model.heads import sample_index


class FactoredHead(nn.Module):
    """Independent categorical factors, given the state: one class of each.

    Parameters are the factors' logits, one factor after the other; the joint log-probability is the
    sum of the factors'. It takes one uniform number a factor.

    Args:
        cardinality (sequence of int): number of classes of each of the ``n`` factors.

    Source: the factorisation of Tavakoli et al., *Action Branching Architectures for Deep
    Reinforcement Learning*, AAAI 2018, https://arxiv.org/abs/1711.08946.

    Examples:
        >>> import torch
        >>> head = FactoredHead([2, 3])
        >>> logits = torch.tensor([0.0, 9.0, 0.0, 0.0, 9.0])
        >>> head.sample(logits, torch.tensor([0.5, 0.5]))[0]
        tensor([1, 2])
        >>> head.features(torch.tensor([1, 2]))
        tensor([0, 1, 0, 0, 1])
    """

    noise_kind = "uniform"
    place: Tensor
    offsets: Tensor

    def __init__(self, cardinality: list[int], *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.cardinality = [int(n) for n in cardinality]
        self.size = self.noise_size = len(self.cardinality)
        self.output_size = self.feature_size = sum(self.cardinality)
        offsets = torch.tensor([0, *self.cardinality[:-1]], device=device).cumsum(0)
        classes = torch.arange(max(self.cardinality), device=device)
        place = offsets.unsqueeze(-1) + classes
        missing = classes >= torch.tensor(self.cardinality, device=device).unsqueeze(-1)
        self.register_buffer("offsets", offsets, persistent=False)
        # Where each factor's logits are; behind the last one stands minus infinity.
        self.register_buffer(
            "place", place.masked_fill(missing, self.output_size), persistent=False
        )

    def logits(self, parameters: Tensor) -> Tensor:
        """Return logits by factor, ``[*B, n, classes]``; minus infinity for those there are not."""
        if len(set(self.cardinality)) == 1:
            return parameters.unflatten(-1, (self.size, self.cardinality[0]))
        return nn.functional.pad(parameters, (0, 1), value=-torch.inf)[..., self.place]

    def features(self, value: Tensor) -> Tensor:
        """Return the factors' classes, each one-hot, as the delta network sees them."""
        features = value.new_zeros(*value.shape[:-1], self.feature_size)
        return features.scatter(-1, value + self.offsets, 1)

    def log_prob(self, parameters: Tensor, value: Tensor) -> Tensor:
        """Log-probability of the factors' class indices, ``[*B, n]``, together."""
        log_prob = torch.log_softmax(self.logits(parameters), -1)
        return log_prob.gather(-1, value.unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self, parameters: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the joint entropy in nats, ``[*B]``; needs no noise."""
        log_prob = torch.log_softmax(self.logits(parameters), -1)
        share = log_prob.exp()
        # Classes that there are not: 0 log 0, without its gradient.
        return -(share * log_prob.masked_fill(log_prob.isneginf(), 0.0)).sum((-2, -1))

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return class indices, ``[*B, n]``, and their log-probability from uniform ``noise``."""
        value = sample_index(self.logits(parameters), noise)
        return value, self.log_prob(parameters, value)


class Choices:
    """Several choices at once as they stand in data.

    Args:
        spec (TensorSpec): one that `are_several` finds to be such.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.shape = torch.Size(spec.shape)
        self.dtype = spec.dtype
        self.is_one_hot = isinstance(spec, OneHot)
        self.is_binary = isinstance(spec, Binary)
        any_spec: Any = spec
        if isinstance(spec, MultiCategorical):
            nvec = torch.as_tensor(any_spec.nvec).expand(self.shape)
            self.widths = self.cardinality = nvec.reshape(-1).tolist()
        elif self.is_one_hot:
            nvec = any_spec.nvec if isinstance(spec, MultiOneHot) else [any_spec.space.n]
            self.widths = [int(n) for n in nvec]
            self.cardinality = self.widths * math.prod(self.shape[:-1])
        else:
            self.widths = self.cardinality = [int(any_spec.space.n)] * math.prod(self.shape)

    def read(self, value: Tensor, name: str, batch: torch.Size) -> Tensor:
        """Turn values ``[*B, *shape]`` into class indices ``[*B, n]``.

        Args:
            value (Tensor): as in the data.
            name (str): how refusals call it.
            batch (torch.Size): ``*B``.

        Returns:
            Tensor: int64.

        Raises:
            ValueError: values that are no classes.
        """
        checked = not torch.compiler.is_compiling()
        if self.is_one_hot:
            rows = value.reshape(*batch, -1, sum(self.widths))
            parts = rows.split(self.widths, -1)
            if checked and not all(map(is_one_hot, parts)):
                raise ValueError(
                    f"{name} must be one-hot over {self.widths} classes each, got other rows."
                )
            index = [part.to(torch.int8).argmax(-1) for part in parts]
            return torch.stack(index, -1).reshape(*batch, len(self.cardinality))
        is_bool = value.dtype == torch.bool and not self.is_binary
        if value.is_floating_point() or value.is_complex() or is_bool:
            raise ValueError(f"{name} must hold integers, got dtype {value.dtype}.")
        index = value.reshape(*batch, len(self.cardinality)).long()
        if checked:
            high = torch.tensor(self.cardinality, device=index.device) - 1
            if bool(((index < 0) | (index > high)).any()):
                raise ValueError(
                    f"{name} must lie in 0 to {high.tolist()}, got {index.min()} to {index.max()}."
                )
        return index

    def restore(self, index: Tensor) -> Tensor:
        """Turn class indices ``[*B, n]`` back into values ``[*B, *shape]`` of the spec's dtype."""
        batch = index.shape[:-1]
        if self.is_one_hot:
            rows = index.reshape(*batch, -1, len(self.widths)).unbind(-1)
            hot = [nn.functional.one_hot(i, n) for i, n in zip(rows, self.widths, strict=True)]
            index = torch.cat(hot, -1)
        return index.reshape(batch + self.shape).to(self.dtype)


def are_several(spec: object) -> TypeGuard[TensorSpec]:
    """Return whether a spec is one of several choices at once."""
    if isinstance(spec, MultiCategorical | MultiOneHot | Binary):
        return True
    if isinstance(spec, OneHot):
        return spec.shape[:-1].numel() > 1
    return isinstance(spec, Categorical) and spec.shape.numel() > 1

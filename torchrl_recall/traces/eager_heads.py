"""The heads of the eager walk: how a tile samples them step by step, with buffers of its own.

An actions' class has ``step(t, delta_first)`` and ``finish()``, a deltas' class ``step(t, state,
before)`` and ``log_prob()``; both have ``parameters_at``, where the networks write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from torchrl_recall.model.heads import (
    TANH_LIMIT,
    NormalHead,
    SupportDelta,
    TanhNormalHead,
    normal_log_prob,
    sample_index,
)
from torchrl_recall.model.mixture import MixtureDelta


class _Normals:
    """Samples of a Gaussian head in one tile; keeps what their log-densities need.

    Args:
        noise (Tensor): ``[T, n, size]`` standard normal.
        log_scale (Tensor): memory for what is kept, of the same shape.
        low (Tensor): with ``width``, the log-scale is ``low + width * sigmoid(raw)``.
        width (float): see ``low``.
        outputs (int): of the network, of which the first two for each value count.
    """

    def __init__(
        self, noise: Tensor, log_scale: Tensor, low: Tensor, width: float, outputs: int
    ) -> None:
        self.noise, self.log_scale, self.low, self.width = noise, log_scale, low, width
        # One call for all views: slicing step by step costs as much as the arithmetic.
        self.noise_at = noise.unbind(0)
        self.log_scale_at = self.log_scale.unbind(0)
        num_steps, n, size = noise.shape
        self.scale = noise.new_empty(n, size)
        self.parameters = noise.new_empty(n, outputs)
        self.parameters_at = (self.parameters,) * num_steps
        self.loc = self.parameters[:, :size]
        # The half that is not needed costs less than a step out of line.
        self.gates = torch.empty_like(self.parameters)
        self.gate = self.gates[:, size : 2 * size]

    def sample(self, t: int, base: Tensor, out: Tensor) -> Tensor:
        """Write ``base + scale * noise`` of step ``t``."""
        torch.sigmoid(self.parameters, out=self.gates)
        log_scale = torch.add(self.low, self.gate, alpha=self.width, out=self.log_scale_at[t])
        torch.exp(log_scale, out=self.scale)
        return torch.addcmul(base, self.scale, self.noise_at[t], out=out)


class NormalActions(_Normals):
    """Samples of continuous actions."""

    def __init__(self, walk: Any, noise: Tensor) -> None:
        log_scale = walk.room("action", noise, *noise.shape)
        super().__init__(noise, log_scale, *walk.action_scale, outputs=walk.outputs[1])
        assert isinstance(walk.action_head, NormalHead | TanhNormalHead)
        self.head, self.weight = walk.action_head, walk.action_weight
        self.squashes = isinstance(self.head, TanhNormalHead)
        self.values = torch.empty_like(noise)
        self.value_at = self.values.unbind(0)
        self.squashed = torch.empty_like(self.scale)

    def step(self, t: int, delta_first: Tensor) -> None:
        """Sample, and add the action's share of the delta network's first layer."""
        value = self.sample(t, self.loc, self.value_at[t])
        if self.squashes:
            value = torch.clamp(value, -TANH_LIMIT, TANH_LIMIT, out=self.squashed).tanh_()
        delta_first.addmm_(value, self.weight)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the actions in their own unit and their log-densities."""
        if isinstance(self.head, NormalHead):
            mean, std = self.head.normalizer.mean, self.head.normalizer.std
            log_prob = normal_log_prob(self.noise, self.log_scale) - std.log().sum()
            return torch.addcmul(mean, self.values, std), log_prob
        inside = self.values.clamp(-TANH_LIMIT, TANH_LIMIT)
        # The noise that would have led to the clamped value.
        noise = torch.addcdiv(self.noise, inside - self.values, self.log_scale.exp())
        # tanh changes the scale too, by 1 - tanh(x)², whose log is -2 (x + softplus(-2 x) - log 2).
        squeeze = torch.sub(inside, softplus(inside, beta=-2), alpha=2)
        log_scale = torch.sub(self.log_scale, squeeze, alpha=2)
        log_scale += (4 * self.head.half_range).log()
        log_prob = normal_log_prob(noise, log_scale)
        values = torch.addcmul(self.head.middle, self.head.half_range, inside.tanh_())
        return values, log_prob


class NormalDeltas(_Normals):
    """Samples of Gaussian changes."""

    def __init__(self, walk: Any, noise: Tensor) -> None:
        log_scale = walk.room("delta", noise, *noise.shape)
        super().__init__(noise, log_scale, *walk.delta_scale, outputs=walk.outputs[0])
        self.unit = walk.delta_unit

    def step(self, t: int, state: Tensor, before: Tensor) -> None:
        """Sample, and write the predecessor of ``state``."""
        self.sample(t, state, before).addcmul_(self.loc, self.unit)

    def log_prob(self) -> Tensor:
        """Return the log-densities of all steps; in the place of the log-scales, at the end."""
        return normal_log_prob(self.noise, self.log_scale, out=self.log_scale)


class UniformActions:
    """Uniform actions of a box, all drawn before the first step.

    Args:
        walk (EagerWalk): the walk.
        noise (Tensor): ``[T, n, A]`` standard normal.
    """

    def __init__(self, walk: Any, noise: Tensor) -> None:
        self.head, self.weight = walk.action_head, walk.action_weight
        self.values = torch.erf(noise * 0.5**0.5)
        self.value_at = self.values.unbind(0)

    def step(self, t: int, delta_first: Tensor) -> None:
        """Add the action's share of the delta network's first layer."""
        delta_first.addmm_(self.value_at[t], self.weight)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the actions in their own unit and their log-densities."""
        values = torch.addcmul(self.head.middle, self.head.half_range, self.values)
        return values, self.head.log_prob(values, values)


class MixtureDeltas:
    """Samples of a mixture's changes; log-densities at once, while the parameters are there.

    Args:
        walk (EagerWalk): the walk.
        noise (Tensor): ``[T, n, D + 1]`` standard normal.
    """

    def __init__(self, walk: Any, noise: Tensor) -> None:
        self.head: MixtureDelta = walk.delta_head
        num_steps, n, _ = noise.shape
        self.parameters_at = (noise.new_empty(n, self.head.output_size),) * num_steps
        self.noise_at = noise[..., :-1].unbind(0)
        self.uniform_at = torch.special.ndtr(noise[..., -1]).unbind(0)
        self.log_probs = noise.new_empty(num_steps, n)

    def step(self, t: int, state: Tensor, before: Tensor) -> None:
        """Sample, and write the predecessor of ``state``."""
        drawn = self.head.draw(self.parameters_at[t], self.noise_at[t], self.uniform_at[t])
        torch.add(state, drawn[0], out=before)
        self.log_probs[t] = drawn[1]

    def log_prob(self) -> Tensor:
        """Return the log-densities of all steps."""
        return self.log_probs


class _Classes:
    """Samples of a categorical head in one tile; keeps what their log-probabilities need.

    Args:
        noise (Tensor): ``[T, n, 1]`` uniform in [0, 1).
        num_classes (int): number of classes.
    """

    def __init__(self, noise: Tensor, num_classes: int) -> None:
        self.noise_at = noise.squeeze(-1).unbind(0)
        self.parameters_at = noise.new_empty(*noise.shape[:2], num_classes).unbind(0)
        self.logits: list[Tensor] = []
        self.indices: list[Tensor] = []

    def sample(self, t: int, logits: Tensor) -> Tensor:
        """Return the class indices of step ``t``, the last step first."""
        index = sample_index(logits, self.noise_at[t])
        self.logits.append(logits)
        self.indices.append(index)
        return index

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the class indices and their log-probabilities."""
        logits, index = torch.stack(self.logits[::-1]), torch.stack(self.indices[::-1])
        # Classes first: torch vectorises over what follows, and there may be very few of them.
        log_prob = torch.log_softmax(logits.movedim(-1, 0).contiguous(), 0)
        return index, log_prob.gather(0, index.unsqueeze(0)).squeeze(0)


class ClassActions(_Classes):
    """Samples of categorical actions."""

    def __init__(self, walk: Any, noise: Tensor) -> None:
        super().__init__(noise, walk.action_head.output_size)
        if walk.is_uniform:
            for logits in self.parameters_at:
                logits.zero_()
        self.weight = walk.action_weight

    def step(self, t: int, delta_first: Tensor) -> None:
        """Sample, and add the action's share of the delta network's first layer."""
        delta_first.add_(self.weight[self.sample(t, self.parameters_at[t])])


class FactorActions:
    """Samples of several choices at once."""

    def __init__(self, walk: Any, noise: Tensor) -> None:
        self.head, self.weight = walk.action_head, walk.action_weight
        self.noise_at = noise.unbind(0)
        # Zeros are the logits of uniform factors, which no network writes.
        self.parameters = noise.new_zeros(*noise.shape[:2], self.head.output_size)
        self.parameters_at = self.parameters.unbind(0)
        self.indices = torch.empty_like(noise, dtype=torch.int64)
        self.index_at = self.indices.unbind(0)

    def step(self, t: int, delta_first: Tensor) -> None:
        """Sample, and add the actions' share of the delta network's first layer."""
        index = sample_index(self.head.logits(self.parameters_at[t]), self.noise_at[t])
        self.index_at[t].copy_(index)
        delta_first.add_(embedding_bag(index + self.head.offsets, self.weight, mode="sum"))

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the class indices and their log-probabilities."""
        return self.indices, self.head.log_prob(self.parameters, self.indices)


class ClassDeltas(_Classes):
    """Samples of displacements, or of states as classes."""

    def __init__(self, walk: Any, noise: Tensor) -> None:
        super().__init__(noise, walk.delta_head.output_size)
        self.head, self.codec = walk.delta_head, walk.codec

    def step(self, t: int, state: Tensor, before: Tensor) -> None:
        """Sample, and write the predecessor of ``state``."""
        logits = self.parameters_at[t]
        if isinstance(self.head, SupportDelta):
            index = self.sample(t, self.head.logits(logits, state))
            before.copy_(self.head.displace(state, index))
        else:
            before.copy_(self.codec.from_joint_index(self.sample(t, logits)))

    def log_prob(self) -> Tensor:
        """Return the log-probabilities of all steps."""
        return self.finish()[1]

"""The output heads of the backtracking model: what a network's numbers mean as distributions.

A head turns parameters into log-probabilities of real data and, fed with noise, into samples. It
draws nothing itself: noise comes in as standard normal or uniform numbers, so that every backend of
the trace sampler gives the same numbers for the same noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchrl_recall.normalization import RunningNormalizer
from torchrl_recall.observation import ObservationCodec

LOG_SQRT_2_PI = 0.5 * math.log(2 * math.pi)
# Actions stay this far inside their bounds, where the squashed density is finite.
TANH_MARGIN = 1e-6
TANH_LIMIT = math.atanh(1 - TANH_MARGIN)


def bounded_log_scale(raw: Tensor, interval: tuple[float, float]) -> Tensor:
    """Squash ``raw`` into ``interval``: the log of a scale that cannot vanish or explode."""
    low, high = interval
    return low + (high - low) * torch.sigmoid(raw)


def normal_log_prob(noise: Tensor, log_scale: Tensor) -> Tensor:
    """Log-density of ``loc + exp(log_scale) * noise``, summed over the last dimension."""
    return -(0.5 * noise.square() + log_scale + LOG_SQRT_2_PI).sum(-1)


def tanh_log_jacobian(pre: Tensor) -> Tensor:
    """``log(1 - tanh(pre)²)`` in a form that does not cancel."""
    return 2 * (math.log(2) - pre - nn.functional.softplus(-2 * pre))


def sample_index(logits: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of ``logits`` at ``uniform``.

    Args:
        logits (Tensor): ``[*B, n]``; minus infinity for classes that must not be drawn.
        uniform (Tensor): ``[*B]`` in [0, 1).

    Returns:
        Tensor: ``[*B]`` int64 class indices.
    """
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    # Just below the total, so that rounding never lands behind the last possible class.
    threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]
    threshold = threshold * (1 - torch.finfo(logits.dtype).eps)
    return (cumulative <= threshold).sum(-1)


class NormalHead(nn.Module):
    """Diagonal Gaussian over normalised values, with a bounded learned scale.

    Serves unbounded actions, and the change ``Δ = s_t - s_{t+1}`` of continuous states.

    Args:
        size (int): number of values.
        log_scale_range (tuple of float): bounds of the log-scale, in normalised units.
        floor (float): smallest unit of normalisation.
        dtype (torch.dtype): dtype of the statistics.
        device (torch.device, optional): device of the statistics.
    """

    noise_kind = "normal"

    def __init__(self, size, log_scale_range, *, floor=1e-6, dtype=None, device=None) -> None:
        super().__init__()
        self.size = self.noise_size = self.feature_size = size
        self.output_size = 2 * size
        self.log_scale_range = log_scale_range
        self.normalizer = RunningNormalizer(size, floor, dtype=dtype, device=device)

    def features(self, value: Tensor) -> Tensor:
        """Return the value as the delta network sees it."""
        return self.normalizer.normalize(value)

    def split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and log-scale, in normalised units."""
        loc, raw = parameters.chunk(2, -1)
        return loc, bounded_log_scale(raw, self.log_scale_range)

    def log_prob(self, parameters: Tensor, value: Tensor) -> Tensor:
        """Log-density of ``value`` in its own unit."""
        loc, log_scale = self.split(parameters)
        noise = (self.normalizer.normalize(value) - loc) * torch.exp(-log_scale)
        return normal_log_prob(noise, log_scale + self.normalizer.std.log())

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return a value and its log-density from standard normal ``noise``."""
        loc, log_scale = self.split(parameters)
        value = self.normalizer.denormalize(loc + log_scale.exp() * noise)
        return value, normal_log_prob(noise, log_scale + self.normalizer.std.log())


class TanhNormalHead(nn.Module):
    """Gaussian squashed by tanh into finite bounds: bounded continuous actions.

    Args:
        low (Tensor): ``[size]`` lower bounds.
        high (Tensor): ``[size]`` upper bounds.
        log_scale_range (tuple of float): bounds of the log-scale before squashing.
    """

    noise_kind = "normal"
    middle: Tensor
    half_range: Tensor

    def __init__(self, low: Tensor, high: Tensor, log_scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.size = self.noise_size = self.feature_size = low.numel()
        self.output_size = 2 * self.size
        self.log_scale_range = log_scale_range
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("half_range", (high - low) / 2)

    def features(self, value: Tensor) -> Tensor:
        """Return the action scaled to [-1, 1], as the delta network sees it."""
        return (value - self.middle) / self.half_range

    def split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and log-scale before squashing."""
        loc, raw = parameters.chunk(2, -1)
        return loc, bounded_log_scale(raw, self.log_scale_range)

    def _log_prob(self, pre: Tensor, noise: Tensor, log_scale: Tensor) -> Tensor:
        jacobian = (tanh_log_jacobian(pre) + self.half_range.log()).sum(-1)
        return normal_log_prob(noise, log_scale) - jacobian

    def log_prob(self, parameters: Tensor, value: Tensor) -> Tensor:
        """Log-density of an action; one on its bound counts as just inside."""
        loc, log_scale = self.split(parameters)
        inside = self.features(value).clamp(-1 + TANH_MARGIN, 1 - TANH_MARGIN)
        pre = torch.atanh(inside)
        return self._log_prob(pre, (pre - loc) * torch.exp(-log_scale), log_scale)

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return an action and its log-density from standard normal ``noise``."""
        loc, log_scale = self.split(parameters)
        pre = (loc + log_scale.exp() * noise).clamp(-TANH_LIMIT, TANH_LIMIT)
        value = self.middle + self.half_range * torch.tanh(pre)
        return value, self._log_prob(pre, (pre - loc) * torch.exp(-log_scale), log_scale)


class CategoricalHead(nn.Module):
    """One of ``n`` classes: categorical and one-hot actions, as an index inside the model.

    Args:
        n (int): number of classes.
    """

    noise_kind = "uniform"
    noise_size = 1

    def __init__(self, n: int) -> None:
        super().__init__()
        self.size = 1
        self.output_size = self.feature_size = n

    def features(self, value: Tensor) -> Tensor:
        """Return the index one-hot, as the delta network sees it."""
        return nn.functional.one_hot(value, self.output_size)

    def log_prob(self, parameters: Tensor, value: Tensor) -> Tensor:
        """Log-probability of an index."""
        return torch.log_softmax(parameters, -1).gather(-1, value.unsqueeze(-1)).squeeze(-1)

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return an index and its log-probability from uniform ``noise``."""
        value = sample_index(parameters, noise.squeeze(-1))
        return value, self.log_prob(parameters, value)


class NormalDelta(NormalHead):
    """Predecessor ``s_t = s_{t+1} + Δ`` with a Gaussian change Δ."""

    def predecessor_log_prob(self, parameters: Tensor, state: Tensor, next_state: Tensor) -> Tensor:
        """Log-density of the change that leads back to ``state``."""
        return self.log_prob(parameters, state - next_state)

    def predecessor(
        self, parameters: Tensor, next_state: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a predecessor of ``next_state`` and its log-density."""
        delta, log_prob = self.sample(parameters, noise)
        return next_state + delta, log_prob


class SupportDelta(CategoricalHead):
    """Predecessor by one of finitely many displacements; those that leave the spec are masked.

    Args:
        support (Tensor): ``[M, D]`` displacements ``s_t - s_{t+1}``.
        codec (ObservationCodec): knows the bounds of states.
    """

    support: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, support: Tensor, codec: ObservationCodec) -> None:
        super().__init__(len(support))
        self.tolerance = 0.0 if codec.is_discrete else 1e-4
        self.register_buffer("support", support)
        self.register_buffer("low", codec.low - self.tolerance)
        self.register_buffer("high", codec.high + self.tolerance)

    def logits(self, parameters: Tensor, next_state: Tensor) -> Tensor:
        """Return the logits with displacements that leave the spec at minus infinity."""
        reached = next_state.unsqueeze(-2) + self.support
        inside = ((reached >= self.low) & (reached <= self.high)).all(-1)
        # Where nothing stays inside there is no right answer, but there must be a finite one.
        inside = inside | ~inside.any(-1, keepdim=True)
        return parameters.masked_fill(~inside, -torch.inf)

    def predecessor_log_prob(self, parameters: Tensor, state: Tensor, next_state: Tensor) -> Tensor:
        """Log-probability of the displacement to ``state``; minus infinity outside the support."""
        delta = (state - next_state).unsqueeze(-2)
        match = ((delta - self.support).abs() <= self.tolerance).all(-1)
        log_prob = self.log_prob(self.logits(parameters, next_state), match.int().argmax(-1))
        return torch.where(match.any(-1), log_prob, -torch.inf)

    def predecessor(
        self, parameters: Tensor, next_state: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a predecessor of ``next_state`` and its log-probability."""
        index, log_prob = self.sample(self.logits(parameters, next_state), noise)
        return next_state + self.support[index], log_prob


class ClassDelta(CategoricalHead):
    """Predecessor as a class of its own: discrete states without a notion of displacement.

    Args:
        codec (ObservationCodec): numbers the states.
    """

    def __init__(self, codec: ObservationCodec) -> None:
        super().__init__(codec.num_states)
        self.cardinality = tuple(codec.cardinality)
        self.__dict__["codec"] = codec  # shared with the model, not owned

    def predecessor_log_prob(self, parameters: Tensor, state: Tensor, next_state: Tensor) -> Tensor:
        """Log-probability of ``state``."""
        return self.log_prob(parameters, self.codec.joint_index(state))

    def predecessor(
        self, parameters: Tensor, next_state: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a predecessor and its log-probability."""
        index, log_prob = self.sample(parameters, noise)
        return self.codec.from_joint_index(index), log_prob

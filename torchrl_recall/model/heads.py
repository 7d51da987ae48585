"""The output heads of the backtracking model: what a network's numbers mean as distributions.

A head turns parameters into log-probabilities of real data and, fed with noise, into samples. It
draws nothing itself: noise comes in as standard normal or uniform numbers, so that every backend of
the trace sampler gives the same numbers for the same noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchrl_recall.model.normalization import RunningNormalizer
from torchrl_recall.model.observation import ObservationCodec

LOG_SQRT_2_PI = 0.5 * math.log(2 * math.pi)
# Actions stay this far inside their bounds, where the squashed density is finite.
TANH_MARGIN = 1e-6
TANH_LIMIT = math.atanh(1 - TANH_MARGIN)


def bounded_log_scale(raw: Tensor, interval: tuple[float, float]) -> Tensor:
    """Squash ``raw`` into ``interval``: the log of a scale that cannot vanish or explode."""
    low, high = interval
    return low + (high - low) * torch.sigmoid(raw)


def normal_log_prob(noise: Tensor, log_scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Log-density of ``loc + exp(log_scale) * noise``, summed over the last dimension.

    ``out`` is memory for its terms, if there is any to be written over.
    """
    energy = torch.addcmul(log_scale, noise, noise, value=0.5, out=out)
    return -noise.shape[-1] * LOG_SQRT_2_PI - energy.sum(-1)


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
    # Classes first: torch vectorises over what follows, and there may be very few of them.
    columns = logits.movedim(-1, 0)
    cumulative = (columns - columns.amax(0)).exp_().cumsum(0)
    # Just below the total, so that rounding never lands behind the last possible class.
    threshold = uniform * cumulative[-1] * (1 - torch.finfo(logits.dtype).eps)
    return (cumulative <= threshold).sum(0)


class GaussianHead(nn.Module):
    """What Gaussian heads share: location and bounded log-scale from one network output.

    Args:
        size (int): number of values.
        log_scale_range (tuple of float): bounds of the log-scale.
    """

    noise_kind = "normal"

    def __init__(self, size: int, log_scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.size = self.noise_size = self.feature_size = size
        self.output_size = 2 * size
        self.log_scale_range = log_scale_range

    def split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and log-scale."""
        loc, raw = parameters.chunk(2, -1)
        return loc, bounded_log_scale(raw, self.log_scale_range)

    @torch.no_grad()
    def start_scale(self, layer: nn.Module) -> None:
        """Let a network's last layer begin with a scale near 1, the data's own, if in range."""
        assert isinstance(layer, nn.Linear)
        low, high = self.log_scale_range
        share = min(max(-low / (high - low), 0.1), 0.9)
        layer.weight[self.size :] *= 0.1
        layer.bias[self.size :] = math.log(share / (1 - share))


class NormalHead(GaussianHead):
    """Diagonal Gaussian over normalised values, with a bounded learned scale.

    Serves unbounded actions, and the change ``Δ = s_t - s_{t+1}`` of continuous states.

    Args:
        size (int): number of values.
        log_scale_range (tuple of float): bounds of the log-scale, in normalised units.
        dtype (torch.dtype): dtype of the statistics.
        device (torch.device, optional): device of the statistics.
    """

    def __init__(
        self,
        size: int,
        log_scale_range: tuple[float, float],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(size, log_scale_range)
        self.normalizer = RunningNormalizer(size, 1e-6, dtype=dtype, device=device)

    def features(self, value: Tensor) -> Tensor:
        """Return the value as the delta network sees it."""
        return self.normalizer.normalize(value)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the mean in normalised units."""
        return self.split(parameters)[0]

    def entropy(self, parameters: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the entropy of the density in its own unit, ``[*B]``; needs no noise."""
        log_scale = self.split(parameters)[1] + self.normalizer.std.log()
        return log_scale.sum(-1) + self.size * (0.5 + LOG_SQRT_2_PI)

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


class TanhNormalHead(GaussianHead):
    """Gaussian squashed by tanh into finite bounds: bounded continuous actions.

    Args:
        low (Tensor): ``[size]`` lower bounds.
        high (Tensor): ``[size]`` upper bounds.
        log_scale_range (tuple of float): bounds of the log-scale before squashing.
    """

    middle: Tensor
    half_range: Tensor

    def __init__(self, low: Tensor, high: Tensor, log_scale_range: tuple[float, float]) -> None:
        super().__init__(low.numel(), log_scale_range)
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("half_range", (high - low) / 2)

    def features(self, value: Tensor) -> Tensor:
        """Return the action scaled to [-1, 1], as the delta network sees it."""
        return (value - self.middle) / self.half_range

    def _log_prob(self, pre: Tensor, noise: Tensor, log_scale: Tensor) -> Tensor:
        jacobian = (tanh_log_jacobian(pre) + self.half_range.log()).sum(-1)
        return normal_log_prob(noise, log_scale) - jacobian

    def log_prob(self, parameters: Tensor, value: Tensor) -> Tensor:
        """Log-density of an action; one on its bound counts as just inside."""
        loc, log_scale = self.split(parameters)
        inside = self.features(value).clamp(-1 + TANH_MARGIN, 1 - TANH_MARGIN)
        pre = torch.atanh(inside)
        return self._log_prob(pre, (pre - loc) * torch.exp(-log_scale), log_scale)

    def entropy(self, parameters: Tensor, noise: Tensor | None = None) -> Tensor:
        """Estimate the entropy, ``[*B]``, by one sample from standard normal ``noise``.

        There is no closed form; gradients go through the sample.
        """
        if noise is None:
            raise ValueError("noise is None, expected standard normal numbers: one sample a row.")
        return -self.sample(parameters, noise)[1]

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

    def entropy(self, parameters: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the entropy in nats, ``[*B]``; needs no noise."""
        log_prob = torch.log_softmax(parameters, -1)
        return -(log_prob.exp() * log_prob).sum(-1)

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
        # Staying put never leaves the spec.
        self.has_dead_ends = support.is_meta or not bool((support == 0).all(-1).any())
        self.register_buffer("low", codec.low - self.tolerance)
        self.register_buffer("high", codec.high + self.tolerance)

    def _inside(self, next_state: Tensor) -> Tensor:
        reached = next_state.unsqueeze(-2) + self.support
        return ((reached >= self.low) & (reached <= self.high)).all(-1)

    def dead_end(self, next_state: Tensor) -> Tensor | None:
        """Return ``[*B]`` bool, where nothing can have come before; None if there is no such."""
        return ~self._inside(next_state).any(-1) if self.has_dead_ends else None

    def logits(self, parameters: Tensor, next_state: Tensor) -> Tensor:
        """Return the logits with displacements that leave the spec at minus infinity."""
        inside = self._inside(next_state)
        # At a dead end there is no right answer, but there must be a finite one.
        return parameters.masked_fill(~inside & inside.any(-1, keepdim=True), -torch.inf)

    def predecessor_log_prob(self, parameters: Tensor, state: Tensor, next_state: Tensor) -> Tensor:
        """Log-probability of the displacement to ``state``; minus infinity outside the support."""
        delta = (state - next_state).unsqueeze(-2)
        match = ((delta - self.support).abs() <= self.tolerance).all(-1)
        log_prob = self.log_prob(self.logits(parameters, next_state), match.int().argmax(-1))
        return torch.where(match.any(-1), log_prob, -torch.inf)

    def predecessor(
        self, parameters: Tensor, next_state: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a predecessor of ``next_state``, itself at a dead end, and its log-probability."""
        index, log_prob = self.sample(self.logits(parameters, next_state), noise)
        return self.displace(next_state, index), log_prob

    def displace(self, next_state: Tensor, index: Tensor) -> Tensor:
        """Return the predecessor by displacement ``index``; a dead end stays where it is."""
        state = next_state + self.support[index]
        dead = self.dead_end(next_state)
        return state if dead is None else torch.where(dead.unsqueeze(-1), next_state, state)


class ClassDelta(CategoricalHead):
    """Predecessor as a class of its own: discrete states without a notion of displacement.

    Args:
        codec (ObservationCodec): numbers the states.
    """

    codec: ObservationCodec

    def __init__(self, codec: ObservationCodec) -> None:
        super().__init__(codec.num_states)
        # Shared with the model, not owned: a submodule would be saved twice.
        self.__dict__["codec"] = codec

    def predecessor_log_prob(self, parameters: Tensor, state: Tensor, next_state: Tensor) -> Tensor:
        """Log-probability of ``state``."""
        return self.log_prob(parameters, self.codec.joint_index(state))

    def predecessor(
        self, parameters: Tensor, next_state: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a predecessor and its log-probability."""
        index, log_prob = self.sample(parameters, noise)
        return self.codec.from_joint_index(index), log_prob

"""Uniform reverse actions over a bounded box: a head without parameters, which has no network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Actions that were scaled and cast may lie this far outside, as a share of the half range.
ROUNDING = 1e-4


class UniformHead(nn.Module):
    """Uniform over a box, whatever the state: nothing to learn, and nothing to run.

    Outside the box, but for rounding, the density is zero.

    Takes standard normal noise, as all heads of continuous actions do, by way of its normal CDF.

    Args:
        low (Tensor): ``[size]`` lower bounds.
        high (Tensor): ``[size]`` upper bounds.

    Examples:
        >>> import torch
        >>> head = UniformHead(torch.tensor([0.0]), torch.tensor([4.0]))
        >>> head.sample(torch.empty(1, 0), torch.zeros(1, 1))
        (tensor([[2.]]), tensor([-1.3863]))
    """

    noise_kind = "normal"
    output_size = 0
    middle: Tensor
    half_range: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.size = self.noise_size = self.feature_size = low.numel()
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("half_range", (high - low) / 2)

    def features(self, value: Tensor) -> Tensor:
        """Return the action scaled to [-1, 1], as the delta network sees it."""
        return (value - self.middle) / self.half_range

    def log_prob(self, parameters: Tensor, value: Tensor) -> Tensor:
        """Log-density of an action: minus infinity outside the box."""
        density = -(2 * self.half_range).log().sum().expand(value.shape[:-1])
        inside = (self.features(value).abs() <= 1 + ROUNDING).all(-1)
        return torch.where(inside, density, -torch.inf)

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return an action and its log-density from standard normal ``noise``."""
        value = self.middle + self.half_range * torch.erf(noise * 0.5**0.5)
        return value, self.log_prob(parameters, value)

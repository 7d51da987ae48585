"""The mixture head: several predecessors of one state, each with a Gaussian of its own.

Another choice than `heads.NormalDelta` for the change ``Δ = s_t - s_{t+1}`` of continuous states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchrl_recall.model.heads import bounded_log_scale, normal_log_prob, sample_index
from torchrl_recall.model.normalization import RunningNormalizer


class MixtureDelta(nn.Module):
    """Predecessor ``s_t = s_{t+1} + Δ``, Δ from a mixture of diagonal Gaussians.

    A single Gaussian averages over the ways into a state: where two doors lead into a room, its
    mean lies inside the wall. A mixture keeps them apart. Parameters are the locations, the raw
    log-scales (both ``[K, D]``, in normalised units) and the logits of the components, in that
    order. All noise is standard normal; the last number of a row picks the component, by way of
    its normal CDF, which is uniform.

    Args:
        size (int): number ``D`` of values.
        num_components (int): number ``K`` of Gaussians.
        log_scale_range (pair of float): bounds of the log-scales, in normalised units.
        dtype (torch.dtype, optional): dtype of the statistics.
        device (torch.device, optional): device of the statistics.

    Source: Bishop, *Mixture Density Networks*, 1994; Goyal et al., *Recall Traces*, ICLR 2019,
    https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> head = MixtureDelta(1, 2, (-5.0, 2.0))
        >>> parameters = torch.tensor([-1.0, 1.0, -9.0, -9.0, 0.0, 0.0])  # at -1 and at 1, narrow
        >>> noise = torch.tensor([[0.0, -1.0], [0.0, 1.0]])
        >>> before, _ = head.predecessor(parameters.expand(2, 6), torch.zeros(2, 1), noise)
        >>> before
        tensor([[-1.],
                [ 1.]])
    """

    noise_kind = "normal"

    def __init__(
        self,
        size: int,
        num_components: int,
        log_scale_range: tuple[float, float],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.num_components = num_components
        self.log_scale_range = log_scale_range
        self.noise_size = size + 1
        self.output_size = num_components * (2 * size + 1)
        self.normalizer = RunningNormalizer(size, 1e-6, dtype=dtype, device=device)

    def split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return locations and log-scales, ``[*B, K, D]``, and logits, ``[*B, K]``."""
        part = self.num_components * self.size
        loc, raw, logits = parameters.split([part, part, self.num_components], -1)
        shape = (self.num_components, self.size)
        log_scale = bounded_log_scale(raw.unflatten(-1, shape), self.log_scale_range)
        return loc.unflatten(-1, shape), log_scale, logits

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the mean change in normalised units, ``[*B, D]``."""
        loc, _, logits = self.split(parameters)
        return (torch.softmax(logits, -1).unsqueeze(-1) * loc).sum(-2)

    @torch.no_grad()
    def start_scale(self, layer: nn.Module) -> None:
        """Let a network's last layer begin apart: components that are equal would stay so.

        Locations are spread with variance 1, the data's own; scales begin near 1 and the components
        equally likely.
        """
        assert isinstance(layer, nn.Linear)
        low, high = self.log_scale_range
        share = min(max(-low / (high - low), 0.1), 0.9)
        part = self.num_components * self.size
        spread = torch.randn_like(layer.bias[:part]).view(self.num_components, self.size)
        spread -= spread.mean(0)
        spread /= spread.square().mean(0).sqrt().clamp_min(1e-6)
        layer.bias[:part] += spread.flatten()
        layer.weight[part:] *= 0.1
        layer.bias[part : 2 * part] = math.log(share / (1 - share))
        layer.bias[2 * part :] = 0.0

    def _log_prob(self, value: Tensor, loc: Tensor, log_scale: Tensor, logits: Tensor) -> Tensor:
        """Log-density, in its own unit, of a value in normalised units."""
        noise = (value.unsqueeze(-2) - loc) * torch.exp(-log_scale)
        log_prob = normal_log_prob(noise, log_scale + self.normalizer.std.log())
        return (torch.log_softmax(logits, -1) + log_prob).logsumexp(-1)

    def log_prob(self, parameters: Tensor, value: Tensor) -> Tensor:
        """Log-density of ``value`` in its own unit, over all components."""
        return self._log_prob(self.normalizer.normalize(value), *self.split(parameters))

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return a value and its log-density, over all components, from standard normal noise.

        Args:
            parameters (Tensor): ``[*B, output_size]``.
            noise (Tensor): ``[*B, D + 1]``; the last number picks the component.

        Returns:
            tuple: ``[*B, D]`` and ``[*B]``.
        """
        return self.draw(parameters, noise[..., :-1], torch.special.ndtr(noise[..., -1]))

    def draw(self, parameters: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `sample` does, from ``[*B, D]`` normal and ``[*B]`` uniform noise."""
        loc, log_scale, logits = self.split(parameters)
        component = sample_index(logits, uniform)
        chosen = component[..., None, None].expand(*component.shape, 1, self.size)
        scale = log_scale.gather(-2, chosen).squeeze(-2).exp()
        value = loc.gather(-2, chosen).squeeze(-2) + scale * noise
        log_prob = self._log_prob(value, loc, log_scale, logits)
        return self.normalizer.denormalize(value), log_prob

    def predecessor_log_prob(self, parameters: Tensor, state: Tensor, next_state: Tensor) -> Tensor:
        """Log-density of the change that leads back to ``state``."""
        return self.log_prob(parameters, state - next_state)

    def predecessor(
        self, parameters: Tensor, next_state: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a predecessor of ``next_state`` and its log-density."""
        delta, log_prob = self.sample(parameters, noise)
        return next_state + delta, log_prob

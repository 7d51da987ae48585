"""Running mean and scale of real data, kept as buffers of the backtracking model.

Written here rather than taken from ``torchrl``'s ``RunningMeanStd`` because it must keep the
model's dtype (that one casts to float32) and skip masked rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningNormalizer(nn.Module):
    """Mean and standard deviation of every row seen so far (Chan et al., 1979).

    Args:
        size (int): number of features.
        floor (float): smallest standard deviation, in the unit of the data.
        dtype (torch.dtype, optional): dtype of the statistics.
        device (torch.device, optional): device of the statistics.

    Examples:
        >>> import torch
        >>> normalizer = RunningNormalizer(1)
        >>> normalizer.update(torch.tensor([[1.0], [3.0]]))
        >>> normalizer.normalize(torch.tensor([[3.0]]))
        tensor([[1.]])
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(
        self,
        size: int,
        floor: float = 1e-4,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(size, dtype=dtype, device=device))
        self.register_buffer("variance", torch.ones(size, dtype=dtype, device=device))
        # An integer never saturates and survives ``.to(dtype)``.
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def std(self) -> Tensor:
        """Standard deviation of each feature, at least ``floor``."""
        return self.variance.sqrt().clamp_min(self.floor)

    @torch.no_grad()
    def update(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Merge the kept rows into the statistics.

        Args:
            rows (Tensor): ``[N, size]`` real data.
            mask (Tensor, optional): ``[N]`` bool, True = use the row.
        """
        if mask is None:
            mask = rows.new_ones(rows.shape[:1], dtype=torch.bool)
        kept = mask.unsqueeze(-1)
        rows = torch.where(kept, rows, torch.zeros_like(rows))
        count = mask.sum()
        total = self.count + count
        divisor = count.clamp_min(1).to(rows.dtype)
        mean = rows.sum(0) / divisor
        squares = torch.where(kept, (rows - mean).square(), torch.zeros_like(rows)).sum(0)
        share = count.to(rows.dtype) / total.clamp_min(1).to(rows.dtype)
        shift = mean - self.mean
        merged = (
            self.variance * (1 - share) + (squares / divisor) * share
        ) + shift.square() * share * (1 - share)
        self.mean.add_(shift * share)
        self.variance.copy_(torch.where(total > 0, merged, self.variance))
        self.count.copy_(total)

    def normalize(self, rows: Tensor) -> Tensor:
        """Return ``(rows - mean) / std``."""
        return (rows - self.mean) / self.std

    def denormalize(self, rows: Tensor) -> Tensor:
        """Return ``rows * std + mean``."""
        return rows * self.std + self.mean

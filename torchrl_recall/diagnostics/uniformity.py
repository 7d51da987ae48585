"""Whether a model's spread is right: real transitions through its cumulative distributions.

A likelihood ranks models and says nothing of their shape; this says where the shape is wrong. Two
modes of predecessor under one Gaussian, or a scale that is off, show as a PIT that is not uniform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.checks import check_choice, check_device, check_real
from torchrl_recall.diagnostics.cdf import model_cdf
from torchrl_recall.model import BacktrackModel
from torchrl_recall.transitions import usable_rows

Factor = Literal["action", "delta"]


class Calibration(NamedTuple):
    """The probability integral transform (PIT) of real transitions, against the uniform.

    The p-values take rows as independent; those of a trajectory may not be.

    Examples:
        >>> import torch
        >>> half = torch.tensor([0.5])
        >>> found = Calibration(half[None], half, half, torch.tensor([0.9]), torch.tensor([[0.8]]))
        >>> round(found.scalars()["coverage_90"], 2)  # too sure: 0.9 would be right
        0.8
    """

    pit: Tensor
    """``F(value)``, float64 ``[N, D]``; uniform on [0, 1] if the model is right."""
    distance: Tensor
    """Kolmogorov-Smirnov distance of each dimension, ``[D]``, in [0, 1]."""
    p_value: Tensor
    """Probability of such a distance if the model is right, asymptotically, ``[D]``."""
    levels: Tensor
    """Central intervals looked at, ``[L]``."""
    coverage: Tensor
    """Share of values inside each of them, ``[D, L]``; ``levels`` if the model is right."""

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger: the worst dimension's, and the mean coverage."""
        named = {
            "distance": float(self.distance.max()),
            # Bonferroni's, over dimensions.
            "p_value": min(1.0, float(self.p_value.min()) * len(self.p_value)),
        }
        for level, share in zip(self.levels.tolist(), self.coverage.mean(0).tolist(), strict=True):
            named[f"coverage_{round(100 * level)}"] = share
        return named


@torch.no_grad()
def calibration(
    model: BacktrackModel,
    data: TensorDictBase,
    *,
    factor: Factor = "delta",
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    mask_nonfinite: bool = False,
    generator: torch.Generator | None = None,
) -> Calibration:
    """Put real transitions through a model's cumulative distributions.

    Args:
        model (BacktrackModel): the model.
        data (TensorDictBase): real transitions of any batch shape with the model's ``in_keys``;
            rows masked at ``("collector", "mask")`` are left out. Best ones held out by `fit`: a
            model is always too sure of those it knows.

    Keyword Args:
        factor (str): ``"delta"``, the change of state, or ``"action"``. Bounded actions on their
            very bounds share one value of the PIT: where many are, it is not uniform.
        levels (sequence of float): central intervals whose coverage to report, in (0, 1).
        mask_nonfinite (bool): leave out rows with NaN or infinite entries instead of refusing them.
        generator (torch.Generator, optional): on the model's device, for categorical heads, whose
            PIT is randomised inside the jump of its class; None is torch's own.

    Returns:
        Calibration: PIT, its distance from the uniform, and the coverage of central intervals.

    Raises:
        KeyError: a key is missing.
        TypeError: not a backtracking model, or a head without a known cumulative distribution.
        ValueError: another factor, levels outside (0, 1), empty or non-finite data.

    Source: Dawid, 1984, "Present position and potential developments: the prequential approach";
    for classes Czado et al., 2009, "Predictive model assessment for count data".

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.diagnostics import calibration
        >>> data = TensorDict({"observation": torch.randn(500, 3), "action": torch.zeros(500, 1),
        ...                    "next": {"observation": torch.zeros(500, 3)}}, [500])
        >>> found = calibration(BacktrackModel(3, 1, num_cells=(32,)), data)
        >>> found.pit.shape, found.coverage.shape
        (torch.Size([500, 3]), torch.Size([3, 4]))
    """
    if not isinstance(model, BacktrackModel):
        raise TypeError(f"model must be a BacktrackModel, got {type(model).__name__}.")
    check_choice("factor", factor, Factor)
    chosen = [
        check_real("levels", level, 0.0, 1.0, open_low=True, open_high=True) for level in levels
    ]
    if generator is not None:
        check_device("generator", generator.device, model.device)
    data = data.reshape(-1)
    rows = usable_rows(BacktrackLoss(model), data, mask_nonfinite=mask_nonfinite)
    if not bool(rows.any()):
        raise ValueError(f"data has no row to look at: none of {len(data)} is kept.")
    kept: Any = data[rows.to(data.device or rows.device)]
    state, action, next_state = model.read(kept)
    uniform = torch.rand(len(state), generator=generator, dtype=torch.float64, device=state.device)
    pit = model_cdf(model, factor, state, action, next_state, uniform)
    distance = uniform_distance(pit)
    wanted = pit.new_tensor(chosen)
    inside = (pit.unsqueeze(-1) - 0.5).abs() <= wanted / 2
    coverage = inside.double().mean(0)
    return Calibration(pit, distance, kolmogorov_p_value(distance, len(pit)), wanted, coverage)


def uniform_distance(values: Tensor) -> Tensor:
    """Return the Kolmogorov-Smirnov distance of samples from the uniform on [0, 1].

    Args:
        values (Tensor): ``[N, *D]``.

    Returns:
        Tensor: ``[*D]``, float64.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import uniform_distance
        >>> uniform_distance(torch.tensor([0.25, 0.75])).item()
        0.25
    """
    ordered = values.double().sort(0).values
    n = len(ordered)
    rank = torch.arange(n, dtype=ordered.dtype, device=ordered.device)
    rank = rank.reshape(n, *[1] * (ordered.ndim - 1))
    return torch.maximum((rank + 1) / n - ordered, ordered - rank / n).amax(0)


def kolmogorov_p_value(distance: Tensor, count: int) -> Tensor:
    """Return how likely a Kolmogorov-Smirnov distance is to be exceeded by chance.

    The limit distribution with Stephens' correction for finite samples; good from ten samples on.

    Args:
        distance (Tensor): any shape, in [0, 1].
        count (int): number of samples.

    Returns:
        Tensor: p-values, float64.

    Source: Stephens, 1970, "Use of the Kolmogorov-Smirnov, Cramér-von Mises and related statistics
    without extensive tables".

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import kolmogorov_p_value
        >>> kolmogorov_p_value(torch.tensor([0.0, 0.135, 0.5]), 100).round(decimals=3).tolist()
        [1.0, 0.047, 0.0]
    """
    root = math.sqrt(count)
    scaled = (root + 0.12 + 0.11 / root) * distance.double()
    # Two series for one function: this one converges for large distances, that one for small.
    j = torch.arange(1, 21, dtype=torch.float64, device=distance.device)
    sign = 1 - 2 * ((j + 1) % 2)
    upper = 2 * (sign * torch.exp(-2 * (j * scaled.unsqueeze(-1)).square())).sum(-1)
    low = scaled.clamp_min(1e-3).unsqueeze(-1)
    terms = torch.exp(-((2 * j - 1) * math.pi / low).square() / 8)
    lower = 1 - math.sqrt(2 * math.pi) * (terms / low).sum(-1)
    return torch.where(scaled < 1, lower, upper).clamp(0, 1)

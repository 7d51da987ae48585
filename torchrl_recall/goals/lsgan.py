"""The least-squares objective of GoalGAN, on scores alone. For `gan.py`.

Source: Held, Geng, Florensa, Abbeel, *Automatic Goal Generation for Reinforcement Learning Agents*,
ICML 2018, https://arxiv.org/abs/1705.06366, equation 5.
"""

from __future__ import annotations

from torch import Tensor


def discriminator_loss(
    score: Tensor, label: Tensor, generated_score: Tensor, *, a: float, b: float
) -> Tensor:
    """Fit the scores: ``b`` for good goals, ``a`` for other goals and for generated ones.

    Args:
        score (Tensor): ``[n]``, the discriminator's scores of goals that were tried.
        label (Tensor): ``[n]``, 1 (or True) for a good goal, else 0.
        generated_score (Tensor): ``[m]``, its scores of generated goals.

    Keyword Args:
        a (float): target of the scores of other goals and of generated ones.
        b (float): target of the scores of good goals.

    Returns:
        Tensor: a scalar, ``mean(y (D - b)² + (1 - y) (D - a)²) + mean((D_generated - a)²)``.

    Examples:
        >>> import torch
        >>> score, label = torch.tensor([1.0, 0.0]), torch.tensor([True, False])
        >>> discriminator_loss(score, label, torch.tensor([1.0]), a=-1.0, b=1.0)
        tensor(4.5000)
    """
    label = label.to(score.dtype)
    real = label * (score - b) ** 2 + (1 - label) * (score - a) ** 2
    return real.mean() + ((generated_score - a) ** 2).mean()


def generator_loss(generated_score: Tensor, *, c: float) -> Tensor:
    """Move the scores of generated goals to ``c``.

    Args:
        generated_score (Tensor): ``[m]``, the discriminator's scores of generated goals.

    Keyword Args:
        c (float): their target.

    Returns:
        Tensor: a scalar, ``mean((D_generated - c)²)``.

    Examples:
        >>> import torch
        >>> generator_loss(torch.tensor([1.0, -3.0]), c=0.0)
        tensor(5.)
    """
    return ((generated_score - c) ** 2).mean()

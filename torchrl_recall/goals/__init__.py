"""Goals for goal-conditioned policies: GoalGAN (Held et al., 2018), and how often goals succeed."""

from torchrl_recall.goals.gan import GoalGAN
from torchrl_recall.goals.success import success_rates

__all__ = ["GoalGAN", "success_rates"]

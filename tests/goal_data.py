"""What tests of GoalGAN share: one with fixed seeds, and a ring of good goals."""

from __future__ import annotations

import torch

from torchrl_recall import GoalGAN


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_gan(goal=2, seed=0, **kwargs):
    torch.manual_seed(seed)
    return GoalGAN(goal, generator=generator(seed), **kwargs)


def in_ring(goals):
    radius = goals.norm(dim=-1)
    return (radius > 0.4) & (radius < 0.7)


def fit_ring(gan, rounds, num_steps=60):
    log = None
    for _ in range(rounds):
        goals = torch.cat([gan.sample(150), gan.space.uniform(50, gan.generator)])
        log = gan.update(goals, labels=in_ring(goals), num_steps=num_steps)
    return log

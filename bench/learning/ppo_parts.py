"""What PPO is made of in these experiments, from TorchRL's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensordict.nn import TensorDictModule
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE


@dataclass(frozen=True)
class PPONumbers:
    """Numbers that each PPO learner has."""

    num_envs: int = 64
    rollout_steps: int = 32
    num_cells: int = 64
    learning_rate: float = 1e-3
    gamma: float = 0.98
    lmbda: float = 0.95
    epochs: int = 4
    minibatch: int = 1024
    clip: float = 0.2
    entropy_coeff: float = 1e-2
    max_grad_norm: float = 0.5


class PPOParts(NamedTuple):
    """An actor with what trains it and its critic."""

    actor: ProbabilisticActor
    advantage: GAE
    loss: ClipPPOLoss
    optimizer: torch.optim.Adam


def make_ppo(
    policy: TensorDictModule,
    critic: TensorDictModule,
    numbers: PPONumbers,
    *,
    normalize_advantage: bool,
) -> PPOParts:
    """Build PPO around two networks.

    Args:
        policy: writes ``"loc"`` and ``"scale"`` of a squashed Gaussian.
        critic: writes ``"state_value"``.
        numbers: of the learner.
        normalize_advantage: as `ClipPPOLoss` has it.
    """
    actor = ProbabilisticActor(
        policy,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    loss = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=numbers.clip,
        entropy_coeff=numbers.entropy_coeff,
        normalize_advantage=normalize_advantage,
    )
    return PPOParts(
        actor,
        GAE(gamma=numbers.gamma, lmbda=numbers.lmbda, value_network=critic),
        loss,
        torch.optim.Adam(loss.parameters(), lr=numbers.learning_rate),
    )

"""The walk's parts as TensorDict modules: a policy, and a transition to the predecessor.

What the rollout and the loop share. Log-probabilities of actions and changes are included.
"""

from __future__ import annotations

import torch
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal

from torchrl_recall import BacktrackModel
from torchrl_recall.model.heads import (
    CategoricalHead,
    NormalDelta,
    SupportDelta,
    TanhNormalHead,
    bounded_log_scale,
)


def policy_and_transition(model: BacktrackModel) -> tuple[ProbabilisticActor, TensorDictModule]:
    """Return a policy, and a module from observation and action to the predecessor.

    Args:
        model (BacktrackModel): whose networks to use.

    Returns:
        tuple: the policy writes ``"action"`` and ``"action_log_prob"``, the transition
        ``"observation"`` and ``"delta_log_prob"``.
    """
    by_class = isinstance(model.action.head, CategoricalHead)
    return (_categorical if by_class else _gaussian)(model)


class _Normal(nn.Module):
    """Location and bounded scale from a network's output."""

    def __init__(self, network: nn.Module, log_scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.network, self.log_scale_range = network, log_scale_range

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.network(*inputs).chunk(2, -1)
        return loc, bounded_log_scale(raw, self.log_scale_range).exp()


def _gaussian(model: BacktrackModel) -> tuple[ProbabilisticActor, TensorDictModule]:
    action_head, delta_head = model.action.head, model.delta_head
    assert isinstance(action_head, TanhNormalHead)
    assert isinstance(delta_head, NormalDelta)
    policy = ProbabilisticActor(
        TensorDictModule(
            _Normal(model.action_network, action_head.log_scale_range),
            in_keys=["observation"],
            out_keys=["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )
    # TorchRL's MLP concatenates several inputs.
    parameters = TensorDictModule(
        _Normal(model.delta_network, delta_head.log_scale_range),
        in_keys=["observation", "action"],
        out_keys=["loc", "scale"],
    )
    change = _drawn(parameters, IndependentNormal)
    add = TensorDictModule(torch.add, in_keys=["observation", "change"], out_keys=["observation"])
    return policy, TensorDictSequential(change, add)  # pyright: ignore[reportArgumentType]


def _categorical(model: BacktrackModel) -> tuple[ProbabilisticActor, TensorDictModule]:
    head = model.delta_head
    assert isinstance(head, SupportDelta)
    policy = ProbabilisticActor(
        TensorDictModule(model.action_parameters, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )

    def logits(action: Tensor, state: Tensor) -> Tensor:
        return head.logits(model.delta_parameters(action, state), state)

    parameters = TensorDictModule(logits, in_keys=["action", "observation"], out_keys=["logits"])
    change = _drawn(parameters, torch.distributions.Categorical)
    add = TensorDictModule(
        lambda state, index: state + head.support[index],
        in_keys=["observation", "change"],
        out_keys=["observation"],
    )
    return policy, TensorDictSequential(change, add)  # pyright: ignore[reportArgumentType]


def _drawn(parameters: TensorDictModule, distribution: type) -> ProbabilisticTensorDictSequential:
    draw = ProbabilisticTensorDictModule(
        in_keys=parameters.out_keys,
        out_keys=["change"],
        distribution_class=distribution,
        return_log_prob=True,
        log_prob_key="delta_log_prob",
        default_interaction_type=InteractionType.RANDOM,  # pyright: ignore[reportArgumentType]
    )
    return ProbabilisticTensorDictSequential(parameters, draw)  # pyright: ignore

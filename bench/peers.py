"""The same walk by TorchRL itself: what a user would write without this library.

`walker` makes an environment whose step goes back in time (`ModelBasedEnvBase`, TorchRL's own way
to imagine) from the very networks of a `BacktrackModel`, and rolls it out with a
`ProbabilisticActor`. Log-probabilities of actions and changes are included, as in `sample_traces`.

In favour of the peer: no normalisation (the statistics are those of a new model, mean 0 and scale
1), no checks, no masks, no rewards, and the order of time stays reversed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import ModelBasedEnvBase
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal

from torchrl_recall import BacktrackModel
from torchrl_recall.heads import (
    CategoricalHead,
    NormalDelta,
    SupportDelta,
    TanhNormalHead,
    bounded_log_scale,
)


class BackwardEnv(ModelBasedEnvBase):
    """An environment that goes from a state to a predecessor.

    Args:
        transition (TensorDictModule): writes ``"observation"`` and ``"delta_log_prob"``.
        start (Tensor): states to go back from, a row each.
    """

    def __init__(self, transition: TensorDictModule, start: Tensor) -> None:
        rows = start.shape[:1]
        super().__init__(transition, batch_size=rows)
        self.observation_spec = Composite(
            observation=Unbounded(start.shape, dtype=start.dtype),
            # `_step` keeps what the spec names.
            delta_log_prob=Unbounded(rows),
            shape=rows,
        )
        self.full_reward_spec = Composite(shape=rows)
        self.start = start

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        data = {"observation": self.start, "delta_log_prob": torch.zeros(self.batch_size)}
        return TensorDict(data, self.batch_size)


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


def walker(model: BacktrackModel, start: Tensor, num_steps: int) -> Callable[[], TensorDictBase]:
    """Return a function that walks ``num_steps`` back from ``start`` by TorchRL's rollout.

    Args:
        model (BacktrackModel): whose networks to use.
        start (Tensor): ``[B, size]`` states.
        num_steps (int): length of the walk.

    Returns:
        Callable: gives a rollout ``[B, T]``, newest step first.
    """
    by_class = isinstance(model.action.head, CategoricalHead)
    policy, transition = (_categorical if by_class else _gaussian)(model)
    env = BackwardEnv(transition, start)

    @torch.no_grad()
    def walk() -> TensorDictBase:
        return env.rollout(num_steps, policy)

    return walk

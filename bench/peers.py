"""The same networks, walked by TorchRL itself: what a user would write without this library."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import ModelBasedEnvBase
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal


def build_networks(observation_size: int, action_size: int, width: int) -> tuple[MLP, MLP]:
    """Return the action network and the delta network of the benchmark."""
    cells = [width, width]
    action = MLP(
        in_features=observation_size,
        out_features=2 * action_size,
        num_cells=cells,
        activation_class=nn.ReLU,
    )
    delta = MLP(
        in_features=observation_size + action_size,
        out_features=2 * observation_size,
        num_cells=cells,
        activation_class=nn.ReLU,
    )
    return action, delta


class BackwardEnv(ModelBasedEnvBase):
    """An environment whose step goes back in time: TorchRL's own way to imagine."""

    def __init__(self, delta: nn.Module, observation_size: int, action_size: int, rows: int):
        transition = ProbabilisticTensorDictSequential(
            TensorDictModule(
                _DeltaParameters(delta),
                in_keys=["observation", "action"],
                out_keys=["loc", "scale"],
            ),
            ProbabilisticTensorDictModule(
                in_keys=["loc", "scale"],
                out_keys=["delta"],
                distribution_class=IndependentNormal,
                return_log_prob=True,
                log_prob_key="delta_log_prob",
            ),
        )
        add = TensorDictModule(
            torch.add, in_keys=["observation", "delta"], out_keys=["observation"]
        )
        super().__init__(TensorDictSequential(transition, add), batch_size=[rows])
        self.observation_spec = Composite(
            observation=Unbounded((rows, observation_size)), shape=[rows]
        )
        self.action_spec = Bounded(-1, 1, (rows, action_size))
        self.reward_spec = Unbounded((rows, 1))
        self.start = torch.zeros(rows, observation_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = self.world_model(tensordict.select("observation", "action"))
        return TensorDict(
            {
                "observation": out["observation"],
                "reward": torch.zeros(*self.batch_size, 1),
                "done": torch.zeros(*self.batch_size, 1, dtype=torch.bool),
            },
            self.batch_size,
        )

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return TensorDict({"observation": self.start, "done": done}, self.batch_size)


class _DeltaParameters(nn.Module):
    def __init__(self, network: MLP) -> None:
        super().__init__()
        self.network = network
        self.extract = NormalParamExtractor()

    def forward(
        self, observation: torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.extract(self.network(observation, action))


def build_policy(action: nn.Module) -> ProbabilisticActor:
    """Return the action network as a TorchRL policy with log-probabilities."""
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(action, NormalParamExtractor()),
            in_keys=["observation"],
            out_keys=["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )

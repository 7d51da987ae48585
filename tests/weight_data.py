"""What tests of weights share: critics, the weights of a batch, the contract of a weighted loss."""

from __future__ import annotations

import pytest
import torch
from loss_contract import LossContract
from loss_data import WIDTH, recall
from torch import nn
from torchrl.modules import ValueOperator

from torchrl_recall.imitation.weights import ImitationKeys

GAMMA = 0.9


def make_critic(keys=("observation",), dtype=torch.float32):
    net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    return ValueOperator(net, in_keys=list(keys))


def double(data):
    return data.apply(lambda x: x.double() if x.is_floating_point() else x)


def weigh(weight, data, **keys):
    trace = data["trace"]
    return weight(trace, data, trace["collector", "mask"], ImitationKeys(**keys))


class WeightedContract(LossContract):
    """A loss with a weight keeps TorchRL's contract; the weight's networks are not its own."""

    critic: object

    def mask(self, data, key):
        return data["trace", "collector", "mask"]

    def networks(self, loss):
        return [loss.actor_network]

    def data(self, *batch):
        return recall(*batch, 5)

    @pytest.fixture(autouse=True)
    def _networks_of_the_weight(self, _seed):
        self.critic = make_critic()

    def test_float64(self):
        self.critic.to(torch.float64)
        super().test_float64()

"""Recall traces beside every loss of TorchRL: one training loop, one cell for each loss."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, OneHot, TensorDictReplayBuffer
from torchrl.modules import (
    MLP,
    OneHotCategorical,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import (
    A2CLoss,
    ClipPPOLoss,
    CQLLoss,
    CrossQLoss,
    DDPGLoss,
    DiscreteCQLLoss,
    DiscreteIQLLoss,
    DiscreteSACLoss,
    DQNLoss,
    IQLLoss,
    KLPENPPOLoss,
    PPOLoss,
    REDQLoss,
    ReinforceLoss,
    SACLoss,
    SoftUpdate,
    TD3BCLoss,
    TD3Loss,
    TQCLoss,
)
from torchrl.objectives.value import GAE

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    QValueWeight,
    RecallTraceLoss,
    ValuePrioritizedSampler,
    transition_value,
)

WIDTH, ACTIONS, CHOICES, ROWS = 4, 2, 3, 64
CONTINUOUS = Bounded(-1.0, 1.0, (ACTIONS,))
DISCRETE = OneHot(CHOICES, dtype=torch.int64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net(inputs, outputs):
    return MLP(inputs, outputs, num_cells=[16], activation_class=nn.Tanh)


def gaussian():
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net(WIDTH, 2 * ACTIONS), NormalParamExtractor()),
            ["observation"],
            ["loc", "scale"],
        ),
        ["loc", "scale"],
        spec=CONTINUOUS,
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def categorical():
    return ProbabilisticActor(
        TensorDictModule(net(WIDTH, CHOICES), ["observation"], ["logits"]),
        ["logits"],
        spec=DISCRETE,
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )


def deterministic():
    module = nn.Sequential(net(WIDTH, ACTIONS), nn.Tanh())
    return TensorDictModule(module, ["observation"], ["action"])


def greedy():
    return QValueActor(net(WIDTH, CHOICES), in_keys=["observation"], spec=DISCRETE)


def state_value():
    return ValueOperator(net(WIDTH, 1), in_keys=["observation"])


def pair_value(outputs=1):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(WIDTH + ACTIONS, outputs)

        def forward(self, observation, action):
            return self.net(torch.cat([observation, action], -1))

    return ValueOperator(Joined(), in_keys=["observation", "action"])


def all_values(out="action_value"):
    return TensorDictModule(net(WIDTH, CHOICES), ["observation"], [out])


def cell(actor, loss, **imitation):
    return actor, loss, imitation


MSE = {"loss_function": "mse", "action_spec": CONTINUOUS}
# Name: an actor, the loss that trains it, and how traces are imitated.
CELLS = {
    "A2C": cell(gaussian, lambda a: A2CLoss(a, state_value())),
    "A2C, discrete": cell(categorical, lambda a: A2CLoss(a, state_value())),
    "PPO": cell(gaussian, lambda a: PPOLoss(a, state_value())),
    "ClipPPO": cell(gaussian, lambda a: ClipPPOLoss(a, state_value())),
    "ClipPPO, discrete": cell(categorical, lambda a: ClipPPOLoss(a, state_value())),
    "KLPENPPO": cell(gaussian, lambda a: KLPENPPOLoss(a, state_value())),
    "Reinforce": cell(gaussian, lambda a: ReinforceLoss(a, state_value())),
    "SAC": cell(gaussian, lambda a: SACLoss(a, pair_value())),
    "SAC with V": cell(gaussian, lambda a: SACLoss(a, pair_value(), state_value())),
    "DiscreteSAC": cell(
        categorical,
        lambda a: DiscreteSACLoss(a, all_values(), action_space="one-hot", num_actions=CHOICES),
    ),
    "REDQ": cell(gaussian, lambda a: REDQLoss(a, pair_value())),
    "CrossQ": cell(gaussian, lambda a: CrossQLoss(a, pair_value())),
    "TQC": cell(gaussian, lambda a: TQCLoss(a, pair_value(5), top_quantiles_to_drop_per_net=1)),
    "IQL": cell(gaussian, lambda a: IQLLoss(a, pair_value(), state_value())),
    "IQL, discrete": cell(
        categorical,
        lambda a: DiscreteIQLLoss(
            a, all_values("state_action_value"), state_value(), action_space="one-hot"
        ),
    ),
    "CQL": cell(gaussian, lambda a: CQLLoss(a, pair_value())),
    "CQL, discrete": cell(
        greedy, lambda a: DiscreteCQLLoss(a, action_space="one-hot"), loss_function="margin"
    ),
    "TD3": cell(deterministic, lambda a: TD3Loss(a, pair_value(), action_spec=CONTINUOUS), **MSE),
    "TD3+BC": cell(
        deterministic, lambda a: TD3BCLoss(a, pair_value(), action_spec=CONTINUOUS), **MSE
    ),
    "DDPG": cell(deterministic, lambda a: DDPGLoss(a, pair_value()), **MSE),
    "DQN, margin": cell(
        greedy, lambda a: DQNLoss(a, action_space="one-hot"), loss_function="margin"
    ),
    "DQN, cross entropy": cell(
        greedy,
        lambda a: DQNLoss(a, action_space="one-hot", double_dqn=True),
        loss_function="cross_entropy",
    ),
}
NO_TARGETS = ("A2C", "PPO", "ClipPPO", "KLPENPPO", "Reinforce", "CrossQ")


def transitions(discrete):
    """Random trajectories of a drifting point, some ended."""
    state = torch.randn(8, ROWS // 8 + 1, WIDTH).cumsum(1)
    shape = (8, ROWS // 8)
    action = DISCRETE.rand(shape) if discrete else 0.9 * CONTINUOUS.rand(shape)
    done = torch.rand(*shape, 1) < 0.1
    after = {
        "observation": state[:, 1:],
        "reward": torch.randn(*shape, 1),
        "done": done,
        "terminated": done,
    }
    now = {"observation": state[:, :-1], "action": action, "next": after}
    return TensorDict(now, shape)


def parameters_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("name", CELLS)
def test_training(name, gated):
    make_actor, make_loss, imitation = CELLS[name]
    actor = make_actor()
    loss = make_loss(actor)
    discrete = make_actor in (categorical, greedy)
    data = transitions(discrete)
    critic = state_value()
    if hasattr(actor, "get_dist"):
        with torch.no_grad():
            distribution = actor.get_dist(data)
            data["action_log_prob"] = distribution.log_prob(data["action"])
            if name == "KLPENPPO":
                data.update(actor(data.select("observation")).select("loc", "scale"))
    GAE(gamma=0.99, lmbda=0.95, value_network=critic)(data)
    data = data.reshape(-1).detach()

    spec = DISCRETE if discrete else CONTINUOUS
    model = BacktrackModel(WIDTH, spec, num_cells=(16,))
    recall = TensorDictReplayBuffer(
        storage=LazyTensorStorage(ROWS),
        sampler=ValuePrioritizedSampler(ROWS, top=0.3),
        transform=BacktrackTransform(model, num_steps=5),
        batch_size=8,
    )
    recall.extend(data)
    recall.sampler.refresh(transition_value(data, critic, gamma=0.99))
    if gated:
        values = all_values() if discrete else pair_value()
        imitation = {**imitation, "weight": QValueWeight(values, critic=state_value(), gate=True)}
    model_loss, recall_loss = BacktrackLoss(model), RecallTraceLoss(actor, **imitation)
    updater = None if name.split(",")[0] in NO_TARGETS else SoftUpdate(loss, tau=0.01)
    optimizer = torch.optim.Adam([*loss.parameters(), *model.parameters()], lr=1e-3)

    before = parameters_of(actor)
    held = {id(p) for p in loss.parameters()}
    assert {id(p) for p in recall_loss.parameters()} <= held, "one optimizer serves both"
    for _ in range(3):
        losses = loss(data.copy())
        sample = recall.sample()
        mask = sample["trace", "collector", "mask"].clone()
        losses.update(model_loss(data)).update(recall_loss(sample))
        terms = {k: v for k, v in losses.items() if k.startswith("loss")}
        assert {"loss_imitation", "loss_backtrack"} < terms.keys()
        assert len(terms) >= 3, "a term of one hides that of the other"
        for key, value in terms.items():
            assert value.shape == (), key
            assert bool(torch.isfinite(value)), key
        assert torch.equal(mask, sample["trace", "collector", "mask"])
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        if updater is not None:
            updater.step()
    assert not torch.equal(before, parameters_of(actor))
    assert bool(torch.isfinite(parameters_of(actor)).all())


@pytest.mark.parametrize("name", CELLS)
def test_imitation_alone_leads_the_policy_to_the_trace(name):
    make_actor, make_loss, imitation = CELLS[name]
    actor = make_actor()
    make_loss(actor)  # makes the parameters functional: imitation must still reach the policy
    discrete = make_actor in (categorical, greedy)
    wanted = torch.tensor([0, 1, 0]) if discrete else torch.tensor([0.5, -0.5])
    observation = torch.randn(16, 5, WIDTH)
    trace = {"observation": observation, "action": wanted.expand(16, 5, -1)}
    trace["collector"] = {"mask": torch.ones(16, 5, dtype=torch.bool)}
    data = TensorDict({"trace": TensorDict(trace, [16, 5])}, [16])
    recall_loss = RecallTraceLoss(actor, **imitation)
    optimizer = torch.optim.Adam(recall_loss.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        recall_loss(data)["loss_imitation"].backward()
        optimizer.step()
    states = TensorDict({"observation": torch.randn(200, WIDTH)}, [200])
    if hasattr(actor, "get_dist"):
        chosen = actor.get_dist(states).deterministic_sample
    else:
        chosen = actor(states)["action"]
    error = (chosen.float() - wanted).abs().amax(-1)
    assert float((error < 0.25).float().mean()) > 0.95

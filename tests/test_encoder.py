"""Models in latent space: images and mixed observations, an encoder that learns beside."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import distributions as D
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import Compose, EnvBase, TransformedEnv, check_env_specs
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import A2CLoss
from torchrl.objectives.value import GAE

from torchrl_recall import BacktrackLoss, BacktrackModel, BacktrackTransform, RecallTraceLoss
from torchrl_recall.encoder import EncoderTransform

SIDE, LATENT, ACTIONS, T = 6, 5, 4, 4
MOVES = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])


class Dot(EnvBase):
    """A bright dot that moves over a dark square, seen as an image or as a mixed dictionary."""

    def __init__(self, kind):
        super().__init__(batch_size=[])
        self.kind = kind
        if kind == "pixels":
            spec = {"pixels": Bounded(0, 1, (1, SIDE, SIDE))}
        else:
            spec = {
                "position": Bounded(0, 1, (1,)),
                "row": Categorical(SIDE, dtype=torch.int64),
            }
        self.observation_spec = Composite(view=Composite(spec))
        self.action_spec = Categorical(ACTIONS)
        self.reward_spec = Unbounded((1,))
        self.full_done_spec = Composite(done=Binary(1, dtype=torch.bool))

    def _view(self):
        row, column = self.place.tolist()
        if self.kind == "pixels":
            view = {"pixels": torch.zeros(1, SIDE, SIDE)}
            view["pixels"][0, row, column] = 1.0
        else:
            view = {"position": torch.tensor([column / SIDE]), "row": torch.tensor(row)}
        return {"view": view}

    def _reset(self, tensordict=None, **kwargs):
        self.place = torch.tensor([SIDE // 2, SIDE // 2])
        return TensorDict(self._view(), [])

    def _step(self, tensordict):
        self.place = (self.place + MOVES[tensordict["action"]]).clamp(0, SIDE - 1)
        reward = self.place.float().sum(0, keepdim=True)
        return TensorDict({**self._view(), "reward": reward, "done": torch.zeros(1).bool()}, [])

    def _set_seed(self, seed):
        torch.manual_seed(seed)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1 + SIDE, 8), nn.Tanh(), nn.Linear(8, LATENT))

    def forward(self, position, row):
        return self.net(torch.cat([position, nn.functional.one_hot(row, SIDE)], -1))


def make_encoder(kind):
    if kind == "pixels":
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(-3), nn.Linear(64, LATENT), nn.Tanh()
        )
        return TensorDictModule(net, [("view", "pixels")], ["latent"])
    return TensorDictModule(Mixed(), [("view", "position"), ("view", "row")], ["latent"])


def make_head():
    net = TensorDictModule(nn.Linear(LATENT, ACTIONS), ["latent"], ["logits"])
    return ProbabilisticActor(net, ["logits"], distribution_class=D.Categorical)


def make_model():
    return BacktrackModel(
        LATENT, Categorical(ACTIONS), num_cells=(16,), observation_keys=["latent"]
    )


def random_data(kind, *batch):
    spec = Dot(kind).observation_spec["view"]
    data = TensorDict({}, batch)
    for root in ((), ("next",)):
        for key in spec.keys():  # noqa: SIM118
            event = spec[key].shape
            one = torch.rand(*batch, *event)
            if key == "row":
                one = torch.randint(SIDE, batch)
            data[(*root, "view", key)] = one
    return data


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["pixels", "mixed"])
class TestTransform:
    @pytest.mark.parametrize("batch", [(5,), (2, 3)])
    def test_latents_are_the_encoders(self, kind, batch):
        encoder, data = make_encoder(kind), random_data(kind, *batch)
        kept = data.clone()
        found = EncoderTransform(encoder)(data)
        assert list(data.keys(True, True)) == list(kept.keys(True, True))
        for root in ((), ("next",)):
            inputs = [kept[(*root, *key)].flatten(0, len(batch) - 1) for key in encoder.in_keys]
            expected = encoder.module(*inputs).unflatten(0, batch)
            torch.testing.assert_close(found[(*root, "latent")], expected)
            assert not found[(*root, "latent")].requires_grad

    def test_the_next_observation_is_enough(self, kind):
        encoder, data = make_encoder(kind), random_data(kind, 4)
        found = EncoderTransform(encoder)(data.select("next"))
        torch.testing.assert_close(
            found["next", "latent"], EncoderTransform(encoder)(data)["next", "latent"]
        )
        assert "latent" not in found

    def test_shares_the_encoder(self, kind):
        encoder = make_encoder(kind)
        transform = EncoderTransform(encoder)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(8), transform=transform)
        assert encoder.training
        assert list(transform.parameters()) == []
        assert not transform.state_dict()
        assert buffer.transform[0].encoder is encoder

    def test_on_an_environment_it_does_nothing(self, kind):
        env = TransformedEnv(Dot(kind), EncoderTransform(make_encoder(kind)))
        check_env_specs(env)
        assert "latent" not in env.rollout(2)


def test_refuses():
    with pytest.raises(TypeError, match="encoder must be a TensorDictModule, got Linear"):
        EncoderTransform(nn.Linear(1, 1))
    transform = EncoderTransform(make_encoder("mixed"))
    data = random_data("mixed", 4)
    with pytest.raises(KeyError, match=r"'next', 'view', 'row'.* missing"):
        transform(data.exclude(("next", "view", "row")))
    with pytest.raises(ValueError, match="observation mixes continuous and discrete keys"):
        BacktrackModel.from_env(
            Dot("mixed"), observation_keys=[("view", "position"), ("view", "row")]
        )


def test_a_gap_gives_a_masked_trace():
    encoder, model = make_encoder("pixels"), make_model()
    data = random_data("pixels", 4)
    data["next", "view", "pixels"][1] = torch.nan
    chain = Compose(EncoderTransform(encoder), BacktrackTransform(model, num_steps=T))
    kept = chain(data)["trace", "collector", "mask"]
    assert kept.all(-1).tolist() == [True, False, True, True]
    assert not kept[1].any()


@pytest.mark.parametrize("prefetch", [None, 2])
@pytest.mark.parametrize("kind", ["pixels", "mixed"])
def test_end_to_end(kind, prefetch):
    """A2C trains encoder and head on real observations, traces move the head alone."""
    env, encoder, head = Dot(kind), make_encoder(kind), make_head()
    actor = ProbabilisticActor(
        TensorDictSequential(encoder, head[0]), ["logits"], distribution_class=D.Categorical
    )
    value = ValueOperator(nn.Linear(LATENT, 1), in_keys=["latent"])
    critic = TensorDictSequential(encoder, value)
    advantage = GAE(gamma=0.9, lmbda=0.9, value_network=critic)
    a2c = A2CLoss(actor, critic)
    model = make_model()
    transform = Compose(EncoderTransform(encoder), BacktrackTransform(model, num_steps=T))
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(200), transform=transform, batch_size=16, prefetch=prefetch
    )
    model_loss, recall_loss = BacktrackLoss(model), RecallTraceLoss(head)
    parameters = {id(p): p for p in [*a2c.parameters(), *model.parameters()]}
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    collector = Collector(
        env,
        actor,
        frames_per_batch=32,
        total_frames=96,
        auto_register_policy_transforms=False,
    )
    for data in collector:
        with torch.no_grad():
            advantage(data)
        buffer.extend(data.exclude("latent", "logits", ("next", "latent")))
        assert "latent" not in buffer.storage[:]

        batch = buffer.sample()
        assert batch["trace"].shape == (16, T)
        assert batch["trace", "latent"].shape == (16, T, LATENT)
        imitation = recall_loss(batch)["loss_imitation"] + model_loss(batch)["loss_backtrack"]
        optimizer.zero_grad()
        imitation.backward()
        assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())
        assert head[0].module.weight.grad.any()
        assert all(p.grad.any() for p in model.delta_network.parameters())
        optimizer.step()

        before = [p.clone() for p in encoder.parameters()]
        losses = a2c(data)
        optimizer.zero_grad()
        sum(loss for key, loss in losses.items() if key.startswith("loss_")).backward()
        optimizer.step()
        assert any(not torch.equal(p, q) for p, q in zip(encoder.parameters(), before, strict=True))

        if prefetch is None:
            batch = buffer.sample()
            today = encoder(batch["next"].select("view"))["latent"]
            torch.testing.assert_close(batch["trace", "next", "latent"][:, -1], today)
    collector.shutdown()

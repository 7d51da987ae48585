"""Offline data: a Minari dataset, recorded here and read by TorchRL without a network."""

from __future__ import annotations

import importlib.util

import gymnasium
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded, OfflineToOnlineReplayBuffer
from torchrl.modules import ProbabilisticActor, TanhNormal

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
    sample_traces,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("minari") is None,
        reason="minari is not installed; it needs Python 3.11",
    ),
    # Minari's own: what a dataset's metadata lacks.
    pytest.mark.filterwarnings("ignore::UserWarning:minari"),
]
NAME, EPISODES, STEPS, T = "recall/pendulum-v0", 4, 25, 4


def record(seed):
    """An episode of random actions in Pendulum.

    Minari's own recorder, `DataCollector`, needs jax; its format does not.
    """
    from minari.data_collector import EpisodeBuffer

    with gymnasium.make("Pendulum-v1", max_episode_steps=STEPS) as env:
        env.action_space.seed(seed)
        observations, actions, outcomes = [env.reset(seed=seed)[0]], [], []
        for _ in range(STEPS):
            actions.append(env.action_space.sample())
            observation, *outcome, _ = env.step(actions[-1])
            observations.append(observation)
            outcomes.append(outcome)
    rewards, terminations, truncations = (list(column) for column in zip(*outcomes, strict=True))
    assert truncations == [False] * (STEPS - 1) + [True]
    return EpisodeBuffer(
        seed, seed, None, observations, actions, rewards, terminations, truncations
    )


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Episodes in Minari's format, in a directory of the test's own."""
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    minari.create_dataset_from_buffers(
        NAME,
        [record(seed) for seed in range(EPISODES)],
        env="Pendulum-v1",
        algorithm_name="random",
        data_format="hdf5",
    )
    # TorchRL 0.14.1 reads the values, and then makes an empty map of their shapes.
    monkeypatch.setattr(TensorDict, "memmap_like", lambda data, path: data.memmap(path))
    return tmp_path / "torchrl"


def read(root, batch_size=32, **options):
    from torchrl.data.datasets import MinariExperienceReplay

    return MinariExperienceReplay(
        NAME, batch_size, root=root, load_from_local_minari=True, **options
    )


def test_fits_a_model_and_samples_traces(dataset):
    import minari

    torch.manual_seed(0)
    low, high = -2 * torch.ones(1), 2 * torch.ones(1)
    model = BacktrackModel(3, Bounded(low, high), num_cells=(32, 32))
    buffer = read(dataset, transform=BacktrackTransform(model, num_steps=T))
    assert len(buffer) == EPISODES * STEPS

    # The rows are those that Minari recorded.
    episode = minari.load_dataset(NAME)[0]
    stored = buffer.storage[:STEPS]
    observations = torch.as_tensor(episode.observations)
    assert torch.equal(stored["observation"], observations[:-1])
    assert torch.equal(stored["next", "observation"], observations[1:])

    loss = BacktrackLoss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    values = []
    for _ in range(150):
        batch = buffer.sample()
        trace = batch["trace"]
        assert trace.shape == (32, T)
        assert torch.equal(trace["next", "observation"][:, -1], batch["next", "observation"])
        value = loss(batch)["loss_backtrack"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    first, last = (sum(values[part]) / 10 for part in (slice(10), slice(-10, None)))
    assert last < first - 2

    # (cos, sin) lie on the unit circle: steps back of the fitted model stay near it.
    def distance(model):
        generator = torch.Generator().manual_seed(0)
        start = buffer.storage[:]["next", "observation"]
        states = sample_traces(model, start, num_steps=2, generator=generator)["observation"]
        return float((states[..., :2].norm(dim=-1) - 1).abs().mean())

    fresh = BacktrackModel(3, Bounded(low, high), num_cells=(32, 32))
    fresh.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "normalizer" in name},
        strict=False,
    )
    assert distance(model) < 0.5 * distance(fresh)


def test_imitates_the_best_of_it(dataset):
    torch.manual_seed(0)
    model = BacktrackModel(3, 1, num_cells=(8,))
    net = nn.Sequential(nn.Linear(3, 2), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ["loc", "scale"],
        distribution_class=TanhNormal,
    )
    buffer = read(
        dataset,
        transform=BacktrackTransform(model, num_steps=T),
        sampler=ValuePrioritizedSampler(EPISODES * STEPS, top=0.1),
    )
    reward = buffer.storage[:]["next", "reward"].flatten()
    buffer.update_priority(torch.arange(len(buffer)), reward)
    best = reward.topk(10).values.min()
    assert best > reward.median()
    batch = buffer.sample()
    assert bool((batch["next", "reward"] >= best).all())
    out = RecallTraceLoss(actor)(batch)
    out["loss_imitation"].backward()
    assert net[0].weight.grad.any()


def test_beside_online_data(dataset):
    torch.manual_seed(0)
    model = BacktrackModel(3, 1, num_cells=(8,))
    keys = ["observation", "action", ("next", "observation")]
    offline = read(dataset, 4, transform=lambda data: data.select(*keys))
    buffer = OfflineToOnlineReplayBuffer(
        offline,
        online_capacity=50,
        transform=BacktrackTransform(model, num_steps=T),
        batch_size=8,
    )
    online = TensorDict(
        {
            "observation": torch.randn(20, 3),
            "action": torch.zeros(20, 1),
            "next": {"observation": torch.randn(20, 3)},
            "index": torch.arange(20),
        },
        [20],
    )
    buffer.extend(online)
    batch = buffer.sample(8)
    assert batch["trace"].shape == (8, T)
    assert torch.equal(batch["trace", "next", "observation"][:, -1], batch["next", "observation"])

"""The model: built from specs, its log-probabilities by hand, and what it learns in closed form."""

from __future__ import annotations

import copy
import math
import pickle
import time

import pytest
import torch
from exact_model import exact_model
from tensordict import TensorDict
from torch.distributions import Categorical, Independent, Normal
from torch.nn.functional import logsigmoid, one_hot
from torchrl.data import (
    Bounded,
    Composite,
    MultiCategorical,
    OneHot,
    Unbounded,
)
from torchrl.data import (
    Categorical as CategoricalSpec,
)
from torchrl.envs import GymEnv, InitTracker, StepCounter, TransformedEnv
from torchrl.modules import TanhNormal

from torchrl_recall import BacktrackLoss, BacktrackModel
from torchrl_recall.diagnostics import tabular_kernel
from torchrl_recall.envs import FourRoomsEnv, backtrack_kernel, kernel_divergence
from torchrl_recall.heads import (
    CategoricalHead,
    ClassDelta,
    NormalDelta,
    NormalHead,
    SupportDelta,
    TanhNormalHead,
)

F64 = torch.float64
UNIFORM = torch.full((25, 4), 0.25)


def make_maze(**kwargs):
    options = {"slip": 0.1, "max_steps": None, "seed": 0, **kwargs}
    return TransformedEnv(FourRoomsEnv(5, **options), InitTracker())


ENVS = {
    "pendulum": lambda: GymEnv("Pendulum-v1"),
    "inverted_pendulum": lambda: GymEnv("InvertedPendulum-v5"),
    "one_hot": lambda: GymEnv("CartPole-v1"),
    "categorical": lambda: GymEnv("CartPole-v1", categorical_action_encoding=True),
    "counted": lambda: TransformedEnv(GymEnv("Pendulum-v1"), StepCounter()),
    "maze": make_maze,
    "mazes": lambda: make_maze(batch_size=(3,)),
}


def update(model, data):
    state, action, next_state = model.read(data.reshape(-1))
    model.update_normalization(state, action, next_state)


def standardize(rows, of):
    return (rows - of.mean(0)) / of.std(0, unbiased=False).clamp_min(1e-6)


def normal(parameters, log_scale_range):
    loc, raw = parameters.chunk(2, -1)
    low, high = log_scale_range
    return loc, torch.exp(low + (high - low) * torch.sigmoid(raw))


def log_prob_by_hand(model, data, env):
    """``log q(no stop) + log q(a|s') + log q(Δ|a,s')`` from the networks' outputs alone.

    The running statistics must have seen exactly ``data``.
    """
    state, next_state, action = data["observation"], data["next", "observation"], data["action"]
    if isinstance(env.observation_spec["observation"], MultiCategorical):
        size = env.size
        row, column = next_state.unbind(-1)
        codes = [one_hot(row, size), one_hot(column, size), one_hot(row * size + column, size**2)]
        features = torch.cat(codes, -1).to(model.dtype)
    else:
        features = standardize(next_state, next_state)
    spec = env.action_spec
    parameters = model.action_network(features)
    if isinstance(spec, Bounded):
        action = action.to(model.dtype)
        loc, scale = normal(parameters, (-5, 2))
        low, high = spec.space.low.to(loc), spec.space.high.to(loc)
        q = TanhNormal(loc, scale, low=low, high=high, event_dims=1, tanh_loc=False)
        action_features = (2 * action - low - high) / (high - low)
    else:
        index = action.argmax(-1) if isinstance(spec, OneHot) else action
        q = Categorical(logits=parameters)
        action, action_features = index, one_hot(index, parameters.shape[-1])
    total = q.log_prob(action)
    parameters = model.delta_network(torch.cat([features, action_features.to(features)], -1))
    delta = state - next_state
    if delta.dtype == torch.int64:
        support = env.delta_support
        inside = ((next_state.unsqueeze(-2) + support) >= 0).all(-1)
        inside &= ((next_state.unsqueeze(-2) + support) < env.size).all(-1)
        logits = torch.where(inside, parameters, -torch.inf)
        index = (delta.unsqueeze(-2) == support).all(-1).int().argmax(-1)
        total = total + Categorical(logits=logits).log_prob(index)
    else:
        loc, scale = normal(parameters, (-6, 2))
        mean, std = delta.mean(0), delta.std(0, unbiased=False)
        total = total + Independent(Normal(loc * std + mean, scale * std), 1).log_prob(delta)
    if model.stop_network is not None:
        total = total + logsigmoid(-model.stop_network(features).squeeze(-1))
    return total


@pytest.mark.parametrize("name", ENVS)
def test_log_prob_of_real_steps_is_the_sum_of_distributions(name):
    torch.manual_seed(0)
    env = ENVS[name]()
    env.set_seed(0)
    data = env.rollout(30, break_when_any_done=False)
    model = BacktrackModel.from_env(env, num_cells=(16, 16))
    update(model, data)
    assert model.dtype == (F64 if name == "inverted_pendulum" else torch.float32)
    assert model.has_stop == (name in ("maze", "mazes"))
    log_prob = model.log_prob(data)
    assert log_prob.shape == data.shape
    torch.testing.assert_close(log_prob, log_prob_by_hand(model, data, env), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "action_head", "delta_head"),
    [
        ("pendulum", TanhNormalHead, NormalDelta),
        ("inverted_pendulum", TanhNormalHead, NormalDelta),
        ("one_hot", CategoricalHead, NormalDelta),
        ("categorical", CategoricalHead, NormalDelta),
        ("maze", CategoricalHead, SupportDelta),
    ],
)
def test_heads_follow_the_specs(name, action_head, delta_head):
    model = BacktrackModel.from_env(ENVS[name](), num_cells=(16,))
    assert type(model.action.head) is action_head
    assert type(model.delta_head) is delta_head


def test_the_default_heads_without_an_env():
    assert type(BacktrackModel(3, 1).action.head) is TanhNormalHead
    assert type(BacktrackModel(3, Unbounded((2,))).action.head) is NormalHead
    assert type(BacktrackModel(CategoricalSpec(4), OneHot(2)).delta_head) is ClassDelta
    assert type(BacktrackModel(MultiCategorical([4, 5]), 1).delta_head) is ClassDelta


def test_the_stop_head_can_be_chosen():
    assert not BacktrackModel.from_env(make_maze(), stop=False).has_stop
    assert BacktrackModel.from_env(FourRoomsEnv(5), stop=True).has_stop
    with pytest.raises(RuntimeError, match="no stop head"):
        BacktrackModel(3, 1).stop_logit(torch.zeros(1, 3))
    renamed = TransformedEnv(FourRoomsEnv(5), InitTracker(init_key="first"))
    model = BacktrackModel.from_env(renamed, is_init_key="first")
    assert model.has_stop
    assert model.is_init_key == "first"


def random_transitions(*batch, size=3, width=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(n):
        return torch.randn(*batch, n, generator=generator, dtype=dtype)

    return TensorDict(
        {
            "observation": randn(size),
            "action": torch.tanh(randn(width)),
            "next": {"observation": randn(size)},
            "other": randn(1),
        },
        batch,
    )


@pytest.mark.parametrize("stop", [False, True])
def test_forward_writes_the_factors_under_backtrack_only(stop):
    model = BacktrackModel(3, 2, num_cells=(8,), stop=stop)
    data = random_transitions(4, 5)
    before = data.clone()
    out = model(data)
    assert out is data
    names = ["action_log_prob", "delta_log_prob"] + ["stop_log_prob"] * stop
    assert sorted(data["backtrack"].keys()) == sorted(names)
    assert set(model.out_keys) == {("backtrack", name) for name in names}
    assert all(data["backtrack", name].shape == (4, 5) for name in names)
    torch.testing.assert_close(sum(data["backtrack", n] for n in names), model.log_prob(before))
    assert bool((data.exclude("backtrack") == before).all())
    assert set(model.in_keys) == {"observation", "action", ("next", "observation")}


def test_the_stop_term_is_the_probability_of_going_on():
    model = BacktrackModel(3, 2, num_cells=(8,), stop=True)
    data = model(random_transitions(6))
    logit = model.stop_network(data["next", "observation"]).squeeze(-1)
    torch.testing.assert_close(data["backtrack", "stop_log_prob"].exp(), 1 - torch.sigmoid(logit))


def test_float64_by_argument_by_spec_and_by_cast():
    data = random_transitions(5, dtype=F64)
    by_spec = BacktrackModel(Unbounded((3,), dtype=F64), Bounded(-1, 1, (2,), dtype=F64))
    for model in (BacktrackModel(3, 2, dtype=F64), by_spec, BacktrackModel(3, 2).double()):
        assert model.dtype == F64
        assert all(p.dtype == F64 for p in model.parameters())
        update(model, data)
        assert model.log_prob(data).dtype == F64
    with pytest.raises(ValueError, match=r"'observation' has dtype torch\.float64"):
        BacktrackModel(3, 2).log_prob(data)


MODELS = {
    "normal": lambda: BacktrackModel(3, 2, num_cells=(8,), stop=True),
    "support": lambda: BacktrackModel.from_env(make_maze(), num_cells=(8,)),
    "class": lambda: BacktrackModel(MultiCategorical([5, 5]), CategoricalSpec(4), num_cells=(8,)),
}


def data_for(name):
    torch.manual_seed(0)
    return random_transitions(40) if name == "normal" else make_maze().rollout(40)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_give_the_same_log_prob(name, how):
    model, data = MODELS[name](), data_for(name)
    update(model, data)
    expected = model.log_prob(data)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = MODELS[name]()
        assert not torch.allclose(other.log_prob(data), expected)
        other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(data), expected)
    # And they are copies: changing one leaves the other alone.
    other.reset_parameters_recursive()
    assert not torch.allclose(other.log_prob(data), expected)
    assert torch.equal(model.log_prob(data), expected)


def test_a_copied_class_head_follows_its_own_codec():
    other = copy.deepcopy(MODELS["class"]())
    assert other.delta_head.codec is other.observation


def test_nested_and_renamed_keys():
    keys = {("agent", "obs"): 2, ("agent", "goal"): Unbounded((1,))}
    nested = BacktrackModel(keys, 2, num_cells=(8,), action_key=("agent", "act"))
    plain = BacktrackModel(3, 2, num_cells=(8,))
    plain.load_state_dict(nested.state_dict())
    data = random_transitions(5)
    renamed = TensorDict({("agent", "act"): data["action"]}, [5])
    for root in ((), ("next",)):
        obs, goal = data[(*root, "observation")].split([2, 1], -1)
        renamed.set((*root, "agent", "obs"), obs)
        renamed.set((*root, "agent", "goal"), goal)
    assert torch.equal(nested.log_prob(renamed), plain.log_prob(data))
    assert nested.next_observation_keys == [("next", "agent", "obs"), ("next", "agent", "goal")]


def test_several_observation_keys_in_the_stated_order():
    spec = Composite(a=Unbounded((1,)), b=Unbounded((2,)), c=Unbounded((4,)))
    model = BacktrackModel(spec, 1, num_cells=(8,), observation_keys=["b", "a"])
    assert model.observation_keys == ["b", "a"]
    data = TensorDict({"a": torch.full((5, 1), 1.0), "b": torch.full((5, 2), 2.0)}, [5])
    assert model.observation.read(data).tolist() == [[2.0, 2.0, 1.0]] * 5


def test_a_batched_composite_is_read_without_its_batch():
    env = make_maze(batch_size=(3,))
    spec = Composite(observation=env.observation_spec["observation"], shape=(3,))
    model = BacktrackModel(spec, CategoricalSpec(4), num_cells=(8,))
    assert model.observation.cardinality == [5, 5]
    assert model.log_prob(env.rollout(4)).shape == (3, 4)


def test_reset_parameters_draws_new_ones():
    model = BacktrackModel(3, 2, num_cells=(8,))
    before = [p.clone() for p in model.parameters()]
    model.reset_parameters_recursive()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("num_cells", [(), (64, 64)])
@pytest.mark.parametrize("action", [2, Unbounded((2,))])
def test_fresh_scales_are_near_those_of_the_data(num_cells, action):
    # Far narrower ones begin with a loss in the thousands, which Adam takes long to forget.
    torch.manual_seed(0)
    model = BacktrackModel(3, action, num_cells=num_cells)
    for _ in range(2):
        rows = torch.randn(500, 3)
        _, action_scale = model.action.head.split(model.action_parameters(rows))
        _, delta_scale = model.delta_head.split(model.delta_parameters(rows[:, :2].tanh(), rows))
        assert float(action_scale.abs().max()) < 0.7
        assert float(delta_scale.abs().max()) < 0.7
        model.reset_parameters_recursive()


@torch.no_grad()
def test_scales_that_cannot_be_the_datas_start_inside_their_range():
    torch.manual_seed(0)
    model = BacktrackModel(3, 1, delta_log_scale_range=(-4, -2), action_log_scale_range=(1, 2))
    rows = torch.randn(500, 3)
    _, action_scale = model.action.head.split(model.action_parameters(rows))
    _, delta_scale = model.delta_head.split(model.delta_parameters(rows[:, :1].tanh(), rows))
    assert 1 < float(action_scale.min()) <= float(action_scale.max()) < 1.3
    assert -2.4 < float(delta_scale.min()) <= float(delta_scale.max()) < -2


def test_statistics_leave_out_masked_rows():
    data = random_transitions(6)
    kept = torch.tensor([True, True, False, True, False, True])
    masked, selected = (BacktrackModel(3, Unbounded((2,))) for _ in range(2))
    masked.update_normalization(*masked.read(data), kept)
    selected.update_normalization(*selected.read(data[kept]))
    delta = data["observation"] - data["next", "observation"]
    for model in (masked, selected):
        torch.testing.assert_close(model.delta_head.normalizer.mean, delta[kept].mean(0))
        head = model.action.head.normalizer
        torch.testing.assert_close(head.mean, data["action"][kept].mean(0))
        mean = model.observation.normalizer.mean
        torch.testing.assert_close(mean, data["next", "observation"][kept].mean(0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"observation": 0}, ValueError, r"observation\['observation'\] must be at least 1"),
        ({"observation": "x"}, TypeError, "observation 'observation' is a str"),
        ({"action": MultiCategorical([2, 2])}, TypeError, "action is a MultiCategorical"),
        ({"num_cells": (0,)}, ValueError, "num_cells must be at least 1"),
        ({"num_cells": (1.5,)}, TypeError, "num_cells must be an int"),
        ({"observation_keys": ["a", "b"]}, ValueError, "observation_keys are"),
        ({"observation": {"a": 1}, "observation_keys": ["b"]}, KeyError, "observation_keys"),
        ({"action_log_scale_range": (2, 1)}, ValueError, "action_log_scale_range"),
        ({"delta_log_scale_range": 3}, ValueError, "delta_log_scale_range"),
        ({"delta_log_scale_range": (0, math.inf)}, ValueError, "delta_log_scale_range"),
        ({"observation": MultiCategorical([40, 40])}, ValueError, "pass delta_support"),
        ({"delta_support": torch.zeros(2, 2)}, ValueError, r"delta_support has shape \(2, 2\)"),
        ({"delta_support": torch.zeros(0, 3)}, ValueError, r"delta_support has shape \(0, 3\)"),
        ({"delta_support": torch.zeros(2, 3)}, ValueError, "delta_support has the same"),
        ({"delta_support": torch.full((1, 3), torch.nan)}, ValueError, "delta_support must be fin"),
        (
            {"observation": CategoricalSpec(3), "delta_support": torch.zeros(1, 1)},
            ValueError,
            "delta_support must hold integers",
        ),
    ],
)
def test_the_constructor_refuses_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        BacktrackModel(**{"observation": 3, "action": 1, **arguments})


class TwoKeys(FourRoomsEnv):
    """A maze that shows its cell twice, under names that none expects."""

    def _make_specs(self):
        super()._make_specs()
        cell = self.observation_spec["observation"]
        self.observation_spec = Composite(a=cell, b=cell.clone())


def test_from_env_refuses_by_name():
    with pytest.raises(TypeError, match="env must be a torchrl EnvBase, got str"):
        BacktrackModel.from_env("Pendulum-v1")
    with pytest.raises(ValueError, match=r"observation_keys must be named.*'a', 'b'"):
        BacktrackModel.from_env(TwoKeys(5))
    with pytest.raises(KeyError, match="observation_keys"):
        BacktrackModel.from_env(FourRoomsEnv(5), observation_keys=["cell"])
    assert BacktrackModel.from_env(TwoKeys(5), observation_keys=["b"]).observation_keys == ["b"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda data: data.exclude("action"), KeyError, "'action' is missing"),
        (lambda data: data.exclude("observation"), KeyError, "'observation' is missing"),
        (lambda data: data.exclude("next"), KeyError, "'next', 'observation'.* is missing"),
        (lambda data: data[:0], ValueError, r"data is empty: batch size \(0,\)"),
        (lambda data: data.to_dict(), TypeError, "data must be a TensorDict, got dict"),
        (lambda data: data.set("action", torch.zeros(4, 3)), ValueError, "'action' has shape"),
        (lambda data: data.set("observation", torch.zeros(4, 2)), ValueError, "'observation' has"),
        (
            lambda data: data.set(("next", "observation"), torch.full((4, 3), torch.nan)),
            ValueError,
            "'next', 'observation'.* must be finite",
        ),
    ],
)
def test_log_prob_refuses_by_name(change, error, message):
    with pytest.raises(error, match=message):
        BacktrackModel(3, 2, num_cells=(8,)).log_prob(change(random_transitions(4)))


# What is learned, against closed forms. ---------------------------------------------------------


def fit(model, batches, learning_rate):
    """Minimise the loss over ``batches``, the learning rate falling to zero by a cosine."""
    batches = list(batches)
    loss = BacktrackLoss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        value = loss(batch)["loss_backtrack"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return model


class LinearGaussian:
    """``x' = a x + b u + noise`` with ``u ~ N(k x, s_u²)`` and ``x ~ N(0, s_x²)``."""

    a, b, k, s_x, s_u, s_noise = 0.9, 0.5, -0.6, 1.5, 0.8, 0.3

    def transitions(self, n, generator):
        noise = torch.randn(3, n, 1, generator=generator)
        x = self.s_x * noise[0]
        u = self.k * x + self.s_u * noise[1]
        after = self.a * x + self.b * u + self.s_noise * noise[2]
        return TensorDict({"observation": x, "action": u, "next": {"observation": after}}, [n])

    def covariance(self):
        """Of (x, u, x'), all of them linear in the three noises."""
        x = torch.tensor([self.s_x, 0.0, 0.0], dtype=F64)
        u = self.k * x + torch.tensor([0.0, self.s_u, 0.0])
        after = self.a * x + self.b * u + torch.tensor([0.0, 0.0, self.s_noise])
        rows = torch.stack([x, u, after])
        return rows @ rows.T

    def condition(self, target, given):
        """Gain and standard deviation of a variable given others."""
        c = self.covariance()
        gain = torch.linalg.solve(c[given][:, given], c[given, target])
        return gain, (c[target, target] - gain @ c[given, target]).sqrt()


def moments(log_density, grid):
    """Mass, mean and standard deviation of densities ``[*B, n]`` on an even grid ``[n]``."""
    weight = log_density.double().exp() * (grid[1] - grid[0])
    mass = weight.sum(-1)
    mean = (weight * grid).sum(-1) / mass
    variance = (weight * (grid - mean.unsqueeze(-1)).square()).sum(-1) / mass
    return mass, mean, variance.sqrt()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More threads only cost on networks of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def divergence(exact, log_density, grid):
    """``KL(exact || model)`` on an even grid."""
    log_exact = exact.log_prob(grid)
    return (log_exact.exp() * (log_exact - log_density)).sum(-1) * (grid[1] - grid[0])


@pytest.fixture(scope="module")
def linear_gaussian():
    system = LinearGaussian()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = BacktrackModel(1, Unbounded((1,)), num_cells=(16,))
    batches = (system.transitions(2048, generator) for _ in range(1200))
    return system, fit(model, batches, learning_rate=1e-2)


# Within two standard deviations of what is given, in units of the exact scale (twice for the
# change, which has two inputs).
MEAN_TOLERANCE, SCALE_TOLERANCE, DIVERGENCE_TOLERANCE = 0.05, 0.03, 0.002


@torch.no_grad()
def test_learns_the_action_posterior_of_a_linear_gaussian_system(linear_gaussian):
    system, model = linear_gaussian
    gain, std = system.condition(1, [2])
    after = torch.linspace(-2, 2, 9, dtype=F64) * system.covariance()[2, 2].sqrt()
    grid = torch.linspace(-12, 12, 2401, dtype=F64)
    # What the model says of every action at every next state; the predecessor does not matter.
    data = TensorDict(
        {
            "observation": torch.zeros(9, 2401, 1),
            "action": grid.float().view(1, -1, 1).expand(9, -1, 1),
            "next": {"observation": after.float().view(-1, 1, 1).expand(9, 2401, 1)},
        },
        [9, 2401],
    )
    log_density = model(data)["backtrack", "action_log_prob"].double()
    mass, mean, scale = moments(log_density, grid)
    torch.testing.assert_close(mass, torch.ones(9, dtype=F64), rtol=0, atol=1e-3)
    assert bool(((mean - gain * after).abs() < MEAN_TOLERANCE * std).all())
    assert bool(((scale / std - 1).abs() < SCALE_TOLERANCE).all())
    exact = Normal((gain * after).unsqueeze(-1), std)
    assert bool((divergence(exact, log_density, grid) < DIVERGENCE_TOLERANCE).all())


@torch.no_grad()
def test_learns_the_change_posterior_of_a_linear_gaussian_system(linear_gaussian):
    system, model = linear_gaussian
    gain, std = system.condition(0, [1, 2])
    action_gain, action_std = system.condition(1, [2])
    after = torch.linspace(-2, 2, 5, dtype=F64) * system.covariance()[2, 2].sqrt()
    # Actions that do occur with such a next state.
    action = action_gain * after + torch.linspace(-2, 2, 5, dtype=F64).unsqueeze(-1) * action_std
    after = after.expand(5, 5)
    grid = torch.linspace(-8, 8, 3201, dtype=F64)
    shape = (5, 5, 3201, 1)
    data = TensorDict(
        {
            "observation": grid.float().view(1, 1, -1, 1).expand(shape),
            "action": action.float().view(5, 5, 1, 1).expand(shape),
            "next": {"observation": after.float().view(5, 5, 1, 1).expand(shape)},
        },
        shape[:-1],
    )
    log_density = model(data)["backtrack", "delta_log_prob"].double()
    mass, mean, scale = moments(log_density, grid)
    # The change's density is the predecessor's, shifted.
    expected = gain[0] * action + gain[1] * after
    torch.testing.assert_close(mass, torch.ones(5, 5, dtype=F64), rtol=0, atol=1e-3)
    assert bool(((mean - expected).abs() < 2 * MEAN_TOLERANCE * std).all())
    assert bool(((scale / std - 1).abs() < 2 * SCALE_TOLERANCE).all())
    exact = Normal(expected.unsqueeze(-1), std)
    assert bool((divergence(exact, log_density, grid) < 2 * DIVERGENCE_TOLERANCE).all())


def whole_episodes(env, count):
    """The steps of the first ``count`` episodes of each maze under a uniform policy.

    Whoever takes what has ended by some time takes too many short episodes; these are all whole.
    """
    data, steps, ended = env.reset(), [], torch.zeros(env.batch_size, dtype=torch.int64)
    while bool((ended < count).any()):
        step, data = env.step_and_maybe_reset(env.rand_action(data))
        keys = ("observation", "action", "is_init", ("next", "observation"))
        steps.append(step.select(*keys)[ended < count])
        ended += step["next", "done"].squeeze(-1)
    return torch.cat(steps)


@pytest.fixture(scope="module")
def learned_maze():
    """A model fitted to 5000 episodes of a uniform policy, and the seconds that took."""
    torch.manual_seed(0)
    started = time.process_time()
    env = make_maze(batch_size=(1000,))
    data = whole_episodes(env, 5)
    assert int(data["is_init"].sum()) == 5000
    model = BacktrackModel.from_env(env, num_cells=(64, 64))
    generator = torch.Generator().manual_seed(0)
    chosen = (torch.randint(len(data), (1024,), generator=generator) for _ in range(800))
    fit(model, (data[index] for index in chosen), learning_rate=1e-2)
    return model, time.process_time() - started


def test_learns_the_exact_posterior_of_a_maze(learned_maze):
    model, seconds = learned_maze
    env = FourRoomsEnv(5, slip=0.1, max_steps=None)
    exact = backtrack_kernel(env, UNIFORM)
    found = kernel_divergence(exact, *tabular_kernel(model, env))
    print(f"KL {found.per_step:.5f} a step, {found.trajectory:.4f} a trajectory, {seconds:.1f} s")
    # A thousand mazes of 32 steps each, and a stop at every start: nothing else gets this low.
    assert 0 <= float(found.per_step) < 0.005
    assert 0 <= float(found.trajectory) < 0.1


@pytest.mark.parametrize("size", [5, 7])
@pytest.mark.parametrize("start", ["fixed", "any"])
@pytest.mark.parametrize("slip", [0.0, 0.2])
def test_the_exact_model_is_exact(size, start, slip):
    env = FourRoomsEnv(size, slip=slip, start=start, max_steps=None)
    torch.manual_seed(0)
    policy = torch.softmax(torch.randn(size**2, 4, dtype=F64), -1)
    model, exact = exact_model(env, policy)
    stop, predecessor = tabular_kernel(model, env)
    found = kernel_divergence(exact, stop, predecessor)
    assert abs(float(found.per_step)) < 1e-6
    visited = exact.visits > 0
    assert bool(visited.any())
    torch.testing.assert_close(stop[visited], exact.stop[visited], rtol=1e-5, atol=1e-6)
    inner = visited & (exact.stop < 1)
    torch.testing.assert_close(predecessor[inner], exact.predecessor[inner], rtol=1e-5, atol=1e-6)


def test_a_tabulated_kernel_sums_to_one_and_is_log_prob():
    env = make_maze()
    torch.manual_seed(0)
    model = BacktrackModel.from_env(env, num_cells=(8,))
    stop, predecessor = tabular_kernel(model, env)
    torch.testing.assert_close(predecessor.sum((1, 2)), torch.ones(25, dtype=F64))
    data = env.rollout(30)
    cell, after = (data[key] @ torch.tensor([5, 1]) for key in model.in_keys[1::-1])
    expected = (1 - stop[after]) * predecessor[after, data["action"], cell]
    torch.testing.assert_close(model.log_prob(data).exp().double(), expected, rtol=1e-4, atol=1e-6)


def test_tabular_kernels_without_stop_or_support():
    env = FourRoomsEnv(5)
    model = BacktrackModel(MultiCategorical([5, 5]), CategoricalSpec(4), num_cells=(8,))
    stop, predecessor = tabular_kernel(model, env)
    assert not bool(stop.any())
    torch.testing.assert_close(predecessor.sum((1, 2)), torch.ones(25, dtype=F64))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (torch.nn.Linear(2, 2), TypeError, "model must be a BacktrackModel, got Linear"),
        (BacktrackModel(2, CategoricalSpec(4)), ValueError, "model has observations of no classes"),
        (BacktrackModel(MultiCategorical([5, 7]), CategoricalSpec(4)), ValueError, r"\[5, 7\]"),
        (BacktrackModel(MultiCategorical([5, 5]), CategoricalSpec(3)), ValueError, "4 moves"),
        (BacktrackModel(MultiCategorical([5, 5]), 4), ValueError, "TanhNormalHead"),
    ],
)
def test_tabular_kernel_refuses_by_name(model, error, message):
    with pytest.raises(error, match=message):
        tabular_kernel(model, FourRoomsEnv(5))

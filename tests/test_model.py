"""The model: built from specs, its log-probabilities by hand, and its copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_data import make_maze, random_transitions, update
from tensordict import TensorDict
from torch.distributions import Categorical, Independent, Normal
from torch.nn.functional import logsigmoid, one_hot
from torchrl.data import Bounded, Composite, MultiCategorical, OneHot, Unbounded
from torchrl.data import (
    Categorical as CategoricalSpec,
)
from torchrl.envs import GymEnv, InitTracker, StepCounter, TransformedEnv
from torchrl.modules import TanhNormal

from torchrl_recall import BacktrackModel
from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.model.heads import (
    CategoricalHead,
    ClassDelta,
    NormalDelta,
    NormalHead,
    SupportDelta,
    TanhNormalHead,
)

F64 = torch.float64

ENVS = {
    "pendulum": lambda: GymEnv("Pendulum-v1"),
    "inverted_pendulum": lambda: GymEnv("InvertedPendulum-v5"),
    "one_hot": lambda: GymEnv("CartPole-v1"),
    "categorical": lambda: GymEnv("CartPole-v1", categorical_action_encoding=True),
    "counted": lambda: TransformedEnv(GymEnv("Pendulum-v1"), StepCounter()),
    "maze": make_maze,
    "mazes": lambda: make_maze(batch_size=(3,)),
}


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

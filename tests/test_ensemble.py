"""Ensembles: members as views, their mixture by hand, how each learns, where they disagree."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from model_data import make_maze, random_transitions
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical, MultiCategorical
from trace_data import CELLS, F32, F64, make_model, randn

from torchrl_recall import BacktrackLoss, BacktrackModel
from torchrl_recall.diagnostics import tabular_kernel
from torchrl_recall.model.disagreement import disagreement


def make_ensemble(observation="normal", action="tanh", num_members=3, **kwargs):
    return make_model(observation, action, num_members=num_members, **kwargs)


def members(model):
    return [model.member(i) for i in range(model.num_members)]


def transitions(rows, seed=0, init=True):
    data = random_transitions(rows, dtype=F64, seed=seed)
    data["action"] = data["action"] * 3 + 1
    if init:
        data["is_init"] = torch.arange(rows).reshape(rows, 1) % 3 == 0
    return data


def test_one_member_is_the_model_there_was():
    torch.manual_seed(0)
    one = BacktrackModel(3, 2, num_cells=(8,), stop=True)
    torch.manual_seed(0)
    other = BacktrackModel(3, 2, num_cells=(8,), stop=True, num_members=1, member_per="trace")
    names = [name.split(".")[0] for name in other.state_dict()]
    assert set(names) == {
        "observation", "action", "delta_head", "action_network", "delta_network", "stop_network",
    }  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert other.member(0) is other
    assert not hasattr(other, "members")


def test_members_share_statistics_and_nothing_else():
    model = make_ensemble(stop=True)
    parameters = [{id(p) for p in one.parameters()} for one in members(model)]
    assert not parameters[0] & parameters[1]
    assert sum(map(len, parameters)) == len(list(model.parameters()))
    assert all(one.observation is model.observation for one in members(model))
    assert all(one.delta_head is model.delta_head for one in members(model))
    weights = [one.delta_network[0].weight for one in members(model)]
    assert not torch.equal(weights[0], weights[1])
    assert all(type(one) is BacktrackModel and one.num_members == 1 for one in members(model))


def test_views_are_kept_and_are_no_part_of_the_state():
    model = make_ensemble()
    assert model.member(1) is model.member(1)
    assert not any(module is model.member(1) for module in model.modules())
    assert all(name.split(".")[0] != "_views" for name in model.state_dict())
    assert b"_views" not in pickle.dumps(model)


def test_views_follow_whatever_happens_to_the_ensemble():
    model, rows = make_ensemble(), (randn(5, 3), randn(5, 2).tanh(), randn(5, 3, seed=1))
    view, other = model.member(2), make_ensemble(seed=1)
    model.load_state_dict(other.state_dict())
    found = view.step_log_prob(*rows)["delta"]
    assert torch.equal(found, other.member(2).step_log_prob(*rows)["delta"])
    model.members[2].delta_network = nn.Linear(5, 6, dtype=F64)
    assert model.member(2).delta_network is model.members[2].delta_network
    model.observation = copy.deepcopy(model.observation)
    assert model.member(2).observation is model.observation
    model.to(F32)
    assert model.member(2).dtype == F32
    assert model.member(2).delta_network.weight.dtype == F32


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_members_of_their_own(twin):
    model, rows = make_ensemble(stop=True), (randn(5, 3), randn(5, 2).tanh(), randn(5, 3, seed=1))
    other = twin(model)
    assert other.member(1).delta_network is other.members[1].delta_network
    assert other.member(1).delta_network is not model.member(1).delta_network
    for name, term in model.step_log_prob(*rows).items():
        assert torch.equal(other.step_log_prob(*rows)[name], term)


@pytest.mark.parametrize("name", ["stop_logit", "action_parameters", "delta_parameters"])
def test_what_is_one_members_is_refused(name):
    model = make_ensemble(stop=True)
    arguments = [randn(2, 3)] if name != "delta_parameters" else [randn(2, 2), randn(2, 3)]
    with pytest.raises(RuntimeError, match=rf"has 3; use model.member\(i\).{name}"):
        getattr(model, name)(*arguments)
    assert getattr(model.member(0), name)(*arguments).shape[0] == 2


def test_arguments_are_refused_by_name():
    for value, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="num_members must be"):
            BacktrackModel(3, 2, num_members=value)
    with pytest.raises(ValueError, match=r"member_per must be one of \('step', 'trace'\), got 'a'"):
        BacktrackModel(3, 2, num_members=2, member_per="a")
    with pytest.raises(ValueError, match="index must lie in 0 to 2, got 3"):
        make_ensemble().member(3)


def test_an_environment_gives_an_ensemble():
    model = BacktrackModel.from_env(make_maze(), num_cells=(8,), num_members=4, member_per="trace")
    assert model.num_members == len(model.members) == 4
    assert model.has_stop
    assert model.member(3).has_stop
    assert model.member_per == "trace"


# ---- the mixture ----


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("observation", ["normal", "support", "class"])
def test_the_mixtures_factors_are_conditionals_by_hand(observation, stop):
    """Each factor from plain probabilities of the members, joint over joint."""
    model = make_ensemble(observation, "categorical", stop=stop)
    if observation == "normal":
        state, next_state = randn(40, 3), randn(40, 3, seed=1)
    else:
        grid = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij"), -1)
        cells = grid.reshape(-1, 2) if observation == "support" else torch.arange(7).unsqueeze(-1)
        next_state = cells[torch.arange(40) % len(cells)]
        state = next_state.clone()
    action = torch.arange(40) % 4
    with torch.no_grad():
        found = {k: v.exp() for k, v in model.step_log_prob(state, action, next_state).items()}
        each = [
            {k: v.exp() for k, v in one.step_log_prob(state, action, next_state).items()}
            for one in members(model)
        ]
    goes_on = [p.get("stop", torch.ones(40, dtype=F64)) for p in each]
    acts = [g * p["action"] for g, p in zip(goes_on, each, strict=True)]
    whole = [g * p["delta"] for g, p in zip(acts, each, strict=True)]
    torch.testing.assert_close(found["action"], sum(acts) / sum(goes_on))
    torch.testing.assert_close(found["delta"], sum(whole) / sum(acts))
    if stop:
        torch.testing.assert_close(found["stop"], sum(goes_on) / 3)
    assert ("stop" in found) == stop
    assert list(found) == list(each[0])


def test_the_mixture_sums_to_one_over_all_that_can_have_come_before():
    model = make_ensemble("support", "categorical", stop=True)
    following = torch.tensor([2, 3])
    states = following + CELLS
    pairs = list(itertools.product(range(4), range(len(CELLS))))
    action = torch.tensor([a for a, _ in pairs])
    with torch.no_grad():
        terms = model.step_log_prob(
            states[[s for _, s in pairs]], action, following.expand(len(pairs), 2)
        )
        stops = torch.stack([one.stop_logit(following) for one in members(model)]).sigmoid().mean()
    total = sum(terms.values()).exp().sum()
    assert float(total + stops) == pytest.approx(1, abs=1e-12)


def test_the_mixture_of_a_single_member_repeated_is_that_member():
    model = make_ensemble(stop=True)
    for networks in model.members[1:]:
        networks.load_state_dict(model.members[0].state_dict())
    data = transitions(9)
    found, expected = model.log_prob(data), model.member(0).log_prob(data)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    written = model(data)["backtrack"]
    assert set(written.keys()) == {"action_log_prob", "delta_log_prob", "stop_log_prob"}


def test_the_mixtures_kernel_of_a_maze_is_its_density():
    torch.manual_seed(0)
    env = make_maze()
    model = BacktrackModel.from_env(env, num_cells=(8,), num_members=3, dtype=F64)
    stop, predecessor = tabular_kernel(model, env.base_env)
    torch.testing.assert_close(predecessor.sum((1, 2)), torch.ones(25, dtype=F64))
    data = env.rollout(30)
    cell, after = (data[key] @ torch.tensor([5, 1]) for key in model.in_keys[1::-1])
    expected = (1 - stop[after]) * predecessor[after, data["action"], cell]
    torch.testing.assert_close(model.log_prob(data).exp(), expected)


# ---- learning ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("stop", [False, True])
def test_the_loss_is_the_mean_of_the_members_own(stop, reduction):
    model, data = make_ensemble(stop=stop), transitions(12)
    loss = BacktrackLoss(model, reduction=reduction).eval()
    found = loss(data)
    each = [BacktrackLoss(one, reduction=reduction).eval()(data) for one in members(model)]
    assert set(found.keys()) == set(each[0].keys())
    for name, value in found.items():
        expected = sum(one[name] for one in each) / 3
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_members_learn_by_themselves():
    """A member's gradient is its own alone, over the number of members."""
    model, data = make_ensemble(), transitions(12)
    BacktrackLoss(model).eval()(data)["loss_backtrack"].backward()
    found = [p.grad.clone() for p in model.members[1].parameters()]
    model.zero_grad()
    BacktrackLoss(model.member(1)).eval()(data)["loss_backtrack"].backward()
    for mine, own in zip(found, model.members[1].parameters(), strict=True):
        torch.testing.assert_close(mine, own.grad / 3)
    assert all(p.grad is None for p in model.members[0].parameters())


def test_statistics_are_counted_once():
    model = make_ensemble()
    before = int(model.observation.normalizer.count)
    BacktrackLoss(model)(transitions(12))
    assert int(model.observation.normalizer.count) == before + 12
    assert int(model.delta_head.normalizer.count) == before + 12


def test_loss_and_density_compile_in_one_graph():
    model, data = make_ensemble(stop=True), transitions(6)
    loss = BacktrackLoss(model).eval()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(data)["loss_backtrack"], loss(data)["loss_backtrack"])
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(data), model.log_prob(data))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_bootstrap_weights_are_poisson_of_the_generator():
    model, data = make_ensemble(), transitions(12)
    loss = BacktrackLoss(model, bootstrap=True, generator=seeded(), reduction="none").eval()
    generator, ones = seeded(), torch.ones(12, dtype=F64)
    plain = [BacktrackLoss(one, reduction="none").eval()(data) for one in members(model)]
    weighted = [torch.poisson(ones, generator=generator) * x["loss_backtrack"] for x in plain]
    assert any(bool((x == 0).any()) for x in weighted)
    torch.testing.assert_close(loss(data)["loss_backtrack"], sum(weighted) / 3)


def test_bootstrap_goes_on_where_it_was_saved():
    model, data = make_ensemble(), transitions(12)
    loss = BacktrackLoss(model, bootstrap=True, generator=seeded()).eval()
    saved = copy.deepcopy(loss.state_dict())
    other = BacktrackLoss(model, bootstrap=True, generator=seeded(5)).eval()
    expected = [loss(data)["loss_backtrack"] for _ in range(3)]
    other.load_state_dict(saved)
    assert [other(data)["loss_backtrack"] for _ in range(3)] == expected
    twin = copy.deepcopy(loss)
    assert twin(data)["loss_backtrack"] == loss(data)["loss_backtrack"]
    assert not any("random" in name for name in BacktrackLoss(model).state_dict())


def test_bootstrap_of_one_member_is_refused():
    with pytest.raises(ValueError, match="bootstrap is for ensembles"):
        BacktrackLoss(make_model(), bootstrap=True)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got int"):
        BacktrackLoss(make_ensemble(), bootstrap=True, generator=3)


# ---- disagreement ----


def biased(model, biases):
    """Let the change's parameters be the same everywhere: the last layer's biases."""
    with torch.no_grad():
        for networks, bias in zip(model.members, biases, strict=True):
            for parameter in networks.delta_network.parameters():
                parameter.zero_()
            networks.delta_network[-1].bias.copy_(torch.as_tensor(bias, dtype=F64))
    return model


def test_gaussian_disagreement_is_the_members_deviation_by_hand():
    model = biased(make_ensemble(num_cells=()), [[m, 0, 0, 0, 0, 0] for m in (1.0, 2.0, 6.0)])
    found = disagreement(model, randn(4, 2), randn(4, 3))
    # Deviations -2, -1 and 3 of the first of three values.
    torch.testing.assert_close(found, torch.full((4,), math.sqrt(14 / 3 / 3), dtype=F64))


def test_mixture_disagreement_is_of_the_mean():
    model = make_ensemble(num_cells=(), num_components=2)
    same_mean = [[1.0] * 3 + [3.0] * 3, [0.0] * 3 + [4.0] * 3, [2.0] * 6]
    biased(model, [[*loc, *[0.0] * 8] for loc in same_mean])
    found = disagreement(model, randn(4, 2), randn(4, 3))
    torch.testing.assert_close(found, torch.zeros(4, dtype=F64), atol=1e-12, rtol=0)


def test_categorical_disagreement_is_mutual_information_by_hand():
    model = make_ensemble("class", "categorical", num_members=2, num_cells=())
    shares = torch.full((2, 7), 1e-12, dtype=F64)
    shares[0, 0], shares[1, 1] = 1, 1
    biased(model, shares.log().tolist())
    state = torch.arange(7).unsqueeze(-1)
    found = disagreement(model, torch.zeros(7, dtype=torch.int64), state)
    torch.testing.assert_close(found, torch.full((7,), math.log(2), dtype=F64))
    shares = torch.tensor([[0.5, 0.5, *[0] * 5], [0.9, 0.1, *[0] * 5]], dtype=F64)
    biased(model, shares.clamp_min(1e-12).log().tolist())
    found = disagreement(model, torch.zeros(7, dtype=torch.int64), state)

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    expected = entropy(0.7) - (entropy(0.5) + entropy(0.9)) / 2
    torch.testing.assert_close(found, torch.full((7,), expected, dtype=F64), rtol=1e-6, atol=0)


def test_displacements_that_leave_the_grid_are_no_disagreement():
    model = make_ensemble("support", "categorical", num_members=2, num_cells=())
    # They differ only about moving up out of the first row; CELLS[2] is (-1, 0).
    biased(model, [[0, 0, 9.0, 0, 0], [0, 0, -9.0, 0, 0]])
    inner, edge = torch.tensor([[2, 2], [0, 2]])
    action = torch.zeros((), dtype=torch.int64)
    with torch.no_grad():
        assert float(disagreement(model, action, inner)) > 0.5
        assert float(disagreement(model, action, edge)) == pytest.approx(0, abs=1e-12)


def test_members_agree_on_data_and_disagree_away_from_it():
    torch.manual_seed(0)
    model = BacktrackModel(1, 1, num_cells=(32,), num_members=5)
    following = torch.rand(512, 1) * 2 - 1
    action = torch.rand(512, 1) * 2 - 1
    state = following - 0.5 * action + torch.sin(3 * following) + 0.05 * torch.randn(512, 1)
    data = TensorDict(
        {"observation": state, "action": action, "next": {"observation": following}}, [512]
    )
    loss = BacktrackLoss(model)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss(data)["loss_backtrack"].backward()
        optimizer.step()
    with torch.no_grad():
        inside = disagreement(model, action, following).mean()
        outside = disagreement(model, action, following + 5).mean()
    print(f"disagreement {inside:.4f} on the data, {outside:.3f} away from it")
    assert float(outside) > 10 * float(inside)


def test_disagreement_refuses_by_name():
    with pytest.raises(ValueError, match="model has one member"):
        disagreement(make_model(), randn(4, 2), randn(4, 3))
    with pytest.raises(TypeError, match="model must be a BacktrackModel, got int"):
        disagreement(3, randn(4, 2), randn(4, 3))


def test_other_heads_and_members_of_several_kinds():
    model = BacktrackModel(MultiCategorical([3, 3]), Categorical(2), num_members=2, num_cells=(8,))
    value = disagreement(model, torch.zeros(5, dtype=torch.int64), torch.zeros(5, 2).long())
    assert value.shape == (5,)
    assert bool((value >= 0).all())
    assert bool((value <= math.log(2)).all())

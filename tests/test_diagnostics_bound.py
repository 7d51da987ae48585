"""The variational bound and its gap, and the divergence from the exact kernel, exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from model_data import make_maze, random_transitions
from torchrl.data import Categorical, MultiCategorical

from torchrl_recall import BacktrackLoss, BacktrackModel
from torchrl_recall.diagnostics import (
    held_out_likelihood,
    maze_bound,
    maze_divergence,
    maze_gap,
    tabular_kernel,
    variational_bound,
)
from torchrl_recall.envs import (
    BacktrackKernel,
    FourRoomsEnv,
    backtrack_kernel,
    exact_backtrack_model,
    forward_log_probability,
    kernel_divergence,
    start_success,
    trajectory_log_probability,
    transition_probability,
)

F64 = torch.float64
GOAL, START = 18, 6
# Bounds are compared with four standard errors: with fixed seeds, one in 16000 is further.
ERRORS = 4


def maze(**options):
    return FourRoomsEnv(5, **{"slip": 0.2, "max_steps": None, **options})


def random_policy(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(25, 4, dtype=F64, generator=generator) / 2, -1)


def perturbed(env, policy, size=0.3, seed=0):
    """A model that is wrong everywhere, but goes only where episodes can go.

    Logits of the exact one, moved by noise: what is impossible stays so.
    """
    model, kernel = exact_backtrack_model(env, policy, dtype=F64), backtrack_kernel(env, policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in (model.action_network, model.delta_network, model.stop_network):
            weight = network[2].weight
            weight += size * torch.randn(weight.shape, dtype=F64, generator=generator)
    return model, kernel


def ensemble_of(models, member_per):
    """An ensemble whose members are given models."""
    whole = BacktrackModel.from_env(
        make_maze(), num_cells=(100,), dtype=F64, num_members=len(models), member_per=member_per
    )
    for i, model in enumerate(models):
        whole.member(i).load_state_dict(model.state_dict())
    return whole


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("horizon", [None, 12])
@pytest.mark.parametrize("start", ["fixed", "any"])
def test_the_bound_is_tight_for_the_exact_model(start, horizon):
    env, policy = maze(start=start), random_policy()
    model = exact_backtrack_model(env, policy, dtype=F64)
    options = {"num_traces": 300, "horizon": horizon, "generator": generator(0)}
    bound = maze_bound(model, env, policy, **options)
    evidence = math.log(start_success(env, policy, horizon=horizon))
    assert float(bound.log_evidence) == pytest.approx(evidence, abs=1e-12)
    if horizon is not None:
        assert evidence < -0.2
    # Every single trajectory has the weight of the evidence, so that there is nothing to average.
    assert float((bound.log_weight - evidence).abs().max()) < 1e-5
    assert abs(float(bound.gap)) < 1e-5
    assert float(bound.standard_error) < 1e-5
    assert float(bound.possible) == 1
    assert float(bound.importance_weighted) == pytest.approx(evidence, abs=1e-5)


def test_walks_that_are_cut_off_are_scored_as_ends_of_longer_episodes():
    env, policy = maze(), random_policy()
    model = exact_backtrack_model(env, policy, dtype=F64)
    bound = maze_bound(model, env, policy, num_traces=200, num_steps=3, generator=generator(0))
    # From corner to corner takes 4 steps at least: all are cut off.
    assert float(bound.log_weight.abs().max()) < 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bound_of_a_wrong_model_is_below_the_evidence_by_its_exact_gap(seed):
    env, policy = maze(), random_policy(seed)
    model, _ = perturbed(env, policy, seed=seed)
    gap = maze_gap(model, env, policy)
    assert 0.05 < float(gap) < 20
    options = {"num_traces": 4000, "num_steps": 400, "generator": generator(seed)}
    bound = maze_bound(model, env, policy, **options)
    assert float(bound.possible) == 1
    assert float(bound.value) < float(bound.log_evidence) - ERRORS * float(bound.standard_error)
    assert abs(float(bound.gap - gap)) < ERRORS * float(bound.standard_error)
    # More samples inside the logarithm: a tighter bound.
    assert float(bound.importance_weighted) > float(bound.value)


def episodes(env, longest):
    """All sequences of states and actions from the start to the goal of at most so many steps."""
    linked = transition_probability(env) > 0
    walks = [((START,), ())]
    for _ in range(longest):
        grown = [
            ((*s, after), (*a, action))
            for s, a in walks
            for action in range(4)
            for after in linked[s[-1], action].nonzero().flatten().tolist()
        ]
        yield from (walk for walk in grown if walk[0][-1] == GOAL)
        walks = [walk for walk in grown if walk[0][-1] != GOAL]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_bound_within_a_horizon_is_the_sum_over_all_trajectories(wrong):
    env, policy, horizon = maze(slip=0.0), random_policy(), 6
    exact = exact_backtrack_model(env, policy, dtype=F64)
    model = perturbed(env, policy)[0] if wrong else exact
    stop, predecessor = tabular_kernel(model, env)
    kernel = BacktrackKernel(stop, predecessor, stop)
    log_p, log_q = [], []
    for s, a in episodes(env, horizon):
        s, a = torch.tensor(s), torch.tensor(a)
        log_p.append(forward_log_probability(env, policy, s, a))
        log_q.append(trajectory_log_probability(kernel, s, a))
    log_p, log_q = torch.stack(log_p), torch.stack(log_q)
    evidence = log_p.logsumexp(0)
    assert float(evidence) == pytest.approx(math.log(start_success(env, policy, horizon=horizon)))
    log_q = log_q - log_q.logsumexp(0)
    exact = (log_q.exp() * (log_p - log_q)).sum()
    options = {"num_traces": 60_000, "horizon": horizon, "generator": generator(1)}
    bound = maze_bound(model, env, policy, **options)
    assert float(bound.log_evidence) == pytest.approx(float(evidence), abs=1e-12)
    assert abs(float(bound.value - exact)) < ERRORS * float(bound.standard_error) + 1e-5
    assert float(evidence - exact) == pytest.approx(0, abs=1e-5) if not wrong else exact < evidence


@pytest.mark.parametrize("member_per", ["step", "trace"])
def test_the_bound_of_an_ensemble_is_that_of_how_it_walks(member_per):
    """Of one model twice nothing changes; of two models the bound is below the evidence."""
    env, policy = maze(), random_policy()
    right = exact_backtrack_model(env, policy, dtype=F64)
    wrong, _ = perturbed(env, policy)
    options = {"num_traces": 2000, "num_steps": 200, "generator": generator(0)}
    same = maze_bound(ensemble_of([right, right], member_per), env, policy, **options)
    assert float(same.log_weight.abs().max()) < 1e-5
    both = ensemble_of([right, wrong], member_per)
    mixed = maze_bound(both, env, policy, **options)
    alone = maze_gap(wrong, env, policy)
    assert 0 < float(mixed.gap) < float(alone)
    if member_per == "step":
        assert abs(float(mixed.gap - maze_gap(both, env, policy))) < ERRORS * float(
            mixed.standard_error
        )
    else:
        # Half of the walks are exact: by convexity the divergence is at most half of the other's.
        assert float(mixed.gap) < float(alone) / 2 + ERRORS * float(mixed.standard_error)
        with pytest.raises(ValueError, match="no Markov kernel"):
            maze_gap(both, env, policy)


def test_the_kernel_of_an_ensemble_is_the_mixture_of_its_members():
    env, policy = maze(), random_policy()
    models = [perturbed(env, policy, seed=i)[0] for i in range(3)]
    stop, predecessor = tabular_kernel(ensemble_of(models, "step"), env)
    tables = [tabular_kernel(model, env) for model in models]
    joint = sum((1 - s)[:, None, None] * p for s, p in tables) / 3
    torch.testing.assert_close(stop, sum(s for s, _ in tables) / 3)
    torch.testing.assert_close((1 - stop)[:, None, None] * predecessor, joint)


def test_a_learned_model_walks_where_no_episode_goes():
    env, policy = maze(), random_policy()
    torch.manual_seed(0)
    model = BacktrackModel.from_env(make_maze(), num_cells=(16,))
    assert math.isinf(float(maze_gap(model, env, policy)))
    bound = maze_bound(model, env, policy, num_traces=2000, num_steps=4, generator=generator(0))
    assert 0 < float(bound.possible) < 0.5
    assert float(bound.value) == -math.inf
    assert float(bound.standard_error) == math.inf
    assert float(bound.value_possible) < ERRORS * float(bound.standard_error_possible)
    # By hand: the walk given that it is possible, times the share of those.
    kept = bound.log_weight[bound.log_weight > -math.inf]
    expected = kept.mean() + math.log(len(kept) / 2000)
    assert float(bound.value_possible) == pytest.approx(float(expected))


def test_the_generic_bound_by_hand():
    log_p, log_q = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]]), torch.full((2, 2), -1.0)
    bound = variational_bound(log_p, log_q, log_evidence=0.5)
    weights = torch.tensor([0.0, -2.0, -1.0, -1.0], dtype=F64)
    torch.testing.assert_close(bound.log_weight, weights)
    assert float(bound.value) == -1
    assert float(bound.standard_error) == pytest.approx(math.sqrt(2 / 3 / 4))
    assert float(bound.gap) == 1.5
    weighted = math.log((1 + math.exp(-2) + 2 * math.exp(-1)) / 4)
    assert float(bound.importance_weighted) == pytest.approx(weighted)
    assert bound.scalars()["log_evidence"] == 0.5
    without = variational_bound(log_p, log_q)
    assert without.log_evidence is None
    assert "log_evidence" not in without.scalars()
    with pytest.raises(ValueError, match="log_evidence, which was not given"):
        without.gap  # noqa: B018


def test_the_error_of_the_bound_of_possible_traces_is_right():
    """The estimate over many draws spreads by its stated standard error (within 10 %)."""
    torch.manual_seed(0)
    values, errors = [], []
    for _ in range(1000):
        log_p = torch.where(torch.rand(400) < 0.7, -1 + 0.5 * torch.randn(400), -torch.inf)
        bound = variational_bound(log_p, torch.zeros(400))
        values.append(bound.value_possible)
        errors.append(bound.standard_error_possible)
    spread = float(torch.stack(values).std())
    assert float(torch.stack(errors).mean()) == pytest.approx(spread, rel=0.1)
    assert float(torch.stack(values).mean()) == pytest.approx(-1 + math.log(0.7), abs=0.01)


@pytest.mark.parametrize(
    ("log_p", "log_q", "evidence", "message"),
    [
        ([0.0], [0.0], None, "at least 2 entries"),
        ([0.0, 0.0], [0.0, 0.0, 0.0], None, "one shape"),
        ([0.0, 0.0], [0.0, -torch.inf], None, "log_q_trajectory must be finite"),
        ([0.0, torch.nan], [0.0, 0.0], None, "log_p_trajectory"),
        ([0.0, torch.inf], [0.0, 0.0], None, "log_p_trajectory"),
        ([0.0, 0.0], [0.0, 0.0], -math.inf, "log_evidence must be one finite"),
    ],
)
def test_wrong_log_probabilities(log_p, log_q, evidence, message):
    with pytest.raises(ValueError, match=message):
        variational_bound(torch.tensor(log_p), torch.tensor(log_q), evidence)


def test_wrong_arguments_of_the_maze():
    env, policy = maze(), random_policy()
    model = exact_backtrack_model(env, policy, dtype=F64)
    for horizon in (2, 3):
        with pytest.raises(ValueError, match=f"horizon {horizon} is too short: 0 of 9"):
            maze_bound(model, env, policy, horizon=horizon, num_traces=9)
    plain = BacktrackModel(MultiCategorical([5, 5]), Categorical(4), num_cells=(8,))
    for function in (maze_bound, maze_gap):
        with pytest.raises(ValueError, match="no stop head"):
            function(plain, env, policy)
        with pytest.raises(TypeError, match="BacktrackModel"):
            function(torch.nn.Linear(1, 1), env, policy)
    with torch.no_grad():
        model.stop_network[2].weight.zero_()
        model.stop_network[2].bias.fill_(-1e4)
    with pytest.raises(ValueError, match="never ends a walk"):
        maze_gap(model, env, policy)


@pytest.mark.parametrize("wrong", [False, True])
def test_divergence_of_a_maze(wrong):
    env, policy = maze(), random_policy()
    exact = exact_backtrack_model(env, policy, dtype=F64), backtrack_kernel(env, policy)
    model, exact = perturbed(env, policy) if wrong else exact
    found = maze_divergence(model, env, policy)
    total = kernel_divergence(exact, *tabular_kernel(model, env))
    assert float(found.trajectory) == float(total.trajectory)
    assert float(found.per_step) == float(total.per_step)
    torch.testing.assert_close(found.visits @ found.per_state, total.trajectory)
    # Each state by the definition, in loops over outcomes.
    stop, predecessor = (part.tolist() for part in tabular_kernel(model, env))
    for after in range(25):
        expected = 0.0
        if (p := float(exact.stop[after])) > 0:
            expected += p * math.log(p / stop[after])
        for action, before in itertools.product(range(4), range(25)):
            p = float(exact.joint[after, action, before])
            if p > 0:
                q = (1 - stop[after]) * predecessor[after][action][before]
                expected += p * math.log(p / q)
        assert float(found.per_state[after]) == pytest.approx(expected, abs=1e-9)
    assert (float(found.trajectory) > 0.1) == wrong
    assert found.scalars() == {
        "per_step": float(found.per_step),
        "trajectory": float(found.trajectory),
    }


class TestHeldOutLikelihood:
    def model_and_data(self, **options):
        torch.manual_seed(0)
        env = make_maze(batch_size=(20,))
        model = BacktrackModel.from_env(env, num_cells=(16,), **options)
        return model, env.rollout(40, break_when_any_done=False)

    @torch.no_grad()
    def test_is_the_mean_of_the_loss(self):
        model, data = self.model_and_data()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        found = held_out_likelihood(model, data, batch_size=37)
        loss = BacktrackLoss(model, reduction="none").eval()(data)
        rows = loss["loss_backtrack"].double()
        assert float(found.total) == pytest.approx(float(rows.mean()), rel=1e-5)
        assert float(found.standard_error) == pytest.approx(float(rows.std()) / 800**0.5, rel=1e-5)
        for name in ("action", "delta", "stop"):
            expected = -float(loss[f"backtrack_{name}_log_prob"])
            assert float(getattr(found, name)) == pytest.approx(expected, rel=1e-4)
        assert found.num_rows == 800
        model.train()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    @torch.no_grad()
    def test_an_ensemble_is_scored_as_a_mixture(self):
        model, data = self.model_and_data(num_members=3)
        found = held_out_likelihood(model, data)
        states = model.read(data.reshape(-1))
        members = []
        for i in range(3):
            terms = model.member(i).step_log_prob(*states)
            members.append(torch.stack(list(terms.values())).sum(0))
        steps = torch.stack(members).logsumexp(0) - math.log(3)
        stops = torch.stack(
            [torch.sigmoid(model.member(i).stop_logit(states[0])) for i in range(3)]
        )
        starts = torch.where(data["is_init"].reshape(-1), stops.mean(0).log(), 0.0)
        expected = -(steps + starts).mean()
        assert float(found.total) == pytest.approx(float(expected), rel=1e-5)
        assert (
            found.total
            <= sum(held_out_likelihood(model.member(i), data).total for i in range(3)) / 3
        )

    def test_rows_that_do_not_count(self):
        torch.manual_seed(0)
        model = BacktrackModel(3, 2, num_cells=(8,))
        data = random_transitions(60)
        expected = held_out_likelihood(model, data[:40])
        data["collector", "mask"] = torch.arange(60) < 50
        data["next", "observation"][40:50] = torch.nan
        with pytest.raises(ValueError, match="10 of 60 transitions have NaN"):
            held_out_likelihood(model, data)
        found = held_out_likelihood(model, data, mask_nonfinite=True)
        assert found.num_rows == 40
        assert float(found.total) == pytest.approx(float(expected.total), rel=1e-6)
        assert found.stop is None
        assert "stop" not in found.scalars()
        data["collector", "mask"] = torch.zeros(60, dtype=torch.bool)
        with pytest.raises(ValueError, match="no row to score"):
            held_out_likelihood(model, data)

"""The exact solutions of FourRoomsEnv against hand, enumeration and Monte-Carlo answers."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scipy.stats import chi2

from torchrl_recall.envs import (
    BacktrackKernel,
    FourRoomsEnv,
    backtrack_kernel,
    expected_visits,
    forward_log_probability,
    kernel_divergence,
    start_success,
    success_probability,
    trajectory_log_probability,
    transition_probability,
)

MAZE_5 = """\
#####
#S  #
# # #
#  G#
#####""".splitlines()

MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1)]
FREE = [6, 7, 8, 11, 13, 16, 17, 18]
START, GOAL = 6, 18

# Monte-Carlo tests fail a correct solution once in a thousand seeds; the seeds are fixed.
ERROR_RATE = 1e-3


def walk(cell, action):
    """One move in the maze above, without tensors; the goal holds."""
    row, column = cell // 5 + MOVES[action][0], cell % 5 + MOVES[action][1]
    return cell if cell == GOAL or MAZE_5[row][column] == "#" else row * 5 + column


def make_policy(size, seed, scale=0.7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size**2, 4, generator=generator, dtype=torch.float64)
    return (scale * logits).softmax(-1)


def play(env, policy):
    """Run every maze to its end; returns states [T + 1, B], actions [T, B], lengths [B].

    Past its length a maze's entries mean nothing.
    """
    torch.manual_seed(0)
    to_cell = torch.tensor([env.size, 1])
    td = env.reset()
    states, actions = [td["observation"].mul(to_cell).sum(-1)], []
    length = torch.zeros(env.batch_size, dtype=torch.int64)
    running = torch.ones(env.batch_size, dtype=torch.bool)
    while running.any():
        actions.append(torch.multinomial(policy[states[-1]], 1).squeeze(-1))
        td = env.step(td.set("action", actions[-1]))["next"]
        states.append(td["observation"].mul(to_cell).sum(-1))
        length += running
        running = running & ~td["done"].squeeze(-1)
    return torch.stack(states), torch.stack(actions), length


def survival(statistic, degrees):
    """Probability that chance alone gives so large a χ² statistic."""
    return float(chi2.sf(float(statistic), degrees))


class Play:
    """A few thousand random-policy episodes without time limit, and what they should look like."""

    def __init__(self):
        kwargs = {"start": "any", "slip": 0.2, "max_steps": None, "batch_size": (4000,), "seed": 0}
        self.env = FourRoomsEnv(5, **kwargs)
        self.policy = make_policy(5, seed=1)
        self.states, self.actions, self.length = play(self.env, self.policy)
        time = torch.arange(len(self.states)).unsqueeze(-1)
        self.visited = time <= self.length
        self.stepped = (time < self.length)[:-1]
        self.kernel = backtrack_kernel(self.env, self.policy)

    def trajectories(self, number):
        for maze in range(number):
            length = int(self.length[maze])
            yield self.states[: length + 1, maze], self.actions[:length, maze]


@pytest.fixture(scope="module")
def episodes():
    return Play()


class TestTransition:
    @pytest.mark.parametrize("slip", [0.0, 0.3, 1.0])
    def test_against_the_map(self, slip):
        p = transition_probability(FourRoomsEnv(5, slip=slip))
        assert p.shape == (25, 4, 25)
        assert p.dtype == torch.float64
        wanted = torch.zeros(25, 4, 25, dtype=torch.float64)
        for cell in range(25):
            for action in range(4):
                if cell not in FREE:
                    wanted[cell, action, cell] = 1
                    continue
                wanted[cell, action, walk(cell, action)] += 1 - slip
                for other in range(4):
                    wanted[cell, action, walk(cell, other)] += slip / 4
        assert torch.allclose(p, wanted, rtol=0, atol=1e-15)


class TestSuccess:
    @pytest.mark.parametrize("slip", [0.0, 0.2])
    @pytest.mark.parametrize("horizon", [0, 1, 4, 6])
    def test_enumeration(self, slip, horizon):
        policy = make_policy(5, seed=2)

        def reach(cell, steps):
            if cell == GOAL or steps == 0:
                return float(cell == GOAL)
            return sum(
                ((1 - slip) * policy[cell, action].item() + slip / 4)
                * reach(walk(cell, action), steps - 1)
                for action in range(4)
            )

        success = success_probability(FourRoomsEnv(5, slip=slip), policy, horizon=horizon)
        assert success.dtype == torch.float64
        wanted = [reach(cell, horizon) if cell in FREE else 0.0 for cell in range(25)]
        assert success.tolist() == pytest.approx(wanted, abs=1e-14)

    def test_monte_carlo(self):
        env = FourRoomsEnv(7, start="any", slip=0.1, max_steps=40, batch_size=(20_000,), seed=0)
        policy = make_policy(7, seed=3)
        states, _, length = play(env, policy)
        won = states[length, torch.arange(20_000)] == 5 * 7 + 5
        number = torch.zeros(49, dtype=torch.float64)
        wins = number.index_add(0, states[0], won.double())
        number = number.index_add(0, states[0], torch.ones_like(won, dtype=torch.float64))
        success = success_probability(env, policy)
        free = number > 0
        variance = (number * success * (1 - success))[free]
        assert free.sum() == 19
        assert variance.min() > 5
        statistic = ((wins - number * success)[free] ** 2 / variance).sum()
        assert survival(statistic, 19) > ERROR_RATE
        mean = start_success(env, policy)
        error = math.sqrt(mean * (1 - mean) / 20_000)
        assert abs(won.double().mean().item() - mean) < 3.3 * error

    def test_horizons(self):
        env, policy = FourRoomsEnv(7, slip=0.1), make_policy(7, seed=4)
        by_default = success_probability(env, policy)
        assert torch.equal(by_default, success_probability(env, policy, horizon=70))
        endless = success_probability(env, policy, horizon=None)
        assert torch.allclose(endless, success_probability(env, policy, horizon=50_000), atol=1e-9)
        unlimited = FourRoomsEnv(7, slip=0.1, max_steps=None)
        assert torch.equal(endless, success_probability(unlimited, policy))
        assert (endless.view(7, 7)[~env.walls] - 1).abs().max() < 1e-12
        assert (endless.view(7, 7)[env.walls] == 0).all()

    def test_no_way_to_the_goal(self):
        policy = torch.zeros(25, 4)
        policy[:, 0] = 1
        wanted = torch.zeros(25, dtype=torch.float64)
        wanted[GOAL] = 1
        assert torch.equal(success_probability(FourRoomsEnv(5), policy, horizon=None), wanted)
        policy[8] = torch.tensor([0.5, 0.5, 0, 0])  # from (1, 3) down, and then up again
        assert torch.equal(success_probability(FourRoomsEnv(5), policy, horizon=None), wanted)
        policy[13] = torch.tensor([0.0, 0.25, 0.75, 0])  # from (2, 3) down in the end
        wanted[[8, 13]] = 1
        assert torch.allclose(
            success_probability(FourRoomsEnv(5), policy, horizon=None), wanted, atol=1e-15
        )


class TestVisits:
    def test_by_hand(self):
        # Folded on its diagonal the 5 x 5 maze is a line of five, walked with probability 1/2: 32
        # steps, and a cell two doors from the goal is seen half as often as one four doors away.
        visits = expected_visits(FourRoomsEnv(5), torch.full((25, 4), 0.25))
        wanted = [[8.0, 6, 4], [6, 0, 2], [4, 2, 1]]
        assert torch.allclose(
            visits.view(5, 5)[1:4, 1:4], torch.tensor(wanted, dtype=torch.float64), atol=1e-12
        )
        assert visits.sum().item() == pytest.approx(33)

    @pytest.mark.parametrize("start", ["fixed", "room", "any"])
    def test_against_the_sum_over_time(self, start):
        env, policy = FourRoomsEnv(7, start=start, slip=0.1), make_policy(7, seed=5)
        step = torch.einsum("sa,sat->st", policy, transition_probability(env))
        step[40] = 0  # the goal, (5, 5), counts once
        now, total = env.start_probability, torch.zeros(49, dtype=torch.float64)
        for _ in range(10_000):
            total, now = total + now, now @ step
        assert torch.allclose(expected_visits(env, policy), total, rtol=1e-9, atol=1e-9)

    def test_monte_carlo(self, episodes):
        # Hotelling's T² of the per-episode counts in the seven cells before the goal.
        counts = torch.zeros(25, 4000, dtype=torch.float64)
        counts.scatter_add_(0, episodes.states, episodes.visited.double())
        exact = episodes.kernel.visits
        assert (counts[GOAL] == 1).all()
        assert exact[GOAL] == 1
        inner = FREE[:-1]
        gap = counts[inner].mean(1) - exact[inner]
        statistic = 4000 * gap @ torch.linalg.solve(counts[inner].cov(), gap)
        assert survival(statistic, len(inner)) > ERROR_RATE

    def test_must_reach_the_goal(self):
        policy = torch.zeros(25, 4)
        policy[:, 0] = 1
        with pytest.raises(ValueError, match=r"action_probability must lead to the goal.*\(1, 1\)"):
            expected_visits(FourRoomsEnv(5), policy)
        # A trap that is entered with probability 1/2 only.
        policy = torch.full((25, 4), 0.25)
        policy[11] = torch.tensor([0.0, 0.0, 1.0, 0.0])
        with pytest.raises(ValueError, match=r"cells \[\(2, 1\)\]"):
            backtrack_kernel(FourRoomsEnv(5), policy)


class TestKernel:
    @pytest.mark.parametrize("size", [5, 7, 15])
    @pytest.mark.parametrize("start", ["fixed", "room", "any"])
    def test_normalised(self, size, start):
        env = FourRoomsEnv(size, start=start, slip=0.1)
        kernel = backtrack_kernel(env, make_policy(size, seed=6, scale=0.3))
        free = ~env.walls.view(-1)
        total = kernel.stop + kernel.joint.sum((1, 2))
        assert (total[free] - 1).abs().max() < 1e-12
        assert (total[~free] == 0).all()
        again = free & (kernel.stop < 1)
        assert (kernel.action.sum(-1)[again] - 1).abs().max() < 1e-12
        goal = (size - 2) * (size + 1)
        assert (kernel.predecessor[:, :, goal] == 0).all()
        assert (kernel.predecessor >= 0).all()

    def test_formulas(self):
        env, policy = FourRoomsEnv(7, start="room", slip=0.1), make_policy(7, seed=7)
        stop, predecessor, visits = backtrack_kernel(env, policy)
        start, p = env.start_probability, transition_probability(env)
        for after in (8, 9, 10, 15, 40):
            assert stop[after].item() == pytest.approx((start[after] / visits[after]).item())
            inflow = visits[after] - start[after]
            for before in (8, 9, 10, 11, 15, 16, 33):
                wanted = visits[before] * policy[before] * p[before, :, after] / inflow
                assert torch.allclose(predecessor[after, :, before], wanted, rtol=1e-9, atol=1e-15)

    def test_shortest_path_leaves_no_doubt(self):
        env = FourRoomsEnv(5)
        policy = torch.full((25, 4), 0.25)
        path, moves = [6, 7, 8, 13, 18], [3, 3, 1, 1]
        policy[path[:-1]] = torch.eye(4)[moves]
        stop, predecessor, visits = backtrack_kernel(env, policy)
        wanted = torch.zeros(25, 4, 25, dtype=torch.float64)
        wanted[path[1:], moves, path[:-1]] = 1
        assert torch.equal(predecessor, wanted)
        assert visits.nonzero().view(-1).tolist() == path
        assert stop.nonzero().view(-1).tolist() == [START]
        assert stop[START] == 1

    def test_monte_carlo(self, episodes):
        # Given s', what came before is drawn from q* anew each time; rows are independent at last.
        states, actions = episodes.states, episodes.actions
        stops = torch.zeros(25, dtype=torch.float64)
        stops.index_add_(0, states[0], torch.ones(4000, dtype=torch.float64))
        code = (states[1:] * 4 + actions) * 25 + states[:-1]
        steps = code[episodes.stepped].bincount(minlength=25 * 4 * 25).double()
        counts = torch.cat([stops.unsqueeze(1), steps.view(25, 100)], 1)
        kernel = episodes.kernel
        probability = torch.cat([kernel.stop.unsqueeze(1), kernel.joint.view(25, 100)], 1)
        assert (counts[probability == 0] == 0).all()
        expected = counts.sum(1, keepdim=True) * probability
        possible = expected > 0
        assert expected[possible].min() > 5
        statistic = ((counts - expected) ** 2 / expected)[possible].sum()
        assert survival(statistic, int(possible.sum()) - len(FREE)) > ERROR_RATE


class TestTrajectories:
    def test_forward_is_backward(self, episodes):
        for states, actions in episodes.trajectories(200):
            forward = forward_log_probability(episodes.env, episodes.policy, states, actions)
            backward = trajectory_log_probability(episodes.kernel, states, actions)
            assert math.isfinite(forward)
            assert backward.item() == pytest.approx(forward.item(), rel=0, abs=1e-10)

    def test_batched_and_impossible(self):
        env, policy = FourRoomsEnv(5, slip=0.1), make_policy(5, seed=8)
        kernel = backtrack_kernel(env, policy)
        states = torch.tensor([[6, 7, 8, 13, 18], [6, 6, 8, 13, 18], [7, 7, 8, 13, 18]])
        actions = torch.tensor([3, 3, 1, 1]).expand(3, 4)
        forward = forward_log_probability(env, policy, states, actions)
        backward = trajectory_log_probability(kernel, states, actions)
        by_hand = policy[[6, 7, 8, 13], [3, 3, 1, 1]].log() + math.log(0.925)
        # A slip does as asked one time in four: 0.9 + 0.1 / 4.
        assert forward[0].item() == pytest.approx(by_hand.sum().item(), abs=1e-12)
        assert backward[0].item() == pytest.approx(by_hand.sum().item(), abs=1e-10)
        assert forward[1:].tolist() == backward[1:].tolist() == [-math.inf, -math.inf]

    def test_shapes(self):
        env, policy = FourRoomsEnv(5), make_policy(5, seed=0)
        states, actions = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        for read in (
            functools.partial(forward_log_probability, env, policy),
            functools.partial(trajectory_log_probability, backtrack_kernel(env, policy)),
        ):
            with pytest.raises(ValueError, match=r"one more entry than actions.*\[4\].*\[4\]"):
                read(states, actions)


class TestDivergence:
    def test_of_itself_is_zero(self, episodes):
        kernel = episodes.kernel
        per_step, trajectory = kernel_divergence(kernel, kernel.stop, kernel.predecessor)
        assert per_step == trajectory == 0

    def test_by_hand(self):
        # Two states: 0 always stops, 1 is entered from 0 by action 0 or 1.
        predecessor = torch.zeros(2, 2, 2, dtype=torch.float64)
        predecessor[1, :, 0] = torch.tensor([0.25, 0.75])
        stop = torch.tensor([1.0, 0.5], dtype=torch.float64)
        exact = BacktrackKernel(stop, predecessor, torch.tensor([1.0, 3.0], dtype=torch.float64))
        other = torch.zeros(2, 2, 2, dtype=torch.float64)
        other[1, :, 0] = 0.5
        per_step, trajectory = kernel_divergence(exact, torch.tensor([0.8, 0.2]), other)
        second = 0.5 * math.log(0.5 / 0.2)
        second += 0.125 * math.log(0.125 / 0.4) + 0.375 * math.log(0.375 / 0.4)
        wanted = math.log(1 / 0.8) + 3 * second
        assert trajectory.item() == pytest.approx(wanted, rel=1e-6)
        assert per_step.item() == pytest.approx(wanted / 4, rel=1e-6)

    def test_monte_carlo(self, episodes):
        # The mean of log q*(τ) - log q(τ) over real episodes.
        exact = episodes.kernel
        torch.manual_seed(0)
        stop = exact.stop * 0.9
        predecessor = exact.predecessor * (0.3 * torch.randn(25, 4, 25, dtype=torch.float64)).exp()
        predecessor = predecessor / predecessor.sum((1, 2), keepdim=True).clamp_min(1e-300)
        model = BacktrackKernel(stop, predecessor, exact.visits)
        gaps = torch.stack(
            [
                trajectory_log_probability(exact, *one) - trajectory_log_probability(model, *one)
                for one in episodes.trajectories(3000)
            ]
        )
        trajectory = kernel_divergence(exact, stop, predecessor).trajectory
        error = gaps.std() / math.sqrt(len(gaps))
        assert trajectory > 5 * error
        assert abs(gaps.mean() - trajectory) < 3.3 * error

    def test_infinite_where_the_model_rules_out_what_happens(self, episodes):
        kernel = episodes.kernel
        for stop in (torch.zeros(25), torch.ones(25)):
            assert kernel_divergence(kernel, stop, kernel.predecessor).per_step == math.inf
        predecessor = kernel.predecessor.clone()
        predecessor[GOAL] = 0
        assert kernel_divergence(kernel, kernel.stop, predecessor).trajectory == math.inf

    def test_shapes(self, episodes):
        kernel = episodes.kernel
        with pytest.raises(ValueError, match=r"stop must have shape \[25\], got \[24\]"):
            kernel_divergence(kernel, kernel.stop[1:], kernel.predecessor)
        with pytest.raises(ValueError, match=r"predecessor must have shape \[25, 4, 25\], got"):
            kernel_divergence(kernel, kernel.stop, kernel.predecessor[:, :1])


class TestPolicyTable:
    @pytest.mark.parametrize(
        ("policy", "message"),
        [
            (torch.full((24, 4), 0.25), r"shape \[25, 4\], got \[24, 4\]"),
            (torch.full((25, 4), 0.5), "rows that sum to 1, got"),
            (torch.tensor([-0.5, 0.5, 0.5, 0.5]).expand(25, 4), "non-negative"),
            (torch.full((25, 4), math.nan), "non-negative"),
        ],
    )
    def test_refused(self, policy, message):
        for solve in (success_probability, expected_visits, backtrack_kernel):
            with pytest.raises(ValueError, match=f"action_probability must .*{message}"):
                solve(FourRoomsEnv(5), policy)

    def test_rows_are_made_to_sum_to_one(self):
        env, policy = FourRoomsEnv(7), make_policy(7, seed=9)
        rounded = (1.0005 * policy).float().requires_grad_()
        visits = expected_visits(env, rounded)
        assert torch.allclose(visits, expected_visits(env, policy), rtol=1e-5)
        assert not visits.requires_grad

    def test_horizon(self):
        with pytest.raises(ValueError, match=r"horizon must be at least 0.*got -1"):
            success_probability(FourRoomsEnv(5), make_policy(5, seed=0), horizon=-1)

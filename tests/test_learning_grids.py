"""The grid runs of `bench.learning`: steps, episodes and what is imitated are what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from bench.learning.grids.dyna import Dyna, DynaSettings
from bench.learning.grids.hosts import DQN, ActorCritic, ActorCriticSettings, DQNSettings
from bench.learning.grids.real import (
    BestReal,
    BestSettings,
    Bonus,
    BonusSettings,
    Hindsight,
    HindsightSettings,
    SelfImitation,
    SelfImitationSettings,
)
from bench.learning.grids.recipes import ROWS
from bench.learning.grids.task import Task
from bench.learning.grids.traces import Traces, TracesSettings, is_last_visit, only_kept
from bench.learning.grids.training import Learner, Recipe, train
from bench.learning.grids.walker import Episodes, Walker
from torchrl_recall.envs import FourRoomsEnv, start_success

SMALL = ActorCriticSettings(num_envs=4, num_cells=8)
SMALL_DQN = DQNSettings(num_envs=4, num_cells=8, updates=2, batch_size=8, epsilon_steps=500)


def uniform(size):
    return torch.full((size**2, 4), 0.25)


def walker(size=5, num_envs=4, seed=0, **options):
    env = FourRoomsEnv(size, batch_size=(num_envs,), seed=seed, **options)
    return Walker(env, seed), env


class TestWalker:
    def test_steps_as_the_environment_does(self):
        mine, env = walker(7, max_steps=9, start="any")
        td = env.reset()
        env._cell = torch.from_numpy(mine.cell).clone()
        for _ in range(20):
            before = env._cell.clone()
            data = mine.rollout(uniform(7), 1)
            assert data.cell[:, 0].tolist() == before.tolist()
            after = env.step(td.set("action", torch.from_numpy(data.action[:, 0])))["next"]
            rows = data.tensordict()["next"][:, 0]
            for key in ("observation", "reward", "terminated", "done"):
                assert torch.equal(rows[key], after[key]), key
            # Starts are drawn by each on its own.
            done = after["done"].squeeze(-1)
            assert set(mine.cell[done.numpy()]) <= set(mine.starts)
            env._cell = torch.from_numpy(mine.cell).clone()
            env._count = torch.from_numpy(mine.count).clone()

    def test_draws_actions_by_the_policy_and_says_their_probability(self):
        mine, _ = walker(5, 64)
        policy = uniform(5)
        policy[6] = torch.tensor([0.1, 0.2, 0.3, 0.4])
        data = mine.rollout(policy, 400)
        here = data.cell == 6
        shares = np.bincount(data.action[here], minlength=4) / here.sum()
        # Some 6,000 draws; four standard deviations are .026.
        assert np.abs(shares - [0.1, 0.2, 0.3, 0.4]).max() < 0.03
        assert np.exp(data.log_prob[here][data.action[here] == 3]) == pytest.approx(0.4)

    def test_slips(self):
        mine, env = walker(7, 64, slip=0.4, start="any")
        data = mine.rollout(uniform(7), 300)
        meant = env.next_cell.numpy()[data.cell, data.action]
        # Each of the three other moves comes with .1, and some lead to the same cell.
        free = np.array([len(set(row)) == 4 for row in env.next_cell.tolist()])[data.cell]
        assert abs((data.next_cell != meant)[free].mean() - 0.3) < 0.02

    def test_episodes_are_cut_where_they_end(self):
        mine, _ = walker(5, 3, max_steps=7)
        cut, found, expected = Episodes(3), [], []
        kept = [[], [], []]
        for _ in range(30):
            data = mine.rollout(uniform(5), 4)
            found += cut.finished(data)
            for row in range(3):
                for t in range(4):
                    entry = (data.cell, data.action, data.next_cell, data.terminated)
                    kept[row].append([int(values[row, t]) for values in entry])
                    if data.done[row, t]:
                        expected.append(kept[row])
                        kept[row] = []
        assert [steps.tolist() for steps in found] == expected
        assert len(found) > 40


class TestHosts:
    def test_advantages_are_torchrls(self):
        task = Task(5)
        mine, _ = walker(5, 4, max_steps=6)
        host = ActorCritic(task.data(4), SMALL)
        data = mine.rollout(uniform(5), 16)
        batch, expected = data.tensordict(), data.tensordict()
        host._set_advantage(batch, data)
        host.a2c.advantage(expected)
        assert data.done.sum() > 5
        for key in ("advantage", "value_target"):
            torch.testing.assert_close(batch[key], expected[key])

    def test_policies_are_tables_of_what_the_networks_say(self):
        env = Task(5).data(4)
        host = ActorCritic(env, SMALL)
        cell = TensorDict({"observation": torch.tensor([1, 3])}, [])
        expected = host.a2c.actor.get_dist(cell).probs
        torch.testing.assert_close(host.policy()[1 * 5 + 3], expected)
        dqn = DQN(env, SMALL_DQN, 1000)
        best = dqn.actor(cell)["action"].item()
        assert dqn.policy()[8].tolist() == [0.25] * 4  # all exploration at first
        assert dqn.judged()[8, best].item() == pytest.approx(0.95 + 0.05 / 4)

    def test_dqn_learns_the_optimal_values(self):
        env = Task(5).data(16)
        torch.manual_seed(0)
        settings = replace(SMALL_DQN, num_envs=16, num_cells=64, updates=8, batch_size=64)
        host = DQN(env, replace(settings, alpha=0.6, gamma=0.8, tau=0.1), 4096)
        mine = Walker(env, 0)
        for _ in range(40):
            host.learn(mine.rollout(uniform(5), 8))
        values = host.network(host.cells).max(-1).values.view(5, 5)
        # From the start four steps lead to the goal.
        assert values[1, 1].item() == pytest.approx(0.8**3, abs=0.05)
        assert start_success(FourRoomsEnv(5), host.judged()) > 0.9


class TestTraces:
    def make(self, settings, size=5, num_envs=4, max_steps=9):
        env = FourRoomsEnv(size, batch_size=(num_envs,), max_steps=max_steps)
        host = ActorCritic(env, replace(SMALL, num_envs=num_envs))
        return Traces(env, host, settings, 4096), Walker(env, 0)

    def test_the_real_past_is_what_came_before(self):
        settings = TracesSettings(past=True, last_visit=False, num_traces=32)
        traces, mine = self.make(settings)
        cut, episodes = Episodes(4), []
        for _ in range(40):
            data = mine.rollout(uniform(5), 8)
            episodes += cut.finished(data)
            traces.observe(data)
        rewarded = {tuple(map(tuple, e[:, :2].tolist())) for e in episodes if e[-1, 3]}
        assert len(rewarded) > 5
        seen = set()
        for _ in range(10):
            trace = traces.sample()["trace"]
            kept = trace["collector", "mask"]
            for row in range(32):
                steps = trace[row][kept[row]]
                cell = steps["observation"] @ torch.tensor([5, 1])
                seen.add(tuple(zip(cell.tolist(), steps["action"].tolist(), strict=True)))
                assert steps["next", "observation"][-1].tolist() == [3, 3]
        assert seen <= rewarded
        assert len(seen) > 5

    def test_last_visit_by_the_definition(self):
        torch.manual_seed(0)
        cells = torch.randint(3, (50, 8, 2))
        end, real = torch.randint(3, (50, 2)), torch.rand(50, 8) < 0.9
        kept = is_last_visit(cells, end, real, 3)
        for row in range(50):
            states = [*cells[row].tolist(), end[row].tolist()]
            for t in range(8):
                again = states[t] in states[t + 1 :]
                assert kept[row, t] == (bool(real[row, t]) and not again)
        assert 0.1 < kept.float().mean() < 0.6

    def test_only_kept_steps_have_the_same_mean(self):
        traces, mine = self.make(TracesSettings(start="known", model_updates=1), size=9)
        traces.observe(mine.rollout(uniform(9), 8))
        sample = traces.sample()
        few = only_kept(sample)
        assert len(few) == sample["trace", "collector", "mask"].sum() < sample["trace"].numel()
        all_steps, kept_steps = (traces.host.recall_loss(rows) for rows in (sample, few))
        torch.testing.assert_close(all_steps["loss_imitation"], kept_steps["loss_imitation"])
        sample["trace", "collector", "mask"][:] = False
        assert only_kept(sample) is sample

    @pytest.mark.parametrize("past", [False, True])
    def test_starts_are_rare_before_the_first_reward_and_rewarded_after(self, past):
        settings = TracesSettings(past=past, num_traces=64, model_updates=1, frontier=3)
        traces, mine = self.make(settings, size=9, max_steps=None)
        traces.observe(mine.rollout(uniform(9), 8))
        assert not traces.found
        after = traces.buffer.storage[:]["next", "observation"] @ torch.tensor([9, 1])
        # By hand: how often each cell was entered in the 32 steps.
        visits = [(after == cell).sum().item() for cell in after]
        drawn = traces.buffer.sample()["index"]
        # Of equal ones any three may be taken.
        assert max(visits[row] for row in drawn.tolist()) <= sorted(visits)[2]
        while not traces.found:
            traces.observe(mine.rollout(uniform(9), 8))
        ends = traces.sample()["trace", "next", "observation"][:, -1]
        assert (ends == 7).all()

    def test_a_known_goal_needs_no_reward(self):
        traces, mine = self.make(TracesSettings(start="known", model_updates=1), size=9)
        traces.observe(mine.rollout(uniform(9), 8))
        sample = traces.sample()
        assert (sample["trace", "next", "observation"][:, -1] == 7).all()
        traces.settings = replace(traces.settings, past=True)
        with pytest.raises(ValueError, match="real past"):
            traces.sample()

    def test_starts_of_value_follow_the_critic(self):
        traces, mine = self.make(TracesSettings(start="value", num_traces=32, top=0.01), size=9)
        data = mine.rollout(uniform(9), 8)
        traces.observe(data)
        value = traces.host.value()
        best = value[torch.from_numpy(data.next_cell)].max()
        end = traces.sample()["trace", "next", "observation"][:, -1] @ torch.tensor([9, 1])
        assert (value[end] == best).all()


class TestReal:
    def test_best_episodes(self):
        env = FourRoomsEnv(5, batch_size=(8,), max_steps=12)
        host = ActorCritic(env, replace(SMALL, num_envs=8))
        best, mine, cut = BestReal(host, BestSettings(num_episodes=6)), Walker(env, 0), Episodes(8)
        episodes = []
        assert best.sample() is None
        for _ in range(30):
            data = mine.rollout(uniform(5), 8)
            best.observe(data)
            episodes += cut.finished(data)
        lengths = sorted(len(steps) for steps in episodes if steps[-1, 3])
        assert sorted(len(steps) for _, _, steps in best.best) == lengths[:6]
        trace = best.sample()["trace"]
        assert trace["collector", "mask"].all()
        wanted = {tuple(step) for _, _, steps in best.best for step in steps[:, :2].tolist()}
        cell = trace["observation"].squeeze(1) @ torch.tensor([5, 1])
        found = set(zip(cell.tolist(), trace["action"].squeeze(1).tolist(), strict=True))
        assert found <= wanted

    def test_self_imitation_stores_discounted_returns(self):
        env = FourRoomsEnv(5, batch_size=(8,), max_steps=12)
        host = ActorCritic(env, replace(SMALL, num_envs=8))
        sil, mine, cut = SelfImitation(host, SelfImitationSettings()), Walker(env, 0), Episodes(8)
        expected = []
        for _ in range(10):
            data = mine.rollout(uniform(5), 8)
            sil.update(data)
            for steps in cut.finished(data):
                if steps[-1, 3]:
                    expected += [0.99 ** (len(steps) - 1 - t) for t in range(len(steps))]
        assert sil.buffer[:]["return"].tolist() == pytest.approx(expected)

    def test_bonus(self):
        mine, _ = walker(5, 2)
        data = mine.rollout(uniform(5), 3)
        counts = np.bincount(data.next_cell.ravel(), minlength=25)
        with_bonus = Bonus(5, BonusSettings(0.5))(data)
        for row in range(2):
            for t in range(3):
                count = counts[data.next_cell[row, t]]
                expected = data.reward[row, t] + 0.5 / math.sqrt(count)
                assert with_bonus.reward[row, t] == pytest.approx(expected)

    def test_hindsight_goals_lie_in_the_future_of_the_episode(self):
        env = FourRoomsEnv(5, batch_size=(4,), max_steps=8)
        host = DQN(env, replace(SMALL_DQN, goals=True), 1000)
        hindsight = Hindsight(host, env.goal, HindsightSettings(num_goals=3))
        mine, cut = Walker(env, 0), Episodes(4)
        data = mine.rollout(uniform(5), 8)
        hindsight.observe(data)
        episodes = cut.finished(data)
        rows = host.buffer[:]
        assert len(rows) == 4 * sum(map(len, episodes))
        goal = rows["observation"][:, 2:] @ torch.tensor([5, 1])
        after = rows["next", "observation"][:, :2] @ torch.tensor([5, 1])
        assert torch.equal(rows["next", "terminated"].squeeze(-1), goal == after)
        begin = 0
        for steps in episodes:
            length = len(steps)
            assert (goal[begin : begin + length] == 18).all()  # the cell (3, 3)
            for repeat in (1, 2, 3):
                part = goal[begin + repeat * length : begin + (repeat + 1) * length]
                assert all(part[t] in steps[t:, 2].tolist() for t in range(length))
            begin += 4 * length

    @pytest.mark.parametrize("num_goals", [1, 8])
    def test_hindsight_keeps_all_of_a_run(self, num_goals):
        settings = replace(SMALL_DQN, goals=True, updates=0)
        recipe = Recipe(settings, hindsight=HindsightSettings(num_goals=num_goals))
        task = Task(5, fragment=8)
        learner, mine = Learner(task, recipe, 320), Walker(task.data(4), 0)
        cut, num_steps = Episodes(4), 0
        for _ in range(10):
            data = mine.rollout(uniform(5), 8)
            learner.update(data)
            num_steps += sum(map(len, cut.finished(data)))
        assert len(learner.host.buffer) == (1 + num_goals) * num_steps > 0

    def test_the_forward_model_learns_the_maze(self):
        env = FourRoomsEnv(5, start="any", batch_size=(16,))
        torch.manual_seed(0)
        host = DQN(env, replace(SMALL_DQN, num_envs=16), 1000)
        settings = DynaSettings(updates=0, model_updates=40, model_learning_rate=1e-2)
        dyna, mine = Dyna(env, host, settings), Walker(env, 0)
        for _ in range(10):
            dyna.update(mine.rollout(uniform(5), 8))
        rows = dyna.imagine()
        cell = rows["observation"] @ torch.tensor([5, 1])
        after = rows["next", "observation"] @ torch.tensor([5, 1])
        real = env.next_cell[cell, rows["action"]]
        assert (after == real).float().mean() > 0.95
        assert ((real == 18) == rows["next", "terminated"].squeeze(-1)).float().mean() > 0.95


class TestTraining:
    @pytest.mark.parametrize("row", sorted(ROWS))
    def test_every_row_trains(self, row):
        recipe = ROWS[row]
        result = train(0, task=Task(7), recipe=recipe, budget=256)
        assert result["steps"][0] == 0
        assert len(result["steps"]) == len(result["score"]) == len(result["seconds"])
        assert result["log"]["gradient_steps"] > 0 or row == "dqn/her"

    def test_the_score_is_the_exact_success(self):
        task = Task(7, fragment=5, slip=0.1)
        env = task.data(16)
        assert (env.max_steps, env.start, env.slip) == (5, "any", 0.1)
        judged = task.judged()
        assert (judged.max_steps, judged.start, judged.slip) == (70, "fixed", 0.1)
        result = train(3, task=task, recipe=ROWS["a2c/plain"], budget=128)
        torch.manual_seed(3)
        learner = Learner(task, ROWS["a2c/plain"], 128)
        expected = start_success(FourRoomsEnv(7, slip=0.1), learner.host.judged())
        assert result["score"][0] == pytest.approx(expected)

    def test_a_seed_repeats_and_another_does_not(self):
        runs = [
            train(seed, task=Task(7), recipe=ROWS["a2c/traces"], budget=384) for seed in (1, 1, 2)
        ]
        assert runs[0]["score"] == runs[1]["score"] != runs[2]["score"]

    def test_ends_when_solved(self):
        result = train(0, task=Task(5), recipe=ROWS["a2c/known"], budget=20_000)
        assert result["solved_at"] == result["steps"][-1] < 5000
        assert result["score"][-1] >= 0.9 > max(result["score"][:-1])

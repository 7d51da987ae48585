"""PointMazeEnv: episodes, states that are set, starts and goals."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import chi2, kstest

from torchrl_recall.envs import PointMazeEnv
from torchrl_recall.envs.maze_map import LAYOUTS

# Statistical tests fail a correct environment once in a thousand seeds; the seeds are fixed.
ERROR_RATE = 1e-3


def play(env, actions):
    """Step a list of actions; returns the list of next tensordicts."""
    td, out = env.reset(), []
    for action in actions:
        action = torch.as_tensor(action, dtype=env.dtype)
        td.set("action", action.expand(*env.batch_size, 2).clone())
        td, following = env.step_and_maybe_reset(td)
        out.append(td["next"])
        td = following
    return out


class TestEpisodes:
    def test_the_goal_pays_once_and_ends(self):
        env = PointMazeEnv("u", step_size=1.0)
        path = [(1, 0), (1, 0), (0, 1), (0, 1), (-1, 0), (-0.7, 0), (-0.1, 0)]
        steps = play(env, path)
        assert [s["reward"].item() for s in steps] == [0, 0, 0, 0, 0, 0, 1]
        for key in ("terminated", "done", "success"):
            assert [s[key].item() for s in steps] == [False] * 6 + [True]
        assert not any(s["truncated"].item() for s in steps)
        assert env.goal.tolist() == [1.5, 3.5]

    @pytest.mark.parametrize(("max_steps", "limit"), [("auto", 112), (3, 3), (1, 1)])
    def test_time_limit_truncates(self, max_steps, limit):
        env = PointMazeEnv("u", max_steps=max_steps)
        steps = play(env, [(-1, 0)] * (2 * limit))
        assert env.max_steps == limit
        ends = [(t + 1) % limit == 0 for t in range(2 * limit)]
        assert [s["truncated"].item() for s in steps] == ends
        assert [s["done"].item() for s in steps] == ends
        assert not any(s["terminated"].item() for s in steps)
        assert [s["elapsed"].item() for s in steps] == [t % limit + 1 for t in range(2 * limit)]

    def test_the_goal_in_the_last_step_is_both(self):
        env = PointMazeEnv(["#####", "#SG #", "#####"], step_size=1.0, max_steps=1)
        (step,) = play(env, [(1, 0)])
        assert step["terminated"].item()
        assert step["truncated"].item()

    def test_no_time_limit(self):
        steps = play(PointMazeEnv("u", max_steps=None), [(-1, 0)] * 200)
        assert "elapsed" not in steps[0]
        assert not any(s["done"].item() for s in steps)

    def test_partial_reset(self):
        env = PointMazeEnv("u", batch_size=(3,), max_steps=4)
        steps = play(env, [(1, 0), (1, 0)])
        td = steps[-1].exclude("reward").set("_reset", torch.tensor([[True], [False], [True]]))
        td = env.reset(td, set_state=False)
        assert td["observation"][:, 0].tolist() == [1.5, 2.0, 1.5]
        assert td["elapsed"].squeeze(-1).tolist() == [0, 2, 0]
        ends = []
        for _ in range(4):
            td = env.step(td.set("action", torch.zeros(3, 2)))["next"]
            ends.append(td["truncated"].squeeze(-1).tolist())
        assert ends[1] == [False, True, False]
        assert ends[3] == [True, True, True]

    def test_rollout_starts_again_after_the_end(self):
        env = PointMazeEnv("u", start="any", batch_size=(64,), max_steps=20, seed=0)
        data = env.rollout(200, break_when_any_done=False)
        ends = data["next", "done"][:, :-1, 0]
        assert (data["elapsed"][:, 1:][ends] == 0).all()
        assert (data["elapsed"][:, 1:][~ends] > 0).all()
        assert data["next", "terminated"].any()
        assert data["next", "truncated"].any()
        same = data["observation"][:, 1:][~ends] == data["next", "observation"][:, :-1][~ends]
        assert same.all()

    def test_masked_mazes_hold_still(self):
        env = PointMazeEnv(["######", "#S  G#", "######"], step_size=1.0, batch_size=(3,))
        td = env.reset()
        for t in range(3):
            td.set("_step", torch.tensor([True, False, t < 2]))
            td = env.step(td.set("action", torch.tensor([[1.0, 0.0]]).repeat(3, 1)))["next"]
        assert td["observation"][:, 0].tolist() == [4.5, 1.5, 3.5]
        assert td["reward"].squeeze(-1).tolist() == [1, 0, 0]
        assert td["elapsed"].squeeze(-1).tolist() == [3, 0, 2]
        # Who holds at the goal is not paid again.
        td.set("_step", torch.tensor([False, True, False])).set("action", torch.zeros(3, 2))
        td = env.step(td)["next"]
        assert td["reward"].squeeze(-1).tolist() == [0, 0, 0]
        assert td["terminated"].squeeze(-1).tolist() == [True, False, False]
        data = PointMazeEnv("u", start="any", batch_size=(16,), seed=0).rollout(
            300, break_when_all_done=True
        )
        assert data["next", "done"][:, -1].all()


class TestStates:
    def test_set_and_go_on_from_any_state(self):
        """Any row of a rollout, in any order, put back into another environment, goes on alike."""
        options = {"start": "any", "goal": "any", "goal_in_observation": True}
        env = PointMazeEnv("large", dynamics="velocity", batch_size=(8,), seed=0, **options)
        data = env.rollout(50, break_when_any_done=False).reshape(-1)
        order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
        data = data[order]
        other = PointMazeEnv("large", dynamics="velocity", batch_size=(400,), seed=9, **options)
        keys = ("observation", "elapsed", "desired_goal")
        td = other.reset(data.select(*keys), set_state=True)
        for key in (*keys, "success", "achieved_goal"):
            assert torch.equal(td[key], data[key])
        after = other.step(td.set("action", data["action"]))["next"]
        for key in after.keys():  # noqa: SIM118
            assert torch.equal(after[key], data["next", key]), key

    def test_a_step_without_a_reset(self):
        env = PointMazeEnv("u", batch_size=(2,), max_steps=None)
        td = env.reset().empty()
        td["observation"] = torch.tensor([[1.5, 1.5], [3.5, 2.5]])
        td["action"] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        after = env.step(td)["next", "observation"]
        assert after.tolist() == [[1.75, 1.5], [3.5, 2.75]]

    def test_what_is_missing_when_set_is_the_beginning(self):
        env = PointMazeEnv("u", goal_in_observation=True)
        td = env.reset().select().set("observation", torch.tensor([3.5, 2.5]))
        td = env.reset(td, set_state=True)
        assert td["elapsed"].item() == 0
        assert td["desired_goal"].tolist() == [1.5, 3.5]
        assert td["achieved_goal"].tolist() == [3.5, 2.5]

    def test_free(self):
        env = PointMazeEnv("u")
        for x, y in itertools.product(range(-1, 6), repeat=2):
            inside = 0 <= x < 5 and 0 <= y < 5
            expected = inside and LAYOUTS["u"][4 - y][x] != "#"
            for offset in (0.0, 0.5, 0.999):
                assert env.free(torch.tensor([x + offset, y + offset])).item() is expected
        odd = torch.tensor([[float("nan"), 1.5], [1.5, float("inf")], [-float("inf"), 1.5]])
        assert not env.free(odd).any()
        assert env.free(torch.tensor([[1.5, 1.5, float("nan"), 0.0]])).all()

    @pytest.mark.parametrize("spacing", [1.0, 0.5, 0.3])
    def test_goal_grid(self, spacing):
        env = PointMazeEnv("large", dtype=torch.float64)
        grid = env.goal_grid(spacing)
        assert grid.dtype == torch.float64
        assert env.free(grid).all()
        # As many as there is room for.
        expected = {
            (i, j)
            for i in range(int(12 / spacing))
            for j in range(int(9 / spacing))
            if LAYOUTS["large"][8 - int((j + 0.5) * spacing)][int((i + 0.5) * spacing)] != "#"
        }
        places = (grid / spacing - 0.5).round().long().tolist()
        assert {tuple(place) for place in places} == expected
        assert len(places) == len(expected)
        torch.testing.assert_close(grid, (torch.tensor(places) + 0.5).double() * spacing)


class TestStarts:
    @pytest.mark.parametrize("end", ["observation", "desired_goal"])
    def test_uniform_over_the_free_area(self, end):
        options = {"start": "any", "goal": "any", "goal_in_observation": True}
        env = PointMazeEnv("u", batch_size=(7000,), seed=0, **options)
        place = env.reset()[end]
        x, y = place.floor().long().unbind(-1)
        counts = torch.zeros(5, 5).index_put_((y, x), torch.tensor(1.0), accumulate=True)
        assert counts[env.walls].sum() == 0
        free = counts[~env.walls]
        statistic = ((free - 1000) ** 2 / 1000).sum()
        assert chi2.sf(float(statistic), 6) > ERROR_RATE
        for column in (place % 1).T:
            assert kstest(column.numpy(), "uniform").pvalue > ERROR_RATE

    def test_start_and_goal_are_in_different_cells(self):
        options = {"goal": "any", "goal_in_observation": True, "batch_size": (2000,), "seed": 0}
        for start in ("fixed", "any"):
            td = PointMazeEnv("u", start=start, **options).reset()
            goals = td["desired_goal"].floor()
            assert (goals != td["observation"].floor()).any(-1).all()
            assert len(goals.unique(dim=0)) == (6 if start == "fixed" else 7)
        td = PointMazeEnv("u", start="any", batch_size=(2000,), seed=0).reset()
        cells = td["observation"].floor().unique(dim=0).tolist()
        assert len(cells) == 6
        assert [1.0, 3.0] not in cells

    def test_fixed(self):
        td = PointMazeEnv("large", batch_size=(3,), goal_in_observation=True).reset()
        assert td["observation"].tolist() == [[10.5, 1.5]] * 3
        assert td["desired_goal"].tolist() == [[1.5, 7.5]] * 3
        assert not td["success"].any()

    def test_each_episode_has_its_goal(self):
        options = {"goal": "any", "goal_in_observation": True, "max_steps": 10}
        data = PointMazeEnv("u", batch_size=(4,), seed=0, **options).rollout(
            40, break_when_any_done=False
        )
        assert torch.equal(data["desired_goal"], data["next", "desired_goal"])
        assert len(data["desired_goal"].reshape(-1, 2).unique(dim=0)) >= 16
        distance = (data["next", "achieved_goal"] - data["desired_goal"]).norm(dim=-1)
        assert torch.equal(distance <= 0.25, data["next", "success"].squeeze(-1))
        assert torch.equal(data["next", "success"], data["next", "terminated"])
        assert torch.equal(data["next", "success"].float(), data["next", "reward"])

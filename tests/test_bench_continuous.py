"""The sparse continuous tasks against Gymnasium, the history against a loop, and short runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from bench.learning.continuous.cells import Cells
from bench.learning.continuous.history import History
from bench.learning.continuous.mountain_car import SparseMountainCarEnv
from bench.learning.continuous.ppo import PPO
from bench.learning.continuous.recall import RecallSettings, RecallTraces, reward_nearness
from bench.learning.continuous.tasks import TASKS
from bench.learning.continuous.variants import VARIANTS, clipped
from bench.learning.mujoco import tasks as mujoco_tasks


class TestMountainCar:
    def test_steps_are_gymnasiums(self):
        gymnasium = pytest.importorskip("gymnasium")
        theirs = gymnasium.make("MountainCarContinuous-v0").unwrapped
        theirs.reset(seed=0)
        draw = np.random.default_rng(0)
        low, high = theirs.observation_space.low, theirs.observation_space.high
        for _ in range(300):
            state = draw.uniform(low, high)
            action = draw.uniform(-1.5, 1.5, 1).astype(np.float32)
            theirs.state = state.copy()
            after, _, terminated, _, _ = theirs.step(action)
            ours = SparseMountainCarEnv()
            made = ours._step(
                TensorDict(
                    {
                        "observation": torch.tensor(state[None], dtype=torch.float64),
                        "action": torch.tensor(action[None]),
                        "elapsed": torch.zeros(1, 1, dtype=torch.int64),
                    },
                    [1],
                )
            )
            np.testing.assert_allclose(made["observation"][0].numpy(), after, atol=1e-6)
            assert bool(made["terminated"]) == terminated

    def test_specs_and_reward(self):
        env = SparseMountainCarEnv((3,), max_steps=5, seed=0)
        check_env_specs(env)
        data = env.rollout(5, break_when_any_done=False)
        assert data["next", "truncated"][:, -1].all()
        assert not data["next", "reward"].any()


class TestHalfCheetah:
    def test_steps_are_gymnasiums(self):
        gymnasium = pytest.importorskip("gymnasium")
        pytest.importorskip("mujoco")
        from bench.learning.continuous.half_cheetah import SparseHalfCheetahEnv

        theirs = gymnasium.make(
            "HalfCheetah-v5", exclude_current_positions_from_observation=False
        ).unwrapped
        ours = SparseHalfCheetahEnv((2,), distance=-0.05, max_steps=40, seed=0)
        check_env_specs(ours)
        state = ours.reset()
        theirs.reset(seed=0)
        data = ours._data[1]
        theirs.set_state(data.qpos.copy(), data.qvel.copy())
        theirs.data.qacc_warmstart[:] = data.qacc_warmstart
        draw = torch.Generator().manual_seed(0)
        after = state
        for _ in range(40):
            state["action"] = 2 * torch.rand(2, 6, generator=draw) - 1
            after = ours.step(state)["next"]
            expected, *_ = theirs.step(state["action"][1].double().numpy())
            found = torch.cat([after["position"], after["observation"]], -1)[1]
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
            assert bool(after["reward"][1]) == (expected[0] >= -0.05)
            state = after.exclude("reward")
        assert after["truncated"].all()

    def test_resets_only_what_is_asked_for(self):
        pytest.importorskip("mujoco")
        from bench.learning.continuous.half_cheetah import SparseHalfCheetahEnv

        env = SparseHalfCheetahEnv((2,), seed=0)
        before = env.reset()
        mask = torch.tensor([[True], [False]])
        env.reset(TensorDict({"_reset": mask}, [2]))
        after = env._read()
        assert torch.equal(before["observation"][1], after["observation"][1])
        assert not torch.equal(before["observation"][0], after["observation"][0])


class TestRoboticsPointMaze:
    def test_steps_are_the_packages(self):
        pytest.importorskip("gymnasium_robotics")
        from bench.learning.continuous.point_maze_robotics import RoboticsPointMazeEnv

        ours = RoboticsPointMazeEnv((2,), max_steps=30, seed=0)
        check_env_specs(ours)
        state = ours.reset()
        theirs = ours._points[1]  # stepped by itself from the same state
        copy = type(theirs)(maze_map=theirs.maze.maze_map, continuing_task=False)
        copy.reset(seed=1)
        place, speed = state["observation"][1].double().numpy().reshape(2, 2)
        copy.point_env.set_state(place, speed)
        draw = torch.Generator().manual_seed(0)
        for _ in range(30):
            action = state["action"] = 2 * torch.rand(2, 2, generator=draw) - 1
            state = ours.step(state)["next"]
            expected = copy.step(action[1].double().numpy())[0]["observation"]
            found = state["observation"][1].numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert state["truncated"].all()
        assert not state["success"].any()

    def test_the_goal_ends_it(self):
        pytest.importorskip("gymnasium_robotics")
        from bench.learning.continuous.point_maze_robotics import RoboticsPointMazeEnv

        env = RoboticsPointMazeEnv((2,), seed=0)
        state = env.reset()
        point = env._points[0]
        point.point_env.set_state(point.goal, np.zeros(2))
        state["action"] = torch.zeros(2, 2)
        after = env.step(state)["next"]
        for name in ("success", "terminated", "done"):
            assert after[name][:, 0].tolist() == [True, False]
        assert after["reward"][:, 0].tolist() == [1.0, 0.0]


class TestCells:
    def test_counts_are_those_of_a_loop(self):
        draw = torch.Generator().manual_seed(0)
        cells = Cells(torch.zeros(2), torch.tensor([1.0, 2.0]), 0.5)
        parts = [torch.randn(50, 2, generator=draw) for _ in range(3)]
        for part in parts:
            cells.add(part)
        names = [(math.floor(x / 0.5), math.floor(y / 1.0)) for x, y in torch.cat(parts).tolist()]
        of_row = cells.of_row.tolist()
        for one, number in zip(names, of_row, strict=True):
            assert cells.count[number] == names.count(one)
            assert [n == one for n in names] == [m == number for m in of_row]

    def test_every_cell_is_drawn_as_often(self):
        cells = Cells(torch.zeros(1), torch.ones(1), 1.0)
        cells.add(torch.tensor([[0.5]] * 97 + [[1.5]] * 2 + [[2.5]]))
        rows = cells.draw(30_000, torch.Generator().manual_seed(0))
        share = torch.bincount(cells.of_row[rows], minlength=3) / len(rows)
        # 5 standard errors of a third.
        assert (share - 1 / 3).abs().max() < 5 * (2 / 9 / len(rows)) ** 0.5


class TestGate:
    def made(self, value: float) -> Any:
        task = TASKS["u_maze_any"]
        few = {"first_model_steps": 2, "model_steps": 2, "num_traces": 4, "trace_steps": 5}
        host = PPO(
            replace(task, ppo=replace(task.ppo, **SMALL)),
            0,
            lambda host: RecallTraces(host, RecallSettings(**few, support=False)),
            budget=256,
        )
        last: Any = host.critic.module.layers[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(value)
        data = host._collect()
        # Two steps are rewarded: one ends its episode, the other does not.
        data["next", "reward"][:] = 0
        data["next", "reward"][0, :2] = 1
        data["next", "terminated"][0, 0], data["next", "terminated"][0, 1] = True, False
        host.history.extend(data)
        host.guide.update(data)
        return host

    def test_weights_are_the_share_that_is_not_expected(self):
        host = self.made(0.5)
        starts, gamma = host.guide.rewarded, host.settings.gamma
        # The best of four is the one that goes on, but where all four end.
        assert {round(x, 4) for x in starts.reached.tolist()} <= {1.0, 1 + gamma * 0.5}
        trace = TensorDict({"observation": torch.zeros(4, 5, 2)}, [4, 5])
        weight = host.guide._weight(trace)
        for row, reached in enumerate(starts.reached.tolist()):
            for t in range(5):
                promised = reached * gamma ** (4 - t)
                assert weight[row, t] == pytest.approx(max(1 - 0.5 / promised, 0), abs=1e-5)

    def test_nearness_of_rewards_by_hand(self):
        reward = torch.tensor(
            [
                [0.0, 0.0, 1.0, 0.0, 0.0],  # after the reward the episode goes on: not known
                [0.0, 0.0, 0.0, 0.0, 0.0],  # none at all
                [0.0, -2.0, 0.0, 0.0, 0.5],  # an end between two rewards
                [0.0, 0.0, 0.0, 1.0, 0.0],  # nothing from the third step to the end
            ]
        )
        done = torch.zeros(4, 5, dtype=torch.bool)
        done[2, 2] = done[3, 1] = done[3, 4] = True
        ends = {"reward": reward.unsqueeze(-1), "done": done.unsqueeze(-1)}
        g = 0.5
        known = [g * g, g, 1.0, *[0.0] * 5, g, 1.0, 0.0, g, 1.0, 0.0, 0.0, g, 1.0, 0.0]
        found = reward_nearness(TensorDict({"next": ends}, [4, 5]), g)
        assert found == pytest.approx(sum(known) / len(known))

    def test_open_is_both_shares(self):
        host = self.made(0.5)
        log = host.log
        weight = float(host.guide.batch["weight"].mean())
        assert 0 < log["reward_nearness"][0] < 0.1
        assert host.guide.open == pytest.approx(weight * (1 - log["reward_nearness"][0]), abs=1e-5)

    def test_where_rewards_come_all_the_time_the_run_is_the_plain_one(self):
        # To the bit: the guide draws from streams of its own.
        pytest.importorskip("mujoco")
        task = mujoco_tasks.TASKS["hopper_dense"]
        task = replace(task, ppo=replace(task.ppo, **SMALL), num_tests=1)
        few = {"first_model_steps": 2, "num_traces": 4, "trace_steps": 5, "num_references": 16}
        scores = []
        for make in (None, lambda host: RecallTraces(host, RecallSettings(**few))):
            host = PPO(task, 0, make, budget=4 * SMALL["num_envs"] * SMALL["rollout_steps"])
            scores.append((host.train()["score"], list(host.policy.parameters())))
        assert scores[0][0] == scores[1][0]
        assert all(torch.equal(a, b) for a, b in zip(scores[0][1], scores[1][1], strict=True))
        assert host.log["reward_nearness"] == [1.0] * 4

    def test_nothing_is_imitated_where_the_critic_expects_more(self):
        host = self.made(1e3)
        before = [p.detach().clone() for p in host.policy.parameters()]
        host.guide.finish()
        after = list(host.policy.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_the_host_learns_nothing_from_it_but_by_its_steps(self):
        host = self.made(0.0)
        steps = host.gradient_steps
        host.guide.finish()
        taken = int(RecallSettings().imitation_steps * host.guide.open)
        assert host.gradient_steps - steps == taken > 0
        assert all(p.grad is None for p in host.policy.parameters())


def made_history() -> tuple[History, torch.Tensor, torch.Tensor]:
    """Two environments, three rollouts of four steps; reward and done ``[2, 12]``."""
    history = History(24, ("observation",))
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(2, 12, generator=generator)
    done = torch.rand(2, 12, generator=generator) < 0.3
    place = torch.arange(24.0).view(2, 12)
    for part in range(3):
        cut = slice(4 * part, 4 * part + 4)
        ends = {"done": done[:, cut, None], "terminated": done[:, cut, None]}
        history.extend(
            TensorDict(
                {
                    "observation": place[:, cut, None],
                    "action": torch.zeros(2, 4, 1),
                    "next": {
                        "observation": place[:, cut, None] + 0.5,
                        "reward": reward[:, cut, None],
                        **ends,
                    },
                },
                [2, 4],
            )
        )
    return history, reward, done


class TestHistory:
    def test_along_time_and_back(self):
        history, *_ = made_history()
        place = history.data["observation"][:, 0]
        assert torch.equal(history.along_time(place), torch.arange(24.0).view(2, 12))
        assert torch.equal(history.by_row(history.along_time(place)), place)

    def test_returns_are_those_of_a_loop(self):
        history, reward, done = made_history()
        total, ended = (history.along_time(x) for x in history.returns(0.9))
        for e in range(2):
            for t in range(12):
                stop = next((u for u in range(t, 12) if done[e, u]), None)
                assert bool(ended[e, t]) == (stop is not None)
                if stop is not None:
                    rewards = reward[e, t : stop + 1]
                    expected = (rewards * 0.9 ** torch.arange(len(rewards))).sum()
                    torch.testing.assert_close(total[e, t], expected)

    def test_past_stops_at_the_episode_before(self):
        history, _, done = made_history()
        place = history.data["observation"][:, 0]
        for row in range(24):
            trace, kept = history.past(torch.tensor([row]), 5)
            e, t = divmod(int(place[row]), 12)
            first = next((u + 1 for u in range(t - 1, -1, -1) if done[e, u]), 0)
            expected = [12.0 * e + u for u in range(max(first, t - 4), t + 1)]
            assert trace["observation"][0, :, 0][kept[0]].tolist() == expected

    def test_episodes(self):
        history, _, done = made_history()
        place = history.data["observation"][:, 0]
        first = history.first_steps().nonzero().flatten()
        for row in first.tolist():
            e, t = divmod(int(place[row]), 12)
            assert t == 0 or done[e, t - 1]
            end = next((u for u in range(t, 12) if done[e, u]), 11)
            rows = history.episode_rows(torch.tensor([row]))
            assert place[rows].tolist() == [12.0 * e + u for u in range(t, end + 1)]


SMALL = {"num_envs": 8, "rollout_steps": 16, "minibatch": 64, "epochs": 1}
# Every task with traces and the real past, every variant on one task.
RUNS = [
    (task.name, variant)
    for task in TASKS.values()
    for variant in (VARIANTS if task.name == "u_maze" else ("traces", "real_past"))
]


@pytest.mark.parametrize(("task_name", "variant_name"), RUNS)
def test_every_row_trains(task_name: str, variant_name: str):
    task, variant = TASKS[task_name], VARIANTS[variant_name]
    if task.mujoco:
        pytest.importorskip("gymnasium_robotics" if task_name == "point_maze" else "mujoco")
    task = replace(task, ppo=replace(task.ppo, **SMALL), num_tests=2)
    settings = variant.options.get("settings")
    if settings is not None:
        few = {"first_model_steps": 2, "model_steps": 2, "num_traces": 4}
        variant = replace(variant, options={"settings": replace(settings, **few)})
    host = PPO(task, 0, variant.make(), budget=256)
    before = [p.detach().clone() for p in host.policy.parameters()]
    for _ in range(2):
        host.iterate()
    assert len(host.history) == 256
    after = list(host.policy.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("last", "solved"), [(1.55, None), (1.65, 20)])
def test_a_run_is_solved_at_a_share_of_its_range(last: float, solved: int | None):
    found = {"steps": [0, 10, 20], "score": [-9.0, 0.95, last], "solved_at": 10, "log": {}}
    assert clipped(found, None) is found
    ranged = clipped(found, (-2.0, 2.0))
    assert ranged == {**found, "score": [-2.0, 0.95, last], "solved_at": solved}

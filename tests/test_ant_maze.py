"""The ant's maze against gymnasium-robotics' own, and a short training run in it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from test_goal_coverage import SHORT, check_short_run
from torchrl.envs.utils import check_env_specs

pytest.importorskip("mujoco")
pytest.importorskip("gymnasium_robotics")

from bench.learning.goal_training import Run
from bench.learning.mujoco.ant_goals import AntSettings
from bench.learning.mujoco.ant_maze import AntMazeEnv

# Rollouts cut episodes, and goals are so large that some are reached at once.
SMALL = {"num_envs": 8, "rollout_steps": 16, "grid_spacing": 1.0, "goal_radius": 2.0}
TINY = AntSettings(**(SHORT | {"max_steps": 9} | SMALL))


def place(env: AntMazeEnv, row: int, x: float, y: float) -> None:
    """Put an ant somewhere, at rest."""
    env._ants[row].qpos[:2] = x, y
    env._mujoco.mj_forward(env._model, env._ants[row])


class TestSteps:
    def test_are_those_of_gymnasium_robotics(self):
        from gymnasium_robotics.envs.maze.ant_maze_v5 import AntMazeEnv as Theirs

        theirs = Theirs(continuing_task=False)
        theirs.position_noise_range = 0.0
        options = {"reset_cell": np.array([3, 1]), "goal_cell": np.array([3, 2])}
        expected, _ = theirs.reset(seed=0, options=options)
        ours = AntMazeEnv((2,), seed=0)
        state = ours.reset()
        goal = torch.from_numpy(expected["desired_goal"]).float()
        draw = torch.Generator().manual_seed(0)
        assert torch.equal(ours.start_position.double(), torch.tensor(theirs.reset_pos))
        rewards = 0.0
        for step in range(60):
            if step == 40:  # near the goal, with both: the reward and the end
                theirs.ant_env.data.qpos[:2] = goal + 0.2
                ours._ants[1].qpos[:2] = goal + 0.2
            state["desired_goal"] = goal.expand(2, 2)
            # Beyond the bounds, too: the simulation clips at its motors' range, as we do.
            state["action"] = 2.4 * torch.rand(2, 8, generator=draw) - 1.2
            expected, reward, terminated, *_ = theirs.step(state["action"][1].double().numpy())
            state = ours._step(state)
            both = np.concatenate([expected["achieved_goal"], expected["observation"]])
            np.testing.assert_array_equal(state["observation"][1], both[:29].astype(np.float32))
            assert float(state["reward"][1]) == reward
            assert bool(state["terminated"][1]) == terminated == bool(state["success"][1])
            rewards += reward
        assert rewards > 0
        theirs.close()

    def test_walls_hold_at_other_scales(self):
        """Ants that run for seconds: none leaves the maze, and walls are met."""
        env = AntMazeEnv((6,), scale=2.0, seed=0)
        state, draw = env.reset(), torch.Generator().manual_seed(1)
        contacts = 0
        for _ in range(120):
            state = env._step(state.set("action", 2 * torch.rand(6, 8, generator=draw) - 1))
            contacts += sum(_touches_a_wall(env, ant) for ant in env._ants)
        assert env.free(state["observation"][:, :2]).all()
        assert contacts > 0


def _touches_a_wall(env: AntMazeEnv, ant) -> bool:
    names = (env._model.geom(g).name for c in ant.contact for g in c.geom)
    return any(name.startswith("block") for name in names)


class TestEnvironment:
    def test_specs_starts_and_goals(self):
        env = AntMazeEnv((3,), scale=2.0, max_steps=5, seed=3)
        check_env_specs(env)
        first = env.reset()
        assert torch.equal(first["observation"][:, :2], torch.tensor([[-2.0, -2.0]]).expand(3, 2))
        assert env.free(first["desired_goal"]).all()
        env.set_seed(4)
        goals = env.reset()["desired_goal"]
        env.set_seed(4)
        assert torch.equal(goals, env.reset()["desired_goal"])
        assert not torch.equal(goals[0], goals[1])
        data = env.rollout(12, break_when_any_done=False)
        assert data["next", "truncated"].sum(1).eq(2).all()
        assert (data["elapsed"][:, :, 0] == torch.arange(12) % 5).all()
        # After a partial reset only the ant that was asked for is at the start.
        again = TensorDict({"_reset": torch.tensor([[True], [False], [False]])}, [3])
        before = env._read(goals, torch.zeros(3, 1, dtype=torch.int64))["observation"]
        after = env._reset(again)["observation"]
        assert torch.equal(after[0], first["observation"][0])
        assert torch.equal(after[1:], before[1:])
        assert not torch.equal(after[1], first["observation"][1])

    def test_success_by_hand(self):
        env = AntMazeEnv((3,), scale=2.0, goal_radius=0.5, max_steps=1, seed=0)
        state = env.reset()
        for row, distance in enumerate((0.4, 0.6, 0.0)):
            place(env, row, 0.0, -2.0)
            state["desired_goal"][row] = torch.tensor([distance, -2.0])
        state["action"] = torch.zeros(3, 8)
        # The third holds still: it has not made a step, and gets no reward.
        state["_step"] = torch.tensor([[True], [True], [False]])
        after = env._step(state)
        moved = (after["observation"][:2, :2] - torch.tensor([0.0, -2.0])).norm(dim=-1)
        assert (moved < 0.05).all()
        assert after["success"].flatten().tolist() == [True, False, True]
        assert after["reward"].flatten().tolist() == [1.0, 0.0, 0.0]
        assert after["elapsed"].flatten().tolist() == [1, 1, 0]
        assert after["terminated"].flatten().tolist() == [True, False, True]
        assert after["truncated"].flatten().tolist() == [True, True, False]
        assert after["done"].all()

    def test_a_diverged_simulation_ends(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
        env = AntMazeEnv((2,), scale=2.0, seed=0)
        state = env.reset().set("action", torch.zeros(2, 8))
        env._ants[1].qvel[0] = 1e12
        after = env._step(state)
        assert after["terminated"].flatten().tolist() == [False, True]
        assert after["observation"].isfinite().all()
        env.restart(after["done"])
        after = env._step(state)
        assert not after["terminated"].any()

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_copies_go_on_to_the_same_numbers(self, way: str):
        """Bit for bit, in mid-episode and through resets, which draw goals."""

        def walked(env, steps, state):
            draw = torch.Generator().manual_seed(1)
            met = []
            for _ in range(steps):
                action = 2 * torch.rand(3, 8, generator=draw) - 1
                _, state = env.step_and_maybe_reset(state.clone().set("action", action))
                met.append(state.clone())
            return met

        env = AntMazeEnv((3,), scale=2.0, max_steps=14, seed=0)
        begun = walked(env, 6, env.reset())[-1]
        other = copy.deepcopy(env) if way == "deepcopy" else pickle.loads(pickle.dumps(env))
        expected = walked(env, 20, begun)
        found = walked(other, 20, begun)
        # Positions are in the simulation: a copy that began anew would differ at once.
        assert not torch.equal(begun["observation"], env.reset()["observation"])
        assert len({tuple(state["desired_goal"][0].tolist()) for state in expected}) == 2
        for theirs, ours in zip(expected, found, strict=True):
            assert (theirs == ours).all()
        assert all(ant.model is other._model for ant in other._ants)

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_copies_know_of_diverged_simulations(self, way: str, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
        env = AntMazeEnv((2,), scale=2.0, seed=0)
        state = env.reset().set("action", torch.zeros(2, 8))
        env._ants[1].qvel[0] = 1e12
        env._step(state)
        other = copy.deepcopy(env) if way == "deepcopy" else pickle.loads(pickle.dumps(env))
        assert other._step(state)["terminated"].flatten().tolist() == [False, True]

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"batch_size": ()}, ValueError, r"batch_size must be .*one number, got \(\)"),
            ({"batch_size": (2, 3)}, ValueError, r"batch_size must be .*got \(2, 3\)"),
            ({"batch_size": (0,)}, ValueError, "batch_size must be at least 1, got 0"),
            ({"scale": 0.0}, ValueError, "scale must lie in .*got 0.0"),
            ({"scale": float("inf")}, ValueError, "scale must lie in .*got inf"),
            ({"scale": "4"}, TypeError, "scale must be a number, got str"),
            ({"goal_radius": -1.0}, ValueError, "goal_radius must lie in .*got -1.0"),
            ({"goal_radius": float("nan")}, ValueError, "goal_radius must lie in .*got nan"),
            ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
            ({"max_steps": "9"}, TypeError, "max_steps must be an int .*got str"),
        ],
    )
    def test_refuses(self, options: dict, error: type[Exception], message: str):
        with pytest.raises(error, match=message):
            AntMazeEnv(**options)

    def test_places(self):
        env = AntMazeEnv(scale=2.0)
        assert env.walls.int().tolist() == [
            [1, 1, 1, 1, 1],
            [1, 0, 0, 0, 1],
            [1, 1, 1, 0, 1],
            [1, 0, 0, 0, 1],
            [1, 1, 1, 1, 1],
        ]
        places = [[-2.0, -2.0], [0.0, 0.0], [2.9, 0.0], [3.1, 0.0], [9.0, 0.0], [torch.nan, 0.0]]
        assert env.free(torch.tensor(places)).tolist() == [True, False, True, False, False, False]
        assert env.low.tolist() == [-3.0, -3.0]
        assert env.high.tolist() == [3.0, 3.0]
        grid = env.goal_grid(2)
        assert grid.shape == (28, 2)
        assert env.free(grid).all()
        assert torch.equal(
            grid[:4], torch.tensor([[-2.5, -2.5], [-2.5, -1.5], [-1.5, -2.5], [-1.5, -1.5]])
        )


class TestTraining:
    @pytest.mark.parametrize("variant", ["uniform + real past", "GoalGAN + traces"])
    def test_short_run_repeats(self, variant: str):
        one, two = (Run(variant, 3, TINY).run() for _ in range(2))
        check_short_run(variant, one, two, 128)

    def test_coverage_of_a_known_policy(self):
        """One that stands still reaches the goals around the start."""
        run = Run("uniform", 0, replace(TINY, grid_spacing=0.2, goal_radius=0.45))

        def policy(state, goal):
            loc = torch.zeros(len(state), 8)
            return loc, torch.full_like(loc, 1e-4)

        run.policy = policy
        distance = (run.grid - run.env.start_position).norm(dim=-1)
        near = (distance - 0.45).abs() < 0.05
        reached = distance <= 0.45
        assert 0 < reached.sum() < len(run.grid)
        wrong = abs(run.coverage() - float(reached.float().mean()))
        assert wrong <= float(near.float().mean()) + 1e-6

    def test_the_real_past_is_what_happened(self):
        run = Run("uniform + real past", 0, replace(TINY, num_traces=60, max_steps=12))
        state = run.env.reset().select("observation", "desired_goal", "elapsed")
        for _ in range(3):
            data, state = run._act(state)
            kept = ("observation", "action", ("next", "observation"), ("next", "done"))
            run.states.extend(data.select(*kept).reshape(-1))
        trace = run._real_past()
        kept = trace["collector", "mask"]
        joined = kept[:, 1:] & kept[:, :-1]
        after, before = trace["next", "observation"][:, :-1], trace["observation"][:, 1:]
        assert joined.sum() > 20
        assert torch.equal(after[joined], before[joined])
        # Each kept step is one of the simulation: from its state, the same action leads there.
        env, rows = run.env, kept.nonzero()[:8]
        state = env.reset()
        for ant, (trace_row, step) in zip(env._ants, rows.tolist(), strict=True):
            numbers = trace["observation"][trace_row, step].double().numpy()
            ant.qpos[:], ant.qvel[:] = numbers[:15], numbers[15:]
        action = trace["action"][rows[:, 0], rows[:, 1]]
        replayed = env._step(state.set("action", action))["observation"]
        expected = trace["next", "observation"][rows[:, 0], rows[:, 1]]
        torch.testing.assert_close(replayed[:, :15], expected[:, :15], rtol=0, atol=5e-3)

"""The MuJoCo tasks against Gymnasium, and late rewards against a loop written as the definition."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, EnvBase, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from bench.learning import mujoco
from bench.learning.continuous.ppo import PPO
from bench.learning.mujoco.environments import OPTIONS, MujocoEnv
from bench.learning.mujoco.rewards import DelayedReward, DistanceReward, pay_later
from bench.learning.mujoco.tasks import BODIES, TASKS, make, score_range
from torchrl_recall.envs import PointMazeEnv

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")


def copied(env: EnvBase, way: str) -> EnvBase:
    """Copy an environment in this process, or as it goes to another one."""
    return copy.deepcopy(env) if way == "deepcopy" else pickle.loads(pickle.dumps(env))


def walked(env: EnvBase, steps: int, state: TensorDict) -> list[TensorDict]:
    """Step with random actions, and reset what has ended."""
    draw = torch.Generator().manual_seed(1)
    met = []
    for _ in range(steps):
        action = 2 * torch.rand(env.action_spec.shape, generator=draw) - 1
        _, state = env.step_and_maybe_reset(state.clone().set("action", action))
        met.append(state.clone())
    return met


class TestMujocoEnv:
    @pytest.mark.parametrize("name", list(OPTIONS))
    def test_steps_are_gymnasiums(self, name: str):
        theirs = gymnasium.make(f"{name}-v5", **OPTIONS[name]).unwrapped
        ours = MujocoEnv(name, (2,), max_steps=25, seed=0)
        state = ours._reset()
        # One of our copies starts where theirs does.
        expected, _ = theirs.reset(seed=5)
        ours._observed[1] = ours._envs[1].reset(seed=5)[0]
        state = ours._read()
        draw = torch.Generator().manual_seed(0)
        space, after = theirs.action_space, state
        for step in range(25):
            np.testing.assert_allclose(state["observation"][1], expected, rtol=1e-5, atol=1e-5)
            state["action"] = 2 * torch.rand(2, *space.shape, generator=draw) - 1
            own = state["action"][1].numpy()
            action = space.low + (own + 1) / 2 * (space.high - space.low)
            expected, reward, terminated, _, found = theirs.step(action)
            after = ours._step(state)
            np.testing.assert_allclose(after["reward"][1].item(), reward, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                after["position"][1].item(), found["x_position"], rtol=1e-4, atol=1e-4
            )
            assert bool(after["terminated"][1]) == terminated
            assert bool(after["truncated"][1]) == (step == 24)
            state = after.exclude("reward")
        assert BODIES[name][0] + BODIES[name][1] == len(expected)

    def test_specs_starts_and_partial_resets(self):
        env = MujocoEnv("Hopper", (2,), seed=3)
        check_env_specs(env)
        env.set_seed(3)
        first = env._reset()["observation"]
        env.set_seed(3)
        assert torch.equal(first, env._reset()["observation"])
        assert not torch.equal(first[0], first[1])
        env._reset(TensorDict({"_reset": torch.tensor([[True], [False]])}, [2]))
        after = env._read()["observation"]
        assert torch.equal(after[1], first[1])
        assert not torch.equal(after[0], first[0])

    def test_scale_and_unknown_names(self):
        rewards = []
        for scale in (1.0, 0.25):
            env = MujocoEnv("Hopper", (1,), reward_scale=scale, seed=0)
            state = env._reset().set("action", torch.full((1, 3), 0.5))
            rewards.append(float(env._step(state)["reward"]))
        assert rewards[1] == pytest.approx(0.25 * rewards[0])
        with pytest.raises(ValueError, match=r"HalfCheetah.*got 'Cheetah'"):
            MujocoEnv("Cheetah")

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("name", list(OPTIONS))
    def test_copies_go_on_to_the_same_numbers(self, name: str, way: str):
        """Bit for bit, in mid-episode and through resets; Ant's reward reads derived numbers."""
        env = MujocoEnv(name, (2,), max_steps=14, seed=0)
        begun = walked(env, 5, env.reset())[-1]
        other = copied(env, way)
        expected = walked(env, 20, begun)
        found = walked(other, 20, begun)
        for theirs, ours in zip(expected, found, strict=True):
            assert (theirs == ours).all()
        for theirs, ours in zip(env._envs, other._envs, strict=True):
            assert theirs.data is not ours.data
            assert theirs.np_random.random() == ours.np_random.random()

    def test_shallow_copies_share_the_simulation(self):
        env = MujocoEnv("Swimmer", (1,), seed=0)
        begun = walked(env, 3, env.reset())[-1]
        other = copy.copy(env)
        assert torch.equal(env._read()["position"], begun["position"])
        assert other._envs[0].data is env._envs[0].data

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"name": ["Hopper"]}, ValueError, r"name must be one of .*got \['Hopper'\]"),
            ({"batch_size": ()}, ValueError, r"batch_size must be .*one number, got \(\)"),
            ({"batch_size": (2, 3)}, ValueError, r"batch_size must be .*got \(2, 3\)"),
            ({"batch_size": 3}, ValueError, "batch_size must be a tuple of one number, got 3"),
            ({"batch_size": (0,)}, ValueError, "batch_size must be at least 1, got 0"),
            ({"batch_size": (2.0,)}, TypeError, "batch_size must be an int .*got float"),
            ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
            ({"max_steps": 2.5}, TypeError, "max_steps must be an int .*got float"),
            ({"reward_scale": float("nan")}, ValueError, "reward_scale must lie in .*got nan"),
            ({"reward_scale": float("inf")}, ValueError, "reward_scale must lie in .*got inf"),
            ({"reward_scale": "1"}, TypeError, "reward_scale must be a number, got str"),
        ],
    )
    def test_refuses(self, options: dict, error: type[Exception], message: str):
        with pytest.raises(error, match=message):
            MujocoEnv(**({"name": "Hopper"} | options))


class TestPayLater:
    @pytest.mark.parametrize("every", [None, 1, 3])
    def test_is_the_definition(self, every: int | None):
        draw = torch.Generator().manual_seed(0)
        reward = torch.rand(60, generator=draw, dtype=torch.float64)
        done = torch.rand(60, generator=draw) < 0.1
        owed, held = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        paid = []
        for t in range(60):
            now, owed, held = pay_later(reward[t : t + 1], owed, held, done[t : t + 1], every)
            paid.append(float(now))
        expected, earned = [], []
        for t in range(60):
            earned.append(float(reward[t]))
            if bool(done[t]) or (every is not None and len(earned) == every):
                expected.append(sum(earned))
                earned = []
            else:
                expected.append(0.0)
        assert paid == pytest.approx(expected)


class TestDelayedReward:
    def test_each_copy_pays_by_its_own_count_through_resets(self):
        class Earning(PointMazeEnv):
            """Reward that tells the step: elapsed + 1."""

            def _step(self, tensordict):
                after = super()._step(tensordict)
                return after.set("reward", after["elapsed"].float())

        env = TransformedEnv(
            Earning("u", start="any", max_steps=7, batch_size=(3,), seed=0), DelayedReward(3)
        )
        check_env_specs(env)
        data = env.rollout(16, break_when_any_done=False)
        reward = data["next", "reward"][..., 0]
        done = data["next", "done"][..., 0]
        elapsed = data["next", "elapsed"][..., 0]
        for row in range(3):
            owed = held = 0
            for t in range(16):
                owed, held = owed + int(elapsed[row, t]), held + 1
                pays = bool(done[row, t]) or held == 3
                assert reward[row, t] == (owed if pays else 0)
                if pays:
                    owed = held = 0

    def test_partial_reset_forgets_only_its_own(self):
        env = TransformedEnv(MujocoEnv("Swimmer", (2,), seed=0), DelayedReward())
        state = env.reset()
        state["owed"] = torch.tensor([[2.0], [3.0]])
        state["held"] = torch.tensor([[4], [5]])
        state["_reset"] = torch.tensor([[True], [False]])
        after = env.reset(state)
        assert after["owed"].flatten().tolist() == [0.0, 3.0]
        assert after["held"].flatten().tolist() == [0, 5]

    def test_steps_without_what_is_carried_owe_nothing_yet(self):
        env = TransformedEnv(MujocoEnv("Hopper", (2,), seed=0), DelayedReward(2))
        dense = MujocoEnv("Hopper", (2,), seed=0)
        dense.reset()
        env.reset()
        action = torch.full((2, 3), 0.5)
        for _ in range(3):
            earned = dense._step(TensorDict({"action": action}, [2]))["reward"]
            after = env.step(TensorDict({"action": action}, [2]))["next"]
            assert torch.equal(after["owed"], earned)
            assert after["held"].flatten().tolist() == [1, 1]
            assert not after["reward"].any()
        assert env.rand_step()["next", "held"].flatten().tolist() == [1, 1]

    def test_declares_what_it_carries(self):
        for dtype in (torch.float32, torch.float64):
            base = PointMazeEnv("u", start="any", max_steps=7, batch_size=(3,), dtype=dtype, seed=0)
            env = TransformedEnv(base, DelayedReward(3))
            check_env_specs(env)
            for spec in (env.state_spec, env.observation_spec):
                assert spec["owed"].dtype == dtype
                assert spec["held"].dtype == torch.int64
            # The maze's own entries stay.
            assert set(env.state_spec.keys()) == {*base.state_spec.keys(), "owed", "held"}

    def test_runs_in_serial_environments_and_collectors(self):
        def made(seed: int) -> EnvBase:
            return make(2, seed, name="Hopper", reward="delayed", every=3, max_steps=7)

        serial = SerialEnv(2, [lambda: made(0), lambda: made(1)])
        check_env_specs(serial)
        assert serial.rand_step()["next", "held"].unique().tolist() == [1]
        together = [serial.rollout(20, break_when_any_done=False)]
        collector = Collector(made(0), None, frames_per_batch=80, total_frames=80)
        together += [data.clone() for data in collector]
        collector.shutdown()
        for data in together:
            held, done = data["next", "held"], data["next", "done"]
            before = data["held"]
            assert torch.equal(held, torch.where(done | (before == 2), 0, before + 1))
            assert torch.equal(data["next", "reward"] != 0, held == 0)
            assert done.any()

    def test_pays_at_the_end_that_a_step_counter_makes(self):
        """After it: before it the end is not seen, and what is owed is lost."""
        paid = []
        for order in ((StepCounter(5), DelayedReward()), (DelayedReward(), StepCounter(5))):
            env = TransformedEnv(MujocoEnv("Swimmer", (1,), seed=0), Compose(*order))
            check_env_specs(env)
            env.set_seed(0)
            torch.manual_seed(0)
            paid.append(env.rollout(9)["next", "reward"].flatten())
        env = TransformedEnv(MujocoEnv("Swimmer", (1,), seed=0), StepCounter(5))
        env.set_seed(0)
        torch.manual_seed(0)
        total = env.rollout(9)["next", "reward"].sum()
        torch.testing.assert_close(paid[0], torch.tensor([0.0, 0.0, 0.0, 0.0, total]))
        assert not paid[1].any()

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_copies_pay_the_same(self, way: str):
        env = make(2, 0, name="Ant", reward="delayed", every=4, max_steps=9)
        begun = walked(env, 6, env.reset())[-1]
        other = copied(env, way)
        for theirs, ours in zip(walked(env, 12, begun), walked(other, 12, begun), strict=True):
            assert (theirs == ours).all()

    @pytest.mark.parametrize(
        ("every", "error", "message"),
        [
            (0, ValueError, "every must be at least 1, got 0"),
            (2.5, TypeError, "every must be an int of at least 1, got float 2.5"),
            (True, TypeError, "every must be an int of at least 1, got bool"),
            ("3", TypeError, "every must be an int of at least 1, got str"),
        ],
    )
    def test_refuses(self, every, error: type[Exception], message: str):
        with pytest.raises(error, match=message):
            DelayedReward(every)

    def test_sums_are_those_of_the_dense_task(self):
        draw = torch.Generator().manual_seed(0)
        actions = 2 * torch.rand(30, 2, 3, generator=draw) - 1
        totals = []
        for options in ({"reward": "dense"}, {"reward": "delayed", "every": 20}):
            env = make(2, 0, name="Hopper", max_steps=30, **options)
            state, total = env._reset(), torch.zeros(2, 1)
            alive = torch.ones(2, 1, dtype=torch.bool)
            for action in actions:
                state = env._step(state.set("action", action))
                total += state["reward"] * alive
                alive &= ~state["done"]
            totals.append(total)
        assert not alive.any()
        torch.testing.assert_close(*totals)


def test_distance_pays_beyond_it():
    base = MujocoEnv("Swimmer", (3,), seed=0)
    env = TransformedEnv(base, DistanceReward(0.02))
    check_env_specs(env)
    data = env.rollout(15, break_when_any_done=False)
    beyond = data["next", "position"] >= 0.02
    assert beyond.any()
    assert not beyond.all()
    assert torch.equal(data["next", "reward"], beyond.float())


@pytest.mark.parametrize(
    ("distance", "error", "message"),
    [
        (float("nan"), ValueError, "distance must lie in .*got nan"),
        (float("inf"), ValueError, "distance must lie in .*got inf"),
        ("1.0", TypeError, "distance must be a number, got str"),
    ],
)
def test_distance_refuses(distance, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        DistanceReward(distance)


class TestMake:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reward": "late"}, r"reward must be one of .*'delayed'.*got 'late'"),
            ({"every": 3}, "every needs reward='delayed', got 3 with 'dense'"),
            ({"reward": "sparse", "every": 3}, "every needs reward='delayed', got 3 with 'sparse'"),
            ({"distance": 2.0}, "distance needs reward='sparse', got 2.0 with 'dense'"),
            ({"reward": "delayed", "distance": 0.0}, "distance needs reward='sparse', got 0.0"),
        ],
    )
    def test_refuses(self, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            make(1, 0, name="Hopper", **options)

    def test_sparse_without_a_distance_pays_from_0_on(self):
        env = make(2, 0, name="Swimmer", reward="sparse")
        data = env.rollout(15)["next"]
        assert torch.equal(data["reward"], (data["position"] >= 0).float())

    @pytest.mark.parametrize("name", list(TASKS))
    def test_makes_all_tasks(self, name: str):
        for kind in (TASKS[name].make, TASKS[name].test):
            assert kind is not None
            assert kind(1, 0).rollout(2)["next", "reward"].isfinite().all()


SMALL = {"num_envs": 2, "rollout_steps": 8, "minibatch": 8, "epochs": 1}


@pytest.mark.parametrize("name", ["humanoid_dense", "hopper_delayed", "swimmer_sparse"])
def test_tasks_train(name: str):
    task = TASKS[name]
    task = replace(task, ppo=replace(task.ppo, **SMALL), num_tests=1)
    host = PPO(task, 0, budget=32)
    before = [p.detach().clone() for p in host.policy.parameters()]
    for _ in range(2):
        host.iterate()
    after = list(host.policy.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_entries_are_unique_and_in_the_section():
    made = mujoco.entries()
    assert len({(entry.task, entry.name) for entry in made}) == len(made)
    assert {entry.task for entry in made} == set(mujoco.sections()[0].tasks) <= set(TASKS)
    assert score_range(TASKS["ant_sparse"]) == (0.0, 1.0)
    assert score_range(TASKS["ant_delayed"]) == (-1.0, 3.0)

"""PointMazeEnv against TorchRL's contract; seeds and refusals."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, InitTracker, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_recall import BacktrackModel
from torchrl_recall.envs import PointMazeEnv

VARIANTS = [
    {},
    {"maze": "large", "start": "any", "noise": 0.3},
    {"dynamics": "velocity", "noise": 0.1, "max_steps": None},
    {"start": "any", "goal": "any", "goal_in_observation": True, "dtype": torch.float64},
    {"dynamics": "velocity", "goal_in_observation": True, "max_steps": 7},
]


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


class TestSeeds:
    @staticmethod
    def make(**kwargs):
        options = {"start": "any", "goal": "any", "goal_in_observation": True, "noise": 0.2}
        return PointMazeEnv("large", batch_size=(8,), **options, **kwargs)

    @staticmethod
    def run(env, steps=30):
        out = play(env, [(0.1 * t, 0.5 - 0.1 * t) for t in range(steps)])
        return torch.stack([torch.cat([s["observation"], s["desired_goal"]], -1) for s in out])

    def test_seed_decides(self):
        first = self.run(self.make(seed=1))
        assert torch.equal(first, self.run(self.make(seed=1)))
        assert not torch.equal(first, self.run(self.make(seed=2)))
        env = self.make()
        env.set_seed(1)
        assert torch.equal(first, self.run(env))

    def test_global_generator_is_left_alone(self):
        env = self.make(seed=1)
        before = torch.get_rng_state()
        self.run(env)
        assert torch.equal(before, torch.get_rng_state())

    def test_without_a_seed_the_global_one_decides(self):
        torch.manual_seed(5)
        first, second = self.run(self.make()), self.run(self.make())
        torch.manual_seed(5)
        assert torch.equal(first, self.run(self.make()))
        assert not torch.equal(first, second)

    @pytest.mark.parametrize(
        "duplicate",
        [
            copy.deepcopy,
            lambda env: pickle.loads(pickle.dumps(env)),
            lambda env: TestSeeds.restored(env.state_dict()),
        ],
    )
    def test_copies_go_on_alike(self, duplicate):
        env = self.make(seed=1)
        self.run(env)
        other = duplicate(env)
        assert torch.equal(self.run(env), self.run(other))

    @classmethod
    def restored(cls, state):
        env = cls.make(seed=2)
        env.load_state_dict(state)
        return env


class TestContract:
    @pytest.mark.parametrize("batch_size", [(), (16,), (3, 2)])
    @pytest.mark.parametrize("kwargs", VARIANTS)
    def test_specs(self, batch_size, kwargs):
        env = PointMazeEnv(batch_size=batch_size, **kwargs)
        check_env_specs(env)
        td = env.reset()
        size = 4 if kwargs.get("dynamics") == "velocity" else 2
        assert td["observation"].shape == (*batch_size, size)
        assert td["observation"].dtype == kwargs.get("dtype", torch.float32)
        assert td.device == env.device
        data = env.rollout(40, break_when_any_done=False)
        assert env.observation_spec["observation"].is_in(td["observation"])
        dim = len(batch_size)
        for step in data["next"].unbind(dim):
            assert env.observation_spec.is_in(step.select(*env.observation_spec.keys()))

    @pytest.mark.parametrize("kwargs", VARIANTS)
    def test_with_transforms(self, kwargs):
        env = PointMazeEnv(batch_size=(4,), seed=0, **kwargs)
        env = TransformedEnv(env, Compose(InitTracker(), StepCounter(5)))
        check_env_specs(env)
        data = env.rollout(12, break_when_any_done=False)
        assert torch.equal(data["is_init"], data["step_count"] == 0)
        if "elapsed" in data.keys():  # noqa: SIM118
            assert torch.equal(data["elapsed"], data["step_count"])

    @pytest.mark.parametrize("kwargs", VARIANTS)
    def test_collector(self, kwargs):
        env = PointMazeEnv(batch_size=(4,), seed=0, **kwargs)
        collector = Collector(env, frames_per_batch=80, total_frames=160)
        first, second = (data.clone() for data in collector)
        collector.shutdown()
        assert first.shape == (4, 20)
        before = torch.cat([first["next", "observation"], second["next", "observation"]], 1)
        after = torch.cat([first["observation"], second["observation"]], 1)
        done = torch.cat([first["next", "done"], second["next", "done"]], 1).squeeze(-1)
        assert torch.equal(before[:, :-1][~done[:, :-1]], after[:, 1:][~done[:, :-1]])

    def test_batched_by_torchrl(self):
        options = {"goal": "any", "goal_in_observation": True, "start": "any", "max_steps": 15}
        env = SerialEnv(2, functools.partial(PointMazeEnv, "u", **options))
        env.set_seed(0)
        data = env.rollout(60, break_when_any_done=False)
        env.close()
        assert data.shape == (2, 60)
        ends = data["next", "done"][:, :-1, 0]
        assert ends.any()
        assert torch.equal(
            data["next", "observation"][:, :-1][~ends], data["observation"][:, 1:][~ends]
        )
        moved = PointMazeEnv("u").step_states(data["observation"], data["action"])
        assert torch.equal(data["next", "observation"], moved)
        assert (data["elapsed"][:, 1:][ends] == 0).all()
        assert not torch.equal(data["observation"][0], data["observation"][1])

    def test_a_backtracking_model_reads_the_specs(self):
        env = PointMazeEnv("u", goal_in_observation=True, dynamics="velocity")
        model = BacktrackModel.from_env(env, num_cells=(8,))
        assert model.observation_keys == ["observation"]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("kwargs", VARIANTS)
    def test_cuda(self, kwargs):
        env = PointMazeEnv(batch_size=(4096,), device="cuda", **kwargs)
        check_env_specs(env)
        td = env.rand_action(env.reset())
        env.step(td)
        torch.cuda.set_sync_debug_mode("error")
        try:
            env._step(td)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert env.rollout(20, break_when_any_done=False).device.type == "cuda"
        moved = PointMazeEnv(batch_size=(8,), **kwargs).to("cuda")
        assert moved.rollout(5, break_when_any_done=False).device.type == "cuda"


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"start": "room"}, "start must be one of .*got 'room'"),
            ({"goal": "far"}, "goal must be one of .*got 'far'"),
            ({"goal": "any"}, "goal='any' needs goal_in_observation=True"),
            ({"dynamics": "ant"}, "dynamics must be one of .*got 'ant'"),
            ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64"),
            ({"step_size": 0.0}, r"step_size must lie in \(0.0, inf\), got 0.0"),
            ({"step_size": float("inf")}, r"step_size must lie in \(0.0, inf\), got inf"),
            ({"inertia": 1.0}, "inertia must lie in"),
            ({"noise": -1.0}, "noise must lie in"),
            ({"noise": float("nan")}, "noise must lie in .*got nan"),
            ({"goal_radius": 0.6}, r"goal_radius must lie in \(0.0, 0.5\], got 0.6"),
            ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
            ({"max_steps": "never"}, "max_steps must be an int of at least 1, got str never"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises((ValueError, TypeError), match=message):
            PointMazeEnv(**kwargs)

    def test_map_that_is_no_text(self):
        with pytest.raises(TypeError, match="maze must be text, got"):
            PointMazeEnv([1, 2])

    def test_actions_that_are_no_numbers(self):
        env = PointMazeEnv()
        with pytest.raises(ValueError, match="action must be finite"):
            env.step(env.reset().set("action", torch.tensor([0.0, float("nan")])))

    def test_states(self):
        env = PointMazeEnv(dynamics="velocity")
        td = env.reset()
        with pytest.raises(ValueError, match="observation must lie in free cells"):
            env.reset(td.clone().set("observation", torch.tensor([2.5, 2.5, 0, 0])), set_state=True)
        with pytest.raises(KeyError, match="'observation' must be in the tensordict"):
            env.reset(td.exclude("observation"), set_state=True)
        td.set("action", torch.zeros(2))
        with pytest.raises(KeyError, match="'elapsed' must be in the tensordict"):
            env.step(td.exclude("elapsed"))
        with pytest.raises(ValueError, match="state must have 4 columns with dynamics='velocity'"):
            env.step_states(torch.zeros(3, 2), torch.zeros(3, 2))
        seeking = PointMazeEnv(goal="any", goal_in_observation=True)
        with pytest.raises(KeyError, match="'desired_goal' must be in the tensordict"):
            seeking.reset(seeking.reset().exclude("desired_goal"), set_state=True)
        with pytest.raises(ValueError, match="spacing must be fine enough"):
            env.goal_grid(100.0)

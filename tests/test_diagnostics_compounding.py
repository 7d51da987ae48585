"""Replayed errors: known by hand, zero for real trajectories, and growing for wrong models."""

from __future__ import annotations

import math
from functools import partial

import gymnasium
import pytest
import torch
from linear_gaussian import F64
from tensordict import TensorDict
from torchrl.envs import PendulumEnv

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.diagnostics import (
    compounding_error,
    four_rooms_step,
    mujoco_step,
    replay_error,
    tensordict_step,
)
from torchrl_recall.envs import FourRoomsEnv, PointMazeEnv


def rollout_of(states, actions, mask=None):
    """A trace from its states ``[N, T + 1, D]`` and actions ``[N, T, A]``."""
    trace = TensorDict({"observation": states[:, :-1], "action": actions}, actions.shape[:2])
    trace["next", "observation"] = states[:, 1:]
    if mask is not None:
        trace["collector", "mask"] = mask
    return trace


def drift(state, action):
    """A world in which actions add up."""
    return state + action


class TestByHand:
    """Each step of the trace claims to have moved by one more than it did, in each dimension."""

    T, D = 6, 3

    def trace(self, n=4, dtype=F64):
        torch.manual_seed(0)
        actions = torch.randn(n, self.T, self.D, dtype=dtype)
        start = torch.randn(n, 1, self.D, dtype=dtype)
        states = torch.cat([start, start + (actions + 1).cumsum(1)], 1)
        return rollout_of(states, actions)

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    @pytest.mark.parametrize("scale", [1.0, 2.0])
    def test_the_error_is_the_number_of_steps(self, dtype, scale):
        found = compounding_error(self.trace(dtype=dtype), drift, scale, steps=(1, 3, 6))
        expected = torch.tensor([1.0, 3.0, 6.0], dtype=F64) / scale
        # Traces are made in their dtype: float32 leaves its rounding.
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
        close(found.error, expected.unsqueeze(-1).expand(3, 4))
        close(found.mean, expected)
        close(found.median, expected)
        close(found.path, torch.arange(1, 7, dtype=F64) / scale)
        assert found.num_traces.tolist() == [4, 4, 4]
        assert float(found.standard_error.max()) < 1e-6
        assert found.scalars()["mean_3"] == pytest.approx(3 / scale)

    def test_dimensions_count_in_their_own_units(self):
        scale = torch.tensor([1.0, 2.0, 4.0])
        found = compounding_error(self.trace(), drift, scale, steps=(2,))
        expected = math.sqrt((2**2 + 1**2 + 0.5**2) / 3)
        torch.testing.assert_close(found.mean, torch.tensor([expected], dtype=F64))

    def test_masked_steps(self):
        trace = self.trace()
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[0, :5], mask[1, :3], mask[2] = False, False, False
        trace["collector", "mask"] = mask
        found = compounding_error(trace, drift, steps=(1, 3, 6))
        assert found.num_traces.tolist() == [3, 2, 1]
        assert found.error.isnan().tolist() == [
            [False, False, True, False],
            [True, False, True, False],
            [True, True, True, False],
        ]
        torch.testing.assert_close(found.mean, torch.tensor([1.0, 3.0, 6.0], dtype=F64))
        assert float(found.standard_error[2]) == math.inf

    def test_statistics_over_traces(self):
        trace = self.trace()
        trace["observation"][:, -1] += torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=F64).view(4, 1)
        found = compounding_error(trace, drift, steps=(1,))
        error = torch.tensor([1.0, 0.0, 1.0, 4.0], dtype=F64)
        torch.testing.assert_close(found.error[0], error)
        torch.testing.assert_close(found.mean[0], error.mean())
        torch.testing.assert_close(found.standard_error[0], error.std() / 2)

    def test_a_replay_that_is_lost_is_infinitely_wrong(self):
        def lost(state, action):
            return (state + action).masked_fill(state[:, :1] > 0, torch.nan)

        trace = self.trace()
        found = compounding_error(trace, lost, steps=(1,))
        gone = trace["observation"][:, -1, 0] > 0
        assert bool(gone.any())
        assert torch.equal(found.error[0].isinf(), gone)
        assert float(found.mean[0]) == math.inf

    def test_keys_and_batches(self):
        trace = self.trace()
        moved = TensorDict({"p": trace["observation"][..., :2]}, trace.shape)
        moved["agent", "q"] = trace["observation"][..., 2:]
        moved["agent", "u"] = trace["action"]
        moved["next", "p"] = trace["next", "observation"][..., :2]
        moved["next", "agent", "q"] = trace["next", "observation"][..., 2:]
        keys = {"observation_keys": ["p", ("agent", "q")], "action_key": ("agent", "u")}
        found = compounding_error(moved.reshape(2, 2, 6), drift, steps=(3,), **keys)
        expected = compounding_error(trace, drift, steps=(3,))
        torch.testing.assert_close(found.error, expected.error)
        with pytest.raises(KeyError, match=r"'observation'.*is missing"):
            compounding_error(moved, drift, steps=(3,))

    def test_wrong_arguments(self):
        trace = self.trace()
        for steps in ((7,), ()):
            with pytest.raises(ValueError, match="steps must lie in 1 to 6"):
                compounding_error(trace, drift, steps=steps)
        with pytest.raises(ValueError, match="steps must be at least 1"):
            compounding_error(trace, drift, steps=(0,))
        for scale in (0.0, torch.ones(2), math.inf):
            with pytest.raises(ValueError, match="scale must hold 3 positive"):
                compounding_error(trace, drift, scale, steps=(1,))
        with pytest.raises(ValueError, match=r"step returned shape \(4, 2\)"):
            compounding_error(trace, lambda s, a: s[:, :2], steps=(1,))
        with pytest.raises(ValueError, match="expected"):
            compounding_error(trace[0, 0], drift, steps=(1,))


def test_the_definition_in_loops():
    torch.manual_seed(0)
    states, actions = torch.randn(3, 6, 2, dtype=F64), torch.randn(3, 5, 2, dtype=F64)
    scale = torch.tensor([0.5, 3.0], dtype=F64)

    def bent(state, action):
        return torch.sin(state) + action * state.flip(-1)

    for k in (1, 2, 5):
        found = replay_error(states, actions, bent, scale, k)
        for i in range(3):
            state = states[i, 5 - k].unsqueeze(0)
            for j in range(k):
                state = bent(state, actions[i, 5 - k + j].unsqueeze(0))
                off = (state[0] - states[i, 5 - k + j + 1]) / scale
                assert float(found[i, j]) == pytest.approx(float(off.square().mean().sqrt()))


class TestRealTrajectories:
    """Of real trajectories nothing but rounding is left."""

    def test_four_rooms(self):
        env = FourRoomsEnv(5, batch_size=(30,), max_steps=None, seed=0)
        real = env.rollout(12, break_when_any_done=False, auto_reset=True)
        # Up to the first goal: a reset is no step.
        done = real["next", "done"].squeeze(-1)
        real["collector", "mask"] = done.cumsum(-1) - done.long() == 0
        real = real[real["collector", "mask"].all(-1)]
        found = compounding_error(real, four_rooms_step(env), steps=(1, 5, 10))
        assert int(found.num_traces.min()) > 10
        assert found.mean.tolist() == [0.0, 0.0, 0.0]
        with pytest.raises(ValueError, match="env has slips"):
            four_rooms_step(FourRoomsEnv(5, slip=0.1))

    def test_pendulum(self):
        env = PendulumEnv(seed=0)
        real = torch.stack([env.rollout(20) for _ in range(5)])
        step, keys = tensordict_step(env, ["th", "thdot"]), ["th", "thdot"]
        found = compounding_error(real, step, 1.0, observation_keys=keys)
        # Angles wrap: a rollout on the border may come out on the other side.
        assert float(found.mean.max()) < 1e-4
        with pytest.raises(KeyError, match="observation_keys"):
            tensordict_step(env, "position")

    @pytest.mark.parametrize("batch", [(), (7,)])
    @pytest.mark.parametrize("dynamics", ["position", "velocity"])
    def test_point_maze(self, batch, dynamics):
        options = {"dynamics": dynamics, "start": "any", "max_steps": None}
        env = PointMazeEnv("u", batch_size=(7,), seed=0, **options)
        real = env.rollout(20, break_when_any_done=False)
        mask = ~(real["next", "done"].squeeze(-1).flip(-1).cummax(-1).values.flip(-1))
        real["collector", "mask"] = mask
        step = tensordict_step(PointMazeEnv("u", batch_size=batch, **options))
        found = compounding_error(real, step, 0.1)
        assert int(found.num_traces[-1]) > 3
        assert float(found.mean.max()) < 1e-4
        wrong = tensordict_step(PointMazeEnv("u", batch_size=(3,), **options))
        with pytest.raises(ValueError, match=r"batch size \(3,\), expected \(7,\)"):
            compounding_error(real, wrong)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("InvertedPendulum-v5", {}),
            ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False}),
        ],
    )
    def test_mujoco(self, name, options):
        env = gymnasium.make(name, **options)
        env.action_space.seed(0)
        states, actions = [], []
        for seed in range(3):
            row = [torch.as_tensor(env.reset(seed=seed)[0], dtype=F64)]
            taken = []
            for _ in range(20):
                action = env.action_space.sample()
                taken.append(torch.as_tensor(action, dtype=F64))
                row.append(torch.as_tensor(env.unwrapped.step(action)[0], dtype=F64))
            states.append(torch.stack(row))
            actions.append(torch.stack(taken))
        trace = rollout_of(torch.stack(states), torch.stack(actions))
        step = mujoco_step(gymnasium.make(name, **options))
        found = compounding_error(trace, step, torch.stack(states).flatten(0, 1).std(0))
        print(f"{name}: {found.mean.tolist()}")
        assert float(found.mean.max()) < 1e-3
        # And a wrong start does not.
        trace["observation"] += 0.1
        wrong = compounding_error(trace, step, torch.stack(states).flatten(0, 1).std(0))
        assert float(wrong.mean.min()) > 1e-2
        trace["observation"][0, -1] = torch.nan
        lost = compounding_error(trace, step, 1.0, steps=(1,))
        assert lost.error[0].isinf().tolist() == [True, False, False]

    def test_mujoco_needs_its_whole_state(self):
        with pytest.raises(ValueError, match=r"observes \(17,\) numbers, expected its 9"):
            mujoco_step(gymnasium.make("HalfCheetah-v5"))
        with pytest.raises(TypeError, match="MuJoCo"):
            mujoco_step(gymnasium.make("CartPole-v1"))


def test_a_model_that_holds_the_truth_has_no_error_and_a_wrong_one_grows():
    """Deterministic ``s' = s + a``: the exact change is ``-a``; a bias adds up, step by step."""
    torch.manual_seed(0)
    for bias in (0.0, 0.05):
        model = BacktrackModel(2, 2, num_cells=(4,), dtype=F64)
        with torch.no_grad():
            first, last = model.delta_network[0], model.delta_network[2]
            for parameter in model.delta_network.parameters():
                parameter.zero_()
            # Features are the state and the action: two units each for the linear map -a.
            first.weight[:2, 2:] = torch.eye(2, dtype=F64)
            first.weight[2:, 2:] = -torch.eye(2, dtype=F64)
            last.weight[:2, :2] = -torch.eye(2, dtype=F64)
            last.weight[:2, 2:] = torch.eye(2, dtype=F64)
            last.bias[:2], last.bias[2:] = bias, -1e3
        trace = sample_traces(
            model,
            torch.zeros(50, 2, dtype=F64),
            num_steps=20,
            generator=torch.Generator().manual_seed(0),
        )
        found = compounding_error(trace, drift)
        # The scale is at its floor, exp(-6); errors of k steps are a random walk's.
        k = found.steps.double()
        noise = math.exp(-6) * k.sqrt()
        expected = (noise**2 + (bias * k) ** 2).sqrt()
        error = found.error.square().mean(-1).sqrt()
        torch.testing.assert_close(error, expected, rtol=0.25, atol=0)

"""Starts from goals that the user gives."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import MultiCategorical
from transform_data import T, make_model, same, transitions

from torchrl_recall import BacktrackTransform
from torchrl_recall.starts import GoalStarts

GOALS = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_goals(count, g):
    return torch.rand(count, 3, generator=g) + 10


class TestGiven:
    @pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
    def test_shares(self, weights):
        """5 standard errors of 6000 draws, under 1e-5 for all goals."""
        starts = GoalStarts(GOALS, weights=None if weights is None else torch.tensor(weights))
        found = starts(transitions(60, 100), generator())["observation"]
        assert found.shape == (60, 100, 3)
        expected = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
        expected /= expected.sum()
        share = torch.bincount((found[..., 0] / 3).long().flatten(), minlength=3) / 6000
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 6000).sqrt()).all()
        assert same(found, GOALS[(found[..., 0] / 3).long()])

    def test_several_keys(self):
        goals = TensorDict({"a": {"o": GOALS}, "b": torch.arange(3), "other": GOALS}, [3])
        found = GoalStarts(goals, observation_keys=[("a", "o"), "b"])(transitions(9), generator())
        assert same(found["a", "o"], GOALS[found["b"]])
        assert "other" not in found

    def test_later_changes_of_the_goals_do_not_reach_it(self):
        goals = GOALS.clone()
        starts = GoalStarts(goals)
        goals.fill_(-1.0)
        assert (starts(transitions(9), generator())["observation"] >= 0).all()


class TestFunctionAndKey:
    def test_function(self):
        found = GoalStarts(make_goals)(transitions(2, 3), generator(4))
        assert same(found["observation"], make_goals(6, generator(4)).reshape(2, 3, 3))
        as_dict = GoalStarts(lambda n, g: TensorDict({"observation": make_goals(n, g)}, [n]))
        found_too = as_dict(transitions(2, 3), generator(4))
        assert same(found["observation"], found_too["observation"])

    def test_key_of_the_batch(self):
        data = transitions(5)
        data["goals", "desired"] = torch.randn(5, 3, generator=generator())
        data["collector", "mask"] = torch.tensor([1, 0, 1, 1, 1]).bool()
        found = GoalStarts(("goals", "desired"))(data, generator())
        assert same(found["observation"], data["goals", "desired"])
        assert same(found["collector", "mask"], data["collector", "mask"])
        found = GoalStarts(["goal", "b"], observation_keys=["x", "y"])(
            TensorDict({"goal": GOALS, "b": -GOALS}, [3]), generator()
        )
        assert same(found["x"], GOALS)
        assert same(found["y"], -GOALS)


class TestRefusals:
    def test_goals(self):
        with pytest.raises(ValueError, match="at least one goal"):
            GoalStarts(torch.zeros(0, 3))
        with pytest.raises(ValueError, match="got a scalar"):
            GoalStarts(torch.zeros(()))
        with pytest.raises(ValueError, match=r"goals\['observation'\] must be finite"):
            GoalStarts(torch.tensor([[math.nan]]))
        with pytest.raises(ValueError, match="must be a TensorDict with the keys"):
            GoalStarts(GOALS, observation_keys=["a", "b"])
        with pytest.raises(ValueError, match=r"batch size \[G\], got \(\)"):
            GoalStarts(TensorDict({"observation": GOALS}))
        with pytest.raises(KeyError, match=r"key .*observation.* is missing from"):
            GoalStarts(TensorDict({"state": GOALS}, [3]))
        with pytest.raises(ValueError, match="one key for each"):
            GoalStarts(["a", "b"])
        with pytest.raises(TypeError, match="goals must be a key"):
            GoalStarts(3)

    @pytest.mark.parametrize(
        ("weights", "error", "match"),
        [
            ([1.0], TypeError, "weights must be a tensor, got list"),
            (torch.ones(2), ValueError, r"shape \(2,\), expected \(3,\)"),
            (torch.zeros(3), ValueError, "not all 0"),
            (torch.tensor([1.0, -1.0, 1.0]), ValueError, "at least 0"),
            (torch.tensor([1.0, math.nan, 1.0]), ValueError, "weights must be finite"),
        ],
    )
    def test_weights(self, weights, error, match):
        with pytest.raises(error, match=match):
            GoalStarts(GOALS, weights=weights)

    def test_on_call(self):
        with pytest.raises(ValueError, match="weights are for"):
            GoalStarts("goal", weights=torch.ones(3))
        with pytest.raises(ValueError, match="must return 5 goals, got 4"):
            GoalStarts(lambda n, g: make_goals(n - 1, g))(transitions(5), generator())
        with pytest.raises(TypeError, match="must be a tensor or a TensorDict, got list"):
            GoalStarts(lambda n, g: [])(transitions(5), generator())
        with pytest.raises(KeyError, match=r"key .*goal.* is missing from"):
            GoalStarts("goal")(transitions(5), generator())


class TestInTheTransform:
    def test_traces_end_in_goals(self):
        transform = BacktrackTransform(make_model(), num_steps=T, start=GoalStarts(GOALS))
        last = transform(transitions(20))["trace", "next", "observation"][:, -1]
        assert (last.unsqueeze(1) == GOALS).all(-1).any(1).all()

    def test_classes(self):
        model = make_model(MultiCategorical([9, 9]))
        cells = torch.tensor([[7, 8], [1, 2]])
        transform = BacktrackTransform(model, num_steps=T, start=GoalStarts(cells))
        last = transform(transitions(20))["trace", "next", "observation"][:, -1]
        assert (last.unsqueeze(1) == cells).all(-1).any(1).all()

    def test_a_function_may_fail_to_find_a_goal(self):
        def goals(count, g):
            found = make_goals(count, g)
            found[0] = math.nan
            return found

        trace = BacktrackTransform(make_model(), num_steps=T, start=GoalStarts(goals))(
            transitions(4)
        )["trace"]
        assert not trace["collector", "mask"][0].any()
        assert trace["collector", "mask"][1:, -1].all()

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, how):
        for starts in (GoalStarts(GOALS, weights=torch.arange(3)), GoalStarts(make_goals)):
            one = starts(transitions(6), generator(1))["observation"]
            assert same(one, how(starts)(transitions(6), generator(1))["observation"])


def test_numbers_in_a_list_are_no_goals():
    with pytest.raises(TypeError, match="goals must be a key"):
        GoalStarts([0.0, 1.0])

"""GoalGAN as a source of start states; its state and copies; what it refuses."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from goal_data import fit_ring, generator, make_gan
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, Unbounded
from transform_data import T, make_model, same, transitions

from torchrl_recall import BacktrackTransform, GoalGAN
from torchrl_recall.checkpoint import RecallCheckpoint
from torchrl_recall.starts import FrontierStarts, StartStates


def to_state(goals):
    return torch.cat([goals, torch.zeros_like(goals[:, :1])], -1)


def to_states(goals):
    return {("a", "x"): goals, "y": goals[:, 0] > 0}


class TestStarts:
    def fitted(self, **kwargs):
        gan = make_gan(**kwargs)
        gan.update(torch.tensor([[0.5, 0.25], [-0.5, 0.75]]), torch.tensor([0.5, 1.0]), num_steps=1)
        return gan

    def test_good_goals_through_the_transform(self):
        gan = self.fitted(goal_to_state=to_state)
        assert isinstance(gan, StartStates)
        transform = BacktrackTransform(make_model(), num_steps=T, start=gan)
        trace = transform(transitions(5, 2))["trace"]
        assert trace.shape == (5, 2, T)
        assert same(trace["next", "observation"][..., -1, :], torch.tensor([0.5, 0.25, 0.0]))
        assert trace["collector", "mask"][..., -1].all()
        assert list(transform.state_dict()) == ["_extra_state"]

    def test_none_is_good(self):
        gan = make_gan(goal_to_state=to_state)
        trace = BacktrackTransform(make_model(), num_steps=T, start=gan)(transitions(5))["trace"]
        assert not trace["collector", "mask"].any()

    def test_sampled_goals(self):
        gan = self.fitted(starts="sample", replay_share=1.0)
        found = gan(transitions(50), generator(1))
        assert same(found["observation"], gan.sample(50, generator=generator(1)))
        assert found["collector", "mask"].all()

    def test_draws_are_the_transforms(self):
        gan = make_gan()
        gan.update(torch.rand(30, 2, generator=generator()), torch.full((30,), 0.5), num_steps=1)
        state = gan.generator.get_state()
        one, two = gan(transitions(9), generator(2)), gan(transitions(9), generator(2))
        assert same(one["observation"], two["observation"])
        assert same(gan.generator.get_state(), state)
        drawn = gan(transitions(3000), generator(2))["observation"]
        assert len(drawn.unique(dim=0)) == 30

    def test_several_keys(self):
        gan = self.fitted(goal_to_state=to_states, observation_keys=[("a", "x"), "y"])
        found = gan(transitions(2, 3), generator())
        assert same(found["a", "x"], torch.tensor([0.5, 0.25]))
        assert found["y"].shape == (2, 3)
        gan.goal_to_state = lambda goals: TensorDict(dict(to_states(goals)), [len(goals)])
        assert (gan(transitions(2, 3), generator()) == found).all()

    def test_wrong_function(self):
        gan = self.fitted(goal_to_state=lambda goals: None)
        with pytest.raises(TypeError, match="goal_to_state must return a tensor"):
            gan(transitions(3), generator())
        gan.goal_to_state = lambda goals: goals[:1]
        with pytest.raises(ValueError, match=r"expected \[3, "):
            gan(transitions(3), generator())
        gan = self.fitted(observation_keys=["a", "b"])
        with pytest.raises(ValueError, match="must return the keys"):
            gan(transitions(3), generator())


def through_state_dict(gan):
    other = make_gan(seed=99)
    other.load_state_dict(pickle.loads(pickle.dumps(gan.state_dict())))
    return other


class TestState:
    def test_in_a_checkpoint_beside_a_frontier(self, tmp_path):
        def parts():
            storage = LazyTensorStorage(50)
            data = transitions(50)
            data["next", "reward"] = torch.zeros(50, 1)
            storage.set(range(50), data)
            return {"gan": make_gan(seed=4), "frontier": FrontierStarts(storage, hold=3)}

        one, two = parts(), parts()
        fit_ring(one["gan"], 1, 5)
        one["frontier"](transitions(4), generator())
        RecallCheckpoint(tmp_path, **one).save(step=1)
        assert RecallCheckpoint(tmp_path, **two).load_latest() == 1
        assert same(one["gan"].sample(9), two["gan"].sample(9))
        assert (one["frontier"].target == two["frontier"].target).all()
        assert two["frontier"].state_dict()["calls"] == 1

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_state_dict]
    )
    @pytest.mark.parametrize("rounds", [0, 2])
    def test_goes_on_bit_for_bit(self, how, rounds):
        gan = make_gan()
        fit_ring(gan, rounds, 5)
        other = how(gan)
        drawn = other(transitions(4), generator())
        assert (gan(transitions(4), generator()) == drawn).all()
        one, two = fit_ring(gan, 2, 5), fit_ring(other, 2, 5)
        assert (one == two).all()
        assert same(gan.sample(50), other.sample(50))
        for p, q in zip(gan.parameters(), other.parameters(), strict=True):
            assert same(p, q)

    def test_state_is_a_copy(self):
        gan = make_gan()
        fit_ring(gan, 1, 5)
        extra = copy.deepcopy(gan.get_extra_state())
        state = gan.get_extra_state()
        fit_ring(gan, 1, 5)
        for index in range(2):
            saved = state["optimizers"][index]["state"]
            before = extra["optimizers"][index]["state"]
            assert all(same(saved[k]["exp_avg"], before[k]["exp_avg"]) for k in before)

    def test_saved_with_torch(self, tmp_path):
        gan = make_gan()
        fit_ring(gan, 1, 5)
        torch.save(gan.state_dict(), tmp_path / "gan.pt")
        other = make_gan(seed=5)
        other.load_state_dict(torch.load(tmp_path / "gan.pt", weights_only=True))
        assert same(gan.sample(9), other.sample(9))

    def test_dtype_follows(self):
        gan = make_gan()
        fit_ring(gan, 1, 5)
        gan.double()
        assert gan.sample(3).dtype == torch.float64
        fit_ring(gan, 1, 5)
        states = gan.goal_optimizer.state.values()
        assert all(state["exp_avg"].dtype == torch.float64 for state in states)
        assert gan.good_goals.dtype == torch.float64
        spec = Bounded(-1.0, 1.0, shape=(3,), dtype=torch.float64)
        assert next(GoalGAN(spec).parameters()).dtype == torch.float64


class TestRefusals:
    @pytest.mark.parametrize(
        ("kwargs", "error", "match"),
        [
            ({"goal": 0}, ValueError, "goal must be at least 1, got 0"),
            ({"goal": 1.5}, TypeError, "goal must be a size"),
            ({"goal": Unbounded((2,))}, TypeError, "Bounded spec, got Unbounded"),
            ({"goal": Bounded(0, 3, shape=(2,), dtype=torch.int64)}, TypeError, "of torch.int64"),
            ({"goal": Bounded(0.0, math.inf, shape=(2,))}, ValueError, "finite bounds"),
            ({"goal": Bounded(0.0, 1.0, shape=(2, 2))}, ValueError, r"shape \[D\], got \(2, 2\)"),
            ({"noise_dim": 0}, ValueError, "noise_dim must be at least 1"),
            ({"num_cells": 3}, TypeError, "num_cells must be a sequence"),
            ({"min_success": -0.1}, ValueError, "min_success must lie in"),
            ({"min_success": 0.5, "max_success": 0.4}, ValueError, "max_success must lie in"),
            ({"replay_size": 0}, ValueError, "replay_size must be at least 1"),
            ({"replay_share": 1.1}, ValueError, "replay_share must lie in"),
            ({"replay_share": 0.6, "uniform_share": 0.5}, ValueError, "uniform_share must lie in"),
            ({"min_distance": -1.0}, ValueError, "min_distance must lie in"),
            ({"targets": (1.0, 2.0)}, ValueError, "targets must be three"),
            ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
            ({"starts": "best"}, ValueError, r"starts must be one of \('good', 'sample'\)"),
            ({"goal_to_state": 3}, TypeError, "goal_to_state must be callable"),
            ({"generator": 3}, TypeError, "generator must be a torch"),
        ],
    )
    def test_arguments(self, kwargs, error, match):
        with pytest.raises(error, match=match):
            GoalGAN(kwargs.pop("goal", 2), **kwargs)

    @pytest.mark.parametrize(
        ("goals", "kwargs", "error", "match"),
        [
            (torch.zeros(3, 2), {}, TypeError, "either success_rate or labels"),
            ([[0.0, 0.0]], {"labels": torch.ones(1).bool()}, TypeError, "must be a tensor"),
            (torch.zeros(0, 2), {"labels": torch.ones(0).bool()}, ValueError, "n at least 1"),
            (torch.zeros(3, 1), {"labels": torch.ones(3).bool()}, ValueError, r"\[n, 2\]"),
            (torch.zeros(3, 2), {"labels": torch.ones(3)}, ValueError, "labels must be bool"),
            (torch.zeros(3, 2), {"labels": torch.ones(2).bool()}, ValueError, "one for each goal"),
            (torch.zeros(3, 2), {"success_rate": torch.ones(3, 1)}, ValueError, "one for each"),
            (torch.zeros(3, 2).double(), {"success_rate": torch.ones(3)}, ValueError, "float64"),
            (torch.full((3, 2), 1.1), {"success_rate": torch.ones(3)}, ValueError, "lie within"),
            (torch.full((3, 2), math.nan), {"success_rate": torch.ones(3)}, ValueError, "finite"),
        ],
    )
    def test_update(self, goals, kwargs, error, match):
        gan = make_gan()
        before = copy.deepcopy(gan.state_dict())
        with pytest.raises(error, match=match):
            gan.update(goals, **kwargs)
        for name, value in gan.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert same(value, before[name])

    def test_is_a_module(self):
        gan = make_gan()
        assert isinstance(gan, nn.Module)
        with pytest.raises(ValueError, match="num_goals must be at least 1"):
            gan.sample(0)

"""Starts among the batch's own next states: who is drawn, how often, and who never is."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives.value import GAE
from transform_data import SIZE, T, make_model, same, transitions

from torchrl_recall import BacktrackTransform, transition_value
from torchrl_recall.priorities.weights import value_weights
from torchrl_recall.starts import BestStarts, NextStates, StartStates


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(scores, key="score", **extra):
    """Rows whose next observation is their number."""
    scores = torch.as_tensor(scores)
    n = len(scores)
    rows = torch.arange(n, dtype=torch.float32).unsqueeze(-1)
    data = TensorDict({"next": {"observation": rows}, **extra}, [n])
    return data.set(key, scores)


def shares(starts, data, draws=400):
    """How often each row was drawn."""
    g = generator()
    rows = torch.cat([starts(data, g)["observation"].flatten().long() for _ in range(draws)])
    return torch.bincount(rows, minlength=len(data)).double() / len(rows)


class TestWeights:
    """Against the sampler's definition, `value_weights`, written for whole buffers."""

    @pytest.mark.parametrize("n", [1, 2, 7, 30, 64])
    @pytest.mark.parametrize("top", [0.1, 0.25, 1 / 3, 1.0, 1e-6])
    def test_top(self, n, top):
        score = torch.randint(0, 6, (n,), generator=generator(n)).double()  # many ties
        score[torch.rand(n, generator=generator(n + 1)) < 0.2] = math.nan
        expected = value_weights(score, "top", top=top)
        weights = BestStarts("score", top=top).weights(score, ~score.isnan())
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
    def test_soft(self, temperature):
        score = torch.randn(30, generator=generator(), dtype=torch.float64) * 5
        score[::7] = math.nan
        expected = value_weights(score, "soft", temperature=temperature)
        weights = BestStarts("score", temperature=temperature).weights(score, ~score.isnan())
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)

    def test_by_hand(self):
        starts = BestStarts("score", top=0.5)
        # Two of four; the second place is tied between two rows.
        score = torch.tensor([3.0, 1.0, 1.0, -2.0])
        assert starts.weights(score, torch.ones(4).bool()).tolist() == [1.0, 0.5, 0.5, 0.0]
        assert BestStarts("score").top == 0.1
        score = torch.tensor([0.0, math.log(3.0)])
        soft = BestStarts("score", temperature=1.0).weights(score, torch.ones(2).bool())
        torch.testing.assert_close(soft[1] / soft[0], torch.tensor(3.0, dtype=torch.float64))


class TestDraws:
    """Shares of 400 draws of each row; the bound is 5 standard errors, under 1e-5 for all rows."""

    @pytest.mark.parametrize("kwargs", [{"top": 0.5}, {"temperature": 2.0}])
    def test_shares(self, kwargs):
        data = batch_of([3.0, 1.0, 1.0, -2.0, 0.0, 2.0])
        starts = BestStarts("score", **kwargs)
        expected = starts.weights(data["score"], torch.ones(6).bool())
        expected = expected / expected.sum()
        found = shares(starts, data)
        error = (expected * (1 - expected) / (400 * 6)).sqrt()
        assert ((found - expected).abs() <= 5 * error).all()

    def test_never_drawn(self):
        scores = torch.tensor([5.0, math.nan, math.inf, -math.inf, 4.0, 9.0, 8.0])
        kept = torch.tensor([1, 1, 1, 1, 1, 0, 1]).bool()
        data = batch_of(scores, collector={"mask": kept})
        data["next", "observation"][6] = math.nan
        for starts in (BestStarts("score", top=1.0), BestStarts("score", temperature=1e3)):
            g = generator()
            found = torch.cat([starts(data, g)["observation"] for _ in range(200)])
            assert set(found.flatten().tolist()) == {0.0, 4.0}

    @pytest.mark.parametrize("kwargs", [{"top": 0.5}, {"temperature": 2.0}])
    def test_nothing_eligible(self, kwargs):
        for data in (
            batch_of([math.nan] * 3),
            batch_of([1.0] * 3, collector={"mask": torch.zeros(3, 1).bool()}),
        ):
            found = BestStarts("score", **kwargs)(data, generator())
            assert found["collector", "mask"].tolist() == [False] * 3
            assert found["observation"].shape == (3, 1)

    def test_batches_of_any_shape_and_dtype(self):
        score = torch.arange(6, dtype=torch.float64).reshape(2, 3, 1)
        states = torch.arange(12, dtype=torch.float64).reshape(2, 3, 2)
        data = TensorDict({"s": score, "next": {"a": {"o": states}, "b": score.long()}}, [2, 3])
        starts = BestStarts("s", top=0.1, observation_keys=[("a", "o"), "b"])
        found = starts(data, generator())
        assert found.shape == (2, 3)
        assert same(found["a", "o"], torch.tensor([10.0, 11.0]))
        assert same(found["b"], 5)
        assert found["collector", "mask"].all()
        assert found["a", "o"].dtype == torch.float64

    def test_repeats_by_seed_and_leaves_the_batch_alone(self):
        data = batch_of(torch.randn(20, generator=generator()))
        before = data.clone()
        starts = BestStarts("score", top=0.5)
        first = starts(data, generator(3))
        assert same(first["observation"], starts(data, generator(3))["observation"])
        assert not same(first["observation"], starts(data, generator(4))["observation"])
        assert (data == before).all()
        assert set(data.keys(True, True)) == set(before.keys(True, True))


class TestNamedScores:
    def critic(self):
        torch.manual_seed(0)
        return TensorDictModule(nn.Linear(3, 1), ["observation"], ["state_value"])

    def data(self, n=12):
        data = transitions(n)
        data["next", "terminated"] = torch.arange(n).reshape(n, 1) % 3 == 0
        data["next", "reward"] = torch.randn(n, 1, generator=generator())
        return data

    def test_value_is_transition_value(self):
        critic, data = self.critic(), self.data()
        starts = BestStarts.by_value(critic, gamma=0.9, top=0.01)
        expected = transition_value(data, critic, gamma=0.9)
        assert same(starts.score(data), expected)
        best = data["next", "observation"][expected.argmax()]
        assert same(starts(data, generator())["observation"], best)

    def test_value_passes_padding_over(self):
        critic, data = self.critic(), self.data()
        expected = transition_value(data, critic, gamma=0.9)[:-2]
        kept = torch.ones(12).bool()
        kept[-2:] = False
        data["collector", "mask"] = kept
        data["next", "observation"][-2:] = math.nan
        starts = BestStarts.by_value(critic, gamma=0.9, top=0.01)
        assert same(starts.score(data)[:-2], expected)
        assert torch.isfinite(starts.score(data)).all()
        best = data["next", "observation"][expected.argmax()]
        assert same(starts(data, generator())["observation"], best)

    def test_value_follows_the_critic(self):
        critic, data = self.critic(), self.data()
        starts = BestStarts.by_value(critic, gamma=1.0, top=0.01)
        data["next", "reward"] = torch.zeros(12, 1)
        data["next", "terminated"] = torch.zeros(12, 1).bool()
        with torch.no_grad():
            critic.module.weight.fill_(1.0)
        up = starts(data, generator())["observation"]
        with torch.no_grad():
            critic.module.weight.fill_(-1.0)
        down = starts(data, generator())["observation"]
        assert same(up, data["next", "observation"][-1])
        assert same(down, data["next", "observation"][0])

    def test_return_of_gae(self):
        critic = self.critic()
        data = self.data()
        data["next", "done"] = data["next", "terminated"].clone()
        with torch.no_grad():
            GAE(gamma=0.9, lmbda=0.9, value_network=critic)(data)
        found = BestStarts.by_return(top=0.01)(data, generator())
        best = data["value_target"].flatten().argmax()
        assert same(found["observation"], data["next", "observation"][best])

    def test_reward(self):
        data = self.data()
        found = BestStarts.by_reward(top=0.01)(data, generator())
        best = data["next", "reward"].flatten().argmax()
        assert same(found["observation"], data["next", "observation"][best])

    def test_td_error_is_absolute(self):
        data = batch_of([1.0, -3.0, 2.0], key="td_error")
        found = BestStarts.by_td_error(top=0.01)(data, generator())
        assert same(found["observation"], 1.0)

    def test_any_function(self):
        data = batch_of([1.0, -3.0, 2.0])
        starts = BestStarts(lambda rows: -rows["next", "observation"][:, 0], top=0.01)
        assert same(starts(data, generator())["observation"], 0.0)


class TestRefusals:
    def test_arguments(self):
        with pytest.raises(TypeError, match="score must be a key or a callable, got int"):
            BestStarts(3)
        with pytest.raises(TypeError, match=r"BestStarts\.by_value"):
            BestStarts(TensorDictModule(nn.Linear(1, 1), ["a"], ["b"]))
        with pytest.raises(TypeError, match="value_network must be a TensorDictModule, got Linear"):
            BestStarts.by_value(nn.Linear(1, 1))
        with pytest.raises(ValueError, match="top or temperature, not both"):
            BestStarts("s", top=0.1, temperature=1.0)
        for top in (0.0, -0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match="top must lie in"):
                BestStarts("s", top=top)
        for temperature in (0.0, -1.0, math.inf):
            with pytest.raises(ValueError, match="temperature must be positive and finite"):
                BestStarts("s", temperature=temperature)
        with pytest.raises(ValueError, match="observation_keys must name at least one key"):
            BestStarts("s", observation_keys=[])

    def test_data(self):
        data = batch_of([1.0, 2.0])
        with pytest.raises(KeyError, match=r"key .*value_target.* is missing from"):
            BestStarts.by_return()(data, generator())
        with pytest.raises(ValueError, match="score has shape"):
            BestStarts(lambda rows: rows["score"][:1])(data, generator())
        with pytest.raises(KeyError, match=r"key .*next.*state.* is missing from"):
            BestStarts("score", observation_keys="state")(data, generator())


class TestInTheTransform:
    def test_traces_end_in_the_best(self):
        model = make_model()
        starts = BestStarts("value_target", top=0.01)
        assert isinstance(starts, StartStates)
        transform = BacktrackTransform(model, num_steps=T, num_traces=2, start=starts)
        rb = TensorDictReplayBuffer(
            storage=LazyTensorStorage(SIZE), batch_size=8, transform=transform
        )
        rb.extend(transitions(SIZE))
        batch = rb.sample()
        best = batch["next", "observation"][batch["value_target"].argmax()]
        assert batch["trace"].shape == (8, 2, T)
        assert same(batch["trace", "next", "observation"][..., -1, :], best)

    def test_nothing_eligible_masks_all(self):
        data = transitions(5)
        data["value_target"] = torch.full((5, 1), math.nan)
        starts = BestStarts("value_target")
        trace = BacktrackTransform(make_model(), num_steps=T, start=starts)(data)["trace"]
        assert not trace["collector", "mask"].any()
        assert torch.isfinite(trace["observation"]).all()

    def test_next_states_are_the_default(self):
        model, data = make_model(), transitions(5)
        data["collector", "mask"] = torch.tensor([1, 1, 0, 1, 1]).bool()
        plain = BacktrackTransform(model, num_steps=T, generator=generator())(data.clone())
        ours = BacktrackTransform(model, num_steps=T, generator=generator(), start=NextStates())(
            data.clone()
        )
        assert (plain["trace"] == ours["trace"]).all()
        assert NextStates(("a", "b")).observation_keys == [("a", "b")]

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, how):
        critic = TensorDictModule(nn.Linear(3, 1), ["observation"], ["state_value"])
        data = transitions(6)
        data["next", "terminated"] = torch.zeros(6, 1).bool()
        for starts in (BestStarts.by_value(critic), BestStarts.by_td_error("value_target")):
            copied = how(starts)
            one, two = starts(data, generator(1)), copied(data, generator(1))
            assert same(one["observation"], two["observation"])


def test_a_score_laid_out_otherwise_is_refused():
    batch = TensorDict({"next": {"observation": torch.zeros(6, 2)}}, [6])
    with pytest.raises(ValueError, match="score has shape"):
        BestStarts(lambda data: torch.zeros(1, 6), top=0.5)(batch, torch.Generator())

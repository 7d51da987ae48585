"""Steps between states, learned: where the answer is known exactly."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import (
    Categorical,
    LazyTensorStorage,
    SliceSampler,
    TensorDictReplayBuffer,
    Unbounded,
)

from torchrl_recall.temporal_distance import TemporalDistance, TemporalDistanceLoss
from torchrl_recall.trace_masks import RisingDistance


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slices(states):
    """Slices ``[N, L]`` of states ``[N, L + 1, D]`` or ``[N, L + 1]``."""
    return TensorDict(
        {"observation": states[:, :-1], "next": {"observation": states[:, 1:]}},
        [len(states), states.shape[1] - 1],
    )


def fit(distance, batches, steps, learning_rate=1e-2, **options):
    loss = TemporalDistanceLoss(distance, **options)
    optimizer = torch.optim.Adam(loss.parameters(), learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(batches())["loss_temporal_distance"].backward()
        optimizer.step()
    return distance


class Fixed(TemporalDistance):
    """A distance that is given: twice the difference."""

    def forward(self, state, end):
        return 2 * (end - state).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_the_specs(dtype):
    for observation in (Unbounded(3, dtype=dtype), {"a": Unbounded(3, dtype=dtype)}):
        distance = TemporalDistance(observation, num_cells=(4,))
        state = torch.randn(2, 3, dtype=dtype)
        assert distance(state, state).dtype == dtype
    assert next(TemporalDistance(Categorical(5), num_cells=(4,)).parameters()).dtype == (
        torch.get_default_dtype()
    )
    asked = TemporalDistance(Unbounded(3, dtype=dtype), num_cells=(4,), dtype=torch.float64)
    assert next(asked.parameters()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"dtype must be a floating-point one, got torch\.int64"):
        TemporalDistance(3, dtype=torch.int64)


class TestLoss:
    @pytest.mark.parametrize("expectile", [0.5, 0.1])
    def test_is_its_definition(self, expectile):
        states = torch.randn(5, 7, 1)
        loss = TemporalDistanceLoss(Fixed(1, num_cells=(4,)), expectile=expectile)
        errors = []
        for row in states.squeeze(-1).tolist():
            for i, j in itertools.combinations_with_replacement(range(7), 2):
                error = (j - i) - 2 * (row[j] - row[i])
                weight = expectile if error > 0 else 1 - expectile
                errors.append(2 * weight * error**2)
        found = loss(slices(states))["loss_temporal_distance"]
        assert float(found) == pytest.approx(sum(errors) / len(errors), rel=1e-5)
        total = TemporalDistanceLoss(loss.distance, expectile=expectile, reduction="sum")
        assert float(total(slices(states))["loss_temporal_distance"]) == pytest.approx(
            sum(errors), rel=1e-5
        )

    def test_no_pair_across_a_done_or_padding(self):
        states = torch.randn(1, 7, 1)
        data = slices(states)
        data["next", "done"] = torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.bool).reshape(1, 6, 1)
        loss = TemporalDistanceLoss(Fixed(1, num_cells=(4,)), reduction="none")
        values = loss(data)["loss_temporal_distance"].squeeze(0)
        pairs = list(itertools.combinations_with_replacement(range(7), 2))
        assert values.shape == (len(pairs),)
        # States 0 to 2, then 3 to 6: what a done leads to is replaced by the next start, but at
        # the slice's end it is there.
        for (i, j), value in zip(pairs, values.tolist(), strict=True):
            error = (j - i) - 2 * float(states[0, j] - states[0, i])
            expected = error**2 if (i <= 2) == (j <= 2) else 0.0
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
        data = slices(states)
        data["observation"] = data["observation"].clone()
        data["observation"][0, 4:] = torch.nan  # padding need not be valid
        data["next", "observation"] = data["next", "observation"].clone()
        data["next", "observation"][0, 3:] = torch.nan
        data["collector", "mask"] = torch.arange(6).reshape(1, 6) < 4
        values = loss(data)["loss_temporal_distance"].squeeze(0)
        for (i, j), value in zip(pairs, values.tolist(), strict=True):
            error = (j - i) - 2 * float(states[0, j] - states[0, i])
            expected = error**2 if j < 4 else 0.0
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)

    def test_statistics_are_those_of_the_data(self):
        distance = TemporalDistance(2, num_cells=(8,))
        loss = TemporalDistanceLoss(distance)
        data = slices(3 + 2 * torch.randn(500, 5, 2))
        loss(data)
        mean = distance.observation.normalizer.mean
        torch.testing.assert_close(mean, data["observation"].mean((0, 1)), rtol=1e-4, atol=1e-4)
        loss.eval()
        loss(slices(100 + torch.randn(5, 5, 2)))
        assert torch.equal(distance.observation.normalizer.mean, mean)

    def test_keys_and_refusals(self):
        distance = TemporalDistance({("agent", "x"): 1, "y": 1}, num_cells=(8,))
        loss = TemporalDistanceLoss(distance)
        assert loss.in_keys == [
            ("agent", "x"), "y", ("next", "agent", "x"), ("next", "y"),
        ]  # fmt: skip
        states = torch.randn(3, 5, 2)
        plain = slices(states)
        data = TensorDict({}, [3, 4])
        for where, source in (((), plain), (("next",), plain["next"])):
            data[(*where, "p")] = source["observation"][..., :1]
            data[(*where, "q")] = source["observation"][..., 1:]
        loss.set_keys(observation=["p", "q"])
        assert loss.in_keys == ["p", "q", ("next", "p"), ("next", "q")]
        assert torch.isfinite(loss(data)["loss_temporal_distance"])
        with pytest.raises(ValueError, match="observation must name 2 keys"):
            loss.set_keys(observation=["p"])
        with pytest.raises(ValueError, match=r"expected \[\*B, L\] with time last"):
            loss(data[0, 0])
        with pytest.raises(KeyError, match="key 'p' is missing"):
            loss(data.exclude("p"))
        with pytest.raises(TypeError, match="distance must be a TemporalDistance, got Linear"):
            TemporalDistanceLoss(nn.Linear(1, 1))  # pyright: ignore
        for bad in (0.0, 1.0, 2.0):
            with pytest.raises(ValueError, match="expectile must lie in"):
                TemporalDistanceLoss(distance, expectile=bad)
        data["p"][0, 0] = torch.nan
        with pytest.raises(ValueError, match="must be finite"):
            loss(data)

    def test_copies_and_dtypes(self):
        distance = TemporalDistance(2, num_cells=(8,), dtype=torch.float64)
        data = slices(torch.randn(4, 5, 2, dtype=torch.float64))
        loss = TemporalDistanceLoss(distance, expectile=0.2).eval()
        found = loss(data)["loss_temporal_distance"]
        assert found.dtype == torch.float64
        other = TemporalDistanceLoss(
            TemporalDistance(2, num_cells=(8,), dtype=torch.float64), expectile=0.2
        ).eval()
        other.load_state_dict(loss.state_dict())
        for copied in (other, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert copied(data)["loss_temporal_distance"] == found
        found.backward()
        assert all(p.grad is not None for p in distance.parameters())


class TestExactAnswers:
    def test_a_chain_walked_to_the_right(self):
        """From the buffer's slices: d(s, g) = g - s."""
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(2000),
            sampler=SliceSampler(slice_len=8, traj_key="trajectory", strict_length=True),
            batch_size=256,
        )
        walk = torch.arange(11.0).repeat(200, 1).unsqueeze(-1)
        data = slices(walk)
        data["trajectory"] = torch.arange(200).unsqueeze(-1).expand(200, 10)
        buffer.extend(data.reshape(-1))
        distance = TemporalDistance(1, num_cells=(32,))
        fit(distance, lambda: buffer.sample().reshape(-1, 8), 400)
        s, g = torch.tensor(list(itertools.product(range(3, 8), range(3, 8)))).float().T
        s, g = s[g >= s], g[g >= s]
        with torch.no_grad():
            found = distance(s.unsqueeze(-1), g.unsqueeze(-1))
        error = (found - (g - s)).abs()
        assert error[g > s].max() < 0.2
        assert error[g == s].max() < 0.35  # a softplus comes near zero, not to it
        # And the mask that it serves: a detour 3 -> 5 -> 4 -> 6 is left out.
        path = torch.tensor([3.0, 5.0, 4.0, 6.0]).unsqueeze(-1)
        trace = TensorDict({"observation": path[:-1], "next": {"observation": path[1:]}}, [3])
        assert RisingDistance(distance)(trace).tolist() == [True, False, True]

    def test_a_random_walk_gives_the_mean_of_the_data(self):
        """Squared error: for each pair of states the mean number of steps between them."""
        steps = torch.randint(0, 2, (60, 6)) * 2 - 1
        walk = torch.cat([torch.full((60, 1), 2), 2 + steps.cumsum(1)], 1) % 5
        sums, counts = torch.zeros(5, 5), torch.zeros(5, 5)
        for row in walk.tolist():
            for i, j in itertools.combinations_with_replacement(range(7), 2):
                sums[row[i], row[j]] += j - i
                counts[row[i], row[j]] += 1
        exact = sums / counts
        distance = TemporalDistance(Categorical(5, shape=(1,)), num_cells=(64,))
        data = slices(walk.unsqueeze(-1))
        fit(distance, lambda: data, 300, learning_rate=2e-2)
        every = torch.cartesian_prod(torch.arange(5), torch.arange(5))
        with torch.no_grad():
            found = distance(every[:, :1], every[:, 1:]).reshape(5, 5)
        assert (found - exact).abs().max() < 0.15
        # A small expectile leans to the shortest way: below the mean, above the least.
        low = TemporalDistance(Categorical(5, shape=(1,)), num_cells=(64,))
        fit(low, lambda: data, 300, learning_rate=2e-2, expectile=0.05)
        with torch.no_grad():
            least = low(every[:, :1], every[:, 1:]).reshape(5, 5)
        assert (least < found + 0.05).all()
        ring = (every[:, 1] - every[:, 0]) % 5
        shortest = torch.minimum(ring, 5 - ring).reshape(5, 5)
        assert (least > shortest - 0.2).all()
        assert (least - shortest).abs().mean() < 0.5 * (found - shortest).abs().mean()

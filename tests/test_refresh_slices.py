"""Slices and staleness: ages and values while data come in, checkpoints, emptying."""

from __future__ import annotations

import math

import pytest
import torch
from refresh_data import (
    GAMMA,
    IDS,
    Critic,
    recall_buffer,
    returns_by_loop,
    sliced,
    transitions,
    values,
)
from tensordict.nn import TensorDictModule
from torchrl.data import ListStorage, TensorDictReplayBuffer

from torchrl_recall import ValuePrioritizedSampler, ValueRefresh, transition_value


def test_ages_by_hand():
    _, critic, refresh = sliced(n=1000)
    assert refresh.share_refreshed == 0.0
    assert math.isnan(refresh.logs()["refresh/age_mean"])
    assert refresh.age.tolist() == [-1] * 1000
    # Newest first, rounded up to blocks: 1000 - 256 lies in the block 512 ... 767.
    logs = refresh()
    assert logs == {"refresh/age_mean": 0, "refresh/age_max": 0, "refresh/share": 0.488}
    refresh()
    assert refresh.age.tolist() == [-1] * 256 + [0] * 256 + [1] * 488
    refresh()
    assert critic.sizes == [488, 256, 256]
    assert refresh.age.tolist() == [0] * 256 + [1] * 256 + [2] * 488
    assert refresh.logs()["refresh/age_mean"] == pytest.approx((256 + 976) / 1000)
    assert refresh()["refresh/age_max"] == 2.0  # and over again
    assert refresh.age.tolist() == [1] * 256 + [2] * 256 + [0] * 488


def test_new_rows_come_first_and_overwritten_ones_are_stale():
    buffer, _, refresh = sliced(capacity=1024)
    for _ in range(4):
        refresh()
    buffer.extend(transitions(100, seed=1, dtype=torch.float64))
    expected = [-1] * 100 + [0] * 156 + [1] * 256 + [2] * 256 + [3] * 256
    assert refresh.age.tolist() == expected
    assert refresh.share_refreshed == 924 / 1024
    critic = Critic(2.0)
    refresh.value_network = critic
    refresh()
    # The new ones, and below them the pass begins again.
    assert refresh.age.tolist() == [0] * 100 + [1] * 156 + [2] * 256 + [3] * 256 + [0] * 256
    wanted = transition_value(buffer, Critic(2.0), gamma=GAMMA)
    torch.testing.assert_close(values(buffer)[:100], wanted[:100])
    torch.testing.assert_close(values(buffer)[768:], wanted[768:])
    stale = transition_value(buffer, Critic(1.0), gamma=GAMMA)
    torch.testing.assert_close(values(buffer)[100:768], stale[100:768])


@pytest.mark.parametrize("target", ["bootstrap", "return"])
@pytest.mark.parametrize("slice_size", [1, 300, 0.2, 1.0])
def test_ages_and_values_while_the_ring_goes_round(target, slice_size):
    buffer = recall_buffer(1000, dtype=torch.float64)
    refresh = ValueRefresh(
        buffer,
        Critic(),
        gamma=GAMMA,
        target=target,
        slice_size=slice_size,
        chunk_size=100,
        trajectory_key=None,
    )
    everything = transitions(4000, dtype=torch.float64)
    before, known, written = None, [-1] * 1000, 0
    for call, new in enumerate([700, 10, 0, 500, 3, 1000, 0, 0, 0, 37, 950, 0, 0, 0, 0, 0, 0]):
        if new:
            index = buffer.extend(everything[written : written + new].clone())
            written += new
            for place in index.tolist():
                known[place] = -1
            assert refresh.age.tolist() == known[: len(buffer)]
        before = values(buffer)
        refresh()
        known = [age + 1 if age >= 0 else -1 for age in known]
        ages = refresh.age.tolist()
        for place, age in enumerate(ages):
            assert age in (0, known[place])
            known[place] = age
        fresh = torch.tensor(ages) == 0
        assert torch.equal(values(buffer)[~fresh], before[~fresh])
        assert bool(fresh.any()), call
        logs, done = refresh.logs(), [age for age in ages if age >= 0]
        assert logs["refresh/share"] == pytest.approx(len(done) / len(ages))
        assert logs["refresh/age_mean"] == pytest.approx(sum(done) / len(done))
        assert logs["refresh/age_max"] == max(done)
        if call > 1 and new:
            assert all(ages[place] == 0 for place in index.tolist())
    if target == "bootstrap":
        expected = transition_value(buffer, Critic(), gamma=GAMMA)
        torch.testing.assert_close(values(buffer), expected)
    elif slice_size != 1:
        # The last rows came 7 calls ago, and each pass follows the ones before them too.
        expected = returns_by_loop(everything[written - 1000 : written])
        torch.testing.assert_close(values(buffer), expected.roll(written % 1000))


def test_returns_of_interleaved_trajectories_across_slices():
    buffer = recall_buffer(1500, dtype=torch.float64)
    data = transitions(2000, dtype=torch.float64, ends=0.02)
    data[IDS] = torch.randint(9, (2000,), generator=torch.Generator().manual_seed(0))
    buffer.extend(data.clone())
    refresh = ValueRefresh(
        buffer, Critic(), gamma=GAMMA, target="return", slice_size=256, chunk_size=100
    )
    calls = 0
    while refresh()["refresh/share"] < 1:
        calls += 1
    assert calls == 4
    expected = returns_by_loop(data[-1500:]).roll(500)
    torch.testing.assert_close(values(buffer), expected)


def test_what_follows_a_slice_is_as_old_as_the_slice_before():
    buffer, _, refresh = sliced(n=512, target="return", trajectory_key=None)
    buffer.storage[:]["next", "done"].fill_(False)
    buffer.storage[:]["next", "terminated"].fill_(False)
    refresh()
    refresh.value_network = Critic(3.0)
    refresh()
    # The one trajectory is still bootstrapped from its last stored step, of the first call.
    torch.testing.assert_close(values(buffer), returns_by_loop(buffer.storage[:]))


@pytest.mark.parametrize("target", ["bootstrap", "return"])
def test_slices_are_deterministic_and_survive_a_checkpoint(target, tmp_path):
    def one():
        return sliced(capacity=1024, slice_size=300, target=target, trajectory_key=None)

    (buffer, _, refresh), (other_buffer, _, other) = one(), one()
    for _ in range(2):
        assert refresh() == other()
    state = torch.save(refresh.state_dict(), tmp_path / "state.pt") or torch.load(
        tmp_path / "state.pt"
    )
    buffer.dumps(tmp_path / "buffer")
    third_buffer = recall_buffer(1024, dtype=torch.float64)
    third_buffer.loads(tmp_path / "buffer")
    third = ValueRefresh(
        third_buffer, Critic(), gamma=GAMMA, slice_size=300, target=target, trajectory_key=None
    )
    third.load_state_dict(state)
    assert torch.equal(third.age, refresh.age)
    for seed in range(5):
        for rb, one_refresh in (
            (buffer, refresh),
            (other_buffer, other),
            (third_buffer, third),
        ):
            rb.extend(transitions(50, seed=seed, dtype=torch.float64))
            one_refresh()
        assert torch.equal(other.age, refresh.age)
        assert torch.equal(third.age, refresh.age)
        assert torch.equal(values(other_buffer), values(buffer))
        assert torch.equal(values(third_buffer), values(buffer))


def test_reset_and_emptying():
    buffer, critic, refresh = sliced(slice_size=None)
    refresh()
    buffer.empty()
    assert refresh.share_refreshed == 0.0
    assert refresh.age.shape == (0,)
    logs = refresh()
    assert logs["refresh/share"] == 0.0
    buffer.extend(transitions(300, seed=5, dtype=torch.float64))
    assert refresh.age.tolist() == [-1] * 300
    refresh()
    torch.testing.assert_close(values(buffer), transition_value(buffer, critic, gamma=GAMMA))
    refresh.reset()
    assert refresh.share_refreshed == 0.0
    assert refresh()["refresh/share"] == 1.0


@pytest.mark.parametrize("keep_count", [True, False])
def test_emptied_and_filled_again_with_less(keep_count):
    buffer, _, refresh = sliced(slice_size=256)
    refresh()
    buffer.empty(empty_write_count=not keep_count)
    buffer.extend(transitions(700, seed=5, dtype=torch.float64))
    assert refresh.share_refreshed == 0.0
    refresh()
    assert 0 < refresh.share_refreshed < 1
    refresh()
    expected = transition_value(buffer, Critic(), gamma=GAMMA)
    torch.testing.assert_close(values(buffer), expected)


def test_empty_storage_and_unbounded_list():
    buffer = TensorDictReplayBuffer(
        storage=ListStorage(), sampler=ValuePrioritizedSampler(4), batch_size=2
    )
    refresh = ValueRefresh(buffer, Critic(), gamma=GAMMA)
    assert refresh()["refresh/share"] == 0.0
    for _ in range(3):
        buffer.extend(transitions(300))
        assert refresh()["refresh/share"] == 1.0
    torch.testing.assert_close(values(buffer)[300:600], values(buffer)[:300])


def test_a_network_that_raises_leaves_all_due():
    buffer, _, refresh = sliced(slice_size=None)
    good, refresh.value_network = (
        refresh.value_network,
        TensorDictModule(lambda s: 1 / 0, ["observation"], ["state_value"]),
    )
    with pytest.raises(ZeroDivisionError):
        refresh()
    assert refresh.share_refreshed == 0.0
    assert buffer._replay_lock.acquire(blocking=False)
    buffer._replay_lock.release()
    refresh.value_network = good
    assert refresh()["refresh/share"] == 1.0

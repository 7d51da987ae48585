"""Returns-to-go: by hand, against loops in float64, against TorchRL, in any chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torchrl.objectives.value.functional import reward2go, td1_return_estimate

from torchrl_recall.priorities.returns import ReturnsToGo, discounted_sum

GAMMA = 0.9


def steps(time, width, *, seed=0, num_ids=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (time, width)
    reward = torch.randn(shape, generator=generator, dtype=torch.float64)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(8, shape, generator=generator)
    ids = None if num_ids is None else torch.randint(num_ids, shape, generator=generator)
    return reward, kind == 0, kind <= 1, ids, value


def by_loop(reward, terminated, done, ids, value, by_id):
    """Go back through all steps, one by one."""
    result, later = torch.zeros_like(reward), {}
    for t in range(len(reward) - 1, -1, -1):
        for b in range(reward.shape[1]):
            name = None if ids is None else int(ids[t, b])
            place = name if by_id else b
            tail = 0.0
            if not terminated[t, b]:
                tail = float(value[t, b])
                if not done[t, b] and place in later and later[place][0] == name:
                    tail = later[place][1]
            result[t, b] = reward[t, b] + GAMMA * tail
            later[place] = name, float(result[t, b])
    return result


def in_chunks(reward, terminated, done, ids, value, by_id, size):
    returns, parts = ReturnsToGo(GAMMA, by_id), []
    for end in range(len(reward), 0, -size):
        chunk = slice(max(0, end - size), end)
        parts.append(
            returns(
                reward[chunk],
                terminated[chunk],
                done[chunk],
                None if ids is None else ids[chunk],
                lambda rows, chunk=chunk: value[chunk].reshape(-1)[rows],
            )
        )
    return torch.cat(parts[::-1])


def test_discounted_sum_by_hand():
    first = torch.tensor([1.0, 2.0, 3.0, math.nan, 5.0])
    discount = torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5])
    expected = torch.tensor([1 + 0.5 * (2 + 1.5), 3.5, 3.0, math.nan, 5.0])
    torch.testing.assert_close(discounted_sum(first, discount), expected, equal_nan=True)
    assert first[0] == 1.0
    assert discount[0] == 0.5


@pytest.mark.parametrize("time", [0, 1, 2, 3, 64, 1000])
def test_discounted_sum_against_a_loop(time):
    generator = torch.Generator().manual_seed(time)
    first = torch.randn(2, time, generator=generator, dtype=torch.float64)
    discount = torch.rand(2, time, generator=generator, dtype=torch.float64).clamp(0.2).sub(0.2)
    expected, after = torch.zeros_like(first), torch.zeros(2, dtype=torch.float64)
    for t in range(time - 1, -1, -1):
        after = expected[:, t] = first[:, t] + discount[:, t] * after
    torch.testing.assert_close(discounted_sum(first, discount), expected)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("width", "num_ids", "by_id"),
    [(1, None, False), (4, None, False), (1, 5, True), (3, 2, False), (1, 200, True)],
)
def test_against_a_loop_in_any_chunks(size, width, num_ids, by_id):
    data = steps(100, width, num_ids=num_ids)
    got = in_chunks(*data, by_id, size)
    torch.testing.assert_close(got, by_loop(*data, by_id))


def test_against_torchrl():
    reward, terminated, done, _, value = steps(50, 3)
    got = in_chunks(reward, terminated, done, None, value, False, 8)
    done[-1] = True
    expected = td1_return_estimate(
        GAMMA, *(x.T.unsqueeze(-1) for x in (value, reward, done, terminated))
    )
    torch.testing.assert_close(got, expected.squeeze(-1).T)


def test_finished_episodes_are_torchrls_reward_to_go():
    reward, _, done, _, value = steps(50, 3)
    done[-1] = True
    got = in_chunks(reward, done, done, None, value.fill_(math.nan), False, 8)
    torch.testing.assert_close(
        got, reward2go(reward.T, done.T, GAMMA, time_dim=-1).T.reshape(50, 3)
    )


def test_value_of_one_trajectory_does_not_spread():
    reward, terminated, done, ids, value = steps(30, 1, num_ids=3)
    value[ids == 1] = math.nan
    got = in_chunks(reward, terminated, done, ids, value, True, 7)
    assert bool(got[ids == 1].isnan().any())
    assert not bool(got[ids != 1].isnan().any())


def test_the_network_is_asked_at_ends_only():
    asked = []
    reward = torch.ones(6, 1)
    no = torch.zeros(6, 1, dtype=torch.bool)
    terminated, done = no.clone(), no.clone()
    terminated[1], done[[1, 3]] = True, True
    returns = ReturnsToGo(0.5, by_id=False)
    got = returns(
        reward, terminated, done, None, lambda rows: (asked.extend(rows.tolist()), rows * 4.0)[1]
    )
    # Truncated after row 3 with value 12, unfinished after row 5 with value 20.
    assert asked == [3, 5]
    assert got.squeeze(1).tolist() == [1.5, 1.0, 4.5, 7.0, 6.5, 11.0]

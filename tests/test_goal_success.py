"""Success rates of goals, against a loop over episodes."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from tensordict import TensorDict

from torchrl_recall import GoalGAN
from torchrl_recall.goals.success import success_rates


def steps(width=2, dtype=torch.float32, envs=6, length=40):
    """Steps of several environments, whose episodes end at random and have one of five goals."""
    g = torch.Generator().manual_seed(0)
    goals = torch.randn(5, width, generator=g).to(dtype)
    done = torch.rand(envs, length, 1, generator=g) < 0.2
    success = torch.rand(envs, length, 1, generator=g) < 0.5
    which = torch.randint(5, (envs, length), generator=g)
    for t in range(1, length):
        which[:, t] = torch.where(done[:, t - 1, 0], which[:, t], which[:, t - 1])
    after = {"done": done, "success": success}
    return TensorDict({"goal": goals[which], "next": after}, [envs, length])


def by_loop(data):
    outcomes = defaultdict(list)
    for step in data.reshape(-1):
        if step["next", "done"] and step.get(("collector", "mask"), torch.tensor(True)):
            outcomes[tuple(step["goal"].tolist())].append(float(step["next", "success"]))
    return {goal: (sum(x) / len(x), len(x)) for goal, x in outcomes.items()}


def as_dict(rates):
    rows = zip(
        map(tuple, rates["goal"].tolist()),
        rates["success_rate"].tolist(),
        rates["count"].tolist(),
        strict=True,
    )
    return {goal: (rate, count) for goal, rate, count in rows}


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_against_a_loop(width, masked):
    data = steps(width, torch.float64)
    if masked:
        kept = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)) < 0.7
        data["collector", "mask"] = kept
    found, expected = as_dict(success_rates(data)), by_loop(data)
    assert len(expected) == 5
    assert found.keys() == expected.keys()
    for goal, rate_and_count in expected.items():
        assert found[goal] == pytest.approx(rate_and_count, rel=1e-12)


def test_rows_that_are_episodes_and_names():
    data = TensorDict(
        {"task": {"cell": torch.tensor([[2, 0], [1, 1], [1, 1]])}, "won": torch.tensor([1, 0, 1])},
        [3],
    )
    rates = success_rates(data, goal_key=("task", "cell"), success_key="won", done_key=None)
    assert rates["goal"].tolist() == [[1, 1], [2, 0]]
    assert rates["success_rate"].tolist() == [0.5, 1.0]
    assert rates["count"].tolist() == [2, 1]
    assert rates["success_rate"].dtype == torch.float32


def test_none_has_ended():
    data = steps()
    data["next", "done"] = torch.zeros(6, 40, 1).bool()
    rates = success_rates(data)
    assert rates.shape == (0,)
    assert rates["goal"].shape == (0, 2)


def test_feeds_goal_gan():
    torch.manual_seed(0)
    gan = GoalGAN(2)
    data = steps()
    data["goal"] = data["goal"].clamp(-1, 1)
    rates = success_rates(data)
    log = gan.update(rates["goal"], rates["success_rate"], num_steps=1)
    assert log["share_good"] == gan.label(rates["success_rate"]).float().mean()


def test_refusals():
    data = steps()
    with pytest.raises(KeyError, match=r"key .*desired.* is missing from"):
        success_rates(data, goal_key="desired")
    bad = data.clone()
    bad["goal"][bad["next", "done"][..., 0]] = math.nan
    with pytest.raises(ValueError, match="must be finite where episodes end"):
        success_rates(bad)
    bad = data.clone()
    bad["next", "success"] = torch.full((6, 40, 1), 0.5)
    with pytest.raises(ValueError, match="must be 0 or 1"):
        success_rates(bad)
    bad["goal"] = data["goal"][..., 0]
    with pytest.raises(ValueError, match=r"expected \[\*batch, D\]"):
        success_rates(bad)

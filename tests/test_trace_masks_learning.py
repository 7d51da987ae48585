"""That the masks point the right way: what imitating the kept steps is worth, computed exactly.

Traces are drawn from the exact backward model of a random policy on four rooms; imitating them
exactly is counting kept (state, action) pairs; the policy that results is judged by dynamic
programming. The right direction must shorten the way to the goal, the wrong one must not.
"""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule

from torchrl_recall import sample_traces
from torchrl_recall.envs import FourRoomsEnv, exact_backtrack_model, expected_visits
from torchrl_recall.trace_masks import (
    LastVisitCells,
    LastVisitRadius,
    RisingDistance,
    RisingValue,
)
from torchrl_recall.traces.masks import last_visit

SIZE = 5
START = SIZE + 1
UNIFORM = torch.full((SIZE**2, 4), 0.25, dtype=torch.float64)
SEEDS = range(1000, 1003)


def cells_of(states):
    return states @ torch.tensor([SIZE, 1])


def expected_steps(env, policy):
    """Steps from the start to the goal, by dynamic programming; infinite if there is no way."""
    try:
        visits = expected_visits(env, policy)
    except ValueError:
        return float("inf")
    return float(visits.sum() - visits[cells_of(env.goal)])


def steps_to_go(env):
    """Expected steps to the goal of the random policy from every cell, and infinity on walls."""
    free = (~env.walls).reshape(-1).nonzero().squeeze(-1)
    goal = int(cells_of(env.goal))
    others = free[free != goal]
    place = {cell: i for i, cell in enumerate(others.tolist())}
    system = torch.eye(len(others), dtype=torch.float64)
    for cell, i in place.items():
        for following in env.next_cell[cell].tolist():
            if following != goal:
                system[i, place[following]] -= 0.25
    found = torch.full((SIZE**2,), torch.inf, dtype=torch.float64)
    found[others] = torch.linalg.solve(system, torch.ones(len(others), dtype=torch.float64))
    found[goal] = 0
    return found


def earliest_visit(trace):
    """The wrong direction: keep a step if its state did not occur before."""
    before = torch.where(trace["collector", "mask"], cells_of(trace["observation"]), -1)
    end = torch.full_like(before[:, :1], -2)
    return last_visit(torch.cat([before.flip(-1), end], -1).unsqueeze(-1)).flip(-1)


def first_rise(value):
    """The wrong direction: keep a step if its value is above all before."""

    def mask(trace):
        level = value(trace["observation"]).squeeze(-1)
        level = torch.where(trace["collector", "mask"], level, -torch.inf)
        highest = level.cummax(-1).values.roll(1, -1)
        highest[:, 0] = -torch.inf
        return level > highest

    return mask


@pytest.fixture(scope="module")
def maze():
    env = FourRoomsEnv(SIZE, max_steps=None)
    return env, exact_backtrack_model(env, UNIFORM)


def imitate(env, traces, kept):
    """The policy that imitates the kept steps exactly; random where there are none."""
    cell = cells_of(traces["observation"])
    pairs = (cell * 4 + traces["action"])[kept]
    counts = torch.bincount(pairs, minlength=4 * SIZE**2).reshape(-1, 4).double()
    total = counts.sum(-1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp_min(1), 0.25)


@pytest.fixture(scope="module")
def worth(maze):
    """For each mask, the expected steps after imitation, one number for each seed."""
    env, model = maze
    to_go = steps_to_go(env)

    def value(states):
        return -to_go[cells_of(states)].unsqueeze(-1)

    def distance(states, end):
        assert bool((end == env.goal).all())
        return to_go[cells_of(states)]

    network = TensorDictModule(value, ["observation"], ["state_value"])
    masks = {
        "every visit": lambda trace: torch.ones(trace.shape, dtype=torch.bool),
        "earliest visit": earliest_visit,
        "last visit": lambda trace: last_visit(
            torch.cat([trace["observation"], trace["next", "observation"][:, -1:]], 1)
        ),
        "exits of cells": LastVisitCells(1, keep="exit"),
        "visits of cells": LastVisitCells(1),
        "visits of squares": LastVisitCells(2),
        "exits of squares": LastVisitCells(2, keep="exit"),
        "rising value": RisingValue(network),
        "first rise": first_rise(value),
        "rising distance": RisingDistance(distance),
    }
    by_radius = {
        "exits by radius": LastVisitRadius(0.5, keep="exit"),
        "visits by radius": LastVisitRadius(0.5),
        "visits of discs": LastVisitRadius(1.5),
    }
    found = {name: [] for name in (*masks, *by_radius)}
    for seed in SEEDS:
        traces = sample_traces(
            model, env.goal, num_steps=120, num_traces=800,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        for name, mask in masks.items():
            kept = mask(traces) & traces["collector", "mask"]
            found[name].append(expected_steps(env, imitate(env, traces, kept)))
        floats = traces.select("observation", ("next", "observation")).float()
        for name, mask in by_radius.items():
            kept = mask(floats) & traces["collector", "mask"]
            found[name].append(expected_steps(env, imitate(env, traces, kept)))
    return {**found, "behaviour": [expected_steps(env, UNIFORM)]}


def test_what_is_compared(maze, worth):
    """The behaviour itself, and the claim that imitating every visit only copies it."""
    env, _ = maze
    assert worth["behaviour"] == [pytest.approx(float(steps_to_go(env)[START]))]
    for steps in worth["every visit"]:
        # Hundreds of steps are counted for each pair: the copy is good to some per cent.
        assert steps == pytest.approx(worth["behaviour"][0], rel=0.1)


# The shortest way has 4 steps; the random policy needs 32.
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("last visit", 0.25),
        ("exits of cells", 0.25),
        ("exits by radius", 0.25),
        ("rising value", 0.14),
        ("rising distance", 0.14),
        ("visits of cells", 0.5),
        ("visits by radius", 0.5),
        ("visits of squares", 0.5),
        ("visits of discs", 0.7),
    ],
)
def test_the_right_direction_helps(worth, name, bound):
    for steps, every in zip(worth[name], worth["every visit"], strict=True):
        assert 3.999 <= steps < bound * every


@pytest.mark.parametrize("name", ["earliest visit", "first rise"])
def test_the_wrong_direction_does_not(worth, name):
    for steps, every in zip(worth[name], worth["every visit"], strict=True):
        assert steps > 0.9 * every


def test_exits_of_large_places_lead_nowhere(worth):
    """Near the border of a square only steps across it are left: the policy goes to and fro."""
    assert worth["exits of squares"] == [float("inf")] * len(SEEDS)


def test_the_same_rule_is_the_same_policy(worth):
    """Cells of one state, and a radius below one step, are exact last visit."""
    assert worth["exits of cells"] == worth["last visit"] == worth["exits by radius"]
    assert worth["visits of cells"] == worth["visits by radius"]
    assert worth["rising distance"] == worth["rising value"]

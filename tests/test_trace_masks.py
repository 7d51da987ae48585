"""Masks of traces by progress and place: against their definitions written as loops."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import MultiCategorical
from torchrl.modules import ValueOperator
from trace_data import make_model

from torchrl_recall.trace_masks import (
    LastVisitCells,
    LastVisitRadius,
    RisingDistance,
    RisingValue,
    TraceMask,
)
from torchrl_recall.traces.masks import last_visit

F32, F64 = torch.float32, torch.float64


def make_trace(states, key="observation"):
    """A trace ``[*B, T]`` through states ``[*B, T + 1, D]``."""
    before, after = states[..., :-1, :], states[..., 1:, :]
    trace = TensorDict({}, before.shape[:-1])
    trace[key] = before
    trace["next"] = TensorDict({}, before.shape[:-1])
    trace.set(("next", *((key,) if isinstance(key, str) else key)), after)
    trace["collector", "mask"] = torch.ones(before.shape[:-1], dtype=torch.bool)
    return trace


def random_walks(*batch, num_steps=9, size=2, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(*batch, num_steps + 1, size, generator=generator, dtype=F64)
    return steps.cumsum(-2).to(dtype)


def by_rows(function, values, *rest):
    """Apply a loop over lists to each walk of a batch."""
    rows = values.flatten(0, -2) if values.ndim > 1 else values.unsqueeze(0)
    return torch.tensor([function(row, *rest) for row in rows.tolist()]).reshape(
        *values.shape[:-1], -1
    )


def rising_by_definition(values):
    last = len(values) - 1
    return [all(values[t] < values[u] for u in range(t + 1, last + 1)) for t in range(last)]


def first_coordinate(key="observation", out="state_value"):
    return TensorDictModule(lambda s: s[..., :1], [key], [out])


class TestRisingValue:
    @pytest.mark.parametrize("batch", [(), (7,), (3, 4)])
    @pytest.mark.parametrize("num_steps", [1, 2, 9])
    def test_is_its_definition(self, batch, num_steps):
        walks = random_walks(*batch, num_steps=num_steps)
        # Few levels, so that ties occur, too.
        walks = walks.round()
        found = RisingValue(first_coordinate())(make_trace(walks))
        assert found.tolist() == by_rows(rising_by_definition, walks[..., 0]).tolist()

    def test_keeps_some_and_drops_some(self):
        found = RisingValue(first_coordinate())(make_trace(random_walks(50)))
        assert 0.05 < found.double().mean() < 0.95

    def test_direction(self):
        """From 0 by the detour 2 -> 1 to 3: the last exit from each level, not the first."""
        walk = torch.tensor([[0.0], [2.0], [1.0], [2.0], [3.0]])
        assert RisingValue(first_coordinate())(make_trace(walk)).tolist() == [
            True, False, True, True,
        ]  # fmt: skip

    def test_end_that_no_critic_knows(self):
        """A terminal state has value 0 for most critics: then nothing would ever be kept."""
        walk = torch.tensor([[1.0], [3.0], [2.0], [0.0]])
        assert not RisingValue(first_coordinate())(make_trace(walk)).any()
        without = RisingValue(first_coordinate(), compare_end=False)
        assert without(make_trace(walk)).tolist() == [True, False, True]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_leaves_out_all_that_is_older(self, bad):
        walk = torch.tensor([[0.0], [1.0], [bad], [2.0], [3.0]])
        for compare_end in (True, False):
            mask = RisingValue(first_coordinate(), compare_end=compare_end)
            assert mask(make_trace(walk)).tolist() == [False, False, False, True]
        assert not RisingValue(first_coordinate())(make_trace(walk[:3])).any()

    def test_junk_says_nothing_about_real_steps(self):
        """Junk is older than all that is real, whatever it holds."""
        walks = random_walks(40)
        expected = RisingValue(first_coordinate())(make_trace(walks))
        junk = walks.clone()
        junk[:, :4] = torch.tensor([1e30, -1e30], dtype=F64)
        found = RisingValue(first_coordinate())(make_trace(junk))
        assert torch.equal(found[:, 4:], expected[:, 4:])

    def test_holes_of_last_visit_change_nothing(self):
        """The state of a hole comes again later, so comparing with it or not is the same."""
        walks = random_walks(200, size=1).round().clamp(-2, 2)
        hole = torch.cat([~last_visit(walks), torch.zeros(200, 1, dtype=torch.bool)], 1)
        found = RisingValue(first_coordinate())(make_trace(walks))
        assert hole.any()
        for row, holes, kept in zip(walks[..., 0].tolist(), hole.tolist(), found, strict=True):
            later = [row[u] if not holes[u] else math.inf for u in range(len(row))]
            assert kept.tolist() == [
                not holes[t] and row[t] < min(later[t + 1 :]) for t in range(len(row) - 1)
            ]

    def test_network_is_shared_and_asked_once_without_gradient(self):
        calls = []

        class Value(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(2, 1, dtype=F64)

            def forward(self, state):
                calls.append((tuple(state.shape), torch.is_grad_enabled()))
                return self.layer(state)

        network = ValueOperator(Value(), in_keys=["observation"])
        mask = RisingValue(network)
        trace = make_trace(random_walks(5, 3))
        keys = set(trace.keys(True, True))
        found = mask(trace)
        assert calls == [((5, 3, 10, 2), False)]
        assert set(trace.keys(True, True)) == keys
        assert mask.value_network is network
        # It follows the network.
        with torch.no_grad():
            network.module.layer.weight.mul_(-1)
        assert not torch.equal(mask(trace), found)

    def test_nested_and_renamed_keys(self):
        walks = random_walks(6)
        expected = RisingValue(first_coordinate())(make_trace(walks))
        key = ("agent", "position")
        nested = RisingValue(first_coordinate(key, ("agent", "v")), value_key=("agent", "v"))
        assert torch.equal(nested(make_trace(walks, key)), expected)
        renamed = RisingValue(first_coordinate("state"), in_keys=key)
        assert torch.equal(renamed(make_trace(walks, key)), expected)

    def test_discrete_states(self):
        cells = torch.tensor([[0, 0], [1, 2], [0, 1], [2, 2]])
        value = TensorDictModule(
            lambda s: s.sum(-1, keepdim=True).float(), ["observation"], ["state_value"]
        )
        assert RisingValue(value)(make_trace(cells)).tolist() == [True, False, True]

    def test_refusals(self):
        with pytest.raises(TypeError, match="value_network must be a TensorDictModule, got Linear"):
            RisingValue(nn.Linear(2, 1))  # pyright: ignore
        with pytest.raises(ValueError, match="value_key 'v' is not among the out_keys"):
            RisingValue(first_coordinate(), value_key="v")
        with pytest.raises(ValueError, match="must match the network's"):
            RisingValue(first_coordinate(), in_keys=["a", "b"])
        with pytest.raises(KeyError, match="key 'state' is missing from the trace"):
            RisingValue(first_coordinate("state"))(make_trace(random_walks(2)))
        two = TensorDictModule(lambda s: s, ["observation"], ["state_value"])
        with pytest.raises(ValueError, match=r"'state_value' has shape \(2, 10, 2\)"):
            RisingValue(two)(make_trace(random_walks(2)))


class TestRisingDistance:
    @staticmethod
    def to_end(state, end):
        return (state - end).square().sum(-1)

    @pytest.mark.parametrize("batch", [(), (7,), (3, 4)])
    def test_is_its_definition(self, batch):
        walks = random_walks(*batch).round()
        end = walks[..., -1:, :]
        distance = (walks - end).square().sum(-1)
        expected = by_rows(lambda row: rising_by_definition([-d for d in row]), distance)
        found = RisingDistance(self.to_end)(make_trace(walks))
        assert found.tolist() == expected.tolist()
        if batch:
            assert 0.05 < found.double().mean() < 0.95

    def test_end_is_at_distance_zero_whatever_the_network_says(self):
        walk = torch.tensor([[2.0], [1.0], [0.0]])
        far = RisingDistance(lambda state, end: (state - end).abs().squeeze(-1) + 5)
        assert far(make_trace(walk)).all()
        none = RisingDistance(lambda state, end: torch.zeros(state.shape[:-1]))
        assert not none(make_trace(walk)).any()

    def test_wrong_way_round_keeps_other_steps(self):
        walk = torch.tensor([[4.0], [2.0], [3.0], [1.0], [0.0]])
        mask = RisingDistance(lambda state, end: (state - end).abs().squeeze(-1))
        assert mask(make_trace(walk)).tolist() == [True, False, True, True]

    def test_refusals(self):
        with pytest.raises(TypeError, match="distance must be callable, got float"):
            RisingDistance(1.0)  # pyright: ignore
        with pytest.raises(
            ValueError, match=r"distance gave \(2, 9, 2\), expected a tensor of \(2, 9\)"
        ):
            RisingDistance(lambda state, end: state - end)(make_trace(random_walks(2)))
        with pytest.raises(ValueError, match="in_keys must name at least one key"):
            RisingDistance(self.to_end, in_keys=[])


def last_cell_by_definition(walk, edge, keep):
    cells = [tuple(math.floor(x / edge) for x in state) for state in walk]
    kept = []
    for t in range(len(cells) - 1):
        later = cells[t + 1 :]
        while keep == "visit" and later and later[0] == cells[t]:
            later = later[1:]  # still the same visit
        kept.append(cells[t] not in later)
    return kept


class TestLastVisitCells:
    @pytest.mark.parametrize("batch", [(7,), (3, 4)])
    @pytest.mark.parametrize("edge", [0.25, 1.5, 4.0])
    @pytest.mark.parametrize("keep", ["visit", "exit"])
    def test_is_its_definition(self, batch, edge, keep):
        walks = random_walks(*batch, num_steps=9, seed=3)
        found = LastVisitCells(edge, keep=keep)(make_trace(walks))
        rows = walks.flatten(0, -3).tolist()
        expected = [last_cell_by_definition(walk, edge, keep) for walk in rows]
        assert found.reshape(-1, 9).tolist() == expected
        assert found.any()
        assert edge < 1 or not found.all()

    def test_the_visit_of_the_end_is_kept(self):
        walk = torch.tensor([[1.5], [0.5], [2.5], [0.2], [0.8], [0.6]])
        assert LastVisitCells(1.0)(make_trace(walk)).tolist() == [True, False, True, True, True]
        exits = LastVisitCells(1.0, keep="exit")(make_trace(walk))
        assert exits.tolist() == [True, False, True, False, False]

    def test_one_edge_a_coordinate(self):
        walks = random_walks(20)
        found = LastVisitCells(torch.tensor([2.0, 1e9]))(make_trace(walks))
        shifted = walks.clone()
        shifted[..., 1] = 0
        assert not torch.equal(found, LastVisitCells(2.0)(make_trace(walks)))
        sign = (walks[..., 1:] >= 0).double()
        shifted[..., 1:] = sign
        assert torch.equal(found, LastVisitCells(torch.tensor([2.0, 0.5]))(make_trace(shifted)))

    def test_cells_of_ones_own(self):
        walks = random_walks(20)
        expected = LastVisitCells(1.5)(make_trace(walks))
        for cells in (
            lambda s: (s / 1.5).floor().long(),
            lambda s: ((s / 1.5).floor() * torch.tensor([1, 1000])).sum(-1).long(),
        ):
            assert torch.equal(LastVisitCells(cells)(make_trace(walks)), expected)

    def test_discrete_states_and_huge_ones(self):
        cells = torch.tensor([[0], [1], [2], [1], [5]])
        assert LastVisitCells(1)(make_trace(cells)).tolist() == [True, False, True, True]
        assert LastVisitCells(2)(make_trace(cells)).tolist() == [False, False, True, True]
        far = torch.tensor([[1e30], [2e30], [1e30], [0.0]])
        assert LastVisitCells(1.0)(make_trace(far)).tolist() == [False, True, True]
        with pytest.raises(
            ValueError, match=r"keep must be one of \('visit', 'exit'\), got 'first'"
        ):
            LastVisitCells(1, keep="first")  # pyright: ignore

    def test_refusals(self):
        for bad in (0.0, -1.0, math.nan, [1.0, 0.0]):
            with pytest.raises(ValueError, match="cell_size must be positive and finite"):
                LastVisitCells(bad)
        with pytest.raises(TypeError, match="cell_size must be a number"):
            LastVisitCells("large")  # pyright: ignore
        with pytest.raises(TypeError, match=r"cell_size gave torch\.float64"):
            LastVisitCells(lambda s: s)(make_trace(random_walks(2)))
        with pytest.raises(ValueError, match=r"cell_size gave shape \(10,\)"):
            LastVisitCells(lambda s: s[0, :, 0].long())(make_trace(random_walks(2)))


def radius_by_definition(walk, radius, keep):
    kept = []
    for t in range(len(walk) - 1):
        near = [math.dist(walk[t], other) <= radius for other in walk[t + 1 :]]
        while keep == "visit" and near and near[0]:
            near = near[1:]  # not gone yet
        kept.append(not any(near))
    return kept


class TestLastVisitRadius:
    @pytest.mark.parametrize("batch", [(), (7,), (3, 4)])
    @pytest.mark.parametrize("radius", [0.0, 1.0, 2.5])
    @pytest.mark.parametrize("keep", ["visit", "exit"])
    def test_is_its_definition(self, batch, radius, keep):
        walks = random_walks(*batch)
        found = LastVisitRadius(radius, keep=keep)(make_trace(walks))
        rows = walks.reshape(-1, *walks.shape[-2:]).tolist()
        expected = [radius_by_definition(walk, radius, keep) for walk in rows]
        assert found.reshape(-1, 9).tolist() == expected

    def test_no_radius_is_last_visit(self):
        walks = random_walks(100).round().clamp(-1, 1)
        found = LastVisitRadius(0.0, keep="exit")(make_trace(walks))
        assert torch.equal(found, last_visit(walks))
        assert not found.all()

    def test_short_steps(self):
        """A straight walk in steps of 0.1 is one visit of each place, and no exit from any."""
        walk = torch.arange(0, 41, dtype=F64).unsqueeze(-1) / 10
        assert LastVisitRadius(0.25)(make_trace(walk)).all()
        assert not LastVisitRadius(0.25, keep="exit")(make_trace(walk)).any()
        # There and back again: only what is not passed a second time.
        kept = LastVisitRadius(0.25)(make_trace(torch.cat([walk[:21], walk[:20].flip(0)])))
        assert kept.tolist() == [False] * 18 + [True] * 22

    def test_scale(self):
        walks = random_walks(30)
        scale = torch.tensor([0.5, 3.0])
        expected = LastVisitRadius(1.0)(make_trace(walks / scale))
        assert torch.equal(LastVisitRadius(1.0, scale=scale)(make_trace(walks)), expected)
        model = make_model()  # with statistics of random data
        walks = random_walks(30, size=3)
        by_model = LastVisitRadius(1.0, scale=model)
        std = model.observation.normalizer.std
        expected = LastVisitRadius(1.0)(make_trace(walks / std))
        assert torch.equal(by_model(make_trace(walks)), expected)
        model.observation.normalizer.variance.mul_(1e6)  # read anew at each call
        assert by_model(make_trace(walks)).all()

    def test_refusals(self):
        with pytest.raises(ValueError, match="radius must lie in"):
            LastVisitRadius(-0.1)
        with pytest.raises(ValueError, match=r"keep must be one of \('visit', 'exit'\), got 'all'"):
            LastVisitRadius(1.0, keep="all")  # pyright: ignore
        with pytest.raises(ValueError, match="scale must be positive"):
            LastVisitRadius(1.0, scale=0.0)
        with pytest.raises(ValueError, match="scale is a model of discrete observations"):
            LastVisitRadius(1.0, scale=make_model("support", "categorical"))
        with pytest.raises(ValueError, match="scale has 3 coordinates, but states have 2"):
            LastVisitRadius(1.0, scale=torch.ones(3))(make_trace(random_walks(2)))
        cells = MultiCategorical([3, 3]).rand((5, 4))
        with pytest.raises(TypeError, match=r"needs continuous states, got dtype torch\.int64"):
            LastVisitRadius(1.0)(make_trace(cells))


MASKS = {
    "value": lambda: RisingValue(ValueOperator(nn.Linear(2, 1), in_keys=["observation"])),
    "distance": lambda: RisingDistance(TestRisingDistance.to_end),
    "cells": lambda: LastVisitCells(1.5),
    "radius": lambda: LastVisitRadius(1.0, scale=torch.tensor([1.0, 2.0])),
}


@pytest.mark.parametrize("name", MASKS)
def test_copies_and_dtypes(name):
    torch.manual_seed(0)
    mask = MASKS[name]()
    assert isinstance(mask, TraceMask)
    trace = make_trace(random_walks(30, dtype=F32))
    found = mask(trace)
    assert found.dtype == torch.bool
    assert 0 < found.sum() < found.numel()
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert torch.equal(other(trace), found)
    if name != "value":
        double = mask(make_trace(random_walks(30, dtype=F64)))
        assert (double != found).sum() <= 2  # rounding, at the edge of a cell


@pytest.mark.parametrize("name", ["distance", "cells", "radius"])
def test_several_keys_are_concatenated(name):
    mask = MASKS[name]()
    walks = random_walks(30, dtype=F32)
    expected = mask(make_trace(walks))
    mask.in_keys = ["x", ("deep", "y")]
    trace = make_trace(walks[..., :1], "x")
    other = make_trace(walks[..., 1:], ("deep", "y"))
    trace["deep"], trace["next", "deep"] = other["deep"], other["next", "deep"]
    assert torch.equal(mask(trace), expected)

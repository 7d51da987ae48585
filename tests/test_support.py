"""Where the data are: neighbour distances by their definition, cells by sets of tuples."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    Categorical,
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    MultiCategorical,
    OneHot,
    TensorDictReplayBuffer,
)
from torchrl.envs import Compose, DoubleToFloat, ObservationNorm

from torchrl_recall import BacktrackModel, CellSupport, DataSupport

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(number, size=2, seed=0, dtype=F64):
    return torch.randn(number, size, generator=generator(seed), dtype=F64).to(dtype)


def as_data(states, key="observation"):
    return TensorDict({}, states.shape[:-1]).set(key, states)


def copies(support):
    fresh = copy.deepcopy(support)
    fresh._known = fresh._visited = None
    fresh.load_state_dict(support.state_dict())
    return [copy.deepcopy(support), pickle.loads(pickle.dumps(support)), fresh]


def inside_by_definition(data, queries, k, quantile, factor):
    """Loops over all pairs, in Python's own numbers."""
    count, size = data.shape
    mean = [sum(row[d] for row in data.tolist()) / count for d in range(size)]
    std = [
        max(math.sqrt(sum((row[d] - mean[d]) ** 2 for row in data.tolist()) / count), 1e-4)
        for d in range(size)
    ]

    def distance(a, b):
        return math.sqrt(sum(((x - y) / s) ** 2 for x, y, s in zip(a, b, std, strict=True)))

    points = data.tolist()
    own = sorted(
        sorted(distance(a, b) for j, b in enumerate(points) if j != i)[k - 1]
        for i, a in enumerate(points)
    )
    place = quantile * (count - 1)
    low, high = own[math.floor(place)], own[math.ceil(place)]
    threshold = factor * (low + (high - low) * (place - math.floor(place)))
    near = [sorted(distance(q, b) for b in points)[k - 1] for q in queries.tolist()]
    return threshold, [d <= threshold for d in near]


class TestDataSupport:
    @pytest.mark.parametrize("k", [1, 5])
    @pytest.mark.parametrize(("quantile", "factor"), [(0.95, 1.5), (0.5, 1.0), (1.0, 0.7)])
    def test_is_its_definition(self, k, quantile, factor):
        data = rows(60) * torch.tensor([1.0, 100.0])
        queries = 2 * rows(80, seed=1) * torch.tensor([1.0, 100.0])
        support = DataSupport(num_neighbours=k, quantile=quantile, factor=factor)
        found = support.fit(as_data(data))(queries)
        threshold, expected = inside_by_definition(data, queries, k, quantile, factor)
        assert float(support.threshold) == pytest.approx(threshold, rel=1e-9)
        assert found.tolist() == expected
        assert 0 < sum(expected) < 80
        torch.testing.assert_close(support.std, data.std(0, correction=0))

    def test_share_of_fresh_data_that_is_inside(self):
        """With factor 1, the share of the same law's states that is inside is the quantile."""
        support = DataSupport(num_references=1500, factor=1.0, quantile=0.9, generator=generator())
        support.fit(as_data(rows(20_000)))
        share = float(support(rows(20_000, seed=9)).double().mean())
        # Two estimates of a quantile, of 1500 points each: standard errors of about 0.008.
        assert share == pytest.approx(0.9, abs=0.035)

    def test_data_far_from_zero_and_close_to_each_other(self):
        """Float32 states of 1000 ± 0.01: their distances survive."""
        data = (1000 + 0.01 * rows(500)).float()
        support = DataSupport(quantile=0.5, factor=1.0).fit(as_data(data))
        exact = DataSupport(quantile=0.5, factor=1.0).fit(as_data(data.double()))
        torch.testing.assert_close(support.threshold, exact.threshold)
        queries = (1000 + 0.02 * rows(200, seed=1)).float()
        assert torch.equal(support(queries), exact(queries.double()))
        assert 0 < support(queries).sum() < 200

    @pytest.mark.parametrize("k", [1, 3])
    def test_data_that_repeat(self, k):
        """Most are at no distance from each other: those that differ say what is near."""
        data = torch.arange(5.0).repeat(20).unsqueeze(-1)
        support = DataSupport(num_neighbours=k, quantile=1.0).fit(as_data(data))
        # 0 to 4: 1 to the nearest, from the ends 3 to the third nearest one.
        assert float(support.threshold * support.std) == pytest.approx(1.5 * k)
        # From outside the third nearest is two further in than the nearest.
        far = 1.5 * k - (k - 1)
        queries = torch.tensor([[3.0], [2.5], [-far + 0.01], [-far - 0.01], [4 + far - 0.01]])
        assert support(queries).tolist() == [True, True, True, False, True]
        assert support(data).all()

    @pytest.mark.parametrize("k", [1, 4, 20])
    def test_two_states_and_one(self, k):
        """Fewer states that differ than neighbours are asked for."""
        two = torch.tensor([[0.0, 7.0], [1.0, 7.0]], dtype=F64).repeat(20, 1)
        support = DataSupport(num_neighbours=k).fit(as_data(two))
        assert support(two).all()
        inside = support(torch.tensor([[0.5, 7.0], [2.4, 7.0], [9.0, 7.0], [0.5, 7.1]], dtype=F64))
        assert inside.tolist() == [True, True, False, False]
        one = DataSupport(num_neighbours=k).fit(as_data(two[:1].repeat(30, 1)))
        assert one(two[:3]).tolist() == [True, False, True]
        assert float(one.threshold) == 0

    def test_repeats_far_from_the_rest(self):
        """Rounding of large squares makes no distances of none."""
        data = torch.cat([rows(100, 50), 1e4 + rows(1, 50, seed=2).repeat(1000, 1)])
        support = DataSupport(quantile=0.5).fit(as_data(data))
        expected = DataSupport(quantile=0.5, factor=1.5).fit(as_data(data[:101]))
        scale = support.std / expected.std
        assert float(support.threshold * scale.mean()) == pytest.approx(
            float(expected.threshold), rel=0.1
        )
        assert support(data).all()

    def test_a_ring_has_a_hole(self):
        angle = torch.rand(3000, generator=generator(), dtype=F64) * 2 * math.pi
        ring = torch.stack([angle.cos(), angle.sin()], -1)
        support = DataSupport(num_references=500, generator=generator()).fit(as_data(ring))
        assert support(ring).double().mean() > 0.98
        assert not support(torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.5, 0.0]], dtype=F64)).any()

    def test_draws_references_without_replacement(self):
        data = torch.arange(1000.0).unsqueeze(-1)
        support = DataSupport(num_references=300, generator=generator()).fit(as_data(data))
        drawn = support._fitted().states * support.std + support._fitted().mean
        assert len(drawn.round().unique()) == 300
        few = DataSupport(num_references=300).fit(as_data(data[:100]))
        assert len(few._fitted().states) == 100

    def test_reproducible(self):
        data = as_data(rows(1000))
        one, other, third = (
            DataSupport(num_references=50, generator=generator(s)).fit(data).threshold
            for s in (0, 0, 1)
        )
        assert one == other != third

    def test_state_goes_on_like_the_original(self):
        data, queries = as_data(rows(1000)), rows(100, seed=3)
        support = DataSupport(num_references=50).fit(data)
        found = support(queries)
        again = [other(queries) for other in copies(support)]
        assert all(torch.equal(found, one) for one in again)
        expected = [copied.fit(data).threshold for copied in copies(support)]
        assert all(threshold == expected[0] for threshold in expected)
        with pytest.raises(KeyError, match="state_dict lacks"):
            support.load_state_dict({k: v for k, v in support.state_dict().items() if k != "mean"})
        unfitted = DataSupport()
        unfitted.load_state_dict(DataSupport().state_dict())
        with pytest.raises(RuntimeError, match="call fit"):
            unfitted(queries)

    def test_pieces_are_the_whole(self, monkeypatch):
        data, queries = as_data(rows(300)), 2 * rows(101, seed=1)
        whole = DataSupport(generator=generator()).fit(data)
        monkeypatch.setattr("torchrl_recall.support.data_support.MAX_DISTANCES", 7 * 300)
        pieces = DataSupport(generator=generator()).fit(data)
        torch.testing.assert_close(whole.threshold, pieces.threshold)
        assert torch.equal(whole(queries), pieces(queries))

    def test_one_reference_from_each_cell(self):
        data = torch.cat([0.02 * rows(2000), 5 + 0.02 * rows(3, seed=1), rows(40, seed=2)])
        support = DataSupport(
            "observation", num_references=10_000, cell_size=0.5, generator=generator()
        ).fit(as_data(data))
        edge = 0.5 * data.std(0, correction=0)
        cells = {tuple(cell) for cell in (data / edge).floor().long().tolist()}
        known = support._known
        references = known.states * known.std + known.mean
        found = [tuple(cell) for cell in (references / edge).floor().long().tolist()]
        assert len(found) == len(cells)
        assert set(found) == cells
        # References are data, not corners of cells.
        apart = (references[:, None] - data).norm(dim=-1)
        assert apart.amin(1).max() < 1e-9

    def test_what_is_rare_is_among_the_references_of_cells(self):
        crowd, path = (
            0.1 * rows(20_000),
            torch.linspace(1, 4, 40, dtype=F64)[:, None] * torch.ones(2),
        )
        data = as_data(torch.cat([crowd, path]))
        inside = {}
        for cell_size in (None, 0.25):
            support = DataSupport(
                "observation", num_references=1000, cell_size=cell_size, generator=generator()
            )
            inside[cell_size] = support.fit(data)(path).double().mean()
            assert not support(torch.tensor([[1.0, 4.0]], dtype=F64))
        assert inside[None] < 0.2
        assert inside[0.25] == 1

    def test_few_cells_still_leave_neighbours(self):
        data = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=F64)
        for size in (1e-3, 0.5):
            support = DataSupport("observation", num_references=1, cell_size=size)
            assert support.fit(as_data(data))(data).any()
        with pytest.raises(ValueError, match="lie in 1 cell"):
            DataSupport("observation", cell_size=100.0).fit(as_data(data + 10))
        with pytest.raises(ValueError, match="cell_size"):
            DataSupport("observation", cell_size=0.0)

    def test_shapes_and_what_is_not_finite(self):
        support = DataSupport().fit(as_data(rows(100)))
        queries = rows(24, seed=1).reshape(2, 3, 4, 2)
        assert support(queries).shape == (2, 3, 4)
        assert torch.equal(support(as_data(queries)), support(queries))
        assert support(queries[0, 0, 0]).shape == ()
        assert support(queries[:0]).shape == (0, 3, 4)
        bad = torch.tensor([[math.nan, 0], [math.inf, 0], [0, 0]], dtype=F64)
        assert support(bad).tolist() == [False, False, True]
        assert support(torch.zeros(1, 2)).tolist() == [True]  # float32

    def test_gaps_in_the_data_do_not_count(self):
        states = rows(60)
        dirty = states.clone()
        dirty[::3] = math.nan
        dirty[1::3] += 50
        data = as_data(dirty)
        data["collector", "mask"] = torch.arange(60) % 3 == 2
        support = DataSupport(num_references=40, generator=generator()).fit(data)
        clean = DataSupport(num_references=40).fit(as_data(states[2::3]))
        torch.testing.assert_close(support.threshold, clean.threshold)
        assert len(support._fitted().states) == 20

    def test_nested_and_several_keys(self):
        states = rows(100, 3)
        data = TensorDict({"a": {"x": states[:, :2]}, "y": states[:, 2]}, [100])
        support = DataSupport([("a", "x"), "y"]).fit(data)
        assert float(support.threshold) == pytest.approx(
            float(DataSupport().fit(as_data(states)).threshold)
        )
        model = BacktrackModel({("a", "x"): 2, "y": 1}, 1, num_cells=(8,))
        assert DataSupport(model).keys == [("a", "x"), "y"]

    def test_refusals(self):
        with pytest.raises(ValueError, match="observation is discrete"):
            DataSupport(BacktrackModel(Categorical(3), 1, num_cells=(8,)))
        with pytest.raises(ValueError, match=r"quantile must lie in \[0\.0, 1\.0\]"):
            DataSupport(quantile=95)
        with pytest.raises(ValueError, match="factor must be positive"):
            DataSupport(factor=0.0)
        with pytest.raises(ValueError, match="num_neighbours must be at least 1"):
            DataSupport(num_neighbours=0)
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator"):
            DataSupport(generator=3)  # pyright: ignore
        with pytest.raises(KeyError, match="key 'observation' is missing from the data"):
            DataSupport().fit(as_data(rows(5), "state"))
        with pytest.raises(ValueError, match="data has 5 finite states, expected more than"):
            DataSupport(num_neighbours=5).fit(as_data(rows(5)))
        with pytest.raises(ValueError, match="expected floating-point states; CellSupport"):
            DataSupport().fit(as_data(torch.ones(5, 2, dtype=torch.int64)))
        with pytest.raises(TypeError, match="data must be a TensorDict, or a Storage"):
            DataSupport().fit(rows(5))
        with pytest.raises(ValueError, match="data is empty"):
            DataSupport().fit(TensorDictReplayBuffer(storage=LazyTensorStorage(5)))
        with pytest.raises(ValueError, match=r"state has shape \(5, 3\), expected \[\*B, 2\]"):
            DataSupport().fit(as_data(rows(50)))(rows(5, 3))


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage, ListStorage])
@pytest.mark.parametrize("kind", ["data", "cells"])
def test_fitted_on_buffers_past_their_transforms(storage, kind):
    states = rows(300, dtype=torch.float32)

    def make():
        return (
            DataSupport(num_references=500)
            if kind == "data"
            else CellSupport("observation", cell_size=0.5)
        )

    expected = make().fit(as_data(states))
    queries = 3 * rows(200, seed=2, dtype=torch.float32)
    shift = ObservationNorm(loc=5.0, scale=9.0, in_keys=["observation"])
    buffer = TensorDictReplayBuffer(
        storage=storage(400), batch_size=8, transform=Compose(shift, DoubleToFloat())
    )
    buffer.extend(as_data(states))
    for source in (buffer, buffer.storage):
        assert torch.equal(make().fit(source)(queries), expected(queries))
    assert 0 < expected(queries).sum() < 200


def test_storage_of_two_dimensions():
    states = rows(300, dtype=torch.float32)
    queries = 2 * rows(200, seed=2, dtype=torch.float32)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(600, ndim=2), batch_size=8)
    buffer.extend(as_data(states.reshape(6, 50, 2)))
    for make in (lambda: DataSupport(num_references=500), lambda: CellSupport(cell_size=0.5)):
        expected = make().fit(as_data(states))(queries)
        assert torch.equal(make().fit(buffer)(queries), expected)


class TestCellSupport:
    @pytest.mark.parametrize("edge", [0.3, 1.0])
    def test_cells_are_sets_of_tuples(self, edge):
        data, queries = rows(400, 3), rows(400, 3, seed=1)
        visited = {tuple(math.floor(x / edge) for x in row) for row in data.tolist()}
        expected = [tuple(math.floor(x / edge) for x in row) in visited for row in queries.tolist()]
        support = CellSupport(cell_size=edge).fit(as_data(data))
        assert support(queries).tolist() == expected
        assert 0 < sum(expected) < 400
        assert support(data).all()

    def test_hashes_tell_cells_apart(self):
        """All 250 000 cells of a plane, half of them visited, neighbours and all signs."""
        side = torch.arange(-250, 250)
        cells = torch.cartesian_prod(side, side)
        odd = (cells.sum(-1) % 2) == 1
        support = CellSupport().fit(as_data(cells[odd]))
        assert torch.equal(support(cells), odd)

    @pytest.mark.parametrize(
        "spec",
        [MultiCategorical([5, 7]), Categorical(9), OneHot(6), MultiCategorical([5000, 5000])],
    )
    def test_discrete_models(self, spec):
        torch.manual_seed(0)
        support = torch.tensor([[0, 1]]) if isinstance(spec, MultiCategorical) else None
        model = BacktrackModel(spec, 1, num_cells=(8,), delta_support=support)
        inside = CellSupport(model)
        assert inside.is_table == (model.observation.num_states < 2**24)
        data = TensorDict({"observation": spec.rand((20,))}, [20])
        inside.fit(data)
        states = model.observation.read(data)
        visited = {tuple(row) for row in states.tolist()}
        every = TensorDict({"observation": spec.rand((300,))}, [300])
        flat = model.observation.read(every)
        expected = [tuple(row) in visited for row in flat.tolist()]
        assert inside(flat).tolist() == expected == inside(every).tolist()
        assert inside(states).all()
        for other in copies(inside):
            assert torch.equal(other(flat), inside(flat))
        if inside.is_table:
            assert not inside(flat - 100).any()  # states that do not exist

    def test_extend_adds_and_fit_replaces(self):
        first, second = torch.tensor([[0], [1]]), torch.tensor([[5]])
        every = torch.tensor([[0], [1], [5], [7]])
        support = CellSupport().fit(as_data(first)).extend(as_data(second))
        assert support(every).tolist() == [True, True, True, False]
        before = support._visited
        assert support.fit(as_data(second))(every).tolist() == [False, False, True, False]
        assert len(before) == 3  # a thread that still looks at it is not disturbed

    def test_padding_and_what_is_not_finite(self):
        spec = MultiCategorical([3, 3])
        model = BacktrackModel(spec, 1, num_cells=(8,), delta_support=torch.tensor([[0, 1]]))
        data = as_data(torch.tensor([[0, 0], [9, 9], [1, 1]]))
        data["collector", "mask"] = torch.tensor([[True], [False], [True]])
        assert CellSupport(model).fit(data)(torch.tensor([[0, 0], [1, 1], [2, 2]])).tolist() == [
            True, True, False,
        ]  # fmt: skip
        gaps = torch.tensor([[0.5], [math.nan], [math.inf], [1e30]])
        support = CellSupport(cell_size=1.0).fit(as_data(gaps))
        assert support(gaps).tolist() == [True, False, False, True]

    def test_refusals(self):
        with pytest.raises(ValueError, match="cell_size is needed for continuous observations"):
            CellSupport(BacktrackModel(2, 1, num_cells=(8,)))
        with pytest.raises(ValueError, match=r"hold torch\.float64; cell_size is needed"):
            CellSupport().fit(as_data(rows(5)))
        with pytest.raises(ValueError, match="cell_size must be positive"):
            CellSupport(cell_size=0.0)
        with pytest.raises(RuntimeError, match="call fit"):
            CellSupport()(torch.zeros(1, 1))
        with pytest.raises(ValueError, match=r"expected \[\*B, 2\]"):
            CellSupport(cell_size=1.0).fit(as_data(rows(5)))(rows(5, 3))

"""Masks by other knowledge: an ensemble, a forward model, the data."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from test_trace_masks import make_trace, random_walks
from torch import nn
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    MultiCategorical,
    TensorDictReplayBuffer,
)

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    CellSupport,
    DataSupport,
    sample_traces,
)
from torchrl_recall.model.disagreement import disagreement
from torchrl_recall.trace_masks import Disagreement, ForwardAgreement, InSupport

CELLS = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def cut_by_definition(good):
    """Keep a step only if it and all later ones are good."""
    return [[all(row[t:]) for t in range(len(row))] for row in good]


def ensemble(observation=3, **options):
    return BacktrackModel(observation, 2, num_cells=(16,), num_members=4, **options)


def transitions(number, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows(size):
        return torch.randn(number, size, generator=generator)

    action = rows(2).clamp(-0.9, 0.9)
    return TensorDict(
        {"observation": rows(3), "action": action, "next": {"observation": rows(3)}}, [number]
    )


class TestDisagreement:
    @pytest.mark.parametrize("discrete", [False, True])
    @pytest.mark.parametrize("num_traces", [None, 3])
    def test_cuts_at_the_first_step_that_exceeds(self, discrete, num_traces):
        spec, support = (MultiCategorical([6, 6]), CELLS) if discrete else (3, None)
        model = ensemble(spec, delta_support=support)
        start = spec.rand((20,)) if discrete else torch.randn(20, 3)
        trace = sample_traces(model, start, num_steps=7, num_traces=num_traces)
        following = model.observation.read(trace, model.next_observation_keys)
        action = model.action.read(trace, "action", model.device)
        found = disagreement(model, action, following).detach()
        threshold = float(found.median())
        kept = Disagreement(model, max_disagreement=threshold)(trace)
        assert kept.shape == trace.shape
        good = (found <= threshold).reshape(-1, 7).tolist()
        assert kept.reshape(-1, 7).tolist() == cut_by_definition(good)
        assert 0 < kept.sum() < kept.numel()

    def test_calibrated_on_real_data(self):
        model, data = ensemble(), transitions(1000)
        mask = Disagreement(model)
        with pytest.raises(RuntimeError, match="max_disagreement is not set"):
            mask(data.reshape(100, 10))
        found = disagreement(model, data["action"], data["next", "observation"]).detach()
        for quantile in (0.5, 0.9):
            mask.calibrate(data, quantile)
            assert (found <= mask.max_disagreement).double().mean() == pytest.approx(
                quantile, abs=2e-3
            )
        one_step = mask(data.unsqueeze(-1)).squeeze(-1)
        assert torch.equal(one_step, found <= mask.max_disagreement)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(2000), batch_size=8)
        buffer.extend(data)
        assert Disagreement(model).calibrate(buffer, 0.9) == mask.max_disagreement
        assert Disagreement(model).calibrate(data.reshape(10, 100), 0.9) == mask.max_disagreement
        dirty = torch.cat([data, 100 * transitions(50, seed=1)])
        dirty["action"].clamp_(-0.9, 0.9)
        dirty["collector", "mask"] = torch.arange(1050) < 1000
        assert Disagreement(model).calibrate(dirty, 0.9) == mask.max_disagreement
        fewer = Disagreement(model).calibrate(data, 0.9, num_rows=100)
        assert fewer == pytest.approx(float(torch.quantile(found[::10], 0.9)))

    @pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
    @pytest.mark.parametrize("shape", [(12, 50), (4, 3, 50), (600,)])
    def test_calibrated_on_few_rows_of_all_dimensions(self, storage, shape):
        """All environments and all times take part, however many rows are looked at."""
        model, data = ensemble(), transitions(600).reshape(shape)
        data["next", "observation"] *= torch.linspace(0.1, 10, shape[-1]).unsqueeze(-1)
        for source in (data, self.stored(storage, data)):
            for num_rows in (600, 301, 100, 12):
                seen = self.rows_looked_at(Disagreement(model), source, num_rows)
                assert num_rows / 5 <= len(seen) <= num_rows
                places = {tuple(row) for row in seen.tolist()}
                assert len(places) == len(seen)
                flat = data["next", "observation"].reshape(600, 3).tolist()
                index = [i for i, row in enumerate(flat) if tuple(row) in places]
                assert len(index) == len(seen)
                steps = {b - a for a, b in itertools.pairwise(index)}
                assert len(steps) == 1 or source is not data  # evenly spaced, as it lies there
                if len(shape) > 1 and num_rows >= 100:
                    assert {i % 50 for i in index} == set(range(50))
                    assert {i // 50 for i in index} == set(range(12))

    def stored(self, storage, data):
        kept = storage(600, ndim=data.ndim)
        buffer = TensorDictReplayBuffer(storage=kept, batch_size=8)
        buffer.extend(data)
        return buffer

    def rows_looked_at(self, mask, source, num_rows):
        """The next states that calibration reads, in any order."""
        read, seen = mask.model.read, []
        mask.model.read = lambda data: seen.append(read(data)) or seen[0]
        mask.calibrate(source, 0.9, num_rows=num_rows)
        del mask.model.read
        return seen[0][2]

    def test_ensemble_that_was_fitted_here_and_not_there(self):
        """Traces from where the data are stay longer than those from far away."""
        model = BacktrackModel(1, 1, num_cells=(32,), num_members=5)
        loss = BacktrackLoss(model)
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        state = torch.rand(2000, 1)
        action = 2 * torch.rand(2000, 1) - 1
        data = TensorDict(
            {"observation": state, "action": action, "next": {"observation": state + action / 10}},
            [2000],
        )
        for step in range(150):
            optimizer.zero_grad()
            loss(data[step % 10 :: 10])["loss_backtrack"].backward()
            optimizer.step()
        model.eval()
        mask = Disagreement(model)
        mask.calibrate(data, 0.99)
        near = mask(sample_traces(model, torch.full((200, 1), 0.5), num_steps=3))
        far = mask(sample_traces(model, torch.full((200, 1), 20.0), num_steps=3))
        assert near.double().mean() > 0.8
        assert far.double().mean() < 0.2

    def test_refusals_and_copies(self):
        model = ensemble()
        with pytest.raises(TypeError, match="model must be a BacktrackModel, got Linear"):
            Disagreement(nn.Linear(1, 1))  # pyright: ignore
        with pytest.raises(ValueError, match="model has num_members=1, expected"):
            Disagreement(BacktrackModel(3, 2, num_cells=(8,)))
        with pytest.raises(ValueError, match="max_disagreement must lie in"):
            Disagreement(model, max_disagreement=-1.0)
        mask, data = Disagreement(model), transitions(100)
        with pytest.raises(ValueError, match="quantile must lie in"):
            mask.calibrate(data, 95)
        with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
            mask.calibrate(data, num_rows=0)
        padding = TensorDict({"collector": {"mask": torch.zeros(100, 1) > 0}}, [100])
        with pytest.raises(ValueError, match="data has no row to look at: all 100 are masked"):
            mask.calibrate(data.clone().update(padding))
        mask.calibrate(data, 0.5)
        trace = data.reshape(10, 10)
        restored = Disagreement(model)
        restored.load_state_dict(mask.state_dict())
        for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), restored):
            assert torch.equal(other(trace), mask(trace))
            assert other.max_disagreement == mask.max_disagreement


def forward_model(function=lambda s, a: s + a, out=("next", "observation")):
    return TensorDictModule(function, ["observation", "action"], [out])


def walk_with_actions(num_steps=6, batch=(40,), error=1.0):
    """Traces of ``s' = s + a + error``, in two dimensions."""
    states = random_walks(*batch, num_steps=num_steps)
    trace = make_trace(states)
    noise = error * torch.randn(*batch, num_steps, 2, dtype=torch.float64)
    trace["action"] = trace["next", "observation"] - trace["observation"] - noise
    return trace, noise


class TestForwardAgreement:
    @pytest.mark.parametrize("cut", [False, True])
    @pytest.mark.parametrize("relative", [False, True])
    @pytest.mark.parametrize("scale", [1.0, [0.5, 4.0]])
    def test_is_its_definition(self, cut, relative, scale):
        trace, noise = walk_with_actions()
        factors = torch.as_tensor(scale, dtype=torch.float64).expand(2).tolist()
        steps = trace["next", "observation"] - trace["observation"]

        def length(row):
            return (sum((x / s) ** 2 for x, s in zip(row, factors, strict=True)) / 2) ** 0.5

        good = [
            [
                length(e) <= 0.8 * (length(step) if relative else 1)
                for e, step in zip(errors, walk, strict=True)
            ]
            for errors, walk in zip(noise.tolist(), steps.tolist(), strict=True)
        ]
        mask = ForwardAgreement(forward_model(), 0.8, scale=scale, relative=relative, cut=cut)
        assert mask(trace).tolist() == (cut_by_definition(good) if cut else good)
        assert 0 < sum(map(sum, good)) < 240

    def test_the_true_forward_model_agrees_with_real_steps(self):
        trace, _ = walk_with_actions(error=0.0)
        assert ForwardAgreement(forward_model(), 1e-9)(trace).all()
        assert not ForwardAgreement(forward_model(lambda s, a: s - a), 1e-9)(trace).any()

    def test_predictions_that_are_no_numbers(self):
        trace, _ = walk_with_actions(error=0.0)
        mask = ForwardAgreement(forward_model(lambda s, a: (s + a) * torch.nan), 1.0)
        assert not mask(trace).any()
        still = trace.clone()
        still["next", "observation"] = still["observation"].clone()
        still["action"].zero_()
        assert ForwardAgreement(forward_model(), 0.0, relative=True)(still).all()

    def test_junk_does_not_cut_real_steps(self):
        trace, _ = walk_with_actions(error=0.0)
        trace["observation"][:, :3] = 1e30
        kept = ForwardAgreement(forward_model(), 1e-6, cut=True)(trace)
        assert kept.tolist() == [[False] * 3 + [True] * 3] * 40

    def test_keys(self):
        trace, _ = walk_with_actions()
        expected = ForwardAgreement(forward_model(), 0.8)(trace)
        nested = trace.select("action")
        nested["agent", "x"] = trace["observation"][..., :1]
        nested["y"] = trace["observation"][..., 1]
        nested["next", "agent", "x"] = trace["next", "observation"][..., :1]
        nested["next", "y"] = trace["next", "observation"][..., 1]
        network = TensorDictModule(
            lambda x, y, a: (x + a[..., :1], y + a[..., 1]),
            [("agent", "x"), "y", "action"],
            ["x_out", ("deep", "y_out")],
        )
        mask = ForwardAgreement(network, 0.8, in_keys=[("agent", "x"), "y"])
        assert torch.equal(mask(nested), expected)
        assert "x_out" not in nested
        only = ForwardAgreement(network, 0.8, in_keys="y", prediction_keys=("deep", "y_out"))
        assert not torch.equal(only(nested), expected)

    def test_refusals(self):
        with pytest.raises(TypeError, match="forward_model must be a TensorDictModule"):
            ForwardAgreement(nn.Linear(2, 2), 1.0)  # pyright: ignore
        with pytest.raises(ValueError, match="tolerance must lie in"):
            ForwardAgreement(forward_model(), -1.0)
        with pytest.raises(ValueError, match="must match in_keys"):
            ForwardAgreement(forward_model(), 1.0, in_keys=["a", "b"])
        trace, _ = walk_with_actions()
        with pytest.raises(KeyError, match="key 'action' is missing from the trace"):
            ForwardAgreement(forward_model(), 1.0)(trace.exclude("action"))
        with pytest.raises(ValueError, match=r"prediction_keys hold states of \(40, 6, 1\)"):
            ForwardAgreement(forward_model(lambda s, a: s[..., :1]), 1.0)(trace)
        cells = make_trace(torch.zeros(2, 4, 1, dtype=torch.int64))
        cells["action"] = torch.zeros(2, 3, 1, dtype=torch.int64)
        with pytest.raises(TypeError, match="ForwardAgreement needs continuous states"):
            ForwardAgreement(forward_model(), 1.0)(cells)


class TestInSupport:
    def test_cuts_where_the_data_end(self):
        walks = random_walks(60)
        support = DataSupport(num_references=500).fit(make_trace(random_walks(3, seed=5)))
        inside = support(walks[:, :-1])
        kept = InSupport(support)(make_trace(walks))
        assert kept.tolist() == cut_by_definition(inside.tolist())
        assert 0 < kept.sum() < kept.numel()

    def test_the_end_is_not_asked(self):
        walk = torch.tensor([[0.0], [1.0], [99.0]])
        support = CellSupport(cell_size=1.0).fit(TensorDict({"observation": walk[:2]}, [2]))
        assert InSupport(support)(make_trace(walk)).all()

    def test_discrete_states(self):
        model = BacktrackModel(MultiCategorical([4, 4]), 2, num_cells=(8,), delta_support=CELLS)
        support = CellSupport(model).fit(
            TensorDict({"observation": torch.tensor([[0, 0], [0, 1]])}, [2])
        )
        walk = torch.tensor([[0, 0], [1, 1], [0, 1], [3, 3]])
        assert InSupport(support)(make_trace(walk)).tolist() == [False, False, True]

    def test_refusals(self):
        with pytest.raises(TypeError, match="support must be callable"):
            InSupport([])  # pyright: ignore
        trace = make_trace(random_walks(5))
        with pytest.raises(ValueError, match=r"support gave torch.bool of shape \(5,\)"):
            InSupport(lambda data: torch.ones(5, dtype=torch.bool))(trace)
        with pytest.raises(RuntimeError, match="call fit"):
            InSupport(DataSupport())(trace)
